"""Pseudo-labels on disk: one safetensors file, checked against the run that trains on it.

For every frame and head a tensor `<token>/<head>` (u8, 255 = not kept), in the order of the index's
points; the metadata says what they were made from, and holds a digest of them.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ftdpp.checkpoint import RunError, digest, read_metadata, read_tensors
from ftdpp.data import CLASS_SETS, IGNORE, UNLABELLED, Batch
from ftdpp.index import Index
from ftdpp.recipe import Recipe
from ftdpp.systems import system_of


def stage_identity(r: Recipe) -> dict[str, str]:
    """What a pseudo-label file and a second stage must share."""
    return {"scenario": r.scenario, "method": r.method, "classes": r.classes}


def made_from(index: Index) -> dict[str, Any]:
    """What a pseudo-label file is about, for people: domain, split and image size."""
    identity = index.identity
    split = identity["split"] or "chosen frames"
    return {"domain": identity["domain"], "split": split, "image_size": identity["size"]}


def check_pseudo_file(path: Path, r: Recipe) -> dict[str, Any]:
    """The metadata of a pseudo-label file that a run with this recipe can train on.

    Raises:
        RunError: unreadable, of another scenario, method or class set, or keeping nothing.
    """
    meta = read_metadata(path)
    if "thresholds" not in meta or "labels" not in meta or "kept" not in meta:
        raise RunError(f"{path}: not a pseudo-label file; make one with: ftd pseudo RUN --out FILE")
    for key, wanted in stage_identity(r).items():
        if meta.get(key) != wanted:
            raise RunError(
                f"{path}: made for {key} {meta.get(key)!r}, this run has {wanted!r}; make one from "
                f"a run of this {key} with: ftd pseudo RUN --out FILE"
            )
    heads = system_of(r.method, r.scenario).pseudo_heads
    if not all(sum(meta["kept"].get(head, [])) for head in heads):
        raise RunError(f"{path}: keeps no label; train the first stage longer")
    return meta


class PseudoLabels:
    """A file that `write_pseudo_labels` wrote, checked against the run that trains on it.

    Raises:
        RunError: see `check_pseudo_file`; it was made from other frames; or it is damaged.
    """

    def __init__(self, path: Path, r: Recipe, index: Index) -> None:
        self.path, self.meta = path, check_pseudo_file(path, r)
        if self.meta["content"] != index.fingerprint["content"]:
            mine = {**made_from(index), "frames": len(index)}
            differing = [
                f"{key} {self.meta[key]} instead of {value}"
                for key, value in mine.items()
                if self.meta.get(key, value) != value
            ]
            raise RunError(
                f"{path}: not made from this run's unlabelled target: "
                f"{', '.join(differing) or 'other frames or points'}; make one from a first stage "
                "with the same data, image size and frames: ftd pseudo RUN --out FILE"
            )
        self._require_whole(r, index)

    def _require_whole(self, r: Recipe, index: Index) -> None:
        """Raises RunError where labels are missing, left over, out of range or not those of the
        digest."""
        tensors, classes = read_tensors(self.path, ""), len(CLASS_SETS[r.classes])
        heads = system_of(r.method, r.scenario).pseudo_heads
        rows = {f"{t}/{h}": index.frame(i).rows for i, t in enumerate(index.tokens) for h in heads}
        wrong = sorted(rows.keys() ^ tensors.keys())
        for name in () if wrong else rows:
            label = tensors[name]
            fits = label.dtype == torch.uint8 and label.shape == (rows[name],)
            if not fits or bool(((label >= classes) & (label != UNLABELLED)).any()):
                wrong.append(name)
        if not wrong and digest(tensors) != self.meta["labels"]:
            wrong = ["a label that was changed after it was written"]
        if wrong:
            raise RunError(
                f"{self.path}: damaged: {len(wrong)} entries do not fit the frames or the classes, "
                f"first {wrong[0]}; make it anew with: ftd pseudo RUN --out FILE"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file: a data loading process opens its own."""
        return {"path": self.path, "meta": self.meta}

    @functools.cached_property
    def _file(self) -> Any:
        return safe_open(self.path, "pt")

    def of(self, token: str, head: str) -> Tensor:
        """(M,) u8 labels of all points of a frame, 255 where none was kept."""
        return self._file.get_tensor(f"{token}/{head}")

    def attach(self, batch: Batch) -> None:
        """Set `batch.pseudo`: for each head (N,) int64, -100 where no label was kept."""
        for head in self.meta["kept"]:
            frames = zip(batch.tokens, batch.keep, strict=True)
            label = torch.cat([self.of(token, head)[keep] for token, keep in frames]).long()
            batch.pseudo[head] = label.masked_fill(label == UNLABELLED, IGNORE)
