// A communicator that hands every call on to another: what tests derive theirs from that treat one
// kind of call in a way of their own. What is begun is done at once.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "parallel/communicator.h"

namespace baleen::testing {

class ForwardingCommunicator : public Communicator {
 public:
  explicit ForwardingCommunicator(std::unique_ptr<Communicator> inner)
      : Communicator(inner->rank(), inner->size(), inner->name()), inner_(std::move(inner)) {}

  std::unique_ptr<Communicator> Split(int color, int key, std::string name) override {
    return Wrap(inner_->Split(color, key, std::move(name)));
  }
  void Fork() override { inner_->Fork(); }
  void Join() override { inner_->Join(); }

 protected:
  // A part that was split off, as one of these.
  virtual std::unique_ptr<Communicator> Wrap(std::unique_ptr<Communicator> part) const {
    return std::make_unique<ForwardingCommunicator>(std::move(part));
  }
  Communicator& inner() { return *inner_; }

  void DoAllReduce(const Tensor& tensor, ReduceOp op) override {
    inner_->AllReduce(current_label(), tensor, op);
  }
  void DoAllGather(const Tensor& part, const Tensor& whole) override {
    inner_->AllGather(current_label(), part, whole);
  }
  void DoReduceScatter(const Tensor& whole, const Tensor& part) override {
    inner_->ReduceScatter(current_label(), whole, part);
  }
  void DoAllToAllV(const Tensor& send, const std::vector<int64_t>& send_counts, const Tensor& recv,
                   const std::vector<int64_t>& recv_counts) override {
    inner_->AllToAllV(current_label(), send, send_counts, recv, recv_counts);
  }
  void DoBroadcast(const Tensor& tensor, int root) override {
    inner_->Broadcast(current_label(), tensor, root);
  }
  void DoSend(const Tensor& tensor, int to) override { inner_->Send(current_label(), tensor, to); }
  void DoRecv(const Tensor& tensor, int from) override {
    inner_->Recv(current_label(), tensor, from);
  }
  void DoBarrier() override { inner_->Barrier(current_label()); }

 private:
  std::unique_ptr<Communicator> inner_;
};

}  // namespace baleen::testing
