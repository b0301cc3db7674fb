"""The figures of runs as data: rows in JSON files and run folders, and tables made from them.

A row is one run's score on one split: what `evaluate.Score` holds, with scenario, method, title and
seed. `ftd compare` writes files of rows, `ftd eval` and `ftd compare` leave a run's row in its
folder, and every table (terminal, README, LaTeX) is made from such rows by `tables`.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import statistics
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ftdpp import files
from ftdpp.checkpoint import RunError, read_metadata
from ftdpp.evaluate import Score

Row = dict[str, Any]
FORMAT = 1  # of a file of rows
OF_A_RUN = "scores.json"  # in a run's folder: split -> row

# What a row has to hold, and of which type.
_FIELDS: dict[str, type] = {
    **dict.fromkeys(("scenario", "method", "title", "domain", "split", "checkpoint"), str),
    **{"seed": int, "frames": int, "miou": dict, "iou": dict},
}


def row_of(score: Score, scenario: str, method: str, title: str, seed: int) -> Row:
    """The row of a run's score.

    Args:
        method: without settings and stage, as the paper's tables name it. title: with them.
    """
    named = {"scenario": scenario, "method": method, "title": title, "seed": seed}
    return named | score.as_dict()


def _checked(rows: Any, path: Path) -> list[Row]:
    """Rows from a file. Raises RunError where it holds something else."""
    for number, row in enumerate(rows if isinstance(rows, list) else [None]):
        found = row if isinstance(row, dict) else {}
        wrong = [name for name, kind in _FIELDS.items() if not isinstance(found.get(name), kind)]
        numbers = [n for n in found.get("miou", {}).values() if isinstance(n, int | float)]
        if wrong or not numbers or len(numbers) != len(found["miou"]):
            raise RunError(
                f"{path}: row {number} has no usable {', '.join(wrong) or 'miou'}; expected what "
                "ftd compare writes (compare.json), or a run folder"
            )
    return list(rows)


# ---- files -------------------------------------------------------------------------------------


def write(path: Path, rows: Sequence[Row], command: str, machine: str, preset: str) -> None:
    """A file of rows, with what one has to type to get them again, and where they were got."""
    text = json.dumps(
        {
            "format": FORMAT,
            "command": command,
            "machine": machine,
            "preset": preset,
            "rows": list(rows),
        },
        indent=1,
    )
    files.write(path, (text + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """A file that `write` wrote.

    Raises:
        RunError: it is none, or damaged.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; name a run folder or a compare.json") from None
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error}); name a run folder or a compare.json") from None
    words = ("command", "machine", "preset")
    if not isinstance(found, dict) or not all(isinstance(found.get(w), str) for w in words):
        raise RunError(f"{path}: not a file of ftd compare; name a run folder or a compare.json")
    found["rows"] = _checked(found.get("rows"), path)
    return found


def keep(folder: Path, row: Row) -> None:
    """Leave the row of a run's best checkpoint in its folder, beside those of other splits."""
    path = folder / OF_A_RUN
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError):
        rows = {}
    rows = rows if isinstance(rows, dict) else {}
    rows[row["split"]] = {**row, "weights": _digest(folder / "best.safetensors")}
    files.write(path, json.dumps(rows, indent=1).encode())


def of_run(folder: Path, split: str | None = None) -> Row:
    """The row that a run's folder holds: of `split`; or of test, and of val where there is none.

    Raises:
        RunError: nothing was evaluated, or the checkpoint has changed since.
    """
    path, again = folder / OF_A_RUN, f"evaluate it with: ftd eval {folder}"
    read_metadata(folder / "best.safetensors")
    if not path.exists():
        raise RunError(f"{folder}: holds no figures yet; {again}")
    try:
        rows = json.loads(path.read_text())
        name = split or ("test" if "test" in rows else "val")
        [row] = _checked([rows[name]], path)
    except (ValueError, TypeError, KeyError):
        wanted = split or "test or val"
        raise RunError(f"{path}: no figure of {wanted}; {again} --split {split or 'val'}") from None
    if row.get("weights") != _digest(folder / "best.safetensors"):
        raise RunError(f"{path}: of another best.safetensors than the one beside it; {again}")
    return row


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def collect(places: Iterable[Path], split: str | None = None) -> list[Row]:
    """The rows of run folders and of files, each run once: the first place that has it counts."""
    rows: dict[tuple[Any, ...], Row] = {}
    for place in places:
        found = [of_run(place, split)] if place.is_dir() else read(place)["rows"]
        for row in found:
            if split in (None, row["split"]):
                key = tuple(row[name] for name in ("scenario", "split", "title", "seed"))
                rows.setdefault(key, row)
    return list(rows.values())


# ---- tables ------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """Mean and sample standard deviation over seeds, in percent; of one seed there is none."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")


Cell = Figure | str


class Table(NamedTuple):
    """Rows of one scenario and split: words and figures, ready for any format."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]


@functools.cache
def published() -> dict[str, dict[str, list[float]]]:
    """Scenario -> method -> mIoU that the papers report on the real data: 2D, 3D, 2D+3D."""
    text = (Path(__file__).parent / "systems" / "published.toml").read_text()
    found: dict[str, dict[str, list[float]]] = tomllib.loads(text)
    return found


def figure(values: Sequence[float]) -> Cell:
    """Mean and deviation of fractions, in percent; a dash for none."""
    if not values:
        return "-"
    deviation = 100 * statistics.stdev(values) if len(values) > 1 else None
    return Figure(100 * statistics.mean(values), deviation)


def tables(rows: Sequence[Row], head: str | None = None, paper: bool = True) -> list[Table]:
    """A table for each scenario and split, methods in their order of appearance.

    Args:
        head: IoU of every class by this head, instead of the mIoU of all heads.
        paper: a last column with what the paper reports for the real data, where it has the row.
    Raises:
        RunError: no row has that head.
    """
    made = []
    for scenario, split in dict.fromkeys((row["scenario"], row["split"]) for row in rows):
        mine = [r for r in rows if (r["scenario"], r["split"]) == (scenario, split)]
        names = list(dict.fromkeys(row["title"] for row in mine))
        heads = list(dict.fromkeys(h for row in mine for h in row["miou"]))
        if head is not None and head not in heads:
            raise RunError(f"--head {head}: {scenario} has {', '.join(heads)}")
        columns = heads if head is None else list(mine[0]["iou"][head])
        theirs = published().get(scenario, {}) if paper and head is None else {}
        lines: list[list[Cell]] = []
        for name in names:
            runs = [row for row in mine if row["title"] == name]
            parts = [_values(runs, column, head) for column in columns]
            mean = [] if head is None else [_values(runs, head, None)]
            lines.append([name, *map(figure, [*parts, *mean])])
            if any(n in theirs for n in names):
                lines[-1].append(" / ".join(f"{value:.1f}" for value in theirs.get(name, [])))
        heading = [h.upper() for h in heads] if head is None else [*columns, "mIoU"]
        last = ["paper"] if any(n in theirs for n in names) else []
        what = "mIoU" if head is None else f"IoU of the {head.upper()} head"
        source, _, target = scenario.removesuffix("-ssda").partition("-")
        title = f"{source} -> {target}" + (", SSDA" if scenario.endswith("-ssda") else "")
        seeds = sorted({row["seed"] for row in mine})
        frames = ", ".join(str(n) for n in sorted({row["frames"] for row in mine}))
        chosen = "" if split == "val" else ", checkpoint chosen on val"
        title += f": {what} in percent on {split} ({frames} frames){chosen}, "
        title += f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
        made.append(Table(title, ["method", *heading, *last], lines))
    return made


def _values(runs: Sequence[Row], column: str, head: str | None) -> list[float]:
    found = [run["miou"].get(column) if head is None else run["iou"][head][column] for run in runs]
    return [value for value in found if value is not None]


def markdown(table: Table) -> str:
    bars = ["---"] * len(table.columns)
    lines: list[Sequence[Cell]] = [table.columns, bars, *table.rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines) + "\n"


def latex(table: Table) -> str:
    """A tabular with the rules of booktabs."""
    special = {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "±": r"$\pm$"}

    def line(cells: Iterable[Cell]) -> str:
        texts = ["".join(special.get(c, c) for c in str(cell)) for cell in cells]
        return "  " + " & ".join(texts) + r" \\"

    layout = "l" + "r" * (len(table.columns) - 1)
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{layout}}}",
            r"  \toprule",
            line(table.columns),
            r"  \midrule",
            *(line(row) for row in table.rows),
            r"  \bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def as_csv(made: Sequence[Table]) -> str:
    """All tables in one file: a line a figure, so that no program has to take cells apart."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "method", "column", "mean", "deviation"])
    for table in made:
        for row in table.rows:
            for column, cell in zip(table.columns[1:], row[1:], strict=True):
                if isinstance(cell, Figure):
                    spread = "" if cell.deviation is None else f"{cell.deviation:.3f}"
                    writer.writerow([table.title, row[0], column, f"{cell.mean:.3f}", spread])
    return out.getvalue()
