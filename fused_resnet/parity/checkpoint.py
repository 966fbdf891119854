"""Loads untrusted checkpoints: weights only, with errors that name the file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class CheckpointError(ValueError):
    """The file is not a usable checkpoint; the message names the file and the reason."""


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state_dict in `path`, on the CPU; no code in the file is executed.

    The file holds a state_dict, or a training checkpoint with one under "state_dict", "model" or
    "model_state". The prefix "module." of DistributedDataParallel is removed. Names of Detectron2
    ("backbone.bottom_up.res2.0.conv1.norm.weight") and Caffe2 ("res2_0_branch2a_bn_s") become
    torchvision's; a norm of which they hold scale and shift alone gets mean 0 and variance 1.
    Raises CheckpointError, a ValueError that names the file and the reason.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint: {path} is not a file")
    if path.suffix == ".safetensors":
        raise CheckpointError(f"checkpoint: {path}: save it with torch.save, not as safetensors")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; errors are raised
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError) as error:
        lines = str(error).strip().splitlines() or ["the file ends too early"]
        raise CheckpointError(
            f"checkpoint: {path} ({path.stat().st_size} bytes) is cut short or damaged: "
            f"{lines[0].split('. ')[0]}"
        ) from None
    except Exception as error:  # arbitrary bytes can raise anything in the unpickler
        raise CheckpointError(_unpickling_message(path, error)) from None
    return _find_state(content, path)


def _unpickling_message(path: Path, error: Exception) -> str:
    text = str(error)
    if "Unsupported global" in text or "GLOBAL" in text:
        name = text.split("GLOBAL ", 1)[-1].split()[0] if "GLOBAL " in text else "an object"
        return (
            f"checkpoint: {path} holds {name}, not only tensors: refused, and nothing in it was "
            f"executed; save model.state_dict() instead of the model"
        )
    return f"checkpoint: {path} is not a checkpoint that torch.load can read, or it is damaged"


def _find_state(content: object, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model", "model_state"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(
            f"checkpoint: {path} must hold a state_dict, got {type(content).__name__}"
        )
    state = {str(k).removeprefix("module."): v for k, v in content.items()}
    invalid = [k for k, v in state.items() if not isinstance(v, Tensor)]
    if invalid:
        raise CheckpointError(
            f"checkpoint: {path} must hold a state_dict of tensors, {invalid[0]!r} is a "
            f"{type(state[invalid[0]]).__name__}"
        )
    return _torchvision_names(state)


# In order: a pattern of another project's names, and torchvision's name.
_NAMES: list[tuple[str, Any]] = [
    (r"(?:backbone\.)?(?:bottom_up\.)?stem\.conv1\.norm\.(\w+)", r"bn1.\1"),
    (r"(?:backbone\.)?(?:bottom_up\.)?stem\.conv1\.weight", "conv1.weight"),
    (r"(?:backbone\.)?(?:bottom_up\.)?res(\d)\.(\d+)\.", r"layer<\1>.\2."),
    (r"(layer<\d>\.\d+)\.conv(\d)\.norm\.", r"\1.bn\2."),
    (r"(layer<\d>\.\d+)\.shortcut\.norm\.", r"\1.downsample.1."),
    (r"(layer<\d>\.\d+)\.shortcut\.", r"\1.downsample.0."),
    (r"(?:backbone\.)?(?:bottom_up\.)?linear\.(\w+)$", r"fc.\1"),
    (r"^(?:pred|fc1000)_", "fc_"),
    (r"^res_conv1_bn_", "bn1_"),
    (r"^res(\d)_(\d+)_branch1_bn_", r"layer<\1>.\2.downsample.1_"),
    (r"^res(\d)_(\d+)_branch1_", r"layer<\1>.\2.downsample.0_"),
    (r"^res(\d)_(\d+)_branch2([abc])_bn_", r"layer<\1>.\2.bn<\3>_"),
    (r"^res(\d)_(\d+)_branch2([abc])_", r"layer<\1>.\2.conv<\3>_"),
    (r"_(?:w|s)$", ".weight"),
    (r"_b$", ".bias"),
    (r"_rm$", ".running_mean"),
    (r"_riv$", ".running_var"),
    (r"layer<(\d)>", lambda m: f"layer{int(m[1]) - 1}"),
    (r"<([abc])>", lambda m: str("abc".index(m[1]) + 1)),
]
_FOREIGN = re.compile(r"(^|\.)(stem\.conv1|res[2-5]\.\d+)\.|^(res[2-5]_\d+_|res_conv1_|conv1_w$)")


def _torchvision_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if not any(map(_FOREIGN.search, state)):
        return state
    renamed = {}
    for key, value in state.items():
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    for key in [k for k in renamed if re.search(r"(bn\d|downsample\.1)\.weight$", k)]:
        norm, one = key.removesuffix("weight"), torch.ones_like(renamed[key])
        renamed.setdefault(f"{norm}running_mean", torch.zeros_like(one))
        renamed.setdefault(f"{norm}running_var", one)
    return renamed


def load_into(model: nn.Module, state: dict[str, Tensor], name: str, path: str | Path) -> None:
    """Load `state` strictly; raises CheckpointError if it does not fit the model `name`."""
    expected = model.state_dict()
    counters = {k for k in expected if k.endswith("num_batches_tracked")}
    missing = [k for k in expected if k not in state and k not in counters]
    unexpected = [k for k in state if k not in expected]
    wrong = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    if missing or unexpected or wrong:
        parts = []
        if missing:
            parts.append(f"{len(missing)} keys missing (first {missing[0]})")
        if unexpected:
            parts.append(f"{len(unexpected)} keys unexpected (first {unexpected[0]})")
        if wrong:
            key = wrong[0]
            parts.append(
                f"{len(wrong)} shapes differ (first {key}: {tuple(state[key].shape)}, "
                f"expected {tuple(expected[key].shape)})"
            )
        raise CheckpointError(f"checkpoint: {path} does not fit {name}: {'; '.join(parts)}")
    # Old checkpoints have no num_batches_tracked; torch also sets it to zero for them.
    model.load_state_dict({**{k: expected[k] for k in counters}, **state})
