"""Look at what a run does: `ftd report`, `ftd show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ftdpp.commands.shared import (
    USAGE,
    Cache,
    Checkpoint,
    Data,
    Device,
    Force,
    RunPath,
    Threads,
    Version,
    cache_folder,
    checkpoint_of,
    chosen_device,
    chosen_threads,
    fail,
    known_domain,
    require_ours,
    require_writable,
)
from ftdpp.commands.using import load_system, run_origin


def report(
    places: Annotated[
        list[Path], typer.Argument(help="Run folders; the first is the baseline of the others.")
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    split: Annotated[
        str | None, typer.Option(help="Split to look at; default: val, where the target has one.")
    ] = None,
    domain: Annotated[
        str | None, typer.Option(help="Domain to look at; default: the runs' target.")
    ] = None,
    data: Data = None,
    data_version: Version = None,
    count: Annotated[int, typer.Option(help="Pictured frames of each kind.", min=0)] = 2,
    force: Force = False,
    device: Device = None,
    threads: Threads = None,
    cache: Cache = None,
) -> None:
    """Write one HTML page about runs: figures, confusion, curves, pseudo-labels, best and worst
    frames. Looks at val, so that nobody tunes on test; figures that ftd eval left are shown too."""
    from ftdpp import files, report, screen
    from ftdpp.readers import plural

    console = screen.messages()
    require_writable(out)
    require_ours(out, force)
    dev, why = chosen_device(device)
    screen.facts(console, [("device", str(dev), why), ("threads", *chosen_threads(threads))])
    origins = []
    for run in places:
        if not run.is_dir():
            raise fail(f"{run}: no such run folder; name the folders of runs", USAGE)
        origins.append(run_origin(run, domain, data, data_version, split, None))
    row = known_domain("--domain", origins[0].domain)
    part = split or next((name for name in ("val", "test") if name in row.splits), row.splits[0])
    if not origins[0].frames and part not in row.splits:
        raise fail(f"--split {part}: {row.name} has {', '.join(row.splits)}", USAGE)
    with screen.bar(console) as tell:
        shown = report.gather(places, origins, part, cache_folder(cache)[0], dev, tell)
    text = report.page(shown, count, dev).encode()
    files.write(out, text)
    size = f"{len(text) / 2**20:.1f} MiB"
    console.print(f"wrote {out}: {plural(len(shown), 'run')}, {size}", soft_wrap=True)


def show(
    run: RunPath,
    frame: Annotated[str, typer.Argument(help="Token of a frame, or a number in the split.")],
    out: Annotated[Path, typer.Option(help="Picture to write: .png or .pdf.")],
    split: Annotated[
        str | None, typer.Option(help="Where a number counts; default: test, or val.")
    ] = None,
    checkpoint: Checkpoint = "best",
    domain: Annotated[
        str | None, typer.Option(help="Domain of the frame; default: the run's target.")
    ] = None,
    data: Data = None,
    data_version: Version = None,
    rrd: Annotated[
        Path | None, typer.Option(help="Write a Rerun recording too (an extra).")
    ] = None,
    force: Force = False,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Draw one frame at its full size: what every head says, and where there are labels, the truth
    and the errors."""
    from ftdpp import inference, pictures, recording, runs, screen
    from ftdpp.data import CLASS_SETS

    console = screen.messages()
    if out.suffix.lower() not in (".png", ".pdf"):
        raise fail(f"--out {out}: expected a name that ends in .png or .pdf", USAGE)
    for path in (out, rrd):
        if path is not None:
            require_writable(path)
            require_ours(path, force)
    if rrd is not None:
        recording.require()
    weights = checkpoint_of(run, checkpoint)
    dev, system, meta = load_system(weights, device, threads, console)
    origin = run_origin(run, domain, data, data_version, split, None)
    ref = _frame_of(origin, frame, split)
    seen, labels = inference.seen_frame(system, ref, dev)
    names = CLASS_SETS[system.recipe.classes]
    title = runs.title(system.recipe, tuple(meta.get("given", ())))
    what = f"{title}, {weights.name}, iteration {meta['iteration']}, {ref.token}"
    panels = pictures.panels_of_heads(seen, labels)
    picture = pictures.page(seen, panels, names, what, pictures.full_width(seen, len(panels)))
    pictures.write_picture(out, picture)
    console.print(f"wrote {out}: {picture.width} x {picture.height} pixels", soft_wrap=True)
    if rrd is not None:
        recording.write(rrd, seen, labels, names, what)
        console.print(f"wrote {rrd}; open it with: rerun {rrd}", soft_wrap=True)


def _frame_of(origin: Any, name: str, split: str | None) -> Any:
    """The frame of a token, wherever it is in the domain, or of a number in a split, from 0."""
    from ftdpp import readers

    row = readers.domains()[origin.domain]
    if split is not None and split not in row.splits:
        raise fail(f"--split {split}: {row.name} has {', '.join(row.splits)}", USAGE)
    everywhere = readers.list_frames(origin.root, row, None, origin.version)
    found = [ref for ref in everywhere if ref.token == name]
    if found:
        return found[0]
    if not name.isdecimal():
        raise fail(
            f"{origin.root}: no frame {name!r} in {row.name}; name a token such as "
            f"{everywhere[0].token if everywhere else '...'}, or a number from 0",
            USAGE,
        )
    part = split or next((s for s in ("test", "val") if s in row.splits), row.splits[0])
    refs = readers.list_frames(origin.root, row, part, origin.version)
    if int(name) >= len(refs):
        raise fail(f"frame {name}: {row.name} {part} has {len(refs)} frames, from 0", USAGE)
    return refs[int(name)]
