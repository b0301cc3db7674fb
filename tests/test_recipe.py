"""Recipes: rows, overrides, refusals."""

from __future__ import annotations

import dataclasses

import pytest

from ftdpp import readers, recipe, systems
from ftdpp.recipe import RecipeError
from ftdpp.systems import ftdpp

SCENARIOS = ftdpp.System.scenarios


def test_recipes_of_all_rows() -> None:
    for scenario in SCENARIOS:
        for method, row in systems.METHODS.items():
            if scenario.endswith("-ssda") and not row.semi_supervised:
                with pytest.raises(RecipeError, match="no semi-supervised form"):
                    systems.recipe(scenario, method)
                continue
            for preset in systems.PRESETS:
                r = systems.recipe(scenario, method, preset)
                assert (r.scenario, r.method) == (scenario, method)
                for name, value in row.settings.items():
                    assert getattr(r, name) == value or preset == "small"
                streams = row.system().streams(r)
                assert sum(s.labels for s in streams.values()) >= 1
                assert len({s.number for s in streams.values()}) == len(streams)


def test_only_ftdpp_has_a_teacher_among_the_published_rows() -> None:
    for method in ("source-only", "source-only-fusion", "xmuda", "target-only"):
        assert not systems.recipe("usa-singapore", method).uses_teacher
    assert systems.recipe("usa-singapore", "ftdpp").uses_teacher


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
    r = make("lr_3d=5e-4", "batch=2", "milestones=10,20", "fusion=false", "image=96,160")
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


def test_settings_that_are_read_can_be_given() -> None:
    """Every setting, in a run that reads it: nothing is refused by mistake."""
    r = systems.recipe("usa-singapore-ssda", "ftdpp", pseudo=True)
    for name in recipe.settings(type(r)):
        [text] = recipe.settings_of(r, [name])
        if name != "supervised":
            assert systems.recipe("usa-singapore-ssda", "ftdpp", pseudo=True, overrides=[text]) == r


def test_a_pair_of_no_paper_has_a_default_row() -> None:
    r = systems.recipe("singapore-usa")
    assert (r.classes, r.image, r.crop) == ("street6", (225, 400), (0, 0))
    assert not systems.in_paper(r) and systems.in_paper(systems.recipe("usa-singapore"))
    r = systems.recipe("usa-skitti", "xmuda", "small")
    assert (r.classes, r.crop, r.eval_batch) == ("street6", (112, 200), 1)
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
