"""What the commands share: options, choices made for the user, errors as exit codes."""

from __future__ import annotations

import functools
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from ftdpp.recipe import Recipe

FAILED, USAGE, DATA, NON_FINITE, OUT_OF_MEMORY, INTERRUPTED = 1, 2, 3, 4, 5, 130


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
    int | None, typer.Option(help="Loading processes; default: 0 on up to 4 cores.", min=0, max=256)
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
Force = Annotated[bool, typer.Option("--force", help="Replace a file that ftd did not write.")]
Clip = Annotated[
    str | None,
    typer.Option(
        help="Frozen CLIP: a folder, or a name on the hub such as openai/clip-vit-base-patch16. "
        "Default: street, small and trained here once."
    ),
]
Domain = Annotated[str, typer.Option(help="A part of a data set, e.g. usa; see the README.")]


def fail(message: object, code: int) -> typer.Exit:
    from ftdpp import parallel, screen

    who = f"ftd, process {parallel.number()}" if parallel.number() else "ftd"
    console = screen.messages()
    console.quiet = False
    console.print(f"{who}: {message}", style="bold red", soft_wrap=True)
    return typer.Exit(code)


def written_down(error: Exception) -> str:
    """A file with the traceback and what else a bug report needs: the command and versions."""
    import torch

    from ftdpp import machine

    about = [
        f"command: {' '.join(map(quote, ['ftd', *sys.argv[1:]]))}",
        *(f"{name}: {version(name)}" for name in ("ftdpp", "torch", "numpy", "typer")),
        f"python: {sys.version}",
        f"machine: {platform.platform()}, {machine.describe(torch.device('cpu'))}",
        "",
        *traceback.format_exception(error),
    ]
    handle, path = tempfile.mkstemp(prefix="ftd-error-", suffix=".txt")
    with open(handle, "w", errors="backslashreplace") as file:
        file.write("\n".join(about))
    return path


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
            raise fail("torchrun starts ftd train alone; call this one without it", USAGE)
        smaller = "use --preset small or a smaller --set batch=..."
        before = os.environ.get("FTD_CACHE")
        if kwargs.get("cache"):  # for this command, and for what asks `files.cache_home`
            os.environ["FTD_CACHE"] = str(kwargs["cache"])
        try:
            command(*args, **kwargs)
        except (RecipeError, KernelError) as error:
            raise fail(error, USAGE) from None
        except RunError as error:
            raise fail(error, FAILED) from None
        except DataError as error:
            raise fail(error, DATA) from None
        except NonFiniteLoss as error:
            raise fail(error, NON_FINITE) from None
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise fail(f"out of memory ({error}); {smaller}", OUT_OF_MEMORY) from None
        except BrokenPipeError:  # the reader closed the pipe
            raise
        except OSError as error:
            what = error.filename or "a file"
            raise fail(f"{what}: {error.strerror or error}", FAILED) from None
        except (Interrupted, KeyboardInterrupt) as error:
            raise fail(str(error) or "interrupted", INTERRUPTED) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:  # the last line of defence: nobody foresaw it
            if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
                raise fail(f"out of memory; {smaller}", OUT_OF_MEMORY) from None  # on a CPU
            words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise fail(
                f"an error that is ours: {words}; please report it with {written_down(error)}",
                FAILED,
            ) from None
        finally:
            os.environ.pop("FTD_CACHE", None)
            os.environ |= {"FTD_CACHE": before} if before is not None else {}

    return run


# ---- choices that are made for the user, each printed with its reason ----------------------------


def cache_folder(cache: Path | None) -> tuple[Path, str]:
    from ftdpp import files

    why = "$FTD_CACHE" if os.environ.get("FTD_CACHE") else "default; change it with --cache"
    folder, why = files.cache_home(), "--cache" if cache else why
    if folder.exists() and not folder.is_dir():
        raise fail(f"{folder}: is a file; name a folder for prepared data ({why})", USAGE)
    return folder, why


def chosen_device(name: str | None) -> tuple[Any, str]:
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
        raise fail(f"--device {name}: {str(error).splitlines()[0]}; use cpu", USAGE) from None
    if device.type == "cuda" and parallel.asked_for() > 1:
        device = parallel.own_gpu()
    machine.use(device)
    return device, why


def chosen_threads(count: int | None, recorded: int | None = None) -> tuple[str, str]:
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


def chosen_preset(name: str | None, device: Any, built_in: bool) -> tuple[str, str]:
    if name:
        return name, "--preset"
    if built_in:
        return "small", "the built-in world is made for it"
    if device.type == "cuda":
        return "paper", "a GPU is present"
    return "small", "two CPU cores train it in minutes"


RUN_FILES = {
    *("last.safetensors", "best.safetensors", "run.json"),
    *("log.csv", "val.csv", "audit.csv", "scores.json", "pseudo.safetensors"),
}


MARKS = {  # what the first bytes of a file hold that a command wrote
    ".safetensors": b'"__metadata__":{"ftd"',
    ".html": b'name="generator" content="ftd"',
    ".png": b"Software\0ftd",  # pictures.MARK
}


def require_ours(path: Path, force: bool) -> None:
    """Refuses to replace a file that ftd did not write, unless that is asked for."""
    if force or not path.is_file():
        return
    mark = MARKS.get(path.suffix.lower())
    with path.open("rb") as file:
        if mark is None or mark not in file.read(1 << 16):
            raise fail(
                f"{path}: is there, and ftd did not write it; name another file, or replace it "
                "with --force",
                USAGE,
            )


def require_writable(path: Path, folder: bool = False) -> None:
    """Refuses a file (or folder) that cannot be written, before hours of work would be lost."""
    from ftdpp import files

    place = path if folder else path.parent
    try:
        if path.is_dir() and not folder:
            raise fail(f"{path}: is a folder; name a file", USAGE)
        # The longest name that will stand there.
        files.temporary_beside(path / "pseudo.safetensors" if folder else path).exists()
    except OSError as error:
        raise fail(
            f"{path}: cannot be written there ({error.strerror}); choose another name", USAGE
        ) from None
    if path.exists() and not path.is_file() and not path.is_dir():
        raise fail(f"{path}: is a pipe or a device; name a file", USAGE)
    if path.name in RUN_FILES and (path.parent / "run.json").is_file():
        raise fail(f"{path}: is a run's own file, which would be lost; name another", USAGE)
    # Tried in the part of it that is there: a command that is refused leaves nothing behind.
    there = next(p for p in (place, *place.absolute().parents) if p.exists())
    if place.is_dir():
        files.sweep(place)
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise fail(
            f"{path}: cannot be written there ({error.strerror}); choose another place", USAGE
        ) from None


def known_domain(option: str, name: str) -> Any:
    from ftdpp import readers, recipe

    domains = readers.domains()
    if name not in domains:
        raise recipe.unknown(f"domain {option}", name, list(domains))
    return domains[name]


def known_roots(src: str, tgt: str, roots: tuple[Path | None, Path | None]) -> bool:
    """Refuses roots that cannot be used; whether the built-in world is meant."""
    from ftdpp.readers import DataError
    from ftdpp.world import layouts

    if (roots[0] is None) != (roots[1] is None):
        side = "--tgt-data" if roots[1] is None else "--src-data"
        raise fail(
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
        raise fail(
            f"there is no built-in world for {src} -> {tgt} (there is for {pairs}); name the data "
            "set's root with --data",
            USAGE,
        )
    return built_in


def built_in_world(
    src: str, tgt: str, cache: Path, workers: int, console: Console
) -> tuple[Path, Path]:
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


def tokens_of(frames: str | None, option: str) -> list[str] | None:
    if frames is None:
        return None
    tokens = [token for token in frames.split(",") if token]
    if not tokens:
        raise fail(f"{option}: expected tokens, comma-separated; found none", USAGE)
    return tokens


def imagenet_weights(pretrained: str | None, *recipes: Recipe) -> dict[str, Tensor] | None:
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


def clip_setting(name: str | None) -> list[str]:
    """--clip as a setting; a folder by its full path, so that it is found from everywhere."""
    if not name:
        return []
    return [f"clip={Path(name).resolve() if Path(name).is_dir() else name}"]


def weights_fact(pretrained: str | None) -> tuple[str, str, str]:
    why = "--pretrained" if pretrained else "none given; the paper starts from them"
    return "ImageNet weights", pretrained or "none", why


def print_choices(
    console: Console, choices: dict[str, tuple[Any, str]], more: list[tuple[str, str, str]]
) -> None:
    """Every automatic choice, as value and reason."""
    from ftdpp import screen

    screen.facts(console, [*((name, str(v), why) for name, (v, why) in choices.items()), *more])


def checkpoint_of(run: Path, which: str) -> Path:
    from ftdpp.checkpoint import RunError

    if run.suffix == ".safetensors" or run.is_file():
        return run
    if which not in ("best", "last"):
        raise fail(f"--checkpoint {which}: expected best or last", USAGE)
    if not run.is_dir():
        raise RunError(f"{run}: no such run folder; name one, or a .safetensors checkpoint")
    return run / f"{which}.safetensors"
