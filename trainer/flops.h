// Model FLOPs of a token: what the mathematics asks for (2 per multiply-add), with the attention
// actually asked for, whatever kernel runs it and whatever is recomputed. MFU = FLOPs per token *
// tokens per second / peak.
//
//   linear   2 x parameters a token meets (projections, A experts, shared expert, head; MTP module
//   with its head) dense    2 H (Q + V) mean causal keys;   sparse  2 H (C + V_latent) mean
//   selected keys (absorbed form) indexer  2 I J mean causal keys for the scores forward + backward
//   = 3 x forward of what trains; the warm-up is forward only, plus the indexer's loss: scores (I
//   J) and target (H Q) once more and the two gradients of the scores (2 I J).
#pragma once

#include "parallel/stage_split.h"
#include "trainer/recipe.h"

namespace baleen {

struct TokenFlops {
  double linear = 0;     // forward
  double attention = 0;  // forward
  double indexer = 0;    // forward
  double total = 0;      // of the training step
};

// The same, block by block and for the ends of the network: what the stage split balances (FLOPs of
// a training step for one token).
StageCosts BlockCosts(const ModelConfig& model, const Recipe& recipe, int64_t seq_length);

TokenFlops ModelFlopsPerToken(const ModelConfig& model, const Recipe& recipe, int64_t seq_length);

}  // namespace baleen
