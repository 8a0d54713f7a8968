"""What the server answers, as data: OpenAI's shapes, plus what steering did.

Invariant: these models only read. Everything steering adds is optional, so that any OpenAI-compatible server can be
read: what OpenAI's shapes may leave out may also be null (`OrNull`).

Here are chats and completions; responses.py has those of /v1/responses, facts.py what a server says of itself.
"""

from pydantic import Field

from trimtab.clients.reading import Answer, Content, Kind, OrNull, P, parse


class Receipt(Answer):
    """What one decode step did. Log-probabilities are of the sampled token unless said, at temperature 1."""

    token: str
    token_id: int
    entropy: float  # nats, of the base's distribution
    open: bool  # the gate let the correction act
    fired: bool  # open, and the correction acted (in shadow mode: would have acted)
    flip: bool  # fired, and the most likely token changed
    base_token: str  # the base's most likely token
    base_token_id: int
    steered_token: str  # the most likely token after the correction
    steered_token_id: int
    base_logprob: float
    steered_logprob: float
    base_token_logprob: float  # of base_token, under the base: a flip's two probabilities are these two
    steered_token_logprob: float  # of steered_token, under the corrected distribution
    statistic: float | None = None  # what the gate looked at: the entropy, unless it is of another kind
    kl: float | None = None  # nats: KL(base || corrected); 0 where it did not fire
    strength: float | None = None  # that was applied, after a budget's cap; 0 where it did not fire


class SteeringReport(Answer):
    """What steering did to one choice: totals, and with `report` a receipt for each step."""

    correction: str | None = None
    version: str | None = None  # of the correction, which may be replaced while the server runs
    mode: str = "apply"  # apply, shadow or off
    strength: float | None = None
    corrections: dict[str, float] | None = None  # several that acted together, by weight
    gate: str | None = None  # entropy, varentropy, margin, random or always
    tau: float | None = None  # of the gate's statistic: nats, for the entropy
    ceiling: float | None = None
    steps: int = 0
    open: int = 0
    fired: int = 0
    flips: int = 0
    mean_entropy: float | None = None  # nats; None without a step
    kl: float | None = None  # nats, the mean over the steps that fired
    tokens: list[Receipt] = Field(default_factory=list)


class PromptDetails(Answer):
    """Of the tokens read: how many were in the cache."""

    cached_tokens: OrNull[int] = 0


class Usage(Answer):
    """Tokens read and written."""

    prompt_tokens: OrNull[int] = 0
    completion_tokens: OrNull[int] = 0
    total_tokens: OrNull[int] = 0
    prompt_tokens_details: PromptDetails | None = None


class Function(Answer):
    """Which function is called, with which arguments: JSON, as the model wrote it; in a stream a piece of it."""

    name: str | None = None
    arguments: str | None = None


class ToolCall(Answer):
    """A call that the model asks for. index: in a stream, which the pieces of one call share."""

    index: int | None = None
    id: str | None = None
    type: str | None = None
    function: OrNull[Function] = Function()

    def parse(self, kind: Kind[P]) -> P:
        """The arguments as data. Raises BadAnswer where they are not `kind`."""
        return parse(self.function.arguments or "", kind)


class Message(Answer):
    """A chat message, or in a stream a piece of one."""

    role: str | None = None
    content: Content = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class TopLogprob(Answer):
    """One of the most likely tokens of a step. bytes: its UTF-8, which may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    """The sampled token of a step and the most likely ones."""

    top_logprobs: OrNull[list[TopLogprob]] = Field(default_factory=list)


class ChatLogprobs(Answer):
    """Log-probabilities of a chat choice, a token each."""

    content: list[TokenLogprob] | None = None


class CompletionLogprobs(Answer):
    """Log-probabilities of a text completion, as parallel lists. With echo the first has no log-probability."""

    tokens: OrNull[list[str]] = Field(default_factory=list)
    token_logprobs: OrNull[list[float | None]] = Field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: OrNull[list[int]] = Field(default_factory=list)


class _Choice(Answer):
    index: OrNull[int] = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None  # the stop string, or the token of stop_token_ids, that ended it
    steering: SteeringReport | None = None


class ChatChoice(_Choice):
    """One answer of a chat."""

    message: Message
    logprobs: ChatLogprobs | None = None

    @property
    def text(self) -> str:
        return self.message.content or ""


class ChatChunkChoice(_Choice):
    """One answer's part in a chunk. `steering` holds the new receipts, and at the end the totals."""

    delta: OrNull[Message] = Message()
    logprobs: ChatLogprobs | None = None

    @property
    def text(self) -> str:
        return self.delta.content or ""


class CompletionChoice(_Choice):
    """One continuation of a prompt, or its part in a chunk."""

    text: OrNull[str] = ""
    logprobs: CompletionLogprobs | None = None


class _Reply(Answer):
    id: OrNull[str] = ""
    created: float | None = None  # seconds since 1970
    model: OrNull[str] = ""
    system_fingerprint: str | None = None
    usage: Usage | None = None


class ChatCompletion(_Reply):
    """The answer of `chat`. `text` and `steering` are the first choice's."""

    choices: list[ChatChoice] = Field(min_length=1)

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def tool_calls(self) -> list[ToolCall]:
        return self.choices[0].message.tool_calls or []

    @property
    def steering(self) -> SteeringReport | None:
        return self.choices[0].steering

    def parse(self, kind: Kind[P]) -> P:
        """The text, which is JSON, as `kind`: the class that was given as response_format. Raises BadAnswer."""
        return parse(self.text, kind)


class Completion(_Reply):
    """The answer of `complete`, and a chunk of `stream_complete`. `text` and `steering` are the first choice's."""

    choices: list[CompletionChoice]

    @property
    def text(self) -> str:
        return self.choices[0].text if self.choices else ""

    @property
    def steering(self) -> SteeringReport | None:
        return self.choices[0].steering if self.choices else None


class ChatChunk(_Reply):
    """One event of `stream_chat`. Without choices it carries the usage alone."""

    choices: OrNull[list[ChatChunkChoice]] = Field(default_factory=list)

    @property
    def text(self) -> str:
        return self.choices[0].text if self.choices else ""

    @property
    def steering(self) -> SteeringReport | None:
        return self.choices[0].steering if self.choices else None
