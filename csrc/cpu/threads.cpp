#include "cpu/threads.h"

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <time.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace fused_resnet {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kMaxThreads = 128;
constexpr int64_t kTeams = 16;  // regions at once; callers beyond them compute alone
constexpr std::chrono::microseconds kSpin{50};

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waiting for what another thread does: for kSpin spinning, then asleep.
class Event {
 public:
  template <typename Done>
  void wait(const Done& done) {
    const auto end = Clock::now() + kSpin;
    do {
      for (int i = 0; i < 32; ++i) {
        if (done()) return;
        relax();
      }
    } while (Clock::now() < end);
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.fetch_add(1);
    changed_.wait(lock, done);
    asleep_.fetch_sub(1);
  }

  // After what `done` reads was changed, by an atomic operation that is sequentially consistent:
  // either that thread reads the change or this one reads that it sleeps.
  void wake() {
    if (asleep_.load() == 0) return;
    {
      std::lock_guard<std::mutex> lock(mutex_);
    }
    changed_.notify_all();
  }

 private:
  std::atomic<int64_t> asleep_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// How a thread rounds, and whether it flushes subnormals: results must not depend on which thread
// computes them.
uint32_t float_mode() {
#if defined(__x86_64__)
  return _mm_getcsr();
#else
  return 0;
#endif
}
void set_float_mode(uint32_t mode) {
#if defined(__x86_64__)
  if (_mm_getcsr() != mode) _mm_setcsr(mode);
#else
  (void)mode;
#endif
}

// Incremented with every run of pieces and at the end of every region.
struct News {
  alignas(kLineBytes) std::atomic<uint64_t> count{0};
  Event event;

  void tell() {
    count.fetch_add(1);
    event.wake();
  }
  void wait(uint64_t seen) {
    event.wait([&] { return count.load() != seen; });
  }
};

// The threads of a region, and the pieces that they take. Thread 0 is the caller. A team is never
// freed: threads may look at it at any time.
class Team {
 public:
  // news: that its threads wait for. This library's are no part of a team on OpenMP's.
  void open(int64_t threads, News& news) {
    news_ = &news;
    threads_ = threads, mode_ = float_mode();
    served_ = 0;
    closed_ = false;
    waited_ = {};
  }

  void run(int64_t count, void (*body)(const void* context, int64_t piece), const void* context) {
    start(count, body, context);
    finish();
  }

  void start(int64_t count, void (*body)(const void* context, int64_t piece), const void* context) {
    const int64_t threads = threads_;
    body_ = body, context_ = context;
    left_ = count;
    ++number_;
    for (int64_t i = 0; i < threads; ++i) {
      const auto begin = static_cast<uint64_t>(count * i / threads),
                 end = static_cast<uint64_t>(count * (i + 1) / threads);
      shares_[i].word.store(uint64_t{number_} << 32 | begin << 16 | end, std::memory_order_release);
    }
    news_.load()->tell();
  }

  void finish() {
    work(0);
    await([&] { return left_ == 0; });
    if (const std::exception_ptr error = std::exchange(error_, nullptr))
      std::rethrow_exception(error);
  }

  // Instead of `finish`: computes no piece that no thread has begun. Nobody asks for an error.
  void abandon() {
    for (int64_t i = 0; i < threads_; ++i)
      while (take(i, true) >= 0) left_.fetch_sub(1);
    await([&] { return left_ == 0; });
    error_ = nullptr;
  }

  // Computes pieces until all are taken: thread `own`. Returns whether there were any.
  bool work(int64_t own) {
    bool any = false;
    const int64_t threads = threads_.load(std::memory_order_relaxed);
    for (int64_t i = 0; i < threads && own < threads; ++i) {
      const int64_t share = (own + i) % threads;
      for (int64_t piece; (piece = take(share, i == 0)) >= 0; any = true) compute(piece);
    }
    return any;
  }

  // The same until the region is closed.
  void serve(int64_t own) {
    for (News& news = *news_;;) {
      const uint64_t seen = news.count;  // before what it tells of is read
      if (closed_) break;
      if (!work(own)) news.wait(seen);
    }
    if (served_.fetch_add(1) + 2 == threads_) finished_.wake();
  }

  void close() {
    closed_ = true;
    news_.load()->tell();
  }

  bool follows(const News& news) const { return news_ == &news; }
  News own_news;

  // Until all have left `serve`.
  void wait() {
    await([&] { return served_ + 1 == threads_; });
  }

  // How long the caller has waited for the others since `open`.
  Clock::duration waited() const { return waited_; }

 private:
  // A thread's share of the pieces: contiguous, as in the layers before and after, so that the
  // thread finds its part of an activation in its cache. A thread takes its own share from the
  // front and then the others' from the back.
  //
  // Pieces [begin, end) not yet taken, and the number of their run: (number << 32) | (begin << 16)
  // | end. One exchange of the word takes a piece: a thread that read it long ago cannot take a
  // piece of a later run, and who has taken one may read body_ and context_ until it is done.
  struct alignas(kLineBytes) Share {
    std::atomic<uint64_t> word{0};
  };

  // Takes a piece of share i, its first or its last; -1 if none is left.
  int64_t take(int64_t i, bool first) {
    uint64_t word = shares_[i].word.load(std::memory_order_acquire);
    for (;;) {
      const uint64_t begin = word >> 16 & 0xffff, end = word & 0xffff;
      if (begin >= end) return -1;
      const uint64_t rest = first ? word + (uint64_t{1} << 16) : word - 1;
      if (shares_[i].word.compare_exchange_weak(word, rest)) return first ? begin : end - 1;
    }
  }

  template <typename Done>
  void await(const Done& done) {
    if (done()) return;
    const auto begin = Clock::now();
    finished_.wait(done);
    waited_ += Clock::now() - begin;
  }

  void compute(int64_t piece) {
    set_float_mode(mode_);
    try {
      body_(context_, piece);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    if (left_.fetch_sub(1) == 1) finished_.wake();
  }

  std::atomic<News*> news_{nullptr};
  std::atomic<int64_t> threads_{0}, served_{0};
  std::atomic<bool> closed_{true};
  uint32_t mode_ = 0, number_ = 0;
  void (*body_)(const void* context, int64_t piece) = nullptr;
  const void* context_ = nullptr;
  std::mutex mutex_;  // of error_
  std::exception_ptr error_;
  Event finished_;
  Clock::duration waited_{};
  alignas(kLineBytes) std::atomic<int64_t> left_{0};  // pieces not yet done
  Share shares_[kMaxThreads];
};

// Of this thread: the region it is in, null in a piece, which runs alone; and whether it is in one.
thread_local Team* team = nullptr;
thread_local bool inside = false;

// Whether OpenMP's threads come in time, by how long regions on them waited.
class Punctuality {
 public:
  bool holds() const { return Clock::now().time_since_epoch().count() >= not_until_; }

  // After a region that took `all`.
  void add(Clock::duration waited, Clock::duration all) {
    int64_t late = late_.load(std::memory_order_relaxed);
    late = waited > kLate && waited > all / 8 ? late + kWeight : std::max<int64_t>(late - 1, 0);
    if (late >= kMost) {
      not_until_ = (Clock::now() + kPause).time_since_epoch().count();
      late = kMost - kWeight;  // the next late region decides again
    }
    late_.store(late, std::memory_order_relaxed);
  }

 private:
  // More than one late region in kWeight; a quiet machine has one in ten.
  static constexpr std::chrono::microseconds kLate{200};
  static constexpr int64_t kWeight = 4, kMost = 12;
  static constexpr std::chrono::seconds kPause{1};
  std::atomic<int64_t> late_{0}, not_until_{0};
};

// Whether OpenMP's threads are running, by the processor time of one of them since the calling
// thread's last region. (That of the process is as old as the system's last tick.)
class OpenMp {
 public:
  // True also if none is known, to get to know one.
  bool runs() const {
    std::chrono::nanoseconds used{};
    return !known_ || !read(clock_, used) ||
           used - used_ > std::chrono::nanoseconds(Clock::now() - since_) / 4;
  }

  // Called by the thread itself.
  void meet() {
#if defined(__linux__)
    known_ = pthread_getcpuclockid(pthread_self(), &clock_) == 0;
#endif
  }

  void end_region() {
    since_ = Clock::now();
    if (known_) known_ = read(clock_, used_);
  }

 private:
#if defined(__linux__)
  clockid_t clock_{};
  static bool read(clockid_t clock, std::chrono::nanoseconds& used) {
    timespec t{};
    if (clock_gettime(clock, &t) != 0) return false;  // the thread has ended
    used = std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
    return true;
  }
#else
  int clock_ = 0;
  static bool read(int, std::chrono::nanoseconds&) { return false; }
#endif
  bool known_ = false;
  std::chrono::nanoseconds used_{};
  Clock::time_point since_{};
};
thread_local OpenMp openmp;

class Threads {
 public:
  // Whether no thread is in a region.
  bool idle() const { return used_ == 0; }

  // Null if all teams are in use.
  Team* enter() {
    for (int64_t i = 0; i < kTeams; ++i)
      if (!(used_.load(std::memory_order_relaxed) >> i & 1) && !(used_.fetch_or(1u << i) >> i & 1))
        return &teams_[i];
    return nullptr;
  }

  void leave(const Team* t) {
    for (int64_t i = 0; i < kTeams; ++i)
      if (&teams_[i] == t) used_.fetch_and(~(1u << i));
  }

  // Starts this library's own threads, up to `count`.
  void start(int64_t count) {
    if (started_.load(std::memory_order_acquire) >= count) return;
    std::lock_guard<std::mutex> lock(mutex_);
    for (int64_t i = started_; i < count; ++i) {
      try {
        std::thread(&Threads::serve, this, i + 1).detach();
      } catch (const std::system_error&) {
        return;  // the system has no thread to give: the others compute its share
      }
      started_ = i + 1;
    }
  }

  Punctuality punctuality;
  News news;

 private:
  void serve(int64_t own) {
    inside = true;
    for (;;) {
      const uint64_t seen = news.count;
      bool any = false;
      for (Team& t : teams_)
        if (t.follows(news)) any |= t.work(own);
      if (!any) news.wait(seen);
    }
  }

  Team teams_[kTeams];
  std::atomic<uint32_t> used_{0};
  std::atomic<int64_t> started_{0};
  std::mutex mutex_;
};

// Never destroyed: its threads may outlive every static of this library. A forked process has none
// of its parent's threads, and begins anew; an OpenMP region would wait for them for ever.
std::atomic<Threads*> instance{nullptr};
std::atomic<bool> forked{false};

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int at_fork =
    pthread_atfork(nullptr, nullptr, [] { instance = nullptr, forked = true; });
#endif

// Without a lock, which another thread may hold at a fork.
Threads& threads() {
  Threads* found = instance.load(std::memory_order_acquire);
  if (found) return *found;
  auto made = std::make_unique<Threads>();
  return *(instance.compare_exchange_strong(found, made.get()) ? made.release() : found);
}

// Processors that this thread may use.
int64_t processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return kMaxThreads;
}

// The region's body on thread 0. Its exception is kept: parallel_for would replace the message.
std::exception_ptr run_body(Team* own, void (*body)(const void* context), const void* context) {
  std::exception_ptr error;
  team = own;
  try {
    body(context);
  } catch (...) {
    error = std::current_exception();
  }
  team = nullptr;
  return error;
}

std::exception_ptr run_on_openmp(Team& own, int64_t count, Punctuality& punctuality,
                                 void (*body)(const void* context), const void* context) {
  std::exception_ptr error;
  OpenMp& known = openmp;
  const auto begin = Clock::now();
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    const bool before = std::exchange(inside, true);
    for (int64_t i = first; i < last; ++i) {
      if (i > 0) {
        if (i == 1 && first > 0) known.meet();
        own.serve(i);
        continue;
      }
      error = run_body(&own, body, context);
      own.close();
      if (last > 1) continue;  // fewer threads than asked for: this one is the others, too
      own.wait();
      punctuality.add(own.waited(), Clock::now() - begin);
    }
    inside = before;
  });
  return error;
}

// Threads of a region that begins now.
int64_t threads_of_region() {
  const int64_t wanted = torch::stable::get_num_threads();
  return wanted == 1 ? 1 : std::min({wanted, kMaxThreads, processors()});
}

// Whether they are PyTorch's.
bool on_openmp(const Threads& all) {
  return !forked && all.idle() && openmp.runs() && all.punctuality.holds();
}

}  // namespace

void in_region(void (*body)(const void* context), const void* context) {
  if (inside) return body(context);
  const int64_t count = threads_of_region();
  Threads& all = threads();
  const bool theirs = count > 1 && on_openmp(all);
  Team* const own = count > 1 ? all.enter() : nullptr;
  std::exception_ptr error;
  if (own) own->open(count, theirs ? own->own_news : all.news);
  if (own && theirs) {
    error = run_on_openmp(*own, count, all.punctuality, body, context);
  } else {
    if (own) all.start(count - 1);
    inside = true;
    error = run_body(own, body, context);
    inside = false;
  }
  if (own) all.leave(own);
  if (count > 1) openmp.end_region();
  if (error) std::rethrow_exception(error);
}

Ahead::Ahead(int64_t count, void (*body)(const void* context, int64_t piece), const void* context)
    : count_(count), body_(body), context_(context) {
  const int64_t wanted = inside || count == 0 ? 1 : threads_of_region();
  if (wanted == 1) return;
  Threads& all = threads();
  Team* const own = on_openmp(all) ? nullptr : all.enter();
  if (!own) return;
  own->open(wanted, all.news);
  all.start(wanted - 1);
  own->start(count, body, context);
  team_ = own;
}

void Ahead::finish() {
  Team* const own = static_cast<Team*>(std::exchange(team_, nullptr));
  const int64_t count = std::exchange(count_, 0);
  if (!own) return run_pieces(count, body_, context_);
  std::exception_ptr error;
  try {
    own->finish();
  } catch (...) {
    error = std::current_exception();
  }
  threads().leave(own);
  openmp.end_region();
  if (error) std::rethrow_exception(error);
}

Ahead::~Ahead() {
  Team* const own = static_cast<Team*>(team_);
  if (!own) return;
  own->abandon();
  threads().leave(own);
}

void run_pieces(int64_t count, void (*body)(const void* context, int64_t piece),
                const void* context) {
  if (count > 1 && !inside) return in_region([&] { run_pieces(count, body, context); });
  Team* const own = std::exchange(team, nullptr);
  if (count > 1 && own)
    own->run(count, body, context);
  else
    for (int64_t piece = 0; piece < count; ++piece) body(context, piece);
  team = own;
}

}  // namespace fused_resnet
