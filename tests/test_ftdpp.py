"""FtD++: losses as slow loops, fusion, stylisation, and what reaches which gradient."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch import Tensor

from ftdpp import losses, readers, systems
from ftdpp.data import GRID, IGNORE, Augment, Batch, DataError, collate, sample
from ftdpp.index import prepare
from ftdpp.kernels import naive
from ftdpp.systems import Chance, ftdpp
from ftdpp.systems.ftdpp import (
    CBAM,
    CrossModal,
    ExternalAttention,
    Logits,
    _Attend,
    density_transfer,
    fda,
    keep_mask,
    mixup,
)


def probs(row: Tensor) -> list[float]:
    e = [math.exp(v) for v in row.tolist()]
    return [v / sum(e) for v in e]


def kl(t: list[float], s: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(t, s, strict=True))


@pytest.fixture
def logits() -> Logits:
    torch.manual_seed(0)
    return Logits(*(torch.randn(13, 6, dtype=torch.float64, requires_grad=True) for _ in range(4)))


def test_mimicry(logits: Logits) -> None:
    two, three = ftdpp.mimicry(logits)
    rows = [[probs(r) for r in part] for part in logits]
    assert two.item() == pytest.approx(
        sum(kl(t, s) for t, s in zip(rows[1], rows[2], strict=True)) / 13, rel=1e-10
    )
    assert three.item() == pytest.approx(
        sum(kl(t, s) for t, s in zip(rows[0], rows[3], strict=True)) / 13, rel=1e-10
    )
    grads = torch.autograd.grad(two + three, list(logits), allow_unused=True)
    assert [g is None for g in grads] == [True, True, False, False], (
        "the main heads are teachers: no gradient reaches them"
    )


def test_distillation(logits: Logits) -> None:
    torch.manual_seed(1)
    teacher = Logits(*(torch.randn(13, 6, dtype=torch.float64) for _ in range(4)))
    single, fused = ftdpp.distillation(teacher, logits)
    want_single = want_fused = 0.0
    for i in range(13):
        t2, t3 = probs(teacher.main_2d[i]), probs(teacher.main_3d[i])
        s2, s3 = probs(logits.main_2d[i]), probs(logits.main_3d[i])
        both = probs(
            torch.tensor([a + b for a, b in zip(t2, t3, strict=True)], dtype=torch.float64)
        )
        want_single += kl(t2, s2) + kl(t3, s3)
        want_fused += kl(both, s2) + kl(both, s3)
    assert single.item() == pytest.approx(want_single / 13, rel=1e-10)
    assert fused.item() == pytest.approx(want_fused / 13, rel=1e-10)


@pytest.mark.parametrize(("classes", "ceiling"), [(5, 0.649), (6, 0.596), (10, 0.451)])
def test_fused_target_is_a_double_softmax(classes: int, ceiling: float) -> None:
    sure = torch.full((1, classes), -1e4)
    sure[0, 0] = 0
    student = torch.zeros(1, classes, requires_grad=True)
    _, fused = ftdpp.distillation(
        Logits(sure, sure, sure, sure), Logits(student, student, student, student)
    )
    (grad,) = torch.autograd.grad(
        fused, student
    )  # d KL(t || softmax(s)) / ds = softmax(s) - t, twice
    assert (1 / classes - grad[0, 0].item() / 2) == pytest.approx(ceiling, abs=5e-4)


def count(module: nn.Module | None) -> int:
    assert module is not None
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("classes", "fusion", "two", "three"), [
    (6, True, 23_628_364, 2_688_860), (10, True, 23_628_884, 2_688_996),
    (6, False, 23_614_924, 2_688_860), (10, False, 23_615_444, 2_688_996),
])  # fmt: skip
def test_parameter_counts(classes: int, fusion: bool, two: int, three: int) -> None:
    net = CrossModal(classes, fusion=fusion)
    assert (count(net.net_2d), count(net.net_3d)) == (two, three)
    if fusion:
        assert count(net.fusion) == 104_775


@pytest.mark.parametrize("n", [1, 2, 37, 300])
def test_external_attention_as_published(n: int) -> None:
    """Output and every gradient, under an upstream gradient that is not 1."""
    torch.manual_seed(0)
    ea = ExternalAttention(16, heads=8).double().eval()
    x = torch.randn(n, 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(n, 16, dtype=torch.float64)
    layers = ea.expand, ea.key, ea.value, ea.project
    weights: Any = [p for layer in layers for p in (layer.weight, layer.bias)]
    wanted, found = naive.external_attention(*[x, *weights, 8]), ea(x)
    assert torch.allclose(found, wanted, atol=1e-12)
    named = {"x": x, **dict(ea.named_parameters())}
    del named["key.bias"]  # without effect: see ExternalAttention
    inputs = list(named.values())
    gradients = (torch.autograd.grad(y, inputs, grad) for y in (found, wanted))
    for name, a, b in zip(named, *gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-10), name
    if n == 37:
        apart = ea(x[:20])
        assert not torch.allclose(apart, wanted[:20], atol=1e-4), "it depends on the batch"


def test_external_attention_without_points() -> None:
    x = torch.zeros(0, 16, requires_grad=True)
    ea = ExternalAttention(16, heads=8)
    ea(x).sum().backward()
    assert ea(x).shape == (0, 16)


def test_attention_dropout_keeps_the_mean_and_its_gradient_is_that_of_what_was_kept() -> None:
    torch.manual_seed(0)
    x, key, value = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((8, 50), (64, 8), (8, 64))
    )
    plain = _Attend.apply(x, key, value, 0.0)
    many = torch.stack([_Attend.apply(x, key, value, 0.5) for _ in range(400)])
    assert torch.allclose(many.mean(0), plain, atol=5 * many.std(0).max().item() / 20)
    assert many.std(0).min() > 0

    def seeded(*args: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return _Attend.apply(*args, 0.3)

    assert torch.autograd.gradcheck(seeded, (x, key, value))


def test_all_heads_at_once_equal_head_by_head() -> None:
    """The form that a GPU runs, against the one that a CPU runs."""
    torch.manual_seed(0)
    x, key, value = (
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((3, 8, 50), (64, 8), (8, 64))
    )
    grad = torch.randn(3, 8, 50, dtype=torch.float64)
    together = _Attend.apply(x, key, value, 0.0)
    apart = torch.stack([_Attend.apply(h, key, value, 0.0) for h in x])
    assert torch.allclose(together, apart)
    for a, b in zip(
        *(torch.autograd.grad(y, (x, key, value), grad) for y in (together, apart)), strict=True
    ):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9])
def test_keep_mask_rate(p: float) -> None:
    mask, keep = keep_mask((501, 203), p, torch.device("cpu"))
    assert mask.shape == (501, 203)
    assert set(mask.unique().tolist()) <= {0, 1}
    assert abs(keep - (1 - p)) <= 1 / 512
    assert abs(mask.float().mean().item() - keep) < 4 * (0.25 / mask.numel()) ** 0.5
    torch.manual_seed(5)
    again = [keep_mask((7, 9), 0.5, torch.device("cpu"))[0] for _ in range(2)]
    torch.manual_seed(5)
    assert torch.equal(again[0], keep_mask((7, 9), 0.5, torch.device("cpu"))[0]), "the seed decides"
    assert not torch.equal(*again), "and each call draws anew"


def test_cbam_residual() -> None:
    net = CBAM(8)
    nn.init.zeros_(net.channel[2].weight)
    nn.init.zeros_(net.spatial.weight)
    nn.init.zeros_(net.spatial.bias)
    x = torch.randn(2, 8, 5, 6)
    places = torch.tensor([0, 1, 1]), torch.tensor([[4, 5], [0, 0], [0, 0]])
    wanted = torch.stack([x[0, :, 4, 5], x[1, :, 0, 0], x[1, :, 0, 0]])
    assert torch.allclose(net(x, *places), 1.25 * wanted)  # both gates sigmoid(0)


def test_cbam_is_the_whole_map_s_read_at_the_points() -> None:
    """Values, and gradients of its weights, against the formula on every pixel."""
    torch.manual_seed(0)
    net, x = CBAM(8).double(), torch.randn(2, 8, 5, 6, dtype=torch.float64, requires_grad=True)
    image, pixel = torch.randint(0, 2, (40,)), torch.randint(0, 5, (40, 2))
    weight = torch.randn(40, 8, dtype=torch.float64)
    (net(x, image, pixel) * weight).sum().backward()
    assert x.grad is None
    found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()

    flat = x.detach().flatten(2)
    mlp = [net.channel(part[:, :, None, None]) for part in (flat.max(2)[0], flat.mean(2))]
    y = x.detach() * torch.sigmoid(mlp[0] + mlp[1])
    pooled = torch.stack([y.max(1)[0], y.mean(1)], 1)
    whole = x.detach() + y * torch.sigmoid(net.spatial(pooled))
    wanted = whole[image, :, pixel[:, 0], pixel[:, 1]]
    assert torch.allclose(net(x, image, pixel), wanted, rtol=1e-12)
    (wanted * weight).sum().backward()
    assert len(found) == len(list(net.parameters()))
    for a, p in zip(found, net.parameters(), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-9)


def test_fusion_stops_gradients() -> None:
    net = CrossModal(6, 16, 8)
    assert net.fusion is not None
    frame, pixel = torch.zeros(9, dtype=torch.int64), torch.randint(0, 5, (9, 2))
    map_2d, feat_3d = (
        torch.randn(1, 16, 5, 5, requires_grad=True),
        torch.randn(9, 8, requires_grad=True),
    )
    out = net.fusion(map_2d, feat_3d, frame, pixel)
    assert out.shape == (9, 24)
    out.sum().backward()
    assert map_2d.grad is None
    assert feat_3d.grad is None


def test_bf16_trunks_and_fp32_islands() -> None:
    """Autocast reaches the trunks and nothing else: logits are fp32 and near, fusion, heads and
    weights are fp32."""
    torch.manual_seed(0)
    exact = CrossModal(6, 16, 8, dropout=(0.0, 0.0)).train()
    half = CrossModal(6, 16, 8, dropout=(0.0, 0.0), precision="bf16").train()
    half.load_state_dict(exact.state_dict())
    seen: dict[str, torch.dtype] = {}
    assert half.fusion is not None
    for name, module in half.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | ExternalAttention | CBAM):
            module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: o.dtype}))
    coords = torch.cat([torch.zeros(200, 1), torch.randint(0, 12, (200, 3))], 1).int()
    image, pixel = torch.rand(1, 3, 32, 32), torch.randint(0, 32, (200, 2))
    wanted, found = exact(image, pixel, coords), half(image, pixel, coords)
    trunk = {dtype for name, dtype in seen.items() if ".trunk." in name}
    rest = {dtype for name, dtype in seen.items() if ".trunk." not in name}
    assert (trunk, rest) == ({torch.bfloat16}, {torch.float32})
    assert "fusion.cbam" in seen and "fusion.attend_2d" in seen and "net_2d.main" in seen
    assert torch.equal(found.main_3d, wanted.main_3d), "on a CPU the sparse trunk stays exact"
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 0.1 * b.abs().max()
    assert not torch.equal(found.main_2d, wanted.main_2d)
    torch.stack([t.square().mean() for t in found]).sum().backward()
    for name, p in half.named_parameters():
        if p.grad is not None:
            assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name


def batch(seed: int, pseudo: bool = False) -> Batch:
    g = torch.Generator().manual_seed(seed)
    n = 60
    frame = torch.arange(2).repeat_interleave(n // 2)
    coords = torch.cat([frame[:, None], torch.randint(0, 40, (n, 3), generator=g)], 1).int()
    row, col = (torch.randint(0, size, (n,), generator=g) for size in (20, 33))
    labels = [torch.randint(0, 6, (n,), generator=g) for _ in range(3)]
    labels[1][::3] = IGNORE
    return Batch(
        image=torch.rand(2, 3, 20, 33, generator=g),
        pixel=torch.stack([row, col], 1),
        coords=coords,
        label=labels[0],
        tokens=["a", "b"],
        keep=[torch.arange(n // 2)] * 2,
        counts=[n // 2] * 2,
        pseudo=dict(zip(("2d", "3d"), labels[1:], strict=True)) if pseudo else {},
    )


def small(
    scenario: str = "usa-singapore", method: str = "ftdpp", pseudo: bool = False, **change: Any
) -> ftdpp.Recipe:
    r = systems.recipe(scenario, method, "small", pseudo, ["dropout=0,0"])
    weights: dict[str, Any] = {"class_weights": (1.0,) * 6}
    if r.supervised == "both":
        weights["class_weights_tgt"] = (2.0,) * 6
    return dataclasses.replace(r, **{**weights, **change})


def make(r: ftdpp.Recipe) -> ftdpp.System:
    return systems.build(r).train()


COIN = Chance(0, 0)  # shows FDA


def step(
    system: ftdpp.System, labelled: Batch, unlabelled: Batch | None = None
) -> dict[str, Tensor]:
    batches = {"labelled": labelled}
    if unlabelled is not None:
        batches["unlabelled"] = unlabelled
    return system("all", batches, COIN)


def touched(net: CrossModal, loss: Tensor) -> set[str]:
    """Parts of the network that a loss sends a gradient to."""
    net.zero_grad()
    loss.backward(retain_graph=True)
    named = {
        ".".join(k.split(".")[:2]) if not k.startswith("fusion") else "fusion": p
        for k, p in reversed(list(net.named_parameters()))
    }
    return {
        part
        for part in named
        if any(
            p.grad is not None and p.grad.abs().sum() > 0
            for k, p in net.named_parameters()
            if k.startswith(part)
        )
    }


def test_who_gets_gradient_from_what() -> None:
    """Fusion hears only the main 2D head, mimicry heads never move the other modality."""
    system = make(small(pseudo=True, pseudo_debias=False))
    terms = step(system, batch(0), batch(1, pseudo=True))
    main_2d = {"net_2d.trunk", "net_2d.fused_in", "net_2d.fused_out", "net_2d.main", "fusion"}
    main_3d = {"net_3d.trunk", "net_3d.main"}
    table = {
        "seg_2d": main_2d,
        "seg_3d": main_3d,
        "mimic_2d_src": {"net_2d.trunk", "net_2d.mimic"},
        "mimic_3d_src": {"net_3d.trunk", "net_3d.mimic"},
        "mimic_2d_tgt": {"net_2d.trunk", "net_2d.mimic"},
        "mimic_3d_tgt": {"net_3d.trunk", "net_3d.mimic"},
        "pseudo_2d": main_2d,
        "pseudo_3d": main_3d,
        "distill_single": main_2d | main_3d,
        "distill_fused": main_2d | main_3d,
    }
    assert terms.keys() == table.keys()
    for name, parts in table.items():
        assert touched(system.student, terms[name]) == parts, name
    assert system.teacher is not None
    assert all(p.grad is None for p in system.teacher.parameters())


def test_trust_factor_pushes_the_mimicry_up() -> None:
    """Released: exp(-KL) is not detached, so the pseudo-label loss lowers itself by raising KL."""
    r = small(pseudo=True, pseudo_detach=False)
    system, a, b = make(r), batch(0), batch(1, pseudo=True)
    terms = step(system, a, b)
    head = system.student.net_2d.mimic.weight
    assert "net_2d.mimic" in touched(system.student, terms["pseudo_2d"])
    [pseudo] = torch.autograd.grad(terms["pseudo_2d"], head, retain_graph=True)
    [mimic] = torch.autograd.grad(terms["mimic_2d_tgt"], head)
    assert torch.cosine_similarity(pseudo.flatten(), mimic.flatten(), 0) < -0.999
    system.recipe = dataclasses.replace(r, pseudo_detach=True)
    detached = step(system, a, b)
    assert "net_2d.mimic" not in touched(system.student, detached["pseudo_2d"])


def test_debiased_pseudo_loss_slowly() -> None:
    torch.manual_seed(0)
    logits, label = (
        torch.randn(9, 6, dtype=torch.float64),
        torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, IGNORE]),
    )
    kl = torch.tensor(0.7, dtype=torch.float64)
    cross = [
        -math.log(probs(row)[y]) for row, y in zip(logits, label.tolist(), strict=True) if y >= 0
    ]
    found = ftdpp.debiased_pseudo_loss(logits, label, kl, detach=False)
    assert found.item() == pytest.approx(math.exp(-0.7) * sum(cross) / 8, rel=1e-12)


MIMICRY = {f"mimic_{head}_{side}" for head in ("2d", "3d") for side in ("src", "tgt")}


@pytest.mark.parametrize(("method", "more"), [
    ("source-only", set()), ("target-only", set()), ("xmuda", MIMICRY),
])  # fmt: skip
def test_terms_of_the_baselines(method: str, more: set[str]) -> None:
    r = small(method=method)
    terms = step(make(r), batch(0), batch(1) if r.uses_target else None)
    assert terms.keys() == {"seg_2d", "seg_3d"} | more
    assert ("unlabelled" in ftdpp.System.streams(r)) == r.uses_target


def test_semi_supervised_loss_is_the_mean_of_two_halves() -> None:
    ascending, descending = (1.0, 2, 3, 4, 5, 6), (6.0, 5, 4, 3, 2, 1)
    r = small("usa-singapore-ssda", class_weights=ascending, class_weights_tgt=descending)
    b, logits = batch(0), torch.randn(60, 6)
    weights = torch.tensor(r.class_weights), torch.tensor(r.class_weights_tgt)
    found = ftdpp.supervised_loss(logits, b, *weights)
    halves = [
        losses.cross_entropy(logits[:30], b.label[:30], weights[0]),
        losses.cross_entropy(logits[30:], b.label[30:], weights[1]),
    ]
    assert found.item() == pytest.approx(0.5 * sum(h.item() for h in halves), rel=1e-6)


def test_semi_supervised_streams_join_into_one_batch() -> None:
    """The two labelled streams give what one batch of both gives."""
    r = small("usa-singapore-ssda", "xmuda")
    streams = ftdpp.System.streams(r)
    assert [s.frames for s in streams.values()] == [2, 2, 4]
    assert [s.split for s in streams.values()] == ["train", "train_labelled", "train_unlabelled"]
    system, source, target = make(r), batch(0), batch(2)
    batches = {"labelled": source, "labelled_tgt": target, "unlabelled": batch(1)}
    terms = system("all", batches, COIN)
    assert {"seg_2d", "seg_3d"} | MIMICRY == terms.keys()
    for parameter in system.student.net_3d.main.parameters():
        [grad] = torch.autograd.grad(terms["seg_3d"], parameter, retain_graph=True)
        assert grad.any()


def test_target_labels_are_never_read() -> None:
    system = make(small(pseudo=True)).eval()
    a, b = batch(0), batch(1, pseudo=True)
    first = {k: v.item() for k, v in step(system, a, b).items()}
    b.label = torch.full_like(b.label, 3)
    assert first == {k: v.item() for k, v in step(system, a, b).items()}


def test_the_teacher_starts_from_weights_of_its_own_and_follows() -> None:
    system = make(small())
    student, teacher = system.student, system.teacher
    assert teacher is not None
    assert not torch.equal(student.net_3d.main.weight, teacher.net_3d.main.weight)
    mean = (student.net_3d.main.weight + teacher.net_3d.main.weight) / 2
    system.after_step(1)
    assert torch.allclose(teacher.net_3d.main.weight, mean, atol=1e-7)
    again = make(small())
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.parameters(), make(small()).parameters(), strict=True)
    )


def test_prediction_needs_no_teacher() -> None:
    r = small()
    whole, alone = systems.build(r).eval(), systems.build(r, training=False).eval()
    assert alone.teacher is None
    found, b = alone.predict(batch(0)), batch(0)
    for head, p in whole.predict(b).items():
        assert torch.equal(p, found[head])
        assert torch.allclose(p.sum(1), torch.ones(60), atol=1e-5)
    assert tuple(found) == whole.heads


# ---- MMST ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(56, 100), (57, 101), (8, 8)])
def test_fda(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    source, target = torch.rand(2, 3, *size), torch.rand(2, 3, *size) * 0.4
    torch.testing.assert_close(fda(source, source), source, atol=1e-5, rtol=0)
    out, side = fda(source, target), int(0.1 * min(size))
    a, s, t = (torch.fft.fft2(x).abs() for x in (out, source, target))
    h, w = size
    for r in range(
        h
    ):  # slowly, in words: within `side` of a corner the target's amplitude, elsewhere the source's
        for c in range(w):
            low = (r < side or r >= h - side) and (c < side or c >= w - side)
            # Real output needs a symmetric spectrum; for r = side the mirror row lies inside, so
            # look at inner cells.
            if low == ((h - r) % h < side or (h - r) % h >= h - side) * (
                (w - c) % w < side or (w - c) % w >= w - side
            ):
                torch.testing.assert_close(
                    a[..., r, c], (t if low else s)[..., r, c], atol=2e-3, rtol=1e-3
                )
    with pytest.raises(DataError, match="one to one"):
        fda(source, target[:1])


def test_mixup() -> None:
    source, target = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    torch.testing.assert_close(mixup(source, target, 0.95), torch.full_like(source, 0.95))


def voxels(sizes: list[int], reach: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    parts = [
        np.column_stack([np.full(n, b), rng.integers(0, reach, (n, 3))])
        for b, n in enumerate(sizes)
    ]
    return torch.from_numpy(np.concatenate(parts)).int()


def volume(coords: torch.Tensor, b: int) -> float:
    xyz = coords[coords[:, 0] == b, 1:].double()
    return float((xyz.amax(0) - xyz.amin(0)).prod() / len(xyz))


def test_density_transfer() -> None:
    source, target = voxels([500, 900, 300], 1500, 0), voxels([700, 400, 350], 1200, 1)
    out = density_transfer(source, target, 3)
    assert out.dtype == torch.int32 and torch.equal(out[:, 0], source[:, 0])
    for b in range(3):
        assert abs(volume(out, b) / volume(target, b) - 1) < 0.01
        alpha = (volume(source, b) / volume(target, b)) ** (-1 / 3)
        own = source[:, 0] == b
        assert torch.equal(out[own, 1:], (source[own, 1:].double() * alpha).int())
    shuffled = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    assert torch.equal(out, density_transfer(source, target[shuffled], 3))


def test_density_transfer_at_the_edges() -> None:
    sparse, dense = voxels([10], 4000, 0), voxels([5000], 4000, 1)
    grown = density_transfer(dense, sparse, 1)
    assert grown[:, 1:].max() == GRID - 1 and grown.min() >= 0
    flat = dense.clone()
    flat[:, 3] = 7
    for a, b in ((dense, flat), (flat, dense), (dense[:1], dense), (dense, dense[:1])):
        out = density_transfer(a, b, 1)
        assert out.shape == a.shape and out.min() >= 0 and out.max() < GRID


def real_frames() -> Path:
    place = Path(__file__).resolve().parents[1].parent / "shared" / "realdata"
    return Path(os.environ.get("FTD_REALDATA", place))


@pytest.mark.skipif(
    not real_frames().is_dir(), reason=f"REAL FRAMES NOT READ: no {real_frames()}; set FTD_REALDATA"
)
def test_density_transfer_on_real_frames(tmp_path: Path) -> None:
    domain = readers.domains()["skitti"]
    index = prepare(real_frames() / "semantic_kitti", domain, "train", "a2d2_10", None, tmp_path)
    # Without the translation: a factor above 1 would push the source over the grid's border, where
    # it is held.
    crop, rng = Augment(crop=(302, 480), translate=False), np.random.default_rng(0)
    source, target = (
        collate([sample(index.frame(i), crop, domain.flip_axis, rng) for i in order])
        for order in ((0, 1), (1, 0))
    )
    stylised = density_transfer(source.coords, target.coords, 2)
    for b in (0, 1):
        assert abs(volume(stylised, b) / volume(target.coords, b) - 1) < 0.01
