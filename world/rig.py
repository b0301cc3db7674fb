"""The recording car: the moments it records, where its sensors are then, and files for frames.

A layout is a module, or an object, that writes one data set; see `Layout`.
The car's frame: x ahead, y to the left, z up. A camera's: x to the right, y down, z ahead.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from ftdpp import files
from ftdpp.readers.base import Array, unit_rotation
from ftdpp.world.cast import Camera, Picture, photo
from ftdpp.world.scene import LABELS, WORLDS, Scene, build_scene

FRAMES_PER_SCENE = 4
_OPTICAL = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # from a camera's frame to the car's
Pose = tuple[Array, Array]  # position (3,), rotation (3, 3) from the sensor's frame


@dataclass(frozen=True)
class Shot:
    """One frame to write: a moment of a scene, and its place in the data set."""

    world: str
    city: str
    key: tuple[int, ...]  # of the scene's randomness
    number: int  # of the frame in its scene; a frame a second
    travel: float  # metres, see build_scene
    place: str  # what the data set sorts frames by: a scene, a sequence, a drive, a town
    index: int  # of the frame in its place

    def scene(self) -> Scene:
        """The street at this moment."""
        return build_scene(self.world, self.city, self.key, self.travel, float(self.number))

    def rng(self, sensor: int = 0) -> np.random.Generator:
        """The noise of one sensor of this frame; 0 is the camera."""
        return np.random.default_rng([*self.key, 2, self.number, sensor])


class Layout(Protocol):
    """How a data set lies on disk."""

    @property
    def IDS(self) -> Array:
        """Index in LABELS -> the raw id that the data set's reader gives."""

    def places(self, world: str, part: str) -> list[tuple[str, str]]:
        """The (city, place) pairs that a part (train, val, test) uses, in the order of use."""

    def files(self, shot: Shot) -> tuple[str, ...]:
        """The files of a frame, below the root."""

    def look(self, shot: Shot, scene: Scene) -> Picture:
        """What the camera of a frame sees, undistorted."""

    def write(self, root: Path, shot: Shot) -> None:
        """Renders a frame and writes each of its files whole."""

    def tables(self, root: Path, shots: list[Shot]) -> None:
        """Writes the files that belong to no single frame."""


def in_turn(world: str, names: list[str]) -> list[tuple[str, str]]:
    """Places that hold streets of each of the world's cities."""
    return [(city, name) for name in names for city in WORLDS[world].cities]


def shots(
    world: str, places: list[tuple[str, str]], count: int, key: tuple[int, ...], length: int
) -> list[Shot]:
    """`count` frames, `length` in a row in one street, spread over the places."""
    used: Counter[str] = Counter()
    out = []
    for n in range(count):
        street, number = divmod(n, length)
        city, place = places[street % len(places)]
        travel = 10.0 * (length - 1)
        out.append(Shot(world, city, (*key, street), number, travel, place, used[place]))
        used[place] += 1
    return out


# ---- where the car and its sensors are -----------------------------------------------------------


def compose(a: Array, b: Array) -> Array:
    """The product of two quaternions: rotate by b, then by a."""
    vector = a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])
    return np.concatenate([[a[0] * b[0] - a[1:] @ b[1:]], vector])


def euler(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> Array:
    """The quaternion (w, x, y, z) of a roll about x, then a pitch about y, then a yaw about z."""
    about_z, about_y, about_x = (
        np.array([math.cos(angle / 2), *(math.sin(angle / 2) * np.eye(3)[axis])])
        for angle, axis in ((yaw, 2), (pitch, 1), (roll, 0))
    )
    return compose(compose(about_z, about_y), about_x)


def ego_pose(scene: Scene, shot: Shot, later: float = 0.0) -> tuple[Array, Array]:
    """Where the car is `later` seconds after the moment: position and quaternion in the scene."""
    time = shot.number + later
    phase = np.random.default_rng([*shot.key, 1]).uniform(0, 6.28, 3)
    x = scene.speed * time
    y = float(scene.centre(x)) + scene.city.side * scene.lane / 2
    yaw, pitch, roll = (
        size * math.sin(frequency * time + start)
        for size, frequency, start in zip(
            (0.012, 0.007, 0.006), (0.9, 2.1, 1.7), phase, strict=True
        )
    )
    return np.array([x, y, 0.0]), euler(scene.heading(x) + yaw, pitch, roll)


def mounted(ego: tuple[Array, Array], position: Array, turn: Array) -> Pose:
    """The pose in the scene of a sensor at `position`, turned by (3, 3) `turn`, on the car."""
    rotation = unit_rotation(ego[1])
    return ego[0] + rotation @ position, rotation @ turn


def ahead(shot: Shot, scene: Scene, camera: Camera, position: Array) -> Picture:
    """What a camera at `position` (3,) on the car sees, looking ahead."""
    pose = mounted(ego_pose(scene, shot), position, _OPTICAL)
    return photo(scene, scene.primitives, camera, *pose, shot.rng())


def intrinsic(camera: Camera) -> list[list[float]]:
    """The (3, 3) matrix from a camera's frame to homogeneous pixels."""
    return [
        [camera.focal, 0.0, camera.centre_u],
        [0.0, camera.focal, camera.centre_v],
        [0.0, 0.0, 1.0],
    ]


# ---- files ---------------------------------------------------------------------------------------


def label_table(ids: Mapping[str, int], dtype: type[np.generic] = np.uint8) -> Array:
    """Lookup array: index in LABELS -> the data set's id. `ids`: "name name" -> id; others 0."""
    of = {name: value for names, value in ids.items() for name in names.split()}
    assert of.keys() <= set(LABELS), f"unknown labels {of.keys() - set(LABELS)}"
    return np.array([of.get(name, 0) for name in LABELS], dtype)


def save(path: Path, image: Array | Image.Image) -> None:
    """An image as PNG: (H, W, 3) u8, (H, W) u8 or (H, W) u16, or one with a palette."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with files.replacing(path) as temporary:
        picture.save(temporary, "PNG", compress_level=2)


def dump(path: Path, numbers: Array) -> None:
    """An array as its bare bytes."""
    with files.replacing(path) as temporary:
        numbers.tofile(temporary)


def text(path: Path, content: str) -> None:
    with files.replacing(path) as temporary:
        temporary.write_text(content)
