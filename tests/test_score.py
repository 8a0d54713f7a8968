"""Scored prompts over HTTP: echo with logprobs, prompt_logprobs, /v1/steering/score; a real engine on a tiny model."""

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from scripted import loopback
from tiny import tiny_correction
from trimtab.server import service
from trimtab.server.app import create_app
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.engine import Engine
from trimtab.server.engine.pieces import Pieces
from trimtab.server.model.base import Base
from trimtab.server.prompt_scores import find_offsets
from trimtab.steering.bank import Bank

TEXT = "Grüße, 🦊!"


@pytest.fixture(scope="module")
def ask(base: Base) -> Iterator[httpx.Client]:
    bank = Bank(base.hidden, "cpu")
    bank.add(tiny_correction(base, "brief", tau=2.2))
    engine = Engine(base, bank, EngineConfig(slots=4, step_tokens=16, max_model_len=64))
    with (
        loopback(create_app(engine, base, bank), engine) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def post(ask: httpx.Client, path: str, status: int = 200, **body: Any) -> Any:
    response = ask.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def complete(ask: httpx.Client, status: int = 200, **body: Any) -> Any:
    return post(ask, "/v1/completions", status, **{"prompt": TEXT, "temperature": 0, "ignore_eos": True} | body)


def likelihoods(base: Base, ids: list[int]) -> torch.Tensor:
    """log softmax of transformers' own float32 forward, [tokens, vocab]: row t predicts token t + 1."""
    base.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            logits: torch.Tensor = base.model(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        base.model.set_attn_implementation("trimtab")
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_tells_the_prompt_then_the_completion(ask: httpx.Client, base: Base, max_tokens: int) -> None:
    ids = base.tokenizer.encode(TEXT)
    plain = complete(ask, max_tokens=max_tokens or 1, logprobs=3)
    answer = complete(ask, max_tokens=max_tokens, logprobs=3, echo=True)
    (choice,), (alone,) = answer["choices"], plain["choices"]
    told = choice["logprobs"]
    count = len(ids) + max_tokens
    assert {key: len(values) for key, values in told.items()} == dict.fromkeys(told, count)
    assert choice["finish_reason"] == "length"
    assert choice["text"] == TEXT + (alone["text"] if max_tokens else "")
    assert answer["usage"]["completion_tokens"] == choice["steering"]["steps"] == max_tokens
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    expected = likelihoods(base, ids)
    for place, token in enumerate(ids[1:]):
        key, logprob, top = (told[name][place + 1] for name in ("tokens", "token_logprobs", "top_logprobs"))
        assert logprob == pytest.approx(float(expected[place, token]), abs=1e-4)
        assert top[key] == logprob, "the token's own entry is the identical float"
        assert max(top.values()) == pytest.approx(float(expected[place].max()), abs=1e-4)
        assert len(top) in (3, 4)
    if max_tokens:
        assert told["tokens"][len(ids) :] == alone["logprobs"]["tokens"]
        assert told["token_logprobs"][len(ids) :] == pytest.approx(alone["logprobs"]["token_logprobs"], abs=1e-4)
    offsets = [len(TEXT.encode()[:at].decode(errors="ignore")) for at in range(len(ids))]
    assert told["text_offset"][: len(ids)] == offsets
    assert told["text_offset"][len(ids) :] == [len(TEXT) + at for at in alone["logprobs"]["text_offset"]][:max_tokens]


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_a_stream_adds_up_to_the_whole(ask: httpx.Client, max_tokens: int) -> None:
    body = {"max_tokens": max_tokens, "logprobs": 2, "echo": True, "n": 2, "steering": {"correction": "brief"}}
    whole = complete(ask, **body)
    lines = ask.post(
        "/v1/completions", json={"prompt": TEXT, "temperature": 0, "ignore_eos": True, "stream": True} | body
    )
    chunks = [json.loads(line[6:]) for line in lines.text.splitlines() if line.startswith("data: {")]
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert mine[0]["text"] == TEXT
        assert mine[0]["logprobs"]["token_logprobs"][0] is None
        assert len(mine[0]["logprobs"]["tokens"]) == len(TEXT.encode())
        assert "".join(c["text"] for c in mine) == choice["text"]
        for key, values in choice["logprobs"].items():
            joined = [value for c in mine if c["logprobs"] for value in c["logprobs"][key]]
            if key == "token_logprobs":
                assert joined[1:] == pytest.approx(values[1:], abs=1e-4)
            elif key != "top_logprobs":
                assert joined == values
        assert mine[-1]["finish_reason"] == choice["finish_reason"]


def test_a_batch_of_ids_is_scored_prompt_by_prompt(ask: httpx.Client, base: Base) -> None:
    prompts = [[5], [65, 66, 67, 200], list(range(30))]
    answer = complete(ask, prompt=prompts, echo=True, logprobs=0, max_tokens=0)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        told = choice["logprobs"]
        assert choice["text"] == base.tokenizer.decode(prompt)
        assert len(told["tokens"]) == len(prompt)
        expected = likelihoods(base, prompt)
        assert told["token_logprobs"][1:] == pytest.approx(
            [float(expected[at, token]) for at, token in enumerate(prompt[1:])], abs=1e-4
        )
        assert told["top_logprobs"][1:] == [
            {key: value} for key, value in zip(told["tokens"][1:], told["token_logprobs"][1:], strict=True)
        ]
    assert answer["usage"] == {
        "prompt_tokens": 35,
        "completion_tokens": 0,
        "total_tokens": 35,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_token_that_ends_the_text_has_its_entry_after_the_prompts(ask: httpx.Client) -> None:
    """lm-eval leaves out the last entry, which it takes for the one token that it asked for."""
    for extra in ({}, {"stop_token_ids": [70], "logit_bias": {"70": 100}}):
        body = {"max_tokens": 1, "logprobs": 1, "echo": True, "ignore_eos": False, "logit_bias": {"256": 100}} | extra
        (choice,) = complete(ask, **body)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (TEXT, "stop")
        told = choice["logprobs"]
        assert [len(values) for values in told.values()] == [len(TEXT.encode()) + 1] * 4
        assert told["tokens"][-1] == ("<|im_end|>" if not extra else told["tokens"][-1])
        assert told["text_offset"][-1] == len(TEXT)


def test_echo_alone_may_sample_nothing(ask: httpx.Client) -> None:
    (choice,) = complete(ask, max_tokens=0, echo=True)["choices"]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == (TEXT, None, "length")


def test_prompt_logprobs_are_vllms(ask: httpx.Client, base: Base) -> None:
    ids = base.tokenizer.encode(TEXT)
    expected = likelihoods(base, ids)
    (choice,) = complete(ask, max_tokens=1, prompt_logprobs=2)["choices"]
    told = choice["prompt_logprobs"]
    assert told[0] is None
    assert len(told) == len(ids)
    for place, (token, entry) in enumerate(zip(ids[1:], told[1:], strict=True)):
        own = entry[str(token)]
        assert set(own) == {"logprob", "rank", "decoded_token"}
        assert own["logprob"] == pytest.approx(float(expected[place, token]), abs=1e-4)
        assert sorted(e["rank"] for e in entry.values() if e["rank"]) == [1, 2]
        (best,) = (key for key, e in entry.items() if e["rank"] == 1)
        assert int(best) == int(expected[place].argmax())
    messages = [{"role": "user", "content": "hi"}]
    chat = post(ask, "/v1/chat/completions", messages=messages, max_tokens=1, prompt_logprobs=0)
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert [len(entry) for entry in chat["prompt_logprobs"][1:]] == [1] * (chat["usage"]["prompt_tokens"] - 1)
    assert "prompt_logprobs" not in chat["choices"][0]


def test_choices_of_one_prompt_are_told_the_same_of_it(ask: httpx.Client) -> None:
    asked = {"max_tokens": 2, "n": 3, "temperature": 1, "seed": 5, "logprobs": 2, "echo": True}
    for choice in (choices := complete(ask, **asked)["choices"]):
        alone = complete(ask, **asked | {"n": 1, "max_tokens": 0, "temperature": 0})["choices"][0]["logprobs"]
        assert {key: values[: len(TEXT.encode())] for key, values in choice["logprobs"].items()} == alone
    assert len({choice["text"] for choice in choices}) > 1
    told = [choice["prompt_logprobs"] for choice in complete(ask, n=3, max_tokens=1, prompt_logprobs=2)["choices"]]
    assert told[0] == told[1] == told[2]


def test_more_log_probabilities_than_an_answer_holds_are_refused(
    ask: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_SCORES", 6 * len(TEXT.encode()))
    complete(ask, max_tokens=1, n=2, prompt_logprobs=2)
    for field, asked in (("prompt_logprobs", {"prompt_logprobs": 2}), ("echo", {"echo": True, "logprobs": 2})):
        error = complete(ask, 400, max_tokens=1, n=3, **asked)["error"]
        assert error["param"] == field
        assert "ask for fewer alternatives, choices or prompts" in error["message"]
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "n": 3}
    post(ask, "/v1/chat/completions", **chat, prompt_logprobs=1)


def test_a_completion_gets_the_receipts_that_it_had_when_it_was_made(ask: httpx.Client) -> None:
    steering = {"correction": "brief", "strength": 3, "report": "tokens", "budget": {"cooldown": 1}}
    made = complete(ask, max_tokens=20, steering=steering, return_token_ids=None)["choices"][0]
    receipts = made["steering"].pop("tokens")
    completion = [receipt["token_id"] for receipt in receipts]
    told = post(ask, "/v1/steering/score", prompt=TEXT, completion=completion, steering=steering)
    assert told["object"] == "steering.score"
    assert told["id"].startswith("score-")
    assert (told["prompt_tokens"], told["completion_tokens"]) == (len(TEXT.encode()), 20)
    assert {key: value for key, value in told["steering"].items() if not isinstance(value, float)} == {
        key: value for key, value in made["steering"].items() if not isinstance(value, float)
    }
    assert {receipt["fired"] for receipt in receipts} == {True, False}
    for mine, theirs in zip(told["tokens"], receipts, strict=True):
        assert mine.pop("logprob") == mine["steered_logprob"]
        assert mine == {k: pytest.approx(v, abs=1e-4) if isinstance(v, float) else v for k, v in theirs.items()}


def test_a_score_reads_text_or_ids_or_messages(ask: httpx.Client, base: Base) -> None:
    by_text = post(ask, "/v1/steering/score", prompt="ab", completion="cde")
    by_ids = post(ask, "/v1/steering/score", prompt=list(b"ab"), completion=list(base.tokenizer.encode("cde")))
    assert [t["token"] for t in by_text["tokens"]] == ["c", "d", "e"]
    assert [t["token"] for t in by_ids["tokens"]] == ["c", "d", "e"]
    messages = [{"role": "user", "content": "hi"}]
    chat = post(ask, "/v1/steering/score", messages=messages, completion="yes")
    rendered = base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    same = post(ask, "/v1/steering/score", prompt=rendered, completion="yes")
    assert [t["logprob"] for t in chat["tokens"]] == pytest.approx([t["logprob"] for t in same["tokens"]], abs=1e-4)
    contrast = {"correction": "contrast", "strength": 1.0, "gate": "always", "negative_prompt": "hey"}
    told = post(ask, "/v1/steering/score", messages=messages, completion="yes", steering=contrast)
    assert told["steering"]["fired"] == 3


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "ab", "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"prompt": "ab", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ("/v1/completions", {"prompt": "ab", "prompt_logprobs": -1}, "prompt_logprobs"),
        ("/v1/completions", {"prompt": "x" * 65, "echo": True, "max_tokens": 0}, "prompt"),
        ("/v1/completions", {"prompt": "ab", "echo": True, "logprobs": 1, "model": "contrast"}, "echo"),
        ("/v1/steering/score", {"prompt": "ab"}, "completion"),
        ("/v1/steering/score", {"completion": "ab"}, "prompt"),
        ("/v1/steering/score", {"prompt": "", "completion": "ab"}, "prompt"),
        ("/v1/steering/score", {"prompt": "ab", "completion": ""}, "completion"),
        ("/v1/steering/score", {"prompt": "ab", "completion": [999]}, "completion"),
        ("/v1/steering/score", {"prompt": [999], "completion": "ab"}, "prompt"),
        ("/v1/steering/score", {"prompt": "ab", "completion": "x" * 63}, "prompt"),
        ("/v1/steering/score", {"prompt": "ab", "messages": [], "completion": "x"}, "messages"),
    ],
)
def test_what_cannot_be_scored_is_refused_and_names_the_field(
    ask: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    error = post(ask, path, 400, **body)["error"]
    assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}


def test_a_misspelled_key_of_a_score_is_logged(ask: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    post(ask, "/v1/steering/score", 200, prompt="ab", completion="c", strenght=5, seed=1)
    assert "'strenght'" in caplog.text
    assert "'seed'" not in caplog.text


def test_a_prompt_that_fills_the_context_is_scored(ask: httpx.Client) -> None:
    (choice,) = complete(ask, prompt="x" * 64, echo=True, logprobs=1, max_tokens=0)["choices"]
    assert len(choice["logprobs"]["tokens"]) == 64
    assert all(math.isfinite(value) for value in choice["logprobs"]["token_logprobs"][1:])


def test_offsets_where_the_text_is_not_the_tokens(base: Base) -> None:
    pieces = Pieces(base.tokenizer)
    begin = 257  # a special token that a tokenizer puts before the text

    def read(tokens: str) -> tuple[int, ...]:
        return tuple(base.tokenizer.encode(tokens))

    assert find_offsets((begin, *read("ab")), "ab", pieces) == [0, 0, 1]
    assert find_offsets((begin, *read("a")), "<|im_start|>a", pieces) == [0, 12]
    assert find_offsets(read(" ab"), "ab", pieces) == [0, 0, 1]
    assert find_offsets(read("AbC"), "abc", pieces) == [0, 1, 2]
    lead, middle, last = (base.tokenizer.encode("€")[i] for i in range(3))
    broken = (lead, *read("#"), lead, lead, middle, last, *read("$"))
    assert find_offsets(broken, "\ufffd#\ufffd€$", pieces) == [0, 1, 2, 3, 3, 3, 4]
