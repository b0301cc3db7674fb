"""CrossMatch: streams, strong view, pseudo-labels, losses as slow loops, and the command."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ftdpp import checkpoint, compare, index, results, runs, systems, train
from ftdpp.data import CLASS_SETS, IGNORE, Batch, Frame, collate, sample
from ftdpp.pretrained import imagenet_weights
from ftdpp.systems import crossmatch, image
from ftdpp.tests import dense_layouts
from ftdpp.tests.commands import TINY, exported, ftd, same_bytes, stopped_in, train_args, words

FRAMES, HEIGHT, WIDTH, POINTS, K = 3, 20, 28, 40, 6
CPU = pytest.mark.usefixtures("on_a_cpu")


def a_recipe(*overrides: str, method: str = "crossmatch") -> Any:
    common = ("dropout=0", "batch=3", "view_jitter=0", "view_blur=0")
    return systems.recipe("usa-singapore", method, "small", overrides=[*common, *overrides])


def a_batch(seed: int = 0) -> Batch:
    """Frames with POINTS rows each at different pixels."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(FRAMES):
        xyz = rng.uniform(1, 40, (POINTS, 3)).astype(np.float32)
        places = rng.choice(HEIGHT * WIDTH, POINTS, replace=False)
        frame = Frame(
            token=str(i),
            image=rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8),
            label=rng.integers(0, K, POINTS).astype(np.uint8),
            has_label=True,
            xyz=xyz,
            pixel=np.stack(np.divmod(places, WIDTH), 1).astype(np.int16),
            depth=xyz[:, 0].copy(),
        )
        samples.append(sample(frame, None, 1, rng, depth=True))
    return collate(samples)


def opened(system: Any) -> Any:
    """With gates that are open and teachers that differ, so that nothing is equal by accident."""
    torch.manual_seed(1)
    for module in (system.auxiliary, system.auxiliary_teacher):
        for gate in module.depth.gates:
            torch.nn.init.normal_(gate)
    for p in system.main_teacher.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return system


def test_the_auxiliary_stream_begins_as_the_main_one() -> None:
    system, batch = systems.build(a_recipe()).eval(), a_batch()
    with torch.no_grad():
        main = system.main(batch.image)
        assert torch.equal(system.auxiliary(batch.image, batch.depth), main)
        taught = system.teach(batch)
        assert torch.equal(taught.main, taught.auxiliary)
        assert torch.allclose(taught.weight, torch.tensor(1.0)), "but for a logarithm's rounding"
        opened(system)
        assert not torch.equal(system.auxiliary(batch.image, batch.depth), main)


def test_it_starts_from_a_source_model() -> None:
    source = systems.build(systems.recipe("usa-singapore", "source-only", "small"), seed=3)
    system = systems.build(a_recipe(), seed=0)
    system.start_from(source.camera_network())
    batch = a_batch()
    source.eval(), system.eval()
    with torch.no_grad():
        wanted = source.predict(batch)["2d"]
        torch.testing.assert_close(system.predict(batch)["2d"], wanted, rtol=0, atol=1e-6)
        for network in (system.main, system.main_teacher):
            assert torch.equal(network(batch.image), system.auxiliary(batch.image, batch.depth))


def test_which_head_of_a_run_is_the_camera_alone() -> None:
    """With fusion the main 2D head reads the LiDAR; the mimicry head does not."""
    net = systems.build(systems.recipe("usa-singapore", "ftdpp", "small"))
    assert torch.equal(net.camera_network()["head.weight"], net.student.net_2d.mimic.weight)
    net = systems.build(systems.recipe("usa-singapore", "xmuda", "small"))
    assert torch.equal(net.camera_network()["head.weight"], net.student.net_2d.main.weight)
    net = systems.build(systems.recipe("usa-singapore", "source-only-fusion", "small"))
    with pytest.raises(systems.RecipeError, match="no network that sees the image alone"):
        net.camera_network()


# ---- the strong view -----------------------------------------------------------------------------


def test_rows_of_the_strong_view_are_the_same_places() -> None:
    batch, r = a_batch(), a_recipe("view_mix=0.6")
    view = crossmatch.strong_view(batch, r, np.random.default_rng(5))
    origin = batch.batch_index[view.row]
    moved = 0
    for n, (frame, (y, x), row) in enumerate(
        zip(view.frame.tolist(), view.pixel.tolist(), view.row.tolist(), strict=True)
    ):
        assert [y, x] == batch.pixel[row].tolist()
        shown, there = view.image[frame, :, y, x], batch.image[origin[n], :, y, x]
        assert torch.allclose(shown, there, atol=1e-6), "but for the rounding of the colours"
        assert view.depth is not None and batch.depth is not None
        assert view.depth[frame, 0, y, x] == batch.depth[origin[n], 0, y, x] > 0
        assert frame in (origin[n], (origin[n] - 1) % FRAMES)
        moved += frame != origin[n]
    assert moved > 10
    # No visible point lacks a row: inside the rectangle all of the guest's, outside all of the own.
    for b in range(FRAMES):
        changed = ((view.image[b] - batch.image[b]).abs() > 1e-5).any(0)
        rows, cols = (places.tolist() for places in torch.nonzero(changed, as_tuple=True))
        assert (max(rows) - min(rows), max(cols) - min(cols)) == (11, 16)
        visible = 0
        for frame, (y, x) in zip(batch.batch_index.tolist(), batch.pixel.tolist(), strict=True):
            inside = min(rows) <= y <= max(rows) and min(cols) <= x <= max(cols)
            visible += frame == ((b + 1) % FRAMES if inside else b)
        assert visible == (view.frame == b).sum()


def test_view_mix_0_and_1() -> None:
    batch = a_batch()
    view = crossmatch.strong_view(batch, a_recipe("view_mix=0"), np.random.default_rng(0))
    assert torch.allclose(view.image, batch.image, atol=1e-6)
    assert torch.equal(view.row, torch.arange(120))
    view = crossmatch.strong_view(batch, a_recipe("view_mix=1"), np.random.default_rng(0))
    assert torch.allclose(view.image, batch.image.roll(-1, 0), atol=1e-6)
    assert torch.equal(view.frame, (batch.batch_index - 1) % FRAMES)


def test_recolour() -> None:
    image = a_batch().image
    factors = torch.tensor([[0.5, 1.0, 1.3], [1.4, 1.0, 0.6], [0.0, 1.0, 1.5]])
    found = crossmatch.recolour(image, factors)
    for b, (bright, contrast, colour) in enumerate(factors.t().tolist()):
        x = (image[b].double() * bright).clamp(0, 1)
        x = (x.mean() + (x - x.mean()) * contrast).clamp(0, 1)
        grey = 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]
        wanted = (grey + (x - grey) * colour).clamp(0, 1)
        assert torch.allclose(found[b], wanted.float(), atol=1e-6)
    assert torch.allclose(found[1], image[1], atol=1e-6), "factors of 1 change nothing"
    assert torch.allclose(found[0, 0], found[0, 2], atol=1e-6), "no saturation: grey"


def test_blur() -> None:
    image = torch.zeros(3, 15, 17)
    image[0, 7, 8] = 1
    assert torch.equal(crossmatch.blur(image, 0.0), image)
    found = crossmatch.blur(image, 1.1)[0]
    for dy, dx in np.ndindex(5, 5):
        wanted = math.exp(-(dy**2 + dx**2) / (2 * 1.1**2))
        assert found[7 + dy, 8 + dx] / found[7, 8] == pytest.approx(wanted, rel=1e-4)
    assert found.sum() == pytest.approx(1, abs=1e-5)
    flat = torch.full((3, 6, 6), 0.3)
    assert torch.allclose(crossmatch.blur(flat, 1.0), flat, atol=1e-6), "up to the border"


# ---- pseudo-labels -------------------------------------------------------------------------------


def test_thresholds_are_running_medians() -> None:
    rng = np.random.default_rng(0)
    thresholds, medians = crossmatch.Thresholds(3, 0.7, 0.8), [0.0] * 3
    for _ in range(5):
        label = rng.integers(0, 2, 21)  # the third class is never predicted
        confidence = rng.uniform(0.3, 1, 21).astype(np.float32)
        thresholds.update(torch.from_numpy(label), torch.from_numpy(confidence))
        for c in (0, 1):
            mine = sorted(confidence[label == c])
            median = mine[(len(mine) - 1) // 2]  # the lower one
            medians[c] = 0.8 * medians[c] + 0.2 * median if medians[c] else median
    assert thresholds.median.tolist() == pytest.approx(medians, abs=1e-6)
    thresholds.median.copy_(torch.tensor([0.5, 0.95, 0.0]))
    kept = thresholds(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0.5, 0.49, 0.7, 0.69, 0.1]))
    assert kept.tolist() == [True, False, True, False, True], "no threshold above the ceiling"


@pytest.mark.parametrize("agree", [True, False])
def test_which_pseudo_labels_are_kept(agree: bool) -> None:
    system = systems.build(a_recipe(f"agree={str(agree).lower()}"))
    main = torch.tensor([[0.8, 0.2, 0], [0.9, 0.1, 0], [0.4, 0.5, 0.1]])
    auxiliary = torch.tensor([[0.7, 0.3, 0], [0.2, 0.8, 0], [0.3, 0.6, 0.1]])
    mean = (main + auxiliary) / 2
    confidence, label = mean.max(1)
    taught = crossmatch.Taught(main, auxiliary, label, confidence, torch.ones(3))
    system.thresholds.median = torch.tensor([0.5, 0.6, 0.0])
    # the first is sure; of the second the teachers disagree; the third is not sure enough
    assert system.kept(taught).tolist() == [True, not agree, False]


# ---- the losses as slow loops, and who learns from what -----------------------------------------


def terms_by_hand(system: Any, batch: Batch, chance: systems.Chance) -> dict[str, float]:
    """The step of the docstring, row by row."""
    r = system.recipe

    def at(scores: Tensor, frame: Tensor, pixel: Tensor) -> Tensor:
        rows = zip(frame.tolist(), pixel.tolist(), strict=True)
        return torch.stack([scores[b, :, y, x] for b, (y, x) in rows]).double()

    with torch.no_grad():
        place = batch.batch_index, batch.pixel
        f = at(system.main_teacher(batch.image), *place).softmax(1)
        g = at(system.auxiliary_teacher(batch.image, batch.depth), *place).softmax(1)
        label, weight = [], []
        mean = (f + g) / 2
        medians = []
        for c in range(K):
            mine = sorted(p[c].item() for p in mean if p.argmax() == c)
            medians.append(mine[(len(mine) - 1) // 2] if mine else 0.0)
        for p, q, m in zip(f, g, mean, strict=True):
            c = int(m.argmax())
            sure = m[c] >= min(medians[c], r.ceiling) - 1e-9 and p.argmax() == q.argmax()
            label.append(c if sure else None)
            pairs = zip(p, q, strict=True)
            weight.append(math.exp(-sum((a * (a / b).log()).item() for a, b in pairs)))
        view = crossmatch.strong_view(batch, r, chance.generator(systems.VIEW))
        main = at(system.main(view.image), view.frame, view.pixel).log_softmax(1)
        auxiliary = at(system.auxiliary(view.image, view.depth), view.frame, view.pixel)
        auxiliary = auxiliary.log_softmax(1)
    sums = dict.fromkeys(("pseudo_main", "pseudo_auxiliary"), 0.0)
    sums |= dict.fromkeys(("consistency_main", "consistency_auxiliary"), 0.0)
    kept = 0
    for n, row in enumerate(view.row.tolist()):
        if label[row] is not None:
            kept += 1
            sums["pseudo_main"] -= weight[row] * main[n, label[row]].item()
            sums["pseudo_auxiliary"] -= weight[row] * auxiliary[n, label[row]].item()
        for c in range(K):
            a, b = g[row, c].item(), f[row, c].item()
            sums["consistency_main"] += a * (math.log(a) - main[n, c].item())
            sums["consistency_auxiliary"] += b * (math.log(b) - auxiliary[n, c].item())
    assert 10 < kept < len(view.row) - 10
    rows = len(view.row)
    return {
        "pseudo_main": sums["pseudo_main"] / kept,
        "pseudo_auxiliary": sums["pseudo_auxiliary"] / kept,
        "consistency_main": r.consistency * sums["consistency_main"] / rows,
        "consistency_auxiliary": r.consistency * sums["consistency_auxiliary"] / rows,
    }


def test_the_step_restated_row_by_row() -> None:
    system = opened(systems.build(a_recipe("consistency=0.3"), seed=2)).eval()
    batch, chance = a_batch(), systems.Chance(0, 4)
    wanted = terms_by_hand(system, batch, chance)
    found = system("all", {"target": batch}, chance)
    assert list(found) == list(wanted)
    for name, term in found.items():
        assert term.item() == pytest.approx(wanted[name], rel=2e-4), name


@pytest.mark.parametrize(
    ("overrides", "method", "terms"),
    [
        ((), "self-training", {"pseudo_main"}),
        (("consistency=0",), "crossmatch", {"pseudo_main", "pseudo_auxiliary"}),
        (
            ("consistency_to=main",),
            "crossmatch",
            {"pseudo_main", "pseudo_auxiliary", "consistency_main"},
        ),
        (
            ("consistency_to=auxiliary", "depth=none"),
            "crossmatch",
            {"pseudo_main", "pseudo_auxiliary", "consistency_auxiliary"},
        ),
    ],
)
def test_flags(overrides: tuple[str, ...], method: str, terms: set[str]) -> None:
    r = a_recipe(*overrides, method=method)
    system = systems.build(r)
    assert system("all", {"target": a_batch()}, systems.Chance(0, 0)).keys() == terms
    stream = system.streams(r)["target"]
    assert stream.depth == (method == "crossmatch" and "depth=none" not in overrides)
    assert not stream.labels and stream.weak


def test_trust_off_counts_every_kept_label_in_full() -> None:
    system = opened(systems.build(a_recipe("trust=false"))).eval()
    assert (system.teach(a_batch()).weight == 1).all()
    system = opened(systems.build(a_recipe())).eval()
    assert (system.teach(a_batch()).weight < 1).all()


def test_who_learns_from_what() -> None:
    """Each term moves one student; teachers and thresholds take no gradient."""
    system = opened(systems.build(a_recipe()))
    learns = {
        "pseudo_main": {"main"},
        "pseudo_auxiliary": {"auxiliary"},
        "consistency_main": {"main"},
        "consistency_auxiliary": {"auxiliary"},
    }
    terms = system("all", {"target": a_batch()}, systems.Chance(0, 0))
    assert terms.keys() == learns.keys()
    for name, term in terms.items():
        system.zero_grad(set_to_none=True)
        term.backward(retain_graph=True)
        moved = {
            n.split(".")[0]
            for n, p in system.named_parameters()
            if p.grad is not None and p.grad.abs().sum() > 0
        }
        assert moved == learns[name], name
    assert any(p.grad.abs().sum() > 0 for p in system.auxiliary.depth.parameters())
    stepped = {p for o in system.optimizers().values() for g in o.param_groups for p in g["params"]}
    assert stepped == {*system.main.parameters(), *system.auxiliary.parameters()}


def test_closed_gates_open() -> None:
    """Behind a closed gate the encoder learns nothing, but the gate does."""
    system = systems.build(a_recipe())
    sum(system("all", {"target": a_batch()}, systems.Chance(0, 0)).values()).backward()
    depth = system.auxiliary.depth
    assert all(gate.grad.abs().sum() > 0 for gate in depth.gates)
    assert not any(p.grad.abs().sum() for p in depth.convs.parameters())


def test_teachers_follow() -> None:
    system = opened(systems.build(a_recipe("ema=0.8", "dropout=0.3"))).train()
    for name, module in system.named_modules():
        dropped = isinstance(module, torch.nn.Dropout) and "teacher" in name
        assert module.training != dropped, "teachers have no dropout, and their batch's statistics"
    assert not any(module.training for module in system.eval().modules())
    with torch.no_grad():
        for student in (system.main, system.auxiliary):
            for tensor in (*student.parameters(), *student.buffers()):
                tensor.add_(1)
    pairs = {
        "main": (system.main_teacher, system.main),
        "auxiliary": (system.auxiliary_teacher, system.auxiliary),
    }
    before = {n: [p.clone() for p in teacher.parameters()] for n, (teacher, _) in pairs.items()}
    statistics = {n: [b.clone() for b in teacher.buffers()] for n, (teacher, _) in pairs.items()}
    system.after_step(100)
    for name, (teacher, student) in pairs.items():
        both = zip(before[name], student.parameters(), teacher.parameters(), strict=True)
        for old, p, new in both:
            assert torch.allclose(new, 0.8 * old + 0.2 * p, atol=1e-5)
        for mine, theirs in zip(statistics[name], student.buffers(), strict=True):
            assert torch.equal(mine, theirs), "predicts with the statistics of the weak view"


def test_audit_counts() -> None:
    system = opened(systems.build(a_recipe(), seed=2)).eval()
    batches = [a_batch(seed) for seed in (0, 1)]
    batches[0].label[:7] = IGNORE
    for batch in batches:
        taught = system.teach(batch)
        system.thresholds.update(taught.label, taught.confidence)
    rows = {row["class"]: row for row in system.audit(iter(batches))}
    assert list(rows) == [*CLASS_SETS["street6"], "all"]
    pairs = []
    for batch in batches:
        taught = system.teach(batch)
        kept = system.kept(taught)
        each = zip(batch.label.tolist(), taught.label.tolist(), kept.tolist(), strict=True)
        pairs += [pair for pair in each if pair[0] != IGNORE]
    for c, name in enumerate(CLASS_SETS["street6"]):
        rows_c = [p for p in pairs if p[0] == c]
        labelled = [p for p in pairs if p[1] == c]
        after = [p for p in labelled if p[2]]
        row = rows[name]
        assert row["rows"] == len(rows_c)
        for column, part, whole in (
            ("precision before", [p for p in labelled if p[0] == c], labelled),
            ("precision after", [p for p in after if p[0] == c], after),
            ("coverage after", [p for p in rows_c if p[2]], rows_c),
        ):
            wanted = f"{100 * len(part) / len(whole):.2f}" if whole else ""
            assert row[column] == wanted, (name, column)
    for column, place in (("main", 0), ("auxiliary", 1)):
        hits = total = 0
        for batch in batches:
            label = system.teach(batch)[place].argmax(1)
            known = batch.label != IGNORE
            hits += int((label == batch.label)[known].sum())
            total += int(known.sum())
        assert rows["all"][f"precision {column} teacher"] == f"{100 * hits / total:.2f}"
    right = sum(a == b for a, b, _ in pairs)
    assert rows["all"]["precision before"] == f"{100 * right / len(pairs):.2f}"


# ---- trunks --------------------------------------------------------------------------------------


def test_deeplabv2(tmp_path: Path) -> None:
    """Torchvision's names, output stride 8, ImageNet weights, and what depth adds."""
    camera = image.Camera("deeplabv2", 16, K)
    trunk = camera.trunk
    assert {"layer3.22.conv3.weight", "layer1.0.downsample.1.bias", "bn1.running_var"} <= set(
        trunk.state_dict()
    )
    assert sum(p.numel() for p in image.ResNet101(64).parameters()) == 42_500_160, "without fc"
    x = torch.rand(2, 3, 41, 57)
    assert trunk(x).shape == (2, 512, 6, 8) and camera(x).shape == (2, K, 41, 57)
    dilations = {m.dilation for m in trunk.layer4.modules() if isinstance(m, torch.nn.Conv2d)}
    assert dilations == {(1, 1), (2, 2), (4, 4)}
    state = {
        k: torch.rand_like(v) if v.is_floating_point() else v
        for k, v in trunk.state_dict().items()
        if k not in ("mean", "std")
    }
    torch.save({**state, "fc.weight": torch.zeros(9)}, tmp_path / "resnet101.pth")
    trunk.load_state_dict(imagenet_weights(trunk, tmp_path / "resnet101.pth"), strict=False)
    assert torch.equal(trunk.layer3[5].conv2.weight, state["layer3.5.conv2.weight"])
    encoder = crossmatch.DepthEncoder(trunk.stages)
    added = encoder(torch.rand(2, 1, 41, 57))
    camera = image.Camera("deeplabv2", 16, K).eval()
    with torch.no_grad():
        assert torch.equal(camera(x, added), camera(x)), "closed gates"
        assert not torch.equal(camera(x, [a + 1 for a in added]), camera(x))
    r = a_recipe()
    system = systems.build(systems.recipe("gta5-cityscapes", "crossmatch", "small", source=deep()))
    assert isinstance(system.auxiliary.camera.trunk, image.ResNet101) and r.trunk == "resnet34"


def deep() -> Any:
    overrides = ["trunk=deeplabv2", "image=24,40", "crop=16,16"]
    return systems.recipe("gta5-cityscapes", "source-only", "small", overrides=overrides)


# ---- from a run ----------------------------------------------------------------------------------


def a_run(world: Path, cache: Path, out: Path, **more: Any) -> train.Run:
    r = systems.recipe("usa-singapore", "crossmatch", "small")
    values = {"steps": 4, "batch": 2, "val_every": 2, "image": (48, 88), "dropout": 0.0}
    r = dataclasses.replace(r, **values)
    places = runs.Places({s: runs.Origin("singapore", world) for s in ("tgt", "val")}, cache)
    return runs.assemble(r, 0, out, places, **more)[0]


def source_weights(seed: int) -> dict[str, Tensor]:
    source = systems.build(systems.recipe("usa-singapore", "source-only", "small"), seed)
    return source.camera_network()


@CPU
def test_a_run_begins_as_its_source(world: Path, cache: Path, tmp_path: Path) -> None:
    weights = source_weights(5)
    run = a_run(world, cache, tmp_path / "a", source=weights)
    for network in (run.system.main, run.system.main_teacher, run.system.auxiliary.camera):
        state = network.state_dict()
        assert all(torch.equal(state[name], weights[name]) for name in weights)
    rates = run.learning_rates()
    assert (rates["all.2d"], rates["all.depth"]) == (1e-4, 5e-3)
    before = run.system.main_teacher.head.weight.clone()
    batches = train.Batches(run.streams, run.recipe, 0, run.indexes)[0]
    run.learn([batches])
    assert not torch.equal(run.system.main_teacher.head.weight, before), "the teacher follows"
    run.out.mkdir()
    run.save(run.last_path)
    other = a_run(world, cache, tmp_path / "a", source=source_weights(6))
    with pytest.raises(checkpoint.RunError, match="made with another source"):
        other.resume()


@CPU
def test_validation_changes_nothing(
    world: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its labels nor its frames: a run that looks at itself ends as one that does not."""
    states = []
    for name in "ab":
        run = a_run(world, cache, tmp_path / name, source=source_weights(5))
        if name == "b":
            monkeypatch.setattr(train, "_audit", lambda run: None)
        for _ in train.fit(run):
            pass
        states.append(run.system.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@CPU
def test_a_weak_view_keeps_its_colours(world: Path, cache: Path, tmp_path: Path) -> None:
    run = a_run(world, cache, tmp_path, source=source_weights(5))
    batch = train.Batches(run.streams, run.recipe, 0, run.indexes)[1]["target"]
    for token, shown in zip(batch.tokens, batch.image, strict=True):
        stored = run.indexes["target"]
        frame = stored.frame(stored.tokens.index(token)).image
        plain = torch.from_numpy(frame.copy()).permute(2, 0, 1) / 255
        assert torch.equal(shown, plain) or torch.equal(shown, plain.flip(-1))


def test_the_strong_view_has_other_colours_and_less_detail() -> None:
    batch, rng = a_batch(), np.random.default_rng
    for name in ("view_jitter=0.4", "view_blur=2"):
        r = a_recipe("view_mix=0", name)
        views = [crossmatch.strong_view(batch, r, rng(seed)).image for seed in (0, 0, 1)]
        assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
        assert (views[0] - batch.image).abs().max() > 0.05, name


def test_what_the_depth_encoder_sees() -> None:
    """Inverse depth, 1 at two metres and nearer, and where there is any."""
    encoder, seen = crossmatch.DepthEncoder((4, 4, 4)), []
    encoder.convs[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    depth = torch.tensor([[0.0, 1.0, 2.0, 4.0, 40.0]]).view(1, 1, 1, 5)
    encoder(depth)
    assert seen[0].shape == (1, 2, 16, 16)
    assert seen[0][0, 0, 0, :6].tolist() == pytest.approx([0, 1, 1, 0.5, 0.05, 0])
    assert seen[0][0, 1, 0, :6].tolist() == [0, 1, 1, 1, 1, 0]


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(world: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("source") / "run"
    result = ftd(*train_args(out, world, cache, method="source-only", steps=2))
    assert result.exit_code == 0, result.output
    return out


def adapt(source: Path, out: Path, data: Path, cache: Path, *more: object, steps: int = 4) -> Any:
    fixed = ("--tgt", "singapore", "--preset", "small", "--threads", 1, "--set", "batch=2")
    where = (
        "--set",
        "val_every=2",
        "--data",
        data,
        "--cache",
        cache,
        "--out",
        out,
        "--steps",
        steps,
    )
    return ftd("train", "--from", source, *fixed, *where, *more)


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@CPU
def test_no_source_frame_is_needed(
    source: Path, world: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = []
    real = index.list_frames

    def watched(root: Any, domain: Any, *more: Any) -> Any:
        listed.append(domain.name)
        return real(root, domain, *more)

    monkeypatch.setattr(index, "list_frames", watched)
    result = adapt(source, tmp_path / "run", world, tmp_path / "cache")
    assert result.exit_code == 0, result.output
    assert set(listed) == {"singapore"}
    assert "reconstruction from the abstract" in words(result)
    assert "no source frame is read" in words(result)
    assert not list((tmp_path / "cache").glob("usa*"))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(record["origins"]) == {"tgt", "val"}
    rows = table(tmp_path / "run" / "audit.csv")
    assert [row["class"] for row in rows] == [*CLASS_SETS["street6"], "all"] * 2
    assert [row["iteration"] for row in rows] == ["2"] * 7 + ["4"] * 7


@CPU
def test_equal_bytes_resume_and_export(
    source: Path, world: Path, cache: Path, tmp_path: Path
) -> None:
    for name in "ab":
        result = adapt(source, tmp_path / name, world, cache)
        assert result.exit_code == 0, result.output
    assert same_bytes(tmp_path / "a", tmp_path / "b")
    # stopped after three of four iterations; the source model is not needed any more
    moved = tmp_path / "source"
    shutil.copytree(source, moved)
    with stopped_in(3):
        result = adapt(moved, tmp_path / "c", world, cache)
    assert result.exit_code == 130 and "--resume" in words(result)
    shutil.rmtree(moved)
    result = ftd("train", "--resume", tmp_path / "c")
    assert result.exit_code == 0, result.output
    assert same_bytes(tmp_path / "a", tmp_path / "c")
    audits = [(tmp_path / name / "audit.csv").read_bytes() for name in "ac"]
    assert audits[0] == audits[1]

    run, out = tmp_path / "a", tmp_path / "main.safetensors"
    where = ("--data", world, "--domain", "singapore", "--cache", cache)
    score = exported(run, out, *where)
    names = checkpoint.read_tensors(out, "").keys()
    assert {name.split(".")[0] for name in names} == {"system/main"}
    assert score["method"] == "crossmatch"
    both = [checkpoint.load(path)[0] for path in (run / "best.safetensors", out)]
    batch = a_batch()
    with torch.no_grad():
        assert torch.equal(*(system.predict(batch)["2d"] for system in both))


def test_a_converted_checkpoint_is_a_source(
    source: Path, world: Path, cache: Path, tmp_path: Path
) -> None:
    """`ftd convert` writes no settings of a user."""
    path = tmp_path / "converted.safetensors"
    meta = checkpoint.read_metadata(source / "best.safetensors")
    del meta["given"], meta["seed"]
    checkpoint.save(path, checkpoint.read_tensors(source / "best.safetensors", ""), meta)
    result = adapt(path, tmp_path / "run", world, cache, steps=1)
    assert result.exit_code == 0, result.output


@CPU
def test_missing_depth_is_said_before_anything_is_written(tmp_path: Path) -> None:
    root = dense_layouts.cityscapes(tmp_path / "cityscapes")
    shutil.rmtree(root / "disparity" / "val")
    first = dense_layouts.gta5(tmp_path / "gta5")
    tiny = ("--set", "batch=2", "--cache", tmp_path / "cache", "--threads", 1, "--preset", "small")
    size = ("--set", "image=24,40", "--set", "crop=16,16")
    pair = ("--src", "gta5", "--tgt", "cityscapes", "--src-data", first, "--tgt-data", root)
    result = ftd("train", *pair, *size, *tiny, "--steps", 1, "--out", tmp_path / "source")
    assert result.exit_code == 0, result.output
    args = ("train", "--from", tmp_path / "source", "--tgt", "cityscapes", "--data", root, *tiny)
    result = ftd(*args, "--steps", 1, "--out", tmp_path / "run")
    assert result.exit_code == 3 and "--set depth=none" in words(result), result.output
    assert not (tmp_path / "run").exists()
    result = ftd(*args, "--steps", 1, "--out", tmp_path / "run", "--set", "depth=none")
    assert result.exit_code == 0, result.output


@CPU
@pytest.mark.parametrize("name", ["gta5", "synthia"])
def test_dense_and_the_source_is_gone(name: str, tmp_path: Path) -> None:
    make = {"gta5": dense_layouts.gta5, "synthia": dense_layouts.synthia}[name]
    first, target = make(tmp_path / name), dense_layouts.cityscapes(tmp_path / "cityscapes")
    tiny = ("--set", "batch=2", "--cache", tmp_path / "cache", "--threads", 1, "--preset", "small")
    size = ("--set", "image=24,40", "--set", "crop=16,16")
    pair = ("--src", name, "--tgt", "cityscapes", "--src-data", first, "--tgt-data", target)
    result = ftd("train", *pair, *size, *tiny, "--steps", 2, "--out", tmp_path / "source")
    assert result.exit_code == 0, result.output
    shutil.rmtree(first)
    args = ("train", "--from", tmp_path / "source", "--tgt", "cityscapes", *tiny, "--steps", 2)
    result = ftd(*args, "--out", tmp_path / "run")
    assert result.exit_code == 1 and "name the root of cityscapes with --data" in words(result)
    result = ftd(*args, "--data", target, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    meta = checkpoint.read_metadata(tmp_path / "run" / "last.safetensors")
    theirs = checkpoint.read_metadata(tmp_path / "source" / "last.safetensors")
    for key in ("classes", "width_2d", "image", "crop", "trunk"):
        assert meta["recipe"][key] == theirs["recipe"][key]
    rows = table(tmp_path / "run" / "log.csv")
    terms = ["pseudo_main", "pseudo_auxiliary", "consistency_main", "consistency_auxiliary"]
    assert list(rows[0]) == ["iteration", *terms]
    assert ftd("eval", tmp_path / "run", "--cache", tmp_path / "cache").exit_code == 0


def test_refusals(source: Path, world: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more: tuple[object, ...]
    for more, message in (
        (("--src", "usa"), "--src: a method without source data starts from the run that --from"),
        (("--ssda",), "--ssda: a method without source data"),
        (("--method", "ftdpp"), "--from: ftdpp trains on labelled data"),
        (("--set", "width_2d=32"), "crossmatch does not read it: the source model decides it"),
        (("--set", "view_mix=2"), "must lie in 0..1"),
        (("--method", "self-training", "--set", "agree=false"), "it has no auxiliary stream"),
    ):
        result = adapt(source, out, world, cache, *more)
        assert result.exit_code == 2 and message in words(result), result.output
    result = ftd("train", "--src", "usa", "--tgt", "singapore", "--method", "crossmatch")
    assert result.exit_code == 2 and "name it with --from RUN" in words(result)
    result = ftd("train", "--tgt", "singapore", "--method", "crossmatch")
    assert result.exit_code == 2 and "name it with --from RUN" in words(result)
    for methods, message in (
        (("crossmatch+pl",), "crossmatch has no second stage; drop +pl"),
        (("crossmatch", "--ssda"), "crossmatch has no semi-supervised form"),
    ):
        result = ftd("compare", "--methods", *methods, "--out", out)
        assert result.exit_code == 2 and message in words(result), result.output
    last = source / "last.safetensors"
    result = ftd("export", source, "--checkpoint", "last", "--out", last)
    assert result.exit_code == 2 and "a run's own file" in words(result)
    result = adapt(tmp_path / "nothing", out, world, cache)
    assert result.exit_code == 1 and "no such run folder" in words(result)
    assert not out.exists()


def test_labels_of_the_target_are_refused(world: Path, cache: Path, tmp_path: Path) -> None:
    oracle = tmp_path / "oracle"
    result = ftd(*train_args(oracle, world, cache, method="target-only", steps=1))
    assert result.exit_code == 0, result.output
    result = adapt(oracle, tmp_path / "run", world, cache)
    assert result.exit_code == 1
    assert "target-only was trained with labels of singapore" in words(result)


def test_comparison_trains_the_source_model_first(world: Path, cache: Path, tmp_path: Path) -> None:
    jobs = compare.plan(
        "usa-singapore", "crossmatch", "0,1", "small", ["depth=none", "steps=3"], tmp_path
    )
    assert [job.recipe.method for job in jobs] == ["source-only", "crossmatch"] * 2
    assert jobs[1].source == jobs[0].out and jobs[3].source == jobs[2].out
    for methods in ("source-only+pl,crossmatch", "crossmatch,source-only+pl"):
        mixed = compare.plan("usa-singapore", methods, "0", "small", ["width_3d=4"], tmp_path)
        (job,) = (job for job in mixed if job.recipe.method == "crossmatch")
        assert job.source == tmp_path / "usa-singapore-source-only[width_3d=4]-seed0"
        assert job.out.name == "usa-singapore-crossmatch[width_3d=4]-seed0", "of another source"
    assert jobs[0].given == ("steps=3",) and jobs[1].given == ("steps=3", "depth=none")
    where = ("--data", world, "--cache", cache, "--out", tmp_path, "--threads", 1)
    args = ("compare", "--methods", "self-training,crossmatch", "--preset", "small", *where)
    for _ in range(2):
        result = ftd(*args, "--steps", 2, *TINY)
        assert result.exit_code == 0, result.output
    rows = results.read(tmp_path / "compare.json")["rows"]
    assert [row["method"] for row in rows] == ["source-only", "self-training", "crossmatch"]
    assert list(rows[2]["miou"]) == ["2d"]
    run = next(tmp_path.glob("*crossmatch*"))
    record = json.loads((run / "run.json").read_text())
    assert set(record["origins"]) == {"tgt", "val"} and record["built_in"] is False
    first = next(tmp_path.glob("*source-only*")) / "best.safetensors"
    assert record["source"] == str(first)
    meta = checkpoint.read_metadata(run / "last.safetensors")
    assert meta["source"] == checkpoint.digest(checkpoint.load(first)[0].camera_network())
    assert "reconstruction from the abstract" in words(result)
