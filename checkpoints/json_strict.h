// Strict JSON: an event parser and a small ordered value, for files that may be hostile (headers,
// index, config.json).
//
// Refused with a Status: more bytes than the limit, depth over 16, repeated keys, integers outside
// int64, numbers outside double, invalid UTF-8, a byte order mark, NUL bytes, comments, anything
// after the value. Nothing throws.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/string_view.h"
#include "kernels/core/status.h"

namespace baleen {

enum class JsonKind : uint8_t {
  kNull,
  kBool,
  kInteger,
  kNumber,  // written with a fraction or an exponent
  kString,
  kArray,
  kObject,
};

absl::string_view JsonKindName(JsonKind kind);  // "an integer", for messages

struct JsonLimits {
  int64_t bytes;
  int depth = 16;
};

// One step of a depth-first walk. `text` lives until the handler returns.
struct JsonEvent {
  enum class What : uint8_t { kBegin, kEnd, kKey, kScalar };
  What what;
  JsonKind kind = JsonKind::kNull;  // kBegin, kEnd: kArray or kObject; kScalar: the others
  absl::string_view text;           // a key, a string, or the digits of kNumber as written
  int64_t integer = 0;
  double number = 0;
  bool boolean = false;
};

// Calls `handler` for every event; its first error ends the walk and is returned. A fault of the
// text is a DataError that begins with `where` and names the byte.
absl::Status ParseJsonEvents(absl::string_view text, absl::string_view where, JsonLimits limits,
                             absl::FunctionRef<absl::Status(const JsonEvent&)> handler);

// A parsed value. Objects keep the order of the file; numbers keep their spelling.
struct JsonValue {
  JsonKind kind = JsonKind::kNull;
  bool boolean = false;
  int64_t integer = 0;
  double number = 0;  // of kNumber and of kInteger
  std::string text;   // kString: the string; kNumber: as written
  std::vector<JsonValue> items;
  struct Member;
  std::vector<Member> members;

  static JsonValue Bool(bool value);
  static JsonValue Integer(int64_t value);
  static JsonValue Number(double value);  // spelt so that it reads back as the same double
  static JsonValue String(absl::string_view value);
  static JsonValue Array(std::vector<JsonValue> items);
  static JsonValue Object();

  bool is_null() const { return kind == JsonKind::kNull; }
  // The member of an object, or nullptr.
  const JsonValue* Find(absl::string_view key) const;
  // Replaces or appends a member of an object.
  void Set(absl::string_view key, JsonValue value);
  void Remove(absl::string_view key);
};

struct JsonValue::Member {
  std::string key;
  JsonValue value;
};

absl::StatusOr<JsonValue> ParseJson(absl::string_view text, absl::string_view where,
                                    JsonLimits limits);

// Two-space indentation as the Hugging Face libraries write it; with `indent` 0 on one line without
// spaces.
std::string JsonText(const JsonValue& value, int indent = 2);
// A string with quotes and escapes.
std::string JsonQuote(absl::string_view text);

}  // namespace baleen
