"""What a person sees in the terminal: progress, tables, and the driver that turns signals into "save, then leave".

Messages and progress go to standard error, results to standard output.
"""

from __future__ import annotations

import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ftdpp import train
from ftdpp.evaluate import HEADS, Score


def messages() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def results() -> Console:
    """Wide enough for a table where standard output is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def facts(console: Console, rows: list[tuple[str, str, str]]) -> None:
    """Decisions, one a line: what, value, reason."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    console.print(table)


@contextmanager
def bar(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar fed by `progress(done, total, what)`, one line per kind of work."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def tell(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield tell


class _Live(Progress):
    """The bar, and below it lines as long as they need to be: what stands in the bar's columns is cut to the terminal's width."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below, style="dim", no_wrap=False, overflow="fold")  # also where messages are not wrapped


class Display:
    """Live view of one training or several: bar, ETA, data-wait share, memory, every loss term.

    `work` is the total in the units of `train.cost`, so that cheap and costly runs share one honest ETA.
    """

    def __init__(self, console: Console, work: float) -> None:
        self.progress = _Live(TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[note]}"), console=console)
        self.task = self.progress.add_task("starting", total=work, note="")
        self.work, self.done, self.waited, self.worked = work, 0.0, 0.0, 0.0
        self.begin: float | None = None

    def step(self, name: str, event: train.Step, units: float, memory: int) -> None:
        now = time.perf_counter()
        if self.begin is None:
            self.begin = now - event.seconds
        self.done += units
        self.waited += event.seconds * event.waited
        self.worked += event.seconds
        eta = int((now - self.begin) / self.done * max(self.work - self.done, 0))
        terms = " ".join(f"{k} {v:.2f}" for k, v in event.terms.items())
        self.progress.below = (
            f"  {event.seconds * 1e3:.0f} ms, data wait {self.waited / self.worked:.0%}, {memory / 2**30:.1f} GiB: {terms}"
        )
        note = f"{event.iteration} | ETA {eta // 60}:{eta % 60:02d}"
        self.progress.update(self.task, description=name, completed=self.done, note=note)

    def validated(self, name: str, score: Score, best: bool, units: float) -> None:
        self.done += units
        miou = ", ".join(f"{h} {v:.1%}" for h, v in score.miou.items())
        line = f"  {name}: {score.checkpoint}, {score.domain} {score.split} ({score.frames} frames): mIoU {miou}"
        self.progress.console.print(line + (" (best so far)" if best else ""), soft_wrap=True)


def drive(run: train.Run, name: str, display: Display, board: Any = None) -> None:
    """Train `run` to its end on `display`, and on a TensorBoard writer if there is one.

    Ctrl-C and SIGTERM finish the iteration, save and raise `train.Interrupted`; a second one leaves at once.
    """

    def stop(signum: int, frame: Any) -> None:
        if run.stop:
            raise KeyboardInterrupt
        run.stop = True

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    units = train.cost(run.recipe)
    try:
        for event in train.fit(run):
            if isinstance(event, train.Step):
                display.step(name, event, units, train.peak_memory(run.device))
                scalars = {f"loss/{k}": v for k, v in event.terms.items()}
            else:
                best = run.best is not None and run.best["iteration"] == run.iteration
                display.validated(name, event, best, event.frames)
                scalars = {f"val/{k}": v for k, v in event.miou.items()}
            if board is not None:
                for key, value in scalars.items():
                    board.add_scalar(key, value, run.iteration)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def score_table(score: Score, method: str) -> Table:
    """IoU per class and mIoU of one evaluation, in percent."""
    table = Table(
        title=f"{method}, {score.checkpoint}, on {score.domain} {score.split}: {score.frames} frames, "
        f"{score.points:,} labelled points"
        + (f" ({score.outside:,} POINTS OUTSIDE THE VOXEL GRID LEFT OUT)" if score.outside else "")
        + "; IoU in percent",
        title_justify="left",
    )
    table.add_column("class")
    for head in HEADS:
        table.add_column(head.upper(), justify="right")
    for name in score.iou["2d"]:
        absent = " (no labelled point: counts as 0)" if name in score.absent else ""
        values = [score.iou[head][name] for head in HEADS]
        table.add_row(name + absent, *("-" if v is None else f"{100 * v:.1f}" for v in values))
    table.add_section()
    table.add_row("mIoU", *(f"{100 * score.miou[head]:.1f}" for head in HEADS))
    return table


def compare_table(rows: list[dict[str, Any]], title: str) -> Table:
    """mIoU of each method in percent, mean and sample standard deviation over its seeds."""
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for head in HEADS:
        table.add_column(head.upper(), justify="right")
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for head in HEADS:
            values = [100 * row["miou"][head] for row in rows if row["method"] == method]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        table.add_row(method, *cells)
    return table


def pseudo_table(meta: dict[str, Any], title: str) -> Table:
    """Threshold, kept and predicted points of each class, from a pseudo-label file's metadata."""
    table = Table(title=title, title_justify="left")
    for column in ("class", "2D threshold", "2D kept", "of", "3D threshold", "3D kept", "of"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for c, name in enumerate(meta["class_names"]):
        cells = [name]
        for m in ("2d", "3d"):
            cells += [f"{meta[f'thresholds_{m}'][c]:.3f}", f"{meta[f'kept_{m}'][c]:,}", f"{meta[f'predicted_{m}'][c]:,}"]
        table.add_row(*cells)
    return table


def plain_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Rows with equal keys; floats in three digits, None blank, text left-aligned."""
    table = Table(title=title, title_justify="left")
    for key, value in rows[0].items():
        table.add_column(key, justify="left" if isinstance(value, str) else "right", overflow="fold")
    for row in rows:
        table.add_row(*("" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    return table
