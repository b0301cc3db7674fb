"""What a person sees: progress on terminals and in pipes, tables on narrow screens, signals."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console, RenderableType

from ftdpp import screen, systems, train
from ftdpp.data import CLASS_SETS
from ftdpp.evaluate import Score
from ftdpp.recipe import Recipe


def a_console(width: int = 80, terminal: bool = False, soft_wrap: bool = False) -> Console:
    return Console(
        width=width,
        file=io.StringIO(),
        force_terminal=terminal,
        color_system=None,
        markup=False,
        soft_wrap=soft_wrap,
    )


def shown(console: Console) -> str:
    """What was printed, without control sequences."""
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def printed(what: RenderableType, width: int = 80) -> str:
    console = a_console(width)
    console.print(what)
    return shown(console)


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


# ---- decisions -----------------------------------------------------------------------------------

FACTS = [
    ("device", "cpu", "no GPU is present"),
    ("cache", "/home/a/[very]/long" + "/folder" * 20, "default; change it with --cache " * 4),
    ("weights", "1.00 " * 30, ""),
]


def test_facts_are_whole_in_a_pipe() -> None:
    """One a line, however long, with spaces as they are."""
    console = a_console(soft_wrap=True)
    screen.facts(console, FACTS)
    lines = shown(console).splitlines()
    assert len(lines) == len(FACTS)
    for line, fact in zip(lines, FACTS, strict=True):
        for part in fact:
            assert part in line


@pytest.mark.parametrize("width", [30, 80])
def test_facts_are_whole_on_a_terminal(width: int) -> None:
    console = a_console(width, terminal=True)
    screen.facts(console, FACTS)
    lines = shown(console).splitlines()
    assert max(map(len, lines)) <= width
    rest = "".join("".join(line[len("weights") :].split()) for line in lines)
    for _, value, reason in FACTS:
        assert "".join((value + reason).split()) in rest
    assert "…" not in shown(console)


def test_consoles_print_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets and colons in a path are no markup. A log shows no live line, FORCE_COLOR or not."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    for console in (screen.messages(), screen.output()):
        assert not console.is_interactive
        with console.capture() as capture:
            console.print("/data/[bold]/:smile:/[/x]")
            console.print(screen.plain_table([{"a": "[red]"}], "[/title]"))
        assert "/data/[bold]/:smile:/[/x]" in capture.get()
        assert "[red]" in capture.get()


def test_results_are_wide_in_a_pipe() -> None:
    code = "from ftdpp import screen; screen.output().print('word ' * 30)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(found.stdout.splitlines()) == 1


# ---- progress ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (7.4, "0:07"),
        (59.7, "1:00"),
        (70, "1:10"),
        (3599.6, "1:00:00"),
        (3723, "1:02:03"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert screen.duration(seconds) == text


def test_progress_in_a_pipe() -> None:
    """A line at once, at least every 30 seconds, and one at the end, for each kind of work."""
    console, clock = a_console(), Clock()
    times = []
    with screen.bar(console, clock) as tell:
        for done in range(41):
            clock.now = 7.0 * done
            before = shown(console)
            tell(done, 40, "building the street world")
            if shown(console) != before:
                times.append(clock.now)
        tell(0, 5, "evaluating")
        clock.now += 2
        tell(1, 5, "evaluating")
        tell(5, 5, "evaluating")
    lines = shown(console).splitlines()
    assert lines[0] == "building the street world: 0 of 40"
    assert lines[1] == "building the street world: 3 of 40, 4:19 left"
    assert "building the street world: 40 of 40, took 4:40" in lines
    assert lines[-2:] == ["evaluating: 0 of 5", "evaluating: 5 of 5, took 0:02"]
    assert times[0] == 0
    assert max(b - a for a, b in itertools.pairwise(times)) <= 30
    assert len(times) < 20, "and not at every call"


@pytest.mark.parametrize("step", [0.5, 20.0, 29.0, 45.0])
def test_no_silence_while_it_moves(step: float) -> None:
    """Whatever the time between calls: no more than 30 seconds, or one step."""
    console, clock = a_console(), Clock()
    last, lines = 0.0, 0
    with screen.bar(console, clock) as tell:
        for done in range(200):
            clock.now = step * done
            tell(done, 1000, "x")
            if len(shown(console).splitlines()) > lines:
                assert clock.now - last <= max(30, step)
                last, lines = clock.now, len(shown(console).splitlines())
    assert clock.now - last <= max(30, step)


def test_progress_begins_anew() -> None:
    """The same kind of work twice, and one that goes on where a killed command stopped."""
    console, clock = a_console(), Clock()
    with screen.bar(console, clock) as tell:
        for total in (3, 3):
            tell(0, total, "preparing")
            clock.now += 1
            tell(total, total, "preparing")
        tell(100, 200, "resumed")
        clock.now += 40
        tell(120, 200, "resumed")
        tell(7, 7, "at once")
    assert shown(console).splitlines() == [
        "preparing: 0 of 3", "preparing: 3 of 3, took 0:01",
        "preparing: 0 of 3", "preparing: 3 of 3, took 0:01",
        "resumed: 100 of 200", "resumed: 120 of 200, 2:40 left",
        "at once: 7 of 7",
    ]  # fmt: skip


def test_long_lines_of_progress_are_whole_in_a_pipe() -> None:
    console = a_console(40)
    what = "building again, /a/long/path/[x]" + "/folder" * 20
    with screen.bar(console, Clock()) as tell:
        tell(0, 3, what)
    assert shown(console) == f"{what}: 0 of 3\n"


def test_a_bar_on_a_terminal() -> None:
    console = a_console(terminal=True)
    with screen.bar(console) as tell:
        tell(0, 5, "[preparing]")
        tell(4, 5, "[preparing]")
        tell(1, 2, "evaluating")
    assert "[preparing]" in shown(console)
    assert "4/5" in shown(console)
    assert "evaluating" in shown(console)


TERMS = dict.fromkeys(
    ("seg_2d", "seg_3d", "mimic_2d_src", "mimic_3d_src", "mimic_2d_tgt", "distill_fused"), 0.25
)
SPEED = "500 ms, data wait 10%, 1.0 GiB"


@pytest.mark.parametrize("width", [40, 80])
def test_every_loss_term_is_visible(width: int) -> None:
    """On a narrow terminal, too."""
    console = a_console(width, terminal=True)
    display = screen.Display(console, 10.0)
    with display:
        display.step("source-only seed 0", train.Step(7, TERMS, 0.5, 0.1), 960, 1.0, 2**30)
    text = " ".join(shown(console).split())
    whole = ["source-only seed 0"] if width == 80 else []  # cut on the narrower one
    for wanted in (*whole, "7/960, ETA 0:04", SPEED, *(f"{term} 0.25" for term in TERMS)):
        assert wanted in text


def test_a_course_is_drawn_in_few_blocks() -> None:
    """Of any number of values; a stretch is their mean, and the last is the newest."""
    trend = screen._Trend()
    assert str(trend) == ""
    for value in range(8):
        trend.add(value)
    assert str(trend) == "▁▂▃▄▅▆▇█"
    for value in range(8, 1000):
        trend.add(value)
        assert len(str(trend)) <= trend.WIDTH
    assert trend.length == 64 and trend.means[:2] == [31.5, 95.5]
    flat = screen._Trend()
    for _ in range(3):
        flat.add(0.25)
    assert str(flat) == "▁▁▁"


def test_a_training_shows_the_course_of_terms_and_validations() -> None:
    console = a_console(100, terminal=True)
    display = screen.Display(console, 10.0)
    score = Score("d", "val", "c", 1, 1, {"3d": 0.5}, {"3d": {}}, 0, [])
    for i in range(4):
        display.step("run", train.Step(i + 1, {"seg": 3.0 - i}, 0.5, 0.1), 9, 1.0, 2**30)
    display.validated("run", score, True, 1.0)
    display.step("run", train.Step(5, {"seg": 1.0}, 0.5, 0.1), 9, 1.0, 2**30)
    below = display.live.below.splitlines()
    assert below[0].startswith("  run: 5/9, ETA")
    assert below[1].split() == ["seg", "1.00", "█▆▃▁▃", "val", "3d", "50.00", "▁"]
    several = screen.Display(console, 10.0, several=True)
    several.step("run", train.Step(1, {"seg": 3.0}, 0.5, 0.1), 9, 1.0, 2**30)
    assert len(several.live.below.splitlines()) == 1


def test_training_in_a_pipe() -> None:
    """The first iteration, at least one line in 30 seconds, the last; every loss term in each."""
    console, clock = a_console(40, soft_wrap=True), Clock()
    display = screen.Display(console, 100.0, clock)
    reached, last = [], 0.0
    with display:
        for i in range(1, 101):
            clock.now += 0.5 if i < 50 else 8.0
            before = shown(console)
            display.step("ftdpp", train.Step(i, TERMS, 0.5, 0.1), 100, 1.0, 2**30)
            if shown(console) != before:
                assert clock.now - last <= 30
                last = clock.now
                reached.append(i)
    assert reached[0] == 1
    assert reached[-1] == 100
    assert len(reached) < 30
    lines = shown(console).splitlines()
    assert len(lines) == len(reached)
    assert lines[0].startswith(f"ftdpp: iteration 1 of 100, ETA 0:50, {SPEED}: ")
    for line in lines:
        assert all(f"{term} 0.25" in line for term in TERMS)


def test_a_comparison_in_a_pipe_announces_each_run() -> None:
    console, clock = a_console(), Clock()
    with screen.Display(console, 10.0, clock) as display:
        for name in ("source-only seed 0", "ftdpp seed 0"):
            for i in range(1, 6):
                clock.now += 1
                display.step(name, train.Step(i, {"seg_2d": 1.0}, 1.0, 0.0), 5, 1.0, 0)
    lines = [line.split(",")[0] for line in shown(console).splitlines()]
    assert lines == [
        "source-only seed 0: iteration 1 of 5", "source-only seed 0: iteration 5 of 5",
        "ftdpp seed 0: iteration 1 of 5", "ftdpp seed 0: iteration 5 of 5",
    ]  # fmt: skip


# ---- the driver ----------------------------------------------------------------------------------


def a_score(heads: Sequence[str] = ("2d", "3d", "2d+3d"), **changes: Any) -> Score:
    names = CLASS_SETS["street6"]
    score = Score(
        domain="singapore",
        split="val",
        checkpoint="iteration 2",
        frames=1,
        points=12_345,
        miou={head: 0.5 + 0.001 * i for i, head in enumerate(heads)},
        iou={head: dict.fromkeys(names, 0.25 + 0.1 * i) for i, head in enumerate(heads)},
        outside=0,
        absent=[],
    )
    return dataclasses.replace(score, **changes)


@pytest.fixture
def a_run() -> Any:
    return SimpleNamespace(
        recipe=Recipe(steps=2),
        system=SimpleNamespace(cost=lambda r: 3.0),
        device=torch.device("cpu"),
        stop=False,
        iteration=0,
        best=None,
    )


def test_drive(a_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and validations, of a system with a single head, on the display and on the board."""

    def fit(run: Any) -> Iterator[train.Step | Score]:
        for run.iteration in (1, 2):
            yield train.Step(run.iteration, {"seg": float(run.iteration)}, 0.5, 0.0)
        run.best = {"iteration": 2}
        yield a_score(["2d"])

    monkeypatch.setattr(train, "fit", fit)
    scalars = []
    board = SimpleNamespace(add_scalar=lambda key, value, i: scalars.append((key, value, i)))
    console = a_console()
    with screen.Display(console, 10.0, Clock()) as display:
        screen.drive(a_run, "mine", display, board)
    assert scalars == [("loss/seg", 1.0, 1), ("loss/seg", 2.0, 2), ("val/2d", 0.5, 2)]
    assert display.done == 3.0 + 3.0 + 1
    validated = "  mine: iteration 2, singapore val (1 frame): mIoU 2d 50.0% (best so far)"
    assert shown(console).splitlines()[-1] == validated


def test_a_signal_stops_and_a_second_one_leaves(
    a_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fit(run: Any) -> Iterator[train.Step | Score]:
        signal.raise_signal(signal.SIGTERM)
        seen.append(run.stop)
        yield train.Step(1, {"seg": 1.0}, 0.5, 0.0)
        signal.raise_signal(signal.SIGINT)
        seen.append("not reached")

    monkeypatch.setattr(train, "fit", fit)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with screen.Display(a_console(), 1.0) as display, pytest.raises(KeyboardInterrupt):
        screen.drive(a_run, "mine", display)
    assert seen == [True]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


# ---- tables --------------------------------------------------------------------------------------


def columns(table: str) -> list[str]:
    """The text of each column, lines joined: what was folded is whole again."""
    rows = [re.split("[│┃]", line)[1:-1] for line in table.splitlines() if line[:1] in ("│", "┃")]
    return ["".join(cell.strip() for cell in column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("heads", [("2d", "3d", "2d+3d"), ("2d",), ("camera", "depth", "both")])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_score_table(heads: Sequence[str], width: int) -> None:
    names = CLASS_SETS["street6"]
    score = a_score(heads, absent=["terrain"], outside=1_234)
    score.iou[heads[0]]["terrain"] = None
    table = printed(screen.score_table(score, "ftdpp, fusion=false"), width)
    assert "…" not in table
    first, *others = columns(table)
    assert (
        first.replace(" ", "")
        == "class"
        + "".join(names).replace("terrain", "terrain(nolabelledpoint:countsas0)")
        + "mIoU"
    )
    for i, (head, column) in enumerate(zip(heads, others, strict=True)):
        values = [f"{25 + 10 * i:.1f}"] * 6
        if i == 0:
            values[3] = "-"
        assert column == head.upper() + "".join(values) + f"{50 + 0.1 * i:.1f}"
    title = " ".join(table.split())
    for words in ("ftdpp, fusion=false", "singapore val: 1 frame,", "12,345 labelled points",
                  "1,234 POINTS OUTSIDE"):  # fmt: skip
        assert words in title
    assert "OUTSIDE" not in printed(screen.score_table(a_score(heads), "x"))


def test_pseudo_table() -> None:
    meta = {
        "class_names": ["vehicle", "driveable_surface"],
        "thresholds": {"2d": [0.9, 0.5], "depth": [0.25, 0.0]},
        "kept": {"2d": [123_456_789, 5], "depth": [1, 0]},
        "predicted": {"2d": [223_456_789, 9], "depth": [3, 0]},
    }
    table = printed(screen.pseudo_table(meta, "/a/path/of/a/file" * 8 + ".safetensors: 2 frames"))
    assert "/a/path/of/a/file" * 8 in "".join(table.split())
    assert "…" not in table
    rows = [[c.strip() for c in r.split("│")[1:-1]] for r in table.splitlines() if r[:1] == "│"]
    assert rows == [
        ["vehicle", "2D", "0.900", "123,456,789", "223,456,789", "55%"],
        ["", "DEPTH", "0.250", "1", "3", "33%"],
        ["driveable_surface", "2D", "0.500", "5", "9", "56%"],
        ["", "DEPTH", "0.000", "0", "0", "-"],
    ]


def test_plain_table_is_whole_on_a_narrow_screen() -> None:
    note = "12 of 9665 frames: part of the data set; /a/long/path" + "/folder" * 10
    rows = [{"split": "train", "frames": 12, "ms": 1.23456, "expected": None, "note": note}]
    for width in (40, 80):
        table = printed(screen.plain_table(rows, "title"), width)
        assert "…" not in table
        found = [c.replace(" ", "") for c in columns(table)]
        assert found == [
            "splittrain",
            "frames12",
            "ms1.23",
            "expected",
            "note" + note.replace(" ", ""),
        ]


# ---- recipes -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OwnRecipe(Recipe):
    """Of a system with a setting of its own."""

    prompts: int = 16


def test_recipes_table_shows_what_differs() -> None:
    """Readable at 80 columns: no word is broken, each value stands below its method."""
    methods = ["source-only", "source-only-fusion", "xmuda", "ftdpp", "target-only"]
    recipes = [systems.recipe("usa-singapore", method) for method in methods]
    text = printed(screen.recipes_table(recipes, "usa-singapore, paper preset"))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    names = {field.name for field in dataclasses.fields(recipes[0])} - {"scenario", "method"}
    differing = {n for n in names if len({getattr(r, n, None) for r in recipes}) > 1}
    words = set(text.split())
    assert differing <= words
    assert not (names - differing) & words
    for word in ("80000,", "source-", "0.0001", "(source)", "2.168,"):
        assert word in words
    rows = [[c.strip() for c in r.split("│")[1:-1]] for r in text.splitlines() if r[:1] == "│"]
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["distill_single"][methods.index("ftdpp")] == "0.1"
    assert by_name["distill_single"][methods.index("xmuda")] == "(0.0)", "it does not read it"
    assert by_name["fusion"][methods.index("ftdpp")] == "true"


def test_many_methods_go_into_further_tables() -> None:
    some = [
        Recipe(method=f"method-{i}", steps=1000 + i, milestones=(100_000 + i,)) for i in range(9)
    ]
    some.append(OwnRecipe(method="own", prompts=7))
    text = printed(screen.recipes_table(some, "a title"))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("setting ") > 1
    assert text.count("a title") == 1
    for i in range(9):
        assert f" {1000 + i} " in text
        assert f" {100_000 + i} " in text
    [row] = [line for line in text.splitlines() if "prompts" in line and " 7 " in line]
    others = [c.strip() for c in row.split("│")[2:-1]]
    assert others[-1] == "7"
    assert set(others[:-1]) <= {""}, "the others have no such setting"


def test_one_recipe_is_shown_whole() -> None:
    recipe = systems.recipe("a2d2-skitti", "ftdpp")
    text = printed(screen.recipes_table([recipe], "a2d2-skitti, paper preset"))
    assert text.startswith("a2d2-skitti, paper preset")
    names, values = columns(text)
    for field in dataclasses.fields(recipe):
        if field.name not in ("scenario", "method"):
            assert field.name in names
    for weight in recipe.class_weights:
        assert str(weight) in values
