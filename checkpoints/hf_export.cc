// The rule of where a tensor comes from stands in PlanTensor; everything else carries it out.
//
//   trained                         -> the callback's values, in the dtype of the V3.2 table
//   frozen, source has this dtype   -> the source's bytes (FP8: with the source's scales, whatever
//   their form) frozen, source has another      -> the source's values, encoded anew
#include "checkpoints/hf_export.h"

#include "checkpoints/fp8_blocks.h"
#include "kernels/core/context.h"

namespace baleen {
namespace {

DType AskedDType(TensorStorage storage, ExportDType dtype) {
  switch (storage) {
    case TensorStorage::kF8Block:
      return dtype == ExportDType::kFp8 ? DType::kF8E4M3 : DType::kBF16;
    case TensorStorage::kBF16:
      return DType::kBF16;
    case TensorStorage::kF32:
      return DType::kF32;
  }
  CHECK(false) << "unknown storage " << static_cast<int>(storage);
  return DType::kF32;
}

// Norms and the correction bias exist as BF16 (V3) and as F32 (V3.1-Terminus, V3.2); either is
// right as it is.
bool LeavesAsItCame(const CatalogEntry& entry, DType stored, DType asked) {
  if (stored == asked) return true;
  return entry.storage == TensorStorage::kF32 && stored == DType::kBF16;
}

// Decides where one tensor comes from and which dtype it gets.
absl::StatusOr<std::pair<ExportTensor, DType>> PlanTensor(const CatalogEntry& entry,
                                                          const ExportRequest& request) {
  // A duplicate follows the tensor it repeats.
  const std::string& main = entry.duplicate_of.empty() ? entry.name : entry.duplicate_of;
  const DType asked = AskedDType(entry.storage, request.dtype);
  const bool trained = request.trained && request.trained(main);
  if (request.source == nullptr || trained) {
    return std::make_pair(ExportTensor{entry.name, ExportTensor::From::kValues, main}, asked);
  }
  std::string origin = entry.name;
  const CheckpointTensor* stored = request.source->Find(origin);
  if (stored == nullptr) {
    origin = main;
    stored = request.source->Find(origin);
  }
  if (stored == nullptr) {
    return std::make_pair(ExportTensor{entry.name, ExportTensor::From::kValues, main}, asked);
  }
  if (stored->shape != entry.shape) {
    return DataError(request.source->directory(), ": ", origin, ": found ",
                     ShapeString(stored->shape), ", the model to export has ",
                     ShapeString(entry.shape));
  }
  if (LeavesAsItCame(entry, stored->dtype, asked)) {
    return std::make_pair(ExportTensor{entry.name, ExportTensor::From::kBytes, origin},
                          stored->dtype);
  }
  return std::make_pair(ExportTensor{entry.name, ExportTensor::From::kConvert, origin}, asked);
}

absl::Status WriteTensor(const std::string& name, const Tensor& tensor, HfWriter& writer) {
  const Shape& expected = writer.plan().tensors.find(name)->second.shape;
  CHECK(tensor.shape() == expected)
      << name << ": values of " << tensor.DebugString() << " for " << ShapeString(expected);
  const size_t count = static_cast<size_t>(tensor.num_elements());
  if (tensor.dtype() == DType::kF64) {
    return writer.WriteValues(name, absl::MakeConstSpan(tensor.data<double>(), count));
  }
  return writer.WriteValues(name, absl::MakeConstSpan(tensor.data<float>(), count));
}

}  // namespace

absl::StatusOr<ExportPlan> PlanExport(const ExportRequest& request) {
  const bool v32 = request.architecture == HfArchitecture::kV32;
  RETURN_IF_ERROR(request.model.Validate("model to export"));
  RETURN_IF_ERROR(CheckModelSize(request.model, "model to export"));
  ExportPlan plan;
  std::vector<PlannedTensor> planned;
  for (const CatalogEntry& entry : TensorCatalog(request.model, {.with_indexer = v32})) {
    ASSIGN_OR_RETURN(auto tensor_and_dtype, PlanTensor(entry, request));
    auto& [tensor, dtype] = tensor_and_dtype;
    planned.push_back({entry.name, entry.shape, dtype});
    if (dtype == DType::kF8E4M3) {
      // The scale of bytes that are copied must exist and fit, before anything is written.
      if (tensor.from == ExportTensor::From::kBytes) {
        RETURN_IF_ERROR(request.source->Scales(tensor.origin).status());
      }
      planned.push_back({ScaleName(entry.name), Fp8ScaleShape(entry.shape), DType::kF32});
    }
    plan.tensors.push_back(std::move(tensor));
  }
  ASSIGN_OR_RETURN(plan.shards, PlanShards(planned, request.max_shard_bytes));
  plan.config_json = HfConfigText(
      {.model = request.model,
       .architecture = request.architecture,
       .fp8 = request.dtype == ExportDType::kFp8,
       .source = request.source == nullptr ? nullptr : &request.source->hf_config().source});
  return plan;
}

absl::Status ExportOne(const ExportTensor& tensor, const HfCheckpoint* source,
                       const TensorValues& values, HfWriter& writer) {
  if (tensor.from == ExportTensor::From::kValues) {
    CHECK(values) << tensor.name << ": no values to export";
    ASSIGN_OR_RETURN(const Tensor value, values(tensor.origin));
    return WriteTensor(tensor.name, value, writer);
  }
  CHECK(source != nullptr) << tensor.name;
  const CheckpointTensor* stored = source->Find(tensor.origin);
  CHECK(stored != nullptr) << tensor.origin;
  if (tensor.from == ExportTensor::From::kConvert) {
    const Tensor value = Context::Cpu().Empty(DType::kF32, stored->shape);
    RETURN_IF_ERROR(source->Read(tensor.origin, WholeBox(stored->shape), DType::kF32, value.raw()));
    return WriteTensor(tensor.name, value, writer);
  }
  ASSIGN_OR_RETURN(const absl::Span<const uint8_t> bytes, source->RawBytes(tensor.origin));
  RETURN_IF_ERROR(writer.WriteRaw(tensor.name, bytes));
  if (stored->dtype != DType::kF8E4M3) return absl::OkStatus();
  ASSIGN_OR_RETURN(const absl::Span<const uint8_t> scale,
                   source->RawBytes(ScaleName(tensor.origin)));
  return writer.WriteRaw(ScaleName(tensor.name), scale);
}

absl::Status ExportHf(const ExportRequest& request, const TensorValues& values,
                      const std::string& directory) {
  ASSIGN_OR_RETURN(ExportPlan plan, PlanExport(request));
  HfWriterFiles files{.config_json = plan.config_json};
  if (request.source != nullptr) files.copy_from = request.source->directory();
  ASSIGN_OR_RETURN(HfWriter writer,
                   HfWriter::Create(directory, std::move(plan.shards), std::move(files)));
  for (const ExportTensor& tensor : plan.tensors) {
    RETURN_IF_ERROR(ExportOne(tensor, request.source, values, writer));
  }
  return writer.Finish();
}

}  // namespace baleen
