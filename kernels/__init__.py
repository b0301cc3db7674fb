"""Sparse 3D convolution: voxel pyramids, their kernel maps, and the operations on them.

Everything else imports from here and does not know which implementation runs. Today there is one: `reference.py`, plain
PyTorch, on any device. `backend()` says what runs and why.
"""

from ftdpp.kernels.maps import KernelMap, Pyramid
from ftdpp.kernels.reference import pixel_to_point, segment_csr, sparse_conv, voxel_mean, voxel_to_point

__all__ = ["KernelMap", "Pyramid", "backend", "pixel_to_point", "sparse_conv", "voxel_mean", "voxel_to_point"]


def backend() -> tuple[str, str]:
    """Name of the implementation in use, and the reason in words."""
    pooling = "torch-scatter" if segment_csr is not None else "native torch (torch-scatter cannot be imported)"
    return "torch", f"plain PyTorch is the only implementation so far; point pooling on a CPU: {pooling}"
