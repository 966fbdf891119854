#include "cpu/memory_pool.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <cstdlib>
#include <map>
#include <mutex>
#include <unordered_map>

namespace fused_resnet {
namespace {

constexpr int64_t kSmallestBytes = int64_t{1} << 20;  // below, PyTorch's allocator reuses well
constexpr int64_t kHugePageBytes = int64_t{1} << 21;
// A free block that this many allocations have not used is returned to the system: several steps of
// a network of a hundred layers.
constexpr int64_t kMaxIdleTakes = 8192;

struct Block {
  int64_t bytes;
  int64_t last_use;  // takes_ when the block was freed
};

class Pool {
 public:
  void* take(int64_t bytes) {
    bytes = rounded(bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    ++takes_;
    // The smallest block that fits, unless it wastes more than an eighth.
    const auto fit = free_.lower_bound(bytes);
    void* p = nullptr;
    if (fit != free_.end() && fit->first - bytes <= bytes / 8) {
      p = fit->second;
      free_bytes_ -= fit->first;
      free_.erase(fit);
    } else {
      p = allocate(bytes);
    }
    used_bytes_ += blocks_[p].bytes;
    peak_bytes_ = std::max(peak_bytes_, used_bytes_);
    if (takes_ % 256 == 0) release_unused_since(takes_ - kMaxIdleTakes);
    return p;
  }

  void put(void* p) {
    std::lock_guard<std::mutex> lock(mutex_);
    Block& block = blocks_[p];
    block.last_use = takes_;
    used_bytes_ -= block.bytes;
    free_bytes_ += block.bytes;
    free_.emplace(block.bytes, p);
  }

  int64_t release() {
    std::lock_guard<std::mutex> lock(mutex_);
    return release_unused_since(takes_ + 1);
  }

  PoolState state() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {used_bytes_, free_bytes_, peak_bytes_};
  }

  void reset_peak() {
    std::lock_guard<std::mutex> lock(mutex_);
    peak_bytes_ = used_bytes_;
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  // Rounds up in steps of a sixteenth of a power of two, so that a block fits several shapes.
  static int64_t rounded(int64_t bytes) {
    int64_t step = kSmallestBytes / 16;
    while (step * 32 < bytes) step *= 2;
    return (bytes + step - 1) / step * step;
  }

  void* allocate(int64_t bytes) {
    void* p = nullptr;
    const auto get = [&] {
      return posix_memalign(&p, kHugePageBytes, static_cast<size_t>(bytes)) == 0;
    };
    const bool found = get() || (release_unused_since(takes_ + 1) > 0 && get());
    check(found, "not enough memory: fused_resnet tried to allocate ", bytes, " bytes");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(p, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
    blocks_[p] = {bytes, takes_};
    return p;
  }

  int64_t release_unused_since(int64_t before) {
    int64_t bytes = 0;
    for (auto it = free_.begin(); it != free_.end();) {
      const auto found = blocks_.find(it->second);
      if (found->second.last_use >= before) {
        ++it;
        continue;
      }
      bytes += found->second.bytes;
      std::free(it->second);
      blocks_.erase(found);
      it = free_.erase(it);
    }
    free_bytes_ -= bytes;
    return bytes;
  }

  std::mutex mutex_;
  std::unordered_map<void*, Block> blocks_;  // used and free
  std::multimap<int64_t, void*> free_;
  int64_t takes_ = 0, used_bytes_ = 0, free_bytes_ = 0, peak_bytes_ = 0;
};

// Never destroyed: tensors may outlive every static of this library.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

#if defined(__unix__) || defined(__APPLE__)
// A fork waits for a thread that is in the pool: the forked process has its copy of the pool, but
// no thread that would finish what that one had begun, nor release its lock.
[[maybe_unused]] const int at_fork =
    pthread_atfork([] { pool().lock(); }, [] { pool().unlock(); }, [] { pool().unlock(); });
#endif

void return_to_pool(void* p) { pool().put(p); }

}  // namespace

PoolState pool_state() { return pool().state(); }
void reset_pool_peak() { pool().reset_peak(); }
int64_t release_pool() { return pool().release(); }

Tensor pooled_empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                    ScalarType dtype) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  int64_t bytes = dtype == ScalarType::Double  ? 8
                  : dtype == ScalarType::Float ? 4
                  : dtype == ScalarType::Byte  ? 1
                                               : 2;
  for (const int64_t size : sizes) bytes *= size;
  if (bytes < kSmallestBytes) {
    AtenTensorHandle small = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
        aoti_torch_device_type_cpu(), 0, &small));
    return Tensor(small);
  }
  void* p = pool().take(bytes);
  return torch::stable::from_blob(p, sizes, strides, cpu, dtype, &return_to_pool);
}

Tensor pooled_channels_last(int64_t N, int64_t C, int64_t H, int64_t W, ScalarType dtype) {
  return pooled_empty({N, C, H, W}, {C * H * W, 1, W * C, C}, dtype);
}

Tensor pooled_like(const Tensor& dense) {
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 0; d < dense.dim(); ++d) {
    sizes.push_back(dense.size(d));
    strides.push_back(dense.stride(d));
  }
  return pooled_empty(sizes, strides, dense.scalar_type());
}

Scratch::Scratch(int64_t bytes) : data_(pool().take(bytes)) {}
Scratch::~Scratch() { pool().put(data_); }

}  // namespace fused_resnet
