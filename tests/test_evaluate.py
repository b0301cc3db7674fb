"""Protocol, evaluation of a run, pseudo-labels, single frames."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import ftdpp
from ftdpp import checkpoint, evaluate, pseudo_labels, readers, runs, screen
from ftdpp.data import CLASS_SETS, IGNORE
from ftdpp.ftd import app
from ftdpp.index import original_frames
from ftdpp.readers import list_frames
from ftdpp.tests.commands import ftd, train_args, words

pytestmark = pytest.mark.usefixtures("on_a_cpu")

# ---- protocol ----------------------------------------------------------------------------------


def test_confusion_and_iou_slowly() -> None:
    g = torch.Generator().manual_seed(0)
    pred, label = (torch.randint(0, 3, (200,), generator=g) for _ in range(2))
    label[::7] = IGNORE
    matrix = evaluate.confusion(pred, label, 4)
    pairs = list(zip(label.tolist(), pred.tolist(), strict=True))
    for i in range(4):
        for j in range(4):
            assert matrix[i, j] == sum(a == i and b == j for a, b in pairs)
    per_class, mean = evaluate.iou(matrix)
    for c in range(3):
        seen = [(a, b) for a, b in pairs if a != IGNORE]
        both, either = sum(a == b == c for a, b in seen), sum(c in (a, b) for a, b in seen)
        assert per_class[c] == pytest.approx(both / either)
    assert per_class[3] != per_class[3], "an absent class has no IoU"
    assert mean == pytest.approx(sum(per_class[:3]) / 4), "and counts as 0 in the mean"
    nothing = evaluate.confusion(pred, torch.full((200,), IGNORE), 4)
    assert evaluate.iou(nothing)[1] == 0


def test_refine_slowly() -> None:
    g = torch.Generator().manual_seed(0)
    label, prob = torch.randint(0, 4, (301,), generator=g), torch.rand(301, generator=g)
    prob[label == 3] = 0.95
    refined, thresholds = evaluate.refine(label, prob, 5)
    for c in range(4):
        mine = sorted(prob[label == c].tolist())
        assert thresholds[c] == pytest.approx(min(mine[(len(mine) - 1) // 2], 0.9))
        assert (refined == c).sum() >= len(mine) / 2
    assert (refined == 3).sum() == (label == 3).sum(), "all at 0.9 and above are kept"
    assert thresholds[4] == 0
    for a, b, p in zip(label.tolist(), refined.tolist(), prob.tolist(), strict=True):
        assert b == (a if p >= torch.tensor(thresholds[a]).item() else IGNORE)


# ---- evaluation --------------------------------------------------------------------------------


def test_eval_json(finished: Path, cache: Path) -> None:
    for which in ("best", "last"):
        args = ["eval", str(finished), "--split", "test", "--checkpoint", which, "--json"]
        result = CliRunner().invoke(app, [*args, "--cache", str(cache), "--threads", "1"])
        assert result.exit_code == 0, result.output
        score = json.loads(result.stdout)
        assert score["split"] == "test"
        assert score["checkpoint"].startswith(f"{which}.safetensors, iteration")
        assert set(score["miou"]) == set(score["iou"]) == {"2d", "3d", "2d+3d"}
        for head, classes in score["iou"].items():
            assert list(classes) == list(CLASS_SETS["street6"])
            mean = sum(v or 0.0 for v in classes.values()) / 6
            assert score["miou"][head] == pytest.approx(mean)


def test_eval_slowly(finished: Path, world: Path, cache: Path) -> None:
    """The score is that of the predictions, frame by frame, over the whole split."""
    system, _ = checkpoint.load(finished / "last.safetensors")
    index = runs.Origin("singapore", world).index("test", system.recipe, cache)
    score = evaluate.evaluate(system, index, "x")
    predictions = {head: [] for head in system.heads}  # type: dict[str, list[torch.Tensor]]
    labels = []
    with torch.no_grad():
        for _, batch in evaluate.batches_of(index, system.recipe, system.recipe.eval_batch):
            labels.append(batch.label)
            for head, p in system.predict(batch).items():
                predictions[head].append(p.argmax(1))
    label = torch.cat(labels)
    for head, parts in predictions.items():
        pred, kept = torch.cat(parts), label != IGNORE
        for c, name in enumerate(CLASS_SETS["street6"]):
            both = ((pred == c) & (label == c)).sum().item()
            either = (((pred == c) | (label == c)) & kept).sum().item()
            assert score.iou[head][name] == pytest.approx(both / either)


def test_eval_table_and_pictures(finished: Path, cache: Path, tmp_path: Path) -> None:
    overlay = ("--overlay", tmp_path, "--count", 1)
    result = ftd("eval", finished, "--cache", cache, *overlay)
    assert result.exit_code == 0, result.output
    assert "mIoU" in result.output
    assert "singapore test" in words(result)
    [file] = tmp_path.glob("*.png")
    picture = np.asarray(Image.open(file))
    assert picture.shape[1] >= 800, "drawn on the original image, not on the network's 88 pixels"
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000, "a photo and coloured points"
    assert ftd("eval", finished, "--split", "tset").exit_code == 2


def test_eval_of_chosen_frames(finished: Path, world: Path, cache: Path) -> None:
    tokens = [r.token for r in list_frames(world, readers.domains()["singapore"], "test")]
    result = ftd("eval", finished, "--cache", cache, "--frames", tokens[0], "--split", "test")
    assert result.exit_code == 0, result.output
    assert "chosen frames: 1 frame," in words(result)


def test_points_outside_the_grid_are_counted(finished: Path, world: Path, cache: Path) -> None:
    """With voxels of 1 cm the grid is 41 m wide, and the built-in streets are longer."""
    system, _ = checkpoint.load(finished / "last.safetensors")
    index = runs.Origin("singapore", world).index("test", system.recipe, cache)
    scores = []
    for voxels in (10.0, 100.0):
        system.recipe = dataclasses.replace(system.recipe, voxels_per_metre=voxels)
        scores.append(evaluate.evaluate(system, index, "x"))
    whole, cut = scores
    assert whole.outside == 0
    assert 0 < cut.outside < index.fingerprint["points"]
    assert cut.points < whole.points
    assert f"{cut.outside:,} POINTS OUTSIDE" in str(screen.score_table(cut, "ftdpp").title)
    assert "OUTSIDE" not in str(screen.score_table(whole, "ftdpp").title)


# ---- one frame of a user's own -----------------------------------------------------------------


def test_library_predicts_what_the_evaluation_does(
    finished: Path, world: Path, cache: Path
) -> None:
    system = ftdpp.load(finished)
    source = runs.Origin("singapore", world)
    index = source.index("test", system.recipe, cache)
    original = next(original_frames(index, [0]))
    ref = list_frames(world, readers.domains()["singapore"], "test")[0]
    # A calibration that puts each point onto its own pixel: this camera's, as one matrix.
    matrix, offset = np.eye(3), np.zeros(3)
    assert ref.calib is not None
    for quaternion, translation, inverse in ref.calib.steps:
        rotation = readers.base.rotation(quaternion)
        rotation = rotation.T if inverse else rotation
        shift = -rotation @ np.array(translation) if inverse else np.array(translation)
        matrix, offset = rotation @ matrix, rotation @ offset + shift
    calibration = np.array(ref.calib.camera) @ np.c_[matrix, offset]
    rows, probabilities = ftdpp.predict(system, original.image, original.xyz, calibration)
    assert np.array_equal(rows, np.arange(len(original.xyz)))
    [(_, batch)] = evaluate.batches_of(index, system.recipe, 1, range(1))
    with torch.no_grad():
        wanted = system.predict(batch)
    for head in system.heads:
        near = np.abs(probabilities[head] - wanted[head].numpy()).max(1) < 1e-4
        assert near.mean() > 0.99, "but for a pixel that the other rounding moved"
    for bad, hint in (
        ((original.image[..., 0], original.xyz, calibration), "image is"),
        ((original.image, original.xyz[:, :2], calibration), "points is"),
        ((original.image, original.xyz, calibration[:2]), "calibration is"),
        ((original.image, -original.xyz, calibration), "no point falls into the image"),
    ):
        with pytest.raises(ValueError, match=hint):
            ftdpp.predict(system, *bad)


# ---- pseudo-labels -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["last.safetensors", "best.safetensors", "log.csv", "run.json"])
def test_no_command_overwrites_a_run(name: str, finished: Path) -> None:
    before = (finished / name).read_bytes()
    for command in ("pseudo", "export"):
        result = ftd(command, finished, "--out", finished / name)
        assert result.exit_code == 2 and "a run's own file" in words(result)
    assert (finished / name).read_bytes() == before


def test_pseudo_labels_and_second_stage(
    finished: Path, world: Path, cache: Path, tmp_path: Path
) -> None:
    file = tmp_path / "pseudo.safetensors"
    overlay = ("--overlay", tmp_path / "pictures", "--count", 1)
    result = ftd("pseudo", finished, "--out", file, "--cache", cache, "--threads", 1, *overlay)
    assert result.exit_code == 0, result.output
    pictures = list((tmp_path / "pictures").glob("*/*.png"))
    assert [p.parent.name for p in sorted(pictures)] == ["2d", "3d"]
    tensors, meta = load_file(file), checkpoint.read_metadata(file)
    system, _ = checkpoint.load(finished / "last.safetensors")
    r = system.recipe
    index = runs.Origin("singapore", world).index("train", r, cache)
    assert set(tensors) == {f"{token}/{head}" for token in index.tokens for head in ("2d", "3d")}
    assert all(t.dtype == torch.uint8 for t in tensors.values()), "labels, no probabilities"
    with torch.no_grad():
        batches = evaluate.batches_of(index, r, r.eval_batch)
        found = torch.cat([system.predict(b)["3d"] for _, b in batches])
    prob, label = found.max(1)
    refined, thresholds = evaluate.refine(label, prob, 6)
    assert meta["thresholds"]["3d"] == pytest.approx(thresholds)
    stored = torch.cat([tensors[f"{t}/3d"] for t in index.tokens]).long()
    assert torch.equal(stored.masked_fill(stored == 255, IGNORE), refined)
    counts = torch.bincount(refined[refined != IGNORE], minlength=6)
    assert meta["kept"]["3d"] == counts.tolist()

    labels = pseudo_labels.PseudoLabels(file, r, index)
    [(_, batch)] = evaluate.batches_of(index, r, len(index))
    labels.attach(batch)
    assert torch.equal(batch.pseudo["3d"], refined)
    assert labels._file is labels._file, "opened once"
    travelled = pickle.loads(pickle.dumps(labels))
    travelled.attach(batch)
    assert torch.equal(batch.pseudo["3d"], refined)

    second = train_args(tmp_path / "second", world, cache, "--pseudo", file, steps=2)
    result = ftd(*second)
    assert result.exit_code == 0, result.output
    assert "pseudo_2d" in (tmp_path / "second" / "log.csv").read_text()
    assert "ftdpp+pl" in words(result)
    before = (tmp_path / "second" / "last.safetensors").read_bytes()
    result = ftd("train", "--resume", tmp_path / "second")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "second" / "last.safetensors").read_bytes() == before


def test_pseudo_label_files_that_do_not_fit(
    finished: Path, world: Path, cache: Path, tmp_path: Path
) -> None:
    """Refused before anything is prepared where the file alone tells."""
    file = tmp_path / "pseudo.safetensors"
    printed = ftd("pseudo", finished, "--out", file, "--cache", cache, "--json")
    assert printed.exit_code == 0
    assert json.loads(printed.stdout)["kept"] == checkpoint.read_metadata(file)["kept"]
    out, empty = tmp_path / "run", tmp_path / "cache"

    def refused(expected: str, *more: object, method: str = "ftdpp") -> None:
        result = ftd(*train_args(out, world, empty, *more, method=method))
        assert result.exit_code == 1, result.output
        assert expected in words(result)
        assert not empty.exists()

    refused("made for method 'ftdpp', this run has 'xmuda'", "--pseudo", file, method="xmuda")
    refused("made for scenario", "--pseudo", file, "--src", "day", "--tgt", "night")
    refused("not a pseudo-label file", "--pseudo", finished / "last.safetensors")

    tensors, meta = load_file(file), checkpoint.read_metadata(file)
    meta["kept"]["2d"] = [0] * 6
    checkpoint.save(tmp_path / "none.safetensors", tensors, meta)
    refused("keeps no label", "--pseudo", tmp_path / "none.safetensors")

    r = checkpoint.load(finished / "last.safetensors")[0].recipe
    for domain, split, expected in (
        ("usa", "train", "domain singapore instead of usa"),
        ("singapore", "val", "frames 8 instead of 2"),
    ):
        index = runs.Origin(domain, world).index(split, r, cache)
        with pytest.raises(checkpoint.RunError, match=expected):
            pseudo_labels.PseudoLabels(file, r, index)
