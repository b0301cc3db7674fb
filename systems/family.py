"""xMUDA and the baselines: FtD++'s networks and step with terms switched off (rows of METHODS).

They follow xMUDA's own release (valeoai/xmuda_journal) where its configuration differs: learning
rates, schedule, and the weight of mimicry on KITTI's target.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ftdpp.systems import ftdpp

_COMMON: dict[str, Any] = {
    "batch": 8,
    "lr_2d": 1e-3,
    "steps": 100_000,
    "milestones": (80_000, 90_000),
    "gamma": 0.1,
}
_OWN: dict[str, dict[str, Any]] = {
    "vkitti-skitti": {
        "steps": 30_000,
        "milestones": (25_000, 28_000),
        "mimic_tgt": 0.01,
        "val_every": 2_000,
        "save_every": 2_000,
    },
    "a2d2-skitti": {"mimic_tgt": 0.01},
    "a2d2-skitti-ssda": {"mimic_tgt": 0.01},
}


class System(ftdpp.System):
    """FtD++'s step under the settings of xMUDA's release."""

    scenarios: ClassVar[dict[str, dict[str, Any]]] = {
        name: {**row, **_COMMON, **_OWN.get(name, {})} for name, row in ftdpp.SCENARIOS.items()
    }
    default: ClassVar[dict[str, Any]] = _COMMON
