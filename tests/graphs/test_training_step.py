"""`fr.training_step`: one callable for a training step, with CUDA graphs on a GPU; without a GPU
they are simulated (recorded_steps.py)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR

import fused_resnet as fr
from tests.graphs.recorded_steps import DEVICE, LOG, SETTINGS, module
from tests.models.model_helpers import randomise

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
BIG = 1.5 * 2.0**127  # a loss scale that overflows
loss_of = nn.functional.cross_entropy


@pytest.fixture(params=["family", pytest.param("fuse", marks=pytest.mark.slow)])
def model(request):
    """Of this package, or torchvision's changed by `fuse`."""
    if request.param == "family":
        return randomise(fr.cifar_resnet(8)).train().to(DEVICE)
    resnet = pytest.importorskip("torchvision.models.resnet")
    stock = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    return fr.fuse(randomise(stock).train().to(DEVICE))


def batches(count, n=4, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 3, size, size, generator=generator).to(DEVICE),
         torch.randint(10, (n,), generator=generator).to(DEVICE))
        for _ in range(count)
    ]  # fmt: skip


OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.125, fused=True),
    "momentum": lambda p: SGD(p, lr=0.125, momentum=0.5, dampening=0.25, fused=True),
    "nesterov": lambda p: SGD(
        p, lr=0.125, momentum=0.5, nesterov=True, weight_decay=0.01, fused=True
    ),
    "adamw": lambda p: AdamW(p, lr=2**-9, fused=True, capturable=True),
}


def schedule_of(optimizer):
    return LambdaLR(optimizer, lambda epoch: 0.5 ** (epoch % 3))  # exact in float32


def hand_written(model, optimizer, data, dtype=None, max_norm=None):
    """A hand-written training loop."""
    schedule, losses = schedule_of(optimizer), []
    for x, target in data:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            loss = loss_of(model(x), target)
        loss.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return losses


def stepped(model, optimizer, data, **options):
    step = fr.training_step(model, loss_of, optimizer, **options)
    schedule, losses = schedule_of(optimizer), []
    for x, target in data:
        losses.append(step(x, target))
        schedule.step()
    return losses, step


def same(a, b):
    """Bitwise equal on the CPU; a GPU's order of summation varies."""
    for x, y in zip(a, b, strict=True):
        if DEVICE == "cpu":
            assert torch.equal(x, y)
        else:
            torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3)


def compare(model, kind, data, hand=None, **options):
    """Compares losses, weights, statistics and optimizer state with the hand-written loop's."""
    other = copy.deepcopy(model)
    mine, theirs = (OPTIMIZERS[kind](m.parameters()) for m in (model, other))
    want = hand_written(other, theirs, data, **(hand or {}))
    losses, step = stepped(model, mine, data, **options)
    same(losses, want)
    same(model.state_dict().values(), other.state_dict().values())
    same(*(
        [t for p in m.parameters() for t in o.state[p].values() if t is not None]
        for m, o in ((model, mine), (other, theirs))
    ))  # fmt: skip
    return step


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_eager_steps_equal_the_loop(model, kind):
    step = compare(model, kind, batches(3), cuda_graph=False)
    assert step.reason == "cuda_graph is False" and not step.cuda_graph


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_replayed_steps_equal_the_loop(model, graphs, kind):
    step = compare(model, kind, batches(8))
    assert graphs == [(4, 3, 16, 16)] and step.reason is None and step.cuda_graph
    assert model.bn1.num_batches_tracked == 8


def test_under_autocast_and_clipped(model, graphs):
    how = {"dtype": torch.bfloat16, "max_norm": 0.5}
    step = compare(model, "momentum", batches(6), how, **how)
    assert step.gradient_norm is not None and float(step.gradient_norm) > 0.5


def test_surrounding_autocast_is_used(model, graphs):
    """Its cache of casts is not: the weights would be those of the first step."""
    other = copy.deepcopy(model)
    data, kind = batches(6), OPTIMIZERS["sgd"]
    want = hand_written(other, kind(other.parameters()), data, torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        losses, step = stepped(model, kind(model.parameters()), data)
        assert len(graphs) == 1
    same(losses, want)
    for _ in range(4):  # without autocast another graph is captured
        step(*data[0])
    assert len(graphs) == 2


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_has_its_own_graph(graphs, setting):
    net = nn.Linear(3, 10).to(DEVICE)
    step = fr.training_step(net, loss_of, OPTIMIZERS["sgd"](net.parameters()))
    x, target = torch.randn(2, 3, device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    for _ in range(4):
        step(x, target)
    with SETTINGS[setting]():
        for _ in range(4):
            step(x, target)
    assert len(graphs) == 2


@pytest.mark.skipif(DEVICE == "cuda", reason="the log of simulated graphs")
def test_order_of_capture_and_replay(model, graphs):
    step = fr.training_step(model, loss_of, OPTIMIZERS["sgd"](model.parameters()))
    LOG.clear()
    x, target = batches(1)[0]
    for _ in range(3):
        step(x, target)
    eager = [
        "main waits for the last turn", "side waits for main", "step on side",
        "main waits for side", "main ends its turn",
    ]  # fmt: skip
    assert eager * 3 == LOG
    LOG.clear()
    step(x, target)
    replayed = ["main waits for the last turn", "replay", "main ends its turn"]
    assert [
        "main waits for the last turn", "side waits for main", "record on side", "step on main",
        "recorded", "main ends its turn", *replayed,
    ] == LOG  # fmt: skip
    LOG.clear()
    step(x, target)
    assert replayed == LOG


def test_param_groups_keep_the_users_learning_rates(model, graphs):
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    step = fr.training_step(model, loss_of, optimizer)
    for x, target in batches(5):
        step(x, target)
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert type(optimizer.param_groups[0]["lr"]) is float
    before = model.fc.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    step(*batches(1)[0])
    assert torch.equal(model.fc.weight, before)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.125, device=DEVICE)
    step(*batches(1)[0])
    assert not torch.equal(model.fc.weight, before) and len(graphs) == 1
    before = model.fc.weight.detach().clone()
    optimizer.param_groups[0]["lr"].zero_()
    step(*batches(1)[0])
    assert torch.equal(model.fc.weight, before) and len(graphs) == 1


def test_one_graph_per_shape(model, graphs):
    one, other = batches(10), batches(10, n=2)
    data = [pair for both in zip(one, other, strict=True) for pair in both]
    compare(model, "momentum", data)
    assert graphs == [(4, 3, 16, 16), (2, 3, 16, 16)]


def test_few_graphs_are_kept(model, graphs):
    step = fr.training_step(model, loss_of, OPTIMIZERS["sgd"](model.parameters()))
    for n in (2, 3, 4, 5, 6):
        for _ in range(4):
            step(*batches(1, n=n)[0])
    assert len(step._graphs) == 4 and len(graphs) == 5
    step(*batches(1, n=6)[0])
    assert len(graphs) == 5


def frozen(optimizer, model):
    model.conv1.weight.requires_grad_(False)


CHANGES = {
    "a setting": lambda o, m: o.param_groups[0].update(weight_decay=0.5),
    "loaded state": lambda o, m: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "replaced": lambda o, m: setattr(m.layer2[0].bn1, "bias", nn.Parameter(torch.ones_like(
        m.layer2[0].bn1.bias))),
    "moved": lambda o, m: setattr(m.fc.weight, "data", m.fc.weight.data * 2),
    "frozen": frozen,
    "mode": lambda o, m: m.layer1.eval(),
    "momentum": lambda o, m: setattr(m.bn1, "momentum", 0.5),
    "surgery": lambda o, m: setattr(m, "relu", nn.ReLU()),
    "an added group": lambda o, m: o.add_param_group({"params": [torch.zeros(
        1, device=DEVICE, requires_grad=True)]}),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_captured_again(model, graphs, change):
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    step = fr.training_step(model, loss_of, optimizer)
    data = batches(10)
    for x, target in data[:5]:
        step(x, target)
    assert len(graphs) == 1
    CHANGES[change](optimizer, model)
    other = copy.deepcopy(model)
    theirs = SGD(other.parameters(), lr=1.0, fused=True)
    if change not in ("an added group", "replaced"):  # they add parameters to one model only
        theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        want = []
        for x, target in data[5:]:
            theirs.zero_grad()
            loss = loss_of(other(x), target)
            loss.backward()
            theirs.step()
            want.append(loss.detach())
        same([step(x, target) for x, target in data[5:]], want)
        same(model.state_dict().values(), other.state_dict().values())
    else:
        for x, target in data[5:]:
            step(x, target)
    assert len(graphs) == 2


def test_frozen_weights_changed_in_place(model, graphs):
    """The graph would read values derived from them before capture."""
    for part in (model.conv1, model.bn1):
        part.requires_grad_(False)
    model.bn1.eval()
    optimizer = OPTIMIZERS["sgd"](p for p in model.parameters() if p.requires_grad)
    step = fr.training_step(model, loss_of, optimizer)
    data = batches(10)
    for x, target in data[:5]:
        step(x, target)
    with torch.no_grad():
        model.bn1.running_var.mul_(4)
    for x, target in data[5:]:
        step(x, target)
    assert len(graphs) == 2


def test_restored_weights_are_used(model, graphs):
    """Trained weights may be restored in place, as by load_state_dict, without a new capture."""
    state = copy.deepcopy(model.state_dict())
    step = fr.training_step(model, loss_of, OPTIMIZERS["sgd"](model.parameters()))
    x, target = batches(1)[0]
    losses = [step(x, target) for _ in range(5)]
    model.load_state_dict(state)
    same([step(x, target)], losses[:1])
    assert len(graphs) == 1


@pytest.mark.parametrize("switched", [False, True], ids=["always in eval", "train and eval"])
def test_evaluation_between_replays_sees_new_weights(model, graphs, switched):
    """train() and eval() drop packed weights; a step in eval mode, with frozen norms, does not."""
    model.train(switched)
    step = fr.training_step(model, loss_of, OPTIMIZERS["sgd"](model.parameters()))
    data = batches(9)
    for x, target in data[:5]:
        step(x, target)
    for x, target in data[5:]:
        if switched:
            model.eval()
        with torch.no_grad():
            for _ in range(2):  # packed weights are cached from the second call
                y = model(x)
            want = copy.deepcopy(model)(x)
        assert torch.equal(y, want)
        if switched:
            model.train()
        versions = [p._version for p in model.parameters()]
        step(x, target)  # on a GPU, without fingerprints, the versions alone show it
        assert all(p._version > was for p, was in zip(model.parameters(), versions, strict=True))
    assert len(graphs) == 1


def test_gradients_are_dropped_before_and_after_a_step(model, graphs):
    step = fr.training_step(model, loss_of, OPTIMIZERS["sgd"](model.parameters()))
    other = copy.deepcopy(model)
    data = batches(5)
    want = hand_written(other, SGD(other.parameters(), lr=0.125, fused=True), data[:1])
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    same([step(*data[0])], want)
    same(model.parameters(), other.parameters())
    for x, target in data[1:]:
        step(x, target)
        assert all(p.grad is None for p in model.parameters())


def test_losses_are_new_memory(model, graphs):
    step = fr.training_step(model, loss_of, OPTIMIZERS["sgd"](model.parameters()), max_norm=1.0)
    results = [(step(x, t), step.gradient_norm) for x, t in batches(7)]
    assert not any(loss.requires_grad for loss, _ in results)
    assert len({float(loss) for loss, _ in results}) == 7
    assert len({float(norm) for _, norm in results}) == 7


def test_random_numbers_of_the_host_prevent_capture(graphs):
    net = fr.cifar_resnet(8, stochastic_depth=0.5).to(DEVICE).train()
    step = fr.training_step(net, loss_of, OPTIMIZERS["sgd"](net.parameters()))
    for x, target in batches(12):
        step(x, target)
    assert not graphs and "random numbers on the host" in step.reason


def hooked(model, optimizer, seen):
    return model.fc.register_forward_hook(lambda *_: seen.append(1))


def step_hooked(model, optimizer, seen):
    return optimizer.register_step_post_hook(lambda *_: seen.append(1))


def tensor_hooked(model, optimizer, seen):
    return model.fc.weight.register_hook(lambda g: seen.append(1))


def accumulated(model, optimizer, seen):
    return model.fc.weight.register_post_accumulate_grad_hook(lambda p: seen.append(1))


@pytest.mark.parametrize("kind", [hooked, step_hooked, tensor_hooked, accumulated])
def test_hooks_run(model, graphs, kind):
    optimizer, seen, data = OPTIMIZERS["sgd"](model.parameters()), [], batches(6)
    step = fr.training_step(model, loss_of, optimizer)
    for x, target in data[:4]:
        step(x, target)
    handle = kind(model, optimizer, seen)
    for x, target in data:
        step(x, target)
    assert len(seen) == 6 and "hooks" in step.reason and len(graphs) == 1
    handle.remove()
    for x, target in data:
        step(x, target)
    assert len(seen) == 6 and step.reason is None


def test_norms_without_a_momentum_prevent_capture(model, graphs):
    model.bn1.momentum = None
    step = compare(model, "sgd", batches(6))
    assert not graphs and "without a momentum" in step.reason


def test_a_dispatch_mode_sees_every_step(model, graphs):
    from torch.utils.flop_counter import FlopCounterMode

    step = fr.training_step(model, loss_of, OPTIMIZERS["sgd"](model.parameters()))
    x, target = batches(1)[0]
    for _ in range(5):
        step(x, target)
    with FlopCounterMode(display=False) as counter:
        step(x, target)
    assert counter.get_total_flops() > 0 and len(graphs) == 1


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
@pytest.mark.parametrize("bad_at", [0, 2, 6])
def test_nonfinite_steps_are_skipped(model, graphs, kind, bad_at):
    data = batches(8)
    other = copy.deepcopy(model)
    optimizer = OPTIMIZERS[kind](model.parameters())
    step = fr.training_step(model, loss_of, optimizer, skip_nonfinite=True)
    for i, (x, target) in enumerate(data):
        if i != bad_at:
            assert torch.isfinite(step(x, target))
            continue
        before = [p.detach().clone() for p in model.parameters()]
        buffers = [b.clone() for b in model.buffers()]
        assert not torch.isfinite(step(torch.full_like(x, float("nan")), target))
        assert not torch.isfinite(step.gradient_norm)
        assert all(map(torch.equal, model.parameters(), before))
        for b, old in zip(model.buffers(), buffers, strict=True):
            b.copy_(old)
    theirs = OPTIMIZERS[kind](other.parameters())
    for i, (x, target) in enumerate(data):
        if i != bad_at:
            theirs.zero_grad()
            loss_of(other(x), target).backward()
            theirs.step()
    same(model.state_dict().values(), other.state_dict().values())
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_a_scaler(model, graphs, kind):
    """The first scales overflow: steps are skipped and the scale decreases, as in a plain loop."""
    data = batches(9)
    other = copy.deepcopy(model)
    scales = []

    def loss(y, target):
        return 4 * (loss_of(y, target) / 4)  # its gradient overflows

    for m, by_hand in ((model, False), (other, True)):
        optimizer = OPTIMIZERS[kind](m.parameters())
        scaler = torch.amp.GradScaler(DEVICE, init_scale=BIG, growth_interval=3)
        step = fr.training_step(m, loss, optimizer, scaler=scaler)
        for i, (x, target) in enumerate(data):
            if i == 1:
                scaler.update(2.0**4)
            if i == 6:
                scaler.update(BIG)
            if not by_hand:
                step(x, target)
            else:
                optimizer.zero_grad()
                scaler.scale(loss(m(x), target)).backward()
                scaler.unscale_(optimizer)
                bad = any(map(bool, scaler._found_inf_per_device(optimizer).values()))
                if not bad:
                    scaler.step(optimizer)
                scaler.update()
            scales.append(scaler.get_scale())
    assert scales[:9] == scales[9:] and scales[0] == scales[6] == BIG / 2 and len(graphs) == 1
    same(model.state_dict().values(), other.state_dict().values())


def test_a_schedule_of_momentum_is_never_replayed(model, graphs):
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    step = fr.training_step(model, loss_of, optimizer)
    for i, (x, target) in enumerate(batches(9)):
        optimizer.param_groups[0]["momentum"] = 0.5 + i / 64
        step(x, target)
    assert not graphs


def test_failed_capture_raises(model, graphs, monkeypatch):
    step = fr.training_step(model, loss_of, OPTIMIZERS["sgd"](model.parameters()))
    x, target = batches(1)[0]
    for _ in range(3):
        step(x, target)

    def refuse(self, *_):
        raise RuntimeError("operation not permitted when stream is capturing")

    with monkeypatch.context() as patched:
        patched.setattr(module.TrainingStep, "_update", refuse)
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            step(x, target)
    assert all(p.grad is None for p in model.parameters())
    assert type(step.optimizer.param_groups[0]["lr"]) is float
    for _ in range(4):
        step(x, target)
    assert len(graphs) == 2


def test_unsupported_optimizers(model, graphs):
    params = list(model.parameters())

    def refused(optimizer, match, **options):
        with pytest.raises(ValueError, match=match):
            fr.training_step(model, loss_of, optimizer, cuda_graph=True, **options)
        step = fr.training_step(model, loss_of, optimizer, **options)
        assert not step.cuda_graph and step.reason
        return step

    step = refused(SGD(params, lr=0.1), r"stays on the GPU: SGD\(..., fused=True\)")
    step(*batches(1)[0])
    refused(Adam(params), r"needs Adam\(..., capturable=True\)")
    scaler = torch.amp.GradScaler(DEVICE)
    capturable = Adam(params)
    capturable.param_groups[0]["capturable"] = True
    assert fr.training_step(model, loss_of, capturable).cuda_graph
    refused(capturable, r"needs Adam\(..., fused=True\), which can", scaler=scaler)
    refused(capturable, r"needs Adam\(..., fused=True\), which can", skip_nonfinite=True)


def test_errors(model):
    with pytest.raises(ValueError, match="training_step: dtype must be float16, bfloat16 or None"):
        fr.training_step(model, loss_of, SGD(model.parameters()), dtype=torch.float64)
    cpu = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="training_step: cuda_graph needs a GPU, the parameters"):
        fr.training_step(cpu, loss_of, SGD(cpu.parameters()), cuda_graph=True)
    step = fr.training_step(cpu, loss_of, SGD(cpu.parameters()))
    assert step.reason == "needs a GPU, the parameters are on cpu"


@needs_gpu
@pytest.mark.gpu
def test_inputs_from_the_host(model):
    """Pinned or pageable, on any stream."""
    other, data = copy.deepcopy(model), batches(8)
    want = hand_written(other, OPTIMIZERS["sgd"](other.parameters()), data)
    step = fr.training_step(model, loss_of, OPTIMIZERS["sgd"](model.parameters()))
    schedule, streams = schedule_of(step.optimizer), [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    losses = []
    for i, (x, target) in enumerate(data):
        x, target = x.cpu(), target.cpu()
        with torch.cuda.stream(streams[i % 3]):
            losses.append(step(x.pin_memory() if i % 2 else x, target))
        schedule.step()
    torch.cuda.synchronize()
    same(losses, want)


@needs_gpu
@pytest.mark.gpu
def test_dropout_draws_new_masks(graphs):
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 10)).to(DEVICE)
    step = fr.training_step(net, loss_of, SGD(net.parameters(), lr=0.0, fused=True))
    x, target = torch.randn(8, 64, device=DEVICE), torch.zeros(8, dtype=torch.int64, device=DEVICE)
    losses = {float(step(x, target)) for _ in range(8)}
    assert len(losses) == 8 and len(graphs) == 1
