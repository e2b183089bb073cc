// DryRank: one rank of a layout, run without ranks, weights or memory: the model, the optimizer and
// the pipeline engine that train, on a dry context (kernels/core/context.h) and pretended
// communicators. What it holds, sends and computes in a step is counted, not estimated.
//
// Microbatches are alike, so each type of action runs once (rehearsal.h); the engine then runs the
// whole program with what was found. Routing is balanced and every row's list
// of selected keys is full: a step whose experts are loaded unevenly holds more rows for them, up
// to expert_buffer times as many.
#pragma once

#include <limits>
#include <map>
#include <string>
#include <vector>

#include "trainer/rehearsal.h"
#include "trainer/stage_layout.h"

namespace baleen {

// Rehearsals of ranks that hold parts of the same make-up, for one stage and layout: the ranks in
// the middle of a pipeline differ in the numbers of their layers only. Parts count from 0 on their
// rank.
using RehearsalMemo = std::map<std::string, Rehearsed>;

struct DryRankRequest {
  const StageConfig& stage;
  const ModelConfig& model;  // the stage's, with the dsa section in it (EffectiveModel)
  const Recipe& recipe;
  const StageLayout& layout;
  const Schedule& schedule;  // lowered
  // kF32 or kF64: the CPU backend. kBF16: as on a GPU, with fp32 gradients and master weights.
  DType dtype = DType::kF32;
  int world_rank = 0;
  RehearsalMemo* memo = nullptr;  // kept by the caller for ranks of one layout
  // A rank that holds more than this between its steps is not run: its plan has `total` alone.
  int64_t most_bytes = std::numeric_limits<int64_t>::max();
};

struct RankPlan {
  int pipeline_rank = 0;
  int world_rank = 0;
  std::vector<PartLayers> parts;
  std::map<std::string, MemoryUse> uses;  // bytes: between steps; peak_bytes: during a step
  MemoryUse total;
  std::map<ActionType, CountedWork> actions;  // one action of each type
  CountedWork reduction;                      // of the gradients, and their norms
  CountedWork update;                         // AdamW, and the gathers of the values
  CommunicationLog messages;                  // of the whole step
  double flops = 0;                           // executed in the whole step, recomputation included
  // Ranks from the first to the last member of each communicator: does it leave a node?
  std::map<std::string, int> spans;
};

RankPlan RunDry(const DryRankRequest& request);

}  // namespace baleen
