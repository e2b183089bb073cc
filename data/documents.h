// Text documents out of files, directories and .jsonl: what `baleen data build` tokenises, in one
// fixed order.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "kernels/core/status.h"

namespace baleen {

// kDirectory: the text files that stand directly in one directory are joined, each behind a line
// "// path".
enum class DocumentPer { kFile, kDirectory };

struct DocumentOptions {
  // Files and directories. *.jsonl is one JSON object a line whose "text" is the document; every
  // other file is text.
  std::vector<std::string> inputs;
  DocumentPer document_per = DocumentPer::kFile;
  // For files found in directories: only these endings (".h"; empty = all) and at most this many
  // bytes (0 = any).
  std::vector<std::string> extensions;
  int64_t max_file_bytes = 0;
};

struct Document {
  std::string name;  // for messages: the file, or file:line of a .jsonl
  std::string text;  // valid UTF-8, not empty
};

struct DocumentCounts {
  int64_t files_read = 0;
  int64_t files_not_text = 0;   // found in a directory and left out: NUL bytes or not UTF-8
  int64_t files_too_large = 0;  // found in a directory and left out
  int64_t empty_documents = 0;  // left out
};

// Calls `use` for each document: inputs as given, directories recursively in byte order of their
// paths. Symbolic links inside directories are not followed. DataError for an input that is
// missing, for a file named as an input that is not UTF-8 text (with the offset), and for a bad
// line of a .jsonl (with its number).
absl::StatusOr<DocumentCounts> ForEachDocument(const DocumentOptions& options,
                                               absl::FunctionRef<absl::Status(Document)> use);

// Offset of the first byte that is NUL or no well-formed UTF-8; -1 for text.
int64_t FindNonText(absl::string_view bytes);

}  // namespace baleen
