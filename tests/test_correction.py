"""A correction's folder: what is written comes back; what is damaged or made for another base is refused by name."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch

from tiny import tiny_base, tiny_correction
from trimtab.errors import CorrectionError
from trimtab.steering.adapter import Adapter, LoraLayer, adapter_files
from trimtab.steering.atomic import write_bytes
from trimtab.steering.correction import BaseIdentity, ContrastCorrection, HeadCorrection, LoraCorrection, check
from trimtab.steering.folder import is_saved, load, save
from trimtab.steering.gate import Gate

BASE = BaseIdentity("tiny/llama", "f" * 64, "t" * 64, "c" * 64)


def nested(levels: int) -> dict[str, object]:
    return {} if levels == 1 else {"in": nested(levels - 1)}


def make(**changes: object) -> HeadCorrection:
    generator = torch.Generator().manual_seed(0)
    fields: dict[str, object] = {
        "name": "polite",
        "rank": 3,
        "top_k": 20,
        "base": BASE,
        "A": torch.randn(3, 8, generator=generator),
        "B": torch.randn(8, 3, generator=generator),
        "b": torch.randn(8, generator=generator),
        "hidden_scale": 2.5,
        "row_scale": 0.125,
        "gate": Gate(tau=0.75),
        "strength": 1.5,
        "provenance": {"task": "instructions", "seed": 3, "sätze": [1, 2]},
        "report": {"gain": 0.1},
    }
    return HeadCorrection(**(fields | changes))  # type: ignore[arg-type]


def test_a_saved_correction_comes_back_equal(tmp_path: Path) -> None:
    original = make()
    save(original, tmp_path / "deep" / "folder")
    back = load(tmp_path / "deep" / "folder")
    for f in dataclasses.fields(HeadCorrection):
        before, after = getattr(original, f.name), getattr(back, f.name)
        assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after, f.name
    assert sorted(p.name for p in (tmp_path / "deep" / "folder").iterdir()) == [
        "correction.json",
        "correction.safetensors",
    ]


def test_saving_again_replaces(tmp_path: Path) -> None:
    save(make(), tmp_path)
    save(make(strength=2.0, report=None), tmp_path)
    assert load(tmp_path).strength == 2.0
    assert load(tmp_path).report is None


def test_another_base_is_refused_with_both_names() -> None:
    check(make(), BASE)
    check(make(), dataclasses.replace(BASE, model="the same under another name"))
    for part in ("fingerprint", "tokenizer", "chat_template"):
        other = dataclasses.replace(BASE, model="other/qwen", **{part: "x"})
        with pytest.raises(CorrectionError, match=r"tiny/llama.*other/qwen"):
            check(make(), other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format is 2"),
        ({"rank": 4}, "shape"),
        ({"rank": "3"}, "rank has the wrong type"),
        ({"rank": True}, "rank has the wrong type"),
        ({"top_k": 0}, "top_k"),
        ({"cap": -1.0}, "cap"),
        ({"tier": "tail"}, "tier must be one of"),
        ({"tier": "lora"}, "adapter_model.safetensors: cannot be read"),
        ({"name": "../etc"}, "name"),
        ({"gate": {"kind": "mood", "tau": 1.0}}, "gate.kind"),
        ({"gate": {"tau": "high"}}, "tau has the wrong type"),
        ({"gate": {"calibration": [[0.1]]}}, "calibration"),
        ({"activation": "relu"}, "activation"),
        ({"base": None}, "base must be"),
        ({"colour": "red"}, "unknown field: colour"),
        ({"report": {"gain": math.nan}}, "is not JSON"),
        ({"report": {"note": "\ud800"}}, "is not JSON"),
        ({"provenance": nested(64)}, "64 levels deep"),
        ({"tensors_sha256": "0"}, "digest"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, object], words: str) -> None:
    save(make(), tmp_path)
    path = tmp_path / "correction.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CorrectionError, match=words) as caught:
        load(tmp_path)
    assert "correction.json" in str(caught.value)


def test_what_lies_less_deep_is_read(tmp_path: Path) -> None:
    save(make(provenance=nested(63)), tmp_path)
    assert load(tmp_path).provenance == nested(63)


@pytest.mark.parametrize("name", ["correction.json", "correction.safetensors"])
def test_a_missing_or_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    save(make(), tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(CorrectionError, match="correction"):
        load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CorrectionError, match=f"{name}: cannot be read"):
        load(tmp_path)


def test_files_of_two_different_writes_are_not_mixed(tmp_path: Path) -> None:
    save(make(), tmp_path / "one")
    save(make(b=torch.ones(8)), tmp_path / "two")
    (tmp_path / "one" / "correction.safetensors").replace(tmp_path / "two" / "correction.safetensors")
    with pytest.raises(CorrectionError, match="digest"):
        load(tmp_path / "two")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_must_be_finite(value: float) -> None:
    with pytest.raises(CorrectionError, match="A holds NaN"):
        make(A=torch.full((3, 8), value))
    with pytest.raises(CorrectionError, match="tau"):
        Gate(tau=value)


def test_a_lora_comes_back_equal_and_peft_can_read_it(tmp_path: Path) -> None:
    original = LoraCorrection(name="l", base=BASE, gate=Gate("entropy", 1.4), adapter=make_adapter())
    save(original, tmp_path)
    back = load(tmp_path)
    assert isinstance(back, LoraCorrection)
    assert (back.gate, back.name, back.adapter.config) == (original.gate, "l", original.adapter.config)
    for path, layer in original.adapter.layers.items():
        found = back.adapter.layers[path]
        assert torch.equal(found.A, layer.A)
        assert torch.equal(found.B, layer.B)
        assert found.scale == 16 / 8
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "correction.json",
    ]


def test_a_lora_cut_off_while_it_was_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its PEFT files alone would be a LoRA that is always on, made for any base."""
    replace, left = os.replace, 0

    def replace_until_killed(source: str, target: str) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_until_killed)
    for survived in range(3):
        folder, left = tmp_path / str(survived), survived
        with pytest.raises(KeyboardInterrupt):
            save(LoraCorrection(name="l", base=BASE, adapter=make_adapter()), folder)
        assert len(list(folder.glob("*[!p]"))) == survived
        assert not is_saved(folder)
        with pytest.raises(CorrectionError, match="cannot be read"):
            load(folder)
    left = 3
    save(LoraCorrection(name="l", base=BASE, adapter=make_adapter()), folder)
    assert is_saved(folder)
    assert load(folder).gate.kind == "entropy"


def test_a_peft_folder_is_a_lora_that_is_always_on(tmp_path: Path) -> None:
    for name, content in adapter_files(make_adapter()).items():
        (tmp_path / name).write_bytes(content)
    found = load(tmp_path)
    assert isinstance(found, LoraCorrection)
    assert found.gate.kind == "always"
    check(found, BASE)  # nothing in the folder says which base it is for


@pytest.mark.parametrize(
    ("folder", "name"),
    [("Ünï_1", "n-_1"), ("_x", "x"), (".hid", "hid"), ("r" * 90, "r" * 64), ("é", "lora"), ("a b", "a-b")],
)
def test_a_peft_folder_of_any_name_has_one_that_can_be_asked_for(tmp_path: Path, folder: str, name: str) -> None:
    for file, content in adapter_files(make_adapter()).items():
        write_bytes(tmp_path / folder / file, content)
    assert load(tmp_path / folder).name == name


@pytest.mark.parametrize("strength", [1e300, -101.0, math.inf, math.nan])
def test_a_strength_that_overflows_is_refused(strength: float) -> None:
    with pytest.raises(CorrectionError, match="strength must be within 100, not"):
        ContrastCorrection(name="mine", strength=strength)


@pytest.mark.parametrize("name", ["contrast", "none", "others"])
def test_names_that_mean_something_else_are_refused(name: str) -> None:
    base = tiny_base()
    with pytest.raises(CorrectionError, match=f"{name} is .*: give this correction another name"):
        check(tiny_correction(base, name), base.identity)
    contrast = ContrastCorrection(name=name)
    if name == "contrast":
        check(contrast, base.identity)
    else:
        with pytest.raises(CorrectionError, match="give this correction another name"):
            check(contrast, base.identity)


def test_a_contrast_needs_no_tensors_and_fits_any_base(tmp_path: Path) -> None:
    save(ContrastCorrection(name="c", prompt="Be wrong.", gate=Gate(ceiling=2.0)), tmp_path)
    back = load(tmp_path)
    assert isinstance(back, ContrastCorrection)
    assert (back.prompt, back.gate.ceiling, back.strength) == ("Be wrong.", 2.0, 0.5)
    check(back, BASE)


def test_rank_0_is_a_constant(tmp_path: Path) -> None:
    save(make(rank=0, A=torch.zeros(0, 8), B=torch.zeros(8, 0)), tmp_path)
    back = load(tmp_path)
    assert isinstance(back, HeadCorrection)
    assert back.A.shape == (0, 8)
    assert back.facts["parameters"] == 8


def make_adapter() -> Adapter:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(8, 12, generator=generator), torch.randn(6, 8, generator=generator)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["o_proj"], "bias": "none"}
    return Adapter({"model.layers.0.self_attn.o_proj": LoraLayer(A, B, 2.0)}, config)
