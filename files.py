"""Files that are written whole or not at all, and folders that one process at a time builds."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Progress = Callable[[int, int, str], None]  # done, total, what is going on


def cache_home() -> Path:
    """The folder of what is made once: $FTD_CACHE, or ftd in the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("FTD_CACHE") or home / "ftd")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process at a time builds `folder`; the others wait and find it finished."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Only this process writes into `folder`.

    Raises:
        BlockingIOError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. What was written there takes its name at the end.

    A reader sees the old file or the new one, never a half; after an error the old one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # some libraries write for the owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
