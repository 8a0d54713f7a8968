"""Compile the step's kernels for a GPU that is not there, and read what the compiler made of them.

    python -m trimtab.kernels.compile_check            every kernel, sm_80 and sm_90; the last line is JSON

Invariant: needs neither driver nor device: the triton wheel brings the assembler and both disassemblers. What passes
the interpreter may still fail to compile, or spill, or read two bytes at a time: this says so.
"""

# mypy: allow-untyped-calls
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trimtab.kernels import chunk_attention, decode_attention, finish, layer, resolve, stats, stream, tasks, tilt

TARGETS = (80, 90)
_GROUPS = 2048  # of 128 tokens: a vocabulary of up to 262144
_RANK = 16  # of the bank's corrections
_BIN = Path(nvidia.__file__).parent / "bin"
_INT32 = (
    "top_k gate correction state chosen edit_spans edit_token edit_count mask_row mask_words correction_top_k task "
    "forced "
    "token_out status_out base_token_out steered_token_out top_ids_out"
)
_POINTERS = dict.fromkeys(_INT32.split(), "*i32") | {
    "steered": "*i8",
    "shadow": "*i8",
    "silu": "*i8",
    "noise": "*i64",
    "pool": "*i64",
    "ranked": "*i64",
    "likely": "*i64",
    "steered_keys": "*i64",
    "slot": "*i64",
    "position": "*i64",
    "eps": "fp32",
    "scale": "fp32",
    "window": "i32",
    "tiles": "*i32",
}
_ALIGNED = {
    "logits_stride",
    "vocab",
    "stride",
    "hidden_stride",
    "size",
    "head_stride",
    "query_row",
    "query_head",
    "key_row",
    "key_head",
    "value_row",
    "value_head",
    "slot_stride",
    "position_stride",
    "width",
    "depth",
    "share",
    "rank",
}  # multiples of 16 in real models
_INTEGERS = _ALIGNED | {"mix", "alternatives", "words", "heads", "kv_heads", "rows"}
_FLOATS = (
    "logits hidden head query key value keys values cos sin query_norm key_norm query_out out "
    "x residual scales summed gate_up"
)
_OF_DTYPE = set(_FLOATS.split())


class Build(NamedTuple):
    """One way to launch a kernel."""

    name: str
    kernel: Any  # the jit function
    dtype: str  # of logits, hidden and head, as Triton writes it
    constants: dict[str, int | bool]
    launch: dict[str, Any]
    types: dict[str, str] | None = None  # of pointers whose names say another in other kernels


class Compiled(NamedTuple):
    """What the compiler made of a build for one target."""

    name: str
    target: int  # 90 is sm_90
    registers: int  # a thread
    stack: int  # bytes
    spills: int  # STL and LDL instructions
    wide_loads: int  # LDG of 128 bits
    shared: int  # bytes
    instructions: int


def builds() -> list[Build]:
    """The launches of a model with up to _GROUPS * 128 tokens: usual banks, and the largest with most alternatives."""
    chunk = {"CHUNK": stats.CHUNK}
    result = []
    for d, itemsize in (("bf16", 2), ("fp32", 4)):
        result.append(Build(f"stats {d}", stats.stats_kernel, d, chunk, stats.LAUNCH))
        for most in (32, tasks.MAX_CANDIDATES):
            slots = tasks.slots_for(most)
            shape = {"HAS_EDITS": True, "HAS_MASKS": True, "SLOTS": slots}
            sizes = shape | {"GROUPS": _GROUPS, "SHIFT": 32 - 8 * itemsize, "ROWS": finish.ROWS}
            result.append(Build(f"finish {d}, {slots} slots", finish.finish_kernel, d, sizes, finish.LAUNCH))
            sizes = shape | {"GROUPS": _GROUPS, "ROWS": tilt.ROWS} | tilt.tiles(most, _RANK, itemsize)
            result.append(Build(f"tilt {d}, {slots} slots", tilt.tilt_kernel, d, sizes, tilt.LAUNCH))
        sizes = shape | {"BLOCK": resolve.BLOCK, "LISTED": resolve.LISTED}
        result.append(Build(f"resolve {d}", resolve.resolve_kernel, d, sizes, resolve.LAUNCH))
        result += _decoding(d, itemsize)
    return result


def _decoding(dtype: str, itemsize: int) -> list[Build]:
    """What a captured decode step launches for each layer, at the sizes of 7B models."""
    result = []
    for size, splits, group in ((64, 16, 7), (128, 1, 7), (128, 4, 7), (256, 4, 4)):  # the last is Gemma's
        tile = decode_attention.tile_for(size, itemsize)
        launch = {name: value for name, value in tile.items() if name != "BLOCK"}
        shape: dict[str, int | bool] = {"GROUP": group, "SIZE": size, "M": 16, "WIDTH": size, "BLOCK": tile["BLOCK"]}
        shape |= {"SPLITS": splits, "ROTARY": True, "NORM": splits == 4}
        name = f"attend {dtype}, {size} wide, {splits} splits"
        result.append(Build(name, decode_attention.attend_kernel, dtype, shape, launch))
        if splits == 1:
            continue
        tile = chunk_attention.tile_for(size, itemsize)
        launch = {name: value for name, value in tile.items() if name != "BLOCK"}
        shape = {"GROUP": group, "SIZE": size, "M": chunk_attention.tile_rows(group, itemsize), "WIDTH": size}
        name, shape = f"chunk {dtype}, {size} wide", shape | {"BLOCK": tile["BLOCK"]}
        result.append(Build(name, chunk_attention.chunk_kernel, dtype, shape, launch))
    shape = {"HEADS": 32, "KV_HEADS": 4, "SIZE": 128, "WIDTH": 128, "ROTARY": True, "NORM": True}
    result.append(Build(f"store {dtype}", chunk_attention.store_kernel, dtype, shape, chunk_attention.STORE))
    sizes = {"SIZE": 128, "WIDTH": 128, "SPLITS": 16}
    result.append(Build(f"combine {dtype}", decode_attention.combine_kernel, dtype, sizes, decode_attention.COMBINE))
    for parts, summand in ((1, dtype), (8, "fp32")):
        block = {"BLOCK": layer.norm_block(3584), "ADD": True, "PARTS": parts}
        name = f"norm {dtype}, {parts} parts"
        result.append(Build(name, layer.add_norm_kernel, dtype, block, layer.norm_launch(3584), {"x": f"*{summand}"}))
    result.append(Build(f"silu {dtype}", layer.silu_kernel, dtype, {"BLOCK": layer.SILU_BLOCK}, layer.SILU_LAUNCH))
    if itemsize == 2:
        sizes = {"ROWS": stream.MOST_ROWS, "TILE": stream.TILE, "DEPTH": stream.DEPTH}
        for silu, out in ((False, "fp32"), (True, dtype)):
            name, shape = f"stream {dtype}, {out}", sizes | {"SILU": silu}
            result.append(
                Build(
                    name, stream.stream_kernel, dtype, shape, stream.LAUNCH, {"out": f"*{out}", "weight": f"*{dtype}"}
                )
            )
    return result


def compile_for(build: Build, target: int) -> Compiled:
    """Compile one build for sm_<target> and read its machine code."""
    names: Sequence[str] = build.kernel.arg_names
    signature = {name: _type(name, build) for name in names}
    aligned = [n for n in names if n in _ALIGNED or signature[n].startswith("*")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(build.kernel, signature, build.constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(build.launch))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = _run("cuobjdump", "-res-usage", file.name), _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Compiled(
        name=build.name,
        target=target,
        registers=int(found[1]),
        stack=int(found[2]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        wide_loads=len(re.findall(r"\bLDG\.E[\w.]*\.128", code)),
        shared=binary.metadata.shared,
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
    )


def _type(name: str, build: Build) -> str:
    if name in build.constants:
        return "constexpr"
    if build.types and name in build.types:
        return build.types[name]
    if name in _INTEGERS:
        return "i32"
    if name in _OF_DTYPE:
        return f"*{build.dtype}"
    return _POINTERS.get(name, "*fp32")


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_BIN / tool, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Compile everything; print a line a kernel, then all of it as JSON."""
    results = [compile_for(build, target) for target in TARGETS for build in builds()]
    for r in results:
        print(
            f"sm_{r.target} {r.name:24} {r.registers:4} registers {r.stack:5} stack {r.spills:5} spills "
            f"{r.wide_loads:3} wide loads {r.shared:6} shared {r.instructions:6} instructions"
        )
    print(json.dumps([r._asdict() for r in results]))


if __name__ == "__main__":
    main()
