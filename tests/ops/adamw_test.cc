// AdamW by hand and against a plain restatement; clipping and the skip flag.
#include "kernels/ops/adamw.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using testing::RandomTensor;
using testing::TensorOf;
using testing::ToDoubles;
using Doubles = std::vector<double>;

struct State {
  Tensor param, grad, m, v;
};

TEST(Adamw, TakesTheFirstStepByHand) {
  const Context context = Context::Cpu();
  const State s{TensorOf(context, DType::kF64, {3}, {1, 2, -3}),
                TensorOf(context, DType::kF64, {3}, {4, -8, 0}), context.Zeros(DType::kF64, {3}),
                context.Zeros(DType::kF64, {3})};
  const AdamwParams params{.lr = 0.1, .beta1 = 0.9, .beta2 = 0.75, .eps = 1, .weight_decay = 0.5};
  AdamwUpdate(context, params, s.param, s.grad, s.m, s.v,
              TensorOf(context, DType::kF64, {2}, {0.5, 0}));
  // g = {2, -4, 0}; m / (1 - b1) = g, v / (1 - b2) = g^2: update g / (|g| + 1) + 0.5 param.
  const Doubles param = ToDoubles(s.param), m = ToDoubles(s.m), v = ToDoubles(s.v);
  EXPECT_NEAR(param[0], 1 - 0.1 * (2.0 / 3 + 0.5), 1e-15);
  EXPECT_NEAR(param[1], 2 - 0.1 * (-4.0 / 5 + 1), 1e-15);
  EXPECT_NEAR(param[2], -3 - 0.1 * (0 - 1.5), 1e-15);
  EXPECT_NEAR(m[0], 0.2, 1e-15);
  EXPECT_NEAR(m[1], -0.4, 1e-15);
  EXPECT_NEAR(v[0], 1, 1e-15);
  EXPECT_NEAR(v[1], 4, 1e-15);
}

TEST(Adamw, FollowsTheFormulaOverManySteps) {
  const Context context = Context::Cpu();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const int64_t count = 37;
    const Tensor param = RandomTensor(context, dtype, {count}, 1);
    const Tensor m = context.Zeros(dtype, {count}), v = context.Zeros(dtype, {count});
    Doubles p = ToDoubles(param), pm(count, 0.0), pv(count, 0.0);
    AdamwParams params{.lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};
    for (params.step = 1; params.step <= 20; ++params.step) {
      const Tensor grad = RandomTensor(context, dtype, {count}, 100 + params.step);
      AdamwUpdate(context, params, param, grad, m, v, TensorOf(context, dtype, {2}, {0.25, 0}));
      const Doubles g = ToDoubles(grad);
      for (int64_t i = 0; i < count; ++i) {
        pm[i] = 0.9 * pm[i] + 0.1 * (0.25 * g[i]);
        pv[i] = 0.95 * pv[i] + 0.05 * (0.25 * g[i]) * (0.25 * g[i]);
        const double m_hat = pm[i] / (1 - std::pow(0.9, params.step));
        const double v_hat = pv[i] / (1 - std::pow(0.95, params.step));
        p[i] -= 1e-2 * (m_hat / (std::sqrt(v_hat) + 1e-8) + 0.1 * p[i]);
      }
    }
    // Each step rounds a parameter of size 1 once and its update of size 1e-2 a few times.
    const double eps = dtype == DType::kF64 ? 0x1p-53 : 0x1p-24;
    EXPECT_LT(testing::RelativeError(ToDoubles(param), p), eps * (4 + std::sqrt(20.0)));
    EXPECT_LT(testing::RelativeError(ToDoubles(m), pm), 8 * eps);
    EXPECT_LT(testing::RelativeError(ToDoubles(v), pv), 8 * eps);
  }
}

TEST(Adamw, LeavesEverythingAsItIsWhenToldToSkip) {
  const Context context = Context::Cpu();
  const State s{
      TensorOf(context, DType::kF32, {2}, {1, 2}), TensorOf(context, DType::kF32, {2}, {NAN, 1}),
      TensorOf(context, DType::kF32, {2}, {3, 4}), TensorOf(context, DType::kF32, {2}, {5, 6})};
  AdamwUpdate(context, {.lr = 1}, s.param, s.grad, s.m, s.v,
              TensorOf(context, DType::kF32, {2}, {0, 1}));
  EXPECT_EQ(ToDoubles(s.param), (Doubles{1, 2}));
  EXPECT_EQ(ToDoubles(s.m), (Doubles{3, 4}));
  EXPECT_EQ(ToDoubles(s.v), (Doubles{5, 6}));
}

Doubles Control(const Context& context, DType dtype, double sum_of_squares, double max_norm) {
  const Tensor control = TensorOf(context, dtype, {2}, {-7, -7});
  ClipControl(context, TensorOf(context, DType::kF64, {1}, {sum_of_squares}), max_norm, control);
  return ToDoubles(control);
}

TEST(ClipControl, ScalesLongGradientsAndLeavesShortOnes) {
  const Context context = Context::Cpu();
  EXPECT_NEAR(Control(context, DType::kF64, 16, 1)[0], 1 / (4 + 1e-6), 1e-15);
  EXPECT_EQ(Control(context, DType::kF64, 16, 1)[1], 0);
  EXPECT_EQ(Control(context, DType::kF32, 0.25, 1), (Doubles{1, 0}));
  EXPECT_EQ(Control(context, DType::kF32, 0, 1), (Doubles{1, 0}));
  EXPECT_EQ(Control(context, DType::kF32, 1e30, 0), (Doubles{1, 0}));  // no clipping
}

TEST(ClipControl, SkipsStepsThatAreNotFinite) {
  const Context context = Context::Cpu();
  for (const double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    EXPECT_EQ(Control(context, DType::kF32, bad, 1), (Doubles{0, 1}));
    EXPECT_EQ(Control(context, DType::kF64, bad, 0), (Doubles{1, 1}));
  }
}

TEST(AdamwDeathTest, NamesTheTensorsThatDoNotFit) {
  const Context context = Context::Cpu();
  const Tensor three = context.Zeros(DType::kF32, {3}), two = context.Zeros(DType::kF32, {2});
  EXPECT_DEATH(AdamwUpdate(context, {}, three, two, three, three, two),
               "adamw: grad is F32\\[2\\], expected F32\\[3\\]");
  EXPECT_DEATH(AdamwUpdate(context, {.step = 0}, three, three, three, three, two), "step 0");
}

TEST(Adamw, DecaysRangesApartAndWritesTheWorkingCopy) {
  const Context context = Context::Cpu();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const auto state = [&] {
      return AdamwTensors{.param = RandomTensor(context, dtype, {11}, 1),
                          .grad = RandomTensor(context, dtype, {11}, 2),
                          .m = context.Zeros(dtype, {11}),
                          .v = context.Zeros(dtype, {11})};
    };
    const Tensor control = TensorOf(context, dtype, {2}, {0.5, 0});
    AdamwTensors whole = state();
    whole.working = context.Zeros(DType::kBF16, {11});
    whole.decay_begin_N1 = context.Empty(DType::kI64, {4});
    const int64_t begins[] = {0, 4, 4, 11};
    std::copy(std::begin(begins), std::end(begins), whole.decay_begin_N1.data<int64_t>());
    whole.decay_N = TensorOf(context, dtype, {3}, {0.5, 9, 0});
    AdamwUpdate(context, {.lr = 0.1, .weight_decay = 7}, whole, control);
    // Range by range gives the same bits.
    const AdamwTensors parts = state();
    for (const auto& [begin, count, decay] :
         {std::tuple<int64_t, int64_t, double>{0, 4, 0.5}, {4, 7, 0}}) {
      AdamwUpdate(context, {.lr = 0.1, .weight_decay = decay}, parts.param.Flat(begin, count),
                  parts.grad.Flat(begin, count), parts.m.Flat(begin, count),
                  parts.v.Flat(begin, count), control);
    }
    EXPECT_TRUE(testing::SameBits(whole.param, parts.param));
    const Doubles param = ToDoubles(whole.param), working = ToDoubles(whole.working);
    for (size_t i = 0; i < param.size(); ++i) {
      EXPECT_EQ(working[i], BFloat16::FromFloat(static_cast<float>(param[i])).ToFloat());
    }
  }
}

TEST(Adamw, RefusesSegmentsThatLeaveElementsOut) {
  const Context context = Context::Cpu();
  const Tensor three = context.Zeros(DType::kF32, {3});
  AdamwTensors tensors{.param = three, .grad = three, .m = three, .v = three};
  tensors.decay_N = context.Zeros(DType::kF32, {1});
  const Tensor control = context.Zeros(DType::kF32, {2});
  EXPECT_DEATH(AdamwUpdate(context, {}, tensors, control), "decay segments");
  tensors.decay_begin_N1 = context.Zeros(DType::kI64, {2});
  EXPECT_DEATH(AdamwUpdate(context, {}, tensors, control),
               "decay segments from 0 to 0 of F32\\[3\\]");
}

}  // namespace
}  // namespace baleen
