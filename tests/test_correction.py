"""A correction's folder: what is written comes back; what is damaged or made for another base is refused by name."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from trimtab.errors import CorrectionError
from trimtab.steering.correction import BaseIdentity, Correction, Gate, check, load, save

BASE = BaseIdentity("tiny/llama", "f" * 64, "t" * 64, "c" * 64)


def make(**changes: object) -> Correction:
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
    return Correction(**(fields | changes))  # type: ignore[arg-type]


def test_a_saved_correction_comes_back_equal(tmp_path: Path) -> None:
    original = make()
    save(original, tmp_path / "deep" / "folder")
    back = load(tmp_path / "deep" / "folder")
    for f in dataclasses.fields(Correction):
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
        ({"tier": "lora"}, "tier"),
        ({"name": "../etc"}, "name"),
        ({"gate": {"kind": "random", "tau": 1.0}}, "gate.kind"),
        ({"gate": {"tau": 1.0}}, "gate lacks kind"),
        ({"base": None}, "base must be"),
        ({"colour": "red"}, "unknown field: colour"),
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
