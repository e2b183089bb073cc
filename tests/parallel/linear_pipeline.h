// A model of which every number of a pipelined step is known: part p maps x to w_p x + c_pm, in
// 64-bit whole numbers modulo 2^64, so that nothing rounds and any tensor in the wrong place shows.
//
//   y_p = w_p x_p + c_pm      dx_p = w_p dy_p      dw_p = sum over m of x_p . dy_p
//
// LinearReference computes a step on one rank; LinearWork is the same as PipelineWork, which
// compares what it is handed with the reference and computes on from that.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/core/context.h"
#include "parallel/pipeline_engine.h"

namespace baleen::testing {

using Numbers = std::vector<uint64_t>;

// 5120 bytes: more than the 4096 that MPI sends eagerly in shared memory.
constexpr int64_t kLinearWidth = 640;

// A scrambled number for each pair (splitmix64).
inline uint64_t Scramble(uint64_t a, uint64_t b) {
  uint64_t z = a * 0x9e3779b97f4a7c15 + b * 0xd1b54a32d192ed03 + 1;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

inline uint64_t Weight(int part) { return Scramble(1, part) | 1; }

inline Numbers LinearForward(int part, int microbatch, const Numbers& x) {
  Numbers y(x);
  for (uint64_t& value : y) value = Weight(part) * value + Scramble(100 + part, microbatch);
  return y;
}

inline Numbers LinearBackwardInput(int part, const Numbers& dy) {
  Numbers dx(dy);
  for (uint64_t& value : dx) value *= Weight(part);
  return dx;
}

inline uint64_t LinearBackwardWeight(const Numbers& x, const Numbers& dy) {
  uint64_t dw = 0;
  for (size_t i = 0; i < x.size(); ++i) dw += x[i] * dy[i];
  return dw;
}

// The input of the first part (which = 2), or the gradient of the last part's output (3).
inline Numbers LinearSource(int which, int microbatch) {
  Numbers values(kLinearWidth);
  for (size_t i = 0; i < values.size(); ++i) values[i] = Scramble(which + 10 * microbatch, i);
  return values;
}

struct LinearReference {
  LinearReference(int num_parts, int num_microbatches)
      : x(num_parts, std::vector<Numbers>(num_microbatches)), dy(x), dw(num_parts, 0) {
    for (int m = 0; m < num_microbatches; ++m) {
      x[0][m] = LinearSource(2, m);
      for (int p = 1; p < num_parts; ++p) x[p][m] = LinearForward(p - 1, m, x[p - 1][m]);
      dy[num_parts - 1][m] = LinearSource(3, m);
      for (int p = num_parts - 1; p > 0; --p) dy[p - 1][m] = LinearBackwardInput(p, dy[p][m]);
      for (int p = 0; p < num_parts; ++p) dw[p] += LinearBackwardWeight(x[p][m], dy[p][m]);
    }
  }

  std::vector<std::vector<Numbers>> x, dy;  // [num_parts][num_microbatches]
  std::vector<uint64_t> dw;                 // [num_parts]
};

class LinearWork : public PipelineWork {
 public:
  // With `most_delay_us` every call first sleeps for a time scrambled from `delay_seed`.
  LinearWork(int num_parts, int num_microbatches, int most_delay_us = 0, uint64_t delay_seed = 0)
      : reference_(num_parts, num_microbatches),
        last_part_(num_parts - 1),
        most_delay_us_(most_delay_us),
        delay_seed_(delay_seed) {}

  Tensor Forward(int part, int microbatch, const Tensor& x) override {
    Delay();
    EXPECT_EQ(x.empty(), part == 0);
    const Numbers values = x.empty() ? LinearSource(2, microbatch) : FromTensor(x);
    EXPECT_TRUE(values == reference_.x[part][microbatch])
        << "activation, part " << part << " microbatch " << microbatch;
    const bool is_new = x_.emplace(std::pair(part, microbatch), values).second;
    EXPECT_TRUE(is_new) << "forward twice, part " << part << " microbatch " << microbatch;
    ++forwards_;
    return part == last_part_ ? Tensor() : ToTensor(LinearForward(part, microbatch, values));
  }

  Tensor BackwardInput(int part, int microbatch, const Tensor& dy) override {
    Delay();
    EXPECT_EQ(dy.empty(), part == last_part_);
    const Numbers values = dy.empty() ? LinearSource(3, microbatch) : FromTensor(dy);
    EXPECT_TRUE(values == reference_.dy[part][microbatch])
        << "gradient, part " << part << " microbatch " << microbatch;
    const bool is_new = dy_.emplace(std::pair(part, microbatch), values).second;
    EXPECT_TRUE(is_new) << "backward twice, part " << part << " microbatch " << microbatch;
    return part == 0 ? Tensor() : ToTensor(LinearBackwardInput(part, values));
  }

  void BackwardWeight(int part, int microbatch) override {
    Delay();
    const auto x = x_.extract({part, microbatch});
    const auto dy = dy_.extract({part, microbatch});
    ASSERT_FALSE(x.empty() || dy.empty()) << "part " << part << " microbatch " << microbatch;
    dw_[part] += LinearBackwardWeight(x.mapped(), dy.mapped());
  }

  Both ForwardBackward(int forward_part, int forward_microbatch, const Tensor& x, int backward_part,
                       int backward_microbatch, const Tensor& dy) override {
    ++interleaved_;
    Both both;
    both.gradient = BackwardInput(backward_part, backward_microbatch, dy);
    both.activation = Forward(forward_part, forward_microbatch, x);
    return both;
  }

  Tensor EmptyActivation() override { return context_.Empty(DType::kI64, {kLinearWidth}); }

  // After the program: every microbatch passed the rank's parts, and their weights' gradients are
  // the reference's.
  void ExpectDone(const Schedule& schedule, int rank) const {
    int own_parts = 0;
    for (int part = 0; part < schedule.num_parts(); ++part) {
      if (schedule.part_rank[part] != rank) continue;
      ++own_parts;
      if (schedule.spec.forward_only) continue;
      const auto dw = dw_.find(part);
      ASSERT_TRUE(dw != dw_.end()) << "no weight gradient of part " << part;
      EXPECT_EQ(dw->second, reference_.dw[part]) << "weight gradient of part " << part;
    }
    EXPECT_EQ(forwards_, own_parts * schedule.spec.num_microbatches);
    EXPECT_EQ(x_.size(), schedule.spec.forward_only ? forwards_ : 0u);
    EXPECT_TRUE(dy_.empty());
    EXPECT_EQ(context_.pool().Total().bytes, 0) << "the engine still holds tensors";
  }

  int interleaved() const { return interleaved_; }
  // The most tensors of the pipeline alive at once: what waits, and what is passed in and out.
  int64_t peak_tensors() const {
    return context_.pool().Total().peak_bytes / (kLinearWidth * DTypeBytes(DType::kI64));
  }

 private:
  // Tensors are copied in and out, so that the pool counts the engine's alone.
  static Numbers FromTensor(const Tensor& tensor) {
    EXPECT_EQ(tensor.num_elements(), kLinearWidth);
    const auto* data = reinterpret_cast<const uint64_t*>(tensor.data<int64_t>());
    return Numbers(data, data + tensor.num_elements());
  }

  Tensor ToTensor(const Numbers& values) {
    const Tensor tensor = EmptyActivation();
    std::copy(values.begin(), values.end(), reinterpret_cast<uint64_t*>(tensor.data<int64_t>()));
    return tensor;
  }

  void Delay() {
    if (most_delay_us_ == 0) return;
    const uint64_t delay = Scramble(delay_seed_, calls_++) % most_delay_us_;
    std::this_thread::sleep_for(std::chrono::microseconds(delay));
  }

  const LinearReference reference_;
  const int last_part_;
  const int most_delay_us_;
  const uint64_t delay_seed_;
  Context context_ = Context::Cpu();
  std::map<std::pair<int, int>, Numbers> x_, dy_;  // by (part, microbatch), until BackwardWeight
  std::map<int, uint64_t> dw_;
  size_t forwards_ = 0;
  int interleaved_ = 0;
  uint64_t calls_ = 0;
};

}  // namespace baleen::testing
