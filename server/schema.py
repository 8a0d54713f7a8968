"""What a request's body may say: OpenAI's and vLLM's words, and `steering`.

Invariant: pydantic checks the shape here, and SamplingParams checks the values; either way the caller is told the
field. null is the same as not sent. Of keys without a field here, foreign.py decides.

    body = ChatBody.model_validate(json);  body.check();  body.sampling();  body.rules()
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from trimtab.errors import InvalidRequest
from trimtab.server import foreign
from trimtab.server.engine.request import SamplingParams
from trimtab.server.many import Closed, Many, Most, Table
from trimtab.server.messages import Messages
from trimtab.server.prompt import Long
from trimtab.server.steering_body import Report, SteeringBody
from trimtab.server.stream import TextRules
from trimtab.server.structure_body import StructuredBody
from trimtab.server.tools.body import MAX_TOOLS, Tool, ToolChoice, choose

MAX_STOPS, MAX_STOP = 16, 1024  # how many, and characters of each: they are looked for at each token
MAX_TOKENS = 2**31 - 1  # more than any context holds
MAX_PROMPTS = 2**14  # in a body; how many a server takes, its queue says
MAX_BIASES = 1024  # each acts at every step; neither OpenAI nor vLLM names a limit


class StreamOptions(Closed):
    """`stream_options`: include_usage adds a last chunk with the usage; with continuous_usage_stats all have it."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # padding against who watches sizes: none is made, either way


class Body(StructuredBody, extra="allow"):
    """What chats and completions share."""

    model: str | None = None
    n: int | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[Table[int, float], Most(MAX_BIASES)] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | Many[str] | None = None
    stop_token_ids: Many[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None  # from which it is cut
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    steering: SteeringBody | None = None

    def check(self) -> None:
        """Raise InvalidRequest for what is well-formed and yet not possible."""
        foreign.refuse(self.model_extra or {})
        self.structure()
        if self.best_of is not None and self.best_of != self.choices:
            raise InvalidRequest("best_of is supported only where it equals n: leave it out", "best_of")
        if self.steering is not None:
            self.steering.check()
        if self.truncate_prompt_tokens is not None and (self.truncate_prompt_tokens or -2) < -1:
            message = "truncate_prompt_tokens must be at least 1, or -1 for what fits"
            raise InvalidRequest(message, "truncate_prompt_tokens")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed with stream: true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs is told in whole answers: leave out stream", "prompt_logprobs")

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk tells the usage so far. As with vLLM, include_usage alone turns usage on."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def report(self) -> Report:
        return (self.steering and self.steering.report) or "summary"

    def unknown_keys(self) -> set[str]:
        """Keys that were accepted without being understood."""
        return foreign.unknown(self.model_extra or {})

    def rules(self) -> TextRules:
        """How the text is cut. Raises InvalidRequest."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS:
            raise InvalidRequest(f"stop must be at most {MAX_STOPS} strings, not {len(stops)}", "stop")
        if not all(stops):
            raise InvalidRequest("stop must not contain an empty string", "stop")
        if max(map(len, stops), default=0) > MAX_STOP:
            raise InvalidRequest(f"stop must not hold a string of more than {MAX_STOP} characters", "stop")
        return TextRules(
            stop=tuple(stops),
            min_tokens=self.min_tokens or 0,
            stop_tokens=frozenset(self.stop_token_ids or ()),
            include_stop=bool(self.include_stop_str_in_output),
            skip_special=self.skip_special_tokens is not False,
        )

    @property
    def long(self) -> Long:
        """What becomes of a text that cannot fit."""
        return "refuse" if self.truncate_prompt_tokens is None else self.truncation_side or "left"

    def cut(self, prompt: tuple[int, ...], max_len: int) -> tuple[int, ...]:
        """The tokens of a prompt that truncate_prompt_tokens leaves: with -1, max_tokens of the room stay free."""
        wanted = self.truncate_prompt_tokens
        if wanted is None:
            return prompt
        if wanted == -1:
            wanted = max_len - min(self.token_limit() or 1, max_len - 1)
        return prompt[:wanted] if self.truncation_side == "right" else prompt[-wanted:]

    def sampling(self, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """How tokens are drawn. defaults: of what is not sent. Raises InvalidRequest."""
        limit = self.token_limit()
        given = {
            "temperature": self.temperature,
            "top_k": 0 if self.top_k == -1 else self.top_k,  # vLLM's "off"
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
            "min_tokens": self.min_tokens,
            "stop_token_ids": None if self.stop_token_ids is None else frozenset(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
            "seed": None if self.seed == -1 else self.seed,  # vLLM's "any"
            "max_tokens": None if limit is None else min(limit, MAX_TOKENS),  # what cannot fit is no fault
            "alternatives": self.alternatives(),
            "allowed_tokens": None if self.allowed_token_ids is None else frozenset(self.allowed_token_ids),
        }
        sent: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        sampling = SamplingParams(**{**(defaults or {}), **sent})
        least, most = sampling.min_tokens, sampling.max_tokens
        if most is not None and least > most:
            message = f"min_tokens is {least}, and the answer may have {most} tokens: ask for fewer, or allow more"
            raise InvalidRequest(message, "min_tokens")
        return sampling

    def token_limit(self) -> int | None:
        """max_tokens under the name that the endpoint gives it."""
        return self.max_tokens

    def alternatives(self) -> int:
        """How many of the most likely tokens each step reports: none, unless the endpoint has a word for it."""
        return 0

    def prompt_alternatives(self) -> int | None:
        """How many of them each token of the prompt reports; None: the prompt is not scored."""
        return self.prompt_logprobs


class CompletionBody(Body):
    """POST /v1/completions."""

    DEFAULT_MAX_TOKENS: ClassVar[int] = 16  # OpenAI's

    prompt: Annotated[str | Many[int] | Many[str] | Many[Many[int]], Most(MAX_PROMPTS, but=int)]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None
    add_special_tokens: bool | None = None

    def token_limit(self) -> int | None:
        return self.DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def alternatives(self) -> int:
        return self.logprobs or 0

    def rules(self) -> TextRules:
        """Where the prompt's tokens are told, every token is: readers count them from the end."""
        return replace(super().rules(), show_end=bool(self.echo) and self.logprobs is not None)

    def prompt_alternatives(self) -> int | None:
        echoed = self.echo and (self.logprobs is not None or self.max_tokens == 0)
        return max(self.prompt_logprobs or 0, self.logprobs or 0) if echoed else self.prompt_logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, as they were sent. Raises InvalidRequest for an empty batch."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequest("the prompt is empty: send at least one token", "prompt")
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Messages = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None
    documents: Many[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    tools: Annotated[Many[Tool], Most(MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    def check(self) -> None:
        super().check()
        self.callable_tools()
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs is only allowed with logprobs: true", "top_logprobs")

    def callable_tools(self) -> tuple[list[Tool], bool]:
        """The tools that may be called, and whether one must be. Raises InvalidRequest."""
        return choose(self.tools or [], self.tool_choice)

    def shown_tools(self) -> list[dict[str, Any]]:
        """As the model's template is to have them: all of them, or none where none may be called."""
        return [] if self.tool_choice == "none" else [tool.for_template() for tool in self.tools or []]

    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def as_written(self, error: InvalidRequest) -> InvalidRequest:
        """The error, of max_tokens by the name that the body has for it."""
        if error.field == "max_tokens" and self.max_completion_tokens is not None:
            error.rename("max_completion_tokens")
        return error

    def alternatives(self) -> int:
        return self.top_logprobs or 0
