// One microbatch on one rank: which rows it holds, and which keys they may see.
//
// The ranks of cp_tp share the sequences of a microbatch. Each sequence is cut in 2 P chunks (P
// ranks) and rank r holds chunks r and 2 P - 1 - r, "zigzag", so that the causal work of all ranks
// is equal. Legend: T rows of the microbatch, in the order of the sequences; R own rows, those of
// sequence 0 first; G = R * tp rows of the tensor-parallel group, in the order of its ranks: heads
// are split over the group, so attention's queries, embedding and head see the group's rows.
#pragma once

#include <vector>

#include "kernels/core/context.h"
#include "kernels/ops/attention/attention.h"

namespace baleen {

// Where a rank stands among those that share a microbatch.
struct RowShare {
  int cp_rank = 0, cp_size = 1;
  int tp_rank = 0, tp_size = 1;
  int rank() const { return cp_rank * tp_size + tp_rank; }
  int size() const { return cp_size * tp_size; }
};

// Rows of the microbatch that rank `rank` of `size` holds, in its order. A sequence must divide
// into 2 * size chunks (size 1: any).
std::vector<int32_t> ZigzagRows(int64_t num_sequences, int64_t seq_length, int rank, int size);

// Keys are rows of the microbatch (of T) everywhere: windows and selected ids mean the same on all
// ranks.
struct Batch {
  int64_t num_sequences = 0;
  int64_t seq_length = 0;
  int64_t number = 0;  // which microbatch of the step, over all ranks; for ChoiceReplay
  // Of the group's rows (all kI32):
  Tensor tokens_G;
  Tensor targets_G;      // -1: no loss
  Tensor mtp_tokens_G;   // token t+1, the MTP module's second input
  Tensor mtp_targets_G;  // token t+2, -1: no loss
  Tensor positions_G;    // RoPE position
  KeyWindows windows_G;  // keys a row may attend to: [document or sample begin, row + 1)
  // Of the own rows:
  Tensor row_R;  // which row of the microbatch
  Tensor positions_R;
  KeyWindows windows_R;
  Tensor sequence_R;  // which sequence of the microbatch
  // Between the order of ranks (all-gathered over cp_tp) and that of keys; empty on one rank.
  Tensor place_of_key_T;  // where row t stands when the ranks' rows lie one behind the other
  Tensor key_of_place_T;  // its inverse

  // The group's rows on the host, for what the host decides: rows to measure, controls, losses by
  // position.
  struct Host {
    std::vector<int32_t> row_G, position_G, key_begin_G, target_G;
    int64_t own_begin = 0;  // the own rows are own_begin .. own_begin + R - 1 of the group's
  } host;

  int64_t num_rows() const { return row_R.num_elements(); }           // R
  int64_t num_group_rows() const { return tokens_G.num_elements(); }  // G
  int64_t num_keys() const { return num_sequences * seq_length; }     // T
};

// kI32 on the context's device.
Tensor IntTensor(const Context& context, const std::vector<int32_t>& values);
// Windows with their host copies.
KeyWindows MakeKeyWindows(const Context& context, const std::vector<int32_t>& begins,
                          const std::vector<int32_t>& ends);

}  // namespace baleen
