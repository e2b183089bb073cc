// Model files: the keys of config.json, as strict as run files.
#include <gmock/gmock.h>

#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_replace.h"
#include "configs/schema/run_file.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using ::testing::HasSubstr;

std::string TinyText() {
  std::ifstream file("configs/model/tiny.yaml");
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

TEST(ModelYaml, DeepSeekV31IsWhatTheStructDefaultsTo) {
  ASSERT_OK_AND_ASSIGN(const ModelConfig config, LoadModelYaml("configs/model/deepseek_v31.yaml"));
  ModelConfig expected;
  expected.rope_scaling = YarnConfig{};
  EXPECT_TRUE(config == expected);
  EXPECT_FALSE(config.has_indexer);
}

TEST(ModelYaml, TinyHasAllPartsInSmallAndWholeFp8Blocks) {
  ASSERT_OK_AND_ASSIGN(const ModelConfig c, LoadModelYaml("configs/model/tiny.yaml"));
  EXPECT_GE(c.first_k_dense_replace, 1);
  EXPECT_GE(c.num_moe_layers(), 3);
  EXPECT_EQ(c.num_nextn_predict_layers, 1);
  EXPECT_EQ(c.n_group, 4);
  EXPECT_EQ(c.topk_group, 2);
  ASSERT_TRUE(c.rope_scaling.has_value());
  EXPECT_GT(c.rope_scaling->factor, 1);
  const int64_t quantised[] = {c.hidden_size,
                               c.intermediate_size,
                               c.moe_intermediate_size * c.n_shared_experts,
                               c.moe_intermediate_size,
                               c.q_lora_rank,
                               c.kv_lora_rank,
                               c.latent_dim(),
                               c.num_attention_heads * c.qk_head_dim(),
                               c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim),
                               c.num_attention_heads * c.v_head_dim};
  for (const int64_t side : quantised) EXPECT_EQ(side % 128, 0) << side;
  EXPECT_FALSE(c.has_indexer) << "V3.1: the run file brings the indexer";
}

TEST(ModelYaml, AnIndexKeyMakesItV32) {
  ASSERT_OK_AND_ASSIGN(const ModelConfig config,
                       ParseModelYaml("m.yaml", TinyText() + "index_topk: 64\n"));
  EXPECT_TRUE(config.has_indexer);
  EXPECT_EQ(config.index_topk, 64);
  EXPECT_EQ(config.index_n_heads, ModelConfig().index_n_heads);
}

TEST(ModelYaml, RopeScalingMayBeLeftOut) {
  const std::string text = TinyText();
  const size_t begin = text.find("rope_scaling:");
  const size_t end = text.find("max_position_embeddings", text.find("mscale_all_dim"));
  for (const std::string other : {"", "rope_scaling: null\n"}) {
    ASSERT_OK_AND_ASSIGN(
        const ModelConfig config,
        ParseModelYaml("m.yaml", text.substr(0, begin) + other + text.substr(end)));
    EXPECT_FALSE(config.rope_scaling.has_value());
  }
}

TEST(ModelYaml, FaultsNamePlaceExpectedAndFound) {
  struct Case {
    std::string from, to, part;
  };
  const std::vector<Case> cases = {
      {"hidden_size: 128", "hidden_size: -1",
       "m.yaml:6:14: error: hidden_size: expected an integer from 1 to 2147483647, found '-1'"},
      {"hidden_size: 128", "hiden_size: 128", "did you mean 'hidden_size'?"},
      {"hidden_size: 128\n", "", "missing key 'hidden_size' at the top level"},
      {"hidden_size: 128", "hidden_size: 128\nhidden_size: 256",
       "key 'hidden_size' is repeated; it was given in line 6"},
      {"hidden_size: 128", "hidden_size: 4Gi", "found '4Gi'"},
      {"norm_topk_prob: true", "norm_topk_prob: 1", "expected true or false, found '1'"},
      {"type: yarn", "type: linear", "rope_scaling.type: expected yarn, found 'linear'"},
      {"  factor: 4\n", "  factor: .inf\n", "infinity is not accepted"},
      {"  factor: 4\n", "  faktor: 4\n", "unknown key 'faktor' in rope_scaling"},
      {"rope_scaling:\n", "rope_scaling: yarn\nx:\n", "rope_scaling: expected a section {type, "},
      {"rope_theta: 10000", "rope_theta: 1", "expected a number above 1, found '1'"},
      {"n_group: 4", "n_group: 3", "n_group = 3 does not divide n_routed_experts = 8"},
      {"topk_group: 2", "topk_group: 5", "topk_group = 5 is more than n_group = 4"},
      {"qk_rope_head_dim: 128", "qk_rope_head_dim: 127", "must be even"},
      {"num_nextn_predict_layers: 1", "num_nextn_predict_layers: 2",
       "expected an integer from 0 to 1, found '2'"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.to);
    const std::string text = absl::StrReplaceAll(TinyText(), {{c.from, c.to}});
    ASSERT_NE(text, TinyText()) << "the edit does not apply";
    const auto model = ParseModelYaml("m.yaml", text);
    EXPECT_EQ(model.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(model.status().message()), HasSubstr(c.part));
  }
  EXPECT_THAT(LoadModelYaml("no/such.yaml").status().message(),
              HasSubstr("model file: no/such.yaml"));
}

}  // namespace
}  // namespace baleen
