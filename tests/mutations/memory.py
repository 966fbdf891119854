"""Mutations of what releases and restores weights: (name, file, old text, new text, tests)."""

from __future__ import annotations

TESTS = "tests/graphs/test_release.py"
PARAMETER = "fused_resnet/layers/released.py"
RELEASING = "fused_resnet/fusion/inference/release.py"
PACKED = "fused_resnet/kernels/cpu/convolution.py"
GUARD = "fused_resnet/fusion/guard.py"
CALLABLE = "fused_resnet/graphs/inference.py"

MEMORY = [
    ("released: memory that others hold", PARAMETER, "if _held(p, storage, aliases):", "if False:", f"{TESTS} -k others_hold"),
    ("released: a graph's memory", PARAMETER, "p._use_count() != 1 or", "", f"{TESTS} -k 'others_hold and graph'"),
    ("released: a parameter of it", PARAMETER, "nn.Parameter(found) if by_parameter else found", "found", f"{TESTS} -k a_released_one"),
    ("released: other bits", PARAMETER, "if not _same_bits(pairs(p.data)):", "if False:", f"{TESTS} -k payload"),
    ("released: mapped memory", PARAMETER, "if not storage.resizable():", "if False:", f"{TESTS} -k mapped"),
    ("released: shared memory", PARAMETER, "if storage.is_shared():", "if False:", f"{TESTS} -k others_hold"),
    ("released: a part of a buffer", PARAMETER, "if storage.nbytes() != p.numel() * p.element_size() or", "if", f"{TESTS} -k others_hold"),
    ("released: tied weights", RELEASING, "if places != 1:", "if False:", f"{TESTS} -k others_hold"),
    ("released: sharded weights", RELEASING, '"sharding rewrites it" if FSDP in module.__dict__ else ', "", f"{TESTS} -k sharded"),
    ("released: own aliases counted as others'", RELEASING, "len(aliases))", "0)", f"{TESTS} -k demand"),
    ("released: other plans kept", CALLABLE, "refresh(self.model)  # other", "pass  # other", f"{TESTS} -k demand"),
    ("released: before the fused call was compared", CALLABLE, "if not verified(self.model):", "if False:", f"{TESTS} -k 'comes_back and fuse'"),
    ("released: memory not taken over", PACKED, "self.tensors[0] = moved.copy_(packed)", "self.tensors[0] = moved", f"{TESTS} -k 'comes_back and Winograd'"),
    ("released: large transforms kept", PACKED, "self.tensors[1].nbytes > _LARGE_BYTES", "False", f"{TESTS} -k transforms"),
    ("released: unpacked without groups", PACKED, "block = 16 if groups > 1 else 64", "block = 64", f"{TESTS} -k 'comes_back and groups'"),
    ("released: lower halves", PACKED, "[1::2]", "[0::2]", f"{TESTS} -k either_product"),
    ("released: half of the last value", PACKED, "rows[:, :, run - 1] *= 2", "pass", f"{TESTS} -k either_product"),
    ("released: any dtype", PACKED, "(weight.dtype, self.dtype) != _EXACT", "False", f"{TESTS} -k another_dtype"),
    ("released: the guard keeps its fingerprint", GUARD, "repeat(-sampled, count)", "repeat(0, count)", f"{TESTS} -k restores_nothing"),
    ("released: the guard keeps that of all bytes", GUARD, "repeat(-whole, count)", "repeat(0, count)", f"{TESTS} -k restores_nothing"),
    ("released: the guard sees no restore", GUARD, "all(map(is_, map(type, self._released), repeat(Released)))", "True", f"{TESTS} -k 'finds and written'"),
    ("released: the callable sees no restore", CALLABLE, "all(type(t) is Released for t in self._released)", "True", f"{TESTS} -k after_a_restore"),
    ("restored: too often", PARAMETER, "if func not in _WITHOUT_VALUES and", "if", f"{TESTS} -k restores_nothing"),
    ("restored: not in lists", PARAMETER, "elif not isinstance(value, (list, tuple, set)):", "else:", f"{TESTS} -k 'finds and list'"),
    ("restored: inside of modes", PARAMETER, "stack.enter_context(_disable_current_modes())", "pass", f"{TESTS} -k 'finds and fake'"),
    ("restored: inside of a trace", PARAMETER, "        set_tracing_state(None)", "        pass", f"{TESTS} -k 'finds and trace'"),
    ("restored: not by deepcopy", PARAMETER, "restore(self)\n        return nn.Parameter.__deepcopy__", "return nn.Parameter.__deepcopy__", f"{TESTS} -k 'finds and deepcopy'"),
    ("restored: not by pickle", PARAMETER, "restore(self)\n        return nn.Parameter.__reduce_ex__", "return nn.Parameter.__reduce_ex__", f"{TESTS} -k a_pickle"),
    ("restored: not by TorchScript", "fused_resnet/layers/planned.py", "restore_all(self.parameters())", "pass", f"{TESTS} -k 'finds and script'"),
    ("restored: a lock of the parent", PARAMETER, "    global _lock\n    _lock = threading.RLock()", "    pass", f"{TESTS} -k forked"),
    ("restored: called so before it is", PARAMETER, "            for part, packed in", "            p.__class__ = nn.Parameter\n            for part, packed in", f"{TESTS} -k half_way"),
    ("released: not undone", PARAMETER, "            if not done:", "            if False:", f"{TESTS} -k half_way"),
]  # fmt: skip
