"""Activation memory levels: bitwise equal gradients and statistics, fewer saved bytes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import fused_resnet as fr
from fused_resnet.bench.contenders import Step
from fused_resnet.bench.memory import saved_bytes
from fused_resnet.fusion.training import activation_memory, prepare
from fused_resnet.fusion.training.activation_memory import LEVELS, segments
from fused_resnet.fusion.training.prepare import Prepared
from fused_resnet.kernels import native
from fused_resnet.kernels.training import choice, protocol
from fused_resnet.layers.norms import recomputing
from fused_resnet.layers.planned import Planned
from tests.fusion.training.training_helpers import Passes

pytestmark = pytest.mark.skipif(native.load() is not None, reason="needs the native kernels")

LAST = torch.channels_last
KINDS = {
    "basic": (fr.BasicBlock, [2, 1, 3, 1], {}),
    "bottleneck": (fr.Bottleneck, [3, 2, 1, 1], {}),
    "grouped": (fr.Bottleneck, [1, 2, 1, 1], {"groups": 8, "width_per_group": 8}),
}


def make(kind: str = "bottleneck", level: str = "full") -> fr.ResNet:
    torch.manual_seed(0)
    block, layers, options = KINDS[kind]
    model = fr.ResNet(block, layers, num_classes=5, **options).train()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0, 0.3)
    fr.set_activation_memory(model, level)
    return model


def images(N: int = 3, size: int = 50, layout: torch.memory_format = LAST) -> Tensor:
    x = torch.randn(N, 3, size, size, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=layout)


def state_after(model: nn.Module, x: Tensor, steps: int = 1) -> list[Tensor]:
    """Gradients of parameters and input, and all buffers."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    for _ in range(steps):
        model(x).float().square().mean().backward()
    return [x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for s, t in zip(a, b, strict=True):
        assert (s is None) == (t is None)
        assert s is None or torch.equal(s, t)


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_levels_are_bitwise_equal(kind, level, dtype, layout):
    results = []
    for each in ("full", level):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            results.append(state_after(make(kind, each), images(layout=layout)))
    same(*results)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("momentum", [None, 0.1])
def test_running_statistics_are_updated_once(level, momentum):
    model = make("basic", level)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = momentum
    stock = copy.deepcopy(model)
    with fr.use_backend("reference"):
        for _ in range(3):
            stock(images())
    state_after(model, images(), steps=3)
    for (name, a), (_, b) in zip(model.named_buffers(), stock.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)
        if name.endswith("tracked"):
            assert a == 3, name


def test_each_level_saves_less():
    """Bytes counted by saved-tensor hooks, without parameters; benchmarks/RESULTS.md has those at
    224 x 224."""
    saved = {}
    x = images(2, 96)
    for kind in ("basic", "bottleneck"):
        for level in LEVELS:
            model = make(kind, level)
            step = Step(lambda model=model: model(x).sum(), model)
            saved[level] = saved_bytes(step)
        model = make(kind)
        with fr.use_backend("reference"):
            saved["stock"] = saved_bytes(Step(lambda model=model: model(x).sum(), model))
        assert saved["full"] <= saved["stock"]
        assert saved["low"] <= 0.85 * saved["stock"]
        assert saved["lower"] <= (0.85 if kind == "basic" else 0.6) * saved["stock"]
        assert saved["minimal"] <= 0.25 * saved["stock"]


def test_default_level(monkeypatch):
    """ "auto" is "low" with the native CPU convolutions and "full" with PyTorch's."""
    x = images(2, 64)

    def saved(level: str) -> int:
        model = make("bottleneck", level)
        return saved_bytes(Step(lambda: model(x).sum(), model))

    assert {m.activation_memory for m in fr.resnet18().modules() if isinstance(m, Planned)} == {
        "auto"
    }
    assert saved("auto") == saved("low") < saved("full")
    monkeypatch.setattr(prepare, "passes_for", lambda *_: choice.portable())
    assert saved("auto") == saved("full") > saved("low")


def test_nothing_is_recomputed_without_gradients(monkeypatch):
    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("checkpoint was called")

    monkeypatch.setattr(activation_memory, "checkpoint", refuse)
    model = make("basic", "minimal")
    with torch.no_grad():
        model(images())
    model.eval()
    with torch.inference_mode():
        model(images())
    with pytest.raises(AssertionError, match="checkpoint was called"):
        model.train()(images())


@pytest.mark.parametrize("level", LEVELS[1:])
def test_frozen_layers_and_accumulated_gradients(level):
    results = []
    for each in ("full", level):
        model = make("bottleneck", each)
        for p in [*model.conv1.parameters(), *model.bn1.parameters(), *model.layer1.parameters()]:
            p.requires_grad_(False)
        model.layer2[0].bn1.weight.requires_grad_(False)
        for _ in range(2):
            model(images()).square().mean().backward()
        results.append([p.grad for p in model.parameters()])
        assert model.conv1.weight.grad is None
    same(*results)


@pytest.mark.parametrize("level", LEVELS)
def test_frozen_norms(level):
    """model.eval() with gradients uses the running statistics and does not change them."""
    results = []
    for each in ("full", level):
        model = make("bottleneck", each).eval()
        before = [b.clone() for b in model.buffers()]
        results.append(state_after(model, images()))
        same(before, list(model.buffers()))
    same(*results)


@pytest.mark.parametrize("level", LEVELS)
def test_double_backward(level):
    """Second derivatives equal stock's."""
    model, x = make("basic", level).double(), images(2, 33).double().requires_grad_()
    results = []
    for backend in ("native", "reference"):
        net = copy.deepcopy(model)
        with fr.use_backend(backend):
            loss = net(x).square().sum()
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
            results.append([g, *torch.autograd.grad(g.square().sum(), list(net.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7 * b.abs().max().item())


def test_level_is_copied_and_pickled_with_the_model():
    model = make("bottleneck", "lower")
    keys = list(model.state_dict())
    assert keys == list(make("bottleneck").state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {b.activation_memory for b in other.modules() if isinstance(b, fr.Bottleneck)} == {
            "lower"
        }
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    make("bottleneck").load_state_dict(torch.load(file, weights_only=True))
    fr.set_activation_memory(model, "full")
    same(state_after(model, images()), state_after(make("bottleneck"), images()))


def test_level_inside_another_module():
    model = nn.Sequential(nn.Identity(), make("basic"))
    fr.set_activation_memory(model, "minimal")
    assert model[1].activation_memory == "minimal"
    same(state_after(model, images()), state_after(make("basic"), images()))


def backbone(kind: str, level: str) -> nn.Sequential:
    """Stem and stages without the ResNet module, as in a detector."""
    model = make(kind, level)
    stem = [model.conv1, model.bn1, nn.ReLU(), model.maxpool]
    net = nn.Sequential(*stem, model.layer1, model.layer2, model.layer3, model.layer4)
    fr.set_activation_memory(net, level)
    return net


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_outside_a_resnet(kind, dtype, layout):
    """At "minimal" each block saves only its input."""
    results = []
    for level in ("full", "minimal"):
        net = backbone(kind, level)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            results.append(state_after(net, images(layout=layout), steps=2))
    same(*results)
    block, x = (
        net[4][1 if len(net[4]) > 1 else 0],
        torch.randn(2, 64 if kind == "basic" else 256, 9, 9),
    )
    if len(net[4]) > 1:
        x = x.contiguous(memory_format=LAST)
        saved = saved_bytes(Step(lambda: block(x).sum(), block))
        statistics = sum(2 * 8 * m.num_features for m in block.modules() if hasattr(m, "eps"))
        assert x.nbytes <= saved <= x.nbytes + statistics


def test_a_segment_runs_twice_in_total(monkeypatch):
    """Every convolution runs once in forward and once in backward: nothing inside a segment is
    computed a third time."""
    by_pytorch: list[tuple[int, ...]] = []
    plain = protocol.Passes.convolution
    monkeypatch.setattr(
        protocol.Passes,
        "convolution",
        lambda *a, **k: (by_pytorch.append(a[2].shape), plain(*a, **k))[1],
    )
    for block_kind in ("basic", "bottleneck"):
        model = make(block_kind, "minimal")
        by_pytorch.clear()
        with Passes() as passes:
            state_after(model, images())
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert passes.convolutions + len(by_pytorch) == 2 * len(convolutions)


def test_a_hook_on_one_block_only_affects_that_block():
    results, saved = [], {}
    x = images(2, 96)
    for level in ("full", "low", "minimal"):
        model = make("bottleneck", level)
        model.layer2[0].register_forward_hook(lambda *_: None)
        results.append(state_after(model, x))
        saved[level] = saved_bytes(Step(lambda model=model: model(x).sum(), model))
    same(results[0], results[1])
    same(results[0], results[2])
    # Measured: 0.273; 0.84 at "low".
    assert saved["minimal"] <= 0.3 * saved["full"]


@pytest.mark.parametrize(
    "edit", ["hook on a block", "hook on a stage", "hook inside", "another norm", "eps of 0.0"]
)
def test_no_segments_where_recomputing_is_observable(edit):
    """No recomputation where a hook would fire twice or PyTorch's norm would update twice."""
    model = make("basic", "minimal")
    calls: list[int] = []

    def count(*_: object) -> None:
        calls.append(1)

    if edit == "hook on a block":
        model.layer1[0].register_forward_hook(count)
    elif edit == "hook on a stage":
        model.layer2.register_forward_hook(count)
    elif edit == "hook inside":
        model.layer1[0].bn1.register_forward_hook(count)
    elif edit == "another norm":
        model.layer3[1].bn2 = nn.BatchNorm2d(256, momentum=0.3)
        model.layer3[1].bn2.forward = model.layer3[1].bn2.forward
    else:
        model.layer3[1].bn2.eps = 0.0
        with pytest.raises(ValueError, match="eps must be positive"):  # stock's error
            model(images())
        return
    model(images()).sum().backward()
    assert len(calls) == (1 if edit.startswith("hook") else 0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.num_batches_tracked == 1


def test_a_block_on_the_stock_path_updates_once():
    """A block that cannot be one autograd node runs PyTorch's SyncBatchNorm, which would update its
    statistics again when the segment is recomputed."""
    results = []
    for level in ("full", "minimal"):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(make("basic", level))
        conv = model.layer1[0].conv1
        conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.out_channels))
        results.append(state_after(model, images()))
        for m in model.modules():
            if isinstance(m, nn.SyncBatchNorm):
                assert m.num_batches_tracked == 1
    same(*results)


def test_sync_batch_norm_in_segments(monkeypatch):
    calls: list[int] = []
    plain = activation_memory.checkpoint
    monkeypatch.setattr(
        activation_memory, "checkpoint", lambda *a, **k: (calls.append(1), plain(*a, **k))[1]
    )
    results = [
        state_after(nn.SyncBatchNorm.convert_sync_batchnorm(make("basic", level)), images())
        for level in ("full", "minimal")
    ]
    assert calls
    same(*results)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("where", ["layer1.0.conv1.weight", "layer2.0.conv2.weight"])
def test_weights_changed_before_backward(where, level):
    """An error that names the in-place change, as stock's, not gradients of changed weights."""
    model = make("basic", level)
    loss = model(images()).square().mean()
    with torch.no_grad():
        model.get_parameter(where).mul_(1.01)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("change", ["eval", "replaced", "frozen statistics"])
def test_otherwise_changed_before_backward(change):
    model = make("basic", "minimal")
    if change == "frozen statistics":
        model.layer2[0].bn1.eval()
    loss = model(images()).square().mean()
    if change == "eval":
        model.layer3.eval()
    elif change == "replaced":
        conv = model.layer1[0].conv2
        conv.weight = nn.Parameter(conv.weight.detach() * 1.01)
    else:
        model.layer2[0].bn1.running_mean.add_(1)
    with pytest.raises(RuntimeError, match="since forward"):
        loss.backward()


def test_backward_twice_with_steps_in_between():
    """retain_graph recomputes a segment twice; an optimizer step after backward is allowed."""
    results = []
    for level in ("full", "minimal"):
        model = make("basic", level)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(2):
            loss = model(images()).square().mean()
            loss.backward(retain_graph=True)
            loss.backward()
            optimizer.step()
        results.append([*model.parameters(), *(p.grad for p in model.parameters())])
        results[-1] += model.buffers()
    same(*results)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_scaled_losses(level):
    """GradScaler steps under autocast; the second one overflows and is skipped."""
    results = []
    for each in ("full", level):
        model = make("bottleneck", each)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        for factor in (1.0, float("inf"), 1.0):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(images()).float().square().mean() * factor
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**11
        results.append([*model.parameters(), *model.buffers()])
    same(*results)


@pytest.mark.parametrize("level", LEVELS)
def test_distributed_data_parallel(level, tmp_path):
    """static_graph in one process: gradients bitwise equal to those without DDP."""
    from torch import distributed as dist

    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs gloo")
    want = state_after(make("basic", level), images(), steps=2)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = make("basic", level)
        parallel = nn.parallel.DistributedDataParallel(model, static_graph=True)
        x = images().requires_grad_()
        for step in range(2):
            with torch.no_grad():
                previous = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            parallel.zero_grad()
            parallel(x).float().square().mean().backward()
            if step:
                for p, before in zip(model.parameters(), previous, strict=True):
                    p.grad.add_(before)
        same([x.grad, *(p.grad for p in model.parameters()), *model.buffers()], want)
    finally:
        dist.destroy_process_group()


def test_saved_bytes_grow_as_the_square_root_of_depth():
    """Eight times the blocks save little more than sqrt(8) times the bytes."""
    saved = {}
    x = images(2, 32)
    for depth in (9, 72):
        results = []
        for level in ("full", "minimal"):
            torch.manual_seed(0)
            model = fr.ResNet(fr.BasicBlock, [depth, 1, 1, 1], num_classes=3).train()
            fr.set_activation_memory(model, level)
            results.append(state_after(model, x))
        same(*results)
        saved[depth] = saved_bytes(Step(lambda model=model: model(x).sum(), model))
    output = 2 * 64 * 8 * 8 * 4
    assert saved[72] - saved[9] <= 5 * output


def test_export_uses_the_torchvision_path():
    """A tracer sees torchvision's operations at every level."""
    model = make("basic", "minimal")
    program = torch.export.export(copy.deepcopy(model).eval(), (images(2, 33),))
    assert not any("checkpoint" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("block_count", [1, 2, 3, 4, 6, 23, 36, 200, 5000])
def test_segments_grow_as_the_square_root(block_count):
    count = segments(block_count)
    assert 1 <= count <= block_count
    assert count <= (block_count / 2) ** 0.5 + 1
    # Saved inputs and the longest segment are both O(sqrt(blocks)).
    assert -(-block_count // count) <= 2 * (block_count / 2) ** 0.5 + 1


def test_random_state_is_not_touched():
    """The random state after a step is the same at every level."""
    following = []
    for level in ("full", "minimal"):
        model = make("basic", level)
        torch.manual_seed(5)
        state_after(model, images())
        following.append(torch.rand(3))
    assert torch.equal(*following)


@pytest.mark.parametrize("level", ["none", "Full", None, 1])
def test_unknown_level(level):
    with pytest.raises(
        ValueError, match=r"level must be one of auto, full, low, lower, minimal, got"
    ):
        fr.set_activation_memory(make("basic"), level)


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        fr.set_activation_memory(None, "low")


def test_module_without_blocks():
    with pytest.raises(ValueError, match="must hold residual blocks of fused_resnet, got a Linear"):
        fr.set_activation_memory(nn.Linear(2, 2), "low")


def test_segments_end_at_stage_boundaries():
    """Every block runs once, in order. A stage's first block, whose output is smaller than its
    input, ends the previous segment."""
    order: list[list[int]] = []

    class Counting(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

        def forward(self, x: Tensor) -> Tensor:
            order[-1].append(self.index)
            return x + 1

    def segment(run, x, modules):
        assert all(isinstance(m, Counting) for m in modules)
        order.append([])
        return run(x)

    stages = [[Counting(0), Counting(1), Counting(2)], [Counting(3), Counting(4)], [Counting(5)]]
    original = activation_memory.run_segment
    activation_memory.run_segment = segment
    try:
        y = activation_memory.run_stages(stages, torch.zeros(1), lambda block, x: block(x))
    finally:
        activation_memory.run_segment = original
    assert y == 6
    assert order == [[0, 1], [2, 3], [4, 5]]


def test_a_replaced_pooling_is_not_recomputed():
    """Another module in the place of the pooling draws random numbers and counts batches once."""
    grads = []
    for level in ("full", "minimal"):
        model = make("basic", level)
        model.maxpool = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Dropout(0.5), nn.BatchNorm2d(64))
        torch.manual_seed(1)
        model(images()).square().mean().backward()
        assert model.maxpool[2].num_batches_tracked == 1
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_recomputing_flag_is_reset_after_the_segment(monkeypatch):
    model = make("basic", "minimal")
    assert not recomputing()
    seen: list[bool] = []
    run = Prepared.run

    def counted(self: Prepared, x: Tensor) -> Tensor:
        seen.extend([recomputing()] * len(self.description.norms))
        return run(self, x)

    monkeypatch.setattr(Prepared, "run", counted)
    state_after(model, images())
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    # Forward, then the recomputed segments, each up to its last block's saved activations.
    assert seen[:norms] == [False] * norms
    assert len(seen) > norms and all(seen[norms:])
    assert not recomputing()
