"""Several processes, and several parts of an update: what they share, and what a lost one means."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from ftdpp import checkpoint, data, parallel, runs, systems, train
from ftdpp.checkpoint import RunError
from ftdpp.models import BatchNormReLU, UNet2D, UNet3D
from ftdpp.tests.commands import ftd, same_bytes, train_args, words
from ftdpp.tests.test_ftdpp import batch as a_batch

pytestmark = pytest.mark.usefixtures("on_a_cpu")


@contextmanager
def torchrun(args: list[str]) -> Iterator[subprocess.Popen[str]]:
    """`torchrun --nproc-per-node=2 -m ftdpp ARGS`, its output in a pipe."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", "--local-addr=127.0.0.1", "-m", "ftdpp", *args]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def output_of(process: subprocess.Popen[str], line: str, then: Callable[[], None]) -> str:
    """The whole output; `then` is called at the first line that holds these words."""
    assert process.stdout is not None
    seen, done = "", False
    for text in process.stdout:
        seen += text
        if line in text and not done:
            done = True
            then()
    process.wait(timeout=60)
    assert done, seen
    return seen


def second_of(process: subprocess.Popen[str]) -> int:
    """The process of rank 1 below torchrun."""
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    raise AssertionError("torchrun has started no second process")


def parameters(run: Path) -> dict[str, Tensor]:
    tensors = checkpoint.read_tensors(run / "last.safetensors", "system/")
    return {name: tensor for name, tensor in tensors.items() if "running_" not in name}


def terms(run: Path) -> list[list[float]]:
    rows = (run / "log.csv").read_text().splitlines()[1:]
    return [[float(value) for value in row.split(",")] for row in rows]


def test_two_processes(world: Path, cache: Path, tmp_path: Path) -> None:
    """A signal to one stops both, and saves; resumed by two they write the bytes of a run that was
    not stopped, which is what accumulate=2 does in one process."""

    def args(name: str) -> list[str]:
        return train_args(tmp_path / name, world, cache, steps=8)

    with torchrun(args("whole")) as process:
        output = output_of(process, "iteration 8 of 8", lambda: None)
    assert process.returncode == 0, output
    assert output.count("iteration 8 of 8") == 1, "one process speaks"
    assert "batches, 4 frames a domain" in output

    with torchrun(args("stopped")) as process:
        stop = lambda: os.kill(second_of(process), signal.SIGTERM)  # noqa: E731
        output = output_of(process, "iteration 1 of 8", stop)
    assert process.returncode != 0
    found = checkpoint.read_metadata(tmp_path / "stopped" / "last.safetensors")
    assert 0 < found["iteration"] < 8 and found["processes"] == 2, output
    refused = ftd("train", "--resume", tmp_path / "stopped")
    assert refused.exit_code == 1
    assert "made by 2 processes, these are 1" in words(refused)
    assert "torchrun --nproc-per-node=2" in words(refused)
    with torchrun(["train", "--resume", str(tmp_path / "stopped")]) as process:
        output = output_of(process, "iteration 8 of 8", lambda: None)
    assert process.returncode == 0, output
    assert same_bytes(tmp_path / "whole", tmp_path / "stopped")

    alone = ftd(*args("alone"), "--set", "accumulate=2")
    assert alone.exit_code == 0, alone.output
    theirs, mine = terms(tmp_path / "whole"), terms(tmp_path / "alone")
    assert theirs[0] == pytest.approx(mine[0], rel=1e-5), "means over the processes"
    assert theirs[3] == pytest.approx(mine[3], rel=1e-3), "and so are the gradients"
    single = ftd(*args("single"))
    assert single.exit_code == 0, single.output
    assert terms(tmp_path / "single")[3] != pytest.approx(mine[3], rel=1e-2)


def test_a_lost_process_ends_the_other(world: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = train_args(out, world, cache, "--set", "save_every=1", steps=4000)
    with torchrun(args) as process:

        def kill() -> None:
            while not (out / "last.safetensors").exists():
                time.sleep(0.1)
            os.kill(second_of(process), signal.SIGKILL)

        output = output_of(process, "iteration 1 of 4000", kill)
    assert process.returncode != 0
    assert "another process of this training has ended" in output
    assert "--resume RUN" in output
    assert checkpoint.read_metadata(out / "last.safetensors")["iteration"] >= 1
    checkpoint.load(out / "last.safetensors")


def test_torchrun_is_for_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torchrun_s = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for name, value in torchrun_s.items():
        monkeypatch.setenv(name, value)
    result = ftd("compare", "--out", tmp_path)
    assert result.exit_code == 2 and "torchrun starts ftd train alone" in words(result)


def a_run(world: Path, cache: Path, out: Path, *settings: str) -> train.Run:
    chosen = ["class_weights=1,1,1,1,1,1", "dropout=0,0", "teacher_image=fda", *settings]
    r = systems.recipe("usa-singapore", "ftdpp", "small", overrides=chosen)
    streams = systems.system_of(r.method, r.scenario).streams(r)
    indexes = {
        name: runs.Origin("usa" if s.side == "src" else "singapore", world).index(s.split, r, cache)
        for name, s in streams.items()
    }
    return train.Run(out, r, 0, indexes, None)


def test_two_parts_are_one_batch_of_twice_the_frames(
    world: Path, cache: Path, tmp_path: Path
) -> None:
    """The same frames, drawn and augmented alike; and, with BatchNorm frozen and without the
    attention over a batch, the same gradients. (Each frame here has as many points.)"""
    size = "image=48,88"
    two = a_run(world, cache, tmp_path, "fusion=false", "batch=2", "accumulate=2", size)
    one = a_run(world, cache, tmp_path, "fusion=false", "batch=4", size)
    parts, whole = (train.Batches(run.streams, run.recipe, 0, run.indexes) for run in (two, one))
    for iteration in (0, 3):
        for name, batch in whole[iteration].items():
            mine = [parts[2 * iteration + own][name] for own in (0, 1)]
            joined = data.join(mine)
            assert joined.tokens == batch.tokens
            assert torch.equal(joined.image, batch.image)
            assert torch.equal(joined.points, batch.points)

    frozen = [{"labelled": a_batch(i), "unlabelled": a_batch(9 + i)} for i in (0, 1)]
    all_ = {name: data.join([part[name] for part in frozen]) for name in frozen[0]}
    grads = []
    for run, batches in ((two, frozen), (one, [all_])):
        for module in run.system.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        found = run.learn(batches)
        grads.append({n: p.grad for n, p in run.system.named_parameters() if p.grad is not None})
        grads[-1] |= {f"term {name}": value for name, value in found.items()}
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 100
    for name, wanted in grads[1].items():
        assert (grads[0][name] - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9, name


def test_parts_have_chance_of_their_own() -> None:
    first, second = (systems.Chance(0, 5, part) for part in (0, 1))
    assert first.generator(3).random() != second.generator(3).random()
    assert all(systems.Chance(0, i).coin() == systems.Chance(0, i, 1).coin() for i in range(20)), (
        "one style an update"
    )
    draws = []
    for part, phase in ((0, 0), (1, 0), (0, 1), (0, 0)):
        systems.Chance(0, 5, part).seed_dropout(phase)
        draws.append(float(torch.rand(())))
    assert draws[0] == draws[3] and len(set(draws)) == 3


def test_batchnorm_over_all_processes() -> None:
    """It takes the place of the image's BatchNorm under the same names; the voxels keep theirs,
    with its ReLU. PyTorch has none for a CPU."""
    made = nn.ModuleDict({"2d": UNet2D(16), "3d": UNet3D(4)})
    names = list(made.state_dict())
    parallel.synchronise(made)
    assert list(made.state_dict()) == names
    kinds = {type(m) for m in made.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm, BatchNormReLU}
    with pytest.raises(RunError, match="needs GPUs"):
        parallel.together(made, sync_batchnorm=True)


def test_errors_of_this_process_are_not_taken_for_a_lost_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel, "size", lambda: 2)
    with pytest.raises(RuntimeError, match="shape"), parallel.noticing():
        raise RuntimeError("shape of a tensor")
    with pytest.raises(RunError, match="another process"), parallel.noticing():
        raise RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer")
