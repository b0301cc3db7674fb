"""What one does with a trained network: `ftd eval`, `pseudo`, `predict`, `convert`, `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftdpp.commands.shared import (
    USAGE,
    AsJson,
    Cache,
    Checkpoint,
    Count,
    Data,
    Device,
    Force,
    Frames,
    Overlay,
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
    tokens_of,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ftdpp.recipe import Recipe
    from ftdpp.runs import Origin


def load_system(
    path: Path, device: str | None, threads: int | None, console: Console
) -> tuple[Any, Any, dict[str, Any]]:
    """The device that was chosen, said with its reason, and a checkpoint's system there."""
    from ftdpp import checkpoint, screen

    dev, why = chosen_device(device)
    screen.facts(console, [("device", str(dev), why), ("threads", *chosen_threads(threads))])
    return dev, *checkpoint.load(path, dev)


def require_overlay(overlay: Path | None, count: int | None) -> None:
    """Refuses a folder of pictures that cannot be written, and a count of none."""
    if overlay is not None:
        require_writable(overlay, folder=True)
    elif count is not None:
        raise fail("--count says how many pictures --overlay makes; add --overlay FOLDER", USAGE)


def run_origin(
    run: Path,
    domain: str | None,
    data: Path | None,
    version: str | None,
    split: str | None,
    frames: str | None,
) -> Origin:
    """Where the data of `ftd eval` and `ftd pseudo` comes from: the run's target, unless said.

    Frames that the target was restricted to in training are the default for that target, as long as
    neither a split nor other frames are asked for.
    """
    from ftdpp import runs
    from ftdpp.checkpoint import RunError

    if domain is not None:
        known_domain("--domain", domain)
    record = runs.read_record(run if run.is_dir() else run.parent)
    chosen = tokens_of(frames, "--frames")
    if record is None and (data is None or domain is None):
        raise RunError(
            f"{run}: no run.json beside it, so where its data lies is unknown; name it with --data "
            "and --domain"
        )
    origins = runs.recorded_places(record).origins if record is not None else {}
    known = [origins[side] for side in ("tgt", "src") if side in origins]
    fitting = [origin for origin in known if domain in (None, origin.domain)]
    if not fitting:
        if data is None:
            raise RunError(f"{run}: was not trained on {domain}; name its root with --data")
        assert domain is not None
        return runs.Origin(domain, data.resolve(), version, chosen)
    origin = fitting[0]
    origin.version = version or origin.version
    origin.root = data.resolve() if data is not None else origin.root
    if chosen is not None or split is not None:
        origin.frames = chosen
    return origin


def evaluate(
    run: RunPath,
    split: Annotated[
        str | None,
        typer.Option(help="val, test or train; default: test, or the run's own --tgt-frames."),
    ] = None,
    checkpoint: Checkpoint = "best",
    as_json: AsJson = False,
    domain: Annotated[
        str | None, typer.Option(help="Domain to evaluate on; default: the run's target.")
    ] = None,
    data: Data = None,
    data_version: Version = None,
    frames: Frames = None,
    overlay: Overlay = None,
    count: Count = None,
    device: Device = None,
    threads: Threads = None,
    cache: Cache = None,
) -> None:
    """Evaluate a checkpoint: point-level IoU of every head, per class."""
    from ftdpp import evaluate as protocol
    from ftdpp import inference, results, runs, screen

    console = screen.messages()
    require_overlay(overlay, count)
    path = checkpoint_of(run, checkpoint)
    own = run.is_dir() and checkpoint == "best" and path.exists()
    before = results.weights_of(run) if own else ""  # of what is read next
    dev, system, meta = load_system(path, device, threads, console)
    origin = run_origin(run, domain, data, data_version, split, frames)
    r = system.recipe
    splits = known_domain("--domain", origin.domain).splits
    if split is None and origin.frames is None and not {"test", "val"} & set(splits):
        raise fail(
            f"{origin.domain} has no test or val split; name one with --split: {', '.join(splits)}",
            USAGE,
        )
    split = split or ("test" if "test" in splits else "val")
    if origin.frames is None and split not in splits:
        raise fail(f"--split {split}: {origin.domain} has {', '.join(splits)}", USAGE)
    title = runs.title(r, tuple(meta.get("given", ())))
    weights = f"{path.name}, iteration {meta['iteration']}"
    with screen.bar(console) as tell:
        index = origin.index(split, r, cache_folder(cache)[0], tell)
        score = protocol.evaluate(system, index, weights, dev, tell)
    row = results.row_of(score, meta, title, index, before)
    if as_json:
        print(json.dumps({**row, "given": meta.get("given", [])}))
    else:
        screen.show(screen.output(), screen.score_table(score, title))
    if before and origin.frames is None and runs.is_target(run, origin):
        try:
            results.keep(run, row)  # for `ftd table`
        except OSError as error:
            note = f"{run}: its figures are not kept there ({error.strerror})"
            console.print(note, soft_wrap=True)
    if overlay is not None:
        chosen = range(min(count or 4, len(index)))
        labels = inference.predict_frames(system, index, chosen, dev)
        what = f"{title}, {system.heads[-1].upper()}, {weights}"
        _overlays(overlay, index, chosen, labels, r, what, console)


def _overlays(
    folder: Path,
    index: Any,
    chosen: range,
    labels: Any,
    r: Recipe,
    title: str,
    console: Console,
    what: str = "prediction",
) -> None:
    """Pictures of labels (M,) u8, 255 = none, drawn on the original images of an index."""
    from ftdpp import pictures
    from ftdpp.data import CLASS_SETS
    from ftdpp.index import original_frames
    from ftdpp.readers import plural

    # Points are drawn on the original image; pixels of a dense data set as they were predicted.
    dense = bool(chosen) and index.frame(chosen[0]).xyz is None
    originals = map(index.frame, chosen) if dense else original_frames(index, chosen)
    frames = zip(originals, labels, strict=True)
    made = pictures.write_overlays(folder, frames, CLASS_SETS[r.classes], title, what)
    wrote = f"wrote {plural(len(made), 'picture')} to {folder}"
    console.print(wrote, soft_wrap=True)


def pseudo(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    checkpoint: Checkpoint = "last",
    split: Annotated[
        str | None, typer.Option(help="Target split; default: the one the run adapted to.")
    ] = None,
    data: Data = None,
    data_version: Version = None,
    domain: Annotated[
        str | None, typer.Option(help="Domain of --data; default: the run's target.")
    ] = None,
    frames: Frames = None,
    as_json: AsJson = False,
    force: Force = False,
    overlay: Overlay = None,
    count: Count = None,
    device: Device = None,
    threads: Threads = None,
    cache: Cache = None,
) -> None:
    """Predict the target training frames and keep the confident labels, for a second stage:
    ftd train ... --pseudo FILE."""
    from ftdpp import evaluate as protocol
    from ftdpp import runs, screen
    from ftdpp.pseudo_labels import PseudoLabels
    from ftdpp.readers import plural

    console = screen.messages()
    require_writable(out)
    require_ours(out, force)
    require_overlay(overlay, count)
    path = checkpoint_of(run, checkpoint)
    dev, system, meta = load_system(path, device, threads, console)
    origin = run_origin(run, domain, data, data_version, split, frames)
    r = system.recipe
    adapted = [s.split for s in system.streams(r).values() if not s.labels]
    split = split or (adapted[0] if adapted else "train")
    weights = f"{path.name}, iteration {meta['iteration']}"
    with screen.bar(console) as tell:
        index = origin.index(split, r, cache_folder(cache)[0], tell)
        found = protocol.write_pseudo_labels(out, system, index, weights, dev, tell)
    title = runs.title(r, tuple(meta.get("given", ())))
    if overlay is not None:
        chosen, labels = range(min(count or 4, len(index))), PseudoLabels(out, r, index)
        for head in system.pseudo_heads:
            kept = (labels.of(index.tokens[i], head).numpy() for i in chosen)
            what = f"kept pseudo-labels of {head.upper()}"
            _overlays(overlay / head, index, chosen, kept, r, title, console, what)
    if as_json:
        print(json.dumps({**found, "file": str(out), "title": title}))
        return
    where = f"{plural(found['frames'], 'frame')} of {found['domain']} {found['split']}"
    heading = f"{out}: {where}, by {title}, {weights}"
    screen.show(screen.output(), screen.pseudo_table(found, heading))


def predict(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="Folder of the label files; has to be new or empty.")],
    domain: Annotated[
        str | None, typer.Option(help="Whose frames; default: the run's target.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Default: test, or val.")] = None,
    data: Data = None,
    data_version: Version = None,
    frames: Frames = None,
    checkpoint: Checkpoint = "best",
    overlay: Overlay = None,
    count: Count = None,
    device: Device = None,
    threads: Threads = None,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Label frames, which need no labels, and write them as the data set's benchmark takes them:
    SemanticKITTI .label, nuScenes lidarseg .bin, Cityscapes PNG; npy for the others."""
    from ftdpp import inference, readers, runs, screen
    from ftdpp.readers import plural

    console = screen.messages()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise fail(f"--out {out}: is there and not empty; name a new folder", USAGE)
    require_writable(out, folder=True)
    require_overlay(overlay, count)
    path = checkpoint_of(run, checkpoint)
    dev, system, meta = load_system(path, device, threads, console)
    origin = run_origin(run, domain, data, data_version, split, frames)
    row = known_domain("--domain", origin.domain)
    splits = row.splits
    split = split or next((name for name in ("test", "val") if name in splits), splits[0])
    if origin.frames is None and split not in splits:
        raise fail(f"--split {split}: {origin.domain} has {', '.join(splits)}", USAGE)
    part = None if origin.frames else split
    refs = readers.list_frames(origin.root, row, part, origin.version, origin.frames)
    if not refs:
        raise readers.DataError(f"{origin.root}: no frame of {origin.domain} {split}")
    with screen.bar(console) as tell:
        done = inference.write_predictions(system, refs, split, out, dev, tell)
    what = "pixels" if readers.reader_of(row).dense else "points that the camera sees"
    title = runs.title(system.recipe, tuple(meta.get("given", ())))
    console.print(
        f"wrote {plural(len(refs), 'file')} of labels to {out}: {done:,} {what}, by the "
        f"{system.heads[-1].upper()} head of {title}; everything else is marked as unlabelled",
        soft_wrap=True,
    )
    if overlay is not None:
        with screen.bar(console) as tell:
            index = origin.index(split, system.recipe, cache_folder(cache)[0], tell)
        chosen = range(min(count or 4, len(index)))
        found = inference.predict_frames(system, index, chosen, dev)
        what = f"{title}, {system.heads[-1].upper()}, {path.name}, iteration {meta['iteration']}"
        _overlays(overlay, index, chosen, found, system.recipe, what, console)
    if as_json:
        about = {"out": str(out), "domain": origin.domain, "split": part, "files": len(refs)}
        about |= {"labelled": done, "head": system.heads[-1], "method": title}
        print(json.dumps(about))


def convert(
    net_2d: Annotated[Path, typer.Option("--2d", help="Released .pth of the 2D network.")],
    net_3d: Annotated[Path, typer.Option("--3d", help="Released .pth of the 3D network.")],
    fusion: Annotated[Path, typer.Option("--fusion", help="Released .pth of the fusion module.")],
    scenario: Annotated[str, typer.Option(help="e.g. usa-singapore; see ftd recipes.")],
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    force: Force = False,
) -> None:
    """Turn released FtD++ checkpoints into one that ftd eval and ftd pseudo read."""
    from ftdpp import released, screen, systems

    r = systems.recipe(scenario)
    require_writable(out)
    require_ours(out, force)
    released.convert_checkpoints({"2d": net_2d, "3d": net_3d, "fusion": fusion}, r, out)
    target = scenario.split("-")[1]
    screen.messages().print(
        f"wrote {out}; evaluate it with: ftd eval {out} --domain {target} --data ROOT",
        soft_wrap=True,
    )


def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    checkpoint: Checkpoint = "best",
    force: Force = False,
    cache: Cache = None,
) -> None:
    """Write a checkpoint with the networks that predict, and nothing else: no auxiliary network, no
    teacher, no optimiser. It evaluates to the same numbers."""
    from ftdpp import checkpoint as files
    from ftdpp import screen

    require_writable(out)
    require_ours(out, force)
    path = checkpoint_of(run, checkpoint)
    if out.resolve() == path.resolve():  # one that lies in no run's folder
        raise fail(f"--out {out}: is the checkpoint itself; name another file", USAGE)
    system, meta = files.load(path)
    tensors = {f"system/{name}": tensor for name, tensor in system.state_dict().items()}
    files.save(out, tensors, meta)
    count = sum(tensor.numel() for tensor in tensors.values())
    screen.messages().print(
        f"wrote {out}: {count:,} numbers, {out.stat().st_size / 2**20:.1f} MiB of "
        f"{path.stat().st_size / 2**20:.1f}; use it with: ftd eval {out} --domain DOMAIN "
        "--data ROOT",
        soft_wrap=True,
    )
