"""What a training step of CrossMatch and of CLIP2UDA costs at the paper preset's size, on paper.

    python docs/cost.py

CrossMatch: a step on small crops is counted (FLOP of convolutions and products; bytes of weights,
gradients, moments and kept activations) and continued to the recipe's size, in proportion to the
pixels. CLIP2UDA: CLIP ViT-B/16 with random weights looks at one image of the recipe's size, and
the decoder learns from it; both are linear in the number of images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ftdpp import systems
from ftdpp.bench.speed import memory
from ftdpp.data import CLASS_SETS, Batch, Frame, collate, sample


class Job:
    """As much of a run as counting needs."""

    def __init__(self, system: Any) -> None:
        self.system, self.optimizers = system.train(), system.optimizers()


def random_batch(size: int, frames: int, classes: int) -> Batch:
    rng = np.random.default_rng(0)
    made = [
        Frame(
            token=str(i),
            image=rng.integers(0, 256, (size, size, 3), np.uint8),
            label=rng.integers(0, classes, (size, size)).astype(np.uint8),
            has_label=True,
            depth=rng.uniform(1, 50, (size, size)).astype(np.float32),
        )
        for i in range(frames)
    ]
    return collate([sample(frame, None, 0, rng, depth=True) for frame in made])


def count(r: Any, size: int) -> tuple[float, float]:
    """FLOP and bytes of a step on two crops of a size."""
    job = Job(systems.build(r))
    batches = {"target": random_batch(size, 2, 16)}
    held = memory(job, batches)
    with FlopCounterMode(display=False) as counter:
        terms = job.system("all", batches, systems.Chance(0, 0))
        torch.stack(list(terms.values())).sum().backward()
    return float(counter.get_total_flops()), float(held)


def clip2uda_rows() -> None:
    """CLIP ViT-B/16 and the shared decoder, image by image."""
    from transformers import CLIPConfig, CLIPModel

    from ftdpp.systems import clip, clip2uda

    r = systems.recipe("usa-singapore", "clip2uda", "paper")
    config = CLIPConfig(projection_dim=512, vision_config={"patch_size": 16, "hidden_size": 768})
    model = CLIPModel(config)
    looker = clip.FrozenCLIP("ViT-B/16", config, lambda: (model, None))
    image = torch.rand(1, 3, *r.image)
    with FlopCounterMode(display=False) as counter:
        seen = looker.look(image)
    looked = float(counter.get_total_flops())
    points, classes = 3_000, len(CLASS_SETS[r.classes])
    pixel = torch.stack([torch.randint(n, (points,)) for n in r.image], 1)
    batch = Batch(image, pixel, torch.zeros(points), ["0"], [], [points])
    decoder = clip2uda.Decoder(looker.width, classes, r.width_3d, r.decoder_width)
    held = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal held
        held += tensor.numel() * tensor.element_size()
        return tensor

    score = clip.scores(seen.dense, torch.rand(classes, looker.dim))
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        decoder(seen, score, torch.rand(points, r.width_3d), batch).sum().backward()
    weights = sum(p.numel() for p in model.parameters())
    images = 2 * r.batch  # of both domains
    print(f"\nCLIP ViT-B/16, {images} images of {r.image[0]}x{r.image[1]} a step:")
    print(
        f"CLIP       {images * looked / 1e12:5.2f} TFLOP, {4 * weights / 2**30:.2f} GiB of weights"
    )
    flop = images * counter.get_total_flops()
    print(f"decoder    {flop / 1e12:5.2f} TFLOP, {images * held / 2**30:.2f} GiB of activations")


def main() -> None:
    print(f"{'method':15}{'trunk':12}{'frames':>7}{'crop':>10}{'TFLOP':>8}{'GiB':>7}")
    for trunk in ("resnet34", "deeplabv2"):
        model = systems.recipe(
            "gta5-cityscapes", "source-only", "paper", overrides=[f"trunk={trunk}"]
        )
        for method in ("self-training", "crossmatch"):
            r = systems.recipe("gta5-cityscapes", method, "paper", source=model)
            (flop, held), (more_flop, more_held) = count(r, 64), count(r, 96)
            step = 2 * (96**2 - 64**2)  # pixels between the two
            left = r.batch * r.crop[0] * r.crop[1] - 2 * 64**2
            flop += (more_flop - flop) * left / step
            held += (more_held - held) * left / step
            crop = f"{r.crop[0]}x{r.crop[1]}"
            row = f"{method:15}{trunk:12}{r.batch:7}{crop:>10}{flop / 1e12:8.1f}{held / 2**30:7.1f}"
            print(row, flush=True)
    clip2uda_rows()


if __name__ == "__main__":
    main()
