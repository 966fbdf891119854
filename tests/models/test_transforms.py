"""Tracing, compiling, exporting and torch.func use torchvision's operations and are correct."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint_sequential, set_checkpoint_early_stop

from tests.models.model_helpers import agree, both_ways, images, pair, same_outputs


@pytest.fixture(params=["basic", "bottleneck"])
def nets(request):
    stock, mine = pair(request.param)
    same_outputs(stock, mine, images())  # plans exist
    return stock, mine


@both_ways
def test_torchscript(nets, tmp_path):
    stock, mine = nets
    x = images()
    with torch.no_grad():
        want = stock(x)
        for module in (torch.jit.script(mine), torch.jit.trace(mine, x)):
            agree(module(x), want)
            torch.jit.save(module, tmp_path / "model.pt")
            agree(torch.jit.load(tmp_path / "model.pt")(x), want)
            agree(torch.jit.freeze(module)(x), want)


@both_ways
def test_fx_graphs_are_torchvisions(nets):
    stock, mine = nets
    theirs, ours = (torch.fx.symbolic_trace(m) for m in (stock, mine))
    assert [(n.op, str(n.target)) for n in ours.graph.nodes] == [
        (n.op, str(n.target)) for n in theirs.graph.nodes
    ]
    same_outputs(theirs, ours, images())


@both_ways
@pytest.mark.parametrize("strict", [False, True])
def test_export(nets, strict):
    stock, mine = nets
    programs = [torch.export.export(m, (images(),), strict=strict) for m in (stock, mine)]
    ops = [[n.target for n in p.graph.nodes if n.op == "call_function"] for p in programs]
    assert ops[0] == ops[1]
    with torch.no_grad():
        agree(programs[1].module()(images()), stock(images()))


@both_ways
def test_compile_as_one_graph(nets):
    stock, mine = nets
    with torch.no_grad():
        compiled = torch.compile(mine, backend="eager", fullgraph=True)
        agree(compiled(images()), stock(images()))
    stock.train(), mine.train()
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    y = compiled(images())
    y.sum().backward()
    agree(y.detach(), stock(images()).detach())


@both_ways
def test_inductor():
    stock, mine = pair("basic")
    mine.layer2 = mine.layer3 = mine.layer4 = torch.nn.Sequential()
    stock.layer2 = stock.layer3 = stock.layer4 = torch.nn.Sequential()
    stock.fc = mine.fc = torch.nn.Identity()
    with torch.no_grad():
        agree(torch.compile(mine)(images()), stock(images()))


@both_ways
def test_function_transforms(nets):
    stock, mine = nets
    x = images(3)
    parameters = {k: v.detach() for k, v in mine.named_parameters()}
    buffers = dict(mine.named_buffers())

    def loss(model):
        def of(parameters, image):
            y = functional_call(model, (parameters, buffers), image[None])
            return y.square().sum()

        return of

    with torch.no_grad():
        doubled = {k: v * 2 if k == "fc.bias" else v for k, v in parameters.items()}
        agree(functional_call(mine, doubled, x), functional_call(stock, doubled, x))
        agree(vmap(mine)(x[:, None]).squeeze(1), stock(x))
    per_sample = [vmap(grad(loss(m)), (None, 0))(parameters, x) for m in (stock, mine)]
    for key, want in per_sample[0].items():
        assert (per_sample[1][key] - want).norm() <= 0.05 * want.norm() + 1e-4, key
    (want, dwant), (got, dgot) = (jvp(m, (x,), (images(3, seed=4),)) for m in (stock, mine))
    agree(got.detach(), want.detach())
    agree(dgot.detach(), dwant.detach(), 1e-3)


@both_ways
def test_ensembles(nets):
    _, mine = nets
    stacked = stack_module_state([mine, mine])
    y = vmap(lambda p, b, x: functional_call(mine, (p, b), x), (0, 0, None))(*stacked, images())
    with torch.no_grad():
        agree(y[1].detach(), mine(images()))


def test_activation_checkpointing(nets):
    stock, mine = nets
    gradients = []
    for model in (stock.train(), mine.train()):
        stages = torch.nn.Sequential(model.layer1, model.layer2, model.layer3)
        x = torch.randn(2, 64, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        if model is stock:  # which would update running statistics twice
            stages(x).square().mean().backward()
        else:
            with set_checkpoint_early_stop(False):
                checkpoint_sequential(stages, 3, x, use_reentrant=False).square().mean().backward()
        gradients.append(x.grad)
    assert (gradients[1] - gradients[0]).norm() <= 0.05 * gradients[0].norm()
    for p, q in zip(stock.buffers(), mine.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5)


@both_ways
def test_inference_mode(nets):
    stock, mine = nets
    with torch.inference_mode():
        y = mine(images())
        agree(y.clone(), stock(images()).clone())
        assert y.is_inference()
    same_outputs(stock, mine, images())
