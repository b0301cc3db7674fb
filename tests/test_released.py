"""Released checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ftdpp import checkpoint, systems
from ftdpp.tests.commands import ftd


def test_convert_released_checkpoints(tmp_path: Path) -> None:
    """Files with the released names, as .pth, give a checkpoint that loads; a pickle with code in
    it is refused."""
    model = systems.build(systems.recipe("usa-singapore"), training=False).student
    parts: dict[str, dict[str, torch.Tensor]] = {"2d": {}, "3d": {}, "fusion": {}}
    released = {
        "net_2d.trunk.up.0.": "net_2d.dec_t_conv_stage2.",
        "net_2d.trunk.up.1.": "net_2d.dec_t_conv_stage3.",
        "net_2d.trunk.up.2.": "net_2d.dec_t_conv_stage4.",
        "net_2d.trunk.up.3.": "net_2d.dec_t_conv_stage5.",
        "net_2d.trunk.merge.0.": "net_2d.dec_conv_stage1.",
        "net_2d.trunk.merge.1.": "net_2d.dec_conv_stage2.",
        "net_2d.trunk.merge.2.": "net_2d.dec_conv_stage3.",
        "net_2d.trunk.merge.3.": "net_2d.dec_conv_stage4.",
        "net_2d.trunk.": "net_2d.",
        "net_2d.fused_in.": "proj_head1.",
        "net_2d.fused_out.": "proj_head2.",
        "net_2d.main.": "cls_head1.",
        "net_2d.mimic.": "cls_head2.",
        "net_3d.main.": "cls_head1.",
        "net_3d.mimic.": "cls_head2.",
        "net_3d.trunk.stem.": "net_3d.sparseModel.1.",
        "net_3d.trunk.norm.": "net_3d.sparseModel.3.",
        "fusion.cbam.channel.": "cbam.ca.se.",
        "fusion.cbam.spatial.": "cbam.sa.conv.",
        "fusion.mix.": "mlp.0.",
        "fusion.out.": "fusion.0.",
        "fusion.norm.": "fusion.1.",
    }
    for level in range(7):
        for ours, theirs in (("encode", "0"), ("down", "1.1"), ("up", "1.1"), ("decode", "3")):
            first = 3 if ours == "up" else 0
            for i, kind in enumerate(("norm", "conv")):
                released[f"net_3d.trunk.{ours}.{level}.{kind}."] = (
                    f"net_3d.sparseModel.2{'.1.1.2' * level}.{theirs}.{first + i}."
                )
    for ours, theirs in (("attend_2d", "ea_2d"), ("attend_3d", "ea_3d"), ("attend", "ea_fuse")):
        for a, b in (
            ("expand", "trans_dims"),
            ("key", "linear_0"),
            ("value", "linear_1"),
            ("project", "proj"),
        ):
            released[f"fusion.{ours}.{a}."] = f"{theirs}.{b}."
    for name, tensor in model.state_dict().items():
        prefix = max((p for p in released if name.startswith(p)), key=len)
        part = "fusion" if name.startswith("fusion") else name[4:6]
        value = tensor.unsqueeze(1) if part == "3d" and tensor.ndim == 3 else tensor
        parts[part][released[prefix] + name.removeprefix(prefix)] = value
    for part, state in parts.items():
        torch.save({"model": state, "iteration": 60000}, tmp_path / f"{part}.pth")
    parts_of = [a for part in parts for a in (f"--{part}", tmp_path / f"{part}.pth")]
    args = ["convert", *parts_of, "--out", tmp_path / "x.safetensors", "--scenario"]
    result = ftd(*args, "usa-singapore")
    assert result.exit_code == 0, result.output
    loaded, meta = checkpoint.load(tmp_path / "x.safetensors")
    assert meta["iteration"] == 60000
    for name, tensor in loaded.student.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert ftd(*args, "a2d2-skitti").exit_code == 1, "ten classes do not fit six"

    torch.save({"model": os.system}, tmp_path / "3d.pth")
    result = ftd(*args, "usa-singapore")
    assert result.exit_code == 1
    assert "3d.pth" in result.output
