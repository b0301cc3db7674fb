"""The recording car: the moments it records, where its sensors are then, and how a set is written.

The car's frame: x ahead, y to the left, z up. A camera's: x to the right, y down, z ahead.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ftdpp.readers.base import Array, euler, unit_rotation
from ftdpp.world.cast import Camera, Picture, Pose, photo
from ftdpp.world.scene import TABLES, WORLDS, Rng, Scene

OPTICAL = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # from a camera's frame to the car's


@dataclass(frozen=True)
class Shot:
    """One frame to write: a moment of a scene, and its place in the data set."""

    world: str
    part: str  # train, val, test
    city: str
    key: tuple[int, ...]  # of the scene's randomness
    number: int  # of the frame in its scene; a frame a second
    travel: float  # metres, see Scene
    place: str  # what the data set sorts frames by: a scene, a sequence, a drive, a town
    index: int  # of the frame in its place

    def scene(self) -> Scene:
        """The street at this moment."""
        return Scene(self.world, self.city, self.key, self.travel, float(self.number))

    def rng(self, sensor: int = 0) -> Rng:
        """The noise of one sensor of this frame; 0 is the camera."""
        return np.random.default_rng([*self.key, 2, self.number, sensor])

    def ego_pose(self, scene: Scene, later: float = 0.0) -> tuple[Array, Array]:
        """Position and quaternion in the scene of the car, `later` seconds after the moment."""
        time = self.number + later
        x = scene.speed * time
        y = float(scene.centre(x)) + scene.city.side * scene.lane / 2
        phase = np.random.default_rng([*self.key, 1]).uniform(0, 6.28, 3)
        swings = zip((0.012, 0.007, 0.006), (0.9, 2.1, 1.7), phase, strict=True)
        yaw, pitch, roll = (size * math.sin(rate * time + start) for size, rate, start in swings)
        return np.array([x, y, 0.0]), euler(scene.heading(x) + yaw, pitch, roll)

    def pose(self, scene: Scene, position: Any, turn: Array, later: float = 0.0) -> Pose:
        """The pose in the scene of a sensor at `position` (3,) on the car, turned by (3, 3)."""
        at, quaternion = self.ego_pose(scene, later)
        rotation = unit_rotation(quaternion)
        return at + rotation @ position, rotation @ turn


class Layout(ABC):
    """How a data set lies on disk, and the camera that recorded it."""

    parts: ClassVar[Mapping[str, Iterable[str]]] = {"train": [""]}  # train, val, test -> places

    def __init__(self, name: str):
        """name: a row of the table `layouts`."""
        self.row = TABLES["layouts"][name]
        self.camera = Camera(*self.row["camera"])
        # Index in LABELS -> the raw id that the data set's reader gives.
        ids = [row[self.row["column"]] for row in TABLES["labels"].values()]
        self.IDS = np.array(ids, np.uint8)

    def places(self, world: str, part: str) -> list[tuple[str, str]]:
        """The (city, place) pairs of a part, in the order of use: all cities in each place."""
        return [(city, name) for name in sorted(self.parts[part]) for city in WORLDS[world].cities]

    def files(self, shot: Shot) -> tuple[str, ...]:
        """The files of a frame, below the root."""
        words = {"stamp": shot.place.replace("_", ""), "count": shot.index + 1}
        return tuple(file.format(**vars(shot), **words) for file in self.row["files"])

    @abstractmethod
    def contents(self, shot: Shot, scene: Scene) -> Iterator[bytes]:
        """Renders a frame: what its files hold. scene: the street at the frame's moment."""

    def tables(self, shots: list[Shot]) -> dict[str, str]:
        """The files that belong to no single frame, and what they hold."""
        return {}

    def camera_pose(self, shot: Shot, scene: Scene) -> Pose:
        return shot.pose(scene, self.row["eye"], OPTICAL)

    def look(self, shot: Shot, scene: Scene) -> Picture:
        """What the camera of a frame sees, undistorted."""
        return photo(scene, self.camera, self.camera_pose(shot, scene), shot.rng())


def saved(save: Callable[..., Any], **options: Any) -> bytes:
    """What a function writes to the file that it is given."""
    file = io.BytesIO()
    save(file, **options)
    return file.getvalue()


def png(image: Array | Image.Image) -> bytes:
    """A PNG of (H, W, 3) u8, (H, W) u8 or (H, W) u16, or of an image with a palette."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return saved(picture.save, format="PNG", compress_level=2)
