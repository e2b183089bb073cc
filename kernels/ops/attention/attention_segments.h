// Which rows of an attention call go to the library's fused kernels: pure functions of host values.
//
// A causal segment is rows [row_begin, row_end) that see keys from one key_begin on, each row one
// key more than the row before, the last one all up to key_end: a document, a chunk of its rows, or
// a rank's share of them under context parallelism. As a rectangle of rows and keys its mask is the
// triangle aligned to the bottom right. What lies between segments is general.
#pragma once

#include <cstdint>
#include <vector>

namespace baleen {

struct AttentionSegment {
  enum class Kind : uint8_t { kCausal, kGeneral };
  Kind kind = Kind::kGeneral;
  int64_t row_begin = 0, row_end = 0;
  int64_t key_begin = 0, key_end = 0;  // of a causal segment

  int64_t num_rows() const { return row_end - row_begin; }
  int64_t num_keys() const { return key_end - key_begin; }
  bool operator==(const AttentionSegment& other) const {
    return kind == other.kind && row_begin == other.row_begin && row_end == other.row_end &&
           key_begin == other.key_begin && key_end == other.key_end;
  }
};

// Measured on an H100, 128 heads 192/128: the library is faster from 128 rows on (forward and
// backward 0.11 against 0.33 ms; of 512 rows 0.36 against 2.7 ms), but each new pair of rows and
// keys costs the host about 0.1 s of plans, which 60 layers of a document win back at some 300
// rows.
inline constexpr int64_t kMinCausalRows = 256;

// The segments of all rows, ascending; causal ones have kMinCausalRows rows or more.
std::vector<AttentionSegment> SplitIntoSegments(const int32_t* begin_T, const int32_t* end_T,
                                                int64_t num_rows);

// The library's deterministic algorithm on sm_90 keeps dS of all rows, keys and heads of a backward
// call in bf16: so many rows, and so many heads of a block of rows and keys, go in one call of at
// most `budget_bytes`. At least 64 rows of one head do.
int64_t BackwardRowsPerCall(int64_t num_rows, int64_t num_keys, int64_t budget_bytes);
int64_t BackwardHeadsPerCall(int64_t num_rows, int64_t num_keys, int64_t num_heads,
                             int64_t budget_bytes);

// Rows [begin, end) of a causal segment, counted from its first one.
AttentionSegment RowsOf(const AttentionSegment& causal, int64_t begin, int64_t end);

// One call of the library in a segment's backward: a block of rows, keys and heads, of which the
// mask is none (the keys that all of the rows see) or the triangle of a square.
struct BackwardCall {
  bool triangle = false;
  int64_t row = 0, key = 0, head = 0;     // where the block begins
  int64_t rows = 0, keys = 0, heads = 0;  // its extents
  bool adds_to_dq = false;                // the rows' dq was begun by another call
};
std::vector<BackwardCall> BackwardCalls(const AttentionSegment& causal, int64_t num_heads,
                                        int64_t budget_bytes);

// What those calls need at once beside their operands: dk, dv and dq of one of them in bf16, its
// lse, and dS, which the library keeps.
struct BackwardScratch {
  int64_t dk_elements = 0, dv_elements = 0, dq_elements = 0, lse_elements = 0;
  int64_t library_bytes = 0;
};
BackwardScratch ScratchOf(const std::vector<BackwardCall>& calls, int64_t q_dim, int64_t v_dim);

}  // namespace baleen
