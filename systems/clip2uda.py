"""CLIP2UDA: frozen CLIP for camera + LiDAR adaptation (Wu et al., ACM MM 2024). A RECONSTRUCTION.

Only the abstract is public (pages 8662-8671, no code). It names: a frozen CLIP; two alternating
steps; features of the image that initiate the learning of an adaptive text prompt for each domain;
representations that interact hierarchically in a shared decoder, for unified 2D predictions; and
cross-modal mutual learning between 3D and that unified space. What it does not name (blocks, taps,
weights, schedule) is our design, after the same group's later code where that gives a hint.

    prompts   texts of the classes behind a learned context, one a domain; each image moves
              them a little: T' = T + gamma * attention(T, image)               class Prompts
    decoder   at four depths of CLIP's image encoder: its features, the score map <patch, T'>
              and the 3D features at their pixels; summed from coarse to fine   class Decoder
    3D        the sparse U-Net of FtD++, main and mimicry head

    phase `prompts`:   source  CE(<V, T'> / 0.07, label)
                       target  KL(sg softmax(3D) || <V, T'> / 0.07)
    phase `networks`:  source  CE 2D + CE 3D;  both domains  the cross-modal KLs of xMUDA

CLIP itself learns nothing. The step is `System.forward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ftdpp import kernels, recipe
from ftdpp.data import CLASS_SETS, Batch
from ftdpp.kernels import pixel_to_point
from ftdpp.losses import cross_entropy, kl_divergence
from ftdpp.systems import INIT, Chance, Stream, clip, seed_torch
from ftdpp.systems import System as Contract
from ftdpp.systems.clip import FrozenCLIP, Seen
from ftdpp.systems.ftdpp import Net3D
from ftdpp.systems.image import look

# ---- settings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe(recipe.Recipe):
    """The shared settings, and those of CLIP2UDA."""

    clip: str = clip.STREET  # street, a folder, or a name on the hub
    taps: tuple[int, ...] = ()  # four blocks of the image encoder; empty: by its depth
    prompts: bool = True  # learned texts; without them: the plain ones, by templates
    prompt_domains: bool = True  # one prompt a domain; without it: both share one
    prompt_length: int = 8  # context vectors of a prompt
    prompt_image: bool = True  # whether the image moves the prompt
    prompt_depth: int = 1  # layers of the attention by which it does
    lr_prompt: float = 1e-4
    alternate: int = 0  # 0: both phases in each iteration; n: n iterations of one, then the other
    decoder_width: int = 64
    decoder_points: bool = True  # whether 3D features enter the decoder
    mimic_src: float = 1.0  # cross-modal KLs on the source
    mimic_tgt: float = 0.1  # and on the target

    @property
    def needs_clip(self) -> str:
        return self.clip

    def rules(self) -> dict[str, bool]:
        return super().rules() | {
            "taps wants four blocks, or none": len(self.taps) in (0, 4),
            "prompt_length and prompt_depth must be at least 1": (
                min(self.prompt_length, self.prompt_depth) >= 1
            ),
            "lr_prompt, mimic_src and mimic_tgt must not be negative": (
                min(self.lr_prompt, self.mimic_src, self.mimic_tgt) >= 0
            ),
            "alternate must not be negative": self.alternate >= 0,
            "decoder_width must be at least 8 and a multiple of 8": (
                self.decoder_width >= 8 and self.decoder_width % 8 == 0
            ),
        }

    def lacking(self) -> dict[str, str]:
        reasons: dict[str, tuple[str, ...]] = {
            "CLIP takes the place of the 2D trunk": ("width_2d", "precision")
        }
        if not self.mimic_src and not self.mimic_tgt:
            reasons["it has no mimicry"] = ("mimic_src", "mimic_tgt")
        if not self.prompts:
            reasons["it learns no prompts"] = ("prompts", *_OF_PROMPTS)
        return {name: why for why, names in reasons.items() for name in names}

    def idle(self) -> dict[str, str]:
        reasons = {} if self.prompt_image else {"prompt_depth": "the image does not move prompts"}
        return super().idle() | reasons


_OF_PROMPTS = (
    *("prompt_domains", "prompt_length", "prompt_image", "prompt_depth"),
    *("lr_prompt", "alternate"),
)
_COMMON: dict[str, Any] = {"batch": 8, "lr_2d": 1e-3, "lr_3d": 1e-3}
_NUSCENES: dict[str, Any] = {**_COMMON, "classes": "street6", "image": (225, 400)}
_KITTI: dict[str, Any] = {
    **_COMMON,
    "eval_batch": 1,
    "image": (0, 0),
    "crop": (302, 480),
    "mimic_src": 0.1,
    "mimic_tgt": 0.01,
}
# Schedules of the same group's UniDSeg, which the paper's own are not known to follow.
SCENARIOS: dict[str, dict[str, Any]] = {
    "usa-singapore": {**_NUSCENES, "steps": 60_000, "milestones": (40_000, 50_000)},
    "day-night": {**_NUSCENES, "steps": 100_000, "milestones": (80_000, 90_000)},
    "vkitti-skitti": {
        **_KITTI,
        "classes": "vkitti6",
        "steps": 30_000,
        "milestones": (25_000, 28_000),
    },
    "a2d2-skitti": {
        **_KITTI,
        "classes": "a2d2_10",
        "steps": 100_000,
        "milestones": (80_000, 90_000),
    },
}

# ---- prompts -----------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """A layer by which texts (B, K, d) attend to what is seen (B, M, d); pre-norm, with MLP."""

    def __init__(self, dim: int, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.query, self.key, self.value = (nn.Linear(dim, width) for _ in range(3))
        self.out = nn.Linear(width, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))

    def forward(self, text: Tensor, seen: Tensor) -> Tensor:
        asked, offered = self.norms[0](text), self.norms[1](seen)
        parts = self.query(asked), self.key(offered), self.value(offered)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts)
        found = F.scaled_dot_product_attention(q, k, v)  # (B, heads, K, width / heads)
        text = text + self.out(found.transpose(1, 2).flatten(2))
        return text + self.mlp(self.norms[2](text))


class Prompts(nn.Module):
    """Learned texts of the classes, for the source and for the target domain.

    T = frozen text encoder(context, class name);  T' = T + gamma * attention(T, image), unit length
    """

    def __init__(self, r: Recipe, width: int, dim: int) -> None:
        super().__init__()
        self.classes, self.shared = r.classes, not r.prompt_domains
        sides = ["both"] if self.shared else ["src", "tgt"]
        # As context vectors are started in prompt learning (CoOp, Zhou et al., 2022).
        self.context = nn.ParameterDict(
            {side: 0.02 * torch.randn(r.prompt_length, width) for side in sides}
        )
        self.layers = nn.ModuleList()
        if r.prompt_image:
            self.layers.extend(CrossAttention(dim) for _ in range(r.prompt_depth))
            self.gamma = nn.Parameter(torch.full((dim,), 1e-4))

    def forward(self, looker: FrozenCLIP, seen: Seen, side: str) -> Tensor:
        """Texts (B, K, dim) for the images of a domain, "src" or "tgt"."""
        context = self.context["both" if self.shared else side]
        plain = looker.prompted(context, self.classes).expand(len(seen.dense), -1, -1)
        text = plain
        if len(self.layers):
            image = torch.cat([seen.overall[:, None], seen.dense.flatten(2).mT], 1)
            for layer in self.layers:
                text = layer(text, image)
            text = plain + self.gamma * text
        return F.normalize(text, dim=-1)


# ---- the decoder -------------------------------------------------------------------------------

CELLS = (4, 2, 1, 0.5)  # cells of a tap's map along the side of a patch, from shallow to deep


def at_scale(patches: Tensor, cells: float) -> Tensor:
    """Values of patches (B, C, h, w) on a map with `cells` cells a side of a patch."""
    if cells < 1:  # an odd last row or column is a cell of its own
        return F.avg_pool2d(patches, round(1 / cells), ceil_mode=True, count_include_pad=False)
    return F.interpolate(patches, scale_factor=cells, mode="bilinear") if cells > 1 else patches


def scattered(feat: Tensor, batch: Batch, shape: tuple[int, int], pixels: float) -> Tensor:
    """Features of points (N, C) as a map (B, C, *shape) whose cells are `pixels` wide.

    A cell has the mean over the points whose pixels lie in it, 0 where there is none.
    """
    frames, (height, width) = len(batch.image), shape
    row, col = (batch.pixel / pixels).long().unbind(1)
    cell = (batch.batch_index * height + row) * width + col
    total = feat.new_zeros(frames * height * width, feat.shape[1]).index_add(0, cell, feat)
    count = torch.bincount(cell, minlength=len(total)).clamp(min=1)
    return (total / count[:, None]).view(frames, height, width, -1).permute(0, 3, 1, 2)


def _norm_relu(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class Decoder(nn.Module):
    """Four maps, each from one depth of CLIP and of a scale of its own, summed from coarse to fine.

    A map is a linear map of the hidden states, of the score map and of the 3D features that lie
    there. The first two are linear, so they are enlarged afterwards: there are fewer channels then.

    Args:
        seen: width of the hidden states. classes: K. points: channels of the 3D features, or 0.
    """

    def __init__(self, seen: int, classes: int, points: int, width: int) -> None:
        super().__init__()
        self.of_image = nn.ModuleList(
            nn.Conv2d(seen + classes, width, 1, bias=False) for _ in CELLS
        )
        self.of_points = nn.ModuleList(
            nn.Linear(points, width, bias=False) for _ in CELLS if points
        )
        self.norms = nn.ModuleList(_norm_relu(width) for _ in CELLS)
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), _norm_relu(width))
            for _ in CELLS
        )

    def forward(self, seen: Seen, score: Tensor, feat_3d: Tensor, batch: Batch) -> Tensor:
        """Features of the points, (N, width): the finest map at their pixels, bilinear.

        Args:
            score: (B, K, h, w) of the patches. feat_3d: (N, points), which gets no gradient: what
            2D would do to the 3D network is the business of the cross-modal losses, as in FtD++.
        """
        x: Tensor | None = None
        for i in (3, 2, 1, 0):
            own = at_scale(self.of_image[i](torch.cat([seen.taps[i], score], 1)), CELLS[i])
            height, width = own.shape[-2:]
            if len(self.of_points):
                points = self.of_points[i](feat_3d.detach())
                own = own + scattered(points, batch, (height, width), seen.patch / CELLS[i])
            found = self.norms[i](own)
            if x is not None:
                finer = F.interpolate(x, scale_factor=2, mode="bilinear")
                found = found + finer[..., :height, :width]
            x = self.smooth[i](found)
        assert x is not None
        place = (batch.pixel + 0.5) * CELLS[0] / seen.patch - 0.5
        return look(x, batch.batch_index, place[:, None], torch.ones_like(place[:, :1]))


# ---- the system ----------------------------------------------------------------------------------


class Points(NamedTuple):
    """What the 3D network says of N points."""

    feat: Tensor  # (N, width_3d)
    main: Tensor  # (N, K) logits
    mimic: Tensor


class System(Contract):
    """CLIP2UDA; without prompts and mimicry, frozen CLIP under a decoder."""

    Recipe = Recipe
    note = "a reconstruction from the abstract of CLIP2UDA (ACM MM 2024), which gives no number"
    scenarios = SCENARIOS
    default = _COMMON
    # CLIP is trained already: fewer iterations than other systems need.
    small: ClassVar[dict[str, Any]] = {
        **recipe.SMALL,
        "decoder_width": 32,
        "lr_prompt": 1e-3,
        "steps": 360,
        "milestones": (270,),
        "val_every": 120,
        "save_every": 120,
    }

    def __init__(self, r: Any, seed: int = 0, training: bool = True) -> None:
        super().__init__(r, seed, training)
        seed_torch(seed, INIT, 0)
        classes = len(CLASS_SETS[r.classes])
        self.clip = clip.load(r.clip)  # no module: it is neither trained nor saved
        self.taps = self.clip.taps(r.taps)
        points = r.width_3d if r.decoder_points else 0
        self.decoder = Decoder(self.clip.width, classes, points, r.decoder_width)
        self.main = nn.Linear(r.decoder_width, classes)
        self.mimic = nn.Linear(r.decoder_width, classes)
        self.net_3d = Net3D(classes, r.width_3d)
        self.prompts = Prompts(r, self.clip.text_width, self.clip.dim) if r.prompts else None
        self._known: dict[int, tuple[Seen, Points]] = {}

    def frozen(self) -> str | None:
        return self.clip.digest

    @staticmethod
    def streams(r: Any) -> dict[str, Stream]:
        made = {"labelled": Stream("src", "train", r.batch, True, 0, "class_weights")}
        if r.prompts or r.mimic_tgt:
            made["unlabelled"] = Stream("tgt", "train", r.batch, False, 2)
        return made

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        r, made = self.recipe, dict[str, torch.optim.Optimizer]()
        if self.prompts is not None:
            group = {"name": "prompt", "params": list(self.prompts.parameters()), "lr": r.lr_prompt}
            made["prompts"] = torch.optim.Adam([group], fused=True)
        of_2d = [p for part in (self.decoder, self.main, self.mimic) for p in part.parameters()]
        groups = [
            {"name": "2d", "params": of_2d, "lr": r.lr_2d},
            {"name": "3d", "params": list(self.net_3d.parameters()), "lr": r.lr_3d},
        ]
        made["networks"] = torch.optim.Adam(groups, fused=True)
        return made

    def look(self, batch: Batch) -> tuple[Seen, Points]:
        """What neither phase's update changes for the other: CLIP's view, and the 3D network's."""
        net = self.net_3d
        pyramid = kernels.pyramid(batch.points, net.trunk.levels)
        feat = net.trunk(net.main.weight.new_ones(len(batch.points), 1), pyramid)
        points = Points(feat, net.main(feat), net.mimic(feat))
        return self.clip.look(batch.image, self.taps), points

    def texts(self, seen: Seen, side: str) -> Tensor:
        """Texts of the classes for images of a domain, (B, K, dim) or (K, dim)."""
        if self.prompts is None:
            return self.clip.texts(self.recipe.classes, seen.dense.device)
        return self.prompts(self.clip, seen, side)

    def heads_2d(self, batch: Batch, seen: Seen, points: Points, side: str) -> tuple[Tensor, ...]:
        """Main and mimicry logits (N, K) of the shared decoder. The prompts get no gradient."""
        with torch.no_grad():
            score = clip.scores(seen.dense, self.texts(seen, side))
        feat = self.decoder(seen, score, points.feat, batch)
        return self.main(feat), self.mimic(feat)

    def score_at_points(self, batch: Batch, seen: Seen, side: str) -> Tensor:
        """Logits (N, K) of CLIP itself: cosines of the points' pixels and the texts."""
        score = seen.enlarged(clip.scores(seen.dense, self.texts(seen, side)))
        return pixel_to_point(score, batch.batch_index, batch.pixel)

    def resting(self, phase: str, iteration: int) -> bool:
        block = self.recipe.alternate if self.prompts is not None else 0
        turn = "networks" if block and iteration // block % 2 else "prompts"
        return bool(block) and phase != turn

    def forward(self, phase: str, batches: dict[str, Batch], chance: Chance) -> dict[str, Tensor]:
        labelled, unlabelled = batches["labelled"], batches.get("unlabelled")
        for batch in (labelled, unlabelled):
            if batch is not None and id(batch) not in self._known:
                self._known[id(batch)] = self.look(batch)
        if phase == "prompts":
            assert unlabelled is not None
            return self.prompt_terms(labelled, unlabelled)
        return self.network_terms(labelled, unlabelled)

    def prompt_terms(self, labelled: Batch, unlabelled: Batch) -> dict[str, Tensor]:
        """The source's labels and the target's 3D predictions tell the prompts what to say."""
        weight = labelled.image.new_tensor(self.recipe.class_weights)
        score = self.score_at_points(labelled, self._known[id(labelled)][0], "src")
        terms = {"prompt_src": cross_entropy(score, labelled.label, weight)}
        seen, points = self._known[id(unlabelled)]
        score = self.score_at_points(unlabelled, seen, "tgt")
        terms["prompt_tgt"] = kl_divergence(F.softmax(points.main, 1), score)
        return terms

    def network_terms(self, labelled: Batch, unlabelled: Batch | None) -> dict[str, Tensor]:
        r, weight = self.recipe, labelled.image.new_tensor(self.recipe.class_weights)
        seen, points = self._known[id(labelled)]
        main, mimic = self.heads_2d(labelled, seen, points, "src")
        terms = {
            "seg_2d": cross_entropy(main, labelled.label, weight),
            "seg_3d": cross_entropy(points.main, labelled.label, weight),
        }
        if r.mimic_src:
            terms["mimic_2d_src"] = r.mimic_src * kl_divergence(F.softmax(points.main, 1), mimic)
            terms["mimic_3d_src"] = r.mimic_src * kl_divergence(F.softmax(main, 1), points.mimic)
        if r.mimic_tgt:
            assert unlabelled is not None
            seen, points = self._known[id(unlabelled)]
            main, mimic = self.heads_2d(unlabelled, seen, points, "tgt")
            terms["mimic_2d_tgt"] = r.mimic_tgt * kl_divergence(F.softmax(points.main, 1), mimic)
            terms["mimic_3d_tgt"] = r.mimic_tgt * kl_divergence(F.softmax(main, 1), points.mimic)
        return terms

    def after_step(self, iteration: int) -> None:
        self._known.clear()

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """2D is the decoder's main head under the target's prompts, 2D+3D softmax(p2 + p3)."""
        seen, points = self.look(batch)
        p2 = F.softmax(self.heads_2d(batch, seen, points, "tgt")[0], 1)
        p3 = F.softmax(points.main, 1)
        return {"2d": p2, "3d": p3, "2d+3d": F.softmax(p2 + p3, 1)}

    @classmethod
    def cost(cls, r: Any) -> float:
        """1 for CLIP, 3 for a forward and backward of decoder and 3D network, of each domain."""
        return 4.0 * r.batch * len(cls.streams(r))


class ZeroShot(Contract):
    """CLIP alone: patches against the plain texts of the classes. Nothing in it learns."""

    heads = ("2d",)

    def __init__(self, r: Any, looker: FrozenCLIP) -> None:
        super().__init__(r)
        self.clip = looker

    def predict(self, batch: Batch) -> dict[str, Tensor]:
        seen = self.clip.look(batch.image)
        texts = self.clip.texts(self.recipe.classes, batch.image.device)
        score = seen.enlarged(clip.scores(seen.dense, texts))
        return {"2d": F.softmax(pixel_to_point(score, batch.batch_index, batch.pixel), 1)}
