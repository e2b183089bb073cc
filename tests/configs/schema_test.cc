// What derives from the fields: JSON Schema, reference page, completeness of what fields say.
#include <gmock/gmock.h>

#include <filesystem>
#include <functional>
#include <set>
#include <string>

#include "configs/schema/model_fields.h"
#include "configs/schema/read_fields.h"
#include "configs/schema/run_fields.h"
#include "configs/schema/scalar.h"
#include "kernels/core/file.h"
#include "tests/configs/json_schema.h"
#include "tests/configs/run_texts.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::Edited;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::JsonSchema;
using testing::kGoodRun;
using ::testing::Not;
using Json = nlohmann::json;

// YAML as an editor sees it: plain words that are numbers or booleans are that.
Json ToJson(const YamlNode& node) {
  Json json;
  if (node.kind == YamlNode::Kind::kList) {
    json = Json::array();
    for (const YamlNode& item : node.items) json.push_back(ToJson(item));
  } else if (node.kind == YamlNode::Kind::kMap) {
    json = Json::object();
    for (const YamlEntry& entry : node.entries) json[entry.key] = ToJson(entry.value);
  } else if (node.kind == YamlNode::Kind::kScalar) {
    json = node.scalar;
    bool flag = false;
    double number = 0;
    if (node.quoted) return json;
    if (ParseBool(node.scalar, flag).empty()) return flag;
    if (!ParseNumber(node.scalar, number).empty()) return json;
    return number == std::floor(number) && std::abs(number) < 1e15
               ? Json(static_cast<int64_t>(number))
               : Json(number);
  }
  return json;
}

std::string SchemaFault(const std::string& text) {
  Problems problems;
  YamlNode root;
  if (!ParseYaml("run.yaml", text, root, problems) || !problems.empty()) return "no YAML";
  return JsonSchema(Json::parse(RunConfigJsonSchema())).Check(ToJson(root));
}

// Calls `visit` with each field and its path.
void ForEach(const std::vector<Field>& fields, const std::string& path,
             const std::function<void(const Field&, const std::string&)>& visit) {
  for (const Field& field : fields) {
    const std::string here = JoinKey(path, field.key);
    visit(field, here);
    ForEach(field.children, here, visit);
  }
}

TEST(JsonSchemaOfRuns, AcceptsEveryRunFileAndWhatIsPrinted) {
  EXPECT_EQ(SchemaFault(kGoodRun), "");
  for (const auto& entry : std::filesystem::directory_iterator("configs/run")) {
    if (entry.path().extension() != ".yaml") continue;
    SCOPED_TRACE(entry.path().string());
    ASSERT_OK_AND_ASSIGN(const std::string text, ReadFile(entry.path().string(), kMostYamlBytes));
    EXPECT_EQ(SchemaFault(text), "");
    ASSERT_OK_AND_ASSIGN(const LoadedRun loaded, LoadRunConfig(entry.path().string()));
    EXPECT_EQ(SchemaFault(PrintRunConfig(loaded)), "");
  }
}

TEST(JsonSchemaOfRuns, RefusesWhatTheReaderRefuses) {
  const std::vector<std::pair<std::string, std::string>> edits = {
      {"tensor: 2", "tensor: two"},
      {"tensor: 2", "tensor: 0"},
      {"{tensor: 2}", "{tensro: 2}"},
      {"    steps: 10\n", ""},
      {"attention: dense", "attention: x"},
      {"{checkpoint: ckpt}", "{}"},
      {"[{path: data/a}]", "[]"},
      {"lr: 1e-3", "lr: 0"},
      {"weight_decay: 0.2", "betas: [0.9, 1]"},
      {"name: test", "name: ../a"},
      {"weight_decay: 0.2", "betas: [0.9]"},
      {"", "deterministic: 1\n"},
      {"{checkpoint: ckpt}", "{checkpoint: a, config: b}"}};
  for (const auto& [from, to] : edits) {
    SCOPED_TRACE(to);
    EXPECT_THAT(SchemaFault(Edited(from, to)), Not(IsEmpty()));
    EXPECT_THAT(testing::RunError(Edited(from, to)), Not(IsEmpty()));
  }
}

TEST(JsonSchemaOfRuns, AllowsSuffixesAndStageOverrides) {
  EXPECT_EQ(SchemaFault(Edited("seq_length: 64", "seq_length: 128Ki")), "");
  EXPECT_EQ(SchemaFault(Edited("    steps: 10", "    steps: 10\n    parallelism: {expert: 4}")),
            "");
  EXPECT_THAT(SchemaFault(Edited("    steps: 10", "    steps: 10\n    parallelism: {expert: x}")),
              HasSubstr("$.stages[0].parallelism.expert"));
}

TEST(Fields, EveryOneSaysWhatItIsAndDefaultsAreInRange) {
  RunConfig run;
  ModelConfig model;
  for (auto fields : {RunFields(run), ModelFields(model)}) {
    ForEach(fields, "", [](const Field& field, const std::string& path) {
      EXPECT_THAT(field.doc, Not(IsEmpty())) << path;
      EXPECT_EQ(field.doc.back(), '.') << path;
    });
    SetDefaults(fields);  // a default that does not read, or lies out of range, ends the process
  }
}

TEST(Fields, SchemaAndReferenceMentionEveryKey) {
  RunConfig run;
  const Json schema = Json::parse(RunConfigJsonSchema());
  EXPECT_EQ(schema.at("$schema"), "https://json-schema.org/draft/2020-12/schema");
  std::set<std::string> in_schema;
  const std::function<void(const Json&)> collect = [&](const Json& node) {
    if (node.is_object() && node.contains("properties")) {
      for (const auto& [key, child] : node.at("properties").items()) in_schema.insert(key);
    }
    for (const Json& child : node) {
      if (child.is_structured()) collect(child);
    }
  };
  collect(schema);
  const std::string reference = RunConfigReference();
  int leaves = 0;
  ForEach(RunFields(run), "", [&](const Field& field, const std::string& path) {
    EXPECT_EQ(in_schema.count(field.key), 1u) << path;
    // A substring matcher would print the page a hundred times.
    if (field.is_leaf()) {
      ++leaves;
      EXPECT_NE(reference.find("| `" + field.key + "` |"), std::string::npos) << path;
    } else if (path.rfind("stages.", 0) != 0) {
      const std::string list = field.type == Field::Type::kSectionList ? "[]" : "";
      EXPECT_NE(reference.find("\n### " + path + list + "\n"), std::string::npos) << path;
    }
  });
  EXPECT_GT(leaves, 50);
}

TEST(Fields, ReferencePageOfTheRepositoryIsCurrent) {
  ASSERT_OK_AND_ASSIGN(const std::string page, ReadFile("configs/reference.md", kMostYamlBytes));
  if (page != RunConfigReference()) {
    const std::string path = ::testing::TempDir() + "reference.md";
    ASSERT_TRUE(WriteFileDurably(path, RunConfigReference()).ok());
    FAIL() << "the fields have changed: cp " << path << " configs/reference.md";
  }
}

TEST(Fields, StagesTakeEverySectionOfTheTopLevelButRunAndModel) {
  RunConfig run;
  std::set<std::string> top, stage;
  for (const Field& field : RunFields(run)) {
    if (field.key != "stages") {
      top.insert(field.key);
    } else {
      for (const Field& child : field.children) stage.insert(child.key);
    }
  }
  top.erase("run");
  top.erase("model");
  for (const char* own : {"name", "attention", "train", "steps", "global_batch_size"}) {
    EXPECT_EQ(stage.erase(own), 1u) << own;
  }
  EXPECT_EQ(top, stage);
}

TEST(Fields, AnOverrideOfEachKeyReachesTheStage) {
  // Every key that both levels have: what the top level says is what the stage holds.
  auto loaded = ParseRunConfig("run.yaml", kGoodRun);
  ASSERT_TRUE(loaded.ok());
  std::vector<Field> top = RunFields(loaded->config);
  std::vector<Field> stage = StageFields(loaded->config.stages[1]);
  std::map<std::string, std::string> top_values;
  ForEach(top, "", [&](const Field& f, const std::string& path) {
    if (f.is_leaf() && path.rfind("stages", 0) != 0 && path.rfind("data.", 0) != 0)
      top_values[path] = f.Text();
  });
  int compared = 0;
  ForEach(stage, "", [&](const Field& f, const std::string& path) {
    const auto at = top_values.find(path);
    if (!f.is_leaf() || at == top_values.end() || path == "optimizer.lr") return;
    EXPECT_EQ(f.Text(), at->second) << path;
    ++compared;
  });
  EXPECT_GT(compared, 35);
}

TEST(Names, AreTheWordsOfTheFile) {
  EXPECT_EQ(Name(DeviceChoice::kCuda), "cuda");
  EXPECT_EQ(Name(AttentionMode::kSparse), "sparse");
  EXPECT_EQ(Name(TrainMode::kAll), "all");
  EXPECT_EQ(Name(Compute::kBf16), "bf16");
  EXPECT_EQ(Name(GemmPrecision::kFp8Block), "fp8_block");
  EXPECT_EQ(Name(Recompute::kFull), "full");
  EXPECT_EQ(Name(ScheduleName::kDualPipeV), "dualpipev");
  EXPECT_EQ(Name(LrStyle::kCosine), "cosine");
  EXPECT_EQ(Name(MomentsDType::kBf16), "bf16");
  EXPECT_EQ(Name(IndexerDType::kFp8), "fp8");
  EXPECT_EQ(Name(AttentionKernel::kMaskedDense), "masked_dense");
  EXPECT_EQ(Name(CheckpointSignal::kTerm), "TERM");
}

}  // namespace
}  // namespace baleen
