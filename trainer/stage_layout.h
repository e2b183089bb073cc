// StageLayout: how the ranks of a job share a training stage. Arithmetic only: what a rank holds is
// known before anything is allocated, and `baleen plan` knows it without the ranks.
//
// In the warm-up tp acts as cp: attention is frozen, so each rank holds its weights whole and runs
// its rows with all heads, and no target crosses ranks.
#pragma once

#include <vector>

#include "configs/schema/run_config.h"
#include "parallel/process_grid.h"
#include "parallel/schedule.h"
#include "parallel/stage_split.h"
#include "trainer/model/model_part.h"
#include "trainer/recipe.h"

namespace baleen {

struct StageLayout {
  ProcessGrid grid;
  ScheduleSpec schedule;              // of a training step
  std::vector<int> part_rank;         // [parts]: which pipeline rank holds a part
  std::vector<int64_t> layer_split;   // [parts]: layers of each
  StageCosts costs;                   // what the split was balanced by
  std::vector<int> embedding_stages;  // pipeline ranks that hold the embedding table
  int64_t rows_per_rank = 0;          // R: own rows of a microbatch
  int64_t expert_rows = 0;            // bound of rows at the experts at once; 0: none
  int expert_node_size = 0;           // ranks of a node in the expert exchange; 0: one hop

  Placement PlacementOf(int world_rank) const;
  RowShare RowShareOf(int world_rank) const;
  std::vector<PartLayers> PartsOf(int pipeline_rank) const;
};

// ConfigError names the key, the product or quotient that does not fit, and what would.
absl::StatusOr<StageLayout> MakeStageLayout(const StageConfig& stage, const ModelConfig& model,
                                            const Recipe& recipe, int world_size);

}  // namespace baleen
