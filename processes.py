"""Work that is spread over processes, which end with the one that started them."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from typing import Any


def die_with_parent() -> None:
    """Ends this process when its parent is gone: a killed parent cannot stop it.

    On Linux the kernel does it at once, before a lost connection is complained of. The watch is for
    other systems, and for a parent that was gone before.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    die_with_parent()


@contextmanager
def in_processes(count: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` by as many processes; by none beside this one where one is enough.

    Raises:
        ChildProcessError: one of them was killed.
    """
    if count < 2:
        yield map
        return
    # Spawned, not forked: the caller may hold threads or a CUDA context.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, _begin)
    try:
        yield pool.map
    except BrokenProcessPool:
        why = "was killed, perhaps for lack of memory; the same command tries again"
        raise ChildProcessError(errno.ECHILD, why, "a process that this one started") from None
    finally:
        pool.shutdown(cancel_futures=True)
