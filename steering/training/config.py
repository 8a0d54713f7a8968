"""Everything `trimtab fit` can be told: one frozen dataclass, validated here, passed whole, stored with the run.

Invariant: two runs with equal FitConfigs on one base, task and CPU make the same correction, bit for bit, whether or
not they were killed on the way. On CUDA, sums inside the LoRA's backward pass come in an order of the device's own, so
there two runs agree up to rounding. FREE fields change the speed, and rounding. The command line's options are these
fields; their help is the line beside each.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from trimtab.errors import InvalidRequest

FREE = ("threads",)  # a resumed run may change these
SAMPLED = (  # what the rollouts hang on; not on how they are scored
    "model", "task", "held_out", "seed", "dtype", "device", "problems", "samples", "temperature", "top_p", "max_tokens",
    "slots",
)  # fmt: skip
CANDIDATES = 64  # kept a position: the most that a correction may have

_DISTILLED: dict[str, Any] = {
    "problems": 256,
    "rank": 16,
    "top_k": 32,
    "learning_rate": 2e-3,
    "epochs": 8,
    "strengths": (0.5, 0.7, 1.0, 1.4),
    "kl_limit": 0.25,
    "lora_kl_limit": 0.03,  # from rewards: useful ones stayed below 0.02; one that ended at 0.05 gained nothing
}
_OF_LORA: dict[str, Any] = {"problems": 256, "strengths": (1.0,), "kl_limit": 0.0, "lora_kl_limit": 0.03}
ROUTES: dict[tuple[str, str], dict[str, Any]] = {  # (tier, via): the defaults that go with it
    ("head", "direct"): {**_DISTILLED, "problems": 128, "rank": 8, "top_k": 20, "learning_rate": 1e-3, "epochs": 25},
    ("head", "lora"): _DISTILLED,
    ("head", "teacher"): _DISTILLED,
    ("lora", "direct"): _OF_LORA,
    ("lora", "teacher"): {**_OF_LORA, "lora_kl_limit": 0.3},  # which may differ from the base anywhere
}

PRESETS: dict[str, dict[str, Any]] = {  # of the LoRA's training
    "small": {
        "lora_targets": ("o_proj",),
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_rate": 1e-4,
        "lora_warmup": 10,
        "lora_epochs": 1.0,
    },
    "paper": {
        "lora_targets": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "lora_rank": 32,
        "lora_alpha": 64,
        "lora_rate": 1e-4,
        "lora_warmup": 50,
        "lora_epochs": 1.35,
    },
}

ACTIVATIONS = ("none", "silu")  # correction.py's, which this file cannot import: it must not need torch
GATES = {"entropy": 0.5, "varentropy": 0.5, "margin": -0.8, "always": 0.5}  # kind -> tau where none is given

FEWEST = 4  # problems of mixed success that can be learned from
MAX_SAMPLES = 128  # that one request to the engine may ask for
STRENGTH_LIMIT = 32.0  # cap * tanh saturates long before


def option(default: Any, help: str, begins: str = "") -> Any:
    """A field with a default and its line of documentation. begins: the heading that `--help` puts above it."""
    return dataclasses.field(default=default, metadata={"help": help, "begins": begins})


@dataclass(frozen=True)
class FitConfig:
    """How a correction is fitted. Defaults: a direct head-tier fit of a small model on one core, in minutes.

    Fields that are None at first take their value from ROUTES, PRESETS or GATES."""

    tier: str = option(
        "head", "head, a function of the last hidden state; or lora, an adapter inside the network", "what is made"
    )
    via: str = option("direct", "direct, from rewards; lora, a head distilled from a LoRA made of them; or teacher")
    teacher: str | None = option(None, "via teacher: the tuned model, or a PEFT folder made for the base")

    model: str = option("demo", "the base: demo, a folder, a GGUF file or a model's id", "the base and the task")
    task: str = option("instructions", "instructions, or a JSONL file's path")
    verifier: str | None = option(None, "for a file: math, final, exact, regex or module:function")
    held_out: str | None = option(None, "for a file: a second JSONL file to judge on; default: a hash picks lines")
    name: str = option("", "the correction's name; default: the output folder's")
    seed: int = option(0, "of everything random: problems, rollouts, initial weights, order, shuffling")
    dtype: str = option("auto", "of the base: auto, float32, bfloat16, float16")
    device: str = option("auto", "auto, cpu or cuda")

    problems: int = option(
        None, "training problems to sample; by default 256, for a head fitted directly 128", "completions to learn from"
    )
    samples: int = option(8, "completions sampled a training problem")
    temperature: float = option(0.6, "of sampling, in fitting and in judging; the fit's likelihood ratio uses it too")
    top_p: float = option(0.95, "nucleus of sampling")
    max_tokens: int = option(96, "most tokens a completion may have")

    gate: str = option(
        "entropy",
        "where it acts: entropy, varentropy, margin (of the two best tokens) or always",
        "where it acts, and which positions it learns from",
    )
    tau: float = option(
        None, "the gate opens above; by default 0.5 (margin: -0.8). With always: learned where entropy is above"
    )
    keep_problems: int = option(0, "use this many problems, those of pass rate nearest 0.5; 0: all of mixed success")
    drop_longest: float = option(0.2, "share of each problem's completions to leave out, the longest")
    advantage_clip: float = option(2.5, "largest absolute advantage")

    rank: int = option(
        None, "of a head, 0 a constant vector; by default 8, distilled 16. With --tier lora, the LoRA's", "a head"
    )
    top_k: int = option(None, f"the base's best tokens it may move, 1 to {CANDIDATES}; by default 20, distilled 32")
    activation: str = option("none", "between a head's two matrices: none or silu")
    cap: float = option(3.0, "largest change of a logit")
    learning_rate: float = option(None, "of AdamW; by default 1e-3, distilled 2e-3 falling to 0")
    batch: int = option(256, "positions a step of AdamW")
    epochs: int = option(None, "most passes over the positions; by default 25, distilled 8")
    ratio_clip: float = option(0.5, "the likelihood ratio counts within 1 minus and 1 plus this")
    kl_weight: float = option(0.02, "of KL(base || corrected) in the loss")
    kl_budgets: tuple[float, ...] = option((0.06, 0.12, 0.18), "stop where held-out KL reaches each; the best is kept")
    kl_limit: float = option(
        None,
        "most held-out KL(base || corrected) of what is kept, in nats; 0: any. By default 0.25, a LoRA any",
    )

    lora_preset: str = option("small", "defaults of the next six: small, or paper", "a LoRA")
    lora_targets: tuple[str, ...] = option(None, "linear layers that the LoRA adapts: small o_proj, paper q,k,v,o_proj")
    lora_rank: int = option(None, "of the LoRA: small 8, paper 32")
    lora_alpha: int = option(None, "the LoRA's update is scaled by this over its rank: small 16, paper 64")
    lora_rate: float = option(None, "learning rate of the LoRA's AdamW: 1e-4")
    lora_warmup: int = option(None, "steps over which that rate rises: small 10, paper 50")
    lora_epochs: float = option(None, "passes of the LoRA over the completions: small 1, paper 1.35")
    lora_batch: int = option(8, "completions a step of the LoRA")
    lora_kl: float = option(0.2, "of KL(base || LoRA) at the other positions, in the LoRA's loss")
    lora_kl_limit: float = option(
        None,
        "end the LoRA where it is further than this from the base there; 0: never. By default 0.03, imitating 0.3",
    )
    teacher_samples: int = option(
        4, "completions of the teacher to distil from, a problem", "distilling, choosing and judging"
    )
    strengths: tuple[float, ...] = option(
        None,
        "a distilled correction is tried at each; the best within the limit is kept; default 0.5 0.7 1 1.4, a LoRA 1",
    )

    validation_problems: int = option(64, "further problems, to choose a budget or strength on")
    validation_samples: int = option(4, "completions sampled a validation problem, for each of those")
    test_problems: int = option(200, "held-out problems to judge on")
    test_samples: int = option(2, "completions sampled a held-out problem, for each policy")

    slots: int = option(32, "completions sampled at once; in bfloat16 it changes their rounding too", "speed")
    threads: int = option(1, "torch threads: speed, and how sums are rounded")

    def __post_init__(self) -> None:
        self._require("tier", self.tier in ("head", "lora"), "must be head or lora")
        vias = [via for tier, via in ROUTES if tier == self.tier]
        self._require("via", self.via in vias, f"must be one of {', '.join(vias)} for the tier {self.tier}")
        self._require(
            "teacher",
            (self.teacher is not None) == (self.via == "teacher"),
            "must be given with --via teacher, and only then",
        )
        self._require("gate", self.gate in GATES, f"must be one of {', '.join(GATES)}")
        self._require("lora_preset", self.lora_preset in PRESETS, f"must be one of {', '.join(PRESETS)}")
        if self.tier == "lora" and self.rank is not None:
            self._require("lora_rank", self.lora_rank in (None, self.rank), f"must be left out, or rank's {self.rank}")
            self._set("lora_rank", self.rank)
            if self.lora_alpha is None:
                self._set("lora_alpha", 2 * self.rank)
        for name, value in {
            **ROUTES[self.tier, self.via],
            **PRESETS[self.lora_preset],
            "tau": GATES[self.gate],
        }.items():
            if getattr(self, name) is None:
                self._set(name, value)
        for name, least in (("rank", 0), ("epochs", 1)):
            value = getattr(self, name)
            self._require(name, value is None or value >= least, f"must be at least {least}")
        self._require("rank", self.rank is None or self.rank <= 1024, "must be at most 1024")
        self._require("activation", self.activation in ACTIVATIONS, f"must be one of {', '.join(ACTIVATIONS)}")
        self._require("activation", self.activation == "none" or self.rank != 0, "must be none for a head of rank 0")
        self._require("seed", 0 <= self.seed < 2**63, "must be at least 0 and below 2**63")
        for name in ("problems", "max_tokens", "batch", "slots", "threads"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("lora_rank", "lora_warmup", "lora_batch", "teacher_samples"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        for name in ("validation_problems", "validation_samples", "test_samples"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        self._require("samples", self.samples >= 2, "must be at least 2, as rewards must differ")
        for name in ("samples", "teacher_samples", "validation_samples", "test_samples"):
            self._require(name, getattr(self, name) <= MAX_SAMPLES, f"must be at most {MAX_SAMPLES}")
        self._require("test_problems", self.test_problems >= 2, "must be at least 2")
        kept = self.keep_problems == 0 or self.keep_problems >= FEWEST
        self._require("keep_problems", kept, f"must be 0, which is all, or at least {FEWEST}")
        self._require("top_k", self.top_k is None or 1 <= self.top_k <= CANDIDATES, f"must be 1 to {CANDIDATES}")
        self._require("drop_longest", 0 <= self.drop_longest < 1, "must be at least 0 and below 1")
        self._require("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1")
        self._require("ratio_clip", 0 < self.ratio_clip < 1, "must be above 0 and below 1")
        positive = ("temperature", "advantage_clip", "cap", "learning_rate", "lora_alpha", "lora_rate", "lora_epochs")
        for name in positive:
            value = getattr(self, name)
            self._require(name, value is None or (math.isfinite(value) and value > 0), "must be above 0")
        for name in ("learning_rate", "lora_rate"):
            value = getattr(self, name)
            self._require(name, value is None or value <= 1, "must be at most 1")
        self._require("temperature", self.temperature <= 100, "must be at most 100")
        self._require("tau", math.isfinite(self.tau), "must be a finite number")
        self._require("tau", self.gate != "margin" or -1 <= self.tau < 0, "must be -1 to 0 for the gate margin")
        for name in ("kl_weight", "kl_limit", "lora_kl", "lora_kl_limit"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value >= 0, "must be at least 0")
        self._require("lora_targets", len(self.lora_targets) > 0, "must name at least one layer")
        self._require("strengths", len(self.strengths) > 0, "must name at least one strength")
        self._require(
            "strengths", all(0 < s <= STRENGTH_LIMIT for s in self.strengths), "must be above 0 and at most 32"
        )
        self._require("strengths", sorted(set(self.strengths)) == list(self.strengths), "must rise")
        self._require("kl_budgets", len(self.kl_budgets) > 0, "must name at least one budget")
        self._require("kl_budgets", all(0 < b <= 1000 for b in self.kl_budgets), "must be above 0 and at most 1000")
        self._require("kl_budgets", sorted(set(self.kl_budgets)) == list(self.kl_budgets), "must rise")
        for name in ("strengths", "kl_budgets"):  # which name the candidates
            shown = {f"{value:g}" for value in getattr(self, name)}
            self._require(name, len(shown) == len(getattr(self, name)), "must differ within six digits")
        wrong_name = self.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name)
        self._require(
            "name", not wrong_name, "must be 1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or a digit: give --name"
        )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _require(self, name: str, holds: bool, words: str) -> None:
        if not holds:
            raise InvalidRequest(f"{name} {words}, not {getattr(self, name)!r}", name)
