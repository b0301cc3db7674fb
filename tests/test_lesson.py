"""docs/lesson.md is what docs/lesson.py makes of it, and the solutions of its exercises hold."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ftdpp import kernels, systems
from ftdpp.data import CLASS_SETS, IGNORE, Augment, Batch, rotation_3d
from ftdpp.docs import exercises, lesson
from ftdpp.kernels import maps, naive
from ftdpp.losses import kl_divergence
from ftdpp.systems import ftdpp
from ftdpp.systems.ftdpp import ExternalAttention, Logits

# ---- the page ------------------------------------------------------------------------------------


def test_the_page_is_what_the_code_makes(world: Path, tmp_path: Path) -> None:
    page = lesson.PAGE.read_text()
    made = lesson.build(world, tmp_path / "cache", tmp_path / "lesson", page)
    assert made == page, "run python docs/lesson.py"

    shown = re.findall(r'<img src="lesson-pictures/([^"]+)" width="\d+" alt="[^"]+">', page)
    assert len(shown) == page.count("<img") >= 6
    for folder in (tmp_path / "lesson", lesson.PICTURES):
        there = sorted(folder.iterdir())
        assert [path.name for path in there] == sorted(shown)
        assert sum(path.stat().st_size for path in there) < 900_000
        for path in there:
            assert path.stat().st_size < 120_000, path.name
            if path.suffix != ".svg":
                Image.open(path).verify()
    drawing = "kernel_map.svg"
    assert (tmp_path / "lesson" / drawing).read_text() == (lesson.PICTURES / drawing).read_text()


def test_a_change_of_the_code_would_be_found() -> None:
    page = '<!-- code: losses.kl_rows -->\n<!-- /code -->\n[old](../x.py#L1-L2 "data.collate")\n'
    made = lesson.update(page, {})
    assert lesson.update(made, {}) == made
    source = (lesson.ROOT / "data.py").read_text().splitlines()
    [(first, last)] = re.findall(r'\(\.\./data\.py#L(\d+)-L(\d+) "data\.collate"\)', made)
    assert source[int(first) - 1].startswith("def collate(")
    assert source[int(last) - 1].startswith("    return batch")
    assert "def kl_rows" in made
    assert '"""' not in made, "without its docstring"
    with pytest.raises(LookupError, match="no collect"):
        lesson.link("data.collect")
    with pytest.raises(LookupError, match="shows"):
        lesson.update("<!-- printed: points -->\n<!-- /printed -->", {})


def test_numbers_are_rounded_where_processors_agree() -> None:
    assert [lesson.about(x) for x in (4273, 28_900, 0.0762, 1.8, 0, 132)] == [
        *("4,300", "29,000", "0.076", "1.8", "0", "130")
    ]
    for x in (4250.5, 0.07651, 1.8497):
        with pytest.raises(ValueError, match="rounding boundary"):
            lesson.about(x)


# ---- the exercises -------------------------------------------------------------------------------


def test_exercise_1_a_convolution_with_a_dictionary() -> None:
    torch.manual_seed(0)
    coords = torch.cat([torch.zeros(90, 1), torch.randint(0, 6, (90, 3))], 1).int()
    pyramid = kernels.pyramid(coords, 1)
    voxels = [tuple(v) for v in pyramid.coords().tolist()]
    x, weight = torch.randn(len(voxels), 3), torch.randn(27, 3, 2)
    y = exercises.submanifold_convolution(voxels, x, weight)
    assert torch.allclose(y, kernels.sparse_conv(x, weight, pyramid.same[0]), atol=1e-4)


def test_exercise_2_a_kernel_map_by_hand() -> None:
    found = naive.submanifold_map(exercises.VOXELS)
    assert {k: pairs for k, pairs in enumerate(found) if pairs} == exercises.PAIRS


def test_exercise_3_a_parent_is_a_shift() -> None:
    rng = np.random.default_rng(0)
    for x, y, z in rng.integers(0, 2**15 - 2, (50, 3)).tolist():
        code = exercises.morton(x, y, z)
        assert code >> 3 == exercises.morton(x // 2, y // 2, z // 2)
        key = int(maps.pack(torch.tensor([[0, x, y, z]])))
        assert key == exercises.morton(*(v + maps.BIAS for v in (x, y, z)))


def test_exercise_4_the_debiased_loss() -> None:
    torch.manual_seed(0)
    main, other, mimic = torch.randn(3, 20, 6).unbind()
    label = torch.randint(0, 6, (20,))
    label[::3] = IGNORE
    kl = kl_divergence(F.softmax(other, 1), mimic)
    wanted = ftdpp.debiased_pseudo_loss(main, label, kl, detach=False)
    assert exercises.debiased_loss(main, label, other, mimic) == pytest.approx(float(wanted), 1e-4)


def test_exercise_5_the_zero_gate() -> None:
    torch.manual_seed(0)
    system = systems.build(systems.recipe("usa-singapore", "crossmatch", "small")).eval()
    batch = Batch(
        image=torch.rand(1, 3, 32, 48),
        pixel=torch.zeros(1, 2, dtype=torch.int64),
        label=torch.zeros(1, dtype=torch.int64),
        tokens=["0"],
        keep=[torch.zeros(1, dtype=torch.int64)],
        counts=[1],
        depth=torch.rand(1, 1, 32, 48) * 40,
    )
    assert exercises.streams_differ(system, batch) == 0
    nn.init.ones_(system.auxiliary.depth.gates[0])
    assert exercises.streams_differ(system, batch) > 0


def test_exercise_6_a_prediction_depends_on_its_neighbours() -> None:
    torch.manual_seed(0)
    x, others = 3 * torch.randn(30, 8), 3 * torch.randn(50, 8)
    attention = ExternalAttention(8, heads=4).eval()
    assert exercises.moved_by_neighbours(attention, x, others) > 1e-3
    assert exercises.moved_by_neighbours(nn.Linear(8, 8), x, others) < 1e-5


@pytest.mark.parametrize("axis", [0, 1])
def test_exercise_7_the_flip(axis: int) -> None:
    """The released flip is that of the code; it is a reflection where there is no noise."""
    flipped = 0
    for seed in range(20):
        for noise in (0.0, 0.1):
            plain = Augment(noise=noise, flip_3d=False, rotate=False)
            matrix = torch.from_numpy(rotation_3d(plain, axis, np.random.default_rng(seed)))
            maybe = Augment(noise=noise, rotate=False)
            drawn = torch.from_numpy(rotation_3d(maybe, axis, np.random.default_rng(seed)))
            released = exercises.released_flip(matrix, axis)
            assert torch.equal(drawn, matrix) or torch.equal(drawn, released)
            flipped += int(not torch.equal(drawn, matrix))
            same = torch.equal(released, exercises.reflection(matrix, axis))
            assert same == (noise == 0)
    assert 0 < flipped < 40


def test_exercise_8_the_largest_target() -> None:
    k = len(CLASS_SETS["street6"])
    sure = torch.full((1, k), -50.0).index_fill(1, torch.tensor([2]), 50.0)
    torch.manual_seed(0)
    for logits in (sure, 5 * torch.randn(200, k)):
        p2, p3 = F.softmax(logits, 1), F.softmax(logits.roll(1, 0), 1)
        both = F.softmax(p2 + p3, 1)
        assert both.max() < exercises.largest_target(k) + 1e-6
    assert F.softmax(2 * F.softmax(sure, 1), 1).max() == pytest.approx(exercises.largest_target(k))
    # The term of the code is at its least, the target's own entropy apart, where p is this target.
    teacher = Logits(sure, sure, sure, sure)
    target = F.softmax(2 * F.softmax(sure, 1), 1)
    _, fused = ftdpp.distillation(teacher, Logits(target.log(), target.log(), sure, sure))
    assert float(fused) == pytest.approx(0, abs=1e-6)
