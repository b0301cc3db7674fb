"""Dense data sets: every pixel is a row, from the prepared index to a trained image network."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ftdpp import checkpoint, readers, systems
from ftdpp.data import CLASS_SETS, IGNORE, Augment, DataError, Frame, collate, join, sample
from ftdpp.evaluate import evaluate
from ftdpp.index import prepare
from ftdpp.recipe import RecipeError
from ftdpp.tests import dense_layouts
from ftdpp.tests.commands import ftd, words

pytestmark = pytest.mark.usefixtures("on_a_cpu")


def a_frame(height: int = 12, width: int = 20) -> Frame:
    rng = np.random.default_rng(0)
    return Frame(
        token="f",
        image=rng.integers(0, 256, (height, width, 3), np.uint8),
        label=rng.choice(np.array([0, 3, 18, 255], np.uint8), (height, width)),
        has_label=True,
        depth=rng.uniform(1, 80, (height, width)).astype(np.float32),
    )


def test_every_pixel_is_a_row() -> None:
    frame = a_frame()
    s = sample(frame, None, 0, np.random.default_rng(0), depth=True)
    assert s.coords is None and s.depth is not None
    for i, (row, col) in enumerate(s.pixel.tolist()):
        assert (row, col) == divmod(i, 20)
        assert s.keep[i] == i
        raw = int(frame.label[row, col])
        assert s.label[i] == (IGNORE if raw == 255 else raw)
        assert s.image[:, row, col].tolist() == pytest.approx(frame.image[row, col] / 255)
        assert s.depth[0, row, col] == frame.depth[row, col]


def test_crop_and_mirror_move_everything_alike() -> None:
    frame, seen, corners = a_frame(), set(), set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        s = sample(frame, Augment(jitter=0, crop=(5, 8)), 0, rng, depth=True)
        assert s.image.shape == (3, 5, 8) and len(s.label) == 40
        row, col = np.divmod(s.keep.numpy(), 20)
        np.testing.assert_allclose(
            s.image.numpy().transpose(1, 2, 0).reshape(-1, 3),
            frame.image[row, col] / 255,
            atol=1e-6,
        )
        raw = torch.from_numpy(frame.label[row, col]).long()
        assert torch.equal(s.label, torch.where(raw == 255, IGNORE, raw))
        assert np.array_equal(s.depth.reshape(-1), frame.depth[row, col])
        seen.add(bool(col[1] > col[0]))
        corners.add((int(row.min()), int(col.min())))
    assert seen == {True, False} and len(corners) > 10, "mirrored or not, anywhere in the image"
    with pytest.raises(DataError, match="12x20 is smaller than the crop 13x8"):
        sample(frame, Augment(crop=(13, 8)), 0, rng)


def test_batches_of_pixels() -> None:
    rng = np.random.default_rng(0)
    samples = [sample(a_frame(), Augment(crop=(4, 6)), 0, rng, depth=True) for _ in range(3)]
    batch = collate(samples)
    assert batch.coords is None and batch.depth is not None
    assert batch.depth.shape == (3, 1, 4, 6)
    assert torch.equal(batch.batch_index, torch.arange(3).repeat_interleave(24))
    both = join([collate(samples[:2]), collate(samples[2:])])
    assert torch.equal(both.batch_index, batch.batch_index)
    assert torch.equal(both.depth, batch.depth) and torch.equal(both.label, batch.label)
    points = sample(
        Frame("p", a_frame().image, np.zeros(2, np.uint8), True, np.ones((2, 3), np.float32),
              np.zeros((2, 2), np.int16), np.ones(2, np.float32)),
        None, 0, rng, depth=True,
    )  # fmt: skip
    whole = sample(a_frame(), None, 0, rng, depth=True)
    with pytest.raises(DataError, match="mixes frames with points and frames without"):
        collate([points, whole])


def test_depth_of_points_is_that_of_the_nearest() -> None:
    xyz = np.array([[5, 0, 0], [9, 0, 0], [7, 1, 0]], np.float32)
    pixel = np.array([[2, 3], [2, 3], [4, 1]], np.int16)
    frame = Frame("p", a_frame().image, np.zeros(3, np.uint8), True, xyz, pixel, xyz[:, 0].copy())
    s = sample(frame, None, 0, np.random.default_rng(0), depth=True)
    assert s.depth[0, 2, 3] == 5 and s.depth[0, 4, 1] == 7
    assert (s.depth > 0).sum() == 2
    mirrored = {
        bool(sample(frame, Augment(jitter=0), 0, np.random.default_rng(seed), depth=True)
             .depth[0, 2, 16] == 5)
        for seed in range(8)
    }  # fmt: skip
    assert mirrored == {True, False}
    frame.depth = None
    with pytest.raises(DataError, match="no depth"):
        sample(frame, None, 0, np.random.default_rng(0), depth=True)


def test_random_draw_of_points() -> None:
    """Virtual KITTI: a random part of the points, in training only."""
    rng = np.random.default_rng(0)
    xyz = rng.uniform(1, 9, (500, 3)).astype(np.float32)
    pixel = np.stack([rng.integers(0, 12, 500), rng.integers(0, 20, 500)], 1).astype(np.int16)
    frame = Frame("p", a_frame().image, np.zeros(500, np.uint8), True, xyz, pixel)
    first, second = (sample(frame, Augment(draw=100), 1, rng) for _ in range(2))
    assert len(first.keep) == len(set(first.keep.tolist())) == 100
    assert not torch.equal(first.keep, second.keep)
    assert len(sample(frame, None, 1, rng).keep) == 500


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dense")
    return {
        "gta5": dense_layouts.gta5(root / "gta5"),
        "synthia": dense_layouts.synthia(root / "synthia"),
        "cityscapes": dense_layouts.cityscapes(root / "cityscapes"),
    }


def test_index_of_pixels(roots: dict[str, Path], tmp_path: Path) -> None:
    """Labels and depth come from the nearest pixel when the image is resized."""
    domain = readers.domains()["cityscapes"]
    reader = readers.reader_of(domain)
    root = roots["cityscapes"]
    whole = prepare(root, domain, "train", "cityscapes19", None, tmp_path)
    half = prepare(root, domain, "train", "cityscapes19", (12, 20), tmp_path)
    ref = readers.list_frames(root, domain, "train")[0]
    raw = reader.read(ref)
    frame = whole.frame(0)
    assert frame.xyz is None and frame.pixel is None and frame.rows == frame.label.size
    names = reader.categories(ref)
    members = dict(zip(CLASS_SETS["cityscapes19"], reader.classes["cityscapes19"], strict=True))
    for row, col in ((0, 0), (3, 7), (23, 39)):
        name = names[int(raw.labels[row, col])]
        wanted = [c for c, raws in enumerate(members.values()) if name in raws.split(", ")]
        assert frame.label[row, col] == (wanted[0] if wanted else 255)
    assert np.array_equal(frame.depth, raw.depth)
    small = half.frame(0)
    assert small.label.shape == (12, 20) and small.image.shape == (12, 20, 3)
    assert np.array_equal(small.label, frame.label[1::2, 1::2])
    assert np.array_equal(small.depth, frame.depth[1::2, 1::2])
    counts = np.bincount(
        np.concatenate([whole.frame(i).label.reshape(-1) for i in range(len(whole))]), minlength=256
    )
    assert whole.counts().tolist() == counts[:19].tolist()


def test_pixels_are_compared_at_the_size_of_the_labels(
    roots: dict[str, Path], tmp_path: Path
) -> None:
    """A network that sees a smaller image is scored on every pixel of the label on disk."""
    overrides = ["image=12,20", "crop=0,0", "eval_batch=2"]
    r = systems.recipe("gta5-cityscapes", "source-only", "small", overrides=overrides)
    system = systems.build(r, seed=3)
    domain, root = readers.domains()["cityscapes"], tmp_path / "cityscapes"
    shutil.copytree(roots["cityscapes"], root)
    whole = prepare(root, domain, "val", r.classes, None, tmp_path)
    half = prepare(root, domain, "val", r.classes, (12, 20), tmp_path)
    score = evaluate(system, half, "")
    matrix = np.zeros((19, 19), np.int64)
    system.eval()
    for i in range(len(half)):
        batch = collate([sample(half.frame(i), None, 0, np.random.default_rng(0))])
        with torch.no_grad():
            small = system.predict(batch)["2d"].reshape(12, 20, 19).permute(2, 0, 1).numpy()
        for row, col in np.ndindex(24, 40):
            y, x = (np.clip((n + 0.5) / 2 - 0.5, 0, m - 1) for n, m in ((row, 12), (col, 20)))
            top, left = int(y), int(x)
            below, right = min(top + 1, 11), min(left + 1, 19)
            upper = small[:, top, left] * (1 - x % 1) + small[:, top, right] * (x % 1)
            lower = small[:, below, left] * (1 - x % 1) + small[:, below, right] * (x % 1)
            label = whole.frame(i).label[row, col]
            if label != 255:
                matrix[label, (upper * (1 - y % 1) + lower * (y % 1)).argmax()] += 1
    assert score.pixels == (24, 40) and score.points == matrix.sum()
    each = matrix.diagonal() / np.maximum(matrix.sum(0) + matrix.sum(1) - matrix.diagonal(), 1)
    assert score.miou["2d"] == pytest.approx(each.mean(), abs=1e-3), "but for equal probabilities"

    for path in (root / "gtFine" / "val").rglob("*_labelIds.png"):
        Image.fromarray(np.zeros((24, 40), np.uint8)).save(path)
    with pytest.raises(DataError, match="has changed since"):
        evaluate(system, half, "")


def test_the_image_network_reads_its_pixels() -> None:
    """Scores of a row are those of the network at its pixel, also in a crop."""
    r = systems.recipe("gta5-cityscapes", "source-only", "small")
    system = systems.build(r).eval()
    rng = np.random.default_rng(0)
    batch = collate([sample(a_frame(16, 24), None, 0, rng) for _ in range(2)])
    with torch.no_grad():
        found = system.predict(batch)["2d"]
        maps = system.camera(batch.image).softmax(1).permute(0, 2, 3, 1)
    assert torch.allclose(found, maps.reshape(-1, 19), atol=1e-5)


TINY = ["--set", "image=24,40", "--set", "crop=16,16", "--set", "batch=2", "--set", "width_2d=16"]


@pytest.mark.parametrize(("source", "classes"), [("gta5", 19), ("synthia", 16)])
def test_dense_pairs_train(
    source: str, classes: int, roots: dict[str, Path], tmp_path: Path
) -> None:
    """Without a method named: the image network, with its own default; picture and table."""
    args = [
        "train",
        "--src",
        source,
        "--tgt",
        "cityscapes",
        "--steps",
        3,
        "--out",
        tmp_path / "run",
    ]
    where = ["--src-data", roots[source], "--tgt-data", roots["cityscapes"]]
    where += ["--cache", tmp_path / "cache", "--threads", 1, "--preset", "small"]
    result = ftd(*args, *where, *TINY)
    assert result.exit_code == 0, result.output
    meta = checkpoint.read_metadata(tmp_path / "run" / "last.safetensors")
    assert meta["recipe"]["method"] == "source-only"
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").read_text().splitlines()))
    assert list(rows[0]) == ["iteration", "seg_2d"] and len(rows) == 3
    result = ftd(
        "eval", tmp_path / "run", "--cache", tmp_path / "cache", "--overlay", tmp_path / "o"
    )
    assert result.exit_code == 0, result.output
    assert "cityscapes val" in words(result) and "3D" not in words(result)
    assert "pixels of label images of 24 x 40" in words(result), "the size that was compared"
    picture = np.asarray(Image.open(next((tmp_path / "o").glob("*.png"))))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    assert len(CLASS_SETS[meta["recipe"]["classes"]]) == classes


def test_comparison_of_two_roots(roots: dict[str, Path], tmp_path: Path) -> None:
    """Without --methods: those that need no points."""
    where = ("--src-data", roots["gta5"], "--tgt-data", roots["cityscapes"])
    more = ("--cache", tmp_path / "cache", "--out", tmp_path / "runs", "--threads", 1)
    pair = ("compare", "--src", "gta5", "--tgt", "cityscapes")
    result = ftd(*pair, *where, *more, "--steps", 1, *TINY)
    assert result.exit_code == 0, result.output
    assert "built-in world" not in words(result).lower(), "the reason of the preset, too"
    rows = json.loads((tmp_path / "runs" / "compare.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["source-only", "target-only"]
    run = next((tmp_path / "runs").glob("*source-only*"))
    found = ftd("eval", run, "--domain", "gta5", "--data",
                roots["gta5"], "--cache", tmp_path / "cache")  # fmt: skip
    assert found.exit_code == 2 and "name one with --split: train" in words(found)


def test_a_missing_camera_is_counted(roots: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "cityscapes"
    shutil.copytree(roots["cityscapes"], root)
    shutil.rmtree(root / "camera")
    result = ftd("data", "check", root, "--domain", "cityscapes")
    assert result.exit_code == 3, result.output
    assert "_camera.json" in words(result)


def test_methods_that_need_points_say_so() -> None:
    with pytest.raises(RecipeError, match=r"ftdpp needs LiDAR points.*source-only, .*target-only"):
        systems.recipe("gta5-cityscapes", "ftdpp")
    with pytest.raises(RecipeError, match="it has no 3D network"):
        systems.recipe("gta5-cityscapes", "source-only", overrides=["width_3d=8"])
    able = ["source-only", "self-training", "crossmatch", "target-only"]
    assert systems.methods_for("gta5-cityscapes") == able
    oracle = systems.recipe("synthia-cityscapes", "target-only")
    assert (
        systems.system_of("target-only", "synthia-cityscapes").streams(oracle)["labelled"].side
        == "tgt"
    )
