#include "parallel/pretend_communicator.h"

#include <algorithm>
#include <cstring>

#include "kernels/core/check.h"

namespace baleen {
namespace {

bool IsFilled(const Tensor& tensor) {
  if (tensor.dtype() == DType::kI64) return true;
  const int64_t most = tensor.dtype() == DType::kI32 ? int64_t{8} << 20 : int64_t{64} << 10;
  return tensor.bytes() <= most;
}

template <typename T>
void ScaleElements(const Tensor& tensor, int factor) {
  T* const data = tensor.data<T>();
  for (int64_t i = 0; i < tensor.num_elements(); ++i) data[i] *= static_cast<T>(factor);
}

// The sum of `factor` equal tensors.
void Multiply(const Tensor& tensor, int factor) {
  switch (tensor.dtype()) {
    case DType::kF32:
      return ScaleElements<float>(tensor, factor);
    case DType::kF64:
      return ScaleElements<double>(tensor, factor);
    case DType::kI32:
      return ScaleElements<int32_t>(tensor, factor);
    case DType::kI64:
      return ScaleElements<int64_t>(tensor, factor);
    default:
      return;  // nothing the host reads
  }
}

class PretendCommunicator : public Communicator {
 public:
  PretendCommunicator(int rank, int size, std::string name, CommunicationLog* log)
      : Communicator(rank, size, std::move(name)), log_(log) {
    CHECK(size >= 1 && rank >= 0 && rank < size) << this->name() << ": " << rank << " of " << size;
    CHECK(log != nullptr) << this->name();
  }

  std::unique_ptr<Communicator> Split(int, int, std::string part) override {
    CHECK(false) << "splitting the pretended " << name() << " into " << part
                 << ": make it with MakePretendCommunicator";
    __builtin_unreachable();
  }

 protected:
  void DoAllReduce(const Tensor& tensor, ReduceOp op) override {
    // Cut into `size` ranges, the longest ones leave most often.
    const int64_t range = (tensor.num_elements() + size() - 1) / size();
    Count("AllReduce", 2 * (size() - 1) * range * DTypeBytes(tensor.dtype()));
    if (op == ReduceOp::kSum && IsFilled(tensor)) Multiply(tensor, size());
  }

  void DoAllGather(const Tensor& part, const Tensor& whole) override {
    Count("AllGather", (size() - 1) * part.bytes());
    if (!IsFilled(whole)) return;
    const Tensor own = whole.Flat(rank() * part.num_elements(), part.num_elements());
    if (own.raw() != part.raw()) std::memcpy(own.raw(), part.raw(), part.bytes());
    for (int r = 0; r < size(); ++r) {
      if (r == rank()) continue;
      std::memcpy(whole.Flat(r * part.num_elements(), part.num_elements()).raw(), own.raw(),
                  part.bytes());
    }
  }

  void DoReduceScatter(const Tensor& whole, const Tensor& part) override {
    Count("ReduceScatter", (size() - 1) * part.bytes());
    if (!IsFilled(whole)) return;
    const Tensor own = whole.Flat(rank() * part.num_elements(), part.num_elements());
    if (own.raw() != part.raw()) std::memcpy(part.raw(), own.raw(), part.bytes());
    Multiply(part, size());
  }

  void DoAllToAllV(const Tensor& send, const std::vector<int64_t>& send_counts, const Tensor& recv,
                   const std::vector<int64_t>& recv_counts) override {
    const int64_t element = DTypeBytes(send.dtype());
    Count("AllToAllV", send.bytes() - send_counts[rank()] * element);
    if (!IsFilled(send) || !IsFilled(recv)) return;
    int64_t own_begin = 0;
    for (int r = 0; r < rank(); ++r) own_begin += send_counts[r];
    const char* const own = static_cast<const char*>(send.raw()) + own_begin * element;
    char* target = static_cast<char*>(recv.raw());
    for (int r = 0; r < size(); ++r) {
      const int64_t bytes = std::min(recv_counts[r], send_counts[rank()]) * element;
      if (bytes > 0) std::memcpy(target, own, bytes);
      target += recv_counts[r] * element;
    }
  }

  void DoBroadcast(const Tensor& tensor, int) override { Count("Broadcast", tensor.bytes()); }
  void DoSend(const Tensor& tensor, int) override { Count("Send", tensor.bytes()); }
  void DoRecv(const Tensor&, int) override { Count("Recv", 0); }
  void DoBarrier() override { Count("Barrier", 0); }

 private:
  void Count(const char* operation, int64_t bytes_sent) {
    if (size() == 1) return;
    CommunicationLog::Count& count = log_->counts[{name(), current_label(), operation}];
    ++count.calls;
    count.bytes_sent += bytes_sent;
  }

  CommunicationLog* log_;
};

}  // namespace

std::unique_ptr<Communicator> MakePretendCommunicator(int rank, int size, std::string name,
                                                      CommunicationLog* log) {
  return std::make_unique<PretendCommunicator>(rank, size, std::move(name), log);
}

}  // namespace baleen
