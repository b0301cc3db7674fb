"""Settings of a run: the dataclass that every system shares, how `--set` is read, what is refused.

A system that needs more settings subclasses `Recipe`. `systems.recipe` lays a scenario's row, a
method's row, a preset and the user's overrides over one another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

import msgspec

from ftdpp.data import CLASS_SETS, GRID

R = TypeVar("R", bound="Recipe")


class RecipeError(ValueError):
    """No such scenario, method, preset or setting, or a value that cannot work: a wrong command."""


OF_3D = ("width_3d", "lr_3d", "voxels_per_metre")  # settings that only a 3D network reads


@dataclass(frozen=True)
class Recipe:
    """Every number of a run. `ftd recipes` prints them; `--set name=value` overrides one."""

    scenario: str = ""  # "usa-singapore"
    method: str = ""  # a row of systems.METHODS
    classes: str = "street6"  # class set, see data.CLASS_SETS
    # optimisation: Adam with a step schedule
    lr_2d: float = 1e-4
    lr_3d: float = 1e-3
    steps: int = 60_000
    milestones: tuple[int, ...] = ()  # iterations at which the learning rates are multiplied ...
    gamma: float = 0.1  # ... by this
    batch: int = 8  # frames of a stream in one part of an update
    accumulate: int = 1  # parts whose gradients are averaged in an update, in each process
    sync_batchnorm: bool = False  # normalise over all processes (GPUs; not the voxels)
    eval_batch: int = 8
    val_every: int = 5_000
    save_every: int = 5_000
    class_weights: tuple[float, ...] = ()  # empty: computed from the labelled training points
    # size of the networks and of the data
    width_2d: int = 64  # channels of the 2D features
    width_3d: int = 16  # channels of the 3D features
    precision: str = "fp32"  # of the two trunks: fp32, or bf16 by autocast
    image: tuple[int, int] = (225, 400)  # H, W; (0, 0) keeps the original size
    crop: tuple[int, int] = (0, 0)  # training crop H, W; (0, 0) none
    voxels_per_metre: float = 20.0

    def image_size(self, aspect: float | None = None) -> tuple[int, int] | None:
        """(H, W) that images are resized to; None keeps the original size.

        Args:
            aspect: width / height of images that are much wider than the recipe's. They keep the
                recipe's height and are not squeezed: a model of nuScenes' 16:9 images then sees
                KITTI's wide ones at the same scale.
        """
        if self.image == (0, 0):
            return None
        height, width = self.image
        if aspect is not None and width < 2.5 * height:
            return height, round(height * aspect)
        return height, width

    def rules(self) -> dict[str, bool]:
        """Every condition that a recipe has to meet, in words, and whether this one meets it."""
        counts = self.steps, self.batch, self.accumulate, self.eval_batch
        periods = self.val_every, self.save_every
        sizes = (self.image, self.crop)
        weights = self.class_weights
        classes = len(CLASS_SETS.get(self.classes, ()))
        return {
            "steps, batch, accumulate, eval_batch, val_every and save_every must be at least 1": (
                min(counts + periods) >= 1
            ),
            "precision must be fp32 or bf16": self.precision in ("fp32", "bf16"),
            f"classes must be one of {', '.join(CLASS_SETS)}": self.classes in CLASS_SETS,
            "learning rates must not be negative": min(self.lr_2d, self.lr_3d) >= 0,
            "gamma must lie in 0..1": 0 <= self.gamma <= 1,
            "image and crop want H,W of 1 to 32767; 0,0 for none": all(  # pixels are 16-bit numbers
                size == (0, 0) or (len(size) == 2 and min(size) >= 1 and max(size) < 1 << 15)
                for size in sizes
            ),
            # Narrower than 16, oneDNN's gradient of the strided 1x1 convolutions crashes
            # (torch 2.13 on a CPU).
            "width_2d must be at least 16 and a multiple of 8": (
                self.width_2d >= 16 and self.width_2d % 8 == 0
            ),
            "width_3d must be a multiple of 4": self.width_3d > 0 and self.width_3d % 4 == 0,
            f"voxels_per_metre must lie in 0..100: the grid has {GRID} voxels a side": (
                0 < self.voxels_per_metre <= 100
            ),
            f"class_weights wants {classes} numbers, not negative, one above 0": usable_weights(
                weights, classes
            ),
        }

    def lacking(self) -> dict[str, str]:
        """Settings of parts that this recipe's method does not have, each with the reason."""
        return {}

    def idle(self) -> dict[str, str]:
        """Settings that other settings keep from being read, each with the reason."""
        return {"milestones": "gamma is 1"} if self.gamma == 1 else {}

    def unread(self) -> dict[str, str]:
        """Settings that change nothing in a run with this recipe, each with the reason."""
        return self.lacking() | self.idle()

    @property
    def second_stage(self) -> bool:
        """Whether the run trains on the pseudo-labels of a first stage."""
        return False

    @property
    def needs_clip(self) -> str:
        """The frozen CLIP that training looks through, by name; empty: none."""
        return ""

    def check(self) -> None:
        """Raises RecipeError where a rule is broken."""
        broken = [rule for rule, holds in self.rules().items() if not holds]
        if broken:
            raise RecipeError("; ".join(broken))


# A network and a schedule of the same architecture that two CPU cores train in minutes: narrower,
# smaller images, voxels of 10 cm. Without ImageNet weights the 2D branch starts from nothing, so it
# learns at a higher rate, and 3D at a rate that makes up for few steps; the class weights follow
# from the data. The drop of the rate at the end lets the running statistics (momentum 0.01 in 3D)
# catch up with the weights before they are used.
SMALL: dict[str, Any] = {
    "width_2d": 16,
    "width_3d": 8,
    "image": (112, 200),
    "voxels_per_metre": 10.0,
    "batch": 4,
    "steps": 960,
    "milestones": (720,),
    "gamma": 0.1,
    "lr_2d": 2e-3,
    "lr_3d": 6e-3,
    "val_every": 240,
    "save_every": 240,
    "class_weights": (),
}
SMALL_CROPPED: dict[str, Any] = {"crop": (112, 200)}  # where training draws crops


def usable_weights(weights: Sequence[float], classes: int) -> bool:
    """Whether these can weight classes; no weights at all can, too: they are computed."""
    return not weights or (len(weights) == classes and min(weights) >= 0 and max(weights) > 0)


def unknown(what: str, found: str, known: Sequence[str]) -> RecipeError:
    """The error for a misspelt name, with the closest known one."""
    close = get_close_matches(found.replace("+", "p"), known, 1)  # FtD++ is written ftdpp
    hint = f"did you mean {close[0]!r}? " if close else ""
    return RecipeError(f"unknown {what} {found!r}; {hint}known: {', '.join(known)}")


def settings(cls: type[Recipe]) -> dict[str, str]:
    """The settings that `--set` may name, and their types in words."""
    return {
        f.name: str(f.type) for f in dataclasses.fields(cls) if f.name not in ("scenario", "method")
    }


def given_names(overrides: Sequence[str]) -> list[str]:
    """The settings that "name=value" strings name. Raises RecipeError for another form."""
    for text in overrides:
        if "=" not in text:
            raise RecipeError(f"--set wants name=value; found {text!r}")
    return [text.partition("=")[0] for text in overrides]


def settings_of(r: Recipe, base: Recipe, names: Sequence[str]) -> tuple[str, ...]:
    """The named settings in which a recipe differs from another, as `--set` takes them.

    In the order of the fields, so that equal settings give equal texts.
    """

    def text(value: Any) -> str:
        if isinstance(value, tuple):
            return ",".join(map(text, value))
        if isinstance(value, float):
            return repr(value).removesuffix(".0")
        return str(value).lower() if isinstance(value, bool) else str(value)

    chosen = [n for n in settings(type(r)) if n in names and getattr(r, n) != getattr(base, n)]
    return tuple(f"{name}={text(getattr(r, name))}" for name in chosen)


def override(base: R, overrides: Sequence[str]) -> R:
    """The recipe with "name=value" strings laid over it; a tuple is written 40,50.

    Raises:
        RecipeError: an unknown name (with the closest known one), a value of another type, or a
            setting that this recipe's method does not read.
    """
    kinds, lacking, made = settings(type(base)), base.lacking(), base
    for name, text in zip(given_names(overrides), overrides, strict=True):
        if name not in kinds:
            raise unknown("setting", name, list(kinds))
        if name in lacking:
            raise RecipeError(f"--set {text}: {base.method} does not read it: {lacking[name]}")
        value = _parse(name, text.partition("=")[2], getattr(base, name), kinds[name])
        made = dataclasses.replace(made, **{name: value})
    unread = made.unread()  # by what was given beside it; but what switches something off is read
    for name, text in zip(given_names(overrides), overrides, strict=True):
        if name in unread and getattr(made, name):
            raise RecipeError(f"--set {text}: would change nothing: {unread[name]}")
    return made


def _parse(name: str, text: str, old: Any, kind: str) -> Any:
    try:
        if isinstance(old, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(old, tuple):
            number = float if "float" in kind else int
            value: Any = tuple(number(part) for part in text.split(",") if part)
            numbers = value
        else:
            value = type(old)(text)
            numbers = (value,)
        if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
            raise ValueError
        return value
    except (ValueError, KeyError):
        raise RecipeError(f"--set {name}={text}: expected {kind}, as in {name}={old}") from None


def from_dict(cls: type[R], values: Mapping[str, Any]) -> R:
    """A recipe from a checkpoint's metadata. A setting that came later has its default.

    Raises:
        RecipeError: it has a setting, or a class set, that this version does not know, a value of
            another type, or breaks a rule.
    """
    known = {f.name for f in dataclasses.fields(cls)}
    for name in sorted(values.keys() - known):
        raise RecipeError(f"the setting {name!r}, which this version does not know")
    try:
        made = msgspec.convert(values, type=cls)
    except msgspec.ValidationError as error:
        raise RecipeError(f"a setting of another type ({error})") from None
    if made.classes not in CLASS_SETS:
        raise RecipeError(f"the class set {made.classes!r}, which this version does not know")
    try:
        made.check()
    except RecipeError as error:
        raise RecipeError(f"settings that cannot be used ({error})") from None
    return made
