"""The command line: parse, call, print. Heavy imports happen inside the commands, so that `--help` is immediate."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ftdpp.losses import Recipe
    from ftdpp.train import Run, Score, Source

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

# Options that several commands share.
Src = Annotated[
    str, typer.Option(help="Labelled source domain: usa, day, skitti (vkitti and a2d2 have recipes, their readers follow).")
]
Tgt = Annotated[str, typer.Option(help="Unlabelled target domain: singapore, night, skitti.")]
Data = Annotated[Path | None, typer.Option("--data", help="Root of the data set. Without it: the built-in street world.")]
Version = Annotated[str | None, typer.Option("--data-version", help="nuScenes version folder, e.g. v1.0-mini.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of prepared data; default $FTD_CACHE or ~/.cache/ftd.")]
Preset = Annotated[str | None, typer.Option(help="paper or small; default: paper on a GPU, small on a CPU.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Override a number of the recipe; repeatable.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")]
Workers = Annotated[int | None, typer.Option(help="Data loading processes; default: 0 on up to four cores.", min=0)]
Checkpoint = Annotated[str, typer.Option(help="best (by validation mIoU) or last.")]


def _console() -> Console:
    """For messages: standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _output() -> Console:
    """For results: standard output, wide enough for a table where it is not a terminal."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _fail(message: object, code: int) -> typer.Exit:
    _console().print(f"ftd: {message}", markup=False, style="bold red", soft_wrap=True)
    return typer.Exit(code)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the package's exceptions into a message and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        import torch

        from ftdpp.data import DataError
        from ftdpp.losses import RecipeError
        from ftdpp.train import Interrupted, NonFiniteLoss, RunError

        try:
            command(*args, **kwargs)
        except RecipeError as error:
            raise _fail(error, USAGE) from None
        except RunError as error:
            raise _fail(error, FAILED) from None
        except DataError as error:
            raise _fail(error, DATA) from None
        except NonFiniteLoss as error:
            raise _fail(error, NON_FINITE) from None
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise _fail(f"out of memory ({error}); use --preset small or a smaller --set batch=...", OUT_OF_MEMORY) from None
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

    if name is None:
        found = torch.cuda.is_available()
        return torch.device("cuda" if found else "cpu"), "a GPU is present" if found else "no GPU is present"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise _fail(f"--device {name}: {str(error).splitlines()[0]}; use cpu", USAGE) from None
    return device, "--device"


def _preset(name: str | None, device: Any) -> tuple[str, str]:
    if name:
        return name, "--preset"
    return ("paper", "a GPU is present") if device.type == "cuda" else ("small", "two CPU cores train it in minutes")


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar fed by `progress(done, total, what)`, one line per kind of work."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as bar:
        tasks: dict[str, Any] = {}

        def tell(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield tell


BUILT_IN = (("usa", "singapore"), ("day", "night"))


def _world(src: str, tgt: str, cache: Path, console: Console) -> Path:
    """The root of the built-in street world for a pair of domains, written on first use."""
    from ftdpp import synth

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
    if not root.is_dir():
        with _bar(console) as tell:
            synth.write_world(root, src, tgt, progress=lambda done, total: tell(done, total, "building the street world"))
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

    world = _world(src, tgt, cache, console) if None in roots else None
    made = []
    for domain, root, chosen in zip((src, tgt), roots, frames, strict=True):
        root = root or world
        assert root is not None
        made.append(Source(domain, root.resolve(), version if root is not world else None, chosen.split(",") if chosen else None))
    return made[0], made[1]


def _facts(console: Console, rows: list[tuple[str, str, str]]) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    console.print(table)


# ---- train -----------------------------------------------------------------------------------------------------------


def _git_hash() -> str | None:
    import subprocess

    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _make_run(
    r: Recipe,
    seed: int,
    out: Path,
    src: Source,
    tgt: Source,
    val: Source,
    pseudo: Path | None,
    device: Any,
    workers: int | None,
    cache: Path,
    pretrained: str | None,
    console: Console,
) -> tuple[Run, list[tuple[str, str, str]]]:
    """Prepare the splits that a recipe needs. Returns the run and what was decided on the way."""
    from ftdpp import train
    from ftdpp.data import DOMAINS, splits

    needs = train.needs(r)
    sides = {"src": src, "tgt": tgt}
    with _bar(console) as tell:
        labelled = [sides[side].index(split, r, cache, tell) for side, split in needs["labelled"]]
        unlabelled = tgt.index(needs["unlabelled"], r, cache, tell) if needs["unlabelled"] else None
        reason = "periodic validation and the choice of the best checkpoint"
        index = None
        if tgt.frames and not val.frames:
            reason = "none: the target frames were named one by one; name others with --val-frames"
        elif not val.frames and "val" not in splits(DOMAINS[tgt.domain]):
            reason = f"none: {tgt.domain} has no validation split"
        else:
            index = val.index("val", r, cache, tell)
            if not len(index) or index.fingerprint["unlabelled_frames"]:
                index, reason = (None, "none: there is no frame, or a frame without labels, in the target's val split here")
    labels = train.PseudoLabels(pseudo, r, unlabelled) if pseudo and unlabelled is not None else None
    cores = os.cpu_count() or 1
    count = (0 if cores <= 4 else min(8, cores // 2)) if workers is None else workers
    run = train.Run(out, r, seed, labelled, unlabelled, index, labels, device, count, pretrained)
    facts = [
        (
            side,
            f"{len(i)} frames, {i.fingerprint['points']:,} points",
            f"{i.identity['domain']} {i.identity['split'] or 'chosen frames'}: {why}",
        )
        for side, i, why in [
            *(("labelled", i, "supervised loss") for i in labelled),
            *([("unlabelled", unlabelled, "adaptation, labels never read")] if unlabelled is not None else []),
        ]
    ]
    facts.append(("validation", f"{len(index)} frames" if index is not None else "off", reason))
    facts.append(("workers", str(count), f"{cores} cores" if workers is None else "--workers"))
    weights = " ".join(f"{w:.2f}" for w in run.recipe.class_weights)
    facts.append(
        ("class weights", weights, "from the paper" if r.class_weights else "log-smoothed counts of the labelled points")
    )
    return run, facts


class _Drawing:
    """The live display of a training: bar, ETA, data-wait share, memory, loss terms. `units` lets several runs share one ETA."""

    def __init__(self, console: Console, total_units: float) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), console=console
        )
        self.task = self.progress.add_task("starting", total=total_units, note="")
        self.begin: float | None = None
        self.skipped = self.done = 0.0
        self.waited = self.worked = 0.0
        self.total = total_units

    def step(self, name: str, step: Any, units: float, memory: int) -> None:
        now = time.perf_counter()
        if self.begin is None:
            self.begin = now - step.seconds
        self.done += units
        self.waited += step.seconds * step.waited
        self.worked += step.seconds
        eta = (now - self.begin) / self.done * max(self.total - self.skipped - self.done, 0)
        terms = " ".join(f"{k} {v:.2f}" for k, v in step.terms.items())
        note = (
            f"{step.iteration} | ETA {int(eta // 60)}:{int(eta % 60):02d} | {step.seconds * 1e3:.0f} ms | "
            f"data wait {self.waited / max(self.worked, 1e-9):.0%} | {memory / 2**30:.1f} GiB\n{terms}"
        )
        self.progress.update(self.task, description=name, completed=self.skipped + self.done, note=note)

    def evaluated(self, units: float) -> None:
        self.done += units


def _cost(r: Recipe) -> float:
    """Work of one iteration, in forward passes of a frame: 3 for a forward and backward on each domain, 1 for the teacher's
    forward; the fusion module takes as long as four fifths of the rest."""
    from ftdpp.losses import uses_teacher

    passes = 3.0 + (3.0 if r.mimic_tgt or r.pseudo else 0.0) + (1.0 if uses_teacher(r) else 0.0)
    return r.batch * passes * (1.8 if r.fusion else 1.0)


def _units(run: Run) -> float:
    left = run.recipe.steps - run.iteration
    return left * _cost(run.recipe) + _validations(run) * (len(run.val) if run.val is not None else 0)


def _validations(run: Run) -> int:
    return (
        len(
            {*range(run.recipe.val_every, run.recipe.steps + 1, run.recipe.val_every), run.recipe.steps}
            - set(range(run.iteration + 1))
        )
        if run.val is not None
        else 0
    )


def _fit(run: Run, name: str, drawing: _Drawing, board: Any = None) -> None:
    """Drive the loop: draw it, and turn Ctrl-C and SIGTERM into "save, then leave"."""
    from ftdpp import train

    def stop(signum: int, frame: Any) -> None:
        if run.stop:  # a second signal: leave now, the last save stands
            raise KeyboardInterrupt
        run.stop = True

    old = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    cost = _cost(run.recipe)
    try:
        for event in train.fit(run):
            if isinstance(event, train.Step):
                drawing.step(name, event, cost, train.peak_memory(run.device))
                if board is not None:
                    for key, value in event.terms.items():
                        board.add_scalar(f"loss/{key}", value, event.iteration)
            else:
                drawing.evaluated(len(run.val) if run.val is not None else 0)
                best = run.best or {}
                drawing.progress.console.print(
                    f"  {name}: {event.checkpoint}, {event.domain} {event.split} ({event.frames} frames): mIoU "
                    + ", ".join(f"{h} {v:.1%}" for h, v in event.miou.items())
                    + (" (best so far)" if best.get("iteration") == run.iteration else "")
                )
                if board is not None:
                    for head, value in event.miou.items():
                        board.add_scalar(f"val/{head}", value, run.iteration)
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


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
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/SRC-TGT-METHOD-SEED.")] = None,
    data: Data = None,
    src_data: Annotated[Path | None, typer.Option(help="Root of the source, where it differs from --data.")] = None,
    tgt_data: Annotated[Path | None, typer.Option(help="Root of the target, where it differs from --data.")] = None,
    data_version: Version = None,
    src_frames: Annotated[str | None, typer.Option(help="Train on these source frames only: tokens, comma-separated.")] = None,
    tgt_frames: Annotated[str | None, typer.Option(help="Adapt to these target frames only.")] = None,
    val_frames: Annotated[str | None, typer.Option(help="Validate on these target frames.")] = None,
    ssda: Annotated[bool, typer.Option("--ssda", help="Semi-supervised: some target scenes are labelled.")] = False,
    pseudo: Annotated[Path | None, typer.Option(help="Second stage: train on these pseudo-labels (from ftd pseudo).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    pretrained: Annotated[str | None, typer.Option(help="ImageNet weights of ResNet-34: a .pth file, or download.")] = None,
    set_: Sets = None,
    device: Device = None,
    workers: Workers = None,
    cache: Cache = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write event files too (needs the tensorboard extra).")
    ] = False,
) -> None:
    """Train on SRC, adapt to TGT. Leaves last.safetensors, best.safetensors, log.csv and run.json in the run folder."""
    from ftdpp import kernels, losses
    from ftdpp import train as engine
    from ftdpp.data import DOMAINS

    console = _console()
    for what, domain in (("--src", src), ("--tgt", tgt)):
        if domain not in DOMAINS:
            raise losses.unknown(f"domain {what}", domain, list(DOMAINS))
    dev, dev_why = _device(device)
    preset, preset_why = _preset(preset, dev)
    overrides = [*(set_ or []), *([f"steps={steps}"] if steps else [])]
    if pseudo and not pseudo.is_file():
        raise _fail(f"--pseudo {pseudo}: no such file; make one with: ftd pseudo RUN --out {pseudo}", USAGE)
    r = losses.recipe(f"{src}-{tgt}" + ("-ssda" if ssda else ""), method, preset, pseudo is not None, overrides)
    if pseudo and not losses.uses_target(r):
        raise losses.RecipeError(f"--pseudo: {method} does not train on the target")
    out = out or Path("runs") / f"{src}-{tgt}-{method}{'-ssda' if ssda else ''}{'-pl' if pseudo else ''}-seed{seed}"
    if (out / "last.safetensors").exists() and not resume:
        raise _fail(f"{out} already holds a run; continue it with --resume, or choose another folder with --out", USAGE)
    if resume and not (out / "last.safetensors").exists():
        raise _fail(f"{out}: nothing to resume, there is no last.safetensors; leave --resume out to begin", USAGE)
    folder, folder_why = _cache(cache)
    source, target = _sources(
        src, tgt, (src_data or data, tgt_data or data), data_version, (src_frames, tgt_frames), folder, console
    )
    val = engine.Source(tgt, target.root, target.version, val_frames.split(",") if val_frames else None)
    run, facts = _make_run(r, seed, out, source, target, val, pseudo, dev, workers, folder, pretrained, console)
    name, why = kernels.backend()
    _facts(
        console,
        [
            (
                "method",
                f"{method}, {r.scenario}{', second stage' if pseudo else ''}",
                f"{r.steps} iterations of {r.batch} frames a domain",
            ),
            ("preset", preset, preset_why),
            ("device", str(dev), dev_why),
            ("kernels", name, why),
            ("dtype", "float32", "the only one so far"),
            ("cache", str(folder), folder_why),
            (
                "ImageNet weights",
                pretrained or "none",
                "--pretrained" if pretrained else "none given; the paper starts from them",
            ),
            *facts,
        ],
    )
    if resume:
        run.resume()
        console.print(f"resuming {out} at iteration {run.iteration} of {r.steps}")
    _write_run_file(run, source, target, sys.argv[1:])
    board = None
    if tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _fail("--tensorboard: not installed; pip install 'ftdpp[tensorboard]'", USAGE) from None
        board = SummaryWriter(str(out / "tensorboard"))
    drawing = _Drawing(console, _units(run))
    with drawing.progress:
        _fit(run, method, drawing, board)
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

    if run.suffix == ".safetensors":
        return run
    if which not in ("best", "last"):
        raise _fail(f"--checkpoint {which}: expected best or last", USAGE)
    if not run.is_dir():
        raise RunError(f"{run}: no such run folder")
    return run / f"{which}.safetensors"


def _run_source(run: Path, side: str, domain: str | None, data: Path | None, version: str | None, frames: str | None) -> Source:
    """Where a finished run's data comes from: as recorded in run.json, unless said otherwise."""
    from ftdpp.train import RunError, Source

    record = (run if run.is_dir() else run.parent) / "run.json"
    stored = json.loads(record.read_text())[side] if record.is_file() else None
    chosen = frames.split(",") if frames else None
    if data is not None:
        if domain is None and stored is None:
            raise RunError(f"{run}: no run.json beside it; say which domain --data holds with --domain")
        return Source(domain or (stored or {})["domain"], data.resolve(), version, chosen)
    if stored is None:
        raise RunError(f"{run}: no run.json beside it, so where its data lies is unknown; name it with --data and --domain")
    if domain is not None and domain != stored["domain"]:
        stored = json.loads(record.read_text())["src" if side == "tgt" else "tgt"]
        if stored is None or domain != stored["domain"]:
            raise RunError(f"{run}: was not trained on {domain}; name its root with --data")
    return Source(stored["domain"], Path(stored["root"]), version or stored["version"], chosen)


def _score_table(scores: list[Score], title: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("class")
    for head in ("2d", "3d", "2d+3d"):
        table.add_column(head.upper(), justify="right")
    score = scores[0]
    for name in score.iou["2d"]:
        absent = " (no labelled point: counts as 0)" if name in score.absent else ""
        values = [score.iou[h][name] for h in score.iou]
        table.add_row(name + absent, *("-" if v is None else f"{100 * v:.1f}" for v in values))
    table.add_section()
    table.add_row("mIoU", *(f"{100 * v:.1f}" for v in score.miou.values()))
    return table


@app.command("eval")
@guarded
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder, or a .safetensors checkpoint.")],
    split: Annotated[str, typer.Option(help="val, test or train.")] = "test",
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
    from ftdpp import train as engine
    from ftdpp.data import DOMAINS, splits

    console = _console()
    path = _checkpoint(run, checkpoint)
    dev, _ = _device(device)
    model, r, meta = engine.load_student(path, dev)
    source = _run_source(run, "tgt", domain, data, data_version, frames)
    if frames is None and split not in splits(DOMAINS[source.domain]):
        raise _fail(f"--split {split}: {source.domain} has {', '.join(splits(DOMAINS[source.domain]))}", USAGE)
    with _bar(console) as tell:
        index = source.index(split, r, _cache(cache)[0], tell)
        score = engine.evaluate(model, index, r, f"{path.name}, iteration {meta['iteration']}", dev, tell)
    if overlay is not None:
        _overlays(overlay, model, index, r, dev, console)
    if as_json:
        print(json.dumps({**score.as_dict(), "method": r.method, "scenario": r.scenario, "seed": meta.get("seed")}))
        return
    _output().print(
        _score_table(
            [score],
            f"{r.method}, {score.checkpoint}, on {score.domain} {score.split}: {score.frames} frames, "
            f"{score.points:,} labelled points; IoU in percent",
        )
    )


def _overlays(folder: Path, model: Any, index: Any, r: Recipe, dev: Any, console: Console, count: int = 4) -> None:
    import torch

    from ftdpp import data, report
    from ftdpp import train as engine

    folder.mkdir(parents=True, exist_ok=True)
    names = data.CLASS_SETS[r.classes].names
    for i in range(min(count, len(index))):
        frame = index.frame(i)
        with torch.no_grad():
            [(_, batch)] = engine.batches_of(index, r, 1, range(i, i + 1))
            batch = batch.to(dev)
            predicted = engine.ensemble(model(batch.image, batch.pixel, batch.coords)).argmax(1).cpu().numpy()
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
    from rich.table import Table

    from ftdpp import train as engine

    console = _console()
    path = _checkpoint(run, checkpoint)
    dev, _ = _device(device)
    model, r, meta = engine.load_student(path, dev)
    source = _run_source(run, "tgt", domain, data, data_version, frames)
    if frames is None and data is None:
        record = (run if run.is_dir() else run.parent) / "run.json"
        source.frames = json.loads(record.read_text())["tgt"]["frames"]
    with _bar(console) as tell:
        index = source.index(split or engine.needs(r)["unlabelled"] or "train", r, _cache(cache)[0], tell)
        found = engine.write_pseudo_labels(out, model, index, r, f"{path.name}, iteration {meta['iteration']}", dev, tell)
    if overlay is not None:
        _overlays(overlay, model, index, r, dev, console)
    table = Table(
        title=f"{out}: {found['frames']} frames of {index.identity['domain']} {index.identity['split'] or 'chosen frames'}, "
        f"by {r.method}, {found['checkpoint']}",
        title_justify="left",
    )
    for column in ("class", "2D threshold", "2D kept", "of", "3D threshold", "3D kept", "of"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for c, name in enumerate(found["class_names"]):
        table.add_row(
            name,
            *(
                x
                for m in ("2d", "3d")
                for x in (f"{found[f'thresholds_{m}'][c]:.3f}", f"{found[f'kept_{m}'][c]:,}", f"{found[f'predicted_{m}'][c]:,}")
            ),
        )
    console.print(table)


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
    from ftdpp import losses
    from ftdpp import train as engine

    r = losses.recipe(scenario)
    engine.convert_checkpoints({"2d": net_2d, "3d": net_3d, "fusion": fusion}, r, out)
    _console().print(f"wrote {out}; evaluate it with: ftd eval {out} --domain {scenario.split('-')[1]} --data ROOT")


# ---- compare ----------------------------------------------------------------------------------------------------------


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
    out: Annotated[Path, typer.Option(help="Folder of the runs; finished ones are not trained again.")] = Path("runs"),
    device: Device = None,
    cache: Cache = None,
) -> None:
    """Train several methods with several seeds, select on val, and compare them on test in one table (also OUT/compare.json)."""
    from ftdpp import losses
    from ftdpp import train as engine

    console = _console()
    dev, _ = _device(device)
    preset, _ = _preset(preset, dev)
    folder, _ = _cache(cache)
    source, target = _sources(src, tgt, (data, data), data_version, (None, None), folder, console)
    jobs: list[tuple[str, int, Path, Path | None, Recipe]] = []
    for seed in [int(s) for s in seeds.split(",")]:
        for method in methods.split(","):
            plain, _, stage = method.partition("+")
            if stage not in ("", "pl"):
                raise losses.RecipeError(f"--methods {method}: expected NAME or NAME+pl")
            for second in [False, True] if stage else [False]:
                name = plain + ("+pl" if second else "")
                labels = out / f"{src}-{tgt}-{plain}-seed{seed}.pseudo.safetensors" if second else None
                job = (
                    name,
                    seed,
                    out / f"{src}-{tgt}-{name}-seed{seed}",
                    labels,
                    losses.recipe(f"{src}-{tgt}", plain, preset, second, set_ or []),
                )
                if job not in jobs:
                    jobs.append(job)

    def make(job: tuple[str, int, Path, Path | None, Recipe]) -> Run:
        _, seed, path, labels, r = job
        run, _ = _make_run(
            r,
            seed,
            path,
            source,
            target,
            engine.Source(tgt, target.root, target.version),
            labels,
            dev,
            None,
            folder,
            None,
            console,
        )
        if run.last_path.exists():
            run.resume()
        return run

    # What is left to do is known before the first step, so one ETA covers all runs.
    sizes = []
    for job in jobs:
        first = make((*job[:3], None, job[4]) if job[3] is not None and not job[3].exists() else job)
        sizes.append(_units(first))
        frames = len(first.labelled[0]), len(first.val) if first.val is not None else 0
    console.print(f"{len(jobs)} runs of the {preset} preset, {frames[0]} labelled and {frames[1]} validation frames, on {dev}")
    drawing = _Drawing(console, sum(sizes))
    rows: list[dict[str, Any]] = []
    with drawing.progress:
        for job in jobs:
            name, seed, path, labels, r = job
            if labels is not None and not labels.exists():
                stage1 = path.with_name(path.name.replace("+pl", ""))
                model, r1, meta = engine.load_student(stage1 / "last.safetensors", dev)
                index = target.index("train", r1, folder)
                engine.write_pseudo_labels(labels, model, index, r1, f"last.safetensors, iteration {meta['iteration']}", dev)
            run = make(job)
            if run.iteration < r.steps:
                _write_run_file(run, source, target, sys.argv[1:])
                _fit(run, f"{name} seed {seed}", drawing)
            model, r, meta = engine.load_student(run.best_path, dev)
            score = engine.evaluate(
                model, target.index("test", r, folder), r, f"best.safetensors, iteration {meta['iteration']}", dev
            )
            rows.append({"method": name, **score.as_dict(), "seed": seed})
    (out / "compare.json").write_text(json.dumps(rows, indent=1))
    _compare_table(
        rows,
        f"{src} -> {tgt}, {preset} preset: mIoU in percent on the {target.domain} test split ({rows[0]['frames']} frames), "
        f"checkpoint chosen on val, seeds {seeds}",
    )


def _compare_table(rows: list[dict[str, Any]], title: str) -> None:
    import statistics

    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for head in ("2d", "3d", "2d+3d"):
        table.add_column(head.upper(), justify="right")
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for head in ("2d", "3d", "2d+3d"):
            values = [100 * row["miou"][head] for row in rows if row["method"] == method]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        table.add_row(method, *cells)
    _output().print(table)


# ---- recipes, data ----------------------------------------------------------------------------------------------------


@app.command()
@guarded
def recipes(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: scenario -> method -> recipe.")] = False,
    preset: Annotated[str, typer.Option(help="paper or small.")] = "paper",
) -> None:
    """Show every scenario and method, with the numbers in which they differ."""
    import dataclasses

    from rich.table import Table

    from ftdpp import losses

    made: dict[str, dict[str, Any]] = {}
    for scenario in losses.SCENARIOS:
        made[scenario] = {}
        for method in losses.METHODS:
            if not (scenario.endswith("-ssda") and method in losses.NOT_SEMI_SUPERVISED):
                made[scenario][method] = dataclasses.asdict(losses.recipe(scenario, method, preset))
    if as_json:
        print(json.dumps(made))
        return
    shown = (
        "lr_2d",
        "lr",
        "ce_3d",
        "mimic_src",
        "mimic_tgt",
        "distill_single",
        "distill_fused",
        "teacher_image",
        "student_mix",
        "pseudo_debias",
        "steps",
        "milestones",
        "gamma",
        "batch",
    )
    table = Table(
        title=f"{preset} preset; every number: ftd recipes --json; override one: ftd train ... --set NAME=VALUE",
        title_justify="left",
    )
    for column in ("scenario", "method", *shown):
        table.add_column(column, overflow="fold")
    for scenario, methods in made.items():
        for i, (method, r) in enumerate(methods.items()):
            cells = [",".join(map(str, r[k])) if isinstance(r[k], tuple) else str(r[k]) for k in shown]
            table.add_row("" if i else scenario, method, *cells)
        table.add_section()
    _output().print(table)


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
    from rich.table import Table

    from ftdpp import data

    table = Table(title=f"{root} as {domain}", title_justify="left")
    rows = data.check(root, _domain(domain), data_version)
    for key in rows[0]:
        table.add_column(key)
    for row in rows:
        table.add_row(*("" if v is None else str(v) for v in row.values()))
    _output().print(table)
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
    from ftdpp import data

    row, folder, console = _domain(domain), _cache(cache)[0], _console()
    shape: tuple[int, int] | None = (225, 400) if row.dataset == "nuscenes" else None
    if size:
        try:
            height, width = (int(x) for x in size.split(","))
        except ValueError:
            raise _fail(f"--size {size}: expected H,W as in 225,400", USAGE) from None
        shape = height, width
    names: list[str | None] = [split]
    if frames:
        names = [None]
    elif split is None:  # all there is; the semi-supervised halves are part of train
        rows = data.check(root, row, data_version)
        names = [r["split"] for r in rows if r["frames"] and not r["split"].startswith("train_")]
        console.print(f"splits with frames here: {', '.join(map(str, names)) or 'none'}; the others: ftd data check")
    for name in names:
        with _bar(console) as tell:
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
    seed: int = 0,
    workers: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Write the built-in street world to a folder of your own."""
    from ftdpp import synth

    counts = None
    if frames:
        try:
            counts = dict(zip(synth.DEFAULT_FRAMES, (int(x) for x in frames.split(",")), strict=True))
        except ValueError:
            raise _fail(f"--frames {frames}: expected four numbers, {','.join(synth.DEFAULT_FRAMES)}", USAGE) from None
    console = _console()
    if out.exists():
        raise _fail(f"{out} exists; choose a new folder", USAGE)
    try:
        with _bar(console) as tell:
            synth.write_world(out, src, tgt, counts, seed, workers, lambda done, total: tell(done, total, "ray casting"))
    except ValueError as error:
        raise _fail(error, USAGE) from None
    console.print(f"wrote {out}; use it with: ftd train --src {src} --tgt {tgt} --data {out}")


@app.command()
@guarded
def bench(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are shown.", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="CSV to append the rows to.")] = None,
    cache: Cache = None,
) -> None:
    """Time maps, sparse U-Net, data loading and the training step on this machine, beside what it can do at best."""
    from rich.table import Table

    from ftdpp import bench as benchmark

    console = _console()
    root = _world("usa", "singapore", _cache(cache)[0], console)
    rows = benchmark.run(root, _cache(cache)[0], rounds)
    table = Table(title=benchmark.machine(), title_justify="left")
    for key in rows[0]:
        table.add_column(key, justify="left" if key == "what" else "right")
    for row in rows:
        table.add_row(*("" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    _output().print(table)
    if out is not None:
        benchmark.append(out, rows)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
