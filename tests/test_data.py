"""Augmentation, voxels and batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ftdpp.data import GRID, IGNORE, Augment, DataError, Frame, collate, join, rotation_3d, sample
from ftdpp.tests.layouts import SINGAPORE, SKITTI


def a_frame(n: int = 2000, height: int = 112, width: int = 200) -> Frame:
    rng = np.random.default_rng(0)
    xyz = rng.uniform([-30, 0, -2], [30, 60, 6], (n, 3)).astype(np.float32)
    pixel = np.stack([rng.integers(0, height, n), rng.integers(0, width, n)], 1).astype(np.int16)
    label = rng.choice(np.array([0, 1, 5, 255], np.uint8), n)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    distance = np.linalg.norm(xyz, axis=1).astype(np.float32)
    return Frame("f", image, label, True, xyz, pixel, distance)


def test_sample_without_augmentation() -> None:
    frame, rng = a_frame(), np.random.default_rng(3)
    s = sample(frame, None, 0, rng)
    fresh = np.random.default_rng(3)
    assert rng.bit_generator.state == fresh.bit_generator.state  # testing draws nothing
    scaled = frame.xyz * np.float32(20)
    np.testing.assert_array_equal(s.coords.numpy(), np.floor(scaled - scaled.min(0)))
    np.testing.assert_array_equal(s.pixel.numpy(), frame.pixel)
    np.testing.assert_array_equal(s.image.numpy().transpose(1, 2, 0) * 255, frame.image)
    types = [s.image.dtype, s.pixel.dtype, s.coords.dtype, s.label.dtype]
    assert types == [torch.float32, torch.int64, torch.int32, torch.int64]
    assert (s.label.numpy()[frame.label == 255] == IGNORE).all()
    assert set(s.label.tolist()) == {0, 1, 5, IGNORE}


def test_augmentation_is_a_function_of_the_rng() -> None:
    frame = a_frame()
    a, b, c = (
        sample(frame, Augment(crop=(80, 120)), 0, np.random.default_rng(seed)) for seed in (5, 5, 6)
    )
    for name in ("image", "pixel", "coords", "label", "keep"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert not torch.equal(a.image, c.image) and a.coords.shape[0] != c.coords.shape[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_flip_touches_one_element(axis: int) -> None:
    assert SINGAPORE.flip_axis == 0 and SKITTI.flip_axis == 1
    flipped = 0
    for seed in range(40):  # with and without the flip the noise is the same
        plain = rotation_3d(Augment(flip_3d=False, rotate=False), axis, np.random.default_rng(seed))
        matrix = rotation_3d(Augment(rotate=False), axis, np.random.default_rng(seed))
        changed = np.argwhere(matrix != plain).tolist()
        assert changed in ([], [[axis, axis]])
        flipped += bool(changed)
        assert not changed or matrix[axis, axis] == -plain[axis, axis]
    assert 10 < flipped < 30
    turn = rotation_3d(Augment(noise=0, flip_3d=False), 0, np.random.default_rng(0))
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
    assert turn[2].tolist() == [0, 0, 1]


def test_nothing_leaves_the_grid_or_the_image() -> None:
    frame = a_frame()
    huge = replace(frame, token="huge", xyz=frame.xyz * 6)  # 360 m, the grid is 205 m
    for seed in range(30):
        rng = np.random.default_rng(seed)
        for f in (frame, huge):
            s = sample(f, Augment(crop=(80, 120)), 1, rng)
            assert s.coords.min() >= 0 and s.coords.max() < GRID
            assert s.image.shape == (3, 80, 120) and s.image.min() >= 0 and s.image.max() <= 1
            assert (s.pixel >= 0).all() and (s.pixel < torch.tensor([80, 120])).all()
            assert len(s.keep) == len(s.label) == len(s.coords) == len(s.pixel) > 0
            raw = torch.from_numpy(f.label)[s.keep].long()
            assert torch.equal(s.label, torch.where(raw == 255, IGNORE, raw))
    assert len(sample(huge, None, 0, rng).keep) < len(huge.xyz)


def test_flip_and_crop_move_pixels_with_their_points() -> None:
    frame = a_frame()
    seen = set()
    for seed in range(12):
        s = sample(frame, Augment(jitter=0, crop=(60, 90)), 0, np.random.default_rng(seed))
        colour = s.image[:, s.pixel[:, 0], s.pixel[:, 1]].T.numpy()
        row, col = frame.pixel[s.keep].T
        np.testing.assert_allclose(colour, frame.image[row, col] / 255, atol=1e-6)
        assert set(np.unique(s.pixel[:, 0].numpy() - row)) == {-52}  # bottom-aligned: 112 - 60
        seen.add(bool(np.ptp(s.pixel[:, 1].numpy() - col)))
    assert seen == {True, False}


def test_crop_limits() -> None:
    with pytest.raises(DataError, match="112x200 is smaller than the crop 302x480"):
        sample(a_frame(), Augment(crop=(302, 480)), 1, np.random.default_rng(0))
    few = sample(a_frame(50), Augment(crop=(100, 100)), 1, np.random.default_rng(0))
    assert 0 < len(few.keep) <= 50 and few.image.shape == (3, 100, 100)  # the fullest of ten
    sky = a_frame()
    sky.pixel[:, 0] = 3
    with pytest.raises(DataError, match="frame f: no point in the lower 20 rows"):
        sample(sky, Augment(crop=(20, 100)), 1, np.random.default_rng(0))


def test_jitter_on_grey() -> None:
    """On grey, contrast and saturation change nothing; brightness scales by 0.6 to 1.4."""
    grey = replace(a_frame(), image=np.full((8, 8, 3), 100, np.uint8))
    values = [
        float(sample(grey, Augment(), 0, np.random.default_rng(i)).image.mean() * 255)
        for i in range(200)
    ]
    assert 60 <= min(values) < 70 and 130 < max(values) <= 140
    two = replace(grey, image=np.repeat(np.array([[[60], [180]]], np.uint8), 3, 2))
    contrasts = [
        np.ptp(sample(two, Augment(), 0, np.random.default_rng(i)).image.numpy()) * 255
        for i in range(200)
    ]
    # Brightness alone would stay within 120 * 0.6 and 120 * 1.4.
    assert min(contrasts) < 72 < 168 < max(contrasts)
    out = sample(grey, Augment(jitter=0), 0, np.random.default_rng(0)).image
    assert torch.equal(out, torch.full_like(out, 100) / 255)


def test_collate() -> None:
    samples = [sample(a_frame(n), None, 0, np.random.default_rng(0)) for n in (30, 20)]
    batch = collate(samples)
    assert batch.image.shape == (2, 3, 112, 200)
    assert batch.counts == [30, 20] and batch.tokens == ["f", "f"]
    assert batch.coords.dtype == torch.int32 and batch.coords[:, 0].tolist() == [0] * 30 + [1] * 20
    assert torch.equal(batch.coords[30:, 1:], samples[1].coords)
    assert torch.equal(batch.keep[1], samples[1].keep)
    assert batch.pseudo == {}
    batch.pseudo["2d"] = batch.label.clone()
    moved = batch.to("meta")
    for name in ("image", "pixel", "coords", "label"):
        assert getattr(moved, name).is_meta and not getattr(batch, name).is_meta
    assert moved.pseudo["2d"].is_meta and not batch.pseudo["2d"].is_meta
    assert moved.keep is batch.keep and moved.tokens == batch.tokens
    wide = sample(a_frame(10, 112, 208), None, 0, np.random.default_rng(0))
    assert collate([wide]).image.shape[-1] == 208
    with pytest.raises(DataError, match=r"different sizes \[\(112, 200\), \(112, 208\)\].*batch=1"):
        collate([wide, samples[0]])
    with pytest.raises(ValueError, match="at least one"):
        collate([])


def test_join() -> None:
    """Joining batches is collating their samples."""
    samples = [sample(a_frame(n), Augment(), 0, np.random.default_rng(n)) for n in (30, 20, 41)]
    whole, parts = collate(samples), [collate(samples[:2]), collate(samples[2:])]
    for batch in (whole, *parts):
        batch.pseudo = {"2d": batch.label + 1, "3d": batch.label + 2}
    joined = join(parts)
    assert joined.tokens == whole.tokens and joined.counts == whole.counts
    for name in ("image", "pixel", "coords", "label"):
        found, expected = getattr(joined, name), getattr(whole, name)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert all(map(torch.equal, joined.keep, whole.keep))
    assert joined.pseudo.keys() == {"2d", "3d"}
    assert all(torch.equal(joined.pseudo[head], whole.pseudo[head]) for head in ("2d", "3d"))
    assert not parts[1].coords[:, 0].any()  # the parts are what they were
    wide = collate([sample(a_frame(10, 112, 208), None, 0, np.random.default_rng(0))])
    wide.pseudo = {"2d": wide.label, "3d": wide.label}
    with pytest.raises(DataError, match=r"different sizes \[\(112, 200\), \(112, 208\)\]"):
        join([whole, wide])
    with pytest.raises(ValueError, match="at least one"):
        join([])
