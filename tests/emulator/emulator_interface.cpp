// The functions that tests/emulator/emulation.py calls through ctypes.
#include <algorithm>
#include <cstring>

#include "emulator.h"

extern "C" {
__attribute__((visibility("default"))) void emulated_device(int multiprocessors, int architecture) {
  emulated::device().multiprocessors = multiprocessors;
  emulated::device().architecture = architecture;
  emulated::device().shared_bytes = (architecture == 90   ? 227
                                     : architecture == 80 ? 163
                                                          : 99) *
                                    1024;
}
__attribute__((visibility("default"))) void emulated_seed(uint64_t seed) {
  emulated::set_seed(seed);
}
// Writes the launches since the previous call, oldest first: at most `capacity`, as four values
// each (blocks, threads, bytes of shared memory, cooperative). Returns the number of launches.
__attribute__((visibility("default"))) int emulated_launches(int64_t* out, int capacity) {
  const auto launches = emulated::take_launches();
  for (size_t i = 0; i < std::min(launches.size(), static_cast<size_t>(capacity)); ++i)
    std::memcpy(out + 4 * i, &launches[i], sizeof launches[i]);
  return static_cast<int>(launches.size());
}
__attribute__((visibility("default"))) void emulated_record(int on) { emulated::set_recording(on); }
// The wavefronts needed (with `ideal`: the minimum) since the previous call.
__attribute__((visibility("default"))) int64_t emulated_wavefronts(int kind, int ideal) {
  emulated::Wavefronts& found = emulated::wavefronts(static_cast<emulated::Access>(kind));
  int64_t& value = ideal ? found.ideal : found.needed;
  const int64_t result = value;
  value = 0;
  return result;
}
}
