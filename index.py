"""The prepared index: the frames of a split, projected once, in flat files.

`prepare` reads the frames of a split, keeps the points that fall into the image (of a dense data
set every pixel), resizes the image and writes all; `Index.frame` reads one frame back. `few_labels`
makes of it an index that holds the labels of few points.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import msgspec
import numpy as np
from msgspec import Meta
from PIL import Image

from ftdpp import files
from ftdpp.data import CLASS_SETS, UNLABELLED, Frame, class_table
from ftdpp.files import Progress, locked
from ftdpp.readers import (
    READERS,
    Array,
    DataError,
    Domain,
    FrameRef,
    RawFrame,
    domains,
    list_frames,
    plural,
    reader_of,
    stamp,
)
from ftdpp.readers.base import regular, require_known, why

FORMAT = 3  # version of the prepared index; a change makes old ones stale
FAR = 1000.0  # metres: no LiDAR sees so far, and one such point would leave the grid to itself
CHUNK = 32  # frames between two checkpoints of `prepare`
_JOURNAL = "progress.jsonl"  # of a `prepare` that is not at its end

Count = Annotated[int, Meta(ge=0)]


class Record(TypedDict):
    """What the index knows of a frame."""

    token: str
    rows: Count  # points or pixels
    dense: bool
    depth: bool
    shape: Annotated[list[Count], Meta(min_length=2, max_length=2)]  # (H, W) of the image
    has_label: bool
    counts: list[Count]  # rows of each class
    ignored: Count
    dropped: Count  # points that are not finite, or farther than FAR
    sha: str  # of its arrays


class _Stored(TypedDict):
    """What meta.json holds."""

    identity: dict[str, Any]
    fingerprint: dict[str, Any]
    frames: list[Record]


# Flat files NAME.bin, each the arrays of all frames one after another, and the types in them.
_TYPES: dict[str, type[np.generic]] = {
    "xyz": np.float32,
    "pixel": np.int16,
    "label": np.uint8,
    "depth": np.float32,
    "image": np.uint8,
}


def _shapes(record: Record) -> dict[str, tuple[int, ...]]:
    """The arrays that are stored of a frame. What it lacks has no rows."""
    points, (height, width) = record["rows"], record["shape"]
    rows = (height, width) if record["dense"] else (points,)
    none = (0,) if record["dense"] else rows
    return {
        "xyz": (*none, 3),
        "pixel": (*none, 2),
        "label": rows,
        "depth": rows if record["depth"] else (0,),
        "image": (height, width, 3),
    }


def _ends(records: Sequence[Record]) -> dict[str, list[int]]:
    """For each flat file 0, and behind which byte each frame ends."""
    ends = {name: [0] for name in _TYPES}
    for record in records:
        for name, shape in _shapes(record).items():
            length = math.prod(shape) * np.dtype(_TYPES[name]).itemsize
            ends[name].append(ends[name][-1] + length)
    return ends


def _title(domain: str, split: str | None, frames: Sequence[str] | None) -> str:
    if split is not None:
        return f"{domain}/{split}"
    return f"{domain}, all splits" if frames is None else f"{domain}, chosen frames"


def _sha(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        text = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(text)
    return digest.hexdigest()


def _frame_sha(frame: Frame) -> str:
    arrays = (frame.xyz, frame.pixel, frame.label, frame.depth, frame.image)
    content = (b"" if a is None else np.ascontiguousarray(a).tobytes() for a in arrays)
    return _sha(frame.token, list(frame.image.shape), *content)


def _close(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


class Index:
    """A prepared split: flat arrays (raw bytes) and a JSON file.

    Holds the files open and no data in memory. Frames without a point in the image are not in it.
    Raises DataError if the folder is incomplete or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / "meta.json"
        try:
            meta = msgspec.json.decode(regular(file).read_bytes(), type=_Stored)
        except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise DataError(
                f"{file}: missing or unreadable ({why(error)}); prepare the data again"
            ) from None
        self.identity, self.fingerprint = meta["identity"], meta["fingerprint"]
        self._records = [record for record in meta["frames"] if record["rows"]]
        self.tokens = [record["token"] for record in self._records]
        self._ends = _ends(self._records)
        self._seen = bytearray(len(self.tokens))  # frames whose digest was compared
        self._open: dict[str, int] = {}  # descriptors: a file that is replaced stays what it was
        weakref.finalize(self, _close, self._open)
        for name, ends in self._ends.items():
            file = self._file(name)
            size = stamp(file)[1]
            if size != ends[-1]:
                raise DataError(
                    f"{file}: damaged, {size} bytes, expected {ends[-1]}; prepare the data again"
                )
            self._open[name] = os.open(file, os.O_RDONLY)

    def _file(self, name: str) -> Path:
        """The flat file of an array."""
        return self.path / f"{name}.bin"

    def __reduce__(self) -> Any:
        # A loading process opens the files itself.
        return _reopened, (type(self), self.path, self.fingerprint["content"])

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def title(self) -> str:
        """What it holds: "DOMAIN/SPLIT", "DOMAIN, chosen frames" or "DOMAIN, all splits"."""
        i = self.identity
        return _title(i["domain"], i["split"], i["frames"])

    def frame(self, i: int) -> Frame:
        """Frame i; its arrays are read-only.

        Its digest is compared when a process first reads it: damaged data looks like any other.

        Raises:
            IndexError: beyond the last one. DataError: it is not what was written.
        """
        i = range(len(self))[i]
        record = self._records[i]
        arrays = {}
        for name, shape in _shapes(record).items():
            arrays[name] = np.ndarray(shape, _TYPES[name], self._read(name, i))
        if record["dense"]:
            del arrays["xyz"], arrays["pixel"]
        if not record["depth"]:
            del arrays["depth"]
        frame = Frame(token=record["token"], has_label=record["has_label"], **arrays)
        if not self._seen[i] and _frame_sha(frame) != record["sha"]:
            raise DataError(
                f"{self.path}: damaged, frame {frame.token} is not what was written there; remove "
                "this folder, and the data is prepared again"
            )
        self._seen[i] = 1
        return frame

    def _read(self, name: str, i: int) -> bytes:
        """The bytes of an array of frame i. A memory map of a file that is cut off meanwhile would
        end the process without a word."""
        begin, end = self._ends[name][i : i + 2]
        try:
            content = os.pread(self._open[name], end - begin, begin)
            found = f"has no {end} bytes any more"
        except OSError as error:  # of a disk, or a network
            content, found = b"", str(error.strerror)
        if len(content) != end - begin:
            file = self._file(name)
            raise DataError(
                f"{file}: {found}; remove {file.parent}, and the data is prepared again"
            )
        return content

    def rows(self) -> Array:
        """Points or pixels of each frame, i64 (F,)."""
        return np.array([record["rows"] for record in self._records], np.int64)

    def counts(self) -> Array:
        """Points per class, i64 (K,); ignored points are not in it."""
        return np.array(self.fingerprint["points_per_class"], np.int64)


def _reopened(kind: type[Index], path: Path, content: str) -> Index:
    """An index in another process. Raises DataError where it was prepared anew meanwhile."""
    index = kind(path)
    if index.fingerprint["content"] != content:
        raise DataError(f"{path}: was prepared anew from other data meanwhile; begin again")
    return index


class FewLabels(Index):
    """A prepared split with the labels of few points: the others are not in its files.

    A folder in that of the whole index, with labels and a JSON file of its own. Points and images
    are those of the whole.
    """

    def _file(self, name: str) -> Path:
        return (self.path if name == "label" else self.path.parent) / f"{name}.bin"


def label_order(token: str, label: Array, seed: int, balanced: bool) -> Array:
    """The rows of a frame that have a label (n,), in the order in which they may be read.

    The order of all rows is a function of the seed and the token alone; those without a label are
    left out of it. A larger share of it holds a smaller one.

    Args:
        label: (M,) u8. balanced: the classes of the frame take turns, so the order follows from the
        labels too; which class begins is drawn.
    """
    number = int.from_bytes(hashlib.sha256(token.encode()).digest()[:8], "big")
    chance = np.random.default_rng([seed, number])
    order = chance.permutation(len(label))
    order = order[label[order] != UNLABELLED]
    if balanced:
        kind, turn = label[order], np.zeros(len(order), np.int64)
        for c in np.unique(kind):
            turn[kind == c] = np.arange((kind == c).sum())
        begins = chance.permutation(UNLABELLED)
        order = order[np.lexsort((begins[kind], turn))]
    return order


def few_labels(
    index: Index, labelled: float, seed: int, balanced: bool, progress: Progress | None = None
) -> Index:
    """The index with the labels of some points of each frame; all other points are UNLABELLED.

    It is written into the folder of the whole index on first use and checked when it is opened
    again; one that is damaged or of other labels is written anew, and `progress` is told why. Its
    fingerprint is its own: hidden labels change nothing in content and counts of classes.

    Args:
        labelled: a share of the labelled points of a frame, of which it has at least one; or, above
        1, a number of points; 1: all, which is the index itself. seed, balanced: which points, see
        `label_order`.
    """
    if labelled == 1:
        return index
    tell = progress or (lambda done, total, what: None)
    few = {"labelled": labelled, "seed": seed, "balanced": balanced}
    identity = {**index.identity, "few": few, "whole": index.fingerprint["content"]}
    final = index.path / f"few-{labelled}-{'balanced-' if balanced else ''}{seed}"
    if final.exists() and not _stale(final, identity, FewLabels):
        return FewLabels(final)  # without the lock: the folder may be read-only
    with locked(final):
        if final.exists():
            why = _stale(final, identity, FewLabels)
            if not why:
                return FewLabels(final)
            tell(0, len(index), f"choosing labels again, {why}")
            shutil.rmtree(final)
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        records = []
        with (partial / "label.bin").open("wb") as file:
            for i, record in enumerate(index._records):
                if i % CHUNK == 0:
                    tell(i, len(index), f"choosing labels of {index.title}")
                frame = index.frame(i)
                flat = frame.label.reshape(-1)
                order = label_order(frame.token, flat, seed, balanced)
                count = labelled if labelled > 1 else max(labelled * len(order), 1)
                kept = order[: round(count)]
                label = np.full_like(flat, UNLABELLED)
                label[kept] = flat[kept]
                file.write(label.tobytes())
                frame = replace(frame, label=label.reshape(frame.label.shape))
                classes = len(record["counts"])
                records.append(_record(frame, record["dropped"], classes))
            file.flush()
            os.fsync(file.fileno())
        tell(len(index), len(index), f"choosing labels of {index.title}")
        fingerprint = {
            **index.fingerprint,
            "few": few,
            "points_per_class": np.sum([r["counts"] for r in records], 0).tolist(),
            "ignored": sum(r["ignored"] for r in records),
            "content": _sha([r["sha"] for r in records]),
            "labels": _sha((partial / "label.bin").read_bytes()),
        }
        meta = {"identity": identity, "fingerprint": fingerprint, "frames": records}
        (partial / "meta.json").write_text(json.dumps(meta))
        files.finish(partial, final)
        return FewLabels(final)


def require_labels(index: Index) -> None:
    """Raises DataError if a frame has no labels: for splits that train with labels or test."""
    missing = index.fingerprint["unlabelled_frames"]
    if missing:
        raise DataError(
            f"{index.identity['root']}: {missing} of {plural(len(index), 'frame')} of "
            f"{index.title} without labels; expected "
            f"{READERS[index.identity['dataset']].label_files}; "
            "add them, or use this split as an unlabelled target"
        )


def require_depth(index: Index) -> None:
    """Raises DataError if a frame has no depth: for methods that read it."""
    missing = sum(not record["depth"] for record in index._records)
    if missing:
        raise DataError(
            f"{index.identity['root']}: {missing} of {plural(len(index), 'frame')} of "
            f"{index.title} without depth; add the depth files of the data set (docs/data.md), or "
            "go without: --set depth=none"
        )


def original_frames(index: Index, frames: Sequence[int]) -> Iterator[Frame]:
    """Frames of an index with images, pixels and dense labels at their original size.

    Reads them again from the root that the index was made from. Points and labels are those of
    `index.frame(i)`. Raises DataError if the data is gone or no longer the same.
    """
    identity = index.identity
    domain, root = domains()[identity["domain"]], identity["root"]
    tokens = [index.tokens[i] for i in frames]
    found = list_frames(root, domain, identity["split"], identity["version"], tokens)
    refs = {ref.token: ref for ref in found}
    reader, size = reader_of(domain), identity["size"]
    for i, token in zip(frames, tokens, strict=True):
        table = class_table(reader, identity["classes"], reader.categories(refs[token]))
        frame = read_frame(refs[token], table, None).frame
        stored, label = index.frame(i), frame.label
        if frame.xyz is None and size is not None:
            label = label[_nearest(label.shape, size)]
        same_points = (frame.xyz is None and stored.xyz is None) or (
            frame.xyz is not None
            and stored.xyz is not None
            and np.array_equal(frame.xyz, stored.xyz)
        )
        if not same_points or not np.array_equal(label, stored.label):
            raise DataError(
                f"{root}: frame {token} has changed since {index.path} was prepared; "
                "prepare the data again"
            )
        yield frame


def resized(
    image: Image.Image, row_col: Array, size: tuple[int, int] | None
) -> tuple[Array, Array]:
    """An image and pixels (n,2) in it, at another size (H, W); None keeps the size.

    Returns the image (H,W,3) u8, bilinear, and the pixels i16, scaled as in the released code:
    int(H / H_original * floor(row)).
    """
    pixel = np.floor(row_col).astype(np.float64)
    if size is not None and size != (image.height, image.width):
        pixel = pixel * np.array([size[0] / image.height, size[1] / image.width])
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image), pixel.astype(np.int16)


class FromDisk(NamedTuple):
    """A frame, and what it is of the points on disk."""

    frame: Frame
    kept: Array  # (n,) i64, which of the points are the frame's rows; empty where these are pixels
    points: int
    dropped: int  # points that are not finite, or farther than FAR


def _huge() -> np.errstate:
    """Within it, a number that overflows becomes infinite; such points are dropped."""
    return np.errstate(over="ignore", invalid="ignore")


def read_frame(ref: FrameRef, table: Array, size: tuple[int, int] | None) -> FromDisk:
    """Read a frame and project its points.

    Args:
        table: of `data.class_table`. size: (H, W) of the image; None: its own.
    Raises:
        DataError: a file is missing, damaged, or does not fit the others.
    """
    reader = READERS[ref.reader]
    with _huge():
        raw = reader.read(ref)
    found = (raw.image.height, raw.image.width)
    if ref.image_size is not None and found != ref.image_size:
        raise DataError(
            f"{ref.image_path}: image is {found} (H, W), the data set says {ref.image_size}; "
            "restore it"
        )
    if raw.points is None and raw.labels is not None and raw.labels.shape != found:
        raise DataError(
            f"{ref.label_path}: labels of {raw.labels.shape} (H, W) for an image of {found}; "
            "download both again"
        )
    if raw.points is not None and raw.labels is not None and len(raw.labels) != len(raw.points):
        raise DataError(
            f"{ref.label_path}: {len(raw.labels)} labels for {len(raw.points)} points; "
            "download both again"
        )
    if raw.labels is not None and ref.label_path is not None:
        require_known(ref.label_path, raw.labels, reader.categories(ref))
    if raw.depth is not None and raw.depth.shape != found:
        raise DataError(
            f"{ref.depth_path}: depth of shape {raw.depth.shape} for an image of {found}; "
            "download both again"
        )
    if raw.points is None:
        return FromDisk(_dense_frame(ref, raw, table, size), np.zeros(0, np.int64), 0, 0)

    usable = (np.abs(raw.points[:, :3]) < FAR).all(1)  # NaN is not, either
    dropped, points = int((~usable).sum()), raw.points[usable]
    if dropped:
        raw = replace(
            raw,
            points=points,
            labels=None if raw.labels is None else raw.labels[usable],
            row_col=None if raw.row_col is None else raw.row_col[usable],
        )
    with _huge():
        rows, row_col, depth = reader.project(raw, ref)
    image, pixel = resized(raw.image, row_col, size)
    label = np.full(len(rows), UNLABELLED, np.uint8)
    if raw.labels is not None:
        label = table[raw.labels[rows]]
    frame = Frame(
        token=ref.token,
        image=image,
        label=label,
        has_label=raw.labels is not None,
        xyz=points[rows, :3],
        pixel=pixel,
        depth=depth.astype(np.float32),
    )
    return FromDisk(frame, np.flatnonzero(usable)[rows], usable.size, dropped)


def _dense_frame(ref: FrameRef, raw: RawFrame, table: Array, size: tuple[int, int] | None) -> Frame:
    """A frame whose rows are pixels: image bilinear, labels and depth from the nearest pixel."""
    image, _ = resized(raw.image, np.zeros((0, 2)), size)
    height, width = image.shape[:2]
    nearest = _nearest((raw.image.height, raw.image.width), (height, width))
    label = np.full((height, width), UNLABELLED, np.uint8)
    if raw.labels is not None:
        label = table[raw.labels[nearest]]
    depth = None if raw.depth is None else raw.depth[nearest].astype(np.float32)
    return Frame(ref.token, image, label, raw.labels is not None, depth=depth)


def _nearest(shape: Sequence[int], size: Sequence[int]) -> tuple[Array, ...]:
    """Of an array of a shape (H, W), the elements under the centres of the pixels of a size."""
    steps = ((np.arange(n) + 0.5) * full / n for n, full in zip(size, shape, strict=True))
    return np.ix_(*(step.astype(np.int64) for step in steps))


def require_frames(
    root: Path, domain: Domain, split: str | None, version: str | None, frames: Sequence[str] | None
) -> list[FrameRef]:
    """The frames of `list_frames`, of which there is one and each has all its files.

    Raises:
        DataError: there is none, or a file is missing.
    """
    refs = list_frames(root, domain, split, version, frames)
    if not refs:
        raise DataError(
            f"{root}: no frame of {_title(domain.name, split, frames)}; to see what there is, "
            f"type: ftd data check {root} --domain {domain.name}"
        )
    absent = [path for ref in refs for path in ref.files if not path.exists()]
    if absent:
        more = f", and {plural(len(absent) - 1, 'more file')}" if len(absent) > 1 else ""
        raise DataError(
            f"{absent[0]}: missing{more}; download what is missing, or name the frames to use"
        )
    return refs


def prepare(
    root: str | Path,
    domain: Domain,
    split: str | None,
    classes: str,
    size: tuple[int, int] | None,
    cache: str | Path,
    version: str | None = None,
    frames: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Index:
    """Write the index of a split below `cache`, or open it if it is there and still valid.

    An interrupted call goes on where it stopped; a finished index appears under its name in one
    rename. An index that is damaged, or whose data changed, is built anew, and `progress` is told
    why.

    Args:
        split, version, frames: as in `list_frames`.
        classes: name of a class set.
        size: (H, W) of the stored images; None keeps the originals, which may differ in size.
    Raises:
        DataError: anything in the data that cannot be used.
    """
    root, tell = Path(root).expanduser().resolve(), progress or (lambda done, total, what: None)
    if classes not in CLASS_SETS:
        raise DataError(f"no class set {classes!r}: type one of {', '.join(CLASS_SETS)}")
    refs, reader = require_frames(root, domain, split, version, frames), reader_of(domain)
    own = {path for ref in refs for path in ref.files}
    stamps = [stamp(path) for path in sorted(own.union(reader.tables(root, version, refs)))]
    table = class_table(reader, classes, reader.categories(refs[0]))
    identity = {
        "format": FORMAT,
        "root": str(root),
        "version": reader.version(root, version),
        "domain": domain.name,
        "dataset": reader.name,
        "split": split,
        "classes": classes,
        "size": size and list(size),
        "frames": frames and sorted(frames),
        "label_map": _sha(table.tobytes()),
        "sources": _sha(stamps),
    }
    place = _sha([identity[key] for key in ("format", "root", "version", "frames")])[:8]
    pixels = f"{size[0]}x{size[1]}" if size else "full"
    final = Path(cache).expanduser() / f"{domain.name}-{split or 'all'}-{classes}-{pixels}-{place}"
    if final.exists() and not _stale(final, identity):
        return Index(final)  # without the lock: the folder may be read-only
    with locked(final):
        if final.exists():
            why = _stale(final, identity)
            if not why:
                return Index(final)
            tell(0, len(refs), f"building again, {why}")
            shutil.rmtree(final)
        partial = final.with_name(final.name + ".partial")
        if _stale(partial, identity):
            records = _write(partial, identity, refs, table, size, tell)
            fingerprint = _fingerprint(records, identity, root, stamps)
            if not fingerprint["frames"]:
                raise DataError(
                    f"{root}: no point of {plural(len(refs), 'frame')} lies in its image; "
                    "the calibration does not fit"
                )
            meta = {"identity": identity, "fingerprint": fingerprint, "frames": records}
            files.write(partial / "meta.json", json.dumps(meta).encode())
        # Whole from here on: what a kill leaves is taken as it is.
        (partial / _JOURNAL).unlink(missing_ok=True)
        files.finish(partial, final)
        return Index(final)


def _stale(final: Path, identity: dict[str, Any], kind: type[Index] = Index) -> str:
    """Why a stored index cannot be used; empty if it can."""
    try:
        stored = kind(final)
    except DataError as error:
        return str(error)
    changed = [key for key in identity if stored.identity.get(key) != identity[key]]
    if changed:
        return f"changed since: {', '.join(changed)}"
    if kind is FewLabels:
        labels = stored._file("label")
        if _sha(labels.read_bytes()) != stored.fingerprint["labels"]:
            return f"{labels}: damaged"
    return ""


def _resume(partial: Path, identity: dict[str, Any]) -> list[Record]:
    """Make `partial` ready to append to; returns the records of the frames that are in it.

    The journal holds the identity, then a line a frame. The lines of a chunk are written after
    its data has reached the disk, so what lies behind the last line's data is cut off.
    """
    journal = partial / _JOURNAL
    records: list[Record] = []
    try:
        first, *lines = journal.read_bytes().split(b"\n")[:-1]  # a torn last one has no newline
        if msgspec.json.decode(first) == identity:
            records = [msgspec.json.decode(line, type=Record) for line in lines]
    except (FileNotFoundError, ValueError, RecursionError):
        pass  # nothing to go on from
    held = _ends([record for record in records if record["rows"]])
    ends = {partial / f"{name}.bin": places[-1] for name, places in held.items()}
    if not records or any(stamp(file)[1] < end for file, end in ends.items()):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        records, ends = [], dict.fromkeys(ends, 0)
    content = "".join(json.dumps(line) + "\n" for line in (identity, *records))
    files.write(journal, content.encode())
    for path, end in ends.items():
        with path.open("ab") as file:
            file.truncate(end)
    return records


def _write(
    partial: Path,
    identity: dict[str, Any],
    refs: list[FrameRef],
    table: Array,
    size: tuple[int, int] | None,
    tell: Progress,
) -> list[Record]:
    """Append the frames that `partial` lacks to its flat files; returns the records of all."""
    classes = len(CLASS_SETS[identity["classes"]])
    what = _title(identity["domain"], identity["split"], identity["frames"])
    records = _resume(partial, identity)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(min(8, os.cpu_count() or 1)))
        journal = stack.enter_context((partial / _JOURNAL).open("a"))
        flat = {name: stack.enter_context((partial / f"{name}.bin").open("ab")) for name in _TYPES}
        for start in range(len(records), len(refs), CHUNK):
            tell(start, len(refs), f"preparing {what}")
            chunk = refs[start : start + CHUNK]
            for frame, _, _, dropped in pool.map(lambda ref: read_frame(ref, table, size), chunk):
                if frame.rows:
                    for name, file in flat.items():
                        if (array := getattr(frame, name)) is not None:
                            file.write(np.ascontiguousarray(array).tobytes())
                records.append(_record(frame, dropped, classes))
            for file in flat.values():
                file.flush()
                os.fsync(file.fileno())
            journal.write("".join(json.dumps(record) + "\n" for record in records[start:]))
            journal.flush()
            os.fsync(journal.fileno())
        tell(len(refs), len(refs), f"preparing {what}")
    return records


def _record(frame: Frame, dropped: int, classes: int) -> Record:
    counts = np.bincount(frame.label.reshape(-1), minlength=256)
    return {
        "token": frame.token,
        "rows": frame.rows,
        "dense": frame.xyz is None,
        "depth": frame.depth is not None,
        "shape": list(frame.image.shape[:2]),
        "has_label": frame.has_label,
        "counts": counts[:classes].tolist(),
        "ignored": int(counts[UNLABELLED]),
        "dropped": dropped,
        "sha": _frame_sha(frame),
    }


def _fingerprint(
    records: list[Record], identity: dict[str, Any], root: Path, stamps: list[tuple[str, int, int]]
) -> dict[str, Any]:
    """What the index holds: equal for equal data on any machine, no absolute path, no time."""
    kept = [r for r in records if r["rows"]]
    named = ("format", "version", "domain", "split", "classes", "size", "label_map")
    sizes = [(Path(path).relative_to(root).as_posix(), length) for path, length, _ in stamps]
    return {
        **{key: identity[key] for key in named},
        "class_names": CLASS_SETS[identity["classes"]],
        "frames": len(kept),
        "empty_frames": len(records) - len(kept),
        "unlabelled_frames": sum(not r["has_label"] for r in kept),
        "points": sum(r["rows"] for r in kept),
        "points_per_class": np.sum([r["counts"] for r in records], 0).tolist(),
        "ignored": sum(r["ignored"] for r in kept),
        "dropped_points": sum(r["dropped"] for r in records),
        "content": _sha([r["sha"] for r in kept]),
        "files": {
            "count": sum(length >= 0 for _, length in sizes),
            "bytes": sum(max(length, 0) for _, length in sizes),
            "names_and_sizes": _sha(sizes),
        },
    }
