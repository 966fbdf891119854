"""Inference of a partly fused network, block by block.

Activations are converted to stock's dtype and layout only where a module that is not fused reads
them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fused_resnet import layout
from fused_resnet.fusion.call import call_reason
from fused_resnet.fusion.members import FORWARDS
from fused_resnet.fusion.pooling import is_plain
from fused_resnet.fusion.structure import Names
from fused_resnet.kernels import native, registry
from fused_resnet.layers.hooks import patched

from . import plan_cache
from .plan import Flow, enter, leave
from .stem import max_pool


class Walk:
    """The state of one forward: the activation in stock's dtype and layout, or as a `Flow`."""

    def __init__(self, x: Tensor) -> None:
        # Exactly one of the two is set.
        self._plain: Tensor | None = x  # in stock's dtype and layout
        self._flow: Flow | None = None  # between fused blocks
        self._outside = (x.dtype, layout.memory_format(x))  # of the last plain input to a block

    def leave(self) -> Tensor:
        """The activation in stock's dtype and layout."""
        if self._plain is None:
            assert self._flow is not None
            self._plain, self._flow = leave(self._flow.x, *self._outside), None
        return self._plain

    def call(self, module: Callable[[Tensor], Tensor]) -> None:
        """Runs a module of any kind on the activation in stock's dtype and layout."""
        self._plain = module(self.leave())

    def fused(self, module: nn.Module, names: Names) -> bool:
        """Runs `module` by its plan; False, and nothing has run, if it has none for this input."""
        flow = self._flow
        if flow is None:
            x = self.leave()
            if call_reason(x) is not None:
                return False
            self._outside = (x.dtype, layout.memory_format(x))
        device = flow.x.device if flow is not None else self.leave().device
        plan = plan_cache.plan_for(module, names, self._outside[0], device)
        if isinstance(plan, str):
            return False
        if flow is None:
            flow = enter(x, plan)
        if not plan.shapes(flow.x.shape):
            return False
        self._plain, self._flow = None, plan.run(flow)
        return True

    def max_pool(self, pool: nn.Module) -> bool:
        """Runs `pool` by this package's kernel; False, and nothing has run, if it cannot."""
        if self._flow is None or not is_plain(pool):
            return False
        gpu = registry.target(self._flow.x.device).vendor != "cpu"
        if not gpu and (native.load() is not None or registry.forced() is not None):
            return False
        after = max_pool(pool, self._flow)
        if after is not None:
            self._flow = after
        return after is not None

    def stage(self, stage: nn.Module) -> None:
        """Runs a stage's blocks, each by its plan where it has one."""
        if type(stage) is not nn.Sequential or patched(stage) is not None:
            self.call(stage)
            return
        for block in stage:
            names = FORWARDS.get(type(block).forward)
            plain = names is None or patched(block) is not None
            if plain or names is None or not self.fused(block, names):
                self.call(block)
