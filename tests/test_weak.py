"""The weakly supervised transfer: which labels are read, the transfer and the losses as slow loops,
who learns from what, and the command."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftdpp import checkpoint, index, kernels, readers, recipe, runs, systems, train
from ftdpp.data import CLASS_SETS, IGNORE, UNLABELLED, Batch, Frame, collate, sample
from ftdpp.index import FewLabels, Index, few_labels, label_order
from ftdpp.models import UNet2D
from ftdpp.readers import DataError
from ftdpp.systems import clip, weak
from ftdpp.tests.commands import TINY, exported, ftd, same_bytes, stopped_in, words
from ftdpp.tests.test_clip import write_clip

HEIGHT, WIDTH, COUNTS, K = 37, 52, (40, 23), 6
CPU = pytest.mark.usefixtures("on_a_cpu")

REAL_LOAD = clip.load

# ---- a small image-text model --------------------------------------------------------------------


class SmallClip:
    """With the interface of `clip.FrozenCLIP`: what it sees is the colours of patches."""

    width, dim, patch, digest, scale = 8, 12, 8, "small", 1 / 0.07

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(3)
        self.colours = torch.randn(3, self.dim, generator=rng)
        self.words = F.normalize(torch.randn(30, self.dim, generator=rng), dim=1)

    def look(self, image: Tensor) -> clip.Seen:
        patches = F.avg_pool2d(image, self.patch, ceil_mode=True) - 0.5
        dense = F.normalize(torch.einsum("bchw,cd->bdhw", patches, self.colours), dim=1)
        overall = F.normalize(dense.mean((2, 3)), dim=1)
        return clip.Seen(dense, overall, [], (image.shape[2], image.shape[3]), self.patch)

    def texts(self, classes: str, device: torch.device | str = "cpu") -> Tensor:
        return self.words[: len(CLASS_SETS[classes])]


@pytest.fixture(autouse=True)
def small_clip(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of the street CLIP; the names that were asked for."""
    asked: list[str] = []

    def load(name: str) -> SmallClip:
        asked.append(name)
        return SmallClip()

    monkeypatch.setattr(clip, "load", load)
    monkeypatch.setattr(clip, "make_ready", lambda name, progress: None)
    return asked


# ---- recipes and batches -------------------------------------------------------------------------


def a_recipe(*overrides: str) -> Any:
    made = systems.recipe("singapore-singapore", "weak", "small", overrides=overrides)
    return dataclasses.replace(made, class_weights=(1.0, 2.0, 0.5, 1.0, 3.0, 1.5), dropout=0.0)


OFF = ("transfer=none", "text=0", "contrast=0")


def a_batch(seed: int = 0, labelled: int = 12) -> Batch:
    """Two frames with different numbers of points; `labelled` labels each."""
    rng = np.random.default_rng(seed)
    samples = []
    for i, count in enumerate(COUNTS):
        places = rng.choice(HEIGHT * WIDTH, count, replace=False)
        label = np.full(count, UNLABELLED, np.uint8)
        label[:labelled] = rng.integers(0, K, min(labelled, count))
        colours = rng.integers(0, 256, (HEIGHT // 8 + 1, WIDTH // 8 + 1, 3), np.uint8)
        picture = colours.repeat(8, 0).repeat(8, 1)[:HEIGHT, :WIDTH]
        frame = Frame(
            token=str(i),
            image=picture,
            label=label,
            has_label=True,
            xyz=rng.uniform(1, 5, (count, 3)).astype(np.float32),
            pixel=np.stack(np.divmod(places, WIDTH), 1).astype(np.int16),
        )
        samples.append(sample(frame, None, 1, rng))
    return collate(samples)


def moved(system: Any) -> Any:
    """With places that have moved and a teacher that differs: nothing is equal by accident."""
    torch.manual_seed(1)
    with torch.no_grad():
        if system.transfer is not None and system.transfer.offset is not None:
            system.transfer.offset.normal_()
        if system.teacher is not None:
            for p in system.teacher.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return system


def test_settings_that_cannot_work() -> None:
    for text, message in (
        ("labelled=0", "labelled must be a share"),
        ("labelled=-1", "labelled must be a share"),
        ("labelled=2.5", "a whole number of points above 1"),
        ("mask_seed=-1", "mask_seed must not be negative"),
        ("transfer=foo", "transfer must be one of deformable, one, none"),
        ("places=0", "at least 1"),
        ("radius=-1", "radius must not be negative"),
        ("distill=-1", "loss weights must not be negative"),
        ("text_threshold=2", "must lie in 0..1"),
        ("temperature=0", "temperature must be above 0"),
        ("classes=skitti19", "has labels for: street6, nuscenes16"),
    ):
        with pytest.raises(recipe.RecipeError, match=message):
            a_recipe(text)
    for texts, message in (
        (("transfer=none", "places=3"), "there is no image branch"),
        (("transfer=none", "lr_2d=1"), "there is no image branch"),
        (("transfer=one", "radius=3"), "a point looks at its pixel"),
        (("labelled=1", "balanced=true"), "all labels are read"),
        (("text=0", "ema=0.5"), "there are no pseudo-labels"),
        (("contrast=0", "temperature=1"), "contrast is 0"),
        (("text=0", "contrast=0", "clip=street"), "text and contrast are 0"),
    ):
        with pytest.raises(recipe.RecipeError, match=f"would change nothing: .*{message}"):
            a_recipe(*texts)
    for text in ("labelled=8", "labelled=1", "labelled=0.0001", "classes=nuscenes16"):
        dataclasses.replace(a_recipe(text), class_weights=()).check()


def test_one_data_set_on_both_sides() -> None:
    """The two data sets of the paper with their official splits; any other by default settings."""
    r = systems.recipe("nuscenes-nuscenes", "weak")
    assert (r.classes, r.image, r.labelled) == ("nuscenes16", (225, 400), 0.001)
    r = systems.recipe("kitti-kitti", "weak")
    assert (r.classes, r.crop, r.batch) == ("skitti19", (302, 480), 4)
    assert readers.domains()["kitti"].splits[:2] == ("train", "val")
    r = systems.recipe("skitti-skitti", "weak", overrides=["classes=skitti19"])
    assert (r.crop, r.steps, r.lr_2d) == ((302, 480), 60_000, 1e-3)
    r = systems.recipe("singapore-singapore", "weak", "small")
    assert (r.classes, r.image, r.ema) == ("street6", (112, 200), 0.99)
    stream = weak.System.streams(r)["labelled"]
    assert stream.few and stream.labels and stream.side == "src"
    assert not weak.System.streams(a_recipe("labelled=1"))["labelled"].few


# ---- few labels ----------------------------------------------------------------------------------


def a_split(world: Path, cache: Path, split: str = "train") -> Index:
    return runs.Origin("singapore", world).index(split, a_recipe(), cache)


def rows_of(few: Index, i: int) -> set[int]:
    return set(np.flatnonzero(few.frame(i).label != UNLABELLED).tolist())


def test_few_labels_hide_all_others(world: Path, cache: Path) -> None:
    whole = a_split(world, cache)
    few = few_labels(whole, 0.01, 0, False)
    assert isinstance(few, FewLabels) and few.tokens == whole.tokens
    counts = np.zeros(K, np.int64)
    for i in range(len(whole)):
        a, b = whole.frame(i), few.frame(i)
        kept = b.label != UNLABELLED
        assert kept.sum() == max(round(0.01 * (a.label != UNLABELLED).sum()), 1)
        np.testing.assert_array_equal(b.label[kept], a.label[kept])
        counts += np.bincount(b.label[kept], minlength=K)
        assert index._frame_sha(b) == few._records[i]["sha"]
        for name in ("xyz", "pixel", "image", "depth"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert few.counts().tolist() == counts.tolist() and counts.sum() > 20
    stored = np.fromfile(few.path / "label.bin", np.uint8)
    assert (stored != UNLABELLED).sum() == counts.sum(), "no other label is in its files"
    f = few.fingerprint
    assert f["ignored"] + counts.sum() == f["points"] == whole.fingerprint["points"]
    assert f["content"] != whole.fingerprint["content"]
    assert few_labels(whole, 1, 0, False) is whole
    with pytest.raises(DataError, match="has changed"):
        next(index.original_frames(few, [0]))  # reads the data set anew, with all its labels


def test_how_many_labels(world: Path, cache: Path) -> None:
    """At least one, whatever the share; more of them hold the fewer; as many as were asked for."""
    whole = a_split(world, cache)
    shares = [1e-6, 0.001, 0.01, 0.3]
    made = [few_labels(whole, share, 0, False) for share in shares]
    for i in range(len(whole)):
        sets = [rows_of(few, i) for few in made]
        assert len(sets[0]) == 1
        assert all(a <= b for a, b in pairwise(sets))
        assert rows_of(few_labels(whole, 8.0, 0, False), i) >= sets[0]
        assert len(rows_of(few_labels(whole, 8.0, 0, False), i)) == 8
        everything = rows_of(few_labels(whole, 1e6, 0, False), i)
        assert len(everything) == (whole.frame(i).label != UNLABELLED).sum()


def test_which_labels(world: Path, cache: Path, tmp_path: Path) -> None:
    """The seed and the token decide, whatever other frames there are and wherever they lie."""
    whole = a_split(world, cache)
    few, other = few_labels(whole, 0.02, 0, False), few_labels(whole, 0.02, 1, False)
    assert few.fingerprint["content"] != other.fingerprint["content"]
    chosen = runs.Origin("singapore", world, frames=whole.tokens[3:1:-1])
    part = few_labels(chosen.index(None, a_recipe(), tmp_path), 0.02, 0, False)
    assert len(part) == 2
    for i, token in enumerate(part.tokens):
        assert rows_of(part, i) == rows_of(few, whole.tokens.index(token))
        assert rows_of(part, i) != rows_of(other, whole.tokens.index(token))


def test_the_order_of_labels() -> None:
    rng = np.random.default_rng(0)
    label = rng.choice([0, 1, 2, UNLABELLED], 400, p=[0.8, 0.15, 0.01, 0.04]).astype(np.uint8)
    order = label_order("a", label, 0, False)
    assert sorted(order.tolist()) == np.flatnonzero(label != UNLABELLED).tolist()
    # A row's place in the order does not depend on the labels of the others.
    fewer = label.copy()
    fewer[::3] = UNLABELLED
    left = [row for row in order.tolist() if fewer[row] != UNLABELLED]
    assert label_order("a", fewer, 0, False).tolist() == left
    assert label_order("b", label, 0, False).tolist() != order.tolist()
    balanced = label_order("a", label, 0, True)
    assert sorted(balanced.tolist()) == sorted(order.tolist())
    for turn in range(int((label == 2).sum())):
        assert set(label[balanced[3 * turn : 3 * turn + 3]]) == {0, 1, 2}
    begins = {int(label[label_order(str(i), label, 0, True)[0]]) for i in range(30)}
    assert begins == {0, 1, 2}, "one label a frame: it is not always of the same class"
    assert not len(label_order("a", np.full(9, UNLABELLED, np.uint8), 0, True))


def test_balanced_labels(world: Path, cache: Path) -> None:
    whole = a_split(world, cache)
    few = few_labels(whole, 12.0, 0, True)
    for i in range(len(whole)):
        there = np.bincount(whole.frame(i).label, minlength=256)[:K]
        kept = np.bincount(few.frame(i).label, minlength=256)[:K]
        assert kept.sum() == 12
        assert all(kept[c] >= min(there[c], 12 // (there > 0).sum()) for c in range(K))


@pytest.mark.parametrize("change", ["nothing", "label", "length", "meta", "data"])
def test_stored_labels_are_checked(
    world: Path, cache: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path(shutil.copytree(a_split(world, cache).path, tmp_path / "index"))
    whole = Index(home)
    few = few_labels(whole, 0.01, 0, False)
    files = {path.name: path.read_bytes() for path in few.path.iterdir()}
    assert sorted(files) == ["label.bin", "meta.json"] and not list(home.glob("*.partial"))
    if change == "label":
        (few.path / "label.bin").write_bytes(bytes(1) + files["label.bin"][1:])
    elif change == "length":
        (few.path / "label.bin").write_bytes(files["label.bin"][1:])
    elif change == "meta":
        (few.path / "meta.json").write_text("{")
    elif change == "data":
        whole.fingerprint["content"] = "other"
    told: list[str] = []
    again = few_labels(whole, 0.01, 0, False, lambda done, total, what: told.append(what))
    reason = {"label": "damaged", "length": "damaged", "meta": "unreadable", "data": "whole"}
    if change == "nothing":
        assert not told
    else:
        assert told[0].startswith("choosing labels again") and reason[change] in told[0]
    assert (again.path / "label.bin").read_bytes() == files["label.bin"]
    assert again.fingerprint == few.fingerprint
    kind, arguments = again.__reduce__()
    np.testing.assert_array_equal(kind(*arguments).frame(1).label, again.frame(1).label)


# ---- the transfer --------------------------------------------------------------------------------


def test_maps_of_the_decoder() -> None:
    """What `forward` computes, up to the stage before the last."""
    torch.manual_seed(0)
    net = UNet2D(16).eval()
    image = torch.rand(2, 3, HEIGHT, WIDTH)
    maps = net.pyramid(image, (), finest=1)
    assert [tuple(x.shape[1:]) for x in maps] == [
        (16, 24, 32),
        (32, 12, 16),
        (64, 6, 8),
        (128, 3, 4),
    ]
    full = F.pad(image, (0, 64 - WIDTH, 0, 48 - HEIGHT))
    skip = F.relu(net.bn1(net.conv1(full)))
    finest = net.merge[0](torch.cat([skip, net.up[0](maps[0])], 1))
    assert torch.equal(finest[..., :HEIGHT, :WIDTH], net(image))


def seen_by_hand(x: Tensor, frame: int, row: float, col: float) -> Tensor:
    """Bilinear, by the four pixels around a place; beyond the border the nearest one."""
    height, width = x.shape[-2:]
    row, col = min(max(row, 0.0), height - 1.0), min(max(col, 0.0), width - 1.0)
    total = torch.zeros(x.shape[1], dtype=x.dtype)
    for y in range(math.floor(row), math.floor(row) + 2):
        for z in range(math.floor(col), math.floor(col) + 2):
            share = (1 - abs(row - y)) * (1 - abs(col - z))
            if share:
                total = total + share * x[frame, :, y, z]
    return total


def places(n: int, k: int, height: int, width: int) -> Tensor:
    """Inside, on pixels, on each border and far beyond."""
    torch.manual_seed(0)
    place = torch.rand(n, k, 2, dtype=torch.float64) * torch.tensor([height + 3, width + 3]) - 2
    place[0, 0], place[1, 0], place[2, 0] = torch.tensor(
        [[0.0, 0], [height - 1, width - 1], [2, 3]]
    )
    place[3, 0], place[4, 0] = torch.tensor([[-9.0, 2.5], [1.25, 99]])
    return place


def test_look_pixel_by_pixel() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    frame = torch.tensor([0] * 9 + [1] * 4)
    place, weight = places(13, 3, 4, 6), torch.rand(13, 3, dtype=torch.float64)
    found = weak.look(x, frame, place, weight)
    for n in range(13):
        wanted = torch.zeros(5, dtype=torch.float64)
        for k in range(3):
            wanted += weight[n, k] * seen_by_hand(x, int(frame[n]), *place[n, k].tolist())
        assert torch.allclose(found[n], wanted, atol=1e-12)
    # The convention of F.grid_sample with align_corners=False and the border repeated.
    size = torch.tensor([6, 4])
    for b in (0, 1):
        grid = (2 * place[frame == b].flip(-1) + 1) / size - 1
        wanted = F.grid_sample(
            x[b : b + 1], grid[None], mode="bilinear", padding_mode="border", align_corners=False
        )
        wanted = (wanted[0] * weight[frame == b]).sum(-1).t()
        assert torch.allclose(found[frame == b], wanted, atol=1e-12)
    assert torch.allclose(
        weak.look(x[..., :1, :1], frame, place, weight)[0], x[0, :, 0, 0] * weight[0].sum()
    )


def test_the_gradient_of_look() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    frame = torch.tensor([0] * 5 + [1] * 2)
    place = (places(7, 2, 4, 6) + 0.13).requires_grad_()  # off the kinks
    weight = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: weak.look(a[0], frame, *a[1:]), (x, place, weight))


def a_transfer(*overrides: str) -> tuple[weak.Transfer, list[Tensor]]:
    torch.manual_seed(2)
    transfer = weak.Transfer(a_recipe(*overrides))
    sizes = ((24, 32), (12, 16), (6, 8), (3, 4))
    maps = [torch.randn(2, 5, *size, requires_grad=True) for size in sizes]
    return transfer, maps


def test_the_transfer_restated() -> None:
    transfer, maps = a_transfer("places=3", "radius=1.5")
    torch.nn.init.normal_(transfer.offset)
    batch, width = a_batch(), transfer.attend.in_features
    feat = torch.randn(len(batch.pixel), width)
    found = transfer(maps, feat, batch.batch_index, batch.pixel)
    frames = [b for b, count in enumerate(COUNTS) for _ in range(count)]
    for n, (row, col) in enumerate(batch.pixel.tolist()):
        logits = transfer.attend(feat[n])
        attention = logits.exp() / logits.exp().sum()
        offset = (feat[n] @ transfer.offset).tolist()
        wanted = torch.zeros(5)
        for s, stride in enumerate((2, 4, 8, 16)):
            for k in range(3):
                at = 2 * (3 * s + k)
                y = (row + 0.5) / stride - 0.5 + 1.5 * math.tanh(offset[at])
                x = (col + 0.5) / stride - 0.5 + 1.5 * math.tanh(offset[at + 1])
                wanted = wanted + attention[3 * s + k] * seen_by_hand(maps[s], frames[n], y, x)
        assert torch.allclose(found[n], wanted, atol=1e-5)


def test_one_to_one_is_one_place_that_stays() -> None:
    """To the bit, and so are the gradients."""
    batch, results = a_batch(), []
    for overrides in (("transfer=one",), ("places=1",)):
        transfer, maps = a_transfer(*overrides)
        torch.manual_seed(3)
        feat = torch.randn(len(batch.pixel), 8, requires_grad=True)
        found = transfer(maps, feat, batch.batch_index, batch.pixel)
        learned = [feat, transfer.attend.weight, transfer.attend.bias, *maps]
        results.append([found, *torch.autograd.grad(found.square().sum(), learned)])
    assert (transfer.offset is not None) and not transfer.offset.any()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    outputs = [
        systems.build(a_recipe(text), seed=4)("all", {"labelled": batch}, systems.Chance(0, 0))
        for text in ("transfer=one", "places=1")
    ]
    assert outputs[0] == outputs[1] and "seg_fused" in outputs[0]


def test_places_begin_at_the_pixel_and_move() -> None:
    system = systems.build(a_recipe())
    offset = system.transfer.offset
    assert offset.shape == (8, 4 * 4 * 2) and not offset.any()
    optimizer = system.optimizers()["all"]
    sum(system("all", {"labelled": a_batch()}, systems.Chance(0, 0)).values()).backward()
    optimizer.step()
    assert offset.any(0).all(), "every scale and place learns where to look"


# ---- the losses and the step ---------------------------------------------------------------------


def test_cosine_distance() -> None:
    torch.manual_seed(0)
    logits = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    total = 0.0
    for a, b in zip(logits.tolist(), target.tolist(), strict=True):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        total += 1 - dot / math.hypot(*a) / math.hypot(*b)
    found = weak.cosine_distance(logits, target)
    assert found.item() == pytest.approx(total / 13, rel=1e-12)
    _, theirs = torch.autograd.grad(found, (logits, target), allow_unused=True)
    assert theirs is None, "the target takes no gradient"
    assert weak.cosine_distance(target[:0], logits[:0]).item() == 0


def test_text_contrast() -> None:
    torch.manual_seed(0)
    logits = torch.randn(13, 6, dtype=torch.float64)
    label = torch.tensor([0, 1, 2, 3, 3, 0, 0, 1, IGNORE, IGNORE, 2, 2, 3])
    texts = F.normalize(torch.randn(4, 6, dtype=torch.float64), dim=1)
    total, count = 0.0, 0
    for row, y in zip(logits.tolist(), label.tolist(), strict=True):
        if y != IGNORE:
            cosines = [sum(a * b for a, b in zip(row, t, strict=True)) for t in texts.tolist()]
            exps = [math.exp(c / math.hypot(*row) / 0.2) for c in cosines]
            total -= math.log(exps[y] / sum(exps))
            count += 1
    found = weak.text_contrast(logits, texts, label, 0.2)
    assert found.item() == pytest.approx(total / count, rel=1e-12)
    nothing = torch.full_like(label, IGNORE)
    assert weak.text_contrast(logits, texts, nothing, 0.2).item() == 0


def lovasz_by_hand(prob: Tensor, label: list[int]) -> float:
    """Row by row, with the IoU of sets."""
    total, classes = 0.0, sorted(set(label))
    for c in classes:
        errors = [abs((y == c) - prob[n, c].item()) for n, y in enumerate(label)]
        own = {n for n, y in enumerate(label) if y == c}
        wrong: set[int] = set()
        last = 0.0
        for n in sorted(range(len(label)), key=lambda n: -errors[n]):
            wrong.add(n)
            jaccard = 1 - len(own - wrong) / len(own | wrong)
            total += errors[n] * (jaccard - last)
            last = jaccard
    return total / len(classes)


def terms_by_hand(system: Any, batch: Batch) -> dict[str, float]:
    """The loss of the docstring, row by row."""
    r, n_points = system.recipe, len(batch.label)
    texts = SmallClip().texts("street6")
    pyramid = kernels.pyramid(batch.points, 7)
    with torch.no_grad():
        feat, logits = system.student(pyramid, batch.points)
        teacher = system.teacher(pyramid, batch.points)[1]
        maps = system.camera(batch.image)
        found = system.transfer(maps, feat, batch.batch_index, batch.pixel)
        fusion, hidden = system.fusion, []
        for q, m in zip(feat, found, strict=True):
            gate = fusion.gate[2](fusion.gate[0](torch.cat([q, m])).clamp(min=0))
            hidden.append(fusion.lift(q).clamp(min=0) + m / (1 + (-gate).exp()))
        cosines = torch.einsum("bdhw,kd->bkhw", SmallClip().look(batch.image).dense, texts)
        student = logits.double().log_softmax(1)
        fused = fusion.head(torch.stack(hidden)).double().log_softmax(1)
        told = F.normalize(system.to_text(feat).double(), dim=1)
        wanted = system.imitate(feat)
    label = batch.label.tolist()
    known = [n for n in range(n_points) if label[n] != IGNORE]
    terms = dict.fromkeys(("seg_3d", "seg_fused", "distill", "cosine", "text", "contrast"), 0.0)
    weights = r.class_weights
    for name, log_prob in (("seg_3d", student), ("seg_fused", fused)):
        total = sum(weights[label[n]] for n in known)
        terms[name] = -sum(weights[label[n]] * log_prob[n, label[n]].item() for n in known) / total
        rows = [label[n] for n in known]
        terms[name] += r.lovasz * lovasz_by_hand(log_prob[known].exp(), rows)
    taught, like = [IGNORE] * n_points, []
    for n, (b, (y, x)) in enumerate(
        zip(batch.batch_index.tolist(), batch.pixel.tolist(), strict=True)
    ):
        p = fused[n].exp()
        terms["distill"] += 4 * r.distill * (p * (fused[n] - student[n])).sum().item() / n_points
        a, m = wanted[n].tolist(), found[n].tolist()
        cosine = sum(u * v for u, v in zip(a, m, strict=True)) / math.hypot(*a) / math.hypot(*m)
        terms["cosine"] += r.cosine * (1 - cosine) / n_points
        cosine_here = seen_by_hand(cosines.double(), b, (y + 0.5) / 8 - 0.5, (x + 0.5) / 8 - 0.5)
        like.append((cosine_here / 0.07).softmax(0))
    best = [(p.max().item(), int(p.argmax())) for p in like]
    for n, (sure, c) in enumerate(best):
        mine = sorted(other for other, k in best if k == c)
        median = mine[(len(mine) - 1) // 2]  # of the first iteration: there is no earlier one
        enough = sure >= min(median, r.text_threshold) - 1e-6
        if enough and int(teacher[n].argmax()) == c and label[n] == IGNORE:
            taught[n] = c
    kept = [n for n in range(n_points) if taught[n] != IGNORE]
    assert 4 < len(kept) < n_points - len(known) - 4, len(kept)
    total = sum(weights[taught[n]] for n in kept)
    terms["text"] = -r.text * sum(weights[taught[n]] * student[n, taught[n]].item() for n in kept)
    terms["text"] /= total
    for n in (*known, *kept):
        c = taught[n] if label[n] == IGNORE else label[n]
        exponents = [(told[n] @ t.double()).item() / r.temperature for t in texts]
        total = sum(math.exp(e) for e in exponents)
        loss = -math.log(math.exp(exponents[c]) / total)
        terms["contrast"] += r.contrast * loss / (len(known) + len(kept))
    return terms


def test_the_step_restated_row_by_row() -> None:
    overrides = ("cosine=0.7", "lovasz=0.6", "text_threshold=0.5", "places=2", "temperature=0.2")
    system = moved(systems.build(a_recipe(*overrides), seed=2)).eval()
    batch = a_batch(labelled=6)
    wanted = terms_by_hand(system, batch)
    found = system("all", {"labelled": batch}, systems.Chance(0, 0))
    assert list(found) == list(wanted)
    for name, term in found.items():
        assert term.item() == pytest.approx(wanted[name], rel=3e-4), name


def test_who_learns_from_what() -> None:
    """Gradients stop at the fused head where it teaches, at m where it is imitated, at the texts
    and the teacher."""
    system = moved(systems.build(a_recipe("cosine=1", "text_threshold=0.3"), seed=2))
    student = {"student.trunk", "student.head"}
    learns = {
        "seg_3d": student,
        "seg_fused": {"student.trunk", "camera", "transfer", "fusion"},
        "distill": student,
        "cosine": {"student.trunk", "imitate"},
        "text": student,
        "contrast": {"student.trunk", "to_text"},
    }
    terms = system("all", {"labelled": a_batch()}, systems.Chance(0, 0))
    assert terms.keys() == learns.keys()
    for name, term in terms.items():
        system.zero_grad(set_to_none=True)
        term.backward(retain_graph=True)
        found = {n for n, p in system.named_parameters() if p.grad is not None and p.grad.any()}
        deep = {".".join(n.split(".")[: 2 if n.startswith("student") else 1]) for n in found}
        assert deep == learns[name], name
    sum(system("all", {"labelled": a_batch()}, systems.Chance(0, 0)).values()).backward()
    learning = {n for n, p in system.named_parameters() if p.grad is not None}
    assert learning == {n for n, _ in system.named_parameters() if not n.startswith("teacher")}
    groups = system.optimizers()["all"].param_groups
    assert [(g["name"], g["lr"]) for g in groups] == [
        *(("3d", 6e-3), ("2d", 2e-3), ("transfer", 6e-3))
    ]
    stepped = {p for group in groups for p in group["params"]}
    assert stepped == {p for n, p in system.named_parameters() if not n.startswith("teacher")}


@pytest.mark.parametrize(
    ("overrides", "terms", "parts"),
    [
        (OFF, {"seg_3d"}, {"student"}),
        (("transfer=none", "contrast=0"), {"seg_3d", "text"}, {"student", "teacher", "thresholds"}),
        (("transfer=none", "text=0"), {"seg_3d", "contrast"}, {"student", "to_text"}),
        (
            ("text=0", "contrast=0", "distill=0", "lovasz=0"),
            {"seg_3d", "seg_fused"},
            {"student", "camera", "transfer", "fusion"},
        ),
        (
            ("transfer=one", "text=0", "contrast=0", "cosine=1"),
            {"seg_3d", "seg_fused", "distill", "cosine"},
            {"student", "camera", "transfer", "fusion", "imitate"},
        ),
        (
            (),
            {"seg_3d", "seg_fused", "distill", "text", "contrast"},
            {"student", "teacher", "camera", "transfer", "fusion", "to_text", "thresholds"},
        ),
    ],
)
def test_flags(
    overrides: tuple[str, ...], terms: set[str], parts: set[str], small_clip: list[str]
) -> None:
    """What is off is neither computed nor built."""
    system = systems.build(a_recipe(*overrides))
    found = system("all", {"labelled": a_batch()}, systems.Chance(0, 0))
    assert found.keys() == terms
    assert {name.split(".")[0] for name in system.state_dict()} == parts
    reads = bool({"text", "contrast"} & terms)
    assert small_clip == (["street"] if reads else []) and (system.clip is not None) == reads
    assert bool(system.recipe.needs_clip) == reads
    assert system.frozen() == ("small" if reads else None)
    assert len(system.encoders()) == ("camera" in parts)
    assert not parts - {"student"} - set(system.training_only)
    alone = systems.build(a_recipe(*overrides), training=False)
    assert {name.split(".")[0] for name in alone.state_dict()} == {"student"}
    assert alone.clip is None and alone.frozen() is None
    total = sum(found.values())
    total.backward()
    assert total.isfinite()


def test_the_3d_network_alone_begins_as_in_the_whole_system() -> None:
    """So that rows of a comparison differ in what teaches it."""
    whole, alone = (systems.build(a_recipe(*more), seed=5) for more in ((), OFF))
    theirs, mine = whole.student.state_dict(), alone.student.state_dict()
    assert all(torch.equal(theirs[name], mine[name]) for name in mine)
    batch, chance = a_batch(), systems.Chance(0, 0)
    terms = [system("all", {"labelled": batch}, chance)["seg_3d"] for system in (whole, alone)]
    assert torch.equal(*terms)


def test_which_pseudo_labels_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    system = systems.build(a_recipe("text_threshold=0.7"))
    batch = a_batch(labelled=1)
    n = len(batch.label)
    sure = torch.full((n, K), 0.01)
    sure[:, 2] = 0.95
    sure[4] = torch.tensor([0.69, 0.31, 0, 0, 0, 0])
    sure[5] = torch.tensor([0.71, 0.29, 0, 0, 0, 0])
    sure[7] = torch.tensor([0.51, 0.49, 0, 0, 0, 0])  # below the median of its class
    monkeypatch.setattr(weak, "pixel_to_point", lambda *a: sure.log())
    logits = torch.zeros(n, K)
    logits[:, 2] = 1
    logits[[4, 5, 7]] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    logits[6, 3] = 2  # the teacher disagrees
    monkeypatch.setattr(weak.Student, "forward", lambda self, *unused: (None, logits))
    found = system.taught(batch, None).tolist()
    wanted = [2] * n
    wanted[0] = wanted[COUNTS[0]] = wanted[6] = wanted[7] = IGNORE  # two have a label already
    wanted[4] = wanted[5] = 0  # the median of the class is 0.69, less than 0.7
    assert found == wanted


def test_without_a_label_in_the_batch() -> None:
    """As after a crop that holds none of the labelled points."""
    system = systems.build(a_recipe("text_threshold=1", "threshold_decay=1"))
    system.thresholds.median.fill_(1)  # and no text is so sure
    terms = system("all", {"labelled": a_batch(labelled=0)}, systems.Chance(0, 0))
    assert terms["seg_3d"] == terms["seg_fused"] == terms["text"] == terms["contrast"] == 0
    sum(terms.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in system.parameters())


def test_the_teacher_follows() -> None:
    system = systems.build(a_recipe("ema=0.8"))
    pairs = zip(system.teacher.parameters(), system.student.parameters(), strict=True)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in pairs)
    with torch.no_grad():
        for p in system.student.parameters():
            p.add_(1)
    before = [p.clone() for p in system.teacher.parameters()]
    system.after_step(100)
    for old, new in zip(before, system.teacher.parameters(), strict=True):
        assert torch.allclose(new, old + 0.2, atol=1e-5)


# ---- runs ----------------------------------------------------------------------------------------


def train_weak(out: Path, world: Path, cache: Path, *more: object, steps: int = 4) -> Any:
    fixed = ("--src", "singapore", "--tgt", "singapore", "--method", "weak", "--preset", "small")
    where = ("--data", world, "--cache", cache, "--out", out, "--threads", 1, "--steps", steps)
    labels = ("--set", "labelled=0.02", "--set", "val_every=2")
    return ftd("train", *fixed, *where, *TINY, *labels, *more)


@pytest.fixture(scope="module")
def world_of_its_own(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that is changed: what else a root holds, its folders and its times stay."""
    return Path(shutil.copytree(world, tmp_path_factory.mktemp("copy") / "world"))


@CPU
def test_no_other_label_is_read(
    world: Path, cache: Path, tmp_path: Path, world_of_its_own: Path
) -> None:
    """With all hidden labels of the training split changed a run ends with equal bytes."""
    result = train_weak(tmp_path / "a", world, cache)
    assert result.exit_code == 0, result.output
    r = checkpoint.load(tmp_path / "a" / "last.safetensors")[0].recipe
    whole = runs.Origin("singapore", world).index("train", r, cache)
    few = few_labels(whole, 0.02, 0, False)
    assert f"supervised loss on {few.counts().sum()} labels; no other" in words(result)

    domain = readers.domains()["singapore"]
    reader, changed = readers.reader_of(domain), 0
    for ref in readers.list_frames(world_of_its_own, domain, "train"):
        raw = reader.read(ref)
        rows, _, _ = reader.project(raw, ref)
        table = index.class_table(reader, "street6", reader.categories(ref))
        shown = rows[sorted(rows_of(few, few.tokens.index(ref.token)))]
        stored = np.fromfile(ref.label_path, np.uint8)
        counted = sorted({int(raw_id) for raw_id in np.unique(stored) if table[raw_id] < K})
        if len({int(table[raw_id]) for raw_id in counted}) < 2:
            continue
        after = dict(zip(counted, counted[1:] + counted[:1], strict=True))
        other = np.array([after.get(int(raw_id), int(raw_id)) for raw_id in stored], np.uint8)
        other[shown] = stored[shown]
        changed += int((other != stored)[rows].sum())
        assert ref.label_path is not None
        os.unlink(ref.label_path)
        other.tofile(ref.label_path)
    assert changed > 0.5 * few.fingerprint["points"]
    result = train_weak(tmp_path / "b", world_of_its_own, tmp_path / "cache")
    assert result.exit_code == 0, result.output
    assert same_bytes(tmp_path / "a", tmp_path / "b")
    meta = checkpoint.read_metadata(tmp_path / "a" / "last.safetensors")
    assert meta["data"] == {"labelled": few.fingerprint["content"]}
    assert sum(np.array(meta["recipe"]["class_weights"]) > 0) == K
    # The test of this test: with all labels it is not so.
    for name, root, prepared in (("c", world, cache), ("d", world_of_its_own, tmp_path / "cache")):
        result = train_weak(tmp_path / name, root, prepared, "--set", "labelled=1", steps=1)
        assert result.exit_code == 0, result.output
    assert not same_bytes(tmp_path / "c", tmp_path / "d")


@CPU
def test_equal_bytes_resume_and_export(world: Path, cache: Path, tmp_path: Path) -> None:
    for name, more in (("a", ()), ("b", ("--workers", 1))):
        result = train_weak(tmp_path / name, world, cache, *more)
        assert result.exit_code == 0, result.output
    assert same_bytes(tmp_path / "a", tmp_path / "b")
    assert "reconstruction from the abstract" in words(result) and "+3.8 mIoU" in words(result)
    with stopped_in(3):
        result = train_weak(tmp_path / "c", world, cache)
    assert result.exit_code == 130 and "--resume" in words(result)
    result = ftd("train", "--resume", tmp_path / "c")
    assert result.exit_code == 0, result.output
    assert same_bytes(tmp_path / "a", tmp_path / "c")

    run, out = tmp_path / "a", tmp_path / "student.safetensors"
    where = ("--data", world, "--domain", "singapore", "--cache", cache)
    score = exported(run, out, *where)
    names = checkpoint.read_tensors(out, "").keys()
    assert {name.split(".")[0] for name in names} == {"system/student"}
    assert score["method"] == "weak" and score["split"] == "test" and list(score["miou"]) == ["3d"]
    both = [checkpoint.load(path)[0] for path in (run / "best.safetensors", out)]
    batch = a_batch()
    with torch.no_grad():
        first, second = (system.predict(batch)["3d"] for system in both)
        assert torch.equal(first, second) and torch.allclose(first.sum(1), torch.tensor(1.0))
        batch.image.zero_()
        assert torch.equal(both[1].predict(batch)["3d"], first), "it needs no image"


@CPU
def test_with_a_clip_of_the_library(
    world: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its texts have an effect, its weights stay and are named in the checkpoint."""
    monkeypatch.setattr(clip, "load", REAL_LOAD)
    folder = write_clip(tmp_path / "clip")
    found = clip.load(str(folder))
    digest = found.digest
    more = ("--set", "text_threshold=0.05", "--clip", folder)
    result = train_weak(tmp_path / "run", world, cache, *more, steps=2)
    assert result.exit_code == 0, result.output
    meta = checkpoint.read_metadata(tmp_path / "run" / "last.safetensors")
    assert meta["frozen"] == digest
    del found.digest  # cached
    assert found.digest == digest
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    terms = dict(zip(rows[0].split(","), map(float, rows[1].split(",")), strict=True))
    assert terms["text"] > 0 and terms["contrast"] > 0
    system = checkpoint.load(tmp_path / "run" / "best.safetensors")[0]
    assert system.frozen() is None, "the student needs no CLIP"


@CPU
def test_other_labels_are_another_run(world: Path, cache: Path, tmp_path: Path) -> None:
    """A changed choice of labels is found when a run is continued."""
    r = systems.recipe(
        "singapore-singapore", "weak", "small", overrides=["batch=2", "width_3d=4", "steps=2", *OFF]
    )
    origins = {side: runs.Origin("singapore", world) for side in ("src", "tgt", "val")}
    places = runs.Places(origins, cache)

    def run(**more: Any) -> train.Run:
        return runs.assemble(dataclasses.replace(r, **more), 0, tmp_path, places)[0]

    list(train.fit(run()))
    run().resume()
    with pytest.raises(checkpoint.RunError, match="made with another data"):
        run(mask_seed=1).resume()
    balanced = run(balanced=True).indexes["labelled"]
    assert balanced.fingerprint["few"] == {"labelled": 0.001, "seed": 0, "balanced": True}


@CPU
def test_a_domain_without_a_validation_split(world: Path, cache: Path, tmp_path: Path) -> None:
    pair = ("--src", "usa", "--tgt", "usa", "--method", "weak", "--preset", "small")
    where = ("--data", world, "--cache", cache, "--out", tmp_path / "run", "--threads", 1)
    more = [part for text in (*OFF, "labelled=8") for part in ("--set", text)]
    result = ftd("train", *pair, *where, *more, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "usa has no validation split" in words(result)
    assert "supervised loss on 32 labels" in words(result), "8 of each of 4 frames"
    result = ftd("eval", tmp_path / "run", "--cache", cache, "--split", "train")
    assert result.exit_code == 0, result.output
