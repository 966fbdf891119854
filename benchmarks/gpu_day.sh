#!/usr/bin/env bash
# Build, test and measure on a machine with an NVIDIA GPU, the most important sections first:
#
#     bash benchmarks/gpu_day.sh [--dry-run] [--seconds N] OUT [SECTION...]
#     bash benchmarks/gpu_day.sh --list
#
# Builds for the available GPU, tests the kernels on it, measures. Each section has a time limit and
# a folder OUT/SECTION with its log and results; OUT/summary.txt has a line per section with its exit
# status (124: timeout) and seconds. A failing section does not stop the others. A repeated run skips
# sections that have passed; sections named on the command line always run. --seconds: total time
# limit. Needs no network; PYTHON is the interpreter to use.
# Exit status: 0 if all passed, 1 if one failed, 2 if nothing can be run.

# shellcheck disable=SC2329 # sections are called by their names
set -uo pipefail

# name, time limit in seconds, description
SECTIONS="
build         540  build for this GPU only, and print information about it
device-tests  300  the CUDA kernels' tests on this GPU: ops, every tile, the stem, 250 repeats
ops           300  ops of ResNet-50, bfloat16, batch 256, against other contenders and the limits
resnet50      280  ResNet-50, eager and fused, with and without a CUDA graph
parity        240  ResNet-50 and 18 against float64, by layer
tune          580  the fastest tile of every convolution of ResNet-50, bfloat16, batch 256
ops-tuned     480  ops after tuning, with every tile and torch.compile
resnet50-peers 580 ResNet-50 and torch.compile (max-autotune, CUDA graphs), batch 256
peers         580  the same for ResNet-18, and for batch 1
tests         580  the whole test suite
sanitizer     580  compute-sanitizer's four tools on every kernel
batches       580  other batches and dtypes
train         580  training: steps of ResNet-50 and 18, gradients of the convolutions
ncu           400  Nsight Compute's counters of the heaviest kernels
"

# Printed where the device tests fail: what no emulator shows.
SUSPECTS="
Where only Hopper's tiles fail, look in csrc/cuda/device/tensor_map.h:
- only strided convolutions: the corners of the im2col box, and their order (W, H);
- only tensors below 128 KiB: with drivers up to 13.1, CUTLASS and Triton clear bit 85 of the tensor
  map (bit 21 of its second 64-bit word) for these. Known on Blackwell; on Hopper the bit is said to be
  reserved, so it is left as the driver sets it.
"

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0"; }
names() { awk 'NF { print $1 }' <<<"$SECTIONS"; }
limit_of() { awk -v name="$1" '$1 == name { print $2 }' <<<"$SECTIONS"; }

DRY=${GPU_DAY_DRY:-}
TOTAL=""
INSIDE=""
while [ $# -gt 0 ]; do
  case $1 in
    --list) awk 'NF { name = $1; limit = $2; $1 = $2 = ""; sub(/^ +/, "")
                     printf "%-15s %4d s  %s\n", name, limit, $0 }' <<<"$SECTIONS"
            exit 0 ;;
    --dry-run) DRY=1; shift ;;
    --seconds) TOTAL=${2:?--seconds needs a number}; shift 2 ;;
    --inside) INSIDE=1; shift ;; # one section, under its time limit
    -h | --help) usage; exit 0 ;;
    -*) echo "gpu_day.sh: unknown option $1" >&2; exit 2 ;;
    *) break ;;
  esac
done
if [ $# -eq 0 ]; then usage >&2; exit 2; fi
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd) || exit 2
shift
ROOT=$(cd "$(dirname "$0")/.." && pwd) || exit 2
HERE=$ROOT/benchmarks/$(basename "$0")
cd "$ROOT" || exit 2
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHON PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Cache of the winners of `tune` for later sections, independent of OUT; copied to OUT/tuned.
export XDG_CACHE_HOME="$ROOT/build/gpu_day-cache"
CPUS=$(nproc 2>/dev/null || echo 4)

failed=0
# Print and run a command; record a failure and continue.
run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [ -n "$DRY" ] && return 0
  "$@" </dev/null || { local rc=$?; echo "exit status $rc"; failed=1; return "$rc"; }
}

# The compute capability of the GPU, e.g. 9.0 for Hopper; empty without a GPU.
capability() {
  local found
  found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d ' ')
  case $found in
    [0-9]*.[0-9]*) echo "$found" ;;
    *) "$PYTHON" -c 'import torch
if torch.cuda.is_available(): print("{}.{}".format(*torch.cuda.get_device_capability()))' 2>/dev/null ;;
  esac
}

# Run each test file in its own process, so that a corrupted CUDA context affects only that file.
# (--foreground keeps them in the process group of the section, which its time limit kills.)
# tests_of PROCESSES SECONDS FOLDER FILE... -- PYTEST_ARGUMENT...
tests_of() {
  local processes=$1 seconds=$2 folder=$3 files=()
  shift 3
  while [ "$1" != -- ]; do files+=("$1"); shift; done
  shift
  # shellcheck disable=SC2016 # expanded by the inner shell
  local one='name=${1#tests/}; name=${name%.py}; name=${name//\//-}; file=$1; folder=$2; seconds=$3; shift 3
    timeout --foreground -k 10 "$seconds" "$PYTHON" -m pytest -q -rfE --tb=short -p no:cacheprovider \
      --junitxml="$folder/$name.xml" "$file" "$@" >"$folder/$name.log" 2>&1
    rc=$?; [ $rc -eq 5 ] && rc=0 # no test selected
    echo "$rc $name: $(tail -1 "$folder/$name.log")"
    tail -c 60000 "$folder/$name.log" >"$folder/$name.part" && mv "$folder/$name.part" "$folder/$name.log"
    [ $rc -eq 0 ]'
  if [ -n "$DRY" ]; then
    printf '+ %s at a time, %s s each: %q -m pytest -q' "$processes" "$seconds" "$PYTHON"
    printf ' %q' "${files[@]}" "$@"
    printf '\n'
    return 0
  fi
  printf '%s\0' "${files[@]}" |
    OMP_NUM_THREADS=$(((CPUS + processes - 1) / processes)) xargs -0 -P "$processes" -I{} \
      bash -c "$one" one {} "$folder" "$seconds" "$@" || failed=1
  "$PYTHON" benchmarks/junit_summary.py "$folder" || failed=1
}

ops() { run "$PYTHON" benchmarks/kernels/cuda/bench_gpu_ops.py "$@"; }
whole() { run "$PYTHON" benchmarks/models/bench_resnet.py --device cuda "$@"; }
cli() { run "$PYTHON" -m fused_resnet.cli "$@"; }

# --- sections: $1 is the folder for their results -------------------------------------------------

section_build() {
  local arch
  arch=$(capability)
  [ "$arch" = 9.0 ] && arch=9.0a # wgmma and TMA require the architecture-specific target
  [ -n "$arch" ] || arch=unknown
  run env TORCH_CUDA_ARCH_LIST="$arch" MAX_JOBS="$CPUS" FUSED_RESNET_CUDA=1 FUSED_RESNET_NATIVE=1 \
    "$PYTHON" setup.py build_ext --inplace || return 1
  run nvidia-smi
  run "$PYTHON" -c 'import fused_resnet as fr, json, sys
from fused_resnet.kernels import native, registry
json.dump({**fr.info(initialise_cuda=True), "kernels": native.kernels()}, open(sys.argv[1], "w"), indent=1, default=str)
print(native.build_info())
missing = [registry.missing(op, "native", "cuda") for op in registry.OPS]
sys.exit("\n".join(filter(None, missing)) or None)' "$1/info.json"
  cli info
}

section_device-tests() {
  # Hopper's tiles, which depend most on the chip, first.
  tests_of 8 280 "$1" \
    tests/kernels/cuda/test_hopper.py tests/kernels/cuda/test_[!h]*.py tests/ops/test_*.py \
    -- -m gpu -k "not triton"
  [ "$failed" -eq 0 ] || echo "$SUSPECTS"
}

section_ops() {
  # First the contenders that need no compilation.
  ops --op conv_bn_relu bn_add_relu add_relu --contender native cudnn unfused \
    --rounds 15 --out "$1" --name gpu_ops
  ops --op conv_bn_relu bn_add_relu add_relu --contender fused native triton unfused \
    --rounds 15 --out "$1" --name gpu_ops_triton
}

section_resnet50() {
  local all=(--model resnet50 --batch 256 --dtype bfloat16 --seconds 10 --out "$1"
    --contender eager-channels_last fused fused-graph)
  run env FUSED_RESNET_BACKEND=native "$PYTHON" benchmarks/models/bench_resnet.py --device cuda \
    "${all[@]}" --name resnet50_native
  whole "${all[@]}" --name resnet50_b256
}

section_parity() {
  local model
  for model in resnet50 resnet18; do
    cli parity --device cuda --model "$model" --dtype bfloat16,float16,float32 --json "$1/$model.json"
  done
}

section_tune() { cli tune --model resnet50 --batch 256 --dtype bfloat16 --seconds 480; }

section_ops-tuned() {
  ops --out "$1" --op conv_bn_relu bn_add_relu add_relu
  ops --out "$1" --op conv_bn_relu --contender fused native --tiles --rounds 9 --name gpu_ops_tiles
}

section_resnet50-peers() {
  whole --model resnet50 --batch 256 --dtype bfloat16 --out "$1" --name resnet50_b256 \
    --contender eager eager-channels_last compile fused fused-graph
}

section_peers() {
  local model batch
  while read -r model batch; do
    whole --model "$model" --batch "$batch" --dtype bfloat16 --out "$1" \
      --name "${model}_b$batch" --contender eager-channels_last compile fused fused-graph
  done <<<"resnet50 1
resnet18 256
resnet18 1"
}

section_tests() {
  tests_of "$(((CPUS + 1) / 2))" 560 "$1" $(find tests -name "test_*.py" | sort) --
}

section_sanitizer() {
  local tool
  if ! command -v compute-sanitizer >/dev/null && [ -z "$DRY" ]; then
    echo "skipped: no compute-sanitizer installed"
    return 0
  fi
  for tool in memcheck racecheck synccheck initcheck; do
    # Without the caching allocator every tensor is a separate allocation, so out-of-bounds accesses
    # are detected. (Not --foreground: the checked process must end with the sanitizer.)
    run env PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 140 \
      compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
      "$PYTHON" -m tests.kernels.cuda.sanitizer_list --device cuda
  done
}

section_batches() {
  local batch dtype
  whole --model resnet50 resnet18 --batch 1 8 32 128 --dtype bfloat16 --seconds 4 --out "$1" \
    --name batches --contender eager-channels_last fused fused-graph
  whole --model resnet50 --batch 256 --dtype float16 float32 --seconds 6 --out "$1" \
    --name dtypes --contender eager-channels_last fused fused-graph
  while read -r batch dtype; do
    ops --batch "$batch" --dtype "$dtype" --rounds 15 --out "$1" --name "gpu_ops_b${batch}_$dtype" \
      --op conv_bn_relu bn_add_relu add_relu --contender fused native cudnn unfused
  done <<<"32 bfloat16
1 bfloat16
256 float16
256 float32"
}

section_train() {
  whole --model resnet50 --batch 256 --dtype bfloat16 --mode train --seconds 10 --out "$1" \
    --name train --contender eager-channels_last fused fused-graph
  ops --op conv_backward --contender triton unfused --rounds 9 --out "$1" --name gpu_ops_backward
  ops --op conv_bn_train --contender fused native unfused --rounds 9 --out "$1" \
    --name gpu_ops_statistics
  ops --op norm_conv_train --contender native apart cudnn unfused --rounds 9 --out "$1" \
    --name gpu_ops_prologue
  ops --op conv_norm_backward --contender fused native apart unfused --rounds 9 --out "$1" \
    --name gpu_ops_gradient_sums
  whole --model resnet50 resnet18 --batch 128 --dtype bfloat16 --mode train --out "$1" \
    --name train_compile --contender eager-channels_last compile fused fused-graph
  whole --model resnet50 resnet18 --batch 16 --dtype bfloat16 --mode train --seconds 5 --out "$1" \
    --name train_small --contender eager-channels_last fused fused-graph
  ops --op conv_bn_train --contender native --tiles --rounds 9 --out "$1" \
    --name gpu_ops_statistics_tiles
}

section_ncu() {
  if [ -z "$DRY" ]; then
    if ! command -v ncu >/dev/null; then
      echo "skipped: no ncu installed"
      return 0
    fi
    if ncu --metrics gpu__time_duration.sum -c 1 "$PYTHON" -c 'import torch
torch.ones(9, device="cuda")' 2>&1 | grep ERR_NVGPUCTRPERM; then
      echo "skipped: no permission for GPU performance counters"
      return 0
    fi
  fi
  local op
  for op in conv_bn_relu bn_add_relu add_relu; do
    # By namespace: PyTorch and cuDNN have kernels called elementwise_kernel, bn_... and implicit_gemm.
    run ncu --kernel-name-base demangled --kernel-name 'regex:^(void )?fused_resnet::.*' \
      --launch-count 50 \
      --section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats \
      --section Occupancy --section LaunchStats --csv --page raw --log-file "$1/$op.csv" \
      "$PYTHON" benchmarks/kernels/cuda/bench_gpu_ops.py --op "$op" --contender native --once
  done
}

# --- running them ---------------------------------------------------------------------------------

if [ -n "$INSIDE" ]; then
  mkdir -p "$OUT/$1"
  "section_$1" "$OUT/$1" || failed=1
  exit "$failed"
fi

# Kill what is left of a section. timeout and torchrun make process groups and sessions of their own,
# which a section's time limit does not reach; but every descendant inherits this variable.
end_section() {
  local pids
  for _ in 1 2 3 4 5 6 7 8 9; do # until none has started another in between
    pids=$(grep -lszx "GPU_DAY_SECTION=$1" /proc/[0-9]*/environ | cut -d / -f 3)
    [ -n "$pids" ] || return 0
    # shellcheck disable=SC2086 # a list
    kill -KILL $pids 2>/dev/null
    sleep 0.2
  done
}

# Write the line of a section in OUT/summary.txt, replacing an earlier one.
note() {
  local line
  line=$(printf '%-15s %3d %5d' "$1" "$2" "$3")
  { grep -v "^$1 " "$OUT/summary.txt" 2>/dev/null; echo "$line"; } >"$OUT/.summary"
  mv "$OUT/.summary" "$OUT/summary.txt"
}

chosen=("$@")
for name in "${chosen[@]+"${chosen[@]}"}"; do
  names | grep -qx -e "$name" || { echo "gpu_day.sh: no section $name; see --list" >&2; exit 2; }
done
forced=1
if [ ${#chosen[@]} -eq 0 ]; then
  forced=""
  mapfile -t chosen < <(names)
fi
if [ -z "$DRY" ] && [ -z "$(capability)" ]; then
  echo "gpu_day.sh: neither nvidia-smi nor torch finds a GPU" >&2
  exit 2
fi

trap 'end_section "$$-$name"; exit 143' INT TERM
any_failed=0
for name in "${chosen[@]}"; do
  limit=$(limit_of "$name")
  if [ -n "$DRY" ]; then
    echo "== $name, $limit s"
    GPU_DAY_DRY=1 bash "$HERE" --inside "$OUT" "$name"
    continue
  fi
  # The build always runs: it takes seconds if nothing has changed.
  if [ -z "$forced" ] && [ "$name" != build ] &&
    grep -Eq "^$name +0 " "$OUT/summary.txt" 2>/dev/null; then
    echo "== $name: passed before"
    continue
  fi
  if [ -n "$TOTAL" ]; then
    left=$((TOTAL - SECONDS))
    if [ "$left" -lt 20 ]; then
      echo "== $name: no time left"
      any_failed=1
      continue
    fi
    [ "$left" -lt "$limit" ] && limit=$left
  fi
  echo "== $name, at most $limit s"
  mkdir -p "$OUT/$name"
  begin=$SECONDS
  GPU_DAY_SECTION=$$-$name timeout -k 10 "$limit" bash "$HERE" --inside "$OUT" "$name" \
    >"$OUT/$name/log.txt" 2>&1 &
  wait "$!" # interruptible, unlike a command in the foreground
  rc=$?
  end_section "$$-$name"
  [ "$rc" -eq 0 ] || any_failed=1
  tail -c 900000 "$OUT/$name/log.txt" >"$OUT/$name/.log" && mv "$OUT/$name/.log" "$OUT/$name/log.txt"
  if [ -d "$XDG_CACHE_HOME/fused_resnet" ]; then
    mkdir -p "$OUT/tuned" && cp "$XDG_CACHE_HOME/fused_resnet/"*.json "$OUT/tuned/"
  fi
  note "$name" "$rc" "$((SECONDS - begin))"
  tail -n 12 "$OUT/$name/log.txt"
done
[ -z "$DRY" ] && cat "$OUT/summary.txt"
exit "$any_failed"
