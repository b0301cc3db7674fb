"""Builds the street world on disk: which frames, by which workers, and on from where it stopped."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from ftdpp import files
from ftdpp.world import a2d2, dense, kitti, nuscenes, rig, vkitti
from ftdpp.world.rig import FRAMES_PER_SCENE, Layout, Shot
from ftdpp.world.scene import WORLDS

VERSION = 2  # of the content: changes with every byte that is written
LAYOUTS: dict[str, Layout] = {
    "usa": nuscenes,
    "singapore": nuscenes,
    "day": nuscenes,
    "night": nuscenes,
    "vkitti": vkitti,
    "skitti": kitti,
    "a2d2": a2d2,
    "gta5": dense.GTA5,
    "synthia": dense.SYNTHIA,
    "cityscapes": dense.CITYSCAPES,
}
# Source, target -> frames of each part, for three minutes on two cores at half a second a frame. A
# part that is not there has no split: the labels of Cityscapes' test are hidden. Virtual KITTI has
# each frame in six weathers.
_STREETS = {"source": 320, "target": 240, "val": 48, "test": 96}
_KITTI = {"target": 200, "val": 40, "test": 80}  # frames of two megabytes
_DENSE = {"source": 360, "target": 280, "val": 64}
DEFAULT_FRAMES: dict[tuple[str, str], dict[str, int]] = {
    ("usa", "singapore"): _STREETS,
    ("day", "night"): _STREETS,
    ("vkitti", "skitti"): {"source": 80, **_KITTI},
    ("a2d2", "skitti"): {"source": 240, **_KITTI},
    ("gta5", "cityscapes"): _DENSE,
    ("synthia", "cityscapes"): _DENSE,
}
PAIRS = tuple(DEFAULT_FRAMES)


# ---- which frames --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a world is made of; equal plans give equal bytes."""

    version: int
    source: str
    target: str
    frames: dict[str, int]  # by part: source, target, val, test
    seed: int


def shots_of(plan: Plan) -> dict[str, list[Shot]]:
    """Folder below the root -> the frames of the data set in it; one where the pair shares it."""
    shared = LAYOUTS[plan.source] is LAYOUTS[plan.target]
    out: dict[str, list[Shot]] = {}
    for index, (part, count) in enumerate(plan.frames.items()):
        world = plan.source if part == "source" else plan.target
        layout = LAYOUTS[world]
        places = layout.places(world, part if part in ("val", "test") else "train")
        key = (plan.seed, list(WORLDS).index(world), index)
        length = FRAMES_PER_SCENE
        if layout is nuscenes:  # one street a place, longer where there are not enough of them
            length = max(length, math.ceil(count / len(places)))
        folder = "" if shared else world
        out[folder] = out.get(folder, []) + rig.shots(world, places, count, key, length)
    return out


# ---- building ------------------------------------------------------------------------------------


def _write(root: Path, shot: Shot) -> None:
    """Writes a frame below `root`, unless its files are all there: each was written whole."""
    layout = LAYOUTS[shot.world]
    if not all((root / file).exists() for file in layout.files(shot)):
        layout.write(root, shot)


def _die_with_parent() -> None:
    """Ends this worker when its parent is gone: a killed parent cannot stop it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_all(roots: list[Path], shots: list[Shot], workers: int) -> Generator[None]:
    """Writes each frame below its root; yields after each, in order."""
    workers = min(workers, len(shots))
    if workers == 1:
        yield from map(_write, roots, shots)
        return
    # Spawned, not forked: the caller may hold threads or a CUDA context.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _die_with_parent) as pool:
        try:
            yield from pool.map(_write, roots, shots)
        finally:
            pool.shutdown(cancel_futures=True)


def _partial(root: Path) -> Path:
    """The folder in which `root` is built."""
    return root.with_name(f".{root.name}.partial")


def _build(root: Path, plan: Plan, workers: int, progress: files.Progress | None) -> None:
    """Builds the world, on top of what a killed build of the same plan left."""
    # plan.json tells one plan from another, and is gone from the finished world.
    partial = _partial(root)
    note, content = partial / "plan.json", json.dumps(asdict(plan))
    if not note.exists() or note.read_text() != content:
        if partial.exists():
            shutil.rmtree(partial)
        with files.replacing(note) as temporary:
            temporary.write_text(content)
    sets = shots_of(plan)
    shots = [shot for part in sets.values() for shot in part]
    roots = [partial / folder for folder, part in sets.items() for _ in part]
    with closing(_write_all(roots, shots, workers)) as written:
        for done, _ in enumerate(written, 1):
            if progress:
                progress(done, len(shots), "building the street world")
    for folder, part in sets.items():
        LAYOUTS[part[0].world].tables(partial / folder, part)
    for stale in partial.rglob(".*.tmp"):  # of workers that were killed
        stale.unlink()
    os.replace(partial, root)
    (root / note.name).unlink()  # only now: a kill before the rename loses nothing


def plan_of(source: str, target: str, frames: dict[str, int], seed: int, workers: int) -> Plan:
    """Checks the arguments of `write_world`."""
    if (source, target) not in PAIRS:
        known = ", ".join(f"{a} -> {b}" for a, b in PAIRS)
        raise ValueError(f"there is no street world for {source} -> {target}; there is {known}")
    defaults = DEFAULT_FRAMES[source, target]
    for part, count in frames.items():
        if part not in defaults:
            known = ", ".join(defaults)
            raise ValueError(f"unknown key {part!r} in frames (known: {known})")
        if count < 1:
            raise ValueError(f"frames[{part!r}] is {count}, expected at least 1")
    if seed < 0 or workers < 1:
        raise ValueError(f"seed is {seed} and workers {workers}, expected seed >= 0, workers >= 1")
    return Plan(VERSION, source, target, defaults | frames, seed)


def write_world(
    root: Path,
    source: str,
    target: str,
    frames: dict[str, int] | None = None,
    seed: int = 0,
    workers: int = 2,
    progress: files.Progress | None = None,
) -> None:
    """Writes a pair: training frames of the source; training, val and test of the target.

    root: the folder to create; its parent is made if need be. Two domains of one data set share it;
    of two data sets, each has a folder of its domain's name in it, see `roots`. source, target: one
    of PAIRS. frames: overrides of DEFAULT_FRAMES by key. workers: processes; the files do not
    depend on it. progress: called with (done, total, what) after each frame.

    The files are built in a folder beside `root` that is renamed at the end: `root` is whole or
    absent. A build that was stopped leaves that folder; the next call with the same arguments goes
    on there. Raises ValueError for a pair that is not in PAIRS and for counts out of range,
    FileExistsError if `root` is not empty.
    """
    plan = plan_of(source, target, frames or {}, seed, workers)
    _refuse_occupied(root)
    with files.locked(_partial(root)):
        _refuse_occupied(root)  # another process may have written it while this one waited
        _build(root, plan, workers, progress)


def roots(root: Path, *domains: str) -> tuple[Path, ...]:
    """Where the data set of each domain lies in a world that `write_world` wrote."""
    return tuple(root if LAYOUTS[domain] is nuscenes else root / domain for domain in domains)


def pair_of(src: str, tgt: str) -> tuple[str, str] | None:
    """The pair of PAIRS whose world has both domains, in whatever direction."""
    return next((pair for pair in PAIRS if {src, tgt} <= set(pair)), None)


def _refuse_occupied(root: Path) -> None:
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(
            f"{root} exists and is not an empty folder: remove it or choose another place"
        )


def built_in(
    src: str, tgt: str, cache: Path, workers: int = 2, progress: files.Progress | None = None
) -> tuple[Path, Path]:
    """The roots of both domains in the built-in world of their pair, in whatever direction.

    Written below `cache` on first use. Resumes as `write_world` does. Raises ValueError where there
    is no such pair.
    """
    plan = plan_of(*(pair_of(src, tgt) or (src, tgt)), {}, 0, workers)
    sizes = "-".join(str(count) for count in plan.frames.values())
    root = cache / f"world-{plan.source}-{plan.target}-v{VERSION}-{sizes}"
    if not root.is_dir():
        with files.locked(_partial(root)):
            if not root.is_dir():  # no other process wrote it while this one waited
                _build(root, plan, workers, progress)
    first, second = roots(root, src, tgt)
    return first, second
