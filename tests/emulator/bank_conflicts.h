// Counts the wavefronts that the 32 banks of shared memory, 4 bytes wide, need for the accesses of
// a warp.
#pragma once

#include <algorithm>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "emulator.h"

namespace emulated {

// A lane's accesses of one kind, in order: address and bytes.
using LaneAccesses = std::vector<std::pair<uintptr_t, unsigned>>;

// The i-th accesses of a warp's lanes form one warp access. It is processed in groups of as many
// lanes as access 128 bytes. A group needs as many wavefronts as the largest number of distinct
// words in one bank.
inline void add_wavefronts(const std::vector<const LaneAccesses*>& lanes, Wavefronts& sum) {
  size_t longest = 0;
  for (const LaneAccesses* lane : lanes) longest = std::max(longest, lane->size());
  for (size_t i = 0; i < longest; ++i) {
    unsigned bytes = 4;
    for (const LaneAccesses* lane : lanes)
      if (i < lane->size()) bytes = (*lane)[i].second;
    const size_t at_once = 128 / bytes;
    for (size_t begin = 0; begin < lanes.size(); begin += at_once) {
      std::map<uintptr_t, std::set<uintptr_t>> words;  // by bank
      for (size_t l = begin; l < std::min(begin + at_once, lanes.size()); ++l)
        if (i < lanes[l]->size())
          for (unsigned b = 0; b < bytes; b += 4) {
            const uintptr_t word = ((*lanes[l])[i].first + b) / 4;
            words[word % 32].insert(word);
          }
      size_t needed = 0;
      for (const auto& [bank, set] : words) needed = std::max(needed, set.size());
      sum.needed += static_cast<int64_t>(needed);
      sum.ideal += needed > 0;
    }
  }
}

}  // namespace emulated
