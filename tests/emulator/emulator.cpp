#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "bank_conflicts.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the current stack pointer and resumes the other stack (stack_switch.cpp).
extern "C" void fused_resnet_switch_stack(void** old_sp, void* new_sp);

namespace emulated {
namespace {

constexpr size_t kStackBytes = 128 * 1024;  // AddressSanitizer's frames are large
constexpr unsigned kWarp = 32;

struct Operation {
  std::function<void()> run;
  bool commit = false;  // marks the end of a group
};

using OperationQueue = std::deque<Operation>;

// For each grid, a random subset of these kinds is delayed: such operations take place only when
// they are waited for, or when no thread can run. Otherwise most missing waits would rarely have an
// effect.
enum class Kind : unsigned { cp_async, wgmma, tma_stores, tma_loads, count };

struct Block;

struct Thread {
  uint8_t* stack = nullptr;
  void* sp = nullptr;
  void* fake_stack = nullptr;
  Index index;
  Block* block = nullptr;
  bool done = false;
  const char* waits_for = "";
  OperationQueue copies, stores;
  std::set<uintptr_t> unfenced;  // writes to shared memory, as 16-byte chunks
  bool wgmma_fenced = false;
  std::array<LaneAccesses, static_cast<size_t>(Access::kinds)> accesses;
};

// Threads that have arrived at a synchronisation point.
struct Rendezvous {
  const char* name = nullptr;
  std::vector<void*> arguments;
  std::vector<Thread*> waiting;
  unsigned arrived = 0;
};

struct Block {
  Index index;
  uint8_t* memory = nullptr;  // the allocation
  uint8_t* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<Thread*> threads;
  unsigned alive = 0;
  Rendezvous all;
  std::map<unsigned, Rendezvous> barriers;
  std::vector<Rendezvous> warps;
  std::map<unsigned, OperationQueue> wgmma;  // by warp
  std::vector<OperationQueue> tma_loads;
  std::map<uint64_t*, std::vector<Thread*>> mbarrier_waiters;
};

struct Machine {
  Device device;
  std::vector<Launch> launches;
  uint64_t random = 1;
  bool recording = false;
  unsigned delayed_kinds = 0;  // one bit per Kind
  std::array<Wavefronts, static_cast<size_t>(Access::kinds)> wavefronts;
  Index grid, block_size;
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Thread>> pool;
  std::vector<Thread*> runnable;
  std::vector<Block*> running;
  Rendezvous grid_rendezvous;
  Thread* current = nullptr;
  void* host_sp = nullptr;
  void* host_fake_stack = nullptr;
  const void* host_bottom = nullptr;
  size_t host_size = 0;
  std::exception_ptr error;

  unsigned below(size_t n) {  // splitmix64
    uint64_t z = (random += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return static_cast<unsigned>((z ^ (z >> 31)) % n);
  }
  ~Machine() {
    for (auto& thread : pool) munmap(thread->stack, kStackBytes);
  }
};

thread_local Machine machine;

Thread& self() {
  if (machine.current == nullptr) throw std::logic_error("emulator: not inside a kernel");
  return *machine.current;
}

// --- stack switching
// -----------------------------------------------------------------------------------

void finish_switch([[maybe_unused]] void* fake_stack, [[maybe_unused]] bool from_host) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, from_host ? &machine.host_bottom : nullptr,
                                  from_host ? &machine.host_size : nullptr);
#endif
}

void switch_to_host([[maybe_unused]] bool final) {
  Thread& thread = self();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(final ? nullptr : &thread.fake_stack, machine.host_bottom,
                                 machine.host_size);
#endif
  fused_resnet_switch_stack(&thread.sp, machine.host_sp);
  finish_switch(thread.fake_stack, true);
}

void thread_main() {
  finish_switch(nullptr, true);
  try {
    (*machine.body)();
  } catch (...) {
    machine.error = std::current_exception();
  }
  self().done = true;
  switch_to_host(true);
  std::abort();
}

void switch_to_thread(Thread& thread) {
  machine.current = &thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.host_fake_stack, thread.stack, kStackBytes);
#endif
  fused_resnet_switch_stack(&machine.host_sp, thread.sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.host_fake_stack, nullptr, nullptr);
#endif
  machine.current = nullptr;
}

void wait(const char* what) {
  self().waits_for = what;
  switch_to_host(false);
}

void wake(std::vector<Thread*>& waiting) {
  machine.runnable.insert(machine.runnable.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

Thread* new_thread(size_t number) {
  while (machine.pool.size() <= number) {
    auto thread = std::make_unique<Thread>();
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    thread->stack = static_cast<uint8_t*>(stack);
    machine.pool.push_back(std::move(thread));
  }
  Thread* thread = machine.pool[number].get();
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(thread->stack, kStackBytes);  // of frames that did not return
#endif
  // Six registers and the return address, placed so that the stack is aligned as after a call.
  auto** top = reinterpret_cast<void**>(thread->stack + kStackBytes - 56);
  top[0] = nullptr;
  top[-1] = reinterpret_cast<void*>(&thread_main);
  for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
  thread->sp = top - 7;
  thread->fake_stack = nullptr;
  thread->done = false;
  thread->waits_for = "";
  thread->copies.clear();
  thread->stores.clear();
  thread->unfenced.clear();
  thread->wgmma_fenced = false;
  for (auto& list : thread->accesses) list.clear();
  return thread;
}

// --- asynchronous operations ---------------------------------------------------------------------

OperationQueue::iterator first_operation(OperationQueue& queue) {
  return std::find_if(queue.begin(), queue.end(), [](const Operation& o) { return !o.commit; });
}

void run(OperationQueue& queue, OperationQueue::iterator which) {
  const Operation operation = std::move(*which);
  queue.erase(which);
  if (!operation.commit) operation.run();
}

// Performs one random pending operation, of a kind that is delayed in this grid only if `delayed`.
// Returns false if there is none.
bool run_some_operation(bool delayed) {
  std::vector<OperationQueue*> found;
  const auto selected = [&](Kind kind) {
    return delayed == ((machine.delayed_kinds >> static_cast<unsigned>(kind) & 1) != 0);
  };
  for (Block* block : machine.running) {
    if (selected(Kind::wgmma))
      for (auto& [group, queue] : block->wgmma) found.push_back(&queue);
    if (selected(Kind::tma_loads))
      for (auto& queue : block->tma_loads) found.push_back(&queue);
    for (Thread* thread : block->threads) {
      if (!thread->copies.empty() && selected(Kind::cp_async)) found.push_back(&thread->copies);
      if (!thread->stores.empty() && selected(Kind::tma_stores)) found.push_back(&thread->stores);
    }
  }
  std::erase_if(found, [](OperationQueue* q) { return first_operation(*q) == q->end(); });
  if (found.empty()) return false;
  OperationQueue& queue = *found[machine.below(found.size())];
  run(queue, first_operation(queue));
  for (Block* block : machine.running)
    std::erase_if(block->tma_loads, [](const OperationQueue& q) { return q.empty(); });
  return true;
}

OperationQueue& queue_of(Queue queue) {
  Thread& thread = self();
  switch (queue) {
    case Queue::cp_async:
      return thread.copies;
    case Queue::tma_stores:
      return thread.stores;
    default:
      return thread.block->wgmma[thread.index.x / kWarp];
  }
}

void count_wavefronts(const Block& block) {
  for (size_t kind = 0; kind < static_cast<size_t>(Access::kinds); ++kind)
    for (size_t first = 0; first < block.threads.size(); first += kWarp) {
      std::vector<const LaneAccesses*> lanes;
      for (size_t t = first; t < std::min(first + kWarp, block.threads.size()); ++t)
        lanes.push_back(&block.threads[t]->accesses[kind]);
      add_wavefronts(lanes, machine.wavefronts[kind]);
    }
}

// --- execution
// -------------------------------------------------------------------------------------

void start_block(Block& block, unsigned number, unsigned threads, size_t shared_bytes,
                 size_t first) {
  block.index = {number, 0, 0};
  // 128 modulo 1024: no better aligned than the hardware guarantees for dynamic shared memory.
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, 128 + shared_bytes) != 0) throw std::bad_alloc();
  block.memory = static_cast<uint8_t*>(memory);
  block.shared = block.memory + 128;
  block.shared_bytes = shared_bytes;
  std::memset(block.shared, 0xff, shared_bytes);
  block.alive = threads;
  block.warps.resize((threads + kWarp - 1) / kWarp);
  for (unsigned t = 0; t < threads; ++t) {
    Thread* thread = new_thread(first + t);
    thread->index = {t, 0, 0};
    thread->block = &block;
    block.threads.push_back(thread);
    machine.runnable.push_back(thread);
  }
}

[[noreturn]] void report_deadlock() {
  std::map<std::string, int> reasons;
  for (Block* block : machine.running)
    for (Thread* thread : block->threads)
      if (!thread->done) ++reasons[thread->waits_for];
  std::string what = "deadlock:";
  for (const auto& [reason, count] : reasons)
    what += " " + std::to_string(count) + " threads wait at " + reason + ";";
  throw Fault(what);
}

void release_if_complete(Block& block) {
  if (block.alive > 0 && block.all.arrived == block.alive) {
    block.all.arrived = 0;
    wake(block.all.waiting);
  }
}

void run_resident_blocks() {
  const size_t operation_interval = 8;  // average steps between spontaneous asynchronous operations
  // With uniform choice all warps advance at about the same rate. Slowing down one warp (or none)
  // exposes writes by other warps to memory that it still reads.
  const unsigned slow_warp = machine.below((machine.block_size.x + kWarp - 1) / kWarp + 1);
  for (;;) {
    if (machine.below(operation_interval) == 0) run_some_operation(false);
    if (machine.runnable.empty()) {
      if (run_some_operation(false) || run_some_operation(true)) continue;
      const bool all_done = std::all_of(machine.running.begin(), machine.running.end(),
                                        [](Block* b) { return b->alive == 0; });
      if (all_done) return;
      report_deadlock();
    }
    size_t pick = machine.below(machine.runnable.size());
    for (int retry = 0; retry < 4 && machine.runnable[pick]->index.x / kWarp == slow_warp; ++retry)
      pick = machine.below(machine.runnable.size());
    Thread* thread = machine.runnable[pick];
    machine.runnable[pick] = machine.runnable.back();
    machine.runnable.pop_back();
    switch_to_thread(*thread);
    if (machine.error) std::rethrow_exception(machine.error);
    if (thread->done) {
      --thread->block->alive;
      release_if_complete(*thread->block);
    }
  }
}

void run_blocks(const std::vector<unsigned>& numbers, unsigned threads, size_t shared_bytes) {
  std::vector<Block> blocks(numbers.size());
  size_t first = 0;
  for (size_t i = 0; i < numbers.size(); ++i, first += threads) {
    start_block(blocks[i], numbers[i], threads, shared_bytes, first);
    machine.running.push_back(&blocks[i]);
  }
  const auto close = [&] {
    for (Block& block : blocks) std::free(block.memory);
    machine.running.clear();
    machine.runnable.clear();
    machine.grid_rendezvous = {};
    machine.current = nullptr;
    machine.error = nullptr;
  };
  try {
    run_resident_blocks();
  } catch (...) {
    const auto error = std::current_exception();
    close();
    std::rethrow_exception(error);
  }
  for (const Block& block : blocks) count_wavefronts(block);
  close();
}

void check_launch(unsigned blocks, unsigned threads, size_t shared_bytes) {
  if (blocks == 0 || threads == 0 || threads > 1024) throw Fault("launch: invalid grid");
  if (shared_bytes > static_cast<size_t>(machine.device.shared_bytes))
    throw Fault("launch: " + std::to_string(shared_bytes) + " bytes of shared memory");
  if (machine.current != nullptr) throw Fault("launch inside a kernel");
}

void start_grid(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  machine.grid = {blocks, 1, 1};
  machine.block_size = {threads, 1, 1};
  machine.body = &body;
  machine.delayed_kinds = machine.below(1u << static_cast<unsigned>(Kind::count));
}

}  // namespace

void fault(const std::string& what) { throw Fault(what); }

Device& device() { return machine.device; }
void set_seed(uint64_t seed) { machine.random = seed; }
void set_recording(bool on) { machine.recording = on; }
std::vector<Launch> take_launches() { return std::exchange(machine.launches, {}); }

void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes,
              const std::function<void()>& body) {
  check_launch(blocks, threads, shared_bytes);
  machine.launches.push_back({blocks, threads, static_cast<int64_t>(shared_bytes), 0});
  start_grid(blocks, threads, body);
  // Start at a random block: kernels must not depend on block order.
  const unsigned offset = machine.below(blocks);
  for (unsigned b = 0; b < blocks; ++b) run_blocks({(b + offset) % blocks}, threads, shared_bytes);
}

void run_cooperative_grid(unsigned blocks, unsigned threads, size_t shared_bytes,
                          const std::function<void()>& body) {
  check_launch(blocks, threads, shared_bytes);
  if (blocks > 2048u / threads * static_cast<unsigned>(machine.device.multiprocessors))
    throw Fault("launch: the cooperative grid is too large to be resident");
  machine.launches.push_back({blocks, threads, static_cast<int64_t>(shared_bytes), 1});
  start_grid(blocks, threads, body);
  std::vector<unsigned> numbers(blocks);
  for (unsigned b = 0; b < blocks; ++b) numbers[b] = b;
  run_blocks(numbers, threads, shared_bytes);
}

const Index& thread_index() { return self().index; }
const Index& block_index() { return self().block->index; }
const Index& block_size() { return machine.block_size; }
const Index& grid_size() { return machine.grid; }
uint8_t* shared_memory() { return self().block->shared; }
uint8_t* shared_at(unsigned offset) { return self().block->shared + offset; }

unsigned shared_offset(const void* p) {
  const Block& block = *self().block;
  const auto* at = static_cast<const uint8_t*>(p);
  if (at < block.shared || at >= block.shared + block.shared_bytes)
    fault("the address is outside shared memory");
  return static_cast<unsigned>(at - block.shared);
}

void collective(const char* name, void* argument, const std::function<void(void**)>& action) {
  Thread& thread = self();
  Rendezvous& rendezvous = thread.block->warps[thread.index.x / kWarp];
  if (rendezvous.arrived == 0) {
    rendezvous.name = name;
    rendezvous.arguments.assign(kWarp, nullptr);
  }
  if (std::strcmp(rendezvous.name, name) != 0)
    fault(std::string("divergent warp: lanes are at ") + rendezvous.name + " and at " + name);
  rendezvous.arguments[thread.index.x % kWarp] = argument;
  if (++rendezvous.arrived < kWarp) {
    rendezvous.waiting.push_back(&thread);
    wait(name);
    return;
  }
  action(rendezvous.arguments.data());
  rendezvous.arrived = 0;
  wake(rendezvous.waiting);
}

void sync_threads() {
  Thread& thread = self();
  Rendezvous& rendezvous = thread.block->all;
  ++rendezvous.arrived;
  rendezvous.waiting.push_back(&thread);
  release_if_complete(*thread.block);
  wait("__syncthreads");
}

void barrier_arrive(unsigned id, unsigned threads) {
  Rendezvous& rendezvous = self().block->barriers[id];
  if (++rendezvous.arrived == threads) {
    rendezvous.arrived = 0;
    wake(rendezvous.waiting);
  }
}

void barrier(unsigned id, unsigned threads) {
  self().block->barriers[id].waiting.push_back(&self());
  barrier_arrive(id, threads);
  wait("a named barrier");
}

void grid_sync() {
  Rendezvous& rendezvous = machine.grid_rendezvous;
  rendezvous.waiting.push_back(&self());
  if (++rendezvous.arrived == machine.running.size() * machine.block_size.x) {
    if (machine.running.size() != machine.grid.x) fault("grid_sync: not all blocks are resident");
    rendezvous.arrived = 0;
    wake(rendezvous.waiting);
  }
  wait("grid_sync");
}

void start(Queue queue, std::function<void()> operation) {
  queue_of(queue).push_back({std::move(operation), false});
}

void commit(Queue queue) { queue_of(queue).push_back({nullptr, true}); }

void finish(Queue queue, unsigned groups_left) {
  if (queue == Queue::wgmma) self().wgmma_fenced = false;
  OperationQueue& operations = queue_of(queue);
  auto groups = static_cast<unsigned>(std::count_if(operations.begin(), operations.end(),
                                                    [](const Operation& o) { return o.commit; }));
  while (groups > groups_left) {
    groups -= operations.front().commit;
    run(operations, operations.begin());
  }
}

void start_unordered(std::function<void()> operation) {
  self().block->tma_loads.push_back({Operation{std::move(operation), false}});
}

void proxy_fence() { self().unfenced.clear(); }

void check_fenced(const void* p, unsigned bytes) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  for (const Thread* thread : self().block->threads) {
    const auto written = thread->unfenced.lower_bound(at / 16 * 16);
    if (written != thread->unfenced.end() && *written < at + bytes)
      fault("the async proxy reads a thread's write without a proxy fence");
  }
}

void wgmma_fence() { self().wgmma_fenced = true; }

void check_wgmma_fenced() {
  if (!self().wgmma_fenced) fault("wgmma: no wgmma.fence since the last wait");
}

// --- mbarriers -----------------------------------------------------------------------------------

namespace {
struct Barrier {  // content of the 8 bytes
  uint16_t count, pending;
  int32_t bytes_and_phase;  // 2 * pending bytes + phase
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

Barrier load(uint64_t* bar) {
  shared_offset(bar);
  if (reinterpret_cast<uintptr_t>(bar) % 8) fault("mbarrier: not aligned to 8 bytes");
  Barrier b;
  std::memcpy(&b, bar, sizeof b);
  return b;
}

void store(uint64_t* bar, Barrier b, Block& block) {
  if (b.pending == 0 && b.bytes_and_phase >> 1 == 0) {
    b.pending = b.count;
    b.bytes_and_phase ^= 1;
    wake(block.mbarrier_waiters[bar]);
  }
  std::memcpy(bar, &b, sizeof b);
}
}  // namespace

void mbarrier_init(uint64_t* bar, unsigned count) {
  const auto n = static_cast<uint16_t>(count);
  load(bar);
  const Barrier b{n, n, 0};
  std::memcpy(bar, &b, sizeof b);
}

void mbarrier_arrive(uint64_t* bar) {
  Barrier b = load(bar);
  if (b.pending == 0) fault("mbarrier: more arrivals than its count");
  --b.pending;
  store(bar, b, *self().block);
}

void mbarrier_expect(uint64_t* bar, unsigned bytes) {
  Barrier b = load(bar);
  b.bytes_and_phase += 2 * static_cast<int32_t>(bytes);
  std::memcpy(bar, &b, sizeof b);
}

void mbarrier_complete(uint64_t* bar, unsigned bytes) {
  // Called by TMA, outside any thread: find the block by the address.
  for (Block* block : machine.running) {
    const auto* at = reinterpret_cast<const uint8_t*>(bar);
    if (at < block->shared || at >= block->shared + block->shared_bytes) continue;
    Barrier b;
    std::memcpy(&b, bar, sizeof b);
    b.bytes_and_phase -= 2 * static_cast<int32_t>(bytes);
    store(bar, b, *block);
  }
}

void mbarrier_wait(uint64_t* bar, unsigned parity) {
  for (;;) {
    const Barrier b = load(bar);
    if (static_cast<unsigned>(b.bytes_and_phase & 1) != parity) return;
    self().block->mbarrier_waiters[bar].push_back(&self());
    wait("an mbarrier");
  }
}

// --- bank conflicts ------------------------------------------------------------------------------

void record(Access kind, const void* p, unsigned bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fault("shared memory: a misaligned access");
  shared_offset(p);
  if (kind == Access::store || kind == Access::stmatrix)
    self().unfenced.insert(reinterpret_cast<uintptr_t>(p) / 16 * 16);
  if (!machine.recording) return;
  self().accesses[static_cast<size_t>(kind)].push_back({reinterpret_cast<uintptr_t>(p), bytes});
}

Wavefronts& wavefronts(Access kind) { return machine.wavefronts[static_cast<size_t>(kind)]; }

}  // namespace emulated
