// The rule of where a tensor comes from stands in PlanTensor; everything else carries it out.
//
//   trained                         -> the callback's values, in the dtype of the V3.2 table
//   frozen, source has this dtype   -> the source's bytes (FP8: with the source's scales, of
//                                      whatever form)
//   frozen, source has another      -> the source's values, encoded anew
#include "checkpoints/hf_export.h"

#include <algorithm>
#include <set>
#include <utility>

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

absl::Status WriteBand(const std::string& name, const Box& band, const Tensor& tensor,
                       HfWriter& writer) {
  CHECK(tensor.shape() == band.extent)
      << name << ": values of " << tensor.DebugString() << " for " << ShapeString(band.extent);
  const int64_t first_row = band.offset.empty() ? 0 : band.offset[0];
  const size_t count = static_cast<size_t>(tensor.num_elements());
  if (tensor.dtype() == DType::kF64) {
    return writer.WriteRows(name, first_row, absl::MakeConstSpan(tensor.data<double>(), count));
  }
  return writer.WriteRows(name, first_row, absl::MakeConstSpan(tensor.data<float>(), count));
}

// With its scale.
int64_t BytesOf(const ExportTensor& tensor, const ShardPlan& shards) {
  int64_t bytes = shards.places.at(tensor.name).bytes;
  const auto scale = shards.places.find(ScaleName(tensor.name));
  if (scale != shards.places.end()) bytes += scale->second.bytes;
  return bytes;
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

std::vector<size_t> ShareOf(const ExportPlan& plan, int rank, int num_ranks) {
  CHECK(rank >= 0 && rank < num_ranks) << rank << " of " << num_ranks;
  std::vector<std::pair<int64_t, size_t>> by_size;
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    by_size.emplace_back(-BytesOf(plan.tensors[i], plan.shards), i);
  }
  std::sort(by_size.begin(), by_size.end());  // equal sizes in the plan's order
  std::set<std::pair<int64_t, int>> loads;    // bytes dealt so far, rank
  for (int r = 0; r < num_ranks; ++r) loads.insert({0, r});
  std::vector<size_t> share;
  for (const auto& [negative_bytes, index] : by_size) {
    const auto [load, least] = *loads.begin();
    loads.erase(loads.begin());
    loads.insert({load - negative_bytes, least});
    if (least == rank) share.push_back(index);
  }
  std::sort(share.begin(), share.end());
  return share;
}

Tensor BandBuffer::Take(DType dtype, const Shape& shape) {
  const int64_t bytes = NumElements(shape) * DTypeBytes(dtype);
  if (storage_ == nullptr || storage_->bytes() < bytes) {
    storage_.reset();  // before the larger one is taken
    const int64_t usual = kBandElements * DTypeBytes(dtype);
    storage_ = Context::Cpu().pool().Allocate(std::max(bytes, usual), "export band");
  }
  return Tensor(storage_, 0, dtype, shape, Device{});
}

absl::Status ExportOne(const ExportTensor& tensor, const HfCheckpoint* source,
                       const TensorValues& values, BandBuffer& buffer, HfWriter& writer) {
  if (tensor.from == ExportTensor::From::kBytes) {
    const CheckpointTensor* stored = source->Find(tensor.origin);
    CHECK(stored != nullptr) << tensor.origin;
    ASSIGN_OR_RETURN(const absl::Span<const uint8_t> bytes, source->RawBytes(tensor.origin));
    RETURN_IF_ERROR(writer.WriteRaw(tensor.name, bytes));
    if (stored->dtype != DType::kF8E4M3) return absl::OkStatus();
    ASSIGN_OR_RETURN(const absl::Span<const uint8_t> scale,
                     source->RawBytes(ScaleName(tensor.origin)));
    return writer.WriteRaw(ScaleName(tensor.name), scale);
  }
  const auto planned = writer.plan().tensors.find(tensor.name);
  CHECK(planned != writer.plan().tensors.end()) << tensor.name;
  for (const Box& band : RowBands(planned->second.shape)) {
    if (tensor.from == ExportTensor::From::kValues) {
      CHECK(values) << tensor.name << ": no values to export";
      ASSIGN_OR_RETURN(const Tensor value, values(tensor.origin, band));
      RETURN_IF_ERROR(WriteBand(tensor.name, band, value, writer));
    } else {
      const Tensor value = buffer.Take(DType::kF32, band.extent);
      RETURN_IF_ERROR(source->Read(tensor.origin, band, DType::kF32, value.raw()));
      RETURN_IF_ERROR(WriteBand(tensor.name, band, value, writer));
    }
  }
  return absl::OkStatus();
}

absl::Status ExportHf(const ExportRequest& request, const TensorValues& values,
                      const std::string& directory) {
  ASSIGN_OR_RETURN(ExportPlan plan, PlanExport(request));
  HfWriterFiles files{.config_json = plan.config_json};
  if (request.source != nullptr) files.copy_from = request.source->directory();
  ASSIGN_OR_RETURN(HfWriter writer,
                   HfWriter::Create(directory, std::move(plan.shards), std::move(files)));
  BandBuffer buffer;
  for (const ExportTensor& tensor : plan.tensors) {
    RETURN_IF_ERROR(ExportOne(tensor, request.source, values, buffer, writer));
  }
  return writer.Finish();
}

}  // namespace baleen
