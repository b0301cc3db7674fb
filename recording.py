"""A frame as a recording for the viewer Rerun, where its package is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftdpp.checkpoint import RunError
from ftdpp.data import UNLABELLED, Frame
from ftdpp.files import replacing
from ftdpp.pictures import NONE, palette


def require() -> Any:
    """The package. Raises RunError where it is missing."""
    try:
        import rerun
    except ImportError:
        raise RunError("--rrd: rerun-sdk is not installed; pip install '.[rerun]'") from None
    return rerun


def write(
    path: Path, frame: Frame, labels: Mapping[str, np.ndarray], names: Sequence[str], title: str
) -> None:
    """The photo with its points, and the points in space, once for each head and the truth.

    Args:
        frame: at its own size. labels: head -> classes of its rows, (M,) u8, 255 = none.
    """
    rr = require()
    shown = {"truth": frame.label.reshape(-1)} if frame.has_label else {}
    shown |= labels
    classes = [*zip(range(len(names)), names, palette(names), strict=True)]
    classes.append((UNLABELLED, "no label", NONE))
    with replacing(path) as temporary, rr.RecordingStream("ftd", recording_id=title) as stream:
        stream.save(temporary)
        context = [rr.AnnotationInfo(number, name, colour) for number, name, colour in classes]
        stream.log("/", rr.AnnotationContext(context), static=True)
        stream.log("camera/photo", rr.Image(frame.image), static=True)
        for head, label in shown.items():
            if frame.xyz is None:
                picture = label.reshape(frame.image.shape[:2])
                stream.log(f"camera/{head}", rr.SegmentationImage(picture), static=True)
                continue
            assert frame.pixel is not None
            xy = frame.pixel[:, ::-1].astype(np.float32) + 0.5
            stream.log(f"camera/{head}", rr.Points2D(xy, class_ids=label, radii=2.0), static=True)
            stream.log(f"space/{head}", rr.Points3D(frame.xyz, class_ids=label), static=True)
        stream.flush()
