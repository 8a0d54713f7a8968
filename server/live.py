"""The series that move with every token: plain numbers while tokens come, told when somebody looks.

Invariant: one thread counts and tells, the event loop's, so nothing is locked. What nobody tells any more may still be
counted by choices that are under way. The text is that of prometheus_client's own counters and histograms, but that it
has no `_created`.

    live = Live("tiny", registry);  counts = live.counts("brief", "apply");  live.between.observe(0.01)
"""

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from trimtab.server.engine.event import Receipt

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_NATS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
_SHADOW = "; with the mode shadow, would have"  # nothing is applied then, so it is a series of its own


class Buckets:
    """A histogram."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)  # the last is of what is above them all
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def tell(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Add it to a family of such."""
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        counts = list(zip(names, itertools.accumulate(self._counts), strict=True))
        family.add_metric(labels, counts, self._sum)


class Counts:
    """What became of the steps of one correction in one mode."""

    __slots__ = ("_entropy", "fired", "flips", "kl", "open", "steps")

    def __init__(self, entropy: Buckets) -> None:
        self._entropy = entropy
        self.steps = self.open = self.fired = self.flips = 0
        self.kl = 0.0  # nats

    def add(self, receipt: Receipt) -> None:
        """A step more."""
        self._entropy.observe(receipt.entropy)
        self.steps += 1
        if receipt.open:
            self.open += 1
        if receipt.fired:
            self.fired += 1
            self.kl += max(0.0, receipt.kl)
            if receipt.flip:
                self.flips += 1


class Live(Collector):
    """Of one app. model: the base's name, a label of every series."""

    def __init__(self, model: str, registry: CollectorRegistry) -> None:
        self._model = model
        self.tokens = 0  # that were sampled
        self.between = Buckets(SECONDS)
        self._counts: dict[tuple[str, str], Counts] = {}  # by correction and mode
        self._entropy: dict[str, Buckets] = {}  # by correction
        registry.register(self)

    def counts(self, correction: str, mode: str) -> Counts:
        """Where steps of that correction and mode are counted."""
        key = correction, mode
        if key not in self._counts:
            self._counts[key] = Counts(self._entropy.setdefault(correction, Buckets(_NATS)))
        return self._counts[key]

    def forget(self, correction: str) -> None:
        """Tell no more of a correction."""
        self._entropy.pop(correction, None)
        self._counts = {key: counts for key, counts in self._counts.items() if key[0] != correction}

    def collect(self) -> Iterator[Metric]:
        """The families, as prometheus_client asks for them."""
        yield self._family("generation_tokens", "Sampled tokens", [((), self.tokens)])
        between = _histogram("inter_token_latency_seconds", "Between tokens")
        self.between.tell(between, (self._model,))
        yield between
        told = {
            "steps": "Steps of choices, steered or not",
            "open": "Steps at which the gate was open",
            "fired": f"Steps at which the correction acted{_SHADOW}",
            "flips": f"Steps whose most likely token it changed{_SHADOW}",
            "kl": f"KL(base || steered), summed over the steps{_SHADOW}",
        }
        for field, text in told.items():
            name = "steering_kl_nats" if field == "kl" else f"steering_{field}"
            values = [(key, getattr(counts, field)) for key, counts in self._counts.items()]
            yield self._family(name, text, values, "correction", "mode")
        entropy = _histogram("steering_entropy_nats", "Entropy of the base", "correction")
        for correction, buckets in self._entropy.items():
            buckets.tell(entropy, (self._model, correction))
        yield entropy

    def _family(
        self, name: str, text: str, values: Sequence[tuple[Sequence[str], float]], *labels: str
    ) -> CounterMetricFamily:
        family = CounterMetricFamily(f"trimtab:{name}", text, labels=["model_name", *labels])
        for key, value in values:
            family.add_metric([self._model, *key], value)
        return family


def _histogram(name: str, text: str, *labels: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"trimtab:{name}", text, labels=["model_name", *labels])
