// Times parallel regions of csrc/cpu/threads.h, linked with threads.cpp or with pools.cpp.
//
//     regions empty|cifar|resnet50|fork
//
// Prints 0, then answers each line of standard input, a number of calls, with their seconds. A call
// is 53 regions, one after the other as the convolutions of ResNet-50 for one image. `fork` prints
// whether the same can be computed in a forked process within 5 s.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <string_view>
#include <vector>

#include "cpu/threads.h"

namespace {

using fused_resnet::in_region;
using fused_resnet::run_pieces;

volatile float result;

// This many products, added up in registers, eight chains of eight floats: as fast as AVX2 can.
void multiply(int64_t products) {
  typedef float Vector __attribute__((vector_size(32)));
  Vector sums[8] = {}, factor = Vector{} + 0.999f, term = Vector{} + result;
  for (int64_t i = 0; i < products / 64; ++i)
    for (Vector& sum : sums) sum = sum * factor + term;
  for (const Vector& sum : sums) term += sum;
  if (term[0] == 1.0f) result = term[0];
}

// Products of each convolution, over `scale`; 1 for images of 224 x 224.
std::vector<int64_t> resnet50(int64_t scale) {
  std::vector<int64_t> found{118'013'952 / scale};
  const auto add = [&](int64_t units) { found.push_back(units * 12'845'056 / scale); };
  const int64_t blocks[] = {3, 4, 6, 3};
  for (int64_t stage = 0; stage < 4; ++stage)
    for (int64_t block = 0; block < blocks[stage]; ++block) {
      const int64_t wide = stage ? 8 : 4;  // the strided projection; 1 x 1 after a wider layer
      add(block ? 4 : stage ? 8 : 1);
      add(9);
      add(4);
      if (block == 0) add(wide);
    }
  return found;
}

// As the convolutions split them: 8 pieces per thread, but none below 2^20 products.
void run(const std::vector<int64_t>& layers) {
  in_region([&] {
    for (const int64_t products : layers) {
      const int64_t most = 8 * torch::stable::get_num_threads();
      const int64_t pieces = std::clamp<int64_t>(products >> 20, 2, most);
      run_pieces(pieces, [&](int64_t) { multiply(products / pieces); });
    }
  });
}

bool works_in_a_fork(const std::vector<int64_t>& layers) {
  run(layers);
  const pid_t child = fork();
  if (child == 0) {
    alarm(5);  // ends a child that waits for threads it does not have
    run(layers);
    _exit(0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  return status == 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view work = argc > 1 ? argv[1] : "";
  // Images of 32 x 32 have 1/49 of the pixels.
  const auto layers = resnet50(work == "empty" ? 1 << 30 : work == "cifar" ? 49 : 1);
  if (work == "fork") {
    std::puts(works_in_a_fork(layers) ? "true" : "false");
    return 0;
  }
  for (int i = 0; i < 3; ++i) run(layers);
  std::puts("0");
  std::fflush(stdout);
  for (long calls; std::scanf("%ld", &calls) == 1;) {
    run(layers);
    const auto begin = std::chrono::steady_clock::now();
    for (long i = 0; i < calls; ++i) run(layers);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    std::printf("%.9f\n", seconds.count());
    std::fflush(stdout);
  }
}
