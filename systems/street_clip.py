"""The street CLIP: a small CLIP for the built-in world, trained here once and kept in the cache.

A real CLIP saw 400 million pictures of the web and their captions. This one stands in for it where
nothing may be downloaded: it sees randomised streets (mixed from all cities, repainted, under
random light) and captions of what stands in them. None of the worlds that a scenario trains or
tests on is among them. It is of the same class, and saved in the same format, as any other.

In a large CLIP the patches come to mean what the whole does by themselves. One so small, trained
for minutes, does not get there, so captions are also given to windows of a few patches.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ftdpp.files import Progress, locked
from ftdpp.processes import in_processes
from ftdpp.readers.base import Array, euler, unit_rotation
from ftdpp.world import cast, rig, scene

VERSION = 1  # of what the training gives; another number is another folder
STREETS, VIEWS = 260, 2  # streets, and pictures of each
HEIGHT, WIDTH = 128, 224  # of a picture
STEPS, BATCH, WINDOWS, RATE = 450, 16, 32, 2e-3
THREADS = 2  # with others, sums would come out differently
SEED = 20_240  # of the streets and of the training
VIEW = (96, 160)  # of what the network sees of it
PATCH = 8

# What a caption calls the things of the world.
WORDS = {
    "road": ("road", "street", "asphalt"),
    "lane_marking": ("road", "lane marking"),
    "parking": ("parking space", "road"),
    "sidewalk": ("sidewalk", "pavement"),
    "terrain": ("grass", "lawn", "terrain"),
    "building": ("building", "house", "facade"),
    "wall": ("wall",),
    "fence": ("fence",),
    "pole": ("pole", "lamp post"),
    "traffic_light": ("traffic light",),
    "traffic_sign": ("traffic sign",),
    "vegetation": ("tree", "vegetation", "bush"),
    "trunk": ("tree trunk",),
    "sky": ("sky",),
    "person": ("person", "pedestrian"),
    "rider": ("rider", "cyclist"),
    "car": ("car", "vehicle"),
    "van": ("van", "car", "vehicle"),
    "truck": ("truck", "vehicle"),
    "bus": ("bus", "vehicle"),
    "train": ("tram", "train"),
    "motorcycle": ("motorcycle",),
    "bicycle": ("bicycle", "bike"),
    "barrier": ("barrier",),
    "traffic_cone": ("traffic cone",),
    "other_object": ("box",),
}
FRAMES = ("a photo of a {}.", "a picture of the {}.", "{}.", "a {} in the street.")
CONFIG: dict[str, Any] = {
    "projection_dim": 64,
    "vision_config": {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": 96,
        "patch_size": PATCH,
    },
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
}

# ---- randomised streets --------------------------------------------------------------------------


def _repainted(color: scene.RGB, rng: scene.Rng) -> scene.RGB:
    """A colour of another hue and brightness."""
    tint = np.exp(rng.normal(0, 0.35, 3))
    painted = np.array(color) * tint / tint.mean() * math.exp(rng.normal(0, 0.3))
    return tuple(painted.clip(0.01, 0.9).tolist())


def _random_city(rng: scene.Rng) -> SimpleNamespace:
    """Each trait from a city drawn for it, each colour repainted."""
    cities = [row for name, row in scene.CITIES.items() if name != "any"]
    traits = {
        name: getattr(cities[rng.integers(len(cities))], name) for name in sorted(vars(cities[0]))
    }
    for name in ("road", "sidewalk", "terrain", "centre_line"):
        traits[name] = _repainted(traits[name], rng)
    for name in ("leaves", "walls", "paint", "kerb"):
        traits[name] = [_repainted(color, rng) for color in traits[name]]
    return SimpleNamespace(**traits)


def _random_light(rng: scene.Rng) -> SimpleNamespace:
    """Something between two lights of the table, varied; a quarter are nights."""
    days = [row for name, row in scene.LIGHTS.items() if name != "any" and not row.lamps]
    nights = [row for row in scene.LIGHTS.values() if row.lamps]
    kind = nights if rng.random() < 0.25 else days
    first, second = (vars(kind[i]) for i in rng.integers(len(kind), size=2))
    share, light = rng.random(), {}
    for name in sorted(first.keys() - {"like", "lamps"}):
        between = (1 - share) * np.array(first[name]) + share * np.array(second[name])
        spread = {"elevation": 0.0, "exposure": 0.2}.get(name, 0.1 if between.ndim else 0.2)
        light[name] = (between * np.exp(rng.normal(0, spread, between.shape))).tolist()
    light["grain"] = rng.uniform(0, 5)
    return SimpleNamespace(**light, lamps=first["lamps"])


def pictures(number: int) -> list[cast.Picture]:
    """Pictures of a random street, from random places with random cameras."""
    rng = np.random.default_rng([SEED, number])
    world = SimpleNamespace(cities=["random"], lights=["random"])
    scene.WORLDS["random"], scene.CITIES["random"] = world, _random_city(rng)
    scene.LIGHTS["random"] = _random_light(rng)
    try:
        street = scene.Scene("random", "random", (SEED, number), 30.0, 0.0)
    finally:
        for table in (scene.WORLDS, scene.CITIES, scene.LIGHTS):
            del table["random"]
    found = []
    for _ in range(VIEWS):
        x = rng.uniform(0, 40)
        y = street.centre(x) + street.city.side * street.lane / 2 + rng.uniform(-2, 2)
        angles = rng.normal((street.heading(x), 0, 0), (0.35, 0.05, 0.02))
        turn = unit_rotation(euler(*angles)) @ rig.OPTICAL
        focal = WIDTH * rng.uniform(0.55, 1.3)
        camera = cast.Camera(HEIGHT, WIDTH, focal, WIDTH / 2, HEIGHT / 2)
        place = np.array([x, y, rng.uniform(1.2, 2.2)])
        found.append(cast.photo(street, camera, (place, turn), rng))
    return found


def all_pictures(progress: Progress | None = None) -> list[cast.Picture]:
    """The pictures of all streets, drawn by as many processes as there are cores."""
    cores = min(len(os.sched_getaffinity(0)), STREETS)
    drawn: list[cast.Picture] = []
    with in_processes(cores) as mapped:
        for number, found in enumerate(mapped(pictures, range(STREETS))):
            if progress:
                progress(number, STREETS, "drawing streets for the street CLIP")
            drawn += found
    return drawn


def caption(label: Array, rng: scene.Rng) -> tuple[str, tuple[int, ...]]:
    """What fills a part of a picture, its largest thing or up to three: a sentence, and labels."""
    share = np.bincount(label.ravel(), minlength=len(scene.LABELS)) / label.size
    share[scene.NOISE] = 0
    largest = np.argsort(-share, kind="stable")
    count = 1 if share[largest[0]] > 0.55 else max(1, int((share > 0.12).sum()))
    named = tuple(int(i) for i in largest[: min(count, 3)])
    words = [WORDS[scene.LABELS[i]] for i in named]
    texts = dict.fromkeys(names[int(rng.integers(len(names)))] for names in words)
    frame = FRAMES[int(rng.integers(len(FRAMES)))]
    return frame.format(" and a ".join(texts)), tuple(sorted(named))


def view(picture: cast.Picture, rng: scene.Rng) -> tuple[Array, Array]:
    """A part of a picture at another scale, perhaps mirrored: (*VIEW, 3) u8 and labels VIEW."""
    (high, wide), scale = VIEW, rng.uniform(0.75, 1.0)
    height, width = round(HEIGHT * scale), round(WIDTH * scale)
    top, left = (int(rng.integers(n + 1)) for n in (HEIGHT - height, WIDTH - width))
    box, size = (left, top, left + width, top + height), (wide, high)
    image = Image.fromarray(picture.image).resize(size, Image.Resampling.BILINEAR, box)
    label = Image.fromarray(picture.label).resize(size, Image.Resampling.NEAREST, box)
    turn = -1 if rng.random() < 0.5 else 1
    return np.asarray(image)[:, ::turn], np.asarray(label)[:, ::turn]


def windows(label: Array, rng: scene.Rng) -> tuple[Array, list[tuple[str, tuple[int, ...]]]]:
    """Rectangles of patches about a view's things, whatever the things' size.

    Returns:
        which patches each has, (WINDOWS, h, w); the caption of each.
    """
    shape = tuple(n // PATCH for n in label.shape)
    inside, captions = np.zeros((WINDOWS, *shape), np.float32), []
    there = np.unique(label)
    places = {what: np.flatnonzero(label == what) for what in there}
    for chosen in inside:
        found = places[there[rng.integers(len(there))]]
        place = np.unravel_index(found[rng.integers(len(found))], label.shape)
        ends = []
        for at, n in zip(place, shape, strict=True):
            size = int(rng.integers(1, 4))
            start = int(np.clip(int(at) // PATCH - rng.integers(size), 0, n - size))
            ends.append((start, start + size))
        (top, bottom), (left, right) = ends
        chosen[top:bottom, left:right] = 1
        part = label[top * PATCH : bottom * PATCH, left * PATCH : right * PATCH]
        captions.append(caption(part, rng))
    return inside, captions


def tokens() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-pair tokenizer that knows the words of the captions.

    Of CLIP's kind: any other text falls into pieces, down to bytes. Made here, since the trainer of
    the library breaks ties at random.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    sentences = [
        frame.format(word) for words in WORDS.values() for word in words for frame in FRAMES
    ]
    merges: dict[tuple[str, str], None] = {}
    for word in dict.fromkeys(" ".join(sentences).replace(".", " ").split()):
        head = word[0]
        for i, letter in enumerate(word[1:], 2):
            tail = letter + "</w>" * (i == len(word))
            merges[head, tail] = None
            head += tail
    specials = ["<|startoftext|>", "<|endoftext|>"]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges)]
    return {piece: i for i, piece in enumerate(dict.fromkeys([*specials, *pieces]))}, list(merges)


# ---- training ------------------------------------------------------------------------------------


def contrast(image: Tensor, text: Tensor, things: Tensor, scale: Tensor) -> Tensor:
    """The loss of CLIP (Radford et al., 2021), B images and B captions against each other.

    Captions that name the same things are all right for an image: a web has few of these, a batch
    of streets is full of them.

    Args:
        image, text: (B, d), unit length. things: (B,) a number for what a caption names.
    """
    logits = scale * image @ text.t()
    same = (things[:, None] == things).to(logits.dtype)
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def loss_of(model: Any, tokenizer: Any, drawn: list[cast.Picture], rng: scene.Rng) -> Tensor:
    """The contrastive loss of a batch of views, as wholes and by windows."""
    from ftdpp.systems.clip import normalised, patch_features

    views = [view(drawn[i], rng) for i in rng.integers(len(drawn), size=BATCH)]
    captions = [caption(label, rng) for _, label in views]
    regions = [windows(label, rng) for _, label in views]
    captions += [found for _, of_windows in regions for found in of_windows]

    image = torch.from_numpy(np.stack([pixels for pixels, _ in views])).permute(0, 3, 1, 2)
    found = model.vision_model(
        normalised(image / 255), output_hidden_states=True, interpolate_pos_encoding=True
    )
    whole = model.visual_projection(found.pooler_output)
    patches = patch_features(model, found.hidden_states[-2])[:, 1:]
    inside = torch.from_numpy(np.stack([chosen for chosen, _ in regions])).flatten(2)
    parts = (inside @ F.normalize(patches, dim=-1)).flatten(0, 1)

    # Each text is read once. Captions that name the same things have the same number.
    texts, things = (list(dict.fromkeys(column)) for column in zip(*captions, strict=True))
    words = tokenizer(texts, padding=True, return_tensors="pt")
    said = F.normalize(model.get_text_features(**words).pooler_output)
    said = said[[texts.index(text) for text, _ in captions]]
    number = torch.tensor([things.index(named) for _, named in captions])

    scale = model.logit_scale.exp().clamp(max=100)
    of_wholes = contrast(F.normalize(whole), said[:BATCH], number[:BATCH], scale)
    return of_wholes + contrast(F.normalize(parts), said[BATCH:], number[BATCH:], scale)


def train(folder: Path, progress: Progress | None = None) -> None:
    """Draw the streets, train, and save model and tokenizer into `folder`."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    drawn = all_pictures(progress)
    rng = np.random.default_rng([SEED, STREETS])
    vocabulary, merges = tokens()
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    text = CONFIG["text_config"] | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = CLIPModel(CLIPConfig(**CONFIG | {"text_config": text}))
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
        for step in range(STEPS):
            if progress:
                progress(step, STEPS, "training the street CLIP")
            loss = loss_of(model, tokenizer, drawn, rng)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def folder(cache: Path) -> Path:
    """Where the street CLIP lies below a cache."""
    return cache / f"street-clip-v{VERSION}"


def build(cache: Path, progress: Progress | None = None) -> Path:
    """The folder of the street CLIP; trains it where it is missing. Whole or absent."""
    final = folder(cache)
    with locked(final):
        if not (final / "model.safetensors").is_file():
            shutil.rmtree(final, ignore_errors=True)
            partial = final.with_name(f".{final.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            train(partial, progress)
            os.replace(partial, final)
    return final
