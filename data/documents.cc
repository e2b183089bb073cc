#include "data/documents.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <system_error>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/core/file.h"

namespace baleen {
namespace {

namespace fs = std::filesystem;

absl::string_view AsText(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

// Length of the well-formed UTF-8 character at the front of `bytes` (Unicode table 3-7); 0 when
// there is none.
size_t CharacterLength(absl::string_view bytes) {
  const auto at = [&](size_t i) -> unsigned { return static_cast<unsigned char>(bytes[i]); };
  const unsigned lead = at(0);
  if (lead < 0x80) return lead == 0 ? 0 : 1;
  const size_t length = lead >= 0xc2 && lead <= 0xdf   ? 2
                        : lead >= 0xe0 && lead <= 0xef ? 3
                        : lead >= 0xf0 && lead <= 0xf4 ? 4
                                                       : 0;
  if (length == 0 || bytes.size() < length) return 0;
  // The second byte rules out overlong forms, surrogates and what is above U+10FFFF.
  const unsigned low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  const unsigned high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  if (at(1) < low || at(1) > high) return 0;
  for (size_t i = 2; i < length; ++i) {
    if (at(i) < 0x80 || at(i) > 0xbf) return 0;
  }
  return length;
}

class Reader {
 public:
  Reader(const DocumentOptions& options, absl::FunctionRef<absl::Status(Document)> use)
      : options_(options), use_(use) {}

  absl::Status ReadInput(const std::string& input) {
    if (DirectoryExists(input)) return ReadDirectory(input);
    if (absl::EndsWith(input, ".jsonl")) return ReadJsonLines(input);
    ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(input));
    const int64_t bad = FindNonText(AsText(file));
    if (bad >= 0) {
      return DataError(
          input, ": byte ", bad, ": found 0x", absl::Hex(file.bytes()[bad], absl::kZeroPad2),
          ", expected UTF-8 text without NUL bytes; convert the file (iconv) or leave it out");
    }
    ++counts_.files_read;
    return Use(input, std::string(AsText(file)));
  }

  const DocumentCounts& counts() const { return counts_; }

 private:
  absl::Status Use(std::string name, std::string text) {
    if (text.empty()) {
      ++counts_.empty_documents;
      return absl::OkStatus();
    }
    return use_({std::move(name), std::move(text)});
  }

  bool Wanted(const std::string& path) const {
    return options_.extensions.empty() ||
           std::any_of(options_.extensions.begin(), options_.extensions.end(),
                       [&](const std::string& ending) { return absl::EndsWith(path, ending); });
  }

  absl::StatusOr<std::vector<std::string>> ListFiles(const std::string& directory) const {
    std::vector<std::string> paths;
    std::error_code error;
    for (auto entry = fs::recursive_directory_iterator(directory, error);
         !error && entry != fs::recursive_directory_iterator(); entry.increment(error)) {
      std::error_code unused;
      if (entry->is_symlink(unused) || !entry->is_regular_file(unused)) continue;
      if (Wanted(entry->path().string())) paths.push_back(entry->path().string());
    }
    if (error) return DataError(directory, ": cannot read the directory: ", error.message());
    std::sort(paths.begin(), paths.end());
    return paths;
  }

  absl::Status ReadDirectory(const std::string& directory) {
    ASSIGN_OR_RETURN(std::vector<std::string> paths, ListFiles(directory));
    if (options_.document_per == DocumentPer::kDirectory) {
      // Files of one directory side by side: sub-directories would otherwise stand between them.
      std::stable_sort(paths.begin(), paths.end(), [](const std::string& a, const std::string& b) {
        return fs::path(a).parent_path() < fs::path(b).parent_path();
      });
    }
    Document joined;
    for (const std::string& path : paths) {
      if (absl::EndsWith(path, ".jsonl")) {
        RETURN_IF_ERROR(ReadJsonLines(path));
        continue;
      }
      ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
      if (!TakeFile(file)) continue;
      if (options_.document_per == DocumentPer::kFile) {
        RETURN_IF_ERROR(Use(path, std::string(AsText(file))));
        continue;
      }
      const std::string parent = fs::path(path).parent_path().string();
      if (parent != joined.name) {
        RETURN_IF_ERROR(Flush(joined));
        joined.name = parent;
      }
      absl::StrAppend(&joined.text, "// ", fs::path(path).lexically_relative(directory).string(),
                      "\n", AsText(file));
      if (joined.text.back() != '\n') joined.text += '\n';
    }
    return Flush(joined);
  }

  // Whether a file found in a directory is text of a wanted size; counts it either way.
  bool TakeFile(const MappedFile& file) {
    const bool too_large = options_.max_file_bytes > 0 &&
                           static_cast<int64_t>(file.bytes().size()) > options_.max_file_bytes;
    const bool text = !too_large && FindNonText(AsText(file)) < 0;
    counts_.files_too_large += too_large;
    counts_.files_not_text += !too_large && !text;
    counts_.files_read += text;
    return text;
  }

  absl::Status Flush(Document& joined) {
    if (joined.text.empty()) return absl::OkStatus();
    return Use(std::exchange(joined.name, ""), std::exchange(joined.text, ""));
  }

  absl::Status ReadJsonLines(const std::string& path) {
    ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
    ++counts_.files_read;
    absl::string_view rest = AsText(file);
    for (int64_t line_number = 1; !rest.empty(); ++line_number) {
      const absl::string_view line = rest.substr(0, rest.find('\n'));
      rest.remove_prefix(std::min(rest.size(), line.size() + 1));
      if (line.find_first_not_of(" \t\r") == absl::string_view::npos) continue;
      const auto object =
          nlohmann::json::parse(line.begin(), line.end(), nullptr, /*allow_exceptions=*/false);
      const std::string where = absl::StrCat(path, ":", line_number);
      if (object.is_discarded()) return DataError(where, ": expected one JSON object a line");
      if (!object.is_object() || !object.contains("text") || !object["text"].is_string()) {
        return DataError(where, ": found ", object.type_name(),
                         object.is_object() ? " without a string \"text\"" : "",
                         ", expected an object with a string \"text\"");
      }
      RETURN_IF_ERROR(Use(where, object["text"].get<std::string>()));
    }
    return absl::OkStatus();
  }

  const DocumentOptions& options_;
  absl::FunctionRef<absl::Status(Document)> use_;
  DocumentCounts counts_;
};

}  // namespace

int64_t FindNonText(absl::string_view bytes) {
  for (size_t i = 0; i < bytes.size();) {
    const size_t length = CharacterLength(bytes.substr(i, 4));
    if (length == 0) return static_cast<int64_t>(i);
    i += length;
  }
  return -1;
}

absl::StatusOr<DocumentCounts> ForEachDocument(const DocumentOptions& options,
                                               absl::FunctionRef<absl::Status(Document)> use) {
  Reader reader(options, use);
  for (const std::string& input : options.inputs) RETURN_IF_ERROR(reader.ReadInput(input));
  return reader.counts();
}

}  // namespace baleen
