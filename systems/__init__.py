"""What a system is, and which methods there are.

The training loop, the evaluator, checkpoints and the command line know a system by `System` and
nothing else. A new method is a module with a subclass of `System` and a row in `METHODS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ftdpp import readers
from ftdpp.data import Batch, common_class_sets
from ftdpp.recipe import SMALL, SMALL_CROPPED, Recipe, RecipeError, override, unknown

# ---- chance ------------------------------------------------------------------------------------

# What a generator is for; keeps the sequences of random numbers apart.
ORDER, AUGMENT, COIN, DROPOUT, INIT, VIEW = range(6)


def generator(seed: int, *purpose: int) -> np.random.Generator:
    """The random numbers of a run for one purpose."""
    return np.random.default_rng([seed, *purpose])


def seed_torch(seed: int, *purpose: int) -> None:
    """Seed PyTorch's own generators, from which initial weights and dropout are drawn."""
    torch.manual_seed(int(generator(seed, *purpose).integers(2**62)))


@dataclasses.dataclass(frozen=True)
class Chance:
    """All chance of one part of an iteration: a function of seed and numbers, nothing is stored."""

    seed: int
    iteration: int  # from 0
    part: int = 0  # of the update, over all processes

    def generator(self, *purpose: int) -> np.random.Generator:
        """Random numbers of this part for one purpose."""
        return generator(self.seed, *purpose, self.iteration, *([self.part] if self.part else []))

    def coin(self) -> bool:
        """A coin flip, the same one whenever it is asked for, in every part."""
        return bool(generator(self.seed, COIN, self.iteration).random() < 0.5)

    def seed_dropout(self, phase: int) -> None:
        later = [self.part, phase] if self.part or phase else []
        seed_torch(self.seed, DROPOUT, self.iteration, *later)


# ---- the contract ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stream:
    """One of the batches that an update receives: where its frames come from."""

    side: str  # domain: "src" or "tgt"
    split: str
    frames: int  # of one batch
    labels: bool  # whether its labels are read; then every frame has to have them
    number: int  # keeps its chance (order of frames, augmentation) apart from other streams'
    weights: str = ""  # the setting that holds its class weights, computed where it is empty
    pseudo: bool = False  # whether it receives the pseudo-labels of a first stage
    depth: bool = False  # whether its batches have a depth image
    weak: bool = False  # whether its images keep their colours
    few: bool = False  # whether it holds the labels of few points: see `index.few_labels`


class System(nn.Module):
    """A trainable method. Its state dict is the checkpoint.

    Args:
        r: the recipe, of this class's `Recipe`. seed: of the initial weights.
        training: False leaves out the networks that prediction does not need.
    """

    Recipe: ClassVar[type[Recipe]] = Recipe
    heads: ClassVar[tuple[str, ...]] = ("2d", "3d", "2d+3d")  # keys of predict(); the last one
    # chooses the best checkpoint
    pseudo_heads: ClassVar[tuple[str, ...]] = ("2d", "3d")  # what `ftd pseudo` stores
    training_only: ClassVar[tuple[str, ...]] = ()  # networks that only training needs
    teachers: ClassVar[Mapping[str, str]] = {}  # a network -> its moving average
    source_free: ClassVar[bool] = False  # starts from a trained network instead of source data ...
    inherited: ClassVar[tuple[str, ...]] = ()  # ... and takes these settings from it
    note: ClassVar[str] = ""  # what a user has to know of it, said at start-up

    # Settings by scenario; for pairs of domains that no row is about; of the preset `small`.
    scenarios: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    default: ClassVar[Mapping[str, Any]] = {}
    small: ClassVar[Mapping[str, Any]] = SMALL
    # Settings that --ssda and a second stage on pseudo-labels add; empty: the system has none.
    semi_supervised: ClassVar[Mapping[str, Any]] = {}
    second_stage: ClassVar[Mapping[str, Any]] = {}
    small_crop: ClassVar[Mapping[str, Any]] = SMALL_CROPPED  # where training draws crops

    recipe: Any  # Recipe; a subclass reads settings of its own

    def __init__(self, r: Any, seed: int = 0, training: bool = True) -> None:
        super().__init__()
        self.recipe = r

    @staticmethod
    def streams(r: Any) -> dict[str, Stream]:
        """The batches that `forward` receives."""
        raise TypeError("a system names its streams")

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One a phase, in the order in which the phases of an iteration run.

        The loop puts the whole system into train mode; a network that stays frozen overrides
        `train`.
        """
        raise TypeError("a system names its optimizers")

    def forward(self, phase: str, batches: dict[str, Batch], chance: Chance) -> dict[str, Tensor]:
        """The weighted loss terms of one update, of another name in each phase: their sum is
        minimised, they are logged."""
        raise TypeError("a system computes its losses")

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Begin as a trained network, of its `camera_network`. For a system without source data."""
        raise TypeError("a system without source data starts from a network")

    def rate(self, iteration: int) -> float:
        """Factor of the learning rates at an iteration, from 0: gamma at each milestone passed."""
        r = self.recipe
        return r.gamma ** sum(iteration >= milestone for milestone in r.milestones)

    def resting(self, phase: str, iteration: int) -> bool:
        """Whether a phase is left out of an iteration, from 0."""
        return False

    def after_step(self, iteration: int) -> None:
        """Called after the last phase of an iteration, counted from 1."""

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Probabilities (N, K) of every head."""
        raise TypeError("a system predicts")

    def encoders(self) -> list[nn.Module]:
        """The networks that ImageNet weights go into."""
        return []

    def frozen(self) -> str | None:
        """Digest of weights that it reads and its checkpoint does not hold; None: it needs none."""
        return None

    def audit(self, batches: Iterator[Batch]) -> list[dict[str, Any]]:
        """What a system measures of itself on the labelled validation split: rows of audit.csv.

        Called at each validation, in eval mode. Nothing that it finds may enter the training.
        """
        return []

    def camera_network(self) -> dict[str, Tensor]:
        """The tensors of the network that labels an image alone, named as in `image.Camera`.

        What a method without source data starts from. Raises RecipeError where there is none.
        """
        raise RecipeError(f"{self.recipe.method} has no network that sees the image alone")

    @classmethod
    def cost(cls, r: Any) -> float:
        """Work of one iteration in forward passes of a frame, for estimates of time."""
        return 3.0 * sum(stream.frames for stream in cls.streams(r).values())


# ---- methods -----------------------------------------------------------------------------------


class Method(NamedTuple):
    """A row of `METHODS`: a system and the settings that make it this method."""

    module: str  # below ftdpp.systems; with a dot in it, any module
    settings: Mapping[str, Any] = {}
    semi_supervised: bool = False  # whether it can use labelled target frames beside the source
    unsupervised: bool = True  # whether it can do without them
    dense: str = ""  # the module that takes its place on dense data sets; empty: it needs points


NO_TEACHER = {"distill_single": 0.0, "distill_fused": 0.0, "student_mix": 1.0}
_NO_MIMICRY = {"mimic_src": 0.0, "mimic_tgt": 0.0}
_ORACLE = {**_NO_MIMICRY, "supervised": "target", "class_weights": ()}

METHODS: dict[str, Method] = {
    "source-only": Method("family", _NO_MIMICRY, dense="image"),
    "source-only-fusion": Method("ftdpp", {**NO_TEACHER, **_NO_MIMICRY}),
    "source-target": Method("family", _NO_MIMICRY, semi_supervised=True, unsupervised=False),
    "minent": Method("family", {**_NO_MIMICRY, "entropy": 1e-3}, semi_supervised=True),
    "logcoral": Method("family", {**_NO_MIMICRY, "logcoral": 1.0}, semi_supervised=True),
    "fda": Method("family", {**_NO_MIMICRY, "student_fda": 0.1}),
    "xmuda": Method("family", semi_supervised=True),
    "bftd": Method("bftd"),
    "ftdpp": Method("ftdpp", semi_supervised=True),
    "self-training": Method("crossmatch", {"auxiliary": False}, dense="crossmatch"),
    "crossmatch": Method("crossmatch", dense="crossmatch"),
    "clip-source-only": Method("clip2uda", {"prompts": False, **_NO_MIMICRY}),
    "clip-xmuda": Method("clip2uda", {"prompts": False}),
    "clip2uda": Method("clip2uda"),
    "weak": Method("weak"),
    "target-only": Method("family", _ORACLE, semi_supervised=True, dense="image"),
}
PRESETS = ("paper", "small")


def recipe(
    scenario: str,
    method: str = "ftdpp",
    preset: str = "paper",
    pseudo: bool = False,
    overrides: Sequence[str] = (),
    source: Any = None,
) -> Any:
    """The recipe of a run: scenario row, method row, preset, second stage, user's overrides.

    Args:
        scenario: SOURCE-TARGET, with -ssda behind it for semi-supervised adaptation.
        pseudo: second stage, on pseudo-labels.
        overrides: "name=value" strings, parsed to the setting's type; a tuple is written 40,50.
        source: the recipe of the network that a system without source data starts from.
    Returns:
        an instance of the system's own `Recipe`.
    Raises:
        RecipeError: an unknown name (with the closest known one), a value that cannot work, or a
            setting that the method does not read.
    """
    for what, found, known in (("method", method, METHODS), ("preset", preset, PRESETS)):
        if found not in known:
            raise unknown(what, found, list(known))
    row, system = METHODS[method], system_of(method, scenario)
    if scenario.endswith("-ssda") and not row.semi_supervised:
        able = ", ".join(methods_for(scenario))
        hint = f", or use: {able}" if able else ""
        raise RecipeError(f"{method} has no semi-supervised form; drop --ssda{hint}")
    if not scenario.endswith("-ssda") and not row.unsupervised:
        raise RecipeError(f"{method} needs labelled frames of the target; add --ssda")
    scenario_row = system.scenarios.get(scenario)
    if scenario_row is None:
        scenario_row = {**default_row(scenario, list(system.scenarios)), **system.default}
        scenario_row |= system.semi_supervised if scenario.endswith("-ssda") else {}
    fields = {field.name for field in dataclasses.fields(system.Recipe)}
    own = {name: value for name, value in row.settings.items() if name in fields}
    values = {**scenario_row, **own}
    if preset == "small":
        values |= {**system.small, **(system.small_crop if "crop" in values else {})}
    if source is not None:
        values |= {n: getattr(source, n) for n in system.inherited if hasattr(source, n)}
    if pseudo and not system.second_stage:
        raise RecipeError(f"{method} has no second stage on pseudo-labels; drop --pseudo")
    values |= system.second_stage if pseudo else {}
    base: Any = system.Recipe(scenario=scenario, method=method, **values)
    made = override(base, overrides)
    made.check()
    _check_classes(made)
    if pseudo and not made.second_stage:
        raise RecipeError("--pseudo needs a pseudo weight above 0")
    return made


def _check_classes(r: Recipe) -> None:
    """Refuse a class set that the scenario's data sets do not share."""
    if not _strange(r.scenario):
        domains = readers.domains()
        names = r.scenario.removesuffix("-ssda").split("-")
        shared = common_class_sets(*(domains[name] for name in names))
        if r.classes not in shared:
            known, why = ", ".join(shared), ""
            if "classes" in r.lacking():
                why = f"; the source model has them: train one with --set classes={shared[0]}"
            raise RecipeError(f"classes={r.classes}: {r.scenario} has labels for: {known}{why}")


def methods_for(scenario: str, second_stage: bool = False) -> list[str]:
    """The methods that have a form for a scenario, and for its second stage."""

    def fits(name: str, row: Method) -> bool:
        form = row.semi_supervised if scenario.endswith("-ssda") else row.unsupervised
        if not form or (is_dense(scenario) and not row.dense):
            return False
        system = system_of(name, scenario)
        if second_stage and not system.second_stage:
            return False
        return scenario in system.scenarios or not _strange(scenario)

    return [name for name, row in METHODS.items() if fits(name, row)]


def known_scenarios() -> list[str]:
    """The scenarios that have a row in a system."""
    modules = [m for row in METHODS.values() for m in (row.module, row.dense) if m]
    systems = [_load(module) for module in dict.fromkeys(modules)]
    return list(dict.fromkeys(name for system in systems for name in system.scenarios))


def _load(module: str) -> type[System]:
    return import_module(module if "." in module else f"ftdpp.systems.{module}").System


def _strange(scenario: str) -> list[str]:
    """The domains of a scenario that no reader has."""
    names = scenario.removesuffix("-ssda").split("-")
    return [name for name in names if name not in readers.domains()]


def system_of(method: str, scenario: str) -> type[System]:
    """The class that trains a method on a scenario.

    Raises:
        RecipeError: the method needs points and a data set of the scenario has none.
    """
    row, module = METHODS[method], METHODS[method].module
    if is_dense(scenario):
        if not row.dense:
            able = ", ".join(name for name, other in METHODS.items() if other.dense)
            raise RecipeError(f"{method} needs LiDAR points, {scenario} has none; use: {able}")
        module = row.dense
    return _load(module)


def is_source_free(method: str) -> bool:
    """Whether a method starts from a trained network instead of source data."""
    return method in METHODS and _load(METHODS[method].module).source_free


def in_paper(r: Recipe) -> bool:
    """Whether the scenario has a row of its own; if not, `default_row` was taken."""
    return r.scenario in system_of(r.method, r.scenario).scenarios


def is_dense(scenario: str) -> bool:
    """Whether a scenario has a dense data set, whose rows are pixels."""
    domains = readers.domains()
    names = [name for name in scenario.removesuffix("-ssda").split("-") if name in domains]
    return any(readers.reader_of(domains[name]).dense for name in names)


def default_row(scenario: str, known: Sequence[str]) -> dict[str, Any]:
    """Settings for a pair of domains that no paper uses: the first class set that they share.

    Raises:
        RecipeError: an unknown domain, no common class set, or no labelled part of the target.
    """
    domains = readers.domains()
    names = scenario.removesuffix("-ssda").split("-")
    if len(names) != 2:
        raise unknown("scenario", scenario, known)
    for name in names:
        if name not in domains:
            raise unknown("domain", name, list(domains))
    source, target = (domains[name] for name in names)
    shared = common_class_sets(source, target)
    if not shared:
        raise RecipeError(f"{source.name} and {target.name} have no class set in common")
    first, second = (readers.reader_of(domain) for domain in (source, target))
    row: dict[str, Any] = {"classes": shared[0], "image": second.image or (0, 0)}
    if first.crop or second.crop:  # images of several sizes: training on crops, one at a time else
        size = second.image or first.image  # where one has a size of its own, crops of that size
        row |= {"crop": size or second.crop or first.crop, "image": size or (0, 0)}
        row |= {"batch": 4, "eval_batch": 1}
    if scenario.endswith("-ssda") and "train_labelled" not in target.splits:
        raise RecipeError(f"--ssda: {target.name} has no split train_labelled; drop --ssda")
    return row


def build(r: Recipe, seed: int = 0, training: bool = True) -> Any:
    """The system of a recipe, with the initial weights of a seed."""
    return system_of(r.method, r.scenario)(r, seed, training)
