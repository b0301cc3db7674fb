"""Frozen CLIP beside the library's own forward; the street CLIP; CLIP2UDA."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftdpp import checkpoint, runs, systems, train
from ftdpp.data import CLASS_SETS, IGNORE, Batch
from ftdpp.recipe import RecipeError
from ftdpp.systems import clip, clip2uda, street_clip
from ftdpp.systems.clip import FrozenCLIP
from ftdpp.tests.commands import ftd, words
from ftdpp.tests.random_clip import DIM, PATCH, SIDE, WIDTH, write_clip
from ftdpp.world import scene


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "random")


@pytest.fixture(scope="module")
def looker(folder: Path) -> FrozenCLIP:
    return clip.load(str(folder))


def images(height: int, width: int) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))


# ---- beside the library --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(SIDE, SIDE), (24, 56), (19, 45)])
def test_what_it_sees_is_what_the_library_gives(looker: FrozenCLIP, size: tuple[int, int]) -> None:
    """Hidden states, overall features; and dense features by the library's own forward with an
    attention in the last block that lets each patch keep its value."""
    image, (height, width) = images(*size), size
    seen = looker.look(image)
    rows, cols = -(-height // PATCH), -(-width // PATCH)
    padded = F.pad(image, (0, cols * PATCH - width, 0, rows * PATCH - height))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (clip.MEAN, clip.STD))
    pixels, model = (padded - mean) / std, looker.model(torch.device("cpu"))
    options = {"interpolate_pos_encoding": True}
    with torch.no_grad():
        states = model.vision_model(pixels, output_hidden_states=True, **options).hidden_states
        overall = model.get_image_features(pixels, **options).pooler_output
    torch.testing.assert_close(seen.overall, F.normalize(overall, dim=1))
    for tap, state in zip(seen.taps, states[1:], strict=True):  # four blocks: each is a tap
        assert tap.shape == (2, WIDTH, rows, cols)
        torch.testing.assert_close(tap.flatten(2).mT, state[:, 1:])

    attention = model.vision_model.encoder.layers[-1].self_attn

    def own_value(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return module.out_proj(module.v_proj(kwargs["hidden_states"])), None

    handle = attention.register_forward_hook(own_value, with_kwargs=True)
    try:
        with torch.no_grad():
            tokens = model.vision_model(pixels, **options).last_hidden_state
            dense = model.visual_projection(model.vision_model.post_layernorm(tokens))
    finally:
        handle.remove()
    assert seen.dense.shape == (2, DIM, rows, cols)
    torch.testing.assert_close(seen.dense.flatten(2).mT, F.normalize(dense[:, 1:], dim=2))
    assert seen.enlarged(seen.dense).shape == (2, DIM, height, width)


def test_enlarged_is_bilinear_between_the_centres_of_patches(looker: FrozenCLIP) -> None:
    seen = looker.look(images(19, 45))
    values = torch.arange(3.0)[:, None] * 10 + torch.arange(6.0)
    full = seen.enlarged(values.expand(2, 1, 3, 6))[0, 0]
    for row, col in ((4, 12), (9, 21), (18, 44), (0, 0)):
        y, x = ((n + 0.5) / PATCH - 0.5 for n in (row, col))
        y, x = min(max(y, 0), 2), min(max(x, 0), 5)
        assert float(full[row, col]) == pytest.approx(10 * y + x, abs=1e-4)


def test_texts_are_means_over_names_and_templates(looker: FrozenCLIP) -> None:
    model, tokenizer = looker._loaded
    found = looker.texts("street6")
    for k, name in enumerate(CLASS_SETS["street6"]):
        rows = []
        for word in clip.NAMES.get(name, (name,)):
            for template in clip.TEMPLATES:
                tokens = tokenizer([template.format(word)], return_tensors="pt")
                with torch.no_grad():
                    feature = model.get_text_features(**tokens).pooler_output[0]
                rows.append(feature / feature.norm())
        mean = torch.stack(rows).mean(0)
        torch.testing.assert_close(found[k], mean / mean.norm())
    assert looker.texts("street6") is found, "computed once"


def test_scores_are_cosines_over_the_temperature(looker: FrozenCLIP) -> None:
    seen, texts = looker.look(images(24, 56)), looker.texts("street6")
    found = clip.scores(seen.dense, texts)
    for b, k, y, x in ((0, 0, 0, 0), (1, 5, 2, 6), (0, 3, 1, 4)):
        cosine = float(seen.dense[b, :, y, x] @ texts[k])
        assert float(found[b, k, y, x]) == pytest.approx(cosine / 0.07, rel=1e-4)


def test_a_context_of_words_gives_the_text_of_the_sentence(looker: FrozenCLIP) -> None:
    """Learned vectors stand where words stand: those of real words give the library's feature."""
    model, tokenizer = looker._loaded
    ids = tokenizer(["a photo of a"])["input_ids"][0][1:-1]
    context = model.text_model.embeddings.token_embedding.weight[ids].detach().requires_grad_()
    found = looker.prompted(context, "skitti19")
    for k, name in enumerate(CLASS_SETS["skitti19"]):
        sentences = [f"a photo of a {word}" for word in clip.names_of(name)]
        features = [
            model.get_text_features(**tokenizer([text], return_tensors="pt")).pooler_output[0]
            for text in sentences
        ]
        mean = torch.stack([f / f.norm() for f in features]).mean(0)
        torch.testing.assert_close(found[k], mean, atol=1e-5, rtol=1e-5)
    found.square().sum().backward()
    assert context.grad is not None and context.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_taps(looker: FrozenCLIP) -> None:
    assert looker.taps() == (0, 1, 2, 3)
    assert looker.taps((3, 2, 1, 0)) == (3, 2, 1, 0)
    with pytest.raises(RecipeError, match=r"taps=0,1,2,4.*four blocks in 0\.\.3"):
        looker.taps((0, 1, 2, 4))
    for blocks, wanted in ((12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (6, (1, 2, 4, 5))):
        looker_like = FrozenCLIP("other", looker.config, lambda: (None, None))
        looker_like.blocks = blocks
        assert looker_like.taps() == wanted


# ---- what is refused -----------------------------------------------------------------------------


def test_without_the_library_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for ask in (lambda: clip.load(str(tmp_path)), lambda: clip.make_ready("street")):
        with pytest.raises(RecipeError, match=r"transformers.*pip install '\.\[clip\]'"):
            ask()


def test_a_folder_without_a_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"(?s)--clip .*neither a folder with a CLIP.*config"):
        clip.load(str(tmp_path))


def test_no_pickle_is_read(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "pickled"
    place.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (place / file.name).write_bytes(file.read_bytes())
    torch.save({"a": torch.zeros(1)}, place / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"model\.safetensors"):
        clip.load(str(place)).look(images(SIDE, SIDE))


def test_a_street_clip_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FTD_CACHE", str(tmp_path))
    clip._load.cache_clear()
    with pytest.raises(RecipeError, match="train it with: ftd clip"):
        clip.load("street").look(images(SIDE, SIDE))
    clip._load.cache_clear()


def copied(folder: Path, place: Path) -> Path:
    shutil.copytree(folder, place)
    return place


def damage(place: Path, what: str) -> None:
    weights = place / "model.safetensors"
    if what == "a tensor is missing":
        tensors = load_file(weights)
        del tensors["text_model.final_layer_norm.weight"]
        save_file(tensors, weights, {"format": "pt"})
    elif what == "no tokenizer":
        for file in place.glob("*token*"):
            file.unlink()
    elif what == "cut off":
        weights.write_bytes(weights.read_bytes()[:3000])
    elif what == "another kind":
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    else:
        (place / what).write_text("[]")


@pytest.mark.parametrize(
    "what",
    [
        *("a tensor is missing", "no tokenizer", "cut off", "another kind"),
        *("config.json", "tokenizer.json"),
    ],
)
def test_a_damaged_clip_is_refused_before_anything_is_prepared(
    what: str, folder: Path, world: Path, tmp_path: Path
) -> None:
    """The library would take random weights, or a tokenizer without words, and say nothing."""
    place = copied(folder, tmp_path / "clip")
    damage(place, what)
    with pytest.raises(RecipeError, match=r"(?s)--clip .*name a folder with"):
        begin(place, world, tmp_path / "cache", tmp_path / "run")
    assert not (tmp_path / "cache").exists()


def test_half_precision_on_disk_is_read_as_single(folder: Path, tmp_path: Path) -> None:
    place = copied(folder, tmp_path / "clip")
    weights = place / "model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(half, weights, {"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert clip.make_ready(str(place)).look(images(SIDE, SIDE)).dense.dtype == torch.float32


# ---- the street CLIP -----------------------------------------------------------------------------


def test_captions_name_what_fills_the_crop() -> None:
    rng = np.random.default_rng(0)
    label = np.full((40, 40), scene.CODES["road"], np.uint8)
    text, things = street_clip.caption(label, rng)
    assert any(word in text for word in street_clip.WORDS["road"])
    assert things == (scene.CODES["road"],)
    label[:18] = scene.CODES["car"]  # 43 per cent, and a pole that is too small to be named
    label[:, :2] = scene.CODES["pole"]
    for _ in range(20):
        text, things = street_clip.caption(label, rng)
        assert things == (scene.CODES["road"], scene.CODES["car"])
        assert any(word in text for word in street_clip.WORDS["car"])
        assert any(word in text for word in street_clip.WORDS["road"])
        assert "pole" not in text and "lamp" not in text


def test_every_thing_of_the_world_has_words() -> None:
    assert set(street_clip.WORDS) | {"noise"} == set(scene.LABELS)


def test_random_streets_leave_the_world_as_it_was() -> None:
    before = {name: list(getattr(scene, name)) for name in ("WORLDS", "CITIES", "LIGHTS")}
    first, second = (street_clip.pictures(0) for _ in range(2))
    assert before == {name: list(getattr(scene, name)) for name in before}
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.image, b.image) and np.array_equal(a.label, b.label)
    assert len(np.unique(first[0].label)) > 4 and first[0].image.std() > 10


def test_contrast_is_the_slow_loop() -> None:
    """Cross-entropy both ways; where captions are equal, each is as right as the other."""
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 7, generator=generator)) for _ in range(2))
    captions = ["a", "b", "a", "c", "b"]
    total = 0.0
    for rows, cols in ((image, text), (text, image)):
        for i in range(5):
            logits = [4.0 * float(rows[i] @ cols[j]) for j in range(5)]
            log_sum = np.log(np.sum(np.exp(logits)))
            right = [j for j in range(5) if captions[j] == captions[i]]
            total += sum(log_sum - logits[j] for j in right) / len(right) / 5 / 2
    found = street_clip.contrast(image, text, torch.tensor([0, 1, 0, 2, 1]), torch.tensor(4.0))
    assert float(found) == pytest.approx(total, rel=1e-5)


def test_the_street_clip_is_built_once_and_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of cores that draw."""
    for name, value in {"STREETS": 2, "STEPS": 2, "BATCH": 4, "THREADS": 1}.items():
        monkeypatch.setattr(street_clip, name, value)
    told: list[str] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    first = street_clip.build(tmp_path / "a", lambda done, total, what: told.append(what))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    second = street_clip.build(tmp_path / "b")
    for file in ("model.safetensors", "tokenizer.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert any("drawing" in what for what in told) and any("training" in what for what in told)
    told.clear()
    assert street_clip.build(tmp_path / "a", lambda *_: told.append("again")) == first
    assert not told, "once"
    stored = json.loads((first / "config.json").read_text())
    for part in ("vision_config", "text_config"):
        for name, value in street_clip.CONFIG[part].items():
            assert stored[part][name] == value


def test_a_killed_build_leaves_nothing_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path, progress: Any = None) -> None:
        (folder / "model.safetensors").write_text("half")
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    def whole(folder: Path, progress: Any = None) -> None:
        assert not list(folder.iterdir()), "what the killed one left is gone"
        (folder / "model.safetensors").write_text("whole")

    monkeypatch.setattr(street_clip, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        street_clip.build(tmp_path)
    assert not street_clip.folder(tmp_path).exists()
    monkeypatch.setattr(street_clip, "train", whole)
    built = street_clip.build(tmp_path)
    assert built == street_clip.folder(tmp_path)
    assert [file.name for file in built.iterdir()] == ["model.safetensors"]


# ---- CLIP2UDA: its parts -------------------------------------------------------------------------


def batch_of(counts: tuple[int, ...] = (7, 5), height: int = 19, width: int = 45) -> Batch:
    rng = np.random.default_rng(0)
    n = sum(counts)
    pixel = np.stack([rng.integers(0, height, n), rng.integers(0, width, n)], 1)
    frame = np.repeat(np.arange(len(counts)), counts)
    coords = np.concatenate([frame[:, None], rng.integers(0, 40, (n, 3))], 1)
    label = rng.integers(0, 6, n)
    label[::4] = IGNORE
    return Batch(
        image=torch.rand(len(counts), 3, height, width, generator=torch.Generator().manual_seed(1)),
        pixel=torch.from_numpy(pixel),
        label=torch.from_numpy(label),
        tokens=[str(i) for i in range(len(counts))],
        keep=[torch.arange(count) for count in counts],
        counts=list(counts),
        coords=torch.from_numpy(coords.astype(np.int32)),
    )


def system_of(folder: Path, *overrides: str, method: str = "clip2uda") -> clip2uda.System:
    chosen = ["batch=2", f"clip={folder}", "class_weights=1,2,1,1,3,1", *overrides]
    r = systems.recipe("usa-singapore", method, "small", overrides=chosen)
    return systems.build(r, 0)


@pytest.mark.parametrize("pixels", [2.0, 8.0, 16.0, 3.5])
def test_scattered_is_the_slow_loop(pixels: float) -> None:
    batch = batch_of()
    feat = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    height, width = (int((n - 1) / pixels) + 1 for n in (19, 45))
    found = clip2uda.scattered(feat, batch, (height, width), pixels)
    for b in range(2):
        for y in range(height):
            for x in range(width):
                rows = [
                    i
                    for i in range(12)
                    if (int(batch.batch_index[i]), *(int(v / pixels) for v in batch.pixel[i]))
                    == (b, y, x)
                ]
                wanted = feat[rows].mean(0) if rows else torch.zeros(3)
                torch.testing.assert_close(found[b, :, y, x], wanted)


def test_without_gamma_prompts_are_plain_texts_exactly(folder: Path) -> None:
    made = system_of(folder)
    assert made.prompts is not None
    seen = made.clip.look(batch_of().image)
    with torch.no_grad():
        assert float(made.prompts.gamma.max()) == pytest.approx(1e-4)
        moved = made.prompts(made.clip, seen, "tgt")
        made.prompts.gamma.zero_()
        found = made.prompts(made.clip, seen, "tgt")
        plain = F.normalize(made.clip.prompted(made.prompts.context["tgt"], "street6"), dim=-1)
    assert torch.equal(found, plain.expand(2, -1, -1))
    assert not torch.equal(moved, found), "with it the image moves them"
    still = system_of(folder, "prompt_image=false")
    assert still.prompts is not None
    with torch.no_grad():
        text = still.prompts(still.clip, seen, "src")
        plain = F.normalize(still.clip.prompted(still.prompts.context["src"], "street6"), dim=-1)
    assert torch.equal(text, plain.expand(2, -1, -1))


def test_domains_share_a_prompt_or_have_their_own(folder: Path) -> None:
    own, shared = system_of(folder), system_of(folder, "prompt_domains=false")
    assert own.prompts is not None and shared.prompts is not None
    seen = own.clip.look(batch_of().image)
    with torch.no_grad():
        texts = [own.prompts(own.clip, seen, side) for side in ("src", "tgt")]
        assert not torch.equal(*texts)
        texts = [shared.prompts(shared.clip, seen, side) for side in ("src", "tgt")]
        assert torch.equal(*texts)


def reached(made: clip2uda.System, term: Tensor) -> set[str]:
    """The parts that a term gives a gradient to."""
    made.zero_grad()
    term.backward(retain_graph=True)
    parts = set()
    for name, p in made.named_parameters():
        if p.grad is not None and p.grad.abs().sum() > 0:
            deep = name.startswith(("prompts", "net"))
            parts.add(".".join(name.split(".")[: 2 if deep else 1]))
    return parts


TRUNK = "net_3d.trunk"
FLOW = {
    "prompt_src": {"prompts.context", "prompts.gamma", "prompts.layers"},
    "prompt_tgt": {"prompts.context", "prompts.gamma", "prompts.layers"},
    "seg_2d": {"decoder", "main"},
    "seg_3d": {TRUNK, "net_3d.main"},
    "mimic_2d_src": {"decoder", "mimic"},
    "mimic_3d_src": {TRUNK, "net_3d.mimic"},
    "mimic_2d_tgt": {"decoder", "mimic"},
    "mimic_3d_tgt": {TRUNK, "net_3d.mimic"},
}


def test_who_learns_from_what(folder: Path) -> None:
    """Prompts from phase one alone; what 2D loses reaches the decoder and never the 3D network."""
    made = system_of(folder).train()
    batches = {"labelled": batch_of(), "unlabelled": batch_of((4, 9))}
    found: dict[str, Tensor] = {}
    for phase in made.optimizers():
        found |= made(phase, batches, systems.Chance(0, 0))
    assert set(found) == set(FLOW)
    for name, term in found.items():
        assert reached(made, term) == FLOW[name], name
    model = made.clip.model(torch.device("cpu"))
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def slow_cross_entropy(logits: Tensor, label: Tensor, weight: list[float]) -> float:
    total, norm = 0.0, 0.0
    for row, y in zip(logits.tolist(), label.tolist(), strict=True):
        if y != IGNORE:
            log_sum = np.log(np.sum(np.exp(row)))
            total, norm = total + weight[y] * (log_sum - row[y]), norm + weight[y]
    return total / norm


def slow_kl(target: Tensor, logits: Tensor) -> float:
    total = 0.0
    for p, row in zip(target.softmax(1).tolist(), logits.tolist(), strict=True):
        log_sum = np.log(np.sum(np.exp(row)))
        total += sum(a * (np.log(a) - (b - log_sum)) for a, b in zip(p, row, strict=True))
    return total / len(logits)


def test_losses_are_the_slow_loops(folder: Path) -> None:
    made = system_of(folder, "mimic_src=0.7", "mimic_tgt=0.3").train()
    source, target = batch_of(), batch_of((4, 9))
    batches = {"labelled": source, "unlabelled": target}
    found = {
        name: term.item()
        for phase in made.optimizers()
        for name, term in made(phase, batches, systems.Chance(0, 0)).items()
    }
    with torch.no_grad():
        logits = {}
        for side, batch in (("src", source), ("tgt", target)):
            seen, points = made._known[id(batch)]
            main, mimic = made.heads_2d(batch, seen, points, side)
            text, score = made.texts(seen, side), torch.zeros(len(batch.pixel), 6)
            enlarged = seen.enlarged(seen.dense)  # cosines of bilinear features: linear, so equal
            for i, (b, (y, x)) in enumerate(
                zip(batch.batch_index.tolist(), batch.pixel.tolist(), strict=True)
            ):
                for k in range(6):
                    score[i, k] = float(enlarged[b, :, y, x] @ text[b, k]) / 0.07
            logits[side] = main, mimic, points.main, points.mimic, score
    weight = [1.0, 2.0, 1.0, 1.0, 3.0, 1.0]
    main, mimic, main_3d, mimic_3d, score = logits["src"]
    wanted = {
        "prompt_src": slow_cross_entropy(score, source.label, weight),
        "seg_2d": slow_cross_entropy(main, source.label, weight),
        "seg_3d": slow_cross_entropy(main_3d, source.label, weight),
        "mimic_2d_src": 0.7 * slow_kl(main_3d, mimic),
        "mimic_3d_src": 0.7 * slow_kl(main, mimic_3d),
    }
    main, mimic, main_3d, mimic_3d, score = logits["tgt"]
    wanted["prompt_tgt"] = slow_kl(main_3d, score)
    wanted["mimic_2d_tgt"] = 0.3 * slow_kl(main_3d, mimic)
    wanted["mimic_3d_tgt"] = 0.3 * slow_kl(main, mimic_3d)
    assert found == pytest.approx(wanted, rel=2e-3)


def test_phases_take_turns(folder: Path) -> None:
    made = system_of(folder, "alternate=2").train()
    batches = {"labelled": batch_of(), "unlabelled": batch_of((4, 9))}
    for iteration, turn in enumerate(["prompts"] * 2 + ["networks"] * 2 + ["prompts"]):
        assert [p for p in made.optimizers() if not made.resting(p, iteration)] == [turn]
        assert made(turn, batches, systems.Chance(0, iteration))
        made.after_step(iteration + 1)


def test_rows_to_compare_with_switch_parts_off(folder: Path) -> None:
    for method, terms in (
        ("clip-source-only", {"seg_2d", "seg_3d"}),
        ("clip-xmuda", {name for name in FLOW if not name.startswith("prompt")}),
    ):
        made = system_of(folder, method=method).train()
        assert made.prompts is None and list(made.optimizers()) == ["networks"]
        batches = {"labelled": batch_of(), "unlabelled": batch_of((4, 9))}
        assert set(made("networks", batches, systems.Chance(0, 0))) == terms
        with pytest.raises(RecipeError, match=r"prompt_length.*it learns no prompts"):
            system_of(folder, "prompt_length=4", method=method)


def test_points_enter_the_decoder_or_not(folder: Path) -> None:
    batch, moved = batch_of(), batch_of()
    moved.coords = moved.points.flip(0).contiguous()
    moved.coords[:, 0] = batch.points[:, 0]
    for chosen, equal in (("true", False), ("false", True)):
        made = system_of(folder, f"decoder_points={chosen}").eval()
        with torch.no_grad():
            first, second = (made.predict(b)["2d"] for b in (batch, moved))
        assert torch.equal(first, second) == equal


# ---- CLIP2UDA: a run -----------------------------------------------------------------------------


def begin(folder: Path, world: Path, cache: Path, out: Path, *more: str) -> train.Run:
    chosen = ["steps=4", "batch=2", "val_every=4", "save_every=2", "image=48,88", "milestones=2"]
    r = systems.recipe(
        "usa-singapore", "clip2uda", "small", overrides=[*chosen, f"clip={folder}", *more]
    )
    domains = {"src": "usa", "tgt": "singapore", "val": "singapore"}
    places = runs.Places({side: runs.Origin(d, world) for side, d in domains.items()}, cache)
    return runs.assemble(r, 0, out, places)[0]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def interrupted(run: train.Run, iteration: int) -> None:
    """Train up to an iteration, and stop there."""
    for event in train.fit(run):
        run.stop = isinstance(event, train.Step) and event.iteration == iteration


def test_runs_are_equal_resume_and_leave_clip_alone(
    quiet: None, folder: Path, world: Path, cache: Path, tmp_path: Path
) -> None:
    def weights() -> str:
        model = clip.load(str(folder)).model(torch.device("cpu"))
        parts = [t.numpy().tobytes() for t in model.state_dict().values()]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    before = weights()
    whole = begin(folder, world, cache, tmp_path / "whole")
    assert [type(event).__name__ for event in train.fit(whole)] == ["Step"] * 4 + ["Score"]
    assert weights() == before and not any("clip." in n for n in whole.system.state_dict())

    stopped = begin(folder, world, cache, tmp_path / "parts")
    with pytest.raises(train.Interrupted):
        interrupted(stopped, 2)
    again = begin(folder, world, cache, tmp_path / "parts")
    again.resume()
    assert again.iteration == 2
    for _ in train.fit(again):
        pass
    for name in ("last", "best"):
        first, second = (
            (tmp_path / run / f"{name}.safetensors").read_bytes() for run in ("whole", "parts")
        )
        assert first == second


def test_a_checkpoint_of_another_clip_is_refused(
    quiet: None, folder: Path, world: Path, cache: Path, tmp_path: Path
) -> None:
    place = tmp_path / "clip"
    write_clip(place, seed=0)
    run = begin(place, world, cache, tmp_path / "run", "steps=1", "val_every=1")
    for _ in train.fit(run):
        pass
    checkpoint.load(run.last_path)
    write_clip(place, seed=1)
    clip._load.cache_clear()
    with pytest.raises(checkpoint.RunError, match=r"another .* CLIP than the one here"):
        checkpoint.load(run.last_path)
    other = begin(place, world, cache, tmp_path / "run", "steps=1", "val_every=1")
    with pytest.raises(checkpoint.RunError, match="another frozen"):
        other.resume()


def test_a_resting_phase_resumes(
    quiet: None, folder: Path, world: Path, cache: Path, tmp_path: Path
) -> None:
    """Stopped before the second phase had its first turn: it has no optimiser state yet."""
    run = begin(folder, world, cache, tmp_path / "run", "alternate=3")
    with pytest.raises(train.Interrupted):
        interrupted(run, 1)
    again = begin(folder, world, cache, tmp_path / "run", "alternate=3")
    kept = load_file(again.last_path)
    lost = {k: v for k, v in kept.items() if not k.startswith("optimizer/prompts")}
    checkpoint.save(again.last_path, lost, checkpoint.read_metadata(again.last_path))
    with pytest.raises(checkpoint.RunError, match="optimizer/prompts is not complete"):
        again.resume()
    checkpoint.save(again.last_path, kept, checkpoint.read_metadata(again.last_path))
    again.resume()
    assert [type(event).__name__ for event in train.fit(again)] == ["Step"] * 3 + ["Score"]


def test_the_command(quiet: None, folder: Path, world: Path, cache: Path) -> None:
    more = ("--domain", "singapore", "--split", "val", "--data", str(world), "--cache", str(cache))
    result = ftd("clip", *more, "--clip", str(folder), "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    score = json.loads(result.stdout)
    assert score["clip"] == str(folder) and score["split"] == "val" and set(score["miou"]) == {"2d"}
    result = ftd("clip", *more, "--clip", "nowhere/at-all", "--device", "cpu")
    assert result.exit_code == 2 and "neither a folder with a CLIP" in words(result)
