"""Builds the street world on disk: which frames, by which workers, and on from where it stopped."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections import Counter
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from ftdpp import files
from ftdpp.processes import in_processes
from ftdpp.world import datasets, nuscenes
from ftdpp.world.rig import Layout, Shot
from ftdpp.world.scene import TABLES, WORLDS

VERSION = 2  # of the content: changes with every byte that is written
FRAMES_PER_STREET = 4
MOST_FRAMES = 100_000  # of a part: no real set has so many, and they take 60 GB
NUSCENES = nuscenes.NuScenes("nuscenes")
LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("usa", "singapore", "day", "night"), NUSCENES),
    "vkitti": datasets.VirtualKitti("virtual_kitti"),
    "skitti": datasets.SemanticKitti("semantic_kitti"),
    "a2d2": datasets.A2d2("a2d2"),
    "gta5": datasets.Gta5("gta5"),
    "synthia": datasets.Synthia("synthia"),
    "cityscapes": datasets.Cityscapes("cityscapes"),
}
DEFAULT_FRAMES = {(source, target): frames for source, target, frames in TABLES["pairs"]}
PAIRS = tuple(DEFAULT_FRAMES)


def shots_of(source: str, target: str, frames: dict[str, int], seed: int) -> list[Shot]:
    """The frames of a pair, part by part. frames: of each part: source, target, val, test."""
    shots = []
    for index, (name, count) in enumerate(frames.items()):
        world, part = source if name == "source" else target, name
        if name in ("source", "target"):
            part = "train"
        places, length = LAYOUTS[world].places(world, part), FRAMES_PER_STREET
        if LAYOUTS[world] is NUSCENES:  # a street a place, longer where there are not enough
            length = max(length, math.ceil(count / len(places)))
        used: Counter[str] = Counter()
        for n in range(count):
            street, number = divmod(n, length)
            city, place = places[street % len(places)]
            key, travel = (seed, list(WORLDS).index(world), index, street), 10.0 * (length - 1)
            shots.append(Shot(world, part, city, key, number, travel, place, used[place]))
            used[place] += 1
    return shots


def roots(root: Path, *domains: str) -> tuple[Path, ...]:
    """Where the data set of each domain lies in a world; those of nuScenes share its root."""
    return tuple(root if LAYOUTS[domain] is NUSCENES else root / domain for domain in domains)


def _write(home: Path, shot: Shot) -> None:
    """Writes a frame below `home`, unless its files are all there: each was written whole."""
    layout = LAYOUTS[shot.world]
    paths = [home / file for file in layout.files(shot)]
    if not all(path.exists() for path in paths):
        for path, content in zip(paths, layout.contents(shot, shot.scene()), strict=True):
            files.write(path, content)


def sizes_of(source: str, target: str, overrides: dict[str, int]) -> dict[str, int]:
    """The frames of each part of a pair: those of DEFAULT_FRAMES but for the overrides.

    Raises ValueError for a pair that is not in PAIRS, an unknown part, a count out of range.
    """
    if (source, target) not in PAIRS:
        known = ", ".join(f"{a} -> {b}" for a, b in PAIRS)
        raise ValueError(f"there is no street world for {source} -> {target}; there is {known}")
    defaults = DEFAULT_FRAMES[source, target]
    for part, count in overrides.items():
        if part not in defaults:
            known = ", ".join(defaults)
            raise ValueError(f"unknown key {part!r} in frames (known: {known})")
        if not 1 <= count <= MOST_FRAMES:
            raise ValueError(f"frames[{part!r}] is {count}, expected 1 to {MOST_FRAMES}")
    return defaults | overrides


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
    on there, one with others removes it. Raises ValueError for a pair that is not in PAIRS and for
    counts out of range, FileExistsError if `root` is not empty.
    """
    sizes = sizes_of(source, target, frames or {})
    if seed < 0 or workers < 1:
        raise ValueError(f"seed is {seed} and workers {workers}, expected seed >= 0, workers >= 1")
    plan = json.dumps([VERSION, source, target, sizes, seed]).encode()
    # The plan is in its name, not in a file of it: one rename finishes the world.
    partial = root.with_name(f".{root.name}.{hashlib.sha256(plan).hexdigest()[:8]}.partial")
    shots = shots_of(source, target, sizes, seed)
    homes = roots(partial, *(shot.world for shot in shots))
    with files.locked(root.with_name(f".{root.name}")):  # another process may write it meanwhile
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise FileExistsError(
                f"{root} exists and is not an empty folder: remove it or choose another place"
            )
        of_a_plan = re.compile(rf"\.{re.escape(root.name)}\.[0-9a-f]{{8}}\.partial")
        for other in root.parent.iterdir():
            if of_a_plan.fullmatch(other.name) and other != partial:
                shutil.rmtree(other)
        with in_processes(min(workers, len(shots))) as mapped:
            for done, _ in enumerate(mapped(_write, homes, shots), 1):
                if progress:
                    progress(done, len(shots), "building the street world")
        for home, own in groupby(zip(homes, shots, strict=True), key=lambda pair: pair[0]):
            part = [shot for _, shot in own]
            for name, text in LAYOUTS[part[0].world].tables(part).items():
                files.write(home / name, text.encode())
        files.finish(partial, root)


def pair_of(src: str, tgt: str) -> tuple[str, str] | None:
    """The pair of PAIRS whose world has both domains, in whatever direction."""
    return next((pair for pair in PAIRS if {src, tgt} <= set(pair)), None)


def built_in(
    src: str, tgt: str, cache: Path, workers: int = 2, progress: files.Progress | None = None
) -> tuple[Path, Path]:
    """The roots of both domains in the built-in world of their pair, in whatever direction.

    Written below `cache` on first use, as `write_world` does it. Raises ValueError where there is
    no such pair.
    """
    source, target = pair_of(src, tgt) or (src, tgt)
    sizes = "-".join(map(str, sizes_of(source, target, {}).values()))
    root = cache / f"world-{source}-{target}-v{VERSION}-{sizes}"
    if not root.is_dir():
        with suppress(FileExistsError):  # another process wrote it while this one waited
            write_world(root, source, target, workers=workers, progress=progress)
    first, second = roots(root, src, tgt)
    return first, second
