"""Optimizers and the learning rate schedule: PyTorch's, and LAMB."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from fused_resnet.checks import one_of

from .distributed import whole

NAMES = ("sgd", "adamw", "lamb")


class Lamb(Optimizer):
    """Adam with the step of each tensor scaled to the norm of the tensor.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    r = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w
    w = w - lr * (|w| / |r|) r,   the ratio is 1 if either norm is 0
    Source: You et al. 2019, "Large Batch Optimization for Deep Learning: Training BERT in 76
    minutes" (1904.00962), algorithm 2.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            directions = [self._direction(w, group) for w in weights]
            # Norms of full tensors; if they are sharded, one collective reduces all norms.
            norms = whole(torch.stack([t.norm() for t in (*weights, *directions)]))
            for w, r, w_norm, r_norm in zip(weights, directions, *norms.chunk(2), strict=True):
                ratio = torch.where((w_norm > 0) & (r_norm > 0), w_norm / r_norm, 1.0)
                w.add_(r * ratio, alpha=-group["lr"])
        return loss

    def _direction(self, w: Tensor, group: dict[str, Any]) -> Tensor:
        """Update m and v, and return r."""
        b1, b2 = group["betas"]
        state = self.state[w]
        if not state:
            state["step"] = torch.zeros(())
            state["m"], state["v"] = torch.zeros_like(w), torch.zeros_like(w)
        state["step"] += 1
        t = float(state["step"])
        m, v = state["m"], state["v"]
        m.lerp_(w.grad, 1 - b1)
        v.mul_(b2).addcmul_(w.grad, w.grad, value=1 - b2)
        r = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt_() + group["eps"])
        return r.add_(w, alpha=group["weight_decay"])


def make_optimizer(
    name: str, model: nn.Module, lr: float, momentum: float, weight_decay: float,
    recorded: bool = False,
) -> Optimizer:  # fmt: skip
    """Weight decay applies only to tensors of more than one dimension, not to biases and norms.

    recorded: whether a CUDA graph captures the step (SGD and AdamW only)."""
    one_of("--optimizer", name, NAMES)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        fused = recorded or None
        return SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
    if name == "adamw":
        return AdamW(groups, lr=lr, fused=recorded or None, capturable=recorded)
    return Lamb(groups, lr=lr)


def make_schedule(optimizer: Optimizer, steps: int, warmup: int) -> LRScheduler:
    """Linear from a hundredth of the learning rate over `warmup` steps, then a cosine to zero.

    Source: Goyal et al. 2017 (1706.02677), section 2.2; Loshchilov and Hutter 2016 (1608.03983).
    """
    warmup = min(warmup, steps - 1)
    cosine = CosineAnnealingLR(optimizer, max(1, steps - warmup))
    if warmup < 1:
        return cosine
    linear = LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warmup])
