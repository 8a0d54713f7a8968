"""LoRAs in the forward: what peft computes, on its own tokens only, and never from another adapter's cache."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tiny import LORA_TARGETS, place, tiny_base, tiny_lora
from trimtab.errors import CorrectionError
from trimtab.server.engine.config import EngineConfig
from trimtab.server.engine.core import Core
from trimtab.server.engine.request import Request, SamplingParams, Steering
from trimtab.server.model import linear
from trimtab.server.model.adapters import Placed, group_tokens
from trimtab.server.model.attention import KVBatch, Span
from trimtab.server.model.base import Base
from trimtab.server.model.linear import PackedLinear, copy_unpacked
from trimtab.steering.adapter import LoraLayer
from trimtab.steering.bank import Bank
from trimtab.steering.correction import LoraCorrection
from trimtab.steering.folder import load
from trimtab.steering.gate import Gate
from trimtab.steering.training.teacher import without_peft_warnings

IDS = [list(range(5, 25)), [7], list(range(40, 10, -1)), list(range(5, 25))]
ALWAYS = Gate("always", tau=0.0)


def forward(base: Base, placed: Mapping[int, Placed], adapters: Sequence[int]) -> list[Tensor]:
    """The logits of IDS in one packed step, sequence i under adapters[i]."""
    order = sorted(range(len(IDS)), key=lambda i: len(IDS[i]))
    spans = [Span(i, 0, len(IDS[at]), adapters[at]) for i, at in enumerate(order)]
    batch = KVBatch(base.new_cache(len(IDS), 64), spans, placed)
    states = base.forward([t for at in order for t in IDS[at]], batch)
    parts = torch.split(base.logits(states), [span.end for span in spans])
    return [parts[order.index(i)] for i in range(len(IDS))]


class CopiedLinear(PackedLinear):
    """A layer that is packed on any CPU, in a layout that is none."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.packed = linear.bias, linear.weight.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.packed, self.bias)


@pytest.mark.parametrize(
    ("dtype", "close", "packs"),
    [(torch.float32, 1e-4, False), (torch.bfloat16, 1.0, False), (torch.bfloat16, 1.0, True)],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_a_peft_folder_computes_what_peft_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, close: float, packs: bool, rslora: bool
) -> None:
    if packs:
        monkeypatch.setattr(linear, "PackedLinear", CopiedLinear)
    base = tiny_base(dtype=dtype)
    assert not packs or any(isinstance(module, CopiedLinear) for module in base.model.modules())
    config = LoraConfig(r=4, lora_alpha=6, target_modules=LORA_TARGETS, init_lora_weights=False, use_rslora=rslora)
    with without_peft_warnings():
        torch.manual_seed(3)
        tuned = get_peft_model(copy_unpacked(base.model), config)
        tuned.save_pretrained(str(tmp_path))
        judge = PeftModel.from_pretrained(copy_unpacked(base.model), str(tmp_path))
    judge.get_base_model().set_attn_implementation("sdpa")
    correction = load(tmp_path)
    assert isinstance(correction, LoraCorrection)
    ours = forward(base, {0: place(base, correction)}, [0] * len(IDS))
    plain = forward(base, {}, [-1] * len(IDS))
    for ids, got, unadapted in zip(IDS, ours, plain, strict=True):
        with torch.inference_mode():
            expected = judge(torch.tensor([ids]), use_cache=False).logits[0]
        assert torch.allclose(got.float(), expected.float(), atol=close)
        assert (got.float() - unadapted.float()).abs().max() > 1, "the test wants an adapter that matters"


def test_tokens_without_an_adapter_come_out_bit_for_bit(base: Base) -> None:
    placed = {seed: place(base, tiny_lora(base, seed=seed)) for seed in (0, 1)}
    plain = forward(base, {}, [-1] * 4)
    mixed = forward(base, placed, [-1, -1, 0, 1])
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], mixed[:2], strict=True))
    x, y = forward(base, placed, [0] * 4), forward(base, placed, [1] * 4)
    assert torch.allclose(mixed[2], x[2], atol=1e-4)
    assert torch.allclose(mixed[3], y[3], atol=1e-4)
    scattered = forward(base, placed, [-1, 0, 0, -1])  # packed by length: its tokens are no range
    assert all(torch.equal(plain[i], scattered[i]) for i in (0, 3))
    assert all(torch.allclose(x[i], scattered[i], atol=1e-4) for i in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(plain, forward(base, placed, [-1] * 4), strict=True))


def test_a_copy_of_the_model_knows_nothing_of_what_acts(base: Base) -> None:
    """The trainer puts peft on copies of a model that is being served."""
    placed = place(base, tiny_lora(base))
    duplicate = copy_unpacked(base.model)
    ids = torch.tensor([IDS[0]])
    spans = [Span(0, 0, len(IDS[0]))]
    with torch.inference_mode():
        expected = duplicate.get_decoder()(
            ids, position_ids=torch.arange(20)[None], use_cache=False, kv_batch=KVBatch(base.new_cache(1, 64), spans)
        ).last_hidden_state
    got = base.forward(IDS[0], KVBatch(base.new_cache(1, 64), spans))
    assert torch.equal(expected[0], got)
    assert placed.keys() == {path for path, _ in base.model.named_modules() if path.split(".")[-1] in LORA_TARGETS}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model.layers.9.mlp.up_proj", "does not have"),
        ("model.layers.0.mlp", "no linear layer"),
        ("lm_head", "no linear layer inside the decoder"),
        ("model.layers.0.mlp.down_proj", r"maps 32 to 64 numbers; the model's \(64, 32\)"),
    ],
)
def test_an_adapter_for_another_model_is_refused_when_the_engine_is_made(base: Base, path: str, message: str) -> None:
    lora = tiny_lora(base)
    adapter = lora.adapter._replace(layers={path: LoraLayer(torch.zeros(2, 32), torch.zeros(64, 2), 1.0)})
    bank = Bank(base.hidden, "cpu")
    bank.add(dataclasses.replace(lora, adapter=adapter))
    with pytest.raises(CorrectionError, match=message):
        Core(base, bank)


def test_tokens_are_grouped_by_adapter_and_ranges_stay_ranges() -> None:
    a, b = ({"a": (torch.zeros(1), torch.zeros(1))}, {"b": (torch.zeros(1), torch.zeros(1))})
    groups = group_tokens([1, -1, 1, 0, 0], [1, 1, 1, 2, 4], {0: a, 1: b}, torch.device("cpu"))
    assert groups[0] == (a, slice(3, 9))
    assert groups[1].placed is b
    assert isinstance(groups[1].tokens, Tensor)
    assert groups[1].tokens.tolist() == [0, 2]


def test_no_request_reads_keys_and_values_made_under_another_adapter(base: Base) -> None:
    """The same prompt under X, the base, Y and X again, over slots that keep what they held: each as if fresh."""
    bank = Bank(base.hidden, "cpu")
    for seed, name in enumerate("xy"):
        bank.add(tiny_lora(base, name, seed=seed, gate=ALWAYS))
    prompt = tuple(range(60, 100))
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)

    def ask(core: Core, name: str | None) -> tuple[list[int | None], int]:
        events = list(core.run([Request("r", prompt, greedy, Steering(name))]))
        return [event.token for event in events], events[0].cached

    for slots in (1, 2, 4):
        core = Core(base, bank, EngineConfig(slots=slots))
        fresh = {name: ask(Core(base, bank, EngineConfig(slots=1)), name)[0] for name in ("x", None, "y")}
        assert len({tuple(answer) for answer in fresh.values()}) == 3, "the test wants adapters that matter"
        seen = [ask(core, name) for name in ("x", None, "y", "x", None, "y")]
        assert [tokens for tokens, _ in seen] == [fresh[name] for name in ("x", None, "y", "x", None, "y")]
        again = len(prompt) - 1 if slots == 4 else 0
        assert [cached for _, cached in seen] == [0, 0, 0, again, again, again]
