// HDF5 files of Baleen's own: one-dimensional, chunked, Fletcher32-checked datasets with integer
// attributes.
//
// Every result is checked, closing included, and what is on disk is read back and compared with
// memory before a file counts as written. On reading, anything we never write (soft and external
// links, external storage, filters other than Fletcher32, other types or ranks) is refused. Works
// with HDF5 1.10 and 1.14; one thread at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "checkpoints/hdf5_driver.h"
#include "kernels/core/dtype.h"
#include "kernels/core/status.h"

namespace baleen {

// Most bytes of a chunk: the unit of checksums and of reading.
inline constexpr int64_t kHdf5ChunkBytes = int64_t{4} << 20;

struct Hdf5Attribute {
  std::string name;
  std::vector<int64_t> values;  // left out when empty
};

class Hdf5Writer {
 public:
  // Creates a file that must not exist.
  static absl::StatusOr<Hdf5Writer> Create(const std::string& path);
  Hdf5Writer(Hdf5Writer&&) noexcept = default;
  // Gives an unfinished file up: nothing more is written; the file itself stays for the caller to
  // remove.
  ~Hdf5Writer();

  // `name` may have groups ("adam_m/x"); `count` > 0. `data` must stay unchanged until Finish.
  absl::Status WriteDataset(const std::string& name, DType dtype, const void* data, int64_t count,
                            const std::vector<Hdf5Attribute>& attributes);

  struct Finished {
    int64_t bytes;
    std::string hash;  // XXH3-128 of the file
  };
  // Flushes, closes and fsyncs; then reads the file once, compares every element with memory and
  // hashes it all.
  absl::StatusOr<Finished> Finish();

 private:
  struct Dataset {
    std::string name;
    const uint8_t* data;
    int64_t bytes;
    int64_t chunk_bytes;
    int64_t chunk_elements;
  };
  // Bytes of the file that must equal bytes in memory.
  struct Extent {
    int64_t offset;
    const uint8_t* data;
    int64_t bytes;
  };

  explicit Hdf5Writer(std::unique_ptr<DriverFile> file) : file_(std::move(file)) {}
  absl::Status Failure(absl::string_view doing) const;
  absl::Status MakeGroups(absl::string_view name);
  absl::StatusOr<std::vector<Extent>> LocateChunks() const;
  absl::StatusOr<Finished> ReadBack(std::vector<Extent> extents) const;

  std::unique_ptr<DriverFile> file_;  // before the ids: HDF5 uses it until they are closed
  DriverAccess access_;
  OwnedHid id_;
  std::set<std::string> groups_;
  std::vector<Dataset> datasets_;
};

class Hdf5Dataset {
 public:
  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  int64_t chunk_elements() const { return chunk_elements_; }
  // Elements [begin, begin + count).
  absl::Status Read(int64_t begin, int64_t count, void* destination) const;

 private:
  friend class Hdf5Reader;
  absl::Status Failure(absl::string_view doing) const;

  const DriverFile* file_ = nullptr;  // of the Hdf5Reader, which must outlive the dataset
  std::string name_;
  OwnedHid id_;
  DType dtype_ = DType::kF32;
  int64_t count_ = 0;
  int64_t chunk_elements_ = 0;
};

class Hdf5Reader {
 public:
  // The caller has verified the file's hash.
  static absl::StatusOr<Hdf5Reader> Open(const std::string& path);
  Hdf5Reader(Hdf5Reader&&) noexcept = default;
  Hdf5Reader& operator=(Hdf5Reader&&) = delete;

  // Checks links, rank, layout and filters. `expected` tells BF16 (stored as 16-bit words) from
  // other types.
  absl::StatusOr<Hdf5Dataset> OpenDataset(const std::string& name, DType expected) const;

 private:
  explicit Hdf5Reader(std::unique_ptr<DriverFile> file) : file_(std::move(file)) {}
  absl::Status CheckLinks(const std::string& name) const;

  std::unique_ptr<DriverFile> file_;
  DriverAccess access_;
  OwnedHid id_;
};

}  // namespace baleen
