// ModelWork: what the pipeline engine's actions do to the model: the microbatches of one pass, and
// what each keeps between forward and backward.
#pragma once

#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "parallel/pipeline_engine.h"
#include "trainer/model/model.h"

namespace baleen {

// What a pass over the microbatches is.
enum class PassKind : uint8_t {
  kTrain,     // forward, input gradient, weight gradient
  kWarmUp,    // forward; each block makes its indexer's gradients
  kValidate,  // forward; losses only
};

class ModelWork : public PipelineWork {
 public:
  // Called with the losses per row of a microbatch, on ranks that hold the last part (validation).
  using LossReader = std::function<void(const Batch& batch, const Tensor& lm_loss_R)>;

  ModelWork(const ModelContext& context, const Model& model, const std::vector<Batch>& batches,
            const PassOptions& pass, PassKind kind, StepStats& stats)
      : context_(context),
        model_(model),
        batches_(batches),
        pass_(pass),
        kind_(kind),
        stats_(stats) {}

  // Called as parameters get their last gradient of the step.
  void set_gradients_ready(GradientsReady ready) { ready_ = std::move(ready); }
  void set_loss_reader(LossReader reader) { read_losses_ = std::move(reader); }

  Tensor Forward(int part, int microbatch, const Tensor& x) override;
  Tensor BackwardInput(int part, int microbatch, const Tensor& dy) override;
  void BackwardWeight(int part, int microbatch) override;
  Both ForwardBackward(int forward_part, int forward_microbatch, const Tensor& x, int backward_part,
                       int backward_microbatch, const Tensor& dy) override;
  Tensor EmptyActivation() override;

 private:
  ModelPart::Saved& SavedOf(int part, int microbatch) { return saved_.at({part, microbatch}); }

  const ModelContext context_;
  const Model& model_;
  const std::vector<Batch>& batches_;
  const PassOptions& pass_;
  PassKind kind_;
  StepStats& stats_;
  // `ready_` for the last of the microbatches whose gradients this part forms, else nothing.
  GradientsReady ReadyAfter(std::map<int, size_t>& formed, int part) const;

  LossReader read_losses_;
  GradientsReady ready_;
  std::map<int, size_t> formed_;         // by part: microbatches whose gradients are formed
  std::map<int, size_t> blocks_formed_;  // the same of the blocks, where the backward forms them
  std::map<std::pair<int, int>, ModelPart::Saved> saved_;  // by (part, microbatch)
};

}  // namespace baleen
