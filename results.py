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
from shlex import quote
from typing import Annotated, Any, NamedTuple

import msgspec

from ftdpp import files
from ftdpp.checkpoint import RunError
from ftdpp.evaluate import Score
from ftdpp.index import Index

Row = dict[str, Any]
FORMAT = 1  # of a file of rows
OF_A_RUN = "scores.json"  # in a run's folder: split -> row


class _Row(msgspec.Struct):
    """What a row has to hold, and of which type; it may hold more."""

    scenario: str
    method: str
    title: str
    domain: str
    split: str
    checkpoint: str
    seed: Annotated[int, msgspec.Meta(ge=0)]
    frames: Annotated[int, msgspec.Meta(ge=0)]
    miou: Annotated[dict[str, float], msgspec.Meta(min_length=1)]
    iou: dict[str, dict[str, float | None]]


class _File(msgspec.Struct):
    """What a file of rows has to hold."""

    command: str
    machine: str
    preset: str
    rows: list[Any]


def row_of(score: Score, meta: dict[str, Any], title: str, index: Index, weights: str) -> Row:
    """The row of a checkpoint's score.

    Args:
        meta: of the checkpoint. title: the method with its settings. index: what it was evaluated
        on. weights: of `weights_of`, taken before the checkpoint was read.
    """
    r = {name: value for name, value in meta["recipe"].items() if name != "save_every"}
    same = {"recipe": r, "pretrained": meta.get("pretrained")}
    row = {
        **{name: meta["recipe"][name] for name in ("scenario", "method")},
        **{"title": title, "seed": meta.get("seed") or 0},
        "chosen": meta["best"]["split"] if meta.get("best") else None,
        "settings": hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16],
        "data": index.fingerprint["content"],
        "weights": weights,
    }
    return row | score.as_dict()


def _checked(rows: list[Any], path: Path) -> list[Row]:
    """Rows from a file. Raises RunError where it holds something else."""
    for number, row in enumerate(rows):
        try:
            heads = msgspec.convert(row, _Row)
            wrong = "" if heads.miou.keys() == heads.iou.keys() else "miou and iou of other heads"
        except msgspec.ValidationError as error:
            wrong = str(error)
        if wrong:
            raise RunError(
                f"{path}: row {number}: {wrong}; expected what ftd compare writes (compare.json), "
                "or a run folder"
            )
    return rows


# ---- files -------------------------------------------------------------------------------------


def write(
    path: Path,
    rows: Sequence[Row],
    command: str,
    machine: str,
    preset: str,
    commit: str | None = None,
) -> None:
    """A file of rows, with what one has to type to get them again, and where they were got."""
    text = json.dumps(
        {
            "format": FORMAT,
            "command": command,
            "machine": machine,
            "preset": preset,
            "commit": commit,
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
    again = "name a run folder or a compare.json"
    try:
        found: dict[str, Any] = msgspec.json.decode(files.read(path))
        msgspec.convert(found, _File)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; {again}") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise RunError(f"{path}: not a file of ftd compare ({error}); {again}") from None
    _checked(found["rows"], path)
    return found


def keep(folder: Path, row: Row) -> None:
    """Leave the row of a run's best checkpoint in its folder, beside those of other splits."""
    path = folder / OF_A_RUN
    try:
        rows = msgspec.json.decode(files.read(path))
    except (FileNotFoundError, ValueError):  # damaged: what is left is of no use
        rows = {}
    rows = rows if isinstance(rows, dict) else {}
    rows[row["split"]] = row
    files.sweep(folder)
    files.write(path, json.dumps(rows, indent=1).encode())


def of_run(folder: Path, split: str | None = None) -> Row:
    """The row that a run's folder holds: of `split`; or of test, and of val where there is none.

    Raises:
        RunError: nothing was evaluated, or the checkpoint has changed since.
    """
    path, again = folder / OF_A_RUN, f"evaluate it with: ftd eval {quote(str(folder))}"
    if not (folder / "best.safetensors").exists():
        raise RunError(f"{folder}: no run, or one without a checkpoint yet; leave it out")
    if not path.exists():
        raise RunError(f"{folder}: holds no figures yet; {again}")
    try:
        rows = msgspec.json.decode(files.read(path))
        name = split or ("test" if "test" in rows else "val")
        [row] = _checked([rows[name]], path)
    except (ValueError, TypeError, KeyError):
        wanted = split or "test or val"
        raise RunError(f"{path}: no figure of {wanted}; {again} --split {split or 'val'}") from None
    if row.get("weights") != weights_of(folder):
        raise RunError(f"{path}: of another best.safetensors than the one beside it; {again}")
    return row


def weights_of(folder: Path) -> str:
    """SHA-256 of a run's best checkpoint."""
    with files.regular(folder / "best.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def collect(places: Iterable[Path], split: str | None = None) -> list[Row]:
    """The rows of run folders and of files, each run once. The first place that has it counts, and
    folders, whose rows are known to be of their checkpoints, come before files.

    Raises:
        RunError: a place is neither, or holds nothing of that split.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    for place in sorted(places, key=lambda place: not place.is_dir()):
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


def tables(rows: Sequence[Row], classes: bool = False, head: str | None = None) -> list[Table]:
    """A table for each scenario and split, methods in their order of appearance; its last column is
    what the paper reports for the real data, where it has such rows.

    Args:
        classes: IoU of every class, by `head` (the last one where none is named), instead of the
            mIoU of all heads.
    Raises:
        RunError: no row has that head; or runs of one name have other settings or data.
    """
    made = []
    for scenario, split in dict.fromkeys((row["scenario"], row["split"]) for row in rows):
        mine = [r for r in rows if (r["scenario"], r["split"]) == (scenario, split)]
        names = list(dict.fromkeys(row["title"] for row in mine))
        heads = list(dict.fromkeys(h for row in mine for h in row["miou"]))
        if head is not None and head not in heads:
            raise RunError(f"--head {head}: {scenario} has {', '.join(heads)}")
        shown = head or heads[-1]
        columns = heads
        if classes:
            columns = list(dict.fromkeys(c for r in mine for c in r["iou"].get(shown, ())))
        theirs = published().get(scenario, {}) if not classes else {}
        seeds = sorted({row["seed"] for row in mine})
        lines: list[list[Cell]] = []
        for name in names:
            runs = [row for row in mine if row["title"] == name]
            _require_alike(name, runs)
            few = f" ({len(runs)} of {len(seeds)} seeds)" if len(runs) < len(seeds) else ""
            if classes:
                ious = [run["iou"].get(shown, {}) for run in runs]
                values = [[i[c] for i in ious if i.get(c) is not None] for c in columns]
                values.append([run["miou"][shown] for run in runs if shown in run["miou"]])
            else:
                values = [[r["miou"][h] for r in runs if h in r["miou"]] for h in heads]
            lines.append([name + few, *map(figure, values)])
            if any(n in theirs for n in names):
                lines[-1].append(" / ".join(f"{value:.1f}" for value in theirs.get(name, [])))
        heading = [*columns, "mIoU"] if classes else [h.upper() for h in heads]
        last = ["paper"] if any(n in theirs for n in names) else []
        what = f"IoU of the {shown.upper()} head" if classes else "mIoU"
        source, _, target = scenario.removesuffix("-ssda").partition("-")
        title = f"{source} -> {target}" + (", SSDA" if scenario.endswith("-ssda") else "")
        frames = ", ".join(str(n) for n in sorted({row["frames"] for row in mine}))
        title += f": {what} in percent on {split} ({frames} frames){_chosen(mine)}, "
        title += f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
        made.append(Table(title, ["method", *heading, *last], lines))
    return made


def _require_alike(name: str, runs: Sequence[Row]) -> None:
    """Raises RunError where the runs of a name are not seeds of one thing."""
    for what in ("settings", "data"):
        found = {row[what] for row in runs if what in row}
        if len(found) > 1 or len({row["seed"] for row in runs}) < len(runs):
            raise RunError(
                f"{name}: its runs have {len(found)} different {what} (another preset, data set or "
                "ImageNet weights?), so they have no mean; make a table of each"
            )


def _chosen(rows: Sequence[Row]) -> str:
    """How the checkpoints were chosen, where that is one way."""
    ways = {row.get("chosen", "val") for row in rows}
    if ways == {None}:
        return ", last iteration"
    return ", checkpoint chosen on val" if ways == {"val"} else ""


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


def as_json(made: Sequence[Table]) -> str:
    """All tables in one array: title, columns, rows. A figure is {"mean", "deviation"}, in percent;
    a cell of words is a string."""

    def plain(cell: Cell) -> Any:
        return cell._asdict() if isinstance(cell, Figure) else cell

    return json.dumps([{**t._asdict(), "rows": [[*map(plain, r)] for r in t.rows]} for t in made])


def as_csv(made: Sequence[Table]) -> str:
    """All tables in one file: a line a figure, so that no program has to take cells apart. What the
    paper reports is a line with its 2D, 3D and 2D+3D as they are printed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "method", "column", "mean", "deviation"])
    for table in made:
        for row in table.rows:
            for column, cell in zip(table.columns[1:], row[1:], strict=True):
                if isinstance(cell, Figure):
                    spread = "" if cell.deviation is None else f"{cell.deviation:.3f}"
                    writer.writerow([table.title, row[0], column, f"{cell.mean:.3f}", spread])
                elif column == "paper" and cell:
                    writer.writerow([table.title, row[0], column, cell, ""])
    return out.getvalue()
