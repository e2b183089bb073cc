// Reading collects every fault of the file before it returns; writing starts from the source's
// keys, so that what Baleen does not know survives, and then sets everything it does know.
#include "checkpoints/hf_config.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_join.h"
#include "checkpoints/tensor_catalog.h"
#include "kernels/core/file.h"
#include "kernels/core/log.h"

namespace baleen {
namespace {

constexpr int64_t kMaxConfigBytes = 1 << 20;

std::string Shown(const JsonValue& value) {
  constexpr size_t kLongest = 80;
  std::string text = JsonText(value, 0);
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  return EscapeControl(text);
}

// One key of config.json and the member it fills.
struct IntegerKey {
  absl::string_view name;
  int64_t ModelConfig::*member;
};
constexpr IntegerKey kIntegerKeys[] = {
    {"vocab_size", &ModelConfig::vocab_size},
    {"hidden_size", &ModelConfig::hidden_size},
    {"num_hidden_layers", &ModelConfig::num_hidden_layers},
    {"first_k_dense_replace", &ModelConfig::first_k_dense_replace},
    {"intermediate_size", &ModelConfig::intermediate_size},
    {"moe_intermediate_size", &ModelConfig::moe_intermediate_size},
    {"n_routed_experts", &ModelConfig::n_routed_experts},
    {"n_shared_experts", &ModelConfig::n_shared_experts},
    {"num_experts_per_tok", &ModelConfig::num_experts_per_tok},
    {"n_group", &ModelConfig::n_group},
    {"topk_group", &ModelConfig::topk_group},
    {"num_attention_heads", &ModelConfig::num_attention_heads},
    {"q_lora_rank", &ModelConfig::q_lora_rank},
    {"kv_lora_rank", &ModelConfig::kv_lora_rank},
    {"qk_nope_head_dim", &ModelConfig::qk_nope_head_dim},
    {"qk_rope_head_dim", &ModelConfig::qk_rope_head_dim},
    {"v_head_dim", &ModelConfig::v_head_dim},
    {"max_position_embeddings", &ModelConfig::max_position_embeddings},
};
constexpr IntegerKey kIndexKeys[] = {
    {"index_n_heads", &ModelConfig::index_n_heads},
    {"index_head_dim", &ModelConfig::index_head_dim},
    {"index_topk", &ModelConfig::index_topk},
};

// Reads keys of one object and collects every fault, so that a file is reported whole.
class KeyReader {
 public:
  KeyReader(const JsonValue& object, std::string prefix, std::vector<std::string>* errors)
      : object_(object), prefix_(std::move(prefix)), errors_(errors) {}

  const JsonValue* Present(absl::string_view key) const {
    const JsonValue* value = object_.Find(key);
    return value == nullptr || value->is_null() ? nullptr : value;
  }
  void Error(absl::string_view key, absl::string_view found, absl::string_view expected) {
    errors_->push_back(absl::StrCat(prefix_, key, ": found ", found, ", expected ", expected));
  }

  void Integer(absl::string_view key, int64_t* out) {
    const JsonValue* value = object_.Find(key);
    if (value == nullptr) return Error(key, "nothing", "an integer");
    if (value->kind != JsonKind::kInteger) return Error(key, Shown(*value), "an integer");
    *out = value->integer;
  }
  void Number(absl::string_view key, double* out) {
    const JsonValue* value = object_.Find(key);
    if (value == nullptr) return Error(key, "nothing", "a number");
    if (value->kind != JsonKind::kInteger && value->kind != JsonKind::kNumber) {
      return Error(key, Shown(*value), "a number");
    }
    *out = value->number;
  }
  void Bool(absl::string_view key, bool* out) {
    const JsonValue* value = object_.Find(key);
    if (value == nullptr) return Error(key, "nothing", "true or false");
    if (value->kind != JsonKind::kBool) return Error(key, Shown(*value), "true or false");
    *out = value->boolean;
  }
  // The same, but absent and null leave the default.
  void OptionalInteger(absl::string_view key, int64_t* out) {
    if (Present(key) != nullptr) Integer(key, out);
  }
  void OptionalNumber(absl::string_view key, double* out) {
    if (Present(key) != nullptr) Number(key, out);
  }

  // A key that may be absent but has one supported value, given as JSON.
  void Fixed(absl::string_view key, absl::string_view expected) {
    const JsonValue* value = Present(key);
    if (value == nullptr) return;
    const bool number = value->kind == JsonKind::kInteger || value->kind == JsonKind::kNumber;
    double wanted = 0;
    if (number && absl::SimpleAtod(expected, &wanted) && value->number == wanted) return;
    if (JsonText(*value, 0) != expected) Error(key, Shown(*value), expected);
  }

 private:
  const JsonValue& object_;
  std::string prefix_;
  std::vector<std::string>* errors_;
};

void ReadYarn(const JsonValue& rope, const std::string& prefix, ModelConfig* model,
              std::vector<std::string>* errors) {
  KeyReader keys(rope, prefix, errors);
  YarnConfig yarn;
  keys.Number("factor", &yarn.factor);
  keys.Integer("original_max_position_embeddings", &yarn.original_max_position_embeddings);
  keys.Number("beta_fast", &yarn.beta_fast);
  keys.Number("beta_slow", &yarn.beta_slow);
  keys.Number("mscale", &yarn.mscale);
  keys.Number("mscale_all_dim", &yarn.mscale_all_dim);
  keys.Fixed("truncate", "true");
  if (const JsonValue* factor = keys.Present("attention_factor")) {
    keys.Error("attention_factor", Shown(*factor), "none (it follows from mscale)");
  }
  model->rope_scaling = yarn;
}

// rope_scaling + rope_theta (DeepSeek) or rope_parameters with rope_theta inside
// (transformers 5.x).
void ReadRope(const JsonValue& config, ModelConfig* model, std::vector<std::string>* errors) {
  KeyReader keys(config, "", errors);
  const JsonValue* parameters = keys.Present("rope_parameters");
  const JsonValue* scaling = keys.Present("rope_scaling");
  if (parameters != nullptr && scaling != nullptr) {
    return keys.Error("rope_scaling", "both rope_scaling and rope_parameters", "one of them");
  }
  const std::string name = parameters != nullptr ? "rope_parameters" : "rope_scaling";
  const JsonValue* rope = parameters != nullptr ? parameters : scaling;
  if (rope != nullptr && rope->kind != JsonKind::kObject) {
    return keys.Error(name, Shown(*rope), "an object");
  }
  if (parameters == nullptr) {
    keys.Number("rope_theta", &model->rope_theta);
  } else {
    KeyReader(*parameters, name + ".", errors).Number("rope_theta", &model->rope_theta);
    KeyReader outer(config, "", errors);
    double theta = model->rope_theta;
    outer.OptionalNumber("rope_theta", &theta);
    if (theta != model->rope_theta) {
      outer.Error("rope_theta", absl::StrCat(theta),
                  absl::StrCat(model->rope_theta, " as in rope_parameters.rope_theta"));
    }
  }
  if (rope == nullptr) return;
  const JsonValue* type = rope->Find("rope_type");
  if (type == nullptr) type = rope->Find("type");
  const std::string found = type == nullptr ? "nothing" : Shown(*type);
  if (found == "\"yarn\"") {
    ReadYarn(*rope, name + ".", model, errors);
  } else if (found != "\"default\"") {
    keys.Error(name + ".type", found, "\"yarn\" or \"default\"");
  }
}

void ReadQuantization(const JsonValue& config, HfConfig* result, std::vector<std::string>* errors) {
  const JsonValue* quantization = KeyReader(config, "", errors).Present("quantization_config");
  if (quantization == nullptr) return;
  if (quantization->kind != JsonKind::kObject) {
    KeyReader(config, "", errors).Error("quantization_config", Shown(*quantization), "an object");
    return;
  }
  KeyReader keys(*quantization, "quantization_config.", errors);
  if (keys.Present("quant_method") == nullptr) keys.Error("quant_method", "nothing", "\"fp8\"");
  keys.Fixed("quant_method", "\"fp8\"");
  keys.Fixed("fmt", "\"e4m3\"");
  if (keys.Present("weight_block_size") == nullptr) {
    keys.Error("weight_block_size", "nothing", "[128,128]");
  }
  keys.Fixed("weight_block_size", "[128,128]");
  // The reader multiplies by whatever scale the file has; only the name is checked.
  keys.Fixed("scale_fmt", "\"ue8m0\"");
  result->fp8 = true;
}

// What the architecture has only one supported value of.
void CheckFixed(const JsonValue& config, const ModelConfig& model,
                std::vector<std::string>* errors) {
  KeyReader keys(config, "", errors);
  keys.Fixed("attention_bias", "false");
  keys.Fixed("mlp_bias", "false");
  keys.Fixed("attention_dropout", "0");
  keys.Fixed("hidden_act", "\"silu\"");
  keys.Fixed("scoring_func", "\"sigmoid\"");
  keys.Fixed("topk_method", "\"noaux_tc\"");
  keys.Fixed("tie_word_embeddings", "false");
  keys.Fixed("moe_layer_freq", "1");
  keys.Fixed("rope_interleave", "true");
  keys.Fixed("num_key_value_heads", absl::StrCat(model.num_attention_heads));
  keys.Fixed("qk_head_dim", absl::StrCat(model.qk_head_dim()));
  const JsonValue* types = keys.Present("mlp_layer_types");
  if (types == nullptr) return;
  std::string expected;
  // The list is as long as the file says; never longer than num_hidden_layers claims.
  for (size_t layer = 0; layer < types->items.size(); ++layer) {
    const bool moe = model.IsMoeLayer(static_cast<int64_t>(layer));
    absl::StrAppend(&expected, layer > 0 ? "," : "", moe ? "\"sparse\"" : "\"dense\"");
  }
  if (JsonText(*types, 0) != absl::StrCat("[", expected, "]") ||
      static_cast<int64_t>(types->items.size()) != model.num_hidden_layers) {
    keys.Error("mlp_layer_types", Shown(*types),
               absl::StrCat("\"dense\" ", model.first_k_dense_replace, " times, then \"sparse\", ",
                            model.num_hidden_layers, " in all"));
  }
}

void ReadIndexer(const JsonValue& config, absl::string_view model_type, ModelConfig* model,
                 std::vector<std::string>* errors) {
  KeyReader keys(config, "", errors);
  model->has_indexer = model_type == "deepseek_v32";
  for (const IntegerKey& key : kIndexKeys) {
    if (model->has_indexer) {
      keys.Integer(key.name, &(model->*key.member));
    } else if (const JsonValue* value = keys.Present(key.name)) {
      keys.Error(key.name, Shown(*value), "no such key with model_type deepseek_v3");
    }
  }
}

void ReadModelKeys(const JsonValue& config, ModelConfig* model, std::vector<std::string>* errors) {
  KeyReader keys(config, "", errors);
  for (const IntegerKey& key : kIntegerKeys) keys.Integer(key.name, &(model->*key.member));
  // transformers leaves the key out where the model has no MTP layer.
  model->num_nextn_predict_layers = 0;
  keys.OptionalInteger("num_nextn_predict_layers", &model->num_nextn_predict_layers);
  keys.Number("routed_scaling_factor", &model->routed_scaling_factor);
  keys.Bool("norm_topk_prob", &model->norm_topk_prob);
  keys.Number("rms_norm_eps", &model->rms_norm_eps);
  keys.OptionalNumber("initializer_range", &model->initializer_range);
  keys.OptionalInteger("bos_token_id", &model->bos_token_id);
  keys.OptionalInteger("eos_token_id", &model->eos_token_id);
  ReadRope(config, model, errors);
}

JsonValue RopeScaling(const YarnConfig& yarn) {
  JsonValue rope = JsonValue::Object();
  rope.Set("beta_fast", JsonValue::Number(yarn.beta_fast));
  rope.Set("beta_slow", JsonValue::Number(yarn.beta_slow));
  rope.Set("factor", JsonValue::Number(yarn.factor));
  rope.Set("mscale", JsonValue::Number(yarn.mscale));
  rope.Set("mscale_all_dim", JsonValue::Number(yarn.mscale_all_dim));
  rope.Set("original_max_position_embeddings",
           JsonValue::Integer(yarn.original_max_position_embeddings));
  rope.Set("type", JsonValue::String("yarn"));
  return rope;
}

JsonValue QuantizationConfig() {
  JsonValue quantization = JsonValue::Object();
  quantization.Set("activation_scheme", JsonValue::String("dynamic"));
  quantization.Set("fmt", JsonValue::String("e4m3"));
  quantization.Set("quant_method", JsonValue::String("fp8"));
  quantization.Set("scale_fmt", JsonValue::String("ue8m0"));
  quantization.Set("weight_block_size",
                   JsonValue::Array({JsonValue::Integer(128), JsonValue::Integer(128)}));
  return quantization;
}

// A number keeps the source's spelling where its value is the same ("1e-06" against "1e-6").
void SetNumber(JsonValue* config, absl::string_view key, double value) {
  const JsonValue* old = config->Find(key);
  const bool number =
      old != nullptr && (old->kind == JsonKind::kInteger || old->kind == JsonKind::kNumber);
  if (number && old->number == value) return;
  config->Set(key, JsonValue::Number(value));
}

// What DeepSeek's files say besides sizes; a key the source has stays as it is.
void SetConstants(JsonValue* config) {
  const std::pair<absl::string_view, JsonValue> constants[] = {
      {"attention_bias", JsonValue::Bool(false)},
      {"attention_dropout", JsonValue::Number(0)},
      {"ep_size", JsonValue::Integer(1)},
      {"hidden_act", JsonValue::String("silu")},
      {"moe_layer_freq", JsonValue::Integer(1)},
      {"scoring_func", JsonValue::String("sigmoid")},
      {"tie_word_embeddings", JsonValue::Bool(false)},
      {"topk_method", JsonValue::String("noaux_tc")},
      {"transformers_version", JsonValue::String("4.44.2")},
      {"use_cache", JsonValue::Bool(true)},
  };
  for (const auto& [key, value] : constants) {
    if (config->Find(key) == nullptr) config->Set(key, value);
  }
}

}  // namespace

absl::StatusOr<HfConfig> ParseHfConfig(absl::string_view text, absl::string_view where) {
  HfConfig result;
  ASSIGN_OR_RETURN(result.source, ParseJson(text, where, {.bytes = kMaxConfigBytes}));
  const JsonValue& config = result.source;
  if (config.kind != JsonKind::kObject) {
    return DataError(where, ": expected an object, found ", JsonKindName(config.kind));
  }
  const JsonValue* type = config.Find("model_type");
  const std::string model_type = type == nullptr ? "nothing" : type->text;
  if (model_type != "deepseek_v3" && model_type != "deepseek_v32") {
    return DataError(where, ": model_type: found ", type == nullptr ? model_type : Shown(*type),
                     ", expected \"deepseek_v3\" or \"deepseek_v32\"");
  }
  std::vector<std::string> errors;
  ReadModelKeys(config, &result.model, &errors);
  ReadIndexer(config, model_type, &result.model, &errors);
  ReadQuantization(config, &result, &errors);
  CheckFixed(config, result.model, &errors);
  if (!errors.empty()) {
    return DataError(where, ": ", errors.size(), " error(s):\n  ", absl::StrJoin(errors, "\n  "));
  }
  // A file, not the user, is at fault: exit 4.
  for (const absl::Status& status :
       {result.model.Validate(where), CheckModelSize(result.model, where)}) {
    if (!status.ok()) return DataError(status.message());
  }
  return result;
}

absl::StatusOr<HfConfig> ReadHfConfig(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxConfigBytes));
  return ParseHfConfig(text, path);
}

std::string HfConfigText(const HfConfigRequest& request) {
  const ModelConfig& model = request.model;
  const bool v32 = request.architecture == HfArchitecture::kV32;
  JsonValue config = request.source != nullptr ? *request.source : JsonValue::Object();
  JsonValue quantization = QuantizationConfig();
  if (const JsonValue* old = config.Find("quantization_config");
      old != nullptr && !old->is_null()) {
    quantization = *old;
  }
  // Spellings of transformers 5.x are replaced by DeepSeek's; remote code does not fit the new
  // architecture.
  for (const absl::string_view key :
       {"auto_map", "rope_parameters", "layer_types", "mlp_layer_types", "dtype",
        "quantization_config", "index_n_heads", "index_head_dim", "index_topk"}) {
    config.Remove(key);
  }
  config.Set("architectures", JsonValue::Array({JsonValue::String(v32 ? "DeepseekV32ForCausalLM"
                                                                      : "DeepseekV3ForCausalLM")}));
  config.Set("model_type", JsonValue::String(v32 ? "deepseek_v32" : "deepseek_v3"));
  for (const IntegerKey& key : kIntegerKeys) {
    config.Set(key.name, JsonValue::Integer(model.*key.member));
  }
  if (v32) {
    for (const IntegerKey& key : kIndexKeys) {
      config.Set(key.name, JsonValue::Integer(model.*key.member));
    }
  }
  config.Set("num_key_value_heads", JsonValue::Integer(model.num_attention_heads));
  config.Set("num_nextn_predict_layers", JsonValue::Integer(model.num_nextn_predict_layers));
  for (const auto& [key, value] : {std::make_pair("bos_token_id", model.bos_token_id),
                                   std::make_pair("eos_token_id", model.eos_token_id)}) {
    const JsonValue* old = config.Find(key);
    if (old == nullptr || !old->is_null()) config.Set(key, JsonValue::Integer(value));
  }
  SetNumber(&config, "initializer_range", model.initializer_range);
  SetNumber(&config, "rms_norm_eps", model.rms_norm_eps);
  SetNumber(&config, "rope_theta", model.rope_theta);
  SetNumber(&config, "routed_scaling_factor", model.routed_scaling_factor);
  config.Set("norm_topk_prob", JsonValue::Bool(model.norm_topk_prob));
  config.Set("rope_scaling", model.rope_scaling ? RopeScaling(*model.rope_scaling) : JsonValue());
  if (request.fp8) config.Set("quantization_config", std::move(quantization));
  config.Set("torch_dtype", JsonValue::String("bfloat16"));
  SetConstants(&config);
  std::sort(config.members.begin(), config.members.end(),
            [](const JsonValue::Member& a, const JsonValue::Member& b) { return a.key < b.key; });
  return JsonText(config) + "\n";
}

}  // namespace baleen
