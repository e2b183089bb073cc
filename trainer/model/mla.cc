#include "trainer/model/mla.h"

#include "kernels/ops/elementwise.h"
#include "kernels/ops/matmul.h"
#include "kernels/ops/permute.h"
#include "kernels/ops/strided.h"

namespace baleen {

struct Mla::CoreGradients {
  Tensor dq_THQ;  // of the rotated q
  Tensor dkv_TC;  // of [c | rotated k_rope]
};

Mla::Mla(const ModelConfig& config, const std::string& prefix, ParameterStore& store)
    : heads_(config.num_attention_heads),
      nope_(config.qk_nope_head_dim),
      rope_(config.qk_rope_head_dim),
      value_(config.v_head_dim),
      latent_(config.kv_lora_rank) {
  const std::string attention = prefix + ".self_attn.";
  const auto declare = [&](const char* name, Shape shape) {
    return store.Declare(attention + name + ".weight", std::move(shape), ParameterGroup::kMain);
  };
  q_a_proj_ = declare("q_a_proj", {config.q_lora_rank, config.hidden_size});
  q_a_layernorm_ = declare("q_a_layernorm", {config.q_lora_rank});
  q_b_proj_ = declare("q_b_proj", {heads_ * (nope_ + rope_), config.q_lora_rank});
  kv_a_proj_ = declare("kv_a_proj_with_mqa", {latent_ + rope_, config.hidden_size});
  kv_a_layernorm_ = declare("kv_a_layernorm", {latent_});
  kv_b_proj_ = declare("kv_b_proj", {heads_ * (nope_ + value_), latent_});
  o_proj_ = declare("o_proj", {config.hidden_size, heads_ * value_});
}

MatrixView Mla::UpKey(const Tensor& kv_b) const {
  return AsBatch(kv_b.Reshaped({heads_, nope_ + value_, latent_})).RowRange(0, nope_);
}

MatrixView Mla::UpValue(const Tensor& kv_b) const {
  return AsBatch(kv_b.Reshaped({heads_, nope_ + value_, latent_})).RowRange(nope_, nope_ + value_);
}

void Mla::Project(const ModelContext& model, const Batch& batch, const Tensor& x,
                  Saved& saved) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  const double eps = model.config.rms_norm_eps;
  saved.x = x;
  saved.q_a = Linear(context, x, weights.value(q_a_proj_));
  const RmsNormResult q_norm = RmsNorm(context, saved.q_a, weights.value(q_a_layernorm_), eps);
  saved.qr = q_norm.y;
  saved.q_a_rstd = q_norm.rstd;
  saved.kv_a = Linear(context, x, weights.value(kv_a_proj_));
  const RmsNormResult kv_norm = RmsNorm(context, SliceColumns(context, saved.kv_a, 0, latent_),
                                        weights.value(kv_a_layernorm_), eps);
  saved.c = kv_norm.y;
  saved.latent_rstd = kv_norm.rstd;
  saved.k_rope_TR = SliceColumns(context, saved.kv_a, latent_, rope_);
  ApplyRope(context, AsMatrix(saved.k_rope_TR), batch.positions_T, model.rope,
            RopeLayout::kInterleaved, RopeDirection::kForward);
}

Tensor Mla::RotatedQuery(const ModelContext& model, const Tensor& qr,
                         const Tensor& positions_T) const {
  const Tensor q_THQ = Linear(model.context, qr, model.parameters.value(q_b_proj_))
                           .Reshaped({qr.dim(0), heads_, nope_ + rope_});
  ApplyRope(model.context, PerHead(q_THQ).Columns(nope_, rope_), positions_T, model.rope,
            RopeLayout::kInterleaved, RopeDirection::kForward);
  return q_THQ;
}

// Keys and values of every head from the latent rows.
void Mla::ExpandKeys(const ModelContext& model, const Tensor& c, const Tensor& k_rope_TR,
                     Tensor& k_SHQ, Tensor& v_SHV) const {
  const Context& context = model.context;
  const int64_t rows = c.dim(0);
  const Tensor kv = Linear(context, c, model.parameters.value(kv_b_proj_))
                        .Reshaped({rows, heads_, nope_ + value_});
  k_SHQ = context.Empty(c.dtype(), {rows, heads_, nope_ + rope_});
  v_SHV = context.Empty(c.dtype(), {rows, heads_, value_});
  CopyView(context, PerHead(kv).Columns(0, nope_), PerHead(k_SHQ).Columns(0, nope_));
  CopyView(context, AsMatrix(k_rope_TR), PerHead(k_SHQ).Columns(nope_, rope_));
  CopyView(context, PerHead(kv).Columns(nope_, value_), PerHead(v_SHV));
}

// From the latents to what the core multiplies: q of all heads, then k and v, or the absorbed q and
// the latent rows.
void Mla::Expand(const ModelContext& model, const Batch& batch, Saved& saved) const {
  const Context& context = model.context;
  saved.q_THQ = RotatedQuery(model, saved.qr, batch.positions_T);
  if (model.options.attention != AttentionForm::kSparse) {
    ExpandKeys(model, saved.c, saved.k_rope_TR, saved.k_SHQ, saved.v_SHV);
    return;
  }
  saved.q_absorbed_THC =
      context.Empty(saved.qr.dtype(), {saved.qr.dim(0), heads_, latent_ + rope_});
  Matmul(context, PerHead(saved.q_THQ).Columns(0, nope_), Transpose::kNo,
         UpKey(model.parameters.value(kv_b_proj_)), Transpose::kNo,
         PerHead(saved.q_absorbed_THC).Columns(0, latent_));
  CopyView(context, PerHead(saved.q_THQ).Columns(nope_, rope_),
           PerHead(saved.q_absorbed_THC).Columns(latent_, rope_));
  saved.kv_SC = ConcatColumns(context, saved.c, saved.k_rope_TR);
}

Mla::DenseRows Mla::MakeDenseRows(const ModelContext& model, const Batch& batch,
                                  const Tensor& rows_R, const KeyWindows& windows_R,
                                  const Saved& saved) const {
  const Context& context = model.context;
  const Tensor positions_R = context.Empty(DType::kI32, rows_R.shape());
  for (int64_t r = 0; r < rows_R.num_elements(); ++r) {
    positions_R.data<int32_t>()[r] = batch.positions_T.data<int32_t>()[rows_R.data<int32_t>()[r]];
  }
  DenseRows dense;
  dense.q_RHQ = RotatedQuery(model, GatherRows(context, saved.qr, rows_R), positions_R);
  Tensor v_SHV;
  ExpandKeys(model, saved.c, saved.k_rope_TR, dense.k_SHQ, v_SHV);
  dense.lse_RH =
      Attention(context, dense.q_RHQ, dense.k_SHQ, v_SHV, windows_R, model.config.softmax_scale())
          .lse_TH;
  return dense;
}

void Mla::RunCore(const ModelContext& model, const Batch& batch, Saved& saved) const {
  const Context& context = model.context;
  const double scale = model.config.softmax_scale();
  Expand(model, batch, saved);
  switch (model.options.attention) {
    case AttentionForm::kDense:
      saved.core = Attention(context, saved.q_THQ, saved.k_SHQ, saved.v_SHV, batch.windows, scale);
      break;
    case AttentionForm::kMaskedDense:
      saved.core =
          MaskedAttention(context, saved.q_THQ, saved.k_SHQ, saved.v_SHV, saved.ids_TK, scale);
      break;
    case AttentionForm::kSparse: {
      const SparseAttentionResult result =
          SparseAttention(context, saved.q_absorbed_THC, saved.kv_SC, saved.ids_TK, latent_, scale);
      saved.core = {result.o_THV, result.lse_TH};
      saved.o_THV = context.Empty(saved.qr.dtype(), {saved.qr.dim(0), heads_, value_});
      Matmul(context, PerHead(saved.core.o_THV), Transpose::kNo,
             UpValue(model.parameters.value(kv_b_proj_)), Transpose::kYes, PerHead(saved.o_THV));
      return;
    }
  }
  saved.o_THV = saved.core.o_THV;
}

Tensor Mla::Attend(const ModelContext& model, const Batch& batch, const Tensor& ids_TK,
                   Saved& saved) const {
  saved.ids_TK = ids_TK;
  RunCore(model, batch, saved);
  const int64_t rows = saved.qr.dim(0);
  return Linear(model.context, saved.o_THV.Reshaped({rows, heads_ * value_}),
                model.parameters.value(o_proj_));
}

void Mla::AttendForTarget(const ModelContext& model, const Batch& batch, Saved& saved) const {
  RunCore(model, batch, saved);
}

void Mla::DropExpanded(Saved& saved) const {
  saved.q_THQ = saved.k_SHQ = saved.v_SHV = saved.q_absorbed_THC = saved.kv_SC = Tensor();
}

Mla::CoreGradients Mla::BackwardDense(const ModelContext& model, const Batch& batch,
                                      Saved& saved) const {
  const Context& context = model.context;
  const double scale = model.config.softmax_scale();
  const int64_t rows = saved.qr.dim(0);
  const DType dtype = saved.qr.dtype();
  const Tensor dk = context.Zeros(dtype, saved.k_SHQ.shape());
  const Tensor dv = context.Zeros(dtype, saved.v_SHV.shape());
  CoreGradients gradients;
  if (model.options.attention == AttentionForm::kDense) {
    gradients.dq_THQ = AttentionBackward(context, saved.do_THV, saved.q_THQ, saved.k_SHQ,
                                         saved.v_SHV, saved.core, batch.windows, scale, dk, dv);
  } else {
    saved.target_TK = context.Empty(dtype, saved.ids_TK.shape());
    gradients.dq_THQ =
        MaskedAttentionBackward(context, saved.do_THV, saved.q_THQ, saved.k_SHQ, saved.v_SHV,
                                saved.core, saved.ids_TK, scale, dk, dv, saved.target_TK);
  }
  // Back through k = [k_nope | k_rope of all heads] and [k_nope | v] = W_kvb c.
  saved.dkv_b_out = context.Empty(dtype, {rows, heads_, nope_ + value_});
  CopyView(context, PerHead(dk).Columns(0, nope_), PerHead(saved.dkv_b_out).Columns(0, nope_));
  CopyView(context, PerHead(dv), PerHead(saved.dkv_b_out).Columns(nope_, value_));
  saved.dkv_b_out = saved.dkv_b_out.Reshaped({rows, heads_ * (nope_ + value_)});
  const Tensor dc =
      LinearBackwardInput(context, saved.dkv_b_out, model.parameters.value(kv_b_proj_));
  const Tensor dk_rope = context.Zeros(dtype, {rows, rope_});
  AddBatchSum(context, PerHead(dk).Columns(nope_, rope_), AsMatrix(dk_rope));
  gradients.dkv_TC = ConcatColumns(context, dc, dk_rope);
  return gradients;
}

Mla::CoreGradients Mla::BackwardAbsorbed(const ModelContext& model, Saved& saved) const {
  const Context& context = model.context;
  const Tensor& kv_b = model.parameters.value(kv_b_proj_);
  const int64_t rows = saved.qr.dim(0);
  const DType dtype = saved.qr.dtype();
  const Tensor do_absorbed = context.Empty(dtype, {rows, heads_, latent_});
  Matmul(context, PerHead(saved.do_THV), Transpose::kNo, UpValue(kv_b), Transpose::kNo,
         PerHead(do_absorbed));
  CoreGradients gradients;
  gradients.dkv_TC = context.Zeros(dtype, saved.kv_SC.shape());
  saved.target_TK = context.Empty(dtype, saved.ids_TK.shape());
  saved.dq_absorbed_THC =
      SparseAttentionBackward(context, do_absorbed, saved.q_absorbed_THC, saved.kv_SC,
                              {saved.core.o_THV, saved.core.lse_TH}, saved.ids_TK,
                              model.config.softmax_scale(), gradients.dkv_TC, saved.target_TK);
  gradients.dq_THQ = context.Empty(dtype, {rows, heads_, nope_ + rope_});
  Matmul(context, PerHead(saved.dq_absorbed_THC).Columns(0, latent_), Transpose::kNo, UpKey(kv_b),
         Transpose::kYes, PerHead(gradients.dq_THQ).Columns(0, nope_));
  CopyView(context, PerHead(saved.dq_absorbed_THC).Columns(latent_, rope_),
           PerHead(gradients.dq_THQ).Columns(nope_, rope_));
  return gradients;
}

Tensor Mla::BackwardInput(const ModelContext& model, const Batch& batch, const Tensor& dout,
                          Saved& saved) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  const int64_t rows = saved.qr.dim(0);
  saved.dout = dout;
  saved.do_THV =
      LinearBackwardInput(context, dout, weights.value(o_proj_)).Reshaped({rows, heads_, value_});
  if (saved.q_THQ.empty()) Expand(model, batch, saved);
  const CoreGradients core = model.options.attention == AttentionForm::kSparse
                                 ? BackwardAbsorbed(model, saved)
                                 : BackwardDense(model, batch, saved);
  // q = rope(W_qb norm(W_qa x)).
  ApplyRope(context, PerHead(core.dq_THQ).Columns(nope_, rope_), batch.positions_T, model.rope,
            RopeLayout::kInterleaved, RopeDirection::kBackward);
  saved.dq = core.dq_THQ.Reshaped({rows, heads_ * (nope_ + rope_)});
  const Tensor dqr = LinearBackwardInput(context, saved.dq, weights.value(q_b_proj_));
  saved.dq_a =
      RmsNormBackwardInput(context, dqr, saved.q_a, weights.value(q_a_layernorm_), saved.q_a_rstd);
  // kv = [norm(latent) | rope(k_rope)] of W_kva x.
  saved.dc = SliceColumns(context, core.dkv_TC, 0, latent_);
  const Tensor dk_rope = SliceColumns(context, core.dkv_TC, latent_, rope_);
  ApplyRope(context, AsMatrix(dk_rope), batch.positions_T, model.rope, RopeLayout::kInterleaved,
            RopeDirection::kBackward);
  const Tensor dlatent =
      RmsNormBackwardInput(context, saved.dc, SliceColumns(context, saved.kv_a, 0, latent_),
                           weights.value(kv_a_layernorm_), saved.latent_rstd);
  saved.dkv_a = ConcatColumns(context, dlatent, dk_rope);
  const Tensor dx = LinearBackwardInput(context, saved.dq_a, weights.value(q_a_proj_));
  AddInPlace(context, dx, LinearBackwardInput(context, saved.dkv_a, weights.value(kv_a_proj_)));
  return dx;
}

void Mla::BackwardWeight(const ModelContext& model, Saved& saved) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  const int64_t rows = saved.qr.dim(0);
  LinearBackwardWeight(context, saved.dout, saved.o_THV.Reshaped({rows, heads_ * value_}),
                       weights.grad(o_proj_));
  if (model.options.attention == AttentionForm::kSparse) {
    // W_kvb's two halves met different operands: dW_UK = q_nope^T dq~, dW_UV = do^T o~, per head.
    Matmul(context, PerHead(saved.q_THQ).Columns(0, nope_), Transpose::kYes,
           PerHead(saved.dq_absorbed_THC).Columns(0, latent_), Transpose::kNo,
           UpKey(weights.grad(kv_b_proj_)), Accumulate::kAdd);
    Matmul(context, PerHead(saved.do_THV), Transpose::kYes, PerHead(saved.core.o_THV),
           Transpose::kNo, UpValue(weights.grad(kv_b_proj_)), Accumulate::kAdd);
  } else {
    LinearBackwardWeight(context, saved.dkv_b_out, saved.c, weights.grad(kv_b_proj_));
  }
  LinearBackwardWeight(context, saved.dq, saved.qr, weights.grad(q_b_proj_));
  // Norm weights: the gradient of the norm's output is made again from what it fed.
  const Tensor dqr = LinearBackwardInput(context, saved.dq, weights.value(q_b_proj_));
  RmsNormBackwardWeight(context, dqr, saved.q_a, saved.q_a_rstd, weights.grad(q_a_layernorm_));
  RmsNormBackwardWeight(context, saved.dc, SliceColumns(context, saved.kv_a, 0, latent_),
                        saved.latent_rstd, weights.grad(kv_a_layernorm_));
  LinearBackwardWeight(context, saved.dq_a, saved.x, weights.grad(q_a_proj_));
  LinearBackwardWeight(context, saved.dkv_a, saved.x, weights.grad(kv_a_proj_));
}

}  // namespace baleen
