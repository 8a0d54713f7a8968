"""Prompts: what the template makes of a chat, and what it may refuse."""

import asyncio
import threading
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from tiny import tiny_tokenizer
from trimtab.errors import ContextOverflow, EngineStopped, InvalidRequest, Overloaded
from trimtab.server import prompt as prompt_module
from trimtab.server.engine.pieces import Pieces
from trimtab.server.prompt import Ids, Prompter

HI = [{"role": "user", "content": "hi"}]


MAX_LEN, MOST = 50, 8
LONGEST = len("<|im_start|>")


def prompter_of(tokenizer: Any) -> Prompter:
    return Prompter(tokenizer, Pieces(tokenizer), MAX_LEN, MOST)


def chat(template: str | None = None, messages: Any = HI, **options: Any) -> Ids:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template if template is not None else tokenizer.chat_template
    prompter = prompter_of(tokenizer)
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


class Watched:
    """A tokenizer that keeps what it was asked to tokenise."""

    def __init__(self) -> None:
        self._tokenizer = tiny_tokenizer()
        self.seen: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **options: Any) -> list[int]:
        self.seen.append(text)
        return list(self._tokenizer.encode(text, **options))


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised() -> None:
    tokenizer = Watched()
    prompter = prompter_of(tokenizer)
    most = "é" * (MAX_LEN * LONGEST // 2)
    try:
        assert len(asyncio.run(prompter.text([most]))[0]) == len(most.encode())
        with pytest.raises(
            ContextOverflow, match=r"you requested at least 52 tokens \(at least 51 in the prompt"
        ) as caught:
            asyncio.run(prompter.text([most + "x"]))
        assert caught.value.field == "prompt"
        with pytest.raises(ContextOverflow, match="in the messages"):
            asyncio.run(prompter.chat([{"role": "user", "content": most}]))
    finally:
        prompter.close()
    assert tokenizer.seen == [most]


def test_who_asks_for_tokens_alone_gets_more_than_fits_but_not_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_module, "WHOLE", 2 * MAX_LEN * LONGEST)
    tokenizer = Watched()
    prompter = prompter_of(tokenizer)
    most = "x" * (2 * MAX_LEN * LONGEST)
    try:
        assert len(asyncio.run(prompter.text([most], long="whole"))[0]) == len(most)
        with pytest.raises(InvalidRequest, match=rf"{len(most) + 1} bytes, {len(most)} at most .*: send less"):
            asyncio.run(prompter.text([most + "x"], long="whole"))
    finally:
        prompter.close()
    assert tokenizer.seen == [most]


def test_callers_take_turns() -> None:
    tokenizer = Watched()
    prompter = prompter_of(tokenizer)

    async def main() -> None:
        await asyncio.gather(prompter.text(["a", "b", "c"]), prompter.text(["x"]))

    try:
        asyncio.run(main())
    finally:
        prompter.close()
    assert tokenizer.seen.index("x") == 1


def test_a_generation_waits_for_one_whole_text_at_most() -> None:
    """Those are for whoever asks for tokens alone, and long."""
    tokenizer = Watched()
    prompter = prompter_of(tokenizer)

    async def main() -> None:
        whole = [asyncio.ensure_future(prompter.text([f"whole {i}"], long="whole")) for i in range(3)]
        await asyncio.sleep(0)
        await prompter.text(["short"])
        await asyncio.gather(*whole)

    try:
        asyncio.run(main())
    finally:
        prompter.close()
    assert tokenizer.seen == ["whole 0", "short", "whole 1", "whole 2"]


def test_a_token_that_opens_every_text_opens_a_chat_once() -> None:
    """The template writes it, so that the tokenizer must not."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)]
    )
    prompter = prompter_of(tokenizer)
    try:
        chat = asyncio.run(prompter.chat(HI))
        (text,) = asyncio.run(prompter.text(["hi"]))
    finally:
        prompter.close()
    assert (chat[:2].count(257), text) == (1, (257, *tokenizer.encode("hi", add_special_tokens=False)))


def held() -> tuple[threading.Event, threading.Event, Prompter]:
    """A prompter whose first text is being tokenised once `begun` is set, and until `going` is."""
    begun, going = threading.Event(), threading.Event()
    prompter = prompter_of(tiny_tokenizer())

    def hold(text: str, **options: Any) -> list[int]:
        begun.set()
        assert going.wait(60)
        return [1]

    prompter._tokenizer.encode = hold
    return begun, going, prompter


def test_a_server_that_ends_waits_for_no_queue_of_prompts() -> None:
    """What is being tokenised is left alone, what waits is told so at once, and what comes later too."""
    begun, going, prompter = held()

    async def main() -> None:
        running, waiting = (asyncio.create_task(prompter.text([text])) for text in "ab")
        await asyncio.to_thread(begun.wait, 60)
        prompter.close()
        with pytest.raises(EngineStopped):
            await waiting
        with pytest.raises(EngineStopped):
            await prompter.text(["c"])
        assert not running.done()
        going.set()
        assert await running == [(1,)]

    asyncio.run(main())


def test_a_caller_that_leaves_is_no_end_of_the_server() -> None:
    begun, going, prompter = held()

    async def main() -> None:
        first, second = (asyncio.create_task(prompter.text([text])) for text in "ab")
        await asyncio.to_thread(begun.wait, 60)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        going.set()
        assert await first == [(1,)]
        prompter.close()

    asyncio.run(main())


def test_no_more_prompts_wait_than_the_engine_could_take_and_none_whose_caller_has_left() -> None:
    begun, going, prompter = held()
    read: list[str] = []

    async def main() -> None:
        first = asyncio.create_task(prompter.text(["a"]))
        await asyncio.to_thread(begun.wait, 60)
        prompter._tokenizer.encode = lambda text, **_: [read.append(text) or 2]
        waiting = [asyncio.create_task(prompter.text([f"w{i}"])) for i in range(MOST - 1)]
        await asyncio.sleep(0)
        assert prompter.waiting == MOST
        with pytest.raises(Overloaded, match=f"{MOST} prompts wait"):
            await prompter.text(["one too many"])
        for task in waiting[1:]:
            task.cancel()
        await asyncio.gather(*waiting[1:], return_exceptions=True)
        last = asyncio.create_task(prompter.text(["last"]))
        going.set()
        assert await first == [(1,)]
        assert await waiting[0] == await last == [(2,)]
        prompter.close()

    asyncio.run(main())
    assert read == ["w0", "last"]
