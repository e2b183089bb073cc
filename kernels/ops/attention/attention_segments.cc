#include "kernels/ops/attention/attention_segments.h"

#include <algorithm>

namespace baleen {
namespace {

constexpr int64_t kRowTile = 64, kKeyTile = 128;  // to which the library rounds dS

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t value, int64_t unit) { return CeilDiv(value, unit) * unit; }

// Of dS, one head.
int64_t BytesOfRow(int64_t num_keys) { return 2 * RoundUp(num_keys, kKeyTile); }

// The row behind the longest causal run that begins at `row`.
int64_t EndOfRun(const int32_t* begin_T, const int32_t* end_T, int64_t num_rows, int64_t row) {
  if (begin_T[row] == end_T[row]) return row + 1;
  int64_t end = row + 1;
  while (end < num_rows && begin_T[end] == begin_T[row] && end_T[end] == end_T[end - 1] + 1) ++end;
  return end;
}

}  // namespace

std::vector<AttentionSegment> SplitIntoSegments(const int32_t* begin_T, const int32_t* end_T,
                                                int64_t num_rows) {
  using Kind = AttentionSegment::Kind;
  std::vector<AttentionSegment> segments;
  for (int64_t row = 0; row < num_rows;) {
    const int64_t end = EndOfRun(begin_T, end_T, num_rows, row);
    if (end - row >= kMinCausalRows) {
      segments.push_back({Kind::kCausal, row, end, begin_T[row], end_T[end - 1]});
    } else if (!segments.empty() && segments.back().kind == Kind::kGeneral) {
      segments.back().row_end = end;
    } else {
      segments.push_back({Kind::kGeneral, row, end, 0, 0});
    }
    row = end;
  }
  return segments;
}

int64_t BackwardRowsPerCall(int64_t num_rows, int64_t num_keys, int64_t budget_bytes) {
  const int64_t fitting =
      std::max(kRowTile, budget_bytes / BytesOfRow(num_keys) / kRowTile * kRowTile);
  // Calls of equal size: the last one has the same plan, or nearly as much to do.
  const int64_t calls = CeilDiv(num_rows, fitting);
  return std::min(num_rows, RoundUp(CeilDiv(num_rows, calls), kRowTile));
}

int64_t BackwardHeadsPerCall(int64_t num_rows, int64_t num_keys, int64_t num_heads,
                             int64_t budget_bytes) {
  const int64_t head_bytes = BytesOfRow(num_keys) * RoundUp(num_rows, kRowTile);
  const int64_t fitting = std::clamp<int64_t>(budget_bytes / head_bytes, 1, num_heads);
  return CeilDiv(num_heads, CeilDiv(num_heads, fitting));
}

AttentionSegment RowsOf(const AttentionSegment& causal, int64_t begin, int64_t end) {
  AttentionSegment part = causal;
  part.row_begin = causal.row_begin + begin;
  part.row_end = causal.row_begin + end;
  part.key_end = causal.key_end - (causal.num_rows() - end);
  return part;
}

std::vector<BackwardCall> BackwardCalls(const AttentionSegment& causal, int64_t num_heads,
                                        int64_t budget_bytes) {
  std::vector<BackwardCall> calls;
  const auto add = [&](BackwardCall call) {
    if (call.keys == 0) return;
    const int64_t most_heads = BackwardHeadsPerCall(call.rows, call.keys, num_heads, budget_bytes);
    for (call.head = 0; call.head < num_heads; call.head += most_heads) {
      call.heads = std::min(most_heads, num_heads - call.head);
      calls.push_back(call);
    }
  };
  const int64_t most_rows = BackwardRowsPerCall(causal.num_rows(), causal.num_keys(), budget_bytes);
  for (int64_t begin = 0; begin < causal.num_rows(); begin += most_rows) {
    const AttentionSegment part =
        RowsOf(causal, begin, std::min(causal.num_rows(), begin + most_rows));
    const int64_t before = part.num_keys() - part.num_rows();  // keys that all of the rows see
    BackwardCall call{
        .row = part.row_begin, .key = part.key_begin, .rows = part.num_rows(), .keys = before};
    add(call);
    call.triangle = true;
    call.key += before;
    call.keys = part.num_rows();
    call.adds_to_dq = before > 0;
    add(call);
  }
  return calls;
}

BackwardScratch ScratchOf(const std::vector<BackwardCall>& calls, int64_t q_dim, int64_t v_dim) {
  BackwardScratch scratch;
  for (const BackwardCall& call : calls) {
    const int64_t keys = call.keys * call.heads, rows = call.rows * call.heads;
    scratch.dk_elements = std::max(scratch.dk_elements, keys * q_dim);
    scratch.dv_elements = std::max(scratch.dv_elements, keys * v_dim);
    scratch.dq_elements = std::max(scratch.dq_elements, rows * q_dim);
    scratch.lse_elements = std::max(scratch.lse_elements, rows);
    scratch.library_bytes = std::max(
        scratch.library_bytes, BytesOfRow(call.keys) * RoundUp(call.rows, kRowTile) * call.heads);
  }
  return scratch;
}

}  // namespace baleen
