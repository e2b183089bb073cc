#include "trainer/model/token_ends.h"

#include <algorithm>

#include "kernels/ops/cross_entropy.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/embedding.h"
#include "kernels/ops/linear/matmul.h"
#include "trainer/model/linear.h"
#include "trainer/model/row_exchange.h"

namespace baleen {
namespace {

constexpr char kTable[] = "model.embed_tokens.weight";

int DeclareTable(const ModelConfig& config, const Placement& placement, ParameterStore& store) {
  const int declared = store.Find(kTable);
  if (declared >= 0) return declared;
  return store.DeclareShard(kTable, {config.vocab_size, config.hidden_size}, 0, placement.tp_rank,
                            placement.tp_size, ParameterGroup::kEmbedding);
}

Tensor GatherParts(const ModelContext& model, const Tensor& own_T) {
  Communicator& tp = *model.axes.tp;
  const Tensor parts = model.context.Empty(own_T.dtype(), {tp.size(), own_T.dim(0)});
  tp.AllGather("cross-entropy statistics", own_T, parts);
  return parts;
}

// Statistics of the whole vocabulary from those of the ranks' parts.
CrossEntropyStats CombineOverGroup(const ModelContext& model, const CrossEntropyStats& own) {
  if (model.axes.tp->size() == 1) return own;
  return CombineCrossEntropyStats(
      model.context, {GatherParts(model, own.row_max_T), GatherParts(model, own.row_sum_T),
                      GatherParts(model, own.target_logit_T)});
}

}  // namespace

Embedding::Embedding(const ModelConfig& config, const Placement& placement, ParameterStore& store)
    : table_(DeclareTable(config, placement, store)),
      vocab_begin_(config.vocab_size / placement.tp_size * placement.tp_rank) {}

Tensor Embedding::Forward(const ModelContext& model, const Tensor& tokens_G) const {
  const Tensor rows_GD =
      EmbeddingLookup(model.context, tokens_G, model.parameters.value(table_), vocab_begin_);
  return ReduceScatterGroup(model, "embedding", rows_GD);
}

void Embedding::BackwardWeight(const ModelContext& model, const Tensor& tokens_G,
                               const Tensor& dy_RD) const {
  EmbeddingBackward(model.context, tokens_G, GatherGroup(model, "embedding gradient", dy_RD),
                    model.parameters.grad(table_), vocab_begin_);
}

Head::Head(const ModelConfig& config, const Placement& placement, ParameterStore& store)
    : lm_head_(store.DeclareShard("lm_head.weight", {config.vocab_size, config.hidden_size}, 0,
                                  placement.tp_rank, placement.tp_size, ParameterGroup::kTensor)),
      vocab_begin_(config.vocab_size / placement.tp_size * placement.tp_rank) {}

Head::Result Head::Loss(const ModelContext& model, const Tensor& hidden_RD, const Tensor& targets_G,
                        double scale, bool train) const {
  const Context& context = model.context;
  const Tensor& weight = model.parameters.value(lm_head_);
  const Tensor hidden_GD = GatherGroup(model, "head", hidden_RD);
  const int64_t rows = hidden_GD.dim(0);
  const Tensor loss_G = context.Empty(StatisticsOf(hidden_GD.dtype()), {rows});
  const Tensor dhidden_GD = train ? context.Empty(hidden_GD.dtype(), hidden_GD.shape()) : Tensor();
  for (int64_t begin = 0; begin < rows; begin += model.options.head_chunk) {
    const int64_t end = std::min(rows, begin + model.options.head_chunk);
    const Tensor targets = targets_G.Rows(begin, end);
    const Tensor logits = Linear(context, hidden_GD.Rows(begin, end), weight);
    const CrossEntropyStats stats =
        CombineOverGroup(model, CrossEntropyLocalStats(context, logits, targets, vocab_begin_));
    Copy(context, CrossEntropyLoss(context, stats, targets), loss_G.Rows(begin, end));
    if (!train) continue;
    CrossEntropyBackwardInPlace(context, logits, targets, stats, vocab_begin_, scale);
    Copy(context, LinearBackwardInput(context, logits, weight), dhidden_GD.Rows(begin, end));
    LinearBackwardWeight(model, logits, hidden_GD.Rows(begin, end), lm_head_);
  }
  // Every rank of the group has all losses; each answers for its own rows.
  const int64_t own = model.axes.tp->rank() * hidden_RD.dim(0);
  Result result;
  result.loss_R = loss_G.Rows(own, own + hidden_RD.dim(0));
  if (train) result.dhidden_RD = ReduceScatterGroup(model, "head gradient", dhidden_GD);
  return result;
}

Tensor Head::Logits(const ModelContext& model, const Tensor& hidden_RD) const {
  CHECK_EQ(model.axes.tp->size(), 1);
  return Linear(model.context, hidden_RD, model.parameters.value(lm_head_));
}

}  // namespace baleen
