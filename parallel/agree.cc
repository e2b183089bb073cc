#include "parallel/agree.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "kernels/core/context.h"

namespace baleen {
namespace {

Tensor HostTensor(DType dtype, int64_t count) { return Context::Cpu().Zeros(dtype, {count}); }

// "rank 3: ..." of an Agree before: the outer one would name its own lowest rank in front.
bool NamesItsRank(absl::string_view message) {
  constexpr absl::string_view kWord = "rank ";
  if (!absl::StartsWith(message, kWord)) return false;
  const size_t colon = message.find(':');
  const absl::string_view number = message.substr(0, colon).substr(kWord.size());
  return colon != absl::string_view::npos && !number.empty() &&
         std::all_of(number.begin(), number.end(), absl::ascii_isdigit);
}

}  // namespace

std::string BroadcastString(Communicator& communicator, absl::string_view label,
                            const std::string& text, int root) {
  const Tensor length = HostTensor(DType::kI64, 1);
  length.data<int64_t>()[0] = static_cast<int64_t>(text.size());
  communicator.Broadcast(label, length, root);
  const Tensor bytes = HostTensor(DType::kU8, length.data<int64_t>()[0]);
  if (communicator.rank() == root) std::memcpy(bytes.raw(), text.data(), text.size());
  communicator.Broadcast(label, bytes, root);
  return std::string(static_cast<const char*>(bytes.raw()), bytes.num_elements());
}

std::vector<std::string> AllGatherStrings(Communicator& communicator, absl::string_view label,
                                          const std::string& text) {
  const int size = communicator.size();
  const Tensor length = HostTensor(DType::kI64, 1);
  const Tensor lengths = HostTensor(DType::kI64, size);
  length.data<int64_t>()[0] = static_cast<int64_t>(text.size());
  communicator.AllGather(label, length, lengths);
  std::vector<int64_t> recv_counts(lengths.data<int64_t>(), lengths.data<int64_t>() + size);
  int64_t total = 0;
  for (int64_t count : recv_counts) total += count;
  const int64_t own = static_cast<int64_t>(text.size());
  const Tensor send = HostTensor(DType::kU8, own * size);
  for (int r = 0; r < size; ++r) {
    std::memcpy(static_cast<char*>(send.raw()) + r * own, text.data(), text.size());
  }
  const Tensor recv = HostTensor(DType::kU8, total);
  communicator.AllToAllV(label, send, std::vector<int64_t>(size, own), recv, recv_counts);
  std::vector<std::string> texts;
  const char* cursor = static_cast<const char*>(recv.raw());
  for (int64_t count : recv_counts) {
    texts.emplace_back(cursor, count);
    cursor += count;
  }
  return texts;
}

absl::Status Agree(Communicator& communicator, const absl::Status& status) {
  const int size = communicator.size();
  if (size == 1) return status;
  // The lowest failing rank, as a maximum: size - rank where it failed, 0 where it did not.
  const Tensor failed = HostTensor(DType::kI32, 1);
  failed.data<int32_t>()[0] = status.ok() ? 0 : size - communicator.rank();
  communicator.AllReduce("agree", failed, ReduceOp::kMax);
  if (failed.data<int32_t>()[0] == 0) return absl::OkStatus();
  const int root = size - failed.data<int32_t>()[0];
  const Tensor code = HostTensor(DType::kI32, 1);
  code.data<int32_t>()[0] = static_cast<int32_t>(status.code());
  communicator.Broadcast("agree", code, root);
  const std::string message =
      BroadcastString(communicator, "agree", std::string(status.message()), root);
  return absl::Status(static_cast<absl::StatusCode>(code.data<int32_t>()[0]),
                      NamesItsRank(message) ? message : absl::StrCat("rank ", root, ": ", message));
}

}  // namespace baleen
