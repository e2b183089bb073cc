// Scalars and suggestions, alone.
#include "configs/schema/scalar.h"

#include <gmock/gmock.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "configs/schema/run_fields.h"
#include "configs/schema/suggest.h"
#include "configs/schema/yaml_document.h"

namespace baleen {
namespace {

TEST(ParseInteger, KnowsUnderscoresAndSuffixes) {
  const std::vector<std::pair<std::string, int64_t>> cases = {
      {"0", 0},
      {"-1", -1},
      {"+7", 7},
      {"1_000_000", 1000000},
      {"32Ki", 32768},
      {"1Mi", 1048576},
      {"2Gi", int64_t{2} << 30},
      {"1.5Ki", 1536},
      {"2.1B", 2100000000},
      {"943.7184B", 943718400000},
      {"0.5K", 500},
      {"-3M", -3000000},
      {"9223372036854775807", std::numeric_limits<int64_t>::max()}};
  for (const auto& [text, expected] : cases) {
    int64_t value = -99;
    EXPECT_EQ(ParseInteger(text, value), "") << text;
    EXPECT_EQ(value, expected) << text;
  }
}

TEST(ParseInteger, RefusesEverythingElse) {
  for (const char* text : {"",        "-",
                           "x",       "1 0",
                           "1.0",     "1.5",
                           "1.K",     ".5K",
                           "1e3",     "0x1F",
                           "0o7",     "0b1",
                           "007",     "00",
                           "_1",      "1_",
                           "1__0",    "K",
                           "1KK",     "1k",
                           "1KiB",    "9223372036854775808",
                           "9.3B9",   "10000000000B",
                           "0.0001K", "nan",
                           "inf",     "--1",
                           "1,000",   "0.1234567890123456789K"}) {
    int64_t value = 0;
    EXPECT_NE(ParseInteger(text, value), "") << text;
  }
}

TEST(ParseNumber, ReadsDecimalsExactly) {
  const std::vector<std::pair<std::string, double>> cases = {
      {"1", 1},           {"-0.5", -0.5},      {".5", 0.5}, {"5.", 5},    {"1e-3", 1e-3},
      {"7.3E-6", 7.3e-6}, {"1_000.5", 1000.5}, {"+2", 2},   {"0.1", 0.1}, {"1e308", 1e308}};
  for (const auto& [text, expected] : cases) {
    double value = -99;
    EXPECT_EQ(ParseNumber(text, value), "") << text;
    EXPECT_EQ(value, expected) << text;
  }
  for (const char* text : {"", ".", "e3", "1e", "1e+", "0x1p3", ".nan", "NaN", "-.inf", "Infinity",
                           "1e400", "1e-400", "01.5", "1..2", "1_.5", "1f", "--1", "1 "}) {
    double value = 0;
    EXPECT_NE(ParseNumber(text, value), "") << text;
  }
}

TEST(FormatNumber, ReadsBackToTheSameBits) {
  EXPECT_EQ(FormatNumber(1e-8), "1.0e-08");
  EXPECT_EQ(FormatNumber(2), "2.0");
  EXPECT_EQ(FormatNumber(7.3e-6), "7.3e-06");
  std::mt19937_64 random(1);
  for (int i = 0; i < 10000; ++i) {
    const double value =
        std::ldexp(static_cast<double>(random()), static_cast<int>(random() % 1800) - 900);
    double back = 0;
    ASSERT_EQ(ParseNumber(FormatNumber(value), back), "") << FormatNumber(value);
    ASSERT_EQ(value, back);
  }
}

TEST(FormatString, ReadsBackAsTheSameString) {
  for (const std::string text :
       {"plain", "a/b-c.d", "true", "No",         "null",  "~",           "1",     "1e5",
        "0x1",   "a: b",    "a #b", "- a",        "[a]",   "{a}",         "*a",    "&a",
        "!a",    "%a",      "@a",   "it's",       "\"q\"", "back\\slash", " lead", "trail ",
        "größe", "\x01",    "a,b",  "2024-01-01", "<<",    "?",           ":"}) {
    Problems problems;
    YamlNode root;
    ASSERT_TRUE(ParseYaml("t", "k: [" + FormatString(text) + "]", root, problems)) << text;
    ASSERT_TRUE(problems.empty()) << problems.ToStatus().message();
    const YamlNode* list = root.Find("k");
    ASSERT_TRUE(list != nullptr && list->items.size() == 1) << text;
    EXPECT_EQ(list->items[0].scalar, text);
    EXPECT_EQ(list->items[0].kind, YamlNode::Kind::kScalar) << text;
  }
}

TEST(Suggest, CountsEditsAndSwapsAndNotCase) {
  EXPECT_EQ(EditDistance("tensor", "tensor"), 0);
  EXPECT_EQ(EditDistance("tensro", "tensor"), 1);
  EXPECT_EQ(EditDistance("optimiser", "optimizer"), 1);
  EXPECT_EQ(EditDistance("Micro-Batch", "micro_batch"), 0);
  EXPECT_EQ(EditDistance("", "abc"), 3);
  EXPECT_EQ(EditDistance("kitten", "sitting"), 3);
  EXPECT_EQ(Nearest("lrr", {"lr", "eps"}), "lr");
  EXPECT_EQ(Nearest("zzz", {"lr", "eps"}), "");
  EXPECT_EQ(Nearest(std::string(100000, 'x'), {"lr"}), "");
}

TEST(Suggest, EveryAliasLeadsToAKey) {
  RunConfig run;
  const std::vector<Field> root = RunFields(run);
  for (const char* alias :
       {"tensor_model_parallel_size", "tp", "pp_size", "ep", "cp", "train_iters", "learning_rate",
        "max_grad_norm", "sequence_length", "data_path", "save_interval", "load",
        "recompute_granularity", "eval_iters", "log_interval", "gradient_accumulation_steps",
        "moe_aux_loss_coeff", "fp8"}) {
    EXPECT_EQ(MeantKey(alias, "", {}, root), AliasOf(alias)) << alias;
    EXPECT_NE(AliasOf(alias), "") << alias;
  }
}

}  // namespace
}  // namespace baleen
