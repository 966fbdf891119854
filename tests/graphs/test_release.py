"""`fr.inference(..., release_weights=True)`: packed weights alone, and their way back."""

from __future__ import annotations

import copy
import io
import os
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fused_resnet as fr
from fused_resnet.fusion.store import made_from
from fused_resnet.kernels import native
from fused_resnet.layers import released as released_module
from fused_resnet.layers.hooks import FSDP
from fused_resnet.layers.released import Released
from tests.models.model_helpers import agree, images, pair, randomise, tv

pytestmark = pytest.mark.skipif(native.load() is not None, reason="needs the native kernels")

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fused_torchvision() -> Any:
    torch.manual_seed(0)
    return fr.fuse(randomise(tv.resnet18(num_classes=10)).eval())


def _mine(kind: str, **options: Any) -> Any:
    return pair(kind, **options)[1]


MODELS = {
    "Winograd": lambda: _mine("basic"),
    "bottleneck": lambda: _mine("bottleneck"),
    "groups": lambda: _mine("bottleneck", groups=4, width_per_group=64),
    "dilated": lambda: _mine("bottleneck", replace_stride_with_dilation=[False, True, True]),
    "CIFAR": lambda: randomise(fr.cifar_resnet(20)).eval(),
    "pre-activation": lambda: randomise(fr.cifar_resnet(29, block="preact_bottleneck")).eval(),
    "fuse": _fused_torchvision,
}


def states(model: Any) -> list[bool]:
    """Of each convolution's weight: whether it is released."""
    return [type(m.weight) is Released for m in model.modules() if isinstance(m, nn.Conv2d)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = BITS[a.element_size()] if a.is_floating_point() else a.dtype
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


def same_state(model: Any, copied: Any) -> None:
    found, want = model.state_dict(), copied.state_dict()
    assert list(found) == list(want)
    for name, t in want.items():
        assert same_bits(found[name], t) and found[name].stride() == t.stride(), name


@pytest.fixture
def three(monkeypatch) -> tuple[Any, Any, Any]:
    """A copy, the model itself, all of whose convolutions are released, and the callable."""
    monkeypatch.setattr("fused_resnet.fusion.guard._SETTLING_S", 0.0)
    # Without large transformed weights, which are given up, some sums are rounded in another order.
    monkeypatch.setattr("fused_resnet.kernels.cpu.convolution._LARGE_BYTES", 2**40)
    model = _mine("basic")
    copied = copy.deepcopy(model)
    call = fr.inference(model, images(), release_weights=True)
    assert all(states(model)) and call.kept == {}
    return copied, model, call


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_bit_comes_back(name, dtype, layout):
    model = MODELS[name]().to(dtype).to(memory_format=layout)
    copied, before = copy.deepcopy(model), list(model.parameters())
    x = images(size=32 if name in ("CIFAR", "pre-activation") else 64).to(dtype)
    call = fr.inference(model, x, release_weights=True)
    stem = {"conv1.weight": "no fused convolution reads it"} if name == "pre-activation" else {}
    assert call.kept == stem and states(model).count(False) == len(stem)
    held = sum(p.untyped_storage().nbytes() for p in copied.parameters() if p.dim() == 4)
    assert held > 100_000
    with torch._C.DisableTorchFunctionSubclass():
        assert not any(p.untyped_storage().nbytes() for p in before if type(p) is Released)
    with torch.no_grad():
        want = copied(x)
    agree(call(x).float(), want.float(), 2e-4 if dtype == torch.float32 else 0.05)
    assert states(model).count(False) == len(stem), "a call restored weights"
    same_state(model, copied)
    assert not any(states(model))
    assert list(map(id, model.parameters())) == list(map(id, before))
    assert {*map(type, before)} == {nn.Parameter}


@pytest.mark.parametrize("widen", [True, False])
def test_bfloat16_by_either_product(widen):
    """Widened to float32, or in pairs, whose last value of an odd row is halved."""
    native.widen_bfloat16(widen)
    try:
        model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU())
        model = fr.fuse(randomise(model).eval().bfloat16())
        copied = copy.deepcopy(model)
        fr.inference(model, images().bfloat16(), release_weights=True)
        assert all(states(model))
        same_state(model, copied)
    finally:
        native.widen_bfloat16(None)


def test_a_payload_that_packing_loses_keeps_the_weight():
    """bfloat16 in pairs is rounded from float32, which makes all NaNs one."""
    model = _mine("basic").bfloat16()
    with torch.no_grad():
        model.layer1[0].conv1.weight.view(torch.int16)[0, 0, 0, 0] = 0x7F81
    copied = copy.deepcopy(model)
    call = fr.inference(model, images().bfloat16(), release_weights=True)
    if not native.widens_bfloat16():
        assert call.kept == {"layer1.0.conv1.weight": "what was packed from it has other bits"}
    same_state(model, copied)


def _step(model: Any) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images(4)), torch.arange(4)).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def _saved(model: Any) -> list[torch.Tensor]:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return list(torch.load(file, weights_only=False).parameters())


def _hooked(model: Any) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    handle = model.layer1[0].conv1.register_forward_hook(lambda m, x, y: seen.append(y.detach()))
    with torch.no_grad():
        model(images())
    handle.remove()
    return seen


def _loaded(model: Any) -> list[torch.Tensor]:
    half = {k: v * 0.5 if v.dim() == 4 else v for k, v in model.state_dict().items()}
    model.load_state_dict(half)
    with torch.no_grad():
        return [model(images()), *model.parameters()]


def _written(model: Any) -> list[torch.Tensor]:
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.data.mul_(0.5)
    with torch.no_grad():
        return [model(images()), *model.parameters()]


def _functional(model: Any) -> list[torch.Tensor]:
    weights = {"conv1.weight": torch.ones(64, 3, 7, 7)}
    with torch.no_grad():
        return [functional_call(model, weights, (images(),))]


def _gradients(model: Any) -> list[torch.Tensor]:
    y = model(images())
    return list(torch.autograd.grad(y.square().sum(), model.parameters()))


def _per_sample(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [torch.vmap(lambda x: model(x[None])[0])(images())]


def _fake(model: Any) -> list[torch.Tensor]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model(torch.empty(2, 3, 64, 64))
    return list(model.parameters())


def _jit(make: Any) -> Any:
    def run(model: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return [make(model)(images())]

    return run


USES = {
    "state_dict": lambda m: list(m.state_dict().values()),
    "parameters": lambda m: [p.clone() for p in m.parameters()],
    "stacked": lambda m: [torch.cat([p.flatten() for p in m.parameters()])],
    "norms of a list": lambda m: list(torch._foreach_norm(list(m.parameters()))),
    "NumPy": lambda m: [torch.from_numpy(p.detach().numpy()) for p in m.parameters()],
    "deepcopy": lambda m: list(copy.deepcopy(m).parameters()),
    "deepcopy of one": lambda m: [copy.deepcopy(p) for p in m.parameters()],
    "pickle": lambda m: list(pickle.loads(pickle.dumps(m)).parameters()),
    "torch.save": _saved,
    "training": _step,
    "gradients in eval": _gradients,
    "half": lambda m: list(m.to(torch.bfloat16).parameters()),
    "double": lambda m: list(m.double().parameters()),
    "layout": lambda m: list(m.to(memory_format=torch.channels_last).parameters()),
    "a hook": _hooked,
    "load_state_dict": _loaded,
    "written through .data": _written,
    "functional_call": _functional,
    "vmap": _per_sample,
    "fake tensors": _fake,
    "unfuse": lambda m: list(fr.unfuse(m).parameters()),
    "export": _jit(lambda m: torch.export.export(m, (images(),)).module()),
    "script": _jit(torch.jit.script),
    "trace": _jit(lambda m: torch.jit.trace(m, images(), check_trace=False)),
    "fx": _jit(torch.fx.symbolic_trace),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", USES)
def test_who_reads_finds_the_weights(three, use):
    """The same values, bit for bit, as from a model that was never released."""
    copied, model, call = three
    for got, want in zip(USES[use](model), USES[use](copied), strict=True):
        assert same_bits(got, want) and type(got) is type(want)
        assert not vars(got), "a copy holds what was packed"
    same_state(model, copied)
    if not model.training and next(model.parameters()).dtype == torch.float32:
        with torch.no_grad():
            agree(call(images()), copied(images()))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_parameter_of_a_released_one(three, requires_grad):
    """nn.Parameter(p), by which weights are moved from module to module: of the same memory."""
    copied, model, _ = three
    p = model.layer1[0].conv1.weight
    made = nn.Parameter(p, requires_grad=requires_grad)
    assert type(made) is nn.Parameter and made is not p and made.is_leaf
    assert made.requires_grad == requires_grad and made.data_ptr() == p.data_ptr() != 0
    assert same_bits(made, copied.layer1[0].conv1.weight)
    assert type(model.layer1[0].conv2.weight.detach()) is torch.Tensor
    same_state(model, copied)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiler", ["eager", "inductor", "fused_resnet"])
@pytest.mark.parametrize("kind", ["own", "fuse"])
def test_compiled(kind, compiler):
    """Compiled before and after the release."""
    model = _mine("basic") if kind == "own" else _fused_torchvision()
    with torch.no_grad():
        want = copy.deepcopy(model)(images())
        torch.compiler.reset()
        compiled = torch.compile(model, backend=compiler)
        agree(compiled(images()), want)
        fr.refresh(model)
        fr.inference(model, images(), release_weights=True)
        agree(compiled(images()), want)
        fr.inference(model, images(), release_weights=True)
        agree(torch.compile(model, backend=compiler)(images()), want)
    torch.compiler.reset()


def test_what_asks_for_no_values_restores_nothing(three):
    _, model, _ = three
    for p in model.parameters():
        assert p.shape and p.dtype == torch.float32 and p.device.type == "cpu" and p.grad is None
        assert p.numel() == p.nelement() and p.requires_grad and p.is_leaf and p.stride()
        p.requires_grad_(False)
    assert next(iter(fr.explain(model))).reason == "weights packed only"
    assert all(e.fused for e in fr.explain(model))
    model.eval()
    model.zero_grad()
    torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        for _ in range(3):  # plans compare every byte once, then a part
            model(images(3, 96))
    assert all(states(model))


def test_a_pickle_holds_the_values_alone(three):
    weight = three[1].conv1.weight
    make, (values, *_) = weight.__reduce_ex__(2)
    assert make is torch._utils._rebuild_parameter and same_bits(values, three[0].conv1.weight.data)


def _view(model: Any) -> Any:
    return model.layer1[0].conv1.weight.detach()[:1]


def _graph(model: Any) -> Any:
    return model(images())


def _buffer(model: Any) -> Any:
    conv = model.layer1[0].conv1
    flat = torch.randn(conv.weight.numel() + 8)
    conv.weight.data = flat[8:].view_as(conv.weight)


def _mapped(model: Any, folder: Any) -> None:
    torch.save(model.state_dict(), folder / "weights.pt")
    state = torch.load(folder / "weights.pt", mmap=True)
    model.load_state_dict(state, assign=True)


def _tied(model: Any) -> None:
    model.layer2[1].conv2.weight = model.layer2[1].conv1.weight


HELD = "its memory is held elsewhere too: by a view, a state_dict or a graph"
KEPT = {
    "a view": (_view, ["layer1.0.conv1.weight"], HELD),
    "a graph": (_graph, None, HELD),
    "a buffer": (_buffer, ["layer1.0.conv1.weight"], "it is a part of a larger buffer"),
    "tied": (
        _tied, ["layer2.1.conv1.weight", "layer2.1.conv2.weight"], "several modules have it",
    ),
    "shared": (lambda m: m.share_memory(), None, "its memory is shared with other processes"),
    "another fused model": (lambda m: _called(fr.fuse(m)), None, HELD),
    "a state_dict": (lambda m: m.state_dict(), None, HELD),
}  # fmt: skip


def _called(model: Any) -> Any:
    with torch.no_grad():
        model(images())
    return model


@pytest.mark.parametrize("case", KEPT)
def test_memory_that_others_hold_is_kept(case):
    """What it is held by still has the values, and sees writes."""
    hold, names, reason = KEPT[case]
    model = tv.resnet18(num_classes=10).eval() if "fused" in case else _mine("basic")
    holder = hold(model)
    model = fr.fuse(model, inplace=True) if "fused" in case else model
    call = fr.inference(model, images(), release_weights=True)
    assert {*call.kept.values()} == {reason}
    if names is None:
        assert not any(states(model))
    else:
        assert list(call.kept) == names and sum(states(model)) == len(states(model)) - len(names)
    with torch.no_grad():
        agree(call(images()), copy.deepcopy(model)(images()))
    del holder


def test_a_mapped_checkpoint_is_kept(tmp_path):
    model = _mine("basic")
    _mapped(model, tmp_path)
    call = fr.inference(model, images(), release_weights=True)
    assert {*call.kept.values()} == {"its memory is not PyTorch's: mapped from a file, or NumPy's"}


def test_another_dtype_is_kept():
    model = _mine("basic")
    call = fr.inference(model, images(), dtype=torch.bfloat16, release_weights=True)
    assert {*call.kept.values()} == {"it is torch.float32, and packed as torch.bfloat16"}
    call = fr.inference(model, images(), dtype=torch.float16, release_weights=True)
    assert all(states(model)) and call.kept == {}, "packed as float32"
    with fr.use_backend("reference"):
        call = fr.inference(model, images(), release_weights=True)
    assert len(call.kept) == len(states(model)) and not any(states(model))


def test_two_models_of_the_same_parameters():
    """The other one restores them for both."""
    stock = randomise(tv.resnet18(num_classes=10)).eval()
    with torch.no_grad():
        want = stock(images())
        fused = fr.fuse(stock)
        call = fr.inference(fused, images(), release_weights=True)
        assert all(states(stock)), call.kept
        assert torch.equal(stock(images()), want) and not any(states(fused))
        agree(call(images()), want)


def test_released_again_on_demand(three):
    copied, model, call = three
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(-2.0)
        copied.layer1[0].conv1.weight.mul_(-2.0)
        want = copied(images())
        agree(call(images()), want)
        assert not any(states(model))
        assert call.release(images()) == {} and all(states(model))
        agree(call(images()), want)
    same_state(model, copied)


@pytest.mark.parametrize("check", ["sampled", "full", "none"])
def test_writes_after_a_restore_are_seen(check, monkeypatch):
    monkeypatch.setattr("fused_resnet.fusion.guard._SETTLING_S", 0.0)
    model = _mine("basic")
    call = fr.inference(model, images(), release_weights=True, check=check)
    weight = model.layer2[0].conv1.weight
    weight.detach().numpy()[:] *= -1.5  # restores: another class and address
    with torch.no_grad():
        agree(call(images()), copy.deepcopy(model)(images()))
    weight.detach().numpy()[:] *= -1.5
    if check != "none":
        with torch.no_grad():
            agree(call(images()), copy.deepcopy(model)(images()))
    call(images())  # has compared every byte once more
    weight.detach().numpy()[5, 40, 1, 1] += 50  # where no fingerprint looks
    if check == "full":
        with torch.no_grad():
            agree(call(images()), copy.deepcopy(model)(images()))


def test_forgotten_plans_do_not_lose_weights(three):
    copied, model, _ = three
    fr.refresh(model)
    model.train().eval()
    same_state(model, copied)


def test_threads_restore_while_others_infer(three):
    copied, model, _ = three
    with torch.no_grad():
        want = copied(images())
    found: list[Any] = []

    def infer() -> None:
        with torch.no_grad():
            found.extend(model(images()) for _ in range(3))

    def read() -> None:
        found.extend(p.detach().clone() for p in model.parameters())

    threads = [threading.Thread(target=t) for t in (infer, read, infer, read)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    read_ones = [t for t in found if t.shape != want.shape]
    assert len(found) - len(read_ones) == 6
    for y in found:
        if y.shape == want.shape:
            agree(y, want)
    wanted = [p for p in copied.parameters() if p.shape != want.shape] * 2
    assert sum(t.double().sum().item() for t in read_ones) == pytest.approx(
        sum(t.double().sum().item() for t in wanted), rel=1e-9
    )
    same_state(model, copied)


def test_restored_by_another_thread_on_the_way(three, monkeypatch):
    copied, model, _ = three
    weight = model.conv1.weight
    restored = released_module._restore_in
    monkeypatch.setattr(released_module, "_restore_in", lambda v: restored(v) and 0)
    assert same_bits(weight.clone(), copied.conv1.weight.detach())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore")
def test_a_forked_child_restores(three):
    copied, model, _ = three
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # libgomp's threads do not survive a fork
    lock = threading.Event()
    try:
        with released_module._lock:  # as another thread would hold it
            child = os.fork()
            if child == 0:
                taken = threading.Thread(
                    target=lambda: os._exit(0 if _equal(model, copied) else 1), daemon=True
                )
                taken.start()
                lock.wait(30)
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert all(states(model))
    finally:
        torch.set_num_threads(threads)


def _equal(model: Any, copied: Any) -> bool:
    return all(map(torch.equal, model.parameters(), copied.parameters()))


def test_an_exception_half_way_leaves_a_whole_model(three, monkeypatch):
    copied, model, call = three
    weight = model.layer1[0].conv1.weight
    pairs = weight.__dict__[released_module._PAIRS]

    def failing(t: torch.Tensor) -> Any:
        yield next(iter(pairs(t)))
        raise MemoryError("none left")

    monkeypatch.setitem(weight.__dict__, released_module._PAIRS, failing)
    with pytest.raises(MemoryError):
        model.state_dict()
    assert type(weight) is Released
    weight.__dict__[released_module._PAIRS] = pairs
    same_state(model, copied)
    monkeypatch.undo()

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(released_module, "_same_bits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call.release(images())
    assert not any(states(model))
    same_state(model, copied)


def test_large_transforms_are_dropped():
    """Winograd's of 256 x 256 weights, not those of 128 x 128."""
    model = _mine("basic")
    fr.inference(model, images(), release_weights=True)
    (network,) = (e for e in made_from(model).values() if hasattr(e, "plans"))
    sizes = {
        conv.problem.weight_shape[:2]: conv.tensors[1].nbytes
        for plan in network.plans
        for conv in plan.all_convs
        if conv.problem.weight_shape[2] == 3
    }
    assert sizes[128, 128] == 128 * 128 * 64 and sizes[256, 256] == 0


def test_sharded_weights_are_kept():
    model = _mine("basic")
    model.layer1[0].conv1.__dict__[FSDP] = True
    call = fr.inference(model, images(), release_weights=True)
    assert call.kept["layer1.0.conv1.weight"] == "sharding rewrites it"


def test_peak_memory_of_packing():
    """Weights are released one by one: never are all held twice."""
    model = _mine("bottleneck")
    seen = []
    offered = fr.fusion.inference.release.Releasing.add

    def add(self: Any, *args: Any) -> None:
        offered(self, *args)
        seen.append(sum(states(model)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fr.fusion.inference.release.Releasing, "add", add)
        fr.inference(model, images(), release_weights=True)
    assert seen == list(range(1, len(states(model)) + 1))
