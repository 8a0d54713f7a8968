"""The LoRA trainer: its loss is the written one, a kill changes nothing, and peft reads what it writes."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from fitting import Killed
from tiny import read_states, tiny_model
from trimtab.errors import InvalidRequest, TaskError
from trimtab.server.model.base import Base
from trimtab.steering.adapter import WEIGHTS_FILE
from trimtab.steering.tasks.problem import Problem
from trimtab.steering.training import lora, lora_loss
from trimtab.steering.training.config import FitConfig
from trimtab.steering.training.features import cache_features
from trimtab.steering.training.lora_loss import Lesson, Target
from trimtab.steering.training.selection import Item
from trimtab.steering.training.teacher import adapt, without_peft_warnings

CONFIG = FitConfig(
    via="lora",
    lora_rank=4,
    lora_alpha=8,
    lora_rate=3e-3,
    lora_batch=4,
    lora_warmup=3,
    lora_epochs=5.0,
    lora_kl_limit=0.0,
)


def random_lessons(count: int, seed: int = 0) -> list[Lesson]:
    """Of different lengths; the first has no closed position and the second no open one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int, below: int) -> list[int]:
        return torch.randint(below, (n,), generator=generator).tolist()

    made = []
    for i in range(count):
        prompt, tokens = tuple(draw(3 + i % 4, 256)), draw(4 + i % 5, 256)
        opened = [i == 0 or (i != 1 and bit > 0) for bit in draw(len(tokens), 3)]
        made.append(Lesson(prompt, tokens, opened, 2.5 - i if i < 4 else (-1.0) ** i))
    return made


def with_effect(base: Base, seed: int = 0) -> PeftModel:
    """An adapter that changes the model."""
    tuned = lora.put_on(base, CONFIG)
    generator = torch.Generator().manual_seed(seed)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return tuned


def log_probabilities(model: torch.nn.Module, lesson: Lesson) -> Tensor:
    """Of every token of the completion, by transformers' plain forward: no padding, no batch."""
    ids = torch.tensor([[*lesson.prompt, *lesson.tokens]])
    return model(ids).logits[0, len(lesson.prompt) - 1 : -1].float().log_softmax(-1)


def plain_loss(tuned: PeftModel, lesson: Lesson) -> tuple[float, float]:
    """The two parts for one completion, position by position."""
    log_pi = log_probabilities(tuned, lesson)
    with tuned.disable_adapter():
        log_p = log_probabilities(tuned, lesson)
    likelihood = [
        -lesson.advantage * float(log_pi[t, token])
        for t, (token, is_open) in enumerate(zip(lesson.tokens, lesson.open, strict=True))
        if is_open
    ]
    anchor = [
        float(F.kl_div(log_pi[t], log_p[t], log_target=True, reduction="sum"))
        for t, is_open in enumerate(lesson.open)
        if not is_open
    ]
    return sum(likelihood) / max(1, len(likelihood)), sum(anchor) / max(1, len(anchor))


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@torch.no_grad()
def test_the_loss_is_the_written_one(base: Base) -> None:
    tuned, batch = with_effect(base), random_lessons(7)
    expected = [plain_loss(tuned, lesson) for lesson in batch]
    found = lora_loss.objective(tuned, batch)
    assert float(found.likelihood) == pytest.approx(sum(one[0] for one in expected), rel=1e-4)
    assert float(found.anchor) == pytest.approx(sum(one[1] for one in expected), rel=1e-4)
    assert expected[0][1] == 0
    assert expected[1][0] == 0
    assert min(abs(one) for one in expected[2]) > 0.01


@torch.no_grad()
def test_closed_positions_feel_the_anchor_alone(base: Base) -> None:
    tuned = with_effect(base)
    lesson = random_lessons(3)[2]
    closed = lesson._replace(open=[*lesson.open[:-1], False])
    other = closed._replace(tokens=[*lesson.tokens[:-1], (lesson.tokens[-1] + 1) % 256])
    one, changed = (torch.stack(lora_loss.objective(tuned, [lesson])) for lesson in (closed, other))
    assert torch.equal(one, changed), "the last token is input to nothing"
    silent = lesson._replace(open=[False] * len(lesson.tokens))
    for advantage in (2.0, -2.0):
        found = lora_loss.objective(tuned, [silent._replace(advantage=advantage)])
        assert float(found.likelihood) == 0
        assert float(found.anchor) > 0


def taught_by(teacher: torch.nn.Module, lesson: Lesson, candidates: int) -> Lesson:
    """The lesson with what a model says of some tokens at its open positions."""
    log_p = log_probabilities(teacher, lesson)[torch.tensor(lesson.open)]
    best = log_p.topk(candidates).indices
    return lesson._replace(target=Target(best.int(), log_p.gather(1, best)))


@torch.no_grad()
@pytest.mark.parametrize("candidates", [258, 40])
def test_an_imitation_is_judged_by_its_divergence_from_the_teacher(base: Base, candidates: int) -> None:
    tuned, teacher = with_effect(base), tiny_model(seed=1)
    teacher.set_attn_implementation("sdpa")
    batch = random_lessons(5)[2:]
    found = lora_loss.objective(tuned, [taught_by(teacher, lesson, candidates) for lesson in batch])
    expected = 0.0
    for lesson in batch:
        is_open = torch.tensor(lesson.open)
        log_q, log_pi = (log_probabilities(model, lesson)[is_open] for model in (teacher, tuned))
        inside = torch.zeros_like(log_q, dtype=torch.bool).scatter(1, log_q.topk(candidates).indices, True)
        q, pi = log_q.exp(), log_pi.exp()
        kl = torch.where(inside, q * (log_q - log_pi), 0.0).sum(1)
        if candidates < 258:  # the rest is one token
            rest, rest_of_pi = (torch.where(inside, 0.0, one).sum(1) for one in (q, pi))
            kl = kl + rest * (rest / rest_of_pi).log()
        expected += float(kl.mean())
    assert float(found.likelihood) == pytest.approx(expected, rel=1e-3)
    assert float(found.anchor) == pytest.approx(sum(plain_loss(tuned, lesson)[1] for lesson in batch), rel=1e-4)


def test_an_adapter_without_effect_is_at_the_anchors_minimum(base: Base) -> None:
    tuned = lora.put_on(base, CONFIG)
    found = lora_loss.objective(tuned, [lesson._replace(advantage=0.0) for lesson in random_lessons(4)])
    (found.likelihood + found.anchor).backward()
    assert float(found.anchor.detach()) == 0
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-6 for p in tuned.parameters())


@pytest.mark.parametrize("taught", [False, True])
def test_blocks_of_positions_change_neither_loss_nor_gradient(
    base: Base, monkeypatch: pytest.MonkeyPatch, taught: bool
) -> None:
    tuned, teacher, batch = with_effect(base), tiny_model(seed=1), random_lessons(7)
    if taught:
        teacher.set_attn_implementation("sdpa")
        with torch.no_grad():
            batch = [taught_by(teacher, lesson, 40) for lesson in batch]
    named = {name: p for name, p in tuned.named_parameters() if p.requires_grad}

    def differentiate() -> list[Tensor]:
        found = lora_loss.objective(tuned, batch)
        loss = found.likelihood + 0.2 * found.anchor
        return [torch.stack(found).detach(), *torch.autograd.grad(loss, list(named.values()))]

    whole = differentiate()
    monkeypatch.setattr(lora_loss, "BLOCK", 5)
    blocked = differentiate()
    assert all(p.requires_grad for p in named.values())
    assert max(float(one.abs().max()) for one in whole[1:]) > 0.01
    for one, other in zip(whole, blocked, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def train(base: Base, folder: Path, config: FitConfig = CONFIG, taught: Sequence[Lesson] | None = None) -> None:
    lora.train(base, taught or random_lessons(20), config, folder)


def test_it_raises_what_was_rewarded_and_lowers_the_rest(base: Base, tmp_path: Path) -> None:
    taught = random_lessons(20)
    train(base, tmp_path, dataclasses.replace(CONFIG, lora_epochs=20.0), taught)
    tuned = read_with_peft(tmp_path)
    with torch.no_grad():
        after = sum(plain_loss(tuned, lesson)[0] for lesson in taught)
        with tuned.disable_adapter():
            before = sum(plain_loss(tuned, lesson)[0] for lesson in taught)
    assert after < before - 5


def test_the_folder_is_pefts_and_adapt_reads_it_the_same(base: Base, tmp_path: Path) -> None:
    before = read_states(base, [1, 2, 3])
    train(base, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    plain = read_with_peft(tmp_path)
    teacher = adapt(base, tmp_path)
    ids = [5, 9, 200, 31, 77]
    with torch.no_grad():
        expected = plain(torch.tensor([ids])).logits[0]
    found = teacher.logits(read_states(teacher, ids))
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, base.logits(read_states(base, ids)), atol=0.1)
    assert torch.equal(read_states(base, [1, 2, 3]), before), "the base itself has no adapter"


def read_with_peft(folder: Path) -> PeftModel:
    model = tiny_model()
    model.set_attn_implementation("sdpa")
    with without_peft_warnings():
        return PeftModel.from_pretrained(model, str(folder))


@pytest.mark.parametrize("calls", [1, 11, 17, 25])
def test_a_killed_run_ends_in_the_bytes_of_an_undisturbed_one(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    train(base, tmp_path / "undisturbed")
    objective, made = lora_loss.objective, []

    def objective_until_killed(tuned: PeftModel, batch: Sequence[Lesson]) -> lora_loss.Objective:
        if len(made) == calls - 1:
            raise Killed
        made.append(batch)
        return objective(tuned, batch)

    with monkeypatch.context() as patch:
        patch.setattr(lora, "objective", objective_until_killed)
        with pytest.raises(Killed):
            train(base, tmp_path / "killed")
    assert not (tmp_path / "killed" / "adapter_config.json").exists()
    monkeypatch.setattr(lora, "objective", lambda tuned, batch: made.append(batch) or objective(tuned, batch))
    train(base, tmp_path / "killed")
    assert digest(tmp_path / "killed") == digest(tmp_path / "undisturbed")
    assert len(made) == 25 + (calls - 1) % lora.CHECKPOINT_EVERY, "it went on from the last checkpoint"


def test_a_finished_folder_is_left_alone(base: Base, tmp_path: Path) -> None:
    train(base, tmp_path)
    before = digest(tmp_path)
    train(base, tmp_path, dataclasses.replace(CONFIG, seed=1))
    assert digest(tmp_path) == before


def test_parts_of_a_step_add_up(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, lora_epochs=1.0)
    train(base, tmp_path / "whole", config)
    monkeypatch.setattr(lora, "TOKENS_AT_ONCE", {"cpu": 1})
    train(base, tmp_path / "parts", config)
    one, other = (read_states(adapt(base, tmp_path / name), [1, 2, 3]) for name in ("whole", "parts"))
    assert torch.allclose(one, other, atol=1e-3)


def test_layers_computed_again_give_the_same_bytes_and_keep_less(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught, kept = random_lessons(12), []

    def keep(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.nbytes
        return tensor

    for name, longest in (("whole", 1024), ("again", 0)):
        monkeypatch.setattr(lora, "KEPT_WHOLE", longest)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            lora.train(base, taught, CONFIG, tmp_path / name)
    assert digest(tmp_path / "again") == digest(tmp_path / "whole")
    assert kept[1] < 0.7 * kept[0]


def test_lessons_come_by_what_they_say_and_without_the_held_out(base: Base, tmp_path: Path) -> None:
    problems = {str(i): Problem(str(i), None, prompt=f"{i}: ") for i in range(4)}
    tokens = [[65 + i] * 6 for i in range(4)]
    items = [Item(str(i), 0, tokens[i], advantage, i == 3) for i, advantage in enumerate((0.5, -2.0, 1.0, 2.5))]
    config = FitConfig(tau=3.0)
    features = cache_features(base, problems, items, config, tmp_path)
    found = lora.lessons(base, problems, items, features)
    weights = [abs(lesson.advantage) * sum(lesson.open) / 6 for lesson in found]
    assert weights == sorted(weights, reverse=True)
    assert {lesson.tokens[0] for lesson in found} == {65, 66, 67}
    for lesson in found:
        (item,) = (item for item in items if item.tokens == lesson.tokens)
        states = read_states(base, [*lesson.prompt, *lesson.tokens])[len(lesson.prompt) - 1 : -1]
        p = base.logits(states).softmax(-1)
        assert lesson.open == (-(p * p.log()).sum(-1) > config.tau).tolist()
        assert lesson.advantage == (item.advantage if any(lesson.open) else 0.0)
    assert any(any(lesson.open) for lesson in found)


def test_a_loss_that_diverges_ends_in_words_and_leaves_no_adapter(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, made = lora_loss.objective, []

    def objective_until_lost(tuned: PeftModel, batch: Sequence[Lesson]) -> lora_loss.Objective:
        made.append(batch)
        found = objective(tuned, batch)
        return found if len(made) < 3 else found._replace(likelihood=found.likelihood * float("nan"))

    monkeypatch.setattr(lora, "objective", objective_until_lost)
    with pytest.raises(TaskError, match="is no number at step 3 of 25: lower --lora-rate"):
        train(base, tmp_path)
    assert not (tmp_path / WEIGHTS_FILE).exists()


def test_layers_that_are_not_there_are_named(base: Base, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="nowhere_proj") as caught:
        train(base, tmp_path, dataclasses.replace(CONFIG, lora_targets=("nowhere_proj",)))
    assert caught.value.field == "lora_targets"


def test_a_lora_that_runs_away_ends_in_words_and_leaves_no_folder(base: Base, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, lora_rate=0.05, lora_kl_limit=0.3)
    with pytest.raises(TaskError, match=r"runs away: .* nats from the base at step .*--lora-kl-limit"):
        lora.train(base, random_lessons(20), config, tmp_path / "lora")
    assert not (tmp_path / "lora" / "adapter_config.json").exists()


def test_a_lora_that_runs_away_late_ends_as_it_was_at_the_last_checkpoint(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(base, tmp_path / "short", dataclasses.replace(CONFIG, lora_epochs=2.0))
    objective, made = lora_loss.objective, []

    def objective_until_away(tuned: PeftModel, batch: Sequence[Lesson]) -> lora_loss.Objective:
        made.append(batch)
        found = objective(tuned, batch)
        return found if len(made) <= 12 else found._replace(anchor=found.anchor + 100.0 * len(batch))

    monkeypatch.setattr(lora, "objective", objective_until_away)
    train(base, tmp_path / "away", dataclasses.replace(CONFIG, lora_kl_limit=4.0))
    assert "nats from the base at step 13 of 25 (at most 4, --lora-kl-limit): it ends as it was after step 10" in (
        capsys.readouterr().err
    )
    assert digest(tmp_path / "away") == digest(tmp_path / "short"), "ten steps, and no checkpoint left behind"


def test_a_lora_that_is_not_calm_loses_no_steps_to_a_kill(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, made = lora_loss.objective, []

    def objective_of_the_uneasy(tuned: PeftModel, batch: Sequence[Lesson]) -> lora_loss.Objective:
        made.append(batch)
        if len(made) == 23:
            raise Killed
        found = objective(tuned, batch)
        return found._replace(anchor=found.anchor + 2.0 * len(batch))  # over a third of the limit, and below it

    monkeypatch.setattr(lora, "objective", objective_of_the_uneasy)
    config = dataclasses.replace(CONFIG, lora_kl_limit=4.0)
    with pytest.raises(Killed):
        train(base, tmp_path / "killed", config)
    train(base, tmp_path / "killed", config)
    assert len(made) == 23 + 5, "it went on from step 20 of 25"
    made.append([])
    train(base, tmp_path / "undisturbed", config)
    assert digest(tmp_path / "killed") == digest(tmp_path / "undisturbed")


@pytest.mark.parametrize("closed", [0, 1])
def test_a_lora_that_nothing_holds_near_its_base_says_so(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], closed: int
) -> None:
    everywhere = [lesson._replace(open=[True] * len(lesson.tokens)) for lesson in random_lessons(4)]
    everywhere[0].open[:closed] = [False] * closed
    lora.train(base, everywhere, dataclasses.replace(CONFIG, lora_batch=4), tmp_path / "lora")
    assert ("[lora] every position is open: no KL holds" in capsys.readouterr().err) == (closed == 0)
