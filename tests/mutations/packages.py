"""Mutations of the build, the library's loading and the wheels: (name, file, old text, new text,
tests)."""

from __future__ import annotations

PACKAGING = "tests/repository/test_packaging.py"
WHEELS = "tests/repository/test_wheels.py"
LIBRARY = "tests/kernels/test_library.py"
HUB = "tests/repository/test_hub_kernel.py"

PACKAGES = [
    # --- the build
    ("build: PTX that runs on Hopper alone", "setup.py",
     'suffix = "a" if kind == "sm" else ""', 'suffix = "a"', f"{PACKAGING} -k spellings"),
    ("build: Hopper's kernels left out", "setup.py", 'if "9.0a" in targets', 'if "9.0" in targets',
     f"{PACKAGING} -k spellings"),
    ("build: kept after other flags", "setup.py", "self.force = True", "pass",
     f"{PACKAGING} -k other_flags"),
    ("info: Hopper's kernels never missing", "fused_resnet/kernels/native.py",
     'if "9.0a" in re.split', 'if "9.0" not in re.split',
     "tests/kernels/test_backends.py -k which_cuda_kernels"),
    # --- the library and the wheels
    ("library: of another version used", "fused_resnet/kernels/library.py",
     "if built != __version__:", "if False:", f"{LIBRARY} -k another_version"),
    ("library: a second copy loaded", "fused_resnet/kernels/library.py",
     "other = _loaded_elsewhere(file)", "other = None", f"{LIBRARY} -k second_copy"),
    ("library: refused when imported anew", "fused_resnet/kernels/library.py",
     "mode=os.RTLD_NOLOAD", "mode=-1", f"{LIBRARY} -k imported_anew"),
    ("library: the cause of a failure left out", "fused_resnet/kernels/library.py",
     "found = error.__cause__ or error", "found = error", f"{LIBRARY} -k no_library"),
    ("library: an older torch not named", "fused_resnet/version.py",
     ">= MINIMUM_TORCH:", ">= (2, 0):", f"{LIBRARY} -k older"),
    ("library: a missing torch not named", "fused_resnet/version.py",
     "except ImportError as error:", "except OSError as error:", f"{LIBRARY} -k without_torch"),
    ("library: CUDA of another release", "fused_resnet/kernels/native.py",
     "if theirs is not None and _version", "if False and _version", f"{LIBRARY} -k release"),
    ("library: PTX for an older driver", "fused_resnet/kernels/native.py",
     '2 if code == "PTX" else 1', "1", f"{LIBRARY} -k release"),
    ("library: an older driver", "fused_resnet/kernels/native.py",
     "if supported is not None and", "if False and", f"{LIBRARY} -k release"),
    ("wheels: newer symbols in the stand-ins", "wheels/old_libc.py",
     " or parsed[1] > NEWEST[parsed[0]]", "", f"{WHEELS} -k stand_ins"),
    ("wheels: without glibc's part that is linked statically", "wheels/old_libc.py",
     ', located("libc_nonshared.a")', "", f"{WHEELS} -k stand_ins"),
    ("wheels: for one Python", "setup.py", 'return "py3", "none", platform',
     'return "cp311", "cp311", platform', f"{WHEELS} -k tags_of"),
    ("wheels: a failed build tagged as built", "setup.py",
     "self.root_is_pure = not self.distribution.ext_modules", "pass", f"{WHEELS} -k tags_of"),
    ("hub: the residual left out", "torch-ext/fused_resnet/layers.py",
     "return norm_add_relu(self.conv2(out), self.bn2, identity)",
     "return norm_add_relu(self.conv2(out), self.bn2)", f"{HUB} -k compute"),
    ("hub: batch statistics by running ones", "torch-ext/fused_resnet/functional.py",
     "and not norm.training and", "and", f"{HUB} -k compute"),
]  # fmt: skip
