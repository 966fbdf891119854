"""Which blocks are fused: module replacement, hooks and patches behave as in torchvision."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from torch import nn

import fused_resnet as fr
from fused_resnet.fusion import store
from fused_resnet.fusion.inference import chain, plan
from fused_resnet.fusion.training.prepare import Prepared
from fused_resnet.kernels import convolution, registry
from fused_resnet.kernels.cpu import onednn
from fused_resnet.kernels.problem import Problem
from tests.models.model_helpers import (
    both_ways,
    clone,
    fused,
    images,
    pair,
    randomise,
    reasons,
    same_outputs,
    same_step,
    tv,
)

pytestmark = pytest.mark.skipif(
    registry.choose("conv_bn_relu", "cpu") == "reference", reason="nothing is fused here"
)
TRAINS = registry.choose("bn_add_relu", "cpu") == "native"


@pytest.fixture
def runs(monkeypatch):
    """The fused convolutions run since the list was last cleared, by class name."""
    seen: list[str] = []
    for dtype in (torch.float32, torch.bfloat16):  # its probes run convolutions, once per process
        onednn.supports(Problem("conv_bn_relu", dtype))
    for kind in convolution.FusedConv.__subclasses__():

        def run(self, *args, _run=kind.run, **kwargs):
            seen.append(type(self).__name__)
            return _run(self, *args, **kwargs)

        monkeypatch.setattr(kind, "run", run)

    def run_blocks(self, *args, _run=plan.Blocks.run):  # one op runs all convolutions
        seen.extend(type(conv).__name__ for p in self.plans for conv in p.all_convs)
        return _run(self, *args)

    monkeypatch.setattr(plan.Blocks, "run", run_blocks)
    return seen


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "grouped"])
def test_every_convolution_of_an_eval_network_is_fused(kind, runs):
    stock, mine = pair(kind)
    assert all(fused(mine)) and {e.path for e in fr.explain(mine)} == {"inference"}
    same_outputs(stock, mine, images())
    convs = sum(isinstance(m, nn.Conv2d) for m in mine.modules())
    assert len(runs) == convs
    runs.clear()
    same_outputs(stock, mine, images())
    assert len(runs) == convs
    runs.clear()
    x = images()
    with torch.no_grad():
        block = mine.layer2[0]
        y = torch.randn(2, block.conv1.in_channels, 9, 9)
        torch.testing.assert_close(block(y), stock.layer2[0](y), rtol=1e-3, atol=1e-4)
        assert len(runs) == (4 if kind != "basic" else 3)
        with fr.use_backend("reference"):
            runs.clear()
            assert torch.equal(mine(x), stock(x)) and not runs
            assert reasons(mine)["stem"] == "the reference backend is forced"


@pytest.mark.skipif(not TRAINS, reason="needs the native kernels")
@pytest.mark.parametrize(
    ("depth", "block"), [(20, "basic"), (20, "preact"), (29, "preact_bottleneck")]
)
def test_consecutive_blocks_by_one_op(depth, block):
    """Bitwise equal to one after the other, each with other weights, norms and shapes."""
    torch.manual_seed(0)
    model = randomise(fr.cifar_resnet(depth, block=block)).eval()
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16))
        (whole,) = (e for key, e in store.made_from(model).items() if key[0] == "network")
        plans = [p for p in whole.plans if p.one_op is not None]
        stem = plans[0].takes_any
        assert len(plans) == 9 + stem and len({p.one_op[-1][1] for p in plans}) > 1
        x = torch.randn(2, 3 if stem else 16, 16, 16).contiguous(memory_format=torch.channels_last)
        got = plan.Blocks(plans).run(x, False)
        y, owned = x, False
        for each in plans:
            y, owned = each.run(y, owned), True
    assert torch.equal(got, y)


@pytest.mark.skipif(not TRAINS, reason="needs the native kernels")
@pytest.mark.parametrize("dilate", [False, True], ids=["plain", "dilated"])
def test_large_batches_run_in_micro_batches(dilate, runs, monkeypatch):
    """The same values as in one pass; a NaN in one image stays in that image."""
    torch.set_num_threads(2)
    stock, mine = pair("bottleneck", replace_stride_with_dilation=[False, dilate, dilate])
    x = images(7)
    x[4, 1, 20, 20] = torch.nan
    whole = same_outputs(stock, mine, x)
    assert whole.isnan().all(1).tolist() == [i == 4 for i in range(7)]
    convs = sum(isinstance(m, nn.Conv2d) for m in mine.modules())
    assert len(runs) == convs
    # The limit is three images of 64 x 32 x 32 values, the stem's output. layer1's output is as
    # large, layer2's half and layer3's a quarter of it: the 9 convolutions up to layer2.0 run on
    # 2 + 2 + 3 images, the next 7 on 4 + 3 and layer4's 4 on all. Dilated, layer3's output is
    # 1024 x 8 x 8 values, as large as the stem's; nothing reads layer4's again.
    monkeypatch.setattr(chain, "_MICRO_BATCH_BYTES", 3 * 64 * 32 * 32 * 4)
    runs.clear()
    fr.refresh(mine)
    split = same_outputs(stock, mine, x)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert len(runs) == (3 * convs if dilate else 3 * 9 + 2 * 7 + 4)


@pytest.mark.skipif(not TRAINS, reason="needs the native kernels")
def test_what_is_read_once_is_not_split(runs, monkeypatch):
    """The input and the output of a chain are; its other activations are not."""
    torch.set_num_threads(2)
    torch.manual_seed(0)

    def conv() -> nn.Conv2d:
        return nn.Conv2d(16, 16, 3, padding=1)

    stock = nn.Sequential(conv(), nn.Sigmoid(), conv(), nn.ReLU(), conv()).eval()
    mine, x = fr.fuse(stock), torch.randn(6, 16, 9, 9)
    with torch.no_grad():
        whole = mine(x)
        torch.testing.assert_close(whole, stock(x), rtol=1e-5, atol=1e-5)
        monkeypatch.setattr(chain, "_MICRO_BATCH_BYTES", 1)
        fr.refresh(mine)
        runs.clear()
        torch.testing.assert_close(mine(x), whole, rtol=1e-5, atol=1e-5)
    assert len(runs) == 1 + 3 * 2  # of two images, one per thread


@pytest.mark.skipif(not TRAINS, reason="needs the native kernels")
def test_every_norm_of_a_training_network_is_fused(monkeypatch):
    stock, mine = pair("bottleneck")
    calls: list[nn.Module] = []
    run = Prepared.run
    monkeypatch.setattr(
        Prepared, "run", lambda self, x: (calls.extend(self.description.norms), run(self, x))[1]
    )
    assert {e.path for e in fr.explain(mine.train())} == {"training"}
    same_step(stock.train(), mine, images())
    assert set(calls) == {m for m in mine.modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(calls) == len(set(calls))


def _set(path: str, make):
    """An edit that replaces the module at `path` by make(module)."""

    def edit(model):
        home, _, name = path.rpartition(".")
        parent = model.get_submodule(home) if home else model
        if name.isdigit():
            parent[int(name)] = make(parent[int(name)])
        else:
            setattr(parent, name, make(getattr(parent, name)))

    return edit


class MyConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def _reflecting(conv):
    return nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect", bias=False)


def _patch_forward(model):
    relu = model.layer1[0].relu
    forward = relu.forward
    relu.forward = lambda x: forward(x) + 1


def _patch_block(model):
    block = model.layer1[0]
    forward = block.forward
    block.forward = lambda x: forward(x) * 3


def _weight_norm(model):
    torch.nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)


def _prune(model):
    torch.nn.utils.prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.5)


def _extend_downsample(model):
    model.layer2[0].downsample.append(nn.Softplus())


def _remove_downsample(model):
    model.layer2[0].downsample = nn.Conv2d(64, 128, 1, stride=2)


def _drop_affine(model):
    model.layer1[0].bn1.weight = None
    model.layer1[0].bn1.bias = None


def _frozen(eps):
    def make(bn):
        from torchvision.ops import FrozenBatchNorm2d

        frozen = FrozenBatchNorm2d(bn.num_features, eps=eps)
        frozen.load_state_dict({k: v for k, v in bn.state_dict().items() if "num" not in k})
        return frozen

    return make


def _two_by_two(_):
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.MaxPool2d(2))


def _classifier(_):
    return nn.Sequential(nn.Dropout(0.0), nn.Linear(512, 3))


# name -> the edit, and part of the reason that explain gives (None: the block stays fused)
REPLACEMENTS = {
    "GELU": (_set("layer1.0.relu", lambda _: nn.GELU()), "relu is a GELU, not a ReLU"),
    "ReLU6": (_set("layer1.0.relu", lambda _: nn.ReLU6()), "relu is a ReLU6"),
    "LeakyReLU": (_set("layer1.0.relu", lambda _: nn.LeakyReLU(0.3)), "relu is a LeakyReLU"),
    "Identity for ReLU": (_set("layer1.0.relu", lambda _: nn.Identity()), "relu is a Identity"),
    "ReLU not in place": (_set("layer1.0.relu", lambda _: nn.ReLU()), None),
    "Identity for BN": (_set("layer1.0.bn1", lambda _: nn.Identity()), "bn1 is a Identity"),
    "GroupNorm": (_set("layer1.0.bn2", lambda _: nn.GroupNorm(4, 64)), "bn2 is a GroupNorm"),
    "BatchNorm2d of eps 0.1": (
        _set("layer1.0.bn1", lambda bn: randomise(nn.BatchNorm2d(64, eps=0.1)).eval()), None,
    ),
    "without affine": (_drop_affine, None),
    "FrozenBatchNorm2d": (_set("layer1.0.bn2", _frozen(0.03)), None),
    "convolution with bias": (
        _set("layer1.0.conv1", lambda _: nn.Conv2d(64, 64, 3, padding=1)), None,
    ),
    "1x5 convolution": (
        _set("layer1.0.conv1", lambda _: nn.Conv2d(64, 64, (1, 5), padding=(0, 2))), None,
    ),
    "grouped, dilated convolution": (
        _set("layer1.0.conv2", lambda _: nn.Conv2d(64, 64, 3, 1, 2, dilation=2, groups=8)), None,
    ),
    "subclass of Conv2d": (
        _set("layer1.0.conv1", lambda _: MyConv(64, 64, 3, padding=1)), "conv1 is a MyConv",
    ),
    "padding='same'": (
        _set("layer1.0.conv1", lambda _: nn.Conv2d(64, 64, 3, padding="same")),
        "is not a number of zeros",
    ),
    "reflecting padding": (_set("layer1.0.conv1", _reflecting), "is not a number of zeros"),
    "weight_norm": (_weight_norm, "conv1 is a ParametrizedConv2d"),
    "pruning": (_prune, "conv1 has hooks"),
    "forward of a part replaced": (_patch_forward, "relu has its forward replaced"),
    "forward of a block replaced": (_patch_block, "the block has its forward replaced"),
    "downsample extended": (_extend_downsample, "downsample is not a Sequential of a convolution"),
    "downsample replaced": (_remove_downsample, "downsample is not a Sequential"),
    "another stem": (_set("conv1", lambda _: nn.Conv2d(3, 64, 3, 1, 1, bias=False)), None),
    "no pooling": (_set("maxpool", lambda _: nn.Identity()), None),
    "average pooling": (_set("maxpool", lambda _: nn.AvgPool2d(2)), None),
    "pooling 2x2": (_set("maxpool", lambda _: nn.MaxPool2d(2, ceil_mode=True)), None),
    "max pooling at the end": (_set("avgpool", lambda _: nn.AdaptiveMaxPool2d(1)), None),
    "pooling to 2x2": (_set("avgpool", _two_by_two), None),
    "classifier replaced": (_set("fc", _classifier), None),
    "a stage is not a Sequential": (_set("layer3", lambda s: s[0]), None),
    "a block is an Identity": (_set("layer1.0", lambda _: nn.Identity()), None),
    "a stage extended": (lambda m: m.layer1.append(nn.Softplus()), None),
}  # fmt: skip


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_edited_modules_match_torchvision(name, way):
    edit, words = REPLACEMENTS[name]
    stock, mine = pair("basic")
    same_outputs(stock, mine, images())  # plans exist before the edit
    for model in (stock, mine):
        torch.manual_seed(7)
        edit(model)
        for m in model.modules():
            m.training = False  # not eval(), which drops plans: guards must detect the edit
    for _ in range(2):
        same_outputs(stock, mine, images())
    why = reasons(mine)
    if way == "family":
        assert (not why) if words is None else words in " ".join(why.values()), why
    same_step(stock.train(), mine.train(), images())
    same_outputs(stock.eval(), mine.eval(), images())


@both_ways
def test_residual_broadcasts():
    """The input is 1 x 1, the main branch 3 x 3: stock broadcasts the residual."""
    stock, mine = pair("basic")
    for model in (stock, mine):
        model.layer1[0].conv1.padding = (2, 2)
    x = torch.randn(2, 64, 1, 1)
    with torch.no_grad():
        want, got = stock.layer1[0](x), mine.layer1[0](x)
    assert got.shape == (2, 64, 3, 3)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "convert", [nn.SyncBatchNorm.convert_sync_batchnorm, fr.convert_sync_batchnorm]
)
def test_sync_batch_norm_without_other_processes(convert):
    """It is batch norm, in inference and training; test_sync_batch_norm.py runs two processes."""
    stock, mine = pair()
    mine = convert(mine)
    assert fused(mine) == fused(pair()[1])
    same_outputs(stock, mine, images())
    same_step(stock.train(), mine.train(), images())


HOOKS = ("forward_pre", "forward", "full_backward", "full_backward_pre")


@both_ways
@pytest.mark.parametrize(
    "where", ["layer1.0.conv1", "layer1.0", "layer1", "maxpool", "avgpool", "conv1"]
)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_fire_and_may_change_values(kind, where):
    stock, mine = pair("basic")
    same_outputs(stock, mine, images())
    counts = []
    for model in (stock, mine):
        fired: list[int] = []

        def hook(module, *values, fired=fired):
            fired.append(1)
            if kind == "forward":
                return values[-1] * 1.5
            if kind == "forward_pre":
                return tuple(v * 0.5 for v in values[0])
            return None

        handle = getattr(model.get_submodule(where), f"register_{kind}_hook")(hook)
        counts.append((fired, handle))
    same_outputs(stock, mine, images())
    same_step(stock.train(), mine.train(), images())
    assert len(counts[0][0]) == len(counts[1][0]) > 0
    for _, handle in counts:
        handle.remove()
    same_outputs(stock.eval(), mine.eval(), images())
    assert all(fused(mine))


@both_ways
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_global_hooks_fire_for_every_module(kind):
    stock, mine = pair("basic")
    same_outputs(stock, mine, images())
    seen: dict[int, list[str]] = {}
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    current: list[str] = []
    handle = register(lambda module, *_: current.append(type(module).__name__) or None)
    try:
        with torch.no_grad():
            for i, model in enumerate((stock, mine)):
                current.clear()
                model(images())
                seen[i] = list(current)
        assert "global module hooks are registered" in reasons(mine).values()
    finally:
        handle.remove()
    assert seen[0] == seen[1] and "ReLU" in seen[0]


@both_ways
def test_feature_extraction_by_node_names():
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    stock, mine = pair("bottleneck")
    assert get_graph_node_names(mine) == get_graph_node_names(stock)
    nodes = {"layer1.0.bn2": "a", "layer2.1.relu_2": "b", "layer3.0.add": "c", "flatten": "d"}
    theirs, ours = (create_feature_extractor(m, nodes)(images()) for m in (stock, mine))
    for key in nodes.values():
        torch.testing.assert_close(ours[key], theirs[key])


@both_ways
def test_intermediate_layers_by_hooks_on_stages():
    from torchvision.models._utils import IntermediateLayerGetter

    stock, mine = pair("bottleneck")
    layers = {"layer1": "a", "layer4": "b"}
    with torch.no_grad():
        theirs, ours = (IntermediateLayerGetter(m, layers)(images()) for m in (stock, mine))
    for key in ("a", "b"):
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4)


@both_ways
def test_fine_tuning_in_eval_mode_matches_stock_gradients():
    """Frozen statistics; gradients for all parameters, or for the last stage only."""
    for frozen in ((), ("conv1", "bn1", "layer1", "layer2", "layer3")):
        stock, mine = pair("bottleneck")
        for model in (stock, mine):
            for name in frozen:
                model.get_submodule(name).requires_grad_(False)
        before = {n: b.clone() for n, b in mine.named_buffers()}
        same_step(stock, mine, images())
        assert all(torch.equal(b, before[n]) for n, b in mine.named_buffers())
        x = images().requires_grad_()
        for p in mine.parameters():
            p.requires_grad_(False)
        mine(x).sum().backward()
        assert x.grad.abs().sum() > 0 and all(p.requires_grad is False for p in mine.parameters())


@both_ways
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_frozen_norms_beside_training_ones_match_stock(kind):
    """Such a block runs unit by unit: conv_bn_relu for frozen norms, bn_add_relu for the others."""
    stock, mine = pair(kind)
    for model in (stock.train(), mine.train()):
        for m in model.modules():
            if hasattr(m, "downsample"):
                m.bn1.eval()
    same_step(stock, mine, images())


@both_ways
def test_copies_pickles_and_saved_models(tmp_path):
    stock, mine = pair("bottleneck")
    keys, children = list(mine.state_dict()), len(list(mine.modules()))
    same_outputs(stock, mine, images())
    with torch.no_grad():
        want = mine(images())
    torch.save(mine, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for copy in (clone(mine), pickle.loads(pickle.dumps(mine)), loaded):
        assert list(copy.state_dict()) == keys and len(list(copy.modules())) == children
        with torch.no_grad():
            assert torch.equal(copy(images()), want)
            copy.conv1.weight.mul_(2)
            assert not torch.equal(copy(images()), want) and torch.equal(mine(images()), want)
    assert len(pickle.dumps(mine)) < 1.1 * len(pickle.dumps(stock))


@both_ways
@pytest.mark.parametrize("where", ["maxpool", "layer2"])
def test_gradients_that_begin_inside_a_frozen_model(where):
    """As Grad-CAM's hooks do: the model's input needs no gradient, an activation does."""
    results = []
    for model in pair("basic"):
        model.requires_grad_(False)
        begun: list[torch.Tensor] = []

        def hook(module, inputs, output, begun=begun):
            begun.append(output.detach().clone().requires_grad_())
            return begun[-1]

        model.get_submodule(where).register_forward_hook(hook)
        for _ in range(2):
            begun.clear()
            model(images()).square().sum().backward()
        results.append(begun[0].grad)
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-3 * results[0].abs().max().item())


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_patched_classes_are_called(mode, monkeypatch):
    """A class's forward replaced after it was registered, and a subclass with its own call."""
    calls = []

    class Counted(fr.BasicBlock):
        def __call__(self, x):
            calls.append(x)
            return super().__call__(x)

    original = fr.BasicBlock.forward
    with torch.set_grad_enabled(mode == "training"):
        fr.ResNet(Counted, [1, 1, 1, 1], num_classes=4).train(mode == "training")(images())
        assert len(calls) == 4
        monkeypatch.setattr(
            fr.BasicBlock, "forward", lambda self, x: calls.append(x) or original(self, x)
        )
        pair("basic")[1].train(mode == "training")(images())
    assert len(calls) == 4 + 5


def test_subclasses_with_a_forward_of_their_own():
    """They are called, and `explain` lists whatever would be asked: a subclass whose forward calls
    that of this package."""

    class Doubled(fr.BasicBlock):
        def forward(self, x):
            return 2 * super().forward(x)

    class Network(fr.ResNet):
        def forward(self, x):
            return super().forward(x + 1)

    mine = Network(Doubled, [1, 1, 1, 1], num_classes=4).eval()
    assert [e.name for e in fr.explain(mine)] == ["stem", *(f"layer{i}.0" for i in range(1, 5))]
    with torch.no_grad():
        y = mine(images())
        with fr.use_backend("reference"):
            torch.testing.assert_close(y, mine(images()), rtol=1e-4, atol=1e-4)
    assert all(fused(mine)) and not fr.explain(tv.resnet18())
    with torch.no_grad():
        got = mine(images())
        assert all(map(store.made_from, (mine.layer1[0], mine.layer4[0], mine)))
        with fr.use_backend("reference"):
            torch.testing.assert_close(got, mine(images()), rtol=1e-4, atol=1e-4)


def test_explain_names_every_block_and_changes_nothing():
    _, mine = pair("bottleneck")
    explanations = fr.explain(mine)
    assert [e.name for e in explanations] == [
        "stem",
        "layer1.0",
        "layer2.0",
        "layer2.1",
        "layer3.0",
        "layer4.0",
    ]
    assert not store.made_from(mine.layer1[0]) and not store.made_from(mine)
    outer = nn.Sequential(mine, tv.resnet18())
    assert [e.name for e in fr.explain(outer)] == [f"0.{e.name}" for e in explanations]
