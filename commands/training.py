"""`ftd train`."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftdpp.commands.shared import (
    RUN_FILES,
    SSDA,
    USAGE,
    Cache,
    Clip,
    Data,
    Device,
    Preset,
    Pretrained,
    Sets,
    SrcData,
    Steps,
    TgtData,
    Threads,
    Version,
    Workers,
    built_in_world,
    cache_folder,
    checkpoint_of,
    chosen_device,
    chosen_preset,
    chosen_threads,
    clip_setting,
    fail,
    imagenet_weights,
    known_domain,
    known_roots,
    print_choices,
    require_writable,
    tokens_of,
    weights_fact,
)

if TYPE_CHECKING:
    from rich.console import Console


# ---- train -------------------------------------------------------------------------------------


def train(
    context: typer.Context,
    src: Annotated[
        str | None, typer.Option(help="Labelled source domain, e.g. usa; see the README.")
    ] = None,
    tgt: Annotated[str | None, typer.Option(help="Unlabelled target domain.")] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Adapt without source data: a trained run, or its checkpoint, and --tgt."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="See: ftd recipes. Default: ftdpp; source-only on dense data sets; crossmatch "
            "with --from."
        ),
    ] = None,
    preset: Preset = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/SRC-TGT-METHOD[SETTINGS]-seedN.")
    ] = None,
    data: Data = None,
    src_data: SrcData = None,
    tgt_data: TgtData = None,
    data_version: Version = None,
    src_frames: Annotated[
        str | None, typer.Option(help="Train on these source frames: tokens, comma-separated.")
    ] = None,
    tgt_frames: Annotated[
        str | None, typer.Option(help="Adapt to these target frames only.")
    ] = None,
    val_frames: Annotated[str | None, typer.Option(help="Validate on these target frames.")] = None,
    ssda: SSDA = False,
    pseudo: Annotated[
        Path | None, typer.Option(help="Second stage: train on these labels (from ftd pseudo).")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder; needs nothing else.")
    ] = None,
    pretrained: Pretrained = None,
    clip: Clip = None,
    set_: Sets = None,
    device: Device = None,
    workers: Workers = None,
    threads: Threads = None,
    cache: Cache = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write event files too (an extra).")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Prepare the data, try six iterations, an evaluation and a checkpoint, and say "
            "how long it will take, how much memory and disk; train nothing.",
        ),
    ] = False,
) -> None:
    """Train on SRC, adapt to TGT; with --from RUN, adapt a trained network without source data.
    Leaves last.safetensors, best.safetensors, log.csv, val.csv and run.json in the run folder, of
    some methods audit.csv."""
    from ftdpp import kernels, parallel, recipe, runs, screen, systems
    from ftdpp.pseudo_labels import check_pseudo_file
    from ftdpp.readers import plural

    console = screen.messages()
    if resume is not None:
        _resume(context, resume, device, workers, threads, cache, tensorboard)
        return
    if dry_run and parallel.asked_for() > 1:
        raise fail("--dry-run: of one process; call it without torchrun", USAGE)
    dev, dev_why = chosen_device(device)
    context.with_resource(parallel.joined(dev))
    source = None
    if from_ is not None:
        if tgt is None:
            raise fail("--tgt missing; name the domain to adapt to", USAGE)
        for option in ("src", "src_data", "src_frames", "ssda", "pseudo", "pretrained"):
            if context.params[option]:
                raise fail(
                    f"--{option.replace('_', '-')}: a method without source data starts from the "
                    "run that --from names; drop it",
                    USAGE,
                )
        source = runs.read_source(checkpoint_of(from_, "best"), tgt, data or tgt_data)
        src, src_data = source.domain, tgt_data
    if source is None and systems.is_source_free(method or ""):
        raise fail(
            f"{method} adapts a trained network without its source data; name it with --from RUN "
            "instead of --src",
            USAGE,
        )
    if src is None or tgt is None:
        missing = " and ".join(n for n, v in (("--src", src), ("--tgt", tgt)) if v is None)
        raise fail(f"{missing} missing; name both domains, or --resume RUN", USAGE)
    for option, domain in (("--src", src), ("--tgt", tgt)):
        known_domain(option, domain)
    roots = src_data or data, tgt_data or data
    preset, preset_why = chosen_preset(preset, dev, None in roots)
    overrides = [*(set_ or []), *([f"steps={steps}"] if steps else [])]
    overrides += clip_setting(clip)
    if pseudo and not pseudo.is_file():
        raise fail(
            f"--pseudo {pseudo}: no such file; make one with: ftd pseudo RUN --out {pseudo}", USAGE
        )
    scenario = f"{src}-{tgt}" + ("-ssda" if ssda else "")
    if source is not None:
        method = method or "crossmatch"
    method = method or ("source-only" if systems.is_dense(scenario) else "ftdpp")
    theirs = source.recipe if source is not None else None
    known = method in systems.METHODS
    if clip and known and "clip" not in recipe.settings(systems.system_of(method, scenario).Recipe):
        raise fail(f"--clip {clip}: {method} looks through no CLIP; drop it", USAGE)
    r = systems.recipe(scenario, method, preset, pseudo is not None, overrides, theirs)
    if source is not None and not systems.is_source_free(method):
        raise fail(
            f"--from: {method} trains on labelled data; use --method crossmatch, or name the "
            "source with --src instead",
            USAGE,
        )
    if pseudo is not None:
        check_pseudo_file(pseudo, r)
    if ssda and tgt_frames:
        raise recipe.RecipeError(
            "--ssda takes labelled and unlabelled frames from the official lists; drop --tgt-frames"
        )
    weights = imagenet_weights(pretrained, r)
    writer = _board_writer() if tensorboard else None
    base = systems.recipe(scenario, method, preset, pseudo is not None, (), theirs)
    given = recipe.settings_of(r, base, recipe.given_names(overrides))
    named = given if source is None else runs.names_source(r, given, source.given)
    out = out or Path("runs") / runs.run_name(r, named, seed)
    require_writable(out, folder=True)
    if (out / "last.safetensors").exists():
        raise fail(
            f"{out} already holds a run; continue it with --resume {quote(str(out))}, or choose "
            "another folder with --out",
            USAGE,
        )
    found = sorted(name for name in RUN_FILES if (out / name).exists())
    if "best.safetensors" in found or (found and "run.json" not in found):
        raise fail(
            f"{out}: holds {', '.join(found)}, which would be lost; choose another --out", USAGE
        )
    built_in = known_roots(src, tgt, roots)
    if built_in and data_version is not None:
        raise fail(
            f"--data-version {data_version}: the built-in world has no versions; name a root with "
            "--data",
            USAGE,
        )
    chosen = [
        tokens_of(frames, option)
        for frames, option in (
            (src_frames, "--src-frames"),
            (tgt_frames, "--tgt-frames"),
            (val_frames, "--val-frames"),
        )
    ]
    folder, folder_why = cache_folder(cache)
    thread_choice = chosen_threads(threads)
    if built_in:
        src_root, tgt_root = built_in_world(src, tgt, folder, int(thread_choice[0]), console)
    else:
        src_root, tgt_root = (Path(root or "").resolve() for root in roots)
    places = runs.Places(
        origins={
            "src": runs.Origin(src, src_root, data_version, chosen[0]),
            "tgt": runs.Origin(tgt, tgt_root, data_version, chosen[1]),
            "val": runs.Origin(tgt, tgt_root, data_version, chosen[2]),
        },
        cache=folder,
        built_in=built_in,
    )
    if source is not None:
        places = places.without_source()
    with screen.bar(console) as tell:
        run, facts = runs.assemble(
            r,
            seed,
            out,
            places,
            pseudo=pseudo,
            device=dev,
            workers=workers,
            pretrained=weights,
            source=source.network if source is not None else None,
            given=named,
            progress=tell,
        )
    method_fact = (
        "method",
        runs.title(r, given),
        f"{plural(r.steps, 'iteration')} of {plural(r.batch, 'frame')} a domain",
    )
    choices = {
        "preset": (preset, preset_why),
        "device": (dev, dev_why),
        **_processes(r),
        "kernels": kernels.backend(dev),
        "threads": thread_choice,
        "cache": (folder, folder_why),
    }
    start = weights_fact(pretrained)
    if source is not None:
        start = "source model", str(source.path), f"{source.title}; no source frame is read"
    print_choices(console, choices, [method_fact, start, *facts])
    if dry_run:
        _rehearse(run, console)
        return
    record = partial(runs.write_record, run, places, int(thread_choice[0]))
    _drive(run, console, writer, partial(record, source.path if source is not None else None))


def _rehearse(run: Any, console: Console) -> None:
    """Say what this training will take."""
    from ftdpp import screen
    from ftdpp.readers import plural
    from ftdpp.rehearsal import FILES, rehearse

    found, r = rehearse(run), run.recipe
    rows = ", ".join(f"{name} {count:,}" for name, count in found.rows.items())
    checks = f"{plural(r.steps, 'iteration')}, {plural(found.validations, 'validation')}"
    memory = "of the GPU" if run.device.type == "cuda" else "of this process"
    screen.facts(
        console,
        [
            ("iteration", f"{found.step:.2f} s", f"on the largest frames; rows: {rows}"),
            ("validation", f"{found.validation:.1f} s", "from its first frames"),
            ("in all", f"about {screen.duration(found.seconds(r.steps))}", checks),
            ("memory", f"{found.memory / 2**30:.1f} GiB", f"the most {memory}"),
            (
                "disk",
                f"{FILES * found.checkpoint / 2**20:,.0f} MiB",
                f"of {found.free / 2**20:,.0f} free: last, best, and one while it is written",
            ),
        ],
    )
    console.print(f"dry run: nothing was written to {run.out}", soft_wrap=True)


def _resume(
    context: typer.Context,
    folder: Path,
    device: str | None,
    workers: int | None,
    threads: int | None,
    cache: Path | None,
    tensorboard: bool,
) -> None:
    """Continue the run of a folder with what its run.json and its checkpoint say."""
    from ftdpp import checkpoint, kernels, parallel, runs, screen

    console = screen.messages()
    mine = {"resume", "device", "workers", "threads", "cache", "tensorboard"}
    mine |= {"data", "src_data", "tgt_data"}  # where the data has moved to
    for name in context.params.keys() - mine:
        origin = context.get_parameter_source(name)
        if origin is not None and origin.name == "COMMANDLINE":
            option = "--" + name.rstrip("_").replace("_", "-")
            raise fail(f"--resume takes the run's own settings; drop {option}", USAGE)
    last = folder / "last.safetensors"
    if not folder.is_dir() or not last.exists():
        raise checkpoint.RunError(f"{folder}: nothing to resume, no last.safetensors is in it")
    record, meta = runs.read_record(folder), checkpoint.read_training(last)
    if record is None:
        raise checkpoint.RunError(
            f"{folder}: there is no run.json, so where its data lies is unknown; begin anew"
        )
    r = checkpoint.stored_recipe(meta, last)
    for what in ("recipe", "seed"):
        if record[what] != meta[what]:
            raise checkpoint.RunError(
                f"{folder}: run.json and last.safetensors have another {what}, so one of them is "
                "damaged or of another run; restore it, or begin anew"
            )
    dev, dev_why = chosen_device(device)
    context.with_resource(parallel.joined(dev))
    places = runs.recorded_places(record)
    place_why = "as the run began"
    if cache is not None:
        places.cache, place_why = cache_folder(cache)
    os.environ["FTD_CACHE"] = str(places.cache)
    thread_choice = chosen_threads(threads, record["threads"])
    moved = context.params["src_data"] or context.params["data"]
    if moved is not None and "src" in places.origins:
        places.origins["src"].root, places.built_in = moved.resolve(), False
    moved = context.params["tgt_data"] or context.params["data"]
    if moved is not None:
        places.origins["tgt"].root = places.origins["val"].root = moved.resolve()
        places.built_in = False
    if places.built_in:
        src, tgt = r.scenario.removesuffix("-ssda").split("-")
        src_root, tgt_root = built_in_world(src, tgt, places.cache, int(thread_choice[0]), console)
        for side, place in places.origins.items():
            place.root = src_root if side == "src" else tgt_root
    given = tuple(meta["given"])
    with screen.bar(console) as tell:
        run, facts = runs.assemble(
            r,
            meta["seed"],
            folder,
            places,
            pseudo=Path(record["pseudo"]) if record["pseudo"] else None,
            device=dev,
            workers=workers,
            pretrained_digest=meta["pretrained"],
            source_digest=meta["source"],
            given=given,
            progress=tell,
        )
    choices = {
        "device": (dev, dev_why),
        **_processes(r),
        "kernels": kernels.backend(dev),
        "threads": thread_choice,
        "cache": (places.cache, place_why),
    }
    run.resume()
    where = f"iteration {run.iteration} of {r.steps}"
    print_choices(console, choices, [("resuming", runs.title(r, given), where), *facts])
    _drive(run, console, _board_writer() if tensorboard else None)


def _processes(r: Any) -> dict[str, tuple[Any, str]]:
    """What an update is the mean of, where it is more than a batch."""
    from ftdpp import parallel

    made = {}
    if parallel.size() > 1:
        made["processes"] = parallel.size(), "torchrun; each has a batch of its own in an update"
    if parallel.size() * r.accumulate > 1:
        count = parallel.size() * r.accumulate
        made["update"] = count, f"batches, {count * r.batch} frames a domain"
    return made


def _board_writer() -> Any:
    """The class that writes event files."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise fail("--tensorboard: not installed; pip install '.[tensorboard]'", USAGE) from None
    return SummaryWriter


def _drive(
    run: Any, console: Console, writer: Any, begin: Callable[[], None] | None = None
) -> None:
    """Train to the end on the screen, and say what was left where.

    Args:
        writer: of TensorBoard's event files, or None. begin: called first, once the folder is ours.
    """
    from ftdpp import runs, screen
    from ftdpp.files import claimed

    board = None if writer is None or not run.leads else writer(str(run.out / "tensorboard"))
    if run.iteration == run.recipe.steps and not run.owed:
        console.print(f"{run.out} is at its end: iteration {run.iteration}", soft_wrap=True)
    display = screen.Display(console, runs.work_left(run))
    try:
        with claimed(run.out) if run.leads else nullcontext(), display:
            if begin is not None and run.leads:
                begin()
            screen.drive(run, runs.title(run.recipe, run.given), display, board)
    except BlockingIOError:
        raise fail(
            f"{run.out}: another process trains there; choose another --out", USAGE
        ) from None
    if board is not None:
        board.close()
    chosen = "the last iteration: nothing to select by"
    if run.best:
        chosen = f"iteration {run.best['iteration']} by {run.best['split']} mIoU"
    done = f"done: {run.last_path}, {run.best_path} ({chosen})"
    if not run.best_path.is_file():
        done = f"done: {run.last_path}; {run.best_path} was removed ({chosen})"
    console.print(done, soft_wrap=True)
