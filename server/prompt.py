"""From what a caller sends to token ids: chat templates and tokenising, off the event loop.

Invariant: a rendered chat is tokenised without adding special tokens, as its template wrote them already. One thread
does all of it: fast tokenizers must not be entered twice, and a long prompt must not hold up the streams. So that no
caller holds up the others, prompts of a batch take turns with theirs, and what cannot fit is not tokenised: it is
refused, or only its end or its beginning is read, for a caller who wants no more. Who asks for the tokens alone may
send WHOLE bytes. What waits for a caller who has left is dropped, and no more wait than the engine could take.

    prompter = Prompter(tokenizer, pieces, max_len, most);  ids = await prompter.chat(messages)
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, TypeVar

from trimtab.errors import SHUTTING_DOWN, ContextOverflow, EngineStopped, InvalidRequest, Overloaded
from trimtab.server.engine.pieces import Pieces
from trimtab.server.tools.template import ToolTemplate

Ids = tuple[int, ...]
Long = Literal["refuse", "left", "right", "whole"]  # what is done with a text that cannot fit; left: it is cut there
T = TypeVar("T")
WHOLE = 2**20  # bytes, or what the context holds at most if that is more
MAX_WORD = 1024  # characters of one that must not be written


def replace_words(messages: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """The same chat with `text` as the user's last message. Raises InvalidRequest where the user says nothing."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise InvalidRequest("messages has none of the user's, of which contrast replaces the last", "messages")
    return [{**message, "content": text} if i == last else dict(message) for i, message in enumerate(messages)]


class Prompter:
    """The prompts of one tokenizer. max_len: tokens that one may have; most: how many may wait here at once."""

    def __init__(self, tokenizer: Any, pieces: Pieces, max_len: int, most: int) -> None:
        self._tokenizer, self._max_len = tokenizer, max_len
        self._waiting, self._most = 0, most
        self._one_whole = asyncio.Semaphore()  # a generation waits for one such text at most
        self._known = frozenset(tokenizer.get_vocab().values())
        self._longest = max(len(pieces.content(token)) for token in self._known)  # bytes
        # what transformers calls its own arguments, and what it hands to the template itself
        self._ours = frozenset({*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"})
        self._thread = ThreadPoolExecutor(1, "trimtab-prompt")
        self._tools = ToolTemplate(tokenizer)
        self.tool_format = self._tools.format  # in which the model is told to write the calls of tools

    @property
    def waiting(self) -> int:
        """How many wait, with the one that is read."""
        return self._waiting

    async def text(self, prompts: Sequence[str], add_special_tokens: bool = True, long: Long = "refuse") -> list[Ids]:
        """Plain texts -> ids, with what the tokenizer puts around a text."""
        whole = long == "whole"
        works = [partial(self._encode, text, add_special_tokens, "prompt", long) for text in prompts]
        return [await self._run(work, whole) for work in works]

    async def following(self, prompt: str, ids: Ids, completion: str, add_special_tokens: bool = True) -> Ids:
        """A completion -> ids that follow the prompt's: as in the whole text, where that begins with the prompt's."""

        def work() -> Ids:
            whole = self._encode(prompt + completion, add_special_tokens, "completion")
            begins = whole[: len(ids)] == ids
            return whole[len(ids) :] if begins else self._encode(completion, False, "completion")

        return await self._run(work)

    async def words(self, words: Sequence[str]) -> list[Ids]:
        """Words that must not be written -> their ids, at a text's beginning and, where that differs, after a space."""
        found: list[Ids] = []
        for word in words:
            if not word.strip():
                raise InvalidRequest("bad_words must not contain an empty word", "bad_words")
            if len(word) > MAX_WORD:
                raise InvalidRequest(f"bad_words must not hold one of more than {MAX_WORD} characters", "bad_words")
            for text in (word.lstrip(), " " + word.lstrip()):
                ids = await self._run(partial(self._encode, text, False, "bad_words"))
                if text[0] != " " or (len(ids) == len(found[-1]) and ids[0] != found[-1][0]):
                    found.append(ids)
        return found

    async def negatives(self, text: str, prompts: Sequence[Ids], add_special_tokens: bool = True) -> list[Ids]:
        """What companions read beside each of these prompts: `text`, or where that is no token, the prompt's last.

        So an empty text leaves the token that opens every text where the tokenizer has one, and else next to nothing.
        """
        ids = await self._run(partial(self._encode, text, add_special_tokens, "steering.negative_prompt"))
        return [ids or prompt[-1:] for prompt in prompts]

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        beside: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        long: Long = "refuse",
    ) -> Ids:
        """A chat, with tools to offer, through the model's template -> ids. Raises InvalidRequest.

        beside: what else the template reads, by transformers' names.
        """
        extra = dict(template_kwargs or {})
        if reserved := sorted(self._ours & extra.keys()):
            message = f"chat_template_kwargs must not set {reserved[0]}"
            raise InvalidRequest(message, f"chat_template_kwargs.{reserved[0]}")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest("continue_final_message needs add_generation_prompt: false", "continue_final_message")

        def work() -> Ids:
            told, offer = self._tools.apply(messages, tools)
            text = self._render(
                told, add_generation_prompt, continue_final_message, {**(beside or {}), **extra, **offer}
            )
            return self._encode(text, False, "messages", long)

        return await self._run(work, long == "whole")

    async def decode(self, prompts: Sequence[Ids]) -> list[str]:
        """The text of prompts. Ids that the tokenizer does not know have none: a model may have rows for them."""
        known = [list(filter(self.knows, ids)) for ids in prompts]
        return [str(await self._run(partial(self._tokenizer.decode, ids))) for ids in known]

    def knows(self, token: int) -> bool:
        """Whether the tokenizer has this id."""
        return token in self._known

    async def strings(self, ids: Ids) -> list[str]:
        """The tokens as the tokenizer's own vocabulary writes them."""
        return list(await self._run(partial(self._tokenizer.convert_ids_to_tokens, list(ids))))

    def info(self) -> dict[str, Any]:
        """What the tokenizer was made from."""
        made_from: dict[str, Any] = dict(getattr(self._tokenizer, "init_kwargs", {}))
        told = {"tokenizer_class": type(self._tokenizer).__name__, "chat_template": self._tokenizer.chat_template}
        return made_from | told

    def close(self) -> None:
        """What has not begun never will, and what goes on is not waited for: a queue of long prompts takes minutes."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T], whole: bool = False) -> T:
        if self._waiting >= self._most:
            raise Overloaded(f"{self._waiting} prompts wait to be read: try again in a moment")
        self._waiting += 1
        try:
            async with self._one_whole if whole else nullcontext():
                return await self._read(work)
        finally:
            self._waiting -= 1

    async def _read(self, work: Callable[[], T]) -> T:
        try:
            future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        except RuntimeError as error:  # after its shutdown
            raise EngineStopped(SHUTTING_DOWN) from error
        try:
            return await future
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise EngineStopped(SHUTTING_DOWN) from None  # not the caller was cancelled, but the work

    def _encode(self, text: str, special: bool, field: str, long: Long = "refuse") -> Ids:
        try:
            content = text.encode()
        except UnicodeEncodeError as error:  # JSON can say half a surrogate pair; no tokenizer can read it
            raise InvalidRequest(f"the text is not valid Unicode: {error.reason}", field) from error
        most = self._max_len * self._longest
        if long == "whole" and len(content) > (most := max(most, WHOLE)):
            raise InvalidRequest(f"the text has {len(content)} bytes, {most} at most are tokenised: send less", field)
        if len(content) > most and long == "refuse":
            raise ContextOverflow(self._max_len, -(-len(content) // self._longest), 1, field, at_least=True)
        if len(content) > most and long in ("left", "right"):
            left = content[-most:] if long == "left" else content[:most]
            text = left.decode(errors="ignore")  # less a character that was cut
        return tuple(self._tokenizer.encode(text, add_special_tokens=special))

    def _render(
        self, messages: Sequence[Mapping[str, Any]], generation: bool, proceed: bool, extra: Mapping[str, Any]
    ) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise InvalidRequest("this model has no chat template: send its prompt to /v1/completions", "messages")
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=generation,
                continue_final_message=proceed,
                **extra,
            )
        except Exception as error:  # templates speak through errors of any kind: roles, keys that a message lacks
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error
        return text
