"""Recipes: rows, overrides, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ftdpp import readers, recipe, systems
from ftdpp.recipe import RecipeError
from ftdpp.systems import ftdpp
from ftdpp.tests.test_clip import write_clip
from ftdpp.tests.test_crossmatch import a_batch as a_batch_with_depth
from ftdpp.tests.test_ftdpp import batch as a_batch

SCENARIOS = ftdpp.System.scenarios


def test_recipes_of_all_rows() -> None:
    for scenario in SCENARIOS:
        for method, row in systems.METHODS.items():
            if scenario.endswith("-ssda") and not row.semi_supervised:
                with pytest.raises(RecipeError, match="no semi-supervised form"):
                    systems.recipe(scenario, method)
                continue
            if not scenario.endswith("-ssda") and not row.unsupervised:
                with pytest.raises(RecipeError, match="add --ssda"):
                    systems.recipe(scenario, method)
                continue
            for preset in systems.PRESETS:
                r = systems.recipe(scenario, method, preset)
                assert (r.scenario, r.method) == (scenario, method)
                changed = systems.system_of(method, scenario).small if preset == "small" else {}
                for name in row.settings.keys() - changed.keys():
                    assert getattr(r, name) == row.settings[name]
                system = systems.system_of(method, scenario)
                streams = system.streams(r)
                labelled = sum(s.labels for s in streams.values())
                assert labelled == 0 if system.source_free else labelled >= 1
                assert len({s.number for s in streams.values()}) == len(streams)


def test_only_ftdpp_and_bftd_have_a_teacher_among_the_published_rows() -> None:
    without = (
        "source-only",
        "source-only-fusion",
        "minent",
        "logcoral",
        "fda",
        "xmuda",
        "target-only",
    )
    for method in without:
        assert not systems.recipe("usa-singapore", method).uses_teacher
    for method in ("bftd", "ftdpp"):
        assert systems.recipe("usa-singapore", method).uses_teacher


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
        r = systems.recipe(scenario)
        found = (
            r.ce_3d,
            r.mimic_src,
            r.mimic_tgt,
            r.distill_single,
            r.distill_fused,
            r.pseudo_debias,
            r.lr_2d,
            r.teacher_image,
        )
        assert (*found, r.student_mix, r.steps, r.gamma) == row, scenario


def test_second_stage() -> None:
    r = systems.recipe("usa-singapore", "ftdpp", pseudo=True)
    assert r.pseudo == 1.0 and r.pseudo_debias and not r.pseudo_detach
    assert systems.recipe("usa-singapore", "ftdpp", "small", pseudo=True).pseudo_detach
    assert any(s.pseudo for s in ftdpp.System.streams(r).values())
    with pytest.raises(RecipeError, match="above 0"):
        systems.recipe("usa-singapore", pseudo=True, overrides=["pseudo=0"])


def test_overrides_are_typed_and_misspellings_refused() -> None:
    make = lambda *o: systems.recipe("usa-singapore", overrides=o)  # noqa: E731
    r = make("lr_3d=5e-4", "batch=2", "gamma=0.1", "milestones=10,20", "fusion=0", "image=96,160")
    found = (r.lr_3d, r.batch, r.milestones, r.fusion, r.image)
    assert found == (5e-4, 2, (10, 20), False, (96, 160))
    for bad, hint in (
        ("lr_2D=1", "did you mean 'lr_2d'"),
        ("lr_3d=fast", "expected float"),
        ("lr_3d", "name=value"),
        ("batch=0", "at least 1"),
        ("batch=2.5", "expected int"),
        ("lr_3d=nan", "expected float"),
        ("fusion=maybe", "expected bool"),
        ("method=x", "unknown setting"),
    ):
        with pytest.raises(RecipeError, match=hint):
            make(bad)


@pytest.mark.parametrize(("method", "setting", "why"), [
    ("source-only", "distill_single=1", "no teacher"),
    ("source-only", "fda_beta=0.2", "no teacher"),
    ("source-only", "mimic_tgt=0.1", "no mimicry"),
    ("xmuda", "fusion=true", "no fusion module"),
    ("ftdpp", "pseudo_detach=true", "--pseudo FILE"),
    ("ftdpp", "class_weights_tgt=1,1,1,1,1,1", "no labelled target frames"),
    ("ftdpp", "supervised=target", "decide it"),
])  # fmt: skip
def test_a_setting_that_the_method_does_not_read_is_refused(
    method: str, setting: str, why: str
) -> None:
    with pytest.raises(RecipeError, match=f"{method} does not read it.*{why}"):
        systems.recipe("usa-singapore", method, overrides=[setting])


@pytest.mark.parametrize(("scenario", "settings", "why"), [
    ("usa-singapore", ["distill_single=0", "distill_fused=0", "ema=0.5"], "no teacher"),
    ("usa-singapore", ["teacher_image=fda", "teacher_mix=0.5"], "teacher_image is fda"),
    ("day-night", ["teacher_mix=0.5"], "teacher_image is fda"),
    ("vkitti-skitti", ["pseudo_detach=true"], "not debiased"),
    ("usa-singapore", ["milestones=5"], "gamma is 1"),
    ("usa-singapore", ["classes=vkitti6"], "has labels for: street6"),
    ("usa-singapore", ["class_weights=1,2"], "wants 6 numbers"),
])  # fmt: skip
def test_what_would_change_nothing_or_cannot_work_is_refused(
    scenario: str, settings: list[str], why: str
) -> None:
    with pytest.raises(RecipeError, match=why):
        systems.recipe(scenario, "ftdpp", pseudo="pseudo" in settings[-1], overrides=settings)


def test_settings_that_are_read_can_be_given() -> None:
    """Every setting, in a run that reads it: nothing is refused by mistake."""
    other = systems.recipe("a2d2-skitti-ssda", "ftdpp", "small", pseudo=True)
    r = systems.recipe("usa-singapore-ssda", "ftdpp", pseudo=True, overrides=["gamma=0.5"])
    for text in recipe.settings_of(r, other, list(recipe.settings(type(r)))):
        name = text.partition("=")[0]
        if name not in ("supervised", "classes"):
            given = ["gamma=0.5", text]
            made = systems.recipe("usa-singapore-ssda", "ftdpp", pseudo=True, overrides=given)
            assert made == r, text


def test_given_settings_have_one_name() -> None:
    """Whatever the order and the spelling; what is as the recipe has it is not named."""
    base = systems.recipe("usa-singapore")
    names = ["batch", "fusion", "lr_2d", "steps"]
    texts = set()
    for overrides in (
        ["fusion=0", "batch=4", "steps=60000"],
        ["steps=60_000", "batch=4", "fusion=False"],
    ):
        r = systems.recipe("usa-singapore", overrides=overrides)
        texts.add(recipe.settings_of(r, base, names))
    assert texts == {("batch=4", "fusion=false")}


READ: set[str] = set()


def spying(cls: type[recipe.Recipe]) -> type[recipe.Recipe]:
    """A recipe that remembers which of its settings were read."""

    def read(self: Any, name: str) -> Any:
        if name in recipe.settings(cls):
            READ.add(name)
        return object.__getattribute__(self, name)

    return type("Spy", (cls,), {"__getattribute__": read})


@pytest.mark.parametrize("method", list(systems.METHODS))
@pytest.mark.parametrize("pseudo", [False, True])
def test_no_setting_that_a_step_reads_is_called_unread(
    method: str, pseudo: bool, tmp_path: Path
) -> None:
    """By watching a whole step. What the method decides is read, but not for the user to set."""
    scenario = "usa-singapore" + ("" if systems.METHODS[method].unsupervised else "-ssda")
    cls = systems.system_of(method, scenario)
    if pseudo and not cls.second_stage:
        with pytest.raises(RecipeError, match="has no second stage on pseudo-labels"):
            systems.recipe(scenario, method, "small", pseudo)
        return
    r = systems.recipe(scenario, method, "small", pseudo)
    given = ["batch=2"]
    if hasattr(r, "dropout"):
        given.append("dropout=0,0" if isinstance(r.dropout, tuple) else "dropout=0")
    if r.needs_clip:
        given.append(f"clip={write_clip(tmp_path / 'clip')}")
    r = systems.recipe(scenario, method, "small", pseudo, given)
    weights = {"class_weights": (1.0,) * 6}
    if scenario.endswith("-ssda"):
        weights["class_weights_tgt"] = (1.0,) * 6
    spied = spying(type(r))(**dataclasses.asdict(r) | weights)
    system = systems.build(spied).train()
    system.streams(spied)
    system.optimizers()
    READ.clear()
    batches = {"labelled": a_batch(0), "unlabelled": a_batch(1, pseudo=True)}
    batches["target"] = a_batch_with_depth()
    if scenario.endswith("-ssda"):
        batches["labelled_tgt"] = a_batch(2)
    terms = [system(phase, batches, systems.Chance(0, 0)) for phase in system.optimizers()]
    system.after_step(1)
    decided = {"supervised", "auxiliary", *cls.inherited}
    values = {name: getattr(r, name) for name in READ & r.unread().keys() - decided}
    # A weight of 0 is read to find out that the term is off, and so is a switch.
    assert not any(values.values()), values
    assert any(terms)


def test_a_pair_of_no_paper_has_a_default_row() -> None:
    r = systems.recipe("singapore-usa")
    assert (r.classes, r.image, r.crop) == ("street6", (225, 400), (0, 0))
    assert not systems.in_paper(r) and systems.in_paper(systems.recipe("usa-singapore"))
    r = systems.recipe("usa-skitti", "xmuda", "small")
    assert (r.classes, r.crop, r.eval_batch) == ("street6", (112, 200), 1)
    kitti = systems.recipe("skitti-skitti")
    assert (kitti.crop, kitti.image, kitti.batch) == ((302, 480), (0, 0), 4)
    assert not systems.in_paper(kitti)
    for scenario in ("usa-skitti", "skitti-usa"):  # crops that both data sets can give
        mixed = systems.recipe(scenario)
        assert mixed.crop == (225, 400)
        assert [mixed.image_size(aspect) for aspect in (None, 1242 / 375)] == [
            (225, 400),
            (225, 745),
        ]
    assert systems.recipe("usa-skitti", "xmuda").lr_2d == 1e-3
    assert systems.recipe("skitti-singapore-ssda").supervised == "both"
    for scenario, hint in (
        ("usa-singapor", "did you mean 'singapore'"),
        ("usa", "unknown scenario"),
        ("usa-night-ssda", "no split train_labelled"),
    ):
        with pytest.raises(RecipeError, match=hint):
            systems.recipe(scenario)


def test_domains_without_a_common_class_set(monkeypatch: pytest.MonkeyPatch) -> None:
    kitti = readers.READERS["semantic_kitti"]
    monkeypatch.setattr(type(kitti), "classes", {"vkitti6": kitti.classes["vkitti6"]})
    with pytest.raises(RecipeError, match="usa and skitti have no class set in common"):
        systems.recipe("usa-skitti")


def test_recipes_survive_storage() -> None:
    r = systems.recipe("a2d2-skitti", "ftdpp", "small")
    stored = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(r).items()}
    assert recipe.from_dict(ftdpp.Recipe, stored) == r
    with pytest.raises(RecipeError, match="setting 'novelty'"):
        recipe.from_dict(ftdpp.Recipe, stored | {"novelty": 1})
    with pytest.raises(RecipeError, match="class set 'street7'"):
        recipe.from_dict(ftdpp.Recipe, stored | {"classes": "street7"})


def test_a_row_of_its_own_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    row = systems.Method("ftdpp", {"distill_fused": 0.0})
    monkeypatch.setitem(systems.METHODS, "mine", row)
    test_recipes_of_all_rows()
    r = systems.recipe("usa-singapore", "mine")
    assert r.uses_teacher and r.distill_fused == 0
