"""What a person sees in the terminal: decisions, progress, tables, and the driver of a training.

Messages and progress go to standard error, results to standard output. On a terminal progress is
one live line; where the output is piped to a file or to another program it is plain lines.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ftdpp import files, machine, parallel, results, train
from ftdpp.evaluate import Score
from ftdpp.readers import plural
from ftdpp.recipe import Recipe

EVERY = 30.0  # seconds: the longest silence of a command that moves, where its output is piped


def messages() -> Console:
    return _console(stderr=True, soft_wrap=not sys.stderr.isatty())


def output() -> Console:
    """Wide enough for a table where standard output is not a terminal."""
    return _console(width=None if sys.stdout.isatty() else 200)


class _Console(Console):
    """One of messages falls silent where nobody reads them any more: the work goes on."""

    def on_broken_pipe(self) -> None:
        if not self.stderr:
            super().on_broken_pipe()
        self.quiet = True
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stderr.fileno())


def _console(**options: Any) -> Console:
    """A console that prints text as it is: a path may hold [brackets] or :colons:."""
    stream = sys.stderr if options.get("stderr") else sys.stdout
    options["quiet"] = parallel.number() > 0  # the first process speaks
    if not stream.isatty():
        options["force_interactive"] = False  # no live line in a log, whatever FORCE_COLOR says
    return _Console(markup=False, emoji=False, highlight=False, **options)


def facts(console: Console, rows: Iterable[tuple[str, str, str]]) -> None:
    """Decisions, one a line: what, value, reason. Long ones wrap on a terminal; nothing is cut."""
    rows = list(rows)
    width = max((len(what) for what, _, _ in rows), default=0)
    if not console.is_interactive:
        for what, value, reason in rows:
            line = f"{what:<{width}}  {value}" + (f"  ({reason})" if reason else "")
            console.print(line, soft_wrap=True)
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for what, value, reason in rows:
        table.add_row(what, Text.assemble(value, "  ", (reason, "dim")))
    console.print(table)


# ---- progress ------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds as 0:07, 1:10 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Pace:
    """Says when a plain line is due: at the first call, then before `EVERY` seconds have passed."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.printed: float | None = None
        self.called: float | None = None

    def due(self) -> bool:
        """To be called once a step. The next one may take as long, or a third of `EVERY`."""
        now = self.clock()
        step = now - self.called if self.called is not None else 0.0
        self.called = now
        coming = now + max(step, EVERY / 3)
        if self.printed is not None and coming - self.printed <= EVERY:
            return False
        self.printed = now
        return True


class _Lines:
    """Plain lines of each kind of work: when it starts, while it moves, at its end."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self.console, self.clock = console, clock
        self.works: dict[str, _Work] = {}

    def tell(self, done: int, total: int, what: str) -> None:
        work = self.works.get(what)
        goes_on = work is not None and total == work.total and done > work.done
        if work is None or not goes_on:
            work = self.works[what] = _Work(_Pace(self.clock), self.clock(), done)
        work.done, work.total = done, total
        if work.pace.due() or done >= total:
            line = f"{what}: {done} of {total}"
            spent = self.clock() - work.begin
            if done >= total:
                line += f", took {duration(spent)}" if goes_on else ""
            elif done > work.first:
                line += f", {duration(spent / (done - work.first) * (total - done))} left"
            self.console.print(line, soft_wrap=True)


@dataclasses.dataclass
class _Work:
    """One kind of work under way."""

    pace: _Pace
    begin: float
    first: int
    done: int = 0
    total: int = 0


@contextmanager
def bar(console: Console, clock: Callable[[], float] = time.monotonic) -> Iterator[files.Progress]:
    """Progress of the work inside, fed by `tell(done, total, what)`; `what` is a kind of work.

    On a terminal a bar for each kind, gone at the end. Where the output is piped, a plain line when
    a kind of work starts, at least every 30 seconds while it moves, and one at its end.
    """
    if not console.is_interactive:
        yield _Lines(console, clock).tell
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def tell(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield tell


class _Live(Progress):
    """The bar, and below it lines as long as they need to be.

    What stands in the bar's own columns is cut to the terminal's width.
    """

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below, style="dim", overflow="fold")


class _Trend:
    """The course of a value: means over stretches of equal length, drawn as a line of blocks."""

    WIDTH = 16

    def __init__(self) -> None:
        self.means: list[float] = []
        self.stretch: list[float] = []  # not complete yet
        self.length = 1

    def add(self, value: float) -> None:
        self.stretch.append(value)
        if len(self.stretch) < self.length:
            return
        self.means.append(statistics.fmean(self.stretch))
        self.stretch = []
        if len(self.means) == self.WIDTH:  # two become one
            pairs = zip(self.means[::2], self.means[1::2], strict=True)
            self.means = [statistics.fmean(pair) for pair in pairs]
            self.length *= 2

    def __str__(self) -> str:
        low, high = min(self.means, default=0.0), max(self.means, default=0.0)
        step = (high - low) / 7 or 1.0
        return "".join("▁▂▃▄▅▆▇█"[round((value - low) / step)] for value in self.means)


class Display:
    """View of one training or several: ETA, data-wait share, memory, every loss term.

    A context manager. On a terminal a live bar, and of a single training the course of each term
    and of the validations; where the output is piped, a plain line at the first iteration, at least
    every 30 seconds, and at the last one.

    Args:
        work: total in the units of `System.cost`, so that cheap and costly runs share one ETA.
        clock: seconds. several: whether runs go on at once; each then has a line of its own.
    """

    def __init__(
        self,
        console: Console,
        work: float,
        clock: Callable[[], float] = time.perf_counter,
        several: bool = False,
    ) -> None:
        self.console, self.work, self.clock, self.several = console, work, clock, several
        self.done = self.waited = self.worked = 0.0
        self.begin: float | None = None
        self.paces: dict[str, _Pace] = {}  # by name of a run
        self.below: dict[str, str] = {}
        self.trends: dict[str, dict[str, _Trend]] = {}  # by name of a run, then of a value
        self.lines = _Lines(console, clock)
        # The name stands below, where it is not cut to a column's width.
        self.live = _Live(BarColumn(40), TextColumn("{task.percentage:.0f}%"), console=console)
        self.task = self.live.add_task("", total=work)

    def __enter__(self) -> Display:
        if self.console.is_interactive:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.console.is_interactive:
            self.live.stop()

    def tell(self, done: int, total: int, what: str, name: str = "") -> None:
        """Progress of what is no training step: a validation, say; of a run that has a name."""
        what = f"{name}: {what}" if name else what
        if self.console.is_interactive:
            self._show(name, f"  {what}: {done} of {total}")
        else:
            self.lines.tell(done, total, what)

    def _show(self, name: str, line: str) -> None:
        """Put a line below the bar, in the place of the last one of this run, or of all."""
        self.below = {**(self.below if self.several else {}), name: line}
        self.live.below = "\n".join(self.below.values())

    def ended(self, name: str) -> None:
        """Take the line of a run away."""
        self.below.pop(name, None)
        self.live.below = "\n".join(self.below.values())

    def step(self, name: str, event: train.Step, steps: int, units: float, memory: int) -> None:
        """Show one iteration of `steps`, which was `units` of work; memory in bytes."""
        now = self.clock()
        if self.begin is None:
            self.begin = now - event.seconds
        self.done += units
        self.waited += event.seconds * event.waited
        self.worked += event.seconds
        left = (now - self.begin) / self.done * max(self.work - self.done, 0)
        eta = f"ETA {duration(left)}"
        speed = (
            f"{event.seconds * 1e3:.0f} ms, data wait {self.waited / max(self.worked, 1e-9):.0%}, "
            f"{memory / 2**30:.1f} GiB"
        )
        terms = " ".join(f"{term} {value:.2f}" for term, value in event.terms.items())
        if self.console.is_interactive:
            place = f"{name}: {event.iteration}/{steps}, {eta}, {speed}"
            if self.several:
                self._show(name, f"  {place}: {terms}")
            else:
                self._show(name, f"  {place}\n{self._courses(name, event.terms)}")
            self.live.update(self.task, completed=self.done)
            return
        if self.paces.setdefault(name, _Pace(self.clock)).due() or event.iteration == steps:
            line = f"{name}: iteration {event.iteration} of {steps}, {eta}, {speed}: {terms}"
            self.console.print(line, soft_wrap=True)

    def _courses(self, name: str, terms: dict[str, float]) -> str:
        """Each value with its course, in as many columns as fit; validations behind the terms."""
        trends = self.trends.setdefault(name, {})
        for term, value in terms.items():
            trends.setdefault(term, _Trend()).add(value)
        last = {**{key: trend.means[-1] for key, trend in trends.items() if trend.means}, **terms}
        longest = max(map(len, last))
        cells = [
            f"{key:<{longest}} {value:5.2f} {trends[key]!s:<{_Trend.WIDTH}}"
            for key, value in sorted(last.items(), key=lambda item: item[0].startswith("val "))
        ]
        columns = max(1, (self.console.width - 2) // (len(cells[0]) + 2))
        rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
        return "\n".join("  " + "  ".join(row).rstrip() for row in rows)

    def validated(self, name: str, score: Score, best: bool, units: float) -> None:
        """Show a validation, which was `units` of work."""
        self.done += units
        self.live.update(self.task, completed=self.done)
        for head, value in score.miou.items():
            self.trends.setdefault(name, {}).setdefault(f"val {head}", _Trend()).add(100 * value)
        miou = ", ".join(f"{head} {value:.1%}" for head, value in score.miou.items())
        line = (
            f"  {name}: {score.checkpoint}, {score.domain} {score.split} "
            f"({plural(score.frames, 'frame')}): mIoU {miou}"
        )
        self.console.print(line + (" (best so far)" if best else ""), soft_wrap=True)


def drive(run: train.Run, name: str, display: Display, board: Any = None) -> None:
    """Train `run` to its end on `display`, and on a TensorBoard writer if there is one.

    Ctrl-C and SIGTERM finish the iteration, save and raise `train.Interrupted`; a second one leaves
    at once.
    """

    def stop(signum: int, frame: Any) -> None:
        if run.stop:
            raise KeyboardInterrupt
        run.stop = True

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    steps, units = run.recipe.steps, run.system.cost(run.recipe) * run.recipe.accumulate
    run.progress = display.tell  # a validation of minutes must not be silent
    try:
        for event in train.fit(run):
            if isinstance(event, train.Step):
                display.step(name, event, steps, units, machine.peak_memory(run.device))
                scalars = {f"loss/{term}": value for term, value in event.terms.items()}
            else:
                best = run.best is not None and run.best["iteration"] == run.iteration
                display.validated(name, event, best, event.frames)
                scalars = {f"val/{head}": value for head, value in event.miou.items()}
            if board is not None:
                for key, value in scalars.items():
                    board.add_scalar(key, value, run.iteration)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


# ---- tables --------------------------------------------------------------------------------------


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """Text columns, then columns of numbers. What is too long for the terminal goes on below."""
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, overflow="fold", justify="right")
    return table


def show(console: Console, table: Table) -> None:
    """Print a table below its title, which is not wrapped to the table's width."""
    title, table.title = table.title, None
    console.print(title, soft_wrap=True)
    console.print(table)


def score_table(score: Score, method: str) -> Table:
    """IoU of each class and mIoU of one evaluation, in percent, for every head that it has."""
    outside = (
        f" ({score.outside:,} POINTS OUTSIDE THE VOXEL GRID LEFT OUT)" if score.outside else ""
    )
    rows = "points"
    if score.pixels:
        rows = f"pixels of label images of {score.pixels[0]} x {score.pixels[1]} (H x W)"
    title = (
        f"{method}, {score.checkpoint}, on {score.domain} {score.split}: "
        f"{plural(score.frames, 'frame')}, {score.points:,} labelled {rows}{outside}; "
        "IoU in percent"
    )
    heads = list(score.miou)
    table = _table(title, ["class"], [head.upper() for head in heads])
    for name in next(iter(score.iou.values())):
        absent = " (no labelled point: counts as 0)" if name in score.absent else ""
        values = [score.iou[head][name] for head in heads]
        table.add_row(name + absent, *("-" if v is None else f"{100 * v:.1f}" for v in values))
    table.add_section()
    table.add_row("mIoU", *(f"{100 * score.miou[head]:.1f}" for head in heads))
    return table


def results_table(table: results.Table) -> Table:
    """Figures of runs, as `results.tables` makes them."""
    made = _table(table.title, table.columns[:1], table.columns[1:])
    for row in table.rows:
        made.add_row(*map(str, row))
    return made


def pseudo_table(meta: dict[str, Any], title: str) -> Table:
    """Threshold, kept and predicted points of each class and head, from a pseudo-label file."""
    table = _table(title, ["class", "head"], ["threshold", "kept", "predicted", "share"])
    heads = list(meta["thresholds"])
    for c, name in enumerate(meta["class_names"]):
        for head in heads:
            threshold = meta["thresholds"][head][c]
            kept, predicted = meta["kept"][head][c], meta["predicted"][head][c]
            share = f"{kept / predicted:.0%}" if predicted else "-"
            shown = name if head == heads[0] else ""
            table.add_row(
                shown, head.upper(), f"{threshold:.3f}", f"{kept:,}", f"{predicted:,}", share
            )
    return table


def plain_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Rows with equal keys; floats in three digits, None blank, text left-aligned."""
    table = Table(title=title, title_justify="left")
    for key, value in rows[0].items():
        justify: Any = "left" if isinstance(value, str) else "right"
        table.add_column(key, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# ---- recipes -------------------------------------------------------------------------------------


def recipes_table(recipes: Sequence[Recipe], title: str, width: int = 80) -> RenderableType:
    """The settings in which the methods of one scenario differ; of a single recipe, all settings.

    A row is a setting, a column a method. Methods that do not fit beside each other in `width`
    columns of text follow in further tables.
    """
    note = Text("in parentheses: fixed, or not read by this method; --set refuses it", "dim")
    if len(recipes) == 1:
        [recipe] = recipes
        table = _table(title, ["setting", recipe.method], [])
        for name in _settings(recipe):
            table.add_row(name, _setting(recipe, name))
        return Group(table, note)

    names = [
        name
        for name in dict.fromkeys(name for recipe in recipes for name in _settings(recipe))
        if len({repr(getattr(recipe, name, None)) for recipe in recipes}) > 1
    ]
    columns = []
    for recipe in recipes:
        heading = recipe.method.replace("-", "-\n")
        columns.append([heading, *(_setting(recipe, name, digits=3) for name in names)])
    widths = [
        max(len(word) for text in column for word in [*text.split(), ""]) for column in columns
    ]
    first = max(len(name) for name in [*names, "setting"])

    groups: list[list[int]] = []
    room = 0
    for i, needed in enumerate(widths):
        if not groups or room < needed + 3:  # 3 for a column's frame
            groups.append([])
            room = width - first - 4
        groups[-1].append(i)
        room -= needed + 3
    tables: list[Table] = []
    for group in groups:
        table = Table(title=None if tables else title, title_justify="left")
        table.add_column("setting", width=first)
        for i in group:
            table.add_column(columns[i][0], width=widths[i])
        for row, name in enumerate(names, 1):
            table.add_row(name, *(columns[i][row] for i in group))
        tables.append(table)
    return Group(*tables, note)


def _settings(recipe: Recipe) -> list[str]:
    fields = [field.name for field in dataclasses.fields(recipe)]
    return [name for name in fields if name not in ("scenario", "method")]


def _setting(recipe: Recipe, name: str, digits: int = 17) -> str:
    """A setting as `--set` takes it, in parentheses where it refuses it; "" where there is none.

    The decimals of long lists can be rounded to so many digits.
    """
    value = getattr(recipe, name, "")
    if isinstance(value, tuple):
        rounded = [round(v, digits) if isinstance(v, float) else v for v in value]
        text = ", ".join(map(str, rounded)) or "none"  # can go on in the next line
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"({text})" if name in recipe.unread() else text
