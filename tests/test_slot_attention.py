"""Attention over KV slots: the Triton kernels against the reference, interpreted everywhere, native on CUDA."""

import importlib
from collections.abc import Iterator
from typing import Any

import layer_reference
import pytest
import torch
from attending import Case, make_case, run
from interpreted import Interpreter
from torch.nn import functional as F

KERNELS, REFERENCE = "trimtab.kernels.slot_attention", "slot_attention_reference"


class Native:
    """The kernels on this machine's GPU, CPU tensors in and out."""

    def call(self, module: str, function: str, *arguments: Any) -> Any:
        found = getattr(importlib.import_module(module), function)(*(move(argument, "cuda") for argument in arguments))
        return move(found, "cpu")


def move(value: Any, device: str) -> Any:
    """The tensors of (nested) tuples on `device`, with their strides."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)
    if isinstance(value, tuple):
        moved = [move(v, device) for v in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        yield Native()
    else:
        interpreter = Interpreter()
        yield interpreter
        interpreter.close()


def check(machine: Any, case: Case, tolerance: float) -> None:
    expected, found = run(REFERENCE, case), machine.call("attending", "run", KERNELS, case)
    real = case.places.position >= 0
    torch.testing.assert_close(found[0][real], expected[0][real], rtol=0, atol=tolerance)
    for kept, wanted in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(kept, wanted, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {"decode": 5, "chunks": []},
        {"decode": 3, "chunks": [(0, 40), (5, 9), (100, 170)]},
        {"decode": 0, "chunks": [(0, 40), (5, 90)], "heads": 14, "size": 64, "rotates": True},
        {
            "decode": 4,
            "chunks": [],
            "heads": 6,
            "kv_heads": 1,
            "size": 16,
            "window": 17,
            "rotates": True,
            "norms": True,
        },
        {"decode": 4, "chunks": [(30, 65)], "heads": 6, "kv_heads": 1, "size": 16, "window": 17, "rotates": True},
        {"decode": 5, "chunks": [(0, 10)] * 3, "kv_heads": 4, "size": 24, "window": 5, "rotates": True, "norms": True},
        {"decode": 1, "chunks": [], "heads": 8, "size": 128, "length": 600},
        {"decode": 5, "chunks": [(0, 40), (5, 9)], "window": 1},
        {"decode": 1, "chunks": [], "window": 1, "length": 600},
        {"decode": 5, "chunks": [], "window": 2},
    ],
    ids=str,
)
def test_the_kernels_agree_with_the_reference(machine: Any, shape: dict[str, Any], dtype: torch.dtype) -> None:
    check(machine, make_case(**shape, dtype=dtype), 1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("chunks", [[], [(0, 300), (40, 77)]])
@pytest.mark.parametrize("heads", [(14, 2, 64), (28, 4, 128)])
def test_bfloat16_agrees_on_a_gpu(heads: tuple[int, int, int], chunks: list[tuple[int, int]]) -> None:
    """The interpreter cannot multiply it."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for decode in (1, 6, 80):  # split over positions, and not
        shape = dict(zip(("heads", "kv_heads", "size"), heads, strict=True))
        case = make_case(decode, chunks, **shape, length=512, dtype=torch.bfloat16, rotates=True)
        check(Native(), case, 3e-2)


@pytest.mark.parametrize("what", ["query", "keys", "one key", "infinite key"])
@pytest.mark.parametrize("position", [960, 992, 1000, 1024])
def test_no_number_stays_no_number_however_a_row_is_split(machine: Any, what: str, position: int) -> None:
    """So that the step finds it and fails the request. A maximum passes over it, and a split without a peak is none."""
    case = make_case(1, [], length=1200)
    case = case._replace(places=case.places._replace(position=torch.tensor([position])))
    home = int(case.places.slot[0])
    query, keys, values = (t.nan_to_num(0.1) for t in (case.query, case.keys, case.values))
    match what:
        case "query":
            query[:] = torch.nan
        case "keys":
            keys[home, :position] = torch.nan
        case "one key":
            keys[home, 7] = torch.nan
        case "infinite key":
            keys[home, 7] = torch.inf
    found, *_ = machine.call("attending", "run", KERNELS, case._replace(query=query, keys=keys, values=values))
    assert found.isnan().all()


def test_a_row_alone_and_among_others_is_the_same(machine: Any) -> None:
    """Split as finely either way, so bit for bit."""
    case = make_case(4, [], length=300, rotates=True)
    both = machine.call("attending", "run", KERNELS, case)
    slot, position, _, _ = case.places
    rows = [2, 0, 3]
    rotary = case.rotary._replace(cos=case.rotary.cos[rows], sin=case.rotary.sin[rows]) if case.rotary else None
    some = case._replace(
        query=case.query[rows],
        key=case.key[rows],
        value=case.value[rows],
        places=case.places._replace(slot=slot[rows], position=position[rows], decode=3),
        rotary=rotary,
    )
    assert torch.equal(both[0][rows], machine.call("attending", "run", KERNELS, some)[0])


@pytest.mark.parametrize("width", [8, 100, 896, 3584])
def test_the_layers_parts_agree(machine: Any, width: int) -> None:
    g = torch.Generator().manual_seed(width)
    x, residual, gate_up = (torch.randn(3, n, generator=g) * 3 for n in (width, width, 2 * width))
    scales = torch.rand(width, generator=g)
    for before in (None, residual):
        found = machine.call("trimtab.kernels.layer", "add_norm", x, before, scales, 1e-6)
        for mine, expected in zip(found, layer_reference.add_norm(x, before, scales, 1e-6), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    found = machine.call("trimtab.kernels.layer", "silu_mul", gate_up)
    torch.testing.assert_close(found, layer_reference.silu_mul(gate_up), rtol=1e-5, atol=1e-5)


STREAM, LAYER = "trimtab.kernels.stream", "trimtab.kernels.layer"


def make_product(rows: int, outputs: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(rows + outputs + depth)
    return torch.randn(rows, depth, generator=g).to(dtype), (torch.randn(outputs, depth, generator=g) / 16).to(dtype)


@pytest.mark.parametrize(("outputs", "depth"), [(64, 128), (192, 640), (128, 1152)])
def test_few_rows_are_streamed_by_a_weight_to_the_same_product(machine: Any, outputs: int, depth: int) -> None:
    """Each row by itself, bit for bit, whatever stands beside it."""
    x, weight = make_product(5, outputs, depth, torch.float16)
    parts = machine.call(STREAM, "stream", x, weight)
    assert len(parts) == {128: 1, 640: 5, 1152: 5}[depth]
    torch.testing.assert_close(parts.sum(0), F.linear(x.float(), weight.float()), rtol=1e-5, atol=1e-4)
    for rows in ([2], [4, 2, 0]):
        assert torch.equal(machine.call(STREAM, "stream", x[rows], weight), parts[:, rows])
    found = machine.call(STREAM, "stream_silu", x, weight)
    torch.testing.assert_close(found, layer_reference.stream_silu(x, weight), rtol=2e-3, atol=1e-3)
    assert torch.equal(machine.call(STREAM, "stream_silu", x[[3]], weight), found[[3]])


def test_what_a_product_leaves_in_parts_is_summed_rounded_and_normed(machine: Any) -> None:
    g = torch.Generator().manual_seed(0)
    parts, residual, scales = torch.randn(7, 3, 576, generator=g), torch.randn(3, 576, generator=g), torch.rand(576)
    for dtype in (torch.float32, torch.float16):
        given = (parts, residual.to(dtype), scales.to(dtype), 1e-6)
        found = machine.call(LAYER, "add_norm", *given)
        assert {t.dtype for t in found} == {dtype}
        for mine, expected in zip(found, layer_reference.add_norm(*given), strict=True):
            torch.testing.assert_close(mine, expected, rtol=2e-3, atol=2e-3 if dtype == torch.float16 else 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("outputs", "depth"), [(3584, 18944), (37888, 3584), (1536, 8960), (896, 4864)])
def test_weights_of_real_shapes_are_streamed_on_a_gpu(outputs: int, depth: int) -> None:
    """The interpreter cannot multiply bfloat16."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for rows in (1, 3, 16):
        x, weight = make_product(rows, outputs, depth, torch.bfloat16)
        found = Native().call(STREAM, "stream", x, weight).sum(0)
        torch.testing.assert_close(found, F.linear(x.float(), weight.float()), rtol=1e-4, atol=1e-2)
        found = Native().call(STREAM, "stream_silu", x, weight)
        torch.testing.assert_close(found, layer_reference.stream_silu(x, weight), rtol=2e-2, atol=2e-2)


def test_the_reference_is_softmax_attention() -> None:
    """One chunk from the start of a slot is what torch calls causal attention."""
    case = make_case(0, [(0, 50)], heads=2, kv_heads=2, size=16)
    q, k, v = (t.transpose(0, 1)[None] for t in (case.query, case.key, case.value))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.scale)[0].transpose(0, 1)
    torch.testing.assert_close(run(REFERENCE, case)[0], expected, rtol=1e-5, atol=1e-5)
