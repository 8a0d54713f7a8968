"""What the demo prints: both answers, where the correction acted, and what it changed."""

import json
from typing import Any

import httpx
import pytest

from trimtab.clients import Client, Receipt, SteeringReport, show


def receipt(token: str, fired: bool = False, flip: bool = False) -> dict[str, Any]:
    return {
        "token": token, "token_id": 1, "entropy": 1.0, "open": fired, "fired": fired, "flip": flip,
        "base_token": " sea", "base_token_id": 2, "steered_token": token, "steered_token_id": 1,
        "base_logprob": -1.0, "steered_logprob": -0.5, "base_token_logprob": -1.0, "steered_token_logprob": -0.5,
    }  # fmt: skip


def run(
    monkeypatch: pytest.MonkeyPatch,
    models: list[dict[str, Any]],
    tokens: list[dict[str, Any]],
    *arguments: str,
    finish: str = "length",
) -> tuple[int, list[dict[str, Any]]]:
    """-> the exit code, and the bodies that the server saw."""
    bodies = []

    def serve(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": models})
        body = json.loads(request.content)
        bodies.append(body)
        choice: dict[str, Any] = {"message": {"content": "A plain answer."}, "finish_reason": finish}
        if "steering" in body:
            totals = {"correction": body["steering"]["correction"], "strength": 1.5, "tau": 0.5, "steps": len(tokens)}
            counts = {"open": 2, "fired": 2, "flips": 1, "mean_entropy": 1.25, "kl": 0.25}
            choice["steering"] = {**totals, **counts, "tokens": tokens}
        return httpx.Response(200, json={"choices": [choice]})

    transport = httpx.MockTransport(serve)
    monkeypatch.setattr(show, "Client", lambda url, api_key: Client(url, api_key=api_key, transport=transport))
    return show.main(["Why?", *arguments]), bodies


BASE = {"id": "demo", "parent": None}
BRIEF = {"id": "brief", "parent": "demo"}


def test_both_answers_and_the_marks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = [receipt("The"), receipt(" sky", fired=True, flip=True), receipt(" is", fired=True)]
    code, bodies = run(monkeypatch, [BASE, BRIEF], tokens)
    printed = capsys.readouterr().out
    assert code == 0
    assert "A plain answer." in printed
    assert "The[[ sky]][ is]" in printed
    assert "brief at strength 1.5, where the entropy is above 0.5 nats" in printed
    assert "3 steps: open 2, fired 2, flips 1; mean entropy 1.25 nats; KL where it fired 0.250 nats" in printed
    assert "step 2: ' sea' -> ' sky'" in printed
    assert bodies[1].pop("steering") == {"correction": "brief", "report": "tokens"}
    assert bodies[0] == bodies[1]  # the answers differ by the correction alone


def test_a_long_list_of_flips_is_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, [BASE], [receipt("x", fired=True, flip=True)] * 11, "--correction", "other")
    printed = capsys.readouterr().out
    assert printed.count("step ") == 8
    assert "and 3 more" in printed


def test_a_server_without_corrections(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, bodies = run(monkeypatch, [BASE], [])
    assert (code, len(bodies)) == (0, 1)
    assert "no correction" in capsys.readouterr().out


def test_a_correction_may_be_required(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, [BASE], [], "--require-correction")[0] == 1
    assert "no correction loaded" in capsys.readouterr().err
    contrast = {"id": "contrast", "parent": "demo", "tier": "contrast"}
    assert run(monkeypatch, [BASE, contrast], [], "--require-correction")[0] == 1
    assert run(monkeypatch, [BASE, contrast], [receipt("x")])[0] == 0
    assert run(monkeypatch, [BASE, BRIEF], [receipt("x")], "--require-correction")[0] == 0


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({"gate": "always"}, "brief, at every step"),
        ({"gate": "random", "tau": 0.75}, "brief, at a random 25% of steps"),
        ({"gate": "margin", "tau": -0.1}, "brief, where the two best tokens' probabilities are nearer than 0.1"),
        ({"tau": 0.5, "ceiling": 2.0}, "brief, where the entropy is above 0.5 nats and up to 2 nats"),
        ({"gate": "varentropy", "tau": 0.5}, "brief, where the varentropy is above 0.5 nats^2"),
        ({}, "brief"),
    ],
)
def test_each_gate_in_words(gate: dict[str, Any], said: str) -> None:
    assert show.describe(SteeringReport.model_validate({"correction": "brief", **gate})) == said


@pytest.mark.parametrize(("finish", "shown"), [("stop", "The[ end]"), ("length", "The[ end]<|im_end|>")])
def test_the_token_that_ended_the_answer_is_a_step_but_no_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finish: str, shown: str
) -> None:
    run(monkeypatch, [BRIEF], [receipt("The"), receipt(" end", fired=True), receipt("<|im_end|>")], finish=finish)
    printed = capsys.readouterr().out
    assert f"\n{shown}\n" in printed
    assert "3 steps" in printed


def test_a_failure_is_one_line_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert show.main(["Why?", "--url", "nonsense"]) == 1
    assert capsys.readouterr().err.startswith("error: base_url must look like")


def test_colours_replace_the_brackets() -> None:
    marked = show.mark([Receipt.model_validate(receipt(" sky", fired=True))], colours=True)
    assert marked == "\033[36m sky\033[0m"
