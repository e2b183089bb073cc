// HfWriter: writes a Hugging Face directory: sharded safetensors, index, config.json, tokenizer
// files passed through.
//
// The plan (tensor -> shard, offset) is a pure function of the list, so every rank knows it.
// Headers and full-length files are made first, tensors are then written in any order by any rank
// with pwrite, band of rows by band of rows. All of it happens in DIR.tmp.<pid>; Finish checks that
// each tensor was written, syncs and renames. Until then DIR does not exist, and an error or the
// destructor removes what was begun. Memory: one encoded band.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "checkpoints/safetensors.h"
#include "kernels/core/box.h"
#include "kernels/core/file.h"

namespace baleen {

inline constexpr int64_t kDefaultShardBytes = 4'300'000'000;

// Elements a band of rows has at most, where 128 rows do not have more: 8 MiB as F32. The largest
// weights of the 671B model have 16384 to 18432 columns, so 128 of their rows are about a band.
inline constexpr int64_t kBandElements = int64_t{1} << 21;

// Cuts a tensor into bands of whole rows, in order; all but the last have a multiple of 128 rows,
// so no FP8 block is cut. A tensor of one dimension has rows of one element, a scalar is one band.
std::vector<Box> RowBands(const Shape& shape, int64_t max_elements = kBandElements);

struct ShardPlan {
  struct Shard {
    std::string file;                    // model-00001-of-00002.safetensors
    std::vector<PlannedTensor> tensors;  // in the order of the data
    std::string header;                  // length word and JSON
    int64_t file_bytes = 0;
  };
  struct Place {
    int shard = 0;
    int64_t offset = 0;  // in the file
    int64_t bytes = 0;
  };
  std::vector<Shard> shards;
  std::map<std::string, Place, std::less<>> places;
  std::map<std::string, PlannedTensor, std::less<>> tensors;
  int64_t total_bytes = 0;  // of all tensors

  std::string IndexText() const;
};

// Tensors in the order given fill shards of at most `max_shard_bytes` of data (a larger tensor gets
// its own). An FP8 weight needs its `_scale_inv` in the list, F32, of the grid's shape; ConfigError
// otherwise and for repeated names.
absl::StatusOr<ShardPlan> PlanShards(const std::vector<PlannedTensor>& tensors,
                                     int64_t max_shard_bytes);

struct HfWriterFiles {
  std::string config_json;  // contents
  std::string
      copy_from;  // directory whose tokenizer and generation files are passed through, or empty
};

class HfWriter {
 public:
  // One process: claims `directory` (which must not exist or be empty) and makes all files at full
  // length.
  static absl::StatusOr<HfWriter> Create(const std::string& directory, ShardPlan plan,
                                         HfWriterFiles files);
  // Another rank: opens what Create made in `staging_directory()`. Its Finish may not be called.
  static absl::StatusOr<HfWriter> Attach(const std::string& staging_directory, ShardPlan plan);

  HfWriter(HfWriter&& other) noexcept;
  HfWriter& operator=(HfWriter&&) = delete;
  ~HfWriter();

  const ShardPlan& plan() const { return plan_; }
  const std::string& staging_directory() const { return staging_; }

  // Writes a whole tensor as its planned dtype (F64, F32, BF16; FP8 writes the scale too).
  // NumericsError names the first value that is not finite.
  absl::Status WriteValues(absl::string_view name, absl::Span<const float> values);
  absl::Status WriteValues(absl::string_view name, absl::Span<const double> values);
  // The same for the next band of rows, from `first_row` on; the bands of a tensor come in order,
  // through one object.
  absl::Status WriteRows(absl::string_view name, int64_t first_row, absl::Span<const float> values);
  absl::Status WriteRows(absl::string_view name, int64_t first_row,
                         absl::Span<const double> values);
  // Copies bytes that already have the planned dtype and length.
  absl::Status WriteRaw(absl::string_view name, absl::Span<const uint8_t> bytes);

  // Names written through this object: an attached rank sends them, the creating rank adds them.
  const std::set<std::string>& written() const { return written_; }
  void AddWritten(const std::set<std::string>& names) {
    written_.insert(names.begin(), names.end());
  }
  // Makes this rank's writes durable; attached ranks call it before they report.
  absl::Status Sync();

  // Checks that every tensor was written, syncs, writes index, config.json and copies, renames into
  // place. On an error nothing is left behind.
  absl::Status Finish();

 private:
  HfWriter() = default;
  absl::Status CreateFiles();
  template <typename T>
  absl::Status WriteWhole(absl::string_view name, absl::Span<const T> values);
  template <typename T>
  absl::Status WriteBand(absl::string_view name, int64_t first_row, absl::Span<const T> values);
  // Bytes [begin, begin + bytes.size()) of a tensor.
  absl::Status WriteAt(const std::string& name, int64_t begin, absl::Span<const uint8_t> bytes);
  absl::Status CopyThrough() const;
  absl::Status CloseFiles();
  absl::Status Publish();
  // Removes what was begun, if this object began it.
  void Discard();

  std::string target_;
  std::string staging_;
  bool owns_staging_ = false;
  ShardPlan plan_;
  HfWriterFiles files_;
  std::vector<FileDescriptor> descriptors_;
  std::set<std::string> written_;
  std::map<std::string, int64_t, std::less<>> rows_written_;  // of tensors that are under way
  std::vector<uint8_t> encoded_;  // of the band; kept, since freed blocks of many sizes scatter
};

}  // namespace baleen
