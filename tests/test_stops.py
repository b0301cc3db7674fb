"""What stops a training from outside costs nothing: signals to all processes, a killed loading
process, a reader of the messages that goes away, a full disk. And files that are not ours stay."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import Result

from ftdpp import checkpoint, files, pictures, processes, readers, runs, train
from ftdpp.commands import shared
from ftdpp.index import FAR, prepare, read_frame
from ftdpp.tests import layouts
from ftdpp.tests.commands import ftd, same_bytes, stopped_in, train_args, words

pytestmark = pytest.mark.usefixtures("on_a_cpu")

SLOW = """
import time
from ftdpp import ftd, train
learn = train.Run.learn
def slower(run, batches):
    time.sleep(0.3)
    return learn(run, batches)
train.Run.learn = slower
ftd.main()
"""


def begun(args: list[str], **more: object) -> subprocess.Popen[str]:
    """`ftd` in a group of processes of its own, each of its iterations a little slower."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, *args],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **more,  # type: ignore[call-overload]
    )


def wait_for(path: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.1)


SAVES = ("--set", "save_every=2", "--set", "val_every=3", "--set", "milestones=4")


def children(number: int) -> list[int]:
    text = Path(f"/proc/{number}/task/{number}/children").read_text()
    return [int(child) for child in text.split()]


@pytest.mark.parametrize(
    "what", ["the group is asked to stop", "a loading process is killed", "their parent is killed"]
)
def test_with_loading_processes(
    what: str, finished: Path, world: Path, cache: Path, tmp_path: Path
) -> None:
    """What was done is saved, one line is printed, and the resumed run is the one left alone."""
    out = tmp_path / "run"
    process = begun(train_args(out, world, cache, *SAVES, "--workers", 2, steps=6))
    wait_for(out / "last.safetensors")
    if what == "the group is asked to stop":
        os.killpg(process.pid, signal.SIGTERM)
    elif what == "their parent is killed":
        process.kill()
    else:
        os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    line = said.strip().splitlines()[-1]
    assert "Traceback" not in said and "an error that is ours" not in said, said
    if what == "the group is asked to stop":
        assert process.returncode == 130 and "interrupted at iteration" in line, said
    elif what == "their parent is killed":
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 1 and "a data loading process ended" in line, said
    assert 2 <= checkpoint.read_metadata(out / "last.safetensors")["iteration"] < 6
    resumed = ftd("train", "--resume", out, "--workers", 0)
    assert resumed.exit_code == 0, resumed.output
    assert same_bytes(finished, out)


def test_messages_that_nobody_reads(
    finished: Path, world: Path, cache: Path, tmp_path: Path
) -> None:
    """A reader such as head goes away: the training goes on to its end."""
    out = tmp_path / "run"
    process = begun(train_args(out, world, cache, *SAVES, steps=6))
    assert process.stderr is not None
    process.stderr.readline()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert same_bytes(finished, out)


HALF = """
import os, signal, sys
from pathlib import Path
from ftdpp import files
with files.replacing(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_goes_at_the_next_start(tmp_path: Path) -> None:
    """Not what a living one writes, or one on another machine, or what is not ours."""
    path, pid = tmp_path / "a", os.getpid()
    path.write_bytes(b"old")
    subprocess.run([sys.executable, "-c", HALF, str(path)], check=False)
    [left] = [other for other in tmp_path.iterdir() if other != path]
    assert path.read_bytes() == b"old" and left.read_bytes() == b"half"
    kept = [f".b.01234567-{pid}.tmp", f".a.{files._HERE}-{pid}.tmp", f".a.{files._HERE}-x.tmp"]
    for name in kept:
        (tmp_path / name).touch()
    with files.claimed(tmp_path):
        assert sorted(os.listdir(tmp_path)) == sorted(["a", ".lock", *kept])


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path: Path) -> None:
    path, mine = tmp_path / "a", tmp_path / "thesis.txt"
    mine.write_bytes(b"mine")
    files.temporary_beside(path).symlink_to(mine)
    files.write(path, b"whole")
    assert mine.read_bytes() == b"mine" and path.read_bytes() == b"whole"
    assert not path.is_symlink() and sorted(os.listdir(tmp_path)) == ["a", "thesis.txt"]


SAVED = """
import sys, torch
from pathlib import Path
from ftdpp import checkpoint
checkpoint.save(Path(sys.argv[1]), {"system/a": torch.ones(3)}, {"format": checkpoint.FORMAT})
"""


def test_two_processes_that_write_one_file(tmp_path: Path) -> None:
    """The last to end wins, and at every moment the file is whole."""
    path = tmp_path / "a.safetensors"
    with files.replacing(path) as temporary:
        temporary.write_bytes(b"first")
        subprocess.run([sys.executable, "-c", SAVED, str(path)], check=True)
        assert checkpoint.read_tensors(path, "system/")["a"].tolist() == [1, 1, 1]
        assert temporary.read_bytes() == b"first"
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == [path.name]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write(path, b"old")

    def fail() -> None:
        with files.replacing(path) as temporary:
            temporary.write_bytes(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_killed_between_the_last_two_checkpoints(
    world: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without validation, best.safetensors is the last iteration's."""
    domain = readers.domains()["singapore"]
    tokens = ",".join(ref.token for ref in readers.list_frames(world, domain, "train")[:4])

    def begin(name: str) -> Result:
        more = ("--tgt-frames", tokens)
        return ftd(*train_args(tmp_path / name, world, cache, *more, steps=1))

    assert begin("whole").exit_code == 0
    save, saved = train.Run.save, []

    def killed(run: train.Run, path: Path) -> None:
        saved.append(path.name)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(run, path)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "save", killed)
        assert begin("killed").exit_code == 130
    assert sorted(saved) == ["best.safetensors", "last.safetensors"]
    resumed = ftd("train", "--resume", tmp_path / "killed")
    assert resumed.exit_code == 0, resumed.output
    assert same_bytes(tmp_path / "whole", tmp_path / "killed")


def test_an_owed_validation_logs_the_rates_of_its_iteration(
    finished: Path, world: Path, cache: Path, tmp_path: Path
) -> None:
    """The resumed process has taken no step that would have set them."""
    out = tmp_path / "run"
    with stopped_in(6):
        assert ftd(*train_args(out, world, cache, *SAVES, steps=6)).exit_code == 130
    assert ftd("train", "--resume", out).exit_code == 0
    assert same_bytes(finished, out)
    whole, resumed = (
        [
            {**row, "seconds": ""}
            for row in csv.DictReader((run / "val.csv").read_text().splitlines())
        ]
        for run in (finished, out)
    )
    assert whole == resumed
    rates = [[value for name, value in row.items() if name.startswith("lr ")] for row in whole]
    assert rates[0] != rates[1], "the milestone was passed"


def test_a_killed_worker_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(ChildProcessError, match=r"was killed, .* the same command tries again"),
        processes.in_processes(2) as mapped,
    ):
        list(mapped(signal.raise_signal, [signal.SIGKILL]))


def test_a_full_disk(finished: Path, tmp_path: Path) -> None:
    """A limit of the size of files is one, too: the message names the file, nothing is left."""
    out = tmp_path / "main.safetensors"
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); from ftdpp import ftd; ftd.main()"
    )
    command = [sys.executable, "-c", code, "export", str(finished), "--out", str(out)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1 and "Traceback" not in found.stderr, found.stderr
    assert f"{out}: File too large" in found.stderr
    assert not list(tmp_path.iterdir())


# ---- what is not ours stays ----------------------------------------------------------------------


def test_a_lock_is_not_followed_and_not_emptied(tmp_path: Path) -> None:
    mine = tmp_path / "thesis.txt"
    mine.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(mine)
    (tmp_path / "index.lock").symlink_to(mine)
    with pytest.raises(OSError, match="symbolic"), files.claimed(tmp_path / "run"):
        pass
    with pytest.raises(OSError, match="symbolic"), files.locked(tmp_path / "index"):
        pass
    assert mine.read_text() == "mine"
    (tmp_path / "other.lock").write_text("mine")
    with files.locked(tmp_path / "other"):
        pass
    assert (tmp_path / "other.lock").read_text() == "mine"


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "a"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="not replaced"), files.replacing(pipe):
        pass
    assert pipe.is_fifo()


def test_a_picture_of_somebody_s_own_is_not_replaced(
    finished: Path, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    args = ("eval", finished, "--cache", cache, "--threads", 1, "--overlay", folder, "--count", 1)
    assert ftd(*args).exit_code == 0
    [picture] = folder.iterdir()
    assert shared.MARKS[".png"] == pictures.MARK
    assert pictures.MARK in picture.read_bytes()[:4096]
    assert ftd(*args).exit_code == 0, "one of ours is"
    picture.write_bytes(b"mine")
    found = ftd(*args)
    assert found.exit_code == 1 and "ftd did not write it" in words(found)
    assert picture.read_bytes() == b"mine"


def test_a_run_s_files_without_its_checkpoint(
    finished: Path, world: Path, cache: Path, tmp_path: Path
) -> None:
    """best.safetensors is there and last is not; or a log that no run has written."""
    out = tmp_path / "run"
    out.mkdir()
    for name in ("best.safetensors", "log.csv"):
        (out / name).write_bytes((finished / name).read_bytes())
        found = ftd(*train_args(out, world, cache))
        assert found.exit_code == 2 and f"holds {name}" in words(found)
        (out / name).unlink()


def test_results_of_somebody_s_own_are_not_replaced(tmp_path: Path) -> None:
    """Not even JSON that has a format."""
    path = tmp_path / "thesis.json"
    path.write_text('{"format": 1}')
    found = ftd("compare", "--preset", "small", "--results", path, "--out", tmp_path / "runs")
    assert found.exit_code == 1 and "not a file of ftd compare" in words(found)
    assert path.read_text() == '{"format": 1}'


def test_force_replaces(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "main.safetensors"
    out.write_text("mine")
    assert ftd("export", finished, "--out", out).exit_code == 2
    assert out.read_text() == "mine"
    assert ftd("export", finished, "--out", out, "--force").exit_code == 0
    assert ftd("export", finished, "--out", out).exit_code == 0, "its own"


# ---- data ----------------------------------------------------------------------------------------


def test_a_point_that_no_lidar_sees_is_dropped_and_counted(tmp_path: Path) -> None:
    """It would leave the grid to itself."""
    root = layouts.kitti(tmp_path / "kitti", ("00",))
    row = readers.domains()["skitti"]
    file = root / "sequences/00/velodyne/000000.bin"
    points = np.fromfile(file, np.float32).reshape(-1, 4)
    whole = prepare(root, row, "train", "street6", None, tmp_path / "a")
    points[:3, 0] = -10_000, FAR, 3e38
    points.tofile(file)
    index = prepare(root, row, "train", "street6", None, tmp_path / "b")
    assert index.fingerprint["dropped_points"] == 3
    assert 0 < whole.frame(0).rows - index.frame(0).rows <= 3
    assert np.abs(index.frame(0).xyz).max() < FAR
    ref = readers.list_frames(root, row, "train")[0]
    assert read_frame(ref, np.full(256, 0, np.uint8), None).dropped == 3


def test_training_without_a_labelled_point(
    world: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs.Index, "counts", lambda self: np.zeros(6, np.int64))
    found = ftd(*train_args(tmp_path / "run", world, cache))
    assert found.exit_code == 3 and "none of its points has a label" in words(found)
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_a_version_is_a_folder_of_the_root(world: Path) -> None:
    found = ftd("data", "check", world, "--domain", "usa", "--data-version", "../..")
    assert found.exit_code == 3 and "expected the name of a folder in it" in words(found)
