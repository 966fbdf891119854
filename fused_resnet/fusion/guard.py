"""The one mechanism that notices change in the modules that something was made from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from operator import attrgetter, contains, getitem, is_
from typing import Any

from torch import Tensor, nn

from fused_resnet.layers.hooks import hooks_of
from fused_resnet.layers.shortcut import PadShortcut

from .description import Description, Place

_version, _dtype = attrgetter("_version"), attrgetter("dtype")
_CONV = ("stride", "padding", "dilation", "groups", "padding_mode")
_NORM = ("eps", "training", "momentum", "track_running_stats", "process_group")
_OTHERS = {
    PadShortcut: ("in_channels", "out_channels", "stride"),
    nn.MaxPool2d: (
        "kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode",
    ),
    nn.AdaptiveAvgPool2d: ("output_size",),
}  # fmt: skip
_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Guard:
    """A snapshot of described modules, taken before anything is read from them.

    `holds` compares it with their current state: identity and type of every module, hooks and
    patched forwards, configuration, identity, address, dtype, shape and version counter of every
    parameter and buffer. The tensors' memory is kept alive, so that no address is reused while the
    guard exists. The comparisons run in C (`map` with builtins), since they run in every forward.

    places: further modules, as those between blocks, and attributes. A guard must not hold a
    reference to the module it belongs to, which is a key in a WeakKeyDictionary, nor to that
    module's dict, where hooks may.
    """

    def __init__(self, descriptions: Sequence[Description], places: Sequence[Place] = ()) -> None:
        places = [*places, *chain.from_iterable(d.places for d in descriptions)]
        self._homes = [place.home for place in places]
        self._names = [place.name for place in places]
        self._modules = [place.module for place in places]
        modules = [m for m in self._modules if isinstance(m, nn.Module)]
        # A module with hooks or a patched forward is not fused, and may keep them.
        plain = [m for m in modules if "forward" not in m.__dict__ and not any(hooks_of(m))]
        self._hooks = list(chain.from_iterable(map(hooks_of, plain)))
        self._dicts = [m.__dict__ for m in plain]
        self._children = [m._modules for m in modules]
        convs = [unit.conv for d in descriptions for unit in d.units]
        norms = [norm for d in descriptions for norm in d.norms]
        settings = [(m.__dict__, _CONV) for m in convs] + [(m.__dict__, _NORM) for m in norms]
        settings += [(m.__dict__, _OTHERS[type(m)]) for m in modules if type(m) in _OTHERS]
        self._settings = [home for home, names in settings for _ in names]
        self._setting_names = [name for _, names in settings for name in names]
        slots = [
            (home, name)
            for module in (*convs, *norms)
            for home in (module._parameters, module._buffers)
            for name in _TENSORS
            if name in home
        ]
        self._slots, self._keys = [h for h, _ in slots], [k for _, k in slots]
        self._values = [h[k] for h, k in slots]
        self._tensors = [t for t in self._values if t is not None]
        self._alive = [t.detach() for t in self._tensors]
        # A tensor created in inference mode has no version counter: writes go undetected.
        self.has_versions = not any(map(Tensor.is_inference, self._tensors))
        self._versions = list(map(_version, self._tensors)) if self.has_versions else []
        self._state = self._current_state()

    @staticmethod
    def combined(guards: Sequence[Guard]) -> Guard:
        """One guard for everything that `guards` hold, by their snapshots."""
        all_of = Guard.__new__(Guard)
        states = [guard._state for guard in guards]
        for name in vars(guards[0]).keys() - {"has_versions", "_state"}:
            setattr(all_of, name, list(chain.from_iterable(getattr(g, name) for g in guards)))
        all_of.has_versions = all(guard.has_versions for guard in guards)
        all_of._state = tuple(list(chain(*lists)) for lists in zip(*states, strict=True))
        return all_of

    def _current_state(self) -> tuple[list[Any], ...]:
        """What is compared by value, and can change without replacing a module or tensor."""
        tensors = self._tensors
        return (
            list(map(Tensor.data_ptr, tensors)),
            list(map(_dtype, tensors)),
            list(map(Tensor.size, tensors)),
            list(map(Tensor.stride, tensors)),
            list(map(type, self._modules)),
            list(map(len, self._children)),
            list(map(dict.get, self._settings, self._setting_names)),
        )

    def holds(self) -> bool:
        """Whether nothing was replaced, hooked, patched, reconfigured or written to."""
        try:
            return list(map(_version, self._tensors)) == self._versions and self.structure_holds()
        except RuntimeError:  # a tensor created in inference mode
            return False

    def structure_holds(self) -> bool:
        """`holds`, except that values may have been written."""
        try:
            return (
                all(map(is_, map(getitem, self._slots, self._keys), self._values))
                and self._current_state() == self._state
                and all(map(is_, map(dict.get, self._homes, self._names), self._modules))
                and not any(self._hooks)
                and not any(map(contains, self._dicts, repeat("forward")))
            )
        except (KeyError, AttributeError):  # a parameter or an attribute was deleted
            return False
