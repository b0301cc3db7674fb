"""Sparse 3D convolution: voxel pyramids, their kernel maps, and the operations on them.

`naive.py` says what they are and is the file to read first. Everything outside imports from here
and need not know which implementation runs: Triton on a GPU (`hash.py` builds the maps, `gemm.py`
multiplies, `norm.py` normalises), plain PyTorch on a CPU (`maps.py`, `reference.py`). Both give the
same voxels in the same order and the same pairs. `FTD_KERNELS=torch|triton` overrides the choice;
`backend()` says which one runs and why. External attention in plain PyTorch belongs to the system
that has it; `attention.py` is Triton's.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ftdpp.kernels import reference
from ftdpp.kernels.maps import KernelMap, Pyramid

P = ParamSpec("P")
R = TypeVar("R")

__all__ = [
    "KernelError",
    "KernelMap",
    "Pyramid",
    "attend",
    "backend",
    "batch_norm_relu",
    "fuses_attention",
    "pixel_to_point",
    "pyramid",
    "sparse_conv",
    "voxel_mean",
    "voxel_to_point",
]


class KernelError(ValueError):
    """FTD_KERNELS asks for an implementation that is unknown or cannot run here."""


def _eager(f: Callable[P, R]) -> Callable[P, R]:
    """Under torch.compile, f runs between the compiled pieces: its maps change with every batch.

    The decorator torch.compiler.disable does the same, but what it imports takes a second. Here
    only a process that compiles imports it.
    """

    @functools.wraps(f)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(f)(*args, **kwargs)
        return f(*args, **kwargs)

    return call


_products = "ieee"


def products(kind: str | None = None) -> str:
    """How Triton multiplies fp32 in sparse convolutions: "ieee", or "tf32", with ten bits of each
    factor.

    A switch of its own: PyTorch's would hold for fusion, heads and attention, too, whose values of
    about 1/N need all their digits.

    Args:
        kind: set it, for this process.
    """
    global _products
    _products = kind or _products
    return _products


voxel_mean = _eager(reference.voxel_mean)
voxel_to_point = _eager(reference.voxel_to_point)
pixel_to_point = _eager(reference.pixel_to_point)


def backend(device: str | torch.device) -> tuple[str, str]:
    """Name of the implementation for a device, torch or triton, and the reason in words.

    Raises:
        KernelError: FTD_KERNELS asks for an implementation that is unknown or cannot run here.
    """
    device = torch.device(device).type
    wish = os.environ.get("FTD_KERNELS", "")
    present = importlib.util.find_spec("triton") is not None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    # Triton compiles its launchers with a C compiler.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if wish not in ("", "torch", "triton"):
        raise KernelError(f"FTD_KERNELS={wish}: expected torch or triton, or leave it unset")
    if wish == "triton" and not present:
        raise KernelError("FTD_KERNELS=triton, but triton cannot be found: pip install triton")
    if wish == "triton" and device == "cpu" and not interpreted:
        raise KernelError(
            "FTD_KERNELS=triton on a CPU needs Triton's interpreter: set TRITON_INTERPRET=1 as "
            "well (slow, for tests), or leave FTD_KERNELS unset"
        )
    if wish:
        return wish, f"FTD_KERNELS={wish}"
    if device == "cuda" and present and compiler:
        return "triton", "a GPU, triton and a C compiler are present"
    if device == "cuda":
        missing = "a C compiler (gcc or clang)" if present else "triton (pip install triton)"
        return "torch", f"{missing} is missing, which the faster kernels need"
    pooling = "torch-scatter"
    if reference.segment_csr is None:
        pooling = "native torch (torch-scatter cannot be imported)"
    return "torch", f"plain PyTorch on a CPU; point pooling: {pooling}"


@_eager
def pyramid(coords: Tensor, levels: int = 7, count: Tensor | None = None) -> Pyramid:
    """The maps of a sparse U-Net, built by the implementation for the device of the points.

    Args:
        coords: (N, 4) integer points b, x, y, z. levels: number of resolutions.
        count: () int64 on the device: only the first `count` rows are points. For CUDA graphs,
            which replay fixed sizes; see `hash.py`.
    Raises:
        KernelError: `count` where plain PyTorch runs, which has no use for it.
    """
    name, why = backend(coords.device)
    if name == "torch":
        if count is not None:
            raise KernelError(
                f"padded maps are Triton's, and plain PyTorch runs here ({why}): "
                "pass the points alone"
            )
        return Pyramid(coords, levels)
    from ftdpp.kernels.hash import HashPyramid  # imports triton

    return HashPyramid(coords, levels, count)


@_eager
def sparse_conv(x: Tensor, weight: Tensor, kmap: KernelMap) -> Tensor:
    """Sparse convolution: `y[o] = sum of x[i] @ weight[k]` over the pairs (i, o) of every offset k.

    Args:
        x: (N_in, Cin). weight: (K, Cin, Cout).
        kmap: of either pyramid: one of `same` or `down`, or `down[l].transposed`.
    Returns:
        (N_out, Cout). Under autocast Triton computes in autocast's dtype; plain PyTorch stays in
        fp32, which is faster on a CPU.
    Raises:
        ValueError: the shapes do not fit the map; or, with Triton, dtypes that differ or are not
            fp32, fp16 or bf16.
    """
    if x.shape != (kmap.n_in, weight.shape[1]) or len(weight) != kmap.offsets:
        raise ValueError(
            f"sparse_conv: input {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit a "
            f"map of {kmap.n_in} input voxels and {kmap.offsets} offsets"
        )
    if isinstance(kmap, KernelMap):
        return reference.sparse_conv(x, weight, kmap)
    from ftdpp.kernels import gemm

    return gemm.sparse_conv(x, weight, kmap)


@_eager
def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    live: Tensor,
    running: tuple[Tensor, Tensor, Tensor],
    momentum: float,
    eps: float,
) -> Tensor:
    """`norm.batch_norm_relu`: BatchNorm and ReLU over the voxels of Triton's maps, in training."""
    from ftdpp.kernels import norm

    return norm.batch_norm_relu(x, weight, bias, live, running, momentum, eps)


@_eager
def fuses_attention(x: Tensor) -> bool:
    """Whether `attend` serves heads x (heads, d, N): Triton runs, x is fp32 and d fits its tile."""
    # A CPU runs Triton only if it is told to. To ask for the reason as well takes 0.2 ms.
    told = x.is_cuda or os.environ.get("FTD_KERNELS")
    if not told or x.dtype != torch.float32 or backend(x.device)[0] != "triton":
        return False
    from ftdpp.kernels import attention

    return x.shape[1] <= attention.WIDEST


@_eager
def attend(x: Tensor, key: Tensor, value: Tensor, p: float) -> Tensor:
    """`attention.attend`: heads of external attention by Triton, where `fuses_attention`."""
    from ftdpp.kernels import attention

    return attention.attend(x, key, value, p)
