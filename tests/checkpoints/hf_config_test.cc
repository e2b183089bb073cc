#include "checkpoints/hf_config.h"

#include "tests/checkpoints/hf_support.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;
using testing::IsOk;
using testing::Replaced;
using testing::TinyModel;

constexpr absl::StatusCode kBad = absl::StatusCode::kDataLoss;

// The published V3.2 file, key by key.
constexpr char kOfficial[] = R"({
  "architectures": ["DeepseekV32ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
  "hidden_act": "silu", "hidden_size": 7168, "index_head_dim": 128, "index_n_heads": 64,
  "index_topk": 2048, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
  "max_position_embeddings": 163840, "model_type": "deepseek_v32", "moe_intermediate_size": 2048,
  "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
  "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8,
  "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
  "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
  "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
  "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc",
  "torch_dtype": "bfloat16", "transformers_version": "4.44.2", "use_cache": true,
  "v_head_dim": 128, "vocab_size": 129280})";

ModelConfig OfficialModel() {
  ModelConfig model;  // the defaults are V3's sizes
  model.rope_scaling = YarnConfig{};
  model.has_indexer = true;
  return model;
}

TEST(HfConfig, ReadsThePublishedFile) {
  ASSERT_OK_AND_ASSIGN(const HfConfig config, ParseHfConfig(kOfficial, "config.json"));
  EXPECT_EQ(config.model, OfficialModel());
  EXPECT_TRUE(config.fp8);
}

TEST(HfConfig, WritesEveryKeyOfThePublishedFileWithItsValue) {
  const std::string text = HfConfigText({.model = OfficialModel(), .fp8 = true});
  ASSERT_OK_AND_ASSIGN(const JsonValue ours, ParseJson(text, "ours", {.bytes = 1 << 20}));
  ASSERT_OK_AND_ASSIGN(const JsonValue theirs, ParseJson(kOfficial, "theirs", {.bytes = 1 << 20}));
  EXPECT_EQ(ours.members.size(), theirs.members.size());
  for (const auto& [key, value] : theirs.members) {
    const JsonValue* found = ours.Find(key);
    ASSERT_NE(found, nullptr) << key;
    if (value.kind == JsonKind::kInteger || value.kind == JsonKind::kNumber) {
      EXPECT_EQ(found->number, value.number) << key;
    } else if (key == "rope_scaling") {
      EXPECT_EQ(found->members.size(), value.members.size());
      for (const auto& [inner, number] : value.members) {
        ASSERT_NE(found->Find(inner), nullptr) << inner;
        EXPECT_EQ(found->Find(inner)->number, number.number) << inner;
      }
    } else {
      EXPECT_EQ(JsonText(*found, 0), JsonText(value, 0)) << key;
    }
  }
}

TEST(HfConfig, WhatIsWrittenReadsBackAsTheSameModel) {
  for (const HfArchitecture architecture : {HfArchitecture::kV31, HfArchitecture::kV32}) {
    ModelConfig model = TinyModel();
    model.has_indexer = architecture == HfArchitecture::kV32;
    if (!model.has_indexer) {  // not in the file: the reader leaves the defaults
      model.index_n_heads = ModelConfig().index_n_heads;
      model.index_head_dim = ModelConfig().index_head_dim;
      model.index_topk = ModelConfig().index_topk;
    }
    const std::string text = HfConfigText({.model = model, .architecture = architecture});
    ASSERT_OK_AND_ASSIGN(const HfConfig config, ParseHfConfig(text, "config.json"));
    EXPECT_EQ(config.model, model) << text;
    EXPECT_FALSE(config.fp8);
  }
}

TEST(HfConfig, ReadsTheRopeKeysOfTransformersFive) {
  std::string text = Replaced(kOfficial, "\"rope_theta\": 10000,", "");
  text = Replaced(text, "\"rope_scaling\": {", "\"rope_parameters\": {\"rope_theta\": 5e4, ");
  text = Replaced(text, "\"type\": \"yarn\"", "\"rope_type\": \"yarn\"");
  ASSERT_OK_AND_ASSIGN(const HfConfig yarn, ParseHfConfig(text, "c"));
  ModelConfig expected = OfficialModel();
  expected.rope_theta = 5e4;
  EXPECT_EQ(yarn.model, expected);
  text = Replaced(text, "\"rope_type\": \"yarn\"", "\"rope_type\": \"default\"");
  ASSERT_OK_AND_ASSIGN(const HfConfig plain, ParseHfConfig(text, "c"));
  expected.rope_scaling.reset();
  EXPECT_EQ(plain.model, expected);
  // Written back, both are in DeepSeek's spelling.
  const std::string written = HfConfigText({.model = yarn.model, .source = &yarn.source});
  EXPECT_EQ(written.find("rope_parameters"), std::string::npos);
  EXPECT_NE(written.find("\"rope_theta\": 50000.0"), std::string::npos) << written;
}

TEST(HfConfig, CarriesUnknownKeysAndDropsRemoteCode) {
  const std::string text = Replaced(kOfficial, "\"ep_size\": 1,",
                                    R"("ep_size": 1, "auto_map": {"AutoConfig": "x.py"},)"
                                    R"( "aux_loss_alpha": 1e-3, "note": {"a": [null]},)");
  ASSERT_OK_AND_ASSIGN(const HfConfig config, ParseHfConfig(text, "c"));
  const std::string written =
      HfConfigText({.model = config.model, .fp8 = true, .source = &config.source});
  ASSERT_OK_AND_ASSIGN(const HfConfig again, ParseHfConfig(written, "c"));
  EXPECT_EQ(again.source.Find("auto_map"), nullptr);
  EXPECT_EQ(JsonText(*again.source.Find("aux_loss_alpha"), 0), "1e-3");
  EXPECT_EQ(JsonText(*again.source.Find("note"), 0), "{\"a\":[null]}");
  EXPECT_EQ(JsonText(*again.source.Find("rms_norm_eps"), 0), "1e-06");
  const std::string bf16 = HfConfigText({.model = config.model, .source = &config.source});
  EXPECT_EQ(bf16.find("quantization_config"), std::string::npos);
}

TEST(HfConfig, MtpAbsentMeansNone) {
  ASSERT_OK_AND_ASSIGN(
      const HfConfig config,
      ParseHfConfig(Replaced(kOfficial, "\"num_nextn_predict_layers\": 1,", ""), "c"));
  EXPECT_EQ(config.model.num_nextn_predict_layers, 0);
}

// Every line changes one thing and must be told by name, with found and expected.
TEST(HfConfig, RefusesWhatIsNotImplementedOrNotRight) {
  struct Case {
    absl::string_view from, to;
    const char* part;
  };
  const Case cases[] = {
      {"\"attention_bias\": false", "\"attention_bias\": true",
       "attention_bias: found true, expected false"},
      {"\"silu\"", "\"gelu\"", "hidden_act: found \"gelu\", expected \"silu\""},
      {"\"sigmoid\"", "\"softmax\"", "scoring_func: found \"softmax\""},
      {"\"noaux_tc\"", "\"greedy\"", "topk_method: found \"greedy\""},
      {"\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true", "tie_word_embeddings"},
      {"\"moe_layer_freq\": 1", "\"moe_layer_freq\": 2", "moe_layer_freq: found 2, expected 1"},
      {"\"num_key_value_heads\": 128", "\"num_key_value_heads\": 8",
       "num_key_value_heads: found 8, expected 128"},
      {"\"attention_dropout\": 0.0", "\"attention_dropout\": 0.1",
       "attention_dropout: found 0.1, expected 0"},
      {"\"use_cache\": true", "\"rope_interleave\": false", "rope_interleave"},
      {"\"use_cache\": true", "\"mlp_layer_types\": [\"sparse\"]", "mlp_layer_types"},
      {"\"deepseek_v32\"", "\"deepseek_v2\"", "model_type: found \"deepseek_v2\""},
      {"\"model_type\": \"deepseek_v32\",", "", "model_type: found nothing"},
      {"\"deepseek_v32\"", "\"deepseek_v3\"", "index_n_heads: found 64, expected no such key"},
      {"\"index_topk\": 2048,", "", "index_topk: found nothing"},
      {"\"hidden_size\": 7168,", "", "hidden_size: found nothing, expected an integer"},
      {"\"hidden_size\": 7168", "\"hidden_size\": \"7168\"", "hidden_size: found \"7168\""},
      {"\"hidden_size\": 7168", "\"hidden_size\": 7168.0", "hidden_size: found 7168.0"},
      {"\"hidden_size\": 7168", "\"hidden_size\": null", "hidden_size: found null"},
      {"\"hidden_size\": 7168", "\"hidden_size\": 0", "hidden_size = 0"},
      {"\"hidden_size\": 7168", "\"hidden_size\": -7168", "hidden_size = -7168"},
      {"\"n_group\": 8", "\"n_group\": 7", "n_group = 7 does not divide"},
      {"\"norm_topk_prob\": true", "\"norm_topk_prob\": 1",
       "norm_topk_prob: found 1, expected true or false"},
      {"\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": \"1e-06\"", "rms_norm_eps: found \"1e-06\""},
      {"\"rope_theta\": 10000,", "", "rope_theta: found nothing"},
      {"\"type\": \"yarn\"", "\"type\": \"linear\"", "rope_scaling.type: found \"linear\""},
      {"\"type\": \"yarn\"", "\"typ\": \"yarn\"", "rope_scaling.type: found nothing"},
      {"\"factor\": 40, ", "", "rope_scaling.factor: found nothing"},
      {"\"mscale_all_dim\": 1.0,", "", "rope_scaling.mscale_all_dim: found nothing"},
      {"\"factor\": 40", "\"attention_factor\": 2, \"factor\": 40",
       "rope_scaling.attention_factor"},
      {"\"rope_theta\": 10000",
       "\"rope_theta\": 10000, \"rope_parameters\": {\"rope_type\": \"default\"}",
       "both rope_scaling and rope_parameters"},
      {"\"quant_method\": \"fp8\"", "\"quant_method\": \"awq\"",
       "quantization_config.quant_method: found \"awq\""},
      {"\"quant_method\": \"fp8\",", "", "quantization_config.quant_method: found nothing"},
      {"\"e4m3\"", "\"e5m2\"", "quantization_config.fmt: found \"e5m2\""},
      {"[128, 128]", "[64, 128]", "quantization_config.weight_block_size: found [64,128]"},
      {"\"ue8m0\"", "\"int8\"", "quantization_config.scale_fmt"},
      {"\"eos_token_id\": 1", "\"eos_token_id\": [1, 2]", "eos_token_id: found [1,2]"},
      {"\"num_nextn_predict_layers\": 1", "\"num_nextn_predict_layers\": 2", "expected 0 or 1"},
      {"\"num_hidden_layers\": 61", "\"num_hidden_layers\": 2000000000", "tensors, the limit is"},
      {"\"vocab_size\": 129280", "\"vocab_size\": 2147483647000", "vocab_size = 2147483647000"},
  };
  for (const Case& c : cases) {
    const auto result = ParseHfConfig(Replaced(kOfficial, c.from, c.to), "dir/config.json");
    EXPECT_THAT(result, HasStatus(kBad, c.part)) << c.to;
    EXPECT_THAT(result, HasStatus(kBad, "dir/config.json")) << c.to;
  }
  EXPECT_THAT(ParseHfConfig("[]", "c"), HasStatus(kBad, "expected an object, found a list"));
}

TEST(HfConfig, ReportsAllFaultsAtOnce) {
  std::string text = Replaced(kOfficial, "\"silu\"", "\"gelu\"");
  text = Replaced(text, "\"sigmoid\"", "\"softmax\"");
  text = Replaced(text, "\"hidden_size\": 7168,", "");
  const auto result = ParseHfConfig(text, "c");
  EXPECT_THAT(result, HasStatus(kBad, "3 error(s)"));
  EXPECT_THAT(result, HasStatus(kBad, "hidden_act"));
  EXPECT_THAT(result, HasStatus(kBad, "scoring_func"));
  EXPECT_THAT(result, HasStatus(kBad, "hidden_size"));
}

TEST(HfConfig, AQuantizationWithoutScaleFormatIsKeptAsItIs) {
  const std::string text = Replaced(kOfficial, "\"scale_fmt\": \"ue8m0\",", "");
  ASSERT_OK_AND_ASSIGN(const HfConfig config, ParseHfConfig(text, "c"));
  EXPECT_TRUE(config.fp8);
  const std::string written =
      HfConfigText({.model = config.model, .fp8 = true, .source = &config.source});
  EXPECT_EQ(written.find("scale_fmt"), std::string::npos);
}

}  // namespace
}  // namespace baleen
