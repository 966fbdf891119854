// Runs a model that examples/export.py wrote, without Python:
//
//     run MODEL.pt2 LIBRARY INPUT N C H W [CALLS]
//
// LIBRARY: this package's libfused_resnet.so. INPUT: N*C*H*W floats. Prints the outputs, then the
// median milliseconds of CALLS calls.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>

int main(int argc, char** argv) try {
  if (argc < 8) throw std::runtime_error("usage: run MODEL.pt2 LIBRARY INPUT N C H W [CALLS]");
  // The model calls operations of this library; without it, loading the model fails.
  if (!dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
  torch::inductor::AOTIModelPackageLoader model(argv[1]);

  const at::Tensor x = at::empty({atoll(argv[4]), atoll(argv[5]), atoll(argv[6]), atoll(argv[7])});
  const auto bytes = static_cast<std::streamsize>(x.nbytes());
  std::ifstream input(argv[3], std::ios::binary);
  if (!input.read(static_cast<char*>(x.data_ptr()), bytes))
    throw std::runtime_error(std::string(argv[3]) + " is shorter than N*C*H*W floats");

  const at::Tensor y = model.run({x})[0].contiguous().to(at::kFloat);
  for (int64_t i = 0; i < y.numel(); ++i) std::printf("%.9g\n", y.data_ptr<float>()[i]);

  std::vector<double> times;
  for (int i = 0, calls = argc > 8 ? atoi(argv[8]) : 0; i < calls; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    model.run({x});
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - begin;
    times.push_back(time.count());
  }
  std::sort(times.begin(), times.end());
  if (!times.empty()) std::fprintf(stderr, "%.3f ms\n", times[times.size() / 2]);
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
