"""Fields of vLLM's that change what an answer holds or what the model reads, and the operator's defaults."""

import json
from dataclasses import replace
from typing import Any

import pytest
from transformers import GenerationConfig

from scripted import EOS, TOKENIZER, ScriptedEngine, event, ids, in_memory, say
from tiny import tiny_base
from trimtab.errors import UnsupportedModel
from trimtab.server.defaults import sampling_defaults
from trimtab.server.engine.event import Event
from trimtab.server.engine.request import Request

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
CHAT_IDS = ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def chunks_of(text: str) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]


def answered(path: str, engine: ScriptedEngine, **body: Any) -> Any:
    with in_memory(engine) as ask:
        response = ask("POST", path, json=(CHAT if path == CHAT_PATH else {"prompt": "ab"}) | body)
    assert response.status_code == 200, response.text
    return chunks_of(response.text) if body.get("stream") else response.json()


@pytest.mark.parametrize("echo", [False, True])
def test_completions_tell_their_ids_on_request(echo: bool) -> None:
    body = {"prompt": ["ab", "c"], "n": 2, "return_token_ids": True, "echo": echo, "stop": "y"}
    whole = answered(TEXT_PATH, ScriptedEngine(say("xyz")), **body)
    prompts = [ids("ab")] * 2 + [ids("c")] * 2
    assert [choice["prompt_token_ids"] for choice in whole["choices"]] == prompts
    assert all(choice["token_ids"] == ids("xy") for choice in whole["choices"]), "what was sampled, shown or not"
    chunks = answered(TEXT_PATH, ScriptedEngine(say("xyz")), stream=True, **body)
    for index, prompt in enumerate(prompts):
        pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [piece["prompt_token_ids"] for piece in pieces if "prompt_token_ids" in piece] == [prompt]
        assert pieces[0]["prompt_token_ids"] == prompt
        assert [token for piece in pieces for token in piece.get("token_ids", [])] == ids("xy")


def test_chats_tell_their_ids_on_request() -> None:
    whole = answered(CHAT_PATH, ScriptedEngine(say("é")), return_token_ids=True)
    assert whole["prompt_token_ids"] == CHAT_IDS
    assert whole["choices"][0]["token_ids"] == [*ids("é"), EOS], "half characters and the end are tokens too"
    chunks = answered(CHAT_PATH, ScriptedEngine(say("é")), return_token_ids=True, stream=True)
    assert [chunk["prompt_token_ids"] for chunk in chunks if "prompt_token_ids" in chunk] == [CHAT_IDS]
    assert chunks[0]["prompt_token_ids"] == CHAT_IDS
    assert [t for chunk in chunks for t in chunk["choices"][0].get("token_ids", [])] == [*ids("é"), EOS]
    assert "prompt_token_ids" not in answered(CHAT_PATH, ScriptedEngine(say("é")))


def test_tokens_of_logprobs_may_be_ids() -> None:
    body = {"return_tokens_as_token_ids": True}
    logprobs = answered(TEXT_PATH, ScriptedEngine(say("a")), logprobs=1, **body)["choices"][0]["logprobs"]
    token = ids("a")[0]
    assert logprobs["tokens"] == [f"token_id:{token}"]
    assert logprobs["top_logprobs"] == [{f"token_id:{token}": -1.0}]
    chat = answered(CHAT_PATH, ScriptedEngine(say("a")), logprobs=True, top_logprobs=2, **body)
    (entry,) = chat["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == (f"token_id:{token}", list(b"a"))
    assert entry["top_logprobs"][1]["token"] == f"token_id:{token + 1}"


@pytest.mark.parametrize(
    ("keep", "max_tokens", "left"),
    [(3, 1, 3), (500, 1, None), (-1, 20, 180), (-1, 1000, 1), (-1, None, None)],
)
def test_a_prompt_may_be_cut_to_its_end(keep: int, max_tokens: int | None, left: int | None) -> None:
    engine = ScriptedEngine(say("z"))
    prompt = [1 + i % 200 for i in range(190 if left is None else 400)]
    expected = 184 if max_tokens is None else left  # completions want 16 tokens unless they say
    body = {"prompt": prompt, "max_tokens": max_tokens, "truncate_prompt_tokens": keep, "echo": True}
    told = answered(TEXT_PATH, engine, **body)
    read = engine.requests[0].prompt
    assert read == tuple(prompt if expected is None else prompt[-expected:])
    assert told["choices"][0]["text"] == TOKENIZER.decode(read) + "z"


@pytest.mark.parametrize(("keep", "max_tokens", "kept"), [(3, 1, 3), (500, 1, 190), (-1, 20, 180)])
def test_or_to_its_beginning(keep: int, max_tokens: int, kept: int) -> None:
    engine = ScriptedEngine(say("z"))
    prompt = [1 + i % 200 for i in range(190)]
    body = {"prompt": prompt, "max_tokens": max_tokens, "truncate_prompt_tokens": keep, "truncation_side": "right"}
    answered(TEXT_PATH, engine, **body)
    assert engine.requests[0].prompt == tuple(prompt[:kept])


@pytest.mark.parametrize("letter", ["x", "é"])
def test_of_a_text_far_too_long_the_beginning_is_read(letter: str) -> None:
    engine = ScriptedEngine(say("z"))
    text = "begun" + letter * 5000
    cut = {"truncate_prompt_tokens": 40, "truncation_side": "right"}
    answered(TEXT_PATH, engine, prompt=text, **cut)
    answered(CHAT_PATH, engine, messages=[{"role": "user", "content": text}], **cut)
    plain, chat = (request.prompt for request in engine.requests)
    assert list(plain) == ids(text)[:40]
    assert list(chat) == ids(f"<|im_start|>user\n{text}")[:40]


@pytest.mark.parametrize("letter", ["x", "é"])  # of two bytes: it may be cut in half
def test_of_a_text_far_too_long_the_end_is_read(letter: str) -> None:
    engine = ScriptedEngine(say("z"))
    text = letter * 5000 + "end"
    answered(TEXT_PATH, engine, prompt=text, truncate_prompt_tokens=11)
    answered(CHAT_PATH, engine, messages=[{"role": "user", "content": text}], truncate_prompt_tokens=60)
    plain, chat = (request.prompt for request in engine.requests)
    assert list(plain) == ids(text)[-11:]
    assert len(chat) == 60
    assert "end<|im_end|>" in TOKENIZER.decode(chat)
    with in_memory(engine) as ask:
        for body in ({"prompt": text, "truncate_prompt_tokens": 5000}, {"prompt": text}):
            error = ask("POST", TEXT_PATH, json=body).json()["error"]
            assert error["code"] == "context_length_exceeded"


def test_a_chat_may_be_cut_too() -> None:
    engine = ScriptedEngine(say("z"))
    told = answered(CHAT_PATH, engine, truncate_prompt_tokens=5)
    assert list(engine.requests[0].prompt) == CHAT_IDS[-5:]
    assert told["usage"]["prompt_tokens"] == 5


def test_documents_and_effort_reach_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ documents[0].text }}|{{ reasoning_effort }}|{{ messages[0].content }}"
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    engine = ScriptedEngine(say("z"))
    answered(CHAT_PATH, engine, documents=[{"title": "t", "text": "D"}], reasoning_effort="high")
    assert TOKENIZER.decode(engine.requests[0].prompt) == "D|high|hi"
    with in_memory(engine) as ask:
        ask("POST", "/v1/responses", json={"input": "hi", "reasoning": {"effort": "low"}, "documents": [{"text": "E"}]})
    assert TOKENIZER.decode(engine.requests[1].prompt) == "E|low|hi"


@pytest.mark.parametrize("trusted", [False, True])
def test_a_requests_own_template_needs_the_operators_leave(trusted: bool) -> None:
    engine = ScriptedEngine(say("z"))
    with in_memory(engine, trust_templates=trusted) as ask:
        response = ask("POST", CHAT_PATH, json=CHAT | {"chat_template": "[{{ messages[0].content }}]"})
    if trusted:
        assert TOKENIZER.decode(engine.requests[0].prompt) == "[hi]"
    else:
        assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template")


@pytest.mark.parametrize("path", [CHAT_PATH, TEXT_PATH])
def test_what_an_answer_does_not_depend_on_is_accepted(path: str) -> None:
    harmless = {
        "user": "u",
        "seed": 1,
        "best_of": 1,
        "suffix": "",
        "metadata": {"a": "b"},
        "store": True,
        "priority": 3,
    }
    answered(path, ScriptedEngine(say("a")), **harmless, reasoning_effort="low", service_tier="flex")


def test_ids_without_a_text_do_not_break_an_echo() -> None:
    """Which of them the model has, the engine says."""
    with in_memory(ScriptedEngine(say("z"))) as ask:
        response = ask("POST", TEXT_PATH, json={"prompt": [-1, *ids("a"), 2**40], "echo": True})
    assert response.json()["choices"][0]["text"] == "az"


# What stopped a choice


@pytest.mark.parametrize("path", [CHAT_PATH, TEXT_PATH])
@pytest.mark.parametrize(
    ("body", "reason", "text"),
    [
        ({"stop": ["c", "b"]}, "b", "a"),
        ({"stop": "b", "include_stop_str_in_output": True}, "b", "ab"),
        ({"stop_token_ids": ids("c")}, ids("c")[0], "ab"),
        ({"stop_token_ids": ids("c"), "include_stop_str_in_output": True}, ids("c")[0], "abc"),
        ({}, None, "abcd"),
        ({"include_stop_str_in_output": True}, None, "abcd"),
    ],
)
def test_what_stopped_a_choice_is_told_whole_and_streamed(path: str, body: Any, reason: Any, text: str) -> None:
    def script(request: Request, index: int) -> list[Event]:
        """As the engine: it ends with a token that stops it."""
        events = list(say("abcd")(request, index))
        stopped = next((i for i, one in enumerate(events) if one.token in request.sampling.stop_token_ids), None)
        return events if stopped is None else [*events[:stopped], replace(events[stopped], finish="stop")]

    (whole,) = answered(path, ScriptedEngine(script), **body)["choices"]
    assert (whole["stop_reason"], whole["finish_reason"]) == (reason, "stop")
    assert (whole["message"]["content"] if path == CHAT_PATH else whole["text"]) == text
    chunks = [chunk["choices"][0] for chunk in answered(path, ScriptedEngine(script), stream=True, **body)]
    pieces = [chunk["delta"].get("content", "") if path == CHAT_PATH else chunk["text"] for chunk in chunks]
    assert "".join(pieces) == text
    assert (chunks[-1]["stop_reason"], chunks[-1]["finish_reason"]) == (reason, "stop")
    assert not any("stop_reason" in chunk for chunk in chunks[:-1])


# What holds where a request is silent


def test_defaults_hold_where_a_request_is_silent() -> None:
    engine = ScriptedEngine(say("a"))
    with in_memory(engine, defaults={"temperature": 0.25, "top_k": 7, "max_tokens": 40}) as ask:
        ask("POST", CHAT_PATH, json=CHAT)
        ask("POST", CHAT_PATH, json=CHAT | {"temperature": 1, "max_tokens": 5})
        answer = ask("POST", "/v1/responses", json={"input": "hi"}).json()
    silent, said, _ = (request.sampling for request in engine.requests)
    assert (silent.temperature, silent.top_k, silent.max_tokens) == (0.25, 7, 40)
    assert (said.temperature, said.top_k, said.max_tokens) == (1, 7, 5)
    assert answer["temperature"] == 0.25, "it is told"


def test_a_models_own_defaults_are_read_and_checked() -> None:
    base = tiny_base()
    assert sampling_defaults(base) == {}
    base.model.generation_config = GenerationConfig(
        temperature=0.5, top_k=3, top_p=0.5, max_new_tokens=9, do_sample=True
    )
    assert sampling_defaults(base) == {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "max_tokens": 9}
    base.model.generation_config = GenerationConfig(temperature=-1.0, do_sample=True)
    with pytest.raises(UnsupportedModel, match="temperature"):
        sampling_defaults(base)


# A clamp is not a refusal


def test_a_max_tokens_beyond_the_room_is_not_refused() -> None:
    def to_the_end(request: Request, index: int) -> list[Event]:
        return [event(request, index, ids("a")[0], finish="length")]

    told = answered(CHAT_PATH, ScriptedEngine(to_the_end), max_tokens=100_000)
    assert told["choices"][0]["finish_reason"] == "length"
