// Random initial weights: each value is a function of (seed, tensor name, element index), the same
// on every layout.
//
// Linears and embeddings are normal(0, initializer_range), norms 1, k_norm.bias and
// e_score_correction_bias 0. The MTP layer's copies of embedding and head equal the main ones.
#pragma once

#include <cstdint>
#include <string>

#include "checkpoints/hf_export.h"
#include "checkpoints/tensor_catalog.h"
#include "kernels/core/box.h"

namespace baleen {

struct InitOptions {
  uint64_t seed = 0;
  double standard_deviation = 0.02;  // ModelConfig::initializer_range
};

// Fills `box` of a catalog tensor, kF32 or kF64, row-major and dense.
void FillInitial(const CatalogEntry& entry, const InitOptions& options, const Box& box, DType out,
                 void* destination);

struct InitRequest {
  ModelConfig model;
  HfArchitecture architecture = HfArchitecture::kV31;
  ExportDType dtype = ExportDType::kFp8;
  InitOptions init;
  int64_t max_shard_bytes = kDefaultShardBytes;
};

// An initialisation is an export of drawn values: what to write, and the values. ConfigError when
// the model cannot be.
ExportRequest InitAsExport(const InitRequest& request);
absl::StatusOr<TensorValues> InitialValues(const InitRequest& request);

// Writes a random checkpoint in one process.
absl::Status InitHfCheckpoint(const InitRequest& request, const std::string& directory);

}  // namespace baleen
