#include "trainer/model/mla.h"

#include <algorithm>

#include "kernels/ops/elementwise.h"
#include "kernels/ops/linear/matmul.h"
#include "kernels/ops/moe/permute.h"
#include "kernels/ops/strided.h"
#include "trainer/model/linear.h"
#include "trainer/model/row_exchange.h"

namespace baleen {

struct Mla::KeyGradients {
  Tensor dk_THQ, dv_THV;  // dense and masked form
  Tensor dkv_TC;          // sparse form: of [c | rotated k_rope]
};

Mla::Mla(const ModelConfig& config, const std::string& prefix, const Placement& placement,
         ParameterStore& store)
    : label_(prefix + ".self_attn"),
      heads_(config.num_attention_heads / placement.tp_size),
      nope_(config.qk_nope_head_dim),
      rope_(config.qk_rope_head_dim),
      value_(config.v_head_dim),
      latent_(config.kv_lora_rank) {
  const auto name = [&](const char* part) { return absl::StrCat(label_, ".", part, ".weight"); };
  const auto whole = [&](const char* part, Shape shape) {
    return store.Declare(name(part), std::move(shape), ParameterGroup::kMain);
  };
  // Heads are cut over tp: rows of the up-projections, columns of the output projection.
  const auto cut = [&](const char* part, Shape shape, int dim) {
    return store.DeclareShard(name(part), std::move(shape), dim, placement.tp_rank,
                              placement.tp_size, ParameterGroup::kTensor);
  };
  const int64_t heads = config.num_attention_heads;
  q_a_proj_ = whole("q_a_proj", {config.q_lora_rank, config.hidden_size});
  q_a_layernorm_ = whole("q_a_layernorm", {config.q_lora_rank});
  q_b_proj_ = cut("q_b_proj", {heads * (nope_ + rope_), config.q_lora_rank}, 0);
  kv_a_proj_ = whole("kv_a_proj_with_mqa", {latent_ + rope_, config.hidden_size});
  kv_a_layernorm_ = whole("kv_a_layernorm", {latent_});
  kv_b_proj_ = cut("kv_b_proj", {heads * (nope_ + value_), latent_}, 0);
  o_proj_ = cut("o_proj", {config.hidden_size, heads * value_}, 1);
}

MatrixView Mla::UpKey(const Tensor& kv_b) const {
  return AsBatch(kv_b.Reshaped({heads_, nope_ + value_, latent_})).RowRange(0, nope_);
}

MatrixView Mla::UpValue(const Tensor& kv_b) const {
  return AsBatch(kv_b.Reshaped({heads_, nope_ + value_, latent_})).RowRange(nope_, nope_ + value_);
}

// ---- Forward -----------------------------------------------------------------------------------

void Mla::Project(const ModelContext& model, const Batch& batch, const Tensor& x_RD,
                  Saved& saved) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  const double eps = model.config.rms_norm_eps;
  saved.x_RD = x_RD;
  const ProjectionRows rows(x_RD);
  saved.q_a = ProjectForward(model, rows, q_a_proj_);
  const RmsNormResult q_norm = RmsNorm(context, saved.q_a, weights.value(q_a_layernorm_), eps);
  saved.qr_R = q_norm.y;
  saved.q_a_rstd = q_norm.rstd;
  saved.kv_a = ProjectForward(model, rows, kv_a_proj_);
  const RmsNormResult kv_norm = RmsNorm(context, SliceColumns(context, saved.kv_a, 0, latent_),
                                        weights.value(kv_a_layernorm_), eps);
  saved.c_R = kv_norm.y;
  saved.latent_rstd = kv_norm.rstd;
  saved.k_rope_R = SliceColumns(context, saved.kv_a, latent_, rope_);
  ApplyRope(context, AsMatrix(saved.k_rope_R), batch.positions_R, model.rope,
            RopeLayout::kInterleaved, RopeDirection::kForward);
}

// What the rank's heads need of other ranks' rows: the queries of the group, the keys of all.
void Mla::GatherLatents(const ModelContext& model, const Batch& batch, Saved& saved) const {
  const Context& context = model.context;
  saved.qr_G = GatherGroup(model, label_ + " q latents", saved.qr_R);
  if (!saved.ids_RK.empty()) {
    saved.ids_GK = GatherGroup(model, label_ + " selected ids", saved.ids_RK);
  }
  saved.kv_TC = GatherKeys(model, batch, label_ + " key latents",
                           ConcatColumns(context, saved.c_R, saved.k_rope_R));
  if (model.options.attention == AttentionForm::kSparse) return;
  saved.c_T = SliceColumns(context, saved.kv_TC, 0, latent_);
  saved.k_rope_T = SliceColumns(context, saved.kv_TC, latent_, rope_);
  saved.kv_TC = Tensor();
  ExpandKeys(model, saved.c_T, saved.k_rope_T, saved.k_THQ, saved.v_THV);
}

Tensor Mla::RotatedQuery(const ModelContext& model, const Tensor& qr,
                         const Tensor& positions) const {
  const Tensor q_THQ =
      ProjectForward(model, qr, q_b_proj_).Reshaped({qr.dim(0), heads_, nope_ + rope_});
  ApplyRope(model.context, PerHead(q_THQ).Columns(nope_, rope_), positions, model.rope,
            RopeLayout::kInterleaved, RopeDirection::kForward);
  return q_THQ;
}

// Keys and values of the rank's heads from the latent rows.
void Mla::ExpandKeys(const ModelContext& model, const Tensor& c_T, const Tensor& k_rope_T,
                     Tensor& k_THQ, Tensor& v_THV) const {
  const Context& context = model.context;
  const int64_t rows = c_T.dim(0);
  const Tensor kv = ProjectForward(model, c_T, kv_b_proj_).Reshaped({rows, heads_, nope_ + value_});
  k_THQ = context.Empty(c_T.dtype(), {rows, heads_, nope_ + rope_});
  v_THV = context.Empty(c_T.dtype(), {rows, heads_, value_});
  CopyView(context, PerHead(kv).Columns(0, nope_), PerHead(k_THQ).Columns(0, nope_));
  CopyView(context, AsMatrix(k_rope_T), PerHead(k_THQ).Columns(nope_, rope_));
  CopyView(context, PerHead(kv).Columns(nope_, value_), PerHead(v_THV));
}

// q of the rank's heads for a chunk of rows; in the sparse form absorbed, q~ = [W_UK^T q_nope |
// rope].
void Mla::ExpandQuery(const ModelContext& model, const Batch& batch, const Saved& saved,
                      Chunk& chunk) const {
  const Context& context = model.context;
  chunk.q_THQ = RotatedQuery(model, saved.qr_G.Rows(chunk.begin, chunk.end),
                             batch.positions_G.Rows(chunk.begin, chunk.end));
  if (model.options.attention != AttentionForm::kSparse) return;
  chunk.q_absorbed_THC =
      context.Empty(saved.qr_G.dtype(), {chunk.end - chunk.begin, heads_, latent_ + rope_});
  Matmul(context, PerHead(chunk.q_THQ).Columns(0, nope_), Transpose::kNo,
         UpKey(model.parameters.value(kv_b_proj_)), Transpose::kNo,
         PerHead(chunk.q_absorbed_THC).Columns(0, latent_));
  CopyView(context, PerHead(chunk.q_THQ).Columns(nope_, rope_),
           PerHead(chunk.q_absorbed_THC).Columns(latent_, rope_));
}

void Mla::RunChunk(const ModelContext& model, const Batch& batch, Saved& saved,
                   Chunk& chunk) const {
  const Context& context = model.context;
  const double scale = model.config.softmax_scale();
  ExpandQuery(model, batch, saved, chunk);
  switch (model.options.attention) {
    case AttentionForm::kDense:
      chunk.core = Attention(context, chunk.q_THQ, saved.k_THQ, saved.v_THV,
                             batch.windows_G.Rows(chunk.begin, chunk.end), scale);
      break;
    case AttentionForm::kMaskedDense:
      chunk.core = MaskedAttention(context, chunk.q_THQ, saved.k_THQ, saved.v_THV,
                                   saved.ids_GK.Rows(chunk.begin, chunk.end), scale);
      break;
    case AttentionForm::kSparse: {
      const SparseAttentionResult result =
          SparseAttention(context, chunk.q_absorbed_THC, saved.kv_TC,
                          saved.ids_GK.Rows(chunk.begin, chunk.end), latent_, scale);
      chunk.core = {result.o_THV, result.lse_TH};
      Matmul(context, PerHead(chunk.core.o_THV), Transpose::kNo,
             UpValue(model.parameters.value(kv_b_proj_)), Transpose::kYes,
             PerHead(saved.o_GHV.Rows(chunk.begin, chunk.end)));
      return;
    }
  }
  if (saved.o_GHV.empty()) {  // the only chunk
    saved.o_GHV = chunk.core.o_THV;
    return;
  }
  const Tensor o = saved.o_GHV.Rows(chunk.begin, chunk.end);
  Copy(context, chunk.core.o_THV, o);
  chunk.core.o_THV = o;
}

// The gathered latents and the list of chunks, none of which has run.
void Mla::MakeChunks(const ModelContext& model, const Batch& batch, Saved& saved) const {
  GatherLatents(model, batch, saved);
  const int64_t rows = saved.qr_G.dim(0);
  const int64_t step = model.options.attention_chunk;
  const bool own_output = rows > step || model.options.attention == AttentionForm::kSparse;
  saved.o_GHV =
      own_output ? model.context.Empty(saved.qr_G.dtype(), {rows, heads_, value_}) : Tensor();
  saved.chunks.clear();
  for (int64_t begin = 0; begin < rows; begin += step) {
    saved.chunks.push_back({.begin = begin, .end = std::min(rows, begin + step)});
  }
}

void Mla::RunCore(const ModelContext& model, const Batch& batch, Saved& saved) const {
  MakeChunks(model, batch, saved);
  // With several chunks the expanded tensors of one are what lives at a time, unless all is to be
  // kept; the warm-up's target needs all queries. o~ is as wide as they are: the backward runs
  // the chunk again.
  const bool drop = saved.chunks.size() > 1 && model.options.recompute != RecomputeMode::kNone &&
                    model.options.indexer_loss != IndexerLossKind::kDense;
  for (Chunk& chunk : saved.chunks) {
    RunChunk(model, batch, saved, chunk);
    if (!drop) continue;
    DropQuery(chunk);
    if (model.options.attention == AttentionForm::kSparse) chunk.core.o_THV = Tensor();
  }
}

Tensor Mla::Attend(const ModelContext& model, const Batch& batch, const Tensor& ids_RK,
                   Saved& saved) const {
  saved.ids_RK = ids_RK;
  RunCore(model, batch, saved);
  const Tensor out_GD =
      ProjectForward(model, saved.o_GHV.Reshaped({saved.o_GHV.dim(0), heads_ * value_}), o_proj_);
  return ReduceScatterGroup(model, label_ + " output", out_GD);
}

void Mla::Prepare(const ModelContext& model, const Batch& batch, const Tensor& ids_RK,
                  Saved& saved) const {
  saved.ids_RK = ids_RK;
  MakeChunks(model, batch, saved);
}

void Mla::AttendForTarget(const ModelContext& model, const Batch& batch, Saved& saved) const {
  RunCore(model, batch, saved);
}

void Mla::DropQuery(Chunk& chunk) { chunk.q_THQ = chunk.q_absorbed_THC = Tensor(); }

void Mla::DropExpanded(Saved& saved) const {
  saved.qr_G = saved.ids_GK = saved.c_T = saved.k_rope_T = saved.kv_TC = Tensor();
  saved.k_THQ = saved.v_THV = Tensor();
  for (Chunk& chunk : saved.chunks) {
    if (!chunk.q_absorbed_THC.empty()) chunk.core.o_THV = Tensor();  // o~: as wide as the query
    DropQuery(chunk);
  }
}

Mla::DenseRows Mla::MakeDenseRows(const ModelContext& model, const Batch& batch,
                                  const Tensor& rows_S, const Tensor& positions_S,
                                  const KeyWindows& windows_S, const Saved& saved) const {
  const Context& context = model.context;
  const Tensor qr_G = GatherGroup(model, label_ + " measured q latents", saved.qr_R);
  const Tensor kv_TC = GatherKeys(model, batch, label_ + " measured key latents",
                                  ConcatColumns(context, saved.c_R, saved.k_rope_R));
  DenseRows dense;
  dense.q_SHQ = RotatedQuery(model, GatherRows(context, qr_G, rows_S), positions_S);
  Tensor v_THV;
  ExpandKeys(model, SliceColumns(context, kv_TC, 0, latent_),
             SliceColumns(context, kv_TC, latent_, rope_), dense.k_THQ, v_THV);
  dense.lse_SH =
      Attention(context, dense.q_SHQ, dense.k_THQ, v_THV, windows_S, model.config.softmax_scale())
          .lse_TH;
  return dense;
}

// ---- Backward ----------------------------------------------------------------------------------

void Mla::BackwardDenseCore(const ModelContext& model, const Batch& batch, Saved& saved,
                            Chunk& chunk, const Tensor& target_TK, KeyGradients& keys) const {
  const Context& context = model.context;
  const double scale = model.config.softmax_scale();
  if (model.options.attention == AttentionForm::kDense) {
    chunk.dq_THQ = AttentionBackward(context, chunk.do_THV, chunk.q_THQ, saved.k_THQ, saved.v_THV,
                                     chunk.core, batch.windows_G.Rows(chunk.begin, chunk.end),
                                     scale, keys.dk_THQ, keys.dv_THV);
    return;
  }
  chunk.dq_THQ = MaskedAttentionBackward(
      context, chunk.do_THV, chunk.q_THQ, saved.k_THQ, saved.v_THV, chunk.core,
      saved.ids_GK.Rows(chunk.begin, chunk.end), scale, keys.dk_THQ, keys.dv_THV, target_TK);
}

void Mla::BackwardAbsorbedCore(const ModelContext& model, Saved& saved, Chunk& chunk,
                               const Tensor& target_TK, KeyGradients& keys) const {
  const Context& context = model.context;
  const Tensor& kv_b = model.parameters.value(kv_b_proj_);
  const int64_t rows = chunk.end - chunk.begin;
  const DType dtype = saved.qr_G.dtype();
  const Tensor do_absorbed = context.Empty(dtype, {rows, heads_, latent_});
  Matmul(context, PerHead(chunk.do_THV), Transpose::kNo, UpValue(kv_b), Transpose::kNo,
         PerHead(do_absorbed));
  chunk.dq_absorbed_THC = SparseAttentionBackward(
      context, do_absorbed, chunk.q_absorbed_THC, saved.kv_TC,
      {chunk.core.o_THV, chunk.core.lse_TH}, saved.ids_GK.Rows(chunk.begin, chunk.end),
      model.config.softmax_scale(), keys.dkv_TC, target_TK);
  chunk.dq_THQ = context.Empty(dtype, {rows, heads_, nope_ + rope_});
  Matmul(context, PerHead(chunk.dq_absorbed_THC).Columns(0, latent_), Transpose::kNo, UpKey(kv_b),
         Transpose::kYes, PerHead(chunk.dq_THQ).Columns(0, nope_));
  CopyView(context, PerHead(chunk.dq_absorbed_THC).Columns(latent_, rope_),
           PerHead(chunk.dq_THQ).Columns(nope_, rope_));
}

void Mla::BackwardChunk(const ModelContext& model, const Batch& batch, Saved& saved, Chunk& chunk,
                        const Tensor& target_TK, KeyGradients& keys) const {
  const Context& context = model.context;
  chunk.do_THV = ProjectBackwardInput(model, saved.dout_GD.Rows(chunk.begin, chunk.end), o_proj_)
                     .Reshaped({chunk.end - chunk.begin, heads_, value_});
  if (chunk.core.o_THV.empty()) {
    RunChunk(model, batch, saved, chunk);
  } else if (chunk.q_THQ.empty()) {
    ExpandQuery(model, batch, saved, chunk);
  }
  if (model.options.attention == AttentionForm::kSparse) {
    BackwardAbsorbedCore(model, saved, chunk, target_TK, keys);
  } else {
    BackwardDenseCore(model, batch, saved, chunk, target_TK, keys);
  }
  ApplyRope(context, PerHead(chunk.dq_THQ).Columns(nope_, rope_),
            batch.positions_G.Rows(chunk.begin, chunk.end), model.rope, RopeLayout::kInterleaved,
            RopeDirection::kBackward);
}

// The gradient of [c | rotated k_rope] of all keys, a partial sum over the rank's heads and rows.
Tensor Mla::JoinKeyGradients(const ModelContext& model, KeyGradients& keys, Saved& saved) const {
  if (model.options.attention == AttentionForm::kSparse) return keys.dkv_TC;
  // Back through k = [k_nope | k_rope of all heads] and [k_nope | v] = W_kvb c.
  const Context& context = model.context;
  const int64_t rows = keys.dk_THQ.dim(0);
  const DType dtype = saved.qr_G.dtype();
  const Tensor dk_rope = context.Zeros(keys.dk_THQ.dtype(), {rows, rope_});
  AddBatchSum(context, PerHead(keys.dk_THQ).Columns(nope_, rope_), AsMatrix(dk_rope));
  // The sums are complete: what follows is a product of activations again.
  const Tensor dk = InDtype(context, std::exchange(keys.dk_THQ, {}), dtype);
  const Tensor dv = InDtype(context, std::exchange(keys.dv_THV, {}), dtype);
  saved.dkv_b_out = context.Empty(dtype, {rows, heads_, nope_ + value_});
  CopyView(context, PerHead(dk).Columns(0, nope_), PerHead(saved.dkv_b_out).Columns(0, nope_));
  CopyView(context, PerHead(dv), PerHead(saved.dkv_b_out).Columns(nope_, value_));
  saved.dkv_b_out = saved.dkv_b_out.Reshaped({rows, heads_ * (nope_ + value_)});
  const Tensor dc = ProjectBackwardInput(model, saved.dkv_b_out, kv_b_proj_);
  return ConcatColumns(context, dc, InDtype(context, dk_rope, dtype));
}

Tensor Mla::BackwardInput(const ModelContext& model, const Batch& batch, const Tensor& dout_RD,
                          Saved& saved) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  saved.dout_GD = GatherGroup(model, label_ + " output gradient", dout_RD);
  if (saved.qr_G.empty()) GatherLatents(model, batch, saved);
  const DType dtype = saved.qr_G.dtype();
  // Summed over chunks of rows, and over heads.
  const DType sums = StatisticsOf(dtype);
  KeyGradients keys;
  if (model.options.attention == AttentionForm::kSparse) {
    keys.dkv_TC = context.Zeros(sums, saved.kv_TC.shape());
  } else if (saved.chunks.size() == 1 && dtype == DType::kBF16) {  // complete at once
    keys.dk_THQ = context.Empty(dtype, saved.k_THQ.shape());
    keys.dv_THV = context.Empty(dtype, saved.v_THV.shape());
  } else {
    keys.dk_THQ = context.Zeros(sums, saved.k_THQ.shape());
    keys.dv_THV = context.Zeros(sums, saved.v_THV.shape());
  }
  const bool selected = model.options.attention != AttentionForm::kDense;
  const Tensor target_GK = selected ? context.Empty(sums, saved.ids_GK.shape()) : Tensor();
  const Tensor dqr_G = context.Empty(dtype, saved.qr_G.shape());
  for (Chunk& chunk : saved.chunks) {
    BackwardChunk(model, batch, saved, chunk,
                  selected ? target_GK.Rows(chunk.begin, chunk.end) : Tensor(), keys);
    Copy(context,
         ProjectBackwardInput(
             model, chunk.dq_THQ.Reshaped({chunk.end - chunk.begin, heads_ * (nope_ + rope_)}),
             q_b_proj_),
         dqr_G.Rows(chunk.begin, chunk.end));
    if (WeightsWait(model, saved)) continue;
    // One chunk's expanded tensors at a time: its weight gradients are formed while they live.
    ChunkWeights(model, saved, chunk);
    chunk = Chunk{.begin = chunk.begin, .end = chunk.end};
  }
  saved.k_THQ = saved.v_THV = Tensor();  // as large as their gradients, which are moved now
  if (selected) saved.target_RK = ReduceScatterGroup(model, label_ + " target", target_GK);
  // q = rope(W_qb norm(W_qa x)).
  saved.dqr_R = ReduceScatterGroup(model, label_ + " q latent gradient", dqr_G);
  saved.dq_a = RmsNormBackwardInput(context, saved.dqr_R, saved.q_a, weights.value(q_a_layernorm_),
                                    saved.q_a_rstd);
  // kv = [norm(latent) | rope(k_rope)] of W_kva x.
  const Tensor dkv_RC = InDtype(context,
                                ReduceScatterKeys(model, batch, label_ + " key latent gradient",
                                                  JoinKeyGradients(model, keys, saved)),
                                dtype);
  saved.dc_R = SliceColumns(context, dkv_RC, 0, latent_);
  const Tensor dk_rope = SliceColumns(context, dkv_RC, latent_, rope_);
  ApplyRope(context, AsMatrix(dk_rope), batch.positions_R, model.rope, RopeLayout::kInterleaved,
            RopeDirection::kBackward);
  const Tensor dlatent =
      RmsNormBackwardInput(context, saved.dc_R, SliceColumns(context, saved.kv_a, 0, latent_),
                           weights.value(kv_a_layernorm_), saved.latent_rstd);
  saved.dkv_a = ConcatColumns(context, dlatent, dk_rope);
  return ProjectBackwardInputOfTwo(model, saved.dq_a, q_a_proj_, saved.dkv_a, kv_a_proj_);
}

// Whether the only chunk's weight gradients are formed in BackwardWeight, with the others.
bool Mla::WeightsWait(const ModelContext& model, const Saved& saved) {
  return saved.chunks.size() == 1 && !model.options.weights_with_input;
}

// Of one chunk: o_proj, q_b_proj and, in the sparse form, kv_b_proj, whose halves met different
// operands: dW_UK = q_nope^T dq~, dW_UV = do^T o~, per head.
void Mla::ChunkWeights(const ModelContext& model, const Saved& saved, const Chunk& chunk) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  const int64_t rows = chunk.end - chunk.begin;
  ProjectBackwardWeight(model, saved.dout_GD.Rows(chunk.begin, chunk.end),
                        saved.o_GHV.Rows(chunk.begin, chunk.end).Reshaped({rows, heads_ * value_}),
                        o_proj_);
  if (model.options.attention == AttentionForm::kSparse) {
    const ParameterStore::GradientSum dkv_b = weights.sum(kv_b_proj_);  // of two parts
    Matmul(context, PerHead(chunk.q_THQ).Columns(0, nope_), Transpose::kYes,
           PerHead(chunk.dq_absorbed_THC).Columns(0, latent_), Transpose::kNo, UpKey(dkv_b.tensor),
           dkv_b.accumulate);
    Matmul(context, PerHead(chunk.do_THV), Transpose::kYes, PerHead(chunk.core.o_THV),
           Transpose::kNo, UpValue(dkv_b.tensor), dkv_b.accumulate);
  }
  ProjectBackwardWeight(model, chunk.dq_THQ.Reshaped({rows, heads_ * (nope_ + rope_)}),
                        saved.qr_G.Rows(chunk.begin, chunk.end), q_b_proj_);
}

void Mla::BackwardWeight(const ModelContext& model, Saved& saved) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  if (WeightsWait(model, saved)) ChunkWeights(model, saved, saved.chunks[0]);
  if (model.options.attention != AttentionForm::kSparse) {
    ProjectBackwardWeight(model, saved.dkv_b_out, saved.c_T, kv_b_proj_);
  }
  RmsNormBackwardWeight(context, saved.dqr_R, saved.q_a, saved.q_a_rstd,
                        weights.grad(q_a_layernorm_));
  RmsNormBackwardWeight(context, saved.dc_R, SliceColumns(context, saved.kv_a, 0, latent_),
                        saved.latent_rstd, weights.grad(kv_a_layernorm_));
  const ProjectionRows x(saved.x_RD);
  ProjectBackwardWeight(model, saved.dq_a, x, q_a_proj_);
  ProjectBackwardWeight(model, saved.dkv_a, x, kv_a_proj_);
}

}  // namespace baleen
