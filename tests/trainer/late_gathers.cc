#include "tests/trainer/late_gathers.h"

#include <cstring>
#include <deque>

#include "kernels/core/context.h"
#include "tests/trainer/forwarding_communicator.h"

namespace baleen::testing {
namespace {

class LateGathers : public ForwardingCommunicator {
 public:
  using ForwardingCommunicator::ForwardingCommunicator;

  void Wait(uint64_t call) override {
    for (; !begun_.empty() && begun_.front().call <= call; begun_.pop_front()) {
      const Begun& begun = begun_.front();
      ForOthers(begun.whole, [&](int64_t at, int64_t bytes) {
        std::memcpy(Bytes(begun.whole) + at, Bytes(begun.arrived) + at, bytes);
      });
    }
  }

 protected:
  std::unique_ptr<Communicator> Wrap(std::unique_ptr<Communicator> part) const override {
    return MakeLateGathers(std::move(part));
  }
  void DoBeginAllGather(const Tensor& part, const Tensor& whole) override {
    const Tensor arrived = Context::Cpu().Empty(whole.dtype(), whole.shape());
    inner().AllGather(current_label(), part, arrived);
    constexpr int kNan = 0xFF;  // every byte of a NaN of any dtype
    ForOthers(whole,
              [&](int64_t at, int64_t bytes) { std::memset(Bytes(whole) + at, kNan, bytes); });
    begun_.push_back({current_call(), whole, arrived});
  }

 private:
  struct Begun {
    uint64_t call;
    Tensor whole, arrived;
  };
  static char* Bytes(const Tensor& tensor) { return static_cast<char*>(tensor.raw()); }
  // Calls `visit` with the range, in bytes, of each other rank's part.
  template <typename Visit>
  void ForOthers(const Tensor& whole, Visit visit) const {
    const int64_t part = whole.bytes() / size();
    for (int r = 0; r < size(); ++r) {
      if (r != rank()) visit(r * part, part);
    }
  }

  std::deque<Begun> begun_;
};

}  // namespace

std::unique_ptr<Communicator> MakeLateGathers(std::unique_ptr<Communicator> inner) {
  return std::make_unique<LateGathers>(std::move(inner));
}

}  // namespace baleen::testing
