#include "data/indexed_tokens.h"

#include <bit>
#include <cstring>
#include <vector>

#include "kernels/core/check.h"

namespace baleen {
namespace {

static_assert(std::endian::native == std::endian::little, "the token formats are little-endian");

constexpr absl::string_view kMagic("MMIDIDX\0\0", 9);
constexpr int64_t kHeaderBytes = 34;

// The arrays of an .idx stand behind a header of 34 bytes, so nothing in it is aligned.
template <typename T>
T Load(absl::Span<const uint8_t> bytes, int64_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(T));
  return value;
}

// What is wrong with a type code, or nothing.
absl::string_view WhyRefused(uint8_t code) {
  switch (code) {
    case 1:
    case 4:
    case 8:
      return "";
    case 2:
      return "i8";
    case 3:
      return "i16";
    case 5:
      return "i64";
    case 6:
      return "f64";
    case 7:
      return "f32";
    default:
      return "no type of the format";
  }
}

struct IndexHeader {
  TokenType type;
  int64_t num_sequences;
  int64_t num_indices;  // documents + 1
};

// Header and lengths of the arrays: after this every array lies inside the file.
absl::StatusOr<IndexHeader> ParseHeader(absl::Span<const uint8_t> bytes, absl::string_view path) {
  const int64_t size = static_cast<int64_t>(bytes.size());
  if (size < kHeaderBytes) {
    return DataError(path, ": the file has ", size, " bytes, expected at least a header of ",
                     kHeaderBytes);
  }
  if (std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    return DataError(path,
                     ": bytes 0-8: expected the magic \"MMIDIDX\\0\\0\" of a Megatron index; "
                     "is this an .idx file?");
  }
  const uint64_t version = Load<uint64_t>(bytes, 9);
  if (version != 1) return DataError(path, ": version at byte 9: found ", version, ", expected 1");
  const uint8_t code = bytes[17];
  if (!WhyRefused(code).empty()) {
    return DataError(path, ": type code at byte 17: found ", int{code}, " (", WhyRefused(code),
                     "), expected 1 (u8), 4 (i32) or 8 (u16); build the set again with i32 ids");
  }
  const uint64_t num_sequences = Load<uint64_t>(bytes, 18);
  const uint64_t num_indices = Load<uint64_t>(bytes, 26);
  // Divided, not multiplied: the counts may be anything up to 2^64 - 1.
  const uint64_t room = static_cast<uint64_t>(size - kHeaderBytes);
  if (num_sequences > room / 12) {
    return DataError(path, ": sequence count at byte 18: found ", num_sequences, ", but ", room,
                     " bytes after the header hold at most ", room / 12);
  }
  const uint64_t room_for_indices = (room - 12 * num_sequences) / 8;
  if (num_indices > room_for_indices) {
    return DataError(path, ": document index count at byte 26: found ", num_indices, ", but ",
                     num_sequences, " sequences leave room for at most ", room_for_indices);
  }
  if (num_indices == 0) {
    return DataError(path, ": document index count at byte 26: found 0, expected documents + 1");
  }
  const uint64_t expected = 12 * num_sequences + 8 * num_indices;
  if (room == expected + num_sequences && num_sequences > 0) {
    return DataError(path,
                     ": the file ends with a mode for each sequence: a multimodal set; "
                     "expected a text set of ",
                     kHeaderBytes + expected, " bytes");
  }
  if (room != expected) {
    return DataError(path, ": the file has ", size, " bytes, expected ", kHeaderBytes + expected,
                     " for ", num_sequences, " sequences and ", num_indices, " document indices");
  }
  return IndexHeader{static_cast<TokenType>(code), static_cast<int64_t>(num_sequences),
                     static_cast<int64_t>(num_indices)};
}

// Lengths and byte offsets must say that the sequences fill .bin exactly, in order.
absl::Status CheckSequences(absl::Span<const uint8_t> bytes, const IndexHeader& header,
                            int64_t bin_bytes, absl::string_view path, absl::string_view bin_path) {
  const int64_t token_bytes = TokenBytes(header.type);
  if (bin_bytes % token_bytes != 0) {
    return DataError(bin_path, ": the file has ", bin_bytes, " bytes, expected a multiple of ",
                     token_bytes, " (", TokenTypeName(header.type), " tokens, as ", path,
                     " says); was it truncated?");
  }
  const int64_t pointers = kHeaderBytes + 4 * header.num_sequences;
  int64_t end_bytes = 0;  // at most bin_bytes, so it cannot overflow
  for (int64_t i = 0; i < header.num_sequences; ++i) {
    const int32_t length = Load<int32_t>(bytes, kHeaderBytes + 4 * i);
    if (length < 0) {
      return DataError(path, ": length of sequence ", i, ": found ", length,
                       ", expected 0 or more");
    }
    const int64_t pointer = Load<int64_t>(bytes, pointers + 8 * i);
    if (pointer != end_bytes) {
      return DataError(path, ": byte offset of sequence ", i, ": found ", pointer, ", expected ",
                       end_bytes, " (the end of the sequence before it)");
    }
    end_bytes += int64_t{length} * token_bytes;
    if (end_bytes > bin_bytes) {
      return DataError(path, ": sequence ", i, " ends at byte ", end_bytes, ", but ", bin_path,
                       " has ", bin_bytes,
                       " bytes; is one of the two truncated or of another set?");
    }
  }
  if (end_bytes != bin_bytes) {
    return DataError(bin_path, ": the file has ", bin_bytes, " bytes, expected ", end_bytes, " as ",
                     path, " says; are the two of one set?");
  }
  return absl::OkStatus();
}

absl::Status CheckDocuments(absl::Span<const uint8_t> bytes, const IndexHeader& header,
                            absl::string_view path) {
  const int64_t begin = kHeaderBytes + 12 * header.num_sequences;
  int64_t previous = 0;
  for (int64_t i = 0; i < header.num_indices; ++i) {
    const int64_t sequence = Load<int64_t>(bytes, begin + 8 * i);
    if (i == 0 && sequence != 0) {
      return DataError(path, ": document index 0: found sequence ", sequence, ", expected 0");
    }
    if (sequence < previous || sequence > header.num_sequences) {
      return DataError(path, ": document index ", i, ": found sequence ", sequence,
                       ", expected one from ", previous, " to ", header.num_sequences);
    }
    previous = sequence;
  }
  if (previous != header.num_sequences) {
    return DataError(path, ": last document index (", header.num_indices - 1, "): found sequence ",
                     previous, ", expected ", header.num_sequences, ", the sequence count");
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status CopyWidened(const GuardedFile& bin, int64_t begin, absl::Span<int32_t> out) {
  std::vector<T> narrow(out.size());
  RETURN_IF_ERROR(bin.ReadAt(
      begin * int64_t{sizeof(T)},
      absl::MakeSpan(reinterpret_cast<uint8_t*>(narrow.data()), narrow.size() * sizeof(T))));
  for (size_t i = 0; i < narrow.size(); ++i) out[i] = narrow[i];
  return absl::OkStatus();
}

}  // namespace

int TokenBytes(TokenType type) {
  return type == TokenType::kUint8 ? 1 : type == TokenType::kUint16 ? 2 : 4;
}

absl::string_view TokenTypeName(TokenType type) {
  return type == TokenType::kUint8 ? "u8" : type == TokenType::kUint16 ? "u16" : "i32";
}

TokenType TokenTypeForVocabulary(int64_t vocab_size) {
  return vocab_size < 65500 ? TokenType::kUint16 : TokenType::kInt32;
}

absl::StatusOr<TokenIndex> TokenIndex::Parse(absl::Span<const uint8_t> bytes, int64_t bin_bytes,
                                             absl::string_view idx_path,
                                             absl::string_view bin_path) {
  ASSIGN_OR_RETURN(const IndexHeader header, ParseHeader(bytes, idx_path));
  RETURN_IF_ERROR(CheckSequences(bytes, header, bin_bytes, idx_path, bin_path));
  RETURN_IF_ERROR(CheckDocuments(bytes, header, idx_path));
  TokenIndex index;
  index.bytes_ = bytes;
  index.type_ = header.type;
  index.num_sequences_ = header.num_sequences;
  index.num_documents_ = header.num_indices - 1;
  index.num_tokens_ = bin_bytes / TokenBytes(header.type);
  return index;
}

int64_t TokenIndex::document_begin(int64_t document) const {
  CHECK(document >= 0 && document <= num_documents_) << document << " of " << num_documents_;
  const int64_t sequence = Load<int64_t>(bytes_, kHeaderBytes + 12 * num_sequences_ + 8 * document);
  // Trailing empty documents begin behind the last sequence. The comparison is unsigned: should the
  // file change under the mapping, a negative number must not be used as an index before the next
  // CheckUnchanged finds out.
  if (static_cast<uint64_t>(sequence) >= static_cast<uint64_t>(num_sequences_)) return num_tokens_;
  return Load<int64_t>(bytes_, kHeaderBytes + 4 * num_sequences_ + 8 * sequence) /
         TokenBytes(type_);
}

absl::StatusOr<IndexedTokens> IndexedTokens::Open(const std::string& prefix) {
  ASSIGN_OR_RETURN(MappedFile idx, MappedFile::Open(prefix + ".idx"));
  ASSIGN_OR_RETURN(GuardedFile bin, GuardedFile::Open(prefix + ".bin"));
  ASSIGN_OR_RETURN(const TokenIndex index,
                   TokenIndex::Parse(idx.bytes(), bin.size(), idx.path(), bin.path()));
  return IndexedTokens(prefix, std::move(idx), std::move(bin), index);
}

absl::Status IndexedTokens::CopyTokens(int64_t begin, absl::Span<int32_t> out) const {
  const int64_t count = static_cast<int64_t>(out.size());
  CHECK(begin >= 0 && begin <= num_tokens() - count)
      << prefix_ << ": tokens [" << begin << ", " << begin + count << ") of " << num_tokens();
  switch (type()) {
    case TokenType::kUint8:
      return CopyWidened<uint8_t>(bin_, begin, out);
    case TokenType::kUint16:
      return CopyWidened<uint16_t>(bin_, begin, out);
    case TokenType::kInt32:
      return bin_.ReadAt(begin * 4,
                         absl::MakeSpan(reinterpret_cast<uint8_t*>(out.data()), out.size() * 4));
  }
  return absl::OkStatus();
}

absl::Status IndexedTokens::CheckUnchanged() const {
  RETURN_IF_ERROR(idx_.CheckUnchanged());
  return bin_.CheckUnchanged();
}

}  // namespace baleen
