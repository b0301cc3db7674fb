"""What each part takes on this machine, beside the least it could take: `ftd bench`.

The floor of a row is the largest of three times: its floating-point operations over the measured
rate of matrix products, its bytes over the measured rate of copies and, on a GPU, its kernels times
what an empty one takes. All are taken in the same rounds; for fp16, too, the product rate is that
of fp32. Rounds interleave all rows, because shared machines drift.
"""

from __future__ import annotations

import copy
import csv
import datetime
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ftdpp import data, kernels, machine, readers, systems, train
from ftdpp.bench import peers
from ftdpp.files import Progress
from ftdpp.index import Index
from ftdpp.kernels import Pyramid
from ftdpp.models import UNet3D
from ftdpp.runs import Origin
from ftdpp.systems.ftdpp import CrossModal

LOADS = 20  # frames loaded in one go: a single one takes too short
LAUNCHES = 100  # kernels launched in one go
LAUNCHED, IN_GRAPH = "an empty kernel, launched", "an empty kernel, in a CUDA graph"
SOURCE, TARGET = "usa", "singapore"  # domains of the built-in world
COLUMNS = [
    *("date", "machine", "what", "ms", "a second", "GFLOP/s", "GB/s"),
    *("kernels", "floor ms", "times floor", "MiB"),
]
Row = dict[str, Any]


class Case(NamedTuple):
    """What to time."""

    call: Callable[[], object]
    flop: float = 0.0
    moved: float = 0.0  # bytes
    times: int = 1  # how often the call does it
    memory: int = 0  # bytes that a training step holds
    captured: Callable[[], object] | None = None  # for a CUDA graph: the call that it replays


# ---- measuring -----------------------------------------------------------------------------------


def run(
    root: Path,
    cache: Path,
    rounds: int,
    device: torch.device,
    batches: tuple[int, ...] = (1, 8),
    scans: Sequence[Path] = (),
    progress: Progress | None = None,
) -> list[Row]:
    """Medians over interleaved rounds, one row a case.

    Args:
        root: of the built-in world, usa -> singapore.
        batches: sizes of the batches of front-camera frames.
        scans: SemanticKITTI .bin files to time as well, whole.
    """
    machine.keep_freed_memory()
    yardsticks = product_and_copy(device)
    cases = dict(yardsticks)
    if device.type == "cuda":
        cases |= launch_cases(device)
    for coords, label in point_sets(root, cache, batches, scans):
        cases |= unet_cases(coords, label, device)
    cases |= loading_case(root, cache)
    cases |= step_cases(root, cache, device)

    median = medians(cases, rounds, device, progress)
    # Counted last, since the profiler slows down what comes after it, and never in a graph, which
    # it may break.
    kernel_count: dict[str, int | None] = {}
    if device.type == "cuda":
        for name, case in cases.items():
            kernel_count[name] = launches(case.captured or case.call)
    product, stream = yardsticks
    rates = cases[product].flop / median[product], cases[stream].moved / median[stream]
    return [to_row(name, case, median, rates, kernel_count) for name, case in cases.items()]


def medians(
    cases: dict[str, Case], rounds: int, device: torch.device, progress: Progress | None
) -> dict[str, float]:
    """Seconds of each case."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds + 1):  # the first round warms up, and compiles
        for j, (name, case) in enumerate(cases.items()):
            if progress is not None:
                progress(i * len(cases) + j, (rounds + 1) * len(cases), "timing")
            wait()
            begin = time.perf_counter()
            case.call()
            wait()
            if i > 0:
                times[name].append((time.perf_counter() - begin) / case.times)
    return {name: statistics.median(t) for name, t in times.items()}


def to_row(
    name: str,
    case: Case,
    median: dict[str, float],
    rates: tuple[float, float],
    kernel_count: dict[str, int | None],
) -> Row:
    """The columns of a case, but for date and machine; rates are FLOP and bytes a second."""
    seconds = median[name]
    bounds = []
    if case.flop or case.moved:
        bounds += [case.flop / rates[0], case.moved / rates[1]]
    if kernel_count and case.times == 1:
        empty = median[IN_GRAPH if case.captured else LAUNCHED]
        bounds.append((kernel_count[name] or 0) * empty)
    floor = max(bounds, default=None)
    return {
        "what": name,
        "ms": 1e3 * seconds,
        "a second": 1 / seconds,
        "GFLOP/s": case.flop / seconds / 1e9 if case.flop else None,
        "GB/s": case.moved / seconds / 1e9 if case.moved else None,
        "kernels": kernel_count.get(name),
        "floor ms": 1e3 * floor if floor else None,
        "times floor": seconds / floor if floor else None,
        "MiB": case.memory / 2**20 if case.memory else None,
    }


def launches(call: Callable[[], object]) -> int | None:
    """How many kernels and copies a call puts on the GPU; None where the profiler cannot say."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
    except RuntimeError:
        return None
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(e.count for e in profile.key_averages() if e.device_type == on_gpu) or None


def counted(call: Callable[[], object]) -> Case:
    """A case with the FLOP of its products and convolutions, counted once, without Triton's."""
    with FlopCounterMode(display=False) as counter:
        call()
    return Case(call, float(counter.get_total_flops()))


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph, each replay of which repeats its kernels.

    It is captured after three calls, which compile and allocate.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    # Keeps the call, too: the memory that it reads has to stay where it is.
    def replay(graph: Any = graph, kept: object = call) -> None:
        graph.replay()

    return replay


def replayed(call: Callable[[], Tensor]) -> Tensor:
    """The output of a replay of the call's graph, which has to write all that the capture wrote."""
    kept: list[Tensor] = []
    replay = captured(lambda: kept.append(call()))
    kept[-1].fill_(float("nan"))
    replay()
    return kept[-1]


# ---- yardsticks and loading ----------------------------------------------------------------------


def product_and_copy(device: torch.device) -> dict[str, Case]:
    """A matrix product and a copy, which give the rates of the floors."""
    side, mib = (8192, 1024) if device.type == "cuda" else (1024, 128)
    a, b = torch.randn(2, side, side, device=device)
    big, other = torch.randn(2, mib * 2**18, device=device)

    def product() -> None:
        torch.set_float32_matmul_precision("high")  # on a GPU tf32, as the convolutions
        torch.mm(a, b)
        torch.set_float32_matmul_precision("highest")

    return {
        f"matrix product {side}^3": Case(product, flop=2.0 * side**3),
        f"copy {mib} MiB": Case(lambda: other.copy_(big), moved=2.0 * big.numel() * 4),
    }


def launch_cases(device: torch.device) -> dict[str, Case]:
    """A kernel that has nothing to do."""
    cell = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(LAUNCHES):
            cell.add_(1)

    return {
        LAUNCHED: Case(launch, times=LAUNCHES),
        IN_GRAPH: Case(captured(launch), times=LAUNCHES, captured=launch),
    }


def source_index(root: Path, cache: Path) -> Index:
    r = systems.recipe(f"{SOURCE}-{TARGET}", "ftdpp", "small")
    return Origin(SOURCE, root).index("train", r, cache)


def loading_case(root: Path, cache: Path) -> dict[str, Case]:
    """Reading and augmenting frames."""
    index = source_index(root, cache)
    numbers = iter(range(10**9))

    def load() -> None:
        for _ in range(LOADS):
            i = next(numbers)
            frame = index.frame(i % len(index))
            data.sample(frame, data.Augment(), 0, np.random.default_rng(i % len(index)))

    return {"load and augment a frame, one core": Case(load, times=LOADS)}


# ---- the sparse U-Net ----------------------------------------------------------------------------


def whole_sweep(points: np.ndarray) -> Tensor:
    """(M, 4) voxels b, x, y, z of 5 cm of all the points (M, 3+) of a sweep."""
    xyz = np.floor(points[:, :3] * 20).astype(np.int32)
    return torch.from_numpy(np.pad(xyz - xyz.min(0), ((0, 0), (1, 0))))


def point_sets(
    root: Path, cache: Path, batches: tuple[int, ...], scans: Sequence[Path]
) -> Iterator[tuple[Tensor, str]]:
    """Points (N, 4) to run the sparse U-Net on, and what they are."""
    index = source_index(root, cache)
    for size in batches:
        samples = [
            data.sample(index.frame(i), None, 0, np.random.default_rng(0)) for i in range(size)
        ]
        yield data.collate(samples).points, f"{size} frame{'s' if size > 1 else ''}"
    domain = readers.domains()[SOURCE]
    first = readers.list_frames(root, domain, "train")[0]
    sweep = readers.reader_of(domain).read(first).points
    assert sweep is not None
    yield whole_sweep(sweep), "a whole sweep"
    for scan in scans:
        points = readers.read_array(scan, np.float32, 4)
        yield whole_sweep(points), f"scan {scan.parent.parent.name}/{scan.stem}"


def unet_cost(net: UNet3D, pyramid: Pyramid) -> tuple[float, float]:
    """FLOP and bytes of one forward pass.

    2 Cin Cout FLOP a pair; inputs and weights read once, outputs written once, all in fp32.
    """
    state = net.state_dict()
    layers = [(state["stem.weight"], pyramid.same[0])]
    layers += [(state[f"encode.{i}.conv.weight"], pyramid.same[i]) for i in range(net.levels)]
    for i in range(net.levels - 1):
        layers += [
            (state[f"decode.{i}.conv.weight"], pyramid.same[i]),
            (state[f"down.{i}.conv.weight"], pyramid.down[i]),
            (state[f"up.{i}.conv.weight"], pyramid.down[i].transposed),
        ]
    flop = moved = 0.0
    for weight, kmap in layers:
        _, cin, cout = weight.shape
        flop += 2.0 * kmap.pairs * cin * cout
        moved += 4.0 * (kmap.n_in * cin + kmap.n_out * cout + weight.numel())
    return flop, moved


def passes(
    model: nn.Module, call: Callable[[], Tensor], half: bool
) -> dict[str, Callable[[], Tensor]]:
    """Forward without gradient, and forward + backward.

    fp16 is by autocast, without its cache: a CUDA graph must not keep that.
    """
    device = next(model.parameters()).device.type

    def forward() -> Tensor:
        with torch.autocast(device, torch.float16, enabled=half, cache_enabled=False):
            return call()

    def learn() -> Tensor:
        model.zero_grad()
        loss = forward().sum()
        loss.backward()
        return loss.detach()

    return {"forward": torch.no_grad()(forward), "forward+backward": learn}


def unet_cases(coords: Tensor, label: str, device: torch.device) -> dict[str, Case]:
    """The sparse U-Net on points (N, 4): its maps, and its passes with maps built before or not.

    On a GPU in half precision and in a CUDA graph, too. spconv and SparseConvNet run on the same
    voxels where they are installed.
    """
    net, flat = UNet3D(), Pyramid(coords)
    flop, moved = unet_cost(net, flat)
    net, coords = net.to(device), coords.to(device)
    feat, built = torch.ones(len(coords), 1, device=device), kernels.pyramid(coords)
    label = f"{label}, {len(flat.keys[0]):,} voxels"
    cases: dict[str, Case] = {f"maps, {label}": Case(lambda: kernels.pyramid(coords))}

    def add(
        what: str, model: nn.Module, call: Callable[[], Tensor], half: bool, graph: bool = False
    ) -> None:
        size = 0.5 if half else 1.0
        for (name, work), share in zip(passes(model, call, half).items(), (1, 3), strict=True):
            cases[f"{what}, {name}, {label}{', fp16' if half else ''}"] = Case(
                captured(work) if graph else work,
                flop=share * flop,
                moved=share * size * moved,
                captured=work if graph else None,
            )

    for half in (False, True) if device.type == "cuda" else (False,):
        add("sparse U-Net m=16, maps warm", net, lambda: net(feat, built), half)
        add("sparse U-Net m=16, maps cold", net, lambda: net(feat, kernels.pyramid(coords)), half)
        if device.type == "cuda":
            padded = PaddedUNet(net, coords)
            found = replayed(passes(padded, padded, half)["forward"])
            wanted = passes(net, lambda: net(feat, built), half)["forward"]()
            off = peers.deviation(found, wanted)
            title = f"sparse U-Net m=16, maps cold, in a CUDA graph ({off})"
            add(title, padded, padded, half, graph=True)
        for peer in peers.installed(net, coords, half):
            add(f"{peer.name}, maps cold", peer, peer, half)
    return cases


class PaddedUNet(nn.Module):
    """A copy of the network on points (N, 4) with room for a quarter more.

    Its sizes are fixed, maps included, as a CUDA graph needs them.
    """

    def __init__(self, net: UNet3D, coords: Tensor) -> None:
        super().__init__()
        self.net, self.points = copy.deepcopy(net), len(coords)
        self.coords = torch.cat([coords, torch.zeros_like(coords[: len(coords) // 4])])
        self.count = torch.tensor(len(coords), device=coords.device)
        self.feat = torch.ones(len(self.coords), 1, device=coords.device)

    def forward(self) -> Tensor:
        """(N, width)."""
        maps = kernels.pyramid(self.coords, self.net.levels, self.count)
        return self.net(self.feat, maps)[: self.points]


# ---- training steps ------------------------------------------------------------------------------


def step_cases(root: Path, cache: Path, device: torch.device) -> dict[str, Case]:
    """Whole training steps, without loading, and the parts of FtD++'s.

    The parts are forward and backward of each network on one batch. A step has two such passes and
    the teacher's forward pass. The preset is the paper's on a GPU, the small one on a CPU.
    """
    preset = "paper" if device.type == "cuda" else "small"
    cases: dict[str, Case] = {}
    for method, precision in (
        ("source-only", "fp32"),
        ("xmuda", "fp32"),
        ("ftdpp", "fp32"),
        ("ftdpp", "bf16"),
        ("self-training", "fp32"),
        ("crossmatch", "fp32"),
    ):
        settings = [f"precision={precision}"]
        r = systems.recipe(f"{SOURCE}-{TARGET}", method, preset, overrides=settings)
        streams = systems.system_of(method, r.scenario).streams(r)
        indexes = {
            name: Origin(SOURCE if s.side == "src" else TARGET, root).index(s.split, r, cache)
            for name, s in streams.items()
        }
        job = train.Run(Path(), r, 0, indexes, None, device=device)
        batches = train.Batches(streams, job.recipe, 0, indexes)[0]
        batches = {name: batch.to(device) for name, batch in batches.items()}
        label = f"{preset} preset, batch {r.batch}, {precision}"
        step = counted(partial(job.learn, [batches]))
        held = memory(job, batches)
        cases[f"training step, {method}, {label}"] = step._replace(memory=held)
        if method == "ftdpp":
            parts = network_parts(job.system.student, batches["labelled"])
            cases |= {f"... {what}, {label}": counted(call) for what, call in parts.items()}
    return cases


def memory(run: train.Run, batches: dict[str, data.Batch]) -> int:
    """Bytes that a training step holds at once: weights, buffers, gradients, the optimiser's
    moments, and what autograd keeps of each phase's forward pass.

    Counted, not measured, so it is the same on every machine; workspaces come on top.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()  # alive until backward, so no address repeats
        return tensor

    chance, largest = systems.Chance(0, 0), 0
    own = {t.untyped_storage().data_ptr() for t in run.system.state_dict().values()}
    for phase in run.optimizers:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            terms = run.system(phase, batches, chance)
        largest = max(largest, sum(size for place, size in kept.items() if place not in own))
        del terms
    held = sum(t.nbytes for t in run.system.state_dict().values())
    held += 3 * sum(p.nbytes for p in run.system.parameters() if p.requires_grad)
    return held + largest


def network_parts(model: CrossModal, batch: data.Batch) -> dict[str, Callable[[], object]]:
    """Forward and backward of the 2D network, the 3D network with its maps, and the fusion."""
    image = batch.points[:, 0].long()

    def camera() -> Tensor:
        return model.features_2d(batch.image)

    def lidar() -> Tensor:
        maps = kernels.pyramid(batch.points, model.net_3d.trunk.levels)
        return model.features_3d(batch.points, maps)

    with torch.no_grad():
        map_2d, feat_3d = camera(), lidar()

    def fusion() -> Tensor:
        assert model.fusion is not None
        return model.fusion(map_2d, feat_3d, image, batch.pixel)

    def learn(part: Callable[[], Tensor]) -> None:
        model.zero_grad()
        part().sum().backward()

    return {
        f"{part.__name__}, forward+backward": partial(learn, part)
        for part in (camera, lidar, fusion)
    }


# ---- the CSV -------------------------------------------------------------------------------------


def check_columns(path: Path) -> None:
    """Raises DataError if rows cannot be added to this file."""
    found = path.read_text(errors="replace").splitlines()[:1] if path.exists() else []
    wanted = ",".join(COLUMNS)
    if found and found != [wanted]:
        raise readers.DataError(
            f"{path}: begins with {found}, not with {wanted}; name another file with --out"
        )


def append(path: Path, rows: list[Row], device: torch.device) -> None:
    """Add the rows to a CSV, with date and machine."""
    new = not path.exists() or not path.stat().st_size
    path.parent.mkdir(parents=True, exist_ok=True)
    origin = {"date": datetime.date.today().isoformat(), "machine": machine.describe(device)}
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        if new:
            writer.writeheader()
        for row in rows:
            cells = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({**origin, **cells})
