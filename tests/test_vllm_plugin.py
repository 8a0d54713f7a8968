"""The plugin through both of vLLM's interfaces, faked: tokens are our engine's, and nothing else is touched.

Where vLLM is installed, the real one is asked too (benchmarks/vllm_parity.py); it is too large for every run.
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_vllm import PLUGIN, Engine, FakeVllm, Running, SamplingParams, V1Runner, V2Runner

from tiny import tiny_base, tiny_correction, tiny_lora
from trimtab.errors import CorrectionError, EngineFailure, UnsupportedModel
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.request import Budget, Request, Steering
from trimtab.server.engine.request import SamplingParams as Sampling
from trimtab.server.model.base import Base
from trimtab.server.vllm_plugin.base import check_weights
from trimtab.server.vllm_plugin.settings import read_settings
from trimtab.steering.bank import Bank
from trimtab.steering.correction import ContrastCorrection
from trimtab.steering.folder import save

ROOT = Path(__file__).resolve().parent.parent
TAU = 2.2  # opens at some steps of the tiny model and not at others
PROMPTS = {name: list(range(40 + 3 * i, 45 + 5 * i)) for i, name in enumerate("abcdef")}
ASKED: dict[str, dict[str, Any] | None] = {
    "a": {"correction": "head0"},
    "b": None,
    "c": {"correction": "head1", "strength": 0.6, "tau": TAU},
    "d": {"correction": "head0", "mode": "shadow"},
    "e": {"correction": "head0", "gate": "always", "kl": 0.05},
    "f": {"correction": "head1", "mode": "off"},
}
LENGTHS = {"a": 9, "b": 5, "c": 12, "d": 7, "e": 3, "f": 8}
Receipts = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folders(base: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for seed, (name, top_k) in enumerate({"head0": 10, "head1": 3}.items()):
        made[name] = tmp_path_factory.mktemp("corrections") / name
        save(tiny_correction(base, name, seed=seed, top_k=top_k, tau=TAU), made[name])
    return made


@pytest.fixture
def vllm(base: Base, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVllm]:
    yield FakeVllm(monkeypatch, base)
    for name in ("hook", "processor"):
        sys.modules.pop(f"{PLUGIN}.{name}", None)


@pytest.fixture(params=[V1Runner, V2Runner])
def runner(request: pytest.FixtureRequest) -> type[Engine]:
    return request.param  # type: ignore[no-any-return]


def start(vllm: FakeVllm, runner: type[Engine], folders: dict[str, Path], chunk: int = 3, **changes: Any) -> Engine:
    vllm.load()
    return runner(vllm, vllm.config(folders, **changes), chunk)


def ours(base: Base, folders: dict[str, Path], asked: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """Tokens and receipts of our engine."""
    from trimtab.steering.folder import load

    bank = Bank(base.hidden, "cpu")
    for folder in folders.values():
        bank.add(load(folder))
    requests = []
    for name, told in asked.items():
        told = dict(told or {})
        budget = Budget(kl=told.pop("kl", None))
        sampling = Sampling(temperature=0, max_tokens=LENGTHS[name], ignore_eos=True)
        requests.append(Request(name, tuple(PROMPTS[name]), sampling, Steering(**told, budget=budget)))
    events = defaultdict(list)
    for event in Core(base, bank, EngineConfig(slots=8)).run(requests):
        events[event.request_id].append(event)
    return events


def read(path: Path, steps: int) -> Receipts:
    """By request, once so many lines are there: a thread writes them."""
    for _ in range(200):
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= steps:
            break
        time.sleep(0.02)
    found = defaultdict(list)
    for line in lines:
        told = json.loads(line)
        found[told["request"]].append(told)
    return dict(found)


@pytest.mark.parametrize("chunk", [3, 100])
def test_a_mixed_batch_gets_our_engines_tokens_and_receipts(
    vllm: FakeVllm, runner: type[Engine], base: Base, folders: dict[str, Path], chunk: int, tmp_path: Path
) -> None:
    log = tmp_path / "receipts.jsonl"
    told = {"corrections": {k: str(v) for k, v in folders.items()}, "receipts": str(log)}
    config = {"additional_config": {"trimtab": told}}
    engine = start(vllm, runner, folders, chunk, **config)
    names = iter(ASKED)
    for name in (next(names), next(names), next(names)):
        engine.add(name, PROMPTS[name], ASKED[name])
    for name in names:  # the others come while these run
        engine.step()
        engine.add(name, PROMPTS[name], ASKED[name])
    done = engine.run(LENGTHS)
    expected = ours(base, folders, ASKED)
    assert done == {name: [e.token for e in events] for name, events in expected.items()}
    unsteered = ours(base, folders, dict.fromkeys(ASKED))
    assert [n for n in ASKED if done[n] != [e.token for e in unsteered[n]]] == ["a", "c", "e"]

    steered = [name for name in ASKED if name not in "bf"]
    receipts = read(log, sum(LENGTHS[name] for name in steered))
    assert sorted(receipts) == steered
    for name in steered:
        assert [line["position"] for line in receipts[name]] == list(range(LENGTHS[name]))
        for line, event in zip(receipts[name], expected[name], strict=True):
            for field in ("open", "fired", "flip", "base_token", "steered_token"):
                assert line[field] == getattr(event.receipt, field), (name, field)
            for field in ("entropy", "statistic", "kl", "strength", "base_token_logprob"):
                assert line[field] == pytest.approx(getattr(event.receipt, field), abs=1e-4), (name, field)
            assert line["mode"] == (ASKED[name] or {}).get("mode", "apply")
            assert len(line["version"]) == 12
    assert {line["open"] for line in receipts["a"]} == {True, False}


def test_rows_that_are_off_are_not_touched(vllm: FakeVllm, runner: type[Engine], folders: dict[str, Path]) -> None:
    engine = start(vllm, runner, folders, 100)
    for name in "abf":
        engine.add(name, PROMPTS[name], ASKED[name])
    seen: list[tuple[torch.Tensor, torch.Tensor, list[Running]]] = []
    draw_from = engine.draw_from

    def watch(logits: torch.Tensor, rows: list[Running]) -> torch.Tensor:
        before = logits.clone()
        after = draw_from(logits, rows)
        seen.append((before, after, list(rows)))
        return after

    engine.draw_from = watch  # type: ignore[method-assign]
    engine.run(dict.fromkeys("abf", 6))
    changed = {(r.id, bool((b[i] != a[i]).any())) for b, a, rows in seen for i, r in enumerate(rows)}
    assert changed == {("a", True), ("a", False), ("b", False), ("f", False)}


def test_the_gate_sees_the_models_logits_and_a_mask_stays(
    vllm: FakeVllm, runner: type[Engine], base: Base, folders: dict[str, Path], tmp_path: Path
) -> None:
    """vLLM's masks and biases edit float32 logits in place before the processor is asked."""
    log = tmp_path / "receipts.jsonl"
    config = {"additional_config": {"trimtab": {"corrections": str(folders["head0"]), "receipts": str(log)}}}
    engine = start(vllm, runner, folders, 100, **config)
    banned = ours(base, folders, {"a": ASKED["a"]})["a"][0].token

    def edit(request: Running, row: torch.Tensor) -> None:
        row[banned] = float("-inf")

    engine.edit = edit  # type: ignore[method-assign]
    engine.add("a", PROMPTS["a"], ASKED["a"])
    (token,) = engine.run({"a": 1})["a"]
    assert token != banned
    if runner is V1Runner:  # V2 copies before it edits, and our fake does not
        ((line,),) = read(log, 1).values()
        assert line["steered_token"] == banned


@pytest.mark.parametrize(
    ("given", "key", "why"),
    [
        ({"correction": "nope"}, "correction", "head0, head1"),
        ({"correction": "head0", "strength": "much"}, "strength", "number"),
        ({"correction": "head0", "strength": 1e9}, "strength", "at most"),
        ({"correction": "head0", "tau": "nan"}, "tau", "NaN"),
        ({"correction": "head0", "mode": "maybe"}, "mode", "apply"),
        ({"correction": "head0", "gate": "sometimes"}, "gate", "entropy"),
        ({"correction": "head0", "gate": "margin"}, "gate", "vllm_xargs.tau"),
        ({"correction": "head0", "gate": "random", "tau": 0.5}, "gate", "control"),
        ({"correction": "head0", "rate": 0.2}, "rate", "calibrat"),
        ({"correction": "head0", "kl": -1}, "kl", "greater than 0"),
        ({"correction": "head0", "tau": 1, "ceiling": 0.5}, "ceiling", "larger"),
        ({"strength": 1.0}, "strength", "needs a correction"),
        ({"kl": 1.0}, "kl", "needs a correction"),
    ],
)
def test_a_bad_value_is_named(
    vllm: FakeVllm, folders: dict[str, Path], given: dict[str, Any], key: str, why: str
) -> None:
    engine = start(vllm, V1Runner, folders)
    with pytest.raises(ValueError, match=rf"vllm_xargs\.{key}.*{why}"):
        engine.add("a", PROMPTS["a"], given)


def test_what_is_not_ours_is_let_pass(vllm: FakeVllm, folders: dict[str, Path]) -> None:
    validate = type(start(vllm, V1Runner, folders).processor).validate_params
    for given in (None, {}, {"kv_transfer_params": {"a": 1}}, {"mode": "off"}, {"correction": "head0", "rate": None}):
        validate(SamplingParams(given))
    structured = SimpleNamespace(json="{}")
    validate(SamplingParams(None, structured))
    with pytest.raises(ValueError, match=r"vllm_xargs\.correction.*structured outputs"):
        validate(SamplingParams({"correction": "head0"}, structured))
    validate(SamplingParams({"correction": "head0", "strength": "0.5", "tau": "1"}))  # numbers as text


@pytest.mark.parametrize("version", ["0.30.1", "0.34.0", "1.0", "dev"])
def test_another_vllm_is_left_alone_and_the_processor_says_so(
    base: Base, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    other = FakeVllm(monkeypatch, base, version)
    plain = other.wrapper.init_device
    other.load()
    assert other.wrapper.init_device is plain
    with pytest.raises(UnsupportedModel, match=rf"vLLM {version} .*vllm>=0\.31,<0\.34"):
        from trimtab.server.vllm_plugin import Processor  # noqa: F401


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"speculative_config": object()}, "speculative"),
        ({"parallel_config__enable_batch_sharded_sampling": True}, "batch-sharded"),
        ({"parallel_config__distributed_executor_backend": "external_launcher",
          "parallel_config__pipeline_parallel_size": 2}, "external_launcher"),
        ({"model_config__runner_type": "pooling"}, "pooling"),
    ],
)  # fmt: skip
def test_engines_that_draw_out_of_our_sight_are_refused(
    vllm: FakeVllm, folders: dict[str, Path], changes: dict[str, Any], why: str
) -> None:
    hook = vllm.load()
    config = vllm.config(folders, **changes)
    with pytest.raises(UnsupportedModel, match=why):
        vllm.front(config, vllm.base.tokenizer)
    from trimtab.server.vllm_plugin import Processor

    with pytest.raises(UnsupportedModel, match=why):
        Processor(config, torch.device("cpu"), False)
    assert hook.installed()


def test_without_our_processor_nothing_is_wrapped(vllm: FakeVllm, folders: dict[str, Path]) -> None:
    vllm.load()
    vllm.load()  # vLLM may call it again
    config = vllm.config(folders, model_config__logits_processors=["other.module:Processor"])
    vllm.front(config, None)
    engine = SimpleNamespace(config=config, runner=SimpleNamespace(), base=vllm.base)
    from fake_vllm import Worker

    wrapper = vllm.wrapper(Worker(engine))  # type: ignore[arg-type]
    wrapper.init_device()
    wrapper.worker.load_model()
    assert "compute_logits" not in vars(wrapper.worker.get_model())


def test_a_processor_whose_plugin_was_left_out_says_so(vllm: FakeVllm, folders: dict[str, Path]) -> None:
    from trimtab.server.vllm_plugin import Processor

    with pytest.raises(UnsupportedModel, match="VLLM_PLUGINS"):
        Processor(vllm.config(folders), torch.device("cpu"), False)
    with pytest.raises(ValueError, match="VLLM_PLUGINS"):
        Processor.validate_params(SamplingParams({"correction": "head0"}))


def test_rows_that_were_not_seen_are_never_guessed(vllm: FakeVllm, folders: dict[str, Path]) -> None:
    engine = start(vllm, V1Runner, folders, 100)
    engine.add("a", PROMPTS["a"], ASKED["a"])
    engine.step()
    with pytest.raises(EngineFailure, match="asked for 1 rows"):
        engine.processor.apply(torch.zeros(1, vllm.base.vocab))


def test_a_rank_that_computes_no_logits_follows_the_batch_and_draws_nothing(
    vllm: FakeVllm, folders: dict[str, Path]
) -> None:
    """With pipeline parallelism only the last ranks have h and z; the others hold the batch too."""
    vllm.group.is_last_rank = False
    engine = start(vllm, V1Runner, folders)
    assert "compute_logits" not in vars(engine.model)
    engine.add("a", PROMPTS["a"], ASKED["a"])
    engine.take_in()
    with pytest.raises(EngineFailure, match="was not there when the model was loaded"):
        engine.processor.apply(torch.zeros(1, vllm.base.vocab))


def test_every_rank_draws_from_the_first_ones_states(vllm: FakeVllm, folders: dict[str, Path]) -> None:
    """vLLM's sum over ranks on a CPU differs from rank to rank in its last bits."""
    vllm.group.rank_in_group, vllm.group.world_size = 1, 2
    vllm.group.all_gather = lambda part, dimension: torch.cat([part, part])
    vllm.group.broadcast = lambda states, source: states.fill_(source + 0.5)
    engine = start(vllm, V1Runner, folders)
    engine.add("a", PROMPTS["a"], ASKED["a"])
    engine.take_in()
    states = torch.ones(1, vllm.base.hidden)
    logits = engine.model.compute_logits(states)
    assert (states == 1).all(), "the model's own stay as they are"
    seen, z = engine.processor._sight.take(1)
    assert (seen == 0.5).all()
    assert torch.equal(z, logits)


def test_parts_of_a_head_are_put_together(vllm: FakeVllm, base: Base) -> None:
    from fake_vllm import FakeModel

    from trimtab.server.vllm_plugin.head import whole_head

    model = FakeModel(base)
    half = -(-base.vocab // 2)
    whole = torch.cat([base.head_weight, torch.zeros(2 * half - base.vocab + 6, base.hidden)])  # padded, as vLLM's are
    model.lm_head.weight.data = whole[:half]
    assert torch.equal(whole_head(model, base.vocab, base.hidden, lambda part: whole), base.head_weight)
    with pytest.raises(UnsupportedModel, match="not its hidden states times its LM head"):
        whole_head(model, base.vocab, base.hidden, lambda part: whole.flip(0))
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModel, match="no plain LM head of 32 columns"):
        whole_head(model, base.vocab, base.hidden, lambda part: part)


class TestSettings:
    def test_from_the_environment(self, folders: dict[str, Path]) -> None:
        head0, head1 = folders["head0"], folders["head1"]
        for text, names in {
            str(head0): ["head0"],
            f"x={head0},{head1}": ["x", "head1"],
            f"{head0}:{head1}": ["head0", "head1"],
            f" {head1} , ": ["head1"],
        }.items():
            found = read_settings(SimpleNamespace(additional_config={}), {"TRIMTAB_CORRECTIONS": text})
            assert [name for name, _ in found.folders] == names
            assert [c.name for c in found.load().values()] == names
            assert (found.receipts, found.any_base) == (None, False)

    def test_a_folder_of_folders(self, base: Base, tmp_path: Path) -> None:
        for name in ("one", "two"):
            save(tiny_correction(base, "same"), tmp_path / name)
        (tmp_path / "neither").mkdir()
        found = read_settings(SimpleNamespace(), {"TRIMTAB_CORRECTIONS": str(tmp_path), "TRIMTAB_ANY_BASE": "1"})
        assert [name for name, _ in found.folders] == ["one", "two"]
        assert found.any_base

    def test_the_configuration_goes_before_the_environment(self, folders: dict[str, Path]) -> None:
        given = {"trimtab": {"corrections": {"x": str(folders["head1"])}, "receipts": "log"}}
        found = read_settings(SimpleNamespace(additional_config=given), {"TRIMTAB_CORRECTIONS": "nowhere"})
        assert found.folders == (("x", folders["head1"]),)
        assert found.receipts == "log"

    @pytest.mark.parametrize(
        ("given", "text", "why"),
        [
            ({}, "", "TRIMTAB_CORRECTIONS=DIR"),
            ({}, "/nowhere", "TRIMTAB_CORRECTIONS: there is no folder /nowhere"),
            ({"corrections": 3}, "", "additional_config.trimtab.corrections must be"),
            ({"corrections": {"x": 3}}, "", "there is no folder 3"),
            ({"correction": "x"}, "", "may hold corrections, receipts and any_base"),
        ],
    )
    def test_what_is_wrong_is_named(self, given: dict[str, Any], text: str, why: str) -> None:
        with pytest.raises(CorrectionError, match=why):
            read_settings(SimpleNamespace(additional_config={"trimtab": given}), {"TRIMTAB_CORRECTIONS": text})

    def test_one_name_for_two_is_refused(self, folders: dict[str, Path]) -> None:
        text = f"x={folders['head0']},x={folders['head1']}"
        with pytest.raises(CorrectionError, match="two corrections are called x"):
            read_settings(SimpleNamespace(), {"TRIMTAB_CORRECTIONS": text})

    def test_other_tiers_are_refused_with_what_to_do(self, base: Base, tmp_path: Path) -> None:
        save(tiny_lora(base, "l"), tmp_path / "l")
        save(ContrastCorrection(name="c"), tmp_path / "c")
        for name, why in {"l": "--enable-lora", "c": "trimtab serve"}.items():
            found = read_settings(SimpleNamespace(), {"TRIMTAB_CORRECTIONS": str(tmp_path / name)})
            with pytest.raises(CorrectionError, match=why):
                found.load()


class TestBase:
    """What the corrections were fitted to is what is served."""

    def test_the_tokenizer_is_compared(self, vllm: FakeVllm, base: Base, tmp_path: Path) -> None:
        identity = dataclasses.replace(base.identity, tokenizer="another")
        save(dataclasses.replace(tiny_correction(base), base=identity), tmp_path / "c")
        vllm.load()
        with pytest.raises(CorrectionError, match=r"'c' was fitted to .* other tokenizer\. .*TRIMTAB_ANY_BASE=1"):
            vllm.front(vllm.config({"c": tmp_path / "c"}), base.tokenizer)
        config = vllm.config({"c": tmp_path / "c"})
        config.additional_config["trimtab"]["any_base"] = True
        vllm.front(config, base.tokenizer)

    def test_the_hidden_size_is_compared(self, vllm: FakeVllm, base: Base, folders: dict[str, Path]) -> None:
        vllm.load()
        config = vllm.config(folders, model_config__get_hidden_size=lambda: 48)
        with pytest.raises(CorrectionError, match="hidden size 32; 'tiny' has 48"):
            vllm.front(config, base.tokenizer)

    @pytest.mark.parametrize("tied", [False, True])
    def test_the_checkpoints_weights_are_compared(self, tied: bool, tmp_path: Path) -> None:
        base = tiny_base(tie_word_embeddings=tied)
        base.model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        correction = tiny_correction(base)
        check_weights([correction], "tiny", tmp_path, False)
        other = dataclasses.replace(correction, base=tiny_base(seed=1).identity)
        with pytest.raises(CorrectionError, match="other weights"):
            check_weights([other], "tiny", tmp_path, False)
        check_weights([other], "tiny", tmp_path, True)

    def test_weights_that_are_not_here_are_said_to_be_unknown(
        self, base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        check_weights([tiny_correction(base)], "tiny", tmp_path, False)
        assert "were not compared" in caplog.text


@pytest.mark.model
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM, which takes gigabytes")
def test_the_real_vllm(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "vllm_parity.py"), "--requests", "6", "--tokens", "16"]
    ran = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
