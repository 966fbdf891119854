"""`training_step`: forward, loss, backward and update as a callable with minimal overhead per call.

On a GPU a step of a ResNet-50 is about a thousand kernels, most of them of 5 to 50 us. At small
batch launching them one by one takes longer than running them. A CUDA graph launches all of them at
once; it is captured once per input shape, with fixed addresses.

Python code runs only while a step is captured, not when it is replayed. So every value that may
change from step to step must be in the GPU's memory (learning rates are copied there), and all
other state that the capture depends on is compared at each call.
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

from fused_resnet.dtypes import convolves_in_tf32, multiplies_in_tf32
from fused_resnet.kernels import registry
from fused_resnet.kernels.cache import noting
from fused_resnet.layers.hooks import GLOBAL_HOOKS, hooks_of

from .capture import RECORDING

_MAX_GRAPHS = 4  # cached graphs, one per input shape; they share one memory pool
_WARM_UPS = 3  # eager steps before capture: compile kernels, create the optimizer's state
# Attributes of modules that affect the computation and may be changed between steps.
_SETTINGS = ("training", "momentum", "eps", "p", "track_running_stats")

Loss = Callable[[Any, Tensor], Tensor]


class TrainingStep:
    """A callable that runs one training step: `step(x, target) -> loss`.

        value = loss(model(x), target);  gradients of value;  optimizer.step()

    model: any module, in its current mode; the models of this package run fused.
    loss: a function or module that maps the model's output and the target to a scalar.
    dtype: the autocast dtype of model and loss, float16 or bfloat16; None: no autocast of its own.
    scaler: scales the loss, which float16 requires; updated in every step.
    max_norm: clip gradients to this norm, with the formula of `torch.nn.utils.clip_grad_norm_`.
    skip_nonfinite: skip the update if the loss or the gradient norm is not finite. (A scaler always
    does.)
    cuda_graph: replay one CUDA graph per input shape (the last 4 are cached); None: on GPUs, if
    optimizer and model allow it. `step.reason` says why steps are not replayed, or is None.

    The callable takes x and target of any shape, on the model's device or the host, and returns the
    detached loss in new memory. With max_norm or skip_nonfinite, `step.gradient_norm` is the norm
    before clipping, as a tensor. Every call is one step: the first three of a shape run eagerly,
    the fourth is captured, and it and later ones are replayed. Existing gradients are dropped, and
    none are left after a step.

    Learning rate schedules work: `lr` of the optimizer's groups is read at each call. Any other
    change between steps (another optimizer setting, a loaded optimizer state, a parameter replaced
    or frozen, a frozen one changed in place, the model's mode, a norm's momentum) drops the graphs:
    the next three steps run eagerly before they are captured again. What cannot be captured always
    runs eagerly: a model or optimizer with hooks, norms with momentum=None, steps that draw random
    numbers on the host (stochastic depth), more than one process. Values inside a loss function,
    and attributes of modules other than tensors, `training`, `momentum`, `eps`, `p` and
    `track_running_stats`, are not compared: call `training_step` again after changing them.

    Raises ValueError for any other dtype and, if cuda_graph is True, without a GPU or if the
    optimizer's step would synchronise with the GPU: SGD must be `fused=True`, Adam and the like
    `capturable=True`, and also fused if a scaler or skip_nonfinite may skip a step. RuntimeError if
    the capture fails.
    Source: CUDA programming guide, "CUDA graphs"; Micikevicius et al. 2018 (1710.03740), scaling.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        *,
        dtype: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        cuda_graph: bool | None = None,
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
        self._eager_steps: OrderedDict[Any, int] = OrderedDict()  # counts, keyed as the graphs
        self._written: dict[int, Tensor] = {}  # the tensors that steps write, by id
        self._uses_host_rng = False  # whether a step has drawn random numbers on the host
        self._turn = threading.Lock()
        self._guard = _StateGuard(self)
        self._memory = _Memory(self.device, optimizer) if self.cuda_graph else None

    def _reason(self) -> str | None:
        """Why device, processes or optimizer rule out capture, or None."""
        if not _on_gpu(self.device):
            return f"needs a GPU, the parameters are on {self.device}"
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return "is for one process: collectives are not captured"
        name = type(self.optimizer).__name__
        for group in self.optimizer.param_groups:
            if "capturable" in group and not group["capturable"]:
                return f"needs {name}(..., capturable=True), whose step stays on the GPU"
            if "capturable" not in group and not group.get("fused"):
                return f"needs an optimizer whose step stays on the GPU: {name}(..., fused=True)"
        may_skip = self.scaler is not None or self.skip_nonfinite
        if may_skip and not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            return f"needs {name}(..., fused=True), which can skip a step on the GPU"
        return None

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """x (N, ...), target: inputs of model and loss -> the loss, a scalar."""
        with self._turn, torch.inference_mode(False), torch.enable_grad():
            if self._memory is None:
                return self._run(x.to(self.device), target.to(self.device))
            return self._replay(self._memory, x, target)

    # --- one step ---------------------------------------------------------------------------------

    def _run(self, x: Tensor, target: Tensor) -> Tensor:
        """Runs one step, eagerly or during capture."""
        self._drop_gradients()
        with self._autocast():
            loss = self.loss(self.model(x), target)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self._update(loss.detach())
        self._drop_gradients()
        return loss.detach()

    def _drop_gradients(self) -> None:
        """Also of parameters outside the optimizer: a graph would accumulate their gradients."""
        for owner in (self.optimizer, self.model, self.loss):
            if isinstance(owner, (Optimizer, nn.Module)):
                owner.zero_grad(set_to_none=True)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast to self.dtype or the surrounding autocast's dtype, without the cache of casts.

        A captured step would read weights that a surrounding autocast cached in an earlier step."""
        kind = self.device.type
        enabled = torch.is_autocast_enabled(kind)
        dtype = self.dtype or (torch.get_autocast_dtype(kind) if enabled else None)
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
            # If a fused SGD's first step is skipped on the GPU, its momentum buffers stay
            # uninitialised but are used in the next step.
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

    # --- CUDA graph -------------------------------------------------------------------------------

    def _replay(self, memory: _Memory, x: Tensor, target: Tensor) -> Tensor:
        if not self._guard.holds(self._written):
            self._graphs.clear()
            self._eager_steps.clear()
            self._written.clear()
            self._uses_host_rng = False
            self._guard = _StateGuard(self)
        self.reason = self._guard.reason() or (
            "is not for steps that draw random numbers on the host" if self._uses_host_rng else None
        )
        if self.reason is not None or x.numel() == 0:
            return self._run_eagerly(memory, x, target)
        key = _key(x, target, self.device.type)
        graph = self._graphs.pop(key, None)
        if graph is None:
            taken = self._eager_steps.pop(key, 0)
            if taken < _WARM_UPS:
                _insert(self._eager_steps, key, taken + 1, 8 * _MAX_GRAPHS)
                return self._run_eagerly(memory, x, target)
            graph = self._record(memory, x, target)
        _insert(self._graphs, key, graph, _MAX_GRAPHS)
        with memory.turn():
            graph.x.copy_(x, non_blocking=True)
            graph.target.copy_(target, non_blocking=True)
            memory.set_lrs(self.optimizer)
            graph.replay()
            loss, norm = graph.loss.clone(), graph.norm
            self.gradient_norm = None if norm is None else norm.clone()
        # A replay does not increment version counters: caches built from the weights (packed ones,
        # for inference) would not be invalidated.
        torch.autograd.graph.increment_version(list(self._written.values()))
        return loss

    def _run_eagerly(self, memory: _Memory, x: Tensor, target: Tensor) -> Tensor:
        """A step on the capture stream, which initialises autograd and the libraries for it."""
        before, state = self._guard.versions(), _host_rng_state()
        with memory.turn(), memory.on_capture_stream():
            loss = self._run(x.to(self.device), target.to(self.device))
        self._uses_host_rng = self._uses_host_rng or _host_rng_state() != state
        self._written.update(self._guard.changed(before))
        if not self._guard.holds(self._written):  # the optimizer has created its state
            self._graphs.clear()
            self._guard = _StateGuard(self)
        return loss.clone()

    def _record(self, memory: _Memory, x: Tensor, target: Tensor) -> _Graph:
        x, target = (t.detach().to(self.device, copy=True) for t in (x, target))
        try:
            with memory.turn(), memory.recording(self.optimizer) as (graph, used):
                loss = self._run(x, target)
        except RuntimeError as error:
            self._drop_gradients()
            raise RuntimeError(
                f"training_step: the step cannot be captured in a CUDA graph ({error}); with "
                "cuda_graph=False it runs eagerly"
            ) from error
        return _Graph(x, target, loss, self.gradient_norm, graph.replay, used)


training_step = TrainingStep


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _overflowed(scaler: Any, optimizer: Optimizer) -> bool:
    return any(bool(inf) for inf in scaler._found_inf_per_device(optimizer).values())


def _insert(cached: OrderedDict[Any, Any], key: Any, value: Any, max_size: int) -> None:
    """Inserts as the most recently used; evicts the least recently used beyond max_size."""
    while len(cached) >= max_size:
        cached.popitem(last=False)
    cached[key] = value


def _key(x: Tensor, target: Tensor, kind: str) -> Any:
    """The key of a graph: state that may alternate between steps, unlike that of `_StateGuard`."""
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    switches = (
        multiplies_in_tf32(),
        convolves_in_tf32(),
        torch.are_deterministic_algorithms_enabled(),
    )
    return (*((t.shape, t.dtype) for t in (x, target)), registry.forced(), autocast, switches)


def _host_rng_state() -> tuple[bytes, Any]:
    """The states of PyTorch's and Python's random number generators on the host."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate()


class _Graph(NamedTuple):
    """A captured step: replay() reads x and target and writes loss and norm. used: references that
    keep alive what the graph reads besides the tensors of `_StateGuard`."""

    x: Tensor
    target: Tensor
    loss: Tensor
    norm: Tensor | None
    replay: Callable[[], None]
    used: Sequence[object]


class _Memory:
    """The capture stream, the memory pool and the learning rates (one tensor per group) of a step's
    graphs. They can share the pool because only one is replayed at a time."""

    def __init__(self, device: torch.device, optimizer: Optimizer) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
            self._done = torch.cuda.Event()
        self._lrs: list[Tensor] = []
        self._values: list[Any] = []
        # Eager warm-up steps would make PyTorch warn that a capturable optimizer is not captured.
        optimizer._warned_capturable_if_run_uncaptured = True

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for the previous user, on whichever stream; the next one waits for this one."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            yield
            self._done.record(stream)

    @contextlib.contextmanager
    def on_capture_stream(self) -> Iterator[None]:
        """Runs on the capture stream; the current stream then waits for it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    @contextlib.contextmanager
    def recording(self, optimizer: Optimizer) -> Iterator[tuple[Any, Sequence[object]]]:
        """Captures without running, with learning rates that `set_lrs` can change afterwards."""
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
            # thread_local: other threads may allocate meanwhile.
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


class _StateGuard:
    """Detects changes to model, loss and optimizer, except to the values of tensors that steps
    write."""

    def __init__(self, step: TrainingStep) -> None:
        self._step = step
        roots = [m for m in (step.model, step.loss) if isinstance(m, nn.Module)]
        modules = list({id(m): m for root in roots for m in root.modules()}.values())
        self._dicts = [d for m in modules for d in (m._parameters, m._buffers, m._modules)]
        self._attributes = [
            (m.__dict__, [s for s in _SETTINGS if s in m.__dict__]) for m in modules
        ]
        self._hooks = [*chain.from_iterable(map(hooks_of, modules)), *GLOBAL_HOOKS]
        self._hooks += [step.optimizer._optimizer_step_pre_hooks]
        self._hooks += [step.optimizer._optimizer_step_post_hooks]
        self._has_cumulative_norm = any(
            isinstance(m, nn.modules.batchnorm._BatchNorm)
            and m.momentum is None
            and m.track_running_stats
            for m in modules
        )
        self._static_reason = step._reason()
        self._members = self._current_members()
        self._tensors = list({id(t): t for t in self._members if isinstance(t, Tensor)}.values())
        self._settings = self._current_settings()
        self._versions = self.versions()
        self._addresses = self._current_addresses()

    def _optimizer_tensors(self) -> list[Tensor]:
        """The state tensors of the optimizer and the scaler."""
        states = self._step.optimizer.state.values()
        tensors = [t for state in states for t in state.values() if isinstance(t, Tensor)]
        scaler: Any = self._step.scaler
        if scaler is not None:
            tensors += [t for t in (scaler._scale, scaler._growth_tracker) if t is not None]
        return tensors

    def _current_members(self) -> list[object]:
        groups = (group["params"] for group in self._step.optimizer.param_groups)
        return [*chain.from_iterable(d.values() for d in self._dicts),
                *chain.from_iterable(groups), *self._optimizer_tensors()]  # fmt: skip

    def _current_settings(self) -> list[Any]:
        groups = self._step.optimizer.param_groups
        scaler: Any = self._step.scaler
        return [
            None
            if scaler is None
            else (scaler._growth_factor, scaler._backoff_factor, scaler._growth_interval),
            [attributes.get(name) for attributes, names in self._attributes for name in names],
            [t.requires_grad for t in self._tensors],
            [
                (key, id(value) if isinstance(value, Tensor) else value)
                for group in groups
                for key, value in group.items()
                if key not in ("params", "lr")
            ],
        ]

    def versions(self) -> list[int]:
        # Tensors created in inference mode have no version counter.
        return [0 if t.is_inference() else t._version for t in self._tensors]

    def _current_addresses(self) -> list[int]:
        return [t.data_ptr() for t in self._tensors]

    def changed(self, before: list[int]) -> dict[int, Tensor]:
        """The tensors written since `versions` returned `before`, by id."""
        pairs = zip(self._tensors, before, self.versions(), strict=True)
        return {id(t): t for t, old, new in pairs if old != new}

    def holds(self, written: dict[int, Tensor]) -> bool:
        """Whether nothing has changed, except the values of the tensors in `written`."""
        now = self._current_members()
        return (
            len(now) == len(self._members)
            and all(map(is_, now, self._members))
            and self._current_addresses() == self._addresses
            and self._current_settings() == self._settings
            and all(id(t) in written for t in self.changed(self._versions).values())
        )

    def reason(self) -> str | None:
        """Why a step cannot be captured now, or None."""
        if self._static_reason is not None:
            return self._static_reason
        tensor_hooks = any(
            t._backward_hooks or getattr(t, "_post_accumulate_grad_hooks", None)
            for t in self._tensors
        )
        if any(self._hooks) or tensor_hooks:
            return "is not for models and optimizers with hooks"
        if torch._C._len_torch_dispatch_stack() > 0:
            return "is not for steps under a TorchDispatchMode"
        if self._has_cumulative_norm:
            return "is not for norms without a momentum, which read a count from the GPU"
        return None
