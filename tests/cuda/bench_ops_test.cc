// baleen bench ops on the GPU: every op's call runs in bf16 at a small model's sizes, takes time,
// holds what its dry run said at most, and gives it back.
#include <gtest/gtest.h>

#include <optional>

#include "tests/cuda/gpu.h"
#include "trainer/bench/ops_bench.h"

namespace baleen {
namespace {

using testing::Gpu;

// Widths of the published heads, so that the tuned kernels run; all else small.
OpSizes SmallSizes() {
  ModelConfig model;
  model.hidden_size = 512;
  model.vocab_size = 1024;
  model.num_attention_heads = 16;
  model.q_lora_rank = 256;
  model.intermediate_size = 512;
  model.moe_intermediate_size = 256;
  model.n_routed_experts = 16;
  model.num_experts_per_tok = 4;
  model.n_group = 4;
  model.topk_group = 2;
  model.index_topk = 128;
  StageConfig stage = DefaultStageConfig();
  stage.data.seq_length = 512;
  stage.parallelism.expert = 2;
  const auto sizes = MakeOpSizes(stage, model, /*cuda=*/true);
  CHECK_OK(sizes.status());
  return *sizes;
}

TEST(CudaBenchOps, EveryOpRunsAndHoldsWhatItsDryRunSays) {
  Context& context = Gpu();
  const OpSizes sizes = SmallSizes();
  OpRequest request;
  request.query_rows = 256;
  const auto cases = MakeOpCases(sizes, request);
  ASSERT_TRUE(cases.ok()) << cases.status();
  OpInputs inputs(context, sizes.dtype, 1);
  std::string no_trace;
  // Held all the time: what empties the L2, and the products beside which ops run. An FP8 product
  // makes its result, 8192^2 in bf16, at each call, and finds the operands of the op beside it.
  std::optional<int64_t> held;
  constexpr int64_t kFp8Result = int64_t{2} * 8192 * 8192;
  BenchOps(
      inputs, sizes, *cases, {.steps = 1, .trace = false, .memory_bytes = int64_t{8} << 30},
      [&](const OpResult& result) {
        EXPECT_TRUE(result.fits) << result.op.op;
        EXPECT_GT(result.median, 1e-7) << result.op.op;
        EXPECT_LT(result.median, 1) << result.op.op;
        const MemoryUse total = context.pool().Total();
        if (held) {
          const bool fp8 = result.op.bound == OpBound::kFp8Matmul;
          const int64_t needed = result.needed_bytes + (fp8 ? kFp8Result : 0);
          // Small counters of the general kernels are not planned.
          EXPECT_LE(total.peak_bytes - *held, needed + (int64_t{4} << 20)) << result.op.op;
        }
        held = held.value_or(total.bytes);
        EXPECT_EQ(total.bytes, *held) << result.op.op;
        context.pool().ResetPeak();
      },
      no_trace);
  EXPECT_LT(*held, int64_t{2} << 30);
}

}  // namespace
}  // namespace baleen
