"""The CPU yardstick: what each part takes on this machine, beside the least it could take.

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

from ftdpp import data, losses, train
from ftdpp.kernels import Pyramid
from ftdpp.models import UNet3D


def machine() -> str:
    """Processor kind, threads, versions."""
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


def run(root: Path, cache: Path, rounds: int) -> list[dict[str, Any]]:
    """Measure on the built-in world's usa -> singapore frames at `root`; medians over interleaved rounds."""
    train.keep_freed_memory()
    r = losses.recipe("usa-singapore", "ftdpp", "small")
    src = train.Source("usa", root).index("train", r, cache)
    tgt = train.Source("singapore", root).index("train", r, cache)
    cases: dict[str, tuple[Callable[[], object], float, float, float]] = {}  # name -> call, FLOP, bytes, items a call

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    big, copy = torch.randn(32 * 2**20), torch.empty(32 * 2**20)
    cases["matrix product 1024^3"] = (lambda: torch.mm(a, b), 2.0 * 1024**3, 0.0, 1)
    cases["copy 128 MiB"] = (lambda: copy.copy_(big), 0.0, 2.0 * big.numel() * 4, 1)

    for frames in (1, 8):
        batch = data.collate([data.sample(src.frame(i), None, 0, np.random.default_rng(0)) for i in range(frames)])
        net, pyramid = UNet3D(), Pyramid(batch.coords)
        feat = torch.ones(len(batch.coords), 1)
        flop, moved = unet_cost(net, pyramid)
        label = f"{frames} frame{'s' if frames > 1 else ''}, {len(pyramid.keys[0]):,} voxels"

        def forward(net: UNet3D = net, feat: torch.Tensor = feat, pyramid: Pyramid = pyramid) -> torch.Tensor:
            with torch.no_grad():
                return net(feat, pyramid)

        def both(
            net: UNet3D = net, feat: torch.Tensor = feat, coords: torch.Tensor = batch.coords, warm: Pyramid | None = None
        ) -> None:
            net.zero_grad()
            net(feat, warm or Pyramid(coords)).sum().backward()

        cases[f"maps, {label}"] = (partial(Pyramid, batch.coords), 0.0, 0.0, 1)
        cases[f"sparse U-Net m=16 forward, {label}"] = (forward, flop, moved, 1)
        cases[f"... forward+backward, maps warm, {label}"] = (partial(both, warm=pyramid), 3 * flop, 3 * moved, 1)
        cases[f"... forward+backward, maps cold, {label}"] = (both, 3 * flop, 3 * moved, 1)

    counter = iter(range(10**9))

    def load() -> None:
        i = next(counter) % len(src)
        data.sample(src.frame(i), data.Augment(), 0, np.random.default_rng(i))

    cases["load and augment a frame, one core"] = (load, 0.0, 0.0, 1)
    for method in ("source-only", "xmuda", "ftdpp"):
        recipe = losses.recipe("usa-singapore", method, "small")
        job = train.Run(Path(), recipe, 0, [src], tgt, None)
        first = train.Batches(job.recipe, 0, [src], tgt)[0]

        def whole(job: train.Run = job, item: Any = first) -> None:
            labelled, unlabelled = item
            terms = losses.step(job.student, job.teacher, labelled, unlabelled, job.recipe, True)
            job.optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            job.optimizer.step()
            if job.teacher is not None:
                train.update_teacher(job.teacher, job.student, 1)

        cases[f"training step, {method}, small preset, batch {recipe.batch}"] = (whole, 0.0, 0.0, 1)

    times: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds + 1):  # the first round warms up
        for name, (call, *_rest) in cases.items():
            repeats = 20 if name.startswith("load") else 1
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            if i:
                times[name].append((time.perf_counter() - begin) / repeats)
    median = {name: statistics.median(t) for name, t in times.items()}
    flops = cases["matrix product 1024^3"][1] / median["matrix product 1024^3"]
    stream = cases["copy 128 MiB"][2] / median["copy 128 MiB"]
    rows = []
    for name, (_, flop, moved, _n) in cases.items():
        floor = max(flop / flops, moved / stream) if flop or moved else None
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


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add the rows to a CSV, with date and machine."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, ["date", "machine", *rows[0]])
        if new:
            writer.writeheader()
        for row in rows:
            cells = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({"date": datetime.date.today().isoformat(), "machine": machine(), **cells})
