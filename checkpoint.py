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
from ftdpp.models import CrossModal, convert_released, misfits, read_pth

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
    try:
        meta = json.loads(text)
    except ValueError as error:
        raise RunError(f"{path}: its metadata is damaged ({error})") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise RunError(f"{path}: format {meta.get('format') if isinstance(meta, dict) else meta!r}, this version reads {FORMAT}")
    return meta


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    with safe_open(path, "pt") as file:
        return {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118


def stored_recipe(meta: dict[str, Any], path: Path) -> Recipe:
    """The recipe of a checkpoint. A setting that came later has its default: that is what older files did.

    Raises:
        RunError: it has settings, or a class set, that this version does not know.
    """
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["recipe"].items()}
    strange = sorted(values.keys() - {f.name for f in dataclasses.fields(Recipe)})
    if strange or values.get("classes", Recipe.classes) not in CLASS_SETS:
        what = f"setting {strange[0]!r}" if strange else f"class set {values['classes']!r}"
        raise RunError(f"{path}: has the {what}, which this version does not know; use the version of ftd that wrote it")
    return Recipe(**values)


def build(r: Recipe) -> CrossModal:
    return CrossModal(len(CLASS_SETS[r.classes].names), r.width, r.m, r.fusion, r.dropout, r.precision)


def load_state(model: torch.nn.Module, path: Path, prefix: str) -> None:
    """Load the tensors under `prefix`.

    Raises:
        RunError: one is missing, left over, of another shape or not finite.
    """
    theirs, mine = read_tensors(path, prefix), model.state_dict()
    for name in misfits(theirs, mine):
        found, wanted = (tuple(t[name].shape) if name in t else "missing" for t in (theirs, mine))
        raise RunError(
            f"{path}: {prefix}{name} is {found}, by its recipe it should be {wanted}; the file is damaged, make it anew"
        )
    for name, tensor in theirs.items():
        if not tensor.isfinite().all():
            raise RunError(f"{path}: {prefix}{name} holds values that are not finite; make the checkpoint anew")
    model.load_state_dict(theirs)


def load_student(path: Path, device: torch.device | str = "cpu") -> tuple[CrossModal, Recipe, dict[str, Any]]:
    """The student of a checkpoint, in eval mode, with its recipe and metadata."""
    if path.suffix in (".pth", ".pt", ".ckpt"):
        raise RunError(f"{path}: not one of our checkpoints; turn the released ones into one with: ftd convert")
    meta = read_metadata(path)
    if "recipe" not in meta:
        what = "a pseudo-label file" if "thresholds_2d" in meta else "a file without a recipe"
        raise RunError(f"{path}: {what}, not a checkpoint; name a run folder, its best.safetensors or its last.safetensors")
    r = stored_recipe(meta, path)
    model = build(r)
    load_state(model, path, "student/")
    return model.to(device).eval(), r, meta


def convert_checkpoints(files: dict[str, Path], r: Recipe, out: Path) -> None:
    """Write released checkpoints (.pth of the parts "2d", "3d", "fusion") as one of ours, readable by `load_student`.

    Raises:
        RunError: a file is unreadable, needs unpickling of arbitrary objects, or does not fit the network.
    """
    state: dict[str, Tensor] = {}
    iteration = 0
    for part, file in files.items():
        if not file.is_file():
            raise RunError(f"{file}: no such file")
        try:
            loaded = read_pth(file)
        except ValueError as error:
            raise RunError(str(error)) from None
        weights = loaded.get("model", loaded) if isinstance(loaded, dict) else {}
        iteration = int(loaded.get("iteration", 0)) if isinstance(loaded, dict) and "model" in loaded else iteration
        tensors = {k.removeprefix("module."): v for k, v in weights.items() if isinstance(v, Tensor)}
        state |= convert_released(part, tensors.items())
    model = build(r)
    mine = model.state_dict()
    wrong = [k for k in misfits(state, mine) if "num_batches_tracked" not in k]
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
