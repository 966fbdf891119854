"""Threads of the CPU ops: one result for any number of them, whoever computes it; errors, forks,
callers at once, and processes that may use one core."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

import fused_resnet as fr
from tests.fusion.training.training_helpers import needs_native

pytestmark = needs_native
LAST = torch.channels_last


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def case(request):
    """A model in eval mode, an image and the output on one thread."""
    torch.manual_seed(0)
    model = getattr(fr, request.param)(weights=None, num_classes=10).eval()
    x = torch.randn(2, 3, 96, 80)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return model, x, model(x)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def parallel_op() -> Tensor:
    """An op of PyTorch's after which its threads spin."""
    return torch.randn(1 << 20) * 2


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("openmp", [False, True])
def test_inference_does_not_depend_on_threads(case, threads, openmp):
    model, x, want = case
    torch.set_num_threads(threads)
    with torch.no_grad():
        for _ in range(5):
            if openmp:
                parallel_op()
            assert torch.equal(model(x), want)


def test_many_callers(case):
    """More callers than there are teams of threads, beside OpenMP's."""
    model, x, want = case
    torch.set_num_threads(2)
    wrong: list[int] = []

    def call(i: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                if i % 3 == 0:
                    parallel_op()
                if not torch.equal(model(x), want):
                    wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(24)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(120)
    assert not any(caller.is_alive() for caller in callers)
    assert wrong == []


def test_number_of_threads_changes(case):
    model, x, want = case
    with torch.no_grad():
        for threads in (2, 1, 4, 2, 5, 3):
            torch.set_num_threads(threads)
            assert torch.equal(model(x), want)


def test_forked_process(case):
    """A process forked after the threads were started has none of them, and starts its own."""
    model, x, want = case
    torch.set_num_threads(2)
    with torch.no_grad():
        assert torch.equal(model(x), want)
    y = torch.ones(64, 512, 9, 9).contiguous(memory_format=LAST)
    weight = torch.ones(300, 512)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # ops of PyTorch on such sizes would wait for OpenMP's threads for ever
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL), signal.alarm(60)  # rather than hang
            sums = torch.ops.fused_resnet_native.mean_linear(y, weight, None)
            os.write(write, b"1" if sums.tolist() == [[512.0] * 300] * 64 else b"0")
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"1"
    assert os.waitpid(pid, 0)[1] == 0
    with torch.no_grad():
        assert torch.equal(model(x), want)


def test_fork_beside_a_thread_in_the_memory_pool():
    """A fork waits for a thread that returns the pool's memory to the system."""
    ops = torch.ops.fused_resnet_native
    x, y = torch.ones(16, 64, 56, 56), torch.ones(1, 16, 1, 1).contiguous(memory_format=LAST)
    weight = torch.ones(4, 16)
    for _ in range(8):
        held = [ops.relayout(x, True) for _ in range(40)]
        del held
        other = threading.Thread(target=fr.release_memory)
        other.start()
        pid = os.fork()
        if pid == 0:
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL), signal.alarm(60)  # rather than hang
                ops.mean_linear(y, weight, None)
            finally:
                os._exit(0)
        other.join()
        assert os.waitpid(pid, 0)[1] == 0


SPAWNED = """
import os, time, torch
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(4)
import fused_resnet as fr
torch.manual_seed(0)
model, x = fr.resnet18(weights=None).eval(), torch.randn(1, 3, 64, 64)
torch.ones(1 << 20).exp().sum()
torch.mm(torch.ones(512, 512), torch.ones(512, 512))
time.sleep(0.1)  # until PyTorch's threads are asleep
tasks = len(os.listdir("/proc/self/task"))
with torch.no_grad():
    y = model(x)
    for _ in range(3):
        assert torch.equal(model(x), y)
    assert len(os.listdir("/proc/self/task")) == tasks
print("one core")
"""


def test_process_on_one_core():
    """With one processor the caller computes alone, however many threads PyTorch was given."""
    run = subprocess.run([sys.executable, "-c", SPAWNED], capture_output=True, text=True)
    assert run.stdout.strip() == "one core", run.stderr


@pytest.mark.parametrize("openmp", [False, True])
def test_error_of_an_op(openmp):
    """An op's error passes through its region with its message; later calls work."""
    torch.set_num_threads(3)
    ops = torch.ops.fused_resnet_native
    x = torch.randn(2, 64, 9, 9).contiguous(memory_format=LAST)
    *tensors, sizes = ops.pack_convolution(
        torch.randn(64, 64, 3, 3), torch.ones(64), torch.zeros(64), [1, 1], [1, 1], [1, 1], 1
    )
    block = tensors, sizes, [0.0], [0, 1], [1, 1, 1, 0, 0] + [0] * 6
    want = ops.block_inference(x.clone(), *block, False)
    for _ in range(3):
        if openmp:
            parallel_op()
        with pytest.raises(
            RuntimeError, match="conv_bn_relu: x must be channels_last, got strides"
        ):
            ops.block_inference(x.contiguous(), *block, False)
        assert torch.equal(ops.block_inference(x.clone(), *block, False), want)


@pytest.mark.parametrize("openmp", [False, True])
def test_subnormals_on_every_thread(openmp):
    """torch.set_flush_denormal is of the calling thread; the others' results are as its own."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormals")
    try:
        ops = torch.ops.fused_resnet_native
        torch.set_flush_denormal(False)
        x = torch.full((4, 64, 64, 64), 1e-39).contiguous(memory_format=LAST)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for flush in (True, False, True):
                if openmp:
                    parallel_op()
                torch.set_flush_denormal(flush)
                y = ops.add_relu(x, x)
                torch.set_flush_denormal(False)
                bits = y.contiguous().view(
                    torch.int32
                )  # OpenMP's threads may flush as they compare
                assert int(bits.count_nonzero()) == (0 if flush else y.numel())
    finally:
        torch.set_flush_denormal(False)
