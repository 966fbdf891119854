// Splitting work over threads.
//
// Work is taken in pieces, not dealt: a thread that runs takes the next piece, the caller computes
// all of them if no other thread comes, and waits only for pieces that another has begun. Threads
// stay together for a whole op, such as the convolutions of a network. OpenMP's own regions end
// when every thread has finished the range it was dealt, and the others spin until then: with
// another program on the cores, each of a network's 50 would wait for a thread that is not running.
// Threads that wait here spin for microseconds and then sleep, which lets the one they wait for
// run.
//
// The threads are this library's own, unless PyTorch's are running: for milliseconds after
// PyTorch's own ops they spin, and would take the cores from others (ResNet-18 at batch 1 on two
// cores, after one such op: 1.7 of the time). Then they serve, as long as they come in time: each
// must come once per region before it can end. Beside another process that spins, regions on this
// library's threads take 0.4 of the time of those on OpenMP's.
//
// Why a pool of our own (benchmarks/RESULTS.md, "Threads"): beside another process or a second of
// its kind ResNet-50 takes 1.4 and 1.8 of the time on OpenMP's threads. On oneTBB's and Taskflow's
// ResNet-18 takes 1.3 and 1.4 on a quiet machine, about the same on a busy one, and regions of
// microseconds that share cores 0.7. But wheels would carry a second TBB beside OpenVINO's, or
// 32,000 lines of Taskflow's headers, and neither supports use after a fork.
#pragma once

#include "common.h"

namespace fused_resnet {

// Runs body() on the calling thread, while PyTorch's other threads (torch.set_num_threads) take
// part in its run_pieces. A nested call is body() alone. Ops enter a region once.
void in_region(void (*body)(const void* context), const void* context);

template <typename Body>
void in_region(const Body& body) {
  in_region([](const void* context) { (*static_cast<const Body*>(context))(); }, &body);
}

// Calls body(context, piece) once for every piece of [0, count), on this thread and those of the
// region. Returns when all are done; rethrows the first exception. Called from a piece, it runs on
// its thread alone. count < 65536.
void run_pieces(int64_t count, void (*body)(const void* context, int64_t piece),
                const void* context);

template <typename Body>
void run_pieces(int64_t count, const Body& body) {
  run_pieces(
      count,
      [](const void* context, int64_t piece) { (*static_cast<const Body*>(context))(piece); },
      &body);
}

// A region whose pieces other threads compute while the caller does something else: from its start
// until `finish`, which computes what is left, waits and rethrows the first exception. Where that
// needs PyTorch's threads, all is left to `finish`. Starting and finishing are one thread's.
class Ahead {
 public:
  // Calls body(context, piece) once for every piece of [0, count); count < 65536.
  Ahead(int64_t count, void (*body)(const void* context, int64_t piece), const void* context);
  ~Ahead();  // begins no more pieces: unless finished, what they read may be gone
  Ahead(const Ahead&) = delete;
  Ahead& operator=(const Ahead&) = delete;
  void finish();

 private:
  int64_t count_;
  void (*body_)(const void* context, int64_t piece);
  const void* context_;
  void* team_ = nullptr;  // null: nothing was started
};

// Runs body(task, begin, end) for `tasks` consecutive ranges of [0, total), each but the last a
// multiple of `granule` long. The ranges depend only on total and PyTorch's number of threads, so
// sums that are merged range by range are reproducible. There are at most as many tasks as threads
// times `per_thread`: more of them, where no sum depends on it, let threads that run take the work
// of those that do not.
struct Split {
  int64_t total, tasks, task_size;
  Split(int64_t total, int64_t granule, int64_t min_task_size, int64_t per_thread = 1)
      : total(total) {
    const int64_t most = per_thread * torch::stable::get_num_threads();
    tasks = std::clamp<int64_t>(total / std::max<int64_t>(min_task_size, 1), 1, most);
    task_size = (total + tasks - 1) / tasks;
    task_size = std::max<int64_t>((task_size + granule - 1) / granule * granule, 1);
    tasks = (total + task_size - 1) / task_size;
  }
  template <typename Body>
  void run(const Body& body) const {
    run_pieces(tasks, [&](int64_t task) {
      body(task, task * task_size, std::min(total, (task + 1) * task_size));
    });
  }
};

}  // namespace fused_resnet
