// Communicator: what crosses ranks. One interface, three kinds: MPI (host memory), NCCL (device
// memory), Self (one rank).
//
// Every call carries a label ("layers.3 dispatch"); label, sequence number, operation and bytes go
// into a ring, the flight recorder, which is printed when a rank hangs or fails. A failed
// collective is not recoverable in the process: it prints the record and aborts all ranks; the
// launcher restarts from the last checkpoint. On the host reductions add in the order of ranks:
// results do not depend on the library's choice of algorithm. On devices the order is NCCL's: the
// same on every rank and in every run of one layout on the same machines.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "kernels/core/tensor.h"

namespace baleen {

enum class ReduceOp : uint8_t { kSum, kMax };

class Communicator {
 public:
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  const std::string& name() const { return name_; }  // "world", "dp", ...

  // In place, over kF32, kF64, kI32 or kI64; on devices kBF16 too, and no maximum of floats (NCCL's
  // may lose a NaN).
  void AllReduce(absl::string_view label, const Tensor& tensor, ReduceOp op = ReduceOp::kSum);
  // whole = the parts in the order of ranks; whole has size() times the elements of part. part may
  // be the rank's own range of whole.
  void AllGather(absl::string_view label, const Tensor& part, const Tensor& whole);
  // part = the sum over ranks of their whole's range of this rank. part may be that range of whole.
  void ReduceScatter(absl::string_view label, const Tensor& whole, const Tensor& part);
  // Sends send_counts[r] elements (consecutive) to rank r, receives recv_counts[r] from it.
  void AllToAllV(absl::string_view label, const Tensor& send,
                 const std::vector<int64_t>& send_counts, const Tensor& recv,
                 const std::vector<int64_t>& recv_counts);
  // As AllToAllV, AllGather, beside what the caller computes: it starts when what was computed
  // before is done. Until Wait of its number, which makes what is computed next wait for it and for
  // all that was begun before it, nobody touches the tensors, but that a gather's own part may be
  // read. On the host the call is done when it returns. An exchange is meant to be waited for soon:
  // it does not queue behind other communicators' gathers.
  uint64_t BeginAllToAllV(absl::string_view label, const Tensor& send,
                          const std::vector<int64_t>& send_counts, const Tensor& recv,
                          const std::vector<int64_t>& recv_counts);
  uint64_t BeginAllGather(absl::string_view label, const Tensor& part, const Tensor& whole);
  virtual void Wait(uint64_t /*call*/) {}
  void Broadcast(absl::string_view label, const Tensor& tensor, int root);
  void Send(absl::string_view label, const Tensor& tensor, int to);
  void Recv(absl::string_view label, const Tensor& tensor, int from);
  void Barrier(absl::string_view label);

  // Ranks with one color form a communicator, ordered by key. Every rank of this one calls it.
  virtual std::unique_ptr<Communicator> Split(int color, int key, std::string name) = 0;

  // From Fork to Join calls run beside what the caller computes: each starts when what was computed
  // before it is done, and nothing waits for it. Join makes what is computed next wait for them,
  // and for every Send (a Send never holds the caller up, but keeps its tensor until it is done);
  // until then nobody touches their tensors. On the host both do nothing, since a call is done when
  // it returns.
  virtual void Fork() {}
  virtual void Join() {}

  // The last calls (at most 64), oldest first, one a line: sequence number, operation, label,
  // bytes, done or under way.
  std::string FlightRecord(uint64_t most = kRing) const;

 protected:
  static constexpr size_t kRing = 64;

  Communicator(int rank, int size, std::string name)
      : rank_(rank), size_(size), name_(std::move(name)) {}

  // The call under way: its number and label.
  uint64_t current_call() const { return sequence_ - 1; }
  const std::string& current_label() const { return ring_[current_call() % kRing].label; }
  // Whether a call that has returned, one of the last 64, is done: a device may still be at it.
  virtual bool IsCallDone(uint64_t) const { return true; }

  virtual void DoAllReduce(const Tensor& tensor, ReduceOp op) = 0;
  virtual void DoAllGather(const Tensor& part, const Tensor& whole) = 0;
  virtual void DoBeginAllGather(const Tensor& part, const Tensor& whole) {
    DoAllGather(part, whole);
  }
  virtual void DoReduceScatter(const Tensor& whole, const Tensor& part) = 0;
  virtual void DoAllToAllV(const Tensor& send, const std::vector<int64_t>& send_counts,
                           const Tensor& recv, const std::vector<int64_t>& recv_counts) = 0;
  virtual void DoBeginAllToAllV(const Tensor& send, const std::vector<int64_t>& send_counts,
                                const Tensor& recv, const std::vector<int64_t>& recv_counts) {
    DoAllToAllV(send, send_counts, recv, recv_counts);
  }
  virtual void DoBroadcast(const Tensor& tensor, int root) = 0;
  virtual void DoSend(const Tensor& tensor, int to) = 0;
  virtual void DoRecv(const Tensor& tensor, int from) = 0;
  virtual void DoBarrier() = 0;

 private:
  void CheckParts(absl::string_view label, const Tensor& part, const Tensor& whole) const;
  void CheckCounts(absl::string_view label, const Tensor& send,
                   const std::vector<int64_t>& send_counts, const Tensor& recv,
                   const std::vector<int64_t>& recv_counts) const;
  class Entry;  // marks a ring entry as done when it leaves scope
  struct Record {
    const char* operation = "";
    std::string label;
    int64_t bytes = 0;
    bool done = false;
  };

  int rank_;
  int size_;
  std::string name_;
  uint64_t sequence_ = 0;  // calls so far
  std::array<Record, kRing> ring_;
};

// One rank: collectives copy at most. Send and Recv are programming errors.
std::unique_ptr<Communicator> MakeSelfCommunicator(std::string name = "self");

}  // namespace baleen
