// Runs CUDA kernels on the host, block by block, thread by thread. Every thread of a block is a
// stack of its own; one OS thread switches between them where they wait for one another. Which
// thread goes on, and when an asynchronous copy or product happens, is drawn by a seeded generator:
// a missing wait or barrier shows as a wrong number sooner or later, and always for the same seed.
//
// Shared memory is a heap allocation of exactly the size asked for, filled with NaN before each
// block; global memory is the tensors' own. AddressSanitizer sees every access to either.
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

// What the kernel did wrong: a hang, lanes that part ways, a misaligned address.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] void fault(const std::string& what);

// --- the machine ---------------------------------------------------------------------------------

struct Device {
  int multiprocessors = 3;
  int architecture = 90;  // 10 * major + minor
  int shared_bytes = 227 * 1024;
};
Device& device();
void set_seed(uint64_t seed);
void set_recording(bool on);  // of bank conflicts
struct Launch {
  int64_t blocks, threads, shared_bytes, together;
};
std::vector<Launch> take_launches();  // since the last time

void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes,
              const std::function<void()>& body);
void run_grid_together(unsigned blocks, unsigned threads, size_t shared_bytes,
                       const std::function<void()>& body);  // all blocks at once: grid_sync works

const Index& thread_index();
const Index& block_index();
const Index& block_size();
const Index& grid_size();
uint8_t* shared_memory();
unsigned shared_offset(const void* p);  // from the start of shared memory; a fault outside it
uint8_t* shared_at(unsigned offset);

// --- waiting for one another ---------------------------------------------------------------------

// All 32 threads of a warp come here with an argument; the last one runs action(arguments), by
// lane; then all go on.
void collective(const char* name, void* argument, const std::function<void(void**)>& action);
void sync_threads();                                 // those of the block that have not returned
void barrier(unsigned id, unsigned threads);         // bar.sync
void barrier_arrive(unsigned id, unsigned threads);  // bar.arrive: counted, not waiting
void grid_sync();

// --- asynchronous operations ---------------------------------------------------------------------

// An operation that happens at some moment from now on, or at the last that it may; those of one
// queue happen in order.
// Queues: a thread's own copies, a warp's products, a thread's stores by the copy engine.
enum class Queue { copies, products, stores };
void start(Queue queue, std::function<void()> operation);
void commit(Queue queue);                           // closes a group of those started
void finish(Queue queue, unsigned groups_left);     // waits until only so many groups are open
void start_alone(std::function<void()> operation);  // of the copy engine: in no order at all

// Discipline that real hardware needs and this machine would not miss. A thread's own writes to
// shared memory (`record`ed) need its proxy_fence before the copy engine or a product reads them
// (PTX ISA, "Async proxy": both are of it); a warpgroup's products need its threads' products_fence
// after they were last waited for.
void proxy_fence();
void check_fenced(const void* p, unsigned bytes);  // a fault if any thread's writes there are not
void products_fence();
void check_products_fenced();

// mbarriers: 8 bytes of shared memory, as this emulator keeps them.
void mbarrier_init(uint64_t* bar, unsigned count);
void mbarrier_arrive(uint64_t* bar);
void mbarrier_expect(uint64_t* bar, unsigned bytes);    // raises the bytes awaited; no arrival
void mbarrier_complete(uint64_t* bar, unsigned bytes);  // by the copy engine
void mbarrier_wait(uint64_t* bar, unsigned parity);

// --- bank conflicts ------------------------------------------------------------------------------

// A lane's access to shared memory. The i-th access of a kind by each lane of a warp is taken as
// one warp access; `wavefronts` counts what the banks need for it, `ideal` what its bytes need.
enum class Access { load, store, async_store, ldmatrix, stmatrix, kinds };
void record(Access kind, const void* p, unsigned bytes);
struct Wavefronts {
  int64_t needed = 0, ideal = 0;
};
Wavefronts& wavefronts(Access kind);

}  // namespace emulated
