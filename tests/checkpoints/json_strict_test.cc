#include "checkpoints/json_strict.h"

#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;
using testing::IsOk;

constexpr JsonLimits kLimits{.bytes = 1 << 20};
constexpr absl::StatusCode kBad = absl::StatusCode::kDataLoss;

TEST(JsonStrict, KeepsOrderAndSpellingThroughAWrite) {
  const std::string text =
      "{\n  \"z\": 1e-06,\n  \"a\": [\n    1,\n    -2,\n    true,\n    null,\n    "
      "\"x\\\"\\u0001\"\n  ],\n"
      "  \"o\": {}\n}";
  ASSERT_OK_AND_ASSIGN(const JsonValue value, ParseJson(text, "t", kLimits));
  EXPECT_EQ(JsonText(value), text);
  EXPECT_EQ(value.Find("z")->number, 1e-6);
  EXPECT_EQ(value.Find("a")->items[1].integer, -2);
  EXPECT_EQ(value.Find("a")->items[4].text, "x\"\x01");
  EXPECT_EQ(value.Find("b"), nullptr);
}

TEST(JsonStrict, WritesNumbersThatReadBackTheSame) {
  for (const double number : {0.02, 1e-6, 2.5, 40.0, 1e22, 0.1 + 0.2}) {
    const std::string text = JsonText(JsonValue::Number(number), 0);
    ASSERT_OK_AND_ASSIGN(const JsonValue value, ParseJson(text, "t", kLimits));
    EXPECT_EQ(value.kind, JsonKind::kNumber) << text;
    EXPECT_EQ(value.number, number) << text;
  }
}

TEST(JsonStrict, RefusesWhatALenientParserTakes) {
  struct Case {
    absl::string_view text;
    const char* part;
  };
  const Case cases[] = {
      {R"({"a":1,"a":2})", "stands twice"},
      {R"({"o":{"b":1,"\u0062":2}})", "stands twice"},
      {"{} x", "parse error"},
      {"{}{}", "parse error"},
      {"", "parse error"},
      {"[1,]", "parse error"},
      {"[1 /* c */]", "parse error"},
      {"[01]", "parse error"},
      {"[NaN]", "parse error"},
      {"[1e999]", "number overflow"},
      {"\xef\xbb\xbf{}", "byte order mark"},
      {"[9223372036854775808]", "64 signed bits"},
      {"[-9223372036854775809]", "64 signed bits"},
      {"[123456789012345678901234567890]", "64 signed bits"},
      {"[\"\xff\"]", "parse error"},
      {"[\"\xed\xa0\x80\"]", "parse error"},
      {R"(["\ud800"])", "parse error"},
      {"[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]", "deeper than 16"},
      {"{\"a\":", "parse error"},
      {"[\"a\nb\"]", "parse error"},
  };
  for (const Case& c : cases) {
    EXPECT_THAT(ParseJson(c.text, "file.json", kLimits), HasStatus(kBad, c.part)) << c.text;
  }
  EXPECT_THAT(ParseJson(absl::string_view("{}\0{}", 5), "f", kLimits), HasStatus(kBad, "NUL"));
  EXPECT_THAT(ParseJson("[1, 2, 3]", "f", {.bytes = 8}), HasStatus(kBad, "the limit is 8"));
}

TEST(JsonStrict, TakesDepthSixteenAndTheEndsOfTheIntegerRange) {
  ASSERT_OK_AND_ASSIGN(const JsonValue deep,
                       ParseJson("[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]", "t", kLimits));
  EXPECT_EQ(deep.kind, JsonKind::kArray);
  ASSERT_OK_AND_ASSIGN(const JsonValue ends,
                       ParseJson("[9223372036854775807, -9223372036854775808]", "t", kLimits));
  EXPECT_EQ(ends.items[0].integer, std::numeric_limits<int64_t>::max());
  EXPECT_EQ(ends.items[1].integer, std::numeric_limits<int64_t>::min());
}

TEST(JsonStrict, FindsARepeatedKeyAmongThousands) {
  std::string text = "{";
  for (int i = 0; i < 5000; ++i) absl::StrAppend(&text, "\"k", i, "\":0,");
  EXPECT_THAT(ParseJson(text + "\"last\":0}", "t", kLimits), IsOk());
  EXPECT_THAT(ParseJson(text + "\"k77\":0}", "t", kLimits),
              HasStatus(kBad, "\"k77\" stands twice"));
}

TEST(JsonStrict, StopsAtTheHandlersFirstError) {
  int seen = 0;
  const absl::Status status =
      ParseJsonEvents("[1, 2, 3]", "t", kLimits, [&](const JsonEvent& event) -> absl::Status {
        if (event.what == JsonEvent::What::kScalar) ++seen;
        return seen == 2 ? ConfigError("enough") : absl::OkStatus();
      });
  EXPECT_THAT(status, HasStatus(absl::StatusCode::kInvalidArgument, "enough"));
  EXPECT_EQ(seen, 2);
}

TEST(JsonStrict, SetReplacesAndRemoveForgets) {
  JsonValue object = JsonValue::Object();
  object.Set("a", JsonValue::Integer(1));
  object.Set("b", JsonValue::Bool(true));
  object.Set("a", JsonValue::String("x"));
  EXPECT_EQ(JsonText(object, 0), R"({"a":"x","b":true})");
  object.Remove("a");
  EXPECT_EQ(JsonText(object, 0), R"({"b":true})");
}

}  // namespace
}  // namespace baleen
