"""Mutations of what serves compilers: (name, file, old text, new text, tests)."""

from __future__ import annotations

REGIONS = "fused_resnet/fusion/regions"
BACKEND_PY, FUNCTIONAL = f"{REGIONS}/backend.py", f"{REGIONS}/functional.py"
EXPORT_PY, COMPILED_PY = f"{REGIONS}/export.py", "fused_resnet/fusion/compiled.py"
FAKES, PLANNED = "fused_resnet/kernels/cpu/fakes.py", "fused_resnet/layers/planned.py"
BACKEND = "tests/fusion/regions/test_backend.py"
EXPORT = "tests/fusion/regions/test_export.py -m 'not slow'"
COMPILED = "tests/fusion/test_compiled.py -m 'not slow'"

COMPILERS = [
    ("backend: another call's weights", FUNCTIONAL,
     "return all([inputs[i] is t for i, t in self.tensors.items()])", "return True",
     f"{BACKEND} -k 'models_of_one_class or made_for_each'"),
    ("backend: weights made for each call are packed", BACKEND_PY,
     "if self.bound is not None and not again:", "if False:", f"{BACKEND} -k at_every_call"),
    ("backend: tensors outlive their model", BACKEND_PY, "found.forget()", "pass",
     f"{BACKEND} -k freed"),
    ("backend: stand-ins own tensors", BACKEND_PY,
     "if not issubclass(type(module), nn.Module) or module in stand_ins:",
     "if not issubclass(type(module), nn.Module):", f"{BACKEND} -k freed"),
    ("backend: a weight that the forward writes", FUNCTIONAL,
     "if not isinstance(value, Tensor) or not all(map(_is_call, users)):",
     "if not isinstance(value, Tensor):", f"{BACKEND} -k 'unusual and writes'"),
    ("backend: switches in the graph", BACKEND_PY,
     'if higher or node.op == "call_module" or node.target in _SWITCHES:', "if higher:",
     f"{BACKEND} -k enabled_inside"),
    ("backend: gradients not asked for", BACKEND_PY,
     "if grad or any(map(uses_batch_statistics, norms)):",
     "if any(map(uses_batch_statistics, norms)):", f"{BACKEND} -k of_weights_alone"),
    ("backend: the forced backend", BACKEND_PY,
     "call_reason(x, training=True)", "None", f"{BACKEND} -k reasons"),
    ("backend: a part's layout", f"{REGIONS}/program.py",
     "if not keep:\n                for n in kept:", "if False:\n                for n in kept:",
     f"{BACKEND} -k segments"),
    ("backend: weights packed for each graph", f"{REGIONS}/program.py",
     "if plan is not None and plan.holds():", "if False:", f"{BACKEND} -k torchvision"),
    ("compiled: gradients are lost", COMPILED_PY, "if t.requires_grad:", "if False:",
     f"{COMPILED} -k gradients"),
    ("compiled: other tensors than the module's", COMPILED_PY,
     "own = _are_own(module, tensors) and call_reason(x) is None", "own = call_reason(x) is None",
     f"{COMPILED} -k 'come_first or opcheck'"),
    ("compiled: export is not portable", COMPILED_PY,
     "if torch.compiler.is_exporting() or module.training", "if module.training",
     f"{COMPILED} -k portable"),
    ("compiled: a subclass's forward twice", COMPILED_PY,
     'if cls.__dict__.keys() & {"forward", "_forward_impl"}:', "if False:",
     f"{COMPILED} -k subclasses"),
    ("compiled: a copy has the number of its original", PLANNED,
     "for name in (MADE, NUMBER, SLOTS):", "for name in (MADE,):", f"{COMPILED} -k copies"),
    ("export: a norm in training", EXPORT_PY,
     "if any(norm.training and norm.track_running_stats for norm in norms):", "if False:",
     f"{EXPORT} -k refused"),
    ("export: the layout of a result", EXPORT_PY,
     "return x if self._free else x.contiguous(memory_format=memory_format)", "return x",
     f"{EXPORT} -k any_model"),
    ("export: written in place meanwhile", f"{REGIONS}/match.py",
     "return node.target._schema.is_mutable", "return False", f"{EXPORT} -k in_place"),
    ("export: an input is overwritten", EXPORT_PY,
     "run_stages(stages_of(plans, x.shape), x, writes=False)",
     "run_stages(stages_of(plans, x.shape), x, writes=True)", f"{EXPORT} -k 'any_model or large'"),
    ("fakes: a stride", FAKES, "// g[_STRIDE + i] + 1", "+ 1", f"{EXPORT} -k without_data"),
    ("fakes: rows of taps", FAKES,
     "g[_RUN] // g[_COPIED] if g[_COPIED] else g[_S]", "g[_S]", f"{EXPORT} -k without_data"),
]  # fmt: skip
