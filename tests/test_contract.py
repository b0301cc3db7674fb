"""The contract of a system: a small one that is not FtD++ trains, resumes, is evaluated, compared.

It has two phases with an optimiser each, a schedule of its own, predicts with the 3D network alone,
needs no image features, has no second stage, and a network that only training needs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from ftdpp import checkpoint, compare, evaluate, recipe, runs, screen, systems, train
from ftdpp.data import CLASS_SETS, IGNORE, Batch
from ftdpp.losses import cross_entropy
from ftdpp.tests.commands import ftd, words


@dataclass(frozen=True)
class Recipe(recipe.Recipe):
    warm_up: int = 3


class Stub(systems.System):
    Recipe = Recipe
    heads = ("3d",)
    pseudo_heads = ("3d",)
    training_only = ("helper",)
    calls: ClassVar[list[Any]] = []

    def __init__(self, r: Any, seed: int = 0, training: bool = True) -> None:
        super().__init__(r, seed, training)
        systems.seed_torch(seed, systems.INIT, 0)
        self.net = nn.Linear(3, len(CLASS_SETS[r.classes]))
        self.helper = nn.Linear(3, 1) if training else None

    @staticmethod
    def streams(r: Any) -> dict[str, systems.Stream]:
        return {
            "labelled": systems.Stream("src", "train", r.batch, True, 0, "class_weights"),
            "seen": systems.Stream("tgt", "train", r.batch, False, 1),
        }

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        assert self.helper is not None
        return {
            "helper": torch.optim.SGD(self.helper.parameters(), lr=1.0, momentum=0.5),
            "net": torch.optim.Adam(self.net.parameters(), lr=self.recipe.lr_3d),
        }

    def rate(self, iteration: int) -> float:
        return min(1.0, (iteration + 1) / self.recipe.warm_up)

    def forward(
        self, phase: str, batches: dict[str, Batch], chance: systems.Chance
    ) -> dict[str, Tensor]:
        assert self.helper is not None and self.training
        tokens = {name: tuple(batch.tokens) for name, batch in batches.items()}
        self.calls.append((phase, tokens, int(chance.generator(99).integers(10**6))))
        if phase == "helper":
            return {"helper": self.helper(xyz(batches["seen"])).square().mean()}
        labelled = batches["labelled"]
        weight = labelled.image.new_tensor(self.recipe.class_weights)
        return {"seg_3d": cross_entropy(self.net(xyz(labelled)), labelled.label, weight)}

    def after_step(self, iteration: int) -> None:
        self.calls.append(("after", iteration))

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        return {"3d": self.net(xyz(batch)).softmax(1)}


def xyz(batch: Batch) -> Tensor:
    return batch.coords[:, 1:].float() / 4096


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("somewhere.stub")
    module.System = Stub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somewhere.stub", module)
    monkeypatch.setitem(systems.METHODS, "stub", systems.Method("somewhere.stub"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Stub.calls.clear()


SETTINGS = ["steps=6", "batch=2", "val_every=3", "save_every=2", "image=48,88"]


def begin(world: Path, cache: Path, out: Path, *more: str) -> train.Run:
    r = systems.recipe("usa-singapore", "stub", "small", overrides=[*SETTINGS, *more])
    domains = {"src": "usa", "tgt": "singapore", "val": "singapore"}
    places = runs.Places({side: runs.Origin(d, world) for side, d in domains.items()}, cache)
    return runs.assemble(r, 0, out, places)[0]


def test_the_loop(world: Path, cache: Path, tmp_path: Path) -> None:
    """Phases in order, then after_step, counted from 1; every phase of an iteration one chance."""
    run = begin(world, cache, tmp_path)
    rates = []
    for event in train.fit(run):
        if isinstance(event, train.Step):
            assert list(event.terms) == ["helper", "seg_3d"]
            rates.append(run.learning_rates()["helper.0"])
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1]), "the system's own schedule"
    phases = [call[0] for call in Stub.calls]
    assert phases == ["helper", "net", "after"] * 6
    assert [call[1] for call in Stub.calls if call[0] == "after"] == [1, 2, 3, 4, 5, 6]
    draws = [call[2] for call in Stub.calls if call[0] != "after"]
    assert draws[::2] == draws[1::2] and len(set(draws)) == 6


def test_each_epoch_has_an_order_of_its_own(world: Path, cache: Path, tmp_path: Path) -> None:
    run = begin(world, cache, tmp_path, "steps=40")
    frames = len(run.indexes["labelled"])  # 4: an epoch is two batches of two
    batches = train.Batches(run.streams, run.recipe, 0, run.indexes)
    orders = set()
    for epoch in range(10):
        pairs = [batches[2 * epoch + i]["labelled"].tokens for i in (0, 1)]
        order = tuple(token for pair in pairs for token in pair)
        assert len(set(order)) == frames, "every frame once an epoch"
        orders.add(order)
    assert len(orders) > 4


def test_streams_are_augmented_apart(world: Path, cache: Path, tmp_path: Path) -> None:
    """Two streams of the same frames do not see the same crops, turns and colours."""
    run = begin(world, cache, tmp_path, "batch=4")
    run.indexes["seen"] = run.indexes["labelled"]
    item = train.Batches(run.streams, run.recipe, 0, run.indexes)[0]
    images = [dict(zip(batch.tokens, batch.image, strict=True)) for batch in item.values()]
    assert images[0].keys() == images[1].keys()
    assert not any(torch.equal(images[0][token], images[1][token]) for token in images[0])


def test_steps_drop_at_a_milestone(world: Path, cache: Path, tmp_path: Path) -> None:
    """The schedule of a system that has none of its own: iteration M is the first slower one."""
    run = begin(world, cache, tmp_path, "milestones=2,4", "gamma=0.1")
    rates = [systems.System.rate(run.system, i) for i in range(6)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_resume_is_exact(world: Path, cache: Path, tmp_path: Path) -> None:
    list(train.fit(whole := begin(world, cache, tmp_path / "whole")))
    stopped = begin(world, cache, tmp_path / "stopped")

    def stop_after_four() -> None:
        for event in train.fit(stopped):
            stopped.stop = isinstance(event, train.Step) and event.iteration == 4

    with pytest.raises(train.Interrupted):
        stop_after_four()
    resumed = begin(world, cache, tmp_path / "stopped")
    resumed.resume()
    list(train.fit(resumed))
    for name in ("last.safetensors", "best.safetensors", "log.csv"):
        assert (resumed.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_the_first_of_equal_scores_is_kept(
    world: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = evaluate.Score("d", "val", "x", 1, 1, {"3d": 0.5}, {"3d": {}}, 0, [])
    monkeypatch.setattr(train, "evaluate", lambda *args: score)
    run = begin(world, cache, tmp_path)
    list(train.fit(run))
    assert run.best is not None and run.best["iteration"] == 3


def test_evaluation_and_checkpoints(world: Path, cache: Path, tmp_path: Path) -> None:
    """Whatever heads there are; what only training needs is not built for prediction."""
    run = begin(world, cache, tmp_path)
    list(train.fit(run))
    system, meta = checkpoint.load(run.best_path)
    assert system.helper is None and meta["iteration"] in (3, 6)
    index = runs.Origin("singapore", world).index("test", run.recipe, cache)
    score = evaluate.evaluate(system, index, "x")
    assert list(score.miou) == ["3d"]
    [(_, batch)] = evaluate.batches_of(index, run.recipe, len(index))
    counts = torch.bincount(batch.label[batch.label != IGNORE], minlength=6).tolist()
    names = CLASS_SETS[run.recipe.classes]
    assert score.absent == [name for name, n in zip(names, counts, strict=True) if not n]
    meta = evaluate.write_pseudo_labels(tmp_path / "pl.safetensors", system, index, "x")
    assert list(meta["kept"]) == ["3d"]


def test_the_commands_know_it(world: Path, cache: Path, tmp_path: Path) -> None:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    where = ("--data", world, "--cache", cache, "--threads", 1, "--preset", "small")
    out = tmp_path / "run"
    pair = ("--src", "usa", "--tgt", "singapore")
    result = ftd("train", *pair, "--method", "stub", "--out", out, *where, *settings)
    assert result.exit_code == 0, result.output
    assert "3D" in ftd("eval", out, "--cache", cache).output
    result = ftd("compare", "--methods", "stub", "--out", tmp_path, *where, *settings)
    assert result.exit_code == 0, result.output
    for wrong, hint in (
        (("--set", "fusion=false"), "unknown setting 'fusion'"),
        (("--ssda",), "no semi-supervised form"),
    ):
        result = ftd("train", *pair, "--method", "stub", *where, *wrong)
        assert result.exit_code == 2
        assert hint in words(result)
    with pytest.raises(recipe.RecipeError, match="no second stage"):
        compare.plan("usa-singapore", "stub+pl", "0", "small", [], tmp_path)
    assert ftd("recipes").exit_code == 0
    assert ftd("recipes", "--pseudo", "--method", "stub").exit_code == 0


def test_comparison_takes_the_best_checkpoint(world: Path, cache: Path, tmp_path: Path) -> None:
    """best.safetensors, not last, is what the table is about."""
    run = begin(world, cache, tmp_path / "usa-singapore-stub[x]-seed0")
    list(train.fit(run))
    best = checkpoint.read_tensors(run.best_path, "")
    best["system/net.bias"] = torch.tensor([50.0, 0, 0, 0, 0, 0])  # says class 0 everywhere
    checkpoint.save(run.best_path, best, checkpoint.read_metadata(run.best_path))
    job = compare.Job(0, run.out, run.recipe, ())
    domains = {"src": "usa", "tgt": "singapore", "val": "singapore"}
    places = runs.Places({side: runs.Origin(d, world) for side, d in domains.items()}, cache)
    work = compare.Comparison([job], {run.recipe.scenario: places}, torch.device("cpu"), 1)
    [row] = work.run(screen.Display(screen.messages(), 1.0))
    assert [v for v in row["iou"]["3d"].values() if v] == [row["iou"]["3d"]["vehicle"]]
