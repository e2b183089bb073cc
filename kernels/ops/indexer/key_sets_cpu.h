// Which keys a query row sees, as the CPU definitions walk them: a window, or a list of ids.
//
// Both kinds answer the same two questions, so that dense and masked attention are one piece of
// code:
//   Union(first, last)   the smallest key range that holds the keys of rows [first, last)
//   ForEach(row, visit)  visit(slot, key) for the row's keys; slot counts within the window or the
//   list
#pragma once

#include <algorithm>

#include "kernels/core/check.h"
#include "kernels/ops/attention/attention.h"

namespace baleen {

struct KeyRange {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
};

// CHECKs 0 <= begin <= end <= num_keys in every row.
void CheckKeyWindows(const char* op, const KeyWindows& windows, int64_t num_keys);

// Query rows times the keys they see: what the work of a dry call is counted from (windows come
// from the batch, they are known then too).
inline double CountPairs(const KeyWindows& windows) {
  const int32_t* begin_T = windows.begin_T.data<int32_t>();
  const int32_t* end_T = windows.end_T.data<int32_t>();
  int64_t pairs = 0;
  for (int64_t t = 0; t < windows.begin_T.num_elements(); ++t) pairs += end_T[t] - begin_T[t];
  return static_cast<double>(pairs);
}

// CHECKs that each id is -1 or in [0, num_keys), and that no row names a key twice.
void CheckKeyIds(const char* op, const Tensor& ids_TK, int64_t num_keys);

class WindowKeys {
 public:
  WindowKeys(const char* op, const KeyWindows& windows, int64_t num_keys)
      : begin_T_(windows.begin_T.data<int32_t>()), end_T_(windows.end_T.data<int32_t>()) {
    CheckKeyWindows(op, windows, num_keys);
  }

  KeyRange Row(int64_t row) const { return {begin_T_[row], end_T_[row]}; }

  KeyRange Union(int64_t first, int64_t last) const {
    KeyRange range;
    for (int64_t row = first; row < last; ++row) {
      const KeyRange own = Row(row);
      if (own.size() == 0) continue;
      if (range.size() == 0) range = own;
      range = {std::min(range.begin, own.begin), std::max(range.end, own.end)};
    }
    return range;
  }

  template <typename Visit>
  void ForEach(int64_t row, Visit visit) const {
    for (int64_t s = begin_T_[row]; s < end_T_[row]; ++s) visit(s - begin_T_[row], s);
  }

 private:
  const int32_t* begin_T_;
  const int32_t* end_T_;
};

class ListedKeys {
 public:
  ListedKeys(const char* op, const Tensor& ids_TK, int64_t num_keys)
      : ids_TK_(ids_TK.data<int32_t>()), num_slots_(ids_TK.dim(1)) {
    CheckKeyIds(op, ids_TK, num_keys);
  }

  KeyRange Union(int64_t first, int64_t last) const {
    KeyRange range;
    for (int64_t row = first; row < last; ++row) {
      ForEach(row, [&](int64_t, int64_t s) {
        if (range.size() == 0) range = {s, s + 1};
        range = {std::min(range.begin, s), std::max(range.end, s + 1)};
      });
    }
    return range;
  }

  template <typename Visit>
  void ForEach(int64_t row, Visit visit) const {
    const int32_t* ids = ids_TK_ + row * num_slots_;
    for (int64_t i = 0; i < num_slots_; ++i) {
      if (ids[i] >= 0) visit(i, static_cast<int64_t>(ids[i]));
    }
  }

 private:
  const int32_t* ids_TK_;
  int64_t num_slots_;
};

// A [rows, cols] matrix at the beginning of a scratch tensor.
inline MatrixView ScratchMatrix(const Tensor& scratch, int64_t rows, int64_t cols) {
  CHECK_LE(rows * cols, scratch.num_elements());
  MatrixView view = AsMatrix(scratch.Flat(0, rows * cols).Reshaped({rows, cols}));
  view.rows = rows;  // also where there is no column
  return view;
}

// One of the view's matrices.
inline MatrixView OneOfBatch(MatrixView view, int64_t index) {
  CHECK(index >= 0 && index < view.batch) << index << " of " << view.batch;
  view.offset += index * view.batch_stride;
  view.batch = 1;
  return view;
}

}  // namespace baleen
