# make demo    the main job on photographs: parity, images/s, plot (IMAGES=DIR for your own)
# make quick   build, then the tests that find most faults, in under 90 s
# make test    build, then run the tests (PYTEST_ARGS="-k parity"; JOBS=1: in one process)
# make lint    ruff, clang-format, mypy, import-linter
# make bench   ops, peers, training and the whole family into benchmarks/results, then the tables
# make tables  the tables of README.md and benchmarks/RESULTS.md, and plots, from the results
# make wheel   dist/: the wheel for every Python and torch, the pure one, and the sdist
# make wheel-test      the wheels in fresh environments, with no compiler (nothing is downloaded)
# make wheel-test-all  the same with other Pythons and torches: gigabytes of downloads
# make build   .venv with the pinned requirements and the package in it, editable
# make clean   remove what was built (.venv stays; remove it by hand to start afresh)

PYTHON ?= python3
VENV ?= .venv
IMAGES ?=
OUT ?= build/demo
PYTEST_ARGS ?=
JOBS ?= auto
# CI runs the slow ones too, unless it is slow itself.
TESTS ?= not large and not slow
RESULTS := benchmarks/results

# Every file that the build reads, in all folders of csrc/.
SOURCES := $(shell find csrc -type f)
CXX_FILES := $(shell find csrc examples tests torch-ext -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

PY := $(VENV)/bin/python
SHELL := bash
.SHELLFLAGS := -o pipefail -c
# Compiling the CUDA kernels takes minutes: where there is a GPU, or on demand.
FUSED_RESNET_CUDA ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU || echo 0)
export FUSED_RESNET_CUDA
# What is built depends on these too: other values than those of the last build make a new one.
SETTINGS := FUSED_RESNET_CUDA=$(FUSED_RESNET_CUDA) TORCH_CUDA_ARCH_LIST=$(TORCH_CUDA_ARCH_LIST)
ifneq ($(shell cat $(VENV)/build.stamp 2>/dev/null),$(SETTINGS))
.PHONY: $(VENV)/build.stamp
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help build demo quick test lint bench tables clean wheel wheel-test wheel-test-all

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# Stamps: a second run installs and builds only when the files they were made from have changed.
$(VENV)/requirements.stamp: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' || \
	  { echo "make: $(PYTHON) must be Python 3.10 or later; choose one: make PYTHON=python3.12"; exit 1; }
	@$(VENV)/bin/pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || \
	  { echo "make: $(PYTHON) has no venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	$(PY) -m pip install --requirement requirements-dev.txt
	@touch $@

# The log has all output of the compilers; shown are one line per file and the messages of setup.py.
PROGRESS := sed -un -e 's|^ *\(\[[0-9/]*\]\) .* -c [^ ]*/\(csrc/[^ ]*\) .*|\1 \2|p' \
  -e 's/^ *\(fused_resnet:.*\)/\1/p'
$(VENV)/build.stamp: $(VENV)/requirements.stamp setup.py pyproject.toml $(SOURCES)
	@mkdir -p build
	@echo "compiling (log: build/compile.log)"
	@PYTHONUNBUFFERED=1 $(PY) setup.py build_ext --inplace 2>&1 | tee build/compile.log | \
	  $(PROGRESS) || { tail -n 40 build/compile.log; exit 1; }
	@# The library lies in place already; pip would compile it again.
	FUSED_RESNET_NATIVE=0 $(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@$(PY) -c 'from fused_resnet.kernels import native; print("build:", native.load() or "native kernels")'
	@echo '$(SETTINGS)' >$@

build: $(VENV)/build.stamp

demo: build
	$(VENV)/bin/fused-resnet demo --out "$(OUT)" $(if $(IMAGES),--images "$(IMAGES)")

# The tests that detect most mutations, without those that take long in an interpreter.
QUICK := tests/repository tests/mutations tests/models/test_cifar.py tests/graphs/test_inference.py \
  $(addprefix tests/fusion/,test_blocks.py test_calls.py test_stale.py training/test_training.py) \
  $(addprefix tests/fusion/regions/test_,fuse.py forwards.py linear.py) \
  tests/ops/test_add_relu.py tests/ops/test_conv_bn_relu.py \
  $(addprefix tests/kernels/cpu/test_,block_ops.py gradient_sums.py train_convolution.py)
PYTEST := $(PY) -m pytest -q -n $(JOBS) --dist loadgroup

quick: build
	$(PYTEST) -m "$(TESTS)" $(QUICK) \
	  -k "not triton and not emulated and not reference and not sync and not compile and not packaging" \
	  $(PYTEST_ARGS)

test: build
	$(PYTEST) -m "$(TESTS)" $(PYTEST_ARGS)

lint: $(VENV)/requirements.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

bench: build
	for op in add_relu bn_add_relu conv_bn_relu; do \
	  $(PY) benchmarks/ops/bench_$$op.py --out $(RESULTS) || exit 1; done
	$(PY) benchmarks/models/bench_resnet.py --model resnet18 resnet50 --memory --name peers \
	  --contender eager eager-channels_last compile onnxruntime openvino fused --out $(RESULTS)
	$(PY) benchmarks/models/bench_resnet.py --model resnet18 resnet50 --batch 8 --mode train --name train \
	  --contender eager eager-channels_last compile fused fused-full fused-lower fused-minimal \
	  --out $(RESULTS)
	$(PY) benchmarks/models/bench_resnet.py --out $(RESULTS)
	$(PY) benchmarks/depth/bench_depth.py --out $(RESULTS)
	$(PY) benchmarks/models/accuracy.py --out $(RESULTS)
	$(PY) benchmarks/models/bench_memory.py --out $(RESULTS)
	$(VENV)/bin/fused-resnet depth --out build/depth
	cp build/depth/report.json \
	  $(RESULTS)/depth-cpu-torch$$($(PY) -c 'import torch; print(torch.__version__.split("+")[0])').json
	$(MAKE) tables

# Linked against stand-ins for glibc 2.28 and its libstdc++ (wheels/old_libc.py). With CUDA code
# where a toolkit is: FUSED_RESNET_CUDA=1.
TORCHS_OWN := --exclude 'libtorch*' --exclude 'libc10*'
wheel: $(VENV)/requirements.stamp
	rm -rf dist build/wheel build/lib* && mkdir -p build/wheel
	$(PY) wheels/old_libc.py build/old_libc
	@echo "compiling (log: build/wheel.log)"
	@LDFLAGS="-L$(CURDIR)/build/old_libc -Wl,--exclude-libs,ALL -Wl,-z,defs" FUSED_RESNET_NATIVE=1 \
	  PYTHONUNBUFFERED=1 $(PY) -m pip wheel --verbose --no-build-isolation --no-deps \
	  --wheel-dir build/wheel . 2>&1 | tee build/wheel.log | $(PROGRESS) || \
	  { tail -n 40 build/wheel.log; exit 1; }
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair --only-plat $(TORCHS_OWN) \
	  --plat manylinux_2_28_$$(uname -m) --wheel-dir dist build/wheel/*.whl
	$(PY) -m auditwheel show dist/*.whl
	@# There is no extension module: what is checked is that no symbol of Python is left.
	$(PY) -m abi3audit --strict --assume-minimum-abi3 3.10 dist/*.whl
	rm -rf build/lib*
	FUSED_RESNET_NATIVE=0 $(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(PY) setup.py -q sdist --dist-dir dist
	@ls -l dist

# What .ci/run and `make` have installed; the first also tests the pure wheel.
WHEEL_TEST := $(VENV) $(wildcard build/ci-plain)
wheel-test:
	$(PY) wheels/test.py --borrow $(WHEEL_TEST)

wheel-test-all:
	$(PY) wheels/test.py --all

tables: build
	$(PY) benchmarks/plot.py

clean:
	rm -rf build dist *.egg-info fused_resnet/*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f $(VENV)/build.stamp
	find fused_resnet tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
