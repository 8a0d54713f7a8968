"""The lora tier: a LoRA by the paper's method, or one that imitates a tuned model, is what a fit ships and serves."""

import dataclasses
from pathlib import Path

import pytest
import torch

from fitting import VIA_LORA, Odd, contents
from tiny import read_states
from trimtab.server.model.base import Base
from trimtab.steering.commands import pipeline
from trimtab.steering.correction import LoraCorrection, check
from trimtab.steering.evaluation.report import to_markdown
from trimtab.steering.folder import load
from trimtab.steering.gate import Gate
from trimtab.steering.training.adapting import mixed_kl
from trimtab.steering.training.features import CANDIDATES, Features, rank
from trimtab.steering.training.teacher import Targets, adapt

LORA = dataclasses.replace(VIA_LORA, tier="lora", via="direct", rank=None, strengths=(1.0,), tau=3.0, kl_limit=0.0)


@pytest.fixture(scope="module")
def finished(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("paper")
    pipeline.run(LORA, out, base, Odd())
    return out


def test_the_papers_lora_ships_as_it_was_trained(base: Base, finished: Path) -> None:
    correction = load(finished)
    assert isinstance(correction, LoraCorrection)
    check(correction, base.identity)
    assert (correction.gate, correction.strength) == (Gate(tau=3.0), 1.0)
    trained = contents(finished / "run" / "lora")
    assert trained["adapter_model.safetensors"] == contents(finished)["adapter_model.safetensors"]
    report = correction.report
    assert report is not None
    of = {policy["policy"]: policy for policy in report["policies"]}
    assert list(of)[4:] == ["correction-always", "shuffled-rewards"]
    assert 0 < of["correction"]["fired"] < 1, "it acts where the gate opens"
    assert of["base"]["fired"] == 0
    fit = correction.provenance["fit"]
    control = load(finished / "controls" / "shuffled-rewards")
    assert control.provenance["kl"] == pytest.approx(fit["kl"], rel=0.05)
    assert isinstance(control, LoraCorrection)
    layer = next(iter(correction.adapter.layers))
    assert not torch.equal(control.adapter.layers[layer].B, correction.adapter.layers[layer].B)


def test_a_folder_of_the_tier_is_a_teacher_too(base: Base, finished: Path) -> None:
    h = read_states(base, [5, 6, 7])
    assert not torch.allclose(read_states(adapt(base, finished), [5, 6, 7]), h, atol=1e-3)


def test_always_on_it_answers_as_the_adapted_model_does(base: Base, finished: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(LORA, gate="always")
    correction = pipeline.run(config, tmp_path, base, Odd())
    assert correction.gate == Gate("always", tau=3.0)
    assert correction.report is not None
    of = {policy["policy"]: policy for policy in correction.report["policies"]}
    assert of["correction"]["fired"] == 1
    assert of["correction"]["flips"] is of["correction"]["kl_token"] is None, "no base row runs beside it"
    assert of["base"]["flips"] == 0
    assert "| 100.0% |  |" in to_markdown(correction.report)
    assert "correction-always" not in of, "it is the correction"
    gated = load(finished).report
    assert gated is not None
    (same,) = (policy for policy in gated["policies"] if policy["policy"] == "correction-always")
    assert same["pass_at_1"] == of["correction"]["pass_at_1"], "the same LoRA under either gate, served always"


def test_another_models_ways_are_learned_by_a_lora_of_rank_r(base: Base, finished: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(
        LORA, via="teacher", teacher="tuned", lora_rank=2, lora_epochs=6.0, lora_rate=0.01, lora_kl_limit=0.0, tau=0.5
    )
    tuned = adapt(base, finished)
    correction = pipeline.run(config, tmp_path, base, Odd(), tuned)
    assert isinstance(correction, LoraCorrection)
    assert correction.adapter.rank == 2
    ids = [[5, 9, 200, 31, 77], [70, 80, 90]]
    log_p = {
        name: torch.cat([one.logits(read_states(one, text)) for text in ids]).log_softmax(1)
        for name, one in {"base": base, "tuned": tuned, "ours": adapt(base, tmp_path)}.items()
    }
    target = log_p["tuned"]
    kl = {name: float((target.exp() * (target - log_p[name])).sum(1).mean()) for name in ("base", "ours")}
    assert kl["ours"] < 0.7 * kl["base"]
    assert (tmp_path / "controls" / "shuffled-teacher" / "adapter_model.safetensors").exists()
    assert correction.report is not None
    assert correction.report["policies"][-1]["policy"] == "teacher"


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0, 2.5])
def test_the_kl_of_a_mixture_is_that_of_the_whole_vocabulary(strength: float) -> None:
    """Where the candidates are all there is, nothing is lumped together."""
    draw, T = torch.Generator().manual_seed(0), 0.7
    z, companion = (2 * torch.randn(50, CANDIDATES, generator=draw) for _ in range(2))
    ids, logits = rank(z, CANDIDATES)
    n = torch.zeros(50)
    rows = Features(
        h=n[:, None],
        ids=ids.int(),
        logits=logits,
        lse=(z / T).logsumexp(1),
        chosen=n,
        advantage=n,
        position=n,
        item=n,
        problem=n,
        held_out=n,
        gated=n,
        random=n,
        acts=n,
    )
    log_q = companion.log_softmax(1)
    targets = Targets(log_q.gather(1, ids), (log_q / T).logsumexp(1))
    p = (z / T).log_softmax(1)
    q = (((1 - strength) * z + strength * companion) / T).log_softmax(1)
    expected = float((p.exp() * (p - q)).sum(1).mean())
    assert mixed_kl(rows, targets, T, strength) == pytest.approx(expected, abs=1e-4)
