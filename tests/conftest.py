"""A tiny street world, made once for all tests; Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ftdpp.tests.commands import ftd, train_args
from ftdpp.world import layouts

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded, and nobody waits for it

FRAMES = {"source": 4, "target": 8, "val": 2, "test": 2}  # 8: its second scene is a labelled one


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "world"
    layouts.write_world(root, "usa", "singapore", FRAMES, seed=0, workers=1)
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def finished(world: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six iterations, saved every two, validated every three."""
    out = tmp_path_factory.mktemp("runs") / "run"
    more = ("--set", "save_every=2", "--set", "val_every=3", "--set", "milestones=4")
    result = ftd(*train_args(out, world, cache, *more, "--device", "cpu", steps=6))
    assert result.exit_code == 0, result.output
    (out / "stderr.txt").write_text(result.output)
    return out


@pytest.fixture(scope="module")
def on_a_cpu() -> Iterator[None]:
    """Promises about bytes are made for a CPU; the commands would choose a GPU if there is one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for child processes
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
