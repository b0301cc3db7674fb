"""Loss functions: each a mean over points, and 0 (with a graph) where no point counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ftdpp.data import IGNORE


def cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of the points that have a label, weighted by class.

        sum_n w[y_n] * -log softmax(logits_n)[y_n]  /  sum_n w[y_n]

    Args:
        logits: (N, K). label: (N,) int64, -100 = ignore. weight: (K,) or None.
    """
    total = F.cross_entropy(logits, label, weight, ignore_index=IGNORE, reduction="sum")
    counts = label != IGNORE
    norm = counts if weight is None else weight[label.clamp(min=0)] * counts
    return total / norm.sum().clamp(min=1e-12)


def kl_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(target || softmax(logits)), mean over points.

        1/N sum_n sum_c t[n, c] * (log t[n, c] - log softmax(logits)[n, c])

    Args:
        target: (N, K) probabilities, taken as given: no gradient. logits: (N, K).
    """
    rows = F.kl_div(F.log_softmax(logits, 1), target.detach(), reduction="none").sum(1)
    return rows.sum() / max(len(rows), 1)


def kl_rows(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each row, (N,): sum_c p[n, c] * (log p[n, c] - log q[n, c]).

    Args:
        p, q: (N, K) probabilities; those of q count as at least 1e-8.
    """
    return F.kl_div(q.clamp(min=1e-8).log(), p, reduction="none").sum(1)


def trusted_cross_entropy(logits: Tensor, label: Tensor, trust: Tensor) -> Tensor:
    """Cross-entropy of the points that have a label, each with its own weight.

        sum_n trust[n] * -log softmax(logits_n)[y_n]  /  number of labelled points

    Little trust makes the loss small: it is not divided by the sum of the weights.

    Args:
        logits: (N, K). label: (N,) int64, -100 = ignore. trust: (N,), no gradient.
    """
    rows = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    return (rows * trust.detach()).sum() / (label != IGNORE).sum().clamp(min=1)


def lovasz_softmax(logits: Tensor, label: Tensor) -> Tensor:
    """Lovász-softmax (Berman et al., 2018): 1 - IoU for probabilities, mean over labelled classes.

        sum_n e_n * (J(n) - J(n - 1)) of a class c, e = |[y = c] - p[:, c]| in descending order

    J(n) is 1 - IoU of the class if the first n points were wrong and the others right, J(0) = 0.

    Args:
        logits: (N, K). label: (N,) int64, -100 = ignore.
    """
    known = label != IGNORE
    own = F.one_hot(label[known], logits.shape[1]).to(logits)
    error = (own - F.softmax(logits[known], 1)).abs()
    error, order = error.sort(stable=True, dim=0, descending=True)
    own = own.gather(0, order)
    points = own.sum(0)
    jaccard = 1 - (points - own.cumsum(0)) / (points + (1 - own).cumsum(0))
    rise = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
    return ((error * rise).sum(0) * (points > 0)).sum() / (points > 0).sum().clamp(min=1)


def log_smoothed_weights(counts: Sequence[int]) -> tuple[float, ...]:
    """Class weights from point counts: w_c = ln(5 N / N_c), divided by the smallest.

    A class without points counts as one point. Source: the released configurations' comments.
    """
    total = max(sum(counts), 1)
    w = [math.log(5 * total / max(n, 1)) for n in counts]
    return tuple(x / min(w) for x in w)
