"""Blocks as one op for forward and one for backward on the CPU: bitwise equal to separate passes;
error messages."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn

import fused_resnet as fr
from fused_resnet.fusion.description import recipe_of
from fused_resnet.fusion.inference.make import plan_for
from fused_resnet.fusion.training import one_op
from fused_resnet.fusion.training.activation_memory import LEVELS
from fused_resnet.kernels.cpu.convolution import NativeConv
from tests.fusion.training.training_helpers import (
    BLOCKS,
    DTYPES,
    LAST,
    ONE_OP,
    Passes,
    make,
    needs_native,
    step,
    stock_step,
)
from tests.ops.op_cases import lifted, randn, same

pytestmark = needs_native


@pytest.mark.pairwise
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_one_op_equals_separate_passes(name, dtype, level, monkeypatch):
    """A block computed by one op each for forward and backward is bitwise equal to its passes."""
    block, x = make(name)
    fr.set_activation_memory(block, level)
    other, function = copy.deepcopy(block), one_op.NativeBlockFunction
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = block(x)
        dy = randn(y.shape, y.dtype).contiguous(memory_format=LAST)
        block.load_state_dict(other.state_dict())  # forward updated the running statistics
        mine = step(block, x, dy)
        assert (type(y.grad_fn).__name__ == f"{function.__name__}Backward") == (name in ONE_OP)
        monkeypatch.setattr(one_op, "layout_of", lambda *_: None)
        want = step(other, x, dy)
    assert mine.keys() == want.keys()
    for key in mine:
        assert torch.equal(mine[key], want[key]), key
        assert mine[key].stride() == want[key].stride(), key


@pytest.mark.parametrize("name", ["bottleneck, groups", *(n for n in BLOCKS if "groups of" in n)])
def test_all_passes_of_grouped_convolutions_are_native(name):
    block, x = make(name)
    fr.set_activation_memory(block, "full")
    other = copy.deepcopy(block)
    dy = randn(block(x).shape, x.dtype).contiguous(memory_format=LAST)
    block.load_state_dict(other.state_dict())
    with Passes() as passes:
        mine = step(block, x, dy)
    want = stock_step(other, x, dy)
    exact = stock_step(other.double(), lifted(x).requires_grad_(), lifted(dy))
    count = sum(isinstance(m, nn.Conv2d) for m in block.modules())
    assert passes.convolutions == passes.input_gradients == passes.weight_gradients == count
    names = [n for n, _ in block.named_parameters()]
    for key in ("y", "dx", *(f"d{n}" for n in names)):
        largest = exact[key].abs().max()
        error, stocks = ((t[key].double() - exact[key]).abs().max() for t in (mine, want))
        assert error <= 2 * stocks + 1e-6 * largest, key


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", [name for name in BLOCKS if "many pixels" in name])
def test_activations_recomputed_in_ranges(name, threads):
    """Activations that each thread recomputes in ranges are bitwise equal to saved ones, so the
    gradients of "low" and "full" are too; also with NaN and Inf."""
    torch.set_num_threads(threads)
    for value in (None, float("nan"), float("inf")):
        block, x = make(name)
        if value is not None:
            with torch.no_grad():
                x[1, :, 7, 5] = value
        other = copy.deepcopy(block)
        dy = randn(block(x).shape, x.dtype).contiguous(memory_format=LAST)
        block.load_state_dict(other.state_dict())
        fr.set_activation_memory(block, "low")
        fr.set_activation_memory(other, "full")
        recomputed, saved = step(block, x, dy), step(other, x, dy)
        for key in saved:
            same(recomputed[key], saved[key])


def test_prepared_step_is_rebuilt_after_changes(monkeypatch):
    """Everything that a block's prepared step depends on may change between two steps."""

    def replace_data(block: Any) -> None:
        block.conv2.weight.data = block.conv2.weight.data.double().float().contiguous()

    changes: dict[str, Any] = {
        "momentum": lambda block: setattr(block.bn1, "momentum", 0.5),
        "cumulative": lambda block: setattr(block.bn2, "momentum", None),
        "eps": lambda block: setattr(block.bn2, "eps", 0.3),
        "no tracking": lambda block: setattr(block.bn1, "track_running_stats", False),
        "weight": lambda block: setattr(block, "conv1", copy.deepcopy(block.conv2)),
        "data": replace_data,
        "dilation": lambda block: setattr(block.conv1, "padding", (2, 2)) or setattr(
            block.conv1, "dilation", (2, 2)),
        "eval of a norm": lambda block: block.bn1.eval(),
        "level": lambda block: fr.set_activation_memory(block, "minimal"),
        "double": lambda block: block.double(),
        "shape": lambda block: None,  # x changes instead
    }  # fmt: skip
    for name, change in changes.items():
        block, x = make("basic")
        step(block, x, torch.ones(x.shape).contiguous(memory_format=LAST))
        change(block)
        other = copy.deepcopy(block)
        x = x[:1, :, :2, :2].contiguous(memory_format=LAST) if name == "shape" else x
        x = x.detach().to(block.conv1.weight.dtype).requires_grad_()
        dy = randn(x.shape, x.dtype).contiguous(memory_format=LAST)
        mine, want = step(block, x, dy), stock_step(other, x, dy)
        for key in want:
            torch.testing.assert_close(
                mine[key], want[key], rtol=1e-4, atol=1e-4, msg=f"{name} {key}"
            )
        assert [int(b) for b in block.buffers() if b.dtype == torch.int64] == [
            int(b) for b in other.buffers() if b.dtype == torch.int64
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("owned", [False, True])
# Inference has no kernel for smaller groups than of 16.
@pytest.mark.parametrize(
    "name", [n for n in BLOCKS if "groups of" not in n and "depthwise" not in n]
)
def test_inference_op_equals_separate_convolutions(name, owned, dtype):
    """A plan computed by one op is bitwise equal to its separate convolutions and overwrites x only
    if `owned`."""
    block, x = make(name, dtype)
    block.eval()
    x = x.detach()
    plan: Any = plan_for(block, recipe_of(block)[0], dtype, x.device)
    native_convs = all(isinstance(conv, NativeConv) for conv in plan.all_convs)
    assert (plan.one_op is not None) == native_convs
    assert native_convs or "odd channels" in name
    results = []
    for op in (plan.one_op, None):
        plan.one_op = op
        given = x.clone(memory_format=LAST)
        results.append(plan.run(given, owned))
        assert owned or torch.equal(given, x)
    assert torch.equal(*results)
    assert results[0].is_contiguous(memory_format=LAST)


def test_errors_name_the_operands():
    ops = torch.ops.fused_resnet_native
    x = torch.zeros(2, 16, 4, 4).contiguous(memory_format=LAST)
    run, back = ops.block_forward.default, ops.block_backward.default
    weight = torch.zeros(16, 16, 3, 3).contiguous(memory_format=LAST)
    weights = [weight, torch.ones(16), torch.zeros(16)]
    geometry = [1, 1, 1, 1, 1, 1, 1]
    for blocks in (
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 9, 1, 0, 0],
        [0, 1, 1, 0, 0],
        [1, 2, 1, 0, 0],
    ):
        with pytest.raises(RuntimeError, match="block_inference: got 3 tensors, 6 geometry"):
            ops.block_inference(x, weights, geometry[:6], [0.0], [1, 1], blocks, False)
    for norm_first in (False, True):
        block = (geometry, [1e-5], 1, 1, norm_first, False)
        for operands, kind, shared in ((weights[:2], 1, False), (weights, 2, False)) + (
            () if norm_first else ((weights, 1, True),)
        ):
            with pytest.raises(
                RuntimeError, match=r"block_forward: got \d operands, 7 sizes and 1"
            ):
                run(x, operands, geometry, [1e-5], kind, 1, norm_first, shared, [0, 0])
        with pytest.raises(RuntimeError, match="block_forward: no such shortcut: 4"):
            run(x, weights, geometry, [1e-5], 4, 1, norm_first, False, [0, 0])
        with pytest.raises(RuntimeError, match="block_forward: keep must have 2 values, got 1"):
            run(x, weights, *block, [0])
        with pytest.raises(
            RuntimeError,
            match="weight must be float32" if norm_first else "x must have 16 channels, got 8",
        ):
            run(x[:, :8].contiguous(memory_format=LAST), weights, *block, [0, 0])
        statistics, y = run(x, weights, *block, [0, 0])
        assert torch.equal(y, x)
        with pytest.raises(RuntimeError, match="block_backward: keep must have 2 values, got 1"):
            back(y, x, weights, [statistics], *block, [0], [1] * 4)
        with pytest.raises(RuntimeError, match="block_backward: needs must have 4 values, got 3"):
            back(y, x, weights, [statistics], *block, [0, 0], [1, 1, 1])
        with pytest.raises(RuntimeError, match="got 2 saved tensors instead of 1"):
            back(y, x, weights, [statistics, y], *block, [0, 0], [1] * 4)


@pytest.mark.parametrize("name", sorted(ONE_OP))
def test_weights_of_any_strides(name):
    """Results by weights that are not channels_last are bitwise equal."""
    results = []
    block, x = make(name)
    dy = randn(block(x).shape, x.dtype).contiguous(memory_format=LAST)
    for strides in ("channels_last", "contiguous", "every second filter", "transposed"):
        block, x = make(name)
        for p in block.parameters():
            if strides == "contiguous":
                p.data = p.data.contiguous()
            elif strides == "every second filter" and p.dim() == 4:
                wide = p.data.repeat_interleave(2, 0).contiguous(memory_format=LAST)
                p.data = wide[::2]
            elif strides == "transposed" and p.dim() == 4:
                p.data = p.data.mT.contiguous(memory_format=LAST).mT
        results.append(step(block, x, dy))
    for got in results[1:]:
        assert all(torch.equal(got[key], want) for key, want in results[0].items())


@pytest.mark.parametrize("name", ["basic, projection", "preact bottleneck, projection"])
def test_few_python_calls(name):
    """Both directions run for every block in every step: at most two Python functions are called in
    forward, the op and one more, and four in backward, which also asks whether it is differentiated
    and lays out the weights' gradients."""
    block, x = make(name)
    calls: list[str] = []
    functions = {
        getattr(one_op.NativeBlockFunction, direction).__code__: direction
        for direction in ("forward", "backward")
    }

    def profile(frame: Any, event: str, _: Any) -> None:
        caller = frame.f_back
        while event == "call" and caller is not None:
            if caller.f_code in functions:
                calls.append(functions[caller.f_code])
            caller = caller.f_back

    block.conv1.weight.requires_grad_(False)
    sys.setprofile(profile)
    try:
        y = block(x)
        y.backward(y)
    finally:
        sys.setprofile(None)
    assert calls.count("forward") <= 2 and calls.count("backward") == 4


def test_norms_with_cumulative_or_no_running_statistics():
    """One norm with a cumulative average or without running statistics, the others default."""
    for change, value in (("momentum", None), ("track_running_stats", False)):
        block, x = make("bottleneck")
        setattr(block.bn2, change, value)
        other = copy.deepcopy(block)
        for _ in range(3):
            dy = randn(x.shape, x.dtype).contiguous(memory_format=LAST)
            mine, want = step(block, x, dy), stock_step(other, x, dy)
            for key in want:
                torch.testing.assert_close(
                    mine[key], want[key], rtol=1e-4, atol=1e-4, msg=f"{change}: {key}"
                )
        for mine, stocks in zip(block.modules(), other.modules(), strict=True):
            if isinstance(mine, nn.BatchNorm2d):
                assert int(mine.num_batches_tracked) == int(stocks.num_batches_tracked)
