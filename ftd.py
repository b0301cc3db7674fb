"""The command line: parse, call, print. Heavy imports happen inside the commands, so that `--help`
is immediate."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from enum import StrEnum
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from ftdpp.recipe import Recipe
    from ftdpp.runs import Origin

app = typer.Typer(
    name="ftd",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Camera + LiDAR domain adaptation for 3D semantic segmentation (FtD++).",
)
data_app = typer.Typer(
    no_args_is_help=True, help="Look at data sets, prepare them, or make the built-in street world."
)
app.add_typer(data_app, name="data")

FAILED, USAGE, DATA, NON_FINITE, OUT_OF_MEMORY, INTERRUPTED = 1, 2, 3, 4, 5, 130

# Options that several commands share.
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Root of the data set. Without it: the built-in street world."),
]
SrcData = Annotated[
    Path | None, typer.Option(help="Root of the source, where it differs from --data.")
]
TgtData = Annotated[
    Path | None, typer.Option(help="Root of the target, where it differs from --data.")
]
Version = Annotated[
    str | None, typer.Option("--data-version", help="nuScenes version folder, e.g. v1.0-mini.")
]
Cache = Annotated[
    Path | None, typer.Option(help="Folder of prepared data; default $FTD_CACHE or ~/.cache/ftd.")
]
Preset = Annotated[
    str | None,
    typer.Option(help="paper or small; default: paper for real data on a GPU, else small."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Override a setting; repeatable."),
]
Steps = Annotated[int | None, typer.Option(help="Iterations; default: the recipe's.", min=1)]
SSDA = Annotated[
    bool, typer.Option("--ssda", help="Semi-supervised: some target scenes are labelled.")
]
Pretrained = Annotated[
    str | None, typer.Option(help="ImageNet weights of the 2D trunk: a .pth file, or download.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")]
Workers = Annotated[
    int | None, typer.Option(help="Data loading processes; default: 0 on up to four cores.", min=0)
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; default: as many as are free now.", min=1)
]
Checkpoint = Annotated[str, typer.Option(help="best (by validation mIoU) or last.")]
RunPath = Annotated[Path, typer.Argument(help="Run folder, or a .safetensors checkpoint.")]
Frames = Annotated[str | None, typer.Option(help="Only these frames: tokens, comma-separated.")]
Overlay = Annotated[
    Path | None, typer.Option(help="Folder for pictures of predictions; see --count.")
]
Count = Annotated[
    int | None, typer.Option(help="How many pictures --overlay makes; default: 4.", min=1)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Clip = Annotated[
    str | None,
    typer.Option(
        help="Frozen CLIP: a folder, or a name on the hub such as openai/clip-vit-base-patch16. "
        "Default: street, small and trained here once."
    ),
]
Domain = Annotated[str, typer.Option(help="A part of a data set, e.g. usa; see the README.")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"ftd {version('ftdpp')}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _fail(message: object, code: int) -> typer.Exit:
    from ftdpp import parallel, screen

    who = f"ftd, process {parallel.number()}" if parallel.number() else "ftd"
    console = screen.messages()
    console.quiet = False
    console.print(f"{who}: {message}", style="bold red", soft_wrap=True)
    return typer.Exit(code)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the package's exceptions into a message and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        import torch

        from ftdpp import parallel
        from ftdpp.checkpoint import RunError
        from ftdpp.kernels import KernelError
        from ftdpp.readers import DataError
        from ftdpp.recipe import RecipeError
        from ftdpp.train import Interrupted, NonFiniteLoss

        if parallel.asked_for() > 1 and command.__name__ != "train":
            raise _fail("torchrun starts ftd train alone; call this one without it", USAGE)
        smaller = "use --preset small or a smaller --set batch=..."
        before = os.environ.get("FTD_CACHE")
        if kwargs.get("cache"):  # for this command, and for what asks `files.cache_home`
            os.environ["FTD_CACHE"] = str(kwargs["cache"])
        try:
            command(*args, **kwargs)
        except (RecipeError, KernelError) as error:
            raise _fail(error, USAGE) from None
        except RunError as error:
            raise _fail(error, FAILED) from None
        except DataError as error:
            raise _fail(error, DATA) from None
        except NonFiniteLoss as error:
            raise _fail(error, NON_FINITE) from None
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise _fail(f"out of memory ({error}); {smaller}", OUT_OF_MEMORY) from None
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # how torch reports it on a CPU
                raise
            raise _fail(f"out of memory; {smaller}", OUT_OF_MEMORY) from None
        except BrokenPipeError:  # the reader closed the pipe
            raise
        except OSError as error:
            what = error.filename or "a file"
            raise _fail(f"{what}: {error.strerror or error}", FAILED) from None
        except (Interrupted, KeyboardInterrupt) as error:
            raise _fail(str(error) or "interrupted", INTERRUPTED) from None
        finally:
            os.environ.pop("FTD_CACHE", None)
            os.environ |= {"FTD_CACHE": before} if before is not None else {}

    return run


# ---- choices that are made for the user, each printed with its reason ----------------------------


def _cache(cache: Path | None) -> tuple[Path, str]:
    from ftdpp import files

    why = "$FTD_CACHE" if os.environ.get("FTD_CACHE") else "default; change it with --cache"
    folder, why = files.cache_home(), "--cache" if cache else why
    if folder.exists() and not folder.is_dir():
        raise _fail(f"{folder}: is a file; name a folder for prepared data ({why})", USAGE)
    return folder, why


def _device(name: str | None) -> tuple[Any, str]:
    import torch

    from ftdpp import machine, parallel

    found = torch.cuda.is_available()
    why = "--device" if name else "a GPU is present" if found else "no GPU is present"
    try:
        device = torch.device(name or ("cuda" if found else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(1, device="cpu" if parallel.asked_for() > 1 else device)
    except (RuntimeError, AssertionError) as error:
        raise _fail(f"--device {name}: {str(error).splitlines()[0]}; use cpu", USAGE) from None
    if device.type == "cuda" and parallel.asked_for() > 1:
        device = parallel.own_gpu()
    machine.use(device)
    return device, why


def _threads(count: int | None, recorded: int | None = None) -> tuple[str, str]:
    """Sets the number of CPU threads of this process."""
    import torch

    from ftdpp import machine

    if count is not None:
        chosen = count, "--threads"
    elif recorded is not None:
        chosen = recorded, "as the run began: another number would change its last digits"
    else:
        chosen = machine.free_threads()
    torch.set_num_threads(chosen[0])
    return str(chosen[0]), chosen[1]


def _preset(name: str | None, device: Any, built_in: bool) -> tuple[str, str]:
    if name:
        return name, "--preset"
    if built_in:
        return "small", "the built-in world is made for it"
    if device.type == "cuda":
        return "paper", "a GPU is present"
    return "small", "two CPU cores train it in minutes"


RUN_FILES = {
    *("last.safetensors", "best.safetensors", "run.json"),
    *("log.csv", "val.csv", "audit.csv", "scores.json"),
}


def _writable(path: Path, folder: bool = False) -> None:
    """Refuses a file (or folder) that cannot be written, before hours of work would be lost."""
    place = path if folder else path.parent
    if path.is_dir() and not folder:
        raise _fail(f"{path}: is a folder; name a file", USAGE)
    if path.name in RUN_FILES and (path.parent / "run.json").is_file():
        raise _fail(f"{path}: is a run's own file, which would be lost; name another", USAGE)
    # Tried in the part of it that is there: a command that is refused leaves nothing behind.
    there = next(p for p in (place, *place.absolute().parents) if p.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise _fail(
            f"{path}: cannot be written there ({error.strerror}); choose another place", USAGE
        ) from None


def _known_domain(option: str, name: str) -> Any:
    from ftdpp import readers, recipe

    domains = readers.domains()
    if name not in domains:
        raise recipe.unknown(f"domain {option}", name, list(domains))
    return domains[name]


def _known_roots(src: str, tgt: str, roots: tuple[Path | None, Path | None]) -> bool:
    """Refuses roots that cannot be used; whether the built-in world is meant."""
    from ftdpp.readers import DataError
    from ftdpp.world import layouts

    if (roots[0] is None) != (roots[1] is None):
        side = "--tgt-data" if roots[1] is None else "--src-data"
        raise _fail(
            f"one domain has a root and the other has none; name it with {side}, or both with "
            "--data",
            USAGE,
        )
    for root in roots:
        if root is not None and not root.is_dir():
            raise DataError(f"{root}: there is no such folder; name the root of the data set")
    built_in = roots[0] is None
    if built_in and layouts.pair_of(src, tgt) is None:
        pairs = ", ".join(f"--src {a} --tgt {b}" for a, b in layouts.PAIRS)
        raise _fail(
            f"there is no built-in world for {src} -> {tgt} (there is for {pairs}); name the data "
            "set's root with --data",
            USAGE,
        )
    return built_in


def _world(src: str, tgt: str, cache: Path, workers: int, console: Console) -> tuple[Path, Path]:
    """The roots of both domains in the built-in street world, written on first use."""
    from ftdpp import screen
    from ftdpp.world import layouts

    console.print(
        "BUILT-IN STREET WORLD: no --data was given, so this runs on generated streets, not on a "
        "real data set.",
        style="bold black on yellow",
        soft_wrap=True,
    )
    with screen.bar(console) as tell:
        src_root, tgt_root = layouts.built_in(src, tgt, cache, workers, tell)
    return src_root.resolve(), tgt_root.resolve()


def _tokens(frames: str | None, option: str) -> list[str] | None:
    if frames is None:
        return None
    tokens = [token for token in frames.split(",") if token]
    if not tokens:
        raise _fail(f"{option}: expected tokens, comma-separated; found none", USAGE)
    return tokens


def _imagenet(pretrained: str | None, *recipes: Recipe) -> dict[str, Tensor] | None:
    """The weights that --pretrained names, read before hours of preparing data and not after."""
    import torch

    from ftdpp import pretrained as weights
    from ftdpp import systems
    from ftdpp.recipe import RecipeError

    if not pretrained:
        return None
    with torch.device("meta"):  # shapes alone
        made = [(r, systems.build(r).encoders()) for r in recipes if r.width_2d == 64]
    if not made:
        raise RecipeError(
            "--pretrained: ImageNet weights fit a network of width 64 only; use --preset paper"
        )
    encoders = [encoder for _, found in made for encoder in found]
    if not encoders:
        raise RecipeError(f"--pretrained: {made[0][0].method} has no image encoder; drop it")
    if pretrained != "download" and not Path(pretrained).is_file():
        raise RecipeError(f"--pretrained {pretrained}: no such file; or --pretrained download")
    file = None if pretrained == "download" else pretrained
    try:
        return weights.imagenet_weights(encoders[0], file)
    except (ValueError, OSError) as error:
        raise RecipeError(f"--pretrained {pretrained}: {error}") from None


def _clip(name: str | None) -> list[str]:
    """--clip as a setting; a folder by its full path, so that it is found from everywhere."""
    if not name:
        return []
    return [f"clip={Path(name).resolve() if Path(name).is_dir() else name}"]


def _weights_fact(pretrained: str | None) -> tuple[str, str, str]:
    why = "--pretrained" if pretrained else "none given; the paper starts from them"
    return "ImageNet weights", pretrained or "none", why


def _print_choices(
    console: Console, choices: dict[str, tuple[Any, str]], more: list[tuple[str, str, str]]
) -> None:
    """Every automatic choice, as value and reason."""
    from ftdpp import screen

    screen.facts(console, [*((name, str(v), why) for name, (v, why) in choices.items()), *more])


# ---- train -------------------------------------------------------------------------------------


@app.command()
@guarded
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
) -> None:
    """Train on SRC, adapt to TGT; with --from RUN, adapt a trained network without source data.
    Leaves last.safetensors, best.safetensors, log.csv, val.csv and run.json in the run folder, of
    some methods audit.csv."""
    from ftdpp import evaluate as protocol
    from ftdpp import kernels, parallel, recipe, runs, screen, systems
    from ftdpp.readers import plural

    console = screen.messages()
    if resume is not None:
        _resume(context, resume, device, workers, threads, cache, tensorboard)
        return
    dev, dev_why = _device(device)
    context.with_resource(parallel.joined(dev))
    source = None
    if from_ is not None:
        if tgt is None:
            raise _fail("--tgt missing; name the domain to adapt to", USAGE)
        for option in ("src", "src_data", "src_frames", "ssda", "pseudo", "pretrained"):
            if context.params[option]:
                raise _fail(
                    f"--{option.replace('_', '-')}: a method without source data starts from the "
                    "run that --from names; drop it",
                    USAGE,
                )
        source = runs.read_source(_checkpoint(from_, "best"), tgt, data or tgt_data)
        src, src_data = source.domain, tgt_data
    if source is None and systems.is_source_free(method or ""):
        raise _fail(
            f"{method} adapts a trained network without its source data; name it with --from RUN "
            "instead of --src",
            USAGE,
        )
    if src is None or tgt is None:
        missing = " and ".join(n for n, v in (("--src", src), ("--tgt", tgt)) if v is None)
        raise _fail(f"{missing} missing; name both domains, or --resume RUN", USAGE)
    for option, domain in (("--src", src), ("--tgt", tgt)):
        _known_domain(option, domain)
    roots = src_data or data, tgt_data or data
    preset, preset_why = _preset(preset, dev, None in roots)
    overrides = [*(set_ or []), *([f"steps={steps}"] if steps else [])]
    overrides += _clip(clip)
    if pseudo and not pseudo.is_file():
        raise _fail(
            f"--pseudo {pseudo}: no such file; make one with: ftd pseudo RUN --out {pseudo}", USAGE
        )
    scenario = f"{src}-{tgt}" + ("-ssda" if ssda else "")
    if source is not None:
        method = method or "crossmatch"
    method = method or ("source-only" if systems.is_dense(scenario) else "ftdpp")
    theirs = source.recipe if source is not None else None
    known = method in systems.METHODS
    if clip and known and "clip" not in recipe.settings(systems.system_of(method, scenario).Recipe):
        raise _fail(f"--clip {clip}: {method} looks through no CLIP; drop it", USAGE)
    r = systems.recipe(scenario, method, preset, pseudo is not None, overrides, theirs)
    if source is not None and not systems.is_source_free(method):
        raise _fail(
            f"--from: {method} trains on labelled data; use --method crossmatch, or name the "
            "source with --src instead",
            USAGE,
        )
    if pseudo is not None:
        protocol.check_pseudo_file(pseudo, r)
    if ssda and tgt_frames:
        raise recipe.RecipeError(
            "--ssda takes labelled and unlabelled frames from the official lists; drop --tgt-frames"
        )
    weights = _imagenet(pretrained, r)
    writer = _board_writer() if tensorboard else None
    base = systems.recipe(scenario, method, preset, pseudo is not None, (), theirs)
    given = recipe.settings_of(r, base, recipe.given_names(overrides))
    named = given if source is None else runs.names_source(r, given, source.given)
    out = out or Path("runs") / runs.run_name(r, named, seed)
    if (out / "last.safetensors").exists():
        raise _fail(
            f"{out} already holds a run; continue it with --resume {quote(str(out))}, or choose "
            "another folder with --out",
            USAGE,
        )
    _writable(out, folder=True)
    built_in = _known_roots(src, tgt, roots)
    if built_in and data_version is not None:
        raise _fail(
            f"--data-version {data_version}: the built-in world has no versions; name a root with "
            "--data",
            USAGE,
        )
    chosen = [
        _tokens(frames, option)
        for frames, option in (
            (src_frames, "--src-frames"),
            (tgt_frames, "--tgt-frames"),
            (val_frames, "--val-frames"),
        )
    ]
    folder, folder_why = _cache(cache)
    thread_choice = _threads(threads)
    if built_in:
        src_root, tgt_root = _world(src, tgt, folder, int(thread_choice[0]), console)
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
    start = _weights_fact(pretrained)
    if source is not None:
        start = "source model", str(source.path), f"{source.title}; no source frame is read"
    _print_choices(console, choices, [method_fact, start, *facts])
    record = partial(runs.write_record, run, places, int(thread_choice[0]))
    _drive(run, console, writer, partial(record, source.path if source is not None else None))


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
            raise _fail(f"--resume takes the run's own settings; drop {option}", USAGE)
    last = folder / "last.safetensors"
    if not folder.is_dir() or not last.exists():
        raise checkpoint.RunError(f"{folder}: nothing to resume, no last.safetensors is in it")
    record, meta = runs.read_record(folder), checkpoint.read_metadata(last)
    if record is None:
        raise checkpoint.RunError(
            f"{folder}: there is no run.json, so where its data lies is unknown; begin anew"
        )
    r = checkpoint.stored_recipe(meta, last)
    dev, dev_why = _device(device)
    context.with_resource(parallel.joined(dev))
    places = runs.recorded_places(record)
    place_why = "as the run began"
    if cache is not None:
        places.cache, place_why = _cache(cache)
    os.environ["FTD_CACHE"] = str(places.cache)
    thread_choice = _threads(threads, record["threads"])
    moved = context.params["src_data"] or context.params["data"]
    if moved is not None and "src" in places.origins:
        places.origins["src"].root, places.built_in = moved.resolve(), False
    moved = context.params["tgt_data"] or context.params["data"]
    if moved is not None:
        places.origins["tgt"].root = places.origins["val"].root = moved.resolve()
        places.built_in = False
    if places.built_in:
        src, tgt = r.scenario.removesuffix("-ssda").split("-")
        src_root, tgt_root = _world(src, tgt, places.cache, int(thread_choice[0]), console)
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
    _print_choices(console, choices, [("resuming", runs.title(r, given), where), *facts])
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
        raise _fail("--tensorboard: not installed; pip install '.[tensorboard]'", USAGE) from None
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
        raise _fail(
            f"{run.out}: another process trains there; choose another --out", USAGE
        ) from None
    if board is not None:
        board.close()
    chosen = "the last iteration: nothing to select by"
    if run.best:
        chosen = f"iteration {run.best['iteration']} by {run.best['split']} mIoU"
    done = f"done: {run.last_path}, {run.best_path} ({chosen})"
    console.print(done, soft_wrap=True)


# ---- eval, pseudo, convert ---------------------------------------------------------------------


def _checkpoint(run: Path, which: str) -> Path:
    from ftdpp.checkpoint import RunError

    if run.suffix == ".safetensors" or run.is_file():
        return run
    if which not in ("best", "last"):
        raise _fail(f"--checkpoint {which}: expected best or last", USAGE)
    if not run.is_dir():
        raise RunError(f"{run}: no such run folder; name one, or a .safetensors checkpoint")
    return run / f"{which}.safetensors"


def _load(
    path: Path, device: str | None, threads: int | None, console: Console
) -> tuple[Any, Any, dict[str, Any]]:
    """The device that was chosen, said with its reason, and a checkpoint's system there."""
    from ftdpp import checkpoint, screen

    dev, why = _device(device)
    screen.facts(console, [("device", str(dev), why), ("threads", *_threads(threads))])
    return dev, *checkpoint.load(path, dev)


def _require_overlay(overlay: Path | None, count: int | None) -> None:
    """Refuses a folder of pictures that cannot be written, and a count of none."""
    if overlay is not None:
        _writable(overlay, folder=True)
    elif count is not None:
        raise _fail("--count says how many pictures --overlay makes; add --overlay FOLDER", USAGE)


def _run_origin(
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
        _known_domain("--domain", domain)
    record = runs.read_record(run if run.is_dir() else run.parent)
    chosen = _tokens(frames, "--frames")
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


@app.command("eval")
@guarded
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
    _require_overlay(overlay, count)
    path = _checkpoint(run, checkpoint)
    own = run.is_dir() and checkpoint == "best" and path.exists()
    before = results.weights_of(run) if own else ""  # of what is read next
    dev, system, meta = _load(path, device, threads, console)
    origin = _run_origin(run, domain, data, data_version, split, frames)
    r = system.recipe
    splits = _known_domain("--domain", origin.domain).splits
    if split is None and origin.frames is None and not {"test", "val"} & set(splits):
        raise _fail(
            f"{origin.domain} has no test or val split; name one with --split: {', '.join(splits)}",
            USAGE,
        )
    split = split or ("test" if "test" in splits else "val")
    if origin.frames is None and split not in splits:
        raise _fail(f"--split {split}: {origin.domain} has {', '.join(splits)}", USAGE)
    title = runs.title(r, tuple(meta.get("given", ())))
    weights = f"{path.name}, iteration {meta['iteration']}"
    with screen.bar(console) as tell:
        index = origin.index(split, r, _cache(cache)[0], tell)
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
    from ftdpp import report
    from ftdpp.data import CLASS_SETS
    from ftdpp.index import original_frames
    from ftdpp.readers import plural

    # Points are drawn on the original image; pixels of a dense data set as they were predicted.
    dense = bool(chosen) and index.frame(chosen[0]).xyz is None
    pictures = map(index.frame, chosen) if dense else original_frames(index, chosen)
    frames = zip(pictures, labels, strict=True)
    made = report.write_overlays(folder, frames, CLASS_SETS[r.classes], title, what)
    wrote = f"wrote {plural(len(made), 'picture')} to {folder}"
    console.print(wrote, soft_wrap=True)


@app.command()
@guarded
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
    from ftdpp.readers import plural

    console = screen.messages()
    _writable(out)
    _require_overlay(overlay, count)
    path = _checkpoint(run, checkpoint)
    dev, system, meta = _load(path, device, threads, console)
    origin = _run_origin(run, domain, data, data_version, split, frames)
    r = system.recipe
    adapted = [s.split for s in system.streams(r).values() if not s.labels]
    split = split or (adapted[0] if adapted else "train")
    weights = f"{path.name}, iteration {meta['iteration']}"
    with screen.bar(console) as tell:
        index = origin.index(split, r, _cache(cache)[0], tell)
        found = protocol.write_pseudo_labels(out, system, index, weights, dev, tell)
    title = runs.title(r, tuple(meta.get("given", ())))
    if overlay is not None:
        chosen, labels = range(min(count or 4, len(index))), protocol.PseudoLabels(out, r, index)
        for head in system.pseudo_heads:
            kept = (labels.of(index.tokens[i], head).numpy() for i in chosen)
            what = f"kept pseudo-labels of {head.upper()}"
            _overlays(overlay / head, index, chosen, kept, r, title, console, what)
    where = f"{plural(found['frames'], 'frame')} of {found['domain']} {found['split']}"
    heading = f"{out}: {where}, by {title}, {weights}"
    screen.show(screen.output(), screen.pseudo_table(found, heading))


@app.command()
@guarded
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
) -> None:
    """Label frames, which need no labels, and write them as the data set's benchmark takes them:
    SemanticKITTI .label, nuScenes lidarseg .bin, Cityscapes PNG; npy for the others."""
    from ftdpp import inference, readers, runs, screen
    from ftdpp.readers import plural

    console = screen.messages()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise _fail(f"--out {out}: is there and not empty; name a new folder", USAGE)
    _writable(out, folder=True)
    _require_overlay(overlay, count)
    path = _checkpoint(run, checkpoint)
    dev, system, meta = _load(path, device, threads, console)
    origin = _run_origin(run, domain, data, data_version, split, frames)
    row = _known_domain("--domain", origin.domain)
    splits = row.splits
    split = split or next((name for name in ("test", "val") if name in splits), splits[0])
    if origin.frames is None and split not in splits:
        raise _fail(f"--split {split}: {origin.domain} has {', '.join(splits)}", USAGE)
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
            index = origin.index(split, system.recipe, _cache(cache)[0], tell)
        chosen = range(min(count or 4, len(index)))
        found = inference.predict_frames(system, index, chosen, dev)
        what = f"{title}, {system.heads[-1].upper()}, {path.name}, iteration {meta['iteration']}"
        _overlays(overlay, index, chosen, found, system.recipe, what, console)


@app.command()
@guarded
def convert(
    net_2d: Annotated[Path, typer.Option("--2d", help="Released .pth of the 2D network.")],
    net_3d: Annotated[Path, typer.Option("--3d", help="Released .pth of the 3D network.")],
    fusion: Annotated[Path, typer.Option("--fusion", help="Released .pth of the fusion module.")],
    scenario: Annotated[str, typer.Option(help="e.g. usa-singapore; see ftd recipes.")],
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
) -> None:
    """Turn released FtD++ checkpoints into one that ftd eval and ftd pseudo read."""
    from ftdpp import released, screen, systems

    r = systems.recipe(scenario)
    _writable(out)
    released.convert_checkpoints({"2d": net_2d, "3d": net_3d, "fusion": fusion}, r, out)
    target = scenario.split("-")[1]
    screen.messages().print(
        f"wrote {out}; evaluate it with: ftd eval {out} --domain {target} --data ROOT",
        soft_wrap=True,
    )


@app.command()
@guarded
def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    checkpoint: Checkpoint = "best",
    cache: Cache = None,
) -> None:
    """Write a checkpoint with the networks that predict, and nothing else: no auxiliary network, no
    teacher, no optimiser. It evaluates to the same numbers."""
    from ftdpp import checkpoint as files
    from ftdpp import screen

    _writable(out)
    path = _checkpoint(run, checkpoint)
    if out.resolve() == path.resolve():  # one that lies in no run's folder
        raise _fail(f"--out {out}: is the checkpoint itself; name another file", USAGE)
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


# ---- compare -----------------------------------------------------------------------------------


@app.command()
@guarded
def compare(
    context: typer.Context,
    src: Annotated[
        str, typer.Option(help="Origin domain; several with commas, each with its --tgt.")
    ] = "usa",
    tgt: Annotated[str, typer.Option(help="Target domain, or several.")] = "singapore",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated; NAME[setting=value,...] is a variant, NAME+pl both stages; "
            "paper and ablations are lists. Default: source-only,ftdpp; on images without points "
            "source-only,target-only."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0",
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE,VALUE,...", help="Run with each of these values; repeatable."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at once, a process each.", min=1)] = 1,
    preset: Preset = None,
    data: Data = None,
    src_data: SrcData = None,
    tgt_data: TgtData = None,
    data_version: Version = None,
    steps: Steps = None,
    set_: Sets = None,
    ssda: SSDA = False,
    pretrained: Pretrained = None,
    clip: Clip = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the runs; finished ones are not trained again.")
    ] = Path("runs"),
    results: Annotated[
        Path | None, typer.Option(help="File of every number; default OUT/compare.json.")
    ] = None,
    device: Device = None,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of a run; default: the free ones, by --jobs.", min=1),
    ] = None,
    cache: Cache = None,
) -> None:
    """Train several methods with several seeds, select on val, and compare them on test in one
    table. Goes on where it was interrupted, and takes the runs that are there."""
    from ftdpp import compare as comparison
    from ftdpp import kernels, machine, runs, screen
    from ftdpp import results as figures
    from ftdpp.readers import plural

    console = screen.messages()
    pairs = _pairs(src, tgt)
    dev, dev_why = _device(device)
    roots = src_data or data, tgt_data or data
    preset, preset_why = _preset(preset, dev, None in roots)
    overrides = [*(set_ or []), *([f"steps={steps}"] if steps else [])]
    overrides += _clip(clip)
    plans = {}
    for pair in pairs:
        scenario = "-".join(pair) + ("-ssda" if ssda else "")
        chosen = comparison.listed(methods, scenario)
        plans[scenario] = comparison.plan(
            scenario, chosen, seeds, preset, overrides, out, sweep or []
        )
        if "val" not in _known_domain("--tgt", pair[1]).splits:
            raise _fail(f"--tgt {pair[1]}: has no val split to select on; use ftd train", USAGE)
    planned = [job for plan in plans.values() for job in plan]
    _writable(out, folder=True)
    results = results or out / "compare.json"
    _writable(results)
    weights = _imagenet(pretrained, *(job.recipe for job in planned))
    built_in = [_known_roots(*pair, roots) for pair in pairs][-1]  # each is looked at
    folder, folder_why = _cache(cache)
    thread_choice = _threads(threads)
    jobs, workers = min(jobs, len(planned)), None
    if jobs > 1:
        cores = machine.allowed_cores()
        workers = min(8, cores // (2 * jobs)) if cores > 4 * jobs else 0
        if threads is None and dev.type == "cpu":
            thread_choice = _threads(1)[0], f"one a run, of {jobs} at once"
    places = {}
    for scenario, pair in zip(plans, pairs, strict=True):
        if built_in:
            where = _world(*pair, folder, machine.allowed_cores(), console)
        else:
            where = Path(roots[0] or "").resolve(), Path(roots[1] or "").resolve()
        sides = {"src": (pair[0], where[0]), "tgt": (pair[1], where[1]), "val": (pair[1], where[1])}
        origins = {side: runs.Origin(*place, data_version) for side, place in sides.items()}
        places[scenario] = runs.Places(origins, folder, built_in)
    work = comparison.Comparison(planned, places, dev, int(thread_choice[0]), weights, workers)
    with screen.bar(console) as tell:
        left, facts = work.prepare(tell)
    choices = {
        "runs": (len(planned), f"seeds {seeds}"),
        "preset": (preset, preset_why),
        "device": (dev, dev_why),
        "kernels": kernels.backend(dev),
        "jobs": (jobs, "--jobs" if jobs > 1 else "one run at a time"),
        "threads": thread_choice,
        "cache": (folder, folder_why),
    }
    _print_choices(console, choices, [_weights_fact(pretrained), *facts])
    with screen.Display(console, left, several=jobs > 1) as display:
        rows = work.run(display) if jobs == 1 else work.run_parallel(jobs, display)
    if rows:
        for table in figures.tables(rows):
            screen.show(screen.output(), screen.results_table(table))
        here = f"{machine.describe(dev)}, {plural(jobs, 'run')} at a time"
        figures.write(results, rows, _typed(context), here, preset, runs.git_hash())
        console.print(f"every number: {results}", soft_wrap=True)
    work.report()


def _pairs(src: str, tgt: str) -> list[tuple[str, str]]:
    """Sources and targets of --src and --tgt, one to one."""
    sources, targets = src.split(","), tgt.split(",")
    for option, names in (("--src", sources), ("--tgt", targets)):
        for name in names:
            _known_domain(option, name)
    if len(sources) != len(targets) or len(set(zip(sources, targets, strict=True))) < len(sources):
        raise _fail(
            f"--src {src}, --tgt {tgt}: {len(sources)} and {len(targets)} domains; name a target "
            "for each source, in the same order, and each pair once",
            USAGE,
        )
    return list(zip(sources, targets, strict=True))


def _typed(context: typer.Context) -> str:
    """The command with the options that the user gave; folders, which differ, by their kind."""
    words = ["ftd", str(context.info_name)]
    for parameter in context.command.params:
        name, value = str(parameter.name), context.params[str(parameter.name)]
        given = context.get_parameter_source(name)
        if given is None or given.name != "COMMANDLINE":
            continue
        for part in value if isinstance(value, list | tuple) else [value]:
            text = name.upper() if isinstance(part, Path) else quote(str(part))
            words += [parameter.opts[0], *([] if part is True else [text])]
    return " ".join(words)


class Format(StrEnum):
    text = "text"
    md = "md"
    latex = "latex"
    csv = "csv"


@app.command()
@guarded
def table(
    places: Annotated[
        list[Path], typer.Argument(help="Run folders, and files of ftd compare (compare.json).")
    ],
    form: Annotated[Format, typer.Option("--format", help="Of the table.")] = Format.text,
    classes: Annotated[
        bool, typer.Option("--classes", help="IoU of every class instead of mIoU of every head.")
    ] = False,
    head: Annotated[
        str | None, typer.Option(help="With --classes: 2d, 3d or 2d+3d; default: the last.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Only this split; default: test, or val.")
    ] = None,
) -> None:
    """One table from runs: mean and deviation over seeds, beside what the papers report.
    Runs that were evaluated (ftd eval, ftd compare) hold their figures."""
    from ftdpp import results, screen

    if head is not None and not classes:
        raise _fail("--head chooses whose classes are shown; add --classes", USAGE)
    rows = results.collect(places, split)
    if not rows:
        what = f"no figure of the split {split}" if split else "no figure in these files"
        raise _fail(f"{what}; evaluate the runs first: ftd eval RUN", FAILED)
    made = results.tables(rows, classes, head)
    if form is Format.csv:
        print(results.as_csv(made), end="")
    for one in made if form is not Format.csv else []:
        if form is Format.text:
            screen.show(screen.output(), screen.results_table(one))
        elif form is Format.md:
            print(f"{one.title}\n\n{results.markdown(one)}")
        else:
            print(f"% {one.title}\n{results.latex(one)}")


# ---- clip --------------------------------------------------------------------------------------


@app.command()
@guarded
def clip(
    domain: Annotated[
        str, typer.Option(help="Whose frames are labelled, e.g. singapore.")
    ] = "singapore",
    name: Annotated[
        str, typer.Option("--clip", help="street, a folder, or a name on the hub.")
    ] = "street",
    data: Data = None,
    data_version: Version = None,
    split: Annotated[str | None, typer.Option(help="Default: test, or val.")] = None,
    preset: Preset = None,
    set_: Sets = None,
    as_json: AsJson = False,
    device: Device = None,
    threads: Threads = None,
    cache: Cache = None,
) -> None:
    """What a frozen CLIP knows without any training: label frames by its texts of the classes.
    The built-in street CLIP is trained first where it is missing."""
    from ftdpp import evaluate as protocol
    from ftdpp import runs, screen, systems
    from ftdpp.systems.clip import make_ready
    from ftdpp.systems.clip2uda import ZeroShot

    console, row = screen.messages(), _known_domain("--domain", domain)
    dev, dev_why = _device(device)
    preset, preset_why = _preset(preset, dev, data is None)
    # Of this method only class set, image size and batch: all data sets have it.
    r = systems.recipe(f"{domain}-{domain}", "target-only", preset, overrides=set_ or [])
    built_in = _known_roots(domain, domain, (data, data))
    folder, thread_choice = _cache(cache)[0], _threads(threads)
    chosen = {"preset": (preset, preset_why), "device": (dev, dev_why), "threads": thread_choice}
    _print_choices(console, chosen, [])
    root = data
    if built_in:
        root = _world(domain, domain, folder, int(thread_choice[0]), console)[0]
    assert root is not None
    split = split or ("test" if "test" in row.splits else "val")
    if split not in row.splits:
        raise _fail(f"--split {split}: {domain} has {', '.join(row.splits)}", USAGE)
    with screen.bar(console) as tell:
        looker = make_ready(name, tell)
        index = runs.Origin(domain, root.resolve(), data_version).index(split, r, folder, tell)
        score = protocol.evaluate(ZeroShot(r, looker), index, f"CLIP {name}", dev, tell)
    if as_json:
        print(json.dumps({**score.as_dict(), "clip": name}))
    else:
        screen.show(screen.output(), screen.score_table(score, "zero-shot"))


# ---- recipes, data -----------------------------------------------------------------------------


@app.command()
@guarded
def recipes(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: scenario -> method -> recipe.")
    ] = False,
    scenario: Annotated[
        str | None, typer.Option(help="Only this one; SRC-TGT of any pair, -ssda behind it.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Only this one.")] = None,
    preset: Annotated[str, typer.Option(help="paper or small.")] = "paper",
    second: Annotated[
        bool, typer.Option("--pseudo", help="The second stage, on pseudo-labels.")
    ] = False,
) -> None:
    """Show every scenario and method, with the settings in which they differ."""
    import dataclasses

    from ftdpp import screen, systems

    known = systems.known_scenarios()
    made: dict[str, list[Any]] = {}
    for name in [scenario] if scenario else known:
        methods = systems.methods_for(name, second) or list(systems.METHODS)[:1]  # which refuses
        if method and (scenario or method in methods or method not in systems.METHODS):
            methods = [method]  # asked for by name: what is wrong with it is said
        elif method:
            continue
        made[name] = [systems.recipe(name, m, preset, second) for m in methods]
    if as_json:
        table = {
            name: {r.method: dataclasses.asdict(r) for r in rows} for name, rows in made.items()
        }
        print(json.dumps(table))
        return
    console = screen.output()
    for name, rows in made.items():
        console.print(screen.recipes_table(rows, f"{name}, {preset} preset"))
    screen.messages().print(
        f"{preset} preset; every setting: ftd recipes --json; override one: ftd train ... --set "
        "NAME=VALUE",
        soft_wrap=True,
    )


@data_app.command("check")
@guarded
def data_check(
    root: Annotated[Path, typer.Argument(help="Root of the data set.")],
    domain: Domain,
    data_version: Version = None,
) -> None:
    """Count what is there and what is missing, split by split, without opening a frame."""
    from ftdpp import readers, screen

    rows = readers.check(root, _known_domain("--domain", domain), data_version)
    numbers = [{name: row[name] for name in row if name != "note"} for row in rows]
    console = screen.output()
    screen.show(console, screen.plain_table(numbers, f"{root} as {domain}"))
    for row in rows:
        console.print(f"{row['split']}: {row['note']}", soft_wrap=True)
    if not any(row["frames"] for row in rows):
        raise _fail(f"{root}: no frame of any split of {domain}", DATA)
    if any(row["missing"] for row in rows):
        raise _fail(f"{root}: files are missing; the first of each split is named above", DATA)


@data_app.command("prepare")
@guarded
def data_prepare(
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
) -> None:
    """Project, map labels, resize, and write the memory-mapped index. Training does this by itself
    when it is missing."""
    from ftdpp import readers, screen
    from ftdpp.data import CLASS_SETS
    from ftdpp.index import prepare

    row, folder, console = _known_domain("--domain", domain), _cache(cache)[0], screen.messages()
    reader = readers.reader_of(row)
    shape, classes = reader.image, classes or next(iter(reader.classes))
    if size:
        try:
            height, width = (int(x) for x in size.split(","))
        except ValueError:
            raise _fail(f"--size {size}: expected H,W as in 225,400", USAGE) from None
        if height < 1 or width < 1:
            raise _fail(f"--size {size}: expected H,W of at least 1,1", USAGE)
        shape = height, width
    tokens = _tokens(frames, "--frames")
    names: list[str | None] = [split]
    if tokens:
        names = [None]
    elif split is None:  # all there is; the semi-supervised halves are part of train
        rows = readers.check(root, row, data_version)
        there = [r["split"] for r in rows if r["frames"]]
        names = [name for name in there if not name.startswith("train_")]
        if not names:
            raise _fail(f"{root}: no frame of any split of {domain}; nothing prepared", DATA)
        console.print(f"splits with frames here: {', '.join(there)}", soft_wrap=True)
    for name in names:
        with screen.bar(console) as tell:
            index = prepare(root, row, name, classes, shape, folder, data_version, tokens, tell)
        f = index.fingerprint
        per_class = zip(CLASS_SETS[classes], f["points_per_class"], strict=True)
        counts = ", ".join(f"{n} {c:,}" for n, c in per_class)
        count = readers.plural(f["frames"], "frame")
        console.print(
            f"{domain} {name or 'chosen frames'}: {count} ({f['unlabelled_frames']} unlabelled, "
            f"{f['empty_frames']} empty), {f['points']:,} points in the image: {counts}, ignored "
            f"{f['ignored']:,}\n  {index.path}",
            soft_wrap=True,
        )


@data_app.command("synth")
@guarded
def data_synth(
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
        raise _fail(f"no built-in world for {src} -> {tgt}; there is {pairs}", USAGE)
    counts = None
    if frames:
        parts = layouts.DEFAULT_FRAMES[src, tgt]
        try:
            counts = dict(zip(parts, (int(x) for x in frames.split(",")), strict=True))
        except ValueError:
            raise _fail(
                f"--frames {frames}: expected {len(parts)} numbers, {','.join(parts)}", USAGE
            ) from None
    if out.exists():
        raise _fail(f"{out} exists; choose a new folder", USAGE)
    _writable(out)
    try:
        with screen.bar(console) as tell:
            layouts.write_world(out, src, tgt, counts, seed, workers, tell)
    except ValueError as error:
        raise _fail(error, USAGE) from None
    first, second = layouts.roots(out, src, tgt)
    data = f"--data {quote(str(out))}"
    if first != second:
        data = f"--src-data {quote(str(first))} --tgt-data {quote(str(second))}"
    console.print(
        f"wrote {out}; use it with: ftd train --src {src} --tgt {tgt} {data}", soft_wrap=True
    )


# ---- bench, doctor -----------------------------------------------------------------------------


@app.command()
@guarded
def bench(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are shown.", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="CSV to append the rows to.")] = None,
    scan: Annotated[
        list[Path] | None,
        typer.Option(
            help="A SemanticKITTI scan (.bin) to time too; repeatable.", exists=True, dir_okay=False
        ),
    ] = None,
    device: Device = None,
    threads: Threads = None,
    cache: Cache = None,
) -> None:
    """Time maps, sparse U-Net, data loading and the training step on this machine, beside what it
    can do at best."""
    from ftdpp import machine, screen
    from ftdpp.kernels import check

    try:
        from ftdpp.bench import speed
    except ModuleNotFoundError as error:
        if error.name != "ftdpp.bench":
            raise
        raise _fail(
            "the benchmarks are part of the repository, not of the installed package; clone it and "
            "run: make setup",
            USAGE,
        ) from None
    if out is not None:
        _writable(out)
        speed.check_columns(out)
    folder = _cache(cache)[0]
    dev, _ = _device(device)
    _threads(threads)
    wrong = [c for c in check.run(dev) if not c.ok]
    if wrong:
        raise _fail(
            f"{wrong[0].what} ({wrong[0].dtype}) is wrong on this machine, so its time means "
            "nothing: ftd doctor",
            FAILED,
        )
    console = screen.messages()
    root, _ = _world("usa", "singapore", folder, machine.allowed_cores(), console)
    with screen.bar(console) as tell:
        rows = speed.run(root, folder, rounds, dev, scans=scan or [], progress=tell)
    screen.show(screen.output(), screen.plain_table(rows, machine.describe(dev)))
    if out is not None:
        speed.append(out, rows, dev)


@app.command()
@guarded
def doctor(device: Device = None) -> None:
    """Versions, device, and every sparse operation checked on this machine: paste it into a bug
    report."""
    import importlib.metadata
    import platform

    from ftdpp import kernels, machine, screen
    from ftdpp.kernels import check

    dev, dev_why = _device(device)
    system = f"{platform.system()} {platform.release()}"
    rows = [
        ("python", platform.python_version(), sys.executable),
        ("machine", machine.describe(dev), system),
    ]
    for package in ("ftdpp", "torch", "triton", "torch_scatter", "numpy", "safetensors"):
        try:
            rows.append((package, importlib.metadata.version(package), ""))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed", ""))
    rows += [("device", str(dev), dev_why), ("kernels", *kernels.backend(dev))]
    console = screen.output()
    screen.facts(console, rows)
    checks = check.run(dev)
    table = [
        {
            "operation": c.what,
            "dtype": c.dtype,
            "deviation": f"{c.deviation:.1e}",
            "allowed": f"{check.ALLOWED[c.dtype]:.0e}",
            "repeats": "yes" if c.repeats else "NO",
            "result": "ok" if c.ok else "WRONG",
        }
        for c in checks
    ]
    heading = "largest deviation from dense float64, as a share of the largest value"
    screen.show(console, screen.plain_table(table, heading))
    if not all(c.ok for c in checks):
        raise _fail(
            "a sparse operation is wrong on this machine; FTD_KERNELS=torch avoids Triton; please "
            "report this",
            FAILED,
        )


def main() -> None:
    app()


if __name__ == "__main__":
    main()
