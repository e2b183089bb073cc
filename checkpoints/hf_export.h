// Export: a model leaves as a Hugging Face V3.2 (or V3.1) checkpoint in FP8 or BF16.
//
// What trained is asked for by name and encoded; what never trained leaves with the bytes it came
// with, if the source has it in the asked dtype, else converted. PlanExport is arithmetic and needs
// no values; ExportHf does the work.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "checkpoints/hf_checkpoint.h"
#include "checkpoints/hf_writer.h"
#include "kernels/core/tensor.h"

namespace baleen {

enum class ExportDType { kFp8, kBF16 };

struct ExportRequest {
  ModelConfig model;
  HfArchitecture architecture =
      HfArchitecture::kV32;  // kV32 has the indexers, kV31 leaves them out
  ExportDType dtype = ExportDType::kFp8;
  const HfCheckpoint* source = nullptr;  // nullptr: every tensor comes from the callback
  std::function<bool(const std::string& name)> trained;  // empty: nothing trained
  int64_t max_shard_bytes = kDefaultShardBytes;
};

struct ExportTensor {
  enum class From {
    kValues,   // the callback's values, encoded
    kBytes,    // the source's bytes
    kConvert,  // the source's values, encoded in the asked dtype
  };
  std::string name;  // as written
  From from = From::kValues;
  std::string origin;  // the name asked of the callback or the source (the main tensor, for an MTP
                       // duplicate)
};

struct ExportPlan {
  std::vector<ExportTensor> tensors;  // scales are not listed: they go with their weight
  ShardPlan shards;
  std::string config_json;
};

absl::StatusOr<ExportPlan> PlanExport(const ExportRequest& request);

// Memory for one band, kept from band to band: blocks that are freed and taken again in many sizes
// scatter, and the heap grows past what is ever in use.
class BandBuffer {
 public:
  // Uninitialised, on the CPU; valid until the next call.
  Tensor Take(DType dtype, const Shape& shape);

 private:
  std::shared_ptr<Storage> storage_;
};

// `band` (whole rows) of a checkpoint name's tensor, kF32 or kF64, on the CPU; valid until the next
// call.
using TensorValues =
    std::function<absl::StatusOr<Tensor>(const std::string& name, const Box& band)>;

// What one of `num_ranks` ranks writes: indices into plan.tensors, ascending. Whole tensors, so
// that no FP8 block is cut between ranks; the largest first to the rank that has fewest bytes. The
// shares of all ranks hold each tensor once.
std::vector<size_t> ShareOf(const ExportPlan& plan, int rank, int num_ranks);

// Writes one tensor of the plan, one band of rows in memory at a time. `buffer` is for values that
// are converted.
absl::Status ExportOne(const ExportTensor& tensor, const HfCheckpoint* source,
                       const TensorValues& values, BandBuffer& buffer, HfWriter& writer);

// All of it in one process; several ranks share the work in trainer/shared_export.h.
absl::Status ExportHf(const ExportRequest& request, const TensorValues& values,
                      const std::string& directory);

}  // namespace baleen
