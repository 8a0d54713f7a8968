"""Prompts: what the template makes of a chat, and what it may refuse."""

import asyncio
from typing import Any

import pytest

from tiny import tiny_tokenizer
from trimtab.errors import InvalidRequest
from trimtab.server.prompt import Ids, Prompter

HI = [{"role": "user", "content": "hi"}]


def chat(template: str | None = None, messages: Any = HI, **options: Any) -> Ids:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template if template is not None else tokenizer.chat_template
    prompter = Prompter(tokenizer)
    try:
        return asyncio.run(prompter.chat(messages, **options))
    finally:
        prompter.close()


def decode(ids: Ids) -> str:
    return str(tiny_tokenizer().decode(ids))


def test_a_final_message_can_be_continued() -> None:
    messages = [*HI, {"role": "assistant", "content": "Once"}]
    ids = chat(messages=messages, add_generation_prompt=False, continue_final_message=True)
    assert decode(ids).endswith("<|im_start|>assistant\nOnce")


def test_template_kwargs_reach_the_template() -> None:
    assert decode(chat("{{ messages[0].content }} {{ style }}", template_kwargs={"style": "bold"})) == "hi bold"


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "return_tensors", "conversation"])
def test_template_kwargs_cannot_change_the_call(name: str) -> None:
    with pytest.raises(InvalidRequest, match=name):
        chat(template_kwargs={name: "x"})


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].missing.deeper }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**12) %}x{% endfor %}",
    ],
)
def test_a_template_that_fails_is_the_requests_fault(template: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(template)
    assert caught.value.field == "messages"


def test_a_model_without_a_template_says_where_to_go() -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        chat("")
