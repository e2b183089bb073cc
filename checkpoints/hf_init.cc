// Values are drawn by global element index, so a rank that fills only its box draws the numbers
// that the whole tensor has there; Philox makes that as cheap as drawing in order.
#include "checkpoints/hf_init.h"

#include <map>
#include <memory>
#include <utility>

#include "checkpoints/box_runs.h"
#include "kernels/core/random.h"

namespace baleen {
namespace {

template <typename T>
void Fill(const CatalogEntry& entry, const InitOptions& options, const Box& box, T* out) {
  const std::string& name = entry.duplicate_of.empty() ? entry.name : entry.duplicate_of;
  const RandomStream stream(options.seed, NameStream(name));
  ForEachRun(entry.shape, box, [&](int64_t from, int64_t to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      switch (entry.role) {
        case TensorRole::kNorm:
          out[to + i] = 1;
          break;
        case TensorRole::kNormBias:
        case TensorRole::kCorrectionBias:
          out[to + i] = 0;
          break;
        case TensorRole::kWeight:
          out[to + i] = static_cast<T>(options.standard_deviation *
                                       stream.Normal(static_cast<uint64_t>(from + i)));
          break;
      }
    }
  });
}

}  // namespace

void FillInitial(const CatalogEntry& entry, const InitOptions& options, const Box& box, DType out,
                 void* destination) {
  CHECK(out == DType::kF32 || out == DType::kF64) << DTypeName(out);
  if (out == DType::kF32) {
    Fill(entry, options, box, static_cast<float*>(destination));
  } else {
    Fill(entry, options, box, static_cast<double*>(destination));
  }
}

ExportRequest InitAsExport(const InitRequest& request) {
  return {.model = request.model,
          .architecture = request.architecture,
          .dtype = request.dtype,
          .max_shard_bytes = request.max_shard_bytes};
}

absl::StatusOr<TensorValues> InitialValues(const InitRequest& request) {
  RETURN_IF_ERROR(request.model.Validate("model to initialise"));
  RETURN_IF_ERROR(CheckModelSize(request.model, "model to initialise"));
  const bool v32 = request.architecture == HfArchitecture::kV32;
  auto entries = std::make_shared<std::map<std::string, CatalogEntry>>();
  for (CatalogEntry& entry : TensorCatalog(request.model, {.with_indexer = v32})) {
    const std::string name = entry.name;
    entries->emplace(name, std::move(entry));
  }
  auto buffer = std::make_shared<BandBuffer>();
  return TensorValues([entries, buffer, init = request.init](
                          const std::string& name, const Box& band) -> absl::StatusOr<Tensor> {
    const Tensor values = buffer->Take(DType::kF32, band.extent);
    FillInitial(entries->at(name), init, band, DType::kF32, values.raw());
    return values;
  });
}

absl::Status InitHfCheckpoint(const InitRequest& request, const std::string& directory) {
  ASSIGN_OR_RETURN(const TensorValues values, InitialValues(request));
  return ExportHf(InitAsExport(request), values, directory);
}

}  // namespace baleen
