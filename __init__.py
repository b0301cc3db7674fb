"""FtD++ and its family as a library: load a trained system, label the points of a frame.

    system = ftdpp.load("runs/usa-singapore-ftdpp-seed0")
    rows, probabilities = ftdpp.predict(system, image, points, calibration)

Heavy imports happen inside, so that `ftd --help` is immediate.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = ["load", "predict"]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("ftdpp")
    raise AttributeError(name)


def load(run_or_file: str | Path, device: str = "cpu") -> Any:
    """The trained system of a run folder (its best checkpoint) or of a checkpoint file.

    Raises:
        RunError: there is no checkpoint, or it is damaged or of another version.
    """
    from ftdpp.checkpoint import load as read

    path = Path(run_or_file)
    return read(path / "best.safetensors" if path.is_dir() else path, device)[0]


def predict(
    system: Any, image: np.ndarray, points: np.ndarray, calibration: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Class probabilities of the points that the camera sees; see `inference.predict`."""
    from ftdpp.inference import predict as run

    return run(system, image, points, calibration)
