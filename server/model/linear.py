"""Linear layers whose bf16 weight is laid out once for oneDNN instead of at every call.

The operators are private to torch, so a layer is replaced only if the packed result equals the plain one to bf16's
precision on a probe; otherwise the model stays as it is. fp32 models are never touched: they are the ones compared bit
for bit.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 32  # the batch the layout is tuned for


class PackedLinear(nn.Module):
    """nn.Linear for inference, bf16 on CPU: y = x W^T + b."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] bf16 -> [..., out_features] bf16."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y

    def unpack(self) -> nn.Linear:
        """The plain layer again: the layout moves the weight's values and changes none."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.packed.to_dense().clone(), requires_grad=False)
        plain.bias = self.bias
        return plain


def copy_unpacked(model: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of a transformers model with plain linear layers: adapters can be put on it and gradients pass through.

    It shares the frozen weights, but for packed ones, or all of them where another dtype is asked for."""
    plain: dict[int, Any] = {id(m): m.unpack() for m in model.modules() if isinstance(m, PackedLinear)}
    dtype = dtype or model.dtype
    if dtype == model.dtype:
        plain |= {id(parameter): parameter for parameter in model.parameters()}
    duplicate = copy.deepcopy(model, plain)  # deepcopy takes what it finds in its memo for the copy
    duplicate.tie_weights()
    return duplicate if dtype == model.dtype else duplicate.to(dtype)


@torch.inference_mode()
def pack_linears(model: nn.Module) -> int:
    """Replace the model's bf16 CPU linears in place. -> how many were replaced; 0 where torch lacks the operators."""
    replaced = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if (
                type(child) is not nn.Linear
                or child.weight.dtype != torch.bfloat16
                or child.weight.device.type != "cpu"
            ):
                continue
            packed = _try_pack(child)
            if packed is None:
                return replaced
            setattr(module, name, packed)
            replaced += 1
    return replaced


def _try_pack(linear: nn.Linear) -> PackedLinear | None:
    """The packed layer, or None if this build of torch cannot pack or computes something else."""
    try:
        packed = PackedLinear(linear)
        probe = torch.linspace(-1, 1, 3 * linear.in_features).view(3, -1).bfloat16()
        expected, got = linear(probe).float(), packed(probe).float()
    except (RuntimeError, AttributeError, NotImplementedError):
        return None
    scale = expected.abs().max().clamp(min=1e-6)
    return packed if (got - expected).abs().max() <= 2e-2 * scale else None
