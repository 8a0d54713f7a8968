"""A PEFT folder: what is read, and what is refused because it would be half applied."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trimtab.errors import CorrectionError
from trimtab.steering.adapter import adapter_files, read_adapter

LAYER = "model.layers.1.mlp.up_proj"


def write(folder: Path, config: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(plain | (config or {})))
    if tensors is None:
        tensors = {
            f"base_model.model.{LAYER}.lora_A.weight": torch.ones(4, 6),
            f"base_model.model.{LAYER}.lora_B.weight": torch.ones(10, 4),
        }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"up_proj": 4}}, 1.0),
        ({"alpha_pattern": {"layers.0.mlp.up_proj": 4}}, 2.0),
        ({"alpha_pattern": {"proj": 4}}, 2.0),  # only whole names match
    ],
)
def test_the_scale_is_pefts(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    adapter = read_adapter(write(tmp_path, config))
    assert adapter.layers[LAYER].scale == scale
    assert (adapter.rank, adapter.parameters) == (4, 64)


def test_writing_what_was_read_gives_an_equal_adapter(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path))
    for name, content in adapter_files(adapter).items():
        (tmp_path / name).write_bytes(content)
    assert adapter_files(read_adapter(tmp_path)) == adapter_files(adapter)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"lora_dropout": math.nan}, "is not JSON"),
        ({"base_model_name_or_path": "\ud800"}, "is not JSON"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"lora_alpha": "8"}, "lora_alpha"),
    ],
)
def test_what_would_be_half_applied_is_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(CorrectionError, match=words):
        read_adapter(write(tmp_path, config))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"base_model.model.{LAYER}.lora_A.weight": torch.ones(4, 6)}, "must have A"),
        ({"base_model.model.lm_head.weight": torch.ones(4, 6)}, "no LoRA of a linear layer"),
        ({f"base_model.model.{LAYER}.lora_A.weight": torch.full((4, 6), torch.nan)}, "finite"),
        ({}, "no layer"),
    ],
)
def test_odd_tensors_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(CorrectionError, match=words):
        read_adapter(write(tmp_path, tensors=tensors))


def test_a_missing_file_is_named_and_pickles_are_not_read(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CorrectionError, match="save it as safetensors"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CorrectionError, match=r"adapter_config\.json: cannot be read"):
        read_adapter(tmp_path)
