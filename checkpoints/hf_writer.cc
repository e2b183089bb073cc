// Order of a write: plan, claim DIR.tmp.<pid>, reserve every file and write its header, tensors in
// any order, fsync, index and config last, rename, fsync of the parent. A reader sees no directory
// or a whole one. Values are encoded one band of rows at a time: FP8 blocks have 128 rows, so bands
// that begin at multiples of 128 know their scales.
#include "checkpoints/hf_writer.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "checkpoints/fp8_blocks.h"
#include "checkpoints/json_strict.h"
#include "checkpoints/tensor_catalog.h"

namespace baleen {
namespace {

constexpr int64_t kMaxCopiedBytes = int64_t{1} << 30;

absl::Status SystemError(absl::string_view path, absl::string_view doing) {
  return EnvironmentError(path, ": cannot ", doing, ": ", std::strerror(errno));
}

// What goes through from the source directory unchanged: without the tokenizer a checkpoint is of
// little use.
bool IsCopiedThrough(absl::string_view name) {
  constexpr absl::string_view kNames[] = {"generation_config.json",
                                          "special_tokens_map.json",
                                          "added_tokens.json",
                                          "vocab.json",
                                          "merges.txt",
                                          "chat_template.jinja",
                                          "chat_template.json",
                                          "LICENSE"};
  for (const absl::string_view known : kNames) {
    if (name == known) return true;
  }
  return absl::StartsWith(name, "tokenizer") &&
         (absl::EndsWith(name, ".json") || absl::EndsWith(name, ".model"));
}

absl::Status WriteFullyAt(int descriptor, absl::Span<const uint8_t> bytes, int64_t offset,
                          const std::string& path) {
  // pwrite may stop early, at 2 GiB for one; the offset belongs to the call, so ranks do not meet.
  while (!bytes.empty()) {
    const ssize_t n = ::pwrite(descriptor, bytes.data(), bytes.size(), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return SystemError(path, "write");
    if (n == 0) return EnvironmentError(path, ": cannot write: no progress");
    bytes.remove_prefix(static_cast<size_t>(n));
    offset += n;
  }
  return absl::OkStatus();
}

// The first value that is not finite, or would not be in the target dtype.
template <typename T>
std::optional<size_t> FirstNotFinite(absl::Span<const T> values, DType target) {
  constexpr double kBf16Limit = 0x1.fefffep127;  // the next float rounds to infinity
  double largest = std::numeric_limits<float>::max();
  if (target == DType::kF64) largest = std::numeric_limits<double>::max();
  if (target == DType::kBF16) largest = kBf16Limit;
  for (size_t i = 0; i < values.size(); ++i) {
    if (!(std::fabs(static_cast<double>(values[i])) <= largest)) return i;
  }
  return std::nullopt;
}

template <typename T>
void EncodePlain(absl::Span<const T> values, DType dtype, uint8_t* out) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::kBF16) {
      const BFloat16 value = BFloat16::FromFloat(static_cast<float>(values[i]));
      std::memcpy(out + 2 * i, &value, 2);
    } else if (dtype == DType::kF32) {
      const float value = static_cast<float>(values[i]);
      std::memcpy(out + 4 * i, &value, 4);
    } else {
      const double value = static_cast<double>(values[i]);
      std::memcpy(out + 8 * i, &value, 8);
    }
  }
}

// Rows of a tensor and elements of a row: a vector has rows of one element, a scalar is one row.
std::pair<int64_t, int64_t> RowsAndWidth(const Shape& shape) {
  if (shape.empty()) return {1, 1};
  return {shape[0], NumElements(Shape(shape.begin() + 1, shape.end()))};
}

// Refuses a target that exists with contents; an empty directory is replaced by the rename.
absl::Status CheckTarget(const std::string& directory) {
  struct stat info;
  if (::lstat(directory.c_str(), &info) != 0) {
    return errno == ENOENT ? absl::OkStatus() : SystemError(directory, "stat");
  }
  std::error_code error;
  if (S_ISDIR(info.st_mode) && std::filesystem::is_empty(directory, error) && !error) {
    return absl::OkStatus();
  }
  return ConfigError(directory, ": exists and is not an empty directory; nothing is overwritten, ",
                     "give a new name or remove it");
}

}  // namespace

std::vector<Box> RowBands(const Shape& shape, int64_t max_elements) {
  const auto [rows, width] = RowsAndWidth(shape);
  const int64_t blocks = max_elements / std::max<int64_t>(1, width) / kFp8Block;
  const int64_t most_rows = std::max<int64_t>(1, blocks) * kFp8Block;
  if (shape.empty() || rows <= most_rows) return {WholeBox(shape)};
  std::vector<Box> bands;
  for (int64_t first = 0; first < rows; first += most_rows) {
    Box band = WholeBox(shape);
    band.offset[0] = first;
    band.extent[0] = std::min(most_rows, rows - first);
    bands.push_back(std::move(band));
  }
  return bands;
}

std::string ShardPlan::IndexText() const {
  JsonValue metadata = JsonValue::Object();
  metadata.Set("total_size", JsonValue::Integer(total_bytes));
  JsonValue weight_map = JsonValue::Object();
  for (const auto& [name, place] : places) {
    weight_map.members.push_back(
        {name, JsonValue::String(shards[static_cast<size_t>(place.shard)].file)});
  }
  JsonValue index = JsonValue::Object();
  index.Set("metadata", std::move(metadata));
  index.Set("weight_map", std::move(weight_map));
  return JsonText(index) + "\n";
}

absl::StatusOr<ShardPlan> PlanShards(const std::vector<PlannedTensor>& tensors,
                                     int64_t max_shard_bytes) {
  ShardPlan plan;
  int64_t used = 0;
  for (const PlannedTensor& tensor : tensors) {
    if (!plan.tensors.emplace(tensor.name, tensor).second) {
      return ConfigError("checkpoint plan: tensor ", tensor.name, " is listed twice");
    }
    const int64_t bytes = PlannedBytes(tensor);
    if (plan.shards.empty() || (used > 0 && used + bytes > max_shard_bytes)) {
      plan.shards.emplace_back();
      used = 0;
    }
    used += bytes;
    plan.total_bytes += bytes;
    plan.shards.back().tensors.push_back(tensor);
  }
  // Before any file exists: an FP8 weight whose scale nobody writes cannot be read by anyone.
  for (const PlannedTensor& tensor : tensors) {
    if (tensor.dtype != DType::kF8E4M3) continue;
    const auto scale = plan.tensors.find(ScaleName(tensor.name));
    if (tensor.shape.size() != 2 || scale == plan.tensors.end() ||
        scale->second.dtype != DType::kF32 || scale->second.shape != Fp8ScaleShape(tensor.shape)) {
      return ConfigError("checkpoint plan: the FP8 tensor ", tensor.name, ShapeString(tensor.shape),
                         " has no F32 scale of its block grid");
    }
  }
  for (size_t s = 0; s < plan.shards.size(); ++s) {
    ShardPlan::Shard& shard = plan.shards[s];
    shard.file = absl::StrFormat("model-%05d-of-%05d.safetensors", s + 1, plan.shards.size());
    SortForSafetensors(shard.tensors);
    shard.header = SafetensorsHeaderText(shard.tensors);
    int64_t offset = static_cast<int64_t>(shard.header.size());
    for (const PlannedTensor& tensor : shard.tensors) {
      const int64_t bytes = PlannedBytes(tensor);
      plan.places[tensor.name] = {static_cast<int>(s), offset, bytes};
      offset += bytes;
    }
    shard.file_bytes = offset;
  }
  return plan;
}

HfWriter::HfWriter(HfWriter&& other) noexcept
    : target_(std::move(other.target_)),
      staging_(std::move(other.staging_)),
      owns_staging_(std::exchange(other.owns_staging_, false)),
      plan_(std::move(other.plan_)),
      files_(std::move(other.files_)),
      descriptors_(std::move(other.descriptors_)),
      written_(std::move(other.written_)),
      rows_written_(std::move(other.rows_written_)),
      encoded_(std::move(other.encoded_)) {}

HfWriter::~HfWriter() { Discard(); }

void HfWriter::Discard() {
  descriptors_.clear();
  if (!std::exchange(owns_staging_, false)) return;
  std::error_code ignored;  // what cannot be removed keeps its telling name
  std::filesystem::remove_all(staging_, ignored);
}

absl::StatusOr<HfWriter> HfWriter::Create(const std::string& directory, ShardPlan plan,
                                          HfWriterFiles files) {
  HfWriter writer;
  writer.target_ = directory;
  while (writer.target_.size() > 1 && writer.target_.back() == '/') writer.target_.pop_back();
  if (writer.target_.empty()) return ConfigError("checkpoint export: the directory has no name");
  RETURN_IF_ERROR(CheckTarget(writer.target_));
  writer.plan_ = std::move(plan);
  writer.files_ = std::move(files);
  const std::string parent = std::filesystem::path(writer.target_).parent_path().string();
  if (!parent.empty()) RETURN_IF_ERROR(MakeDirectories(parent));
  writer.staging_ = absl::StrCat(writer.target_, ".tmp.", ::getpid());
  if (::mkdir(writer.staging_.c_str(), 0755) != 0) {
    const int code = errno;
    const absl::Status status = SystemError(writer.staging_, "create directory");
    if (code != EEXIST) return status;
    return EnvironmentError(status.message(), "; left by an export that was killed? Remove it");
  }
  writer.owns_staging_ = true;
  RETURN_IF_ERROR(writer.CreateFiles());
  return writer;
}

absl::StatusOr<HfWriter> HfWriter::Attach(const std::string& staging_directory, ShardPlan plan) {
  HfWriter writer;
  writer.staging_ = staging_directory;
  writer.plan_ = std::move(plan);
  for (const ShardPlan::Shard& shard : writer.plan_.shards) {
    const std::string path = JoinPath(staging_directory, shard.file);
    FileDescriptor file(::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NOFOLLOW));
    if (!file) return SystemError(path, "open");
    writer.descriptors_.push_back(std::move(file));
  }
  return writer;
}

absl::Status HfWriter::CreateFiles() {
  for (const ShardPlan::Shard& shard : plan_.shards) {
    const std::string path = JoinPath(staging_, shard.file);
    FileDescriptor file(
        ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0644));
    if (!file) return SystemError(path, "create");
    // Takes the space at once where the file system can, so that a full disk is found before the
    // work.
    if (::fallocate(file.get(), 0, 0, shard.file_bytes) != 0) {
      const bool unsupported = errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL;
      if (!unsupported) {
        return SystemError(path, absl::StrCat("reserve ", shard.file_bytes, " bytes"));
      }
      if (::ftruncate(file.get(), shard.file_bytes) != 0) return SystemError(path, "extend");
    }
    const auto* header = reinterpret_cast<const uint8_t*>(shard.header.data());
    RETURN_IF_ERROR(WriteFullyAt(file.get(), {header, shard.header.size()}, 0, path));
    descriptors_.push_back(std::move(file));
  }
  return absl::OkStatus();
}

absl::Status HfWriter::WriteAt(const std::string& name, int64_t begin,
                               absl::Span<const uint8_t> bytes) {
  const ShardPlan::Place& place = plan_.places.at(name);
  CHECK_LE(begin + static_cast<int64_t>(bytes.size()), place.bytes) << name;
  const size_t shard = static_cast<size_t>(place.shard);
  return WriteFullyAt(descriptors_[shard].get(), bytes, place.offset + begin,
                      JoinPath(staging_, plan_.shards[shard].file));
}

template <typename T>
absl::Status HfWriter::WriteBand(absl::string_view name, int64_t first_row,
                                 absl::Span<const T> values) {
  const auto found = plan_.tensors.find(name);
  CHECK(found != plan_.tensors.end()) << "not in the plan: " << std::string(name);
  const PlannedTensor& tensor = found->second;
  const auto [rows, width] = RowsAndWidth(tensor.shape);
  const int64_t num_rows = width == 0 ? rows : static_cast<int64_t>(values.size()) / width;
  CHECK_EQ(static_cast<int64_t>(values.size()), num_rows * width) << tensor.name;
  CHECK_LE(first_row + num_rows, rows) << tensor.name;
  const int64_t last_row = first_row + num_rows;
  CHECK_EQ(first_row, std::exchange(rows_written_[tensor.name], last_row)) << tensor.name;
  if (const std::optional<size_t> bad = FirstNotFinite(values, tensor.dtype)) {
    return NumericsError("checkpoint export: ", tensor.name, ": element ",
                         first_row * width + static_cast<int64_t>(*bad), " of ",
                         ShapeString(tensor.shape), " is ", values[*bad], ", expected a number ",
                         DTypeName(tensor.dtype), " can hold; did training diverge?");
  }
  const int64_t element_bytes = DTypeBytes(tensor.dtype);
  encoded_.resize(values.size() * static_cast<size_t>(element_bytes));
  if (tensor.dtype == DType::kF8E4M3) {
    CHECK(first_row % kFp8Block == 0 && (num_rows % kFp8Block == 0 || last_row == rows))
        << tensor.name << ": rows [" << first_row << ", " << last_row << ") cut a block";
    const Shape grid = Fp8ScaleShape({num_rows, width});
    std::vector<float> scales(static_cast<size_t>(NumElements(grid)));
    // Whole blocks, whatever the layout that trained the tensor: a cut through a block would show
    // in its scale.
    QuantiseFp8(values.data(), num_rows, width, encoded_.data(), scales.data());
    const int64_t scale_begin = first_row / kFp8Block * grid[1] * int64_t{sizeof(float)};
    RETURN_IF_ERROR(
        WriteAt(ScaleName(tensor.name), scale_begin,
                {reinterpret_cast<const uint8_t*>(scales.data()), scales.size() * sizeof(float)}));
  } else {
    CHECK(tensor.dtype == DType::kF64 || tensor.dtype == DType::kF32 ||
          tensor.dtype == DType::kBF16)
        << tensor.name << " " << DTypeName(tensor.dtype);
    EncodePlain(values, tensor.dtype, encoded_.data());
  }
  RETURN_IF_ERROR(WriteAt(tensor.name, first_row * width * element_bytes, encoded_));
  if (last_row < rows) return absl::OkStatus();
  rows_written_.erase(tensor.name);
  written_.insert(tensor.name);
  if (tensor.dtype == DType::kF8E4M3) written_.insert(ScaleName(tensor.name));
  return absl::OkStatus();
}

template <typename T>
absl::Status HfWriter::WriteWhole(absl::string_view name, absl::Span<const T> values) {
  const auto found = plan_.tensors.find(name);
  CHECK(found != plan_.tensors.end()) << "not in the plan: " << std::string(name);
  const Shape& shape = found->second.shape;
  CHECK_EQ(static_cast<int64_t>(values.size()), NumElements(shape)) << std::string(name);
  rows_written_.erase(found->first);  // a whole tensor may be written again after an error
  size_t begin = 0;
  for (const Box& band : RowBands(shape)) {
    const size_t count = static_cast<size_t>(NumElements(band.extent));
    const int64_t first_row = shape.empty() ? 0 : band.offset[0];
    RETURN_IF_ERROR(WriteBand(name, first_row, values.subspan(begin, count)));
    begin += count;
  }
  return absl::OkStatus();
}

absl::Status HfWriter::WriteValues(absl::string_view name, absl::Span<const float> values) {
  return WriteWhole(name, values);
}

absl::Status HfWriter::WriteValues(absl::string_view name, absl::Span<const double> values) {
  return WriteWhole(name, values);
}

absl::Status HfWriter::WriteRows(absl::string_view name, int64_t first_row,
                                 absl::Span<const float> values) {
  return WriteBand(name, first_row, values);
}

absl::Status HfWriter::WriteRows(absl::string_view name, int64_t first_row,
                                 absl::Span<const double> values) {
  return WriteBand(name, first_row, values);
}

absl::Status HfWriter::WriteRaw(absl::string_view name, absl::Span<const uint8_t> bytes) {
  const auto found = plan_.places.find(name);
  CHECK(found != plan_.places.end()) << "not in the plan: " << std::string(name);
  CHECK_EQ(static_cast<int64_t>(bytes.size()), found->second.bytes) << found->first;
  RETURN_IF_ERROR(WriteAt(found->first, 0, bytes));
  written_.insert(found->first);
  return absl::OkStatus();
}

absl::Status HfWriter::Sync() {
  for (size_t i = 0; i < descriptors_.size(); ++i) {
    if (::fsync(descriptors_[i].get()) != 0) {
      return SystemError(JoinPath(staging_, plan_.shards[i].file), "sync");
    }
  }
  return absl::OkStatus();
}

absl::Status HfWriter::CloseFiles() {
  for (size_t i = 0; i < descriptors_.size(); ++i) {
    if (::close(descriptors_[i].Release()) != 0) {
      return SystemError(JoinPath(staging_, plan_.shards[i].file), "close");
    }
  }
  descriptors_.clear();
  return absl::OkStatus();
}

absl::Status HfWriter::CopyThrough() const {
  if (files_.copy_from.empty()) return absl::OkStatus();
  std::error_code error;
  for (auto it = std::filesystem::directory_iterator(files_.copy_from, error);
       !error && it != std::filesystem::directory_iterator(); it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (!IsCopiedThrough(name) || !FileExists(it->path().string())) continue;
    ASSIGN_OR_RETURN(const std::string contents, ReadFile(it->path().string(), kMaxCopiedBytes));
    RETURN_IF_ERROR(WriteFileDurably(JoinPath(staging_, name), contents));
  }
  if (error) return EnvironmentError(files_.copy_from, ": cannot list: ", error.message());
  return absl::OkStatus();
}

absl::Status HfWriter::Publish() {
  for (const auto& [name, place] : plan_.places) {
    if (written_.count(name) == 0) {
      return absl::InternalError(absl::StrCat(target_, ": tensor ", name, " was never written"));
    }
  }
  RETURN_IF_ERROR(Sync());
  RETURN_IF_ERROR(CloseFiles());
  RETURN_IF_ERROR(
      WriteFileDurably(JoinPath(staging_, "model.safetensors.index.json"), plan_.IndexText()));
  RETURN_IF_ERROR(WriteFileDurably(JoinPath(staging_, "config.json"), files_.config_json));
  RETURN_IF_ERROR(CopyThrough());
  RETURN_IF_ERROR(SyncDirectory(staging_));
  if (::rename(staging_.c_str(), target_.c_str()) != 0) {
    return SystemError(target_, "rename into place");
  }
  owns_staging_ = false;
  const std::string parent = std::filesystem::path(target_).parent_path().string();
  return SyncDirectory(parent.empty() ? "." : parent);
}

absl::Status HfWriter::Finish() {
  CHECK(owns_staging_) << "Finish is for the rank that created the checkpoint";
  const absl::Status status = Publish();
  if (!status.ok()) Discard();
  return status;
}

}  // namespace baleen
