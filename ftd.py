"""The command line: parse, call, print. Heavy imports happen inside the commands, so that `--help` is immediate."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from ftdpp.losses import Recipe
    from ftdpp.train import Run, Source

app = typer.Typer(
    name="ftd",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Camera + LiDAR domain adaptation for 3D semantic segmentation (FtD++).",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at data sets, prepare them, or make the built-in street world.")
app.add_typer(data_app, name="data")

FAILED, USAGE, DATA, NON_FINITE, OUT_OF_MEMORY, INTERRUPTED = 1, 2, 3, 4, 5, 130
BUILT_IN = (("usa", "singapore"), ("day", "night"))  # pairs of domains that synth.py can make

# Options that several commands share.
Src = Annotated[
    str, typer.Option(help="Labelled source domain: usa, day, skitti (vkitti and a2d2 have recipes, their readers follow).")
]
Tgt = Annotated[str, typer.Option(help="Unlabelled target domain: singapore, night, skitti.")]
Data = Annotated[
    Path | None, typer.Option("--data", help="Root of the data set. Without it: the run's own, or the built-in street world.")
]
Version = Annotated[str | None, typer.Option("--data-version", help="nuScenes version folder, e.g. v1.0-mini.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of prepared data; default $FTD_CACHE or ~/.cache/ftd.")]
Preset = Annotated[str | None, typer.Option(help="paper or small; default: paper for real data on a GPU, else small.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Override a number of the recipe; repeatable.")
]
SSDA = Annotated[bool, typer.Option("--ssda", help="Semi-supervised: some target scenes are labelled.")]
Pretrained = Annotated[str | None, typer.Option(help="ImageNet weights of ResNet-34: a .pth file, or download.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")]
Workers = Annotated[int | None, typer.Option(help="Data loading processes; default: 0 on up to four cores.", min=0)]
Checkpoint = Annotated[str, typer.Option(help="best (by validation mIoU) or last.")]


def _fail(message: object, code: int) -> typer.Exit:
    from ftdpp import screen

    screen.messages().print(f"ftd: {message}", markup=False, style="bold red", soft_wrap=True)
    return typer.Exit(code)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the package's exceptions into a message and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        import torch

        from ftdpp.checkpoint import RunError
        from ftdpp.data import DataError
        from ftdpp.kernels import KernelError
        from ftdpp.losses import RecipeError
        from ftdpp.train import Interrupted, NonFiniteLoss

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
            raise _fail(f"out of memory ({error}); use --preset small or a smaller --set batch=...", OUT_OF_MEMORY) from None
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # how torch reports it on a CPU
                raise
            raise _fail("out of memory; use --preset small or a smaller --set batch=...", OUT_OF_MEMORY) from None
        except BrokenPipeError:  # who reads has enough
            raise
        except OSError as error:
            raise _fail(f"{error.filename or 'a file'}: {error.strerror or error}", FAILED) from None
        except (Interrupted, KeyboardInterrupt) as error:
            raise _fail(str(error) or "interrupted", INTERRUPTED) from None

    return run


# ---- choices that are made for the user, each printed with its reason -----------------------------------------------


def _cache(cache: Path | None) -> tuple[Path, str]:
    if cache:
        return cache, "--cache"
    if os.environ.get("FTD_CACHE"):
        return Path(os.environ["FTD_CACHE"]), "$FTD_CACHE"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ftd", "default; change it with --cache"


def _device(name: str | None) -> tuple[Any, str]:
    import torch

    found = torch.cuda.is_available()
    why = "--device" if name else "a GPU is present" if found else "no GPU is present"
    try:
        device = torch.device(name or ("cuda" if found else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise _fail(f"--device {name}: {str(error).splitlines()[0]}; use cpu", USAGE) from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # tf32 products, as cuDNN's convolutions use by default
        if device.index is not None:
            torch.cuda.set_device(device)  # Triton launches on the current one
    return device, why


def _preset(name: str | None, device: Any, built_in: bool) -> tuple[str, str]:
    if name:
        return name, "--preset"
    if built_in:
        return "small", "the built-in world is made for it"
    return ("paper", "a GPU is present") if device.type == "cuda" else ("small", "two CPU cores train it in minutes")


def _writable(path: Path, folder: bool = False) -> None:
    """Refuses a file (or folder) that cannot be written, before hours of work that would be lost."""
    place = path if folder else path.parent
    if path.is_dir() and not folder:
        raise _fail(f"{path}: is a folder; name a file", USAGE)
    try:  # in the part of it that is there: a command that is refused leaves nothing behind
        tempfile.TemporaryFile(dir=next(p for p in (place, *place.absolute().parents) if p.exists())).close()
    except OSError as error:
        raise _fail(f"{path}: cannot be written there ({error.strerror}); choose another place", USAGE) from None


def _world(src: str, tgt: str, cache: Path, console: Console) -> Path:
    """The root of the built-in street world for a pair of domains, written on first use."""
    from ftdpp import screen, synth
    from ftdpp.data import locked

    if (src, tgt) not in BUILT_IN:
        pairs = ", ".join(f"--src {a} --tgt {b}" for a, b in BUILT_IN)
        raise _fail(
            f"there is no built-in world for {src} -> {tgt} (there is for {pairs}); name the data set's root with --data", USAGE
        )
    size = "-".join(str(n) for n in synth.DEFAULT_FRAMES.values())
    root = cache / f"world-{src}-{tgt}-v{synth.VERSION}-{size}"
    console.print(
        "BUILT-IN STREET WORLD: no --data was given, so this runs on generated streets, not on a real data set.",
        style="bold black on yellow",
    )
    with locked(root), screen.bar(console) as tell:
        if not root.is_dir():
            workers = os.cpu_count() or 1
            synth.write_world(
                root, src, tgt, workers=workers, progress=lambda done, total: tell(done, total, "building the street world")
            )
    return root


def _sources(
    src: str,
    tgt: str,
    roots: tuple[Path | None, Path | None],
    version: str | None,
    frames: tuple[str | None, str | None],
    cache: Path,
    console: Console,
) -> tuple[Source, Source]:
    from ftdpp.train import Source

    if (roots[0] is None) != (roots[1] is None):
        side = "--tgt-data" if roots[1] is None else "--src-data"
        raise _fail(f"one domain has a root and the other has none; name it with {side}, or both with --data", USAGE)
    if None in roots and version is not None:
        raise _fail(f"--data-version {version}: the built-in world has no versions; name a root with --data", USAGE)
    world = _world(src, tgt, cache, console) if None in roots else None
    made = []
    for domain, root, chosen in zip((src, tgt), roots, frames, strict=True):
        root = root or world
        assert root is not None
        made.append(Source(domain, root.resolve(), version if root is not world else None, chosen.split(",") if chosen else None))
    return made[0], made[1]


def _imagenet(pretrained: str | None, r: Recipe) -> dict[str, Tensor] | None:
    """The weights that --pretrained names, read before hours of preparing data and not after."""
    from ftdpp import losses, models

    if not pretrained:
        return None
    if r.width != 64:
        raise losses.RecipeError("--pretrained: ImageNet weights fit a network of width 64 only; use --preset paper")
    if pretrained != "download" and not Path(pretrained).is_file():
        raise losses.RecipeError(f"--pretrained {pretrained}: no such file; or --pretrained download")
    try:
        return models.imagenet_weights(r.width, None if pretrained == "download" else pretrained)
    except (ValueError, OSError) as error:
        raise losses.RecipeError(f"--pretrained {pretrained}: {error}") from None


def _weights_fact(pretrained: str | None) -> tuple[str, str, str]:
    why = "--pretrained" if pretrained else "none given; the paper starts from them"
    return "ImageNet weights", pretrained or "none", why


def _print_choices(
    console: Console, preset: tuple[str, str], device: tuple[Any, str], cache: tuple[Path, str], more: list[tuple[str, str, str]]
) -> None:
    """Every automatic choice, as value and reason."""
    from ftdpp import kernels, screen

    named = {"preset": preset, "device": device, "kernels": kernels.backend(device[0]), "cache": cache}
    screen.facts(console, [*((name, str(value), why) for name, (value, why) in named.items()), *more])


# ---- train -----------------------------------------------------------------------------------------------------------


def _git_hash() -> str | None:
    import subprocess

    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _write_run_file(run: Run, src: Source, tgt: Source, argv: list[str]) -> None:
    import dataclasses

    import torch

    def row(source: Source) -> dict[str, Any]:
        return {**dataclasses.asdict(source), "root": str(source.root)}

    record = {
        "command": argv,
        "recipe": dataclasses.asdict(run.recipe),
        "seed": run.seed,
        "src": row(src),
        "tgt": row(tgt),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "git": _git_hash(),
        "data": [i.fingerprint for i in [*run.labelled, *([run.unlabelled] if run.unlabelled is not None else [])]],
    }
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "run.json").write_text(json.dumps(record, indent=1))


@app.command()
@guarded
def train(
    src: Src,
    tgt: Tgt,
    method: Annotated[str, typer.Option(help="See: ftd recipes.")] = "ftdpp",
    preset: Preset = None,
    steps: Annotated[int | None, typer.Option(help="Iterations; default: the recipe's.", min=1)] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/SRC-TGT-METHOD-seedN, with -ssda and -pl.")] = None,
    data: Data = None,
    src_data: Annotated[Path | None, typer.Option(help="Root of the source, where it differs from --data.")] = None,
    tgt_data: Annotated[Path | None, typer.Option(help="Root of the target, where it differs from --data.")] = None,
    data_version: Version = None,
    src_frames: Annotated[str | None, typer.Option(help="Train on these source frames only: tokens, comma-separated.")] = None,
    tgt_frames: Annotated[str | None, typer.Option(help="Adapt to these target frames only.")] = None,
    val_frames: Annotated[str | None, typer.Option(help="Validate on these target frames.")] = None,
    ssda: SSDA = False,
    pseudo: Annotated[Path | None, typer.Option(help="Second stage: train on these pseudo-labels (from ftd pseudo).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    pretrained: Pretrained = None,
    set_: Sets = None,
    device: Device = None,
    workers: Workers = None,
    cache: Cache = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write event files too (needs the tensorboard extra).")
    ] = False,
) -> None:
    """Train on SRC, adapt to TGT. Leaves last.safetensors, best.safetensors, log.csv and run.json in the run folder."""
    from ftdpp import losses, screen
    from ftdpp import train as engine
    from ftdpp.data import DOMAINS

    console = screen.messages()
    for what, domain in (("--src", src), ("--tgt", tgt)):
        if domain not in DOMAINS:
            raise losses.unknown(f"domain {what}", domain, list(DOMAINS))
    dev, dev_why = _device(device)
    preset, preset_why = _preset(preset, dev, None in (src_data or data, tgt_data or data))
    overrides = [*(set_ or []), *([f"steps={steps}"] if steps else [])]
    if pseudo and not pseudo.is_file():
        raise _fail(f"--pseudo {pseudo}: no such file; make one with: ftd pseudo RUN --out {pseudo}", USAGE)
    r = losses.recipe(f"{src}-{tgt}" + ("-ssda" if ssda else ""), method, preset, pseudo is not None, overrides)
    if ssda and tgt_frames:
        raise losses.RecipeError("--ssda takes labelled and unlabelled frames from the official lists; drop --tgt-frames")
    weights = _imagenet(pretrained, r)
    out = out or Path("runs") / f"{src}-{tgt}-{method}{'-ssda' if ssda else ''}{'-pl' if pseudo else ''}-seed{seed}"
    if (out / "last.safetensors").exists() and not resume:
        raise _fail(f"{out} already holds a run; continue it with --resume, or choose another folder with --out", USAGE)
    if resume and not (out / "last.safetensors").exists():
        raise _fail(f"{out}: nothing to resume, there is no last.safetensors; leave --resume out to begin", USAGE)
    _writable(out, folder=True)
    folder, folder_why = _cache(cache)
    source, target = _sources(
        src, tgt, (src_data or data, tgt_data or data), data_version, (src_frames, tgt_frames), folder, console
    )
    val = engine.Source(tgt, target.root, target.version, val_frames.split(",") if val_frames else None)
    with screen.bar(console) as tell:
        run, facts = engine.assemble(r, seed, out, source, target, val, folder, pseudo, dev, workers, weights, tell)
    stage = ", second stage" if pseudo else ""
    own = [
        ("method", f"{method}, {r.scenario}{stage}", f"{r.steps} iterations of {r.batch} frames a domain"),
        _weights_fact(pretrained),
    ]
    _print_choices(console, (preset, preset_why), (dev, dev_why), (folder, folder_why), [*own, *facts])
    if resume:
        run.resume()
        console.print(f"resuming {out} at iteration {run.iteration} of {r.steps}")
    _write_run_file(run, source, target, sys.argv[1:])
    board = None
    if tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _fail("--tensorboard: not installed; pip install '.[tensorboard]'", USAGE) from None
        board = SummaryWriter(str(out / "tensorboard"))
    display = screen.Display(console, engine.work_left(run))
    with display.progress:
        screen.drive(run, method, display, board)
    if board is not None:
        board.close()
    chosen = (
        f"iteration {run.best['iteration']} by {run.best['split']} mIoU"
        if run.best
        else "the last iteration: nothing to select by"
    )
    console.print(f"done: {run.last_path}, {run.best_path} ({chosen})")


# ---- eval, pseudo, convert ------------------------------------------------------------------------------------------


def _checkpoint(run: Path, which: str) -> Path:
    from ftdpp.train import RunError

    if run.suffix == ".safetensors" or run.is_file():
        return run
    if which not in ("best", "last"):
        raise _fail(f"--checkpoint {which}: expected best or last", USAGE)
    if not run.is_dir():
        raise RunError(f"{run}: no such run folder")
    return run / f"{which}.safetensors"


def _run_source(
    run: Path, domain: str | None, data: Path | None, version: str | None, split: str | None, frames: str | None
) -> Source:
    """Where the data of `ftd eval` and `ftd pseudo` comes from: the run's target as recorded in run.json, unless said otherwise.

    Frames that the target was restricted to in training are the default for that target, as long as neither a split nor
    other frames are asked for.
    """
    from ftdpp.checkpoint import RunError
    from ftdpp.train import Source

    if domain is not None:
        _domain(domain)
    record = (run if run.is_dir() else run.parent) / "run.json"
    try:
        stored = json.loads(record.read_text()) if record.is_file() else None
    except ValueError as error:
        raise RunError(
            f"{record}: damaged ({error}); name the data with --data and --domain, and a checkpoint instead of RUN"
        ) from None
    if stored is None and (data is None or domain is None):
        raise RunError(f"{run}: no run.json beside it, so where its data lies is unknown; name it with --data and --domain")
    side = next((stored[k] for k in ("tgt", "src") if domain in (None, stored[k]["domain"])), None) if stored else None
    if side is None and data is None:
        raise RunError(f"{run}: was not trained on {domain}; name its root with --data")
    chosen = frames.split(",") if frames else None
    if side is None:
        assert data is not None and domain is not None
        return Source(domain, data.resolve(), version, chosen)
    if chosen is None and split is None:
        chosen = side["frames"]
    root = data.resolve() if data is not None else Path(side["root"])
    return Source(side["domain"], root, version or side["version"], chosen)


@app.command("eval")
@guarded
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder, or a .safetensors checkpoint.")],
    split: Annotated[str | None, typer.Option(help="val, test or train; default: test, or the run's own --tgt-frames.")] = None,
    checkpoint: Checkpoint = "best",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    domain: Annotated[str | None, typer.Option(help="Domain to evaluate on; default: the run's target.")] = None,
    data: Data = None,
    data_version: Version = None,
    frames: Annotated[str | None, typer.Option(help="Only these frames: tokens, comma-separated.")] = None,
    overlay: Annotated[Path | None, typer.Option(help="Folder for pictures of the first frames' predictions.")] = None,
    device: Device = None,
    cache: Cache = None,
) -> None:
    """Evaluate a checkpoint: point-level IoU of 2D, 3D and 2D+3D, per class."""
    from ftdpp import checkpoint as files
    from ftdpp import evaluate as protocol
    from ftdpp import screen
    from ftdpp.data import DOMAINS, splits

    console = screen.messages()
    if overlay is not None:
        _writable(overlay, folder=True)
    path = _checkpoint(run, checkpoint)
    dev, _ = _device(device)
    model, r, meta = files.load_student(path, dev)
    source = _run_source(run, domain, data, data_version, split, frames)
    split = split or "test"
    if source.frames is None and split not in splits(DOMAINS[source.domain]):
        raise _fail(f"--split {split}: {source.domain} has {', '.join(splits(DOMAINS[source.domain]))}", USAGE)
    with screen.bar(console) as tell:
        index = source.index(split, r, _cache(cache)[0], tell)
        score = protocol.evaluate(model, index, r, f"{path.name}, iteration {meta['iteration']}", dev, tell)
    if as_json:
        print(json.dumps({**score.as_dict(), "method": r.method, "scenario": r.scenario, "seed": meta.get("seed")}))
    else:
        screen.results().print(screen.score_table(score, r.method))
    if overlay is not None:
        _overlays(overlay, model, index, r, dev, console)


def _overlays(folder: Path, model: Any, index: Any, r: Recipe, dev: Any, console: Console, count: int = 4) -> None:
    import torch

    from ftdpp import data, report
    from ftdpp import evaluate as protocol

    folder.mkdir(parents=True, exist_ok=True)
    names = data.CLASS_SETS[r.classes].names
    for i in range(min(count, len(index))):
        frame = index.frame(i)
        with torch.no_grad():
            [(_, batch)] = protocol.batches_of(index, r, 1, range(i, i + 1))
            batch = batch.to(dev)
            predicted = protocol.ensemble(model(batch.image, batch.pixel, batch.coords)).argmax(1).cpu().numpy()
        label = frame.label.copy()
        label[:] = data.UNLABELLED
        label[batch.keep[0].numpy()] = predicted
        path = folder / f"{frame.token.replace('/', '_')}.png"
        report.overlay(frame, label, names, f"{r.method} 2D+3D, {frame.token}").save(path)
        if frame.has_label:
            report.overlay(frame, frame.label, names, f"labels, {frame.token}").save(path.with_stem(path.stem + "_labels"))
    console.print(f"wrote pictures to {folder}")


@app.command()
@guarded
def pseudo(
    run: Annotated[Path, typer.Argument(help="Run folder, or a .safetensors checkpoint.")],
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    checkpoint: Checkpoint = "last",
    split: Annotated[str | None, typer.Option(help="Target split; default: the one the run adapted to.")] = None,
    data: Data = None,
    data_version: Version = None,
    domain: Annotated[str | None, typer.Option(help="Domain of --data; default: the run's target.")] = None,
    frames: Annotated[str | None, typer.Option(help="Only these frames: tokens, comma-separated.")] = None,
    overlay: Annotated[Path | None, typer.Option(help="Folder for pictures of the first frames' predictions.")] = None,
    device: Device = None,
    cache: Cache = None,
) -> None:
    """Predict the target training frames and keep the confident labels, for a second stage: ftd train ... --pseudo FILE."""
    from ftdpp import checkpoint as files
    from ftdpp import evaluate as protocol
    from ftdpp import screen
    from ftdpp import train as engine

    console = screen.messages()
    _writable(out)
    if overlay is not None:
        _writable(overlay, folder=True)
    path = _checkpoint(run, checkpoint)
    dev, _ = _device(device)
    model, r, meta = files.load_student(path, dev)
    source = _run_source(run, domain, data, data_version, split, frames)
    with screen.bar(console) as tell:
        index = source.index(split or engine.needs(r)["unlabelled"] or "train", r, _cache(cache)[0], tell)
        found = protocol.write_pseudo_labels(out, model, index, r, f"{path.name}, iteration {meta['iteration']}", dev, tell)
    if overlay is not None:
        _overlays(overlay, model, index, r, dev, console)
    title = (
        f"{out}: {found['frames']} frames of {index.identity['domain']} {index.identity['split'] or 'chosen frames'}, "
        f"by {r.method}, {found['checkpoint']}"
    )
    screen.results().print(screen.pseudo_table(found, title))


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
    from ftdpp import checkpoint as files
    from ftdpp import losses, screen

    r = losses.recipe(scenario)
    _writable(out)
    files.convert_checkpoints({"2d": net_2d, "3d": net_3d, "fusion": fusion}, r, out)
    screen.messages().print(f"wrote {out}; evaluate it with: ftd eval {out} --domain {scenario.split('-')[1]} --data ROOT")


# ---- compare ----------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One run of a comparison."""

    name: str
    seed: int
    out: Path
    pseudo: Path | None  # labels that the first stage writes for the second
    recipe: Recipe


def _jobs(scenario: str, methods: str, seeds: str, preset: str, overrides: list[str], out: Path) -> list[Job]:
    from ftdpp import losses

    try:
        numbers = [int(s) for s in seeds.split(",")]
        if min(numbers) < 0:
            raise ValueError
    except ValueError:
        raise losses.RecipeError(f"--seeds {seeds}: expected numbers from 0 on, as in 0,1,2") from None
    jobs = []
    for seed in numbers:
        for method in methods.split(","):
            plain, _, stage = method.partition("+")
            if stage not in ("", "pl"):
                raise losses.RecipeError(f"--methods {method}: expected NAME or NAME+pl")
            first = losses.recipe(scenario, plain, preset, False, overrides)
            jobs.append(Job(plain, seed, out / f"{scenario}-{plain}-seed{seed}", None, first))
            if stage:
                second = losses.recipe(scenario, plain, preset, True, overrides)
                jobs.append(
                    Job(method, seed, out / f"{scenario}-{method}-seed{seed}", jobs[-1].out / "pseudo.safetensors", second)
                )
    return list(dict.fromkeys(jobs))


@app.command()
@guarded
def compare(
    src: Annotated[str, typer.Option(help="Source domain.")] = "usa",
    tgt: Annotated[str, typer.Option(help="Target domain.")] = "singapore",
    methods: Annotated[str, typer.Option(help="Comma-separated; NAME+pl adds the second stage.")] = "source-only,ftdpp",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0",
    preset: Preset = None,
    data: Data = None,
    data_version: Version = None,
    set_: Sets = None,
    ssda: SSDA = False,
    pretrained: Pretrained = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs; finished ones are not trained again.")] = Path("runs"),
    device: Device = None,
    cache: Cache = None,
) -> None:
    """Train several methods with several seeds, select on val, and compare them on test in one table (also OUT/compare.json)."""
    from ftdpp import checkpoint as files
    from ftdpp import evaluate as protocol
    from ftdpp import screen
    from ftdpp import train as engine
    from ftdpp.data import require_labels

    console = screen.messages()
    dev, dev_why = _device(device)
    preset, preset_why = _preset(preset, dev, data is None)
    folder, folder_why = _cache(cache)
    jobs = _jobs(f"{src}-{tgt}" + ("-ssda" if ssda else ""), methods, seeds, preset, set_ or [], out)
    _writable(out, folder=True)
    weights = _imagenet(pretrained, jobs[0].recipe)
    source, target = _sources(src, tgt, (data, data), data_version, (None, None), folder, console)
    val = engine.Source(tgt, target.root, target.version)

    def open_run(job: Job, pseudo: Path | None) -> tuple[Run, list[tuple[str, str, str]]]:
        run, facts = engine.assemble(job.recipe, job.seed, job.out, source, target, val, folder, pseudo, dev, None, weights)
        if run.last_path.exists():
            run.resume()
        return run, facts

    def labels_of(job: Job) -> Path | None:
        """The pseudo-labels of a second stage, written by its first stage's last checkpoint when they are not there yet."""
        if job.pseudo is not None and not job.pseudo.exists():
            first = next(j for j in jobs if j.seed == job.seed and f"{j.name}+pl" == job.name)
            model, r, meta = files.load_student(first.out / "last.safetensors", dev)
            index = target.index(engine.needs(r)["unlabelled"], r, folder)
            protocol.write_pseudo_labels(job.pseudo, model, index, r, f"last.safetensors, iteration {meta['iteration']}", dev)
        return job.pseudo

    # What is left to do is known before the first step, so that one ETA covers all runs.
    with screen.bar(console) as tell:
        test = target.index("test", jobs[0].recipe, folder, tell)
        require_labels(test)
        for index_of in dict.fromkeys(engine.needs(job.recipe)["labelled"][0] for job in jobs):
            (source if index_of[0] == "src" else target).index(index_of[1], jobs[0].recipe, folder, tell)
        val.index("val", jobs[0].recipe, folder, tell)
    work = 0.0
    facts: list[tuple[str, str, str]] = []
    for job in jobs:
        ready = job.pseudo is None or job.pseudo.exists()
        run, found = open_run(job, job.pseudo if ready else None)
        work += engine.work_left(run)
        facts = max(facts, found, key=len)
    many = ("runs", str(len(jobs)), f"{methods}; seeds {seeds}")
    _print_choices(console, (preset, preset_why), (dev, dev_why), (folder, folder_why), [many, _weights_fact(pretrained), *facts])
    display = screen.Display(console, work)
    rows: list[dict[str, Any]] = []
    with display.progress:
        for job in jobs:
            run, _ = open_run(job, labels_of(job))
            if run.iteration < run.recipe.steps or run.owed:
                _write_run_file(run, source, target, sys.argv[1:])
                screen.drive(run, f"{job.name} seed {job.seed}", display)
            model, r, meta = files.load_student(run.best_path, dev)
            name = f"best.safetensors, iteration {meta['iteration']}"
            rows.append(
                {
                    "method": job.name,
                    "seed": job.seed,
                    **protocol.evaluate(model, target.index("test", r, folder), r, name, dev).as_dict(),
                }
            )
    title = (
        f"{src} -> {tgt}, {preset} preset: mIoU in percent on the {tgt} test split ({rows[0]['frames']} frames), "
        f"checkpoint chosen on val, seeds {seeds}"
    )
    screen.results().print(screen.compare_table(rows, title))
    (out / "compare.json").write_text(json.dumps(rows, indent=1))


# ---- recipes, data ----------------------------------------------------------------------------------------------------


@app.command()
@guarded
def recipes(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: scenario -> method -> recipe.")] = False,
    preset: Annotated[str, typer.Option(help="paper or small.")] = "paper",
    second: Annotated[bool, typer.Option("--pseudo", help="The second stage, on pseudo-labels.")] = False,
) -> None:
    """Show every scenario and method, with the numbers in which they differ."""
    import dataclasses

    from ftdpp import losses, screen

    made: dict[str, dict[str, Any]] = {}
    for scenario in losses.SCENARIOS:
        made[scenario] = {}
        for method in losses.METHODS:
            if not (scenario.endswith("-ssda") and method in losses.NOT_SEMI_SUPERVISED):
                made[scenario][method] = dataclasses.asdict(losses.recipe(scenario, method, preset, second))
    if as_json:
        print(json.dumps(made))
        return
    shown = (
        "lr_2d", "lr", "ce_3d", "mimic_src", "mimic_tgt", "distill_single", "distill_fused", "teacher_image", "student_mix",
        "pseudo_debias", "steps", "milestones", "gamma", "batch",
    )  # fmt: skip
    rows = []
    for scenario, methods in made.items():
        for method, r in methods.items():
            cells = {k: ",".join(map(str, r[k])) if isinstance(r[k], tuple) else str(r[k]) for k in shown}
            rows.append({"scenario": scenario, "method": method, **cells})
    hint = f"{preset} preset; every number: ftd recipes --json; override one: ftd train ... --set NAME=VALUE"
    screen.results().print(screen.plain_table(rows, hint))


Domain = Annotated[str, typer.Option(help="usa, singapore, day, night or skitti.")]


def _domain(name: str) -> Any:
    from ftdpp import losses
    from ftdpp.data import DOMAINS

    if name not in DOMAINS:
        raise losses.unknown("domain", name, list(DOMAINS))
    return DOMAINS[name]


@data_app.command("check")
@guarded
def data_check(
    root: Annotated[Path, typer.Argument(help="Root of the data set.")], domain: Domain, data_version: Version = None
) -> None:
    """Count what is there and what is missing, split by split, without opening a frame."""
    from ftdpp import data, screen

    rows = data.check(root, _domain(domain), data_version)
    screen.results().print(screen.plain_table(rows, f"{root} as {domain}"))
    if not any(row["frames"] for row in rows):
        raise _fail(f"{root}: no frame of any split of {domain}", DATA)


@data_app.command("prepare")
@guarded
def data_prepare(
    root: Annotated[Path, typer.Argument(help="Root of the data set.")],
    domain: Domain,
    split: Annotated[str | None, typer.Option(help="Default: every split of the domain.")] = None,
    classes: Annotated[str, typer.Option(help="street6, vkitti6 or a2d2_10.")] = "street6",
    size: Annotated[
        str | None, typer.Option(help="Image size H,W; default: 225,400 for nuScenes, as they are for KITTI.")
    ] = None,
    frames: Annotated[str | None, typer.Option(help="Only these frames: tokens, comma-separated.")] = None,
    data_version: Version = None,
    cache: Cache = None,
) -> None:
    """Project, map labels, resize, and write the memory-mapped index. Training does this by itself when it is missing."""
    from ftdpp import data, screen

    row, folder, console = _domain(domain), _cache(cache)[0], screen.messages()
    shape: tuple[int, int] | None = (225, 400) if row.dataset == "nuscenes" else None
    if size:
        try:
            height, width = (int(x) for x in size.split(","))
        except ValueError:
            raise _fail(f"--size {size}: expected H,W as in 225,400", USAGE) from None
        if height < 1 or width < 1:
            raise _fail(f"--size {size}: expected H,W of at least 1,1", USAGE)
        shape = height, width
    names: list[str | None] = [split]
    if frames:
        names = [None]
    elif split is None:  # all there is; the semi-supervised halves are part of train
        rows = data.check(root, row, data_version)
        names = [r["split"] for r in rows if r["frames"] and not r["split"].startswith("train_")]
        console.print(f"splits with frames here: {', '.join(map(str, names)) or 'none'}; the others: ftd data check")
    for name in names:
        with screen.bar(console) as tell:
            index = data.prepare(
                root, row, name, classes, shape, folder, data_version, frames.split(",") if frames else None, tell
            )
        f = index.fingerprint
        counts = ", ".join(f"{n} {c:,}" for n, c in zip(data.CLASS_SETS[classes].names, f["points_per_class"], strict=True))
        console.print(
            f"{domain} {name or 'chosen frames'}: {f['frames']} frames ({f['unlabelled_frames']} unlabelled, "
            f"{f['empty_frames']} empty), "
            f"{f['points']:,} points in the image: {counts}, ignored {f['ignored']:,}\n  {index.path}",
            soft_wrap=True,
        )


@data_app.command("synth")
@guarded
def data_synth(
    out: Annotated[Path, typer.Argument(help="Folder to write, in the nuScenes layout.")],
    src: Annotated[str, typer.Option(help="usa or day.")] = "usa",
    tgt: Annotated[str, typer.Option(help="singapore or night.")] = "singapore",
    frames: Annotated[str | None, typer.Option(help="source,target,val,test frame counts.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Write the built-in street world to a folder of your own."""
    from ftdpp import screen, synth

    counts = None
    if frames:
        try:
            counts = dict(zip(synth.DEFAULT_FRAMES, (int(x) for x in frames.split(",")), strict=True))
        except ValueError:
            raise _fail(f"--frames {frames}: expected four numbers, {','.join(synth.DEFAULT_FRAMES)}", USAGE) from None
    console = screen.messages()
    if (src, tgt) not in BUILT_IN:
        pairs = ", ".join(f"--src {a} --tgt {b}" for a, b in BUILT_IN)
        raise _fail(f"no scenario for {src} -> {tgt}; there is {pairs}", USAGE)
    if out.exists():
        raise _fail(f"{out} exists; choose a new folder", USAGE)
    _writable(out)
    try:
        with screen.bar(console) as tell:
            synth.write_world(out, src, tgt, counts, seed, workers, lambda done, total: tell(done, total, "ray casting"))
    except ValueError as error:
        raise _fail(error, USAGE) from None
    console.print(f"wrote {out}; use it with: ftd train --src {src} --tgt {tgt} --data {out}")


@app.command()
@guarded
def bench(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are shown.", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="CSV to append the rows to.")] = None,
    scan: Annotated[
        list[Path] | None, typer.Option(help="A SemanticKITTI scan (.bin) to time too; repeatable.", exists=True, dir_okay=False)
    ] = None,
    device: Device = None,
    cache: Cache = None,
) -> None:
    """Time maps, sparse U-Net, data loading and the training step on this machine, beside what it can do at best."""
    from ftdpp import bench as benchmark
    from ftdpp import screen
    from ftdpp.kernels import check

    if out is not None:
        _writable(out)
        benchmark.check_columns(out)
    folder = _cache(cache)[0]
    dev, _ = _device(device)
    wrong = [c for c in check.run(dev) if not c.ok]
    if wrong:
        raise _fail(f"{wrong[0].what} ({wrong[0].dtype}) is wrong on this machine, so its time means nothing: ftd doctor", FAILED)
    root = _world("usa", "singapore", folder, screen.messages())
    rows = benchmark.run(root, folder, rounds, dev, scans=scan or [])
    screen.results().print(screen.plain_table(rows, benchmark.machine(dev)))
    if out is not None:
        benchmark.append(out, rows, dev)


@app.command()
@guarded
def doctor(device: Device = None) -> None:
    """Versions, device, and every sparse operation checked on this machine: paste it into a bug report."""
    import importlib.metadata
    import platform

    from ftdpp import bench as benchmark
    from ftdpp import kernels, screen
    from ftdpp.kernels import check

    dev, dev_why = _device(device)
    rows = [("machine", benchmark.machine(dev), f"{platform.system()} {platform.release()}")]
    for package in ("ftdpp", "torch", "triton", "torch_scatter", "numpy", "safetensors"):
        try:
            rows.append((package, importlib.metadata.version(package), ""))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed", ""))
    rows += [("device", str(dev), dev_why), ("kernels", *kernels.backend(dev))]
    console = screen.results()
    screen.facts(console, [("python", platform.python_version(), sys.executable), *rows])
    checks = check.run(dev)
    table = [
        {"operation": c.what, "dtype": c.dtype, "deviation": f"{c.deviation:.1e}", "allowed": f"{check.ALLOWED[c.dtype]:.0e}",
         "repeats": "yes" if c.repeats else "NO", "result": "ok" if c.ok else "WRONG"}
        for c in checks
    ]  # fmt: skip
    console.print(screen.plain_table(table, "largest deviation from dense float64, as a share of the largest value"))
    if not all(c.ok for c in checks):
        raise _fail("a sparse operation is wrong on this machine; FTD_KERNELS=torch avoids Triton; please report this", FAILED)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
