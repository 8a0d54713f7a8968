"""/tokenize and its kin: ids are what a generation would read, and text comes back as it was."""

from typing import Any

import pytest

from scripted import EOS, TOKENIZER, ScriptedEngine, ids, in_memory, say
from trimtab import __version__

HI = [{"role": "user", "content": "hé 😀"}]


def ask_for(path: str, **body: Any) -> Any:
    with in_memory(ScriptedEngine(say("x"))) as ask:
        response = ask("POST", path, json=body)
    return response.json() | {"status": response.status_code}


def test_a_prompt_is_counted_and_comes_back() -> None:
    told = ask_for("/tokenize", prompt="hé 😀", model="tiny")
    assert told["tokens"] == ids("hé 😀")
    assert (told["count"], told["max_model_len"], told["token_strs"]) == (len(told["tokens"]), 200, None)
    assert ask_for("/detokenize", tokens=told["tokens"])["prompt"] == "hé 😀"


def test_tokens_are_told_as_the_vocabulary_writes_them() -> None:
    told = ask_for("/tokenize", prompt="a ", return_token_strs=True)
    assert told["token_strs"] == ["a", "Ġ"]


def test_what_does_not_fit_is_counted_too() -> None:
    long = "é" * 5000
    assert ask_for("/tokenize", prompt=long)["tokens"] == ids(long)
    told = ask_for("/tokenize", messages=[{"role": "user", "content": long}])
    assert told["count"] > told["max_model_len"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
        {"chat_template_kwargs": {"style": "x"}},
        {"add_special_tokens": False, "temperature": 0.5},
    ],
)
def test_a_chat_is_what_a_generation_reads(options: dict[str, Any]) -> None:
    engine = ScriptedEngine(say("x"))
    with in_memory(engine) as ask:
        told = ask("POST", "/tokenize", json={"messages": HI} | options).json()
        chat = {key: value for key, value in options.items() if key != "add_special_tokens"}
        used = ask("POST", "/v1/chat/completions", json={"messages": HI} | chat).json()["usage"]
    assert tuple(told["tokens"]) == engine.requests[0].prompt
    assert told["count"] == used["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HI}, 400, "prompt"),
        ("/tokenize", {"messages": HI, "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"messages": HI, "chat_template_kwargs": 1}, 400, "chat_template_kwargs"),
        ("/tokenize", {"messages": HI, "chat_template": "x"}, 400, "chat_template"),
        ("/tokenize", {"prompt": "a", "model": "none"}, 404, "model"),
        ("/detokenize", {"tokens": [1], "model": "none"}, 404, "model"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [2**40]}, 400, "tokens"),
        ("/detokenize", {"tokens": [len(TOKENIZER)]}, 400, "tokens"),
        ("/detokenize", {"tokens": "abc"}, 400, "tokens"),
    ],
)
def test_a_bad_body_names_the_field(path: str, body: dict[str, Any], status: int, param: str) -> None:
    told = ask_for(path, **body)
    assert (told["status"], told["error"]["param"]) == (status, param)


def test_special_tokens_are_written_out() -> None:
    assert ask_for("/detokenize", tokens=[*ids("a"), EOS])["prompt"] == "a<|im_end|>"
    assert ask_for("/detokenize", tokens=[])["prompt"] == ""


def test_the_tokenizer_and_the_version_are_told() -> None:
    with in_memory(ScriptedEngine(say("x"))) as ask:
        info = ask("GET", "/tokenizer_info").json()
        assert ask("GET", "/version").json() == {"version": __version__}
    assert info["tokenizer_class"] == type(TOKENIZER).__name__
    assert info["chat_template"] == TOKENIZER.chat_template


def test_where_the_tokenizer_lies_is_told_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOKENIZER.init_kwargs, "name_or_path", "/root/models/mine")
    monkeypatch.setitem(TOKENIZER.init_kwargs, "padding_side", "left")
    with in_memory(ScriptedEngine(say("x"))) as ask:
        info = ask("GET", "/tokenizer_info").json()
    assert info["padding_side"] == "left"
    assert "/root" not in str(info)


def test_a_tokenizer_with_several_templates_tells_them_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    templates = {"default": TOKENIZER.chat_template, "tool_use": "{{ messages }}"}
    monkeypatch.setattr(TOKENIZER, "chat_template", templates)
    with in_memory(ScriptedEngine(say("x"))) as ask:
        assert ask("GET", "/tokenizer_info").json()["chat_template"] == templates
