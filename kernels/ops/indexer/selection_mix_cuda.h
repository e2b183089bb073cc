// Internal: one selected key's contribution to the hash of selection_hash.h; the same on every
// device.
#pragma once

#include <cstdint>

namespace baleen {

// A bijection of 64 bits in which every bit of (row, id) moves every bit of the result (the
// finaliser of the SplitMix generator).
#ifdef __CUDACC__
__host__ __device__
#endif
    inline uint64_t
    MixSelected(int32_t row, int32_t id) {
  uint64_t x = static_cast<uint64_t>(static_cast<uint32_t>(row)) << 32 | static_cast<uint32_t>(id);
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

}  // namespace baleen
