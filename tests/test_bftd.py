"""BFtD: its step as slow loops, who learns from what, its fusion head and its settings."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ftdpp import checkpoint, systems
from ftdpp.recipe import RecipeError
from ftdpp.systems import Chance, bftd
from ftdpp.systems.bftd import FusionHead, look
from ftdpp.systems.ftdpp import fda, mixup, stylise
from ftdpp.tests.commands import exported, ftd, train_args
from ftdpp.tests.test_family import slow_cross_entropy, slow_kl
from ftdpp.tests.test_ftdpp import batch, make, small, step, touched

WEIGHTS = (1.0, 2, 3, 4, 5, 6)
LATE = Chance(0, 9)


def settings(pseudo: bool = False, **change: Any) -> Any:
    return small(method="bftd", pseudo=pseudo, class_weights=WEIGHTS, **change)


@pytest.mark.parametrize("tail", ["sigmoid", "norm"])
def test_a_step_slowly(tail: str) -> None:
    """All terms, the fusion head's imitation at the centre, from the logits of every head."""
    r = settings(True, tail=tail, student_mix=0.9, ce_3d=0.5, seg_fused=0.7, distill_tgt_after=8)
    system, a, b = make(r), batch(0), batch(1, pseudo=True)
    terms = system("all", {"labelled": a, "unlabelled": b}, LATE)

    student, teacher = (system.student, system.fusion), (system.teacher, system.teacher_fusion)
    src, src_f = look(*student, mixup(a.image, b.image, 0.9), a.pixel, a.points)
    tgt, tgt_f = look(*student, b.image, b.pixel, b.points)
    _, coords = stylise(a, b, r, coin=True)
    taught, taught_f = look(*teacher, fda(a.image, b.image, 0.1), a.pixel, coords)
    _, late_f = look(*teacher, b.image, b.pixel, b.points)

    def both(fused: Tensor, logits: Any) -> float:
        return slow_kl(fused, logits.main_2d) + slow_kl(fused, logits.main_3d)

    single = slow_kl(taught.main_2d, src.main_2d) + slow_kl(taught.main_3d, src.main_3d)
    wanted = {
        "seg_2d": slow_cross_entropy(src.main_2d, a.label, WEIGHTS),
        "seg_3d": 0.5 * slow_cross_entropy(src.main_3d, a.label, WEIGHTS),
        "seg_fused": 0.7 * slow_cross_entropy(src_f, a.label, WEIGHTS),
        "mimic_2d_src": slow_kl(src_f, src.mimic_2d),
        "mimic_3d_src": slow_kl(src_f, src.mimic_3d),
        "mimic_2d_tgt": 0.1 * slow_kl(tgt_f, tgt.mimic_2d),
        "mimic_3d_tgt": 0.1 * slow_kl(tgt_f, tgt.mimic_3d),
        "pseudo_2d": 0.1 * slow_cross_entropy(tgt.main_2d, b.pseudo["2d"], (1.0,) * 6),
        "pseudo_3d": 0.1 * slow_cross_entropy(tgt.main_3d, b.pseudo["3d"], (1.0,) * 6),
        "distill_single": 0.1 * single,
        "distill_fused": 1e-3 * both(taught_f, src),
        "distill_tgt": 1e-3 * both(late_f, tgt),
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(wanted, rel=1e-4)


def test_who_gets_gradient_from_what() -> None:
    """The fusion head hears its own cross-entropy alone, and pushes nothing into the trunks."""
    system = make(settings(True, distill_tgt_after=8))
    batches = {"labelled": batch(0), "unlabelled": batch(1, pseudo=True)}
    terms = system("all", batches, LATE)
    main_2d, main_3d = {"net_2d.trunk", "net_2d.main"}, {"net_3d.trunk", "net_3d.main"}
    table = {
        "seg_2d": main_2d,
        "seg_3d": main_3d,
        "seg_fused": set(),
        "mimic_2d_src": {"net_2d.trunk", "net_2d.mimic"},
        "mimic_3d_src": {"net_3d.trunk", "net_3d.mimic"},
        "mimic_2d_tgt": {"net_2d.trunk", "net_2d.mimic"},
        "mimic_3d_tgt": {"net_3d.trunk", "net_3d.mimic"},
        "pseudo_2d": main_2d,
        "pseudo_3d": main_3d,
        "distill_single": main_2d | main_3d,
        "distill_fused": main_2d | main_3d,
        "distill_tgt": main_2d | main_3d,
    }
    assert terms.keys() == table.keys()
    for name, parts in table.items():
        system.zero_grad()
        assert touched(system.student, terms[name]) == parts, name
        heard = any(p.grad is not None and p.grad.any() for p in system.fusion.parameters())
        assert heard == (name == "seg_fused"), name
    for frozen in (system.teacher, system.teacher_fusion):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize(("tail", "parameters"), [("norm", 86_891), ("sigmoid", 114_349)])
def test_fusion_head(tail: str, parameters: int) -> None:
    """As many parameters as the layers that the release describes have; both inputs detached."""
    head = FusionHead(64, 16, 6, tail)
    assert sum(p.numel() for p in head.parameters()) == parameters
    map_2d, feat_3d = (
        torch.randn(1, 64, 5, 5, requires_grad=True),
        torch.randn(9, 16, requires_grad=True),
    )
    frame, pixel = torch.zeros(9, dtype=torch.int64), torch.randint(0, 5, (9, 2))
    out = head(map_2d, feat_3d, frame, pixel)
    assert out.shape == (9, 6)
    out.sum().backward()
    assert map_2d.grad is None and feat_3d.grad is None
    assert not torch.equal(head(map_2d + 1, feat_3d, frame, pixel), out), "but both are read"
    assert not torch.equal(head(map_2d, feat_3d + 1, frame, pixel), out)


@pytest.mark.parametrize("tail", ["norm", "sigmoid"])
def test_fusion_head_layer_by_layer(tail: str) -> None:
    torch.manual_seed(0)
    head = FusionHead(16, 8, 6, tail).eval()
    map_2d, feat_3d = torch.randn(1, 16, 5, 5), torch.randn(9, 8)
    pixel = torch.randint(0, 5, (9, 2))
    x2 = head.cbam(map_2d, torch.zeros(9, dtype=torch.int64), pixel)
    x = torch.cat([head.attend_2d(x2) + x2, head.attend_3d(feat_3d) + feat_3d], 1)
    first, second = (layer for layer in head.mix if isinstance(layer, torch.nn.Linear))
    x = second(first(x).relu())
    x = x.relu() if tail == "sigmoid" else x
    x = head.attend(x) + x
    linear = [layer for layer in head.classify if isinstance(layer, torch.nn.Linear)]
    if tail == "sigmoid":
        wanted = linear[2](linear[1](linear[0](x).relu()).sigmoid())
    else:
        wanted = linear[1](head.classify[1](linear[0](x)).relu())
    found = head(map_2d, feat_3d, torch.zeros(9, dtype=torch.int64), pixel)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_the_extra_term_comes_late() -> None:
    """After iteration 80,000 of usa-singapore: counted from 0, the first one is 80,001."""
    system = make(settings(distill_tgt_after=8))
    batches = {"labelled": batch(0), "unlabelled": batch(1)}
    for iteration in (0, 8, 9):
        terms = system("all", batches, Chance(0, iteration))
        assert ("distill_tgt" in terms) == (iteration == 9)
    r = systems.recipe("usa-singapore", "bftd")
    assert (r.distill_tgt, r.distill_tgt_after, r.steps) == (1e-3, 80_000, 100_000)
    assert systems.recipe("day-night", "bftd").distill_tgt == 0
    assert systems.recipe("usa-singapore", "bftd", "small").distill_tgt_after < 960


def test_coefficients() -> None:
    """Rows: student_mix, tail, mimicry on source and target, extra term; DPD and rates are one."""
    table = {
        "usa-singapore": (0.99, "sigmoid", 1.0, 0.1, 1e-3, 8),
        "day-night": (0.8, "norm", 1.0, 0.1, 0, 8),
        "vkitti-skitti": (0.95, "sigmoid", 0.1, 0.01, 0, 4),
        "a2d2-skitti": (0.95, "sigmoid", 0.1, 0.01, 0, 4),
    }
    for scenario, row in table.items():
        r = systems.recipe(scenario, "bftd", pseudo=True)
        found = r.student_mix, r.tail, r.mimic_src, r.mimic_tgt, r.distill_tgt, r.batch
        assert found == row, scenario
        assert (r.distill_single, r.distill_fused, r.pseudo, r.pseudo_debias) == (
            *(0.1, 1e-3, 0.1),
            False,
        )
        assert (r.teacher_image, r.lr_2d, r.lr_3d, r.steps) == ("fda", 1e-3, 1e-3, 100_000)
        assert (r.milestones, r.gamma, r.ce_3d, r.seg_fused) == ((80_000, 90_000), 0.1, 1, 1)


@pytest.mark.parametrize(("scenario", "setting", "why"), [
    ("usa-singapore", "fusion=true", "does not read it: its fusion head stands apart"),
    ("day-night", "distill_tgt_after=5", "distill_tgt is 0"),
    ("usa-singapore", "distill_tgt_after=-1", "must not be negative"),
    ("usa-singapore", "tail=relu", "tail must be sigmoid or norm"),
    ("usa-singapore", "width_3d=12", "has to|have to share"),
    ("usa-singapore-ssda", "batch=2", "no semi-supervised form"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(scenario: str, setting: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        systems.recipe(scenario, "bftd", overrides=[setting])


def test_a_term_that_would_never_come_is_refused() -> None:
    with pytest.raises(RecipeError, match="ends before"):
        systems.recipe("day-night", "bftd", overrides=["distill_tgt=0.1", "steps=80000"])
    assert systems.recipe("day-night", "bftd", overrides=["distill_tgt=0.1"]).distill_tgt == 0.1


def test_without_a_teacher() -> None:
    none = {"distill_single": 0.0, "distill_fused": 0.0, "distill_tgt": 0.0}
    system = make(settings(**none))
    assert system.teacher is None and system.teacher_fusion is None
    terms = step(system, batch(0), batch(1))
    assert not any(name.startswith("distill") for name in terms)
    system.after_step(1)


def test_the_teacher_follows() -> None:
    system = make(settings())
    fusion, teacher = system.fusion.classify[-1].weight, system.teacher_fusion.classify[-1].weight
    assert not torch.equal(fusion, teacher), "it starts from weights of its own"
    mean = (fusion + teacher) / 2
    before = (system.student.net_3d.main.weight + system.teacher.net_3d.main.weight) / 2
    system.after_step(1)
    assert torch.allclose(teacher, mean, atol=1e-7)
    assert torch.allclose(system.teacher.net_3d.main.weight, before, atol=1e-7)


def test_prediction() -> None:
    """2D+3D is the fusion head; no teacher is needed."""
    r = settings()
    whole, alone = systems.build(r).eval(), systems.build(r, training=False).eval()
    assert alone.teacher is None and alone.teacher_fusion is None
    b = batch(0)
    found = alone.predict(b)
    logits, fused = look(alone.student, alone.fusion, b.image, b.pixel, b.points)
    wanted = {"2d": logits.main_2d, "3d": logits.main_3d, "2d+3d": fused}
    assert tuple(found) == whole.heads
    for head, p in whole.predict(b).items():
        assert torch.equal(p, found[head])
        assert torch.allclose(p, wanted[head].softmax(1))
    sees_the_image_alone = whole.camera_network()
    assert torch.equal(sees_the_image_alone["head.weight"], whole.student.net_2d.main.weight)


def test_learning_rates() -> None:
    r = settings()
    rates = {g["name"]: g["lr"] for g in make(r).optimizers()["all"].param_groups}
    assert rates == {"2d": r.lr_2d, "3d": r.lr_3d, "fusion": r.lr_3d}


def test_it_trains_in_both_stages(world: Path, cache: Path, tmp_path: Path) -> None:
    first, second, labels = tmp_path / "first", tmp_path / "second", tmp_path / "pl.safetensors"
    where = ("--cache", cache, "--threads", 1)
    early = ("--set", "distill_tgt_after=0")
    for command in (
        train_args(first, world, cache, *early, method="bftd", steps=2),
        ("pseudo", first, "--out", labels, *where),
        train_args(second, world, cache, *early, "--pseudo", labels, method="bftd", steps=2),
    ):
        result = ftd(*command)
        assert result.exit_code == 0, result.output
    stages = []
    for run in (first, second):
        rows = list(csv.DictReader((run / "log.csv").read_text().splitlines()))
        assert all(math.isfinite(float(row["seg_fused"])) for row in rows)
        stages.append(rows)
    assert float(stages[0][1]["distill_tgt"]) > 0
    assert stages[1][0].keys() - stages[0][0].keys() == {"pseudo_2d", "pseudo_3d"}
    there = ("--data", world, "--domain", "singapore", *where)
    score = exported(first, tmp_path / "out.safetensors", *there)
    assert set(score["miou"]) == {"2d", "3d", "2d+3d"}
    system, _ = checkpoint.load(tmp_path / "out.safetensors")
    assert isinstance(system, bftd.System) and system.teacher_fusion is None
