"""`steering` in a request's body: which correction acts, how, how often, and what is told about it.

Invariant: pydantic checks the shape here, and request.Steering and request.Budget check the values; either way the
caller is told the field. null is the same as not sent.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from trimtab.errors import InvalidRequest
from trimtab.server.engine.request import MAX_MIX, MAX_SPANS, Budget, Mode, Steering
from trimtab.server.many import Closed, Many, Most, Table
from trimtab.steering.gate import GateKind

Report = Literal["none", "summary", "tokens"]


class BudgetBody(Closed):
    """`steering.budget`: how often it may act, and where. See request.Budget."""

    max_steps: int | None = None
    max_share: float | None = None
    cooldown: int | None = None
    kl: float | None = None
    until: str | None = None
    spans: Annotated[Many[tuple[str, str]], Most(MAX_SPANS)] | None = None
    structured: bool | None = None

    def budget(self) -> Budget:
        """Raises InvalidRequest."""
        given: dict[str, Any] = {name: value for name, value in self if value is not None}
        if self.spans is not None:
            given["spans"] = tuple(self.spans)
        return Budget(**given)


class SteeringBody(Closed):
    """`steering` in a body: which correction acts (or several, with weights), how, and what is told about it."""

    correction: str | None = None
    corrections: Annotated[Table[str, float], Most(MAX_MIX)] | None = None
    strength: float | None = None
    gate: GateKind | None = None
    tau: float | None = None
    ceiling: float | None = None
    rate: float | None = None
    budget: BudgetBody | None = None
    negative_prompt: str | None = None
    mode: Mode | None = None
    report: Report | None = None

    def check(self) -> None:
        """Raise InvalidRequest for what does not go together."""
        if self.corrections is not None and (self.correction is not None or not self.corrections):
            message = "steering.corrections names one correction or more, and takes the place of steering.correction"
            raise InvalidRequest(message, "steering.corrections")

    @property
    def weights(self) -> dict[str, float]:
        """The corrections that are named, the first being the one whose defaults hold."""
        return self.corrections or ({} if self.correction is None else {self.correction: 1.0})

    def steering(self, weights: Mapping[str, float]) -> Steering:
        """What the engine is asked. weights: of at least one correction. Raises InvalidRequest."""
        (first, weight), *others = weights.items()
        return Steering(
            correction=first,
            strength=self.strength,
            tau=self.tau,
            mode=self.mode or "apply",
            ceiling=self.ceiling,
            rate=self.rate,
            gate=self.gate,
            weight=weight,
            also=dict(others),
            budget=Budget() if self.budget is None else self.budget.budget(),
        )

    def in_vain(self) -> str | None:
        """A field that says something, though there is no correction to say it of; None when there is none."""
        fields = ("strength", "gate", "tau", "ceiling", "rate", "budget", "negative_prompt", "mode")
        return next((name for name in fields if getattr(self, name) not in (None, "off")), None)
