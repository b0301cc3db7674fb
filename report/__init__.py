"""`ftd report`: runs on one HTML page that needs nothing else, neither network nor script."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from PIL import Image

from ftdpp import checkpoint, pictures, results, runs
from ftdpp.checkpoint import RunError
from ftdpp.data import Frame
from ftdpp.evaluate import iou
from ftdpp.files import Progress
from ftdpp.index import Index, original_frames
from ftdpp.pictures import Panel
from ftdpp.readers import plural
from ftdpp.report.charts import lines
from ftdpp.report.survey import Curve, Survey, curves, labels_of, look

STYLE = Path(__file__).with_name("page.css")
PANEL = 560  # pixels: width of a picture on the page


@dataclass
class Shown:
    """A run on the page."""

    folder: Path
    title: str  # the method with its settings
    meta: dict[str, Any]  # of the checkpoint
    index: Index
    system: Any
    survey: Survey
    name: str = ""  # the title, with the seed where there are several
    rows: dict[str, results.Row] = field(default_factory=dict)  # split -> figures of `ftd eval`

    @property
    def record(self) -> runs.Record | None:
        return runs.read_record(self.folder)


def gather(
    folders: Sequence[Path],
    origins: Sequence[runs.Origin],
    part: str | None,
    cache: Path,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[Shown]:
    """Load the best checkpoint of every run and look at what it makes of one split.

    Args:
        origins: of each run's target. part: the split.
    Raises:
        RunError: a run has no checkpoint; or they cannot be on one page: another target or class
            set. DataError: the split has frames without labels.
    """
    shown: list[Shown] = []
    for folder, origin in zip(folders, origins, strict=True):
        system, meta = checkpoint.load(folder / "best.safetensors", device, teachers=True)
        index = origin.index(part, system.recipe, cache, progress)
        if shown:
            _require_alike(shown[0], folder, system.recipe.classes, index)
        title = runs.title(system.recipe, tuple(meta.get("given", ())))
        one = Shown(
            folder, title, meta, index, system, look(system, index, device, progress), title
        )
        one.rows = _figures(folder)
        shown.append(one)
    for one in shown if len(shown) > 1 else []:  # what all have is said once, above
        own = [text for text in one.meta.get("given", ()) if text not in common_settings(shown)]
        one.title = one.name = runs.title(one.system.recipe, tuple(own))
    if len({one.meta.get("seed") for one in shown}) > 1 or len(shown) > len(
        {one.title for one in shown}
    ):
        for one in shown:
            one.name = f"{one.title}, seed {one.meta.get('seed')}"
    if len({one.system.recipe.scenario for one in shown}) > 1:
        for one in shown:
            one.name += f", {one.system.recipe.scenario.replace('-', ' -> ', 1)}"
    return shown


def common_settings(shown: Sequence[Shown]) -> list[str]:
    """Settings that the user chose for every one of several runs."""
    given = [one.meta.get("given", ()) for one in shown]
    return [text for text in given[0] if all(text in other for other in given)]


def _require_alike(first: Shown, folder: Path, classes: str, index: Index) -> None:
    mine = first.index.identity["domain"], first.system.recipe.classes
    theirs = index.identity["domain"], classes
    if mine != theirs or first.index.tokens != index.tokens:
        raise RunError(
            f"{folder}: its target is {theirs[0]} with the classes {theirs[1]} "
            f"({plural(len(index), 'frame')}), that of {first.folder} is {mine[0]} with {mine[1]} "
            f"({plural(len(first.index), 'frame')}); make a report of each"
        )


def _figures(folder: Path) -> dict[str, results.Row]:
    """What `ftd eval` and `ftd compare` left in a run's folder."""
    found = {}
    for part in ("test", "val"):
        try:
            found[part] = results.of_run(folder, part)
        except RunError:
            continue
    return found


def chosen_frames(shown: Sequence[Shown], count: int) -> list[tuple[str, list[int]]]:
    """Which frames are pictured, and why: of the last run the worst and the best; and where there
    are several, where it gains and where it loses most against the first. No frame twice."""
    last = np.array(shown[-1].survey.wrong)
    known = np.flatnonzero(np.isfinite(last))
    name = shown[-1].name
    groups = [
        (f"Worst frames of {name}", known[np.argsort(-last[known], kind="stable")]),
        (f"Best frames of {name}", known[np.argsort(last[known], kind="stable")]),
    ]
    if len(shown) > 1:
        gain = np.array(shown[0].survey.wrong) - last
        both = np.flatnonzero(np.isfinite(gain))
        up, down = both[gain[both] > 0], both[gain[both] < 0]
        groups += [
            (f"Where it gains most on {shown[0].name}", up[np.argsort(-gain[up], kind="stable")]),
            (
                f"Where it loses most against {shown[0].name}",
                down[np.argsort(gain[down], kind="stable")],
            ),
        ]
    taken: set[int] = set()
    found = []
    for why, order in groups:
        mine = [int(i) for i in order if int(i) not in taken][:count]
        taken |= set(mine)
        if mine:
            found.append((why, mine))
    return found


# ---- the page ------------------------------------------------------------------------------------


def page(shown: Sequence[Shown], count: int, device: torch.device | str = "cpu") -> str:
    """The whole page as text.

    Args:
        shown: the first is the baseline that the others are compared with; the last is the one
            whose frames are pictured. count: how many frames of a kind.
    """
    first = shown[0]
    target = first.index.identity["domain"]
    part = first.index.identity["split"] or "chosen frames"
    sections = [
        ("runs", "Runs", _runs(shown)),
        ("miou", "mIoU", _miou(shown, part)),
        ("classes", "Classes", _classes(shown, part)),
        ("confusion", "Confusion", _confusion(shown)),
        ("curves", "Training", _curves(shown)),
        ("agreement", "Agreement", _agreement(shown)),
        ("pseudo", "Pseudo-labels", _pseudo(shown)),
        ("frames", "Frames", _frames(shown, count, device)),
    ]
    sections = [section for section in sections if section[2]]
    names = ", ".join(dict.fromkeys(one.title for one in shown))
    scenarios = {one.system.recipe.scenario.removesuffix("-ssda") for one in shown}
    where = scenarios.pop().replace("-", " → ", 1) if len(scenarios) == 1 else target
    title = f"{where}: {names}"
    menu = "".join(f'<a href="#{key}">{escape(text)}</a>' for key, text, _ in sections)
    about = (
        f"Looked at: {plural(len(first.index), 'frame')} of {target} {part}, "
        f"{first.index.fingerprint['points']:,} "
        f"{'pixels' if _dense(first.index) else 'points'}. "
        "Everything on this page but the figures of other splits, which say so, is about them."
    )
    if len(shown) > 1 and (common := common_settings(shown)):
        about += f" All runs: {', '.join(common)}."
    body = "".join(
        f'<section id="{key}"><h2>{escape(text)}</h2>{content}</section>'
        for key, text, content in sections
    )
    notes = "".join(
        f'<p class="note">{escape(one.title)}: {escape(one.system.note)}.</p>'
        for one in {one.title: one for one in shown}.values()
        if one.system.note
    )
    built_in = (
        '<p class="note">Built-in street world: generated streets, no real data set.</p>'
        if any(one.record is not None and one.record["built_in"] for one in shown)
        else ""
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="generator" content="ftd">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(about)}</p>{built_in}{notes}"
        f"<nav>{menu}</nav></header>\n<main>{body}</main>\n</body>\n</html>\n"
    )


def _dense(index: Index) -> bool:
    return bool(len(index)) and index.frame(0).xyz is None


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table of cells that are HTML already; the first of a row names it."""
    top = "".join(c if c.startswith("<th") else f'<th scope="col">{c}</th>' for c in head)
    lines = []
    for row in rows:
        cells = "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in row[1:])
        lines.append(f'<tr><th scope="row">{row[0]}</th>{cells}</tr>')
    about = f"<caption>{escape(caption)}</caption>" if caption else ""
    whole = f"<table>{about}<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="wide" tabindex="0">{whole}</div>'


def _named(shown: Sequence[Shown], i: int) -> str:
    """A run's name behind the colour that it has in every chart."""
    return f'<span class="key c{i % 8}"></span>{escape(shown[i].name)}'


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _delta(value: float | None, base: float | None) -> str:
    """A figure, and behind it how far it is from the baseline."""
    if value is None or base is None:
        return f"<td>{_percent(value)}</td>"
    change = 100 * (value - base)
    sign = "up" if change >= 0.05 else "down" if change <= -0.05 else "same"
    return f'<td>{_percent(value)} <small class="{sign}">{change:+.1f}</small></td>'


def _recorded(record: runs.Record | None) -> list[str]:
    """What run.json knows, as lines of HTML."""
    if record is None:
        return ["no run.json"]
    places = (f"{side}: {origin['domain']}" for side, origin in record["origins"].items())
    prints = [
        f"{escape(name)} {found['frames']:,} frames, {found['points']:,} rows, "
        f"<code>{escape(found['content'][:12])}</code>"
        for name, found in record["data"].items()
    ]
    commit = f", commit <code>{escape(record['git'][:12])}</code>" if record["git"] else ""
    words = " ".join(map(quote, ["ftd", *record["command"]]))
    return [
        "; ".join([escape(", ".join(places)), *prints]),
        f"PyTorch {escape(record['versions'].get('torch', '?'))}{commit}",
        f"<code>{escape(words)}</code>",
    ]


def _runs(shown: Sequence[Shown]) -> str:
    rows = []
    for i, one in enumerate(shown):
        best = one.meta.get("best")
        chosen = f"by {best['split']} mIoU" if best else "the last"
        steps = f"iteration {one.meta['iteration']:,} of {one.system.recipe.steps:,}"
        facts = [f"{steps}, chosen {chosen}", *_recorded(one.record)]
        rows.append([_named(shown, i), f'<td class="text">{"<br>".join(facts)}</td>'])
    return _table(["run", '<th scope="col" class="text">what it is</th>'], rows)


def _heads(shown: Sequence[Shown]) -> list[str]:
    """Of all runs, in the order of the one that has most."""
    longest = max(shown, key=lambda one: len(one.survey.heads)).survey.heads
    return list(dict.fromkeys([*longest, *(h for one in shown for h in one.survey.heads)]))


def _miou(shown: Sequence[Shown], part: str) -> str:
    heads = _heads(shown)
    tables = []
    splits = [name for name in ("test", "val") if any(name in one.rows for one in shown)]
    for name in [*(s for s in splits if s != part), part]:
        looked = name == part
        figures = [
            {h: one.survey.miou(h) for h in one.survey.heads}
            if looked
            else one.rows.get(name, {}).get("miou", {})
            for one in shown
        ]
        base = figures[0]
        rows = [
            [_named(shown, i), *(_delta(found.get(h), base.get(h) if i else None) for h in heads)]
            for i, found in enumerate(figures)
        ]
        how = "looked at for this page" if looked else "figures of ftd eval"
        caption = f"mIoU in percent on {name} ({how})"
        if len(shown) > 1:
            caption += f"; small: against {shown[0].name}"
        tables.append(_table(["run", *(h.upper() for h in heads)], rows, caption))
    kept = [row for one in shown for row in one.rows.values()]
    several = len({row["seed"] for row in kept}) > 1
    for table in results.tables(kept) if several else []:
        cells = [[escape(str(cell)) for cell in row] for row in table.rows]
        tables.append(_table([escape(c) for c in table.columns], cells, table.title))
    return "".join(tables)


def _classes(shown: Sequence[Shown], part: str) -> str:
    """IoU of each class by the last head of each run."""
    names = shown[0].survey.classes
    found = [iou(one.survey.confusion[one.survey.heads[-1]])[0] for one in shown]
    colours = pictures.palette(names)
    rows = []
    for c, name in enumerate(names):
        disc = '<span class="disc" style="background:rgb({},{},{})"></span>'.format(*colours[c])
        cells = []
        for i, mine in enumerate(found):
            value = 0.0 if math.isnan(mine[c]) else 100 * mine[c]
            change = ""
            if i and not (math.isnan(mine[c]) or math.isnan(found[0][c])):
                change = _delta(mine[c], found[0][c]).split(" ", 1)[1].removesuffix("</td>")
            cells.append(
                f'<td class="bars"><span class="bar c{i % 8}" style="width:{value:.1f}%"></span>'
                f"<span>{_percent(mine[c])} {change}</span></td>"
            )
        rows.append([f'<span class="class">{disc}{escape(name)}</span>', *cells])
    heads = [f"{_named(shown, i)} ({one.survey.heads[-1].upper()})" for i, one in enumerate(shown)]
    return _table(["class", *heads], rows, f"IoU in percent on {part}")


def _confusion(shown: Sequence[Shown]) -> str:
    names = shown[0].survey.classes
    tables = []
    for i, one in enumerate(shown):
        head = one.survey.heads[-1]
        matrix = one.survey.confusion[head].double()
        share = (matrix / matrix.sum(1, keepdim=True)).tolist()
        rows = []
        for c, name in enumerate(names):
            cells = []
            for value, other in zip(share[c], names, strict=True):
                shade = 0.0 if math.isnan(value) else value
                about = f"{name} seen as {other}: {_percent(value)}"
                cells.append(
                    f'<td style="--v:{shade:.3f}" title="{escape(about)}">'
                    f"{'' if shade < 0.005 else f'{100 * shade:.0f}'}</td>"
                )
            rows.append([f'<span class="class">{escape(name)}</span>', *cells])
        head_row = ["label \\ prediction", *(f"<span>{escape(name)}</span>" for name in names)]
        body = _table(head_row, rows)
        summary = f"<summary>{_named(shown, i)}, {head.upper()}</summary>"
        opened = " open" if i in (0, len(shown) - 1) else ""
        tables.append(f'<details class="matrix"{opened}>{summary}{body}</details>')
    note = "<p>Of the labelled rows of a class (line), how many percent are predicted as each.</p>"
    return f'{note}<div class="matrices">{"".join(tables)}</div>'


def _curves(shown: Sequence[Shown]) -> str:
    order = [one.name for one in shown]
    logs = {one.name: curves(one.folder / "log.csv") for one in shown}
    vals = {one.name: curves(one.folder / "val.csv") for one in shown}
    charts = []
    for head in _heads(shown):
        key = f"mIoU {head}"
        mine = {n: [(x, 100 * y) for x, y in v[key]] for n, v in vals.items() if key in v}
        charts.append(_figure(f"validation mIoU, {head.upper()}, percent", mine, order))
    terms = dict.fromkeys(term for log in logs.values() for term in log)
    for term in terms:
        mine = {name: log[term] for name, log in logs.items() if term in log}
        charts.append(_figure(f"loss term {term}, weighted", mine, order))
    audits = {one.name: curves(one.folder / "audit.csv", "all") for one in shown}
    for column in dict.fromkeys(c for a in audits.values() for c in a if c != "rows"):
        mine = {name: a[column] for name, a in audits.items() if column in a}
        charts.append(_figure(f"pseudo-labels on val: {column}, percent", mine, order))
    legend = "".join(f"<li>{_named(shown, i)}</li>" for i in range(len(shown)))
    return (
        f'<ul class="legend">{legend}</ul><div class="charts">{"".join(charts)}</div>'
        if any(charts)
        else ""
    )


def _figure(title: str, found: dict[str, Curve], order: list[str]) -> str:
    drawn = lines(title, found, order)
    return f"<figure>{drawn}<figcaption>{escape(title)}</figcaption></figure>" if drawn else ""


def _agreement(shown: Sequence[Shown]) -> str:
    pairs = dict.fromkeys(pair for one in shown for pair in one.survey.agreement)
    taught = dict.fromkeys(head for one in shown for head in one.survey.teacher)
    if not pairs and not taught:
        return ""
    head = [
        "run",
        *(f"{a.upper()} = {b.upper()}" for a, b in pairs),
        *(f"{h.upper()} = its teacher's" for h in taught),
    ]
    rows = [
        [
            _named(shown, i),
            *(_percent(one.survey.agreement.get(pair)) for pair in pairs),
            *(_percent(one.survey.teacher.get(h)) for h in taught),
        ]
        for i, one in enumerate(shown)
    ]
    return _table(head, rows, "Rows on which two heads predict the same class, in percent")


def _pseudo(shown: Sequence[Shown]) -> str:
    """Of the labels that `ftd pseudo` would keep on this split."""
    blocks = []
    for i, one in enumerate(shown):
        for head, kept in one.survey.pseudo.items():
            rows = [
                [
                    escape(name),
                    f"{k.threshold:.2f}",
                    _percent(k.coverage),
                    _percent(k.before),
                    _delta(k.after, k.before),
                ]
                for name, k in zip(one.survey.classes, kept, strict=True)
            ]
            columns = ["class", "threshold", "coverage", "precision before", "precision after"]
            opened = " open" if i == len(shown) - 1 else ""
            blocks.append(
                f"<details{opened}><summary>{_named(shown, i)}, {head.upper()}</summary>"
                f"{_table(columns, rows)}</details>"
            )
    note = (
        "<p>What ftd pseudo would keep of these frames: per class the threshold of the confidence; "
        "of the labelled rows of the class how many keep a pseudo-label, right or wrong; of those "
        "predicted as the class how many are of it, before and after the threshold. "
        "In percent.</p>"
    )
    return note + "".join(blocks) if blocks else ""


# ---- pictures ------------------------------------------------------------------------------------


def _frames(shown: Sequence[Shown], count: int, device: torch.device | str) -> str:
    names = shown[0].survey.classes
    groups = chosen_frames(shown, count)
    wanted = [i for _, frames in groups for i in frames]
    frames = dict(zip(wanted, _pictured(shown[0].index, wanted), strict=True))
    blocks = []
    for why, chosen in groups:
        blocks.append(f"<h3>{escape(why)}</h3>")
        blocks += [_frame(shown, i, frames[i], names, device) for i in chosen]
    entries = "".join(
        '<li><span class="disc" style="background:rgb({},{},{})"></span>{}</li>'.format(
            *colour, escape(name)
        )
        for name, colour in [
            *zip(names, pictures.palette(names), strict=True),
            ("no label", pictures.NONE),
            ("right", pictures.RIGHT),
            ("wrong", pictures.WRONG),
        ]
    )
    return f'<ul class="legend classes">{entries}</ul>' + "".join(blocks) if blocks else ""


def _pictured(index: Index, chosen: Sequence[int]) -> Iterable[Frame]:
    """Points are drawn on the original image; pixels as they were predicted."""
    return map(index.frame, chosen) if _dense(index) else original_frames(index, chosen)


def _frame(
    shown: Sequence[Shown], i: int, frame: Frame, names: Sequence[str], device: torch.device | str
) -> str:
    truth = frame.label.reshape(-1)
    parts = [_panel(frame, Panel("truth", truth), names, "truth")]
    for one in shown:
        labels = labels_of(one.system, one.index, i, device)
        heads = one.survey.heads if one is shown[-1] else one.survey.heads[-1:]
        for head in heads:
            parts.append(
                _panel(frame, Panel(head, labels[head]), names, f"{one.name}, {head.upper()}")
            )
        error = Panel("error", labels[heads[-1]], truth)
        words = error.note().replace("error: ", "")
        parts.append(_panel(frame, error, names, f"{one.name}, {heads[-1].upper()}: {words}"))
    return (
        f'<article><h4>{escape(frame.token)}</h4><div class="panels">{"".join(parts)}</div>'
        "</article>"
    )


def _panel(frame: Frame, panel: Panel, names: Sequence[str], caption: str) -> str:
    """A photo with its points and, below it, the same from above."""
    photo, above = pictures.panel_images(frame, panel, names, PANEL)
    images = [_embedded(photo, f"{caption}: over the photo")]
    if above is not None:
        images.append(_embedded(above, f"{caption}: from above"))
    return f"<figure>{''.join(images)}<figcaption>{escape(caption)}</figcaption></figure>"


def _embedded(picture: Image.Image, words: str) -> str:
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=82, method=4)
    text = base64.b64encode(file.getvalue()).decode()
    return (
        f'<img src="data:image/webp;base64,{text}" alt="{escape(words)}" '
        f'width="{picture.width}" height="{picture.height}" loading="lazy">'
    )
