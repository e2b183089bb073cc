#include "trainer/model_work.h"

namespace baleen {

GradientsReady ModelWork::ReadyAfter(std::map<int, size_t>& formed, int part) const {
  return ++formed[part] == batches_.size() ? ready_ : nullptr;
}

Tensor ModelWork::Forward(int part, int microbatch, const Tensor& x) {
  const ModelPart& model = model_.part(part);
  const Batch& batch = batches_[microbatch];
  if (kind_ == PassKind::kWarmUp)
    return model.WarmUp(context_, batch, pass_, x, stats_, ReadyAfter(formed_, part));
  ModelPart::Saved saved;
  const Tensor y = model.Forward(context_, batch, pass_, x, stats_, saved);
  if (read_losses_ && model.layers().last) read_losses_(batch, saved.lm_loss_R);
  if (kind_ == PassKind::kTrain) saved_[{part, microbatch}] = std::move(saved);
  return y;
}

Tensor ModelWork::BackwardInput(int part, int microbatch, const Tensor& dy) {
  const bool weights = context_.options.weights_with_input;
  return model_.part(part).BackwardInput(context_, batches_[microbatch], pass_, dy, stats_,
                                         SavedOf(part, microbatch),
                                         weights ? ReadyAfter(blocks_formed_, part) : nullptr);
}

void ModelWork::BackwardWeight(int part, int microbatch) {
  model_.part(part).BackwardWeight(context_, batches_[microbatch], pass_, stats_,
                                   SavedOf(part, microbatch), ReadyAfter(formed_, part));
  saved_.erase({part, microbatch});
}

// A step of the one, a step of the other: while rows of one microbatch travel to experts, the other
// computes.
PipelineWork::Both ModelWork::ForwardBackward(int forward_part, int forward_microbatch,
                                              const Tensor& x, int backward_part,
                                              int backward_microbatch, const Tensor& dy) {
  const ModelPart& forward = model_.part(forward_part);
  const ModelPart& backward = model_.part(backward_part);
  ModelPart::Saved& front = saved_[{forward_part, forward_microbatch}];
  ModelPart::Saved& back = SavedOf(backward_part, backward_microbatch);
  ModelPart::Begin(x, front);
  ModelPart::Begin(dy, back);
  bool more_forward = true, more_backward = true;
  while (more_forward || more_backward) {
    if (more_forward) {
      more_forward =
          forward.ForwardStep(context_, batches_[forward_microbatch], pass_, stats_, front);
    }
    if (more_backward) {
      more_backward = backward.BackwardStep(context_, batches_[backward_microbatch], pass_, back);
    }
  }
  Both both{front.flow, back.flow};
  front.flow = back.flow = Tensor();
  return both;
}

Tensor ModelWork::EmptyActivation() {
  return context_.context.Empty(context_.parameters.dtype(),
                                {batches_.front().num_rows(), context_.config.hidden_size});
}

}  // namespace baleen
