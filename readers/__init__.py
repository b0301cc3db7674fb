"""Data sets on disk, one file each: which frames there are, how one is read and projected.

A new data set is a file with a `Reader` and a row in READERS.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftdpp.readers.a2d2 import A2d2
from ftdpp.readers.base import (
    Array,
    Calib,
    DataError,
    Domain,
    FrameRef,
    RawFrame,
    Reader,
    ids,
    inside_image,
    make_calib,
    plural,
    read_array,
    read_image,
    rotation,
    stamp,
)
from ftdpp.readers.cityscapes import Cityscapes
from ftdpp.readers.gta5 import Gta5
from ftdpp.readers.nuscenes import NuScenes
from ftdpp.readers.semantic_kitti import SemanticKitti
from ftdpp.readers.synthia import Synthia
from ftdpp.readers.virtual_kitti import VirtualKitti

__all__ = [
    "READERS", "Array", "Calib", "DataError", "Domain", "FrameRef", "RawFrame", "Reader", "check",
    "domains", "ids", "inside_image", "list_frames", "make_calib", "plural", "read_array",
    "read_image", "reader_of", "rotation", "stamp",
]  # fmt: skip

_ALL = (NuScenes, SemanticKitti, VirtualKitti, A2d2, Cityscapes, Gta5, Synthia)
READERS: dict[str, Reader] = {reader.name: reader() for reader in _ALL}


def domains() -> dict[str, Domain]:
    """Every domain of every reader, by name."""
    return {domain.name: domain for reader in READERS.values() for domain in reader.domains}


def reader_of(domain: Domain) -> Reader:
    return READERS[domain.reader]


def list_frames(
    root: str | Path,
    domain: Domain,
    split: str | None,
    version: str | None = None,
    frames: Sequence[str] | None = None,
) -> list[FrameRef]:
    """The frames of a split in a fixed order (scene, then time). No file of a frame is opened.

    Args:
        split: None for all frames of the domain.
        version: which version of a data set that has several; None leaves the choice to the reader.
        frames: only the frames with these tokens.
    Raises:
        DataError: an unknown split or token, no such root, missing or unreadable tables.
    """
    if split is not None and split not in domain.splits:
        why = "a source domain has no validation split, all its training scenes train; "
        raise DataError(
            f"domain {domain.name} has no split {split!r}: {why if split == 'val' else ''}"
            f"type one of {', '.join(domain.splits)}"
        )
    root, reader = Path(root).expanduser().absolute(), reader_of(domain)
    if not root.is_dir():
        what = "is a file" if root.exists() else "there is no such folder"
        raise DataError(f"{root}: {what}; give the root folder of the {reader.name} data")
    refs = reader.list_frames(root, domain, split, version)
    if frames is None:
        return refs
    wanted = set(frames)
    unknown = sorted(wanted - {ref.token for ref in refs})
    if unknown:
        owners = [
            other.name
            for other in reader.domains
            if other is not domain
            and unknown[0] in {r.token for r in reader.list_frames(root, other, None, version)}
        ]
        where = f"{domain.name}/{split}" if split else domain.name
        raise DataError(
            f"{root}: no frame {unknown[0]!r} in {where} "
            f"({plural(len(refs), 'frame')} found)"
            + (f"; it belongs to {', '.join(owners)}" if owners else "")
        )
    return [ref for ref in refs if ref.token in wanted]


def check(root: str | Path, domain: Domain, version: str | None = None) -> list[dict[str, Any]]:
    """One row a split: scenes, frames, labelled frames, missing files, official number, a note.

    "missing" counts files that the tables name and that are not there. Opens no frame. Raises
    DataError if the root is not a data set of this kind.
    """
    rows = []
    for split in domain.splits:
        refs = list_frames(root, domain, split, version)
        files = [path for ref in refs for path in ref.files]
        if reader_of(domain).dense:  # cameras; the tables of others are read when frames are listed
            files += reader_of(domain).tables(Path(root), version, refs)
        missing = [path for path in files if not path.exists()]
        labelled = sum(ref.label_path is not None for ref in refs)
        expected = domain.frames.get(split)
        notes = []
        if not refs:
            notes.append("no frame of this split here")
        elif expected is not None and len(refs) != expected:
            notes.append(
                f"{len(refs)} of {plural(expected, 'frame')}: part of the data set, "
                "numbers will not compare"
            )
        if labelled < len(refs):
            notes.append(
                f"{plural(len(refs) - labelled, 'frame')} without labels: usable as unlabelled "
                f"target alone, or add {reader_of(domain).label_files}"
            )
        if missing:
            notes.append(
                f"{plural(len(missing), 'file')} missing, first {missing[0]}: "
                "download what is missing, or name the frames to use"
            )
        rows.append(
            {
                "split": split,
                "scenes": len({ref.scene for ref in refs}),
                "frames": len(refs),
                "labelled": labelled,
                "missing": len(missing),
                "expected": expected,
                "note": "; ".join(notes) or "complete",
            }
        )
    return rows
