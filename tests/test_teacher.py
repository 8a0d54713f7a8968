"""Teachers: what they say of the base's candidates, and who may not be one."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import tiny_base, tiny_lora
from trimtab.errors import CorrectionError, UnsupportedModel
from trimtab.server.model.base import Base
from trimtab.server.model.linear import PackedLinear
from trimtab.steering.folder import save
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.training import lora, teacher
from trimtab.steering.training.config import FitConfig
from trimtab.steering.training.features import CANDIDATES, cache_features, states_of
from trimtab.steering.training.selection import Item
from trimtab.steering.training.teacher import adapt, cache_targets, load_teacher

PROBLEMS = {name: Problem(name, None, prompt=text) for name, text in {"a": "Hello", "b": "Once upon a time"}.items()}
ITEMS = [Item(name, i, [70 + i, 80, 90 + i, 100][: 3 + i], 1.0, False) for name in PROBLEMS for i in range(2)]


def adapter(base: Base, folder: Path) -> Path:
    """An adapter that changes the model."""
    tuned = lora.put_on(base, FitConfig(via="lora"))
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            p.data = 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    lora.write(tuned, base, folder)
    return folder


def test_targets_are_what_the_teacher_gives_the_bases_candidates(base: Base, tmp_path: Path) -> None:
    tuned = load_teacher(str(adapter(base, tmp_path / "lora")), base)
    features = cache_features(base, PROBLEMS, ITEMS, FitConfig(tau=3.0), tmp_path / "features")
    assert 0 < len(features.h) < sum(len(item.tokens) for item in ITEMS), "the test wants some positions to be left out"
    found = cache_targets(tuned, PROBLEMS, ITEMS, features, 0.5, tmp_path / "targets", "teacher")
    assert found.log_p.shape == (len(features.h), CANDIDATES)
    states = states_of(tuned, PROBLEMS, ITEMS)
    for row, (item, position, ids) in enumerate(zip(features.item, features.position, features.ids, strict=True)):
        log_p = tuned.logits(states[int(item)][int(position)][None])[0].log_softmax(0)
        assert torch.allclose(found.log_p[row], log_p[ids.long()], atol=1e-5)
        assert torch.allclose(found.lse[row], (log_p / 0.5).logsumexp(0), atol=1e-5)
    assert not torch.allclose(found.log_p, features.logits.log_softmax(1), atol=0.1)


@pytest.mark.parametrize("change", [("layers.0.", "layers.7."), ("o_proj", "q_proj")], ids=["no layer", "no target"])
def test_an_adapter_that_finds_no_place_is_refused(base: Base, tmp_path: Path, change: tuple[str, str]) -> None:
    """Peft passes over it, and what it leaves would teach in its place."""
    folder = adapter(base, tmp_path / "lora")
    path = folder / "adapter_model.safetensors"
    tensors = {name.replace(*change): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(CorrectionError, match=rf"acts on .*{re.escape(change[1])}.* does not have or target_modules"):
        adapt(base, folder)


def test_finished_targets_are_read(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = cache_features(base, PROBLEMS, ITEMS, FitConfig(temperature=1.0), tmp_path / "features")
    before = cache_targets(base, PROBLEMS, ITEMS, features, 0.5, tmp_path / "targets", "teacher")
    lse = features.lse[:, None]  # at a temperature of 1
    assert torch.allclose(before.log_p, features.logits - lse, atol=1e-4), "the base is its own teacher"
    monkeypatch.setattr(teacher, "states_of", None)
    after = cache_targets(base, PROBLEMS, ITEMS, features, 0.5, tmp_path / "targets", "teacher")
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_an_adapted_bf16_base_is_packed_and_its_adapter_stays_precise(tmp_path: Path) -> None:
    base = tiny_base(dtype=torch.bfloat16)
    tuned = adapt(base, adapter(base, tmp_path))
    packed = [name for name, module in tuned.model.named_modules() if isinstance(module, PackedLinear)]
    can_pack = any(isinstance(module, PackedLinear) for module in base.model.modules())  # not every CPU can
    assert any(name.endswith("o_proj.base_layer") for name in packed) == can_pack
    adapters = {p.dtype for name, p in tuned.model.named_parameters() if "lora_" in name}
    assert adapters == {torch.float32}


def test_a_tuned_model_reads_the_bases_prompts(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_base(seed=1)
    made.tokenizer.chat_template = "another"
    monkeypatch.setattr(teacher, "load_base", lambda *_: made)
    assert load_teacher("tuned", base).tokenizer is base.tokenizer


def test_who_cannot_teach_is_refused_in_words(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> Base:
        made = tiny_base(seed=1)
        made.identity = made.identity.__class__("tuned", "f", "another tokenizer", "c")
        return made

    monkeypatch.setattr(teacher, "load_base", load)
    with pytest.raises(UnsupportedModel, match="another tokenizer than tiny-llama"):
        load_teacher("tuned", base)
    folder = adapter(tiny_base(hidden_size=64, num_attention_heads=8), tmp_path)
    with pytest.raises(CorrectionError, match="cannot be put on tiny-llama"):
        load_teacher(str(folder), base)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CorrectionError, match="pickled adapters are not read"):
        load_teacher(str(folder), base)


def test_a_correction_teaches_its_own_base_and_as_it_is_served(base: Base, tmp_path: Path) -> None:
    made = dataclasses.replace(tiny_lora(base, "mine"), strength=1.0)
    save(made, tmp_path / "mine")
    assert load_teacher(str(tmp_path / "mine"), base).hidden == base.hidden
    with pytest.raises(CorrectionError, match="'mine' was fitted to"):
        load_teacher(str(tmp_path / "mine"), tiny_base(seed=1))
    save(dataclasses.replace(made, strength=0.5), tmp_path / "half")
    with pytest.raises(CorrectionError, match=r"a correction of strength 0\.5, and would teach at 1"):
        load_teacher(str(tmp_path / "half"), base)


def test_an_adapters_scale_makes_another_teacher_of_it(base: Base, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path)
    before = adapt(base, folder).identity.fingerprint
    described = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(described | {"lora_alpha": 8 * described["lora_alpha"]}))
    assert adapt(base, folder).identity.fingerprint not in (before, base.identity.fingerprint)


def test_a_teacher_of_fewer_rows_gives_the_others_no_probability(base: Base, tmp_path: Path) -> None:
    small = tiny_base(vocab_size=258)
    features = cache_features(base, PROBLEMS, ITEMS, FitConfig(), tmp_path / "features")
    features.ids[0, 1] = 300
    found = cache_targets(small, PROBLEMS, ITEMS, features, 1.0, tmp_path / "targets", "teacher")
    assert found.log_p[0, 1] == teacher.NEVER
    assert bool((found.log_p[0, 0] > teacher.NEVER).all())


def test_a_teacher_writes_no_more_than_its_base_reads(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "load_base", lambda *_: tiny_base(seed=1, max_position_embeddings=4096))
    assert load_teacher("tuned", base).max_len == base.max_len


def test_a_folder_that_asks_for_more_than_a_lora_is_refused(base: Base, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path)
    described = json.loads((folder / "adapter_config.json").read_text())
    for field, value in {"use_dora": True, "bias": "all", "modules_to_save": ["lm_head"]}.items():
        (folder / "adapter_config.json").write_text(json.dumps(described | {field: value}))
        with pytest.raises(CorrectionError, match=f"asks for {field} = .*, which is not supported"):
            load_teacher(str(folder), base)
