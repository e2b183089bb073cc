// What `baleen bench ops` times: calls of public ops (kernels/ops/*.h), as the model makes them, at
// the sizes that one rank of a run file's layout has.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "configs/schema/model_config.h"
#include "configs/schema/run_config.h"
#include "kernels/core/context.h"
#include "kernels/core/status.h"
#include "trainer/bench/bench_ids.h"
#include "trainer/bench/op_inputs.h"

namespace baleen {

// The sizes of one rank: heads, experts and widths of its shards, rows of a microbatch.
struct OpSizes {
  ModelConfig model;  // global
  DType dtype = DType::kF32;
  bool cuda = false;
  int64_t seq_length = 0;
  int64_t rows = 0;        // R: its own rows
  int64_t group_rows = 0;  // G: rows that its heads see, R x tp
  int64_t keys = 0;        // of all ranks' rows
  int64_t heads = 0;
  int64_t intermediate = 0, shared_intermediate = 0, vocab = 0;
  int64_t experts = 0;      // local ones
  int64_t expert_rows = 0;  // N: rows at them, where experts are loaded equally
  bool bf16_moments = false;
};

// ConfigError: a shard that is no whole number, a key that the device cannot honour.
absl::StatusOr<OpSizes> MakeOpSizes(const StageConfig& stage, const ModelConfig& model, bool cuda);

// What of the cases is wanted.
struct OpRequest {
  std::string ops = "*";        // patterns of names, comma-separated
  std::vector<int64_t> heads;   // of attention; empty: the rank's
  std::vector<int64_t> tokens;  // S of attention and indexer; empty: the run's sequence length
  std::vector<BenchIds> ids = {BenchIds::kNear, BenchIds::kRandom};
  int64_t query_rows = 4096;  // T of one call, where the model goes through the rows in chunks
};

// One call, with the tensors it works on.
struct OpCall {
  std::function<void()> run;
  double flops = 0;
  double bytes = 0;    // operands read and results written, each once
  std::string kernel;  // the op's own words, where they depend on the operands
};

// What a figure is a share of.
enum class OpBound : uint8_t { kMatmul, kFp8Matmul, kCopy };

struct OpCase {
  std::string op;      // "sparse_attention.backward"
  std::string shape;   // for people
  std::string kernel;  // the op's own words; empty: OpCall has them, or it has none
  OpBound bound = OpBound::kCopy;
  // Of attention and indexer: T, H (or index heads), S; what goals are found by.
  int64_t rows = 0, heads = 0, keys = 0;
  std::optional<BenchIds> ids;
  // Makes the tensors; in a dry context too, which says what they and the call hold.
  std::function<OpCall(OpInputs& inputs)> make;
};

// By folder of the model: sparse, masked and dense attention; indexer and warm-up; products; what
// only moves bytes.
void AddSparseAttentionCases(const OpSizes& sizes, const OpRequest& request,
                             std::vector<OpCase>& cases);
void AddDenseAttentionCases(const OpSizes& sizes, const OpRequest& request,
                            std::vector<OpCase>& cases);
void AddIndexerCases(const OpSizes& sizes, const OpRequest& request, std::vector<OpCase>& cases);
void AddLinearCases(const OpSizes& sizes, const OpRequest& request, std::vector<OpCase>& cases);
void AddExpertCases(const OpSizes& sizes, std::vector<OpCase>& cases);
void AddMemoryCases(const OpSizes& sizes, std::vector<OpCase>& cases);

// All that the request names, in this order. ConfigError: a pattern that names no op.
absl::StatusOr<std::vector<OpCase>> MakeOpCases(const OpSizes& sizes, const OpRequest& request);

// Whether values of this dtype are quantised to block FP8 (fp8_quantise.h).
bool Fp8Operands(DType dtype, bool cuda);
// Sums of bytes, each tensor once.
double BytesOf(std::initializer_list<Tensor> tensors);
// Rows from which on one call no longer has all rows of a sequence, but the last query_rows: dense
// forms have T = S below.
inline constexpr int64_t kMostWholeRows = int64_t{32} << 10;
// The op's words on GPUs.
std::string KernelWords(const OpSizes& sizes, const std::string& on_cuda);

}  // namespace baleen
