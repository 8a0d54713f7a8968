"""The base: the frozen model and its tokenizer, run over KV slots.

Invariant: what `forward` computes equals transformers' own forward on the same weights; this is checked when a model is
loaded, so that a family our attention does not cover is refused instead of served wrong.

    base = load_base("demo")
    states = base.forward(token_ids, KVBatch(cache, spans))      # final hidden states
    logits = base.logits(states[batch.last])
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.errors import UnsupportedModel
from trimtab.kernels.dispatch import LayerKernels, layers_for, make_ready
from trimtab.server.model.adapters import AdaptedLayers
from trimtab.server.model.attention import IMPLEMENTATION, FixedBatch, KVBatch, Span
from trimtab.server.model.fused import FusedDecoder, can_fuse
from trimtab.server.model.kv import KVCache
from trimtab.server.model.linear import pack_linears
from trimtab.server.model.staging import stage
from trimtab.server.model.weights import locate
from trimtab.steering.identity import identify

log = logging.getLogger(__name__)

LAYER_TYPES = {"full_attention", "sliding_attention"}
DEVICES = ("cpu", "cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Base:
    """A causal language model with a head. Wraps a transformers model made with our attention, on its device."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.config = model.config.get_text_config()
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        head = model.get_output_embeddings()
        decoder = model.get_decoder()
        if head is None or decoder is None:
            raise UnsupportedModel(f"{name} is not a causal language model with an output head")
        self.head_weight: Tensor = head.weight  # [vocab, hidden]
        self.vocab, self.hidden = head.weight.shape
        self.max_len = _position_limit(self.config)
        self.eos = frozenset(token for token in _end_tokens(model, tokenizer) if 0 <= token < self.vocab)
        self.identity = identify(model, tokenizer, name)
        self.adapted = AdaptedLayers(model)
        self._decoder = decoder
        self._fused: FusedDecoder | None = None  # the decoder's layers in fewer launches, where that was shown equal

    def new_cache(self, slots: int, length: int) -> KVCache:
        """An empty cache for `slots` sequences of up to `length` tokens."""
        return KVCache(self.config, slots, length, self.dtype, self.device)

    @torch.inference_mode()
    def forward(self, token_ids: Sequence[int], batch: KVBatch) -> Tensor:
        """The packed tokens of one step -> h after the last norm, [tokens, hidden]. Writes their keys and values."""
        return self.run(stage([np.asarray(token_ids, dtype=np.int64)], self.device)[0], batch)

    @torch.inference_mode()
    def run(self, ids: Tensor, batch: KVBatch | FixedBatch, plainly: bool = False) -> Tensor:
        """`forward` of ids int64 [tokens] that are on the device. Here it is chosen what computes the layers.

        plainly: by transformers' own, as where adapters act.
        """
        if self._fused is not None and batch.places is not None and not (batch.adapted or plainly):
            return self._fused(ids, batch.places, batch.cache)
        with self.adapted.acting(batch.adapted):
            out = self._decoder(ids[None], position_ids=batch.position[None], use_cache=False, kv_batch=batch)
        states: Tensor = out.last_hidden_state[0]
        return states

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """h [n, hidden] -> base logits [n, vocab] in the model's dtype, with the family's own soft-cap."""
        return read_logits(self.model, states)

    @torch.inference_mode()
    def logits_into(self, states: Tensor, out: Tensor) -> None:
        """`logits`, written to `out`: without a copy where the head is a plain product."""
        head = self.model.get_output_embeddings()
        if type(head) is nn.Linear and head.bias is None and _soft_cap(self.model) is None:
            torch.mm(states, head.weight.T, out=out)
        else:
            out.copy_(self.logits(states))

    def fuse(self, kernels: LayerKernels) -> None:
        """Run the layers in fewer launches from now on, if they are of a known kind and come out the same."""
        if not can_fuse(self._decoder):
            return
        self._fused = FusedDecoder(self._decoder, kernels)
        try:
            _check_parity(self)
        except UnsupportedModel as error:
            log.warning("%s; its layers run as transformers has them", error)
            self._fused = None

    def drawn_from(self, prompts: Sequence[tuple[int, ...]], completions: Sequence[Sequence[int]]) -> list[Tensor]:
        """The h that each completion's tokens were drawn from, [tokens, hidden] each. Neither may be empty.

        A prompt that several completions share is read once."""
        ends = [len(prompt) + len(tokens) - 1 for prompt, tokens in zip(prompts, completions, strict=True)]
        cache = self.new_cache(len(prompts), max(ends))
        first: dict[tuple[int, ...], int] = {}
        for slot, prompt in enumerate(prompts):
            first.setdefault(prompt, slot)
        read = self._read(cache, {slot: (0, prompt) for prompt, slot in first.items()})
        for slot, prompt in enumerate(prompts):
            if first[prompt] != slot:
                cache.copy(first[prompt], slot, len(prompt))
        pairs = enumerate(zip(prompts, completions, strict=True))
        rest = self._read(cache, {slot: (len(p), tokens[:-1]) for slot, (p, tokens) in pairs if len(tokens) > 1})
        last = [read[first[prompt]][-1:] for prompt in prompts]
        return [torch.cat([h, rest[slot]]) if slot in rest else h for slot, h in enumerate(last)]

    def _read(self, cache: KVCache, new: Mapping[int, tuple[int, Sequence[int]]]) -> dict[int, Tensor]:
        """new: a slot's tokens, and how many came before them -> their h, [tokens, hidden] a slot."""
        # single tokens first, each kind by slot, as KVBatch asks
        order = sorted(new, key=lambda slot: (len(new[slot][1]) > 1, slot))
        if not order:
            return {}
        spans = [Span(slot, start, start + len(tokens)) for slot in order for start, tokens in [new[slot]]]
        packed = self.forward([token for slot in order for token in new[slot][1]], KVBatch(cache, spans))
        return dict(zip(order, torch.split(packed, [len(new[slot][1]) for slot in order]), strict=True))


def read_logits(model: Any, states: Tensor) -> Tensor:
    """h [n, hidden] -> the logits of a transformers model [n, vocab]. Gradients pass through."""
    logits: Tensor = model.get_output_embeddings()(states)
    soft_cap = _soft_cap(model)
    return logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap


def _soft_cap(model: Any) -> float | None:
    cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return cap


def load_base(model: str, dtype: str = "auto", device: str = "auto", threads: int = 1) -> Base:
    """Load MODEL (see weights.py). dtype: auto, float32, bfloat16, float16; device: auto, cpu, cuda.

    auto dtype is bfloat16 where the device multiplies it natively, else float32. threads: torch's, for the calling
    thread, here and afterwards: more than the free cores is far slower than one. Raises UnsupportedModel.
    """
    torch.set_num_threads(threads)
    weights = locate(model)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in DEVICES or (device == "cuda" and not torch.cuda.is_available()):
        raise UnsupportedModel(
            f"device {device!r} is not here: it must be auto, cpu, or cuda where there is a CUDA GPU"
        )
    where = torch.device(device)
    make_ready(where)
    if dtype != "auto" and dtype not in DTYPES:
        raise UnsupportedModel(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype}")
    kind = _native_dtype(where) if dtype == "auto" else DTYPES[dtype]
    try:
        loaded = AutoModelForCausalLM.from_pretrained(weights.path, dtype=kind, attn_implementation=IMPLEMENTATION)
        tokenizer = AutoTokenizer.from_pretrained(weights.path)
    except Exception as error:  # libraries raise what they like for a damaged or unknown model
        raise UnsupportedModel(f"{model} cannot be loaded: {error}") from error
    return prepare(loaded.to(where), tokenizer, weights.name)


def prepare(model: Any, tokenizer: Any, name: str) -> Base:
    """Check a loaded transformers model against its own forward and make it a Base. Raises UnsupportedModel."""
    kind = f"{name} ({type(model).__name__})"
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(f"{kind} does not support transformers' attention back ends")
    unknown = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - LAYER_TYPES
    if unknown:
        raise UnsupportedModel(f"{kind} has layers of kinds that are not supported: {', '.join(sorted(unknown))}")
    try:
        base = Base(model, tokenizer, name)
        _check_parity(base)
        if (kernels := layers_for(base.device)) is not None:
            base.fuse(kernels)
    except UnsupportedModel:
        raise
    except Exception as error:  # a family that does something else with its cache or head fails anywhere in here
        raise UnsupportedModel(f"{kind} does not run on this engine: {type(error).__name__}: {error}") from error
    pack_linears(model)
    return base


@torch.inference_mode()
def _check_parity(base: Base) -> None:
    """A chunk, a second chunk and a decode step through our cache, against transformers' plain forward.

    Long enough to pass a sliding window of up to 1000 tokens; a longer one is checked as far as that. On a GPU, the
    chunks are of more rows than kernels/stream.py takes, and the decode step of one.
    """
    window = min(getattr(base.config, "sliding_window", None) or 0, 1000)
    length = min(window + 40, base.max_len)
    ids = [(7 * i + 3) % base.vocab for i in range(length)]
    cache = base.new_cache(1, length)
    cuts = (0, length // 2, length - 1, length)
    steps = [base.forward(ids[a:b], KVBatch(cache, [Span(0, a, b)])) for a, b in itertools.pairwise(cuts)]
    ours = base.logits(torch.cat(steps)).float()
    base.model.set_attn_implementation("sdpa" if base.model._supports_sdpa else "eager")
    try:
        plain = base.model(torch.tensor([ids], device=base.device), use_cache=False).logits[0].float()
    finally:
        base.model.set_attn_implementation(IMPLEMENTATION)
    p, q = plain.log_softmax(-1), ours.log_softmax(-1)
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    if not divergence < (1e-5 if base.dtype == torch.float32 else 0.05):
        raise UnsupportedModel(
            f"{base.name} ({type(base.model).__name__}): our forward differs from transformers' by a KL of "
            f"{divergence:.2g} nats; its attention or head does something this engine does not know"
        )


def _position_limit(config: Any) -> int:
    """The most tokens a sequence may have.

    Rope of the kinds "longrope" and "dynamic" changes with the longest position of a whole step, so that one request
    would alter another's: such models are served up to the length where it begins to.
    """
    limit = int(getattr(config, "max_position_embeddings", None) or 4096)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]
    for kind in kinds:
        if kind.get("rope_type") in ("longrope", "dynamic"):
            original = kind.get("original_max_position_embeddings")
            limit = min(limit, int(original or getattr(config, "original_max_position_embeddings", None) or limit))
    return limit


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that the model, its generation config or its tokenizer calls end-of-text."""
    found: set[int] = set()
    for source in (model.config, getattr(model, "generation_config", None), tokenizer):
        value = getattr(source, "eos_token_id", None)
        found.update(value if isinstance(value, list) else [value] if value is not None else [])
    return frozenset(found)


def _native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA and on CPUs that multiply it in hardware, else float32."""
    if device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False):
        return torch.bfloat16
    return torch.float32
