"""Sparse 3D convolution: voxel pyramids, their kernel maps, and the operations on them.

Everything else imports from here and does not know which implementation runs: Triton on a GPU (`hash.py` builds the maps,
`gemm.py` multiplies), plain PyTorch on a CPU (`maps.py`, `reference.py`). Both give the same voxels in the same order and the
same pairs. `FTD_KERNELS=torch|triton` overrides the choice; `backend()` says what runs and why.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch
from torch import Tensor

from ftdpp.kernels import reference
from ftdpp.kernels.maps import KernelMap, Pyramid
from ftdpp.kernels.reference import pixel_to_point, voxel_mean, voxel_to_point

__all__ = [
    "KernelError",
    "KernelMap",
    "Pyramid",
    "backend",
    "pixel_to_point",
    "pyramid",
    "sparse_conv",
    "voxel_mean",
    "voxel_to_point",
]


class KernelError(ValueError):
    """FTD_KERNELS asks for an implementation that is unknown or cannot run here."""


def backend(device: str | torch.device) -> tuple[str, str]:
    """Name of the implementation for a device, torch or triton, and the reason in words.

    Raises:
        KernelError: FTD_KERNELS asks for what is unknown or cannot run here.
    """
    device = torch.device(device).type
    wish = os.environ.get("FTD_KERNELS", "")
    present = importlib.util.find_spec("triton") is not None
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # Triton builds its launchers with it
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if wish not in ("", "torch", "triton"):
        raise KernelError(f"FTD_KERNELS={wish}: expected torch or triton, or leave it unset")
    if wish == "triton" and not present:
        raise KernelError("FTD_KERNELS=triton, but triton cannot be found: pip install triton")
    if wish == "triton" and device == "cpu" and not interpreted:
        raise KernelError(
            "FTD_KERNELS=triton on a CPU needs Triton's interpreter: set TRITON_INTERPRET=1 as well (slow, for tests), "
            "or leave FTD_KERNELS unset"
        )
    if wish:
        return wish, f"FTD_KERNELS={wish}"
    if device == "cuda" and present and compiler:
        return "triton", "a GPU, triton and a C compiler are present"
    if device == "cuda":
        missing = "a C compiler (gcc or clang)" if present else "triton (pip install triton)"
        return "torch", f"{missing} is missing, which the faster kernels need"
    pooling = "native torch (torch-scatter cannot be imported)" if reference.segment_csr is None else "torch-scatter"
    return "torch", f"plain PyTorch on a CPU; point pooling: {pooling}"


def pyramid(coords: Tensor, levels: int = 7) -> Pyramid:
    """The maps of a sparse U-Net over points (N, 4) b, x, y, z, built by the implementation for their device."""
    if backend(coords.device)[0] == "torch":
        return Pyramid(coords, levels)
    from ftdpp.kernels.hash import HashPyramid  # imports triton

    return HashPyramid(coords, levels)


def sparse_conv(x: Tensor, weight: Tensor, kmap: KernelMap) -> Tensor:
    """Sparse convolution `y[o] = sum over the pairs (i, o) of offset k: x[i] @ weight[k]`, on the map of either pyramid.

    Args:
        x: (N_in, Cin). weight: (K, Cin, Cout). kmap: of `Pyramid.same`, `.down` or `.down[l].transposed`.
    Returns:
        (N_out, Cout).
    Raises:
        ValueError: when the shapes do not fit the map.
    """
    if isinstance(kmap, KernelMap):
        return reference.sparse_conv(x, weight, kmap)
    from ftdpp.kernels import gemm

    return gemm.sparse_conv(x, weight, kmap)
