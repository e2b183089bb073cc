// LayoutRig: training steps of a small model under any layout, on the ranks of a communicator, on
// the CPU in fp64 or on GPUs in bf16; and what is compared between layouts.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "trainer/model/choice_replay.h"
#include "trainer/model_work.h"
#include "trainer/optimizer.h"
#include "trainer/stage_layout.h"
#include "trainer/training_stage.h"

namespace baleen::testing {

struct RigCase {
  StageConfig stage;  // attention, train, parallelism, batch sizes, seq_length, recompute
  ModelConfig model;
  bool document_mask = false;
  bool measure_indexer = false;
  bool validate = false;           // a validation pass before the step, its losses by row
  int64_t row_chunk = 0;           // of attention and MLPs; 0: the defaults
  int64_t bucket_elements = 3000;  // several buckets even in a small model
  int64_t expert_rows = -1;        // -1: the layout's
  std::vector<int> sample_order;   // empty: 0, 1, 2, ...
  std::vector<int> expert_order;   // new place of each expert of every layer; empty: as they are
  // Added to the router's bias of expert 0: all tokens go there (positive) or none (negative).
  double first_expert_bias = 0;
  int steps = 1;  // on the same batch; losses and gradients are the last one's
};

// What computes a case. The communicator must carry the context's tensors.
struct RigBackend {
  Context context = Context::Cpu();
  DType dtype = DType::kF64;  // of activations and working weights
  bool bf16_weights = false;  // the values of a bf16 run, whatever the dtype
  ChoiceReplay* replay = nullptr;
  // The grid of another case of the same layout, whose recipe may differ; null: split anew.
  const GridCommunicators* axes = nullptr;
};

// What does not depend on the layout: summed over all ranks, whole tensors by the checkpoint's
// name.
struct StepOutcome {
  double lm_loss = 0, mtp_loss = 0, balance = 0;
  std::vector<double> kl, mass, recall, ties;
  std::vector<int64_t> expert_counts, selection_hash;
  double norm_main = 0, norm_indexer = 0;  // 0 where the group does not train
  // Of the validation pass, for each row of a microbatch: sum of losses, then of rows with a
  // target.
  std::vector<double> validation_loss, validation_targets;
  // Parts of tensors on this rank: (name, box, values).
  struct Piece {
    std::string name;
    Box box;
    std::vector<double> values;
  };
  std::vector<Piece> gradients;  // after the reduction
  std::vector<Piece> values;     // after the update: the masters where the model's are rounded
  // Where the model's values are rounded: whether each is its master, rounded, and how far the
  // update moved the masters of what trains.
  bool values_are_rounded_masters = true;
  std::vector<Piece> changes;
};

// On every rank of `world`, together. ConfigError when the layout cannot be.
absl::StatusOr<StepOutcome> RunOneStep(const RigCase& rig_case, Communicator& world,
                                       const RigBackend& backend = {});
absl::StatusOr<GridCommunicators> SplitForCase(const RigCase& rig_case, Communicator& world);

}  // namespace baleen::testing
