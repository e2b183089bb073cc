// Multi-head latent attention (DeepSeek-V2 report 2.1.2), dense or over selected keys.
//
//   q_a = W_qa x;  qr = norm(q_a);  q = W_qb qr = [nope | rope] per head;  kv_a = W_kva x = [latent
//   | rope];  c = norm(latent) dense:  [k_nope | v] = W_kvb c per head, k = [k_nope | k_rope]
//   sparse: q~ = [W_UK^T q_nope | q_rope], keys are rows [c | k_rope], o = W_UV o~   (W_kvb = per
//   head W_UK over W_UV) y = W_o o
// Over ranks: the latents are of the own rows; qr is gathered over tp, because the rank's heads
// serve the whole group's rows; [c | k_rope] is gathered over cp x tp, because rows attend to all
// keys. Both are gathered again in the backward, where their gradients, partial sums over heads and
// rows, are reduce-scattered. The core runs over chunks of query rows: only key-side tensors live
// for the whole sequence. Legend: R own rows, G rows of the tp group, T keys (batch.h), H own
// heads, Q = nope + rope, V value dim, C = kv_lora_rank + rope, K selected keys.
#pragma once

#include "kernels/ops/attention/sparse_attention.h"
#include "kernels/ops/rms_norm.h"
#include "trainer/model/model_context.h"

namespace baleen {

class Mla {
 public:
  // Declares the weights of `prefix`.self_attn, e.g. prefix "model.layers.3".
  Mla(const ModelConfig& config, const std::string& prefix, const Placement& placement,
      ParameterStore& store);

  // One chunk of the group's query rows in the core.
  struct Chunk {
    int64_t begin = 0, end = 0;
    Tensor q_THQ;           // rotated
    Tensor q_absorbed_THC;  // sparse form
    AttentionResult core;   // o and lse of the core; o~ in the sparse form
    // Filled by BackwardInput for BackwardWeight:
    Tensor do_THV, dq_THQ;
    Tensor dq_absorbed_THC;  // sparse form
  };

  struct Saved {
    Tensor x_RD;                              // block's normalised input
    Tensor q_a, q_a_rstd, qr_R;               // [R, q_lora_rank]; qr also feeds the indexer
    Tensor kv_a, latent_rstd, c_R, k_rope_R;  // [R, C], [R], [R, kv_lora_rank], rotated
    Tensor ids_RK;                            // selected keys (sparse and masked form)
    Tensor qr_G, ids_GK;                      // gathered
    Tensor c_T, k_rope_T;                     // gathered, dense and masked form
    Tensor kv_TC;                             // gathered, sparse form
    Tensor k_THQ, v_THV;                      // dense and masked form
    std::vector<Chunk> chunks;
    Tensor o_GHV;  // input of o_proj
    // Filled by BackwardInput for BackwardWeight:
    Tensor dout_GD, dqr_R, dq_a, dkv_a, dc_R;
    Tensor dkv_b_out;  // dense: gradient of kv_b_proj's output [T, H (nope + V)]
    Tensor target_RK;  // head-summed probabilities: what the indexer learns from
  };

  // The two halves of the forward: what precedes the choice of keys, and what follows it. `ids_RK`
  // is empty for kDense.
  void Project(const ModelContext& model, const Batch& batch, const Tensor& x_RD,
               Saved& saved) const;
  Tensor Attend(const ModelContext& model, const Batch& batch, const Tensor& ids_RK,
                Saved& saved) const;
  // Instead of Attend where nobody needs its output again: what BackwardInput takes, with no chunk
  // run yet. The backward runs each of them as it comes to it.
  void Prepare(const ModelContext& model, const Batch& batch, const Tensor& ids_RK,
               Saved& saved) const;
  // Only the core of dense attention, without o_proj: what the warm-up of the MTP indexer needs.
  void AttendForTarget(const ModelContext& model, const Batch& batch, Saved& saved) const;

  // Dense q, k and lse of a few of the group's query rows with the rank's heads, whatever form of
  // attention the stage uses (for measuring selections). rows_S are places among the group's rows.
  struct DenseRows {
    Tensor q_SHQ, k_THQ, lse_SH;
  };
  DenseRows MakeDenseRows(const ModelContext& model, const Batch& batch, const Tensor& rows_S,
                          const Tensor& positions_S, const KeyWindows& windows_S,
                          const Saved& saved) const;

  Tensor BackwardInput(const ModelContext& model, const Batch& batch, const Tensor& dout_RD,
                       Saved& saved) const;
  void BackwardWeight(const ModelContext& model, Saved& saved) const;
  // Frees what the backward makes again (selective recompute).
  void DropExpanded(Saved& saved) const;

 private:
  void GatherLatents(const ModelContext& model, const Batch& batch, Saved& saved) const;
  void ExpandQuery(const ModelContext& model, const Batch& batch, const Saved& saved,
                   Chunk& chunk) const;
  Tensor RotatedQuery(const ModelContext& model, const Tensor& qr, const Tensor& positions) const;
  void ExpandKeys(const ModelContext& model, const Tensor& c_T, const Tensor& k_rope_T,
                  Tensor& k_THQ, Tensor& v_THV) const;
  void MakeChunks(const ModelContext& model, const Batch& batch, Saved& saved) const;
  void RunCore(const ModelContext& model, const Batch& batch, Saved& saved) const;
  static void DropQuery(Chunk& chunk);
  void RunChunk(const ModelContext& model, const Batch& batch, Saved& saved, Chunk& chunk) const;
  // Gradients of the keys, summed over chunks; dk and dv in the dense forms, dkv_TC in the sparse.
  struct KeyGradients;
  void BackwardChunk(const ModelContext& model, const Batch& batch, Saved& saved, Chunk& chunk,
                     const Tensor& target_TK, KeyGradients& keys) const;
  void BackwardDenseCore(const ModelContext& model, const Batch& batch, Saved& saved, Chunk& chunk,
                         const Tensor& target_TK, KeyGradients& keys) const;
  void BackwardAbsorbedCore(const ModelContext& model, Saved& saved, Chunk& chunk,
                            const Tensor& target_TK, KeyGradients& keys) const;
  Tensor JoinKeyGradients(const ModelContext& model, KeyGradients& keys, Saved& saved) const;
  static bool WeightsWait(const ModelContext& model, const Saved& saved);
  void ChunkWeights(const ModelContext& model, const Saved& saved, const Chunk& chunk) const;
  MatrixView UpKey(const Tensor& kv_b) const;    // W_UK of each head [nope, kv_lora_rank]
  MatrixView UpValue(const Tensor& kv_b) const;  // W_UV of each head [V, kv_lora_rank]

  std::string label_;
  int64_t heads_, nope_, rope_, value_, latent_;
  int q_a_proj_, q_a_layernorm_, q_b_proj_, kv_a_proj_, kv_a_layernorm_, kv_b_proj_, o_proj_;
};

}  // namespace baleen
