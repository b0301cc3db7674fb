"""Weights that others have trained: their files, checks, ImageNet's weights for the trunks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftdpp.models import Trunk


def read_pth(file: str | Path) -> Any:
    """What a .pth file holds, without running the code that may be in it.

    Raises:
        ValueError: that is not possible.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # torch raises several kinds, and advises to load the file unsafely
        raise ValueError(
            f"{file}: not a PyTorch file, or one that cannot be read without running code in it"
        ) from None


def misfits(found: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> list[str]:
    """Names that are missing from `found`, left over, or of another shape than in `wanted`."""

    def shape(tensors: Mapping[str, Any], name: str) -> Any:
        return getattr(tensors.get(name), "shape", None)

    names = found.keys() | wanted.keys()
    same = {n for n in found.keys() & wanted.keys() if shape(found, n) == shape(wanted, n)}
    return sorted(names - same)


def imagenet_weights(encoder: Trunk, file: str | Path | None = None) -> dict[str, Tensor]:
    """torchvision's ImageNet weights for an image trunk, from `file` or by download.

    Raises:
        ValueError: the file is not such a state dict, or the trunk's width is not the paper's.
        OSError: it cannot be fetched.
    """
    name, url = encoder.IMAGENET
    if file is None:
        try:
            state = torch.hub.load_state_dict_from_url(
                url, progress=False, map_location="cpu", weights_only=True
            )
        except OSError as error:  # also how a failed download is reported
            raise OSError(
                f"{url}: {error}; fetch it by hand and name the file with --pretrained FILE"
            ) from None
    else:
        state = read_pth(file)
    wanted = {k: v for k, v in encoder.state_dict().items() if not k.startswith(encoder.BESIDE)}
    weights = {k: v for k, v in state.items() if k in wanted} if isinstance(state, dict) else {}
    bad = misfits(weights, wanted)
    if bad:
        raise ValueError(
            f"{file or url}: not torchvision's {name} state dict for a trunk of this width; "
            f"{len(bad)} tensors are missing or of another shape, first {bad[0]}"
        )
    return weights
