// The rehearsal of a dry rank: each type of action runs once on the real ModelWork, and what it did
// to memory, what it sent and computed is written down; PlannedWork then stands for the model in
// the engine, action by action, for any number of microbatches.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "parallel/pretend_communicator.h"
#include "trainer/model_work.h"

namespace baleen {

// What one action, or one phase of the step, does.
struct CountedWork {
  OpCounter ops;
  CommunicationLog messages;
};

// An action without its microbatch: kind, part, backward part (-1 but for kForwardBackward).
using ActionType = std::tuple<ActionKind, int, int>;
ActionType TypeOf(const Action& action);

// What one action does to memory.
struct Footprint {
  std::map<std::string, int64_t> peak;  // above what is held when it begins; "": of all uses
  // What its microbatch holds more afterwards, beside the input and the result.
  std::map<std::string, int64_t> kept;
  bool keeps_input = false;
};

struct Rehearsed {
  std::map<ActionType, Footprint> footprints;
  std::map<ActionType, CountedWork> counted;
};

using BytesByUse = std::map<std::string, int64_t>;

inline BytesByUse HeldBytes(const MemoryPool& pool) {
  BytesByUse held;
  for (const auto& [use, memory] : pool.Uses()) held[use] = memory.bytes;
  return held;
}

inline BytesByUse Difference(const BytesByUse& a, const BytesByUse& b) {
  BytesByUse difference = a;
  for (const auto& [use, bytes] : b) difference[use] -= bytes;
  return difference;
}

// The largest bytes of each use, and of all together under "".
class Peaks {
 public:
  explicit Peaks(MemoryPool& pool) : pool_(pool) { Restart(); }

  // What the pool has seen since the last Restart counts.
  void Take() {
    for (const auto& [use, memory] : pool_.Uses()) Raise(use, memory.peak_bytes);
    Raise("", pool_.Total().peak_bytes);
    pool_.ResetPeak();
  }
  void Restart() { pool_.ResetPeak(); }
  // `more` on top of what is held now.
  void TakeAbove(const BytesByUse& more) {
    Take();
    BytesByUse held = HeldBytes(pool_);
    held[""] = pool_.Total().bytes;
    for (const auto& [use, bytes] : more) Raise(use, held[use] + bytes);
  }
  const BytesByUse& bytes() const { return bytes_; }

 private:
  void Raise(const std::string& use, int64_t bytes) { bytes_[use] = std::max(bytes_[use], bytes); }
  MemoryPool& pool_;
  BytesByUse bytes_;
};

// Runs every type of action once on the real ModelWork.
class Rehearsal {
 public:
  Rehearsal(Context& context, ModelWork& work, OpCounter& counter, CommunicationLog& log,
            int num_parts)
      : context_(context), work_(work), counter_(counter), log_(log), num_parts_(num_parts) {}

  void ForwardOnly(int part) { Forward(part, 0); }
  void Train(int part) {
    Forward(part, 0);
    BackwardInput(part, 0);
    BackwardWeight(part, 0);
  }
  // The plain actions of both parts must have been rehearsed.
  void Both(int part, int backward_part);

  Rehearsed found;

 private:
  // What crosses into a part, or an empty tensor. Not a braced list: that would hold a copy.
  std::vector<Tensor> Inputs(const std::vector<bool>& exist) {
    std::vector<Tensor> inputs;
    for (const bool exists : exist) inputs.push_back(exists ? work_.EmptyActivation() : Tensor());
    return inputs;
  }
  void Forward(int part, int microbatch);
  void BackwardInput(int part, int microbatch);
  void BackwardWeight(int part, int microbatch);
  // Runs `action` on `inputs`; it returns its results.
  template <typename Function>
  void Measure(const ActionType& type, std::vector<Tensor> inputs, Function action);

  Context& context_;
  ModelWork& work_;
  OpCounter& counter_;
  CommunicationLog& log_;
  int num_parts_;
};

// What one microbatch holds between its actions on a part.
struct Held {
  Tensor input;  // shared with the engine, or with the part before it
  BytesByUse bytes;
  std::vector<std::shared_ptr<Storage>> storages;
};

// Does to memory what the rehearsed actions did, and to nothing else.
class PlannedWork : public PipelineWork {
 public:
  PlannedWork(Context& context, ModelWork& work, const Rehearsed& rehearsed, int num_parts,
              Peaks& peaks)
      : context_(context),
        work_(work),
        rehearsed_(rehearsed),
        num_parts_(num_parts),
        peaks_(peaks) {}

  Tensor Forward(int part, int microbatch, const Tensor& x) override {
    const Footprint& footprint = Begin({ActionKind::kForward, part, -1});
    Keep(part, microbatch, x, footprint);
    return part + 1 < num_parts_ ? EmptyActivation() : Tensor();
  }
  Tensor BackwardInput(int part, int microbatch, const Tensor& dy) override {
    const Footprint& footprint = Begin({ActionKind::kBackwardInput, part, -1});
    Keep(part, microbatch, dy, footprint);
    return part > 0 ? EmptyActivation() : Tensor();
  }
  void BackwardWeight(int part, int microbatch) override {
    Begin({ActionKind::kBackwardWeight, part, -1});
    held_.erase({part, microbatch});
  }
  Both ForwardBackward(int part, int microbatch, const Tensor& x, int backward_part,
                       int backward_microbatch, const Tensor& dy) override {
    const Footprint& footprint = Begin({ActionKind::kForwardBackward, part, backward_part});
    const Footprint& forward = rehearsed_.footprints.at({ActionKind::kForward, part, -1});
    Keep(part, microbatch, x, forward);
    // Of what the two keep together, the rest is the backward's.
    Footprint backward = rehearsed_.footprints.at({ActionKind::kBackwardInput, backward_part, -1});
    backward.kept = Difference(footprint.kept, forward.kept);
    Keep(backward_part, backward_microbatch, dy, backward);
    return {part + 1 < num_parts_ ? EmptyActivation() : Tensor(),
            backward_part > 0 ? EmptyActivation() : Tensor()};
  }
  Tensor EmptyActivation() override { return work_.EmptyActivation(); }

 private:
  const Footprint& Begin(const ActionType& type) {
    const Footprint& footprint = rehearsed_.footprints.at(type);
    peaks_.TakeAbove(footprint.peak);
    return footprint;
  }

  // The input of the action before is nobody else's by now: its bytes are its holder's.
  void Keep(int part, int microbatch, const Tensor& input, const Footprint& footprint) {
    Held& held = held_[{part, microbatch}];
    if (!held.input.empty()) {
      held.bytes[context_.use()] += held.input.bytes();
      held.input = Tensor();
    }
    for (const auto& [use, bytes] : footprint.kept) held.bytes[use] += bytes;
    held.storages.clear();
    for (const auto& [use, bytes] : held.bytes) {
      CHECK_GE(bytes, 0) << use << " of part " << part << " microbatch " << microbatch;
      if (bytes > 0) held.storages.push_back(context_.pool().Allocate(bytes, use));
    }
    if (footprint.keeps_input) held.input = input;
  }

  Context& context_;
  ModelWork& work_;
  const Rehearsed& rehearsed_;
  int num_parts_;
  Peaks& peaks_;
  std::map<std::pair<int, int>, Held> held_;  // by (part, microbatch)
};

}  // namespace baleen
