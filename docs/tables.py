"""Writes the tables of README and docs from bench/results: python docs/tables.py

A table stands between two comments and is made from the files that the first one names:

    <!-- results: usa-singapore.json more.json | columns: 2D, paper | rows: xmuda, ftdpp -->
    <!-- /results -->

`rows` and `columns` choose and order, `scenario` takes some of several. With `layout: pairs` a row
is a scenario, a column one of the methods in `rows`; `gap: source-only, target-only` adds what lies
between the two, here and in the paper. Below each table stands what was measured, where, and by
which command: that comes from the files, too.
"""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

from ftdpp import results
from ftdpp.results import Row, Table

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- results: (.*?) -->\n.*?<!-- /results -->", re.S)
WIDTH = 128


def listed(text: str) -> list[str]:
    """Names with commas between; those in brackets do not count."""
    return [name.strip() for name in re.split(r",(?![^\[]*\])", text)]


def block(words: str, folder: Path = ROOT / "bench" / "results") -> str:
    """The text between the comments."""
    files, *options = [part.strip() for part in words.split("|")]
    chosen = {name: listed(text) for name, text in (part.split(": ", 1) for part in options)}
    unknown = chosen.keys() - {"rows", "columns", "scenario", "layout", "gap"}
    if unknown:
        raise ValueError(f"<!-- results: {words} -->: unknown {', '.join(unknown)}")
    paths = [folder / name for name in files.split()]
    rows = results.collect(paths)
    if "scenario" in chosen:
        rows = [row for row in rows if row["scenario"] in chosen["scenario"]]
    if "rows" in chosen:
        rows = [row for row in rows if row["title"] in chosen["rows"]]
    if chosen.get("layout") == ["pairs"]:
        tables = [pairs(rows, chosen["rows"], chosen.get("gap"))]
    else:
        tables = [narrowed(table, chosen) for table in results.tables(rows)]
    parts = []
    for table in tables:
        about = textwrap.wrap(f"*{table.title}*", WIDTH, break_on_hyphens=False)
        parts.append("\n".join([results.markdown(table), *about]))
    return "\n\n".join([*parts, "\n".join(sources(paths, rows))])


def narrowed(table: Table, chosen: dict[str, list[str]]) -> Table:
    """Rows and columns in the wanted order."""
    columns, rows = table.columns, table.rows
    if "rows" in chosen:
        rows = [r for name in chosen["rows"] for r in rows if str(r[0]).split(" (")[0] == name]
    if "columns" in chosen:
        places = [columns.index(name) for name in ["method", *chosen["columns"]]]
        columns, rows = [columns[i] for i in places], [[row[i] for i in places] for row in rows]
    return table._replace(columns=columns, rows=rows)


def pairs(rows: Sequence[Row], methods: list[str], gap: list[str] | None) -> Table:
    """A row a scenario, a column a method: its heads' mIoU; of a single head with deviation."""
    lines: list[list[results.Cell]] = []
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        mine = [row for row in rows if row["scenario"] == scenario]
        seeds = len({row["seed"] for row in mine})
        line: list[results.Cell] = [scenario.replace("-", " -> ", 1)]
        means: dict[str, list[float]] = {}
        for method in methods:
            runs = [row["miou"] for row in mine if row["title"] == method]
            heads = list(runs[0]) if runs else []
            figures = [results.figure([run[head] for run in runs]) for head in heads]
            means[method] = [100 * statistics.mean(run[head] for run in runs) for head in heads]
            few = f" ({len(runs)} of {seeds} seeds)" if 0 < len(runs) < seeds else ""
            single = len(figures) == 1
            line.append((str(figures[0]) if single else joined(means[method])) + few)
        if gap:
            published = results.published().get(scenario, {})
            for found in (means, published):
                low, high = (found.get(method, []) for method in gap)
                both = zip(low, high, strict=True) if low and high else ()
                line.append(joined([b - a for a, b in both]))
        line.append(f"{seeds}, {mine[0]['split']}")
        lines.append(line)
    more = ["gap", "gap in the paper"] if gap else []
    title = "mIoU in percent, 2D / 3D / 2D+3D, or of 2D alone; checkpoint chosen on val"
    return Table(title, ["pair", *methods, *more, "seeds, split"], lines)


def joined(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.1f}" for value in values)


def sources(paths: Sequence[Path], rows: Sequence[Row]) -> list[str]:
    """Of the files that the rows come from: preset, machine, command, a line or two each."""
    lines = []
    for path in paths:
        file = results.read(path)
        if any(row in file["rows"] for row in rows):
            about = f"`bench/results/{path.name}`, `{file['preset']}` preset, {file['machine']}:"
            lines += ["", *textwrap.wrap(about, WIDTH), f"`{file['command']}`"]
    return lines[1:]


def update(text: str) -> str:
    """The page with true tables."""
    return BLOCK.sub(
        lambda found: f"<!-- results: {found[1]} -->\n{block(found[1])}\n<!-- /results -->", text
    )


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    for path in pages():
        path.write_text(update(path.read_text()))


if __name__ == "__main__":
    main()
