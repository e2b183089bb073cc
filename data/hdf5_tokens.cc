#include "data/hdf5_tokens.h"

#include <hdf5.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "kernels/core/check.h"
#include "kernels/core/owned.h"

namespace baleen {
namespace {

using File = Owned<hid_t, [](hid_t id) { H5Fclose(id); }, H5I_INVALID_HID>;
using H5Dataset = Owned<hid_t, [](hid_t id) { H5Dclose(id); }, H5I_INVALID_HID>;
using Dataspace = Owned<hid_t, [](hid_t id) { H5Sclose(id); }, H5I_INVALID_HID>;
using Datatype = Owned<hid_t, [](hid_t id) { H5Tclose(id); }, H5I_INVALID_HID>;
using Properties = Owned<hid_t, [](hid_t id) { H5Pclose(id); }, H5I_INVALID_HID>;
using Attribute = Owned<hid_t, [](hid_t id) { H5Aclose(id); }, H5I_INVALID_HID>;

constexpr size_t kLongestAttribute = 1024;

// HDF5 prints its error stack by default; here every failure becomes a Status.
class SilentHdf5 {
 public:
  SilentHdf5() {
    H5Eget_auto2(H5E_DEFAULT, &print_, &data_);
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  }
  ~SilentHdf5() { H5Eset_auto2(H5E_DEFAULT, print_, data_); }
  SilentHdf5(const SilentHdf5&) = delete;
  SilentHdf5& operator=(const SilentHdf5&) = delete;

 private:
  H5E_auto2_t print_ = nullptr;
  void* data_ = nullptr;
};

absl::StatusOr<Attribute> OpenScalarAttribute(hid_t file, const char* name, H5T_class_t type_class,
                                              const std::string& path) {
  Attribute attribute(H5Aopen(file, name, H5P_DEFAULT));
  if (!attribute)
    return DataError(path, ": root attribute ", name, " is missing; is this a token file?");
  const Dataspace space(H5Aget_space(attribute.get()));
  const Datatype type(H5Aget_type(attribute.get()));
  if (H5Sget_simple_extent_npoints(space.get()) != 1 || H5Tget_class(type.get()) != type_class) {
    return DataError(path, ": root attribute ", name, ": expected a single ",
                     type_class == H5T_STRING ? "string" : "integer");
  }
  return attribute;
}

absl::StatusOr<int64_t> ReadInteger(hid_t file, const char* name, const std::string& path) {
  ASSIGN_OR_RETURN(const Attribute attribute, OpenScalarAttribute(file, name, H5T_INTEGER, path));
  int64_t value = 0;
  if (H5Aread(attribute.get(), H5T_NATIVE_INT64, &value) < 0) {
    return DataError(path, ": root attribute ", name, " cannot be read");
  }
  return value;
}

// Both kinds of HDF5 string: of fixed length (C writers) and of variable length (h5py).
absl::StatusOr<std::string> ReadString(hid_t file, const char* name, const std::string& path) {
  ASSIGN_OR_RETURN(const Attribute attribute, OpenScalarAttribute(file, name, H5T_STRING, path));
  const Datatype type(H5Aget_type(attribute.get()));
  if (H5Tis_variable_str(type.get()) > 0) {
    char* text = nullptr;
    if (H5Aread(attribute.get(), type.get(), &text) < 0 || text == nullptr) {
      return DataError(path, ": root attribute ", name, " cannot be read");
    }
    std::string value(text, strnlen(text, kLongestAttribute));
    H5free_memory(text);
    return value;
  }
  const size_t size = H5Tget_size(type.get());
  if (size > kLongestAttribute)
    return DataError(path, ": root attribute ", name, " has ", size, " bytes");
  std::string value(size, '\0');
  if (H5Aread(attribute.get(), type.get(), value.data()) < 0) {
    return DataError(path, ": root attribute ", name, " cannot be read");
  }
  return std::string(value.c_str());
}

// A one-dimensional dataset whose bytes stand unfiltered in this very file.
struct Column {
  H5Dataset dataset;
  Properties properties;
  int64_t count = 0;
};

absl::StatusOr<Column> OpenColumn(hid_t file, const char* name, hid_t type,
                                  absl::string_view type_name, const GuardedFile& guarded) {
  const std::string where = absl::StrCat(guarded.path(), ": dataset ", name);
  H5L_info_t link;
  if (H5Lget_info(file, name, &link, H5P_DEFAULT) < 0) return DataError(where, " is missing");
  if (link.type != H5L_TYPE_HARD)
    return DataError(where, ": found a link, expected the data itself");
  Column column;
  column.dataset = H5Dataset(H5Dopen2(file, name, H5P_DEFAULT));
  if (!column.dataset) return DataError(where, ": expected a dataset");
  const Datatype found_type(H5Dget_type(column.dataset.get()));
  if (H5Tequal(found_type.get(), type) <= 0) {
    return DataError(where, ": expected elements of type ", type_name, " (little-endian)");
  }
  const Dataspace space(H5Dget_space(column.dataset.get()));
  hsize_t count = 0;
  if (H5Sget_simple_extent_ndims(space.get()) != 1)
    return DataError(where, ": expected one dimension");
  H5Sget_simple_extent_dims(space.get(), &count, nullptr);
  column.properties = Properties(H5Dget_create_plist(column.dataset.get()));
  const H5D_layout_t layout = H5Pget_layout(column.properties.get());
  if (layout != H5D_CONTIGUOUS && layout != H5D_CHUNKED) {
    return DataError(where, ": expected contiguous or chunked storage");
  }
  if (layout == H5D_CONTIGUOUS && H5Pget_external_count(column.properties.get()) != 0) {
    return DataError(where, ": the data is in other files, expected it in this one");
  }
  if (H5Pget_nfilters(column.properties.get()) != 0) {
    return DataError(where,
                     ": expected no filters (compression, checksums); write it again without");
  }
  // A claimed length is believed only as far as the file has bytes for it.
  const uint64_t stored = H5Dget_storage_size(column.dataset.get());
  const uint64_t room = std::min<uint64_t>(stored, guarded.size()) / H5Tget_size(type);
  if (count > room) {
    return DataError(where, ": ", count, " elements, but the file holds at most ", room,
                     " of them");
  }
  column.count = static_cast<int64_t>(count);
  return column;
}

absl::Status CheckPiece(const GuardedFile& file, haddr_t offset, int64_t bytes, int64_t piece) {
  const auto size = static_cast<uint64_t>(file.size());
  if (offset != HADDR_UNDEF && offset <= size && static_cast<uint64_t>(bytes) <= size - offset) {
    return absl::OkStatus();
  }
  return DataError(file.path(), ": dataset /tokens: piece ", piece, " of ", bytes,
                   " bytes is not stored inside the file's ", size, " bytes");
}

struct Pieces {
  int64_t tokens_each = 0;
  std::vector<int64_t> offsets;
};

absl::StatusOr<Pieces> LocateTokens(const Column& tokens, const GuardedFile& file) {
  Pieces pieces;
  if (tokens.count == 0) return pieces;
  if (H5Pget_layout(tokens.properties.get()) == H5D_CONTIGUOUS) {
    const haddr_t offset = H5Dget_offset(tokens.dataset.get());
    RETURN_IF_ERROR(CheckPiece(file, offset, 4 * tokens.count, 0));
    pieces.tokens_each = tokens.count;
    pieces.offsets.push_back(static_cast<int64_t>(offset));
    return pieces;
  }
  hsize_t chunk = 0;
  H5Pget_chunk(tokens.properties.get(), 1, &chunk);
  CHECK_GE(chunk, hsize_t{1});
  pieces.tokens_each = static_cast<int64_t>(chunk);
  for (hsize_t begin = 0; begin < static_cast<hsize_t>(tokens.count); begin += chunk) {
    unsigned filter_mask = 0;
    haddr_t offset = HADDR_UNDEF;
    hsize_t bytes = 0;
    if (H5Dget_chunk_info_by_coord(tokens.dataset.get(), &begin, &filter_mask, &offset, &bytes) <
        0) {
      offset = HADDR_UNDEF;
    }
    const int64_t piece = static_cast<int64_t>(begin / chunk);
    RETURN_IF_ERROR(CheckPiece(file, offset, static_cast<int64_t>(4 * chunk), piece));
    pieces.offsets.push_back(static_cast<int64_t>(offset));
  }
  return pieces;
}

absl::Status CheckEnds(const std::vector<uint64_t>& ends, int64_t num_tokens,
                       const std::string& path) {
  uint64_t previous = 0;
  for (size_t i = 0; i < ends.size(); ++i) {
    if (ends[i] < previous || ends[i] > static_cast<uint64_t>(num_tokens)) {
      return DataError(path, ": /doc_ends[", i, "]: found ", ends[i], ", expected ", previous,
                       " to ", num_tokens);
    }
    previous = ends[i];
  }
  if (previous != static_cast<uint64_t>(num_tokens)) {
    return DataError(path, ": the last of /doc_ends: found ", previous, ", expected ", num_tokens,
                     ", the length of /tokens");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Hdf5Tokens> Hdf5Tokens::Open(const std::string& path) {
  ASSIGN_OR_RETURN(GuardedFile file, GuardedFile::Open(path));
  Hdf5Tokens tokens(std::move(file));
  RETURN_IF_ERROR(tokens.ReadStructure());
  RETURN_IF_ERROR(tokens.CheckUnchanged());  // HDF5 opened the path a second time
  return tokens;
}

absl::Status Hdf5Tokens::ReadStructure() {
  const SilentHdf5 silent;
  const File file(H5Fopen(path().c_str(), H5F_ACC_RDONLY, H5P_DEFAULT));
  if (!file) return DataError(path(), ": cannot be opened as an HDF5 file");
  const Properties creation(H5Fget_create_plist(file.get()));
  hsize_t userblock = 0;
  H5Pget_userblock(creation.get(), &userblock);
  if (userblock != 0)
    return DataError(path(), ": found a user block of ", userblock, " bytes, expected none");
  ASSIGN_OR_RETURN(const std::string format, ReadString(file.get(), "format", path()));
  if (format != "dsa-tokens") {
    return DataError(path(), ": root attribute format: found \"", format,
                     "\", expected \"dsa-tokens\"");
  }
  ASSIGN_OR_RETURN(const int64_t version, ReadInteger(file.get(), "version", path()));
  if (version != 1)
    return DataError(path(), ": root attribute version: found ", version, ", expected 1");
  ASSIGN_OR_RETURN(vocab_size_, ReadInteger(file.get(), "vocab_size", path()));
  if (H5Aexists(file.get(), "eos_id") > 0) {
    ASSIGN_OR_RETURN(eos_id_, ReadInteger(file.get(), "eos_id", path()));
  }
  ASSIGN_OR_RETURN(const Column tokens,
                   OpenColumn(file.get(), "/tokens", H5T_STD_U32LE, "u32", file_));
  ASSIGN_OR_RETURN(Pieces pieces, LocateTokens(tokens, file_));
  num_tokens_ = tokens.count;
  chunk_tokens_ = pieces.tokens_each;
  chunk_offsets_ = std::move(pieces.offsets);
  ASSIGN_OR_RETURN(const Column ends,
                   OpenColumn(file.get(), "/doc_ends", H5T_STD_U64LE, "u64", file_));
  document_ends_.resize(ends.count);
  if (ends.count > 0 && H5Dread(ends.dataset.get(), H5T_NATIVE_UINT64, H5S_ALL, H5S_ALL,
                                H5P_DEFAULT, document_ends_.data()) < 0) {
    return DataError(path(), ": dataset /doc_ends cannot be read");
  }
  return CheckEnds(document_ends_, num_tokens_, path());
}

absl::Status Hdf5Tokens::CopyTokens(int64_t begin, absl::Span<int32_t> out) const {
  const int64_t count = static_cast<int64_t>(out.size());
  CHECK(begin >= 0 && begin <= num_tokens_ - count)
      << path() << ": tokens [" << begin << ", " << begin + count << ") of " << num_tokens_;
  for (int64_t done = 0; done < count;) {
    const int64_t piece = (begin + done) / chunk_tokens_;
    const int64_t skip = (begin + done) % chunk_tokens_;
    const int64_t part = std::min(count - done, chunk_tokens_ - skip);
    RETURN_IF_ERROR(file_.ReadAt(chunk_offsets_[piece] + 4 * skip,
                                 absl::MakeSpan(reinterpret_cast<uint8_t*>(&out[done]), 4 * part)));
    done += part;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (out[i] < 0) {  // u32 read as i32
      return DataError(path(), ": /tokens[", begin + i, "]: found id ",
                       static_cast<uint32_t>(out[i]), ", expected at most ",
                       std::numeric_limits<int32_t>::max());
    }
  }
  return absl::OkStatus();
}

}  // namespace baleen
