"""The yardstick: what each part takes on this machine, beside the least it could take.

The floor of a row is the largest of its floating-point operations over the measured matrix-product rate, its bytes over the
measured copy rate and, on a GPU, its kernels times what an empty one takes, all taken in the same rounds (for fp16, too, the
product rate of fp32).
Rounds interleave all rows, because shared machines drift.
"""

from __future__ import annotations

import copy
import csv
import datetime
import importlib.metadata
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ftdpp import data, kernels, losses, train
from ftdpp.kernels import Pyramid
from ftdpp.models import CrossModal, UNet3D, released_name

LOADS = 20  # frames loaded in one go: a single one takes too short
LAUNCHES = 100  # kernels launched in one go
COLUMNS = ["date", "machine", "what", "ms", "a second", "GFLOP/s", "GB/s", "kernels", "floor ms", "times floor"]


def machine(device: torch.device) -> str:
    """Processor or GPU kind, threads, versions."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), model
        )
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def unet_cost(net: UNet3D, pyramid: Pyramid) -> tuple[float, float]:
    """FLOP and bytes of one forward pass: 2 Cin Cout a pair; inputs read, weights read and outputs written once, fp32."""
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


class Case(NamedTuple):
    """What to time, its FLOP and bytes, how often the call does it, and for a CUDA graph the call that was captured."""

    call: Callable[[], object]
    flop: float = 0.0
    moved: float = 0.0
    times: int = 1
    captured: Callable[[], object] | None = None


def whole_sweep(points: np.ndarray) -> torch.Tensor:
    """(M, 4) voxels b, x, y, z of 5 cm of all the points (M, 3+) of a sweep."""
    xyz = np.floor(points[:, :3] * 20).astype(np.int32)
    return torch.from_numpy(np.pad(xyz - xyz.min(0), ((0, 0), (1, 0))))


def run(
    root: Path, cache: Path, rounds: int, device: torch.device, batches: tuple[int, ...] = (1, 8), scans: Sequence[Path] = ()
) -> list[dict[str, Any]]:
    """Measure on the built-in world's usa -> singapore frames at `root`; medians over interleaved rounds.

    Args:
        batches: sizes of the batches of front-camera frames. scans: SemanticKITTI .bin files to time as well, whole.
    """
    train.keep_freed_memory()
    gpu = device.type == "cuda"
    src = train.Source("usa", root).index("train", losses.recipe("usa-singapore", "ftdpp", "small"), cache)

    side, mib = (8192, 1024) if gpu else (1024, 128)
    a, b = torch.randn(2, side, side, device=device)
    big, other = torch.randn(2, mib * 2**18, device=device)
    product, stream = f"matrix product {side}^3", f"copy {mib} MiB"
    cases: dict[str, Case] = {
        product: Case(lambda: torch.mm(a, b), flop=2.0 * side**3),
        stream: Case(lambda: other.copy_(big), moved=2.0 * big.numel() * 4),
    }
    if gpu:
        cases |= launch_cases(device)
    for frames in batches:
        batch = data.collate([data.sample(src.frame(i), None, 0, np.random.default_rng(0)) for i in range(frames)])
        cases |= unet_cases(batch.coords, f"{frames} frame{'s' if frames > 1 else ''}", device)
    sweep = data.read_frame(data.list_frames(root, data.DOMAINS["usa"], "train")[0]).points
    cases |= unet_cases(whole_sweep(sweep), "a whole sweep", device)
    for scan in scans:
        points = data.read_array(scan, np.float32, 4)
        cases |= unet_cases(whole_sweep(points), f"scan {scan.parent.parent.name}/{scan.stem}", device)

    counter = iter(range(10**9))

    def load() -> None:
        for _ in range(LOADS):
            i = next(counter) % len(src)
            data.sample(src.frame(i), data.Augment(), 0, np.random.default_rng(i))

    cases["load and augment a frame, one core"] = Case(load, times=LOADS)
    cases |= step_cases(root, cache, device)

    times: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds + 1):  # the first round warms up, and compiles
        for name, case in cases.items():
            if gpu:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            case.call()
            if gpu:
                torch.cuda.synchronize()
            if i:
                times[name].append((time.perf_counter() - begin) / case.times)
    # Counted last, since the profiler slows down what comes after it, and never in a graph, which it may break.
    kernel_count = {name: launches(case.captured or case.call) for name, case in cases.items() if gpu}
    median = {name: statistics.median(t) for name, t in times.items()}
    flops, bandwidth = cases[product].flop / median[product], cases[stream].moved / median[stream]
    rows = []
    for name, case in cases.items():
        flop, moved = case.flop, case.moved
        bounds = [flop / flops, moved / bandwidth] if flop or moved else []
        if gpu and case.times == 1:
            bounds.append((kernel_count[name] or 0) * median[IN_GRAPH if case.captured else LAUNCHED])
        floor = max(bounds, default=None)
        rows.append(
            {
                "what": name,
                "ms": 1e3 * median[name],
                "a second": 1 / median[name],
                "GFLOP/s": flop / median[name] / 1e9 if flop else None,
                "GB/s": moved / median[name] / 1e9 if moved else None,
                "kernels": kernel_count.get(name),
                "floor ms": 1e3 * floor if floor else None,
                "times floor": median[name] / floor if floor else None,
            }
        )
    return rows


LAUNCHED, IN_GRAPH = "an empty kernel, launched", "an empty kernel, in a CUDA graph"


def launch_cases(device: torch.device) -> dict[str, Case]:
    """What a kernel takes that has nothing to do."""
    cell = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(LAUNCHES):
            cell.add_(1)

    return {LAUNCHED: Case(launch, times=LAUNCHES), IN_GRAPH: Case(captured(launch), times=LAUNCHES, captured=launch)}


def launches(call: Callable[[], object]) -> int | None:
    """How many kernels and copies a call puts on the GPU; None where the profiler does not say."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
    except RuntimeError:
        return None
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA) or None


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: after the first rounds, which compile and allocate, each replay repeats its kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(graph: Any = graph, kept: object = call) -> None:  # what the call reads has to stay where it is
        graph.replay()

    return replay


def replayed(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What a replay of the call's graph gives, with everything that the capture left there wiped out before."""
    kept: list[torch.Tensor] = []
    replay = captured(lambda: kept.append(call()))
    kept[-1].fill_(float("nan"))
    replay()
    return kept[-1]


def passes(model: torch.nn.Module, call: Callable[[], torch.Tensor], half: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """Forward without gradient, and forward + backward; in fp16 by autocast, whose cache a CUDA graph must not keep."""
    device = next(model.parameters()).device.type

    def forward() -> torch.Tensor:
        with torch.autocast(device, torch.float16, enabled=half, cache_enabled=False):
            return call()

    def learn() -> torch.Tensor:
        model.zero_grad()
        loss = forward().sum()
        loss.backward()
        return loss.detach()

    return {"forward": torch.no_grad()(forward), "forward+backward": learn}


def unet_cases(coords: torch.Tensor, label: str, device: torch.device) -> dict[str, Case]:
    """Maps, forward, and forward + backward with the maps built (warm) and not (cold), on points (N, 4); on a GPU in half
    precision too; and spconv and SparseConvNet on the same voxels where they are installed."""
    net, flat = UNet3D(), Pyramid(coords)
    flop, moved = unet_cost(net, flat)
    net, coords = net.to(device), coords.to(device)
    feat, built = torch.ones(len(coords), 1, device=device), kernels.pyramid(coords)
    label = f"{label}, {len(flat.keys[0]):,} voxels"
    cases: dict[str, Case] = {f"maps, {label}": Case(lambda: kernels.pyramid(coords))}

    def add(what: str, model: torch.nn.Module, call: Callable[[], torch.Tensor], half: bool, graph: bool = False) -> None:
        for (whole, work), share in zip(passes(model, call, half).items(), (1, 3), strict=True):
            least = share * (moved / 2 if half else moved)
            case = Case(captured(work) if graph else work, share * flop, least, captured=work if graph else None)
            cases[f"{what}, {whole}, {label}{', fp16' if half else ''}"] = case

    for half in (False, True) if device.type == "cuda" else (False,):
        add("sparse U-Net m=16, maps warm", net, lambda: net(feat, built), half)
        add("sparse U-Net m=16, maps cold", net, lambda: net(feat, kernels.pyramid(coords)), half)
        if device.type == "cuda":
            padded = PaddedUNet(net, coords)
            forward = [
                passes(model, call, half)["forward"] for model, call in ((padded, padded), (net, lambda: net(feat, built)))
            ]
            off = deviation(replayed(forward[0]), forward[1]())
            add(f"sparse U-Net m=16, maps cold, in a CUDA graph ({off})", padded, padded, half, graph=True)
        peers: list[Any] = []
        if importlib.util.find_spec("spconv") is not None:
            peers.append(SpconvUNet(net, built))
        if importlib.util.find_spec("sparseconvnet") is not None and not half:  # it has no half precision
            peers.append(SparseConvNetUNet(net, coords))
        for peer in peers:
            add(f"{peer.name}, maps cold", peer, peer, half)
    return cases


def deviation(found: torch.Tensor, wanted: torch.Tensor) -> str:
    """How far a peer's output is from ours, as a share of the largest value, in words."""
    return f"output differs by {((found - wanted).abs().max() / wanted.abs().max()).item():.0e}"


class PaddedUNet(torch.nn.Module):
    """A copy of the network on points (N, 4) with room for a quarter more, maps included: fixed sizes for a CUDA graph."""

    def __init__(self, net: UNet3D, coords: torch.Tensor) -> None:
        super().__init__()
        self.net, self.points = copy.deepcopy(net), len(coords)
        self.coords = torch.cat([coords, torch.zeros_like(coords[: len(coords) // 4])])
        self.count = torch.tensor(len(coords), device=coords.device)
        self.feat = torch.ones(len(self.coords), 1, device=coords.device)

    def forward(self) -> torch.Tensor:
        """(N, m)."""
        return self.net(self.feat, kernels.pyramid(self.coords, self.net.levels, self.count))[: self.points]


class SpconvUNet(torch.nn.Module):
    """The same network with the same weights by spconv, on the same voxels. It gets them ready-made: there are no points to
    average, and no rows to copy back to them. spconv is no dependency of ours; this class wants it installed."""

    norms: Any  # our network, for its BatchNorms
    stem: Any
    encode: Any
    down: Any
    up: Any
    decode: Any

    def __init__(self, net: UNet3D, pyramid: Pyramid) -> None:
        super().__init__()
        import spconv.constants
        import spconv.pytorch as spconv

        if not torch.cuda.is_available():  # in all of this process: its CPU backward pass asks for a CUDA stream it does not use
            torch.cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0)  # type: ignore[assignment]
        spconv.constants.SPCONV_ALLOW_TF32 = torch.get_float32_matmul_precision() != "highest"
        self.norms, self.levels = copy.deepcopy(net), net.levels
        kinds: dict[str, Callable[[int, int, str], Any]] = {
            "same": lambda cin, cout, key: spconv.SubMConv3d(cin, cout, 3, bias=False, indice_key=key),
            "down": lambda cin, cout, key: spconv.SparseConv3d(cin, cout, 2, 2, bias=False, indice_key=key),
            "up": lambda cin, cout, key: spconv.SparseInverseConv3d(cin, cout, 2, bias=False, indice_key=key),
        }

        def conv(kind: str, level: int, weight: torch.Tensor) -> Any:
            cin, cout = weight.shape[1:]
            made = kinds[kind](cin, cout, f"same{level}" if kind == "same" else f"down{level}")
            with torch.no_grad():  # ours is (K, Cin, Cout), the offsets in the order x, y, z
                made.weight.copy_(weight.permute(2, 0, 1).reshape(made.weight.shape))
            return made.to(weight.device)

        w = dict(net.named_parameters())
        steps = range(net.levels - 1)
        self.stem = conv("same", 0, w["stem.weight"])
        self.encode = torch.nn.ModuleList(conv("same", i, w[f"encode.{i}.conv.weight"]) for i in range(net.levels))
        self.down = torch.nn.ModuleList(conv("down", i, w[f"down.{i}.conv.weight"]) for i in steps)
        self.up = torch.nn.ModuleList(conv("up", i, w[f"up.{i}.conv.weight"]) for i in steps)
        self.decode = torch.nn.ModuleList(conv("same", i, w[f"decode.{i}.conv.weight"]) for i in steps)

        voxels = pyramid.coords()
        low = voxels[:, 1:].amin(0) >> 6 << 6  # a multiple of every stride, so that both have the same coarse voxels
        at = torch.cat([voxels[:, :1], voxels[:, 1:] - low], 1).contiguous()
        size, frames = [(int(n) + 64) // 64 * 64 for n in at[:, 1:].amax(0)], int(at[:, 0].max()) + 1
        feat = torch.ones(len(at), 1, device=at.device)
        self.input = lambda: spconv.SparseConvTensor(feat, at, size, frames)
        with torch.no_grad():
            wanted = net(torch.ones(len(pyramid.voxel), 1, device=at.device), pyramid)
            off = deviation(self()[pyramid.voxel], wanted)
        self.name = f"spconv {importlib.metadata.version('spconv')} ({off})"

    def forward(self) -> torch.Tensor:
        """(V, m). The maps are built anew in each call; spconv does not reuse those of strided convolutions."""
        x = self.stem(self.input())
        skips = []
        for level in range(self.levels - 1):
            x = self.encode[level](x.replace_feature(self.norms.encode[level].norm(x.features)))
            skips.append(x.features)
            x = self.down[level](x.replace_feature(self.norms.down[level].norm(x.features)))
        x = self.encode[-1](x.replace_feature(self.norms.encode[-1].norm(x.features)))
        for level in reversed(range(self.levels - 1)):
            x = self.up[level](x.replace_feature(self.norms.up[level].norm(x.features)))
            joined = torch.cat([skips[level], x.features], 1)
            x = self.decode[level](x.replace_feature(self.norms.decode[level].norm(joined)))
        return self.norms.norm(x.features)


class SparseConvNetUNet(torch.nn.Module):
    """The same network with the same weights by SparseConvNet, as xMUDA and FtD++ build it, from the same points (N, 4).
    It is no dependency of ours; this class wants it installed."""

    def __init__(self, net: UNet3D, coords: torch.Tensor) -> None:
        super().__init__()
        import sparseconvnet as scn

        m = net.norm.num_features
        at = coords[:, [1, 2, 3, 0]].long().cpu()  # it reads the coordinates on the host
        at[:, :3] -= at[:, :3].amin(0) >> 6 << 6  # a multiple of every stride, so that both have the same coarse voxels
        size = 1 << int(at[:, :3].max()).bit_length()
        self.net = scn.Sequential(
            scn.InputLayer(3, size, mode=4),  # 4: the mean of a voxel's points
            scn.SubmanifoldConvolution(3, 1, m, 3, False),
            scn.UNet(3, 1, [m * (level + 1) for level in range(net.levels)], False),
            scn.BatchNormReLU(m),
            scn.OutputLayer(3),
        ).to(coords.device)
        ours = net.state_dict()
        with torch.no_grad():
            for name, tensor in self.net.state_dict().items():
                tensor.copy_(ours[released_name("3d", f"sparseModel.{name}").removeprefix("net_3d.trunk.")].view_as(tensor))
            feat = torch.ones(len(coords), 1, device=coords.device)
            self.input = lambda: [at, feat]
            self.name = f"SparseConvNet ({deviation(self(), net(feat, kernels.pyramid(coords)))})"

    def forward(self) -> torch.Tensor:
        """(N, m). The maps are built anew in each call."""
        return self.net(self.input())


def step_cases(root: Path, cache: Path, device: torch.device) -> dict[str, Case]:
    """Whole training steps, without loading, and the parts of FtD++'s: each network forward and backward on one batch. A step
    has two such passes and the teacher's forward pass. The paper's preset on a GPU, the small one on a CPU."""
    preset = "paper" if device.type == "cuda" else "small"
    cases: dict[str, Case] = {}
    for method, precision in (("source-only", "fp32"), ("xmuda", "fp32"), ("ftdpp", "fp32"), ("ftdpp", "bf16")):
        r = losses.recipe("usa-singapore", method, preset, overrides=[f"precision={precision}"])
        src, tgt = (train.Source(name, root).index("train", r, cache) for name in ("usa", "singapore"))
        job = train.Run(Path(), r, 0, [src], tgt, None, device=device)
        labelled, unlabelled = train.Batches(job.recipe, 0, [src], tgt)[0]
        item = labelled.to(device), unlabelled.to(device) if unlabelled is not None else None
        label = f"{preset} preset, batch {r.batch}, {precision}"
        cases[f"training step, {method}, {label}"] = counted(partial(job.learn, *item))
        if method == "ftdpp":
            cases |= {f"... {what}, {label}": counted(call) for what, call in network_parts(job.student, item[0]).items()}
    return cases


def counted(call: Callable[[], object]) -> Case:
    """A case with the FLOP of its products and convolutions, those in Triton aside, counted in one run."""
    with FlopCounterMode(display=False) as counter:
        call()
    return Case(call, float(counter.get_total_flops()))


def network_parts(model: CrossModal, batch: data.Batch) -> dict[str, Callable[[], object]]:
    """Forward and backward of the 2D network, the 3D network with its maps, and the fusion module."""
    frame = batch.coords[:, 0].long()

    def camera() -> torch.Tensor:
        return model.features_2d(batch.image)

    def lidar() -> torch.Tensor:
        return model.features_3d(batch.coords, kernels.pyramid(batch.coords, model.net_3d.trunk.levels))

    with torch.no_grad():
        map_2d, feat_3d = camera(), lidar()

    def fusion() -> torch.Tensor:
        assert model.fusion is not None
        return model.fusion(map_2d, feat_3d, frame, batch.pixel)

    def learn(part: Callable[[], torch.Tensor]) -> None:
        model.zero_grad()
        part().sum().backward()

    return {f"{part.__name__}, forward+backward": partial(learn, part) for part in (camera, lidar, fusion)}


def check_columns(path: Path) -> None:
    """Raises DataError if rows cannot be added to this file."""
    found = path.read_text(errors="replace").splitlines()[:1] if path.exists() else []
    if found not in ([], [",".join(COLUMNS)]):
        raise data.DataError(f"{path}: begins with {found}, not with {','.join(COLUMNS)}; name another file with --out")


def append(path: Path, rows: list[dict[str, Any]], device: torch.device) -> None:
    """Add the rows to a CSV, with date and machine."""
    new = not path.exists() or not path.stat().st_size
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        if new:
            writer.writeheader()
        for row in rows:
            cells = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({"date": datetime.date.today().isoformat(), "machine": machine(device), **cells})
