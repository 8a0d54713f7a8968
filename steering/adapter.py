"""A LoRA as plain tensors, and PEFT's folder: adapter_config.json + adapter_model.safetensors. No pickle, no peft.

Invariant: an Adapter that was read adds exactly scale * (x A^T) B^T to the outputs of the layers it names, and nothing
else: a folder that asks for more (DoRA, biases, whole modules, embeddings) is refused, never half applied.

    adapter = read_adapter("runs/lora");  adapter.layers["model.layers.0.self_attn.o_proj"].B
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from trimtab.errors import CorrectionError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
# What PEFT may be asked for beyond the plain update: any value but these is refused.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (False, None),
    "use_qalora": (False, None),
    # Others change the base's weights too (pissa, olora, corda, loftq): PEFT can save those as a plain LoRA.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
}


class LoraLayer(NamedTuple):
    """What one linear layer gains: y += scale * (x A^T) B^T."""

    A: Tensor  # [rank, in_features]
    B: Tensor  # [out_features, rank]
    scale: float


class Adapter(NamedTuple):
    """A LoRA of one base. config: PEFT's own description, as JSON values; a folder is written from it."""

    layers: Mapping[str, LoraLayer]  # by the layer's path in the transformers model
    config: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max(len(layer.A) for layer in self.layers.values())

    @property
    def parameters(self) -> int:
        """How many numbers were learned."""
        return sum(layer.A.numel() + layer.B.numel() for layer in self.layers.values())


def read_adapter(folder: str | Path) -> Adapter:
    """Read a PEFT folder. Raises CorrectionError naming the file and what is wrong."""
    try:
        config = (Path(folder) / CONFIG_FILE).read_bytes()
        content = (Path(folder) / WEIGHTS_FILE).read_bytes()
    except OSError as error:
        hint = "; pickled adapters are not read, save it as safetensors" if WEIGHTS_FILE in str(error) else ""
        raise CorrectionError(f"{error.filename}: cannot be read ({error.strerror}){hint}") from error
    try:
        return parse_adapter(config, content)
    except CorrectionError as error:
        raise CorrectionError(f"{folder}: {error}") from error


def parse_adapter(described: bytes, content: bytes) -> Adapter:
    """Of the bytes of adapter_config.json and adapter_model.safetensors. Raises CorrectionError."""
    try:
        config = json.loads(described)
        json.dumps(config, ensure_ascii=False, allow_nan=False).encode()  # as a folder is written from it
    except (ValueError, RecursionError) as error:
        raise CorrectionError(f"{CONFIG_FILE}: is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CorrectionError(f"{CONFIG_FILE} must hold a JSON object")
    for field, plain in _PLAIN.items():
        if field in config and config[field] not in plain:
            raise CorrectionError(f"{CONFIG_FILE} asks for {field} = {config[field]!r}, which is not supported")
    try:
        tensors = load_tensors(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorrectionError(f"{WEIGHTS_FILE} is not a safetensors file ({error})") from error
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise CorrectionError(f"{WEIGHTS_FILE} holds {name}, which is no LoRA of a linear layer")
        if tensor.dim() != 2 or not bool(torch.isfinite(tensor.float()).all()):
            raise CorrectionError(f"{WEIGHTS_FILE}: {name} must be a matrix of finite numbers")
        sides.setdefault(found["layer"], {})[found["side"]] = tensor
    if not sides:
        raise CorrectionError(f"{WEIGHTS_FILE} holds no layer")
    layers = {layer: _layer(layer, pair, config) for layer, pair in sorted(sides.items())}
    return Adapter(layers, config)


def adapter_files(adapter: Adapter) -> dict[str, bytes]:
    """The two files of its PEFT folder, by name: equal adapters make equal bytes."""
    tensors = {}
    for path, layer in adapter.layers.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = layer.A.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = layer.B.detach().cpu().contiguous()
    config = json.dumps(adapter.config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    return {WEIGHTS_FILE: save_tensors(tensors), CONFIG_FILE: config.encode()}


def _layer(path: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoraLayer:
    if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
        shapes = {side: list(tensor.shape) for side, tensor in sorted(pair.items())}
        raise CorrectionError(f"{WEIGHTS_FILE}: {path} must have A [rank, in] and B [out, rank], not {shapes}")
    rank = pair["A"].shape[0]
    alpha = _of_layer(config.get("alpha_pattern"), path, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        raise CorrectionError(f"{CONFIG_FILE}: lora_alpha must be a positive number, not {alpha!r}")
    return LoraLayer(pair["A"], pair["B"], alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _of_layer(patterns: Any, path: str, default: Any) -> Any:
    """PEFT's per-layer override: the first pattern that matches the end of the layer's path, whole names only."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return value
    return default
