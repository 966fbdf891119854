// What tests/emulator/emulation.py calls by ctypes.
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
// The launches since the last time this was asked, oldest first: at most `room` of four numbers
// each (blocks, threads, bytes of shared memory, together). Returns how many there were.
__attribute__((visibility("default"))) int emulated_launches(int64_t* out, int room) {
  const auto launches = emulated::take_launches();
  for (size_t i = 0; i < std::min(launches.size(), static_cast<size_t>(room)); ++i)
    std::memcpy(out + 4 * i, &launches[i], sizeof launches[i]);
  return static_cast<int>(launches.size());
}
__attribute__((visibility("default"))) void emulated_record(int on) { emulated::set_recording(on); }
// Wavefronts needed (and, with ideal, the least possible) since the last time this was asked.
__attribute__((visibility("default"))) int64_t emulated_wavefronts(int kind, int ideal) {
  emulated::Wavefronts& found = emulated::wavefronts(static_cast<emulated::Access>(kind));
  int64_t& value = ideal ? found.ideal : found.needed;
  const int64_t result = value;
  value = 0;
  return result;
}
}
