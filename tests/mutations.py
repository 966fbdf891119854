"""Breaks the code on purpose, one line at a time, and expects the tests to notice.

    python tests/mutations.py [-k NAME] [--native] [--cuda]

Each mutation is made in a copy of the package in a temporary folder; the working tree is never
touched. Exit status 1 when one survives. `--native` adds the C++ ones, each of which is a build;
`--cuda` those of the CUDA kernels, which run in the emulator: their own sources are compiled.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from cuda_mutations import CUDA

ROOT = Path(__file__).parent.parent


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # arguments to pytest


STALE, BLOCKS = "tests/test_stale.py", "tests/test_blocks.py"
FAULTS, CONV = "tests/test_model_faults.py", "tests/test_conv_bn_relu.py"
BN, ADD, NATIVE = "tests/test_bn_add_relu.py", "tests/test_add_relu.py", "tests/test_native.py"
PLANS, STRUCTURE = "fused_resnet/plans.py", "fused_resnet/structure.py"
TRAINING, KERNELS_PY = "fused_resnet/training.py", "fused_resnet/train_kernels.py"
MEMORY, SYNC = "fused_resnet/activation_memory.py", "fused_resnet/sync_batch_norm.py"
STEP, LEVELS = "tests/test_training.py", "tests/test_activation_memory.py"
CONVOLUTIONS, PROCESSES = "tests/test_train_convolution.py", "tests/test_sync_batch_norm.py"
LOOP, DATA = "fused_resnet/train/loop.py", "fused_resnet/train/data.py"
SHARED, LEARNING = "fused_resnet/train/distributed.py", "tests/test_train.py"
TOGETHER = "tests/test_train_distributed.py"
OPS, BLOCKS_PY = "fused_resnet/ops.py", "fused_resnet/blocks.py"
CIFAR, CIFAR_PY = "tests/test_cifar.py", "fused_resnet/cifar.py"
PREACT = "fused_resnet/preact_training.py"
SHORTCUT, PROFILES = "fused_resnet/shortcut.py", "fused_resnet/depth/profiles.py"
EXPERIMENT, DEPTH_REPORT = "fused_resnet/depth/experiment.py", "fused_resnet/depth/report.py"
DEPTH, LOOKS = "tests/test_depth.py", "tests/test_depth_profiles.py"

PYTHON = [
    Mutation("cifar: preact's identity gradient dropped", PREACT,
             'return added.add_(dy) if spec.shortcut == "identity" else added', "return added",
             f"{STEP} -k against_float64"),
    Mutation("cifar: shared activation not shared", PREACT, "inner[0] if spec.shared else x", "x",
             f"{CIFAR} -k papers_formula"),
    Mutation("cifar: padding in front", SHORTCUT, "y[:, : x.shape[1]] = some",
             "y[:, -x.shape[1] :] = some", f"{CIFAR} -k papers_formula"),
    Mutation("cifar: padding's gradient dropped", SHORTCUT,
             "dx[:, :, ::stride, ::stride] += dy[:, : dx.shape[1]]", "pass",
             f"{STEP} -k against_float64"),
    Mutation("cifar: padding's gradient of the wrong channels", SHORTCUT, "dy[:, : dx.shape[1]]",
             "dy[:, -dx.shape[1] :]", f"{STEP} -k against_float64"),
    Mutation("cifar: norms folded into the wrong convolution", PLANS,
             "for _, bn in parts.main[1:]] + [None, None]", "for _, bn in parts.main] + [None]",
             f"{CIFAR} -k papers_formula"),
    Mutation("cifar: survivors not scaled", BLOCKS_PY, "tensors[i] = tensors[i] / survival", "pass",
             f"{CIFAR} -k costs_nothing"),
    Mutation("cifar: survival one block late", CIFAR_PY, "(i + 1) / len(every)", "i / len(every)",
             f"{CIFAR} -k survival"),
    Mutation("cifar: a skipped projection counted twice", CIFAR_PY,
             "y = blocks.run_projection(self, structure.BASIC, x)", "y = None",
             f"{CIFAR} -k costs_nothing"),
    Mutation("cifar: a plain network with shortcuts", CIFAR_PY, "[shortcut == \"none\"]", "[0]",
             f"{CIFAR} -k papers_formula"),
    Mutation("depth: the classifier among the layers", DEPTH_REPORT,
             "convolutions = gradients[:-1]", "convolutions = gradients",
             f"{DEPTH} -k classifier"),
    Mutation("depth: finished parts made again", EXPERIMENT, "if not file.exists():", "if True:",
             f"{DEPTH} -k goes_on"),
    Mutation("depth: weights left where they were moved", PROFILES,
             "            p.copy_(w)\n", "            pass\n", f"{LOOKS} -k direction"),
    Mutation("depth: running statistics left changed", PROFILES, "b.copy_(was)", "pass", LOOKS),
    Mutation("depth: divergence an error of no steps", EXPERIMENT,
             'curve["diverged"] = steps.taken', "pass", f"{DEPTH} -k divergence"),
    Mutation("training: shortcut's gradient dropped", TRAINING,
             'dx = g if spec.shortcut == "identity" and self.need_x else None', "dx = None",
             f"{STEP} -k against_float64"),
    Mutation("training: projection's gradient dropped", TRAINING,
             "if branch is not None and self.need_x:", "if False:",
             f"{STEP} -k against_float64"),
    Mutation("training: a block's end masked by its own norm", TRAINING,
             'alone=spec.shortcut == "none"', "alone=True", f"{STEP} -k only_what"),
    Mutation("training: gradients nobody asked for", TRAINING,
             "            if self.needs[3 * i]:", "            if True:", f"{STEP} -k only_what"),
    Mutation("training: second derivatives dropped", TRAINING,
             "if torch.is_grad_enabled():\n            needs = ctx.needs_input_grad[2:]\n"
             "            return None, None, *d", "if False:\n            return None, None, *d",
             f"{STEP} -k double_backward"),
    Mutation("training: recomputed without its ReLU", TRAINING,
             "self.normed(i - 1), None, relu=True)", "self.normed(i - 1), None, relu=False)",
             f"{LEVELS} -k last_bit"),
    Mutation("training: widening convolution kept", TRAINING,
             "found[last] = pointwise and last > 0", "found[last] = False",
             f"{LEVELS} -k saves_less"),
    Mutation("training: variance not unbiased", KERNELS_PY,
             "state[1] * (count / (count - 1))", "state[1]", f"{STEP} -k running"),
    Mutation("training: nobody told of updated statistics", KERNELS_PY,
             "torch.autograd.graph.increment_version(running)", "pass", f"{STEP} -k versions"),
    Mutation("training: strided pixels' gradient overwritten", KERNELS_PY,
             "dx = torch.zeros_like(x) if added is None else added", "dx = torch.zeros_like(x)",
             f"{CONVOLUTIONS} -k added"),
    Mutation("training: momentum None ignored", BLOCKS_PY,
             "momentum = 1.0 / float(bn.num_batches_tracked)", "momentum = 0.1",
             f"{STEP} -k running"),
    Mutation("training: statistics counted twice", BLOCKS_PY,
             " or activation_memory.recomputing():", ":", f"{LEVELS} -k counted_once"),
    Mutation("training: segments of changed weights", MEMORY,
             "self._made.check()", "pass", f"{LEVELS} -k changed"),
    Mutation("training: synchronised norms counted twice", BLOCKS_PY,
             "(whole or type(bn) is nn.BatchNorm2d)", "True", f"{LEVELS} -k another_path"),
    Mutation("training: blocks outside segments keep all", TRAINING,
             'found = [spec.level == "minimal"]', "found = [False]", f"{LEVELS} -k something_else"),
    Mutation("training: blocks in segments run three times", MEMORY,
             "token = _in_segment.set(True)", "token = _in_segment.set(False)",
             f"{LEVELS} -k segment_runs"),
    Mutation("training: segments run twice past hooks", "fused_resnet/network.py",
             "if whole is None or not blocks.counts_once(whole[0], x):",
             "whole = whole or ([], [])\n    if False:", f"{LEVELS} -k twice_would_show"),
    Mutation("training: one segment for all blocks", MEMORY,
             "return math.ceil(math.sqrt(blocks / 2))", "return 1", f"{LEVELS} -k segments"),
    Mutation("sync: counts ignored", SYNC, "off * (n / total)", "off / len(gathered)",
             f"{PROCESSES} -k merging"),
    Mutation("sync: means of different processes taken as one", SYNC,
             " + off.square() * (n * (total - n) / total)", "", f"{PROCESSES} -k merging"),
    Mutation("sync: sums of one process alone", KERNELS_PY,
             "sums if norm.group is None else sync_batch_norm.reduce(sums, norm.group)", "sums",
             f"{PROCESSES} -k one_process"),
    Mutation("sync: by itself of one process", SYNC,
             "(mean, variance), total = merge(own, count, group_of(self))",
             "(mean, variance), total = own, count", f"{PROCESSES} -k by_itself"),
    Mutation("processes: norms of one's own part", SHARED,
             "return t.full_tensor() if isinstance(t, DTensor) else t", "return _own(t)",
             f"{TOGETHER} -k lamb"),
    Mutation("processes: one's own part written", SHARED,
             "full = value.full_tensor()", "full = value.to_local()", f"{TOGETHER} -k as_one"),
    Mutation("processes: each tests its own statistics", SHARED, "dist.broadcast(b, 0)", "pass",
             f"{TOGETHER} -k firsts"),
    Mutation("processes: each tells of its own gradients", SHARED, "return found if alone else",
             "return found if True else", f"{TOGETHER} -k told_by_all"),
    Mutation("processes: each tells of its own layers", LOOP,
             "if self.processes > 1:  # a process", "if False:  # a process",
             f"{TOGETHER} -k told_by_all"),
    Mutation("processes: gradients kept whole", SHARED, "    fully_shard(model, mesh=mesh)",
             "    pass", f"{TOGETHER} -k its_part"),
    Mutation("learning: a neighbour counts twice", DATA,
             "range(len(self._source) if self._replaced else 1)", "range(len(self._source))",
             f"{LEARNING} -k unreadable"),
    Mutation("learning: everybody's random numbers", DATA,
             "generator=torch.Generator().manual_seed(seed),", "", f"{LEARNING} -k nobodys"),
    Mutation("FSDP's weights kept by blocks", PLANS,
             "if not keepable(plan.weight) or any(is_fsdps(conv) for conv, _ in parts.pairs):",
             "if not keepable(plan.weight):", f"{STALE} -k fsdp"),
    Mutation("FSDP's weights kept by networks", "fused_resnet/network.py",
             " or any(is_fsdps(conv) for conv, _ in whole.pairs):", ":", f"{STALE} -k fsdp"),
    Mutation("FSDP's norms kept", BLOCKS_PY, " and not is_fsdps(bn):", ":", f"{STALE} -k fsdp"),
    Mutation("eps left out of the fold", PLANS, "bn.running_var.to(dtype) + bn.eps",
             "bn.running_var.to(dtype)", f"{BLOCKS} -k eps"),
    Mutation("mean left out of the fold", PLANS, "mean = bn.running_mean.to(dtype)",
             "mean = bn.running_mean.to(dtype) * 0", f"{BLOCKS} -k every_convolution"),
    Mutation("convolution's bias left out", PLANS, "conv.bias.to(dtype) - mean",
             "-mean", f"{BLOCKS} -k bias"),
    Mutation("residual dropped", PLANS, "run(y, residual, True, overwrite=owned)",
             "run(y, None, True)", f"{BLOCKS} -k every_convolution"),
    Mutation("downsample skipped", PLANS, "if self.downsample is not None:",
             "if False:", f"{BLOCKS} -k every_convolution"),
    Mutation("input overwritten", BLOCKS_PY, "inner.data_ptr() != x.data_ptr()",
             "True", f"{FAULTS} -k edited"),
    Mutation("output left in the compute dtype", BLOCKS_PY,
             "y.to(outer).contiguous", "y.contiguous",
             f"{STALE} -k another_dtype tests/test_resnet.py -k autocast"),
    Mutation("sizes not checked", PLANS, "and branch != shapes[-1]:", "and False:",
             f"{BLOCKS} -k broadcasts"),
    Mutation("norms of any dtype taken", PLANS,
             "t is None or t.dtype in (dtype, torch.float32)", "True", f"{FAULTS} -k float64"),
    Mutation("training does not drop plans", "fused_resnet/resnet.py", "plans.forget(self)",
             "pass", STALE),
    Mutation("versions not watched", STRUCTURE,
             "and list(map(_version, self._tensors)) == self._versions", "", STALE),
    Mutation("addresses not watched", STRUCTURE,
             "and list(map(Tensor.data_ptr, self._tensors)) == self._addresses", "", STALE),
    Mutation("parameters' identity not watched", STRUCTURE,
             "all(map(is_, map(getitem, self._slots, self._keys), self._values))", "True", STALE),
    Mutation("modules' identity not watched", STRUCTURE,
             "and all(map(is_, map(dict.get, self._homes, self._names), self._parts))", "",
             f"{STALE} {BLOCKS}"),
    Mutation("classes not watched", STRUCTURE,
             "and list(map(type, self._modules)) == self._types", "", STALE),
    Mutation("hooks not watched", STRUCTURE, "and not any(self._hooks)", "", f"{BLOCKS} -k hooks"),
    Mutation("replaced forwards not watched", STRUCTURE,
             'and not any(map(contains, self._dicts, repeat("forward")))', "",
             f"{BLOCKS} -k replaced"),
    Mutation("convolutions' settings not watched", STRUCTURE,
             "and list(map(_conv_state, self._convs)) == self._conv_states", "", STALE),
    Mutation("norms' settings not watched", STRUCTURE,
             "and list(map(_bn_state, self._bns)) == self._bn_states", "", STALE),
    Mutation("added modules not watched", STRUCTURE,
             "and list(map(len, self._children)) == self._counts", "", f"{BLOCKS} -k extended"),
    Mutation("global hooks ignored", BLOCKS_PY, "if any(_GLOBAL_HOOKS):", "if False:",
             f"{BLOCKS} -k global"),
    Mutation("transforms ignored", BLOCKS_PY, "if ops.in_transform():", "if False:",
             "tests/test_model_transforms.py"),
    Mutation("gradients not wanted", BLOCKS_PY, "if not torch.is_grad_enabled():", "if True:",
             f"{BLOCKS} -k fine_tuning"),
    Mutation("training mode ignored", STRUCTURE, "return bn.training or", "return", STALE),
    Mutation("momentum the wrong way round", KERNELS_PY,
             "* (1 - momentum) + now * momentum", "* momentum + now * (1 - momentum)",
             f"{BLOCKS} -k every_norm"),
    Mutation("batches not counted", BLOCKS_PY, "bn.num_batches_tracked.add_(1)", "pass",
             f"{BLOCKS} -k every_norm"),
    Mutation("residual forgotten in training", BLOCKS_PY,
             "ops.bn_add_relu(x, bn.weight, bn.bias, residual, bn.eps, relu)",
             "ops.bn_add_relu(x, bn.weight, bn.bias, None, bn.eps, relu)",
             f"{BLOCKS} -k every_norm"),
    Mutation("NaN let into oneDNN's ReLU", OPS,
             "if not conv.bound(convolution.max_abs(x)) + added <= convolution.BOUND_LIMIT:",
             "if False:", f"{CONV} -k special_values"),
    Mutation("packed weights kept too long", "fused_resnet/convolution.py",
             "state = (weight._version, weight.data_ptr(), kind, dtype, geometry)",
             "state = (kind, dtype, geometry)", f"{CONV} -k stale"),
    Mutation("stride and padding exchanged", "fused_resnet/native_conv.py",
             "[*taps, *self.stride, *pad, *dilate", "[*taps, *pad, *self.stride, *dilate",
             f"{CONV} -k integers"),
    Mutation("an odd run's last weight whole", "fused_resnet/native_conv.py",
             "weight[:, -1:] / 2, weight[:, -1:] / 2", "weight[:, -1:], weight[:, -1:]",
             f"{CONV} -k integers"),
    Mutation("an odd run's last value beside a zero", "fused_resnet/native_conv.py",
             "weight[:, -1:] / 2, weight[:, -1:] / 2", "weight[:, -1:], weight[:, -1:] * 0",
             f"{CONV} -k special"),
    Mutation("a group's channels off by one", "fused_resnet/native_conv.py",
             "_padded(group * C_per_group, 0", "_padded(group * C_per_group + 1, 0",
             f"{CONV} -k integers"),
    Mutation("no mask in conv_bn_relu's backward", OPS,
             "g = torch.ops.fused_resnet.add_relu_backward(dy, y) if ctx.relu else dy\n    rest",
             "g = dy\n    rest", f"{CONV} -k gradients"),
    Mutation("scale left out of dweight", OPS, "dweight = (raw * gain)", "dweight = (raw)",
             f"{CONV} -k gradients"),
    Mutation("dshift of the unmasked gradient", OPS, "dshift = g.sum", "dshift = dy.sum",
             f"{CONV} -k gradients"),
    Mutation("no residual gradient without a ReLU", OPS,
             "(dresidual if masked else dy) if need_residual", "(dresidual) if need_residual",
             f"{BN} -k left_out"),
    Mutation("second derivative without the mask", OPS,
             "return torch.ops.fused_resnet.add_relu_backward(ddx, ctx.saved_tensors[0]), None",
             "return ddx, None", f"{ADD} {BN} -k second"),
]  # fmt: skip

# The Triton kernels, run in the interpreter.
TCONV, TBN = (
    "fused_resnet/triton_kernels/convolution.py",
    "fused_resnet/triton_kernels/batch_norm.py",
)
TBACK, TCONFIG = "fused_resnet/triton_kernels/backward.py", "fused_resnet/triton_kernels/configs.py"
TADD = "fused_resnet/triton_kernels/elementwise.py"
TRITON = "tests/test_triton.py"
PYTHON += [
    Mutation("triton: eps = 0", TBN, "1.0 / tl.sqrt(var + EPS)", "1.0 / tl.sqrt(var)",
             f"{BN} -k triton"),
    Mutation("triton: eps = 0 in backward", TBN, "other=1) + EPS)", "other=1))", f"{BN} -k triton"),
    Mutation("triton: residual dropped by batch norm", TBN,
             "y += widened(tl.load(residual_ptr + at, mask=inside, other=0), ACC)", "y += 0.0",
             f"{BN} -k triton"),
    Mutation("triton: centre left out", TBN, "y -= _channel(folded_ptr, c, C, CHANNELS_LAST)",
             "y -= 0.0", f"{BN} -k triton"),
    Mutation("triton: places not merged about the mean", TBN,
             "squares += _of_pixels(count, CHANNELS_LAST) * (apart * apart)", "squares += 0.0",
             f"{BN} -k triton"),
    Mutation("triton: parts not merged about the mean", TBN,
             "within + n[:, None] * apart * apart", "within", f"{BN} -k triton"),
    Mutation("triton: last part counted whole", TBN,
             "tl.minimum(tl.maximum(M - part * pixels_per_part, 0), pixels_per_part).to(ACC)",
             "tl.full((BLOCK_P,), 1, ACC) * pixels_per_part", f"{BN} -k triton"),
    Mutation("triton: mask skipped in batch norm's backward", TBN,
             "g = tl.where(widened(tl.load(y_ptr + at, mask=inside, other=0), ACC) <= 0, 0.0, g)",
             "g = g", f"{BN} -k triton"),
    Mutation("triton: a channel not stored", TBN, "mean_ptr + c, centre + offset, mask=in_c)",
             "mean_ptr + c, centre + offset, mask=in_c & (c != 1))", f"{BN} -k triton"),
    Mutation("triton: mask skipped in add_relu's backward", TADD, "tl.where(y <= 0, 0.0, dy)", "dy",
             f"{ADD} -k triton"),
    Mutation("triton: NaN killed by ReLU", TADD, "tl.where(total < 0, 0.0, total)",
             "tl.where(total > 0, total, 0.0)", f"{ADD} -k triton"),
    Mutation("triton: residual dropped by the convolution", TCONV,
             "y += widened(tl.load(residual_ptr + at, mask=inside, other=0.0), tl.float32)",
             "y += 0.0", f"{CONV} -k triton"),
    Mutation("triton: wrong stride", TCONV, "w0 = q * stride_w - pad_w",
             "w0 = q * stride_h - pad_w", f"{CONV} -k triton"),
    Mutation("triton: dilation left out", TCONV, "w = w0 + s * dilation_w", "w = w0 + s",
             f"{CONV} -k triton"),
    Mutation("triton: right half of a tile misplaced", TCONV, "first_k + BLOCK_N // 2", "first_k",
             f"{CONV} -k triton"),
    Mutation("triton: groups see each other's NaN", TCONV,
             "if tl.max(tl.max(unsure.to(tl.int32), 1), 0) > 0:", "if False:",
             f"{TRITON} -k group"),
    Mutation("triton: last split dropped", TCONV, "for split in range(splits):",
             "for split in range(splits - 1):", f"{TRITON} -k every_tile"),
    Mutation("triton: persistent programs stop early", TCONV,
             "tiles_m * tiles_n, tl.num_programs(0))", "tiles_m * tiles_n - 1, tl.num_programs(0))",
             f"{TRITON} -k every_tile"),
    Mutation("triton: taps not flipped", TBACK, "turned[:, :, rows, columns].flip(2, 3)",
             "turned[:, :, rows, columns]", f"{CONV} -k gradients"),
    Mutation("triton: weight's gradient reads the padding", TBACK,
             "inside = (m < end) & (h >= 0) & (h < H) & (w >= 0) & (w < W)", "inside = m < end",
             f"{CONV} -k gradients"),
    Mutation("triton: one part of the weight's gradient", TBACK, "sums.sum(0).view", "sums[0].view",
             f"{TRITON} -k gradients"),
    Mutation("triton: grid of two dimensions", TBN, "(shape.tiles,)",
             "(shape.over_channels, shape.tiles // shape.over_channels)", f"{TRITON} -k grid"),
    Mutation("triton: largest tiles for the smallest grids", TCONFIG,
             "* (1.0 if config.splits == 1 else 1.1)", "* -1", f"{TRITON} -k heuristic"),
]  # fmt: skip

# What stands between the kernels of GPUs and their callers.
INFERENCE_PY, INFERENCE = "fused_resnet/inference.py", "tests/test_inference.py"
GPU, CUDA_PY = "fused_resnet/gpu_conv.py", "fused_resnet/cuda_conv.py"
TUNING, GEMM = "fused_resnet/tuning.py", "tests/test_implicit_gemm.py"
STEP_PY, STEP = "fused_resnet/training_step.py", "tests/test_training_step.py"
PYTHON += [
    Mutation("training_step: learning rates frozen", STEP_PY, "elif now != self._values[i]:",
             "elif self._values[i] is None:", f"{STEP} -k replayed"),
    Mutation("training_step: the user's learning rate replaced", STEP_PY,
             'group["lr"] = rate', "pass", f"{STEP} -k users"),
    Mutation("training_step: versions not moved", STEP_PY,
             "torch.autograd.graph.increment_version(list(self._written.values()))", "pass",
             f"{STEP} -k evaluation"),
    Mutation("training_step: x not copied for the graph", STEP_PY,
             "graph.x.copy_(x, non_blocking=True)", "pass", f"{STEP} -k replayed"),
    Mutation("training_step: the target not copied", STEP_PY,
             "graph.target.copy_(target, non_blocking=True)", "pass", f"{STEP} -k replayed"),
    Mutation("training_step: the graph's loss given away", STEP_PY, "graph.loss.clone()",
             "graph.loss", f"{STEP} -k new_memory"),
    Mutation("training_step: settings not watched", STEP_PY,
             "self._settings_now() == self._settings", "True", f"{STEP} -k recorded_anew"),
    Mutation("training_step: identity not watched", STEP_PY,
             "all(map(is_, now, self._members))", "True", f"{STEP} -k recorded_anew"),
    Mutation("training_step: addresses not watched", STEP_PY,
             "self._addresses_now() == self._addresses", "True", f"{STEP} -k recorded_anew"),
    Mutation("training_step: frozen weights not watched", STEP_PY,
             "all(id(t) in written for t in self.changed(self._was).values())", "True",
             f"{STEP} -k in_place"),
    Mutation("training_step: written weights watched", STEP_PY,
             "self._written.update(self._watch.changed(before))", "pass", f"{STEP} -k replayed"),
    Mutation("training_step: host's random numbers frozen", STEP_PY,
             "self._draws or _host_state() != state", "False", f"{STEP} -k host"),
    Mutation("training_step: hooks of modules ignored", STEP_PY, "any(self._hooks) or ", "",
             f"{STEP} -k hooks"),
    Mutation("training_step: hooks of tensors ignored", STEP_PY, " or tensor_hooks", "",
             f"{STEP} -k hooks"),
    Mutation("training_step: gradients added to", STEP_PY,
             "        self._drop_gradients()\n        with", "        with", f"{STEP} -k own"),
    Mutation("training_step: gradients left", STEP_PY,
             "        self._drop_gradients()\n        return loss", "        return loss",
             f"{STEP} -k own"),
    Mutation("training_step: a first step left out without momentum", STEP_PY,
             "if optimizer.state and getattr(", "if getattr(", f"{STEP} -k left_out"),
    Mutation("training_step: a scaler's first step likewise", STEP_PY,
             "if optimizer.state or not _overflowed(scaler, optimizer):", "if True:",
             f"{STEP} -k scaler"),
    Mutation("training_step: casts cached over steps", STEP_PY, ", cache_enabled=False", "",
             f"{STEP} -k autocast_around"),
    Mutation("training_step: autocast's state no part of the key", STEP_PY,
             "backends.forced(), autocast, switches)", "backends.forced(), switches)",
             f"{STEP} -k autocast_around"),
    Mutation("training_step: graphs never dropped", STEP_PY, "while len(kept) >= most:",
             "while False:", f"{STEP} -k few"),
]  # fmt: skip
PYTHON += [
    Mutation("inference: stale graphs replayed", INFERENCE_PY,
             "                self._graphs.clear()\n", "", f"{INFERENCE} -k weights_that_change"),
    Mutation("inference: the graph's output given away", INFERENCE_PY, "return graph.y.clone()",
             "return graph.y", f"{INFERENCE} -k new_memory"),
    Mutation("inference: x not copied for the graph", INFERENCE_PY, "graph.x.copy_(x)", "pass",
             f"{INFERENCE} -k gives"),
    Mutation("inference: versions not watched", INFERENCE_PY,
             "(0 if t.is_inference() else t._version, t.data_ptr())", "(0, t.data_ptr())",
             f"{INFERENCE} -k weights_that_change"),
    Mutation("inference: addresses not watched", INFERENCE_PY,
             "else t._version, t.data_ptr())", "else t._version, 0)",
             f"{INFERENCE} -k weights_that_change"),
    Mutation("inference: identity not watched", INFERENCE_PY,
             "all(map(is_, now, self._members))", "True", f"{INFERENCE} -k weights_that_change"),
    Mutation("inference: hooks ignored", INFERENCE_PY, " or self._watch.hooked()", "",
             f"{INFERENCE} -k hooks"),
    Mutation("inference: hooks before a forward ignored", INFERENCE_PY,
             "in (m._forward_hooks, m._forward_pre_hooks)", "in (m._forward_hooks,)",
             f"{INFERENCE} -k hooks"),
    Mutation("inference: graphs never dropped", INFERENCE_PY,
             "while len(self._graphs) >= _MOST_GRAPHS:", "while False:", f"{INFERENCE} -k few"),
    Mutation("inference: the newest graph dropped", INFERENCE_PY, "popitem(last=False)",
             "popitem()", f"{INFERENCE} -k few"),
    Mutation("inference: another backend's graph replayed", INFERENCE_PY, "backends.forced())",
             "None)", f"{INFERENCE} -k forced"),
    Mutation("inference: a graph of nothing", INFERENCE_PY, " or x.numel() == 0", "",
             f"{INFERENCE} -k empty"),
    Mutation("inference: dtype ignored", INFERENCE_PY, "if self.dtype is None:", "if True:",
             f"{INFERENCE} -k 16_bits"),
    Mutation("inference: gradients kept", INFERENCE_PY, "with torch.no_grad(), self._turn:",
             "with self._turn:", f"{INFERENCE} -k gives"),
    Mutation("inference: training mode taken", INFERENCE_PY, "if self.model.training:",
             "if False:", f"{INFERENCE} -k training"),
    Mutation("gpu: x of any layout taken", GPU, "x = channels_last(x.to(self.dtype))",
             "x = x.to(self.dtype)", f"{CONV} -k 'emulated and values'"),
    Mutation("gpu: the residual always overwritten", GPU,
             "y = residual if overwrite and residual is not None else None", "y = residual",
             f"{CONV} -k 'emulated and values'"),
    Mutation("gpu: the stem's kernel with a residual", GPU,
             "if stem and self.stem and residual is None and relu:", "if stem and self.stem:",
             f"{CONV} -k 'emulated and values and stem'"),
    Mutation("gpu: the stem's kernel with any padding", GPU,
             "self.geometry == ((2, 2), (3, 3), (1, 1))", "True",
             "tests/test_stem.py -k conv_bn_relu"),
    Mutation("cuda: channels not padded", CUDA_PY, "more = -weight.shape[1] % elements",
             "more = 0", f"{CONV} -k 'emulated and small_integers'"),
    Mutation("cuda: unaligned data not copied", CUDA_PY, "t if t.data_ptr() % 16 == 0 else",
             "t if True else", f"{CONV} -k 'emulated and any_layout'"),
    Mutation("cuda: the stem's fourth channel first", CUDA_PY,
             "F.pad(weight, (0, 1, 0, 0, 0, 1))", "F.pad(weight, (0, 1, 0, 0, 1, 0))",
             "tests/test_stem.py -k conv_bn_relu"),
    Mutation("cuda: the slowest tile", CUDA_PY, "return min(_tile_configs(problem, hopper)",
             "return max(_tile_configs(problem, hopper)",
             f"{GEMM} -k chosen"),
    Mutation("cuda: Hopper's tiles on any GPU", CUDA_PY, "capability == (9, 0)\n",
             "True\n", f"{GEMM} -k chosen"),
    Mutation("cuda: Hopper's tiles for any stride", CUDA_PY, "and stride <= 8\n    )", "\n    )",
             f"{GEMM} -k chosen"),
    Mutation("cuda: float32 taken for TF32", CUDA_PY, 'problem.operands != "float32"', "True",
             f"{CONV} -k 'emulated and values'"),
    Mutation("cuda: groups of any width", CUDA_PY,
             "problem.groups == 1 or problem.C % elements == 0", "True",
             f"{CONV} -k 'emulated and small_integers and groups'"),
    Mutation("cuda: any number of outputs", CUDA_PY,
             "        and problem.K // problem.groups % elements == 0\n", "",
             f"{CONV} -k 'emulated and small_integers'"),
    Mutation("tuning: the slowest winner chosen", TUNING, "return min(known", "return max(known",
             f"{TRITON} -k tune"),
    Mutation("tuning: the slowest kept", TUNING,
             "if time_s < (best[backend].time_s if backend in best else math.inf):",
             "if time_s > (best[backend].time_s if backend in best else 0):", f"{TRITON} -k tune"),
    Mutation("tuning: ends where something does not run", TUNING,
             "except Exception:  # too much", "except KeyError:  # too much", f"{TRITON} -k tune"),
    Mutation("tuning: choices outlive it", TUNING, "    choice.cache_clear()\n", "",
             f"{TRITON} -k tune"),
    Mutation("tuning: the file's other winners lost", TUNING,
             "write(path, merged(read(path), {problem: best}))", "write(path, {problem: best})",
             f"{TRITON} -k tune"),
    Mutation("kept without waiting for it", "fused_resnet/convolution.py",
             "    if capturing(t):\n        return False\n", "",
             "tests/test_gpu_models.py -k waited_for"),
    Mutation("tuning: shipped winners before the user's", TUNING,
             "found = merged(found, read(folder / name))",
             "found = merged(read(folder / name), found)", f"{TRITON} -k winners"),
    Mutation("tuning: whoever does not cover it chosen", TUNING,
             "if module.covers(problem, capability(device)):", "if True:",
             f"{CONV} -k 'emulated and small_integers and groups'"),
]  # fmt: skip

CPP = [
    Mutation("training: taps not reversed", "csrc/conv_pack_kernels.h",
             "p.transposed ? p.taps - 1 - tap : tap", "tap", CONVOLUTIONS),
    Mutation("training: Winograd's weights without a half", "csrc/conv_pack_kernels.h",
             "middle = t[i][1] * 0.5f", "middle = t[i][1]", CONVOLUTIONS),
    Mutation("training: odd columns not shifted", "csrc/conv_weight_gradient_kernels.h",
             "const int64_t odd = column % pair;", "const int64_t odd = 0;", CONVOLUTIONS),
    Mutation("training: rows outside the image", "csrc/conv_weight_gradient_kernels.h",
             "if (static_cast<uint64_t>(h) >= static_cast<uint64_t>(g.H)) continue;", "",
             CONVOLUTIONS),
    Mutation("training: last outputs added twice", "csrc/conv_weight_gradient_kernels.h",
             "for (int64_t i = k - start; i < kTilePixels; ++i) {",
             "for (int64_t i = 0; i < kTilePixels; ++i) {", CONVOLUTIONS),
    Mutation("training: odd rows of dy in Winograd's tiles", "csrc/conv_weight_gradient_winograd.h",
             "if (p + 1 < g.P) d[1][0]", "if (true) d[1][0]", CONVOLUTIONS),
    Mutation("training: 16 channels: pieces of the gradient lost", "csrc/conv_winograd_16.h",
             "again ? sums[k] + sum[k] : sum[k]", "sum[k]", f"{CONVOLUTIONS} -k 16"),
    Mutation("training: 16 channels: the total begun again", "csrc/conv_winograd_16.h",
             "if (pieces > kPieces16)", "if (false)", f"{CONVOLUTIONS} -k 16"),
    Mutation("training: 16 channels: odd rows of dy", "csrc/conv_winograd_16.h",
             "const bool two_rows = p + 1 < g.P;", "const bool two_rows = true;",
             f"{CONVOLUTIONS} -k 16"),
    Mutation("16 channels: the last few tiles lost", "csrc/conv_winograd_16.h",
             "for (int64_t tile = 0; tile < count; tile += kChains) {",
             "for (int64_t tile = 0; tile + kChains <= count; tile += kChains) {",
             f"{CONVOLUTIONS} -k 16"),
    Mutation("16 channels: odd columns written", "csrc/conv_winograd_16.h",
             "if (two_columns) write(y[1], pixel + 1);", "write(y[1], pixel + 1);",
             f"{CONVOLUTIONS} -k 16"),
    Mutation("16 channels: columns of the tile before", "csrc/conv_winograd_16.h",
             "t[i][0] = t[i][2], t[i][1] = t[i][3];", "", f"{CONVOLUTIONS} -k 16"),
    Mutation("16 channels: tiles left Inf or NaN", "csrc/conv_winograd_16.h",
             "_CMP_UNORD_Q", "_CMP_FALSE_OQ", f"{NATIVE} -k overflow"),
    Mutation("16 channels: the residual dropped", "csrc/conv_winograd_16.h",
             "if (c.residual) value +=", "if (false) value +=", f"{CONVOLUTIONS} -k added"),
    Mutation("training: a thread's sums lost", "csrc/conv_train_cpu.cpp",
             "out[i] += from[i];", "out[i] = from[i];", CONVOLUTIONS),
    Mutation("training: pixels scattered without their stride", "csrc/conv_train_cpu.cpp",
             "q * stride[1]", "q", CONVOLUTIONS),
    Mutation("training: the second norm's mean", "csrc/bn_add_relu_kernels.h",
             "(memory.load(residual + base + j) - load_any<V>(mean2 + j))",
             "memory.load(residual + base + j)", STEP),
    Mutation("training: the second norm's sum", "csrc/bn_add_relu_kernels.h",
             "if (bn.x2) sum_gx2[tile + j] += t3[j];", "", STEP),
    Mutation("training: mask from another shift", "csrc/bn_cpu.h",
             "affine.shift[c] -=", "affine.shift[c] +=", STEP),
    Mutation("training: pooling takes the last of equals", "csrc/bn_pool_kernels.h",
             "(v > best) | (v != v)", "(v >= best) | (v != v)", f"{STEP} -k one_pass"),
    Mutation("training: pooling's gradient past the ReLU", "csrc/bn_pool_cpu.cpp",
             "pool.dy = passed.const_data_ptr();", "pool.dy = dy.const_data_ptr();",
             f"{STEP} -k one_pass"),
    Mutation("training: memory handed out twice", "csrc/memory_pool.cpp",
             "free_.erase(fit);", "", STEP),
    Mutation("ReLU kills NaN", "csrc/cpu_vec.h", "return v < 0 ? V{} : v;",
             "return v > 0 ? v : V{};", f"{ADD} -k special"),
    Mutation("no mask in the backward kernels", "csrc/cpu_vec.h", "return y <= 0 ? V{} : dy;",
             "return dy;", f"{NATIVE} -k elementwise"),
    Mutation("the convolution drops its residual", "csrc/conv_bn_relu_kernels.h",
             "if (c.residual) value += D::load(residual + j);", "", f"{CONV} -k values"),
    Mutation("a row of taps too many left out", "csrc/conv_bn_relu_kernels.h",
             "lowest + *begin * c.dilation_h < 0", "lowest + *begin * c.dilation_h <= 0",
             f"{CONV} -k integers"),
    Mutation("one piece of a long sum lost", "csrc/conv_bn_relu_kernels.h",
             "sum[4 * i + v] += piece[4 * i + v]", "sum[4 * i + v] += 0 * piece[4 * i + v]",
             f"{CONV} -k integers"),
    Mutation("a sign of Winograd's transform", "csrc/conv_bn_relu_winograd.h",
             "t[2][j] = d2 - d1", "t[2][j] = d1 - d2", f"{CONV} -k integers"),
    Mutation("Winograd's tiles left Inf or NaN", "csrc/conv_bn_relu_winograd.h",
             "if (any) return false;", "", f"{CONV} -k special"),
    Mutation("Winograd's last tile lost", "csrc/conv_bn_relu_winograd.h",
             "tile < count; ++tile) {", "tile + 1 < count; ++tile) {", f"{CONV} -k values"),
    Mutation("max pooling loses NaN", "csrc/max_pool2d_kernels.h",
             "return size > infinity ? size : ordered;", "return ordered;",
             f"{NATIVE} -k max_pool2d"),
]  # fmt: skip


# Where emulated kernels cannot run, the tests that want them are skipped.
EMULATE = """
import sys
sys.path.insert(0, "tests")
import emulation
emulation.unavailable() or emulation.load()
"""


def survives(mutation: Mutation, build: list[str]) -> str | None:
    """None when the tests notice; else why not. build: arguments to python, none for Python."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        # What the emulator's build made is good in the copy too, but for the mutated sources.
        emulated = [str(path.relative_to(ROOT)) for path in ROOT.glob("build/emulated-*")]
        for name in ("fused_resnet", "tests", "csrc", *emulated):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        target = copy / mutation.file
        text = target.read_text()
        if text.count(mutation.old) == 0:
            return "its text is not there any more: mend the table"
        target.write_text(text.replace(mutation.old, mutation.new, 1))
        environment = {**os.environ, "PYTHONPATH": folder, "FUSED_RESNET_CUDA": "0"}
        if build:
            command = [sys.executable, *build]
            built = subprocess.run(command, cwd=copy, capture_output=True, env=environment)
            if built.returncode:
                return "it does not compile"
        # pytest takes one -k: several selections are several runs, any of which may notice.
        words = shlex.split(mutation.tests)
        runs: list[list[str]] = [[]]
        for i, word in enumerate(words):
            runs[-1].append(word)
            if i and words[i - 1] == "-k":
                runs.append([])
        for run in filter(None, runs):
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *run]
            result = subprocess.run(command, cwd=copy, capture_output=True, env=environment)
            if result.returncode == 1 or result.returncode < 0:  # a test failed, or all crashed
                return None
            if result.returncode != 0:
                return f"pytest gave {result.returncode} for {' '.join(run)}"
    return "every test passed"


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the code; see the tests fail.")
    parser.add_argument("-k", default="", help="only mutations whose name holds this")
    parser.add_argument("--native", action="store_true", help="C++ mutations too: a build each")
    parser.add_argument("--cuda", action="store_true", help="mutations of the CUDA kernels too")
    args = parser.parse_args()
    subprocess.run([sys.executable, "-c", EMULATE], cwd=ROOT, check=True)
    survivors = 0
    native = ["setup.py", "-q", "build_ext", "--inplace", "--force"]
    table: list[tuple[Mutation, list[str]]] = [(m, []) for m in PYTHON]
    table += [(m, native) for m in CPP if args.native]
    table += [(Mutation(*row), ["-c", EMULATE]) for row in CUDA if args.cuda]
    for mutation, build in table:
        if args.k not in mutation.name:
            continue
        begin = time.perf_counter()
        reason = survives(mutation, build)
        survivors += reason is not None
        outcome = "noticed" if reason is None else f"SURVIVES: {reason}"
        print(f"{mutation.name:45s} {time.perf_counter() - begin:5.0f} s  {outcome}", flush=True)
    print(f"{survivors} survive" if survivors else "all noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
