// Runs CUDA kernels on the host. Every thread of a block has its own stack; a single OS thread
// switches between the stacks where CUDA threads wait for each other. A seeded generator chooses
// which thread continues and when an asynchronous operation (cp.async, TMA, wgmma) takes place. A
// missing wait or barrier therefore shows as a wrong result for some seeds, reproducibly for each
// seed.
//
// Shared memory is a heap allocation of exactly the requested size, filled with NaN before each
// block; global memory is the memory of the tensors. AddressSanitizer checks every access to both.
// Overview and limits: tests/emulator/README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulated {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// An error of the kernel: a deadlock, divergent lanes, a misaligned address.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] void fault(const std::string& what);

// --- device --------------------------------------------------------------------------------------

struct Device {
  int multiprocessors = 3;
  int architecture = 90;  // 10 * major + minor
  int shared_bytes = 227 * 1024;
};
Device& device();
void set_seed(uint64_t seed);
void set_recording(bool on);  // of bank conflicts
struct Launch {
  int64_t blocks, threads, shared_bytes, cooperative;
};
std::vector<Launch> take_launches();  // since the previous call

void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes,
              const std::function<void()>& body);
void run_cooperative_grid(
    unsigned blocks, unsigned threads, size_t shared_bytes,
    const std::function<void()>& body);  // all blocks resident: supports grid_sync

const Index& thread_index();
const Index& block_index();
const Index& block_size();
const Index& grid_size();
uint8_t* shared_memory();
unsigned shared_offset(const void* p);  // from the start of shared memory; faults outside it
uint8_t* shared_at(unsigned offset);

// --- synchronisation -----------------------------------------------------------------------------

// Warp-collective operation: all 32 threads of a warp call it with an argument. The last one runs
// action(arguments), indexed by lane, then all continue.
void collective(const char* name, void* argument, const std::function<void(void**)>& action);
void sync_threads();                          // the threads of the block that have not returned
void barrier(unsigned id, unsigned threads);  // bar.sync
void barrier_arrive(unsigned id, unsigned threads);  // bar.arrive: does not wait
void grid_sync();

// --- asynchronous operations ---------------------------------------------------------------------

// Starts an operation that takes place at a random time, at the latest when it is waited for.
// Operations of one queue take place in order.
// Queues: cp.async of a thread, wgmma of a warp, TMA stores of a thread.
enum class Queue { cp_async, wgmma, tma_stores };
void start(Queue queue, std::function<void()> operation);
void commit(Queue queue);                        // closes a group of started operations
void finish(Queue queue, unsigned groups_left);  // until at most this many groups are pending
void start_unordered(std::function<void()> operation);  // TMA loads: in no order

// Fences that the hardware requires but the emulator's memory does not. A thread's writes to shared
// memory (see `record`) need its proxy_fence before TMA or wgmma reads them (PTX ISA, "Async
// proxy"). The wgmma of a warpgroup need a wgmma_fence of its threads after the last wait.
void proxy_fence();
void check_fenced(const void* p, unsigned bytes);  // faults if a thread's write there is not fenced
void wgmma_fence();
void check_wgmma_fenced();

// mbarriers: 8 bytes of shared memory, in a format private to the emulator.
void mbarrier_init(uint64_t* bar, unsigned count);
void mbarrier_arrive(uint64_t* bar);
void mbarrier_expect(uint64_t* bar, unsigned bytes);    // adds to the expected bytes; no arrival
void mbarrier_complete(uint64_t* bar, unsigned bytes);  // by TMA
void mbarrier_wait(uint64_t* bar, unsigned parity);

// --- bank conflicts ------------------------------------------------------------------------------

// Records a lane's access to shared memory. The i-th accesses of a kind by the lanes of a warp form
// one warp access. `needed` counts the wavefronts that the banks need for it, `ideal` those that
// its bytes need.
enum class Access { load, store, async_store, ldmatrix, stmatrix, kinds };
void record(Access kind, const void* p, unsigned bytes);
struct Wavefronts {
  int64_t needed = 0, ideal = 0;
};
Wavefronts& wavefronts(Access kind);

}  // namespace emulated
