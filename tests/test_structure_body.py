"""Structured output as callers ask for it: over HTTP, on a tiny random model."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from scripted import loopback
from tiny import tiny_base, tiny_correction, tiny_tokenizer
from trimtab.errors import InvalidRequest
from trimtab.server.app import create_app
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.engine import Engine
from trimtab.server.schema import ChatBody, CompletionBody
from trimtab.steering.bank import Bank

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "boolean"}},
    "required": ["n", "b"],
    "additionalProperties": False,
}
CLOSED = {"json": {}, "disable_additional_properties": True}
FORMAT = {"type": "json_schema", "json_schema": {"name": "pair", "strict": True, "schema": SCHEMA}}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    base = tiny_base()
    bank = Bank(base.hidden, "cpu")
    bank.add(tiny_correction(base, "c0", tau=-1.0))
    engine = Engine(base, bank, EngineConfig(slots=6, max_model_len=200))
    with loopback(create_app(engine, base, bank), engine) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def ask(client: httpx.Client, path: str = CHAT, **body: Any) -> httpx.Response:
    words = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "ab"}
    return client.post(path, json=words | {"max_tokens": 100, "seed": 1} | body)


def texts(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [c["message"]["content"] if "message" in c else c["text"] for c in answer.json()["choices"]]


def refusal(answer: httpx.Response) -> tuple[str | None, str]:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


def test_an_answer_fits_its_schema_whole_and_streamed(client: httpx.Client) -> None:
    answer = ask(client, response_format=FORMAT, n=3, logprobs=True, top_logprobs=2)
    for text in texts(answer):
        value = json.loads(text)
        assert set(value) == {"n", "b"}
        assert 0 <= value["n"] <= 99
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == choice["message"]["content"]
    with client.stream("POST", CHAT, json=json.loads(answer.request.content) | {"stream": True}) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    streamed = ["", "", ""]
    for event in events:
        for piece in event["choices"]:
            streamed[piece["index"]] += piece["delta"].get("content") or ""
    assert streamed == texts(answer)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("asked", "fits"),
    [
        ({"response_format": {"type": "text"}}, lambda text: True),
        ({"structured_outputs": {"json": SCHEMA}}, lambda text: set(json.loads(text)) == {"n", "b"}),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, lambda text: set(json.loads(text)) == {"n", "b"}),
        ({"structured_outputs": {"regex": "[ab]{5}"}}, lambda text: set(text) <= {"a", "b"} and len(text) == 5),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, lambda text: text in ("yes", "no")),
        ({"structured_outputs": {"grammar": 'start: "x" "y"+'}}, lambda text: set(text) == {"x", "y"}),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            lambda text: json.dumps(json.loads(text), separators=(",", ":")) == text,
        ),
        (
            {"guided_json": SCHEMA, "guided_whitespace_pattern": "~?", "guided_decoding_backend": "auto"},
            lambda text: set(json.loads(text.replace("~", ""))) == {"n", "b"} and " " not in text,
        ),
        ({"guided_regex": "[0-9]{3}"}, lambda text: len(text) == 3 and text.isdigit()),
        ({"guided_choice": ["maybe"]}, lambda text: text == "maybe"),
        ({"guided_grammar": 'root ::= "a" | "b"'}, lambda text: text in ("a", "b")),
        ({"allowed_token_ids": [70, 71], "max_tokens": 9}, lambda text: len(set(text)) <= 2 and len(text) == 9),
    ],
)
def test_every_word_for_it_is_obeyed(client: httpx.Client, path: str, asked: dict[str, Any], fits: Any) -> None:
    assert all(map(fits, texts(ask(client, path, n=2, **asked))))


@pytest.mark.parametrize(
    "asked", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}]
)
def test_any_object_is_json(client: httpx.Client, asked: dict[str, Any]) -> None:
    (closing,) = tiny_tokenizer().encode("}", add_special_tokens=False)
    (text,) = texts(ask(client, logit_bias={str(closing): 30.0}, **asked))
    assert isinstance(json.loads(text), dict)


def test_a_batch_of_prompts_and_its_stop_strings(client: httpx.Client) -> None:
    answer = ask(client, TEXT, prompt=["a", "b", "c"], guided_regex="[ab]{4}-[cd]{4}", stop="-")
    for text in texts(answer):
        assert len(text) == 4
        assert set(text) <= {"a", "b"}


def test_bad_words_are_not_written_anywhere(client: httpx.Client) -> None:
    (plain,) = texts(ask(client, TEXT, guided_regex="[ab]{60}"))
    assert "ab" in plain
    (text,) = texts(ask(client, TEXT, guided_regex="[ab]{60}", bad_words=["ab"]))
    assert len(text) == 60
    assert "ab" not in text


@pytest.mark.parametrize(
    ("param", "asked"),
    [
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}),
        ("response_format", {"response_format": {"type": "json_schema"}}),
        ("response_format.type", {"response_format": {"type": "yaml"}}),
        ("structured_outputs.json", {"structured_outputs": {"json": "{"}}),
        ("structured_outputs.json", {"structured_outputs": {"json": "[" * 100_000}}),
        ("structured_outputs.regex", {"structured_outputs": {"regex": "("}}),
        ("structured_outputs.choice", {"structured_outputs": {"choice": []}}),
        ("structured_outputs.grammar", {"structured_outputs": {"grammar": "start: x"}}),
        ("structured_outputs", {"structured_outputs": {}}),
        ("structured_outputs.structural_tag", {"structured_outputs": {"structural_tag": "x"}}),
        ("structured_outputs.disable_additional_properties", {"structured_outputs": CLOSED}),
        ("guided_json", {"guided_json": {"type": "array", "uniqueItems": True}}),
        ("guided_regex", {"response_format": FORMAT, "guided_regex": "a"}),
        ("structured_outputs.choice", {"structured_outputs": {"regex": "a", "choice": ["a"]}}),
        ("allowed_token_ids", {"allowed_token_ids": []}),
        ("allowed_token_ids", {"allowed_token_ids": [9999]}),
        ("allowed_token_ids", {"allowed_token_ids": [70], "stop_token_ids": [70], "min_tokens": 2}),
        ("bad_words", {"bad_words": ["a", " "]}),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(client: httpx.Client, param: str, asked: dict[str, Any]) -> None:
    for stream in (False, True):
        field, message = refusal(ask(client, stream=stream, **asked))
        assert field == param
        assert message


def test_a_refusal_tells_the_reason(client: httpx.Client) -> None:
    schema = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
    asked = {"type": "json_schema", "json_schema": {"schema": schema}}
    assert "oneOf" in refusal(ask(client, response_format=asked))[1]


def test_nothing_is_steered_inside_unless_the_budget_says_so(client: httpx.Client) -> None:
    def opened(**steering: Any) -> int:
        answer = ask(client, response_format=FORMAT, steering={"correction": "c0"} | steering)
        return int(answer.json()["choices"][0]["steering"]["open"])

    assert opened() == 0
    assert opened(budget={"structured": True}) > 0


@pytest.mark.parametrize(
    "asked",
    [
        {"guided_regex": "[a]{3}", "allowed_token_ids": [70]},
        {"structured_outputs": {"choice": ["abc"]}, "bad_words": ["b"]},
        {"allowed_token_ids": [70], "bad_words": [tiny_tokenizer().decode([70])]},
    ],
)
def test_what_leaves_no_token_is_the_fault_of_its_request_alone(client: httpx.Client, asked: dict[str, Any]) -> None:
    """Not of the engine: sent again, it would fail again."""
    answer = ask(client, **asked)
    assert answer.status_code == 400
    assert "no token is legal here" in answer.json()["error"]["message"]
    assert '"type": "invalid_request_error"' in ask(client, stream=True, **asked).text
    assert texts(ask(client, guided_regex="[a]{3}")) == ["aaa"]


def test_many_at_once_are_held_to_their_own(client: httpx.Client) -> None:
    async def all_of_them() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as many:
            bodies = [{"prompt": f"{i}", "guided_regex": f"{i}[ab]{{{i}}}", "seed": i} for i in range(20)]
            return await asyncio.gather(*(many.post(TEXT, json=body | {"max_tokens": 60}) for body in bodies))

    for i, answer in enumerate(asyncio.run(all_of_them())):
        (text,) = texts(answer)
        assert text.startswith(str(i))
        assert len(text) == len(str(i)) + i


def test_null_says_nothing() -> None:
    words = ("response_format", "structured_outputs", "guided_json", "guided_regex", "allowed_token_ids", "bad_words")
    body = CompletionBody(prompt="a", **dict.fromkeys(words))
    body.check()
    assert body.structure() is None


def test_strict_or_not_a_schema_is_kept_to() -> None:
    for strict in (True, False, None):
        given = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": strict}}
        body = ChatBody.model_validate({"messages": [{"role": "user", "content": "a"}], "response_format": given})
        found = body.structure()
        assert found is not None
        assert (json.loads(found[0].text), found[1]) == (SCHEMA, "response_format")


def test_two_words_for_it_are_one_too_many() -> None:
    body = CompletionBody(prompt="a", guided_regex="a", guided_choice=["b"])
    with pytest.raises(InvalidRequest, match="guided_regex and guided_choice"):
        body.structure()
