"""Optimizers and the schedule: PyTorch's own, and LAMB, which PyTorch does not carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

WARM_FROM = 0.01  # the share of the learning rate that warm-up starts from


class Lamb(Optimizer):
    """Adam's direction for each tensor, as long as lr times the tensor itself.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w
    w = w - lr (|w| / |u|) u,   the ratio being 1 where either norm is 0

    w, g, m, v: of one shape. ValueError for lr, eps or weight_decay below 0 and betas outside
    [0, 1). Source: You et al. 2019, "Large Batch Optimization for Deep Learning: Training BERT in
    76 minutes" (1904.00962), algorithm 2, with phi the identity.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"Lamb: {name} must be at least 0, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Lamb: betas must be at least 0 and below 1, got {betas}")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self._update(w, group)
        return loss

    def _update(self, w: Any, group: dict[str, Any]) -> None:
        state = self.state[w]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(w)
            state["exp_avg_sq"] = torch.zeros_like(w)
        state["step"] += 1
        t = float(state["step"])
        b1, b2 = group["betas"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(w.grad, 1 - b1)
        v.mul_(b2).addcmul_(w.grad, w.grad, value=1 - b2)
        u = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"])
        u.add_(w, alpha=group["weight_decay"])
        size, length = w.norm(), u.norm()
        # On the device, without asking for the norms: a zero norm becomes the ratio 1.
        zero = (size == 0) | (length == 0)
        ratio = torch.where(zero, torch.ones_like(size), size / length)
        w.sub_(u * (ratio * group["lr"]))


def make_optimizer(
    name: str, model: nn.Module, lr: float, momentum: float, weight_decay: float
) -> Optimizer:
    """`name`: "sgd", "adamw" or "lamb". Weights of convolutions and of the classifier decay;
    biases and norms, of one dimension, do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    return AdamW(groups, lr=lr) if name == "adamw" else Lamb(groups, lr=lr)


def make_schedule(optimizer: Optimizer, steps: int, warmup: int) -> LRScheduler:
    """Per step: linear growth from a hundredth of the learning rate over `warmup` steps, then a
    cosine to 0 at step `steps`.

    Source: Goyal et al. 2017 (1706.02677), section 2.2; Loshchilov and Hutter 2016 (1608.03983).
    """
    warmup = min(warmup, steps - 1)
    if warmup < 1:
        return CosineAnnealingLR(optimizer, max(1, steps))
    grow = LinearLR(optimizer, start_factor=WARM_FROM, total_iters=warmup)
    fall = CosineAnnealingLR(optimizer, steps - warmup)
    return SequentialLR(optimizer, [grow, fall], milestones=[warmup])
