"""Compile every kernel, in every configuration that the paper's sparse U-Net uses, for GPUs that need not be there.

    python -m ftdpp.kernels.aot [--write FILE.csv]

prints registers, bytes spilled, shared memory and asynchronous copies for each, and exits with 1 where a kernel spills, or
where a GEMM for an NVIDIA GPU does not fetch the next rows while it multiplies. `bench/kernels.csv` keeps the table.
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
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ftdpp.kernels import gemm, hash, norm
from ftdpp.kernels.maps import AXIS_BITS, BIAS, FRAME_BITS

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
DTYPES = {"fp32": ("fp32", "ieee"), "tf32": ("fp32", "tf32"), "fp16": ("fp16", "ieee"), "bf16": ("bf16", "ieee")}
LONG = ("keys", "table_key", "base", "axes", "place", "first", "last", "valid", "live", "batches")  # pointers to int64
FLOAT = ("part", "stat", "weight", "bias", "dweight", "dbias", "running_mean", "running_var")  # to fp32, whatever is stored
SCALARS = {**dict.fromkeys(("cin", "cout", "wk", "wi", "wo", "channels", "rows", "share", "shares"), "i32"),
           **dict.fromkeys(("count", "size", "columns", "flip", "splits"), "i32"), "momentum": "fp32", "eps": "fp32"}  # fmt: skip
Row = dict[str, Any]


def unet_layers(m: int = 16, levels: int = 7) -> list[tuple[int, int]]:
    """(cin, cout) of every convolution of the sparse U-Net."""
    c = [m * (level + 1) for level in range(levels)]
    between = [pair for a, b in pairwise(c) for pair in ((a, b), (b, a))]
    return sorted({(1, m), *((a, a) for a in c), *((2 * a, a) for a in c[:-1]), *between})


def configurations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, kernel, types of its pointers, constants, options), each once."""
    grid = {"BIAS": BIAS, "AXIS_BITS": AXIS_BITS, "FRAME_BITS": FRAME_BITS}
    for kernel in (hash.pack_points, hash.hash_insert, hash.find_neighbours, hash.list_pairs):
        constants = {"BLOCK": hash.LANES["BLOCK"], **(grid if kernel is hash.pack_points else {})}
        yield kernel.__name__, kernel, {}, constants, {"num_warps": hash.LANES["num_warps"]}
    for dtype in ("fp32", "fp16", "bf16"):
        for side in (16, 32, 64):
            options = {k: v for k, v in norm.blocks(side).items() if k.islower()}
            tile = {k: v for k, v in norm.blocks(side).items() if k.isupper()}
            for kernel, extra in (
                (norm.sum_rows, {"BACK": False}),
                (norm.normalise, {"SHARES": norm.SHARES}),
                (norm.sum_rows, {"BACK": True}),
                (norm.normalise_backward, {"SHARES": norm.SHARES}),
            ):
                label = f"{kernel.__name__}{' backward' * extra.get('BACK', False)} {dtype} {tile['BR']} rows {tile['BC']} wide"
                yield label, kernel, dict.fromkeys(("x", "y", "dy", "dx"), dtype), {**tile, **extra}, options
    seen = set()
    for name, (dtype, precision) in DTYPES.items():
        for cin, cout in unet_layers():
            passes = [("forward", gemm.gather_gemm, cin, cout, gemm.gemm_blocks(cin, cout), {"wo": 1})]
            if cin > 1:  # the first layer's input takes no gradient
                passes.append(("input gradient", gemm.gather_gemm, cout, cin, gemm.gemm_blocks(cout, cin), {"wi": 1}))
            passes.append(("weight gradient", gemm.weight_gradient, cin, cout, gemm.gradient_blocks(cin, cout), {}))
            for what, kernel, a, _, blocks, fixed in passes:
                options = {k: v for k, v in blocks.items() if k.islower()}
                constants = {k: v for k, v in blocks.items() if k.isupper()} | fixed | ({"cin": 1} if a == 1 else {})
                label = f"{what} {name} {'x'.join(str(v) for k, v in blocks.items() if k.isupper())}{', cin 1' * (a == 1)}"
                if label not in seen:
                    seen.add(label)
                    storage = dict.fromkeys(("x", "w", "y", "dy"), dtype)
                    yield label, kernel, storage, {**constants, "PRECISION": precision}, options


def compiled(kernel: Any, storage: dict[str, str], constants: dict[str, Any], options: dict[str, int], target: GPUTarget) -> Any:
    """The kernel for a target. Pointers and channel counts are multiples of 16, as those of the U-Net with m = 16 are."""
    stored = {**dict.fromkeys(kernel.arg_names, "i32"), **dict.fromkeys(LONG, "i64"), **dict.fromkeys(FLOAT, "fp32"), **storage}
    signature = {n: "constexpr" if n in constants else SCALARS.get(n, f"*{stored[n]}") for n in kernel.arg_names}
    aligned = {"cin", "cout", "wk", "wi", "wo", "channels"}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (n, t) in enumerate(signature.items())
        if (t.startswith("*") and n not in hash.ANY_PLACE) or (n in aligned and t != "constexpr")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={**options, **gemm.FUSION})


def cuda_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of a CUDA binary, by the disassembler that Triton brings."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def table() -> Iterator[Row]:
    """One row for each configuration and target."""
    for name, kernel, storage, constants, options in configurations():
        for gpu, target in TARGETS.items():
            made = compiled(kernel, storage, constants, options, target)
            if gpu.startswith("sm_"):
                registers, spilled = cuda_usage(made.asm["cubin"])
                copies = made.asm["ptx"].count("cp.async.c")
            else:
                text = made.asm["amdgcn"]
                registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
                spilled = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text))
                copies = 0
            yield {
                "triton": triton.__version__, "kernel": name, "target": gpu, "registers": registers, "spilled": spilled,
                "shared": made.metadata.shared, "async copies": copies,
            }  # fmt: skip


def complaint(row: Row) -> str:
    """What is wrong with a row; empty when nothing is. Single numbers (the first layer's input) cannot be copied ahead."""
    if row["spilled"]:
        return f"{row['kernel']} for {row['target']} spills {row['spilled']} bytes"
    if row["target"] != "gfx942" and "x" in row["kernel"] and "cin 1" not in row["kernel"] and not row["async copies"]:
        return f"{row['kernel']} for {row['target']} has no asynchronous copies"
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
