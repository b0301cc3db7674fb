"""Compile every Triton kernel for GPUs that need not be there.

    python -m ftdpp.bench.aot [--write FILE.csv]

It takes every configuration that the paper's sparse U-Net uses. It prints registers, bytes spilled,
shared memory and asynchronous copies of each, and exits with 1 where a kernel spills, or where a
GEMM for an NVIDIA GPU does not fetch the next rows while it multiplies. `bench/kernels.csv` keeps
the table.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ftdpp.kernels import attention, gemm, hash, norm
from ftdpp.kernels.maps import AXIS_BITS, BATCH_BITS, BIAS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PRECISIONS = {  # name: type in memory, precision of the products
    "fp32": ("fp32", "ieee"),
    "tf32": ("fp32", "tf32"),
    "fp16": ("fp16", "ieee"),
    "bf16": ("bf16", "ieee"),
}
# Types of the kernels' arguments by name; a pointer that is named nowhere is to int32.
INT64_POINTERS = (
    *("keys", "table_key", "base", "axes", "place"),
    *("first", "last", "valid", "live", "batches", "seed"),
)
FP32_POINTERS = (
    *("part", "stat", "weight", "bias"),
    *("dweight", "dbias", "running_mean", "running_var"),
    *("key", "value", "dkey", "dvalue"),
)
INTEGERS = (
    *("cin", "cout", "wk", "wi", "wo", "channels", "rows", "share", "shares"),
    *("count", "size", "columns", "flip", "splits", "d", "points"),
)
SCALARS = {**dict.fromkeys(INTEGERS, "i32"), "momentum": "fp32", "eps": "fp32"}
# Pointers that may lie anywhere; all others are aligned to 16 bytes, as PyTorch's are.
ANY_PLACE = (*hash.ANY_PLACE, *norm.ANY_PLACE)
# The U-Net's channels are multiples of 16; what is derived from them is, too.
ALIGNED = {"cin", "cout", "wk", "wi", "wo", "channels"}
Row = dict[str, Any]


class Configuration(NamedTuple):
    """One way to compile a kernel."""

    name: str
    kernel: Any
    storage: dict[str, str]  # types of the pointers whose type varies
    constants: dict[str, Any]
    options: dict[str, int]  # of the compiler


def unet_layers(width: int = 16, levels: int = 7) -> list[tuple[int, int]]:
    """(cin, cout) of every convolution of the sparse U-Net."""
    c = [width * (level + 1) for level in range(levels)]
    same = [(a, a) for a in c]
    joined = [(2 * a, a) for a in c[:-1]]
    between = [pair for a, b in pairwise(c) for pair in ((a, b), (b, a))]
    return sorted({(1, width), *same, *joined, *between})


def split_blocks(blocks: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """The kernel's constants and the compiler's options in a table of tile sizes."""
    constants = {k: v for k, v in blocks.items() if k.isupper()}
    options = {k: v for k, v in blocks.items() if k.islower()}
    return constants, options


def map_configurations() -> Iterator[Configuration]:
    constants, options = split_blocks(hash.LANES)
    grid = {"BIAS": BIAS, "AXIS_BITS": AXIS_BITS, "BATCH_BITS": BATCH_BITS}
    for kernel in (hash.pack_points, hash.hash_insert, hash.find_neighbours, hash.list_pairs):
        given = {**constants, **grid} if kernel is hash.pack_points else constants
        yield Configuration(kernel.__name__, kernel, {}, given, options)


def norm_configurations() -> Iterator[Configuration]:
    passes: list[tuple[str, Any, dict[str, Any]]] = [
        ("sum_rows", norm.sum_rows, {"BACK": False}),
        ("normalise", norm.normalise, {"SHARES": norm.SHARES}),
        ("sum_rows backward", norm.sum_rows, {"BACK": True}),
        ("normalise_backward", norm.normalise_backward, {"SHARES": norm.SHARES}),
    ]
    for dtype in ("fp32", "fp16", "bf16"):
        storage = dict.fromkeys(("x", "y", "dy", "dx"), dtype)
        for side in (16, 32, 64):
            tile, options = split_blocks(norm.blocks(side))
            for name, kernel, extra in passes:
                label = f"{name} {dtype} {tile['BR']} rows {tile['BC']} wide"
                yield Configuration(label, kernel, storage, {**tile, **extra}, options)


def attention_configurations() -> Iterator[Configuration]:
    """A head's channels decide a tile in the gradients alone: 16 columns in the paper's network."""
    storage = dict.fromkeys(("x", "y", "dy", "dx"), "fp32")
    tile, options = split_blocks(attention.BLOCK)
    tile["S"], size = 64, f"{tile['BN']} points"
    yield Configuration(f"sum_logits {size}", attention.sum_logits, storage, tile, options)
    for drop in (0, 51):
        given = {**tile, "DROP": drop, **({} if drop else {"seed": None})}  # no dropout, no seed
        shares = {"SHARES": attention.SHARES}
        what = " dropout" if drop else ""
        forward = {**given, **shares}
        name = f"attend_points{what} {size}"
        yield Configuration(name, attention.attend_points, storage, forward, options)
        for width in (16, 32, attention.WIDEST):
            back = {**given, "D": attention.columns(width), "PRECISION": attention.PRECISION}
            name = f"sum_gradients{what} {size} {width} wide"
            yield Configuration(name, attention.sum_gradients, storage, back, options)
            name = f"attend_backward{what} {size} {width} wide"
            yield Configuration(
                name, attention.attend_backward, storage, {**back, **shares}, options
            )


def gemm_configurations() -> Iterator[Configuration]:
    """Several layers share a configuration; each comes once."""
    seen = set()
    for precision, (dtype, products) in PRECISIONS.items():
        storage = dict.fromkeys(("x", "w", "y", "dy"), dtype)
        for cin, cout in unet_layers():
            passes = [("forward", gemm.gather_gemm, cin, gemm.gemm_blocks(cin, cout), {"wo": 1})]
            if cin > 1:  # the first layer's input takes no gradient
                back = gemm.gemm_blocks(cout, cin)
                passes.append(("input gradient", gemm.gather_gemm, cout, back, {"wi": 1}))
            part = gemm.gradient_blocks(cin, cout)
            passes.append(("weight gradient", gemm.weight_gradient, cin, part, {}))
            for what, kernel, channels, blocks, fixed in passes:
                tile, options = split_blocks(blocks)
                name = f"{what} {precision} {'x'.join(map(str, tile.values()))}"
                constants = {**tile, **fixed, "PRECISION": products}
                if channels == 1:  # Triton compiles an argument of 1 as a constant
                    name += ", cin 1"
                    constants["cin"] = 1
                if name not in seen:
                    seen.add(name)
                    yield Configuration(name, kernel, storage, constants, options)


def configurations() -> Iterator[Configuration]:
    """Every configuration that the paper's U-Net and its fusion use, each once."""
    yield from map_configurations()
    yield from norm_configurations()
    yield from attention_configurations()
    yield from gemm_configurations()


def compiled(c: Configuration, target: GPUTarget) -> Any:
    """The kernel for a target, with pointers aligned to 16 bytes as PyTorch's are."""
    names = c.kernel.arg_names
    pointers = {
        **dict.fromkeys(names, "i32"),
        **dict.fromkeys(INT64_POINTERS, "i64"),
        **dict.fromkeys(FP32_POINTERS, "fp32"),
        **c.storage,
    }
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name in c.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = SCALARS.get(name, f"*{pointers[name]}")
        pointer = name not in SCALARS
        if name in ALIGNED or (pointer and name not in ANY_PLACE):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=c.kernel, signature=signature, constexprs=c.constants, attrs=attributes)
    return triton.compile(source, target=target, options=c.options)


def cuda_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of a CUDA binary, by Triton's disassembler."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "-res-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def hip_usage(assembly: str) -> tuple[int, int]:
    """(vector registers, registers spilled) from AMD assembly."""
    registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", assembly)[0])
    spilled = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly)
    return registers, sum(int(n) for n in spilled)


def table() -> Iterator[Row]:
    """One row for each configuration and target."""
    for configuration in configurations():
        for gpu, target in TARGETS.items():
            made = compiled(configuration, target)
            if gpu.startswith("sm_"):
                registers, spilled = cuda_usage(made.asm["cubin"])
                copies = made.asm["ptx"].count("cp.async.c")
            else:
                registers, spilled = hip_usage(made.asm["amdgcn"])
                copies = 0
            yield {
                "triton": triton.__version__,
                "kernel": configuration.name,
                "target": gpu,
                "registers": registers,
                "spilled": spilled,
                "shared": made.metadata.shared,
                "async copies": copies,
            }


def complaint(row: Row) -> str:
    """What is wrong with a row; empty where nothing is."""
    name, target = row["kernel"], row["target"]
    if row["spilled"]:
        return f"{name} for {target} spills {row['spilled']} bytes"
    gemm_for_nvidia = "x" in name and target != "gfx942"
    # The first layer's input is single numbers, which cannot be copied asynchronously.
    if gemm_for_nvidia and "cin 1" not in name and not row["async copies"]:
        return f"{name} for {target} has no asynchronous copies"
    return ""


def main() -> int:
    rows = []
    for row in table():
        rows.append(row)
        print(",".join(str(v) for v in row.values()), flush=True)
    if sys.argv[1:2] == ["--write"]:
        with open(sys.argv[2], "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    wrong = [text for text in map(complaint, rows) if text]
    print("\n".join(wrong), file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
