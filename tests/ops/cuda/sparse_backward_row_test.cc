// Short rows of dkv: what packing into words with one exponent for eight numbers leaves of them,
// and where the words lie.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/ops/attention/sparse_scatter_row_cuda.h"

namespace baleen {
namespace {

using Eight = std::array<float, 8>;

ShortUnit Pack(const Eight& numbers) {
  float raw[8];
  std::copy(numbers.begin(), numbers.end(), raw);
  return ShortUnit(raw);
}
Eight Unpack(const ShortUnit& unit, const Eight& onto = {}) {
  float2 sums[4];
  std::memcpy(sums, onto.data(), sizeof sums);
  ShortUnitAdder(0).Add(unit.words[0], unit.words[1], unit.words[2], sums);
  Eight out;
  std::memcpy(out.data(), sums, sizeof sums);
  return out;
}

// The last bit of each number, beside the power of two above the largest: 2 / 1023, and 2 / 511 for
// the third and the sixth, the narrow fields. Rounded to half of that.
double Step(int place) { return place == 2 || place == 5 ? 2.0 / 511 : 2.0 / 1023; }
double PowerAbove(const Eight& numbers) {
  float largest = 0;
  for (float x : numbers) largest = std::max(largest, std::abs(x));
  return std::ldexp(1.0, std::ilogb(largest) + 1);
}

TEST(ShortUnit, RoundsToTheNearestStepOfItsLargestNumber) {
  std::mt19937_64 random(7);
  std::normal_distribution<float> normal;
  for (int trial = 0; trial < 20000; ++trial) {
    Eight numbers;
    for (float& x : numbers) x = std::ldexp(normal(random), static_cast<int>(random() % 9) - 4);
    const float scale = std::ldexp(1.0f, static_cast<int>(random() % 200) - 100);
    for (float& x : numbers) x *= scale;
    const Eight found = Unpack(Pack(numbers));
    const double power = PowerAbove(numbers);
    for (int j = 0; j < 8; ++j) {
      ASSERT_LE(std::abs(found[j] - numbers[j]), 0.5001 * Step(j) * power)
          << "number " << j << " of trial " << trial << ": " << numbers[j] << " beside " << power;
    }
  }
}

TEST(ShortUnit, KeepsTheLargestNumbersOfAPowerOfTwo) {
  // Just below a power of two, the code is the largest there is and must not spill over.
  for (const float largest : {std::nextafter(1.0f, 0.0f), 1.0f, std::nextafter(2.0f, 0.0f)}) {
    for (int place = 0; place < 8; ++place) {
      for (const float sign : {-1.0f, 1.0f}) {
        Eight numbers = {};
        numbers[place] = sign * largest;
        const Eight found = Unpack(Pack(numbers));
        for (int j = 0; j < 8; ++j) {
          EXPECT_NEAR(found[j], numbers[j], 0.5001 * Step(j) * PowerAbove(numbers))
              << largest << " at " << place << ", number " << j;
          if (j != place) EXPECT_EQ(found[j], 0) << largest << " at " << place;
        }
      }
    }
  }
}

TEST(ShortUnit, HasLessErrorThanBf16OfNormalNumbers) {
  std::mt19937_64 random(11);
  std::normal_distribution<float> normal;
  double squares = 0, errors = 0;
  for (int trial = 0; trial < 100000; ++trial) {
    Eight numbers;
    for (float& x : numbers) x = normal(random);
    const Eight found = Unpack(Pack(numbers));
    for (int j = 0; j < 8; ++j) {
      squares += double{numbers[j]} * numbers[j];
      errors += std::pow(double{found[j]} - numbers[j], 2);
    }
  }
  // bf16 of normal numbers: 1.6e-3.
  EXPECT_LT(std::sqrt(errors / squares), 1.1e-3);
  EXPECT_GT(std::sqrt(errors / squares), 0.5e-3);
}

TEST(ShortUnit, KeepsZerosAndForgetsWhatIsTinyOnly) {
  for (const float x : Unpack(Pack({}))) EXPECT_EQ(x, 0);
  const Eight tiny = Unpack(Pack({1e-40f, -1e-38f, 0, 1e-39f, 0, 0, 0, 0}));
  for (const float x : tiny) EXPECT_EQ(x, 0);
  const Eight small = Unpack(Pack({1e-33f, 0, 0, 0, 0, 0, 0, -1e-33f}));
  EXPECT_NEAR(small[0], 1e-33f, 2e-36);
  EXPECT_NEAR(small[7], -1e-33f, 2e-36);
}

TEST(ShortUnit, IsNowhereFiniteIfANumberIsNot) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float bad : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN(), 2e38f}) {
    for (int place = 0; place < 8; ++place) {
      Eight numbers = {1, -2, 3, 0, 5, -6, 7, 1e-3f};
      numbers[place] = bad;
      for (const float x : Unpack(Pack(numbers))) {
        EXPECT_FALSE(std::isfinite(x)) << bad << " at " << place;
      }
    }
  }
}

TEST(ShortUnitAdder, AddsToWhatIsThere) {
  const Eight onto = {1, 2, 3, 4, 5, 6, 7, 8};
  const Eight numbers = {1, -1, 0.5f, 0.25f, -0.5f, 1, 0, 0.75f};
  const Eight alone = Unpack(Pack(numbers)), both = Unpack(Pack(numbers), onto);
  for (int j = 0; j < 8; ++j) EXPECT_FLOAT_EQ(both[j], onto[j] + alone[j]) << j;
}

TEST(ScatterRows, HaveAPlaceForEveryWordOfAShortRow) {
  // 32 lanes have 6 words each of the 512 columns in units, then come 64 columns of bf16.
  std::vector<int> users(kScatterRowBytes<true> / 4);
  for (int lane = 0; lane < 32; ++lane) {
    EXPECT_EQ(ScatterUnitPlace(lane) % 16, 0) << lane;
    EXPECT_EQ(ScatterUnitRest(lane) % 8, 0) << lane;
    for (int word = 0; word < 4; ++word) ++users.at(ScatterUnitPlace(lane) / 4 + word);
    for (int word = 0; word < 2; ++word) ++users.at(ScatterUnitRest(lane) / 4 + word);
  }
  for (int word = 0; word < static_cast<int>(users.size()); ++word) {
    EXPECT_EQ(users[word], word < 512 * 12 / 8 / 4 ? 1 : 0) << "word " << word;
  }
}

TEST(ScatterRows, HaveUnitsThatCoverAllColumns) {
  std::vector<int> users(kScatterColumns);
  for (int unit = 0; unit < kScatterColumns / 8; ++unit) {
    for (int x = 0; x < 8; ++x) ++users.at(ScatterUnitColumn(unit) + x / 2 * 8 + x % 2);
  }
  EXPECT_EQ(std::count(users.begin(), users.end(), 1), kScatterColumns);
}

}  // namespace
}  // namespace baleen
