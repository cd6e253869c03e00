"""Rewards by explicit matrices in feature space, one block at a time: what closed forms must equal."""

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_SIZE = 24
CASES = (
    "random",
    "correlated",
    "pair-equal",
    "two-pairs-equal",
    "all-equal",
    "one-is-target",
    "two-are-target",
    "one-zero",
    "all-zero",
)


def features(case: str, num_samples: int, seed: int = 0, size: int = FEATURE_SIZE) -> tuple[Tensor, Tensor]:
    """Unit rollout features [n, D] and target feature [D] of one block."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, size, dtype=torch.float64, generator=generator)
    y = torch.randn(size, dtype=torch.float64, generator=generator)
    if case == "correlated":
        x, y = x * 0.3 + y, y + 0.1 * x[0]
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=0)
    if case == "pair-equal":
        x[-1] = x[0]
    elif case == "two-pairs-equal":
        x[1::2] = x[::2][: len(x[1::2])]
        x[:] = x[torch.arange(num_samples) // 2 * 2]
    elif case == "all-equal":
        x[:] = x[0]
    elif case == "one-is-target":
        x[num_samples // 2] = y
    elif case == "two-are-target":
        x[:2] = y
    elif case == "one-zero":
        x[-1] = 0
    elif case == "all-zero":
        x[:] = 0
    return x, y


def gram_of(x: Tensor, y: Tensor) -> Tensor:
    """[1, 1, n + 1, n + 1] of one block; equal rows give equal entries whatever the order of summation."""
    rows = torch.cat((x, y[None]))
    return torch.stack([torch.stack([(a * b).sum() for b in rows]) for a in rows])[None, None]


def whitened(x: Tensor, y: Tensor, whitening: str) -> tuple[Tensor, Tensor]:
    """Rollouts [n, D] and each one's target [n, D] in the space of a whitening."""
    targets = y.expand_as(x)
    if whitening == "none":
        return x, targets
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    inverse = torch.where(s > 1e-5 * s.max(), 1 / (s + 1e-12), 0.0)
    if whitening == "sample":  # the authors' code: an n x n matrix applied from the left to both
        w = u @ torch.diag(inverse) @ u.T
        return w @ x, w @ targets
    w = vt.T @ torch.diag(inverse) @ vt  # the paper, axolotl: a D x D matrix applied to every feature
    return x @ w, targets @ w


def naive_rewards(x: Tensor, y: Tensor, whitening: str, kind: str = "cosine") -> tuple[Tensor, Tensor, Tensor]:
    """Alignment [n] and diversity [n] with their factor 2, and CFM []."""
    rollouts, targets = whitened(x, y, whitening)
    n = len(x)
    if kind == "cosine":
        alignment = 2 * F.cosine_similarity(rollouts, targets, dim=1, eps=1e-8)
    else:
        alignment = torch.stack([2 * (x @ y) for x, y in zip(rollouts, targets, strict=True)])
    diversity = torch.zeros(n, dtype=x.dtype)
    for j in range(n):
        for k in range(n):
            if k != j:
                diversity[j] += 2 * (rollouts[j] @ rollouts[k]) / (n - 1)
    return alignment, diversity, (rollouts.mean(dim=0) - targets.mean(dim=0)).square().sum()
