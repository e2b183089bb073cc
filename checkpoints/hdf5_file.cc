#include "checkpoints/hdf5_file.h"

#include <fcntl.h>
#include <hdf5.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_split.h"
#include "checkpoints/state_io.h"
#include "kernels/core/check.h"

namespace baleen {
namespace {

static_assert(std::endian::native == std::endian::little,
              "datasets are little-endian, as memory is");

// BF16 has no HDF5 type and is stored as its 16 bits; the manifest knows the meaning.
hid_t Hdf5Type(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return H5T_IEEE_F64LE;
    case DType::kF32:
      return H5T_IEEE_F32LE;
    case DType::kBF16:
      return H5T_STD_U16LE;
    case DType::kI64:
      return H5T_STD_I64LE;
    case DType::kI32:
      return H5T_STD_I32LE;
    case DType::kU8:
      return H5T_STD_U8LE;
    case DType::kF8E4M3:
      break;
  }
  CHECK(false) << "training state is not kept in " << DTypeName(dtype);
  return H5I_INVALID_HID;
}

bool CloseChecked(OwnedHid& id, herr_t (*close)(hid_t)) { return close(id.Release()) >= 0; }

// No time stamps: equal states give equal files.
OwnedHid CreationList(hid_t kind) {
  OwnedHid list(H5Pcreate(kind));
  if (list && H5Pset_obj_track_times(list.get(), false) < 0) list.Reset();
  return list;
}

bool WriteAttribute(hid_t dataset, const Hdf5Attribute& attribute) {
  const hsize_t count = attribute.values.size();
  OwnedHid space(H5Screate_simple(1, &count, nullptr));
  OwnedHid id(H5Acreate2(dataset, attribute.name.c_str(), H5T_STD_I64LE, space.get(), H5P_DEFAULT,
                         H5P_DEFAULT));
  return space && id && H5Awrite(id.get(), H5T_STD_I64LE, attribute.values.data()) >= 0 &&
         CloseChecked(id, H5Aclose);
}

OwnedHid DatasetCreationList(int64_t chunk_elements) {
  OwnedHid list = CreationList(H5P_DATASET_CREATE);
  const hsize_t chunk = static_cast<hsize_t>(chunk_elements);
  if (list && (H5Pset_chunk(list.get(), 1, &chunk) < 0 || H5Pset_fletcher32(list.get()) < 0 ||
               H5Pset_fill_time(list.get(), H5D_FILL_TIME_NEVER) < 0)) {
    list.Reset();
  }
  return list;
}

}  // namespace

absl::StatusOr<Hdf5Writer> Hdf5Writer::Create(const std::string& path) {
  FileDescriptor descriptor(
      ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0640));
  if (!descriptor) return EnvironmentError(path, ": cannot create: ", std::strerror(errno));
  Hdf5Writer writer(std::make_unique<DriverFile>(path, std::move(descriptor), 0));
  ASSIGN_OR_RETURN(writer.access_, MakeDriverAccess(writer.file_.get()));
  OwnedHid creation = CreationList(H5P_FILE_CREATE);
  writer.id_ = OwnedHid(
      H5Fcreate(path.c_str(), H5F_ACC_TRUNC, creation.get(), writer.access_.access_list.get()));
  if (!writer.id_) return writer.Failure("create the file");
  return writer;
}

Hdf5Writer::~Hdf5Writer() {
  if (file_ == nullptr || !id_) return;
  file_->Abandon();
  H5Fclose(id_.Release());
  H5Eclear2(H5E_DEFAULT);
}

absl::Status Hdf5Writer::Failure(absl::string_view doing) const {
  const absl::Status from_hdf5 = Hdf5Error(file_->path(), doing);
  return file_->error().ok() ? EnvironmentError(from_hdf5.message()) : file_->error();
}

absl::Status Hdf5Writer::MakeGroups(absl::string_view name) {
  for (size_t slash = name.find('/'); slash != name.npos; slash = name.find('/', slash + 1)) {
    const std::string group(name.substr(0, slash));
    if (!groups_.insert(group).second) continue;
    OwnedHid creation = CreationList(H5P_GROUP_CREATE);
    OwnedHid id(H5Gcreate2(id_.get(), group.c_str(), H5P_DEFAULT, creation.get(), H5P_DEFAULT));
    if (!id || !CloseChecked(id, H5Gclose)) return Failure(absl::StrCat("create group ", group));
  }
  return absl::OkStatus();
}

absl::Status Hdf5Writer::WriteDataset(const std::string& name, DType dtype, const void* data,
                                      int64_t count, const std::vector<Hdf5Attribute>& attributes) {
  CHECK_GT(count, 0) << name;
  RETURN_IF_ERROR(file_->error());
  RETURN_IF_ERROR(MakeGroups(name));
  const std::string doing = absl::StrCat("write dataset ", name);
  // Chunks of equal size: the last one is stored whole, so a short one would waste the rest.
  const int64_t most_elements = kHdf5ChunkBytes / DTypeBytes(dtype);
  const int64_t num_chunks = (count + most_elements - 1) / most_elements;
  const int64_t chunk_elements = (count + num_chunks - 1) / num_chunks;
  const hsize_t extent = static_cast<hsize_t>(count);
  OwnedHid space(H5Screate_simple(1, &extent, nullptr));
  OwnedHid creation = DatasetCreationList(chunk_elements);
  if (!space || !creation) return Failure(doing);
  OwnedHid dataset(H5Dcreate2(id_.get(), name.c_str(), Hdf5Type(dtype), space.get(), H5P_DEFAULT,
                              creation.get(), H5P_DEFAULT));
  if (!dataset) return Failure(doing);
  for (const Hdf5Attribute& attribute : attributes) {
    if (attribute.values.empty()) continue;
    if (!WriteAttribute(dataset.get(), attribute)) return Failure(doing);
  }
  if (H5Dwrite(dataset.get(), Hdf5Type(dtype), H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0 ||
      !CloseChecked(dataset, H5Dclose)) {
    return Failure(doing);
  }
  datasets_.push_back({name, static_cast<const uint8_t*>(data), count * DTypeBytes(dtype),
                       chunk_elements * DTypeBytes(dtype), chunk_elements});
  return file_->error();
}

absl::StatusOr<std::vector<Hdf5Writer::Extent>> Hdf5Writer::LocateChunks() const {
  std::vector<Extent> extents;
  for (const Dataset& dataset : datasets_) {
    const std::string doing = absl::StrCat("find the chunks of ", dataset.name);
    OwnedHid id(H5Dopen2(id_.get(), dataset.name.c_str(), H5P_DEFAULT));
    if (!id) return Failure(doing);
    hsize_t element = 0;
    for (int64_t begin = 0; begin < dataset.bytes; begin += dataset.chunk_bytes) {
      unsigned filter_mask = 0;
      haddr_t address = HADDR_UNDEF;
      hsize_t stored_bytes = 0;
      if (H5Dget_chunk_info_by_coord(id.get(), &element, &filter_mask, &address, &stored_bytes) <
              0 ||
          address == HADDR_UNDEF || filter_mask != 0) {
        return Failure(doing);
      }
      extents.push_back({static_cast<int64_t>(address), dataset.data + begin,
                         std::min(dataset.chunk_bytes, dataset.bytes - begin)});
      element += static_cast<hsize_t>(dataset.chunk_elements);
    }
    if (!CloseChecked(id, H5Dclose)) return Failure(doing);
  }
  return extents;
}

// The checksum filter appends to a chunk and leaves its bytes as they are, so memory and file
// compare directly.
absl::StatusOr<Hdf5Writer::Finished> Hdf5Writer::ReadBack(std::vector<Extent> extents) const {
  std::sort(extents.begin(), extents.end(),
            [](const Extent& a, const Extent& b) { return a.offset < b.offset; });
  StreamHash hash;
  size_t next = 0;
  int64_t compared = 0, expected = 0;
  for (const Extent& extent : extents) expected += extent.bytes;
  RETURN_IF_ERROR(ForEachBlock(
      file_->descriptor(), file_->path(), file_->size(), [&](int64_t offset, auto block) {
        hash.Update(block);
        const int64_t block_end = offset + static_cast<int64_t>(block.size());
        for (; next < extents.size() && extents[next].offset < block_end; ++next) {
          const Extent& extent = extents[next];
          const int64_t begin = std::max(extent.offset, offset);
          const int64_t end = std::min(extent.offset + extent.bytes, block_end);
          if (std::memcmp(block.data() + (begin - offset), extent.data + (begin - extent.offset),
                          static_cast<size_t>(end - begin)) != 0) {
            return EnvironmentError(file_->path(), ": bytes ", begin, " to ", end,
                                    " read back differ from memory; the disk or the memory of this"
                                    " host is faulty, or the state changed while it was saved");
          }
          compared += end - begin;
          if (extent.offset + extent.bytes > block_end) break;  // goes on in the next block
        }
        return absl::OkStatus();
      }));
  if (compared != expected) {
    return EnvironmentError(file_->path(), ": ", compared, " bytes of data read back, expected ",
                            expected);
  }
  return Finished{file_->size(), hash.Hex()};
}

absl::StatusOr<Hdf5Writer::Finished> Hdf5Writer::Finish() {
  RETURN_IF_ERROR(file_->error());
  if (H5Fflush(id_.get(), H5F_SCOPE_GLOBAL) < 0) return Failure("flush");
  RETURN_IF_ERROR(file_->error());
  ASSIGN_OR_RETURN(std::vector<Extent> extents, LocateChunks());
  if (!CloseChecked(id_, H5Fclose)) return Failure("close the file");
  RETURN_IF_ERROR(file_->error());
  if (::fsync(file_->descriptor()) != 0) {
    return EnvironmentError(file_->path(), ": cannot sync: ", std::strerror(errno));
  }
  ASSIGN_OR_RETURN(const Finished finished, ReadBack(std::move(extents)));
  FileDescriptor descriptor = file_->TakeDescriptor();
  if (::close(descriptor.Release()) != 0) {
    return EnvironmentError(file_->path(), ": cannot close: ", std::strerror(errno));
  }
  return finished;
}

absl::StatusOr<Hdf5Reader> Hdf5Reader::Open(const std::string& path) {
  ASSIGN_OR_RETURN(OpenedFile opened, OpenStateFile(path));
  Hdf5Reader reader(std::make_unique<DriverFile>(path, std::move(opened.descriptor), opened.bytes));
  ASSIGN_OR_RETURN(reader.access_, MakeDriverAccess(reader.file_.get()));
  reader.id_ = OwnedHid(H5Fopen(path.c_str(), H5F_ACC_RDONLY, reader.access_.access_list.get()));
  if (!reader.id_) {
    const absl::Status status = Hdf5Error(path, "open the file");
    return reader.file_->error().ok() ? status : reader.file_->error();
  }
  return reader;
}

// A soft or external link would lead out of the file whose hash was checked.
absl::Status Hdf5Reader::CheckLinks(const std::string& name) const {
  for (size_t slash = name.find('/');; slash = name.find('/', slash + 1)) {
    const std::string part = name.substr(0, slash);
    H5L_info_t info;
    if (H5Lget_info(id_.get(), part.c_str(), &info, H5P_DEFAULT) < 0) {
      return Hdf5Error(file_->path(), absl::StrCat("find ", name));
    }
    if (info.type != H5L_TYPE_HARD) {
      return DataError(file_->path(), ": ", part, " is a link; a state has hard links only");
    }
    if (slash == name.npos) return absl::OkStatus();
  }
}

absl::StatusOr<Hdf5Dataset> Hdf5Reader::OpenDataset(const std::string& name, DType expected) const {
  RETURN_IF_ERROR(CheckLinks(name));
  Hdf5Dataset dataset;
  dataset.file_ = file_.get();
  dataset.name_ = name;
  dataset.dtype_ = expected;
  dataset.id_ = OwnedHid(H5Dopen2(id_.get(), name.c_str(), H5P_DEFAULT));
  if (!dataset.id_) return dataset.Failure("open");
  OwnedHid type(H5Dget_type(dataset.id_.get()));
  OwnedHid space(H5Dget_space(dataset.id_.get()));
  OwnedHid creation(H5Dget_create_plist(dataset.id_.get()));
  if (!type || !space || !creation) return dataset.Failure("describe");
  const std::string where = absl::StrCat(file_->path(), ": dataset ", name);
  if (H5Tequal(type.get(), Hdf5Type(expected)) <= 0) {
    return DataError(where, ": the elements are not ", std::string(DTypeName(expected)));
  }
  hsize_t chunk = 0;
  if (H5Pget_layout(creation.get()) != H5D_CHUNKED ||
      H5Pget_chunk(creation.get(), 1, &chunk) != 1 || chunk < 1 ||
      chunk > static_cast<hsize_t>(kHdf5ChunkBytes / DTypeBytes(expected))) {
    return DataError(where, ": expected one-dimensional chunks of at most ", kHdf5ChunkBytes,
                     " bytes");
  }
  dataset.chunk_elements_ = static_cast<int64_t>(chunk);
  unsigned flags = 0, config = 0;
  size_t num_values = 0;
  if (H5Pget_nfilters(creation.get()) != 1 ||
      H5Pget_filter2(creation.get(), 0, &flags, &num_values, nullptr, 0, nullptr, &config) !=
          H5Z_FILTER_FLETCHER32) {
    return DataError(where, ": expected the Fletcher32 checksum as its one filter");
  }
  hsize_t extent = 0;
  if (H5Sget_simple_extent_ndims(space.get()) != 1 ||
      H5Sget_simple_extent_dims(space.get(), &extent, nullptr) != 1) {
    return DataError(where, ": expected one dimension");
  }
  dataset.count_ = static_cast<int64_t>(extent);
  return dataset;
}

absl::Status Hdf5Dataset::Failure(absl::string_view doing) const {
  const absl::Status status = Hdf5Error(file_->path(), absl::StrCat(doing, " dataset ", name_));
  return file_->error().ok() ? status : file_->error();
}

absl::Status Hdf5Dataset::Read(int64_t begin, int64_t count, void* destination) const {
  CHECK_GE(begin, 0);
  CHECK_GT(count, 0);
  if (begin > count_ || count > count_ - begin) {
    return DataError(file_->path(), ": dataset ", name_, " has ", count_, " elements, asked for ",
                     begin, " + ", count);
  }
  const hsize_t start = static_cast<hsize_t>(begin), extent = static_cast<hsize_t>(count);
  OwnedHid memory_space(H5Screate_simple(1, &extent, nullptr));
  OwnedHid file_space(H5Dget_space(id_.get()));
  if (!memory_space || !file_space ||
      H5Sselect_hyperslab(file_space.get(), H5S_SELECT_SET, &start, nullptr, &extent, nullptr) <
          0 ||
      H5Dread(id_.get(), Hdf5Type(dtype_), memory_space.get(), file_space.get(), H5P_DEFAULT,
              destination) < 0) {
    return Failure("read");
  }
  return absl::OkStatus();
}

}  // namespace baleen
