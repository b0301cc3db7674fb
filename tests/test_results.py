"""Figures as data: what is read, what is refused, and the tables made from it."""

from __future__ import annotations

import csv
import io
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from ftdpp import checkpoint, results, systems
from ftdpp.checkpoint import RunError
from ftdpp.compare import LISTS, plan
from ftdpp.docs import tables
from ftdpp.tests.commands import ftd, words


def a_row(title: str, seed: int, miou: dict[str, float], **more: Any) -> results.Row:
    iou = {head: {"vehicle": value, "manmade": None} for head, value in miou.items()}
    row: results.Row = {"scenario": "usa-singapore", "method": title.split("[")[0], "title": title}
    row |= {"seed": seed, "domain": "singapore", "split": "test", "frames": 48, "miou": miou}
    return row | {"iou": iou, "checkpoint": "best.safetensors, iteration 960"} | more


ROWS = [
    a_row("source-only", 0, {"2d": 0.40}),
    a_row("ftdpp", 0, {"2d": 0.50, "2d+3d": 0.61}),
    a_row("ftdpp", 1, {"2d": 0.52, "2d+3d": 0.63}),
    a_row("ftdpp[teacher_image=none]", 0, {"2d": 0.5, "2d+3d": 0.6}),
]


def a_file(path: Path, rows: list[results.Row]) -> Path:
    results.write(path, rows, "ftd compare", "a machine", "small")
    return path


def test_mean_and_deviation_beside_the_paper() -> None:
    """Over seeds; a head that a method lacks is a dash; the paper's row under its plain name."""
    [table] = results.tables(ROWS)
    assert table.title == (
        "usa -> singapore: mIoU in percent on test (48 frames), checkpoint chosen on val, "
        "seeds 0, 1"
    )
    assert table.columns == ["method", "2D", "2D+3D", "paper"]
    spread = 100 * statistics.stdev([0.5, 0.52])
    assert table.rows[1][1] == results.Figure(pytest.approx(51.0), pytest.approx(spread))
    shown = [[str(cell) for cell in row] for row in table.rows]
    assert shown == [
        ["source-only (1 of 2 seeds)", "40.0", "-", "58.4 / 62.8 / 68.2"],
        ["ftdpp", "51.0 ± 1.4", "62.0 ± 1.4", "69.7 / 64.6 / 69.8"],
        ["ftdpp[teacher_image=none] (1 of 2 seeds)", "50.0", "60.0", ""],
    ]
    of_classes = results.tables(ROWS, True, "2d")[0]
    assert of_classes.columns == ["method", "vehicle", "manmade", "mIoU"]
    assert [str(cell) for cell in of_classes.rows[1]][1:] == ["51.0 ± 1.4", "-", "51.0 ± 1.4"]
    last = results.tables(ROWS, True)[0]
    assert [str(cell) for cell in last.rows[0]][1:] == ["-", "-", "-"], "it has no such head"
    with pytest.raises(RunError, match="usa-singapore has 2d, 2d"):
        results.tables(ROWS, True, "4d")
    more = [a_row("ftdpp", 0, {"2d": 1.0}, scenario="a2d2-skitti-ssda", split="val")]
    titles = [table.title for table in results.tables(ROWS + more)]
    title = "a2d2 -> skitti, SSDA: mIoU in percent on val (48 frames), checkpoint chosen on val"
    assert titles[1] == f"{title}, seed 0"


def test_runs_of_one_name_have_to_be_alike() -> None:
    """Seeds of one thing: no other preset, data, or the same seed twice."""
    alike = [a_row("ftdpp", seed, {"2d": 0.5}, settings="a", data="b") for seed in (0, 1)]
    assert len(results.tables(alike)) == 1
    for change in ({"settings": "c"}, {"data": "c"}, {"seed": 0}):
        with pytest.raises(RunError, match="make a table of each"):
            results.tables([alike[0], {**alike[1], **change}])


@pytest.mark.parametrize(
    ("chosen", "words_"), [("val", ", checkpoint chosen on val"), (None, ", last iteration")]
)
def test_how_checkpoints_were_chosen(chosen: str | None, words_: str) -> None:
    rows = [{**row, "chosen": chosen} for row in ROWS]
    assert words_ in results.tables(rows)[0].title
    assert "chosen" not in results.tables([*rows, {**ROWS[0], "seed": 5, "chosen": "x"}])[0].title


def test_formats(tmp_path: Path) -> None:
    file = a_file(tmp_path / "a.json", ROWS)
    text = ftd("table", file)
    assert text.exit_code == 0, text.output
    assert "51.0 ± 1.4" in text.output and "paper" in text.output
    md = ftd("table", file, "--format", "md").output
    assert "| ftdpp | 51.0 ± 1.4 | 62.0 ± 1.4 | 69.7 / 64.6 / 69.8 |" in md
    assert md.count("|") == 5 * 5, "every line has every cell"
    tex = ftd("table", file, "--format", "latex").output
    assert r"ftdpp & 51.0 $\pm$ 1.4 & 62.0 $\pm$ 1.4 & 69.7 / 64.6 / 69.8 \\" in tex
    assert r"ftdpp[teacher\_image=none]" in tex and r"\begin{tabular}{lrrr}" in tex
    rows = list(csv.DictReader(io.StringIO(ftd("table", file, "--format", "csv").output)))
    of_ftdpp = {row["column"]: row for row in rows if row["method"] == "ftdpp"}
    assert of_ftdpp["2D"]["mean"] == "51.000" and of_ftdpp["2D"]["deviation"] == "1.414"
    [found] = json.loads(ftd("table", file, "--format", "json").output)
    assert found["columns"] == ["method", "2D", "2D+3D", "paper"]
    mine = next(row for row in found["rows"] if row[0] == "ftdpp")
    assert mine[1] == {"mean": 51.0, "deviation": pytest.approx(2**0.5)}
    assert mine[3] == "69.7 / 64.6 / 69.8"
    classes = ftd("table", file, "--classes", "--head", "2d", "--format", "md").output
    assert "| ftdpp | 51.0 ± 1.4 | - | 51.0 ± 1.4 |" in classes
    assert ftd("table", file, "--classes").exit_code == 0
    paper = [row for row in rows if row["column"] == "paper"]
    assert paper[0]["mean"] == "58.4 / 62.8 / 68.2"
    wrong = ftd("table", file, "--head", "2d")
    assert wrong.exit_code == 2 and "add --classes" in words(wrong)
    wrong = ftd("table", file, "--split", "train")
    assert wrong.exit_code == 1 and "no figure of the split train" in words(wrong)


OPTIONS = "a.json b.json | layout: systems | system: "


def table_of(text: str) -> list[list[str]]:
    """The cells of a Markdown table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def test_one_table_of_all_systems(tmp_path: Path) -> None:
    """A block a system, with the heads that all its methods have, beside the paper's figures."""
    other = {"scenario": "day-night", "split": "val"}
    a_file(tmp_path / "a.json", [*ROWS, a_row("bftd", 0, {"2d": 0.1})])
    a_file(tmp_path / "b.json", [a_row("weak[text=0,transfer=none]", 0, {"3d": 0.2}, **other)])
    words_ = (
        "a.json b.json\n| layout: systems\n"
        "| system: FtD++, mine; usa-singapore; ftdpp (1) = ftdpp, ftdpp[teacher_image=none]\n"
        "| system: Camera; usa-singapore; source-only, ftdpp\n"
        "| system: Weak; day-night; alone = weak[text=0,transfer=none]"
    )
    text = tables.block(words_, tmp_path)
    assert table_of(text) == [
        ["**FtD++, mine**: 2D / 2D+3D", "**usa -> singapore**, test, 2 seeds"],
        ["---", "---"],
        ["ftdpp (1)", "51.0 / 62.0"],
        ["ftdpp[teacher_image=none]", "50.0 / 60.0 (1 of 2 seeds)"],
        ["**Camera**: 2D", "**usa -> singapore**, test, 2 seeds"],
        ["source-only", "40.0 (1 of 2 seeds)"],
        ["ftdpp", "51.0 ± 1.4"],
        ["**Weak**: 3D", "**day -> night**, val, 1 seed"],
        ["alone", "20.0"],
    ]
    sources = [line for line in text.splitlines() if line.startswith("- ")]
    assert [line.split("`")[1] for line in sources] == [
        *("bench/results/a.json", "bench/results/b.json")
    ]
    assert "`small` preset, a machine: `ftd compare`" in sources[0]
    three = {"2d": 0.5, "3d": 0.4, "2d+3d": 0.6}
    dense = a_row("crossmatch", 0, {"2d": 0.3}, scenario="gta5-cityscapes")
    a_file(tmp_path / "a.json", [a_row("xmuda", 0, three), a_row("weak", 0, three), dense])
    of_pair = OPTIONS + "A; usa-singapore; xmuda, weak | system: B; gta5-cityscapes; crossmatch"
    assert [row[1:] for row in table_of(tables.block(of_pair, tmp_path))] == [
        ["**usa -> singapore**, test, 1 seed", "paper"],
        ["---", "---"],
        ["50.0 / 40.0 / 60.0", "64.4 / 63.2 / 69.4"],
        ["50.0 / 40.0 / 60.0", ""],
        ["**gta5 -> cityscapes**, test, 1 seed", "paper"],
        ["30.0", "57.7"],
    ]


def test_more_seeds_and_files_change_what_is_named_alone(tmp_path: Path) -> None:
    a_file(tmp_path / "a.json", ROWS)
    a_file(tmp_path / "b.json", [a_row("ftdpp", 2, {"2d": 0.57}), a_row("fda", 0, {"2d": 0.9})])
    made = table_of(tables.block(OPTIONS + "A; usa-singapore; source-only, ftdpp", tmp_path))
    assert [row[1] for row in made] == [
        *("**usa -> singapore**, test, 3 seeds", "---", "40.0 (1 of 3 seeds)", "53.0 ± 3.6")
    ]
    before = tables.block("a.json | layout: systems | system: A; usa-singapore; ftdpp", tmp_path)
    assert "62.0" in before and "b.json" not in before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("a.json | colums: 2D", "unknown colums"),
        ("a.json | layout: pears", "unknown layout pears"),
        ("a.json | layout: systems | rows: ftdpp", "unknown rows"),
        ("a.json | system: A; usa-singapore; ftdpp", "unknown system"),
        ("a.json | layout: pairs | rows: ftdpp | columns: 2D", "unknown columns"),
        ("a.json | layout: systems | system: A; usa-singapore; ftdp", "ftdp, usa-singapore in"),
        ("a.json | layout: systems | system: A; day-night; ftdpp", "no figure of day-night, ftdpp"),
        ("b.json | layout: systems | system: A; usa-singapore; fda, ftdpp", "a head that all"),
        ("c.json | layout: systems | system: A; usa-singapore; ftdpp", "several splits"),
    ],
)
def test_tables_refuse_what_they_cannot_make(tmp_path: Path, options: str, message: str) -> None:
    a_file(tmp_path / "a.json", ROWS)
    a_file(tmp_path / "b.json", [ROWS[1], a_row("fda", 0, {"3d": 0.5})])
    a_file(tmp_path / "c.json", [ROWS[1], {**ROWS[1], "split": "val"}])
    with pytest.raises(ValueError, match=message):
        tables.block(options, tmp_path)


def test_the_first_place_that_has_a_run_counts(tmp_path: Path) -> None:
    other = [a_row("ftdpp", 0, {"2d": 0.9}), a_row("ftdpp", 2, {"2d": 0.6})]
    places = a_file(tmp_path / "a.json", ROWS), a_file(tmp_path / "b.json", other)
    found = results.collect(places)
    assert found == [*ROWS, other[1]]


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "compare.json"
    whole = json.loads(a_file(path, ROWS).read_text())
    assert whole["command"] == "ftd compare" and results.read(path)["rows"] == ROWS
    for damaged in (
        "",
        "[]",
        "{}",
        "null",
        json.dumps({**whole, "rows": "x"}),
        json.dumps({**whole, "rows": [1]}),
        json.dumps({**whole, "rows": [{**ROWS[0], "seed": "0"}]}),
        json.dumps({**whole, "rows": [{**ROWS[0], "miou": {"2d": None}}]}),
        json.dumps({**whole, "rows": [{**ROWS[0], "miou": {}}]}),
        json.dumps({**whole, "rows": [{**ROWS[0], "miou": [1]}]}),
        json.dumps({**whole, "rows": [{**ROWS[0], "iou": {}}]}),
        json.dumps({**whole, "rows": [{**ROWS[0], "iou": {"2d": 1}}]}),
        json.dumps({**whole, "machine": 1}),
    ):
        path.write_text(damaged)
        result = ftd("table", path)
        assert result.exit_code == 1 and "compare.json" in words(result), damaged
    result = ftd("table", tmp_path / "no.json")
    assert result.exit_code == 1 and "No such file" in words(result)
    result = ftd("table", a_file(path, []))
    assert result.exit_code == 1 and "no figure in these files" in words(result)
    result = ftd("table", tmp_path)
    assert result.exit_code == 1 and "leave it out" in words(result)


def test_a_run_s_folder_holds_its_figures(
    finished: Path, world: Path, cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / results.OF_A_RUN).unlink(missing_ok=True)
    result = ftd("table", run)
    assert result.exit_code == 1 and f"ftd eval {run}" in words(result)
    for split in ("val", "test"):
        result = ftd("eval", run, "--split", split, "--cache", cache, "--threads", 1, "--json")
        assert result.exit_code == 0, result.output
    score = json.loads(result.stdout[result.stdout.index("{") :])
    row = results.of_run(run)
    assert row["split"] == "test" and row["miou"] == score["miou"] and row["method"] == "ftdpp"
    assert results.of_run(run, "val")["split"] == "val"
    shown = ftd("table", run, "--split", "val").output
    assert "on val (" in shown
    before = (run / results.OF_A_RUN).read_bytes()
    ftd("eval", run, "--checkpoint", "last", "--cache", cache, "--threads", 1)
    assert (run / results.OF_A_RUN).read_bytes() == before, "of the best checkpoint alone"
    shutil.copytree(world, tmp_path / "other")
    other = ("--data", tmp_path / "other", "--cache", cache, "--threads", 1)
    assert ftd("eval", run, *other).exit_code == 0
    assert (run / results.OF_A_RUN).read_bytes() == before, "of the run's own data alone"
    meta = checkpoint.read_metadata(run / "best.safetensors")
    tensors = checkpoint.read_tensors(run / "best.safetensors", "")
    checkpoint.save(run / "best.safetensors", tensors, {**meta, "seed": 5})
    result = ftd("table", run)
    assert result.exit_code == 1 and "of another best.safetensors" in words(result)


def test_the_paper_s_rows_are_methods_of_ours() -> None:
    """By the names that the tables use."""
    for scenario, rows in results.published().items():
        for name, values in rows.items():
            assert len(values) == (1 if "cityscapes" in scenario else 3)
            method, stage, _ = name.partition("+pl")
            r = systems.recipe(scenario, method, "small", bool(stage))
            assert r.scenario == scenario
    titles = {job.title for job in plan("usa-singapore", LISTS["paper"], "0", "small", [], Path())}
    assert set(results.published()["usa-singapore"]) == titles
