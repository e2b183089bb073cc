// The file driver under our HDF5 files: one descriptor, opened by us, and write errors that HDF5
// never sees.
//
// HDF5 1.10 survives no failed write: it reports success, then crashes or loops while it closes. So
// this driver notes the first error and from then on swallows writes; HDF5 closes in good order,
// and the writer asks error() before it believes anything. It also retries short writes and EINTR,
// takes no file locks (they fail on some NFS and Lustre mounts) and refuses reads beyond the end,
// so that a damaged file is an error and not zeros.
#pragma once

#include <H5Ipublic.h>
#include <H5public.h>

#include <cstdint>
#include <memory>
#include <string>

#include "kernels/core/file.h"
#include "kernels/core/owned.h"
#include "kernels/core/status.h"

namespace baleen {

void CloseHdf5Id(hid_t id);
// Any kind of HDF5 identifier; closed without a check. Where the result of closing matters,
// Release() and check.
using OwnedHid = Owned<hid_t, CloseHdf5Id, H5I_INVALID_HID>;

// What happened to the bytes of one file. Lives as long as the HDF5 file that uses it.
class DriverFile {
 public:
  DriverFile(std::string path, FileDescriptor descriptor, int64_t size)
      : path_(std::move(path)), descriptor_(std::move(descriptor)), size_(size) {}

  // The first failure is kept in error(); whatever is written after it is dropped.
  void Write(int64_t offset, const void* data, size_t bytes);
  void Resize(int64_t size);
  // False at the end of the file or on a read error.
  bool Read(int64_t offset, void* data, size_t bytes);
  // From now on nothing is written: the file is given up.
  void Abandon() { swallow_ = true; }

  const absl::Status& error() const { return error_; }
  const std::string& path() const { return path_; }
  int descriptor() const { return descriptor_.get(); }
  int64_t size() const { return size_; }
  FileDescriptor TakeDescriptor() { return std::move(descriptor_); }

 private:
  void Fail(absl::string_view doing);

  std::string path_;
  FileDescriptor descriptor_;
  int64_t size_;
  absl::Status error_;
  bool swallow_ = false;
};

// A file access list that sends all input and output of one HDF5 file through `file`, with the
// newest file format (checksummed metadata) and no plugins. Both identifiers must outlive the HDF5
// file.
struct DriverAccess {
  OwnedHid driver;
  OwnedHid access_list;
};
absl::StatusOr<DriverAccess> MakeDriverAccess(DriverFile* file);

// HDF5's error stack as one line, with what was being done in front; clears it.
absl::Status Hdf5Error(absl::string_view path, absl::string_view doing);
// Nothing of HDF5's own goes to stderr.
void SilenceHdf5();

}  // namespace baleen
