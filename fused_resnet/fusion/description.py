"""The description of what can be fused, made once from modules, or the reason why it cannot be.

A `Description` is a chain of units (convolution, norm, activation) with a shortcut; a stem ends
with a pooling. The executors of inference and training read it, and so does `explain`. It
does not depend on where the modules were found: `describe` finds those of a module by `Names`.

Modules are fused only while they are exactly Conv2d, BatchNorm2d (SyncBatchNorm, FrozenBatchNorm2d)
and ReLU, unhooked and unpatched, so that surgery on a model and feature extraction keep working.
The classes are those of the import: a quantiser may put others in their place in `torch.nn`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import BatchNorm2d, Conv2d, MaxPool2d, ReLU, Sequential

from fused_resnet.kernels.activation import OF_MODULE, Activation
from fused_resnet.kernels.problem import Geometry, output_shape, pair
from fused_resnet.layers.hooks import patched
from fused_resnet.layers.norms import has_activation, is_frozen_bn
from fused_resnet.layers.originals import ALL
from fused_resnet.layers.released import Released
from fused_resnet.layers.shortcut import PadShortcut
from fused_resnet.layers.sync_batch_norm import SyncBatchNorm

from . import pooling

# What executors depend on besides submodules and tensors. `self.downsample = None` in __init__ sets
# a plain attribute, not a child module.
ATTRIBUTES = ("activation_shared", "survival", "activation_memory", "downsample", "training")
_SYNCHRONISED = (nn.SyncBatchNorm, SyncBatchNorm)


class Names(NamedTuple):
    """The names of a block's submodules. pairs: (convolution, norm) in order.

    downsample: the submodule that changes the shortcut's shape; None: there is no shortcut.
    norm_first: norm and ReLU come before each convolution, and none after the addition. pool: the
    pooling after a stem."""

    pairs: tuple[tuple[str, str], ...]
    relu: str = "relu"
    downsample: str | None = "downsample"
    norm_first: bool = False
    pool: str | None = None


class Place(NamedTuple):
    """One module: `home[name] is module`, whose type must be exactly `kind`."""

    home: dict[str, Any]
    name: str
    module: Any
    kind: type


class Unit(NamedTuple):
    """A convolution, its norm (None: it has none), and the activation of the norm's output; in a
    norm_first block norm and activation come before the convolution."""

    conv: Any
    norm: Any
    activation: Activation


class Description(NamedTuple):
    """y = activation(chain(x) + shortcut(x)), or, norm first, y = chain(x) + shortcut(x).

    units: in order, a projecting shortcut's last; the projection of a norm_first block has no norm.
    shortcut: "none", "identity", "projection" or "pad" (by the module `pad`). shared: the shortcut
    starts from the first activation. survival: the probability that a training step runs the
    block, by which its branch is divided; 1 in eval mode. pool: the MaxPool2d after the last
    activation,
    or None. geometries: of the units' convolutions."""

    units: list[Unit]
    shortcut: str
    places: list[Place]
    geometries: list[Geometry]
    pad: PadShortcut | None = None
    norm_first: bool = False
    shared: bool = False
    survival: float = 1.0
    pool: Any = None

    @property
    def norms(self) -> list[Any]:
        return [unit.norm for unit in self.units if unit.norm is not None]

    @property
    def main(self) -> list[Unit]:
        """The units of the residual branch."""
        return self.units[:-1] if self.shortcut == "projection" else self.units

    @property
    def folds(self) -> list[Unit]:
        """The units of inference: each convolution with the norm and activation of its output."""
        if not self.norm_first:
            return self.units
        nothing = Unit(None, None, Activation.NONE)
        after = [*self.main[1:], nothing, nothing]
        return [
            Unit(unit.conv, *following[1:])
            for unit, following in zip(self.units, after, strict=False)
        ]

    def output_shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The shape of every convolution's output for x of `shape` (N, C, H, W). Empty if x does
        not fit: stock then raises the error."""
        main, found = len(self.main), list[tuple[int, ...]]()
        for i, (unit, geometry) in enumerate(zip(self.units, self.geometries, strict=True)):
            source = shape if i in (0, main) else found[-1]
            out = output_shape(source, unit.conv.weight.shape, *geometry)
            if out is None:
                return []
            found.append(out)
        branch = tuple(shape) if self.shortcut == "identity" else found[-1]
        if self.pad is not None:
            branch = self.pad.output_shape(shape)
        return found if branch == found[main - 1] else []


def attributes_of(module: nn.Module) -> tuple[Any, ...]:
    """The values of `ATTRIBUTES`, None where absent."""
    return tuple(map(module.__dict__.get, ATTRIBUTES))


# A class whose forward asks for fusion -> the names of its submodules, and that forward; filled by
# `register`.
_recipes: dict[type, tuple[Any, Any]] = {}


def register(recipes: dict[Any, Any]) -> None:
    """Registers classes of blocks with their `Names`, and of networks with their `NetworkNames`."""
    for cls, names in recipes.items():
        _recipes[cls] = names, cls.forward
        ALL.remember(cls, "forward", "__call__")


def recipe_of(module: nn.Module) -> tuple[Any, Any]:
    """The names registered for the module's class or its nearest base, and the forward that asks;
    None, None if there are none."""
    for cls in type(module).__mro__:
        if cls in _recipes:
            return _recipes[cls]
    return None, None


def own_recipe(block: nn.Module) -> Any:
    """The names of a block whose call is exactly the registered forward; None for any other."""
    names, forward = recipe_of(block)
    cls: Any = type(block)
    exact = cls.forward is forward and cls.__call__ is nn.Module.__call__
    return names if exact and patched(block) is None else None


def describe(module: nn.Module, names: Names) -> Description | str:
    """What `module` computes, or a one-line reason why it cannot be fused."""
    children, places = module._modules, []

    def child(home: dict[str, Any], name: str, kind: type) -> Any:
        places.append(Place(home, name, home.get(name), kind))
        return places[-1].module

    kind = type(children.get(names.relu))
    activation = OF_MODULE.get(kind)
    units = [
        Unit(
            child(children, conv, Conv2d), child(children, norm, BatchNorm2d),
            activation or Activation.NONE,
        )
        for conv, norm in names.pairs
    ]  # fmt: skip
    child(children, names.relu, ReLU if activation is None else kind)
    shortcut, pad = "none", None
    if names.downsample is not None:
        branch = children.get(names.downsample)
        shortcut = "projection"
        plain = module.__dict__.get(names.downsample)
        if plain is not None:
            return f"{names.downsample} is a {type(plain).__name__}, not a submodule"
        if branch is None:
            shortcut = "identity"
            child(children, names.downsample, type(None))
        elif type(branch) is PadShortcut:
            shortcut, pad = "pad", child(children, names.downsample, PadShortcut)
        elif names.norm_first:
            conv = child(children, names.downsample, Conv2d)
            units.append(Unit(conv, None, Activation.NONE))
        elif type(branch) is not Sequential or len(branch) != 2:
            return f"{names.downsample} is not a Sequential of a convolution and a norm"
        else:
            child(children, names.downsample, Sequential)
            layers = branch._modules
            conv, norm = layers
            conv, norm = child(layers, conv, Conv2d), child(layers, norm, BatchNorm2d)
            units.append(Unit(conv, norm, Activation.NONE))
    pool = None if names.pool is None else children.get(names.pool)
    if pooling.is_plain(pool):
        places.append(Place(children, str(names.pool), pool, MaxPool2d))
    else:
        pool = None  # runs as a module
    shared, survival, *_, training = attributes_of(module)
    description = Description(
        units, shortcut, places, [], pad, names.norm_first, names.norm_first and bool(shared),
        survival if training and survival is not None else 1.0, pool,
    )  # fmt: skip
    return finished(description)


def finished(description: Description) -> Description | str:
    """The description with its geometries, or a one-line reason why it cannot be fused."""
    reason = _reason_against(description)
    if reason is not None:
        return reason
    for conv, *_ in description.units:
        sizes = conv.stride, conv.padding, conv.dilation
        if {*map(type, sizes)} != {tuple} or {*map(len, sizes)} != {2}:
            sizes = pair(conv.stride), pair(conv.padding), pair(conv.dilation)
        description.geometries.append(Geometry(*sizes, conv.groups))
    return description


def _reason_against(description: Description) -> str | None:
    for _, name, module, kind in description.places:
        if type(module) is not kind and not (
            kind is BatchNorm2d
            and (type(module) in _SYNCHRONISED or is_frozen_bn(module) or has_activation(module))
        ):
            return f"{name} is a {type(module).__name__}, not a {kind.__name__}"
        why = None if module is None else patched(module)
        if why is not None:
            return f"{name} {why}"
    for conv, norm, _ in description.units:
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return "a convolution's padding is not a number of zeros"
        if conv.weight is None:
            return "a convolution has no weight"
        for name, t in tensors_of(conv, norm):
            if t is None:
                continue
            if type(t) not in (Tensor, nn.Parameter, Released):
                return f"{name} is a {type(t).__name__}"
            if name.startswith("bn.running") and t.requires_grad:
                return f"{name} requires a gradient"
            first = description.norm_first and name != "conv.bias"
            channels = conv.in_channels if first else conv.out_channels
            if name != "conv.weight" and t.shape != (channels,):
                return f"{name} has shape {tuple(t.shape)} for {channels} channels"
            if t.device != conv.weight.device:
                return f"{name} is on {t.device}, conv.weight on {conv.weight.device}"
    return None


def tensors_of(conv: Any, norm: Any) -> list[tuple[str, Tensor | None]]:
    """(name, tensor) of every parameter and running statistic of the unit."""
    tensors = [("conv.weight", conv.weight), ("conv.bias", conv.bias)]
    if norm is not None:
        tensors += [("bn.weight", norm.weight), ("bn.bias", norm.bias)]
        tensors += [("bn.running_mean", norm.running_mean), ("bn.running_var", norm.running_var)]
    return tensors
