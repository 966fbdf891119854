"""`training_step`: forward, loss, backward and update as a callable that does as little as possible
per call.

On a GPU a step of a ResNet-50 is some thousand kernels, most of them of 5 to 50 us; launching them
one by one takes the CPU longer than that at small batch. A CUDA graph launches all of them at once:
it is recorded once per shape of input, from and into memory that stays where it is.

What Python does in a step is done when it is recorded and never again. So every number that may
change from step to step must be in the GPU's memory (learning rates are put there), and what else
the step was recorded with is compared at each call.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from fused_resnet.kernels import registry
from fused_resnet.kernels.cache import noting
from fused_resnet.layers.hooks import GLOBAL_HOOKS

from .capture import RECORDING

_MOST_GRAPHS = 4  # shapes of input whose graphs are kept; they share their memory
_WARM_UPS = 3  # steps before recording: kernels are compiled, the optimizer makes its state
# What a module computes by, besides tensors, that somebody may change from step to step.
_SETTINGS = ("training", "momentum", "eps", "p", "track_running_stats")

Loss = Callable[[Any, Tensor], Tensor]


def training_step(
    model: nn.Module,
    loss: Loss,
    optimizer: Optimizer,
    *,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    max_norm: float | None = None,
    skip_nonfinite: bool = False,
    cuda_graph: bool | None = None,
) -> TrainingStep:
    """A callable that takes one step of training: `step(x, target) -> loss`.

        value = loss(model(x), target);  gradients of value;  optimizer.step()

    model: any module, in the mode it is in; those of this family run fused.
    loss: a function or module of the model's output and the target, to a scalar.
    dtype: model and loss run under autocast to it, float16 or bfloat16; None: as they are.
    scaler: scales the loss, as float16 needs; updated by every step.
    max_norm: gradients are clipped to this norm, by `torch.nn.utils.clip_grad_norm_`'s formula.
    skip_nonfinite: parameters stay as they are where the loss or the gradient's norm is no finite
    number. (A scaler does that by itself.)
    cuda_graph: replay a CUDA graph per shape of input (the last 4 are kept); None: on GPUs, where
    optimizer and model allow that. `step.reason` says why steps are not replayed, or is None.

    The callable takes x and target of any shape, on the model's device or the host, and returns the
    loss, detached, in new memory; `step.gradient_norm` is the norm before clipping, a tensor, where
    max_norm or skip_nonfinite ask for one. Every call is one step, whichever way it is taken: the
    first three of a shape run as they are, the fourth is recorded, and it and later ones are
    replayed. Gradients are the step's own: what there was before is dropped, none is left.

    A schedule of learning rates works as ever: `lr` of the optimizer's groups is read at each call.
    Whatever else changes between steps (another setting of the optimizer, its state loaded anew, a
    parameter replaced or frozen, a frozen one changed in place, the model's mode, a norm's
    momentum) makes the next three steps run as they are, and the graphs be recorded anew. What
    cannot be recorded runs as it is: a model or optimizer with hooks, norms that average without a
    momentum, steps that draw random numbers on the host (stochastic depth), more than one process.
    Not watched are a loss function's own numbers and what modules hold besides tensors and
    `training`, `momentum`, `eps` and `p`: make the step anew after changing those.

    Raises ValueError for a dtype that autocast does not have and, where cuda_graph is True, where
    there is no GPU or the optimizer's step would ask it for numbers: SGD must be `fused=True`, Adam
    and the like `capturable=True`, and fused besides where a scaler or skip_nonfinite may leave a
    step out. RuntimeError where recording fails.
    Source: CUDA programming guide, "CUDA graphs"; Micikevicius et al. 2018 (1710.03740), scaling.
    """
    return TrainingStep(model, loss, optimizer, dtype, scaler, max_norm, skip_nonfinite, cuda_graph)


class TrainingStep:
    """What `training_step` returns."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        dtype: torch.dtype | None,
        scaler: torch.amp.GradScaler | None,
        max_norm: float | None,
        skip_nonfinite: bool,
        cuda_graph: bool | None,
    ) -> None:
        if dtype not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"training_step: dtype must be float16, bfloat16 or None, got {dtype}")
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.dtype, self.max_norm, self.skip_nonfinite = dtype, max_norm, skip_nonfinite
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        first = optimizer.param_groups[0]["params"][0]
        self.device: torch.device = first.device
        self.gradient_norm: Tensor | None = None
        self.reason = "cuda_graph is False" if cuda_graph is False else self._reason()
        if cuda_graph and self.reason is not None:
            raise ValueError(f"training_step: cuda_graph {self.reason}")
        self.cuda_graph = self.reason is None
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._steps: OrderedDict[Any, int] = OrderedDict()  # taken as they are, per kind of input
        self._written: dict[int, Tensor] = {}  # by steps: what is in them may change
        self._draws = False  # whether a step has drawn random numbers on the host
        self._turn = threading.Lock()
        self._watch = _Watch(self)
        self._memory = _Memory(self.device, optimizer) if self.cuda_graph else None

    def _reason(self) -> str | None:
        """Why steps cannot be recorded whatever they compute, or None."""
        if not _on_gpu(self.device):
            return f"needs a GPU, the parameters are on {self.device}"
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return "is for one process: collectives are not recorded"
        name = type(self.optimizer).__name__
        for group in self.optimizer.param_groups:
            if "capturable" in group and not group["capturable"]:
                return f"needs {name}(..., capturable=True), whose step stays on the GPU"
            if "capturable" not in group and not group.get("fused"):
                return f"needs an optimizer whose step stays on the GPU: {name}(..., fused=True)"
        may_skip = self.scaler is not None or self.skip_nonfinite
        if may_skip and not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            return f"needs {name}(..., fused=True), which can leave a step out on the GPU"
        return None

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """x (N, ...), target: as model and loss take them -> the loss, a scalar."""
        with self._turn, torch.inference_mode(False), torch.enable_grad():
            if self._memory is None:
                return self._run(x.to(self.device), target.to(self.device))
            return self._replay(self._memory, x, target)

    # --- one step ---------------------------------------------------------------------------------

    def _run(self, x: Tensor, target: Tensor) -> Tensor:
        """A step as it is, or as it is recorded."""
        self._drop_gradients()
        with self._autocast():
            loss = self.loss(self.model(x), target)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self._update(loss.detach())
        self._drop_gradients()
        return loss.detach()

    def _drop_gradients(self) -> None:
        """Of parameters that the optimizer does not have too: a graph would add to their memory."""
        for owner in (self.optimizer, self.model, self.loss):
            if isinstance(owner, (Optimizer, nn.Module)):
                owner.zero_grad(set_to_none=True)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Without the cache of casts, which must not outlive a recording: with a cache around it,
        a step would read weights as they were before the last one."""
        kind = self.device.type
        outer = torch.is_autocast_enabled(kind)
        dtype = self.dtype or (torch.get_autocast_dtype(kind) if outer else None)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(kind, dtype, cache_enabled=False)

    def _update(self, loss: Tensor) -> None:
        optimizer, scaler = self.optimizer, self.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        self.gradient_norm = None
        if self.max_norm is not None or self.skip_nonfinite:
            every = chain.from_iterable(g["params"] for g in optimizer.param_groups)
            parameters = [p for p in every if p.grad is not None]
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            self.gradient_norm = norm
            if self.max_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        if scaler is not None:
            # A fused SGD whose first step is left out has no momentum, and takes it for one.
            if optimizer.state or not _overflowed(scaler, optimizer):
                scaler.step(optimizer)
            scaler.update()
        elif self.gradient_norm is not None and self.skip_nonfinite:
            bad = ~(torch.isfinite(self.gradient_norm) & torch.isfinite(loss))
            if optimizer.state and getattr(optimizer, "_step_supports_amp_scaling", False):
                fused: Any = optimizer
                fused.grad_scale, fused.found_inf = None, bad.float()
                optimizer.step()
                del fused.grad_scale, fused.found_inf
            elif not bad:
                optimizer.step()
        else:
            optimizer.step()

    # --- by CUDA graph ----------------------------------------------------------------------------

    def _replay(self, memory: _Memory, x: Tensor, target: Tensor) -> Tensor:
        if not self._watch.holds(self._written):
            self._graphs.clear()
            self._steps.clear()
            self._written.clear()
            self._draws = False
            self._watch = _Watch(self)
        self.reason = self._watch.reason() or (
            "is not for steps that draw random numbers on the host" if self._draws else None
        )
        if self.reason is not None or x.numel() == 0:
            return self._as_it_is(memory, x, target)
        key = _key(x, target, self.device.type)
        graph = self._graphs.pop(key, None)
        if graph is None:
            taken = self._steps.pop(key, 0)
            if taken < _WARM_UPS:
                _keep(self._steps, key, taken + 1, 8 * _MOST_GRAPHS)
                return self._as_it_is(memory, x, target)
            graph = self._record(memory, x, target)
        _keep(self._graphs, key, graph, _MOST_GRAPHS)
        with memory.turn():
            graph.x.copy_(x, non_blocking=True)
            graph.target.copy_(target, non_blocking=True)
            memory.set_lrs(self.optimizer)
            graph.replay()
            loss, norm = graph.loss.clone(), graph.norm
            self.gradient_norm = None if norm is None else norm.clone()
        # A replay writes behind PyTorch's back: what was made of the weights (packed ones, for
        # inference) would seem to be as good as ever.
        torch.autograd.graph.increment_version(list(self._written.values()))
        return loss

    def _as_it_is(self, memory: _Memory, x: Tensor, target: Tensor) -> Tensor:
        """A step on the stream that is recorded, where autograd and the libraries get ready."""
        before, state = self._watch.versions(), _host_state()
        with memory.turn(), memory.aside():
            loss = self._run(x.to(self.device), target.to(self.device))
        self._draws = self._draws or _host_state() != state
        self._written.update(self._watch.changed(before))
        if not self._watch.holds(self._written):  # the optimizer has made its state
            self._graphs.clear()
            self._watch = _Watch(self)
        return loss.clone()

    def _record(self, memory: _Memory, x: Tensor, target: Tensor) -> _Graph:
        x, target = (t.detach().to(self.device, copy=True) for t in (x, target))
        try:
            with memory.turn(), memory.recording(self.optimizer) as (graph, used):
                loss = self._run(x, target)
        except RuntimeError as error:
            self._drop_gradients()
            raise RuntimeError(
                f"training_step: the step cannot be recorded in a CUDA graph ({error}); with "
                "cuda_graph=False it runs as it is"
            ) from error
        return _Graph(x, target, loss, self.gradient_norm, graph.replay, used)


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _overflowed(scaler: Any, optimizer: Optimizer) -> bool:
    return any(bool(found) for found in scaler._found_inf_per_device(optimizer).values())


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    """As the newest of at most so many."""
    while len(kept) >= most:
        kept.popitem(last=False)
    kept[key] = value


def _key(x: Tensor, target: Tensor, kind: str) -> Any:
    """What a step is recorded for, besides what is watched."""
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    switches = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
    )
    return (*((t.shape, t.dtype) for t in (x, target)), registry.forced(), autocast, switches)


def _host_state() -> tuple[bytes, Any]:
    """Of the generators of random numbers that a step on a GPU should not touch."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate()


class _Graph(NamedTuple):
    """A recorded step: from x and target, by replay, into loss and norm. used: what it reads
    besides tensors that are watched, whose memory must stay though nobody else may want it."""

    x: Tensor
    target: Tensor
    loss: Tensor
    norm: Tensor | None
    replay: Callable[[], None]
    used: Sequence[object]


class _Memory:
    """Where graphs of one step are recorded and what they read and write: a stream, a pool that
    they share since one is replayed at a time, and a learning rate per group."""

    def __init__(self, device: torch.device, optimizer: Optimizer) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
            self._done = torch.cuda.Event()
        self._lrs: list[Tensor] = []
        self._values: list[Any] = []
        # PyTorch warns of a capturable optimizer whose step is not recorded; it will be.
        optimizer._warned_capturable_if_run_uncaptured = True

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for the last user on whichever stream that was; the next one waits for this."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            yield
            self._done.record(stream)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """On the stream that is recorded; the present one waits for it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    @contextlib.contextmanager
    def recording(self, optimizer: Optimizer) -> Iterator[tuple[Any, Sequence[object]]]:
        """Records instead of doing, with learning rates that `set_lrs` can change afterwards."""
        groups = optimizer.param_groups
        if len(self._lrs) != len(groups):
            self._lrs = [torch.zeros((), device=self.device) for _ in groups]
            self._values = [None] * len(groups)
        self._stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        rates = [group["lr"] for group in groups]
        try:
            for group, lr in zip(groups, self._lrs, strict=True):
                group["lr"] = lr
            # Other threads may go on allocating.
            with (
                RECORDING,
                noting() as used,
                torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._stream,
                    capture_error_mode="thread_local",
                ),
            ):
                yield graph, used
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def set_lrs(self, optimizer: Optimizer) -> None:
        for i, (group, lr) in enumerate(zip(optimizer.param_groups, self._lrs, strict=True)):
            now = group["lr"]
            if isinstance(now, Tensor):
                lr.copy_(now.reshape(()), non_blocking=True)
            elif now != self._values[i]:
                lr.fill_(now)
            self._values[i] = now


class _Watch:
    """Whether model, loss and optimizer are what they were, but for what is in tensors that steps
    write."""

    def __init__(self, step: TrainingStep) -> None:
        self._step = step
        roots = [m for m in (step.model, step.loss) if isinstance(m, nn.Module)]
        modules = list({id(m): m for root in roots for m in root.modules()}.values())
        self._homes = [h for m in modules for h in (m._parameters, m._buffers, m._modules)]
        self._set = [(m.__dict__, [s for s in _SETTINGS if s in m.__dict__]) for m in modules]
        self._hooks = [
            getattr(m, f"_{kind}_hooks")
            for m in modules
            for kind in ("forward", "forward_pre", "backward", "backward_pre")
        ]
        self._hooks += [step.optimizer._optimizer_step_pre_hooks]
        self._hooks += [step.optimizer._optimizer_step_post_hooks, *GLOBAL_HOOKS]
        self._averages = any(
            isinstance(m, nn.modules.batchnorm._BatchNorm)
            and m.momentum is None
            and m.track_running_stats
            for m in modules
        )
        self._static = step._reason()
        self._members = self._now()
        found = {id(t): t for t in self._members if isinstance(t, Tensor)}
        self._tensors = list(found.values())
        self._settings = self._settings_now()
        self._was = self.versions()
        self._addresses = self._addresses_now()

    def _optimizers(self) -> list[Tensor]:
        """Tensors that the optimizer, and the scaler, keep from step to step."""
        states = self._step.optimizer.state.values()
        found = [t for state in states for t in state.values() if isinstance(t, Tensor)]
        scaler: Any = self._step.scaler
        if scaler is not None:
            found += [t for t in (scaler._scale, scaler._growth_tracker) if t is not None]
        return found

    def _now(self) -> list[object]:
        groups = (group["params"] for group in self._step.optimizer.param_groups)
        return [*chain.from_iterable(home.values() for home in self._homes),
                *chain.from_iterable(groups), *self._optimizers()]  # fmt: skip

    def _settings_now(self) -> list[Any]:
        groups = self._step.optimizer.param_groups
        scaler: Any = self._step.scaler
        return [
            None
            if scaler is None
            else (scaler._growth_factor, scaler._backoff_factor, scaler._growth_interval),
            [attributes.get(name) for attributes, names in self._set for name in names],
            [t.requires_grad for t in self._tensors],
            [
                (key, id(value) if isinstance(value, Tensor) else value)
                for group in groups
                for key, value in group.items()
                if key not in ("params", "lr")
            ],
        ]

    def versions(self) -> list[int]:
        # What was made in inference mode has no version counter.
        return [0 if t.is_inference() else t._version for t in self._tensors]

    def _addresses_now(self) -> list[int]:
        return [t.data_ptr() for t in self._tensors]

    def changed(self, before: list[int]) -> dict[int, Tensor]:
        """The tensors that were written since `versions` gave `before`."""
        pairs = zip(self._tensors, before, self.versions(), strict=True)
        return {id(t): t for t, old, new in pairs if old != new}

    def holds(self, written: dict[int, Tensor]) -> bool:
        now = self._now()
        return (
            len(now) == len(self._members)
            and all(map(is_, now, self._members))
            and self._addresses_now() == self._addresses
            and self._settings_now() == self._settings
            and all(id(t) in written for t in self.changed(self._was).values())
        )

    def reason(self) -> str | None:
        """Why a step cannot be recorded now, or None."""
        if self._static is not None:
            return self._static
        tensor_hooks = any(
            t._backward_hooks or getattr(t, "_post_accumulate_grad_hooks", None)
            for t in self._tensors
        )
        if any(self._hooks) or tensor_hooks:
            return "is not for models and optimizers with hooks"
        if torch._C._len_torch_dispatch_stack() > 0:
            return "is not for steps that a TorchDispatchMode is to see"
        if self._averages:
            return "is not for norms without a momentum, which ask the GPU for a count"
        return None
