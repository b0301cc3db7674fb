"""What a long training comes to: its memory over thousands of steps, and bf16 beside fp32.

    python -m ftdpp.bench.endurance steps [N]        memory over N iterations (2,000)
    python -m ftdpp.bench.endurance frames [N]       memory of an index of N frames (100,000)
    python -m ftdpp.bench.endurance precision [N]    losses in bf16 and fp32 over N iterations (200)

The trainings are FtD++ on the built-in world, usa -> singapore, with images of 48x88 and networks a
quarter as wide as the paper's: what grows, grows in them too.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftdpp import files, index, runs, systems, train
from ftdpp.data import CLASS_SETS
from ftdpp.index import Index
from ftdpp.runs import Origin, Places
from ftdpp.world import layouts

TINY = ("image=48,88", "batch=2", "width_2d=16", "width_3d=4")
KEPT = 50  # iterations, at the end, over which a loss is averaged


def resident() -> float:
    """MiB of this process that are in memory now, the pages of mapped files among them."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def a_run(out: Path, steps: int, *more: str, seed: int = 0) -> train.Run:
    """A training on the built-in world, which is made on first use."""
    torch.set_num_threads(1)
    given = (*TINY, f"steps={steps}", f"milestones={steps * 3 // 4}", *more)
    r = systems.recipe("usa-singapore", "ftdpp", "small", overrides=given)
    cache = files.cache_home()
    roots = layouts.built_in("usa", "singapore", cache, 1, lambda done, total, what: None)
    usa, singapore = (
        Origin(name, root) for name, root in zip(("usa", "singapore"), roots, strict=True)
    )
    places = Places({"src": usa, "tgt": singapore, "val": singapore}, cache, built_in=True)
    return runs.assemble(r, seed, out, places, workers=0)[0]


def over_steps(steps: int) -> Iterator[str]:
    """Memory twenty times on the way, validations and saves included."""
    every = max(steps // 20, 1)
    with tempfile.TemporaryDirectory() as folder:
        run = a_run(Path(folder), steps, f"val_every={5 * every}", f"save_every={every}")
        found = {}
        yield "iteration,MiB"
        for event in train.fit(run):
            if isinstance(event, train.Step) and event.iteration % every == 0:
                found[event.iteration] = resident()
                yield f"{event.iteration},{found[event.iteration]:.0f}"
    late = [(i, mib) for i, mib in found.items() if i > steps // 4]
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope
    yield f"after the first quarter {1000 * slope:+.1f} MiB in 1,000 iterations"


def over_frames(frames: int) -> Iterator[str]:
    """Memory of an index whose frames are small, so that what counts is what it keeps of each."""
    rows, shape, classes = 50, (12, 20), len(CLASS_SETS["street6"])
    chance, rng = random.Random(0), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        path.mkdir()
        record: dict[str, Any] = {"rows": rows, "dense": False, "depth": True, "shape": shape}
        record |= {"has_label": True, "counts": [rows // classes] * classes, "ignored": 2}
        records: list[Any] = [
            {"token": f"{chance.getrandbits(128):032x}", **record, "dropped": 0, "sha": "0" * 64}
            for _ in range(frames)
        ]
        for name, size in index._shapes(records[0]).items():
            block = rng.integers(0, 100, (1000, *size)).astype(index._TYPES[name]).tobytes()
            with (path / f"{name}.bin").open("wb") as file:
                for _ in range(frames // 1000):
                    file.write(block)
                file.write(block[: len(block) // 1000 * (frames % 1000)])
        identity = {"domain": "usa", "split": "train", "frames": None}
        meta = {"identity": identity, "fingerprint": {}, "frames": records}
        (path / "meta.json").write_text(json.dumps(meta))
        del records, meta
        before = resident()
        made = Index(path)
        made._seen[:] = b"\1" * frames  # the digests are made up
        yield f"{frames:,} frames: {resident() - before:.0f} MiB once it is open"
        order = np.random.default_rng(0).permutation(frames)
        for i in order[: frames // 2]:
            made.frame(int(i)).image.sum()
        yield f"{resident() - before:.0f} MiB after half of them were read, in any order"


def losses(run: train.Run) -> tuple[list[float], float]:
    """The sum of the terms at each iteration, and the last mIoU of the last head on val."""
    sums, miou = [], 0.0
    for event in train.fit(run):
        if isinstance(event, train.Step):
            sums.append(sum(event.terms.values()))
        else:
            miou = event.miou[run.system.heads[-1]]
    return sums, miou


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the mean loss over the last iterations, in percent of the second."""
    first, second = (statistics.fmean(side[-KEPT:]) for side in (a, b))
    return 100 * abs(first - second) / second


def of_precisions(steps: int) -> Iterator[str]:
    """bf16 beside fp32, and beside it what another seed or other weights by a rounding make."""
    sides: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"more": ("precision=bf16",)},
        "fp32, learning rates larger by 1e-6": {"more": ("lr_2d=2.000002e-3", "lr_3d=6.000006e-3")},
        "fp32, another seed": {"seed": 1},
    }
    found = {}
    yield f"{steps} iterations; loss: the mean over the last {KEPT}"
    for name, given in sides.items():
        with tempfile.TemporaryDirectory() as folder:
            more = given.get("more", ())
            run = a_run(Path(folder), steps, f"val_every={steps}", *more, seed=given.get("seed", 0))
            found[name] = losses(run)
        sums, miou = found[name]
        mean = statistics.fmean(sums[-KEPT:])
        away, points = distance(sums, found["fp32"][0]), 100 * (miou - found["fp32"][1])
        yield f"{name}: loss {mean:.4f}, {away:.2f} % from fp32; mIoU {points:+.2f} points"


def main() -> None:
    kinds = {
        "steps": (over_steps, 2000),
        "frames": (over_frames, 100_000),
        "precision": (of_precisions, 200),
    }
    if len(sys.argv) < 2 or sys.argv[1] not in kinds:
        sys.exit(__doc__)
    what, count = kinds[sys.argv[1]]
    for line in what(int(sys.argv[2]) if len(sys.argv) > 2 else count):
        print(line, flush=True)


if __name__ == "__main__":
    main()
