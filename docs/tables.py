"""Writes the tables of README and docs from bench/results: python docs/tables.py

A table stands between two comments and is made from the files that the first one names:

    <!-- results: usa-singapore.json more.json | columns: 2D, paper | rows: xmuda, ftdpp -->
    <!-- /results -->

`rows` and `columns` choose and order, `scenario` takes some of several. With `layout: pairs` a row
is a scenario, a column one of the methods in `rows`; `gap: source-only, target-only` adds what lies
between the two, here and in the paper. With `layout: systems` one table has a block a system, each
with the pairs and methods of one option `system`; `SHOWN = METHOD` names a row in other words:

    | system: CrossMatch; usa-singapore, day-night; baseline = source-only, crossmatch

Below each table stands what was measured, where, and by which command: that comes from the files,
too.
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
LAYOUTS = {  # and the options that each knows
    "methods": {"rows", "columns", "scenario"},
    "pairs": {"layout", "rows", "scenario", "gap"},
    "systems": {"layout", "system"},
}


def listed(text: str) -> list[str]:
    """Names with commas between; those in brackets do not count."""
    return [name.strip() for name in re.split(r",(?![^\[]*\])", text)]


def block(words: str, folder: Path = ROOT / "bench" / "results") -> str:
    """The text between the comments."""
    files, *options = [part.strip() for part in words.split("|")]
    pieces = [part.partition(": ") for part in options]
    chosen = {name: listed(text) for name, _, text in pieces if name != "system"}
    of_systems = [text for name, _, text in pieces if name == "system"]
    layout = ", ".join(chosen.get("layout", ["methods"]))
    if layout not in LAYOUTS:
        raise ValueError(f"<!-- results: {words} -->: unknown layout {layout}")
    unknown = {name for name, _, _ in pieces} - LAYOUTS[layout]
    if unknown:
        raise ValueError(f"<!-- results: {words} -->: unknown {', '.join(sorted(unknown))}")
    paths = [folder / name for name in files.split()]
    rows = results.collect(paths)
    if "scenario" in chosen:
        rows = [row for row in rows if row["scenario"] in chosen["scenario"]]
    if "rows" in chosen:
        rows = [row for row in rows if row["title"] in chosen["rows"]]
    if layout == "systems":
        table, rows = systems(rows, of_systems)
        tables = [table]
    elif layout == "pairs":
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


def systems(rows: Sequence[Row], texts: Sequence[str]) -> tuple[Table, list[Row]]:
    """A block a system: its name and pairs, then a row a method. And the rows it is made from.

    A block shows the heads that all its methods have. Beside a pair stands what the paper reports
    for the same heads, where it reports anything.
    """
    lines: list[list[str]] = []
    used: list[Row] = []
    for text in texts:
        name, *lists = (part.strip() for part in text.split(";"))
        scenarios, methods = map(listed, lists)
        shown = {entry.split(" = ")[-1]: entry.split(" = ")[0] for entry in methods}
        mine = [r for r in rows if r["scenario"] in scenarios and r["title"] in shown]
        missing = {*scenarios, *shown} - {r[of] for r in mine for of in ("scenario", "title")}
        heads = [h for h in ("2d", "3d", "2d+3d") if all(h in row["miou"] for row in mine)]
        if missing or not heads:
            what = ", ".join(sorted(missing)) or "a head that all have"
            raise ValueError(f"system {name}: no figure of {what} in these files")
        columns = [[f"**{name}**: {' / '.join(heads).upper()}", *shown.values()]]
        for scenario in scenarios:
            of_pair = [row for row in mine if row["scenario"] == scenario]
            columns += beside_the_paper(of_pair, heads, list(shown))
        lines += [list(line) for line in zip(*columns, strict=True)]
        used += [row for row in mine if row not in used]
    width = max(map(len, lines))
    heading, *body = [[*line, *[""] * (width - len(line))] for line in lines]
    title = (
        "mIoU in percent: mean over seeds, and of a single head the deviation; checkpoint chosen "
    )
    title += "on val. Paper: what the papers report for the real data sets"
    return Table(title, heading, [list(line) for line in body]), used


def beside_the_paper(
    rows: Sequence[Row], heads: Sequence[str], methods: Sequence[str]
) -> list[list[str]]:
    """The columns of one pair: ours; and the paper's, where it has one."""
    made = results.tables(rows)  # which refuses to mix settings or data
    scenario, splits = rows[0]["scenario"], {row["split"] for row in rows}
    if len(splits) > 1 or "checkpoint chosen on val" not in made[0].title:
        raise ValueError(f"{scenario}: several splits, or checkpoints not chosen on val")
    seeds = len({row["seed"] for row in rows})
    pair = f"**{scenario.replace('-', ' -> ', 1)}**, {splits.pop()}"
    ours = [f"{pair}, {seeds} seed{'s' if seeds > 1 else ''}"]
    places = [made[0].columns.index(head.upper()) for head in heads]
    found = {str(line[0]).split(" (")[0]: line for line in made[0].rows}
    for method in methods:
        name, *_ = line = found.get(method, [""])
        figures = [line[place] for place in places] if name else []
        means = [cell.mean for cell in figures if isinstance(cell, results.Figure)]
        few = "".join(str(name).partition(" (")[1:])  # seeds, where others have more
        ours.append((str(figures[0]) if len(figures) == 1 else joined(means)) + few)
    published = results.published().get(scenario, {})
    alike = {name: values for name, values in published.items() if len(values) == len(heads)}
    paper = [joined(alike.get(method, [])) for method in methods]
    return [ours, ["paper", *paper]] if any(paper) else [ours]


def joined(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.1f}" for value in values)


def sources(paths: Sequence[Path], rows: Sequence[Row]) -> list[str]:
    """Of the files that the rows come from: preset, machine, command; a line each."""
    lines = []
    for path in paths:
        file = results.read(path)
        if any(row in file["rows"] for row in rows):
            about = f"`bench/results/{path.name}`, `{file['preset']}` preset, {file['machine']}"
            lines.append(f"- {about}: `{file['command']}`")
    return lines


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
