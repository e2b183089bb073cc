#include "trainer/bench/op_case.h"

#include <fnmatch.h>

#include <algorithm>
#include <set>

#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "trainer/recipe.h"
#include "trainer/training_stage.h"

namespace baleen {
namespace {

// total / parts, where that is a whole number.
absl::StatusOr<int64_t> Share(const char* what, int64_t total, const char* key, int64_t parts) {
  if (total % parts == 0) return total / parts;
  return ConfigError("baleen bench ops: ", what, " = ", total, " is not divisible by parallelism.",
                     key, " = ", parts, "; choose a divisor of ", total);
}

}  // namespace

absl::StatusOr<OpSizes> MakeOpSizes(const StageConfig& stage, const ModelConfig& model, bool cuda) {
  const DeviceKind device = cuda ? DeviceKind::kCuda : DeviceKind::kCpu;
  RETURN_IF_ERROR(CheckBackend(stage, device));
  const ParallelismConfig& axes = stage.parallelism;
  OpSizes sizes;
  sizes.model = EffectiveModel(model, stage.dsa);
  RETURN_IF_ERROR(sizes.model.Validate("baleen bench ops: the model"));
  sizes.dtype = ComputeDType(stage.precision, device);
  sizes.cuda = cuda;
  sizes.seq_length = stage.data.seq_length;
  sizes.keys = stage.micro_batch_size * stage.data.seq_length;
  const auto tensor = [&](const char* what, int64_t total) {
    return Share(what, total, "tensor", axes.tensor);
  };
  ASSIGN_OR_RETURN(sizes.group_rows,
                   Share("the tokens of a microbatch", sizes.keys, "context", axes.context));
  ASSIGN_OR_RETURN(sizes.rows, tensor("the tokens of a context-parallel rank", sizes.group_rows));
  ASSIGN_OR_RETURN(sizes.heads, tensor("num_attention_heads", model.num_attention_heads));
  ASSIGN_OR_RETURN(sizes.intermediate, tensor("intermediate_size", model.intermediate_size));
  ASSIGN_OR_RETURN(sizes.shared_intermediate, tensor("n_shared_experts x moe_intermediate_size",
                                                     std::max<int64_t>(1, model.n_shared_experts) *
                                                         model.moe_intermediate_size));
  ASSIGN_OR_RETURN(sizes.vocab, tensor("vocab_size", model.vocab_size));
  ASSIGN_OR_RETURN(sizes.experts,
                   Share("n_routed_experts", model.n_routed_experts, "expert", axes.expert));
  sizes.expert_rows = sizes.rows * model.num_experts_per_tok;
  sizes.bf16_moments = stage.optimizer.moments == MomentsDType::kBf16;
  return sizes;
}

absl::StatusOr<std::vector<OpCase>> MakeOpCases(const OpSizes& sizes, const OpRequest& asked) {
  OpRequest request = asked;
  if (request.heads.empty()) request.heads = {sizes.heads};
  if (request.tokens.empty()) request.tokens = {sizes.seq_length};
  std::vector<OpCase> all;
  AddSparseAttentionCases(sizes, request, all);
  AddDenseAttentionCases(sizes, request, all);
  AddIndexerCases(sizes, request, all);
  AddLinearCases(sizes, request, all);
  AddExpertCases(sizes, all);
  AddMemoryCases(sizes, all);
  std::vector<std::string> names;
  for (const OpCase& op : all) {
    if (std::find(names.begin(), names.end(), op.op) == names.end()) names.push_back(op.op);
  }
  const std::vector<std::string> patterns = absl::StrSplit(request.ops, ',', absl::SkipEmpty());
  std::set<std::string> unused(patterns.begin(), patterns.end());
  std::vector<OpCase> wanted;
  for (OpCase& op : all) {
    bool matches = false;
    for (const std::string& pattern : patterns) {
      if (::fnmatch(pattern.c_str(), op.op.c_str(), 0) != 0) continue;
      matches = true;
      unused.erase(pattern);
    }
    if (matches) wanted.push_back(std::move(op));
  }
  if (unused.empty() && !patterns.empty()) return wanted;
  return ConfigError("baleen bench ops: --ops ", request.ops, ": no op is called '",
                     unused.empty() ? "" : *unused.begin(), "'; there are ",
                     absl::StrJoin(names, ", "));
}

bool Fp8Operands(DType dtype, bool cuda) { return !cuda || dtype == DType::kBF16; }

double BytesOf(std::initializer_list<Tensor> tensors) {
  double bytes = 0;
  for (const Tensor& tensor : tensors) bytes += static_cast<double>(tensor.bytes());
  return bytes;
}

std::string KernelWords(const OpSizes& sizes, const std::string& on_cuda) {
  return sizes.cuda ? on_cuda : "CPU definition";
}

}  // namespace baleen
