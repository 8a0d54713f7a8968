"""Plain text: the served step's own likelihoods, token by token, against what transformers' forward says."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny import read_states, tiny_correction, tiny_lora
from trimtab.errors import InvalidRequest, TaskError
from trimtab.server.model.base import Base
from trimtab.steering.correction import ContrastCorrection, HeadCorrection
from trimtab.steering.evaluation import text as text_module
from trimtab.steering.evaluation.text import read_text, to_markdown
from trimtab.steering.folder import save
from trimtab.steering.gate import Gate
from trimtab.steering.training.teacher import adapt

TEXT = ("A trim tab is the small rudder on a ship's rudder: a little force there turns the whole ship. " * 3)[:250]


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "WINDOW", 48)


def windows(base: Base) -> list[Tensor]:
    ids = torch.tensor(base.tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    return [window for window in ids.split(48) if len(window) > 1]


def nats(z: Tensor, ids: Tensor) -> Tensor:
    return -z.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def entropy(z: Tensor) -> Tensor:
    p = z.softmax(-1)
    return -(p * z.log_softmax(-1)).sum(-1)


def steer(correction: HeadCorrection, h: Tensor, z: Tensor, rows: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    shift = (h / correction.hidden_scale) @ correction.A.T @ correction.B.T + correction.b
    delta = correction.cap * torch.tanh(shift @ rows.T / correction.row_scale / correction.cap)
    best = torch.zeros_like(z, dtype=torch.bool).scatter(1, z.topk(correction.top_k).indices, True)
    fired = entropy(z) > tau
    return torch.where(best & fired[:, None], z + correction.strength * delta, z), fired


def test_a_heads_likelihood_is_that_of_the_corrected_distribution(base: Base) -> None:
    correction = tiny_correction(base, tau=3.0)
    measured = read_text(base, correction, TEXT, gate=Gate(tau=3.0))
    own, corrected, opened = [], [], []
    for ids in windows(base):
        h = read_states(base, ids.tolist())[:-1]
        z = base.logits(h).float()
        z_corrected, fired = steer(correction, h, z, base.head_weight, 3.0)
        own.append(nats(z, ids[1:]))
        corrected.append(nats(z_corrected, ids[1:]))
        opened.append(fired)
    fired = torch.cat(opened)
    assert 0.1 < float(fired.float().mean()) < 0.9
    assert measured["tokens"] == len(fired)
    assert measured["fired"] == pytest.approx(float(fired.float().mean()))
    for name, values in (("base", own), ("corrected", corrected)):
        assert measured[name] == pytest.approx(float(torch.cat(values).mean()), abs=1e-4)
        assert measured[f"{name}_at_fired"] == pytest.approx(float(torch.cat(values)[fired].mean()), abs=1e-4)
    assert len(own[-1]) < 10, "the last window is short, and weighs as its tokens do"
    difference = measured["corrected"] - measured["base"]
    assert measured["change"]["mean"] == pytest.approx(difference, abs=1e-5)
    assert measured["change"]["low"] < measured["change"]["mean"] < measured["change"]["high"]
    assert f"fired at {measured['fired']:.1%}" in to_markdown(measured)


def test_a_gated_lora_mixes_where_it_opens(base: Base, tmp_path: Path) -> None:
    lora = tiny_lora(base, gate=Gate(tau=3.0), size=0.1)
    save(lora, tmp_path)
    tuned = adapt(base, tmp_path)
    measured = read_text(base, lora, TEXT)
    expected = []
    for ids in windows(base):
        z, z_tuned = (m.logits(read_states(m, ids.tolist())[:-1]).float() for m in (base, tuned))
        expected.append(nats(torch.where((entropy(z) > 3.0)[:, None], z_tuned, z), ids[1:]))
    assert measured["corrected"] == pytest.approx(float(torch.cat(expected).mean()), abs=1e-4)


def test_a_lora_that_is_always_on_is_told_beside_the_base(base: Base, tmp_path: Path) -> None:
    lora = tiny_lora(base, gate=Gate("always"), size=0.1)
    save(lora, tmp_path)
    measured = read_text(base, lora, TEXT)
    for name, model in (("base", base), ("corrected", adapt(base, tmp_path))):
        read = [nats(model.logits(read_states(model, ids.tolist())[:-1]).float(), ids[1:]) for ids in windows(base)]
        assert measured[name] == pytest.approx(float(torch.cat(read).mean()), abs=1e-4)
    assert measured["fired"] == 1
    assert abs(measured["change"]["mean"]) > 1e-3


def test_a_random_gate_opens_at_its_share_of_the_text(base: Base) -> None:
    measured = read_text(base, tiny_correction(base), TEXT, gate=Gate("random", tau=0.5))
    assert 0.35 < measured["fired"] < 0.65


def test_markers_in_the_text_shut_no_gate(base: Base) -> None:
    marked = f"Here: <tool_call> {TEXT}"
    measured = read_text(base, tiny_correction(base), marked, gate=Gate("always"))
    assert measured["fired"] == 1


def test_a_shut_gate_changes_no_bit(base: Base) -> None:
    measured = read_text(base, tiny_correction(base), TEXT, gate=Gate(tau=100.0))
    assert measured["base"] == measured["corrected"]
    assert (measured["fired"], measured["base_at_fired"]) == (0, None)
    assert measured["change"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_what_cannot_be_read_is_refused(base: Base) -> None:
    with pytest.raises(InvalidRequest, match="no prompt to contrast"):
        read_text(base, ContrastCorrection(name="away"), TEXT)
    with pytest.raises(TaskError, match="the text has 5 tokens: give 50 or more"):
        read_text(base, tiny_correction(base), "Short")
