#include "trainer/stage_layout.h"

#include <algorithm>
#include <cmath>

#include "parallel/expert_exchange.h"
#include "trainer/flops.h"

namespace baleen {
namespace {

// Rows at a rank's experts at once, whatever the run file allows: 3.8 GB of bf16 rows 7168 wide. A
// long sequence is met by rounds, as attention meets it by chunks. Rounds keep nothing for the
// backward, which a full recompute would not have kept either: then smaller ones cost no more.
int64_t MostExpertRows(Recompute recompute) {
  return int64_t{1} << (recompute == Recompute::kFull ? 17 : 18);
}

SchedulePolicy PolicyOf(ScheduleName name) {
  switch (name) {
    case ScheduleName::kGpipe:
      return SchedulePolicy::kGpipe;
    case ScheduleName::k1F1B:
      return SchedulePolicy::k1F1B;
    case ScheduleName::kInterleaved:
      return SchedulePolicy::kInterleaved;
    case ScheduleName::kZbH1:
      return SchedulePolicy::kZbH1;
    case ScheduleName::kZbv:
      return SchedulePolicy::kZbv;
    case ScheduleName::kDualPipeV:
      return SchedulePolicy::kDualPipeV;
  }
  return SchedulePolicy::k1F1B;
}

// Divisors of `number` nearest to `wanted`, the smaller first.
std::string NearestDivisors(int64_t number, int64_t wanted) {
  int64_t below = std::min(wanted, number), above = wanted;
  while (below > 1 && number % below != 0) --below;
  while (above < number && number % above != 0) ++above;
  return above <= number && number % above == 0 && above != below
             ? absl::StrCat(below, " or ", above)
             : absl::StrCat(below);
}

absl::Status CheckDivides(const std::string& where, absl::string_view key, int64_t ranks,
                          absl::string_view what, int64_t number) {
  if (number % ranks == 0) return absl::OkStatus();
  return ConfigError(where, "parallelism.", key, " = ", ranks, " does not divide the model's ",
                     what, " = ", number, "; nearest that fit: ", NearestDivisors(number, ranks));
}

absl::Status CheckShards(const std::string& where, const ModelConfig& model,
                         const ProcessGrid& grid) {
  const int64_t tp = grid.tp_size(), ep = grid.ep_size();
  RETURN_IF_ERROR(
      CheckDivides(where, "tensor", tp, "num_attention_heads", model.num_attention_heads));
  RETURN_IF_ERROR(CheckDivides(where, "tensor", tp, "vocab_size", model.vocab_size));
  if (model.first_k_dense_replace > 0) {
    RETURN_IF_ERROR(
        CheckDivides(where, "tensor", tp, "intermediate_size", model.intermediate_size));
  }
  if (model.n_shared_experts > 0) {
    RETURN_IF_ERROR(CheckDivides(where, "tensor", tp, "n_shared_experts x moe_intermediate_size",
                                 model.n_shared_experts * model.moe_intermediate_size));
  }
  return CheckDivides(where, "expert", ep, "n_routed_experts", model.n_routed_experts);
}

absl::Status CheckRows(const std::string& where, const StageConfig& stage,
                       const ProcessGrid& grid) {
  const int64_t ranks = int64_t{grid.cp_size()} * grid.tp_size();
  if (ranks > 1 && stage.data.seq_length % (2 * ranks) != 0) {
    return ConfigError(where, "data.seq_length = ", stage.data.seq_length,
                       " does not divide into 2 x tensor x context = ", 2 * ranks,
                       " chunks (each rank of context x tensor holds two of a sequence); the next "
                       "that fits is ",
                       (stage.data.seq_length / (2 * ranks) + 1) * 2 * ranks);
  }
  const int64_t samples = stage.micro_batch_size * grid.dp_size();
  if (stage.global_batch_size % samples != 0) {
    return ConfigError(where, "global_batch_size = ", stage.global_batch_size,
                       " is no multiple of micro_batch_size ", stage.micro_batch_size, " x data ",
                       grid.dp_size(), " = ", samples, "; the next that fits is ",
                       (stage.global_batch_size / samples + 1) * samples);
  }
  // Every rank makes the lists of all ranks and checks them, an entry for each microbatch and more.
  constexpr int64_t kMostMicrobatches = 1 << 16;
  if (stage.global_batch_size / samples > kMostMicrobatches) {
    return ConfigError(where, "global_batch_size = ", stage.global_batch_size,
                       " over micro_batch_size ", stage.micro_batch_size, " x data ",
                       grid.dp_size(), " makes ", stage.global_batch_size / samples,
                       " microbatches of a step, expected at most ", kMostMicrobatches,
                       "; a larger micro_batch_size or more ranks make fewer");
  }
  return absl::OkStatus();
}

void SetExpertRows(const StageConfig& stage, const ModelConfig& model, StageLayout& layout) {
  const ParallelismConfig& asked = stage.parallelism;
  const int64_t ep = layout.grid.ep_size();
  // Nodes as large as ep or larger hold a whole exchange: one hop.
  const int64_t node = asked.expert_node_size.value_or(1);
  if (node > 1 && node < ep) layout.expert_node_size = static_cast<int>(node);
  if (asked.expert_buffer == 0) return;
  const auto balanced = static_cast<double>(layout.rows_per_rank * model.num_experts_per_tok);
  const int64_t least = MinimumExpertRows(ep, model.n_routed_experts / ep,
                                          model.num_experts_per_tok, layout.expert_node_size);
  const auto wanted = static_cast<int64_t>(std::ceil(balanced * asked.expert_buffer));
  layout.expert_rows = std::max(least, std::min(wanted, MostExpertRows(stage.recompute)));
}

absl::Status SetParts(const StageConfig& stage, const ModelConfig& model, const Recipe& recipe,
                      StageLayout& layout) {
  const ParallelismConfig& asked = stage.parallelism;
  ScheduleSpec& spec = layout.schedule;
  spec.policy = PolicyOf(asked.schedule);
  spec.num_ranks = layout.grid.pp_size();
  spec.parts_per_rank = static_cast<int>(asked.parts_per_rank());
  spec.num_microbatches =
      static_cast<int>(stage.global_batch_size / (stage.micro_batch_size * layout.grid.dp_size()));
  spec.forward_only = recipe.forward_only;
  const auto made = MakeSchedule(spec);
  if (!made.ok()) return Annotate(made.status(), absl::StrCat("stage '", stage.name, "'"));
  layout.part_rank = made->part_rank;
  layout.costs = BlockCosts(model, recipe, stage.data.seq_length);
  if (asked.layer_split.empty()) {
    auto split = SplitLayers(layout.costs, layout.part_rank);
    if (!split.ok()) return Annotate(split.status(), absl::StrCat("stage '", stage.name, "'"));
    layout.layer_split = *std::move(split);
  } else {
    const absl::Status status =
        CheckLayerSplit(asked.layer_split, made->num_parts(), model.num_hidden_layers);
    if (!status.ok()) return Annotate(status, absl::StrCat("stage '", stage.name, "'"));
    layout.layer_split = asked.layer_split;
  }
  layout.embedding_stages = {layout.part_rank.front()};
  if (model.num_nextn_predict_layers > 0 && layout.part_rank.back() != layout.part_rank.front())
    layout.embedding_stages.push_back(layout.part_rank.back());
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<StageLayout> MakeStageLayout(const StageConfig& stage, const ModelConfig& model,
                                            const Recipe& recipe, int world_size) {
  const std::string where = absl::StrCat("stage '", stage.name, "': ");
  const auto size = [](int64_t value) {
    return static_cast<int>(std::min<int64_t>(value, 1 << 20));
  };
  ParallelLayout sizes{.tensor = size(stage.parallelism.tensor),
                       .pipeline = size(stage.parallelism.pipeline),
                       .expert = size(stage.parallelism.expert),
                       .context = size(stage.parallelism.context)};
  StageLayout layout;
  // As asked first, so that messages speak of the run file's numbers.
  ASSIGN_OR_RETURN(layout.grid, ProcessGrid::Make(world_size, sizes));
  if (recipe.forward_only && sizes.tensor > 1) {
    sizes.context *= sizes.tensor;
    sizes.tensor = 1;
    ASSIGN_OR_RETURN(layout.grid, ProcessGrid::Make(world_size, sizes));
  }
  RETURN_IF_ERROR(CheckShards(where, model, layout.grid));
  RETURN_IF_ERROR(CheckRows(where, stage, layout.grid));
  layout.rows_per_rank = stage.micro_batch_size * stage.data.seq_length /
                         (int64_t{layout.grid.cp_size()} * layout.grid.tp_size());
  SetExpertRows(stage, model, layout);
  RETURN_IF_ERROR(SetParts(stage, model, recipe, layout));
  return layout;
}

Placement StageLayout::PlacementOf(int world_rank) const {
  const ProcessGrid::Coordinates at = grid.At(world_rank);
  return {.tp_rank = at.tp, .tp_size = grid.tp_size(), .ep_rank = at.ep, .ep_size = grid.ep_size()};
}

RowShare StageLayout::RowShareOf(int world_rank) const {
  const ProcessGrid::Coordinates at = grid.At(world_rank);
  return {.cp_rank = at.cp, .cp_size = grid.cp_size(), .tp_rank = at.tp, .tp_size = grid.tp_size()};
}

std::vector<PartLayers> StageLayout::PartsOf(int pipeline_rank) const {
  std::vector<PartLayers> parts;
  int64_t begin = 0;
  const int count = static_cast<int>(part_rank.size());
  for (int part = 0; part < count; ++part) {
    const int64_t end = begin + layer_split[part];
    if (part_rank[part] == pipeline_rank) {
      parts.push_back({.part = part,
                       .begin = begin,
                       .end = end,
                       .first = part == 0,
                       .last = part + 1 == count});
    }
    begin = end;
  }
  return parts;
}

}  // namespace baleen
