// The report is made of sections that each return text; faults are collected beside them and end it
// as the verdict.
#include "checkpoints/inspect_hf.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "checkpoints/fp8_blocks.h"
#include "checkpoints/hf_checkpoint.h"
#include "kernels/core/log.h"

namespace baleen {
namespace {

constexpr int64_t kChunkElements = int64_t{1} << 22;  // 16 MiB of F32 at a time

// "model.layers.3.mlp.experts.17.up_proj.weight" -> "model.layers.*.mlp.experts.*.up_proj.weight".
std::string Pattern(absl::string_view name) {
  std::string pattern;
  bool in_number = false;
  for (size_t i = 0; i < name.size(); ++i) {
    const bool digit = name[i] >= '0' && name[i] <= '9';
    const bool starts = digit && !in_number && i > 0 && name[i - 1] == '.';
    if (starts) pattern.push_back('*');
    in_number = digit && (starts || in_number);
    if (!in_number) pattern.push_back(name[i]);
  }
  return pattern;
}

std::string Billions(int64_t count) {
  if (count < 10'000'000) return absl::StrCat(count);
  return absl::StrFormat("%.2f B", static_cast<double>(count) * 1e-9);
}

std::string Gigabytes(int64_t bytes) {
  if (bytes < 10'000'000) return absl::StrCat(bytes, " bytes");
  return absl::StrFormat("%d bytes (%.2f GB)", bytes, static_cast<double>(bytes) * 1e-9);
}

// Names under one heading, those that differ in layer and expert only on one line.
std::string ListByPattern(absl::string_view heading, const std::vector<std::string>& names) {
  std::map<std::string, int64_t> counts;
  for (const std::string& name : names) ++counts[Pattern(name)];
  std::string text = absl::StrCat(heading, ": ", names.size(), " tensors\n");
  for (const auto& [pattern, count] : counts) {
    absl::StrAppend(&text, "  ", absl::StrFormat("%7d  ", count), EscapeControl(pattern), "\n");
  }
  return text;
}

std::string ModelLines(const HfCheckpoint& checkpoint) {
  const ModelConfig& model = checkpoint.config();
  const ParameterCount count = CountParameters(model, {.with_indexer = model.has_indexer});
  std::string text =
      absl::StrCat("model: ", model.has_indexer ? "deepseek_v32" : "deepseek_v3", ", ",
                   model.num_hidden_layers, " layers (", model.first_k_dense_replace, " dense, ",
                   model.num_moe_layers(), " MoE of ", model.n_routed_experts, " experts, ",
                   model.num_experts_per_tok, " a token), hidden ", model.hidden_size, ", ",
                   model.num_attention_heads, " heads, vocabulary ", model.vocab_size, "\n");
  absl::StrAppend(
      &text, "MTP: ",
      model.num_nextn_predict_layers > 0 ? absl::StrCat("layer ", model.num_hidden_layers) : "none",
      "; indexer: ",
      model.has_indexer ? absl::StrCat(model.index_n_heads, " heads of ", model.index_head_dim,
                                       ", top ", model.index_topk)
                        : "none",
      "\n");
  absl::StrAppend(&text, "parameters: ", Billions(count.main), ", of them active a token ",
                  Billions(count.active), "; MTP layer ", Billions(count.mtp), "; indexers ",
                  Billions(count.indexer), "\n");
  return text;
}

std::string StorageLines(const HfCheckpoint& checkpoint) {
  std::map<DType, std::pair<int64_t, int64_t>> histogram;  // tensors, bytes
  int64_t total = 0;
  const std::vector<std::string> names = checkpoint.TensorNames();
  for (const std::string& name : names) {
    const CheckpointTensor& tensor = *checkpoint.Find(name);
    ++histogram[tensor.dtype].first;
    histogram[tensor.dtype].second += tensor.end - tensor.begin;
    total += tensor.end - tensor.begin;
  }
  std::string text = absl::StrCat("stored: ", names.size(), " tensors, ", Gigabytes(total), ", ",
                                  checkpoint.ShardNames().size(), " shard(s)\n");
  for (const auto& [dtype, count] : histogram) {
    absl::StrAppend(&text, "  ", absl::StrFormat("%7d  ", count.first), DTypeName(dtype), ", ",
                    Gigabytes(count.second), "\n");
  }
  if (!checkpoint.index_note().empty()) {
    absl::StrAppend(&text, "index: ", checkpoint.index_note(), "\n");
  }
  return text;
}

struct ScaleCheck {
  int64_t blocks = 0;
  float smallest = std::numeric_limits<float>::infinity();
  float largest = 0;
  std::vector<std::string> not_powers;  // weights with a scale that is no power of two
  std::vector<std::string> errors;
};

ScaleCheck CheckScales(const HfCheckpoint& checkpoint) {
  ScaleCheck check;
  for (const std::string& name : checkpoint.TensorNames()) {
    if (checkpoint.Find(name)->dtype != DType::kF8E4M3) continue;
    const absl::StatusOr<std::vector<float>> scales = checkpoint.Scales(name);
    if (!scales.ok()) {
      check.errors.emplace_back(scales.status().message());
      continue;
    }
    check.blocks += static_cast<int64_t>(scales->size());
    for (const float scale : *scales) {
      check.smallest = std::min(check.smallest, scale);
      check.largest = std::max(check.largest, scale);
    }
    if (!std::all_of(scales->begin(), scales->end(), IsPowerOfTwo)) {
      check.not_powers.push_back(name);
    }
  }
  return check;
}

std::string ScaleLines(const ScaleCheck& check) {
  if (check.blocks == 0) return "";
  std::string text = absl::StrFormat("FP8 blocks: %d of 128 x 128, scales %g to %g\n", check.blocks,
                                     check.smallest, check.largest);
  if (check.not_powers.empty()) {
    absl::StrAppend(&text, "  every scale is a power of two (UE8M0)\n");
  } else {
    absl::StrAppend(&text, ListByPattern("  scales that are no power of two (used as they are)",
                                         check.not_powers));
  }
  return text;
}

struct ValueCheck {
  int64_t values = 0, nans = 0, infinities = 0;
};

// Reads one tensor a few rows at a time.
absl::Status CountValues(const HfCheckpoint& checkpoint, const std::string& name,
                         ValueCheck* check) {
  const Shape& shape = checkpoint.Find(name)->shape;
  const int64_t elements = NumElements(shape);
  if (elements == 0) return absl::OkStatus();
  const int64_t rows = shape.empty() ? 1 : shape[0];
  const int64_t row_elements = elements / rows;
  const int64_t step = std::max<int64_t>(1, kChunkElements / row_elements);
  std::vector<double> values;
  for (int64_t row = 0; row < rows; row += step) {
    Box box = WholeBox(shape);
    if (!shape.empty()) {
      box.offset[0] = row;
      box.extent[0] = std::min(step, rows - row);
    }
    values.resize(static_cast<size_t>(NumElements(box.extent)));
    RETURN_IF_ERROR(checkpoint.Read(name, box, DType::kF64, values.data()));
    for (const double value : values) {
      check->nans += std::isnan(value);
      check->infinities += std::isinf(value);
    }
    check->values += static_cast<int64_t>(values.size());
  }
  return absl::OkStatus();
}

bool IsFloating(DType dtype) {
  return dtype == DType::kF8E4M3 || dtype == DType::kBF16 || dtype == DType::kF32 ||
         dtype == DType::kF64;
}

// Every value of every tensor; and whether the MTP layer's copies are copies.
absl::StatusOr<std::string> VerifyValues(const HfCheckpoint& checkpoint,
                                         std::vector<std::string>* errors) {
  ValueCheck total;
  for (const std::string& name : checkpoint.TensorNames()) {
    if (!IsFloating(checkpoint.Find(name)->dtype)) continue;
    ValueCheck check;
    const absl::Status status = CountValues(checkpoint, name, &check);
    if (!status.ok()) errors->emplace_back(status.message());
    if (check.nans + check.infinities > 0) {
      errors->push_back(absl::StrCat(EscapeControl(name), ": ", check.nans, " NaN and ",
                                     check.infinities, " infinite of ", check.values, " values"));
    }
    total.values += check.values;
    total.nans += check.nans;
    total.infinities += check.infinities;
  }
  std::string text = absl::StrCat("values: ", total.values, " read, ", total.nans, " NaN, ",
                                  total.infinities, " infinite\n");
  const ModelConfig& model = checkpoint.config();
  for (const CatalogEntry& entry : TensorCatalog(model, {.with_indexer = model.has_indexer})) {
    if (entry.duplicate_of.empty()) continue;
    if (checkpoint.Find(entry.name) == nullptr || checkpoint.Find(entry.duplicate_of) == nullptr) {
      continue;
    }
    ASSIGN_OR_RETURN(const auto copy, checkpoint.RawBytes(entry.name));
    ASSIGN_OR_RETURN(const auto main, checkpoint.RawBytes(entry.duplicate_of));
    absl::StrAppend(&text, "  ", entry.name, copy == main ? " equals " : " DIFFERS from ",
                    entry.duplicate_of, "\n");
  }
  return text;
}

}  // namespace

absl::StatusOr<InspectReport> InspectHf(const std::string& directory, InspectDepth depth) {
  ASSIGN_OR_RETURN(const HfCheckpoint checkpoint, HfCheckpoint::Open(directory));
  const ModelConfig& model = checkpoint.config();
  const Accounting accounting = checkpoint.Account(model, {.with_indexer = true});
  std::vector<std::string> errors = accounting.errors;

  InspectReport report;
  std::string& text = report.text;
  absl::StrAppend(&text, "Hugging Face checkpoint ", directory, "\n", ModelLines(checkpoint),
                  StorageLines(checkpoint), "source hash: ", checkpoint.SourceHash(), "\n");
  const ScaleCheck scales = CheckScales(checkpoint);
  absl::StrAppend(&text, ScaleLines(scales));
  if (depth == InspectDepth::kValues) {
    ASSIGN_OR_RETURN(const std::string values, VerifyValues(checkpoint, &errors));
    absl::StrAppend(&text, values);
  } else {
    errors.insert(errors.end(), scales.errors.begin(), scales.errors.end());
  }
  absl::StrAppend(
      &text, ListByPattern("loaded", accounting.loaded),
      ListByPattern("initialised (a V3.2 run draws them from its seed)", accounting.initialised));
  absl::StrAppend(&text, "ignored: ", accounting.ignored.size(), " tensors\n");
  for (const Accounting::Ignored& ignored : accounting.ignored) {
    absl::StrAppend(&text, "           ", ignored.name, " (", ignored.reason, ")\n");
  }
  // A scale may be named by more than one check.
  std::sort(errors.begin(), errors.end());
  errors.erase(std::unique(errors.begin(), errors.end()), errors.end());
  report.healthy = errors.empty();
  absl::StrAppend(&text, report.healthy ? "verdict: complete\n"
                                        : absl::StrCat("verdict: ", errors.size(), " error(s)\n  ",
                                                       absl::StrJoin(errors, "\n  "), "\n"));
  return report;
}

}  // namespace baleen
