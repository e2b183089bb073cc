// Sums of a row in fp64 for the CPU definitions, in a fixed order that the compiler can vectorise:
// eight partial sums over i mod 8, then the partial sums in order. The rows' statistics do not lose
// bits to their length.
#pragma once

#include <cstdint>

namespace baleen {

// sum over i of term(i), term giving a double.
template <typename Term>
double SumInLanes(int64_t count, Term term) {
  constexpr int kLanes = 8;
  double lanes[kLanes] = {};
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int64_t i = whole; i < count; ++i) lanes[i - whole] += term(i);
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

}  // namespace baleen
