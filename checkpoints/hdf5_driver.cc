#include "checkpoints/hdf5_driver.h"

#include <hdf5.h>
#if H5_VERSION_GE(1, 13, 2)
#include <H5FDdevelop.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>

namespace baleen {
namespace {

// HDF5's view of an open file: its own header first, then ours. Made by Open, deleted by Close.
struct OpenFile {
  H5FD_t base;
  DriverFile* file;
  haddr_t end_of_addresses;
};

OpenFile* Ours(H5FD_t* file) { return reinterpret_cast<OpenFile*>(file); }
const OpenFile* Ours(const H5FD_t* file) { return reinterpret_cast<const OpenFile*>(file); }

H5FD_t* Open(const char*, unsigned, hid_t access_list, haddr_t) {
  const void* info = H5Pget_driver_info(access_list);
  if (info == nullptr) return nullptr;
  auto* open = new OpenFile{};
  std::memcpy(&open->file, info, sizeof(DriverFile*));
  return &open->base;
}

herr_t Close(H5FD_t* file) {
  delete Ours(file);
  return 0;
}

// Gather small metadata writes: fewer system calls, each of which could fail.
herr_t Query(const H5FD_t*, unsigned long* flags) {
  if (flags != nullptr) {
    *flags = H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_ACCUMULATE_METADATA | H5FD_FEAT_DATA_SIEVE |
             H5FD_FEAT_AGGREGATE_SMALLDATA;
  }
  return 0;
}

haddr_t GetEoa(const H5FD_t* file, H5FD_mem_t) { return Ours(file)->end_of_addresses; }

herr_t SetEoa(H5FD_t* file, H5FD_mem_t, haddr_t address) {
  Ours(file)->end_of_addresses = address;
  return 0;
}

haddr_t GetEof(const H5FD_t* file, H5FD_mem_t) {
  return static_cast<haddr_t>(Ours(file)->file->size());
}

herr_t Read(H5FD_t* file, H5FD_mem_t, hid_t, haddr_t address, size_t bytes, void* data) {
  if (address > static_cast<haddr_t>(std::numeric_limits<int64_t>::max())) return -1;
  return Ours(file)->file->Read(static_cast<int64_t>(address), data, bytes) ? 0 : -1;
}

herr_t Write(H5FD_t* file, H5FD_mem_t, hid_t, haddr_t address, size_t bytes, const void* data) {
  Ours(file)->file->Write(static_cast<int64_t>(address), data, bytes);
  return 0;
}

// HDF5 refuses to open a file shorter than the addresses it allocated.
herr_t Truncate(H5FD_t* file, hid_t, hbool_t) {
  Ours(file)->file->Resize(static_cast<int64_t>(Ours(file)->end_of_addresses));
  return 0;
}

// Field by field: the struct has more members in 1.14 than in 1.10.
H5FD_class_t DriverClass() {
  H5FD_class_t driver{};
#if H5_VERSION_GE(1, 13, 2)
  driver.version = H5FD_CLASS_VERSION;
  driver.value = 0x0BA1;
#endif
  driver.name = "baleen";
  driver.maxaddr = static_cast<haddr_t>(std::numeric_limits<int64_t>::max());
  driver.fc_degree = H5F_CLOSE_STRONG;
  driver.fapl_size = sizeof(DriverFile*);
  driver.open = Open;
  driver.close = Close;
  driver.query = Query;
  driver.get_eoa = GetEoa;
  driver.set_eoa = SetEoa;
  driver.get_eof = GetEof;
  driver.read = Read;
  driver.write = Write;
  driver.truncate = Truncate;
  return driver;
}

herr_t CollectError(unsigned, const H5E_error2_t* error, void* text) {
  auto* out = static_cast<std::string*>(text);
  if (error->desc != nullptr && out->size() < 600) {
    absl::StrAppend(out, out->empty() ? "" : "; ", error->desc);
  }
  return 0;
}

}  // namespace

void CloseHdf5Id(hid_t id) { H5Idec_ref(id); }

void SilenceHdf5() { H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr); }

absl::Status Hdf5Error(absl::string_view path, absl::string_view doing) {
  std::string stack;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, CollectError, &stack);
  H5Eclear2(H5E_DEFAULT);
  return DataError(path, ": HDF5 cannot ", doing, ": ", stack.empty() ? "no reason given" : stack);
}

void DriverFile::Fail(absl::string_view doing) {
  const int code = errno;
  if (error_.ok()) {
    error_ = EnvironmentError(path_, ": cannot ", doing, ": ", std::strerror(code));
  }
}

void DriverFile::Write(int64_t offset, const void* data, size_t bytes) {
  const char* next = static_cast<const char*>(data);
  while (bytes > 0 && !swallow_) {
    const ssize_t n = ::pwrite(descriptor_.get(), next, bytes, offset);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      if (n == 0) errno = EIO;
      swallow_ = true;
      return Fail(absl::StrCat("write ", bytes, " bytes at offset ", offset));
    }
    next += n;
    offset += n;
    bytes -= static_cast<size_t>(n);
    size_ = std::max(size_, offset);
  }
}

void DriverFile::Resize(int64_t size) {
  if (size == size_ || swallow_) return;
  while (::ftruncate(descriptor_.get(), size) != 0) {
    if (errno == EINTR) continue;
    swallow_ = true;
    return Fail(absl::StrCat("set the length to ", size));
  }
  size_ = size;
}

bool DriverFile::Read(int64_t offset, void* data, size_t bytes) {
  char* next = static_cast<char*>(data);
  // After a failed write the file lacks what HDF5 believes it holds; what it reads then is never
  // used.
  if (swallow_) std::memset(data, 0, bytes);
  while (bytes > 0) {
    const ssize_t n = ::pread(descriptor_.get(), next, bytes, offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) Fail(absl::StrCat("read ", bytes, " bytes at offset ", offset));
    if (n <= 0) return swallow_;
    next += n;
    offset += n;
    bytes -= static_cast<size_t>(n);
  }
  return true;
}

absl::StatusOr<DriverAccess> MakeDriverAccess(DriverFile* file) {
  SilenceHdf5();
  DriverAccess access;
  const H5FD_class_t driver = DriverClass();
  access.driver = OwnedHid(H5FDregister(&driver));
  access.access_list = OwnedHid(H5Pcreate(H5P_FILE_ACCESS));
  if (!access.driver || !access.access_list ||
      H5Pset_driver(access.access_list.get(), access.driver.get(), &file) < 0 ||
      H5Pset_fclose_degree(access.access_list.get(), H5F_CLOSE_STRONG) < 0 ||
      H5Pset_libver_bounds(access.access_list.get(), H5F_LIBVER_V110, H5F_LIBVER_V110) < 0 ||
      H5PLset_loading_state(0) < 0) {
    return Hdf5Error(file->path(), "set up file access");
  }
  return access;
}

}  // namespace baleen
