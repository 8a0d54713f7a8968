"""The wire: what callers of each route see, streaming or not, when all is well and when it is not."""

import asyncio
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from browser import PacedEngine
from scripted import (
    EOS,
    RECEIPT,
    TOKENIZER,
    ScriptedEngine,
    event,
    ids,
    in_memory,
    loopback,
    say,
    scripted_app,
    scripted_bank,
)
from trimtab.errors import ContextOverflow, EngineFailure, InvalidRequest, Overloaded
from trimtab.server.drain import Lifecycle
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Budget, Request
from trimtab.server.front_door import MAX_BODY
from trimtab.server.prompt import Prompter
from trimtab.server.tickets import Ticket
from trimtab.steering.folder import version_of

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"


def chat(script: Any = None, **body: Any) -> httpx.Response:
    with in_memory(ScriptedEngine(script or say("Hello 😀!"))) as ask:
        return ask("POST", CHAT_PATH, json=CHAT | body)


def complete(script: Any = None, **body: Any) -> httpx.Response:
    with in_memory(ScriptedEngine(script or say("Hello 😀!"))) as ask:
        return ask("POST", TEXT_PATH, json={"prompt": "ab"} | body)


def events_of(response: httpx.Response) -> list[Any]:
    """The data of a stream's events, parsed; the last must be [DONE]."""
    assert response.status_code == 200, response.text
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


# Whole answers


def test_a_chat() -> None:
    answer = chat().json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny"
    assert answer["system_fingerprint"] == "fp_0123456789ab"
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "Hello 😀!"
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    prompt = len(ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"))
    usage = {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}
    assert answer["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 3}}


def test_a_completion() -> None:
    answer = complete(say("abc", end="length")).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == "abc"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == 2


def test_a_rendered_chat_is_tokenised_as_it_stands() -> None:
    engine = ScriptedEngine(say("x"))
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    with in_memory(engine) as ask:
        ask("POST", CHAT_PATH, json={"messages": messages})
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert engine.requests[0].prompt == tuple(ids(text))


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [ids("ab")]),
        ([5, 6], [[5, 6]]),
        (["a", "bc"], [ids("a"), ids("bc")]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_prompts_come_in_four_forms(prompt: Any, prompts: list[list[int]]) -> None:
    engine = ScriptedEngine(say("x"))
    with in_memory(engine) as ask:
        answer = ask("POST", TEXT_PATH, json={"prompt": prompt, "n": 2}).json()
    assert [list(request.prompt) for request in engine.requests] == prompts
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(prompts)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts)), "n does not count a prompt again"
    assert answer["usage"]["completion_tokens"] == 2 * 2 * len(prompts)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3 * len(prompts)


def test_sampling_reaches_the_engine_and_null_is_unset() -> None:
    engine = ScriptedEngine(say("x"))
    body = {"temperature": None, "top_k": -1, "seed": 7, "logit_bias": {"5": -100}, "max_completion_tokens": 9}
    with in_memory(engine) as ask:
        ask("POST", CHAT_PATH, json=CHAT | body)
        ask("POST", TEXT_PATH, json={"prompt": "a"})
    sampling, text_sampling = (request.sampling for request in engine.requests)
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (1.0, 0, 7)
    assert (sampling.logit_bias, sampling.max_tokens) == ({5: -100.0}, 9)
    assert text_sampling.max_tokens == 16, "OpenAI's default for completions"


def test_echo_repeats_the_prompt_before_the_answer() -> None:
    assert complete(say("cd"), echo=True).json()["choices"][0]["text"] == "abcd"
    assert complete(say("cd"), echo=True, prompt=ids("xy")).json()["choices"][0]["text"] == "xycd"
    chunks = events_of(complete(say("cd"), echo=True, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcd"


# Log-probabilities


def test_chat_logprobs_are_complete_and_their_bytes_are_the_content() -> None:
    choice = chat(logprobs=True, top_logprobs=3).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert bytes(b for entry in entries for b in entry["bytes"]).decode() == choice["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 3 for entry in entries)
    assert all(entry["logprob"] == -1.0 for entry in entries)


def test_completion_logprobs_hold_the_sampled_token_with_the_same_number() -> None:
    logprobs = complete(logprobs=2).json()["choices"][0]["logprobs"]
    text = "Hello 😀!"
    assert len(logprobs["tokens"]) == len(text.encode())
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 7]
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob


def test_infinite_logprobs_are_numbers_in_json() -> None:
    def script(request: Request, index: int) -> list[Event]:
        return [event(request, index, 65, logprob=float("-inf"), finish="length")]

    entry = chat(script, logprobs=True).json()["choices"][0]["logprobs"]["content"][0]
    assert entry["logprob"] == -9999.0


# Streams


def test_a_chat_stream_is_shaped_like_openais() -> None:
    response = chat(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-accel-buffering"] == "no"
    *chunks, last = events_of(response)
    assert {(c["id"], c["created"], c["model"], c["object"]) for c in chunks} == {
        (last["id"], last["created"], "tiny", "chat.completion.chunk")
    }
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in c["choices"][0]["delta"] for c in chunks[1:])
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Hello 😀!"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert all(c["usage"] is None for c in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("ask", [chat, complete])
def test_usage_so_far_comes_with_every_chunk_on_request(ask: Callable[..., httpx.Response]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events_of(ask(say("abc"), stream=True, n=2, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert all(chunk["usage"]["prompt_tokens"] == last["usage"]["prompt_tokens"] for chunk in chunks)
    assert chunks[-1]["usage"] == last["usage"]
    assert last["usage"]["completion_tokens"] == 8
    alone = events_of(ask(stream=True, stream_options=options | {"include_usage": False}))
    assert all("usage" not in chunk for chunk in alone), "as with vLLM"


@pytest.mark.parametrize("ask", [chat, complete])
def test_without_include_usage_every_chunk_has_a_choice(ask: Callable[..., httpx.Response]) -> None:
    chunks = events_of(ask(stream=True))
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("stop", [None, "ö", "lo 😀", ["x", "wörld"]])
@pytest.mark.parametrize("ask", [chat, complete])
def test_a_stream_adds_up_to_the_whole_answer(ask: Callable[..., httpx.Response], stop: Any) -> None:
    body = {"stop": stop, "n": 2, "logprobs": True if ask is chat else 1, "steering": {"report": "tokens"}}
    whole = ask(say("Hello 😀 wörld!"), **body).json()
    chunks = [chunk["choices"][0] for chunk in events_of(ask(say("Hello 😀 wörld!"), stream=True, **body))]
    for index in range(2):
        pieces, expected = [c for c in chunks if c["index"] == index], whole["choices"][index]
        texts = [c["delta"].get("content", "") if ask is chat else c["text"] for c in pieces]
        assert "".join(texts) == (expected["message"]["content"] if ask is chat else expected["text"])
        assert pieces[-1]["finish_reason"] == expected["finish_reason"]
        key = "content" if ask is chat else "tokens"
        entries = [entry for c in pieces if c["logprobs"] for entry in c["logprobs"][key]]
        assert entries == expected["logprobs"][key]
        receipts = [receipt for c in pieces for receipt in c.get("steering", {}).get("tokens", [])]
        assert receipts == expected["steering"].pop("tokens")
        assert pieces[-1]["steering"] == expected["steering"]


def test_a_stop_string_ends_one_choice_and_the_engines_work_on_it() -> None:
    def endless(request: Request, index: int) -> list[Event]:
        return [event(request, index, token) for token in ids("one. two. three")]

    engine = ScriptedEngine(endless)
    with in_memory(engine) as ask:
        answer = ask("POST", TEXT_PATH, json={"prompt": "a", "stop": ". ", "n": 2}).json()
    assert [(c["text"], c["finish_reason"]) for c in answer["choices"]] == [("one", "stop")] * 2
    assert answer["usage"]["completion_tokens"] == 2 * len("one. ")
    assert sorted(index for _, index in engine.aborted) == [0, 1]


def test_a_silent_stream_is_kept_alive() -> None:
    engine = ScriptedEngine(lambda request, index: [])
    with in_memory(engine, keep_alive=0.001) as ask:
        answered: list[int] = []

        def answer_later(*_: Any) -> None:
            answered.append(1)
            if len(answered) == 5:
                engine.on_events([event(engine.requests[0], 0, EOS, finish="stop")])

        stats = engine.stats
        engine.stats = lambda: answer_later() or stats()  # type: ignore[method-assign,func-returns-value]
        text = ask("POST", CHAT_PATH, json=CHAT | {"stream": True}).text
    assert text.startswith(": keep-alive\n\n: keep-alive\n\n")
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(("path", "body"), [(CHAT_PATH, CHAT), ("/v1/responses", {"input": "x"})])
def test_a_stream_that_holds_its_text_back_is_kept_alive(path: str, body: dict[str, Any]) -> None:
    """The engine goes on, and nothing may be shown: it could be a stop string."""
    text = "a" * 40

    def ask_with(keep_alive: float) -> str:
        engine = PacedEngine(say(text), pace=0.01)
        with loopback(scripted_app(engine, keep_alive=keep_alive), engine) as url:
            return httpx.post(f"{url}{path}", json=body | {"stream": True, "stop": text + "b"}, trust_env=False).text

    assert ": keep-alive" in ask_with(0.05)
    assert ": keep-alive" not in ask_with(60.0)


@pytest.mark.parametrize(("path", "body"), [(CHAT_PATH, CHAT), ("/v1/responses", {"input": "x"})])
@pytest.mark.parametrize("stream", [False, True])
def test_silence_counts_from_what_was_sent_last(
    path: str, body: dict[str, Any], stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from the last step, which may have brought nothing that could be shown. An answer in one piece hears late."""
    waits: list[float] = []
    following = Ticket.next

    async def watched(ticket: Ticket, timeout: float) -> list[Event]:
        waits.append(timeout)
        return await following(ticket, timeout)

    monkeypatch.setattr(Ticket, "next", watched)
    text = "a" * 20
    engine = PacedEngine(say(text), pace=0.01)
    with loopback(scripted_app(engine, keep_alive=60.0), engine) as url:
        httpx.post(f"{url}{path}", json=body | {"stream": stream, "stop": text + "b"}, trust_env=False)
    if stream:
        held = waits[1:]  # the first step may have brought the role
        assert held == sorted(held, reverse=True)
        assert held[-1] < held[0] < 60
    else:
        assert set(waits) == {60.0}


# Steering


def test_naming_a_correction_steers_and_the_summary_says_so() -> None:
    engine = ScriptedEngine(say("abc"))
    with in_memory(engine) as ask:
        answer = ask("POST", CHAT_PATH, json=CHAT | {"model": "brief"}).json()
    assert answer["model"] == "brief"
    assert engine.requests[0].steering.correction == "brief"
    assert answer["choices"][0]["steering"] == {
        "correction": "brief",
        "version": version_of(scripted_bank().get("brief")),
        "mode": "apply",
        "strength": 1.25,
        "gate": "entropy",
        "tau": 0.75,
        "ceiling": None,
        "steps": 4,
        "open": 4,
        "fired": 4,
        "flips": 4,
        "mean_entropy": 1.5,
        "kl": 0.125,
    }


def test_steering_in_the_body_refines_it() -> None:
    engine = ScriptedEngine(say("a"))
    steering = {"correction": "polite", "strength": 2, "tau": 0.1, "mode": "shadow", "report": "tokens"}
    with in_memory(engine) as ask:
        answer = ask("POST", TEXT_PATH, json={"prompt": "a", "model": "tiny", "steering": steering}).json()
    asked = engine.requests[0].steering
    assert (asked.correction, asked.strength, asked.tau, asked.mode) == ("polite", 2, 0.1, "shadow")
    told = answer["choices"][0]["steering"]
    assert (told["mode"], told["strength"], told["tau"]) == ("shadow", 2, 0.1)
    assert told["tokens"][0] == {
        "token": "a",
        "token_id": ids("a")[0],
        "entropy": RECEIPT.entropy,
        "open": True,
        "fired": True,
        "flip": True,
        "base_token": "b",
        "base_token_id": 65,
        "steered_token": "c",
        "steered_token_id": 66,
        "base_logprob": -2.0,
        "steered_logprob": -1.0,
        "base_token_logprob": -0.5,
        "steered_token_logprob": -0.25,
        "statistic": 1.5,
        "kl": 0.125,
        "strength": 1.25,
    }
    assert [receipt["token"] for receipt in told["tokens"]] == ["a", "<|im_end|>"]


def steering_of(steering: dict[str, Any], path: str = TEXT_PATH, **body: Any) -> tuple[Request, dict[str, Any]]:
    """What the engine is asked, and what the answer says of it."""
    engine = ScriptedEngine(say("a"))
    subject = CHAT if path == CHAT_PATH else {"prompt": "ab"}
    with in_memory(engine) as ask:
        answer = ask("POST", path, json=subject | body | {"steering": steering})
    assert answer.status_code == 200, answer.text
    return engine.requests[0], answer.json()["choices"][0]["steering"]


def test_corrections_act_together_with_weights() -> None:
    request, told = steering_of({"corrections": {"polite": 0.5, "brief": -2}, "strength": 2})
    asked = request.steering
    assert (asked.correction, asked.weight, asked.also, asked.strength) == ("polite", 0.5, {"brief": -2.0}, 2)
    assert (told["correction"], told["corrections"]) == ("polite", {"polite": 0.5, "brief": -2.0})
    assert told["versions"] == {name: version_of(scripted_bank().get(name)) for name in ("polite", "brief")}
    request, _ = steering_of({"corrections": {"polite": 1, "brief": 1}}, model="brief")
    assert request.steering.correction == "polite"


@pytest.mark.parametrize(
    ("steering", "gate"),
    [
        ({"correction": "polite", "rate": 0.25}, ("entropy", 1.5, None)),
        ({"correction": "polite", "tau": 0.5, "ceiling": 2}, ("entropy", 0.5, 2.0)),
        ({"correction": "brief", "gate": "margin", "tau": -0.1}, ("margin", -0.1, None)),
        ({"correction": "brief", "gate": "random", "rate": 0.25}, ("random", 0.75, None)),
        ({"correction": "tuned", "gate": "always"}, ("always", None, None)),
    ],
)
def test_the_gate_is_chosen_and_told(steering: dict[str, Any], gate: Any) -> None:
    request, told = steering_of(steering)
    assert (told["gate"], told["tau"], told["ceiling"]) == gate
    asked = {"gate": None, "tau": None, "ceiling": None, "rate": None} | steering
    assert {name: getattr(request.steering, name) for name in asked} == asked


def test_a_budget_reaches_the_engine() -> None:
    budget = {"max_steps": 5, "max_share": 0.5, "cooldown": 2, "kl": 0.25, "until": "####", "spans": [["<a>", "</a>"]]}
    request, _ = steering_of({"correction": "brief", "budget": budget})
    assert request.steering.budget == Budget(**budget | {"spans": (("<a>", "</a>"),)})
    request, _ = steering_of({"correction": "brief", "budget": {"until": None, "spans": []}})
    assert request.steering.budget == Budget(spans=())
    request, _ = steering_of({"correction": "brief"})
    assert request.steering.budget == Budget()


@pytest.mark.parametrize(("negative", "read"), [(None, ""), ("", ""), ("be dull", "be dull")])
def test_a_contrasts_companion_reads_another_last_message(negative: str | None, read: str) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "two"},
    ]
    steering = {"correction": "contrast"} | ({} if negative is None else {"negative_prompt": negative})
    request, told = steering_of(steering, CHAT_PATH, messages=messages)
    decoded = TOKENIZER.decode(request.steering.companion_prompt)
    assert decoded == str(TOKENIZER.decode(request.prompt)).replace("user\ntwo", f"user\n{read}")
    assert (told["correction"], told["strength"], told["tau"]) == ("contrast", 0.5, 0.5)


def test_a_completions_companion_reads_the_negative_prompt_or_the_prompts_last_token() -> None:
    request, _ = steering_of({"negative_prompt": "xyz"}, model="contrast")
    assert request.steering.companion_prompt == tuple(ids("xyz"))
    engine = ScriptedEngine(say("a"))
    with in_memory(engine) as ask:
        ask("POST", TEXT_PATH, json={"prompt": ["abc", "de"], "model": "contrast"})
    assert [r.steering.companion_prompt for r in engine.requests] == [tuple(ids("c")), tuple(ids("e"))]
    off, _ = steering_of({"mode": "off"}, model="contrast")
    assert off.steering.companion_prompt is None


def test_off_needs_no_correction() -> None:
    assert chat(steering={"mode": "off"}).json()["choices"][0]["steering"]["mode"] == "off"


def test_report_none_says_nothing_and_the_base_alone_reports_its_entropy() -> None:
    assert "steering" not in chat(steering={"report": "none"}).json()["choices"][0]
    summary = chat().json()["choices"][0]["steering"]
    assert (summary["correction"], summary["mode"], summary["strength"], summary["tau"]) == (None, "off", None, None)
    assert summary["mean_entropy"] == 1.5


# Errors


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty"),
        ({"repetition_penalty": 0.009}, "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a" * 1025]}, "stop"),
        ({"bad_words": ["a" * 1025]}, "bad_words"),
        ({"stop": ""}, "stop"),
        ({"stop": 5}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None, "audio": {"id": "a"}}]}, "messages[0].audio"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"stop_token_ids": list(range(257))}, "stop_token_ids"),
        ({"bad_words": ["x"] * 513}, "bad_words"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"best_of": 3}, "best_of"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"prediction": {"type": "content", "content": "a"}}, "prediction"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"steering": {"strength": 1000, "correction": "brief"}}, "steering.strength"),
        ({"steering": {"strength": 1}}, "steering.strength"),
        ({"steering": {"mode": "shadow"}}, "steering.mode"),
        ({"steering": {"mode": "apply"}}, "steering.mode"),
        ({"stream": True, "stream_options": {"include_obfuscation": 2}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"steering": {"mode": "on"}}, "steering.mode"),
        ({"steering": {"strenght": 1}}, "steering.strenght"),
        ({"steering": {"report": "all"}}, "steering.report"),
        ({"steering": {"gate": "margin"}}, "steering.gate"),
        ({"steering": {"rate": 0.5}}, "steering.rate"),
        ({"steering": {"budget": {}}}, "steering.budget"),
        ({"steering": {"negative_prompt": "x"}}, "steering.negative_prompt"),
        ({"steering": {"correction": "brief", "gate": "loud"}}, "steering.gate"),
        ({"steering": {"correction": "brief", "gate": "margin"}}, "steering.gate"),
        ({"steering": {"correction": "brief", "rate": 0.5}}, "steering.rate"),
        ({"steering": {"correction": "polite", "rate": 0.5, "tau": 1}}, "steering.rate"),
        ({"steering": {"correction": "brief", "ceiling": 0.5}}, "steering.ceiling"),
        ({"steering": {"correction": "brief", "negative_prompt": "x"}}, "steering.negative_prompt"),
        ({"steering": {"correction": "brief", "budget": {"max_share": 2}}}, "steering.budget.max_share"),
        ({"steering": {"correction": "brief", "budget": {"max_stpes": 2}}}, "steering.budget.max_stpes"),
        ({"steering": {"correction": "brief", "budget": {"spans": [["a"]]}}}, "steering.budget.spans[0][1]"),
        ({"steering": {"correction": "brief", "budget": {"spans": [["a", "b"]] * 65}}}, "steering.budget.spans"),
        ({"steering": {"correction": "brief", "corrections": {"polite": 1}}}, "steering.corrections"),
        ({"steering": {"corrections": {}}}, "steering.corrections"),
        ({"steering": {"corrections": {"polite": 101}}}, "steering.corrections.polite"),
        ({"steering": {"corrections": {"polite": 1, "brief": -101}}}, "steering.corrections.brief"),
        ({"steering": {"corrections": {"polite": 1, "tuned": 1}}}, "steering.corrections"),
        ({"model": "brief", "steering": {"corrections": {"polite": 1}}}, "steering.corrections"),
        ({"model": "contrast", "messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"model": "contrast", "steering": {"negative_prompt": "x" * 190}}, "steering.negative_prompt"),
        ({"model": "brief", "steering": {"correction": "polite"}}, "steering.correction"),
    ],
)
def test_a_bad_value_is_a_400_that_names_the_field(body: dict[str, Any], param: str) -> None:
    response = chat(**body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[0].split("[")[0] in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
    ],
)
def test_a_bad_completion_is_a_400_that_names_the_field(body: dict[str, Any], param: str) -> None:
    response = complete(**body)
    assert (response.status_code, error_of(response)["param"]) == (400, param)


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b'{"messages": [{"role": "user", "content": "\\ud800"}]}'])
def test_a_body_that_is_no_request_is_a_400(content: bytes) -> None:
    with in_memory(ScriptedEngine(say("x"))) as ask:
        response = ask("POST", CHAT_PATH, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "field", "code"),
    [
        ({"model": "gpt-4"}, "model", "model_not_found"),
        ({"steering": {"correction": "nobody"}}, "steering.correction", "correction_not_found"),
        ({"steering": {"corrections": {"brief": 1, "nobody": 1}}}, "steering.corrections", "correction_not_found"),
    ],
)
def test_an_unknown_model_or_correction_is_a_404_that_names_the_field(body: Any, field: str, code: str) -> None:
    response = chat(**body)
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (404, field, code)


def test_a_batch_that_can_never_be_taken_is_a_400_before_it_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prompter, "text", lambda *_: pytest.fail("it was tokenised"))
    with in_memory(ScriptedEngine(say("x"))) as ask:
        response = ask("POST", TEXT_PATH, json={"prompt": ["a"] * 65})
    assert (response.status_code, error_of(response)["param"]) == (400, "prompt")


def test_a_batch_of_more_text_than_may_ever_wait_is_a_400() -> None:
    engine = ScriptedEngine(say("x"))
    engine.queue_tokens = 5
    with in_memory(engine) as ask:
        refused = ask("POST", TEXT_PATH, json={"prompt": ["abc", "def"]})
        taken = [ask("POST", TEXT_PATH, json={"prompt": prompt}).status_code for prompt in ("abcdef", ["abc", "de"])]
    assert (refused.status_code, error_of(refused)["param"]) == (400, "prompt")
    assert taken == [200, 200], "one prompt alone may always wait"


def test_ids_that_cannot_fit_are_a_400_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prompter, "decode", lambda *_: pytest.fail("they were decoded"))
    response = complete(prompt=[1] * 300, echo=True)
    assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")


def test_a_text_that_cannot_fit_is_an_overflow_too() -> None:
    response = complete(prompt="x" * 10_000)
    assert (response.status_code, error_of(response)["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_a_413(announced: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(MAX_BODY // 2**20):
            yield b"x" * 2**20
        pytest.fail("all of it was read")

    content: Any = b"x" * (MAX_BODY + 1) if announced else pieces()
    with in_memory(ScriptedEngine(say("x"))) as ask:
        response = ask("POST", TEXT_PATH, content=content, headers={"content-type": "application/json"})
        assert ask("POST", TEXT_PATH, json={"prompt": "a"}).status_code == 200
    assert (response.status_code, error_of(response)["type"]) == (413, "invalid_request_error")
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(("path", "word"), [(CHAT_PATH, "messages"), (TEXT_PATH, "prompt")])
def test_an_overflow_is_a_400_with_both_lengths(path: str, word: str) -> None:
    long = "x" * 250
    with in_memory(ScriptedEngine(say("x"))) as ask:
        response = ask(
            "POST", path, json={"prompt": long, "messages": [{"role": "user", "content": long}], "max_tokens": 7}
        )
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", word)
    prompt = 250 if word == "prompt" else 250 + len(ids("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"))
    assert error["message"].startswith(
        f"This model's maximum context length is 200 tokens. However, you requested {prompt + 7} tokens "
        f"({prompt} in the {word}, 7 in the completion)"
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (Overloaded("full"), 503, "server_overloaded"),
        (ContextOverflow(10, 20, 1), 400, "context_length_exceeded"),
        (InvalidRequest("prompt holds a token id outside 0..5", "prompt"), 400, None),
        (EngineFailure("the engine is not running"), 500, "engine_failure"),
    ],
)
def test_what_the_engine_refuses_has_its_status_streaming_or_not(
    refusal: Exception, status: int, code: str | None, stream: bool
) -> None:
    with in_memory(ScriptedEngine(say("x"), refusal)) as ask:
        response = ask("POST", CHAT_PATH, json=CHAT | {"stream": stream})
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert response.headers.get("retry-after") == ("1" if status == 503 else None)


def failing(request: Request, index: int) -> list[Event]:
    return [event(request, index, ids("a")[0]), event(request, index, None, finish="error", error="NaN in the logits")]


def test_an_engine_failure_is_a_500_and_in_a_stream_an_event() -> None:
    response = chat(failing)
    assert (response.status_code, error_of(response)["message"]) == (500, "NaN in the logits")
    *chunks, last = events_of(chat(failing, stream=True))
    assert chunks[-1]["choices"][0]["delta"]["content"] == "a"
    assert last["error"]["message"] == "NaN in the logits"
    assert set(last["error"]) == {"message", "type", "param", "code"}


def test_our_own_bugs_are_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with in_memory(ScriptedEngine(say("x"), ZeroDivisionError("a secret"))) as ask:
        response = ask("POST", CHAT_PATH, json=CHAT)
    assert (response.status_code, error_of(response)["code"]) == (500, "internal_error")
    assert "a secret" not in response.text
    assert "a secret" in caplog.text
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", CHAT_PATH, 405), ("POST", f"{CHAT_PATH}/", 404)]
)
def test_wrong_paths_and_methods_have_the_envelope(method: str, path: str, status: int) -> None:
    with in_memory(ScriptedEngine(say("x"))) as ask:
        response = ask(method, path)
    assert response.status_code == status
    assert path in error_of(response)["message"]


def test_unknown_keys_are_accepted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with in_memory(ScriptedEngine(say("x"))) as ask:
        for _ in range(2):
            assert ask("POST", CHAT_PATH, json=CHAT | {"user": "u", "frobnicate": 1, "tools": []}).status_code == 200
    assert caplog.text.count("frobnicate") == 1
    assert "'user'" not in caplog.text


def test_a_body_of_many_unknown_keys_or_long_ones_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with in_memory(ScriptedEngine(say("x"))) as ask:
        for junk in ({"k" * 5000: 1}, {f"junk{i}": 1 for i in range(500)}, {f"more{i}": 1 for i in range(500)}):
            assert ask("POST", CHAT_PATH, json=CHAT | junk).status_code == 200
    assert "k" * 64 + "'" in caplog.text
    assert caplog.text.count("junk") == 99, "with the long one, a hundred"
    assert "more" not in caplog.text


def test_a_full_engine_is_told_before_the_work_on_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine(say("x"))
    engine.capacity = 3  # as many as its stats say are under way
    monkeypatch.setattr(Prompter, "_encode", None)
    with in_memory(engine) as ask:
        for path, body in ((CHAT_PATH, CHAT), ("/v1/completions", {"prompt": "a"}), ("/v1/responses", {"input": "a"})):
            refused = ask("POST", path, json=body)
            assert (refused.status_code, error_of(refused)["code"]) == (503, "server_overloaded")
            assert refused.headers["retry-after"] == "1"


# The other routes


@pytest.mark.parametrize("path", ["/v1/models/", "/v1//models"])
def test_a_slash_too_many_finds_the_models(path: str) -> None:
    with in_memory(ScriptedEngine(say("x"))) as ask:
        assert ask("GET", path).json() == ask("GET", "/v1/models").json()


def test_models_are_the_base_and_its_corrections() -> None:
    with in_memory(ScriptedEngine(say("x")), names=["tiny", "alias"]) as ask:
        listed = ask("GET", "/v1//models").json()["data"]
        one = ask("GET", "/v1/models/polite").json()
        missing = ask("GET", "/v1/models/none")
        unknown = ask("GET", "/v1/corrections/none")
        correction = ask("GET", "/v1/corrections/polite").json()
        tuned = ask("GET", "/v1/corrections/tuned").json()
        contrast = ask("GET", "/v1/corrections/contrast").json()
        aliased = ask("POST", CHAT_PATH, json=CHAT | {"model": "alias"}).json()
    assert [(m["id"], m["parent"]) for m in listed] == [
        ("tiny", None),
        ("alias", None),
        ("brief", "tiny"),
        ("polite", "tiny"),
        ("tuned", "tiny"),
        ("contrast", "tiny"),
    ]
    assert [m["tier"] for m in listed] == [None, None, "head", "head", "lora", "contrast"]
    assert one == listed[3]
    assert one["max_model_len"] == 200
    assert missing.status_code == 404
    assert error_of(missing)["code"] == "model_not_found"
    assert unknown.status_code == 404
    assert (error_of(unknown)["param"], error_of(unknown)["code"]) == ("correction", "correction_not_found")
    assert (correction["parent"], correction["tier"], correction["rank"]) == ("tiny", "head", 4)
    gate = {"kind": "entropy", "tau": 0.75, "ceiling": None, "calibration": [[0.125, 2.0], [0.375, 1.0]]}
    assert correction["gate"] == gate
    assert (tuned["tier"], tuned["rank"], tuned["layers"], tuned["parameters"]) == ("lora", 2, ["up_proj"], 48)
    assert (contrast["tier"], contrast["prompt"], contrast["strength"]) == ("contrast", "", 0.5)
    assert [c["slots"] for c in (correction, tuned, contrast)] == [1, 2, 2]
    assert aliased["model"] == "alias"


def test_health_follows_the_engine() -> None:
    engine = ScriptedEngine(say("x"))
    with in_memory(engine) as ask:
        assert ask("GET", "/health").status_code == 200
        assert 'trimtab:engine_up{model_name="tiny"} 1.0' in ask("GET", "/metrics").text
        engine.beat = 120.0
        assert ask("GET", "/health").status_code == 503
        assert 'trimtab:engine_up{model_name="tiny"} 0.0' in ask("GET", "/metrics").text
        engine.beat, engine.alive = 0.0, False
        assert ask("GET", "/health").status_code == 503


def test_ready_follows_the_engine_and_the_drain() -> None:
    engine, lifecycle = ScriptedEngine(say("x")), Lifecycle()
    with in_memory(engine, lifecycle=lifecycle, api_keys=["k"]) as ask:
        assert (ask("GET", "/ready").status_code, ask("GET", "/ready").json()) == (200, {"status": "ready"})
        engine.beat = 120.0
        assert ask("GET", "/ready").json() == {"status": "unhealthy"}
        engine.beat, lifecycle.draining = 0.0, True
        ready, refused = ask("GET", "/ready"), ask("POST", CHAT_PATH, json=CHAT, headers={"Authorization": "Bearer k"})
        assert ask("GET", "/health").status_code == 200
    assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
    assert (refused.status_code, error_of(refused)["code"]) == (503, "engine_stopped")
    assert (refused.headers["connection"], refused.headers["retry-after"]) == ("close", "1")
    assert not engine.requests


# Keys, ids, and clients that leave


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic k2"}, 401),
        ({"Authorization": "bearer k2"}, 200),
    ],
)
def test_keys_guard_v1(header: dict[str, str], status: int) -> None:
    with in_memory(ScriptedEngine(say("x")), api_keys=["k1", "k2"]) as ask:
        response = ask("GET", "/v1//models", headers=header)
        assert ask("GET", "/health").status_code == 200
        assert ask("GET", "/docs").status_code == 401
    assert response.status_code == status
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer"
        assert error_of(response)["code"] == "invalid_api_key"


def test_request_ids_are_echoed_or_made() -> None:
    with in_memory(ScriptedEngine(say("x"))) as ask:
        assert ask("GET", "/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
        made = [ask("GET", "/health", headers={"X-Request-Id": "a b"}).headers["x-request-id"] for _ in range(2)]
        streamed = ask("POST", CHAT_PATH, json=CHAT | {"stream": True}, headers={"X-Request-Id": "abc-2"})
    assert made[0] != made[1]
    assert all(request_id.startswith("req_") for request_id in made)
    assert streamed.headers["x-request-id"] == "abc-2"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_aborted(stream: bool) -> None:
    """In ASGI's own words: the body came, one token was sampled, then http.disconnect."""
    engine = ScriptedEngine(lambda request, index: [event(request, index, ids("a")[0])])
    body = json.dumps(CHAT | {"stream": stream}).encode()

    async def main() -> list[Any]:
        app = scripted_app(engine)
        left, sent = asyncio.Event(), []
        incoming = iter([{"type": "http.request", "body": body}])

        async def receive() -> Any:
            for message in incoming:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": CHAT_PATH,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        async with app.router.lifespan_context(app):
            task = asyncio.create_task(app(scope, receive, send))
            while not engine.requests:
                await asyncio.wait((task,), timeout=0.001)
            left.set()
            await task
        return sent

    sent = asyncio.run(main())
    assert engine.aborted == [(engine.requests[0].id, None)]
    assert sent[0]["status"] == (200 if stream else 499)


@pytest.mark.parametrize("stream", [False, True])
def test_a_socket_that_closes_is_aborted(stream: bool) -> None:
    submitted = threading.Event()

    def silence(request: Request, index: int) -> list[Event]:
        submitted.set()
        return []

    engine = ScriptedEngine(silence)
    with loopback(scripted_app(engine), engine) as url:
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps(CHAT | {"stream": stream}).encode()
        head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert submitted.wait(10)
        assert engine.after_abort.wait(10)


@pytest.mark.parametrize("stream", [False, True])
def test_what_outlasts_the_drain_is_told_so(stream: bool) -> None:
    submitted = threading.Event()

    def one_token(request: Request, index: int) -> list[Event]:
        submitted.set()
        return [event(request, index, ids("a")[0])]

    engine = ScriptedEngine(one_token)
    with ExitStack() as serving, ThreadPoolExecutor(1) as caller:
        url = serving.enter_context(loopback(scripted_app(engine), engine, drain=0.01))
        asked = caller.submit(httpx.post, f"{url}{CHAT_PATH}", json=CHAT | {"stream": stream})
        assert submitted.wait(10)
        serving.close()
        response = asked.result(10)
    if stream:
        assert events_of(response)[-1]["error"]["code"] == "engine_stopped"
    else:
        assert (response.status_code, error_of(response)["code"]) == (503, "engine_stopped")
