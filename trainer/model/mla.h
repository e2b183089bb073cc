// Multi-head latent attention (spec 1.7), dense or over selected keys.
//
//   q_a = W_qa x;  qr = norm(q_a);  q = W_qb qr = [nope | rope] per head;  kv_a = W_kva x = [latent
//   | rope];  c = norm(latent) dense:  [k_nope | v] = W_kvb c per head, k = [k_nope | k_rope]
//   sparse: q~ = [W_UK^T q_nope | q_rope], keys are rows [c | k_rope], o = W_UV o~   (W_kvb = per
//   head W_UK over W_UV) y = W_o o
// Legend: T tokens, H heads, Q = nope + rope, V value dim, C = kv_lora_rank + rope, K selected
// keys.
#pragma once

#include "kernels/ops/rms_norm.h"
#include "kernels/ops/sparse_attention.h"
#include "trainer/model/model_context.h"

namespace baleen {

class Mla {
 public:
  // Declares the weights of `prefix`.self_attn, e.g. prefix "model.layers.3".
  Mla(const ModelConfig& config, const std::string& prefix, ParameterStore& store);

  struct Saved {
    Tensor x;                      // block's normalised input [T, D]
    Tensor q_a, q_a_rstd, qr;      // [T, q_lora_rank]; qr also feeds the indexer
    Tensor kv_a, latent_rstd, c;   // [T, C], [T], [T, kv_lora_rank]
    Tensor q_THQ;                  // rotated
    Tensor k_rope_TR;              // rotated
    Tensor k_SHQ, v_SHV;           // dense and masked form
    Tensor q_absorbed_THC, kv_SC;  // sparse form
    Tensor ids_TK;                 // selected keys (sparse and masked form)
    AttentionResult core;          // o and lse of the core; o~ in the sparse form
    Tensor o_THV;                  // input of o_proj
    // Filled by BackwardInput for BackwardWeight:
    Tensor dout, dq, dq_a, dkv_a, dc, do_THV;
    Tensor dkv_b_out;        // dense: gradient of kv_b_proj's output
    Tensor dq_absorbed_THC;  // sparse
    Tensor target_TK;        // head-summed probabilities: what the indexer learns from
  };

  // The two halves of the forward: what precedes the choice of keys, and what follows it. `ids_TK`
  // is empty for kDense.
  void Project(const ModelContext& model, const Batch& batch, const Tensor& x, Saved& saved) const;
  Tensor Attend(const ModelContext& model, const Batch& batch, const Tensor& ids_TK,
                Saved& saved) const;
  // Only o and lse of dense attention, without o_proj: what the warm-up of the MTP indexer needs.
  void AttendForTarget(const ModelContext& model, const Batch& batch, Saved& saved) const;

  // Dense q, k and lse of a few query rows, whatever form of attention the stage uses (for
  // measuring selections).
  struct DenseRows {
    Tensor q_RHQ, k_SHQ, lse_RH;
  };
  DenseRows MakeDenseRows(const ModelContext& model, const Batch& batch, const Tensor& rows_R,
                          const KeyWindows& windows_R, const Saved& saved) const;

  Tensor BackwardInput(const ModelContext& model, const Batch& batch, const Tensor& dout,
                       Saved& saved) const;
  void BackwardWeight(const ModelContext& model, Saved& saved) const;
  // Frees what a later Expand makes again (selective recompute).
  void DropExpanded(Saved& saved) const;

 private:
  void Expand(const ModelContext& model, const Batch& batch, Saved& saved) const;
  Tensor RotatedQuery(const ModelContext& model, const Tensor& qr, const Tensor& positions_T) const;
  void ExpandKeys(const ModelContext& model, const Tensor& c, const Tensor& k_rope_TR,
                  Tensor& k_SHQ, Tensor& v_SHV) const;
  void RunCore(const ModelContext& model, const Batch& batch, Saved& saved) const;
  struct CoreGradients;
  CoreGradients BackwardDense(const ModelContext& model, const Batch& batch, Saved& saved) const;
  CoreGradients BackwardAbsorbed(const ModelContext& model, Saved& saved) const;
  MatrixView UpKey(const Tensor& kv_b) const;    // W_UK of each head [nope, kv_lora_rank]
  MatrixView UpValue(const Tensor& kv_b) const;  // W_UV of each head [V, kv_lora_rank]

  int64_t heads_, nope_, rope_, value_, latent_;
  int q_a_proj_, q_a_layernorm_, q_b_proj_, kv_a_proj_, kv_a_layernorm_, kv_b_proj_, o_proj_;
};

}  // namespace baleen
