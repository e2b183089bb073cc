// The engine: one switch over the action, and four places where tensors wait: for the rank's own
// next action, or for their send; activations and gradients.
#include "parallel/pipeline_engine.h"

#include <map>
#include <utility>

#include "absl/strings/str_join.h"
#include "kernels/core/check.h"

namespace baleen {
namespace {

// Tensors by (part, microbatch) of the action that will use them: put once, taken once.
class Waiting {
 public:
  explicit Waiting(const char* what) : what_(what) {}

  void Put(int part, int microbatch, Tensor tensor, const Action& action) {
    const bool is_new = tensors_.emplace(std::pair(part, microbatch), std::move(tensor)).second;
    CHECK(is_new) << ActionString(action) << ": " << what_ << " of part " << part << " microbatch "
                  << microbatch << " waits already";
  }

  // The caller's copy is then the engine's only one.
  Tensor Take(int part, int microbatch, const Action& action) {
    const auto found = tensors_.find({part, microbatch});
    CHECK(found != tensors_.end()) << ActionString(action) << ": no " << what_ << " of part "
                                   << part << " microbatch " << microbatch << " is here";
    Tensor tensor = std::move(found->second);
    tensors_.erase(found);
    return tensor;
  }

  void CheckEmpty() const {
    CHECK(tensors_.empty()) << "the program has ended, and " << what_ << " of part "
                            << tensors_.begin()->first.first << " microbatch "
                            << tensors_.begin()->first.second << " was not used";
  }

 private:
  const char* what_;
  std::map<std::pair<int, int>, Tensor> tensors_;
};

// One run of one program. Compute actions take their inputs before and put their results after
// the call into the work; messages move what waits between ranks.
class Engine {
 public:
  Engine(const std::vector<int>& part_rank, Communicator& pp, PipelineWork& work)
      : part_rank_(part_rank), pp_(pp), work_(work) {}

  void Run(const Program& program) {
    for (const Action& action : program) {
      CheckOwn(action.part, action);
      Step(action);
    }
    for (const Waiting* waiting :
         {&activations_in_, &gradients_in_, &activations_out_, &gradients_out_}) {
      waiting->CheckEmpty();
    }
  }

 private:
  int last_part() const { return static_cast<int>(part_rank_.size()) - 1; }

  void CheckOwn(int part, const Action& action) const {
    CHECK(part >= 0 && part <= last_part())
        << ActionString(action) << ": part " << part << " of " << part_rank_.size();
    CHECK_EQ(part_rank_[part], pp_.rank()) << ActionString(action) << " on another rank's part";
  }

  // The input of `part`'s forward; the first part reads the batch instead.
  Tensor TakeActivation(int part, int microbatch, const Action& action) {
    return part == 0 ? Tensor() : activations_in_.Take(part, microbatch, action);
  }

  // The gradient of `part`'s output; the last part starts from the loss instead.
  Tensor TakeGradient(int part, int microbatch, const Action& action) {
    return part == last_part() ? Tensor() : gradients_in_.Take(part, microbatch, action);
  }

  // What crosses has one shape and dtype in a whole program: a message that is too short would
  // leave old values at the end of the tensor it is received into.
  void CheckCrosses(const Tensor& tensor, const Action& action) {
    CHECK(!tensor.empty()) << ActionString(action) << " gave no tensor for the next part";
    if (shape_.empty()) {
      shape_ = tensor.shape();
      dtype_ = tensor.dtype();
    }
    CHECK(tensor.shape() == shape_ && tensor.dtype() == dtype_)
        << ActionString(action) << ": " << tensor.DebugString() << " crosses, expected "
        << DTypeName(dtype_) << ShapeString(shape_);
  }

  // To this rank's next part, or to the send that the program has for it.
  void PutActivation(int part, int microbatch, Tensor activation, const Action& action) {
    if (part == last_part()) {
      CHECK(activation.empty()) << ActionString(action) << ": an activation beyond the last part";
      return;
    }
    CheckCrosses(activation, action);
    if (part_rank_[part + 1] == pp_.rank()) {
      activations_in_.Put(part + 1, microbatch, std::move(activation), action);
    } else {
      activations_out_.Put(part, microbatch, std::move(activation), action);
    }
  }

  // The same one part down.
  void PutGradient(int part, int microbatch, Tensor gradient, const Action& action) {
    if (part == 0) {
      CHECK(gradient.empty()) << ActionString(action) << ": a gradient before the first part";
      return;
    }
    CheckCrosses(gradient, action);
    if (part_rank_[part - 1] == pp_.rank()) {
      gradients_in_.Put(part - 1, microbatch, std::move(gradient), action);
    } else {
      gradients_out_.Put(part, microbatch, std::move(gradient), action);
    }
  }

  // Blocking, as the check replays it; afterwards nobody but the work holds the tensor.
  void Send(Waiting& waiting, const Action& action) {
    const Tensor tensor = waiting.Take(action.part, action.microbatch, action);
    pp_.Send(ActionString(action), tensor, action.peer);
  }

  // Stands in the list where the peer's send stands in its own, so that one tensor is allocated
  // only when its message is under way.
  void Receive(Waiting& waiting, const Action& action) {
    Tensor tensor = work_.EmptyActivation();
    CheckCrosses(tensor, action);
    pp_.Recv(ActionString(action), tensor, action.peer);
    waiting.Put(action.part, action.microbatch, std::move(tensor), action);
  }

  // Both inputs are here before either phase starts: the two microbatches are at different places
  // of the pipeline and never feed each other.
  void ForwardBackward(const Action& action) {
    const int backward_part = action.backward_part;
    CheckOwn(backward_part, action);
    const Tensor x = TakeActivation(action.part, action.microbatch, action);
    const Tensor dy = TakeGradient(backward_part, action.backward_microbatch, action);
    PipelineWork::Both both = work_.ForwardBackward(action.part, action.microbatch, x,
                                                    backward_part, action.backward_microbatch, dy);
    PutActivation(action.part, action.microbatch, std::move(both.activation), action);
    PutGradient(backward_part, action.backward_microbatch, std::move(both.gradient), action);
  }

  // An input leaves its place before the call and is let go after the result is put.
  void Step(const Action& action) {
    const int part = action.part;
    const int microbatch = action.microbatch;
    switch (action.kind) {
      case ActionKind::kForward: {
        const Tensor x = TakeActivation(part, microbatch, action);
        PutActivation(part, microbatch, work_.Forward(part, microbatch, x), action);
        return;
      }
      case ActionKind::kBackwardInput: {
        const Tensor dy = TakeGradient(part, microbatch, action);
        PutGradient(part, microbatch, work_.BackwardInput(part, microbatch, dy), action);
        return;
      }
      case ActionKind::kBackwardWeight:
        return work_.BackwardWeight(part, microbatch);
      case ActionKind::kForwardBackward:
        return ForwardBackward(action);
      case ActionKind::kSendActivation:
        return Send(activations_out_, action);
      case ActionKind::kRecvActivation:
        return Receive(activations_in_, action);
      case ActionKind::kSendGradient:
        return Send(gradients_out_, action);
      case ActionKind::kRecvGradient:
        return Receive(gradients_in_, action);
    }
  }

  const std::vector<int>& part_rank_;
  Communicator& pp_;
  PipelineWork& work_;
  Waiting activations_in_{"activation"}, gradients_in_{"gradient"};  // by the part that takes them
  Waiting activations_out_{"activation to send"};                    // by the part that made them
  Waiting gradients_out_{"gradient to send"};
  Shape shape_;  // of what crosses; empty until something did
  DType dtype_ = DType::kF32;
};

}  // namespace

void RunPipeline(const Program& program, const std::vector<int>& part_rank, Communicator& pp,
                 PipelineWork& work) {
  for (const int rank : part_rank) {
    CHECK(rank >= 0 && rank < pp.size()) << "parts on ranks " << absl::StrJoin(part_rank, ",")
                                         << ", but " << pp.name() << " has " << pp.size();
  }
  Engine(part_rank, pp, work).Run(program);
  pp.Join();  // what was sent may be overwritten from here on
}

absl::StatusOr<CheckedSchedule> MakeCheckedSchedule(const ScheduleSpec& spec) {
  ASSIGN_OR_RETURN(const Schedule made, MakeSchedule(spec));
  CheckedSchedule checked;
  ASSIGN_OR_RETURN(checked.schedule, LowerSchedule(made));
  ASSIGN_OR_RETURN(checked.report, CheckSchedule(checked.schedule));
  return checked;
}

}  // namespace baleen
