"""`ftd data`: look at data sets, prepare them, write the built-in street world."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from ftdpp.commands.shared import (
    DATA,
    USAGE,
    AsJson,
    Cache,
    Domain,
    Frames,
    Version,
    cache_folder,
    fail,
    known_domain,
    require_writable,
    tokens_of,
)


def check(
    root: Annotated[Path, typer.Argument(help="Root of the data set.")],
    domain: Domain,
    data_version: Version = None,
    as_json: AsJson = False,
) -> None:
    """Count what is there and what is missing, split by split, without opening a frame."""
    from ftdpp import readers, screen

    rows = readers.check(root, known_domain("--domain", domain), data_version)
    numbers = [{name: row[name] for name in row if name != "note"} for row in rows]
    console = screen.output()
    if as_json:
        print(json.dumps({"root": str(root), "domain": domain, "splits": rows}))
    else:
        screen.show(console, screen.plain_table(numbers, f"{root} as {domain}"))
        for row in rows:
            console.print(f"{row['split']}: {row['note']}", soft_wrap=True)
    if not any(row["frames"] for row in rows):
        raise fail(f"{root}: no frame of any split of {domain}", DATA)
    if any(row["missing"] for row in rows):
        raise fail(f"{root}: files are missing; the first of each split is named above", DATA)


def prepare(
    root: Annotated[Path, typer.Argument(help="Root of the data set.")],
    domain: Domain,
    split: Annotated[str | None, typer.Option(help="Default: every split of the domain.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Class set; default: the first that the data set has.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Image size H,W; default: what the paper preset uses.")
    ] = None,
    frames: Frames = None,
    data_version: Version = None,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Project, map labels, resize, and write the index. Training does this by itself when it is
    missing."""
    from ftdpp import readers, screen
    from ftdpp.data import CLASS_SETS
    from ftdpp.index import prepare as write_index
    from ftdpp.readers.base import PIXELS

    row, folder, console = (
        known_domain("--domain", domain),
        cache_folder(cache)[0],
        screen.messages(),
    )
    reader = readers.reader_of(row)
    shape, classes = reader.image, classes or next(iter(reader.classes))
    if size:
        try:
            height, width = (int(x) for x in size.split(","))
        except ValueError:
            raise fail(f"--size {size}: expected H,W as in 225,400", USAGE) from None
        if not (1 <= height < 1 << 15 and 1 <= width < 1 << 15 and height * width <= PIXELS):
            raise fail(
                f"--size {size}: expected H,W of 1 to 32767, and at most {PIXELS:,} pixels", USAGE
            )
        shape = height, width
    tokens = tokens_of(frames, "--frames")
    names: list[str | None] = [split]
    if tokens:
        names = [None]
    elif split is None:  # all there is; the semi-supervised halves are part of train
        rows = readers.check(root, row, data_version)
        there = [r["split"] for r in rows if r["frames"]]
        names = [name for name in there if not name.startswith("train_")]
        if not names:
            raise fail(f"{root}: no frame of any split of {domain}; nothing prepared", DATA)
        console.print(f"splits with frames here: {', '.join(there)}", soft_wrap=True)
    made = []
    for name in names:
        with screen.bar(console) as tell:
            index = write_index(root, row, name, classes, shape, folder, data_version, tokens, tell)
        f = index.fingerprint
        made.append({"path": str(index.path), **f})
        per_class = zip(CLASS_SETS[classes], f["points_per_class"], strict=True)
        counts = ", ".join(f"{n} {c:,}" for n, c in per_class)
        count = readers.plural(f["frames"], "frame")
        console.print(
            f"{domain} {name or 'chosen frames'}: {count} ({f['unlabelled_frames']} unlabelled, "
            f"{f['empty_frames']} empty), {f['points']:,} points in the image: {counts}, ignored "
            f"{f['ignored']:,}\n  {index.path}",
            soft_wrap=True,
        )
    if as_json:
        print(json.dumps({"indexes": made}))


def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write, in the layouts of the data sets.")],
    src: Annotated[str, typer.Option(help="usa, day, vkitti, a2d2, gta5 or synthia.")] = "usa",
    tgt: Annotated[str, typer.Option(help="singapore, night, skitti or cityscapes.")] = "singapore",
    frames: Annotated[
        str | None,
        typer.Option(help="source,target,val,test frame counts; cityscapes has no test."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Write the built-in street world to a folder of your own."""
    from ftdpp import screen
    from ftdpp.world import layouts

    console = screen.messages()
    if (src, tgt) not in layouts.PAIRS:
        pairs = ", ".join(f"--src {a} --tgt {b}" for a, b in layouts.PAIRS)
        raise fail(f"no built-in world for {src} -> {tgt}; there is {pairs}", USAGE)
    counts = None
    if frames:
        parts = layouts.DEFAULT_FRAMES[src, tgt]
        try:
            counts = dict(zip(parts, (int(x) for x in frames.split(",")), strict=True))
        except ValueError:
            raise fail(
                f"--frames {frames}: expected {len(parts)} numbers, {','.join(parts)}", USAGE
            ) from None
    if out.exists():
        raise fail(f"{out} exists; choose a new folder", USAGE)
    require_writable(out)
    try:
        with screen.bar(console) as tell:
            layouts.write_world(out, src, tgt, counts, seed, workers, tell)
    except ValueError as error:
        raise fail(error, USAGE) from None
    first, second = layouts.roots(out, src, tgt)
    data = f"--data {quote(str(out))}"
    if first != second:
        data = f"--src-data {quote(str(first))} --tgt-data {quote(str(second))}"
    console.print(
        f"wrote {out}; use it with: ftd train --src {src} --tgt {tgt} {data}", soft_wrap=True
    )
