"""Writes the street world in the layout of nuScenes with lidarseg: 32 beams, a 400x225 image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from ftdpp.readers.base import compose, euler, ids, unit_rotation
from ftdpp.world import rig
from ftdpp.world.cast import Lidar, Pose, sweep
from ftdpp.world.rig import Shot
from ftdpp.world.scene import CITIES, TABLES, WORLDS, Scene

TABLE = TABLES["nuscenes"]
LIDAR = Lidar(np.radians(np.linspace(-30.67, 10.67, 32)), 1090, 80.0)
CHANNELS = {"LIDAR_TOP": "lidar", "CAM_FRONT": "camera"}
EARLY = {"LIDAR_TOP": 0, "CAM_FRONT": 35_491}  # microseconds: the image precedes the sweep's end


class NuScenes(rig.Layout):
    def places(self, world: str, part: str) -> list[tuple[str, str]]:
        """A place is a scene; the world's cities take turns."""
        cities = WORLDS[world].cities
        scenes = [TABLE["night" if world == "night" else city][part].split() for city in cities]
        queues = [[name for span in spans for name in sorted(ids(span))] for spans in scenes]
        turns = (zip(cities, names, strict=True) for names in zip(*queues, strict=False))
        return [(city, f"scene-{name}") for turn in turns for city, name in turn]

    def files(self, shot: Shot) -> tuple[str, ...]:
        lidar, camera = (f"{_log(shot)}__{c}__{_timestamp(shot, c)}" for c in CHANNELS)
        return (
            f"samples/LIDAR_TOP/{lidar}.pcd.bin",
            f"lidarseg/v1.0-trainval/{_data_token(shot, 'LIDAR_TOP')}_lidarseg.bin",
            f"samples/CAM_FRONT/{camera}.jpg",
        )

    def camera_pose(self, shot: Shot, scene: Scene) -> Pose:
        return _pose(shot, scene, "CAM_FRONT")

    def contents(self, shot: Shot, scene: Scene) -> Iterator[bytes]:
        points, labels = sweep(scene, LIDAR, _pose(shot, scene, "LIDAR_TOP"), shot.rng(1))
        yield points.tobytes()
        yield self.IDS[labels].tobytes()
        image = Image.fromarray(self.look(shot, scene).image)
        yield rig.saved(image.save, format="JPEG", quality=92)

    def tables(self, shots: list[Shot]) -> dict[str, str]:
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLE["tables"]}

        def add(table: str, token: str, **row: Any) -> None:
            rows[table].append({"token": token, **row})

        for index, name in enumerate(TABLE["categories"]):
            add("category", _token("category", name), name=name, description="", index=index)
        for channel, modality in CHANNELS.items():
            add("sensor", _token("sensor", channel), channel=channel, modality=modality)
        for _, scene in groupby(shots, key=lambda shot: (shot.key, shot.place)):
            self._add_scene(add, list(scene))
        folder = "v1.0-trainval"
        return {f"{folder}/{name}.json": json.dumps(t, indent=0) + "\n" for name, t in rows.items()}

    def _add_scene(self, add: Callable[..., None], shots: list[Shot]) -> None:
        """All frames of one scene. `add` takes a table, a token, the columns of a row."""
        first, names = shots[0], (*shots[0].key, shots[0].place)
        scene, style = first.scene(), CITIES[first.city]
        log, token = _token(*names, "log"), _token(*names, "scene")
        where = {"location": style.locations[first.key[-1] % len(style.locations)]}
        made = {"logfile": _log(first), "date_captured": f"{_begin(first):%Y-%m-%d}"}
        add("log", log, vehicle=style.vehicle, **where, **made)
        samples = [_token(*names, "sample", shot.number) for shot in shots]
        ends = {"first_sample_token": samples[0], "last_sample_token": samples[-1]}
        told = {"nbr_samples": len(shots), "description": WORLDS[first.world].description}
        add("scene", token, name=first.place, log_token=log, **ends, **told)
        for shot, sample, chain in zip(shots, samples, _chain(samples), strict=True):
            time, lidar = _timestamp(shot, "LIDAR_TOP"), _data_token(shot, "LIDAR_TOP")
            add("sample", sample, timestamp=time, scene_token=token, **chain)
            add("lidarseg", lidar, sample_data_token=lidar, filename=self.files(shot)[1])
        # Each street lies elsewhere in the city, and turned.
        turn, east, north = np.random.default_rng([*first.key, 3]).uniform(0, 1, 3)
        street = euler(6.28 * turn)
        corner = np.array([300 + 1200 * east, 300 + 1200 * north, 0.0])
        camera = {"fileformat": "jpg", "height": self.camera.height, "width": self.camera.width}
        for channel, file, form, matrix in (
            ("LIDAR_TOP", 0, {"fileformat": "pcd", "height": 0, "width": 0}, np.array([])),
            ("CAM_FRONT", 2, camera, self.camera.matrix),
        ):
            sensor = _token(*names, "calibration", channel)
            translation, quaternion = _mount(first.city, channel)
            kind = {"sensor_token": _token("sensor", channel), "camera_intrinsic": matrix.tolist()}
            add("calibrated_sensor", sensor, translation=translation, rotation=quaternion, **kind)
            tokens = [_data_token(shot, channel) for shot in shots]
            frames = zip(shots, samples, tokens, _chain(tokens), strict=True)
            for shot, sample, data, chain in frames:
                when = {"timestamp": _timestamp(shot, channel)}
                own = {"ego_pose_token": data, "filename": self.files(shot)[file]}
                belongs = {"sample_token": sample, "calibrated_sensor_token": sensor}
                row = when | own | belongs | {"is_key_frame": True} | chain | form
                add("sample_data", data, **row)
                at, turned = rig.ego_pose(scene, shot, -EARLY[channel] / 1e6)
                at = (corner + unit_rotation(street) @ at).tolist()
                turned = compose(street, turned).tolist()
                add("ego_pose", data, **when, translation=at, rotation=turned)


def _mount(city: str, channel: str) -> tuple[list[float], list[float]]:
    """Translation (3) in metres and quaternion (4) from a sensor's to the car's frame."""
    (x, y, z), quaternion = TABLE["mounts"][channel]
    return [x, y, z + CITIES[city].mount], quaternion


def _pose(shot: Shot, scene: Scene, channel: str) -> Pose:
    """The pose of a sensor in the scene, when it measures."""
    position, quaternion = _mount(shot.city, channel)
    ego = rig.ego_pose(scene, shot, -EARLY[channel] / 1e6)
    return rig.mounted(ego, np.array(position), unit_rotation(quaternion))


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


def _chain(tokens: list[str]) -> list[dict[str, str]]:
    """The neighbours of each of the tokens."""
    pairs = zip(["", *tokens], [*tokens[1:], ""], strict=False)
    return [{"prev": before, "next": after} for before, after in pairs]
