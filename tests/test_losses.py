"""Losses restated as slow loops, recipes, and what reaches which gradient."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ftdpp import losses
from ftdpp.data import IGNORE, Batch
from ftdpp.models import CrossModal, Logits


def probs(row: Tensor) -> list[float]:
    e = [math.exp(v) for v in row.tolist()]
    return [v / sum(e) for v in e]


def kl(t: list[float], s: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(t, s, strict=True))


@pytest.fixture
def logits() -> Logits:
    torch.manual_seed(0)
    return Logits(*(torch.randn(13, 6, dtype=torch.float64, requires_grad=True) for _ in range(4)))


@pytest.mark.parametrize("weighted", [True, False])
def test_cross_entropy(logits: Logits, weighted: bool) -> None:
    label = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, IGNORE, IGNORE, 2, 2, 5])
    weight = torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64) if weighted else None
    total = norm = 0.0
    for row, y in zip(logits.main_2d, label.tolist(), strict=True):
        if y != IGNORE:
            w = float(weight[y]) if weight is not None else 1.0
            total -= w * math.log(probs(row)[y])
            norm += w
    assert losses.cross_entropy(logits.main_2d, label, weight).item() == pytest.approx(total / norm, rel=1e-12)


def test_cross_entropy_without_labels(logits: Logits) -> None:
    out = losses.cross_entropy(logits.main_2d, torch.full((13,), IGNORE))
    assert out.item() == 0
    (grad,) = torch.autograd.grad(out, logits.main_2d)
    assert not grad.any()


def test_mimicry(logits: Logits) -> None:
    two, three = losses.mimicry(logits)
    rows = [[probs(r) for r in part] for part in logits]
    assert two.item() == pytest.approx(sum(kl(t, s) for t, s in zip(rows[1], rows[2], strict=True)) / 13, rel=1e-10)
    assert three.item() == pytest.approx(sum(kl(t, s) for t, s in zip(rows[0], rows[3], strict=True)) / 13, rel=1e-10)
    grads = torch.autograd.grad(two + three, list(logits), allow_unused=True)
    assert [g is None for g in grads] == [True, True, False, False], "the main heads are teachers: no gradient reaches them"


def test_domain_distillation(logits: Logits) -> None:
    torch.manual_seed(1)
    teacher = Logits(*(torch.randn(13, 6, dtype=torch.float64) for _ in range(4)))
    single, fused = losses.domain_distillation(teacher, logits)
    want_single = want_fused = 0.0
    for i in range(13):
        t2, t3 = probs(teacher.main_2d[i]), probs(teacher.main_3d[i])
        s2, s3 = probs(logits.main_2d[i]), probs(logits.main_3d[i])
        both = probs(torch.tensor([a + b for a, b in zip(t2, t3, strict=True)], dtype=torch.float64))
        want_single += kl(t2, s2) + kl(t3, s3)
        want_fused += kl(both, s2) + kl(both, s3)
    assert single.item() == pytest.approx(want_single / 13, rel=1e-10)
    assert fused.item() == pytest.approx(want_fused / 13, rel=1e-10)


@pytest.mark.parametrize(("classes", "ceiling"), [(5, 0.649), (6, 0.596), (10, 0.451)])
def test_fused_target_is_a_double_softmax(classes: int, ceiling: float) -> None:
    sure = torch.full((1, classes), -1e4)
    sure[0, 0] = 0
    student = torch.zeros(1, classes, requires_grad=True)
    _, fused = losses.domain_distillation(Logits(sure, sure, sure, sure), Logits(student, student, student, student))
    (grad,) = torch.autograd.grad(fused, student)  # d KL(t || softmax(s)) / ds = softmax(s) - t, twice
    assert (1 / classes - grad[0, 0].item() / 2) == pytest.approx(ceiling, abs=5e-4)


def test_log_smoothed_weights() -> None:
    counts = [10, 1000, 0]
    w = losses.log_smoothed_weights(counts)
    raw = [math.log(5 * 1010 / n) for n in (10, 1000, 1)]
    assert w == pytest.approx([r / raw[1] for r in raw])


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_recipes_of_all_rows() -> None:
    for scenario in losses.SCENARIOS:
        for method in losses.METHODS:
            if scenario.endswith("-ssda") and method in losses.NOT_SEMI_SUPERVISED:
                with pytest.raises(losses.RecipeError, match="no semi-supervised form"):
                    losses.recipe(scenario, method)
                continue
            for preset in losses.PRESETS:
                r = losses.recipe(scenario, method, preset, pseudo=True)
                assert r.pseudo == 1.0
                assert losses.uses_teacher(r) == (method == "ftdpp")


def test_coefficients_of_ftdpp() -> None:
    """The table of effective coefficients, and the six switches between the released scripts."""
    table = {
        "usa-singapore": (1, 1.0, 0.1, 0.1, 0.01, True, 1e-4, "coin", 1.0, 60_000, 1.0),
        "day-night": (1, 1.0, 0.1, 0.1, 0.01, True, 1e-3, "fda", 0.8, 100_000, 0.1),
        "vkitti-skitti": (0.1, 0.1, 0.02, 0.01, 0.001, False, 1e-4, "coin", 1.0, 60_000, 0.1),
        "a2d2-skitti": (1, 0.1, 0.02, 0.01, 0.001, True, 1e-4, "fda", 0.95, 200_000, 0.1),
        "usa-singapore-ssda": (1, 1.0, 0.1, 0.1, 0.01, True, 1e-4, "coin", 1.0, 100_000, 1.0),
        "a2d2-skitti-ssda": (1, 0.1, 0.02, 0.01, 0.001, True, 1e-4, "fda", 0.95, 200_000, 0.1),
    }
    for scenario, row in table.items():
        r = losses.recipe(scenario)
        found = (r.ce_3d, r.mimic_src, r.mimic_tgt, r.distill_single, r.distill_fused, r.pseudo_debias, r.lr_2d, r.teacher_image)
        assert (*found, r.student_mix, r.steps, r.gamma) == row, scenario


def test_overrides_are_typed_and_misspellings_refused() -> None:
    make = lambda *o: losses.recipe("usa-singapore", overrides=o)  # noqa: E731
    r = make("lr=5e-4", "batch=2", "milestones=10,20", "pseudo_debias=false", "image=96,160")
    assert (r.lr, r.batch, r.milestones, r.pseudo_debias, r.image) == (5e-4, 2, (10, 20), False, (96, 160))
    for bad, hint in (
        ("lr_2D=1", "did you mean 'lr_2d'"),
        ("lr=fast", "expected float"),
        ("lr", "name=value"),
        ("batch=0", "at least 1"),
        ("batch=2.5", "expected int"),
        ("lr=nan", "expected float"),
        ("pseudo_debias=maybe", "expected bool"),
        ("method=x", "unknown setting"),
    ):
        with pytest.raises(losses.RecipeError, match=hint):
            make(bad)
    with pytest.raises(losses.RecipeError, match="did you mean 'usa-singapore'"):
        losses.recipe("usa-singapor")


# ---- the step --------------------------------------------------------------------------------------------------------


def batch(seed: int, pseudo: bool = False) -> Batch:
    g = torch.Generator().manual_seed(seed)
    n = 60
    frame = torch.arange(2).repeat_interleave(n // 2)
    coords = torch.cat([frame[:, None], torch.randint(0, 40, (n, 3), generator=g)], 1).int()
    pixel = torch.stack([torch.randint(0, 20, (n,), generator=g), torch.randint(0, 33, (n,), generator=g)], 1)
    labels = [torch.randint(0, 6, (n,), generator=g) for _ in range(3)]
    labels[1][::3] = IGNORE
    return Batch(
        torch.rand(2, 3, 20, 33, generator=g),
        pixel,
        coords,
        labels[0],
        ["a", "b"],
        [torch.arange(n // 2)] * 2,
        [n // 2] * 2,
        *(labels[1:] if pseudo else (None, None)),
    )


def small(scenario: str = "usa-singapore", method: str = "ftdpp", pseudo: bool = False, **change: Any) -> losses.Recipe:
    r = losses.recipe(scenario, method, "small", pseudo, ["width=16", "m=8"])
    weights: dict[str, Any] = {"class_weights": (1.0,) * 6, "class_weights_tgt": (2.0,) * 6 if r.supervised == "both" else ()}
    return dataclasses.replace(r, **{**weights, **change})


def model(r: losses.Recipe, seed: int = 0) -> CrossModal:
    torch.manual_seed(seed)
    return CrossModal(6, r.width, r.m, r.fusion, (0.0, 0.0)).train()


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
        if any(p.grad is not None and p.grad.abs().sum() > 0 for k, p in net.named_parameters() if k.startswith(part))
    }


def test_who_gets_gradient_from_what() -> None:
    """The table of gradient flow: fusion hears only the main 2D head, mimicry heads never move the other modality."""
    r = small(pseudo=True, pseudo_debias=False)
    net, teacher = model(r), model(r, 1).requires_grad_(False)
    terms = losses.step(net, teacher, batch(0), batch(1, pseudo=True), r, coin=True)
    main_2d = {"net_2d.trunk", "net_2d.fused_in", "net_2d.fused_out", "net_2d.main", "fusion"}
    table = {
        "seg_2d": main_2d, "seg_3d": {"net_3d.trunk", "net_3d.main"},
        "mimic_2d_src": {"net_2d.trunk", "net_2d.mimic"}, "mimic_3d_src": {"net_3d.trunk", "net_3d.mimic"},
        "mimic_2d_tgt": {"net_2d.trunk", "net_2d.mimic"}, "mimic_3d_tgt": {"net_3d.trunk", "net_3d.mimic"},
        "pseudo_2d": main_2d, "pseudo_3d": {"net_3d.trunk", "net_3d.main"},
        "distill_single": main_2d | {"net_3d.trunk", "net_3d.main"}, "distill_fused": main_2d | {"net_3d.trunk", "net_3d.main"},
    }  # fmt: skip
    assert terms.keys() == table.keys()
    for name, parts in table.items():
        assert touched(net, terms[name]) == parts, name
    assert all(p.grad is None for p in teacher.parameters())


def test_trust_factor_pushes_the_mimicry_up() -> None:
    """Released: exp(-KL) is not detached, so the pseudo-label loss lowers itself by raising KL. pseudo_detach stops that."""
    r = small(pseudo=True, pseudo_detach=False)
    net, teacher = model(r), model(r, 1)
    a, b = batch(0), batch(1, pseudo=True)
    terms = losses.step(net, teacher, a, b, r, False)
    parts = touched(net, terms["pseudo_2d"])
    assert "net_2d.mimic" in parts
    pseudo_grad = torch.autograd.grad(terms["pseudo_2d"], net.net_2d.mimic.weight, retain_graph=True)[0]
    mimic_grad = torch.autograd.grad(terms["mimic_2d_tgt"], net.net_2d.mimic.weight)[0]
    assert torch.cosine_similarity(pseudo_grad.flatten(), mimic_grad.flatten(), 0) < -0.999
    detached = losses.step(net, teacher, a, b, dataclasses.replace(r, pseudo_detach=True), False)
    assert "net_2d.mimic" not in touched(net, detached["pseudo_2d"])


@pytest.mark.parametrize(("method", "names"), [
    ("source-only", {"seg_2d", "seg_3d"}), ("target-only", {"seg_2d", "seg_3d"}),
    ("xmuda", {"seg_2d", "seg_3d", "mimic_2d_src", "mimic_3d_src", "mimic_2d_tgt", "mimic_3d_tgt"}),
])  # fmt: skip
def test_terms_of_the_baselines(method: str, names: set[str]) -> None:
    r = small(method=method)
    terms = losses.step(model(r), None, batch(0), batch(1) if losses.uses_target(r) else None, r, False)
    assert terms.keys() == names


def test_semi_supervised_loss_is_the_mean_of_two_halves() -> None:
    r = small("usa-singapore-ssda", class_weights=(1.0, 2, 3, 4, 5, 6), class_weights_tgt=(6.0, 5, 4, 3, 2, 1))
    b, logits = batch(0), torch.randn(60, 6)
    found = losses.supervised_loss(logits, b, torch.tensor(r.class_weights), torch.tensor(r.class_weights_tgt))
    halves = [losses.cross_entropy(logits[:30], b.label[:30], torch.tensor(r.class_weights)),
              losses.cross_entropy(logits[30:], b.label[30:], torch.tensor(r.class_weights_tgt))]  # fmt: skip
    assert found.item() == pytest.approx(0.5 * sum(h.item() for h in halves), rel=1e-6)


def test_target_labels_are_never_read() -> None:
    r = small(pseudo=True)
    net, teacher = model(r), model(r, 1)
    a, b = batch(0), batch(1, pseudo=True)
    first = {k: v.item() for k, v in losses.step(net.eval(), teacher.eval(), a, b, r, True).items()}
    b.label = torch.full_like(b.label, 3)
    assert first == {k: v.item() for k, v in losses.step(net, teacher, a, b, r, True).items()}
