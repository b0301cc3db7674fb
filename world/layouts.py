"""Writes the street world to disk in the layout of nuScenes, so that its reader reads it, too."""

from __future__ import annotations

import hashlib
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
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np

from ftdpp import files
from ftdpp.readers.base import Array, ids, unit_rotation
from ftdpp.readers.nuscenes import OFFICIAL_VAL, SSDA_LABELLED, SSDA_TRAIN, VAL_NIGHT, VAL_SINGAPORE
from ftdpp.world.cast import HEIGHT, INTRINSIC, WIDTH, View, photo, sweep
from ftdpp.world.scene import CATEGORIES, CITIES, WORLDS, Scene, build_scene

VERSION = 1  # of the content: changes with every byte that is written
DEFAULT_FRAMES = {"source": 160, "target": 120, "val": 24, "test": 48}
FRAMES_PER_SCENE = 4  # more where there are not enough scenes
PAIRS = (("usa", "singapore"), ("day", "night"))  # source and target
TABLES = (
    "sample sample_data scene log calibrated_sensor ego_pose sensor category lidarseg attribute"
    " visibility instance sample_annotation map"
)
CHANNELS = ("LIDAR_TOP", "CAM_FRONT")

Rows = list[dict[str, Any]]


# ---- which scenes --------------------------------------------------------------------------------


def _scenes(ranges: str, official: frozenset[str] | None = None) -> list[str]:
    """Scene ids in `ranges`; those of an official list, where one is given."""
    chosen = ids(ranges)
    return sorted(chosen if official is None else chosen & official)


# The name of a nuScenes scene decides its split. Each split takes its names from the official list.
SCENES: dict[str, dict[str, list[str]]] = {
    "boston": {
        "train": _scenes(
            "161-168 170-176 200 202-204 206-214 218-220 222 224-260 283-306 440-459 499-502"
        )
    },
    "singapore": {
        "labelled": _scenes("1-947", SSDA_LABELLED),
        "unlabelled": _scenes("1-378", SSDA_TRAIN - SSDA_LABELLED),
        "val": _scenes("4-984", VAL_SINGAPORE),
        "test": _scenes("3-110 270-346", OFFICIAL_VAL),
    },
    "night": {
        "labelled": _scenes("1074-1102", SSDA_LABELLED),
        "unlabelled": _scenes("1074-1102", SSDA_TRAIN - SSDA_LABELLED),
        "val": _scenes("1044-1058", VAL_NIGHT),
        "test": _scenes("1059-1072", OFFICIAL_VAL),
    },
}


def _pool(world: str, split: str) -> list[tuple[str, str]]:
    """The (city, scene name) pairs that a split may use, in the order of use."""
    queues = []
    for city in WORLDS[world].cities:
        lists = SCENES["night" if WORLDS[world].light.lamps else city]
        if split == "train" and "labelled" in lists:
            # Interleaved: any beginning of the list holds about 30 % labelled scenes.
            ranked = [
                ((place + 0.5) / share, scene)
                for part, share in (("labelled", 0.3), ("unlabelled", 0.7))
                for place, scene in enumerate(lists[part])
            ]
            scenes = [scene for _, scene in sorted(ranked)]
        else:
            scenes = lists[split]
        queues.append([(city, f"scene-{scene}") for scene in scenes])
    return [pair for row in zip(*queues, strict=False) for pair in row]


# ---- one frame -----------------------------------------------------------------------------------


def _compose(a: Array, b: Array) -> Array:
    """The product of two quaternions: rotate by b, then by a."""
    vector = a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])
    return np.concatenate([[a[0] * b[0] - a[1:] @ b[1:]], vector])


def _euler(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> Array:
    """The quaternion (w, x, y, z) of a roll about x, then a pitch about y, then a yaw about z."""
    about_z, about_y, about_x = (
        np.array([math.cos(angle / 2), *(math.sin(angle / 2) * np.eye(3)[axis])])
        for angle, axis in ((yaw, 2), (pitch, 1), (roll, 0))
    )
    return _compose(_compose(about_z, about_y), about_x)


def _unit(*quaternion: float) -> Array:
    return np.array(quaternion) / np.linalg.norm(quaternion)


# Position and orientation in the ego car's frame: those of a nuScenes car.
_MOUNTS = {
    "LIDAR_TOP": (
        np.array([0.943713, 0.0, 1.84023]),
        _unit(0.7077955119163518, -0.006492242056004365, 0.010646214713995808, -0.7063073142877817),
    ),
    "CAM_FRONT": (
        np.array([1.70079118954, 0.0159456324149, 1.51095763913]),
        _unit(0.4998015430569128, -0.5030316162024876, 0.4997798114386805, -0.49737083824542755),
    ),
}


def mount(city: str, channel: str) -> tuple[Array, Array]:
    """Translation (3,) in metres and rotation quaternion (4,) from a sensor's to the ego frame."""
    translation, quaternion = _MOUNTS[channel]
    return translation + np.array([0, 0, CITIES[city].mount]), quaternion


def _ego_pose(scene: Scene, phase: Array, time: float) -> tuple[Array, Array]:
    """Where the ego car is after `time` seconds: translation and quaternion in the scene.

    phase: (3,) at which yaw, pitch and roll sway.
    """
    x = scene.speed * time
    y = float(scene.centre(x)) + scene.city.side * scene.lane / 2
    yaw, pitch, roll = (
        size * math.sin(frequency * time + start)
        for size, frequency, start in zip(
            (0.012, 0.007, 0.006), (0.9, 2.1, 1.7), phase, strict=True
        )
    )
    return np.array([x, y, 0.0]), _euler(scene.heading(x) + yaw, pitch, roll)


@dataclass(frozen=True)
class Job:
    """One frame to render: what it shows and the files that it becomes."""

    world: str
    city: str
    key: tuple[int, ...]  # of the scene's randomness
    number: int  # of the frame in its scene; a frame a second
    travel: float  # metres, see build_scene
    start: int  # of the scene, microseconds
    log: str
    tokens: dict[str, str]  # by channel, of its sample_data

    def timestamp(self, channel: str) -> int:
        """Microseconds; the image comes before the sweep ends."""
        early = 35_491 if channel == "CAM_FRONT" else 0
        return self.start + self.number * 1_000_000 - early

    def paths(self) -> tuple[str, str, str]:
        """Sweep, labels and image, below the root."""
        sweep, image = (f"{self.log}__{c}__{self.timestamp(c)}" for c in CHANNELS)
        return (
            f"samples/LIDAR_TOP/{sweep}.pcd.bin",
            f"lidarseg/v1.0-trainval/{self.tokens['LIDAR_TOP']}_lidarseg.bin",
            f"samples/CAM_FRONT/{image}.jpg",
        )


def _render(root: Path, job: Job) -> Rows:
    """Writes the frame's files below `root`; returns its rows of ego_pose.json.

    A frame whose files are all there is not rendered again: each was written whole.
    """
    scene = build_scene(job.world, job.city, job.key, job.travel, float(job.number))
    phase = np.random.default_rng([*job.key, 1]).uniform(0, 6.28, 6)
    poses = {}
    for channel in CHANNELS:
        time = (job.timestamp(channel) - job.start) / 1e6
        poses[channel] = _ego_pose(scene, phase[:3], time)
    if not all((root / file).exists() for file in job.paths()):
        _write_frame(root, job, scene, poses)
    # Each street lies elsewhere in the city, and turned.
    street = _euler(float(phase[3]))
    corner = np.array([300 + 200 * phase[4], 300 + 200 * phase[5], 0.0])
    return [
        {
            "token": job.tokens[channel],
            "timestamp": job.timestamp(channel),
            "rotation": _compose(street, quaternion).tolist(),
            "translation": (corner + unit_rotation(street) @ translation).tolist(),
        }
        for channel, (translation, quaternion) in poses.items()
    ]


def _write_frame(root: Path, job: Job, scene: Scene, poses: dict[str, tuple[Array, Array]]) -> None:
    """Renders a frame; poses: of the ego car, by channel."""
    views = []
    for channel, (translation, quaternion) in poses.items():
        mounted_at, mounted = mount(job.city, channel)
        position = translation + unit_rotation(quaternion) @ mounted_at
        views.append(View(position, unit_rotation(_compose(quaternion, mounted))))
    lidar, camera = views
    rng = np.random.default_rng([*job.key, 2, job.number])
    points, labels = sweep(scene, lidar, WORLDS[job.world].lidar_drop, rng)
    image = photo(scene, camera, rng)
    sweep_file, label_file, image_file = (root / file for file in job.paths())
    with files.replacing(sweep_file) as temporary:
        points.tofile(temporary)
    with files.replacing(label_file) as temporary:
        labels.tofile(temporary)
    with files.replacing(image_file) as temporary:
        image.save(temporary, "JPEG", quality=92)


# ---- the tables ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a world is made of; equal plans give equal bytes."""

    version: int
    source: str
    target: str
    frames: dict[str, int]  # by part: source, target, val, test
    seed: int


class Tables:
    """The tables of a world, ego_pose still empty, and the frames to render."""

    def __init__(self, plan: Plan):
        self.rows: dict[str, Rows] = {name: [] for name in TABLES.split()}
        self.jobs: list[Job] = []
        self.plan = plan
        for index, name in enumerate(CATEGORIES):
            token = _token("category", name)
            self.add("category", token, name=name, description="", index=index)
        for channel, modality in zip(CHANNELS, ("lidar", "camera"), strict=True):
            self.add("sensor", _token("sensor", channel), channel=channel, modality=modality)
        parts = {"source": plan.source, "target": plan.target}
        parts |= {"val": plan.target, "test": plan.target}
        for index, (part, world) in enumerate(parts.items()):
            pool = _pool(world, part if part in ("val", "test") else "train")
            count = plan.frames[part]
            length = max(FRAMES_PER_SCENE, math.ceil(count / len(pool)))
            for number in range(math.ceil(count / length)):
                key = (plan.seed, list(WORLDS).index(world), index, number)
                self._add_scene(world, pool[number], key, count - number * length, length)

    def add(self, table: str, token: str, **row: Any) -> str:
        self.rows[table].append({"token": token, **row})
        return token

    def _token(self, *parts: object) -> str:
        plan = self.plan
        return _token(plan.version, plan.source, plan.target, plan.seed, *parts)

    def _add_scene(
        self, world: str, place: tuple[str, str], key: tuple[int, ...], left: int, length: int
    ) -> None:
        """Adds a scene of `length` frames, or of those that are left."""
        city, name = place
        style, night = CITIES[city], WORLDS[world].light.lamps
        count = min(left, length)
        begin = _begin(city, night, len(self.rows["scene"]))
        log = f"{style.vehicle}-{begin:%Y-%m-%d-%H-%M-%S%z}"
        log_token = self.add(
            "log",
            self._token("log", name),
            logfile=log,
            vehicle=style.vehicle,
            date_captured=f"{begin:%Y-%m-%d}",
            location=style.locations[key[-1] % len(style.locations)],
        )
        calibrated = {}
        for channel in CHANNELS:
            translation, quaternion = mount(city, channel)
            calibrated[channel] = self.add(
                "calibrated_sensor",
                self._token("calibration", name, channel),
                sensor_token=_token("sensor", channel),
                translation=translation.tolist(),
                rotation=quaternion.tolist(),
                camera_intrinsic=INTRINSIC if channel == "CAM_FRONT" else [],
            )
        samples = ["", *(self._token("sample", name, k) for k in range(count)), ""]
        scene_token = self.add(
            "scene",
            self._token("scene", name),
            log_token=log_token,
            nbr_samples=count,
            name=name,
            first_sample_token=samples[1],
            last_sample_token=samples[count],
            description=WORLDS[world].description,
        )
        start = int(begin.timestamp()) * 1_000_000
        travel = 10.0 * (length - 1)
        jobs = []
        for k in range(count):
            tokens = {channel: self._token(name, k, channel) for channel in CHANNELS}
            jobs.append(Job(world, city, key, k, travel, start, log, tokens))
        self.jobs += jobs
        for k, job in enumerate(jobs):
            self.add(
                "sample",
                samples[k + 1],
                timestamp=job.timestamp("LIDAR_TOP"),
                prev=samples[k],
                next=samples[k + 2],
                scene_token=scene_token,
            )
            sweep_file, label_file, image_file = job.paths()
            lidar = job.tokens["LIDAR_TOP"]
            self.add("lidarseg", lidar, sample_data_token=lidar, filename=label_file)
            for channel in CHANNELS:
                image = channel == "CAM_FRONT"
                neighbours = ["", *(other.tokens[channel] for other in jobs), ""]
                self.add(
                    "sample_data",
                    job.tokens[channel],
                    sample_token=samples[k + 1],
                    ego_pose_token=job.tokens[channel],
                    timestamp=job.timestamp(channel),
                    calibrated_sensor_token=calibrated[channel],
                    fileformat="jpg" if image else "pcd",
                    is_key_frame=True,
                    height=HEIGHT if image else 0,
                    width=WIDTH if image else 0,
                    filename=image_file if image else sweep_file,
                    prev=neighbours[k],
                    next=neighbours[k + 2],
                )


def _token(*parts: object) -> str:
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def _begin(city: str, night: bool, scene: int) -> datetime:
    """When a scene was recorded, as it were: no two begin together."""
    zone = timezone(timedelta(hours=8 if city == "singapore" else -4))
    later = timedelta(days=scene % 90, minutes=7 * (scene // 90))
    return datetime(2018, 7, 1, 20 if night else 10, tzinfo=zone) + later


# ---- building ------------------------------------------------------------------------------------


def _die_with_parent() -> None:
    """Ends this worker when its parent is gone: a killed parent cannot stop it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _render_all(root: Path, jobs: list[Job], workers: int) -> Generator[Rows]:
    """The rows of ego_pose.json, frame by frame, in order."""
    workers = min(workers, len(jobs))
    if workers == 1:
        yield from (_render(root, job) for job in jobs)
        return
    # Spawned, not forked: the caller may hold threads or a CUDA context.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _die_with_parent) as pool:
        try:
            yield from pool.map(_render, [root] * len(jobs), jobs)
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
    tables = Tables(plan)
    with closing(_render_all(partial, tables.jobs, workers)) as rendered:
        for done, poses in enumerate(rendered, 1):
            tables.rows["ego_pose"] += poses
            if progress:
                progress(done, len(tables.jobs), "building the street world")
    folder = partial / "v1.0-trainval"
    folder.mkdir(exist_ok=True)
    for name, rows in tables.rows.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=0) + "\n")
    for stale in partial.rglob(".*.tmp"):  # of workers that were killed
        stale.unlink()
    os.replace(partial, root)
    (root / note.name).unlink()  # only now: a kill before the rename loses nothing


def _plan(source: str, target: str, frames: dict[str, int], seed: int, workers: int) -> Plan:
    """Checks the arguments of `write_world`."""
    if (source, target) not in PAIRS:
        known = ", ".join(f"{a} -> {b}" for a, b in PAIRS)
        raise ValueError(f"there is no street world for {source} -> {target}; there is {known}")
    for part, count in frames.items():
        if part not in DEFAULT_FRAMES:
            known = ", ".join(DEFAULT_FRAMES)
            raise ValueError(f"unknown key {part!r} in frames (known: {known})")
        if count < 1:
            raise ValueError(f"frames[{part!r}] is {count}, expected at least 1")
    if seed < 0 or workers < 1:
        raise ValueError(f"seed is {seed} and workers {workers}, expected seed >= 0, workers >= 1")
    return Plan(VERSION, source, target, DEFAULT_FRAMES | frames, seed)


def write_world(
    root: Path,
    source: str,
    target: str,
    frames: dict[str, int] | None = None,
    seed: int = 0,
    workers: int = 2,
    progress: files.Progress | None = None,
) -> None:
    """Writes a data set: training frames of the source; training, val and test of the target.

    root: the folder to create; its parent is made if need be. source, target: one of PAIRS.
    frames: overrides of DEFAULT_FRAMES by key. workers: processes; the files do not depend on it.
    progress: called with (done, total, what) after each frame.

    The files are built in a folder beside `root` that is renamed at the end: `root` is whole or
    absent. A build that was stopped leaves that folder; the next call with the same arguments goes
    on there. Raises ValueError for a pair that is not in PAIRS and for counts out of range,
    FileExistsError if `root` is not empty.
    """
    plan = _plan(source, target, frames or {}, seed, workers)
    _refuse_occupied(root)
    with files.locked(_partial(root)):
        _refuse_occupied(root)  # another process may have written it while this one waited
        _build(root, plan, workers, progress)


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
) -> Path:
    """The root of the built-in world for a pair of domains, written below `cache` on first use.

    Resumes and raises as `write_world` does.
    """
    plan = _plan(src, tgt, {}, 0, workers)
    sizes = "-".join(str(count) for count in plan.frames.values())
    root = cache / f"world-{src}-{tgt}-v{VERSION}-{sizes}"
    if not root.is_dir():
        with files.locked(_partial(root)):
            if not root.is_dir():  # no other process wrote it while this one waited
                _build(root, plan, workers, progress)
    return root
