// A shuffled order of 0 .. size - 1 that needs no array: a keyed bijection, evaluated at any place.
//
// An eight-round Feistel network permutes the numbers of b bits, 2^b the power of two at or above
// size; a number that lands outside is sent through again until it lands inside (cycle walking,
// fewer than two passes on average), which keeps it a bijection of 0 .. size - 1. Round keys come
// from Philox, so the order is a function of (seed, stream).
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "kernels/core/check.h"
#include "kernels/core/random.h"

namespace baleen {

class IndexOrder {
 public:
  // The numbers as they are.
  static IndexOrder Identity(int64_t size) { return IndexOrder(size); }
  // `purpose`, `source_idx` and `epoch` together name the stream.
  static IndexOrder Shuffled(int64_t size, uint64_t seed, uint32_t purpose, uint32_t source_idx,
                             int64_t epoch) {
    IndexOrder order(size);
    order.shuffled_ = size > 1;
    const int bits = size > 1 ? std::bit_width(static_cast<uint64_t>(size - 1)) : 1;
    order.low_bits_ = bits / 2;
    order.high_bits_ = bits - bits / 2;
    const std::array<uint32_t, 2> seed_words = {static_cast<uint32_t>(seed),
                                                static_cast<uint32_t>(seed >> 32)};
    const std::array<uint32_t, 4> stream = Philox::Block(
        seed_words,
        {purpose, source_idx, static_cast<uint32_t>(epoch), static_cast<uint32_t>(epoch >> 32)});
    for (uint32_t round = 0; round < kRounds; ++round) {
      const auto words = Philox::Block({stream[0], stream[1]}, {stream[2], stream[3], round, 0});
      order.round_keys_[round] = (uint64_t{words[0]} << 32) | words[1];
    }
    return order;
  }

  int64_t size() const { return size_; }
  // The number at a place of the order.
  int64_t At(int64_t place) const {
    DCHECK(place >= 0 && place < size_) << place << " of " << size_;
    if (!shuffled_) return place;
    auto number = static_cast<uint64_t>(place);
    do {
      number = Permute(number);
    } while (number >= static_cast<uint64_t>(size_));
    return static_cast<int64_t>(number);
  }

 private:
  static constexpr uint32_t kRounds = 8;
  explicit IndexOrder(int64_t size) : size_(size) {}

  // The finaliser of SplitMix64: every input bit reaches every output bit.
  static uint64_t Mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
  }
  // Halves of unequal width are fine: in each round one is xored with a function of the other.
  uint64_t Permute(uint64_t number) const {
    const uint64_t low_mask = (uint64_t{1} << low_bits_) - 1;
    const uint64_t high_mask = (uint64_t{1} << high_bits_) - 1;
    uint64_t low = number & low_mask, high = number >> low_bits_;
    for (uint32_t round = 0; round < kRounds; round += 2) {
      high ^= Mix(low + round_keys_[round]) & high_mask;
      low ^= Mix(high + round_keys_[round + 1]) & low_mask;
    }
    return (high << low_bits_) | low;
  }

  int64_t size_;
  bool shuffled_ = false;
  int low_bits_ = 0;
  int high_bits_ = 1;
  std::array<uint64_t, kRounds> round_keys_ = {};
};

}  // namespace baleen
