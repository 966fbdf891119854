"""Inference of a whole network by one plan: one guard covers everything that is fused in it, so
that little Python runs between two convolutions.

Consecutive fused members are a chain, in which activations stay channels_last in the compute dtype.
They are converted to stock's dtype and layout only where a module that is not fused reads them."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fused_resnet import layout
from fused_resnet.fusion import store
from fused_resnet.fusion.dtype_rules import output_dtype
from fused_resnet.fusion.guard import Guard
from fused_resnet.fusion.network import Member, NetworkNames, members_of
from fused_resnet.kernels import registry

from .chain import Chain
from .head import run_head
from .make import plan_for
from .plan import Plan


class Network:
    """The members of a network in segments, each with the chain of its plans, or None where it is
    not fused; valid while `guard` holds."""

    def __init__(self, model: Any, names: NetworkNames, x: Tensor) -> None:
        self.generation = store.generation()
        stem, stages, places = members_of(model, names)
        self.segments: list[tuple[Chain | None, list[Member]]] = []
        for member in (stem, *chain.from_iterable(stages)):
            plan: Plan | str = "not a block"
            if member.names is not None:
                plan = plan_for(member.module(model), member.names, x.dtype, x.device)
            if isinstance(plan, str):
                self.segments.append((None, [member]))
                continue
            last = self.segments[-1][0] if self.segments else None
            if last is None:
                last = Chain()
                self.segments.append((last, []))
            last.plans.append(plan)
            pool = member.names.pool if member.names else None
            after = pool is not None and not plan.pools
            if after:  # the stem's pooling is a module after its plan
                assert isinstance(member.target, tuple)
                member = member._replace(target=member.target[:-1])
            self.segments[-1][1].append(member)
            if after:
                self.segments.append((None, [Member((str(pool),), None)]))
        self.plans = [plan for fused, _ in self.segments if fused for plan in fused.plans]
        self.guard = Guard.combined([Guard([], places), *(plan.guard for plan in self.plans)])
        self.holds = self.guard.holds

    def run(self, model: Any, names: NetworkNames, x: Tensor) -> Tensor:
        """The logits (N, classes), for x (N, C, H, W) of any layout."""
        checked = True  # x itself; modules that are not fused may return anything
        memory_format = layout.memory_format(x)
        last = None if names.norm is not None else self.segments[-1][0]
        for fused, members in self.segments:
            runs = fused is not None and (checked or fused.accepts(x))
            y = fused.run(x, keep=fused is last) if fused is not None and runs else None
            if y is None:
                for member in members:
                    x = member.call(model, x)
            else:
                x = y
            checked = False
        if names.norm is not None:
            norm, relu = names.norm
            x = getattr(model, relu)(getattr(model, norm)(x))
        elif last is not None:
            logits = run_head(model.avgpool, model.fc, x)
            if logits is not None:
                return logits
            x = x.contiguous(memory_format=memory_format)
        return model.fc(torch.flatten(model.avgpool(x), 1))


def run_network(model: Any, names: NetworkNames, x: Tensor) -> Tensor:
    """The network's logits (N, classes), by its plan, cached or made now."""
    kind = x.device.type
    # Autocast also decides which weights stock accepts.
    autocast = torch.is_autocast_enabled(kind)
    dtypes = x.dtype, output_dtype(x.dtype, kind), autocast
    key = ("network", *dtypes, x.device, registry.forced())
    network = store.lookup(model, key)
    if network is None or network.generation != store.generation():
        network = Network(model, names, x)
        if all(plan.is_cached for plan in network.plans) and network.holds():
            store.insert(model, key, network)
    return network.run(model, names, x)
