"""What this machine is and has to give: processor, free CPU threads, memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from ftdpp import kernels

IDLE = 0.25  # busy cores that an idle machine shows, too


def free_threads(
    cores: int | None = None,
    allowed: int | None = None,
    busy: float | None = None,
    root: Path = Path("/"),
    environment: Mapping[str, str] = os.environ,
) -> tuple[int, str]:
    """How many CPU threads to compute with, and why, in words for the start-up line.

    Two threads that share a core with another job wait for each other at every operation: with two
    busy threads on a shared machine a step takes five times as long as with one. So this takes the
    whole cores that are free, never more, and at least one.

    Args:
        cores: of the machine. allowed: that this process may run on. busy: how many are at work at
            this moment. None, each: as the system says.
        root: below it lie proc/self/cgroup and sys/fs/cgroup.
        environment: a number in its OMP_NUM_THREADS is the user's choice and is taken as it is.
    """
    chosen = environment.get("OMP_NUM_THREADS", "")
    if chosen.isdecimal() and int(chosen) > 0:
        return int(chosen), "OMP_NUM_THREADS"
    cores = cores or os.cpu_count() or 1
    allowed = allowed or allowed_cores()
    if busy is None:
        busy = busy_cores()
    limit = cgroup_cores(root)

    words = f"{cores} core{'s' if cores > 1 else ''}"
    if allowed < cores:
        words += f", {allowed} allowed to this process"
    if limit is not None and limit < min(cores, allowed):
        words += f", limited to {limit:g} by the control group"
    if busy > IDLE:
        words += f", {busy:.1f} of them busy: another job is running"
    else:
        busy = 0.0
    free = min(cores - busy, allowed, cores if limit is None else limit)
    return max(int(free), 1), words


def use(device: torch.device) -> None:
    """Compute on a device from now on, in this process."""
    if device.type == "cuda":
        kernels.products("tf32")  # as cuDNN's convolutions use, and nothing else
        if device.index is not None:
            torch.cuda.set_device(device)  # Triton launches on the current one


def allowed_cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def busy_cores(seconds: float = 0.4, stat: Path = Path("/proc/stat")) -> float:
    """How many cores are at work now, while this process waits; 0 where the system does not say.

    Not the load average: that remembers the minute before, such as our own building of the world.
    """

    def ticks() -> tuple[int, int]:
        numbers = [int(word) for word in _text(stat).partition("\n")[0].split()[1:9]]
        # user, nice, system, idle, iowait, irq, softirq, steal
        return sum(numbers) - sum(numbers[3:5]), sum(numbers)

    if not _text(stat).startswith("cpu "):
        return 0.0
    work, total = ticks()
    time.sleep(seconds)
    work_later, total_later = ticks()
    return (os.cpu_count() or 1) * (work_later - work) / max(total_later - total, 1)


def cgroup_cores(root: Path = Path("/")) -> float | None:
    """CPU time that control groups (version 2 or 1) leave this process, in cores; None: no limit.

    The limit of a group holds for the groups below it, so the smallest on the way up counts.
    """
    limits = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        place = base / group.lstrip("/")
        # In a container the group's path may be the host's: then only the base itself is there.
        for folder in (place, *place.parents):
            if controllers:
                quota, period = (
                    _text(folder / "cpu.cfs_quota_us"),
                    _text(folder / "cpu.cfs_period_us"),
                )
            else:
                quota, _, period = _text(folder / "cpu.max").partition(" ")
            if quota.isdecimal() and period.isdecimal() and int(period):  # not "max", not "-1"
                limits.append(int(quota) / int(period))
            if folder == base:
                break
    return min(limits, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def describe(device: torch.device, root: Path = Path("/")) -> str:
    """Kind of processor or GPU, threads, version of PyTorch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    lines = _text(root / "proc/cpuinfo").splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    model = next(models, platform.processor() or platform.machine())
    count = torch.get_num_threads()
    threads = "1 thread" if count == 1 else f"{count} threads"
    return f"{model}, {threads}, torch {torch.__version__}"


def keep_freed_memory() -> None:
    """Tell glibc not to hand freed blocks back to the kernel.

    Each step would fault the same memory in again, at the cost of kernel time. Does nothing where
    there is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, 1 << 30)


def memory(device: torch.device) -> int:
    """Bytes of memory that the device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: torch.device) -> int:
    """Bytes: the GPU's largest allocation, or the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
