"""Writes the street world in the layout of nuScenes with lidarseg: 32 beams, a 400x225 image.

The functions are those of `rig.Layout`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ftdpp import files as disk
from ftdpp.readers.base import Array, ids, unit_rotation
from ftdpp.readers.nuscenes import OFFICIAL_VAL, SSDA_LABELLED, SSDA_TRAIN, VAL_NIGHT, VAL_SINGAPORE
from ftdpp.world import rig
from ftdpp.world.cast import Camera, Lidar, Picture, photo, sweep
from ftdpp.world.rig import Shot
from ftdpp.world.scene import CITIES, WORLDS, Scene

CAMERA = Camera(225, 400, 316.604300761, 204.066755, 122.876766)  # nuScenes' at a quarter
LIDAR = Lidar(tuple(np.radians(np.linspace(-30.67, 10.67, 32))), 1090, 80.0)
CHANNELS = ("LIDAR_TOP", "CAM_FRONT")
EARLY = {"LIDAR_TOP": 0, "CAM_FRONT": 35_491}  # microseconds: the image precedes the sweep's end
TABLES = (
    "sample sample_data scene log calibrated_sensor ego_pose sensor category lidarseg attribute"
    " visibility instance sample_annotation map"
)
CATEGORIES = [  # of lidarseg; the place in the list is the raw id
    "noise", "animal", "human.pedestrian.adult", "human.pedestrian.child",
    "human.pedestrian.construction_worker", "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer", "human.pedestrian.stroller", "human.pedestrian.wheelchair",
    "movable_object.barrier", "movable_object.debris", "movable_object.pushable_pullable",
    "movable_object.trafficcone", "static_object.bicycle_rack", "vehicle.bicycle",
    "vehicle.bus.bendy", "vehicle.bus.rigid", "vehicle.car", "vehicle.construction",
    "vehicle.emergency.ambulance", "vehicle.emergency.police", "vehicle.motorcycle",
    "vehicle.trailer", "vehicle.truck", "flat.driveable_surface", "flat.other", "flat.sidewalk",
    "flat.terrain", "static.manmade", "static.other", "static.vegetation", "vehicle.ego",
]  # fmt: skip
IDS = rig.label_table({
    "person": 2, "barrier": 9, "traffic_cone": 12, "bicycle": 14, "bus": 16, "car van": 17,
    "motorcycle rider": 21, "truck": 23, "road lane_marking parking": 24, "sidewalk": 26,
    "terrain": 27, "vegetation trunk": 30,
    "building wall fence pole traffic_light traffic_sign train other_object": 28,
})  # fmt: skip


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
        "labelled": _scenes("948-1043 1074-1102", SSDA_LABELLED),
        "unlabelled": _scenes("948-1043 1074-1102", SSDA_TRAIN - SSDA_LABELLED),
        "val": _scenes("1044-1058", VAL_NIGHT),
        "test": _scenes("1059-1072", OFFICIAL_VAL),
    },
}


def places(world: str, part: str) -> list[tuple[str, str]]:
    """See `rig.Layout`. Any beginning of a list of training scenes holds about 30 % that are
    labelled in the semi-supervised setting."""
    queues = []
    for city in WORLDS[world].cities:
        lists = SCENES["night" if world == "night" else city]
        if part == "train" and "labelled" in lists:
            ranked = [
                ((place + 0.5) / share, scene)
                for kind, share in (("labelled", 0.3), ("unlabelled", 0.7))
                for place, scene in enumerate(lists[kind])
            ]
            scenes = [scene for _, scene in sorted(ranked)]
        else:
            scenes = lists[part]
        queues.append([(city, f"scene-{scene}") for scene in scenes])
    return [pair for row in zip(*queues, strict=False) for pair in row]


# ---- one frame -----------------------------------------------------------------------------------

# Position and orientation in the car's frame: those of a nuScenes car.
_MOUNTS = {
    "LIDAR_TOP": (
        (0.943713, 0.0, 1.84023),
        (0.7077955119163518, -0.006492242056004365, 0.010646214713995808, -0.7063073142877817),
    ),
    "CAM_FRONT": (
        (1.70079118954, 0.0159456324149, 1.51095763913),
        (0.4998015430569128, -0.5030316162024876, 0.4997798114386805, -0.49737083824542755),
    ),
}


def mount(city: str, channel: str) -> tuple[Array, Array]:
    """Translation (3,) in metres and rotation quaternion (4,) from a sensor's to the ego frame."""
    translation, quaternion = (np.array(numbers) for numbers in _MOUNTS[channel])
    raised = np.array([0, 0, CITIES[city].mount])
    return translation + raised, quaternion / np.linalg.norm(quaternion)


def _begin(shot: Shot) -> datetime:
    """When a scene was recorded, as it were: no two begin together."""
    zone = timezone(timedelta(hours=8 if shot.city == "singapore" else -4))
    scene = int(shot.place.removeprefix("scene-"))
    later = timedelta(days=scene % 90, minutes=7 * (scene // 90))
    return datetime(2018, 7, 1, 20 if shot.world == "night" else 10, tzinfo=zone) + later


def _timestamp(shot: Shot, channel: str) -> int:
    """Microseconds."""
    return (int(_begin(shot).timestamp()) + shot.number) * 1_000_000 - EARLY[channel]


def _log(shot: Shot) -> str:
    return f"{CITIES[shot.city].vehicle}-{_begin(shot):%Y-%m-%d-%H-%M-%S%z}"


def _token(*parts: object) -> str:
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def _data_token(shot: Shot, channel: str) -> str:
    """Of the sample_data of one sensor."""
    return _token(*shot.key, shot.place, shot.number, channel)


def files(shot: Shot) -> tuple[str, ...]:
    lidar, camera = (f"{_log(shot)}__{c}__{_timestamp(shot, c)}" for c in CHANNELS)
    return (
        f"samples/LIDAR_TOP/{lidar}.pcd.bin",
        f"lidarseg/v1.0-trainval/{_data_token(shot, 'LIDAR_TOP')}_lidarseg.bin",
        f"samples/CAM_FRONT/{camera}.jpg",
    )


def _pose(shot: Shot, scene: Scene, channel: str) -> rig.Pose:
    position, quaternion = mount(shot.city, channel)
    ego = rig.ego_pose(scene, shot, -EARLY[channel] / 1e6)
    return rig.mounted(ego, position, unit_rotation(quaternion))


def look(shot: Shot, scene: Scene) -> Picture:
    pose = _pose(shot, scene, "CAM_FRONT")
    return photo(scene, scene.primitives, CAMERA, *pose, shot.rng())


def write(root: Path, shot: Shot) -> None:
    scene, drop = shot.scene(), WORLDS[shot.world].lidar_drop
    pose = _pose(shot, scene, "LIDAR_TOP")
    points, labels = sweep(scene, scene.primitives, LIDAR, *pose, drop, shot.rng(1))
    sweep_file, label_file, image_file = (root / file for file in files(shot))
    rig.dump(sweep_file, points)
    rig.dump(label_file, IDS[labels])
    with disk.replacing(image_file) as temporary:
        image = Image.fromarray(look(shot, scene).image)
        image.save(temporary, "JPEG", quality=92)


# ---- the tables ----------------------------------------------------------------------------------

Add = Callable[..., None]  # table, token, the columns of a row


def tables(root: Path, shots: list[Shot]) -> None:
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES.split()}

    def add(table: str, token: str, **row: Any) -> None:
        rows[table].append({"token": token, **row})

    for index, name in enumerate(CATEGORIES):
        add("category", _token("category", name), name=name, description="", index=index)
    for channel, modality in zip(CHANNELS, ("lidar", "camera"), strict=True):
        add("sensor", _token("sensor", channel), channel=channel, modality=modality)
    for _, scene in groupby(shots, key=lambda shot: (shot.key, shot.place)):
        _add_scene(add, list(scene))
    for name, content in rows.items():
        rig.text(root / "v1.0-trainval" / f"{name}.json", json.dumps(content, indent=0) + "\n")


def _add_scene(add: Add, shots: list[Shot]) -> None:
    """All frames of one scene."""
    first, names = shots[0], (*shots[0].key, shots[0].place)
    scene, style = first.scene(), CITIES[first.city]
    log, token = _token(*names, "log"), _token(*names, "scene")
    where = {"location": style.locations[first.key[-1] % len(style.locations)]}
    when = {"logfile": _log(first), "date_captured": f"{_begin(first):%Y-%m-%d}"}
    add("log", log, vehicle=style.vehicle, **where, **when)
    samples = ["", *(_token(*names, "sample", shot.number) for shot in shots), ""]
    ends = {"first_sample_token": samples[1], "last_sample_token": samples[-2]}
    told = {"nbr_samples": len(shots), "description": WORLDS[first.world].description}
    add("scene", token, name=first.place, log_token=log, **ends, **told)
    for k, shot in enumerate(shots, 1):
        time, lidar = _timestamp(shot, "LIDAR_TOP"), _data_token(shot, "LIDAR_TOP")
        chain = {"prev": samples[k - 1], "next": samples[k + 1]}
        add("sample", samples[k], timestamp=time, scene_token=token, **chain)
        add("lidarseg", lidar, sample_data_token=lidar, filename=files(shot)[1])
    for channel in CHANNELS:
        _add_sensor(add, scene, shots, samples, channel)


def _add_sensor(
    add: Add, scene: Scene, shots: list[Shot], samples: list[str], channel: str
) -> None:
    """What one sensor recorded in a scene."""
    first, image = shots[0], channel == "CAM_FRONT"
    sensor = _token(*first.key, first.place, "calibration", channel)
    translation, quaternion = (numbers.tolist() for numbers in mount(first.city, channel))
    mounted = {"translation": translation, "rotation": quaternion}
    intrinsic = rig.intrinsic(CAMERA) if image else []
    kind = {"sensor_token": _token("sensor", channel), "camera_intrinsic": intrinsic}
    add("calibrated_sensor", sensor, **mounted, **kind)
    height, width = (CAMERA.height, CAMERA.width) if image else (0, 0)
    form = {"fileformat": "jpg" if image else "pcd", "height": height, "width": width}
    # Each street lies elsewhere in the city, and turned.
    turn, east, north = np.random.default_rng([*first.key, 3]).uniform(0, 1, 3)
    street, corner = rig.euler(6.28 * turn), np.array([300 + 1200 * east, 300 + 1200 * north, 0.0])
    tokens = ["", *(_data_token(shot, channel) for shot in shots), ""]
    for k, shot in enumerate(shots, 1):
        token, time = tokens[k], _timestamp(shot, channel)
        belongs = {"sample_token": samples[k], "calibrated_sensor_token": sensor}
        chain = {"is_key_frame": True, "prev": tokens[k - 1], "next": tokens[k + 1]}
        own = {"ego_pose_token": token, "filename": files(shot)[2 if image else 0]}
        add("sample_data", token, timestamp=time, **own, **belongs, **chain, **form)
        translation, quaternion = rig.ego_pose(scene, shot, -EARLY[channel] / 1e6)
        translation = (corner + unit_rotation(street) @ translation).tolist()
        rotation = rig.compose(street, quaternion).tolist()
        add("ego_pose", token, timestamp=time, translation=translation, rotation=rotation)
