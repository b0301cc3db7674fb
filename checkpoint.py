"""Checkpoints: one safetensors file each, written whole or not at all, never unpickled."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ftdpp.data import CLASS_SETS
from ftdpp.losses import Recipe
from ftdpp.models import CrossModal, convert_released

FORMAT = 1  # of checkpoints and pseudo-label files


class RunError(Exception):
    """The run cannot go on as asked: the message says what was found, what was expected and what to type."""


def save(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a safetensors file under a temporary name and rename it: a reader sees the old file or the new one.

    All metadata is one JSON string, because several keys would be stored in random order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, {"ftd": json.dumps(meta, sort_keys=True)}
        )
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # safetensors writes for the owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint or pseudo-label file.

    Raises:
        RunError: missing, damaged, not ours, or of another format.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("ftd")
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: not a readable safetensors file ({error})") from None
    if text is None:
        raise RunError(f"{path}: a safetensors file, but not written by ftd; convert a released checkpoint with: ftd convert")
    meta = json.loads(text)
    if meta.get("format") != FORMAT:
        raise RunError(f"{path}: format {meta.get('format')}, this version reads {FORMAT}")
    return meta


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    with safe_open(path, "pt") as file:
        return {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118


def stored_recipe(meta: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["recipe"].items()}
    return Recipe(**values)


def build(r: Recipe) -> CrossModal:
    return CrossModal(len(CLASS_SETS[r.classes].names), r.width, r.m, r.fusion, r.dropout, r.precision)


def load_student(path: Path, device: torch.device | str = "cpu") -> tuple[CrossModal, Recipe, dict[str, Any]]:
    """The student of a checkpoint, in eval mode, with its recipe and metadata."""
    meta = read_metadata(path)
    if "recipe" not in meta:
        raise RunError(f"{path}: not a checkpoint")
    r = stored_recipe(meta)
    model = build(r)
    model.load_state_dict(read_tensors(path, "student/"))
    return model.to(device).eval(), r, meta


def convert_checkpoints(files: dict[str, Path], r: Recipe, out: Path) -> None:
    """Write released checkpoints (.pth of the parts "2d", "3d", "fusion") as one of ours, readable by `load_student`.

    Raises:
        RunError: a file is unreadable, needs unpickling of arbitrary objects, or does not fit the network.
    """
    state: dict[str, Tensor] = {}
    iteration = 0
    for part, file in files.items():
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise RunError(f"{file}: no such file") from None
        except Exception as error:  # torch raises several kinds for a file that is not a plain checkpoint
            raise RunError(f"{file}: not a checkpoint that can be read without running its code ({error})") from None
        weights = loaded.get("model", loaded) if isinstance(loaded, dict) else {}
        iteration = int(loaded.get("iteration", 0)) if isinstance(loaded, dict) and "model" in loaded else iteration
        tensors = {k.removeprefix("module."): v for k, v in weights.items() if isinstance(v, Tensor)}
        state |= convert_released(part, tensors.items())
    model = build(r)
    mine = model.state_dict()
    wrong = [
        k
        for k in {**mine, **state}
        if "num_batches_tracked" not in k and (k not in mine or k not in state or mine[k].shape != state[k].shape)
    ]
    if wrong:
        raise RunError(
            f"{', '.join(str(f) for f in files.values())}: {len(wrong)} tensors do not fit {r.scenario} "
            f"({len(CLASS_SETS[r.classes].names)} classes), first {wrong[0]}; check --scenario and the order of the files"
        )
    meta = {
        "format": FORMAT,
        "recipe": dataclasses.asdict(r),
        "iteration": iteration,
        "class_names": CLASS_SETS[r.classes].names,
        "converted_from": {k: Path(v).name for k, v in files.items()},
    }
    save(out, {f"student/{k}": state.get(k, v) for k, v in mine.items()}, meta)
