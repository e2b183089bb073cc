// Strict JSON over nlohmann's SAX parser, which is included here and nowhere else (compile time).
//
// The parser is iterative, so depth costs no stack; it checks UTF-8, escapes and grammar. What it
// is lenient about (NUL bytes, byte order marks, repeated keys, integers that become floats) is
// refused in front of it or in the adapter.
#include "checkpoints/json_strict.h"

#include <charconv>
#include <cmath>
#include <exception>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <string_view>
#include <unordered_set>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "kernels/core/log.h"

namespace baleen {
namespace {

// The keys of one open object, as hashes: a repeated key always hits, and a collision of two
// different keys only refuses a file. Most objects are small, so a list comes before the set.
class KeySet {
 public:
  // False when the key was there already.
  bool Insert(absl::string_view key) {
    const size_t hash = std::hash<std::string_view>{}({key.data(), key.size()});
    if (large_.empty() && small_.size() < kSmall) {
      for (const size_t other : small_) {
        if (other == hash) return false;
      }
      small_.push_back(hash);
      return true;
    }
    if (large_.empty()) large_.insert(small_.begin(), small_.end());
    return large_.insert(hash).second;
  }

 private:
  static constexpr size_t kSmall = 32;
  std::vector<size_t> small_;
  std::unordered_set<size_t> large_;
};

std::string Shortened(absl::string_view text) {
  constexpr size_t kLongest = 200;
  return EscapeControl(text.size() <= kLongest ? text
                                               : absl::StrCat(text.substr(0, kLongest), "..."));
}

// nlohmann's SAX interface -> JsonEvent. Every function returns false to stop; `status` says why.
class Adapter {
 public:
  using number_integer_t = nlohmann::json::number_integer_t;
  using number_unsigned_t = nlohmann::json::number_unsigned_t;
  using number_float_t = nlohmann::json::number_float_t;
  using string_t = nlohmann::json::string_t;
  using binary_t = nlohmann::json::binary_t;

  Adapter(absl::string_view where, int max_depth,
          absl::FunctionRef<absl::Status(const JsonEvent&)> handler)
      : where_(where), max_depth_(max_depth), handler_(handler) {}

  bool null() { return Scalar({JsonEvent::What::kScalar, JsonKind::kNull}); }
  bool boolean(bool value) {
    JsonEvent event{JsonEvent::What::kScalar, JsonKind::kBool};
    event.boolean = value;
    return Scalar(event);
  }
  bool number_integer(number_integer_t value) {
    JsonEvent event{JsonEvent::What::kScalar, JsonKind::kInteger};
    event.integer = value;
    event.number = static_cast<double>(value);
    return Scalar(event);
  }
  bool number_unsigned(number_unsigned_t value) {
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return Fail(absl::StrCat("the integer ", value, " does not fit 64 signed bits"));
    }
    return number_integer(static_cast<int64_t>(value));
  }
  bool number_float(number_float_t value, const string_t& text) {
    // An integer beyond 64 bits arrives here, too.
    if (text.find_first_of(".eE") == string_t::npos) {
      return Fail(absl::StrCat("the integer ", Shortened(text), " does not fit 64 signed bits"));
    }
    JsonEvent event{JsonEvent::What::kScalar, JsonKind::kNumber, text};
    event.number = value;
    return Scalar(event);
  }
  bool string(string_t& text) {
    return Scalar({JsonEvent::What::kScalar, JsonKind::kString, text});
  }
  bool binary(binary_t&) { return Fail("binary value"); }
  bool start_object(size_t) {
    keys_.emplace_back();
    return Begin(JsonKind::kObject);
  }
  bool end_object() {
    keys_.pop_back();
    return End(JsonKind::kObject);
  }
  bool start_array(size_t) { return Begin(JsonKind::kArray); }
  bool end_array() { return End(JsonKind::kArray); }
  bool key(string_t& text) {
    if (!keys_.back().Insert(text)) {
      return Fail(absl::StrCat("the key \"", Shortened(text), "\" stands twice in one object"));
    }
    return Scalar({JsonEvent::What::kKey, JsonKind::kString, text});
  }
  bool parse_error(size_t, const std::string&, const nlohmann::json::exception& error) {
    // "[json.exception.parse_error.101] parse error at line 1, ...": the code means nothing to the
    // user.
    absl::string_view what = error.what();
    const size_t end_of_code = what.find("] ");
    if (end_of_code != absl::string_view::npos) what = what.substr(end_of_code + 2);
    return Fail(Shortened(what));
  }

  const absl::Status& status() const { return status_; }

 private:
  bool Fail(absl::string_view what) {
    status_ = DataError(where_, ": not valid JSON: ", what);
    return false;
  }
  bool Scalar(const JsonEvent& event) {
    status_ = handler_(event);
    return status_.ok();
  }
  bool Begin(JsonKind kind) {
    if (++depth_ > max_depth_) return Fail(absl::StrCat("nested deeper than ", max_depth_));
    return Scalar({JsonEvent::What::kBegin, kind});
  }
  bool End(JsonKind kind) {
    --depth_;
    return Scalar({JsonEvent::What::kEnd, kind});
  }

  absl::string_view where_;
  int max_depth_;
  int depth_ = 0;
  std::vector<KeySet> keys_;
  absl::FunctionRef<absl::Status(const JsonEvent&)> handler_;
  absl::Status status_;
};

// Builds a JsonValue from events: `open` holds the containers from the root to the one being
// filled.
class TreeBuilder {
 public:
  absl::Status Take(const JsonEvent& event) {
    switch (event.what) {
      case JsonEvent::What::kKey:
        key_ = std::string(event.text);
        break;
      case JsonEvent::What::kBegin:
        open_.push_back(Add(FromEvent(event)));
        break;
      case JsonEvent::What::kEnd:
        open_.pop_back();
        break;
      case JsonEvent::What::kScalar:
        Add(FromEvent(event));
        break;
    }
    return absl::OkStatus();
  }
  JsonValue TakeRoot() { return std::move(root_); }

 private:
  static JsonValue FromEvent(const JsonEvent& event) {
    JsonValue value;
    value.kind = event.kind;
    value.boolean = event.boolean;
    value.integer = event.integer;
    value.number = event.number;
    value.text = std::string(event.text);
    return value;
  }
  // The pointer stays good while the value's container is not appended to, that is, while the value
  // is open.
  JsonValue* Add(JsonValue value) {
    if (open_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    JsonValue& parent = *open_.back();
    if (parent.kind == JsonKind::kArray) return &parent.items.emplace_back(std::move(value));
    parent.members.push_back({std::move(key_), std::move(value)});
    return &parent.members.back().value;
  }

  JsonValue root_;
  std::string key_;
  std::vector<JsonValue*> open_;
};

void AppendText(const JsonValue& value, int indent, int level, std::string* out) {
  const bool object = value.kind == JsonKind::kObject;
  auto new_line = [&](int depth) {
    if (indent > 0)
      absl::StrAppend(out, "\n", std::string(static_cast<size_t>(indent * depth), ' '));
  };
  switch (value.kind) {
    case JsonKind::kNull:
      out->append("null");
      return;
    case JsonKind::kBool:
      out->append(value.boolean ? "true" : "false");
      return;
    case JsonKind::kInteger:
      absl::StrAppend(out, value.integer);
      return;
    case JsonKind::kNumber:
      out->append(value.text);
      return;
    case JsonKind::kString:
      out->append(JsonQuote(value.text));
      return;
    case JsonKind::kArray:
    case JsonKind::kObject:
      break;
  }
  const size_t count = object ? value.members.size() : value.items.size();
  out->push_back(object ? '{' : '[');
  for (size_t i = 0; i < count; ++i) {
    if (i > 0) out->push_back(',');
    new_line(level + 1);
    if (object) {
      absl::StrAppend(out, JsonQuote(value.members[i].key), indent > 0 ? ": " : ":");
    }
    AppendText(object ? value.members[i].value : value.items[i], indent, level + 1, out);
  }
  if (count > 0) new_line(level);
  out->push_back(object ? '}' : ']');
}

}  // namespace

absl::string_view JsonKindName(JsonKind kind) {
  switch (kind) {
    case JsonKind::kNull:
      return "null";
    case JsonKind::kBool:
      return "true or false";
    case JsonKind::kInteger:
      return "an integer";
    case JsonKind::kNumber:
      return "a number";
    case JsonKind::kString:
      return "a string";
    case JsonKind::kArray:
      return "a list";
    case JsonKind::kObject:
      return "an object";
  }
  CHECK(false) << "unknown kind " << static_cast<int>(kind);
  return "";
}

absl::Status ParseJsonEvents(absl::string_view text, absl::string_view where, JsonLimits limits,
                             absl::FunctionRef<absl::Status(const JsonEvent&)> handler) {
  if (static_cast<int64_t>(text.size()) > limits.bytes) {
    return DataError(where, ": ", text.size(), " bytes of JSON, the limit is ", limits.bytes);
  }
  // The parser behind takes a NUL for the end of the text and skips a byte order mark.
  if (text.find('\0') != absl::string_view::npos) {
    return DataError(where, ": not valid JSON: a NUL byte at ", text.find('\0'));
  }
  if (text.substr(0, 3) == "\xef\xbb\xbf") {
    return DataError(where, ": not valid JSON: it begins with a byte order mark");
  }
  Adapter adapter(where, limits.depth, handler);
  try {
    const bool complete = nlohmann::json::sax_parse(text.begin(), text.end(), &adapter,
                                                    nlohmann::json::input_format_t::json,
                                                    /*strict=*/true, /*ignore_comments=*/false);
    if (!complete && adapter.status().ok()) return DataError(where, ": not valid JSON");
  } catch (const std::exception& error) {
    return DataError(where, ": cannot parse JSON: ", error.what());
  }
  return adapter.status();
}

absl::StatusOr<JsonValue> ParseJson(absl::string_view text, absl::string_view where,
                                    JsonLimits limits) {
  TreeBuilder builder;
  RETURN_IF_ERROR(ParseJsonEvents(text, where, limits,
                                  [&](const JsonEvent& event) { return builder.Take(event); }));
  return builder.TakeRoot();
}

JsonValue JsonValue::Bool(bool value) {
  JsonValue result;
  result.kind = JsonKind::kBool;
  result.boolean = value;
  return result;
}

JsonValue JsonValue::Integer(int64_t value) {
  JsonValue result;
  result.kind = JsonKind::kInteger;
  result.integer = value;
  result.number = static_cast<double>(value);
  return result;
}

JsonValue JsonValue::Number(double value) {
  CHECK(std::isfinite(value)) << "JSON has no " << value;
  char digits[32];
  const auto end = std::to_chars(digits, digits + sizeof digits, value).ptr;
  JsonValue result;
  result.kind = JsonKind::kNumber;
  result.number = value;
  result.text = std::string(digits, end);
  // A number keeps a fraction or an exponent, as Python writes floats.
  if (result.text.find_first_of(".e") == std::string::npos) result.text += ".0";
  return result;
}

JsonValue JsonValue::String(absl::string_view value) {
  JsonValue result;
  result.kind = JsonKind::kString;
  result.text = std::string(value);
  return result;
}

JsonValue JsonValue::Array(std::vector<JsonValue> items) {
  JsonValue result;
  result.kind = JsonKind::kArray;
  result.items = std::move(items);
  return result;
}

JsonValue JsonValue::Object() {
  JsonValue result;
  result.kind = JsonKind::kObject;
  return result;
}

const JsonValue* JsonValue::Find(absl::string_view key) const {
  for (const auto& [name, value] : members) {
    if (name == key) return &value;
  }
  return nullptr;
}

void JsonValue::Set(absl::string_view key, JsonValue value) {
  for (auto& [name, old] : members) {
    if (name == key) {
      old = std::move(value);
      return;
    }
  }
  members.push_back({std::string(key), std::move(value)});
}

void JsonValue::Remove(absl::string_view key) {
  std::erase_if(members, [&](const Member& member) { return member.key == key; });
}

std::string JsonText(const JsonValue& value, int indent) {
  std::string out;
  AppendText(value, indent, 0, &out);
  return out;
}

std::string JsonQuote(absl::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out.push_back('\\');
      out.push_back(c);
    } else if (static_cast<unsigned char>(c) < 0x20) {
      constexpr char kHex[] = "0123456789abcdef";
      absl::StrAppend(&out, "\\u00", c < 0x10 ? "0" : "1");
      out.push_back(kHex[c & 0xf]);
    } else {
      out.push_back(c);
    }
  }
  out.push_back('"');
  return out;
}

}  // namespace baleen
