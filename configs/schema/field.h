// Field: one key of a configuration with everything that is known about it, bound to the struct
// member it fills.
//
// A struct lists its fields in one function, Visit(T&, Fields&) (run_fields.cc, model_fields.cc).
// Reading, checking, printing, JSON Schema and the reference page are loops over that list, so no
// default, range or word of documentation stands anywhere else.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace baleen {

// What a leaf holds; a choice is its word. monostate: an optional key that is absent.
using FieldValue = std::variant<std::monostate, bool, int64_t, double, std::string,
                                std::vector<int64_t>, std::array<double, 2>>;

struct Field {
  enum class Type {
    kBool,
    kInteger,
    kNumber,
    kString,
    kChoice,
    kIntegerList,
    kNumberPair,
    kSection,
    kSectionList
  };
  enum class Presence {
    kRequired,
    kRequiredInStage,  // given at the top level or by every stage
    kOptional,         // may be absent or null
    kDefault           // absent means `default_text`
  };
  // A bound of integers and numbers; `open` excludes the bound itself.
  struct Bound {
    double value = 0;
    bool open = false;
  };

  std::string key;
  Type type = Type::kString;
  Presence presence = Presence::kRequired;
  std::string default_text;  // YAML
  std::optional<Bound> low, high;
  std::string unit;
  std::string doc;
  std::vector<std::string> choices;
  bool identifier = false;   // kString: letters, digits and -_. only
  bool exactly_one = false;  // kSection: exactly one of its keys is given
  size_t min_items = 0;      // kSectionList
  size_t max_items = 10000;  // kSectionList: bounds the work that a hostile file can ask for

  // Leaves.
  std::function<void(const FieldValue&)> set;
  std::function<FieldValue()> get;

  // Sections and lists: the fields of the section, or of a typical element. `prototype` owns what
  // they are bound to where the target itself has no such element yet.
  std::vector<Field> children;
  std::shared_ptr<void> prototype;
  std::function<bool()> present;               // optional kSection
  std::function<std::vector<Field>()> open;    // optional kSection: created and bound
  std::function<size_t()> size;                // kSectionList
  std::function<void()> clear;                 // kSectionList
  std::function<std::vector<Field>()> append;  // kSectionList: a new last element, bound
  std::function<std::vector<Field>(size_t index)> element;  // kSectionList

  bool is_leaf() const { return type != Type::kSection && type != Type::kSectionList; }
  // "an integer from 1 to 65536", "one of auto | cpu | cuda".
  std::string Expected() const;
  bool InRange(long double value) const;  // a type that holds every int64_t exactly
  // The leaf's value as YAML.
  std::string Text() const;

  // What Visit() says about a field, in a chain.
  Field& Default(absl::string_view yaml);
  Field& DefaultIsCurrent();  // the value that the struct holds now
  Field& Optional();
  Field& RequiredInStage();
  Field& Between(double lowest, double highest);
  Field& AtLeast(double lowest);
  Field& Above(double bound);  // excluded
  Field& Below(double bound);  // excluded
  Field& Identifier();
  Field& ExactlyOne();
  Field& Items(size_t fewest, size_t most);
  Field& Unit(absl::string_view text);
  Field& Doc(absl::string_view text);
};

inline constexpr char kIdentifierPattern[] = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$";
bool IsIdentifier(absl::string_view text);

// Collects the fields of one struct. References returned by Add* hold until the next Add*.
class Fields {
 public:
  Field& Add(absl::string_view key, bool* target);
  Field& Add(absl::string_view key, int64_t* target);
  Field& Add(absl::string_view key, double* target);
  Field& Add(absl::string_view key, std::string* target);
  Field& Add(absl::string_view key, std::optional<int64_t>* target);  // Optional() already
  Field& Add(absl::string_view key, std::optional<std::string>* target);
  Field& Add(absl::string_view key, std::vector<int64_t>* target);
  Field& Add(absl::string_view key, std::array<double, 2>* target);
  // A string with its own reading: a word with a meaning, a value the struct does not hold.
  Field& AddText(absl::string_view key, std::function<void(const std::string&)> set,
                 std::function<std::string()> get);
  Field& AddChoice(absl::string_view key, std::vector<std::string> words,
                   std::function<void(size_t)> set, std::function<size_t()> get);

  // An enum whose values 0, 1, ... are written as `words`.
  template <typename E>
  Field& Choice(absl::string_view key, E* target, absl::Span<const absl::string_view> words) {
    return AddChoice(
        key, std::vector<std::string>(words.begin(), words.end()),
        [target](size_t index) { *target = static_cast<E>(index); },
        [target] { return static_cast<size_t>(*target); });
  }

  template <typename T>
  Field& Section(absl::string_view key, T* target) {
    Field& field = AddContainer(key, Field::Type::kSection);
    field.presence = Field::Presence::kDefault;
    field.children = Of(*target);
    return field;
  }

  template <typename T>
  Field& OptionalSection(absl::string_view key, std::optional<T>* target) {
    Field& field = AddContainer(key, Field::Type::kSection);
    field.presence = Field::Presence::kOptional;
    DescribeBy<T>(field);
    field.present = [target] { return target->has_value(); };
    field.open = [target] { return Of(target->has_value() ? **target : target->emplace()); };
    return field;
  }

  // `append` makes a new last element; the default is an empty one.
  template <typename T>
  Field& List(absl::string_view key, std::vector<T>* target, std::function<T()> make = nullptr) {
    Field& field = AddContainer(key, Field::Type::kSectionList);
    DescribeBy<T>(field);
    field.size = [target] { return target->size(); };
    field.clear = [target] { target->clear(); };
    field.element = [target](size_t index) { return Of((*target)[index]); };
    field.append = [target, make] { return Of(target->emplace_back(make ? make() : T{})); };
    return field;
  }

  template <typename T>
  static std::vector<Field> Of(T& target) {
    Fields fields;
    Visit(target, fields);
    return std::move(fields.fields_);
  }

 private:
  Field& AddLeaf(absl::string_view key, Field::Type type,
                 std::function<void(const FieldValue&)> set, std::function<FieldValue()> get);
  Field& AddContainer(absl::string_view key, Field::Type type);
  template <typename T>
  static void DescribeBy(Field& field) {
    auto prototype = std::make_shared<T>();
    field.children = Of(*prototype);
    field.prototype = std::move(prototype);
  }

  std::vector<Field> fields_;
};

// The value as YAML: "1f1b", "[0.9, 0.95]", "null".
std::string FormatValue(const FieldValue& value);

// "stages[0].optimizer.lr" from the key path "stages.0.optimizer.lr".
std::string DisplayPath(absl::string_view path);
// "optimizer.lr" from "stages.0.optimizer.lr"; any other path stays as it is.
std::string WithoutStage(absl::string_view path);
std::string JoinKey(absl::string_view path, absl::string_view key);

}  // namespace baleen
