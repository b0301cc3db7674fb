"""Checkpoints: one safetensors file each, written whole or not at all, never unpickled.

system/NAME                      a tensor of the system's state dict
optimizer/PHASE/PARAMETER/SLOT   optimiser state, by the name of its parameter
metadata "ftd"                   JSON: format, recipe, iteration, ... and digests of all this, which
                                 are compared when it is read: a flipped bit shows nowhere else
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Required, TypedDict

import msgspec
import torch
from msgspec import Meta
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from ftdpp import files
from ftdpp.files import write
from ftdpp.pretrained import misfits
from ftdpp.recipe import RecipeError, from_dict
from ftdpp.systems import METHODS, build, system_of

FORMAT = 3  # of checkpoints and pseudo-label files
PARTS = ("system", "optimizer")  # whose tensors have a digest; those of pseudo-labels: one of all


Count = Annotated[int, Meta(ge=0)]


class Best(TypedDict):
    """The validation that chose best.safetensors."""

    iteration: Count
    split: str
    miou: dict[str, float]


class Metadata(TypedDict, total=False):
    """What a file of ours says of itself; which of it is there depends on its kind."""

    format: Required[int]
    digests: dict[str, str]  # of the parts, and of the rest of the metadata
    class_names: list[str]
    # a checkpoint
    recipe: dict[str, Any]
    iteration: Count
    # ... of a training
    given: list[str]  # settings that the user chose
    seed: Count
    processes: Annotated[int, Meta(ge=1)]
    best: Best | None
    validation_owed: bool
    torch: str
    data: dict[str, str]  # stream -> digest
    pseudo: str | None  # digests of what it began with
    pretrained: str | None
    source: str | None
    frozen: str | None
    # ... converted from released ones
    converted_from: dict[str, str]
    # pseudo-labels
    scenario: str
    method: str
    classes: str
    checkpoint: str
    weights: str
    content: str
    frames: Count
    domain: str
    split: str
    image_size: list[int] | None
    thresholds: dict[str, list[float]]  # head -> class by class
    kept: dict[str, list[Count]]
    predicted: dict[str, list[Count]]
    labels: str


# What the checkpoint of a training has, and one that only predicts may lack.
OF_A_TRAINING = (
    *("given", "seed", "processes", "best", "validation_owed", "data"),
    *("pseudo", "pretrained", "source", "frozen"),
)


class RunError(Exception):
    """The run cannot go on as asked: what was found, what was expected and what to type."""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _digests(tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> dict[str, str]:
    """What `Metadata.digests` has to be."""
    rest = json.dumps({k: v for k, v in meta.items() if k != "digests"}, sort_keys=True)
    found = {"metadata": hashlib.sha256(rest.encode()).hexdigest()}
    for part in PARTS:
        mine = {k: v for k, v in tensors.items() if k.startswith(f"{part}/")}
        if mine:
            found[part] = digest(mine)
    return found


def save(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a safetensors file, with digests of its metadata and its parts.

    All metadata is one JSON string, because several keys would be stored in random order.
    """
    stored = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    text = json.dumps({**meta, "digests": _digests(stored, meta)}, sort_keys=True)
    # Not by save_file, which writes elsewhere and renames: a killed one leaves that for ever.
    write(path, serialised(stored, {"ftd": text}))


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint or pseudo-label file.

    Raises:
        RunError: missing, damaged, not ours, or of another format.
    """
    if not path.is_file():
        raise RunError(f"{path}: no such file; name a run folder or a file that ftd has written")
    try:
        with safe_open(files.regular(path), "pt") as file:
            text = (file.metadata() or {}).get("ftd")
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: not a readable safetensors file ({error})") from None
    if text is None:
        raise RunError(
            f"{path}: a safetensors file, but not written by ftd; convert a released checkpoint "
            "with: ftd convert"
        )
    try:
        meta: dict[str, Any] = msgspec.json.decode(text, type=Metadata)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise RunError(f"{path}: its metadata is damaged ({error}); make it anew") from None
    if meta["format"] != FORMAT:
        found = meta["format"]
        raise RunError(f"{path}: format {found!r}, this version reads {FORMAT}; make it anew")
    if meta.get("digests", {}).get("metadata") != _digests({}, json.loads(text))["metadata"]:
        raise RunError(f"{path}: its metadata is not what was written; make it anew")
    if "recipe" in meta and "iteration" not in meta:
        raise RunError(f"{path}: its metadata is damaged (no iteration); make it anew")
    return meta


def read_training(path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint that a training can go on from.

    Raises:
        RunError: it is none; it was converted from released ones; or it is damaged.
    """
    meta = read_metadata(path)
    if "converted_from" in meta:
        raise RunError(
            f"{path}: converted from released checkpoints, which hold no optimiser state: it can "
            "be evaluated, and no training goes on from it"
        )
    missing = [key for key in ("recipe", *OF_A_TRAINING) if key not in meta]
    if missing:
        raise RunError(f"{path}: its metadata is damaged (no {missing[0]}); begin anew")
    return meta


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it.

    Args:
        prefix: "system/" or "optimizer/"; "" for all.
    Raises:
        RunError: see `read_metadata`; or one of them is not what was written.
    """
    wanted = read_metadata(path)["digests"]
    with safe_open(path, "pt") as file:
        names = [k for k in file.keys() if k.startswith(prefix)]  # noqa: SIM118 - no mapping
        tensors = {k: file.get_tensor(k) for k in names}
    for part, found in _digests(tensors, {}).items():
        if part != "metadata" and found != wanted.get(part):
            raise RunError(
                f"{path}: a tensor of {part} is not what was written, so the file is damaged; copy "
                "it again, or make it anew"
            )
    return {k.removeprefix(prefix): tensor for k, tensor in tensors.items()}


def stored_recipe(meta: dict[str, Any], path: Path) -> Any:
    """The recipe of a checkpoint.

    Raises:
        RunError: it has a method, settings or a class set that this version does not know.
    """
    method, scenario = (meta["recipe"].get(name) for name in ("method", "scenario"))
    try:
        if not isinstance(method, str) or method not in METHODS:
            raise RecipeError(f"the method {method!r}, which this version does not know")
        if not isinstance(scenario, str) or scenario.removesuffix("-ssda").count("-") != 1:
            raise RecipeError(f"the scenario {scenario!r}, expected SOURCE-TARGET")
        return from_dict(system_of(method, scenario).Recipe, meta["recipe"])
    except RecipeError as error:
        raise RunError(f"{path}: has {error}; use the version of ftd that wrote it") from None


def _holds(path: Path, networks: Sequence[str]) -> bool:
    """Whether a checkpoint has tensors of these networks of its system."""
    begins = tuple(f"system/{name}." for name in networks)
    with safe_open(path, "pt") as file:
        return any(key.startswith(begins) for key in file.keys())  # noqa: SIM118 - no mapping


def load_state(system: Any, path: Path) -> None:
    """Load the system's tensors. Networks that only training needs may be left over in the file.

    Raises:
        RunError: one is missing, left over, of another shape or not finite.
    """
    theirs, mine = read_tensors(path, "system/"), system.state_dict()
    extra = tuple(f"{name}." for name in system.training_only)
    theirs = {k: v for k, v in theirs.items() if k in mine or not k.startswith(extra)}
    for name in misfits(theirs, mine):
        found, wanted = (
            tuple(tensors[name].shape) if name in tensors else "missing"
            for tensors in (theirs, mine)
        )
        raise RunError(
            f"{path}: {name} is {found}, by its recipe it should be {wanted}; the file is damaged, "
            "make it anew"
        )
    for name, tensor in theirs.items():
        if not tensor.isfinite().all():
            raise RunError(f"{path}: {name} holds values that are not finite; make it anew")
    system.load_state_dict(theirs)


def load(
    path: Path, device: torch.device | str = "cpu", teachers: bool = False
) -> tuple[Any, dict[str, Any]]:
    """The system of a checkpoint, ready to predict, and the checkpoint's metadata.

    Args:
        teachers: with the networks that only training needs, where the file has the teachers.
    Raises:
        RunError: the file is no checkpoint, is damaged, or is of another version.
    """
    if path.suffix in (".pth", ".pt", ".ckpt"):
        raise RunError(
            f"{path}: not one of our checkpoints; turn the released ones into one with: ftd convert"
        )
    meta = read_metadata(path)
    if "recipe" not in meta:
        what = "a pseudo-label file" if "thresholds" in meta else "a file without a recipe"
        raise RunError(
            f"{path}: {what}, not a checkpoint; name a run folder, its best.safetensors or its "
            "last.safetensors"
        )
    r = stored_recipe(meta, path)
    system = build(r, training=False)
    if teachers and _holds(path, tuple(system.teachers.values())):
        system = build(r)
    load_state(system, path)
    needs = system.frozen()
    if needs is not None and needs != meta.get("frozen"):
        raise RunError(
            f"{path}: was trained with another {system.recipe.clip!r} CLIP than the one here; copy "
            "its folder from where it was trained, or train anew"
        )
    return system.to(device).eval(), meta
