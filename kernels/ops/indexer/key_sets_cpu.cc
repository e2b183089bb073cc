// Checks of windows and id lists: a wrong key is the programmer's fault, named with its row.
#include "kernels/ops/indexer/key_sets_cpu.h"

#include <vector>

namespace baleen {

void CheckKeyWindows(const char* op, const KeyWindows& windows, int64_t num_keys) {
  const int32_t* begin_T = windows.begin_T.data<int32_t>();
  const int32_t* end_T = windows.end_T.data<int32_t>();
  for (int64_t t = 0; t < windows.begin_T.num_elements(); ++t) {
    CHECK(0 <= begin_T[t] && begin_T[t] <= end_T[t] && end_T[t] <= num_keys)
        << op << ": row " << t << " has the key window [" << begin_T[t] << ", " << end_T[t]
        << ") of " << num_keys << " keys";
  }
}

void CheckKeyIds(const char* op, const Tensor& ids_TK, int64_t num_keys) {
  const int32_t* ids = ids_TK.data<int32_t>();
  const int64_t num_slots = ids_TK.dim(1);
  std::vector<int64_t> last_row_with_key(num_keys, -1);
  for (int64_t t = 0; t < ids_TK.dim(0); ++t) {
    for (int64_t i = 0; i < num_slots; ++i) {
      const int64_t s = ids[t * num_slots + i];
      if (s == -1) continue;
      CHECK(s >= 0 && s < num_keys)
          << op << ": row " << t << " names key " << s << " of " << num_keys << " keys";
      CHECK_NE(last_row_with_key[s], t) << op << ": row " << t << " names key " << s << " twice";
      last_row_with_key[s] = t;
    }
  }
}

}  // namespace baleen
