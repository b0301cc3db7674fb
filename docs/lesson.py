"""Keeps docs/lesson.md true: python docs/lesson.py

The prose is written by hand in lesson.md. This file runs the code on one batch of a tiny built-in
world and writes anew

- what stands between `<!-- printed: NAME -->` and `<!-- /printed -->`: what the code printed;
- what stands between `<!-- code: NAME -->` and `<!-- /code -->`: the code of that function;
- every link whose title is the name of a function, class or method: where its lines are now, so
  run it after each change of the code;
- the pictures in docs/lesson-pictures/.

Numbers have to agree on every kind of processor, so they are rounded, by `about` and `roughly`.
`lesson_pictures.py` draws.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ftdpp import kernels, pictures, readers, systems
from ftdpp.data import CLASS_SETS, IGNORE, UNLABELLED, Batch
from ftdpp.docs import figures
from ftdpp.docs.exercises import largest_target, streams_differ
from ftdpp.docs.lesson_pictures import (
    drawn_map,
    drawn_slots,
    from_above,
    heat,
    over_photo,
    picture_of,
    save,
)
from ftdpp.evaluate import refine
from ftdpp.index import Index, few_labels, original_frames, prepare
from ftdpp.kernels import naive, reference
from ftdpp.losses import kl_rows, log_smoothed_weights
from ftdpp.models import update_teacher
from ftdpp.systems import Chance, crossmatch, ftdpp, weak
from ftdpp.train import Batches
from ftdpp.world import layouts

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURES = ROOT / "docs/lesson.md", ROOT / "docs/lesson-pictures"
PAIR = ("usa", "singapore")
FRAMES = {"source": 4, "target": 8, "val": 2, "test": 2}
NAMES = CLASS_SETS["street6"]
SEED = 0
UPDATES = 24  # on the labelled frames of the batch, before the others get pseudo-labels
TILE = (400, 224)  # of the pictures that consist of several; the batch's images are 200x112

# ---- numbers and tables --------------------------------------------------------------------------


def about(x: float, digits: int = 2, margin: float = 0.0015) -> str:
    """x rounded to some significant digits, with commas.

    Raises ValueError closer to a rounding boundary than a share of x: there another processor may
    print another digit.
    """
    if not x:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(abs(x))) + 1 - digits)
    if abs(abs(x) / unit % 1 - 0.5) * unit < margin * abs(x):
        raise ValueError(f"{x} is close to a rounding boundary of {digits} digits: round otherwise")
    return f"{round(x / unit) * unit:,.{max(0, -round(math.log10(unit)))}f}"


def roughly(loss: float) -> str:
    """Two digits where the first is 1, else one. The world that another processor writes differs in
    the last bits of points and pixels; with other matrix kernels, losses moved by up to 0.6 %."""
    first = int(f"{loss:e}"[0])
    return about(loss, 2 if first == 1 else 1, margin=0.003)


def table(head: str, rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; head is its first line's cells, separated by |."""
    lines = [[cell.strip() for cell in head.split("|")], *rows]
    text = [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join([text[0], "|---" * len(lines[0]) + "|", *text[1:]])


def printed(*lines: str) -> str:
    return "\n".join(["```text", *lines, "```"])


def shape(x: Tensor, rows: int) -> str:
    """A shape in which N stands for the number of points."""
    return " x ".join("N" if n == rows else f"{n:,}" for n in x.shape)


def bounded(x: float, bound: float) -> str:
    """x as "< bound", which has to be true by far."""
    assert x < bound / 3, f"{x} is not far below {bound}"
    return f"< {bound:g}".replace("e-0", "e-")


# ---- the batch -----------------------------------------------------------------------------------


class Lesson:
    """One batch, as the training loop draws it, and the networks that it goes through."""

    def __init__(self, root: Path, cache: Path) -> None:
        overrides = ["batch=2", "pseudo_detach=false"]  # the released form of the trust factor
        r = systems.recipe("-".join(PAIR), "ftdpp", "small", True, overrides)
        streams = ftdpp.System.streams(r)
        self.indexes: dict[str, Index] = {}
        for name, stream in streams.items():
            domain = readers.domains()[PAIR[stream.side == "tgt"]]
            self.indexes[name] = prepare(
                root, domain, stream.split, r.classes, r.image_size(), cache
            )
        counts = self.indexes["labelled"].counts().tolist()
        self.recipe = dataclasses.replace(r, class_weights=log_smoothed_weights(counts))
        self.batches = Batches(streams, self.recipe, SEED, self.indexes)[0]
        self.labelled, self.unlabelled = self.batches["labelled"], self.batches["unlabelled"]
        self.rows = len(self.labelled.label)
        self.pyramid = kernels.pyramid(self.labelled.points)
        self.system = systems.build(self.recipe, SEED).train()
        self.student: ftdpp.CrossModal = self.system.student
        self.terms: dict[str, Tensor] = {}  # of the first update
        self.drawings: dict[str, Image.Image | str] = {}

    def seed(self) -> None:
        """The dropout of iteration 0, before each forward pass."""
        Chance(SEED, 0).seed_dropout(0)

    @functools.cached_property
    def said(self) -> dict[str, Tensor]:
        """What the heads predict on the target."""
        self.seed()
        with torch.no_grad():
            return self.system.predict(self.unlabelled)


def learn(system: Any, batches: dict[str, Batch], iteration: int) -> float:
    """Losses and gradients of an iteration, as `train.Run.learn` computes them; the total."""
    chance = Chance(SEED, iteration)
    chance.seed_dropout(0)
    total = torch.stack(list(system("all", batches, chance).values())).sum()
    system.zero_grad()
    total.backward()
    return float(total.detach())


# ---- the stations: each returns what stands in its block -----------------------------------------


def points(a: Lesson) -> str:
    """Station 1: the first labelled frame, then the batch."""
    index, token = a.indexes["labelled"], a.labelled.tokens[0]
    [frame] = original_frames(index, [index.tokens.index(token)])
    root, domain = Path(index.identity["root"]), readers.domains()[PAIR[0]]
    [ref] = readers.list_frames(root, domain, None, None, [token])
    raw = readers.reader_of(domain).read(ref)
    panel = pictures.Panel("points that the camera sees; labelled", frame.label)
    a.drawings["points.jpg"] = pictures.page(frame, [panel], NAMES, "", 1000)
    return printed(
        f"photo                          {frame.image.shape[0]} x {frame.image.shape[1]}",
        f"points of the sweep            about {about(len(raw.points))}",
        f"points that the camera sees    about {about(len(frame.xyz))}",
        f"batch: image                   {shape(a.labelled.image, a.rows)}",
        f"batch: pixel, label, coords    {shape(a.labelled.pixel, a.rows)}, N, "
        f"{shape(a.labelled.points, a.rows)}",
        f"batch: N                       about {about(a.rows, 1)}",
    )


def pyramid(a: Lesson) -> str:
    """Station 2."""
    rows = [
        (
            level,
            f"{2**level / a.recipe.voxels_per_metre:g} m",
            f"about {about(same.n_out)}",
            about(same.pairs / same.n_out),
            a.recipe.width_3d * (level + 1),
        )
        for level, same in enumerate(a.pyramid.same)
    ]
    for level, keys in enumerate(a.pyramid.keys[:-1]):
        assert set((keys >> 3).tolist()) == set(a.pyramid.keys[level + 1].tolist())
    a.drawings["pyramid.jpg"] = figures.grid(
        {f"level {n}": from_above(a.labelled, n) for n in (2, 4, 6)}, 3
    )
    return table(
        "level | side of a voxel | voxels | pairs a voxel, 3x3x3, with the centre | "
        "channels of the 3D trunk",
        rows,
    )


FOUR = [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 1), (0, 5, 5, 5)]


def four_voxels(a: Lesson) -> str:
    """Station 3."""
    found = naive.submanifold_map(FOUR)
    fast = kernels.pyramid(torch.tensor(FOUR), 1).same[0]
    assert fast.sizes == [len(pairs) if k != fast.centre else 0 for k, pairs in enumerate(found)]
    a.drawings["kernel_map.svg"] = drawn_map(FOUR, found)
    rows = [(k, naive.CUBE_3[k], pairs) for k, pairs in enumerate(found) if pairs]
    return table("k | offset d_k | pairs (input row, output row)", rows)


def gather_gemm(a: Lesson) -> str:
    """Station 4."""
    # The offsets of level 3, slow and fast.
    level, cin, cout = 3, 4, 4
    kmap, voxels = a.pyramid.same[level], [tuple(v) for v in a.pyramid.coords(level).tolist()]
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(len(voxels), cin, generator=numbers)
    weight = torch.randn(27, cin, cout, generator=numbers)
    slow = naive.convolution(x, weight, naive.submanifold_map(voxels), len(voxels))
    difference = (reference.sparse_conv(x, weight, kmap) - slow).abs().max() / slow.abs().max()

    finest = a.pyramid.same[0]
    sizes = sorted(finest.sizes[:13] + finest.sizes[14:])
    slots = slots_of(finest)
    by_mask = slots[np.argsort(slots @ (1 << np.arange(27)), kind="stable")]
    a.drawings["slots.png"] = drawn_slots(slots, by_mask)
    return printed(
        f"level 0, voxels                           about {about(finest.n_out)}",
        f"level 0, 27 times as many                 about {about(27 * finest.n_out)}",
        f"level 0, pairs of all offsets             about {about(finest.pairs)}",
        f"level 0, pairs of the centre, k = 13      about {about(finest.n_out)}",
        f"level 0, pairs of another offset          {bounded(sizes[0], 50)} to about "
        f"{about(sizes[-1])}",
        f"level 3, naive and fast differ by         {bounded(float(difference), 1e-5)} of the "
        "largest value",
        "level 0, rows multiplied for each pair, in blocks of 64 slots",
        f"    slots in the order of the voxels      about {about(work(slots) / finest.pairs)}",
        f"    slots sorted by mask                  about {about(work(by_mask) / finest.pairs)}",
    )


def slots_of(kmap: kernels.KernelMap) -> np.ndarray:
    """(V, 27) bool: which offsets each output has, as bits of its mask."""
    has = np.zeros((kmap.n_out, 27), bool)
    offset = np.repeat(np.arange(27), kmap.sizes)
    has[kmap.pair_out.numpy(), offset] = True
    has[:, kmap.centre] = True
    return has


def work(slots: np.ndarray, block: int = 64) -> int:
    """Rows that blocks of slots multiply: a block goes through each offset that one of it has."""
    return sum(block * int(slots[i : i + block].any(0).sum()) for i in range(0, len(slots), block))


@torch.no_grad()
def trunks(a: Lesson) -> str:
    """Station 5."""
    batch, student = a.labelled, a.student
    a.seed()
    image, points = student.features_2d(batch.image), student.features_3d(batch.points, a.pyramid)
    lifted = kernels.pixel_to_point(image, batch.batch_index, batch.pixel)
    same = points[a.pyramid.voxel == a.pyramid.voxel[0]]
    assert torch.equal(same, same[:1].expand_as(same)), "equal within a voxel"
    parts = (student.net_2d, student.net_3d, student.fusion)
    sizes = [about(sum(map(torch.numel, part.parameters()))) for part in parts]
    return printed(
        f"UNet2D   {shape(batch.image, a.rows)}  ->  {shape(image, a.rows)}",
        f"lifted   {shape(image, a.rows)}  ->  {shape(lifted, a.rows)}",
        f"UNet3D   {shape(batch.points, a.rows)}  ->  {shape(points, a.rows)}",
        f"parameters of 2D, 3D, fusion   about {sizes[0]} / {sizes[1]} / {sizes[2]}",
    )


@torch.no_grad()
def fusion(a: Lesson) -> str:
    """Station 6."""
    batch, attend = a.labelled, copy.deepcopy(a.student.fusion.attend_3d).eval()
    a.seed()
    feat = a.student.features_3d(batch.points, a.pyramid)
    own = feat[: batch.counts[0]]
    alone, beside = attend(own), attend(feat)[: len(own)]
    assert (alone - beside).abs().max() > 3e-3 * alone.abs().max()
    with torch.no_grad():  # one memory row of the first head, the one that differs most by point
        scores = attend.expand(feat).chunk(attend.heads, 1)[0] @ attend.key.weight.t()
        weight = scores.softmax(0)
        row = int((weight.std(0) / weight.mean(0)).argmax())
        tiles = {
            "softmax over the points": heat(batch, weight[:, row]),
            "its share of a point's memory": heat(batch, (weight / weight.sum(1, True))[:, row]),
        }
    a.drawings["fusion.jpg"] = figures.grid(tiles, 2)
    rows = [
        f"{name:9}  {net.expand.in_features:2} channels, {net.heads} heads of "
        f"{net.expand.out_features // net.heads:2}, {net.SLOTS} memory rows"
        for name, net in a.student.fusion.named_children()
        if isinstance(net, ftdpp.ExternalAttention)
    ]
    return printed(
        *rows,
        "attend_3d of the first frame, alone and beside the second:",
        "the output differs by more than 1e-3 of its largest value",
    )


PARTS = {  # of the student, by the names of its parameters
    "2D trunk": r"net_2d\.trunk",
    "2D main head": r"net_2d\.(main|fused)",
    "2D mimicry head": r"net_2d\.mimic",
    "3D trunk": r"net_3d\.trunk",
    "3D main head": r"net_3d\.main",
    "3D mimicry head": r"net_3d\.mimic",
    "fusion": "fusion",
}
TERMS = {
    "seg_2d": ("source labels teach the main 2D head", "systems.ftdpp.supervised_loss"),
    "seg_3d": ("source labels teach the main 3D head", "systems.ftdpp.supervised_loss"),
    "mimic_2d_src": ("main 3D head teaches the 2D mimicry head, source", "systems.ftdpp.mimicry"),
    "mimic_3d_src": ("main 2D head teaches the 3D mimicry head, source", "systems.ftdpp.mimicry"),
    "mimic_2d_tgt": ("the same on the target", "systems.ftdpp.mimicry"),
    "mimic_3d_tgt": ("the same on the target", "systems.ftdpp.mimicry"),
    "pseudo_2d": ("pseudo-labels teach the main 2D head", "systems.ftdpp.debiased_pseudo_loss"),
    "pseudo_3d": ("pseudo-labels teach the main 3D head", "systems.ftdpp.debiased_pseudo_loss"),
    "distill_single": ("each teacher head teaches its own", "systems.ftdpp.distillation"),
    "distill_fused": ("the teacher's ensemble teaches both", "systems.ftdpp.distillation"),
}


def losses(a: Lesson) -> str:
    """Station 7, first half."""
    for head in ("2d", "3d"):
        confidence, label = a.said[head].max(1)
        a.unlabelled.pseudo[head] = refine(label, confidence, len(NAMES))[0]
    a.drawings["losses.jpg"] = figures.grid(point_by_point(a), 3)
    a.seed()
    a.terms = a.system("all", a.batches, Chance(SEED, 0))
    assert a.terms.keys() == TERMS.keys()
    rows = [
        (f"`{name}`", what, roughly(a.terms[name].item()), link(where))
        for name, (what, where) in TERMS.items()
    ]
    return table("term | what teaches what | value | lines", rows)


@torch.no_grad()
def point_by_point(a: Lesson) -> dict[str, Image.Image]:
    """What each kind of term is at every point of one frame."""
    src, tgt = a.labelled, a.unlabelled
    a.seed()
    s, t = (a.student(b.image, b.pixel, b.points) for b in (src, tgt))
    image, coords = ftdpp.stylise(src, tgt, a.recipe, True)
    taught = a.system.teacher(image, src.pixel, coords)
    heads = s.main_2d, s.main_3d, taught.main_2d, taught.main_3d
    p2, p3, t2, t3 = (F.softmax(x, 1) for x in heads)
    q3, both = F.softmax(t.main_3d, 1), F.softmax(t2 + t3, 1)

    def of(logits: Tensor, label: Tensor) -> Tensor:
        found = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
        return found.masked_fill(label == IGNORE, torch.nan)

    return {
        "seg_2d": heat(src, of(s.main_2d, src.label)),
        "mimic_2d_src": heat(src, kl_rows(p3, F.softmax(s.mimic_2d, 1))),
        "mimic_2d_tgt": heat(tgt, kl_rows(q3, F.softmax(t.mimic_2d, 1))),
        "distill_single": heat(src, kl_rows(t2, p2) + kl_rows(t3, p3)),
        "distill_fused": heat(src, kl_rows(both, p2) + kl_rows(both, p3)),
        "pseudo_2d": heat(tgt, of(t.main_2d, tgt.pseudo["2d"])),
    }


def reach(a: Lesson) -> str:
    """Station 7, second half: the gradient of each term alone."""
    student, batch = a.student, a.unlabelled
    a.seed()
    again = student(batch.image, batch.pixel, batch.points)
    detached = dataclasses.replace(a.recipe, pseudo_detach=True)
    others = ftdpp.pseudo_terms(detached, again, batch, *ftdpp.mimicry(again))
    named = {f"`{name}`": term for name, term in a.terms.items()}
    named |= {f"`{name}`, trust detached": term for name, term in others.items()}
    names, parameters = zip(*student.named_parameters(), strict=True)
    groups = [next(n for n, part in enumerate(PARTS.values()) if re.match(part, name))
              for name in names]  # fmt: skip
    rows = []
    for name, term in named.items():
        grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        met = {n for n, g in zip(groups, grads, strict=True) if g is not None and g.any()}
        rows.append((name, *("yes" if n in met else "" for n in range(len(PARTS)))))
    assert a.system.teacher is not None
    assert not any(p.requires_grad for p in a.system.teacher.parameters())
    return table(" | ".join(["term", *PARTS]), rows)


def stylised(a: Lesson) -> str:
    """Station 8."""
    src, tgt, r = a.labelled, a.unlabelled, a.recipe
    (fda, coords), (mixed, _) = (ftdpp.stylise(src, tgt, r, coin) for coin in (True, False))
    assert fda.max() > 1.01
    images = {"source": src.image, "target": tgt.image}
    images |= {"stylised: FDA": fda, "stylised: mixup": mixed}
    resized = {name: picture_of(x[0]).resize(TILE) for name, x in images.items()}
    a.drawings["stylised.jpg"] = figures.grid(resized, 2)

    voxels = [about(len(kernels.pyramid(c, 1).keys[0])) for c in (src.points, coords)]
    decays = []
    for step in (1, 2, 10, 100, 5000):
        teacher, student = nn.Linear(1, 1), nn.Linear(1, 1)
        nn.init.ones_(teacher.weight), nn.init.zeros_(student.weight)
        update_teacher(teacher, student, step, r.ema)
        decays.append(f"{step}: {teacher.weight.item():.3f}")
    return printed(
        "largest value after FDA                  above 1: it is not clamped",
        f"the coin of iteration 0                  {'FDA' if Chance(SEED, 0).coin() else 'mixup'}",
        f"voxels of the batch, before and after    about {voxels[0]} and {voxels[1]}",
        f"share a of the teacher's own, by step    {', '.join(decays)}",
    )


def ensemble(a: Lesson) -> str:
    """Station 9: one point, and what holds for all."""
    p2, p3 = torch.tensor([[0.70, 0.20, 0.10]]), torch.tensor([[0.15, 0.60, 0.25]])
    values = {"p2": p2, "p3": p3, "softmax(p2 + p3)": F.softmax(p2 + p3, 1)}
    bound, both = largest_target(len(NAMES)), a.said["2d+3d"]
    assert both.max() < bound
    assert torch.equal(both.argmax(1), (a.said["2d"] + a.said["3d"]).argmax(1))
    return printed(
        *(f"{n:18}{', '.join(f'{v:.2f}' for v in x[0].tolist())}" for n, x in values.items()),
        f"{len(NAMES)} classes: softmax(p2 + p3) is at most {bound:.3f}",
        "the batch: at every point its class is that of the largest p2 + p3",
    )


def pseudo(a: Lesson) -> str:
    """Station 10: labels of a source-only network that has learned from this one batch."""
    r = systems.recipe("-".join(PAIR), "source-only", "small", overrides=["batch=2"])
    faster = {"lr_2d": 2 * r.lr_2d, "lr_3d": 2 * r.lr_3d}
    r = dataclasses.replace(r, class_weights=a.recipe.class_weights, **faster)
    system, totals = systems.build(r, SEED).train(), []
    optimizer = system.optimizers()["all"]
    for i in range(UPDATES):
        totals.append(learn(system, {"labelled": a.labelled}, i))
        optimizer.step()
    assert totals[-1] < totals[0] / 2

    # In train mode, with its batch's statistics: the running ones have not caught up yet.
    for module in system.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    batch = a.unlabelled
    with torch.no_grad():
        confidence, label = system.predict(batch)["2d"].max(1)
    kept, thresholds = refine(label, confidence, len(NAMES))
    for c in label.unique():
        assert 2 * (kept == c).sum() >= (label == c).sum()
    assert max(thresholds) <= 0.9
    shown = {"predicted": label, "kept": kept, "truth": batch.label}
    tiles = {name: over_photo(batch, x) for name, x in shown.items()}
    a.drawings["pseudo.jpg"] = figures.grid(tiles, 3)

    def right(said: Tensor) -> float:
        both = (batch.label != IGNORE) & (said != IGNORE)
        return float((said == batch.label)[both].float().mean())

    assert right(kept) > right(label) + 0.02
    trust = [f"{math.exp(-kl):.2f} at KL {kl:g}" for kl in (0, 0.1, 0.5, 1, 2)]
    return printed(
        f"loss after {UPDATES} updates       below half of the first",
        "largest threshold           at most 0.9",
        "labels kept of each class   at least half",
        "labels right                a larger share of the kept than of all",
        f"trust exp(-KL)              {', '.join(trust)}",
    )


def gates(a: Lesson) -> str:
    """Station 11: CrossMatch's first update."""
    r = systems.recipe("-".join(PAIR), "crossmatch", "small", overrides=["batch=2"])
    [(name, stream)] = crossmatch.System.streams(r).items()
    batches = Batches({name: stream}, r, SEED, {name: a.indexes["unlabelled"]})[0]
    system = systems.build(r, SEED).eval()
    assert streams_differ(system, batches[name]) < 1e-6
    learn(system.train(), batches, 0)
    depth = system.auxiliary.depth
    assert not any(p.grad.any() for p in depth.convs.parameters())
    assert all(gate.grad.any() for gate in depth.gates)
    system.optimizers()["all"].step()
    assert all(gate.any() for gate in depth.gates)
    return printed(
        "step 0: scores of the two streams                        equal",
        "step 0: gradient of the gates                            not zero",
        "step 0: gradient of the convolutions behind the gates    zero",
        "step 1: the gates                                        not zero",
    )


@torch.no_grad()
def one_to_many(a: Lesson) -> str:
    """Station 13: what a point of the weakly supervised system sees before the first update."""
    r = systems.recipe("-".join(PAIR), "weak", "small")
    batch, whole = a.labelled, a.indexes["labelled"]
    few = few_labels(whole, r.labelled, r.mask_seed, r.balanced)
    given, there = (int((x.frame(0).label != UNLABELLED).sum()) for x in (few, whole))
    torch.manual_seed(0)
    camera, transfer = weak.Camera(r), weak.Transfer(r)
    maps, feat = camera(batch.image), torch.randn(a.rows, r.width_3d)
    found = transfer(maps, feat, batch.batch_index, batch.pixel)
    assert transfer.offset is not None and not transfer.offset.any()
    sizes = ", ".join(f"{x.shape[2]} x {x.shape[3]}" for x in maps)
    return printed(
        f"labels of a frame that may be read    {given} of about {about(there)}",
        f"maps of the image                     {sizes}; {r.width_hidden} channels each",
        f"places a point looks at               {r.places} on each of {len(weak.STRIDES)} maps",
        f"what it finds                         {shape(found, a.rows)}",
        "places before the first update        all are the point's own pixel",
    )


STATIONS: dict[str, Callable[[Lesson], str]] = {
    "points": points,
    "pyramid": pyramid,
    "four voxels": four_voxels,
    "gather-GEMM": gather_gemm,
    "trunks": trunks,
    "fusion": fusion,
    "losses": losses,
    "reach": reach,
    "stylised": stylised,
    "ensemble": ensemble,
    "pseudo": pseudo,
    "gates": gates,
    "one-to-many": one_to_many,
}

# ---- the page ------------------------------------------------------------------------------------


@functools.cache
def _tree(file: Path) -> tuple[ast.Module, list[str]]:
    source = file.read_text()
    return ast.parse(source), source.splitlines()


def found(name: str) -> tuple[Path, ast.FunctionDef | ast.ClassDef]:
    """The file and the definition of "systems.ftdpp.System.forward", without importing it."""
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        folder = ROOT.joinpath(*parts[:n])
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        if file.exists():
            node: Any = _tree(file)[0]
            for part in parts[n:]:
                inside = [b for b in node.body if getattr(b, "name", "") == part]
                if not inside:
                    raise LookupError(f"{file.name} has no {part}, which docs/lesson.md names")
                node = inside[0]
            return file, node
    raise LookupError(f"no file has {name}, which docs/lesson.md names")


def link(name: str) -> str:
    file, node = found(name)
    where = file.relative_to(ROOT).as_posix()
    first, last = node.lineno, node.end_lineno
    return f'[{where}:{first}-{last}](../{where}#L{first}-L{last} "{name}")'


def code(name: str) -> str:
    """The lines of a function or class, without docstrings."""
    file, node = found(name)
    lines: list[str | None] = list(_tree(file)[1])
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner):
            last = inner.body[0].end_lineno or 0
            for i in range(inner.body[0].lineno - 1, last + (not lines[last])):
                lines[i] = None
    begin = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    kept = [line for line in lines[begin : node.end_lineno] if line is not None]
    indent = len(kept[0]) - len(kept[0].lstrip())
    body = "\n".join(line[indent:] for line in kept)
    return f"{link(name)}\n\n```python\n{body}\n```"


def update(page: str, blocks: dict[str, str]) -> str:
    """The page with its blocks, code and links written anew. Raises LookupError for a name that
    is not there, or a block that the page does not show."""
    shown = re.findall(r"<!-- printed: (.*?) -->", page)
    if sorted(shown) != sorted(blocks):
        raise LookupError(f"docs/lesson.md shows {shown}, the stations are {list(blocks)}")

    def renewed(match: re.Match[str]) -> str:
        kind, name = match[1], match[2]
        content = blocks[name] if kind == "printed" else code(name)
        return f"<!-- {kind}: {name} -->\n{content}\n<!-- /{kind} -->"

    page = re.sub(r"<!-- (printed|code): (.*?) -->\n.*?<!-- /\1 -->", renewed, page, flags=re.S)
    return re.sub(r'\[[^\]\n]*\]\(\.\./[^)\s]+ "([\w.]+)"\)', lambda m: link(m[1]), page)


def build(root: Path, cache: Path, pictures_to: Path, page: str) -> str:
    """The page, made from the world at `root`; writes the pictures."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            lesson = Lesson(root, cache)
            blocks = {name: station(lesson) for name, station in STATIONS.items()}
    finally:
        torch.set_num_threads(threads)
    save(lesson.drawings, pictures_to)
    return update(page, blocks)


def main() -> None:
    cache = Path(tempfile.gettempdir()) / "ftdpp-lesson"
    root = cache / f"world-{layouts.VERSION}"
    if not root.exists():
        layouts.write_world(root, *PAIR, FRAMES, seed=0, workers=1)
    PAGE.write_text(build(root, cache, PICTURES, PAGE.read_text()))


if __name__ == "__main__":
    main()
