"""Released FtD++ checkpoints: three .pth files become one of ours (`ftd convert`)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ftdpp.checkpoint import FORMAT, RunError, save
from ftdpp.data import CLASS_SETS
from ftdpp.pretrained import misfits, read_pth
from ftdpp.systems import build

_RELEASED_2D = [
    (r"^net_2d\.dec_t_conv_stage([2-5])\.", lambda m: f"trunk.up.{int(m[1]) - 2}."),
    (r"^net_2d\.dec_conv_stage1\.", lambda m: "trunk.merge.0."),
    (r"^net_2d\.dec_conv_stage([2-4])\.", lambda m: f"trunk.merge.{int(m[1]) - 1}."),
    (r"^net_2d\.", lambda m: "trunk."),
    (r"^proj_head1\.", lambda m: "fused_in."),
    (r"^proj_head2\.", lambda m: "fused_out."),
]
_RELEASED_HEADS = [(r"^cls_head1\.", lambda m: "main."), (r"^cls_head2\.", lambda m: "mimic.")]
# SparseConvNet nests each level in the branch of the one above: `.1.1.2` once a level.
_RELEASED_LEVEL = {
    "0.0": "encode.{}.norm",
    "0.1": "encode.{}.conv",
    "1.1.0": "down.{}.norm",
    "1.1.1": "down.{}.conv",
    "1.1.3": "up.{}.norm",
    "1.1.4": "up.{}.conv",
    "3.0": "decode.{}.norm",
    "3.1": "decode.{}.conv",
}
_RELEASED_FUSION = [
    (r"^cbam\.ca\.se\.", lambda m: "cbam.channel."),
    (r"^cbam\.sa\.conv\.", lambda m: "cbam.spatial."),
    (r"^ea_2d\.", lambda m: "attend_2d."),
    (r"^ea_3d\.", lambda m: "attend_3d."),
    (r"^ea_fuse\.", lambda m: "attend."),
    (r"\.trans_dims\.", lambda m: ".expand."),
    (r"\.linear_0\.", lambda m: ".key."),
    (r"\.linear_1\.", lambda m: ".value."),
    (r"\.proj\.", lambda m: ".project."),
    (r"^mlp\.0\.", lambda m: "mix."),
    (r"^fusion\.0\.", lambda m: "out."),
    (r"^fusion\.1\.", lambda m: "norm."),
]


def _released_3d(name: str) -> str:
    name = name.removeprefix("net_3d.")
    if name.startswith("sparseModel.1."):
        return "trunk.stem." + name.removeprefix("sparseModel.1.")
    if name.startswith("sparseModel.3."):
        return "trunk.norm." + name.removeprefix("sparseModel.3.")
    found = re.fullmatch(r"sparseModel\.2((?:\.1\.1\.2)*)\.([0-9.]+)\.(\w+)", name)
    if found and found[2] in _RELEASED_LEVEL:
        return f"trunk.{_RELEASED_LEVEL[found[2]].format(found[1].count('.1.1.2'))}.{found[3]}"
    return name


def released_name(part: str, name: str) -> str:
    """Our name, inside `CrossModal`, of a tensor of a released state dict.

    Args:
        part: "2d", "3d" or "fusion".
    """
    if part == "3d":
        name = _released_3d(name)
    rules = {
        "2d": _RELEASED_2D + _RELEASED_HEADS,
        "3d": _RELEASED_HEADS,
        "fusion": _RELEASED_FUSION,
    }[part]
    for pattern, to in rules:
        name = re.sub(pattern, to, name)
    return f"fusion.{name}" if part == "fusion" else f"net_{part}.{name}"


def convert_released(part: str, state: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Rename a released state dict and reshape its sparse weights to (K, Cin, Cout).

    Args:
        part: "2d", "3d" or "fusion": which of the three released files the items come from.
        state: (name, tensor) pairs; a sparse weight is (K, 1, Cin, Cout).
    """
    out = {}
    for name, tensor in state:
        if part == "3d" and tensor.ndim == 4 and tensor.shape[1] == 1:
            tensor = tensor.squeeze(1)
        out[released_name(part, name)] = tensor
    return out


def convert_checkpoints(files: dict[str, Path], r: Any, out: Path) -> None:
    """Write released checkpoints as one of ours, readable by `checkpoint.load`.

    Args:
        files: .pth of the parts "2d", "3d", "fusion". r: the recipe that they were trained with.
    Raises:
        RunError: a file is missing, needs unpickling of arbitrary objects, or does not fit.
    """
    state: dict[str, Tensor] = {}
    iteration = 0
    for part, file in files.items():
        if not file.is_file():
            raise RunError(f"{file}: no such file; expected the released {part} network (.pth)")
        try:
            loaded = read_pth(file)
        except ValueError as error:
            raise RunError(str(error)) from None
        weights = loaded if isinstance(loaded, dict) else {}
        if "model" in weights:
            iteration = int(weights.get("iteration", 0))
            weights = weights["model"]
        named = ((k.removeprefix("module."), v) for k, v in weights.items())
        state |= convert_released(part, ((k, v) for k, v in named if isinstance(v, Tensor)))
    mine = build(r, training=False).student.state_dict()
    wrong = [k for k in misfits(state, mine) if "num_batches_tracked" not in k]
    if wrong:
        raise RunError(
            f"{', '.join(str(f) for f in files.values())}: {len(wrong)} tensors do not fit "
            f"{r.scenario} ({len(CLASS_SETS[r.classes])} classes), first {wrong[0]}; check "
            "--scenario and the order of the files"
        )
    meta = {
        "format": FORMAT,
        "recipe": dataclasses.asdict(r),
        "iteration": iteration,
        "class_names": CLASS_SETS[r.classes],
        "converted_from": {k: Path(v).name for k, v in files.items()},
    }
    save(out, {f"system/student.{k}": state.get(k, v) for k, v in mine.items()}, meta)
