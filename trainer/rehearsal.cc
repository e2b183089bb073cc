#include "trainer/rehearsal.h"

namespace baleen {

ActionType TypeOf(const Action& action) { return {action.kind, action.part, action.backward_part}; }

template <typename Function>
void Rehearsal::Measure(const ActionType& type, std::vector<Tensor> inputs, Function action) {
  MemoryPool& pool = context_.pool();
  counter_.ops.clear();
  log_.counts.clear();
  pool.ResetPeak();
  const BytesByUse before = HeldBytes(pool);
  const int64_t total_before = pool.Total().bytes;
  std::vector<Tensor> results = action(inputs);
  Footprint footprint;
  for (const auto& [use, memory] : pool.Uses()) {
    const auto was = before.find(use);
    footprint.peak[use] = memory.peak_bytes - (was == before.end() ? 0 : was->second);
  }
  footprint.peak[""] = pool.Total().peak_bytes - total_before;
  found.counted[type] = {counter_, log_};
  results.clear();
  // An input that nobody else holds gives its bytes back when the engine lets it go.
  int64_t input_bytes = 0;
  const int64_t with_input = pool.Total().bytes;
  for (Tensor& input : inputs) {
    input_bytes += input.bytes();
    input = Tensor();
  }
  footprint.keeps_input = input_bytes > 0 && pool.Total().bytes == with_input;
  footprint.kept = Difference(HeldBytes(pool), before);
  // `before` holds the inputs.
  if (!footprint.keeps_input) footprint.kept[context_.use()] += with_input - pool.Total().bytes;
  found.footprints[type] = footprint;
}

void Rehearsal::Forward(int part, int microbatch) {
  Measure({ActionKind::kForward, part, -1}, Inputs({part > 0}),
          [&](const std::vector<Tensor>& inputs) {
            return std::vector<Tensor>{work_.Forward(part, microbatch, inputs[0])};
          });
}

void Rehearsal::BackwardInput(int part, int microbatch) {
  Measure({ActionKind::kBackwardInput, part, -1}, Inputs({part + 1 < num_parts_}),
          [&](const std::vector<Tensor>& inputs) {
            return std::vector<Tensor>{work_.BackwardInput(part, microbatch, inputs[0])};
          });
}

void Rehearsal::BackwardWeight(int part, int microbatch) {
  Measure({ActionKind::kBackwardWeight, part, -1}, {}, [&](const std::vector<Tensor>&) {
    work_.BackwardWeight(part, microbatch);
    return std::vector<Tensor>();
  });
}

void Rehearsal::Both(int part, int backward_part) {
  const Rehearsed plain = found;
  Forward(backward_part, 0);
  const ActionType type = {ActionKind::kForwardBackward, part, backward_part};
  Measure(type, Inputs({part > 0, backward_part + 1 < num_parts_}),
          [&](const std::vector<Tensor>& inputs) {
            const PipelineWork::Both both =
                work_.ForwardBackward(part, 1, inputs[0], backward_part, 0, inputs[1]);
            return std::vector<Tensor>{both.activation, both.gradient};
          });
  BackwardWeight(backward_part, 0);
  BackwardInput(part, 1);
  BackwardWeight(part, 1);
  // The plain actions above began with more held: theirs stand.
  Rehearsed with_both = plain;
  with_both.footprints[type] = found.footprints.at(type);
  with_both.counted[type] = found.counted.at(type);
  found = std::move(with_both);
}

}  // namespace baleen
