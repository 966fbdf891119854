// The interface of csrc/cpu/threads.h on another library's threads, in place of threads.cpp: as
// many of them as PyTorch is set to, and every piece a task of its own. One of WITH_TBB,
// WITH_TASKFLOW and WITH_OPENMP is defined. Exceptions are left to the library, rounding modes too.
#include "cpu/threads.h"

#if defined(WITH_TBB)
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>
#include <oneapi/tbb/task_group.h>
#elif defined(WITH_TASKFLOW)
#include <taskflow/algorithm/for_each.hpp>
#include <taskflow/taskflow.hpp>
#endif

#include <utility>

namespace fused_resnet {
namespace {

using Region = void (*)(const void* context);
using Piece = void (*)(const void* context, int64_t piece);

thread_local bool inside = false;  // a region, or a piece, whose own run_pieces runs alone
thread_local bool in_piece = false;

void run_piece(Piece body, const void* context, int64_t piece) {
  const bool before = std::exchange(in_piece, true);
  body(context, piece);
  in_piece = before;
}

void run_region(Region body, const void* context) {
  const bool before = std::exchange(inside, true);
  body(context);
  inside = before;
}

// Never destroyed: at exit its threads may already be gone.
template <typename Pool>
Pool& pool() {
  static Pool* const made = new Pool(static_cast<int>(torch::stable::get_num_threads()));
  return *made;
}

#if defined(WITH_TBB)

using Started = oneapi::tbb::task_group;

void enter(Region body, const void* context) {
  auto& arena = pool<oneapi::tbb::task_arena>();
#if defined(TBB_HAS_PARALLEL_PHASE)
  oneapi::tbb::task_arena::parallel_phase phase(arena);  // its threads stay for the next pieces
#endif
  arena.execute([&] { run_region(body, context); });
}

void share(int64_t count, Piece body, const void* context) {
  oneapi::tbb::parallel_for(
      int64_t{0}, count, [&](int64_t piece) { run_piece(body, context, piece); },
      oneapi::tbb::simple_partitioner());
}

Started* start(int64_t count, Piece body, const void* context) {
  auto* group = new Started;
  pool<oneapi::tbb::task_arena>().execute([&] {
    for (int64_t i = 0; i < count; ++i) group->run([=] { run_piece(body, context, i); });
  });
  return group;
}

void finish(Started& group) {
  pool<oneapi::tbb::task_arena>().execute([&] { group.wait(); });
}

#elif defined(WITH_TASKFLOW)

struct Started {
  tf::Taskflow flow;
  tf::Future<void> done;
};

// On one of its threads: only those take part in what they wait for.
void enter(Region body, const void* context) {
  pool<tf::Executor>().async([&] { run_region(body, context); }).get();
}

tf::Taskflow flow_of(int64_t count, Piece body, const void* context) {
  tf::Taskflow flow;
  flow.for_each_index(
      int64_t{0}, count, int64_t{1}, [=](int64_t piece) { run_piece(body, context, piece); },
      tf::DynamicPartitioner(1));
  return flow;
}

void share(int64_t count, Piece body, const void* context) {
  tf::Taskflow flow = flow_of(count, body, context);
  pool<tf::Executor>().corun(flow);
}

Started* start(int64_t count, Piece body, const void* context) {
  auto* started = new Started{flow_of(count, body, context), {}};
  started->done = pool<tf::Executor>().run(started->flow);
  return started;
}

void finish(Started& started) { started.done.wait(); }

#elif defined(WITH_OPENMP)

struct Started {};  // a region's threads cannot work while its caller does something else

void enter(Region body, const void* context) { run_region(body, context); }

void share(int64_t count, Piece body, const void* context) {
  const int threads = static_cast<int>(torch::stable::get_num_threads());
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t piece = 0; piece < count; ++piece) run_piece(body, context, piece);
}

Started* start(int64_t, Piece, const void*) { return nullptr; }

void finish(Started&) {}

#endif

bool alone() { return in_piece || torch::stable::get_num_threads() == 1; }

}  // namespace

void in_region(Region body, const void* context) {
  return inside || alone() ? body(context) : enter(body, context);
}

void run_pieces(int64_t count, Piece body, const void* context) {
  if (count < 2 || alone())
    for (int64_t piece = 0; piece < count; ++piece) body(context, piece);
  else if (inside)
    share(count, body, context);
  else
    in_region([&] { share(count, body, context); });
}

Ahead::Ahead(int64_t count, Piece body, const void* context)
    : count_(count), body_(body), context_(context) {
  if (count > 0 && !inside && !alone()) team_ = start(count, body, context);
}

void Ahead::finish() {
  auto* const started = static_cast<Started*>(std::exchange(team_, nullptr));
  const int64_t count = std::exchange(count_, 0);
  if (!started) return run_pieces(count, body_, context_);
  fused_resnet::finish(*started);
  delete started;
}

Ahead::~Ahead() {
  if (team_) finish();
}

}  // namespace fused_resnet
