"""Kernel maps for all levels of a sparse U-Net, on any device by plain PyTorch.

`naive.py` says what a voxel, a pair and a kernel map are. Here a voxel `(b, x, y, z)` is one
integer, its *key*: the batch index in the high bits, below it the Morton code of the position (the
bits of x, y, z interleaved). Two properties make the rest short. A parent's key is its child's key
`>> 3`, so one sort of the points orders the voxels of every level. And the children of a parent are
neighbours in memory.

Neighbours are found without a search: a neighbour of a voxel is a child of a neighbour of its
parent. The recursion starts where each element of the batch is one voxel.

`KernelMap` holds the pairs of a convolution once, ordered by offset, and serves the forward pass,
the input gradient and the weight gradient.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

AXIS_BITS = 16  # bits per axis in a key: coordinates lie strictly inside +-2**15
BATCH_BITS = 12  # a key takes 60 bits; the Triton hash table puts the level below it
BIAS = 1 << (AXIS_BITS - 1)  # makes coordinates unsigned; a multiple of every stride


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
        raise ValueError(
            f"coords must be (N, 4) integers b, x, y, z; found {tuple(coords.shape)} {coords.dtype}"
        )


def pack(coords: Tensor) -> Tensor:
    """Keys of voxels.

    Args:
        coords: (N, 4) integer, columns b, x, y, z; positions may be negative.
    Returns:
        (N,) int64, increasing in b, then along the Morton curve.
    Raises:
        ValueError: a position outside +-(2**15 - 2), or a batch index that does not fit.
    """
    c = coords.long()
    if len(c):
        low, high = c.amin(0), c.amax(0)
        if low[1:].min() < 2 - BIAS or high[1:].max() > BIAS - 2:
            raise ValueError(
                f"voxel coordinates span {low[1:].tolist()} to {high[1:].tolist()}; they must lie "
                f"inside +-{BIAS - 2}: shift them to start at 0 or use larger voxels"
            )
        if low[0] < 0 or high[0] >= 1 << BATCH_BITS:
            raise ValueError(
                f"batch indices span {low[0]} to {high[0]}; expected 0 to {(1 << BATCH_BITS) - 1}"
            )
    x, y, z = (_spread(c[:, i] + BIAS) for i in (1, 2, 3))
    return c[:, 0] << (3 * AXIS_BITS) | x << 2 | y << 1 | z


def unpack(keys: Tensor, level: int = 0) -> Tensor:
    """Voxels (N, 4) int32 b, x, y, z of keys of a level; the inverse of `pack` at level 0."""
    bits = AXIS_BITS - level
    position = [_compact(keys >> axis) & ((1 << bits) - 1) for axis in (2, 1, 0)]
    return torch.stack([keys >> 3 * bits, *(p - (BIAS >> level) for p in position)], 1).int()


@dataclass(frozen=True)
class KernelMap:
    """The pairs of one sparse convolution with K offsets, N_in input and N_out output voxels.

    pair_in, pair_out: (P,) int64, rows of each pair, offset by offset.
    sizes: how many pairs each offset has.
    by_out, start_out: the pairs of output row i are `by_out[start_out[i]:start_out[i + 1]]`. An
        output is the sum of one run: no scatter, no atomics, one order of addition.
    by_in, start_in: the same for input rows; the input gradient runs the pairs backwards.
    centre: the offset under which every row meets itself; None where there is no such offset. Its
        pairs are not in the lists, because all rows in their order need no gathering. They are a
        quarter of the pairs of a LiDAR frame.
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
        """The number of pairs, those of the centre included."""
        return len(self.pair_in) + (0 if self.centre is None else self.n_out)

    @property
    def transposed(self) -> KernelMap:
        """The map of the inverse convolution: input and output exchanged, offsets as they are."""
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
    """(groups + 1,) int64: where each group begins when its members lie sorted.

    `bincount` would count, too, but it makes the host wait for a GPU.
    """
    counts = member.new_zeros(groups).scatter_add_(0, member, torch.ones_like(member))
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def axis_masks(level: int) -> tuple[int, int, int]:
    """The bits of x, y and z in a key of a level."""
    z = sum(1 << (3 * i) for i in range(AXIS_BITS - level))
    return z << 2, z << 1, z


def children_neighbours(near: Tensor, parent: Tensor, octant: Tensor) -> Tensor:
    """Rows of the neighbours of every voxel under the 13 offsets before the centre.

    A neighbour of a child is a child of a neighbour of its parent. Along one axis, a step of d from
    half o = 0, 1 of a parent ends in half `(o + d) & 1` of the parent `(o + d) >> 1` further on.

    Args:
        near: (27, V) rows of all the neighbours of the V parents; V where there is none.
        parent, octant: (N,) parent row of each child, and which of the parent's octants it is.
    Returns:
        (13, N) int64: the row of the voxel at coords + d_k under k = (dx+1)*9 + (dy+1)*3 + (dz+1);
        N where there is none. The offsets after the centre are mirror images of these.
    """
    n, parents = len(parent), near.shape[1]
    # The child in each octant of each parent; N where it is empty, and for parent V, which is none.
    child = torch.full(((parents + 1) * 8,), n, device=near.device)
    child[parent * 8 + octant] = torch.arange(n, device=near.device)
    d = torch.arange(-1, 2, device=near.device)[:, None]
    x, y, z = (d + (octant >> bit & 1) for bit in (2, 1, 0))  # (3, N) each

    def first_offsets(along_x: Tensor, along_y: Tensor, along_z: Tensor) -> Tensor:
        """Sums of one entry an axis, (3, N) each, for the first 13 offsets: (13, N)."""
        return (along_x[:2, None, None] + along_y[:, None] + along_z).flatten(0, 2)[:13]

    # The cell of `near` that names the neighbour's parent, and the neighbour's octant in it.
    step = (x >> 1) * 9 * parents, (y >> 1) * 3 * parents, (z >> 1) * parents
    cell = first_offsets(step[0], step[1], step[2] + (13 * parents + parent))
    within = first_offsets((x & 1) * 4, (y & 1) * 2, z & 1)
    return child.take(near.take(cell).mul_(8).add_(within))


def all_neighbours(before: Tensor, k: Tensor, i: Tensor, p: Tensor) -> Tensor:
    """All 27 neighbours, (27, N), from the 13 before the centre, (13, N).

    Args:
        before: of `children_neighbours`. k, i, p: its pairs, as in `submanifold_map`.
    """
    n = before.shape[1]
    near = torch.full((27, n), n, device=before.device)
    near[:13] = before
    near[13] = torch.arange(n, device=before.device)
    near[26 - k, i] = p
    return near


def submanifold_map(n: int, k: Tensor, i: Tensor, p: Tensor) -> KernelMap:
    """Pairs of a 3x3x3 convolution whose n outputs are its inputs.

    Args:
        k, i, p: (P,) the pairs of the offsets before the centre: `coords[i] = coords[p] + d_k`.
            By symmetry (p, i) is a pair of offset 26 - k.
    """
    device = k.device
    sizes = torch.bincount(k, minlength=13).tolist()
    # The offsets after the centre, 14 to 26, are the mirror images of 12 to 0.
    pair_in = torch.cat([i, *reversed(p.split(sizes))])
    pair_out = torch.cat([p, *reversed(i.split(sizes))])
    sizes = [*sizes, 0, *reversed(sizes)]
    first = torch.tensor([0, *itertools.accumulate(sizes)], device=device)
    here = torch.arange(len(k), device=device)
    image = here + (first[26 - k] - first[k])  # where the mirror image of each pair stands
    place = torch.full((n, 27), -1, device=device)  # where the pair of an output and offset stands
    place[p, k] = here
    place[i, 26 - k] = image
    by_out = place[place >= 0]
    mirror = torch.empty_like(by_out)
    mirror[here] = image
    mirror[image] = here
    start = group_starts(pair_out, n)
    return KernelMap(pair_in, pair_out, sizes, by_out, start, mirror[by_out], start, centre=13)


def strided_map(keys: Tensor) -> tuple[Tensor, KernelMap]:
    """Keys of the next coarser level, and the pairs of the strided 2x2x2 convolution to it.

    Offset k = 4*dx + 2*dy + dz with `coords_in = 2 * coords_out + d_k` is the octant of the input
    voxel in its parent; each input voxel is in exactly one pair.
    """
    parents, parent = torch.unique_consecutive(keys >> 3, return_inverse=True)
    octant = keys & 7
    by_octant = torch.argsort(octant, stable=True)
    rank = torch.empty_like(by_octant)
    rank[by_octant] = torch.arange(len(keys), device=keys.device)
    kernel_map = KernelMap(
        pair_in=by_octant,
        pair_out=parent[by_octant],
        sizes=torch.bincount(octant, minlength=8).tolist(),
        by_out=rank,
        start_out=group_starts(parent, len(parents)),
        by_in=rank,
        start_in=torch.arange(len(keys) + 1, device=keys.device),
    )
    return parents, kernel_map


class Pyramid:
    """All the maps of a sparse U-Net, built once and shared by every layer, forward and backward.

    Args:
        coords: (N, 4) integer points b, x, y, z. Several points may share a voxel.
        levels: number of resolutions; level l has voxels of side 2**l.

    Attributes:
        keys: per level, (V_l,) int64 sorted voxel keys.
        voxel: (N,) int64, the level-0 voxel of each point.
        order, start: the points of voxel v are `order[start[v]:start[v + 1]]`.
        same: per level, the `KernelMap` of submanifold 3x3x3 convolutions.
        down: per step l -> l+1, the `KernelMap` of the strided convolution; `.transposed` is that
            of the inverse convolution.
    """

    same: list[Any]  # Any: `hash.SlotMap` in the subclass
    down: list[Any]

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
            self.down = []
            for _ in range(1, levels):
                keys, down = strided_map(keys)
                self.keys.append(keys)
                self.down.append(down)
            self.same = self._submanifold_maps()

    def _submanifold_maps(self) -> list[KernelMap]:
        """The maps of all levels, built from the top down."""
        levels, keys = len(self.keys), self.keys[-1]
        # Parent row and octant of every voxel, level by level.
        links = [
            (down.pair_out[down.by_in], fine & 7)
            for down, fine in zip(self.down, self.keys[:-1], strict=True)
        ]
        # Above the last level go on until each element of the batch is one voxel, which has no
        # neighbours.
        elements = len(torch.unique_consecutive(keys >> 3 * (AXIS_BITS - levels + 1)))
        while len(keys) > elements:
            parents, parent = torch.unique_consecutive(keys >> 3, return_inverse=True)
            links.append((parent, keys & 7))
            keys = parents
        before = torch.full((13, elements), elements, device=keys.device)
        maps = []
        for level in reversed(range(len(links) + 1)):
            n = before.shape[1]
            k, p = (before < n).nonzero(as_tuple=True)
            i = before[k, p]
            if level < levels:
                maps.append(submanifold_map(n, k, i, p))
            if level > 0:
                near = all_neighbours(before, k, i, p)
                before = children_neighbours(near, *links[level - 1])
        return maps[::-1]

    def coords(self, level: int = 0) -> Tensor:
        """(V, 4) int32 voxels of a level in row order."""
        return unpack(self.keys[level], level)
