#include "trainer/model/choice_replay.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/core/transfer.h"

namespace baleen {

Tensor ChoiceReplay::Choose(const Context& context, Kind kind, absl::string_view layer,
                            const Batch& batch, const Tensor& own_ids) {
  const bool experts = kind == Kind::kExperts;
  const std::string key = absl::StrCat(experts ? "experts of " : "keys of ", layer);
  Rows& kept = kept_[{key, batch.number}];
  if (mode_ == Mode::kRecord) kept.resize(batch.num_keys());
  CHECK_EQ(static_cast<int64_t>(kept.size()), batch.num_keys())
      << "replaying the " << key << ", microbatch " << batch.number << ", which were not recorded";

  const Tensor own = CopyToHost(context, own_ids);
  const int64_t rows = batch.num_rows(), width = own.dim(1);
  Count& count = counts_[static_cast<int>(kind)];
  std::vector<int32_t> given;
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t* const begin = own.data<int32_t>() + r * width;
    const int32_t row = batch.host.row_G[batch.host.own_begin + r];
    if (mode_ == Mode::kRecord) kept[row].assign(begin, begin + width);
    const std::vector<int32_t>& ids = kept[row];
    CHECK_EQ(static_cast<int64_t>(ids.size()), width) << key << ", row " << row;
    for (const int32_t* id = begin; id != begin + width; ++id) {
      if (*id < 0) continue;
      ++count.choices;
      if (std::find(ids.begin(), ids.end(), *id) == ids.end()) ++count.flipped;
    }
    given.insert(given.end(), ids.begin(), ids.end());
  }
  return mode_ == Mode::kReplay ? IntTensor(context, given).Reshaped(own_ids.shape()) : own_ids;
}

}  // namespace baleen
