"""The commands as the tests call them, on a tiny built-in world."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from ftdpp.ftd import app

TINY = ["--set", "image=48,88", "--set", "batch=2", "--set", "width_2d=16", "--set", "width_3d=4"]
FILES = ("last.safetensors", "best.safetensors", "log.csv")


def ftd(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def words(result: Result) -> str:
    """The output with its line breaks taken out."""
    return " ".join(result.output.split())


def train_args(
    out: Path, world: Path, cache: Path, *more: object, method: str = "ftdpp", steps: int = 4
) -> list[str]:
    """`ftd train` of a tiny run on one thread, so that bytes can be compared."""
    args = [
        *("train", "--src", "usa", "--tgt", "singapore", "--method", method, "--preset", "small"),
        *("--steps", steps, "--seed", 0, "--out", out, "--data", world, "--cache", cache),
        *("--threads", 1, *TINY, *more),
    ]
    return [str(a) for a in args]


def same_bytes(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in FILES)
