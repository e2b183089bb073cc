#include "trainer/bench/kernel_kind.h"

#include <cxxabi.h>

#include <cstdlib>

#include "absl/strings/match.h"

namespace baleen {
namespace {

struct Rule {
  absl::string_view part;  // of the mangled name
  absl::string_view kind;
};

// The first that matches.
constexpr Rule kRules[] = {
    {"nccl", "messages"},
    {"dense_indexer_loss", "dense indexer loss"},
    {"indexer_backward", "indexer backward"},
    {"indexer_scores", "indexer scores"},
    {"IndexerScores", "indexer scores"},
    {"indexer_general", "indexer, general kernels"},
    {"topk_select", "top-k"},
    {"TopkSelect", "top-k"},
    // The masked kernels serve dense attention too, without a mask.
    {"KeyGradientKernel", "attention backward"},
    {"QueryGradientKernel", "attention backward"},
    {"masked_attention_backward", "attention backward"},
    {"masked_attention_schedule", "attention backward"},
    {"masked_attention", "attention"},
    {"MaskedAttention", "attention"},
    {"sparse_attention_backward", "sparse attention backward"},
    {"sparse_attention_general_backward", "sparse attention backward"},
    {"SparseAttentionBackward", "sparse attention backward"},
    {"sparse_scatter", "sparse attention backward"},
    {"sparse_attention", "sparse attention"},
    {"SparseAttention", "sparse attention"},
    {"attention_general_backward", "attention backward"},
    {"sdpa_sm90_flash_bprop", "attention backward"},
    {"bprop", "attention backward"},
    {"matmul_dq", "attention backward"},  // of cuDNN
    {"attention", "attention"},
    {"sdpa", "attention"},
    {"fprop", "attention"},
    {"grouped_matmul", "grouped GEMM"},
    {"Grouped", "grouped GEMM"},
    {"nvjet", "GEMM"},
    {"cutlass", "GEMM"},
    {"gemm", "GEMM"},
    {"splitK", "GEMM"},
    {"cublas", "GEMM"},
    {"adamw", "AdamW"},
    {"rms_norm", "norms"},
    {"layer_norm", "norms"},
    {"column_sums", "norms"},
    {"swiglu", "swiglu"},
    {"rope", "rope"},
    {"strided", "strided copies"},
    {"elementwise", "elementwise"},
    {"reduce_cuda", "sums"},
    {"permute", "permutation"},
    {"stable_sort", "permutation"},
    {"router", "router"},
    {"cross_entropy", "cross entropy"},
    {"embedding", "embedding"},
    {"hadamard", "hadamard"},
    {"fp8_simulate", "fp8"},
    {"selection", "selection hash"},
};

}  // namespace

std::string KernelKind(absl::string_view mangled_name) {
  for (const Rule& rule : kRules) {
    if (absl::StrContains(mangled_name, rule.part)) return std::string(rule.kind);
  }
  return "other";
}

std::string ShortKernelName(const std::string& mangled_name) {
  int status = 0;
  char* const text = abi::__cxa_demangle(mangled_name.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 ? text : mangled_name;
  std::free(text);
  // "void baleen::(anonymous namespace)::AdamwKernel<4, float>(long, ...)" -> "AdamwKernel"
  constexpr absl::string_view kAnonymous = "(anonymous namespace)";
  for (size_t at; (at = name.find(kAnonymous.data(), 0, kAnonymous.size())) != std::string::npos;) {
    name.erase(at, kAnonymous.size() + 2);
  }
  name = name.substr(0, name.find_first_of("(<"));
  const size_t colon = name.rfind("::");
  if (colon != std::string::npos) name = name.substr(colon + 2);
  const size_t space = name.rfind(' ');
  return space == std::string::npos ? name : name.substr(space + 1);
}

}  // namespace baleen
