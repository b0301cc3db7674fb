"""SemanticKITTI: KITTI odometry with a label a point; a LiDAR and a camera in Karlsruhe.

On disk: sequences/NN with velodyne, image_2, labels and calib.txt. Sequences 11-21 have no labels.
The splits of `skitti` are those of the released code, where 07 validates and 08 tests; those of
`kitti` the official ones, where 08 validates. The 19 classes are those of the official benchmark
(semantic-kitti.yaml of github.com/PRBonn/semantic-kitti-api).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from ftdpp.readers.base import (
    Array,
    Calib,
    DataError,
    Domain,
    FrameRef,
    RawFrame,
    Reader,
    ids,
    inside_image,
    make_calib,
    raw_labels,
    read_array,
    read_image,
    regular,
    why,
)

SEQUENCES = {  # domain -> split -> sequences
    "skitti": {
        "train": ids("0-6 9-10", 2),
        "val": ids("7", 2),
        "test": ids("8", 2),
        "train_labelled": ids("0-1", 2),
        "train_unlabelled": ids("2-6 9-21", 2),
    },
    "kitti": {"train": ids("0-7 9-10", 2), "val": ids("8", 2), "hidden": ids("11-21", 2)},
}
_RAW_NAMES = {
    0: "unlabeled", 1: "outlier", 10: "car", 11: "bicycle", 13: "bus", 15: "motorcycle",
    16: "on-rails", 18: "truck", 20: "other-vehicle", 30: "person", 31: "bicyclist",
    32: "motorcyclist", 40: "road", 44: "parking", 48: "sidewalk", 49: "other-ground",
    50: "building", 51: "fence", 52: "other-structure", 60: "lane-marking", 70: "vegetation",
    71: "trunk", 72: "terrain", 80: "pole", 81: "traffic-sign", 99: "other-object",
    # the same things, moving
    252: "car", 253: "bicyclist", 254: "person", 255: "motorcyclist", 256: "on-rails", 257: "bus",
    258: "truck", 259: "other-vehicle",
}  # fmt: skip


def _domain(name: str, **frames: int) -> Domain:
    return Domain(name, "semantic_kitti", 1, tuple(SEQUENCES[name]), frames)


class SemanticKitti(Reader):
    name = "semantic_kitti"
    domains = (
        _domain(
            "skitti", train=18029, val=1101, test=4071, train_labelled=5642, train_unlabelled=32738
        ),
        _domain("kitti", train=19130, val=4071, hidden=20351),
    )
    classes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        # Ours, so that nuScenes and SemanticKITTI share a class set; no released code has it.
        "street6": (
            "car, bicycle, motorcycle, bus, truck, other-vehicle, on-rails",
            "road, lane-marking, parking",
            "sidewalk",
            "terrain",
            "building, fence, other-structure, pole, traffic-sign, other-object",
            "vegetation, trunk",
        ),
        "vkitti6": (
            "vegetation, trunk, terrain",
            "building",
            "road, lane-marking",
            "fence, pole, traffic-sign, other-object",
            "truck",
            "car",
        ),
        "a2d2_10": (
            "car",
            "truck",
            "bicycle, motorcycle, bicyclist, motorcyclist",
            "person",
            "road, lane-marking",
            "parking",
            "sidewalk",
            "building",
            "vegetation, trunk, terrain",
            "fence, pole, traffic-sign, other-object",
        ),
        "skitti19": (
            "car",
            "bicycle",
            "motorcycle",
            "truck",
            "other-vehicle, bus, on-rails",
            "person",
            "bicyclist",
            "motorcyclist",
            "road, lane-marking",
            "parking",
            "sidewalk",
            "other-ground",
            "building",
            "fence",
            "vegetation",
            "trunk",
            "terrain",
            "pole",
            "traffic-sign",
        ),
    }
    label_files = "the labels folders"
    crop = (302, 480)
    aspect = 1242 / 375

    def list_frames(
        self, root: Path, domain: Domain, split: str | None, version: str | None
    ) -> list[FrameRef]:
        places = (root / "sequences", root / "dataset" / "sequences")
        base = next((place for place in places if place.is_dir()), None)
        if base is None:
            raise DataError(
                f"{root}: no folder sequences or dataset/sequences in it; "
                "give the SemanticKITTI root"
            )
        refs = []
        for sequence in sorted(path for path in base.iterdir() if path.is_dir()):
            if split is not None and sequence.name not in SEQUENCES[domain.name][split]:
                continue
            scans = sorted((sequence / "velodyne").glob("*.bin"))
            if not scans:
                continue
            calib = _read_calib(sequence / "calib.txt")
            for scan in scans:
                label = sequence / "labels" / f"{scan.stem}.label"
                refs.append(
                    FrameRef(
                        token=f"{sequence.name}/{scan.stem}",
                        scene=sequence.name,
                        reader=self.name,
                        image_path=sequence / "image_2" / f"{scan.stem}.png",
                        points_path=scan,
                        label_path=label if label.exists() else None,
                        calib=calib,
                    )
                )
        return refs

    def read(self, ref: FrameRef) -> RawFrame:
        assert ref.points_path is not None
        points = read_array(ref.points_path, np.float32, 4)
        labels = None
        if ref.label_path is not None:
            # The upper half of a label is the instance.
            labels = read_array(ref.label_path, np.uint32, 1)[:, 0] & 0xFFFF
        return RawFrame(read_image(ref.image_path), points, labels)

    def project(self, raw: RawFrame, ref: FrameRef) -> tuple[Array, Array, Array]:
        """Kept are points with x > 0. In single precision, with which kept points and pixels equal
        the released code's bit for bit."""
        assert raw.points is not None and ref.calib is not None
        xyz, camera = raw.points[:, :3], np.array(ref.calib.camera, np.float32)
        front = np.flatnonzero(xyz[:, 0] > 0)
        homogeneous = np.concatenate([xyz[front], np.ones((len(front), 1), np.float32)], 1)
        size = raw.image.height, raw.image.width
        rows, row_col = inside_image(camera @ homogeneous.T, front, size)
        return rows, row_col, xyz[rows] @ camera[2, :3] + camera[2, 3]

    def categories(self, ref: FrameRef) -> Mapping[int, str]:
        return _RAW_NAMES

    def prediction_path(self, ref: FrameRef, split: str) -> Path:
        sequence, _, frame = ref.token.partition("/")
        return Path("sequences", sequence, "predictions", f"{frame}.label")

    def write_prediction(self, path: Path, label: Array, ids: Array) -> None:
        """u32 raw ids, as the benchmark's server takes them."""
        raw_labels(label, ids).astype("<u4").tofile(path)

    def tables(self, root: Path, version: str | None, refs: Sequence[FrameRef]) -> list[Path]:
        return sorted({ref.image_path.parents[1] / "calib.txt" for ref in refs})


def _read_calib(path: Path) -> Calib:
    try:
        rows = dict(
            line.split(":", 1) for line in regular(path).read_text().splitlines() if ":" in line
        )
        p2, tr = (np.array(rows[key].split(), np.float64).reshape(3, 4) for key in ("P2", "Tr"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: missing; expected the calibration of the sequence, download KITTI odometry"
        ) from None
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{path}: expected rows P2 and Tr of 12 numbers, found {why(error)}; download it again"
        ) from None
    # Single precision on purpose: the released code rounds the product, and with it the last bits
    # of every pixel.
    with np.errstate(over="ignore", invalid="ignore"):  # make_calib refuses what is not finite
        product = (p2 @ np.vstack([tr, [0, 0, 0, 1]])).astype(np.float32)
    return make_calib(path, [], product)
