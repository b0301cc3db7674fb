"""xMUDA and the baselines: losses as slow loops, the matrix logarithm, which frames are learnt."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ftdpp import checkpoint, compare, systems
from ftdpp.data import IGNORE, Batch, join
from ftdpp.recipe import RecipeError
from ftdpp.systems import family, ftdpp
from ftdpp.systems.family import RIDGE, MatrixLog, entropy, log_coral
from ftdpp.systems.ftdpp import fda
from ftdpp.tests.commands import ftd, train_args, words
from ftdpp.tests.test_ftdpp import COIN, batch, kl, make, probs, small, step, touched


def slow_cross_entropy(logits: Tensor, label: Tensor, weight: tuple[float, ...]) -> float:
    total = norm = 0.0
    for row, y in zip(logits, label.tolist(), strict=True):
        if y != IGNORE:
            total -= weight[y] * math.log(probs(row)[y])
            norm += weight[y]
    return total / norm


def slow_kl(teacher: Tensor, student: Tensor) -> float:
    pairs = zip(teacher, student, strict=True)
    return sum(kl(probs(t), probs(s)) for t, s in pairs) / len(teacher)


def slow_entropy(logits: Tensor) -> float:
    total = 0.0
    for row in logits:
        total -= sum(p * math.log(p, len(row)) for p in probs(row))
    return total / len(logits)


def slow_log_covariance(x: Tensor) -> np.ndarray:
    n, d = x.shape
    rows = x.tolist()
    mean = [sum(row[i] for row in rows) / n for i in range(d)]
    c = np.zeros((d, d))
    for row in rows:
        for i in range(d):
            for j in range(d):
                c[i, j] += (row[i] - mean[i]) * (row[j] - mean[j]) / (n - 1)
    values, vectors = np.linalg.eigh(c + RIDGE * np.eye(d))
    log = np.zeros((d, d))
    for w, v in zip(values, vectors.T, strict=True):
        log += math.log(w) * np.outer(v, v)
    return log


def slow_log_coral(source: Tensor, target: Tensor) -> float:
    d = source.shape[1]
    a, b = slow_log_covariance(source), slow_log_covariance(target)
    return sum((a[i, j] - b[i, j]) ** 2 for i in range(d) for j in range(d)) / d**2


# ---- the losses ----------------------------------------------------------------------------------


def test_entropy() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(13, 6, dtype=torch.float64, requires_grad=True)
    assert entropy(logits).item() == pytest.approx(slow_entropy(logits), rel=1e-12)
    assert torch.autograd.gradcheck(entropy, logits)
    assert entropy(torch.zeros(4, 5)).item() == pytest.approx(1)
    sure = torch.tensor([[1e4, 0, 0]], requires_grad=True)
    entropy(sure).backward()
    assert sure.grad is not None and sure.grad.isfinite().all()
    assert entropy(logits[:0]).item() == 0


def rotated(*values: float) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    torch.manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize("values", [
    (0.3, 1.0, 2.0, 7.0), (2.0, 2.0, 2.0, 2.0), (1.0, 1.0, 3.0, 3.0), (0.5, 0.5 + 1e-9, 1.0, 4.0),
    (1e-3, 1e-3, 1e-3, 5.0), (0.7,),
])  # fmt: skip
def test_matrix_log(values: tuple[float, ...]) -> None:
    matrix = rotated(*values).requires_grad_()
    log = MatrixLog.apply(matrix)
    assert torch.allclose(torch.matrix_exp(log), matrix, rtol=1e-10, atol=1e-10)
    # In steps that are small beside the smallest eigenvalue, also off the symmetric matrices.
    assert torch.autograd.gradcheck(MatrixLog.apply, matrix, eps=1e-7, atol=1e-4, rtol=1e-4)
    skew = torch.triu(torch.full_like(matrix, 0.1), 1)
    assert torch.allclose(MatrixLog.apply(matrix + skew - skew.T), log)


def test_why_the_matrix_log_has_a_gradient_of_its_own() -> None:
    """Through `eigh`, equal eigenvalues divide by zero."""
    plain, ours = (rotated(2.0, 2.0, 5.0).diagonal().diag().requires_grad_() for _ in range(2))
    equal = torch.diag(torch.tensor([2.0, 2.0, 5.0], dtype=torch.float64))
    with torch.no_grad():
        plain.copy_(equal), ours.copy_(equal)
    values, vectors = torch.linalg.eigh(plain)
    direction = torch.tensor([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]], dtype=torch.float64)
    ((vectors * values.log()) @ vectors.T * direction).sum().backward()
    assert plain.grad is not None and not plain.grad.isfinite().all()
    (MatrixLog.apply(ours) * direction).sum().backward()
    between = math.log(5 / 2) / (5 - 2)  # the divided difference of 2 and 5
    wanted = [[0.5, 1, 3 * between], [1, 2, 5 * between], [3 * between, 5 * between, 6 / 5]]
    assert ours.grad is not None
    assert torch.allclose(ours.grad, torch.tensor(wanted, dtype=torch.float64))


def test_log_coral() -> None:
    torch.manual_seed(0)
    mix = torch.randn(5, 5, dtype=torch.float64)
    source = torch.randn(17, 5, dtype=torch.float64, requires_grad=True)
    target = (torch.randn(11, 5, dtype=torch.float64) @ mix + 3).requires_grad_()
    found = log_coral(source, target)
    assert found.item() == pytest.approx(slow_log_coral(source, target), rel=1e-9)
    assert torch.autograd.gradcheck(log_coral, (source, target))
    assert log_coral(source, source + 2).item() == pytest.approx(0, abs=1e-20), "not of the mean"
    assert log_coral(source.float(), target.float()).dtype == torch.float32


def test_log_coral_of_dead_channels_and_few_points() -> None:
    torch.manual_seed(0)
    source, target = (torch.randn(9, 6).requires_grad_() for _ in range(2))
    dead = torch.tensor([1.0, 1, 0, 0, 0, 1])
    grads = torch.autograd.grad(log_coral(source * dead, target * dead), (source, target))
    assert all(g.isfinite().all() and g.any() for g in grads)
    for n in (0, 1):
        out = log_coral(source[:n], target)
        assert out.item() == 0
        out.backward()
    assert log_coral(source * math.nan, target).isnan(), "for the loop to name"


# ---- the steps -----------------------------------------------------------------------------------

WEIGHTS = (1.0, 2, 3, 4, 5, 6)
SEG = {"seg_2d", "seg_3d"}


def views(system: Any, *batches: Batch) -> list[ftdpp.Logits]:
    return [system.student(b.image, b.pixel, b.points) for b in batches]


def test_xmuda_slowly() -> None:
    """Every term of a step: CE on the source, KL from each main head to the other's mimicry."""
    r = small(method="xmuda", pseudo=True, class_weights=WEIGHTS)
    assert (r.mimic_src, r.mimic_tgt, r.pseudo) == (1.0, 0.1, 1.0)
    system, a, b = make(r), batch(0), batch(1, pseudo=True)
    terms, (src, tgt) = step(system, a, b), views(system, a, b)
    wanted = {
        "seg_2d": slow_cross_entropy(src.main_2d, a.label, WEIGHTS),
        "seg_3d": slow_cross_entropy(src.main_3d, a.label, WEIGHTS),
        "mimic_2d_src": slow_kl(src.main_3d, src.mimic_2d),
        "mimic_3d_src": slow_kl(src.main_2d, src.mimic_3d),
        "mimic_2d_tgt": 0.1 * slow_kl(tgt.main_3d, tgt.mimic_2d),
        "mimic_3d_tgt": 0.1 * slow_kl(tgt.main_2d, tgt.mimic_3d),
        "pseudo_2d": slow_cross_entropy(tgt.main_2d, b.pseudo["2d"], (1.0,) * 6),
        "pseudo_3d": slow_cross_entropy(tgt.main_3d, b.pseudo["3d"], (1.0,) * 6),
    }
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(wanted, rel=1e-4)


def test_pl_is_source_only_with_its_second_stage() -> None:
    """Cross-entropy of pseudo-labels beside the source's, weight 1, without class weights."""
    r = small(method="source-only", pseudo=True, class_weights=WEIGHTS)
    system, a, b = make(r), batch(0), batch(1, pseudo=True)
    terms, (_, tgt) = step(system, a, b), views(system, a, b)
    assert terms.keys() == SEG | {"pseudo_2d", "pseudo_3d"}
    wanted = slow_cross_entropy(tgt.main_2d, b.pseudo["2d"], (1.0,) * 6)
    assert terms["pseudo_2d"].item() == pytest.approx(wanted, rel=1e-4)
    assert touched(system.student, terms["pseudo_2d"]) == {"net_2d.trunk", "net_2d.main"}
    assert touched(system.student, terms["pseudo_3d"]) == {"net_3d.trunk", "net_3d.main"}
    jobs = compare.plan("usa-singapore", "source-only+pl", "0", "small", [], Path("runs"))
    assert [job.title for job in jobs] == ["source-only", "source-only+pl"]
    assert [job.recipe.pseudo for job in jobs] == [0, 1]


def test_xmossda_weights_pseudo_labels_by_class() -> None:
    """With --ssda the second stage has the labelled target's class weights, as released."""
    assert systems.recipe("usa-singapore-ssda", "xmuda", pseudo=True).pseudo_weighted
    r = small("usa-singapore-ssda", "xmuda", pseudo=True, class_weights_tgt=WEIGHTS)
    system, a, b, c = make(r), batch(0), batch(1, pseudo=True), batch(2)
    terms = system("all", {"labelled": a, "labelled_tgt": c, "unlabelled": b}, COIN)
    [tgt] = views(system, b)
    for name, logits in (("2d", tgt.main_2d), ("3d", tgt.main_3d)):
        wanted = slow_cross_entropy(logits, b.pseudo[name], WEIGHTS)
        assert terms[f"pseudo_{name}"].item() == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(RecipeError, match="weighted by class or debiased"):
        systems.recipe("usa-singapore-ssda", "xmuda", pseudo=True, overrides=["pseudo_debias=true"])


def test_minent_slowly() -> None:
    r = small(method="minent", entropy=0.5)
    system, a, b = make(r), batch(0), batch(1)
    terms, (_, tgt) = step(system, a, b), views(system, a, b)
    assert terms.keys() == SEG | {"entropy_2d", "entropy_3d"}
    for name, logits in (("2d", tgt.main_2d), ("3d", tgt.main_3d)):
        assert terms[f"entropy_{name}"].item() == pytest.approx(
            0.5 * slow_entropy(logits), rel=1e-5
        )
        parts = {f"net_{name}.trunk", f"net_{name}.main"}
        assert touched(system.student, terms[f"entropy_{name}"]) == parts


def features(system: Any, b: Batch) -> tuple[Tensor, Tensor]:
    """What stands before the heads, found by the heads' own weights being an identity."""
    net = system.student
    saved = {}
    for name, part in (("2d", net.net_2d), ("3d", net.net_3d)):
        saved[name], part.main = part.main, torch.nn.Identity()
        part.main.weight = saved[name].weight
    out = net(b.image, b.pixel, b.points)
    net.net_2d.main, net.net_3d.main = saved["2d"], saved["3d"]
    return out.main_2d, out.main_3d


@pytest.mark.parametrize("ssda", [False, True])
def test_logcoral_slowly(ssda: bool) -> None:
    """Source against unlabelled target; labelled target frames are not of the source."""
    scenario = "usa-singapore-ssda" if ssda else "usa-singapore"
    system = make(small(scenario, "logcoral", logcoral=2.0))
    a, b, c = batch(0), batch(1), batch(2)
    batches = {"labelled": a, "unlabelled": b} | ({"labelled_tgt": c} if ssda else {})
    terms = system("all", batches, COIN)
    assert terms.keys() == SEG | {"logcoral_2d", "logcoral_3d"}
    whole = join([a, c]) if ssda else a
    for i, name in enumerate(("2d", "3d")):
        source, target = features(system, whole)[i][: len(a.label)], features(system, b)[i]
        wanted = 2 * slow_log_coral(source.double(), target.double())
        assert terms[f"logcoral_{name}"].item() == pytest.approx(wanted, rel=1e-3)
        assert touched(system.student, terms[f"logcoral_{name}"]) == {f"net_{name}.trunk"}
    heads = system.student.net_2d.main, system.student.net_3d.main
    assert not any(head._forward_pre_hooks for head in heads), "nothing is left to watch"


def test_fda_is_source_only_on_images_in_the_target_s_style() -> None:
    a, b = batch(0), batch(1)
    terms = step(make(small(method="fda")), a, b)
    styled = dataclasses.replace(a, image=fda(a.image, b.image, 0.1))
    plain = make(small(method="source-only"))
    wanted = step(plain, styled)
    assert terms.keys() == SEG
    assert {n: t.item() for n, t in terms.items()} == {n: t.item() for n, t in wanted.items()}
    assert terms["seg_2d"].item() != step(plain, a)["seg_2d"].item()


# ---- which frames --------------------------------------------------------------------------------


def places_of(scenario: str, method: str, pseudo: bool = False) -> dict[str, tuple[str, str]]:
    r = systems.recipe(scenario, method, "small", pseudo)
    streams = systems.system_of(method, scenario).streams(r)
    return {name: (stream.side, stream.split) for name, stream in streams.items()}


def test_which_frames_each_method_learns_from() -> None:
    source, rest = ("src", "train"), ("tgt", "train_unlabelled")
    few = {"labelled_tgt": ("tgt", "train_labelled")}
    both = {"labelled": source, **few}
    for method in ("minent", "logcoral", "fda", "xmuda"):
        wanted = {"labelled": source, "unlabelled": ("tgt", "train")}
        assert places_of("usa-singapore", method) == wanted
    for method in ("minent", "logcoral", "xmuda"):
        assert places_of("usa-singapore-ssda", method) == {**both, "unlabelled": rest}
    assert places_of("usa-singapore-ssda", "source-target") == both
    assert places_of("usa-singapore-ssda", "source-target", True) == {**both, "unlabelled": rest}
    only = {"labelled": ("tgt", "train_labelled")}
    assert places_of("usa-singapore-ssda", "target-only") == only
    assert places_of("usa-singapore-ssda", "target-only", True) == {**only, "unlabelled": rest}
    assert places_of("usa-singapore", "target-only") == {"labelled": ("tgt", "train")}


def test_source_target_is_semi_supervised_only() -> None:
    with pytest.raises(RecipeError, match="needs labelled frames of the target; add --ssda"):
        systems.recipe("usa-singapore", "source-target")
    assert "source-target" not in systems.methods_for("usa-singapore")
    table = ["target-only", "source-target", "logcoral", "minent", "xmuda", "ftdpp"]
    assert set(systems.methods_for("usa-singapore-ssda")) == set(table), "the paper's Table V"


@pytest.mark.parametrize(("method", "setting", "why"), [
    ("xmuda", "entropy=0.1", "minent does"),
    ("minent", "logcoral=0.1", "logcoral does"),
    ("source-only", "student_fda=0.1", "fda changes it"),
    ("minent", "pseudo_weighted=true", "no pseudo-labels beside labelled target frames"),
    ("minent", "mimic_tgt=0.1", "no mimicry"),
])  # fmt: skip
def test_settings_of_others_are_refused(method: str, setting: str, why: str) -> None:
    with pytest.raises(RecipeError, match=f"{method} does not read it.*{why}"):
        systems.recipe("usa-singapore", method, overrides=[setting])


def test_weights_and_their_sources() -> None:
    """ADVENT's for the entropy; the schedule of xMUDA's release for all."""
    for method, name, value in (
        ("minent", "entropy", 0.001),
        ("logcoral", "logcoral", 1.0),
        ("fda", "student_fda", 0.1),
    ):
        r = systems.recipe("a2d2-skitti", method)
        assert getattr(r, name) == value
        assert (r.lr_2d, r.steps, r.batch, r.fusion) == (1e-3, 100_000, 8, False)
    for settings in (["entropy=-1"], ["entropy=0.1", "student_fda=2"]):
        with pytest.raises(RecipeError):
            systems.recipe("usa-singapore", "minent", overrides=settings)


# ---- the commands --------------------------------------------------------------------------------


def terms_of(run: Path) -> set[str]:
    """The terms that a run logged, all finite."""
    rows = list(csv.DictReader((run / "log.csv").read_text().splitlines()))
    assert len(rows) == 2
    names = {name for name in rows[0] if name.rpartition("_")[2] in ("2d", "3d")}
    assert all(math.isfinite(float(row[name])) for row in rows for name in names)
    return names


@pytest.mark.parametrize(("method", "more"), [
    ("minent", {"entropy_2d", "entropy_3d"}), ("logcoral", {"logcoral_2d", "logcoral_3d"}),
    ("fda", set()),
])  # fmt: skip
def test_it_trains(method: str, more: set[str], world: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = ftd(*train_args(out, world, cache, method=method, steps=2))
    assert result.exit_code == 0, result.output
    assert terms_of(out) == SEG | more
    system, meta = checkpoint.load(out / "last.safetensors")
    assert isinstance(system, family.System) and meta["recipe"]["method"] == method


@pytest.mark.parametrize(("method", "more"), [
    ("source-target", set()), ("target-only", set()), ("minent", {"entropy_2d", "entropy_3d"}),
    ("logcoral", {"logcoral_2d", "logcoral_3d"}),
])  # fmt: skip
def test_it_trains_semi_supervised(
    method: str, more: set[str], world: Path, cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = ftd(*train_args(out, world, cache, "--ssda", method=method, steps=2))
    assert result.exit_code == 0, result.output
    assert terms_of(out) == SEG | more
    assert ("usa train:" in words(result)) == (method != "target-only")
    assert "singapore train_labelled:" in words(result)


def test_pl_trains(world: Path, cache: Path, tmp_path: Path) -> None:
    first, second, labels = tmp_path / "first", tmp_path / "second", tmp_path / "pl.safetensors"
    for command in (
        train_args(first, world, cache, method="source-only", steps=2),
        ("pseudo", first, "--out", labels, "--cache", cache, "--threads", 1),
        train_args(second, world, cache, "--pseudo", labels, method="source-only", steps=2),
    ):
        result = ftd(*command)
        assert result.exit_code == 0, result.output
    assert terms_of(second) == SEG | {"pseudo_2d", "pseudo_3d"}
