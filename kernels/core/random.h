// Philox4x32-10 (Salmon et al., SC'11): random numbers as a pure function of a key and a counter.
//
// Baleen never carries generator state: a weight is a function of (seed, tensor name, element
// index), a sample of (seed, step, slot). So every layout and every restart draws the same numbers.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "absl/strings/string_view.h"

namespace baleen {

struct Philox {
  // Four 32-bit random words for (key, counter).
  static constexpr std::array<uint32_t, 4> Block(std::array<uint32_t, 2> key,
                                                 std::array<uint32_t, 4> counter) {
    for (int round = 0; round < 10; ++round) {
      const uint64_t product0 = uint64_t{0xD2511F53} * counter[0];
      const uint64_t product1 = uint64_t{0xCD9E8D57} * counter[2];
      counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
                 static_cast<uint32_t>(product1),
                 static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
                 static_cast<uint32_t>(product0)};
      key[0] += 0x9E3779B9;
      key[1] += 0xBB67AE85;
    }
    return counter;
  }
};

// 64-bit FNV-1a of a name: the stream a tensor draws from.
constexpr uint64_t NameStream(absl::string_view name) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
  return hash;
}

// Random values addressed by index within one stream of one seed.
class RandomStream {
 public:
  RandomStream(uint64_t seed, uint64_t stream) : seed_(seed), stream_(stream) {}

  // Uniform in [0, 1) with 53 random bits.
  double Uniform(uint64_t index) const {
    const std::array<uint32_t, 4> words = Words(index);
    return static_cast<double>(((uint64_t{words[0]} << 32) | words[1]) >> 11) * 0x1p-53;
  }
  uint64_t Integer(uint64_t index) const {
    const std::array<uint32_t, 4> words = Words(index);
    return (uint64_t{words[2]} << 32) | words[3];
  }
  // Standard normal by Box-Muller.
  double Normal(uint64_t index) const {
    const std::array<uint32_t, 4> words = Words(index);
    const double u =
        (static_cast<double>(((uint64_t{words[0]} << 32) | words[1]) >> 11) + 1) * 0x1p-53;
    const double v = static_cast<double>(((uint64_t{words[2]} << 32) | words[3]) >> 11) * 0x1p-53;
    return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586476925286766559 * v);
  }

 private:
  std::array<uint32_t, 4> Words(uint64_t index) const {
    return Philox::Block({static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32)},
                         {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                          static_cast<uint32_t>(stream_), static_cast<uint32_t>(stream_ >> 32)});
  }
  uint64_t seed_;
  uint64_t stream_;
};

}  // namespace baleen
