"""The pyramid on a GPU: one hash table of the voxels of all levels, from which every map is read.

One sort of the points, one insertion, one look-up kernel for all levels, and one synchronisation
with the host: how many voxels each level has. The voxels of all levels form one list, finest level
first; `base[l]` is where level l begins.

A CUDA graph replays launches of fixed sizes, so for a graph the host must not need those numbers.
*Padded* maps give every level room for as many voxels as there may be points. The rows left over
hold a negative key. Such a row is no voxel's neighbour and in no pair, so convolutions write zeros
into it; only BatchNorm has to know how many rows count (`SlotMap.live`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftdpp.kernels.maps import (
    AXIS_BITS,
    BATCH_BITS,
    BIAS,
    Pyramid,
    axis_masks,
    check_coords,
    group_starts,
)

# A product and a sum in one instruction. Triton 3.9 warns when this is left open.
FUSION = {"enable_fp_fusion": True}
# Two entries a thread. With one, ptxas spills a register pair of find_neighbours.
LANES = {"BLOCK": 256, "num_warps": 4, **FUSION}
TAG = 3  # bits below a key that hold its level
# A kernel is compiled once, not again for each size, nor for where in memory a level's part of a
# list begins.
ANY_SIZE = ["count", "size"]
ANY_PLACE = ["idx", "row", "mask", "place", "pair_in", "pair_out", "first", "last"]


@dataclass(frozen=True)
class SlotMap:
    """The pairs of one sparse convolution with K offsets, ordered for the two GEMM kernels.

    idx: (K, n_out) int32, the input row that a slot's output meets under each offset, -1 for none.
    row: (n_out,) int32, output row of a slot. Slots are the outputs in the order of their masks:
        a block of slots then shares most of its offsets, and the others can be skipped. On LiDAR
        batches this halves the padding.
    mask: (n_out,) int32, bit k set where idx[k] is not -1.
    pair_in, pair_out: int32 lists of the same pairs, offset by offset; those of offset k are
        `first[k]:last[k]`.
    back: the map of the input gradient. None: this one with its offsets in reverse order, as in a
        submanifold convolution.
    live: () int64, how many of the n_in rows are voxels: all of them, except in padded maps.
    """

    idx: Tensor
    row: Tensor
    mask: Tensor
    pair_in: Tensor
    pair_out: Tensor
    first: Tensor
    last: Tensor
    n_in: int
    n_out: int
    live: Tensor
    back: SlotMap | None = None

    @property
    def offsets(self) -> int:
        return len(self.idx)

    @property
    def transposed(self) -> SlotMap:
        """The map of the inverse convolution: input and output exchanged, offsets as they are."""
        assert self.back is not None, "a submanifold convolution is its own inverse map"
        return replace(self.back, back=replace(self, back=None))


@triton.jit
def _spread(v):
    """Move bit i of a 16-bit integer to bit 3i."""
    v = (v | v << 16) & 0x0000_00FF_0000_FF
    v = (v | v << 8) & 0x00F0_0F00_F00F
    v = (v | v << 4) & 0x0C30_C30C_30C3
    return (v | v << 2) & 0x2492_4924_9249


@triton.jit(do_not_specialize=ANY_SIZE)
def pack_points(
    coords,
    keys,
    valid,
    count,
    BIAS: tl.constexpr,
    AXIS_BITS: tl.constexpr,
    BATCH_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`maps.pack`: the key of every point.

    It is -1 for a point outside the grid, and larger than all keys for a point that is not valid.

    coords (count, 4) int32 or int64 b, x, y, z; keys (count,) int64; valid () int64, how many
    points count, from the first on.
    Grid: count / BLOCK. Bytes: 16 or 32 read and 8 written a point.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    b = tl.load(coords + 4 * i, mask=inside, other=0).to(tl.int64)
    key = b << 3 * AXIS_BITS
    fits = (b >= 0) & (b < 1 << BATCH_BITS)
    for axis in tl.static_range(3):
        v = tl.load(coords + 4 * i + 1 + axis, mask=inside, other=0).to(tl.int64) + BIAS
        fits = fits & (v > 1) & (v < 2 * BIAS - 1)
        key = key | _spread(v) << 2 - axis
    key = tl.where(i < tl.load(valid), tl.where(fits, key, -1), 1 << 3 * AXIS_BITS + BATCH_BITS)
    tl.store(keys + i, key, mask=inside)


@triton.jit
def _place(key, size):
    """Where the search for a key begins in a table of 2^n entries.

    A multiplicative hash, its upper bits folded in.
    """
    h = key * 0x9E3779B97F4A7C1
    return (h ^ (h >> 31)) & (size - 1)


@triton.jit(do_not_specialize=ANY_SIZE)
def hash_insert(keys, table_key, table_row, count, size, BLOCK: tl.constexpr):
    """Enter `keys[i] -> i`: from a key's place on, compare-and-swap takes the first free entry.

    keys (count,) int64, each once, negative ones left out; table_key (size + BLOCK,) int64 filled
    with -1; table_row (size,) int32.
    Grid: count / BLOCK. Bytes: about 8 read and 12 written a key, at random places.

    A swap takes no mask: a lane that is done swaps at its own entry, without effect, and lanes
    without a key swap in the BLOCK entries behind the table. Swaps need no order among themselves,
    since look-ups are another launch.
    """
    lane = tl.arange(0, BLOCK)
    i = tl.program_id(0).to(tl.int64) * BLOCK + lane
    key = tl.load(keys + i, mask=i < count, other=-1)
    live = key >= 0
    todo = live
    at = _place(key, size)
    while tl.max(todo.to(tl.int32), 0) > 0:
        free = tl.full([BLOCK], -1, tl.int64)
        found = tl.atomic_cas(table_key + tl.where(live, at, size + lane), free, key, sem="relaxed")
        tl.store(table_row + at, i.to(tl.int32), mask=todo & (found == -1))
        todo = todo & (found != -1)
        at = tl.where(todo, (at + 1) & (size - 1), at)


@triton.jit
def _find(key, wanted, table_key, table_row, size, BLOCK: tl.constexpr):
    """Row of each wanted key, -1 where the table does not have it."""
    at = _place(key, size)
    row = tl.full([BLOCK], -1, tl.int32)
    todo = wanted
    while tl.max(todo.to(tl.int32), 0) > 0:
        found = tl.load(table_key + at, mask=todo, other=-1)
        hit = todo & (found == key)
        row = tl.where(hit, tl.load(table_row + at, mask=hit, other=-1), row)
        todo = todo & (found != key) & (found != -1)
        at = (at + 1) & (size - 1)
    return row


@triton.jit
def _step(here, axis, d):
    """The bits of one axis after a step d of -1, 0, +1, and whether it stays on the grid.

    Adding one to interleaved bits: the gaps are filled with ones, so that the carry runs through
    them. Subtracting leaves the gaps zero.
    """
    one = axis & -axis
    moved = tl.where(
        d < 0, (here - one) & axis, tl.where(d > 0, ((here | ~axis) + one) & axis, here)
    )
    return moved, ((d >= 0) | (here != 0)) & ((d <= 0) | (here != axis))


@triton.jit(do_not_specialize=ANY_SIZE)
def find_neighbours(
    keys, base, axes, table_key, table_row, idx, mask, count, size, BLOCK: tl.constexpr
):
    """The 27 neighbours of every voxel of every level.

    Offset k = (dx+1)*9 + (dy+1)*3 + (dz+1): idx[k, v] is the row, within its level, of the voxel
    at coords[v] + d_k.

    keys (count,) int64, level in the low bits, negative where there is no voxel; base int64, first
    voxel of each level; axes (levels, 3) int64, the bits of x, y, z in a key; idx (27, count)
    int32; mask (count,) int32.
    Grid: count / BLOCK. Bytes: 8 read and 112 written a voxel, 27 look-ups of 8 to 12 at random
    places.
    """
    v = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = v < count
    key = tl.load(keys + v, mask=inside, other=-1)
    live = key >= 0
    level = key & 7
    start = tl.load(base + level, mask=live, other=0)
    x = tl.load(axes + level * 3, mask=live, other=1)
    y = tl.load(axes + level * 3 + 1, mask=live, other=1)
    z = tl.load(axes + level * 3 + 2, mask=live, other=1)
    rest = key & ~(x | y | z)  # batch index and level
    bits = tl.zeros([BLOCK], tl.int32)
    cells = idx + v
    for k in range(27):
        px, on_x = _step(key & x, x, k // 9 - 1)
        py, on_y = _step(key & y, y, k // 3 % 3 - 1)
        pz, on_z = _step(key & z, z, k % 3 - 1)
        on_grid = on_x & on_y & on_z
        found = _find(rest | px | py | pz, live & on_grid, table_key, table_row, size, BLOCK)
        tl.store(cells, tl.where(found >= 0, found - start, -1).to(tl.int32), mask=inside)
        bits = bits | ((found >= 0).to(tl.int32) << k)
        cells += count
    tl.store(mask + v, bits, mask=inside)


@triton.jit(do_not_specialize=ANY_SIZE, do_not_specialize_on_alignment=ANY_PLACE)
def list_pairs(idx, row, place, pair_in, pair_out, count, size, BLOCK: tl.constexpr):
    """The pairs that idx holds, as lists: pair place[j] - 1 is (idx[j], row of the slot of j).

    idx (size,) int32, flattened (K, count); row (count,) int32; place (size,) int64, how many of
    the entries up to this one are not -1.
    Grid: size / BLOCK. Bytes: 16 read an entry, 8 written a pair.
    """
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i = tl.load(idx + j, mask=j < size, other=-1)
    there = i >= 0
    to = tl.load(place + j, mask=there, other=1) - 1
    tl.store(pair_in + to, i, mask=there)
    tl.store(pair_out + to, tl.load(row + j % count, mask=there, other=0), mask=there)


def sorted_keys(coords: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of the points (N, 4) in order, those of the first `valid` in front, and where each was.

    A point outside the grid stops the program, on a GPU by a device-side assertion: the host does
    not wait for it.
    """
    keys = torch.empty(len(coords), dtype=torch.int64, device=coords.device)
    if len(keys):
        grid = (triton.cdiv(len(keys), LANES["BLOCK"]),)
        pack_points[grid](
            coords.contiguous(), keys, valid, len(keys), BIAS, AXIS_BITS, BATCH_BITS, **LANES
        )
    keys, order = torch.sort(keys, stable=True)
    if len(keys):
        torch._assert_async(
            keys[0] >= 0,
            f"voxel coordinates outside +-{BIAS - 2}, or batch indices outside "
            f"0 to {(1 << BATCH_BITS) - 1}",
        )
    return keys, order


def hash_table(keys: Tensor) -> tuple[Tensor, Tensor, int]:
    """Table of (N,) int64 keys, at most half full.

    Returns:
        Its keys (size + BLOCK,), its rows (size,) int32, its size.
    """
    size = 1 << (2 * len(keys)).bit_length()
    table_key = keys.new_full((size + LANES["BLOCK"],), -1)
    table_row = torch.empty(size, dtype=torch.int32, device=keys.device)
    if len(keys):
        grid = (triton.cdiv(len(keys), LANES["BLOCK"]),)
        hash_insert[grid](keys, table_key, table_row, len(keys), size, **LANES)
    return table_key, table_row, size


@functools.cache
def _axes(levels: int, device: torch.device) -> Tensor:
    """(levels, 3) int64: the bits of x, y, z in a tagged key of each level."""
    masks = [[mask << TAG for mask in axis_masks(level)] for level in range(levels)]
    return torch.tensor(masks, device=device)


def _submanifold(keys: Tensor, base: Tensor, sizes: list[int], live: list[Tensor]) -> list[SlotMap]:
    """Maps of the 3x3x3 convolutions of all levels.

    keys: (total,) with their level in the low bits. base: (levels + 1,).
    """
    total, levels, device = len(keys), len(sizes) - 1, keys.device
    axes = _axes(levels, device)
    idx = torch.empty(27, total, dtype=torch.int32, device=device)
    mask = torch.empty(total, dtype=torch.int32, device=device)
    if total:
        table_key, table_row, size = hash_table(keys)
        grid = (triton.cdiv(total, LANES["BLOCK"]),)
        find_neighbours[grid](
            keys, base, axes, table_key, table_row, idx, mask, total, size, **LANES
        )
    order = torch.argsort((keys & 7) << 27 | mask, stable=True)
    idx, mask = idx[:, order], mask[order]
    # The order keeps levels together, so that keys & 7 is sorted already.
    row = (order - base[keys & 7]).int()
    place = (idx >= 0).flatten().cumsum(0)
    pair_in, pair_out = torch.empty(2, 27 * total, dtype=torch.int32, device=device)
    if total:
        grid = (triton.cdiv(27 * total, LANES["BLOCK"]),)
        list_pairs[grid](idx, row, place, pair_in, pair_out, total, 27 * total, **LANES)
    before = torch.cat([place.new_zeros(1), place])
    seg = before[(torch.arange(27, device=device) * total)[:, None] + base]  # (27, levels + 1)
    seg = seg.t().contiguous()
    maps = []
    for n, (a, b) in enumerate(pairwise(sizes)):
        slots = idx[:, a:b], row[a:b], mask[a:b]
        lists = pair_in, pair_out, seg[n], seg[n + 1]
        maps.append(SlotMap(*slots, *lists, n_in=b - a, n_out=b - a, live=live[n]))
    return maps


def _strided(
    keys: Tensor, parent: Tensor, base: Tensor, sizes: list[int], live: list[Tensor]
) -> list[SlotMap]:
    """Maps of the 2x2x2 convolutions between neighbouring levels.

    parent: (sizes[-2],) row of each voxel's parent.
    """
    fine, device, levels = sizes[-2], keys.device, len(sizes) - 1
    coarse = sizes[-1] - sizes[1]  # the voxels of levels 1 and up
    level = keys[:fine] & 7
    # Rows that are no voxel form a ninth group, which is dropped below.
    octant = torch.where(keys[:fine] < 0, 8, keys[:fine] >> TAG & 7)
    child = torch.arange(fine, device=device) - base[level]
    column = base[level + 1] - sizes[1] + parent

    # Down: a parent meets up to eight children.
    idx = torch.full((9, coarse), -1, dtype=torch.int32, device=device)
    idx.view(-1)[octant * coarse + column] = child.int()
    idx = idx[:8]
    mask = ((idx >= 0).int() << torch.arange(8, device=device, dtype=torch.int32)[:, None]).sum(0)
    above = keys[sizes[1] :] & 7
    order = torch.argsort(above << 8 | mask, stable=True)
    down = idx[:, order], (order + sizes[1] - base[above]).int(), mask[order].int()

    # Up: a child meets its one parent, under its octant. In this order the slots are the list of
    # pairs, too.
    group = level * 9 + octant
    order = torch.argsort(group, stable=True)
    pair_in, pair_out = child[order].int(), parent[order].int()
    idx = torch.full((9, fine), -1, dtype=torch.int32, device=device)
    idx.view(-1)[octant[order] * fine + torch.arange(fine, device=device)] = pair_out
    up = idx[:8], pair_in, (1 << octant[order] & 255).int()
    seg = torch.searchsorted(group[order], torch.arange(9 * (levels - 1) + 1, device=device))

    maps = []
    for n in range(levels - 1):
        a, b, c = sizes[n : n + 3]
        ends = seg[9 * n : 9 * n + 8], seg[9 * n + 1 : 9 * n + 9]
        slots = up[0][:, a:b], up[1][a:b], up[2][a:b]
        lists = pair_out, pair_in, *ends
        inverse = SlotMap(*slots, *lists, n_in=c - b, n_out=b - a, live=live[n + 1])
        col = slice(b - sizes[1], c - sizes[1])
        slots = down[0][:, col], down[1][col], down[2][col]
        lists = pair_in, pair_out, *ends
        maps.append(SlotMap(*slots, *lists, n_in=b - a, n_out=c - b, live=live[n], back=inverse))
    return maps


class HashPyramid(Pyramid):
    """`maps.Pyramid` by Triton: the same voxels in the same order, the same pairs, as `SlotMap`s.

    Args:
        count: () int64 on the device, for padded maps: the points are the first `count` rows; the
            rows behind them are ignored. Every level then has len(coords) rows, its voxels first,
            and nothing waits for the GPU.
    """

    def __init__(self, coords: Tensor, levels: int = 7, count: Tensor | None = None) -> None:
        check_coords(coords)
        if not 1 <= levels <= 1 << TAG:
            raise ValueError(f"a pyramid by Triton has 1 to {1 << TAG} levels; found {levels}")
        n, device = len(coords), coords.device
        point = torch.arange(n, device=device)
        valid = point < (n if count is None else count)
        every = torch.full((), n, device=device)
        keys, self.order = sorted_keys(coords, every if count is None else count)
        depth = torch.arange(levels, device=device)
        at_level = keys >> (3 * depth)[:, None]  # (levels, N), each row sorted
        new = valid.expand(levels, n).clone()
        new[:, 1:] &= at_level[:, 1:] != at_level[:, :-1]
        counts = new.sum(1)  # voxels of each level
        # The voxel of each point on each level, by one running sum over all levels: a sum for each
        # level would keep only as many multiprocessors busy as there are levels.
        rank = new.flatten().cumsum(0).view(levels, n) - (counts.cumsum(0) - counts + 1)[:, None]
        if count is None:
            base = torch.cat([depth[:1], counts.cumsum(0)])
            sizes = base.tolist()  # the one synchronisation
        else:
            base = torch.arange(levels + 1, device=device) * n
            sizes = [level * n for level in range(levels + 1)]
            # A row that is no point gets a row of its own on every level: row j >= count is free
            # there, as no level has more voxels than there are points.
            rank = torch.where(valid, rank, point)
        voxel = base[:-1, None] + rank  # in the list of all voxels
        no_voxel = depth - (1 << TAG)
        if count is None:  # every voxel has a point, which writes it below
            tagged = torch.empty(sizes[-1], dtype=torch.int64, device=device)
        else:
            tagged = no_voxel[:, None].expand(levels, n).flatten()
        # Points of one voxel write the same value, so it does not matter which one comes last.
        tagged[voxel] = torch.where(valid, at_level << TAG | depth[:, None], no_voxel[:, None])
        parent = torch.full((sizes[-2],), max(n - 1, 0), device=device)
        parent[voxel[:-1]] = rank[1:]
        self.voxel = torch.empty_like(self.order)
        self.voxel[self.order] = rank[0]
        self.start = group_starts(rank[0], sizes[1])
        self.keys = [tagged[a:b] >> TAG for a, b in pairwise(sizes)]
        live = list(counts.unbind())
        self.same = _submanifold(tagged, base, sizes, live)
        self.down = _strided(tagged, parent, base, sizes, live)
