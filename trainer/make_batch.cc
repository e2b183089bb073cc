#include "trainer/make_batch.h"

namespace baleen {
namespace {

std::vector<int32_t> Pick(const std::vector<int32_t>& values, const std::vector<int32_t>& rows) {
  std::vector<int32_t> picked;
  picked.reserve(rows.size());
  for (const int32_t row : rows) picked.push_back(values[row]);
  return picked;
}

}  // namespace

Batch MakeBatch(const Context& context, const Microbatch& microbatch, const RowShare& share) {
  Batch batch;
  batch.num_sequences = microbatch.num_samples;
  batch.seq_length = microbatch.seq_length;
  const auto rows_of = [&](int rank) {
    return ZigzagRows(microbatch.num_samples, microbatch.seq_length, rank, share.size());
  };
  std::vector<int32_t> group;
  for (int tp = 0; tp < share.tp_size; ++tp) {
    const std::vector<int32_t> rows = rows_of(share.cp_rank * share.tp_size + tp);
    group.insert(group.end(), rows.begin(), rows.end());
  }
  std::vector<int32_t> ends, sequences;
  for (const int32_t row : group) {
    ends.push_back(row + 1);
    sequences.push_back(static_cast<int32_t>(row / microbatch.seq_length));
  }
  batch.host = {.row_G = group,
                .position_G = Pick(microbatch.positions, group),
                .key_begin_G = Pick(microbatch.key_begin, group),
                .target_G = Pick(microbatch.targets, group)};
  batch.tokens_G = IntTensor(context, Pick(microbatch.tokens, group));
  batch.targets_G = IntTensor(context, batch.host.target_G);
  batch.mtp_tokens_G = IntTensor(context, Pick(microbatch.mtp_tokens, group));
  batch.mtp_targets_G = IntTensor(context, Pick(microbatch.mtp_targets, group));
  batch.positions_G = IntTensor(context, batch.host.position_G);
  batch.windows_G = MakeKeyWindows(context, batch.host.key_begin_G, ends);

  const int64_t rows = static_cast<int64_t>(group.size()) / share.tp_size;
  const int64_t begin = share.tp_rank * rows;
  batch.host.own_begin = begin;
  const auto own = [&](const Tensor& of_group) { return of_group.Rows(begin, begin + rows); };
  batch.row_R = own(IntTensor(context, group));
  batch.sequence_R = own(IntTensor(context, sequences));
  batch.positions_R = own(batch.positions_G);
  batch.windows_R = batch.windows_G.Rows(begin, begin + rows);
  if (share.size() == 1) return batch;

  std::vector<int32_t> key_of_place;
  for (int rank = 0; rank < share.size(); ++rank) {
    const std::vector<int32_t> of_rank = rows_of(rank);
    key_of_place.insert(key_of_place.end(), of_rank.begin(), of_rank.end());
  }
  std::vector<int32_t> place_of_key(key_of_place.size());
  for (size_t place = 0; place < key_of_place.size(); ++place) {
    place_of_key[key_of_place[place]] = static_cast<int32_t>(place);
  }
  batch.key_of_place_T = IntTensor(context, key_of_place);
  batch.place_of_key_T = IntTensor(context, place_of_key);
  return batch;
}

}  // namespace baleen
