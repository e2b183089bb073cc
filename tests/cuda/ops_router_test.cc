// The gate on the GPU: choice under a group limit with ties, weights, gradients, balance.
#include "kernels/core/random.h"
#include "kernels/ops/moe/router.h"
#include "kernels/ops/reduce.h"
#include "tests/cuda/ops_support.h"

namespace baleen {
namespace {

using testing::Cpu;
using testing::ExpectClose;
using testing::ExpectSameBits;
using testing::Gpu;
using testing::IntsOnBoth;
using testing::kGpuDtypes;
using testing::OnBoth;
using testing::OnHost;
using testing::RandomOnBoth;
using testing::ToDoubles;
using testing::ValuesOnBoth;
using testing::ZerosOnBoth;

struct GateCase {
  int64_t tokens, E;
  RouterParams params;
};
// DeepSeek-V3's gate; no groups; one expert a group; one chosen; all chosen; 1024 experts; no
// tokens.
const GateCase kGates[] = {
    {515,
     256,
     {.n_group = 8, .topk_group = 4, .num_experts_per_tok = 8, .routed_scaling_factor = 2.5}},
    {129, 64, {.num_experts_per_tok = 6, .norm_topk_prob = false}},
    {17, 8, {.n_group = 8, .topk_group = 3, .num_experts_per_tok = 3}},
    {3, 5, {.num_experts_per_tok = 1}},
    {9, 12, {.n_group = 4, .topk_group = 2, .num_experts_per_tok = 6}},
    {33, 1024, {.n_group = 32, .topk_group = 5, .num_experts_per_tok = 32}},
    {0, 16, {.num_experts_per_tok = 2}}};

// Multiples of 1/8: sigmoids of different logits lie far apart, equal ones are equal on every
// device, and there are many.
OnBoth CoarseLogits(DType dtype, int64_t tokens, int64_t E, uint64_t seed) {
  const RandomStream random(seed, 23);
  std::vector<double> values(tokens * E);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = (static_cast<double>(random.Integer(i) % 49) - 24) / 8;
  }
  return ValuesOnBoth(dtype, {tokens, E}, values);
}

TEST(CudaRouter, ChoosesLikeTheCpuWithTiesToTheLowerIndex) {
  for (const DType dtype : kGpuDtypes) {
    for (const GateCase& c : kGates) {
      SCOPED_TRACE(::testing::Message() << c.tokens << " of " << c.E << " " << dtype);
      const OnBoth logits = CoarseLogits(dtype, c.tokens, c.E, 1);
      // The bias of half the experts is 0: ties stay ties.
      std::vector<double> biases(c.E, 0.0);
      for (int64_t e = 0; e < c.E; e += 2) biases[e] = static_cast<double>(e % 7 - 3) / 32;
      const OnBoth bias = ValuesOnBoth(DType::kF32, {c.E}, biases);
      const RouterResult gpu = Route(Gpu(), logits.gpu, bias.gpu, c.params);
      const RouterResult cpu = Route(Cpu(), logits.cpu, bias.cpu, c.params);
      ExpectClose(gpu.scores_TE, cpu.scores_TE);
      ExpectSameBits(gpu.expert_ids_TA, cpu.expert_ids_TA);
      ExpectClose(gpu.weights_TA, cpu.weights_TA, c.params.num_experts_per_tok);
      const RouterResult given = RouteWithIds(Gpu(), logits.gpu, gpu.expert_ids_TA, c.params);
      ExpectSameBits(given.weights_TA, OnHost(gpu.weights_TA));
    }
  }
}

TEST(CudaRouter, EqualScoresGoToTheFirstExperts) {
  const OnBoth logits = ZerosOnBoth(DType::kBF16, {2, 64}), bias = ZerosOnBoth(DType::kF32, {64});
  const RouterResult result = Route(Gpu(), logits.gpu, bias.gpu,
                                    {.n_group = 8, .topk_group = 2, .num_experts_per_tok = 10});
  EXPECT_EQ(ToDoubles(OnHost(result.expert_ids_TA)),
            (std::vector<double>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9}));
}

TEST(CudaRouter, NotANumberLeavesValidDifferentIds) {
  std::vector<double> values(2 * 32, 0.25);
  for (int64_t e = 0; e < 32; ++e) values[e] = std::nan("");
  values[32 + 5] = std::nan("");
  const OnBoth logits = ValuesOnBoth(DType::kF32, {2, 32}, values);
  const OnBoth bias = ZerosOnBoth(DType::kF32, {32});
  const RouterResult result =
      Route(Gpu(), logits.gpu, bias.gpu, {.n_group = 4, .topk_group = 2, .num_experts_per_tok = 4});
  const std::vector<double> ids = ToDoubles(OnHost(result.expert_ids_TA));
  for (size_t i = 0; i < ids.size(); ++i) {
    EXPECT_TRUE(ids[i] >= 0 && ids[i] < 32) << ids[i];
    if (i % 4 > 0) EXPECT_GT(ids[i], ids[i - 1]);
  }
}

TEST(CudaRouter, HasTheGradientOfTheDefinition) {
  for (const GateCase& c : kGates) {
    const OnBoth logits = RandomOnBoth(DType::kF32, {c.tokens, c.E}, 2);
    const RouterParams& params = c.params;
    const RouterResult cpu = Route(Cpu(), logits.cpu, ZerosOnBoth(DType::kF32, {c.E}).cpu, params);
    const RouterResult gpu =
        RouteWithIds(Gpu(), logits.gpu, testing::OnGpu(cpu.expert_ids_TA), params);
    const OnBoth dweights = RandomOnBoth(DType::kF32, {c.tokens, params.num_experts_per_tok}, 3);
    const OnBoth dscores = RandomOnBoth(DType::kF32, {c.tokens, c.E}, 4);
    ExpectClose(RouteBackward(Gpu(), dweights.gpu, dscores.gpu, gpu, params),
                RouteBackward(Cpu(), dweights.cpu, dscores.cpu, cpu, params), 16);
    // With one chosen expert and normalised weights the gradient is 0 up to rounding.
    if (params.num_experts_per_tok == 1) continue;
    ExpectClose(RouteBackward(Gpu(), dweights.gpu, Tensor(), gpu, params),
                RouteBackward(Cpu(), dweights.cpu, Tensor(), cpu, params), 64);
  }
}

TEST(CudaRouter, CountsExpertsExactly) {
  for (const auto& [count, E] :
       {std::pair<int64_t, int64_t>{65536, 256}, {0, 8}, {1001, 8192}, {7, 3}}) {
    const RandomStream random(3, 4);
    std::vector<int32_t> values(count);
    for (int64_t i = 0; i < count; ++i) {
      values[i] = static_cast<int32_t>(random.Integer(i) % (E + 1)) - 1;
    }
    const OnBoth ids = IntsOnBoth({count, 1}, values);
    const Tensor gpu = Gpu().Zeros(DType::kI64, {E}), cpu = Cpu().Zeros(DType::kI64, {E});
    for (int repeat = 0; repeat < 2; ++repeat) {
      CountExperts(Gpu(), ids.gpu, gpu);
      CountExperts(Cpu(), ids.cpu, cpu);
    }
    ExpectSameBits(gpu, cpu);
  }
}

TEST(CudaRouter, BalanceStatisticsAndGradientMatchTheDefinition) {
  struct Case {
    int64_t tokens, E, sequences, top_k;
  };
  for (const Case& c : {Case{1000, 256, 2, 8}, Case{70, 8, 5, 2}, Case{1, 3, 1, 3},
                        Case{0, 8, 1, 2}, Case{20000, 64, 1, 6}}) {
    SCOPED_TRACE(::testing::Message() << c.tokens << " of " << c.E);
    // Scores as the gate makes them; the ids chosen from them must be the same on both.
    const OnBoth logits = CoarseLogits(DType::kF32, c.tokens, c.E, 5);
    const OnBoth bias = ZerosOnBoth(DType::kF32, {c.E});
    const RouterParams params{.num_experts_per_tok = 1};
    const Tensor scores_gpu = Route(Gpu(), logits.gpu, bias.gpu, params).scores_TE;
    const Tensor scores_cpu = Cast(Cpu(), OnHost(scores_gpu), DType::kF64);
    std::vector<int32_t> rows(c.tokens);
    // The last row goes back to sequence 0: sequences need not be contiguous.
    for (int64_t t = 0; t < c.tokens; ++t) {
      rows[t] = static_cast<int32_t>(t + 1 == c.tokens ? 0 : t * c.sequences / c.tokens);
    }
    const OnBoth sequence = IntsOnBoth({c.tokens}, rows);
    const BalanceStats gpu =
        BalanceLocalStats(Gpu(), scores_gpu, sequence.gpu, c.sequences, c.top_k);
    const BalanceStats cpu =
        BalanceLocalStats(Cpu(), scores_cpu, sequence.cpu, c.sequences, c.top_k);
    EXPECT_EQ(ToDoubles(OnHost(gpu.counts_BE)), ToDoubles(cpu.counts_BE));
    ExpectClose(gpu.prob_sum_BE, cpu.prob_sum_BE, c.tokens);
    const BalanceStats again =
        BalanceLocalStats(Gpu(), scores_gpu, sequence.gpu, c.sequences, c.top_k);
    ExpectSameBits(again.prob_sum_BE, OnHost(gpu.prob_sum_BE));
    const Tensor loss_gpu = Gpu().Zeros(DType::kF64, {1}), loss_cpu = Cpu().Zeros(DType::kF64, {1});
    AddDot(Gpu(), gpu.counts_BE, gpu.prob_sum_BE, 0.25, loss_gpu);
    AddDot(Cpu(), cpu.counts_BE, cpu.prob_sum_BE, 0.25, loss_cpu);
    const double loss = loss_cpu.data<double>()[0];
    EXPECT_NEAR(OnHost(loss_gpu).data<double>()[0], loss, 1e-5 * loss);
    const OnBoth coefficient = RandomOnBoth(DType::kF32, {c.sequences, c.E}, 6);
    ExpectClose(BalanceBackward(Gpu(), scores_gpu, sequence.gpu, coefficient.gpu),
                BalanceBackward(Cpu(), scores_cpu, sequence.cpu, coefficient.cpu), c.E);
  }
}

TEST(CudaRouter, MovesTheBiasAwayFromTheLoad) {
  for (const int64_t E : {1, 8, 257}) {
    const Tensor counts = Cpu().Zeros(DType::kI64, {E});
    for (int64_t e = 0; e < E; ++e) counts.data<int64_t>()[e] = (e * 37) % 11;
    const OnBoth bias = RandomOnBoth(DType::kF32, {E}, 7);
    const Tensor host = OnHost(bias.gpu);
    UpdateRouterBias(Gpu(), testing::OnGpu(counts), 1e-3, bias.gpu);
    UpdateRouterBias(Cpu(), counts, 1e-3, host);
    ExpectSameBits(bias.gpu, host);
  }
}

}  // namespace
}  // namespace baleen
