"""What stands where in the street world: cities, their light, and the street of one scene.

A scene is a street and a list of convex primitives. The street is a height field whose bands
(pavement, lawn) follow the distance to the kerb. A `City` says how a place is built and painted, a
`Light` how it is lit and photographed, a `World` which of them make a domain.

Lengths are in metres, angles in radians, colours linear RGB in 0..1. The x axis runs along the
street, z points up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from ftdpp.readers.base import Array

# A label is an index into this list.
LABELS = (
    "noise", "road", "lane_marking", "parking", "sidewalk", "terrain", "building", "wall", "fence",
    "pole", "traffic_light", "traffic_sign", "vegetation", "trunk", "sky", "person", "rider", "car",
    "van", "truck", "bus", "train", "motorcycle", "bicycle", "barrier", "traffic_cone",
    "other_object",
)  # fmt: skip
(
    NOISE, ROAD, LANE_MARKING, PARKING, SIDEWALK, TERRAIN, BUILDING, WALL, FENCE, POLE,
    TRAFFIC_LIGHT, TRAFFIC_SIGN, VEGETATION, TRUNK, SKY, PERSON, RIDER, CAR, VAN, TRUCK, BUS, TRAIN,
    MOTORCYCLE, BICYCLE, BARRIER, CONE, OTHER,
) = range(len(LABELS))  # fmt: skip

VEHICLE_LABELS = (CAR, VAN, TRUCK, BUS, TRAIN)

Vector = tuple[float, float, float]
RGB = tuple[float, float, float]
Pose = tuple[float, float, float, float]  # x, y, z, yaw

BOX, CYLINDER, ELLIPSOID = range(3)  # a box may have slanted sides; a cylinder stands upright
PLAIN, FACADE, GLASS, BANDS, LEAF, LAMP, SLATS, BRICK = range(8)
WHITE, BLACK, GREY, STEEL = (0.70,) * 3, (0.03, 0.03, 0.035), (0.35, 0.36, 0.38), (0.3, 0.31, 0.32)
RED, BLUE, TYRE = (0.40, 0.03, 0.03), (0.05, 0.12, 0.36), (0.02, 0.02, 0.02)

# half: half extents; cos, sin: of the yaw; taper: how far the x and y sides lean inwards, per metre
# of height; reflect: for the LiDAR, 0..1; pattern: varies the texture, see cast._object_albedo.
PRIMITIVE = np.dtype(
    [
        ("center", "f4", 3), ("half", "f4", 3), ("cos", "f4"), ("sin", "f4"), ("taper", "f4", 2),
        ("color", "f4", 3), ("reflect", "f4"), ("pattern", "f4"),
        ("kind", "u1"), ("label", "u1"), ("texture", "u1"),
    ],
    align=True,
)  # fmt: skip


@dataclass(frozen=True)
class City:
    """How a place is built and painted. Where several values are given, a scene draws one."""

    locations: tuple[str, ...]
    vehicle: str  # name of the recording car
    road: RGB
    sidewalk: RGB
    terrain: RGB
    leaves: tuple[RGB, ...]
    walls: tuple[RGB, ...]
    # Variants of the bands from the kerb outwards: label, least and greatest width, height, slope.
    bands: tuple[str, ...]
    # What of STRIPS stands along each side of the street: the mean gap in metres; below 1 the
    # share of sides that have a row without gaps; a side has one row at most.
    strips: str
    floors: tuple[int, int]
    paint: tuple[RGB, ...] = (WHITE, BLACK, GREY, RED, BLUE)  # of vehicles
    mix: str = "car 62, van 12, truck 7, bus 4, tram 1, motorcycle 4, bicycle 10"  # percent
    house: tuple[float, float] = (5.5, 11.0)  # half width of a building
    glass: tuple[float, float] = (0.35, 0.55)  # share of a facade that is window
    gable: float = 0.3  # share of low buildings; hipped roofs are half as many
    palm: float = 0.0  # share of trees
    crown: Vector = (2.3, 2.2, 2.4)  # radius, half height, height of the trunk below
    parking: float = 0.33  # share of streets with cars along the kerb
    two_lanes: float = 0.25  # share of streets
    roadworks: float = 0.6
    centre_line: RGB = (0.62, 0.62, 0.60)
    double_line: bool = False
    kerb: tuple[RGB, RGB] = ((0.45, 0.44, 0.42), (0.42, 0.41, 0.40))  # alternating along the road
    detail: float = 1.0  # contrast of textures
    side: int = -1  # +1: traffic keeps left (the ego car drives at positive y), -1: right
    mount: float = 0.0  # added to the height of the sensors


@dataclass(frozen=True)
class Light:
    """Light, air and camera of a world."""

    elevation: tuple[float, float]  # of the sun, degrees
    sun: RGB
    ambient: RGB
    zenith: RGB
    horizon: RGB
    haze: float  # distance at which 1/e of the light arrives
    clouds: float  # share of the sky
    exposure: float
    grain: float = 0.0  # of the image, standard deviation in grey levels
    vignette: float = 0.0  # share of the light that the corners lack, about
    contrast: float = 0.06
    saturation: float = 1.0
    tint: RGB = (1.0, 1.0, 1.0)
    lamps: bool = False


@dataclass(frozen=True)
class World:
    """A domain: its scenes alternate between `cities`."""

    cities: tuple[str, ...]
    light: Light
    description: str  # of every scene; the nuScenes reader looks for "night" in it
    lidar_drop: float  # share of LiDAR returns that are lost
    dull: Light | None = None  # of every other scene, drawn at random


# Tables: related numbers share a line.
# fmt: off
BOSTON = City(
    locations=("boston-seaport",), vehicle="n008", mount=-0.07,
    road=(0.30, 0.293, 0.285), sidewalk=(0.48, 0.44, 0.40), terrain=(0.34, 0.34, 0.15),
    leaves=((0.20, 0.27, 0.08), (0.27, 0.27, 0.07), (0.34, 0.22, 0.06)),
    walls=((0.36, 0.15, 0.10), (0.42, 0.22, 0.15), (0.50, 0.40, 0.28), (0.45, 0.42, 0.38)),
    bands=("sidewalk 3 4.2 0.16 0, terrain 4 8 0.18 0.01",
           "terrain 2 3.4 0.15 0, sidewalk 2.6 3.6 0.16 0, terrain 4 8 0.18 0.02",
           "sidewalk 4 6 0.16 0, terrain 2.5 4 0.16 0"),
    strips="house 21, tower 24, lamp 27, ban 60, notice 60, box 60, person 10, bush 10, "
           "tree 14, garden 14, hedge 0.15, wall 0.3, fence 0.2",
    mix="car 52, pickup 19, van 11, truck 8, bus 4, motorcycle 2, bicycle 4",
    floors=(2, 6), centre_line=(0.70, 0.50, 0.08), double_line=True,
)
SINGAPORE = replace(
    BOSTON, locations=("singapore-onenorth", "singapore-queenstown", "singapore-hollandvillage"),
    vehicle="n015", side=1, mount=0.06, double_line=False,
    road=(0.12, 0.123, 0.128), sidewalk=(0.31, 0.28, 0.265), terrain=(0.10, 0.22, 0.055),
    leaves=((0.05, 0.14, 0.035), (0.07, 0.18, 0.04), (0.11, 0.20, 0.05)),
    walls=((0.72, 0.72, 0.70), (0.62, 0.68, 0.70), (0.70, 0.62, 0.48), (0.45, 0.47, 0.50)),
    paint=(WHITE, (0.04, 0.12, 0.45), (0.55, 0.40, 0.03), (0.10, 0.11, 0.12), (0.45, 0.04, 0.05)),
    kerb=((0.60, 0.60, 0.58), (0.10, 0.10, 0.10)), centre_line=(0.62, 0.62, 0.60),
    bands=("terrain 1.6 2.6 0.21 0.03, sidewalk 2.2 3 0.18 0, terrain 5 9 0.26 0.07",
           "sidewalk 2.2 3.4 0.13 0, terrain 5 9 0.18 0.09",
           "sidewalk 2.4 3.6 0.14 0, terrain 2 3 0.28 0.05, sidewalk 2.4 3.4 0.16 0"),
    strips=BOSTON.strips + ", tree 9, garden 10, hedge 0.45, wall 0.12, fence 0.12",
    mix="car 46, van 14, truck 10, bus 10, motorcycle 16, bicycle 4",
    floors=(4, 16), glass=(0.5, 0.95), gable=0.06, palm=0.25, crown=(3.6, 1.7, 3.6),
)
# Central Europe: gabled houses of two to four storeys behind hedges and fences, cars at the kerb.
KARLSRUHE = City(
    locations=("karlsruhe",), vehicle="kitti",
    road=(0.20, 0.198, 0.196), sidewalk=(0.37, 0.35, 0.34), terrain=(0.16, 0.18, 0.07),
    leaves=((0.08, 0.13, 0.03), (0.11, 0.16, 0.04), (0.14, 0.17, 0.05)),
    walls=((0.74, 0.72, 0.68), (0.70, 0.64, 0.50), (0.56, 0.54, 0.50), (0.66, 0.56, 0.40),
           (0.48, 0.30, 0.24)),
    paint=(BLACK, (0.42, 0.43, 0.45), (0.12, 0.13, 0.15), WHITE, (0.04, 0.07, 0.18), RED),
    bands=("sidewalk 1.6 2.4 0.12 0, terrain 2.5 5 0.14 0.02",
           "terrain 1.4 2.2 0.13 0, sidewalk 1.6 2.4 0.13 0, terrain 2 6 0.15 0.03",
           "sidewalk 2.6 4 0.12 0, terrain 1 2 0.12 0"),
    strips="house 18, behind 24, lamp 40, ban 45, notice 60, box 50, person 20, bike 35, "
           "bush 6, tree 12, garden 9, hedge 0.35, wall 0.25, fence 0.3",
    floors=(2, 4), house=(5.0, 8.5), glass=(0.3, 0.45), gable=0.65, crown=(2.2, 2.3, 2.2),
    parking=0.7, two_lanes=0.1, roadworks=0.15,
)
# The same streets as a game builder saw them: less clutter, more green, smooth surfaces.
VIRTUAL = replace(
    KARLSRUHE, locations=("virtual",), vehicle="virtual", detail=0.35, parking=0.45, roadworks=0.0,
    road=(0.33, 0.325, 0.325), terrain=(0.19, 0.36, 0.07),
    leaves=((0.10, 0.30, 0.04), (0.16, 0.36, 0.06), (0.22, 0.38, 0.08)),
    walls=((0.78, 0.72, 0.60), (0.70, 0.50, 0.36), (0.62, 0.62, 0.66), (0.80, 0.78, 0.74)),
    paint=(WHITE, (0.55, 0.05, 0.05), (0.06, 0.16, 0.55), BLACK, (0.5, 0.52, 0.55)),
    bands=("terrain 2 4 0.08 0, sidewalk 1.6 2.2 0.1 0, terrain 4 9 0.1 0.01",
           "sidewalk 1.8 2.6 0.14 0, terrain 5 10 0.15 0.01",
           "terrain 8 12 0.05 0.01"),
    strips="house 26, forest 8, lamp 60, ban 90, notice 90, tree 10, garden 8, bush 7, "
           "rail 0.25, fence 0.15",
    mix="car 74, van 16, truck 8, bus 2", crown=(2.7, 2.8, 2.6),
)
INGOLSTADT = replace(
    KARLSRUHE, locations=("ingolstadt",), vehicle="a2d2", two_lanes=0.4, parking=0.4, gable=0.5,
    road=(0.235, 0.237, 0.242), floors=(2, 5), strips=KARLSRUHE.strips + ", rail 0.1, tree 18",
    walls=((0.66, 0.66, 0.66), (0.72, 0.68, 0.58), (0.50, 0.52, 0.55), (0.62, 0.50, 0.40)),
)
COUNTRY = replace(
    INGOLSTADT, locations=("country",), parking=0.0, two_lanes=0.1, roadworks=0.3,
    bands=("terrain 9 14 0.02 0.03",
           "terrain 6 9 0.02 0.05",
           "terrain 2 3 0.05 0, sidewalk 1.8 2.4 0.06 0, terrain 6 9 0.07 0.04"),
    strips="behind 80, forest 6, garden 9, bush 6, post 22, ban 80, notice 80, rail 0.35, "
           "fence 0.2, person 60",
)
# Terraces of four to six storeys, wide pavements, people, cyclists and a tram.
STUTTGART = replace(
    KARLSRUHE, locations=("stuttgart",), vehicle="cityscapes", floors=(4, 6), house=(7.0, 10.0),
    road=(0.195, 0.20, 0.205), two_lanes=0.35, parking=0.6, gable=0.4, roadworks=0.3,
    walls=((0.52, 0.49, 0.43), (0.60, 0.57, 0.52), (0.44, 0.40, 0.36), (0.56, 0.44, 0.34)),
    bands=("sidewalk 3.5 5.5 0.13 0",
           "terrain 1.5 2.5 0.14 0, sidewalk 3 4.5 0.13 0",
           "sidewalk 2.5 3.5 0.13 0, terrain 2 4 0.15 0.02"),
    strips="house 18, tower 25, lamp 28, ban 32, notice 40, box 30, person 6, bike 25, "
           "post 0.25, tree 14, garden 20, wall 0.2, fence 0.25, hedge 0.15",
)
# Two games. One is rich: wide roads, palms, tall and low side by side; one is flat and clean.
LOS_SANTOS = replace(
    BOSTON, locations=("los_santos",), vehicle="gta5", floors=(1, 9), glass=(0.4, 0.85),
    road=(0.25, 0.243, 0.235), sidewalk=(0.53, 0.49, 0.44), terrain=(0.29, 0.29, 0.13),
    leaves=((0.10, 0.17, 0.05), (0.15, 0.20, 0.06), (0.20, 0.20, 0.07)), palm=0.5,
    walls=((0.66, 0.54, 0.40), (0.72, 0.66, 0.56), (0.50, 0.34, 0.24), (0.40, 0.42, 0.46)),
    paint=(BLACK, (0.5, 0.5, 0.52), (0.45, 0.04, 0.03), (0.60, 0.42, 0.04), (0.06, 0.16, 0.30)),
    strips=BOSTON.strips + ", wall 0.4, fence 0.4, box 25, post 30, tree 18",
    crown=(2.6, 2.0, 3.0), parking=0.25, two_lanes=0.7,
)
SYNTHETIC = replace(
    STUTTGART, locations=("synthia",), vehicle="synthia", detail=0.15, floors=(3, 12),
    road=(0.23, 0.22, 0.215), sidewalk=(0.49, 0.43, 0.40), terrain=(0.16, 0.27, 0.08), gable=0.06,
    leaves=((0.09, 0.20, 0.04), (0.14, 0.24, 0.05)), glass=(0.5, 0.7), crown=(2.4, 2.0, 2.6),
    walls=((0.62, 0.44, 0.34), (0.68, 0.62, 0.54), (0.46, 0.44, 0.44), (0.72, 0.68, 0.64)),
    paint=(WHITE, (0.5, 0.06, 0.05), (0.08, 0.22, 0.5), (0.5, 0.42, 0.1), BLACK),
    parking=0.3, two_lanes=0.7,
)
CITIES = {
    "boston": BOSTON, "singapore": SINGAPORE, "karlsruhe": KARLSRUHE, "virtual": VIRTUAL,
    "ingolstadt": INGOLSTADT, "country": COUNTRY, "stuttgart": STUTTGART,
    "los_santos": LOS_SANTOS, "synthetic": SYNTHETIC,
}

TEMPERATE = Light(
    elevation=(28, 48), sun=(1.30, 1.12, 0.86), ambient=(0.22, 0.27, 0.36),
    zenith=(0.10, 0.24, 0.58), horizon=(0.50, 0.62, 0.74), haze=520, clouds=0.40, exposure=1.5,
    grain=1.6, vignette=0.28,
)
MIXED = replace(TEMPERATE, elevation=(32, 62), haze=400, clouds=0.55, zenith=(0.20, 0.35, 0.62))
TROPICAL = replace(
    TEMPERATE, elevation=(50, 72), sun=(0.92, 0.90, 0.84), ambient=(0.34, 0.36, 0.38), haze=300,
    zenith=(0.36, 0.47, 0.62), horizon=(0.68, 0.71, 0.73), clouds=0.70, exposure=1.45, grain=2.0,
)
NIGHT = replace(
    TEMPERATE, elevation=(60, 80), sun=(0.0, 0.0, 0.0), ambient=(0.070, 0.067, 0.078), haze=320,
    zenith=(0.008, 0.009, 0.016), horizon=(0.040, 0.030, 0.024), exposure=4.2, grain=4.0,
    clouds=0.50, lamps=True,
)
# KITTI's camera: hard contrast, deep shadows, a burnt-out sky; or a dull day.
SUNNY = replace(
    TEMPERATE, elevation=(30, 55), sun=(1.70, 1.58, 1.35), ambient=(0.30, 0.34, 0.42),
    zenith=(0.14, 0.32, 0.75), horizon=(0.85, 0.95, 1.05), haze=520, clouds=0.3, exposure=1.35,
    grain=3.0, vignette=0.35, contrast=0.08, saturation=0.92, tint=(0.97, 1.0, 0.98),
)
OVERCAST = replace(
    SUNNY, elevation=(66, 82), sun=(0.55, 0.55, 0.54), ambient=(0.50, 0.52, 0.55), haze=380,
    zenith=(0.75, 0.79, 0.83), horizon=(1.0, 1.02, 1.05), clouds=0.8, exposure=1.55, contrast=0.08,
)
COOL = replace(
    OVERCAST, sun=(0.80, 0.82, 0.85), elevation=(40, 70), zenith=(0.34, 0.46, 0.66), grain=2.2,
    horizon=(0.72, 0.79, 0.88), exposure=1.3, saturation=0.8, tint=(0.95, 0.99, 1.04),
)
BLUISH = replace(
    OVERCAST, sun=(0.62, 0.61, 0.57), elevation=(45, 75), ambient=(0.38, 0.40, 0.42), haze=330,
    zenith=(0.66, 0.72, 0.76), horizon=(0.80, 0.85, 0.88), exposure=1.25, contrast=0.06,
    grain=2.4, saturation=0.85, tint=(0.92, 1.0, 0.99), vignette=0.45,
)
NOON = Light(
    elevation=(42, 60), sun=(1.15, 1.10, 1.0), ambient=(0.42, 0.45, 0.50),
    zenith=(0.12, 0.34, 0.85), horizon=(0.55, 0.74, 0.95), haze=4000, clouds=0.35, exposure=1.35,
    contrast=0.05, saturation=1.3,
)
GOLDEN = replace(
    NOON, elevation=(20, 42), sun=(1.75, 1.30, 0.80), ambient=(0.24, 0.27, 0.36), haze=1100,
    zenith=(0.12, 0.26, 0.55), horizon=(0.85, 0.74, 0.60), clouds=0.5, contrast=0.09,
    saturation=1.2,
)
FLAT = replace(
    NOON, elevation=(45, 65), sun=(1.0, 0.94, 0.84), ambient=(0.30, 0.31, 0.34),
    zenith=(0.30, 0.46, 0.68), horizon=(0.62, 0.68, 0.74), contrast=0.03, saturation=0.95,
)
WORLDS = {
    "usa": World(("boston",), TEMPERATE, "Parked cars, pedestrians on sidewalk, turn", 0.03),
    "singapore": World(("singapore",), TROPICAL, "Wait, motorcycles, bus, dense vegetation", 0.06),
    "day": World(("boston", "singapore"), MIXED, "Intersection, parked cars, peds", 0.04),
    "night": World(("singapore",), NIGHT, "Night, street lamps, parked cars, peds", 0.09),
    "vkitti": World(("virtual",), NOON, "clone", 0.0),
    "skitti": World(("karlsruhe",), SUNNY, "", 0.05, OVERCAST),
    "a2d2": World(("ingolstadt", "country"), COOL, "", 0.05),
    "gta5": World(("los_santos",), GOLDEN, "", 0.0),
    "synthia": World(("synthetic",), FLAT, "", 0.0),
    "cityscapes": World(("stuttgart",), BLUISH, "", 0.05),
}

# Vehicles: label, half length, half width, radius of the wheels, height of the lamps, and the
# parts of the body: centre x, centre z, half extents, colour (None: the paint), texture, taper.
VEHICLES: dict[str, tuple[int, float, float, float, float, tuple[Any, ...]]] = {
    "car": (CAR, 2.2, 0.9, 0.33, 0.68, (
        (0, 0.54, (2.2, 0.9, 0.27), None, PLAIN, (0.10, 0.05)),
        (0, 0.32, (2.23, 0.86, 0.10), TYRE, PLAIN, (0, 0)),
        (0.0, 0.87, (2.1, 0.86, 0.08), None, PLAIN, (1.2, 0.4)),
        (-0.25, 1.19, (1.5, 0.80, 0.28), None, GLASS, (0.95, 0.30)),
    )),
    "pickup": (TRUCK, 2.75, 1.0, 0.38, 0.80, (
        (0, 0.75, (2.75, 1.0, 0.36), None, PLAIN, (0.05, 0.06)),
        (0, 0.40, (2.78, 0.92, 0.12), TYRE, PLAIN, (0, 0)),
        (0.25, 1.48, (1.15, 0.92, 0.38), None, GLASS, (0.45, 0.2)),
    )),
    "van": (VAN, 2.4, 0.98, 0.34, 0.80, (
        (0, 0.72, (2.4, 0.98, 0.42), None, PLAIN, (0.10, 0.05)),
        (0, 0.34, (2.43, 0.92, 0.10), TYRE, PLAIN, (0, 0)),
        (-0.2, 1.55, (2.1, 0.93, 0.42), None, GLASS, (0.5, 0.15)),
    )),
    "truck": (TRUCK, 4.2, 1.2, 0.5, 0.95, (
        (3.35, 1.45, (0.85, 1.1, 1.0), None, GLASS, (0.12, 0.03)),
        (-0.95, 2.05, (3.25, 1.2, 1.3), WHITE, PLAIN, (0, 0)),
        (0, 0.62, (4.15, 0.95, 0.16), TYRE, PLAIN, (0, 0)),
    )),
    "bus": (BUS, 5.6, 1.25, 0.48, 0.95, ((0, 1.8, (5.6, 1.25, 1.45), None, BANDS, (0.02, 0.02)),)),
    "tram": (TRAIN, 8, 1.25, 0.35, 0.85, ((0, 1.9, (8, 1.25, 1.6), RED, BANDS, (0.04, 0.02)),)),
}
# Things that do not vary: how they are stretched upwards, and their parts: label, kind, centre,
# half extents, colour (None: a wall's or that of TONES), texture. x is along the road, away from
# those who come; y towards the road.
TONES = ((0.30, 0.20, 0.12), (0.62, 0.62, 0.60), (0.10, 0.17, 0.11), STEEL)
THINGS: dict[str, tuple[tuple[float, float], tuple[Any, ...]]] = {
    "lamp": ((1, 1), (
        (POLE, CYLINDER, (0, 0, 3.6), (0.09, 0.09, 3.6), STEEL, PLAIN),
        (POLE, BOX, (0, 1.1, 7.2), (0.06, 1.2, 0.05), STEEL, PLAIN),
        (POLE, BOX, (0, 2.2, 7.12), (0.13, 0.35, 0.06), (0.9, 0.8, 0.6), LAMP),
    )),
    "ban": ((0.9, 1.1), (
        (POLE, CYLINDER, (0, 0, 1.3), (0.045, 0.045, 1.3), GREY, PLAIN),
        (TRAFFIC_SIGN, ELLIPSOID, (-0.02, 0, 2.4), (0.035, 0.34, 0.34), RED, PLAIN),
        (TRAFFIC_SIGN, ELLIPSOID, (-0.05, 0, 2.4), (0.03, 0.25, 0.25), WHITE, PLAIN),
    )),
    "notice": ((0.9, 1.1), (
        (POLE, CYLINDER, (0, 0, 1.3), (0.045, 0.045, 1.3), GREY, PLAIN),
        (TRAFFIC_SIGN, BOX, (-0.06, 0, 2.4), (0.03, 0.33, 0.33), BLUE, PLAIN),
        (TRAFFIC_SIGN, BOX, (-0.08, 0, 2.4), (0.03, 0.16, 0.19), WHITE, PLAIN),
    )),
    "signal": ((1, 1), (
        (POLE, CYLINDER, (0, 0, 2.6), (0.07, 0.07, 2.6), BLACK, PLAIN),
        (POLE, BOX, (0, 1.6, 5.15), (0.05, 1.65, 0.05), BLACK, PLAIN),
        (TRAFFIC_LIGHT, BOX, (0, 0, 4.4), (0.16, 0.18, 0.5), (0.05, 0.05, 0.04), PLAIN),
        (TRAFFIC_LIGHT, ELLIPSOID, (-0.15, 0, 4.1), (0.04, 0.12, 0.12), (0.05, 0.8, 0.3), LAMP),
        (TRAFFIC_LIGHT, BOX, (0, 3.2, 5.4), (0.16, 0.18, 0.5), (0.05, 0.05, 0.04), PLAIN),
        (TRAFFIC_LIGHT, ELLIPSOID, (-0.15, 3.2, 5.1), (0.04, 0.12, 0.12), (0.05, 0.8, 0.3), LAMP),
    )),
    "post": ((0.9, 1.1), (
        (POLE, CYLINDER, (0, 0, 0.5), (0.07, 0.07, 0.5), WHITE, PLAIN),
        (POLE, CYLINDER, (0, 0, 0.8), (0.075, 0.075, 0.1), BLACK, PLAIN),
    )),
    "box": ((0.7, 1.3), ((OTHER, BOX, (0, 0, 0.5), (0.35, 0.25, 0.5), None, PLAIN),)),
    "wall": ((0.5, 1.2), (
        (WALL, BOX, (0, 0, 0.8), (4.05, 0.14, 0.8), None, BRICK),
        (WALL, BOX, (0, 0, 1.64), (4.05, 0.19, 0.05), (0.4, 0.39, 0.37), PLAIN),
    )),
    "fence": ((0.7, 1.2), (
        (FENCE, BOX, (0, 0, 0.7), (4.05, 0.04, 0.62), None, SLATS),
        *((FENCE, BOX, (x, 0, 0.7), (0.06, 0.07, 0.7), STEEL, PLAIN) for x in (-3, -1, 1, 3)),
    )),
    "rail": ((1, 1), (
        (FENCE, BOX, (0, 0, 0.62), (4.05, 0.05, 0.16), (0.45, 0.46, 0.48), PLAIN),
        *((FENCE, BOX, (x, -0.1, 0.35), (0.05, 0.06, 0.35), STEEL, PLAIN) for x in (-3, -1, 1, 3)),
    )),
}
# fmt: on

PROFILE_CELLS, CELLS_PER_METRE = 2500, 50  # of the street's cross-section
ROW_PIECE = 8.0  # metres between the pieces of a wall or a hedge


@dataclass
class Scene:
    """One street with everything on it.

    profile_height, profile_label: (2, PROFILE_CELLS), the cross-section of each side beyond the
    kerb. Cell 0 is the road; side 1 lies at positive y.
    """

    city: City
    light: Light
    bend: tuple[float, float]  # the centre line is bend[0] * sin(x / bend[1])
    cross: float  # x of the crossing street's centre; far away where there is none
    cross_half: float  # half its width
    half: float  # half the width of the road
    lane: float
    lanes: int  # in each direction
    speed: float  # of the traffic and of the ego car, m/s
    reach: tuple[float, float]  # first and last x that is built
    profile_height: Array
    profile_label: Array
    walk: list[tuple[float, float]]  # per side: where the pavement begins and ends beyond the kerb
    setback: list[float]  # per side: where the buildings may begin
    colors: Array  # (labels, 3) of the ground
    sun: Array  # (3,) unit vector towards it
    rows: list[tuple[Any, ...]] = field(default_factory=list)  # of PRIMITIVE
    lamps: list[Vector] = field(default_factory=list)  # positions of street lamps

    @cached_property
    def primitives(self) -> Array:
        """All that was added, (P,) of PRIMITIVE."""
        return np.array(self.rows, PRIMITIVE)

    def centre(self, x: Array | float) -> Any:
        """The y of the centre line."""
        return self.bend[0] * np.sin(np.asarray(x) / self.bend[1])

    def heading(self, x: float) -> float:
        """The yaw of the centre line."""
        return math.atan(self.bend[0] / self.bend[1] * math.cos(x / self.bend[1]))

    def ground(self, x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
        """Height, label, distance from the centre line, distance beyond the kerb; like x and y."""
        across = y - self.centre(x)
        to_kerb = np.abs(across) - self.half
        beyond = np.minimum(to_kerb, np.abs(x - self.cross) - self.cross_half)
        cell = np.clip(beyond * CELLS_PER_METRE + 1, 0, PROFILE_CELLS - 1).astype(np.int32)
        cell += PROFILE_CELLS * (across > 0)
        return self.profile_height.ravel()[cell], self.profile_label.ravel()[cell], across, beyond

    def across(self, place: str, side: int, rng: np.random.Generator) -> float:
        """Distance from the kerb of a place that STRIPS names."""
        (begin, end), setback = self.walk[side], self.setback[side]
        return {
            "kerb": 0.45,
            "verge": (0.9 if begin < 0.5 else begin * 0.5) + rng.uniform(-0.1, 0.3),
            "walk": rng.uniform(begin + 0.3, max(end, begin + 1.0) - 0.3),
            "fence": end + 0.5,
            "garden": rng.uniform(end + 1.1, max(end + 1.6, setback)),
            "front": max(setback, end + 0.8) + rng.uniform(0.3, 2.0),
            "back": setback + rng.uniform(22.0, 30.0),
        }[place]

    def pose(self, x: float, across: float, turn: float = 0.0) -> Pose:
        """The base of something that stands at `x`, `across` from the centre line."""
        y = float(self.centre(x)) + across
        z = float(self.ground(np.array([x]), np.array([y]))[0][0])
        return x, y, z, self.heading(x) + turn

    def site(self, x: float, across: float, turn: float = 0.0) -> Pose:
        """As `pose`; its y axis points to the road."""
        return self.pose(x, across, turn + (math.pi if across > 0 else 0.0))

    def is_clear(self, x: float, margin: float) -> bool:
        """Whether `x` keeps a margin from the crossing street."""
        return abs(x - self.cross) > self.cross_half + margin

    def place(self, base: Pose, offset: Vector) -> Vector:
        """The point of the scene at `offset` in the frame of `base`."""
        (x, y, z, yaw), (dx, dy, dz) = base, offset
        cos, sin = math.cos(yaw), math.sin(yaw)
        return x + cos * dx - sin * dy, y + sin * dx + cos * dy, z + dz

    def add(
        self, base: Pose, kind: int, label: int, offset: Vector, half: Vector, color: RGB,
        texture: int = PLAIN, taper: tuple[float, float] = (0.0, 0.0), reflect: float = 0.3,
        pattern: float = 0.0,
    ) -> None:  # fmt: skip
        """Adds a primitive whose centre is at `offset` in the frame of `base`."""
        center, cos, sin = self.place(base, offset), math.cos(base[3]), math.sin(base[3])
        row = (center, half, cos, sin, taper, color, reflect, pattern, kind, label, texture)
        self.rows.append(row)


def _numbers(text: str) -> dict[str, float]:
    """Names and numbers of a table's row."""
    return {name: float(value) for name, value in (part.split() for part in text.split(","))}


def _scaled(color: RGB, factor: float) -> RGB:
    return color[0] * factor, color[1] * factor, color[2] * factor


def _pick(rng: np.random.Generator, colors: tuple[RGB, ...], spread: float = 0.12) -> RGB:
    """One of the colours, brighter or darker by up to `spread`."""
    return _scaled(colors[rng.integers(len(colors))], rng.uniform(1 - spread, 1 + spread))


def _along(
    rng: np.random.Generator, reach: tuple[float, float], gap: float, spread: float = 0.3
) -> Iterator[float]:
    """Positions along the street, `gap` apart on average."""
    x = reach[0] + gap * rng.random()
    while x < reach[1]:
        yield x
        x += gap * rng.uniform(1 - spread, 1 + spread)


# ---- what stands in the street -------------------------------------------------------------------


def _thing(scene: Scene, base: Pose, rng: np.random.Generator, what: str) -> None:
    """One of THINGS."""
    stretch, parts = THINGS[what]
    tall, tone = rng.uniform(*stretch), _pick(rng, scene.city.walls if what == "wall" else TONES)
    for label, kind, (x, y, z), (hx, hy, hz), color, texture in parts:
        at, size = (-scene.city.side * x, y, z * tall), (hx, hy, hz * tall)
        reflect = 0.9 if label == TRAFFIC_SIGN else 0.45
        scene.add(base, kind, label, at, size, color or tone, texture, reflect=reflect)
    if what == "lamp":
        scene.lamps.append(scene.place(base, (0, 2.2, 6.9)))


def _vehicle(scene: Scene, base: Pose, rng: np.random.Generator, parked: bool = False) -> None:
    """Something of the city's traffic, with its rider; or something short that is parked."""
    mix = _numbers(scene.city.mix)
    if parked:
        mix = {name: share for name, share in mix.items() if name not in ("truck", "bus", "tram")}
    kind = str(rng.choice(list(mix), p=np.array(list(mix.values())) / sum(mix.values())))
    paint, scale = _pick(rng, scene.city.paint), rng.uniform(0.95, 1.05)
    if kind in ("motorcycle", "bicycle"):
        _bike(scene, base, rng, kind == "motorcycle")
        if not parked:
            _person(scene, base, rng, riding=0.28 if kind == "bicycle" else 0.12)
        return
    label, length, width, radius, lamp_height, parts = VEHICLES[kind]
    part = partial(scene.add, base, label=label)
    for x, z, (hx, hy, hz), color, texture, taper in parts:
        look = (color or paint, texture, taper)
        scene.add(base, BOX, label, (x * scale, 0, z), (hx * scale, hy, hz), *look)
    length *= scale
    for y in (-width, width):
        for x in (-0.62 * length, 0.62 * length):
            for out, size, color in ((0.93, radius, TYRE), (1.04, radius * 0.55, GREY)):
                hub, half = (x, y * out, radius), (size, 0.12 * size / radius, size)
                part(kind=ELLIPSOID, offset=hub, half=half, color=color, reflect=0.1)
        for end, color in ((-0.99 * length, (0.55, 0.02, 0.02)), (0.99 * length, (0.9, 0.9, 0.8))):
            at, half = (end, y * 0.74, lamp_height), (0.06, 0.15, 0.08)
            part(kind=BOX, offset=at, half=half, color=color, texture=LAMP, reflect=0.9)
    plate = (-1.01 * length, 0, 0.5)
    part(kind=BOX, offset=plate, half=(0.03, 0.26, 0.06), color=WHITE, reflect=0.9)


def _bike(scene: Scene, base: Pose, rng: np.random.Generator, motor: bool = False) -> None:
    """A motorcycle or a bicycle."""
    part = partial(scene.add, base, ELLIPSOID, MOTORCYCLE if motor else BICYCLE)
    thick = 0.09 if motor else 0.04
    for x in (-0.56, 0.56):
        part((x, 0, 0.33), (0.33, thick, 0.33), TYRE, reflect=0.1)
        part((x, 0, 0.33), (0.2, thick + 0.01, 0.2), GREY, reflect=0.2)
    part((0, 0, 0.62), (0.62, 1.7 * thick, 1.2 * thick + 0.08), _pick(rng, scene.city.paint))
    part((-0.28, 0, 0.86), (0.26, 0.12, 0.06), BLACK)
    part((0.5, 0, 0.95), (0.06, 0.34, 0.09), BLACK)


def _person(scene: Scene, base: Pose, rng: np.random.Generator, riding: float = 0.0) -> None:
    """Somebody who walks; or who rides, leaning forward by `riding` metres."""
    scale = 0.7 if rng.random() < 0.12 and not riding else rng.uniform(0.93, 1.06)
    shirt, trousers, hair = (
        _pick(rng, colors, 0.5)
        for colors in ((RED, BLUE, WHITE, BLACK, TONES[0], TONES[2]), (BLACK, BLUE, GREY), (BLACK,))
    )
    skin = _pick(rng, ((0.45, 0.28, 0.20), (0.30, 0.17, 0.11)))
    part = partial(scene.add, base, label=RIDER if riding else PERSON)
    stride, hip = rng.uniform(0.02, 0.09), 0.95 if riding else 0.84 * scale
    for side in (-1, 1):
        step = side * stride
        leg, arm = (step, side * 0.09, hip / 2), (riding * 1.4 - step, side * 0.23, hip + 0.28)
        part(kind=CYLINDER, offset=leg, half=(0.1, 0.085, hip / 2), color=trousers)
        sleeve = (0.3, 0.065, 0.09) if riding else (0.09, 0.065, 0.3 * scale)
        part(kind=ELLIPSOID, offset=arm, half=sleeve, color=shirt)
    torso, head = (riding * 0.5, 0, hip + 0.28 * scale), (riding, 0, hip + 0.72 * scale)
    chest = (0.15 + riding * 0.4, 0.2, 0.38 * scale)
    part(kind=ELLIPSOID, offset=torso, half=chest, color=shirt)
    part(kind=ELLIPSOID, offset=head, half=(0.11, 0.095, 0.14), color=skin)
    crown = (head[0] - 0.03, 0, head[2] + 0.05)
    part(kind=ELLIPSOID, offset=crown, half=(0.115, 0.105, 0.12), color=hair)


def _leaves(
    scene: Scene,
    base: Pose,
    at: Vector,
    half: Vector,
    rng: np.random.Generator,
    kind: int = ELLIPSOID,
) -> None:
    color, offset = _pick(rng, scene.city.leaves, 0.25), rng.random() * 60
    scene.add(base, kind, VEGETATION, at, half, color, LEAF, reflect=0.5, pattern=offset)


def _tree(scene: Scene, base: Pose, rng: np.random.Generator) -> None:
    radius, half_height, trunk = (size * rng.uniform(0.8, 1.25) for size in scene.city.crown)
    palm = rng.random() < scene.city.palm
    middle = rng.uniform(2.4, 3.6) if palm else (trunk + half_height) / 2
    stem = (0.14, 0.14, middle) if palm else (0.07 * radius, 0.07 * radius, middle)
    scene.add(base, CYLINDER, TRUNK, (0, 0, middle), stem, (0.15, 0.12, 0.09), reflect=0.25)
    for k in range(7):
        turned = (*base[:3], base[3] + k * 0.898 + trunk)
        if palm:
            _leaves(scene, turned, (1.0, 0, 2 * middle + 0.1), (1.2, 0.22, 0.32), rng)
            continue
        out, width, rise = rng.uniform(0.4, 0.62), rng.uniform(0.42, 0.62), rng.uniform(0.45, 1.5)
        if k == 0:
            out, width, rise = 0.0, 0.65, 1.2
        size = (radius * width, radius * width, half_height * width)
        _leaves(scene, turned, (radius * out, 0.0, trunk + half_height * rise), size, rng)


def _bush(scene: Scene, base: Pose, rng: np.random.Generator, hedge: bool = False) -> None:
    """A bush, or a piece of a hedge."""
    tall = rng.uniform(0.35, 0.8)
    half = (4.0, 0.4, tall) if hedge else (tall * 1.2, tall, tall)
    _leaves(scene, base, (0, 0, tall * 0.9), half, rng, BOX if hedge else ELLIPSOID)


def _house(scene: Scene, base: Pose, rng: np.random.Generator, grow: float = 1.0) -> None:
    """A building that faces the street; grow: factor of its height."""
    city = scene.city
    width, depth = rng.uniform(*city.house), rng.uniform(5.0, 9.0)
    tall = float(rng.integers(*city.floors, endpoint=True) * 1.55 * grow)  # half the height
    style = float(rng.integers(1, 90)) + rng.uniform(*city.glass)
    wall, roof, extra = _pick(rng, city.walls), rng.random(), rng.random()
    dark, pale = _scaled(wall, 0.55), _scaled(wall, 0.8)
    box = partial(scene.add, base, BOX, BUILDING)
    body = (width, depth, tall + 0.5)
    box((0, -depth, tall - 0.5), body, wall, FACADE, reflect=0.35, pattern=style)
    box((0, -depth, 0.3), (width + 0.06, depth + 0.06, 0.5), dark)
    if roof < 1.5 * city.gable and tall < 11:
        rise = min(depth, width) * 0.4
        slope = 0.02 if roof < city.gable else (width + 0.5) / (2.6 * rise)
        lean = slope, (depth + 0.5) / (2 * rise)
        tiles = _pick(rng, ((0.32, 0.12, 0.07), (0.20, 0.10, 0.07), (0.13, 0.12, 0.12)))
        box((0, -depth, 2 * tall + rise), (width + 0.4, depth + 0.5, rise), tiles, taper=lean)
        box((width / 2, -depth - 0.8, 2 * tall + 1.6 * rise), (0.35, 0.35, 0.7 * rise), tiles)
    else:  # a cornice
        box((0, -depth, 2 * tall + 0.1), (width + 0.25, depth + 0.25, 0.22), dark)
    if extra < 0.3:  # an awning
        box((0, 0.7, 3), (width * 0.7, 0.8, 0.12), _pick(rng, city.paint))
    elif extra < 0.6:  # balconies
        for floor in range(1, int(tall * 2 / 3.1)):
            box((width * 0.4, 0.5, 3.1 * floor + 0.9), (1.3, 0.55, 0.5), pale, SLATS)


# What City.strips names: who builds it (None: it is one of THINGS), at one of the places of
# Scene.across, and the margin that it keeps to a crossing.
STRIPS: dict[str, tuple[Callable[..., None] | None, str, float]] = {
    "house": (_house, "front", 13.0),
    "tower": (partial(_house, grow=1.5), "back", 13.0),
    "behind": (_house, "back", 13.0),
    "forest": (_tree, "back", 4.0),
    "tree": (_tree, "verge", 4.0),
    "garden": (_tree, "garden", 4.0),
    "bush": (_bush, "garden", 3.0),
    "hedge": (partial(_bush, hedge=True), "fence", 7.0),
    "person": (_person, "walk", -3.0),
    "bike": (_bike, "fence", 1.0),
    "lamp": (None, "kerb", 1.0),
    "ban": (None, "kerb", 1.0),
    "notice": (None, "kerb", 1.0),
    "post": (None, "kerb", 0.5),
    "rail": (None, "kerb", 7.0),
    "box": (None, "fence", 1.0),
    "wall": (None, "fence", 7.0),
    "fence": (None, "fence", 7.0),
}


def _crossing(scene: Scene, rng: np.random.Generator) -> None:
    """Traffic lights, a car waiting on each side and people who cross."""
    for sign in (-1, 1):
        x = scene.cross - scene.city.side * sign * (scene.cross_half + 0.8)
        _thing(scene, scene.site(x, sign * (scene.half + 0.8)), rng, "signal")
        y = float(scene.centre(scene.cross)) + sign * (scene.half + rng.uniform(6, 9))
        _vehicle(scene, (scene.cross + sign * scene.lane / 2, y, 0.0, math.pi / 2), rng)
        for _ in range(2):
            x = scene.cross - scene.cross_half - rng.uniform(1.4, 3.2)
            across = rng.uniform(-scene.half, scene.half)
            _person(scene, scene.site(x, across, math.pi / 2), rng)


def _roadworks(scene: Scene, rng: np.random.Generator) -> None:
    """A row of cones or of barriers along the kerb."""
    sign = scene.city.side * (2 * scene.lanes - 3)
    start, cones = rng.uniform(8, 40), rng.random() < 0.5
    for k in range(7):
        base = scene.site(start + k * 2.4, sign * (scene.half - 0.35))
        if cones:
            size, orange = (0.19, 0.19, 0.37), (0.75, 0.16, 0.02)
            scene.add(base, BOX, CONE, (0, 0, 0.37), size, orange, taper=(0.23, 0.23), reflect=0.7)
        else:
            size, color = (1.1, 0.2, 0.45), ((0.7, 0.7, 0.68), (0.65, 0.15, 0.04))[k % 2]
            scene.add(base, BOX, BARRIER, (0, 0, 0.45), size, color, taper=(0, 0.12))


def _traffic(scene: Scene, parking: bool, time: float, rng: np.random.Generator) -> None:
    """Parked cars, then moving ones lane by lane."""
    keep_side = scene.city.side
    for sign in (-1, 1) if parking else ():
        for x in _along(rng, scene.reach, 10):
            if scene.is_clear(x, 9) and rng.random() < 0.8:
                turn = 0.0 if sign == keep_side else math.pi
                _vehicle(scene, scene.pose(x, sign * (scene.half - 1.15), turn), rng, parked=True)
    for direction in (1, -1):
        for lane in range(scene.lanes):
            # The first car of the ego lane keeps its distance; behind the ego car that lane is
            # empty.
            ego_lane = direction == 1 and lane == 0
            x = rng.uniform(15, 42) if ego_lane else rng.uniform(-50, -30)
            while x < scene.reach[1]:
                middle = direction * keep_side * scene.lane * (lane + 0.5)
                at = x + direction * scene.speed * time
                turn = 0.0 if direction == 1 else math.pi
                _vehicle(scene, scene.pose(at, middle + rng.uniform(-0.2, 0.2), turn), rng)
                x += rng.uniform(18, 48)


def build_scene(world: str, city: str, key: tuple[int, ...], travel: float, time: float) -> Scene:
    """The street of one scene at one moment.

    world, city: names in WORLDS and CITIES. key: the scene's random key. travel: metres that the
    ego car covers in the whole scene; the street is built as far as it will see. time: seconds
    since the scene's start; moves the traffic.
    """
    style, light, dull = CITIES[city], WORLDS[world].light, WORLDS[world].dull
    rng = np.random.default_rng(key)
    light = dull if dull and rng.random() < 0.5 else light
    lanes = 1 + int(rng.random() < style.two_lanes)
    parking = rng.random() < style.parking
    lane = rng.uniform(3, 3.4)
    crossing = rng.random() < 0.45
    azimuth = rng.uniform(-math.pi, math.pi)
    elevation = math.radians(rng.uniform(*light.elevation))
    flat = math.cos(elevation)
    sun = (math.cos(azimuth) * flat, math.sin(azimuth) * flat, math.sin(elevation))

    height = np.zeros((2, PROFILE_CELLS), np.float32)
    label = np.full((2, PROFILE_CELLS), ROAD, np.uint8)
    setback, walk = [0.0, 0.0], [(0.0, 0.0), (0.0, 0.0)]
    for side in (0, 1):
        edge = 0.0
        for part in style.bands[rng.integers(len(style.bands))].split(","):
            name, *numbers = part.split()
            narrow, wide, level, slope = map(float, numbers)
            start, edge, band = edge, edge + rng.uniform(narrow, wide), LABELS.index(name)
            cell = 1 + round(start * CELLS_PER_METRE)
            rise = np.minimum(np.arange(PROFILE_CELLS - cell) / CELLS_PER_METRE, 6.0) * slope
            height[side, cell:] = level + rise
            label[side, cell:] = band
            if band == SIDEWALK:
                walk[side] = (start, edge)
        setback[side] = edge

    colors = np.zeros((TERRAIN + 1, 3), np.float32)
    for ground in (ROAD, SIDEWALK, TERRAIN):
        colors[ground] = _pick(rng, (getattr(style, LABELS[ground]),), 0.15)
    scene = Scene(
        city=style,
        light=light,
        bend=(rng.uniform(-5, 5), rng.uniform(45, 90)),
        cross=rng.uniform(18, 55) if crossing else 1e6,
        cross_half=lane + 1.5,
        half=lanes * lane + (2.3 if parking else 0.0),
        lane=lane,
        lanes=lanes,
        speed=rng.uniform(6, 10),
        reach=(-75.0, travel + 115.0),
        profile_height=height,
        profile_label=label,
        walk=walk,
        setback=setback,
        colors=colors,
        sun=np.array(sun),
    )
    for side in (0, 1):
        chance, seed = rng.random(), int(rng.integers(1 << 31))
        for what, gap in _numbers(style.strips).items():
            builder, place, margin = STRIPS[what]
            build = builder or partial(_thing, what=what)
            row = gap < 1
            if row:  # a side of the street has one row, or none
                chance -= gap
                if not -gap <= chance < 0:
                    continue
            for x in _along(rng, scene.reach, ROW_PIECE if row else gap, 0 if row else 0.3):
                across = (2 * side - 1) * (scene.half + scene.across(place, side, rng))
                if rng.random() < 0.85 and scene.is_clear(x, margin):
                    turn = rng.uniform(-3, 3) if what == "person" else 0.0
                    # The pieces of a row are alike.
                    draw = np.random.default_rng(seed) if row else rng
                    build(scene, scene.site(x, across, turn), draw)
    if crossing:
        _crossing(scene, rng)
    if rng.random() < style.roadworks:
        _roadworks(scene, rng)
    _traffic(scene, parking, time, rng)
    return scene
