"""Builds libfused_resnet.so: CPU kernels always, CUDA kernels where a CUDA toolkit is found.

Environment: FUSED_RESNET_NATIVE=1 makes a failed native build an error (0 skips it; by default the
package installs as pure Python and says why); FUSED_RESNET_CUDA=0/1 forbids or demands the CUDA
kernels; TORCH_CUDA_ARCH_LIST chooses the GPU architectures. Nothing is ever downloaded.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

# Every GPU from sm_80 on: machine code for A100-class (also sm_86 and sm_89) and for Hopper, and
# PTX of compute_80, which later GPUs can compile.
DEFAULT_CUDA_ARCHS = "8.0+PTX;9.0a"
NATIVE = os.environ.get("FUSED_RESNET_NATIVE", "")
EXPORTS = "-Wl,--version-script=csrc/exports.map"
HOW_TO_BUILD = "`pip install --no-build-isolation .` beside torch >= 2.11 and a C++ compiler"


def say(line):
    """Prints once per build: pip runs this file for the metadata too."""
    if not {"egg_info", "dist_info"} & set(sys.argv):
        print(f"fused_resnet: {line}")


def without_native(reason):
    if NATIVE == "1":
        sys.exit(f"fused_resnet: {reason} (FUSED_RESNET_NATIVE=1 makes this an error)")
    say(f"pure Python install: {reason}; to get the kernels: {HOW_TO_BUILD}")


def find_cuda_root():
    """The toolkit's folder, or None. An nvcc on PATH may be a wrapper script that lives outside
    the toolkit, so a folder counts only when it holds the runtime's headers."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
        roots += re.findall(r"^#\$ TOP=(.+)$", dryrun.stderr, flags=re.MULTILINE)
    roots += ["/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True)]
    for root in filter(None, roots):
        if all(os.path.exists(f"{root}/{f}") for f in ("include/cuda_runtime.h", "bin/nvcc")):
            return os.path.realpath(root)
    return None


def cuda_root_for(torch):
    wanted = os.environ.get("FUSED_RESNET_CUDA", "")
    if wanted == "0" or (torch.version.cuda is None and wanted != "1"):
        return None
    root = find_cuda_root()
    missing = "this torch is built without CUDA" if torch.version.cuda is None else ""
    if root is None:
        missing = "no CUDA toolkit (a folder with include/cuda_runtime.h and bin/nvcc) was found"
    elif not missing:
        nvcc = subprocess.run([f"{root}/bin/nvcc", "--version"], capture_output=True, text=True)
        release = re.search(r"release (\d+)\.\d+", nvcc.stdout)
        if release and release[1] != torch.version.cuda.split(".")[0]:
            missing = f"{root} is CUDA {release[0].split()[1]}, torch's is {torch.version.cuda}"
    if missing and wanted == "1":
        sys.exit(f"fused_resnet: FUSED_RESNET_CUDA=1, but {missing}")
    if missing:
        say(f"CPU kernels only: {missing}")
    return None if missing else root


def cuda_targets(cpp_extension, archs):
    """{"8.0": {"sm"}, "9.0": {"compute"}, ...}: the machine code (sm) and the PTX (compute) that
    TORCH_CUDA_ARCH_LIST asks for, in any spelling of PyTorch's ("Hopper", "8.0 9.0+PTX")."""
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(filter(None, re.split("[; ]", archs)))
    try:
        flags = " ".join(cpp_extension._get_cuda_arch_flags())
    except (ValueError, IndexError) as error:  # IndexError: "native" without a GPU
        sys.exit(
            f"fused_resnet: TORCH_CUDA_ARCH_LIST={archs!r} is not a list that PyTorch takes, such "
            f"as '8.0;9.0', '8.0 9.0+PTX' or 'Ampere;Hopper' ({error})"
        )
    targets = {}
    for number, suffix, kind in re.findall(r"compute_(\d+)([a-z]?),code=([a-z]+)_", flags):
        if number == "90":
            # Only machine code for sm_90a has wgmma; only PTX of compute_90 runs on later GPUs.
            suffix = "a" if kind == "sm" else ""
        if int(number) >= 80:
            targets.setdefault(f"{number[:-1]}.{number[-1]}{suffix}", set()).add(kind)
    return targets


def cuda_archs(cpp_extension):
    """(names, flags of nvcc) of the architectures to build for."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ") or DEFAULT_CUDA_ARCHS
    targets = cuda_targets(cpp_extension, asked)
    targets = targets or cuda_targets(cpp_extension, DEFAULT_CUDA_ARCHS)
    flags, names = [], []
    for name, kinds in sorted(targets.items(), key=lambda item: float(item[0].rstrip("af"))):
        number = name.replace(".", "")
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in sorted(kinds)]
        names.append(name + ("+PTX" if "compute" in kinds else ""))
    if "9.0a" in targets:
        flags.append("-DFUSED_RESNET_SM_90A")
    say(f"CUDA kernels for {';'.join(names)} (asked for {asked}; GPUs from sm_80 on are served)")
    return ";".join(names), flags


def files_of(kind):
    """The files of this ending in csrc/ and all its folders, sorted."""
    return sorted(glob.glob(f"csrc/**/*.{kind}", recursive=True))


def version():
    text = Path("fused_resnet/version.py").read_text()
    return re.search('^__version__ = "(.+)"$', text, re.M)[1]


class Wheel(bdist_wheel):
    """The library contains nothing of Python, so its wheel is for every Python 3."""

    def get_tag(self):
        # Asked after the build, which may have failed and left the package pure.
        self.root_is_pure = not self.distribution.ext_modules
        platform = super().get_tag()[2]
        return "py3", "none", platform


def native_build():
    """Keyword arguments for setup() that build the library, {} where it cannot be built."""
    if NATIVE == "0":
        return {}
    try:
        import torch
    except ImportError as error:
        without_native(f"torch cannot be imported in the build environment ({error})")
        return {}
    cuda_root = cuda_root_for(torch)
    if cuda_root:
        # Must be set before cpp_extension is imported, which otherwise guesses from PATH.
        os.environ["CUDA_HOME"] = cuda_root
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler.split()[0]) is None:
        without_native(f"there is no C++ compiler ({compiler})")
        return {}

    class BuildNative(cpp_extension.BuildExtension):
        def get_ext_filename(self, fullname):
            return f"{fullname.replace('.', '/')}.so"  # for no Python in particular

        def run(self):
            try:
                super().run()
            except (Exception, SystemExit) as error:
                if NATIVE == "1":
                    raise
                without_native(f"compiling failed ({str(error).strip().splitlines()[-1]})")
                self.extensions = self.distribution.ext_modules = []

        def build_extension(self, ext):
            # Without ninja, only the times of files are compared: what other flags had made, for
            # example for other GPUs, would be kept.
            tools = [getattr(self.compiler, name) for name in self.compiler.executables]
            options = [ext.sources, ext.include_dirs, ext.libraries, ext.extra_compile_args]
            options.append(ext.extra_link_args)
            output = os.path.abspath(self.get_ext_fullpath(ext.name))
            settings = repr([output, tools, cuda_root, *options])
            stamp = Path(self.build_temp, "settings.txt")
            if not stamp.exists() or stamp.read_text() != settings:
                self.force = True
            super().build_extension(ext)
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(settings)

    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
    facts = {"VERSION": version(), "TORCH": torch.__version__, "CXX_FLAGS": "-O3"}
    sources = files_of("cpp")
    extension = cpp_extension.CppExtension
    flags = {"cxx": ["-O3", "-g0", *warnings, "-fvisibility=hidden"]}
    if cuda_root:
        extension = cpp_extension.CUDAExtension
        sources += files_of("cu")
        facts["CUDA_ARCHS"], targets = cuda_archs(cpp_extension)
        flags["cxx"].append("-DFUSED_RESNET_WITH_CUDA")
        # Machine code and PTX compressed; PyTorch adds no architectures beside these.
        code = ["-Xfatbin=-compress-all", *targets]
        flags["nvcc"] = ["-O3", "-DUSE_CUDA", "-Xcompiler=-Wall", *code]
    flags["cxx"] += [f'-DFUSED_RESNET_{k}="{v}"' for k, v in facts.items()]
    native = extension(
        "fused_resnet.libfused_resnet",
        sources,
        # Absolute: ninja compiles from its own folder.
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args=flags,
        # libtorch.so alone depends on all of torch's libraries, CUDA's where they are.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-s", EXPORTS],
        depends=files_of("h") + files_of("cuh"),
    )
    # libstdc++ before torch's libraries, which export parts of it. The stable ABI needs none of
    # libtorch_python, whose symbols change from release to release.
    native.libraries = ["stdc++", "torch_cpu", "c10"]
    if cuda_root:
        # Linked statically, the runtime asks for no torch of the same CUDA release.
        native.libraries += ["cudart_static", "dl", "rt", "pthread"]
    return {"ext_modules": [native], "cmdclass": {"build_ext": BuildNative, "bdist_wheel": Wheel}}


setup(**{"cmdclass": {"bdist_wheel": Wheel}, **native_build()})
