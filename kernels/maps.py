"""Kernel maps: which input voxel meets which output voxel under which offset, for all levels of a sparse U-Net.

A voxel is an integer cell `(b, x, y, z)`: frame of the batch, then position. Its *key* is the frame in the high bits and
the Morton code of the position below (the bits of x, y, z interleaved). Two properties make the rest short: a parent's key
is its child's key `>> 3`, so one sort of the points orders the voxels of every level; and the children of a parent are
neighbours in memory.

Neighbours need no search: a neighbour of a voxel is a child of a neighbour of its parent, from one voxel a frame downwards.

A convolution with K offsets is a list of *pairs* (input row, output row), grouped by offset. `KernelMap` holds the pairs
once and serves the forward pass, the input gradient and the weight gradient.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

AXIS_BITS = 16  # bits per axis in a key: coordinates lie strictly inside +-2**15
FRAME_BITS = 12  # a key takes 60 bits; the Triton hash table puts the level below it
BIAS = 1 << (AXIS_BITS - 1)  # makes coordinates unsigned; a multiple of every stride, so that parents stay parents


def _spread(v: Tensor) -> Tensor:
    """Move bit i of a 16-bit integer to bit 3i."""
    v = v & 0xFFFF
    v = (v | v << 16) & 0x0000_00FF_0000_FF
    v = (v | v << 8) & 0x00F0_0F00_F00F
    v = (v | v << 4) & 0x0C30_C30C_30C3
    return (v | v << 2) & 0x2492_4924_9249


def _compact(v: Tensor) -> Tensor:
    """Inverse of `_spread`: collect every third bit."""
    v = v & 0x2492_4924_9249
    v = (v | v >> 2) & 0x0C30_C30C_30C3
    v = (v | v >> 4) & 0x00F0_0F00_F00F
    v = (v | v >> 8) & 0x0000_00FF_0000_FF
    return (v | v >> 16) & 0xFFFF


def check_coords(coords: Tensor) -> None:
    """Raises ValueError unless coords is an (N, 4) integer tensor."""
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.is_floating_point():
        raise ValueError(f"coords must be (N, 4) integers b, x, y, z; found {tuple(coords.shape)} {coords.dtype}")


def pack(coords: Tensor) -> Tensor:
    """Keys of voxels.

    Args:
        coords: (N, 4) integer, columns b, x, y, z; positions may be negative.
    Returns:
        (N,) int64, increasing in b, then along the Morton curve.
    Raises:
        ValueError: a position outside +-(2**15 - 2), or a frame index that does not fit.
    """
    c = coords.long()
    if len(c):
        low, high = c.amin(0), c.amax(0)
        if low[1:].min() < 2 - BIAS or high[1:].max() > BIAS - 2:
            raise ValueError(
                f"voxel coordinates span {low[1:].tolist()} to {high[1:].tolist()}; they must lie inside "
                f"+-{BIAS - 2}: shift them to start at 0 or use larger voxels"
            )
        if low[0] < 0 or high[0] >= 1 << FRAME_BITS:
            raise ValueError(f"frame indices span {low[0]} to {high[0]}; expected 0 to {(1 << FRAME_BITS) - 1}")
    x, y, z = (_spread(c[:, i] + BIAS) for i in (1, 2, 3))
    return c[:, 0] << (3 * AXIS_BITS) | x << 2 | y << 1 | z


def unpack(keys: Tensor, level: int = 0) -> Tensor:
    """Voxels (N, 4) int32 b, x, y, z of keys of a level; the inverse of `pack` at level 0."""
    shift = 3 * (AXIS_BITS - level)
    position = [_compact(keys >> s) & ((1 << (AXIS_BITS - level)) - 1) for s in (2, 1, 0)]
    return torch.stack([keys >> shift, *(p - (BIAS >> level) for p in position)], 1).int()


@dataclass(frozen=True)
class KernelMap:
    """The pairs of one sparse convolution with K offsets, N_in input and N_out output voxels.

    pair_in, pair_out: (P,) int64, rows of each pair, offset by offset. sizes: how many pairs each offset has.
    by_out, start_out: the pairs of output row i are `by_out[start_out[i]:start_out[i + 1]]`, so an output is the sum of one
        run: no scatter, no atomics, one order of addition.
    by_in, start_in: the same for input rows; the gradient with respect to the input runs the pairs backwards.
    centre: the offset under which every row meets itself. Its pairs are not in the lists, because rows that are all there in
        their order need no gathering: a quarter of the pairs of a LiDAR frame. None: there is no such offset.
    """

    pair_in: Tensor
    pair_out: Tensor
    sizes: list[int]
    by_out: Tensor
    start_out: Tensor
    by_in: Tensor
    start_in: Tensor
    centre: int | None = None
    live = None  # all rows are voxels; `hash.SlotMap` may have more, and counts them on the GPU

    @property
    def offsets(self) -> int:
        return len(self.sizes)

    @property
    def n_in(self) -> int:
        return len(self.start_in) - 1

    @property
    def n_out(self) -> int:
        return len(self.start_out) - 1

    @property
    def pairs(self) -> int:
        """How many pairs there are, those of the centre included."""
        return len(self.pair_in) + (0 if self.centre is None else self.n_out)

    @property
    def transposed(self) -> KernelMap:
        """The map of the inverse convolution: input and output exchanged, the same weight index for each pair."""
        return replace(
            self,
            pair_in=self.pair_out,
            pair_out=self.pair_in,
            by_out=self.by_in,
            start_out=self.start_in,
            by_in=self.by_out,
            start_in=self.start_out,
        )


def group_starts(member: Tensor, groups: int) -> Tensor:
    """(groups + 1,) int64: where each group begins when the members lie sorted. (`bincount` would wait for a GPU.)"""
    counts = member.new_zeros(groups).scatter_add_(0, member, torch.ones_like(member))
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def axis_masks(level: int) -> tuple[int, int, int]:
    """The bits of x, y and z in a key of a level."""
    z = sum(1 << (3 * i) for i in range(AXIS_BITS - level))
    return z << 2, z << 1, z


def children_neighbours(near: Tensor, parent: Tensor, octant: Tensor) -> Tensor:
    """Rows of half of the neighbours of every voxel: a neighbour of a child is a child of a neighbour of its parent.

    A step of d from half o = 0, 1 of the parent along an axis ends in half `(o + d) & 1` of the parent `(o + d) >> 1` further on.

    Args:
        near: (27, V) rows of all the neighbours of the parents, V where there is none. parent, octant: (N,) of each child.
    Returns:
        (13, N) int64: the row of the voxel at coords + d_k under the offsets k = (dx+1)*9 + (dy+1)*3 + (dz+1) before the centre,
        k = 13; N where there is none. The others are their mirror images.
    """
    n, parents = len(parent), near.shape[1]
    child = torch.full(((parents + 1) * 8,), n, device=near.device)
    child[parent * 8 + octant] = torch.arange(n, device=near.device)
    d = torch.arange(-1, 2, device=near.device)[:, None]
    x, y, z = (d + (octant >> bit & 1) for bit in (2, 1, 0))  # (3, N) each
    step = [(x >> 1) * 9 * parents, (y >> 1) * 3 * parents, (z >> 1) * parents + 13 * parents + parent]
    half = [(x & 1) * 4, (y & 1) * 2, z & 1]
    at, within = ((t[0][:2, None, None] + t[1][:, None] + t[2]).flatten(0, 2)[:13] for t in (step, half))
    return child.take(near.take(at).mul_(8).add_(within))


def all_neighbours(before: Tensor, k: Tensor, i: Tensor, p: Tensor) -> Tensor:
    """(27, N) from the (13, N) of `children_neighbours` and their pairs, as in `submanifold_map`."""
    n = before.shape[1]
    near = torch.full((27, n), n, device=before.device)
    near[:13] = before
    near[13] = torch.arange(n, device=before.device)
    near[26 - k, i] = p
    return near


def submanifold_map(n: int, k: Tensor, i: Tensor, p: Tensor) -> KernelMap:
    """Pairs of a 3x3x3 convolution whose n outputs are its inputs.

    Args:
        k, i, p: the pairs of the offsets before the centre: `coords[i] = coords[p] + d_k`. Then (p, i) is one of offset 26 - k.
    """
    device = k.device
    sizes = torch.bincount(k, minlength=13).tolist()
    # The offsets after the centre, 14 to 26, are the mirror images of 12 to 0.
    pair_in = torch.cat([i, *reversed(p.split(sizes))])
    pair_out = torch.cat([p, *reversed(i.split(sizes))])
    sizes = [*sizes, 0, *reversed(sizes)]
    first = torch.tensor([0, *itertools.accumulate(sizes)], device=device)
    here = torch.arange(len(k), device=device)
    image = here + (first[26 - k] - first[k])
    place = torch.full((n, 27), -1, device=device)
    place[p, k], place[i, 26 - k] = here, image
    by_out = place[place >= 0]
    mirror = torch.empty_like(by_out)
    mirror[here], mirror[image] = image, here
    start = group_starts(pair_out, n)
    return KernelMap(pair_in, pair_out, sizes, by_out, start, mirror[by_out], start, 13)


def strided_map(keys: Tensor) -> tuple[Tensor, KernelMap]:
    """Keys of the next coarser level, and the pairs of the 2x2x2 convolution with stride 2 that leads there.

    Octant k = 4*dx + 2*dy + dz with `coords_in = 2 * coords_out + d_k`; each input voxel is in exactly one pair.
    """
    parents, parent = torch.unique_consecutive(keys >> 3, return_inverse=True)
    octant = keys & 7
    by_octant = torch.argsort(octant, stable=True)
    rank = torch.empty_like(by_octant)
    rank[by_octant] = torch.arange(len(keys), device=keys.device)
    sizes = torch.bincount(octant, minlength=8).tolist()
    return parents, KernelMap(
        by_octant,
        parent[by_octant],
        sizes,
        rank,
        group_starts(parent, len(parents)),
        rank,
        torch.arange(len(keys) + 1, device=keys.device),
    )


class Pyramid:
    """All the maps of a sparse U-Net, built in one pass and shared by every layer, forward and backward.

    Args:
        coords: (N, 4) integer points b, x, y, z. Several points may share a voxel.
        levels: number of resolutions; level l has voxels of side 2**l.

    Attributes:
        keys: per level, (V_l,) int64 sorted voxel keys.
        voxel: (N,) int64, the level-0 voxel of each point.
        order, start: the points of voxel v are `order[start[v]:start[v + 1]]`.
        same: per level, the `KernelMap` of submanifold 3x3x3 convolutions.
        down: per step l -> l+1, the `KernelMap` of the strided convolution; `.transposed` is the inverse convolution's.
    """

    def __init__(self, coords: Tensor, levels: int = 7) -> None:
        check_coords(coords)
        if not 1 <= levels <= AXIS_BITS:
            raise ValueError(f"a pyramid has 1 to {AXIS_BITS} levels; found {levels}")
        with torch.no_grad():
            keys, self.order = torch.sort(pack(coords), stable=True)
            keys, voxel = torch.unique_consecutive(keys, return_inverse=True)
            self.voxel = torch.empty_like(self.order)
            self.voxel[self.order] = voxel
            self.start = group_starts(voxel, len(keys))
            self.keys = [keys]
            self.down: list[Any] = []  # Any: `hash.SlotMap` in the subclass
            for _ in range(1, levels):
                keys, down = strided_map(keys)
                self.keys.append(keys)
                self.down.append(down)
            # The neighbours are found from the top down. The top has one voxel a frame, and so no neighbours.
            steps = [(down.pair_out[down.by_in], k & 7) for down, k in zip(self.down, self.keys, strict=False)]
            frames = len(torch.unique_consecutive(keys >> 3 * (AXIS_BITS - levels + 1)))
            while len(keys) > frames:
                coarse, parent = torch.unique_consecutive(keys >> 3, return_inverse=True)
                steps.append((parent, keys & 7))
                keys = coarse
            before = torch.full((13, frames), frames, device=keys.device)
            self.same: list[Any] = []
            for level in reversed(range(len(steps) + 1)):
                n = before.shape[1]
                k, p = (before < n).nonzero(as_tuple=True)
                pairs = k, before[k, p], p
                if level < levels:
                    self.same.insert(0, submanifold_map(n, *pairs))
                if level:
                    before = children_neighbours(all_neighbours(before, *pairs), *steps[level - 1])

    def coords(self, level: int = 0) -> Tensor:
        """(V, 4) int32 voxels of a level in row order."""
        return unpack(self.keys[level], level)
