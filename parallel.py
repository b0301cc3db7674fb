"""Several processes that train one network: torchrun --nproc-per-node=N -m ftdpp train ...

An update is the mean over its parts. A part is what a single process computes: a batch of every
stream, with chance of its own. `accumulate` parts run after one another in a process, and each
process has as many; so two processes do what accumulate=2 does in one, to the rounding of sums.

Process 0 writes all files and evaluates. Parameters are equal in all; buffers (running statistics)
are process 0's, which DistributedDataParallel hands out before each forward pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from ftdpp.checkpoint import RunError
from ftdpp.models import BatchNormReLU

# How long the others wait while process 0 evaluates. A process that is gone is noticed at once by
# gloo; where NCCL waits for it, torchrun ends the others.
PATIENCE = timedelta(hours=6)


def asked_for() -> int:
    """How many processes torchrun has started; 1 without it."""
    started = all(name in os.environ for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"))
    return int(os.environ.get("WORLD_SIZE", "1")) if started else 1


def number() -> int:
    """Which of them this process is, from 0, also before they are a group."""
    return int(os.environ["RANK"]) if asked_for() > 1 else 0


def own_gpu() -> torch.device:
    """The GPU of this process. Raises RunError where this machine has fewer than processes."""
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= there:
        raise RunError(
            f"torchrun started more processes than there are GPUs here ({there}); lower "
            "--nproc-per-node"
        )
    return torch.device("cuda", local)


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Within it, the processes that torchrun has started are a group: gloo on CPUs, NCCL on GPUs.

    Args:
        device: of this process.
    """
    if asked_for() < 2:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def noticing() -> Iterator[None]:
    """Within it, a process that is gone is an error of the run.

    Raises:
        RunError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        lost = isinstance(error, dist.DistError) or "gloo" in text or "Connection" in text
        if size() < 2 or not lost:
            raise
        raise RunError(
            f"process {rank()} of {size()}: another process of this training has ended "
            f"({text.splitlines()[0][:120]}); the last checkpoint stands: go on from it with the "
            "same torchrun command and --resume RUN"
        ) from None


def together(system: nn.Module, sync_batchnorm: bool) -> Any:
    """The system as it is called in training: itself, or as one of several processes.

    Args:
        sync_batchnorm: normalise with the statistics of all processes' batches, but for the voxels
            (`BatchNormReLU`), which keep those of their own process.
    Raises:
        RunError: sync_batchnorm on a CPU, where PyTorch has none.
    """
    if sync_batchnorm:
        if next(system.parameters()).device.type != "cuda":
            raise RunError("sync_batchnorm=true: PyTorch's SyncBatchNorm needs GPUs; drop it")
        synchronise(system)
    if size() < 2:
        return system
    # A phase does not use every parameter.
    return nn.parallel.DistributedDataParallel(system, find_unused_parameters=True)


def synchronise(module: nn.Module) -> None:
    """Put SyncBatchNorm in the place of BatchNorm, under the same names."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            if not isinstance(child, BatchNormReLU):
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
        else:
            synchronise(child)


@contextmanager
def silent(network: Any, last: bool) -> Iterator[None]:
    """Gradients are exchanged in the last part of an update, not before."""
    if size() > 1 and not last:
        with network.no_sync():
            yield
    else:
        yield


def mean_terms(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Loss terms, averaged over the processes."""
    if size() < 2:
        return dict(terms)
    values = torch.stack([term.detach() for term in terms.values()])
    with noticing():
        dist.all_reduce(values)
    return dict(zip(terms, values / size(), strict=True))


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether one of the processes says so."""
    if size() < 2:
        return flag
    found = torch.tensor(float(flag), device=device)
    with noticing():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())
