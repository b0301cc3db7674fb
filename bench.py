"""The yardstick: what each part takes on this machine, beside the least it could take.

The floor of a row is the larger of its floating-point operations over the measured matrix-product rate and its bytes over
the measured copy rate, both taken in the same rounds. Rounds interleave all rows, because shared machines drift.
"""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftdpp import data, kernels, losses, train
from ftdpp.kernels import Pyramid
from ftdpp.models import UNet3D, update_teacher

LOADS = 20  # frames loaded in one go: a single one takes too short


def machine(device: torch.device) -> str:
    """Processor or GPU kind, threads, versions."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), model
        )
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def unet_cost(net: UNet3D, pyramid: Pyramid) -> tuple[float, float]:
    """FLOP and bytes of one forward pass: 2 Cin Cout a pair; inputs read, weights read and outputs written once, fp32."""
    state = net.state_dict()
    layers = [(state["stem.weight"], pyramid.same[0])]
    layers += [(state[f"encode.{i}.conv.weight"], pyramid.same[i]) for i in range(net.levels)]
    for i in range(net.levels - 1):
        layers += [
            (state[f"decode.{i}.conv.weight"], pyramid.same[i]),
            (state[f"down.{i}.conv.weight"], pyramid.down[i]),
            (state[f"up.{i}.conv.weight"], pyramid.down[i].transposed),
        ]
    flop = moved = 0.0
    for weight, kmap in layers:
        _, cin, cout = weight.shape
        n_in, n_out = len(kmap.start_in) - 1, len(kmap.start_out) - 1
        flop += 2.0 * len(kmap.pair_in) * cin * cout
        moved += 4.0 * (n_in * cin + n_out * cout + weight.numel())
    return flop, moved


Case = tuple[Callable[[], object], float, float]  # what to time, its FLOP, its bytes


def run(root: Path, cache: Path, rounds: int, device: torch.device, batches: tuple[int, ...] = (1, 8)) -> list[dict[str, Any]]:
    """Measure on the built-in world's usa -> singapore frames at `root`; medians over interleaved rounds."""
    train.keep_freed_memory()
    gpu = device.type == "cuda"
    r = losses.recipe("usa-singapore", "ftdpp", "small")
    src = train.Source("usa", root).index("train", r, cache)
    tgt = train.Source("singapore", root).index("train", r, cache)

    side, mib = (8192, 1024) if gpu else (1024, 128)
    a, b = torch.randn(2, side, side, device=device)
    big, copy = torch.randn(2, mib * 2**18, device=device)
    product, stream = f"matrix product {side}^3", f"copy {mib} MiB"
    cases: dict[str, Case] = {
        product: (lambda: torch.mm(a, b), 2.0 * side**3, 0.0),
        stream: (lambda: copy.copy_(big), 0.0, 2.0 * big.numel() * 4),
    }
    for frames in batches:
        batch = data.collate([data.sample(src.frame(i), None, 0, np.random.default_rng(0)) for i in range(frames)])
        cases |= unet_cases(batch.coords, f"{frames} frame{'s' if frames > 1 else ''}", device)

    counter = iter(range(10**9))

    def load() -> None:
        for _ in range(LOADS):
            i = next(counter) % len(src)
            data.sample(src.frame(i), data.Augment(), 0, np.random.default_rng(i))

    cases["load and augment a frame, one core"] = (load, 0.0, 0.0)
    for method in ("source-only", "xmuda", "ftdpp"):
        recipe = losses.recipe("usa-singapore", method, "small")
        job = train.Run(Path(), recipe, 0, [src], tgt, None, device=device)
        labelled, unlabelled = train.Batches(job.recipe, 0, [src], tgt)[0]
        item = labelled.to(device), unlabelled.to(device) if unlabelled is not None else None
        cases[f"training step, {method}, small preset, batch {recipe.batch}"] = (partial(whole_step, job, *item), 0.0, 0.0)

    times: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds + 1):  # the first round warms up, and compiles
        for name, (call, *_) in cases.items():
            if gpu:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            if gpu:
                torch.cuda.synchronize()
            if i:
                times[name].append((time.perf_counter() - begin) / (LOADS if name.startswith("load") else 1))
    median = {name: statistics.median(t) for name, t in times.items()}
    flops, bandwidth = cases[product][1] / median[product], cases[stream][2] / median[stream]
    rows = []
    for name, (_, flop, moved) in cases.items():
        floor = max(flop / flops, moved / bandwidth) if flop or moved else None
        rows.append(
            {
                "what": name,
                "ms": 1e3 * median[name],
                "a second": 1 / median[name],
                "GFLOP/s": flop / median[name] / 1e9 if flop else None,
                "GB/s": moved / median[name] / 1e9 if moved else None,
                "floor ms": 1e3 * floor if floor else None,
                "times floor": median[name] / floor if floor else None,
            }
        )
    return rows


def unet_cases(coords: torch.Tensor, label: str, device: torch.device) -> dict[str, Case]:
    """Maps, forward, and forward + backward with the maps built (warm) and not (cold), on points (N, 4)."""
    net, flat = UNet3D(), Pyramid(coords)
    flop, moved = unet_cost(net, flat)
    net, coords = net.to(device), coords.to(device)
    feat, built = torch.ones(len(coords), 1, device=device), kernels.pyramid(coords)
    label = f"{label}, {len(flat.keys[0]):,} voxels"

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return net(feat, built)

    def both(warm: Pyramid | None = None) -> None:
        net.zero_grad()
        net(feat, warm or kernels.pyramid(coords)).sum().backward()

    return {
        f"maps, {label}": (lambda: kernels.pyramid(coords), 0.0, 0.0),
        f"sparse U-Net m=16 forward, {label}": (forward, flop, moved),
        f"... forward+backward, maps warm, {label}": (lambda: both(built), 3 * flop, 3 * moved),
        f"... forward+backward, maps cold, {label}": (both, 3 * flop, 3 * moved),
    }


def whole_step(job: train.Run, labelled: data.Batch, unlabelled: data.Batch | None) -> None:
    """One iteration as `train.fit` runs it, without loading."""
    terms = losses.step(job.student, job.teacher, labelled, unlabelled, job.recipe, True)
    job.optimizer.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    job.optimizer.step()
    if job.teacher is not None:
        update_teacher(job.teacher, job.student, 1)


def append(path: Path, rows: list[dict[str, Any]], device: torch.device) -> None:
    """Add the rows to a CSV, with date and machine."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, ["date", "machine", *rows[0]])
        if new:
            writer.writeheader()
        for row in rows:
            cells = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({"date": datetime.date.today().isoformat(), "machine": machine(device), **cells})
