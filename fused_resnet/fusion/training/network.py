"""A whole network in training: one guard covers the steps of all its blocks; at the level "minimal"
its stages run in recomputed segments."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fused_resnet.fusion import store
from fused_resnet.fusion.call import call_reason, wants_grad
from fused_resnet.fusion.guard import Guard
from fused_resnet.fusion.network import NetworkNames, members_of
from fused_resnet.layers.norms import falls_back

from .activation_memory import run_segment, run_stages
from .prepare import Step, setting, step_for
from .units import counts_once, run_norm, run_step


class NetworkStep:
    """The steps of a network's stem and blocks, valid while their structure holds."""

    def __init__(self, model: Any, names: NetworkNames, x: Tensor) -> None:
        self.generation = store.generation()
        self._first, stages, places = members_of(model, names)
        found = None if self._first.names is None else step_for(model, self._first.names, x)
        self._stem = found if isinstance(found, Step) else None
        # A stem whose pooling is no part of its step: after it.
        pool = self._first.names and self._first.names.pool
        described = self._stem is None or self._stem.description.pool is not None
        self._pool = None if described else pool
        self._stages = [[member.target for member in stage] for stage in stages]
        # Block -> its step. If any has none, every block decides for itself, by what reaches it.
        self._steps: dict[Any, Step] = {}
        for member in chain.from_iterable(stages):
            step: Step | str = "not a block"
            if member.names is not None:
                step = step_for(member.module(model), member.names, x)
            if isinstance(step, str):
                self._steps = {}
                break
            self._steps[member.target] = step
        steps = [*([] if self._stem is None else [self._stem]), *self._steps.values()]
        self.is_cached = all(step.is_cached for step in steps)
        self._descriptions = [step.description for step in steps]
        self.guard = Guard.combined(
            [Guard([], places, values=False), *(step.guard for step in steps)]
        )
        self.holds = self.guard.structure_holds

    def run(self, model: Any, names: NetworkNames, x: Tensor) -> Tensor:
        """The output of the last stage."""
        stages = self._stages if names.running is None else getattr(model, names.running)()
        segmented = self._segmented(model, x)
        x = self.run_stem(model, x, segmented)
        run = self._run_block
        if self._stem is None and call_reason(x, model.training) is not None:
            run, segmented = _call, False
        if segmented:
            return run_stages(stages, x, run)
        for block in chain.from_iterable(stages):
            x = run(block, x)
        return x

    def _segmented(self, model: Any, x: Tensor) -> bool:
        """Whether only the inputs of segments are saved: at "minimal", unless recomputing a segment
        would call hooks twice or update the statistics of norms that PyTorch computes twice."""
        minimal = getattr(model, "activation_memory", "auto") == "minimal"
        return (
            minimal
            and bool(self._steps)
            and wants_grad(model, x)
            and all(counts_once(description, x) for description in self._descriptions)
        )

    def run_stem(self, model: Any, x: Tensor, segmented: bool = False) -> Tensor:
        """The stem with its pooling; `segmented` recomputes its step, and no other module, in
        backward."""
        if self._stem is None:
            if self._first.names is not None:
                falls_back()
            return self._first.call(model, x)
        run: Any = partial(run_step, self._stem)
        modules = [module for unit in self._stem.description.units for module in unit[:2]]
        y = run_segment(run, x, modules) if segmented else run(x)
        if y is None:
            falls_back()
            return self._first.call(model, x)
        return y if self._pool is None else getattr(model, self._pool)(y)

    def _run_block(self, block: Any, x: Tensor) -> Tensor:
        step = self._steps.get(block)
        y = None if step is None else run_step(step, x)
        return _call(block, x) if y is None else y


def _call(block: Any, x: Tensor) -> Tensor:
    falls_back()
    return block(x)


def run_network(model: Any, names: NetworkNames, x: Tensor) -> Tensor:
    """The network's logits (N, classes), differentiably."""
    y = run_body(model, names, x)
    return model.fc(torch.flatten(model.avgpool(y), 1))


def run_body(model: Any, names: NetworkNames, x: Tensor) -> Tensor:
    """The features that the network's head pools, differentiably, by its steps, cached or made
    now."""
    key = ("network step", *setting(x), getattr(model, "activation_memory", "auto"))
    step = store.lookup(model, key)
    if step is None or step.generation != store.generation():
        step = NetworkStep(model, names, x)
        if step.is_cached:
            store.insert(model, key, step)
    y = step.run(model, names, x)
    if names.norm is not None:
        norm, relu = (getattr(model, name) for name in names.norm)
        normed = run_norm(norm, relu, y)
        y = relu(norm(y)) if normed is None else normed
    return y
