// What every module is handed: the device, the sizes, the parameters, the options of DSA, the ranks
// it works with.
#pragma once

#include <vector>

#include "configs/schema/model_config.h"
#include "kernels/core/context.h"
#include "kernels/ops/rope.h"
#include "parallel/grid_communicators.h"
#include "trainer/model/batch.h"
#include "trainer/model/parameter_store.h"

namespace baleen {

class ChoiceReplay;

// How attention runs in this training stage.
enum class AttentionForm : uint8_t {
  kDense,        // all causal keys, 192/128 heads
  kSparse,       // selected keys, absorbed 576/512 heads
  kMaskedDense,  // selected keys, 192/128 heads: the same mathematics, cheaper for short sequences
};

enum class IndexerPrecision : uint8_t {
  kFull,
  kFp8
};  // kFp8: q and k rounded through E4M3, as V3.2 serves them

// What the projections' products are made of (linear.h).
enum class GemmKind : uint8_t { kCompute, kFp8Block };

// What a block keeps between forward and backward; the rest is computed again with the same bits.
enum class RecomputeMode : uint8_t {
  kNone,       // everything is kept
  kSelective,  // q, k, v of attention and the inner activations of MLPs and experts are made again
  kFull,       // only the block's input and the selected ids are kept
};

// Where the indexers' loss is formed, if anywhere.
enum class IndexerLossKind : uint8_t {
  kNone,    // plain dense training, evaluation
  kDense,   // warm-up: over all causal keys, in the forward pass
  kSparse,  // over the selected keys, in the backward pass
};

// Who chooses the keys. The controls show what the indexer is worth (baleen eval).
enum class SelectionKind : uint8_t {
  kIndexer,
  kRandom,  // uniformly from the window, a function of (layer, row)
  kLast,    // the most recent keys: a sliding window
};

struct ModelOptions {
  SelectionKind selection = SelectionKind::kIndexer;
  // Where given, the keys of every layer, whatever the indexer chose: what a step costs depends on
  // how near the keys of neighbouring rows are (baleen bench). [R, K], ascending, -1 behind them.
  Tensor replaced_ids_RK;
  AttentionForm attention = AttentionForm::kDense;
  IndexerLossKind indexer_loss = IndexerLossKind::kNone;
  IndexerPrecision indexer_precision = IndexerPrecision::kFull;
  GemmKind gemm = GemmKind::kCompute;
  RecomputeMode recompute = RecomputeMode::kNone;
  // BackwardInput forms each block's weight gradients right behind its input gradient, so that what
  // a block kept, and what a full recompute makes again, lives for one block at a time. Not where
  // the schedule delays weight gradients.
  bool weights_with_input = false;
  bool hadamard = false;
  int64_t query_chunk = 512;  // query rows whose scores are held at once
  int64_t key_tile = 256;     // keys of one tile of the dense warm-up loss
  // Rows whose logits are held at once. Each chunk adds to the whole fp32 gradient of the head:
  // with 1024 rows that traffic takes as long as the product.
  int64_t head_chunk = 4096;
  // Rows whose inner activations of a dense MLP, or of the shared expert, live at once.
  int64_t mlp_chunk = 16384;
  // Query rows whose heads are expanded at once: the length of a sequence is met by chunks.
  int64_t attention_chunk = 4096;
  // Rows from all ranks that an expert-parallel rank takes in at once; the rest comes in further
  // rounds. 0: no bound.
  int64_t expert_rows = 0;
};

struct ModelContext {
  Context& context;
  const ModelConfig& config;
  const ModelOptions& options;
  const ParameterStore& parameters;
  const RopeTable& rope;
  const GridCommunicators& axes;
  ChoiceReplay* replay = nullptr;  // of tests that compare layouts (choice_replay.h)
};

// What one division makes means of the step's sums: global counts over all microbatches and ranks
// (architecture 4).
struct LossScales {
  double lm = 0;       // 1 / valid targets of the step
  double mtp = 0;      // lambda / valid MTP targets of the step
  double kl = 0;       // indexer_loss_coeff / query rows of the step
  double balance = 0;  // alpha / sequences of the step
};

}  // namespace baleen
