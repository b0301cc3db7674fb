"""Frozen CLIP (Radford et al., 2021): what two systems take from image-text pretraining.

Any CLIP of `transformers`, from the hub or a folder, or the small one that is trained on generated
streets (`street_clip`). It never learns here, and no checkpoint holds it: only its digest.

    image        -> patches: hidden states at four taps, and features in the space of the texts
    class names  -> texts in the same space, by templates or behind a learned prompt
    scores       =  cosine(patch, text) / 0.07

Features of patches are computed the way of MaskCLIP (Zhou et al., 2022): in the last block, whose
attention gathers for the class token, each patch keeps its own value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ftdpp import files
from ftdpp.data import CLASS_SETS
from ftdpp.files import Progress
from ftdpp.recipe import RecipeError
from ftdpp.systems import street_clip

STREET = "street"  # the name of the built-in one
TEMPERATURE = 0.07
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the images that CLIP was trained on, RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
TAPS = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}  # blocks, by their number; else evenly spaced

TEMPLATES = ("a photo of a {}.", "a picture of the {}.", "a {} in the street.")
# What a class is called; one that is not here, by its name. A class of many things has many names.
_VEHICLES = ("car", "truck", "bus", "van", "motorcycle", "bicycle")
NAMES: dict[str, tuple[str, ...]] = {
    "vehicle": _VEHICLES,
    "driveable_surface": ("road", "street"),
    "terrain": ("grass", "lawn"),
    "manmade": ("building", "house", "wall", "fence", "pole", "traffic sign", "traffic light"),
    "vegetation": ("tree", "bush", "vegetation"),
    "vegetation_terrain": ("tree", "bush", "grass"),
    "object": ("traffic light", "traffic sign", "pole", "fence"),
    "bike": ("bicycle", "motorcycle"),
    "parking": ("parking space",),
    "nature": ("tree", "bush", "grass"),
    "other-objects": ("traffic light", "traffic sign", "pole", "fence", "wall"),
    "construction_vehicle": ("excavator", "construction vehicle"),
    "other_flat": ("traffic island",),
    "other-vehicle": ("bus", "van", "tram"),
    "bicyclist": ("cyclist", "rider on a bicycle"),
    "motorcyclist": ("rider on a motorcycle",),
    "other-ground": ("ground",),
    "trunk": ("tree trunk",),
    "person": ("person", "pedestrian"),
    "building": ("building", "house"),
    "road": ("road", "street"),
    "sidewalk": ("sidewalk", "pavement"),
    "train": ("train", "tram"),
}


class Seen(NamedTuple):
    """What a CLIP sees in B images of h x w patches."""

    dense: Tensor  # (B, dim, h, w) unit vectors in the space of the texts
    overall: Tensor  # (B, dim) unit vectors, of the whole images
    taps: list[Tensor]  # four of (B, width, h, w), from shallow to deep
    size: tuple[int, int]  # H, W of the images
    patch: int  # side of a patch, pixels

    def enlarged(self, patches: Tensor) -> Tensor:
        """Values of the patches (B, C, h, w) at each pixel (B, C, H, W), bilinear."""
        height, width = patches.shape[-2] * self.patch, patches.shape[-1] * self.patch
        full = F.interpolate(patches, (height, width), mode="bilinear")
        return full[..., : self.size[0], : self.size[1]]


def normalised(image: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as CLIP wants them."""
    mean, std = (image.new_tensor(x)[:, None, None] for x in (MEAN, STD))
    return (image - mean) / std


def scores(dense: Tensor, texts: Tensor, scale: float = 1 / TEMPERATURE) -> Tensor:
    """Cosines times a scale, (B, K, h, w).

    Args:
        dense: (B, dim, h, w) unit vectors. texts: (K, dim) or (B, K, dim) unit vectors.
    """
    texts = texts.expand(len(dense), *texts.shape[-2:])
    return scale * torch.einsum("bdhw,bkd->bkhw", dense, texts)


def patch_features(model: Any, x: Tensor) -> Tensor:
    """Tokens (B, T, width) before the last block -> (B, T, dim), as of MaskCLIP."""
    vision = model.vision_model
    last = vision.encoder.layers[-1]
    attention = last.self_attn
    x = x + attention.out_proj(attention.v_proj(last.layer_norm1(x)))
    x = x + last.mlp(last.layer_norm2(x))
    return model.visual_projection(vision.post_layernorm(x))


class FrozenCLIP:
    """A CLIP that is only looked through. Not a module: no state dict, optimiser or mode has it.

    Weights are read when they are first needed; `config` is enough to build a network beside it.
    """

    def __init__(self, name: str, config: Any, read: Callable[[], tuple[Any, Any]]) -> None:
        self.name, self.config, self._read = name, config, read
        vision, text = config.vision_config, config.text_config
        self.width: int = vision.hidden_size  # of hidden states
        self.dim: int = config.projection_dim  # of the space that images and texts share
        self.text_width: int = text.hidden_size  # of token embeddings
        self.blocks: int = vision.num_hidden_layers
        self.patch: int = vision.patch_size
        self._texts: dict[str, Tensor] = {}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, tokenizer = self._read()
        return model.eval().requires_grad_(False), tokenizer

    def model(self, device: torch.device) -> Any:
        """The CLIPModel, on a device."""
        model = self._loaded[0]
        if model.device != device:
            model.to(device)
            self._texts.clear()
        return model

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its weights."""
        total = hashlib.sha256()
        for name, tensor in sorted(self._loaded[0].state_dict().items()):
            total.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return total.hexdigest()

    @property
    def scale(self) -> float:
        """What it was trained to multiply cosines by, before a softmax."""
        return float(self._loaded[0].logit_scale.exp())

    def taps(self, chosen: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The blocks whose hidden states are taken: those chosen, or four by its depth."""
        if chosen:
            if len(chosen) != 4 or not all(0 <= tap < self.blocks for tap in chosen):
                raise RecipeError(
                    f"--set taps={','.join(map(str, chosen))}: expected four blocks in "
                    f"0..{self.blocks - 1} of {self.name}"
                )
            return chosen
        even = tuple(-(-self.blocks * (i + 1) // 4) - 1 for i in range(4))
        return TAPS.get(self.blocks, even)

    @torch.no_grad()
    def look(self, image: Tensor, taps: tuple[int, ...] = ()) -> Seen:
        """Images (B, 3, H, W) in [0, 1], padded to whole patches at the right and the bottom."""
        model = self.model(image.device)
        vision, size = model.vision_model, (image.shape[-2], image.shape[-1])
        padded = F.pad(image, (0, -size[1] % self.patch, 0, -size[0] % self.patch))
        found = vision(
            pixel_values=normalised(padded), output_hidden_states=True,
            interpolate_pos_encoding=True,
        )  # fmt: skip
        height, width = (n // self.patch for n in padded.shape[-2:])

        def patches(tokens: Tensor) -> Tensor:  # (B, 1 + h w, C) -> (B, C, h, w)
            return tokens[:, 1:].unflatten(1, (height, width)).permute(0, 3, 1, 2)

        dense = patch_features(model, found.hidden_states[-2])
        overall = model.visual_projection(found.pooler_output)
        states = [found.hidden_states[tap + 1] for tap in self.taps(taps)]
        return Seen(
            dense=F.normalize(patches(dense), dim=1),
            overall=F.normalize(overall, dim=1),
            taps=[patches(state) for state in states],
            size=size,
            patch=self.patch,
        )

    def texts(self, classes: str, device: torch.device | str = "cpu") -> Tensor:
        """Texts of a class set, (K, dim) unit vectors: the mean over names and templates."""
        model = self.model(torch.device(device))
        if classes not in self._texts:
            rows = []
            for name in CLASS_SETS[classes]:
                words = [t.format(word) for word in names_of(name) for t in TEMPLATES]
                tokens = self._loaded[1](words, padding=True, return_tensors="pt").to(model.device)
                with torch.no_grad():
                    found = F.normalize(model.get_text_features(**tokens).pooler_output, dim=1)
                rows.append(F.normalize(found.mean(0), dim=0))
            self._texts[classes] = torch.stack(rows)
        return self._texts[classes]

    def prompted(self, context: Tensor, classes: str) -> Tensor:
        """Texts of a class set behind a learned context, (K, dim); not of unit length.

        The context stands for the first words of the sentence, before the name; a class of several
        names has their mean. Its gradient passes through the frozen text encoder.

        Args:
            context: (n, text_width) token embeddings.
        """
        model, tokenizer, n = self.model(context.device), self._loaded[1], len(context)
        names = [names_of(name) for name in CLASS_SETS[classes]]
        flat = [word for words in names for word in words]
        tokens = tokenizer(flat, padding=True, return_tensors="pt").to(context.device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        longest = self.config.text_config.max_position_embeddings
        if ids.shape[1] + n > longest:
            raise RecipeError(
                f"--set prompt_length={n}: with the longest class name that makes "
                f"{ids.shape[1] + n} tokens, {self.name} reads {longest}; use a shorter prompt"
            )
        places = ids[:, :1].expand(-1, n)  # of the context, behind the first token
        ids = torch.cat([ids[:, :1], places, ids[:, 1:]], 1)
        mask = torch.cat([mask[:, :1], torch.ones_like(places), mask[:, 1:]], 1)

        def put(module: Any, args: Any, embedded: Tensor) -> Tensor:
            learned = context.expand(len(embedded), -1, -1)
            return torch.cat([embedded[:, :1], learned, embedded[:, 1 + n :]], 1)

        # The library's own forward, but for these embeddings.
        handle = model.text_model.embeddings.token_embedding.register_forward_hook(put)
        try:
            found = model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        finally:
            handle.remove()
        found = F.normalize(found, dim=1)
        parts = found.split([len(words) for words in names])
        return torch.stack([part.mean(0) for part in parts])


def names_of(name: str) -> tuple[str, ...]:
    """What a class is called in a text."""
    return NAMES.get(name, (name.replace("_", " ").replace("-", " "),))


# ---- where it comes from -------------------------------------------------------------------------


def _library() -> Any:
    """The library, an extra of this package."""
    try:
        import transformers
    except ImportError:
        raise RecipeError(
            "a frozen CLIP needs the library transformers; type: pip install '.[clip]'"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load(name: str) -> FrozenCLIP:
    """A CLIP by its name; one that was loaded before is the same object.

    Args:
        name: `street`, a folder, or a name on the hub such as openai/clip-vit-base-patch16.
    Raises:
        RecipeError: the library is not installed, or there is no CLIP of this name. What is wrong
        with its weights is said when they are first needed.
    """
    if name == STREET:
        return _load(name, str(street_clip.folder(files.cache_home())))
    return _load(name, str(Path(name).resolve()) if Path(name).is_dir() else name)


@cache
def _load(name: str, where: str) -> FrozenCLIP:
    library = _library()

    def missing(error: object) -> RecipeError:
        reason = str(error).strip().split("\n")[0]
        if name == STREET:
            return RecipeError(
                f"{where}: no street CLIP is there ({reason}); train it with: ftd clip; or name "
                "with --cache the folder in which it is"
            )
        return RecipeError(
            f"--clip {name}: neither a folder with a CLIP nor one that the hub gave ({reason}); "
            "name a folder with config.json, model.safetensors and the tokenizer's files, or "
            "--clip openai/clip-vit-base-patch16"
        )

    # The library raises whatever a damaged file provokes, and takes defaults for what is missing.
    def read() -> tuple[Any, Any]:
        try:
            # Safetensors only: another file could run code.
            model, found = library.CLIPModel.from_pretrained(
                where, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = library.CLIPTokenizer.from_pretrained(where)
        except Exception as error:
            raise missing(error) from None
        if lost := sorted(found["missing_keys"]):
            raise missing(f"model.safetensors has no {lost[0]}")
        if len(tokenizer) < model.config.text_config.vocab_size:
            raise missing("the tokenizer's files are missing or another's")
        return model, tokenizer

    if name == STREET:
        config = library.CLIPConfig(**street_clip.CONFIG)
    else:
        try:
            if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
                raise OSError("no config.json in it")
            config = library.CLIPConfig.from_pretrained(where)
        except Exception as error:
            raise missing(error) from None
        if config.model_type != "clip":
            raise missing(f"its config.json is of a {config.model_type}")
    return FrozenCLIP(name, config, read)


def make_ready(name: str, progress: Progress | None = None) -> FrozenCLIP:
    """A CLIP whose weights are there and whole; the street CLIP is trained where it is missing.

    Raises:
        RecipeError: as `load`, and for anything wrong with the weights or the tokenizer.
    """
    _library()
    if name == STREET:
        street_clip.build(files.cache_home(), progress)
    looker = load(name)
    assert looker.digest
    return looker
