"""Files written whole or not at all, logs, and folders that one process at a time builds."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

Progress = Callable[[int, int, str], None]  # done, total, what is going on


def cache_home() -> Path:
    """The folder of what is made once: $FTD_CACHE, or ftd in the user's cache.

    An $XDG_CACHE_HOME that is empty or not absolute counts as none (XDG Base Directory
    Specification). Raises OSError where the user has no home.
    """
    chosen, shared = os.environ.get("FTD_CACHE"), Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        if chosen:
            return Path(chosen).expanduser()
        return (shared if shared.is_absolute() else Path.home() / ".cache") / "ftd"
    except RuntimeError:
        raise OSError(
            errno.ENOENT, "no home folder, which would hold it; name it with --cache", "the cache"
        ) from None


def _opened_lock(path: Path) -> IO[bytes]:
    """A lock file, whose content is left alone; a link is not followed, a pipe not waited for."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    return os.fdopen(os.open(path, flags, 0o666), "rb+", buffering=0)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process at a time builds `folder`; the others wait and find it finished."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _opened_lock(folder.with_name(folder.name + ".lock")) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sweep(folder.parent)
        yield


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Only this process writes into `folder`.

    Raises:
        BlockingIOError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _opened_lock(folder / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        sweep(folder)
        yield


_HERE = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]  # this machine


def temporary_beside(path: Path) -> Path:
    """A name beside a file that no other process has, on no machine."""
    return path.with_name(f".{path.name}.{_HERE}-{os.getpid()}.tmp")


def sweep(folder: Path) -> None:
    """Removes from a folder what killed processes of this machine left of files they wrote."""
    for left in folder.glob(f".*.{_HERE}-*.tmp"):
        number = left.name.removesuffix(".tmp").rpartition("-")[2]
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (ValueError, OverflowError, PermissionError):  # none of ours; or it lives
            pass


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. What was written there takes its name at the end.

    A reader sees the old file or the new one, never a half; after an error the old one stays. What
    a killed process leaves, `sweep` removes at the start of the next command that writes there.
    """
    if path.exists() and not path.is_file():
        raise OSError(
            errno.EINVAL, "is a folder, a pipe or a device, and is not replaced", str(path)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        temporary.unlink(missing_ok=True)
        # Not through a link that somebody put there.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # some libraries write for the owner alone
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None or str(temporary) == error.filename:  # a full disk names nothing
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def finish(partial: Path, final: Path) -> None:
    """A folder that was built under a lock takes its name, without what killed processes left in
    it, on whatever machine."""
    for left in partial.rglob(".*.tmp"):
        left.unlink()
    os.replace(partial, final)


def regular(path: Path) -> Path:
    """The path of a regular file: a pipe or a device may never end.

    Raises:
        OSError: it is not there, or something else.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is a folder, a pipe or a device, expected a file", str(path))
    return path


def read(path: Path) -> bytes:
    """The content of a regular file. Raises OSError."""
    return regular(path).read_bytes()


def write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


class Log:
    """A CSV of rows that begin with an iteration. On resume the later ones are cut off.

    Args:
        writes: False makes one that keeps nothing.
    """

    def __init__(self, path: Path, iteration: int, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.columns: list[str] = []
        self.rows: list[dict[str, Any]] = []  # not written yet
        if not writes:
            return
        kept = [row for row in self._stored() if int(row["iteration"]) <= iteration]
        if not kept:
            path.unlink(missing_ok=True)
        self._write(kept)

    def _stored(self) -> list[dict[str, Any]]:
        """The rows of the file; a torn last one, from a killed process, is none."""
        if not self.path.exists():
            return []
        try:
            with regular(self.path).open(newline="") as f:
                rows = [row for row in csv.DictReader(f) if None not in row.values()]
            if all(row["iteration"].isdecimal() for row in rows):
                return rows
        except (KeyError, AttributeError, TypeError, UnicodeDecodeError, csv.Error):
            pass
        raise OSError(errno.EINVAL, "is not a log of ftd train; move it away", str(self.path))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """The whole file."""
        if not rows:
            return
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        with replacing(self.path) as temporary, temporary.open("w", newline="") as f:
            writer = csv.DictWriter(f, self.columns)
            writer.writeheader()
            writer.writerows(rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if len(self.rows) >= 50:
            self.flush()

    def flush(self) -> None:
        if not self.writes:
            pass
        elif any(row.keys() - set(self.columns) for row in self.rows):  # terms that came later
            self._write(self._stored() + self.rows)
        elif self.rows:
            with self.path.open("a", newline="") as f:
                csv.DictWriter(f, self.columns).writerows(self.rows)
        self.rows = []
