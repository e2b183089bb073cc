#include "parallel/communicator.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"

namespace baleen {

class Communicator::Entry {
 public:
  Entry(Communicator& communicator, const char* operation, absl::string_view label, int64_t bytes)
      : record_(communicator.ring_[communicator.sequence_++ % kRing]) {
    record_ = Record{operation, std::string(label), bytes, false};
  }
  ~Entry() { record_.done = true; }

 private:
  Record& record_;
};

void Communicator::AllReduce(absl::string_view label, const Tensor& tensor, ReduceOp op) {
  const Entry entry(*this, "AllReduce", label, tensor.bytes());
  if (size_ > 1 && tensor.num_elements() > 0) DoAllReduce(tensor, op);
}

void Communicator::CheckParts(absl::string_view label, const Tensor& part,
                              const Tensor& whole) const {
  CHECK_EQ(part.num_elements() * size_, whole.num_elements()) << name_ << " " << std::string(label);
  CHECK(part.dtype() == whole.dtype()) << std::string(label);
}

void Communicator::AllGather(absl::string_view label, const Tensor& part, const Tensor& whole) {
  CheckParts(label, part, whole);
  const Entry entry(*this, "AllGather", label, whole.bytes());
  if (whole.num_elements() > 0) DoAllGather(part, whole);
}

uint64_t Communicator::BeginAllGather(absl::string_view label, const Tensor& part,
                                      const Tensor& whole) {
  CheckParts(label, part, whole);
  const Entry entry(*this, "AllGather", label, whole.bytes());
  if (whole.num_elements() > 0) DoBeginAllGather(part, whole);
  return current_call();
}

void Communicator::ReduceScatter(absl::string_view label, const Tensor& whole, const Tensor& part) {
  CheckParts(label, part, whole);
  const Entry entry(*this, "ReduceScatter", label, whole.bytes());
  if (whole.num_elements() > 0) DoReduceScatter(whole, part);
}

void Communicator::CheckCounts(absl::string_view label, const Tensor& send,
                               const std::vector<int64_t>& send_counts, const Tensor& recv,
                               const std::vector<int64_t>& recv_counts) const {
  CHECK(static_cast<int>(send_counts.size()) == size_ &&
        static_cast<int>(recv_counts.size()) == size_)
      << name_ << " " << std::string(label);
  int64_t sent = 0, received = 0;
  for (int r = 0; r < size_; ++r) {
    CHECK(send_counts[r] >= 0 && recv_counts[r] >= 0) << std::string(label) << " rank " << r;
    sent += send_counts[r];
    received += recv_counts[r];
  }
  CHECK_EQ(sent, send.num_elements()) << std::string(label);
  CHECK_EQ(received, recv.num_elements()) << std::string(label);
}

void Communicator::AllToAllV(absl::string_view label, const Tensor& send,
                             const std::vector<int64_t>& send_counts, const Tensor& recv,
                             const std::vector<int64_t>& recv_counts) {
  CheckCounts(label, send, send_counts, recv, recv_counts);
  const Entry entry(*this, "AllToAllV", label, send.bytes());
  DoAllToAllV(send, send_counts, recv, recv_counts);
}

uint64_t Communicator::BeginAllToAllV(absl::string_view label, const Tensor& send,
                                      const std::vector<int64_t>& send_counts, const Tensor& recv,
                                      const std::vector<int64_t>& recv_counts) {
  CheckCounts(label, send, send_counts, recv, recv_counts);
  const Entry entry(*this, "AllToAllV", label, send.bytes());
  DoBeginAllToAllV(send, send_counts, recv, recv_counts);
  return current_call();
}

void Communicator::Broadcast(absl::string_view label, const Tensor& tensor, int root) {
  CHECK(root >= 0 && root < size_) << std::string(label) << " root " << root;
  const Entry entry(*this, "Broadcast", label, tensor.bytes());
  if (size_ > 1 && tensor.num_elements() > 0) DoBroadcast(tensor, root);
}

void Communicator::Send(absl::string_view label, const Tensor& tensor, int to) {
  CHECK(to >= 0 && to < size_ && to != rank_) << std::string(label) << " to " << to;
  const Entry entry(*this, "Send", label, tensor.bytes());
  DoSend(tensor, to);
}

void Communicator::Recv(absl::string_view label, const Tensor& tensor, int from) {
  CHECK(from >= 0 && from < size_ && from != rank_) << std::string(label) << " from " << from;
  const Entry entry(*this, "Recv", label, tensor.bytes());
  DoRecv(tensor, from);
}

void Communicator::Barrier(absl::string_view label) {
  const Entry entry(*this, "Barrier", label, 0);
  if (size_ > 1) DoBarrier();
}

std::string Communicator::FlightRecord(uint64_t most) const {
  std::string text;
  const uint64_t count = std::min<uint64_t>({most, kRing, sequence_});
  const uint64_t first = sequence_ - count;
  for (uint64_t n = first; n < sequence_; ++n) {
    const Record& record = ring_[n % kRing];
    absl::StrAppend(&text, name_, "[", rank_, "/", size_, "] #", n, " ", record.operation, " ",
                    record.label, " ", record.bytes, " bytes ",
                    record.done && IsCallDone(n) ? "done" : "UNDER WAY", "\n");
  }
  return text;
}

namespace {

class SelfCommunicator : public Communicator {
 public:
  explicit SelfCommunicator(std::string name) : Communicator(0, 1, std::move(name)) {}
  std::unique_ptr<Communicator> Split(int, int, std::string name) override {
    return MakeSelfCommunicator(std::move(name));
  }

 protected:
  void DoAllReduce(const Tensor&, ReduceOp) override {}
  void DoAllGather(const Tensor& part, const Tensor& whole) override { CopyBytes(part, whole); }
  void DoReduceScatter(const Tensor& whole, const Tensor& part) override { CopyBytes(whole, part); }
  void DoAllToAllV(const Tensor& send, const std::vector<int64_t>&, const Tensor& recv,
                   const std::vector<int64_t>&) override {
    CopyBytes(send, recv);
  }
  void DoBroadcast(const Tensor&, int) override {}
  void DoSend(const Tensor&, int) override {}
  void DoRecv(const Tensor&, int) override {}
  void DoBarrier() override {}

 private:
  static void CopyBytes(const Tensor& from, const Tensor& to) {
    CHECK(from.device().kind == DeviceKind::kCpu) << "SelfCommunicator copies host memory only";
    if (from.raw() != to.raw()) std::memmove(to.raw(), from.raw(), from.bytes());
  }
};

}  // namespace

std::unique_ptr<Communicator> MakeSelfCommunicator(std::string name) {
  return std::make_unique<SelfCommunicator>(std::move(name));
}

}  // namespace baleen
