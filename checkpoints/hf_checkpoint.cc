// Opening reads three kinds of hostile text (config.json, index, headers) and must end with one map
// from name to bytes that every later read can trust: index and headers agree in both directions,
// each tensor lies in one shard.
#include "checkpoints/hf_checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <set>

#include "absl/strings/match.h"
#include "checkpoints/box_runs.h"
#include "checkpoints/fp8_blocks.h"
#include "checkpoints/json_strict.h"
#include "kernels/core/file.h"
#include "kernels/core/log.h"

namespace baleen {
namespace {

constexpr int64_t kMaxIndexBytes = kMaxSafetensorsHeaderBytes;
constexpr int64_t kMaxShards = 10'000;
constexpr absl::string_view kIndexName = "model.safetensors.index.json";
constexpr absl::string_view kSingleName = "model.safetensors";

// Takes the events of an index: {"metadata": {...}, "weight_map": {tensor: file, ...}}; other keys
// are passed over.
class IndexReader {
 public:
  IndexReader(absl::string_view where, CheckpointIndex* index) : where_(where), index_(index) {}

  absl::Status Take(const JsonEvent& event) {
    switch (event.what) {
      case JsonEvent::What::kBegin:
        if (++depth_ == 1 && event.kind != JsonKind::kObject) {
          return Error("expected an object at the top, found a list");
        }
        if (depth_ == 2 && section_ == "weight_map") {
          if (event.kind != JsonKind::kObject) return Error("weight_map: expected an object");
          has_weight_map_ = true;
        } else if (depth_ == 3 && section_ == "weight_map") {
          return EntryError("expected a file name, found a list or an object");
        }
        return absl::OkStatus();
      case JsonEvent::What::kEnd:
        --depth_;
        return absl::OkStatus();
      case JsonEvent::What::kKey:
        if (depth_ == 1) section_ = std::string(event.text);
        if (depth_ == 2) key_ = std::string(event.text);
        return absl::OkStatus();
      case JsonEvent::What::kScalar:
        return TakeScalar(event);
    }
    return absl::OkStatus();
  }

  absl::Status Finish() const {
    return has_weight_map_ ? absl::OkStatus() : Error("the key \"weight_map\" is missing");
  }

 private:
  absl::Status Error(absl::string_view what) const { return DataError(where_, ": ", what); }
  absl::Status EntryError(absl::string_view what) const {
    return Error(absl::StrCat("weight_map: tensor \"", EscapeControl(key_), "\": ", what));
  }

  absl::Status TakeScalar(const JsonEvent& event) {
    if (depth_ == 0) {
      return Error(absl::StrCat("expected an object, found ", JsonKindName(event.kind)));
    }
    if (depth_ == 1 && section_ == "weight_map") return Error("weight_map: expected an object");
    if (depth_ == 2 && section_ == "metadata" && key_ == "total_size") {
      // A remark, not a size anything is made from; some writers give a float.
      if (event.kind == JsonKind::kInteger && event.integer >= 0) {
        index_->total_size = event.integer;
      } else if (event.kind != JsonKind::kNumber || event.number < 0) {
        return Error("metadata.total_size: expected a number of 0 or more");
      }
    }
    if (depth_ != 2 || section_ != "weight_map") return absl::OkStatus();
    if (key_.empty() || static_cast<int64_t>(key_.size()) > kMaxTensorNameBytes) {
      return Error(absl::StrCat("weight_map: a tensor name of ", key_.size(),
                                " bytes, expected 1 to ", kMaxTensorNameBytes));
    }
    if (event.kind != JsonKind::kString) {
      return EntryError(absl::StrCat("expected a file name, found ", JsonKindName(event.kind)));
    }
    if (!IsShardName(event.text)) {
      return EntryError(absl::StrCat("the file name \"",
                                     EscapeControl(event.text.substr(0, kMaxTensorNameBytes)),
                                     "\" is not a plain name of letters, digits, '.', '_', '-' "
                                     "that ends in .safetensors"));
    }
    if (static_cast<int64_t>(index_->weight_map.size()) == kMaxCheckpointTensors) {
      return Error(absl::StrCat("weight_map: more than ", kMaxCheckpointTensors, " tensors"));
    }
    index_->weight_map.emplace(key_, std::string(event.text));
    return absl::OkStatus();
  }

  absl::string_view where_;
  CheckpointIndex* index_;
  int depth_ = 0;
  std::string section_;  // key at the top
  std::string key_;      // key inside it
  bool has_weight_map_ = false;
};

// Copies `box` of a row-major tensor of T to dense memory, converting each element.
template <typename T, typename Out, typename Convert>
void CopyBox(const uint8_t* bytes, const Shape& shape, const Box& box, Out* out,
             const Convert& convert) {
  ForEachRun(shape, box, [&](int64_t from, int64_t to, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      T value;  // the header's length decides the alignment: copy, do not cast
      std::memcpy(&value, bytes + (from + j) * int64_t{sizeof(T)}, sizeof(T));
      out[to + j] = convert(value);
    }
  });
}

bool BoxInside(const Box& box, const Shape& shape) {
  if (box.offset.size() != shape.size() || box.extent.size() != shape.size()) return false;
  for (size_t d = 0; d < shape.size(); ++d) {
    if (box.offset[d] < 0 || box.extent[d] < 0 || box.offset[d] + box.extent[d] > shape[d]) {
      return false;
    }
  }
  return true;
}

template <typename Out>
absl::Status ReadPlain(const CheckpointTensor& tensor, absl::Span<const uint8_t> bytes,
                       const Box& box, absl::string_view what, Out* out) {
  switch (tensor.dtype) {
    case DType::kBF16:
      CopyBox<BFloat16>(bytes.data(), tensor.shape, box, out,
                        [](BFloat16 v) { return static_cast<Out>(v.ToFloat()); });
      return absl::OkStatus();
    case DType::kF32:
      CopyBox<float>(bytes.data(), tensor.shape, box, out,
                     [](float v) { return static_cast<Out>(v); });
      return absl::OkStatus();
    case DType::kF64:
      CopyBox<double>(bytes.data(), tensor.shape, box, out,
                      [](double v) { return static_cast<Out>(v); });
      return absl::OkStatus();
    default:
      return DataError(what, ": found dtype ", DTypeName(tensor.dtype),
                       ", expected F8_E4M3, BF16, F32 or F64");
  }
}

}  // namespace

bool IsShardName(absl::string_view name) {
  if (name.size() > 255 || absl::StartsWith(name, ".")) return false;
  for (const char c : name) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                       c == '.' || c == '_' || c == '-';
    if (!plain) return false;
  }
  return absl::EndsWith(name, ".safetensors") && name != ".safetensors";
}

absl::StatusOr<CheckpointIndex> ParseIndex(absl::string_view text, absl::string_view where) {
  CheckpointIndex index;
  IndexReader reader(where, &index);
  RETURN_IF_ERROR(ParseJsonEvents(text, where, {.bytes = kMaxIndexBytes},
                                  [&](const JsonEvent& event) { return reader.Take(event); }));
  RETURN_IF_ERROR(reader.Finish());
  return index;
}

absl::StatusOr<HfCheckpoint> HfCheckpoint::Open(const std::string& directory) {
  if (!DirectoryExists(directory)) {
    return DataError(directory, ": expected a directory with config.json and safetensors files");
  }
  HfCheckpoint checkpoint;
  checkpoint.directory_ = directory;
  const std::string config_path = JoinPath(directory, "config.json");
  ASSIGN_OR_RETURN(checkpoint.config_, ReadHfConfig(config_path));
  ASSIGN_OR_RETURN(std::string identity, HashFile(config_path));

  const std::string index_path = JoinPath(directory, kIndexName);
  if (FileExists(index_path)) {
    ASSIGN_OR_RETURN(const std::string text, ReadFile(index_path, kMaxIndexBytes));
    ASSIGN_OR_RETURN(const CheckpointIndex index, ParseIndex(text, index_path));
    absl::StrAppend(&identity,
                    Hash128({reinterpret_cast<const uint8_t*>(text.data()), text.size()}));
    RETURN_IF_ERROR(checkpoint.OpenIndexed(index, index_path));
  } else if (FileExists(JoinPath(directory, kSingleName))) {
    RETURN_IF_ERROR(checkpoint.AddShard(std::string(kSingleName), nullptr));
  } else {
    return DataError(directory, ": found neither ", kIndexName, " nor ", kSingleName);
  }
  for (const SafetensorsFile& shard : checkpoint.shards_) {
    absl::StrAppend(&identity, Hash128(shard.HeaderBytes()), ":", shard.file().bytes().size());
  }
  checkpoint.source_hash_ =
      Hash128({reinterpret_cast<const uint8_t*>(identity.data()), identity.size()});
  return checkpoint;
}

// Read, not mapped: a fault of a mapping brings in the pages around it, megabytes on some file
// systems.
absl::StatusOr<std::string> HfCheckpoint::DataHash(size_t shard) const {
  const MappedFile& file = shards_[shard].file();
  RETURN_IF_ERROR(file.CheckUnchanged());
  const FileDescriptor descriptor(::open(file.path().c_str(), O_RDONLY | O_CLOEXEC));
  if (descriptor.get() < 0) return DataError(file.path(), ": cannot open: ", std::strerror(errno));
  ::posix_fadvise(descriptor.get(), 0, 0, POSIX_FADV_RANDOM);
  const auto begin = static_cast<int64_t>(shards_[shard].HeaderBytes().size());
  const int64_t bytes = std::ssize(file.bytes()) - begin;
  const int64_t sample = std::min(kDataSampleBytes, bytes);
  const int64_t count =
      std::min(kDataSamples, (bytes + kDataSampleBytes - 1) / kDataSampleBytes);  // 0: no data
  std::vector<uint8_t> samples(count * sample);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t offset = begin + (count == 1 ? 0 : (bytes - sample) * i / (count - 1));
    if (::pread(descriptor.get(), samples.data() + i * sample, sample, offset) != sample) {
      return DataError(file.path(), ": cannot read ", sample, " bytes at ", offset,
                       "; was it replaced while it is open?");
    }
  }
  return Hash128(samples);
}

absl::Status HfCheckpoint::OpenIndexed(const CheckpointIndex& index, const std::string& where) {
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : index.weight_map) {
    shards.insert(shard);
    if (static_cast<int64_t>(shards.size()) > kMaxShards) {
      return DataError(where, ": more than ", kMaxShards, " shards");
    }
  }
  for (const std::string& shard : shards) RETURN_IF_ERROR(AddShard(shard, &index));
  // The shards agree with the index; now the index with the shards.
  int64_t total = 0;
  for (const auto& [name, shard] : index.weight_map) {
    const CheckpointTensor* tensor = Find(name);
    if (tensor == nullptr) {
      return DataError(where, ": weight_map says ", EscapeControl(name), " is in ", shard,
                       ", which does not have it");
    }
    total += tensor->end - tensor->begin;
  }
  if (index.total_size >= 0 && index.total_size != total) {
    index_note_ = absl::StrCat("metadata.total_size is ", index.total_size, ", the tensors have ",
                               total, " bytes");
  }
  return absl::OkStatus();
}

absl::Status HfCheckpoint::AddShard(const std::string& shard, const CheckpointIndex* index) {
  const std::string path = JoinPath(directory_, shard);
  ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::Open(path));
  const int shard_index = static_cast<int>(shards_.size());
  for (const SafetensorsEntry& entry : file.entries()) {
    if (index != nullptr) {
      const auto mapped = index->weight_map.find(entry.name);
      if (mapped == index->weight_map.end()) {
        return DataError(path, ": holds ", entry.name, ", which ", kIndexName, " does not list");
      }
      if (mapped->second != shard) {
        return DataError(path, ": holds ", entry.name, ", which ", kIndexName, " places in ",
                         mapped->second);
      }
    }
    // Never a second time: the index names one shard a tensor, and a lone file has no doubled keys.
    tensors_.emplace(entry.name, CheckpointTensor{entry.dtype, entry.shape, shard, shard_index,
                                                  entry.begin, entry.end});
  }
  shard_names_.push_back(shard);
  shards_.push_back(std::move(file));
  return absl::OkStatus();
}

const CheckpointTensor* HfCheckpoint::Find(absl::string_view name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

std::vector<std::string> HfCheckpoint::TensorNames() const {
  std::vector<std::string> names;
  names.reserve(tensors_.size());
  for (const auto& [name, tensor] : tensors_) names.push_back(name);
  return names;
}

std::string HfCheckpoint::Describe(absl::string_view name, const CheckpointTensor& tensor) const {
  return absl::StrCat(JoinPath(directory_, tensor.shard), ": ", EscapeControl(name));
}

absl::StatusOr<absl::Span<const uint8_t>> HfCheckpoint::RawBytes(absl::string_view name) const {
  const CheckpointTensor* tensor = Find(name);
  if (tensor == nullptr) {
    return DataError(directory_, ": the checkpoint has no tensor ", EscapeControl(name));
  }
  const SafetensorsFile& shard = shards_[static_cast<size_t>(tensor->shard_index)];
  // A page of a shortened file would kill the process; this is two system calls a tensor.
  RETURN_IF_ERROR(shard.file().CheckUnchanged());
  return shard.Data(tensor->begin, tensor->end);
}

absl::StatusOr<std::vector<float>> HfCheckpoint::Scales(absl::string_view name) const {
  const CheckpointTensor* weight = Find(name);
  CHECK(weight != nullptr && weight->dtype == DType::kF8E4M3) << std::string(name);
  const std::string what = Describe(name, *weight);
  if (weight->shape.size() != 2) {
    return DataError(what, ": found F8_E4M3", ShapeString(weight->shape),
                     ", expected two dimensions (blocks of 128 x 128)");
  }
  const std::string scale_name = ScaleName(name);
  const CheckpointTensor* scale = Find(scale_name);
  if (scale == nullptr) {
    return DataError(what, ": found F8_E4M3", ShapeString(weight->shape), " without its scale ",
                     EscapeControl(scale_name));
  }
  const Shape expected = Fp8ScaleShape(weight->shape);
  if (scale->dtype != DType::kF32 || scale->shape != expected) {
    return DataError(Describe(scale_name, *scale), ": found ", DTypeName(scale->dtype),
                     ShapeString(scale->shape), ", expected F32", ShapeString(expected),
                     " for a weight of ", ShapeString(weight->shape));
  }
  ASSIGN_OR_RETURN(const absl::Span<const uint8_t> bytes, RawBytes(scale_name));
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  for (size_t i = 0; i < values.size(); ++i) {
    // Zero is a zero block of some quantisers; a NaN fails both comparisons.
    if (!(values[i] >= 0 && values[i] <= std::numeric_limits<float>::max())) {
      return DataError(Describe(scale_name, *scale), ": block [",
                       static_cast<int64_t>(i) / expected[1], ", ",
                       static_cast<int64_t>(i) % expected[1], "] is ", values[i],
                       ", expected a finite multiplier of 0 or more");
    }
  }
  return values;
}

absl::Status HfCheckpoint::Read(absl::string_view name, const Box& box, DType out,
                                void* destination) const {
  CHECK(out == DType::kF32 || out == DType::kF64) << DTypeName(out);
  ASSIGN_OR_RETURN(const absl::Span<const uint8_t> bytes, RawBytes(name));
  const CheckpointTensor& tensor = *Find(name);
  const std::string what = Describe(name, tensor);
  if (!BoxInside(box, tensor.shape)) {
    return DataError(what, ": found ", ShapeString(tensor.shape), ", asked for ",
                     ShapeString(box.extent), " at ", ShapeString(box.offset),
                     "; does config.json belong to these weights?");
  }
  if (tensor.dtype != DType::kF8E4M3) {
    return out == DType::kF32
               ? ReadPlain(tensor, bytes, box, what, static_cast<float*>(destination))
               : ReadPlain(tensor, bytes, box, what, static_cast<double*>(destination));
  }
  ASSIGN_OR_RETURN(const std::vector<float> scales, Scales(name));
  const Fp8Slice slice{tensor.shape[0], tensor.shape[1], box.offset[0],
                       box.offset[1],   box.extent[0],   box.extent[1]};
  if (out == DType::kF32) {
    DequantiseFp8(bytes.data(), scales.data(), slice, static_cast<float*>(destination));
  } else {
    DequantiseFp8(bytes.data(), scales.data(), slice, static_cast<double*>(destination));
  }
  return absl::OkStatus();
}

}  // namespace baleen
