"""The layers of a Llama-like decoder with a quarter of the launches: what runs on a GPU wherever no adapter acts.

Invariant: computes what transformers' own layers compute, from the same memory: projections of one input lie one after
the other and the model's weights become views of them, so nothing is held twice. `prepare` (base.py) checks it against
the model's own forward and falls back to that when it differs.

Per layer: residual and norm, one product for q, k and v, attention that rotates on the way, one product out, residual
and norm, one product for gate and up, their SiLU, one product down. Of few rows, all products but the first are
streamed: gate, up and their SiLU are one launch, and the norms sum what the other two leave in parts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.kernels.dispatch import LayerKernels
from trimtab.kernels.places import Places, Rotary
from trimtab.server.model.kv import KVCache

# Whose attention is known to be rotation and softmax alone: parts of the same names may do more, and only far along,
# where no check looks (Ministral3 scales queries by position, SmolLM3 leaves out some layers' rotation).
_FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj"}


class _Projection(NamedTuple):
    weight: Tensor  # [out, in]
    bias: Tensor | None


class _Layer(NamedTuple):
    attention_norm: Tensor  # [hidden]
    qkv: _Projection
    query_norm: Tensor | None  # [head_dim], of families that norm their heads
    key_norm: Tensor | None
    out: _Projection
    mlp_norm: Tensor
    gate_up: _Projection
    down: _Projection
    scale: float  # of attention


def can_fuse(decoder: Any) -> bool:
    """Whether the decoder is of a known family, and built of the parts that FusedDecoder knows."""
    config = decoder.config
    if config.model_type not in _FAMILIES:
        return False
    parts = {name for name, _ in decoder.named_children()}
    if parts != {"embed_tokens", "layers", "norm", "rotary_emb"} or getattr(config, "hidden_act", None) != "silu":
        return False
    if any(getattr(layer.self_attn, "sliding_window", None) for layer in decoder.layers if hasattr(layer, "self_attn")):
        return False
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        return False
    return hasattr(decoder.norm, "variance_epsilon") and all(_is_known(layer) for layer in decoder.layers)


def _is_known(layer: Any) -> bool:
    if {name for name, _ in layer.named_children()} != _LAYER:
        return False
    attention, mlp = dict(layer.self_attn.named_children()), dict(layer.mlp.named_children())
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention[name] for name in _HEAD_NORMS if name in attention]
    linear = [attention.get(name) for name in _ATTENTION] + [mlp.get(name) for name in _MLP]
    return (
        attention.keys() - _HEAD_NORMS == _ATTENTION
        and len(attention.keys() & _HEAD_NORMS) != 1
        and mlp.keys() - {"act_fn"} == _MLP
        and all(type(part) is nn.Linear for part in linear)
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
    )


class FusedDecoder:
    """decoder = FusedDecoder(model.get_decoder(), kernels);  states = decoder(ids, places, cache)"""

    def __init__(self, decoder: Any, kernels: LayerKernels) -> None:
        """decoder: one that `can_fuse`. Its projections' weights are moved, and keep their values."""
        config = decoder.config
        self._kernels = kernels
        self._embed, self._rotary = decoder.embed_tokens, decoder.rotary_emb
        self._norm: Tensor = decoder.norm.weight
        self._eps: float = decoder.norm.variance_epsilon
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = getattr(config, "num_key_value_heads", None) or self._heads
        self._layers = [_fuse(layer) for layer in decoder.layers]

    @torch.inference_mode()
    def __call__(self, ids: Tensor, places: Places, cache: KVCache) -> Tensor:
        """ids int64 [tokens], packed as `places` says -> h after the last norm, [tokens, hidden]."""
        k = self._kernels
        x: Tensor = self._embed(ids)
        cos, sin = (t[0].contiguous() for t in self._rotary(x[None], places.position[None]))
        split = [self._heads, self._kv_heads, self._kv_heads]
        residual: Tensor | None = None
        for layer, keys, values in zip(self._layers, cache.keys, cache.values, strict=True):
            rotary = Rotary(cos, sin, layer.query_norm, layer.key_norm, self._eps)
            residual, h = k.add_norm(x, residual, layer.attention_norm, self._eps)
            q, key, value = torch.split(F.linear(h, *layer.qkv).view(len(h), sum(split), -1), split, 1)
            attended = k.attend(q, key, value, keys, values, places, layer.scale, None, rotary)
            x = self._product(attended.flatten(1), layer.out)
            residual, h = k.add_norm(x, residual, layer.mlp_norm, self._eps)
            x = self._product(self._activate(h, layer.gate_up), layer.down)
        return k.add_norm(x, residual, self._norm, self._eps)[1]

    def _product(self, x: Tensor, projection: _Projection) -> Tensor:
        """[rows, out], or its parts, float32 [parts, rows, out]."""
        weight, bias = projection
        if bias is None and self._kernels.streams(x, weight):
            return self._kernels.stream(x, weight)
        return F.linear(x, weight, bias)

    def _activate(self, x: Tensor, gate_up: _Projection) -> Tensor:
        """SiLU(gate) * up, [rows, width]."""
        weight, bias = gate_up
        if bias is None and self._kernels.streams(x, weight):
            return self._kernels.stream_silu(x, weight)
        return self._kernels.silu_mul(F.linear(x, weight, bias))


def _fuse(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    normed = hasattr(attention, "q_norm")
    return _Layer(
        layer.input_layernorm.weight,
        _join(attention.q_proj, attention.k_proj, attention.v_proj),
        attention.q_norm.weight if normed else None,
        attention.k_norm.weight if normed else None,
        _join(attention.o_proj),
        layer.post_attention_layernorm.weight,
        _join(mlp.gate_proj, mlp.up_proj),
        _join(mlp.down_proj),
        attention.scaling,
    )


def _join(*linears: nn.Linear) -> _Projection:
    """Layers of one input as one; they become views of it."""
    if len(linears) == 1:
        return _Projection(linears[0].weight, linears[0].bias)
    weight = torch.cat([linear.weight.detach() for linear in linears])
    at = 0
    for linear in linears:
        linear.weight = nn.Parameter(weight[at : at + linear.out_features], requires_grad=linear.weight.requires_grad)
        at += linear.out_features
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(linears))
    return _Projection(weight, torch.cat(biases) if biases else None)
