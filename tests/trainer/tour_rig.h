// What the tour's test watches (parallel_tour_test.cc): the tables of docs/parallelism.md, and a
// pipeline work that takes the model's steps one by one and keeps, phase by phase, the tensors and
// the collectives of this rank.
//
// A table stands under "#### " and the name of its phase; a row is
//   | `tensor` | [letters] | [numbers] | Operation over axis: `label` | text |
#pragma once

#include <map>
#include <string>
#include <vector>

#include "parallel/pipeline_engine.h"
#include "trainer/model/model.h"

namespace baleen::testing {

constexpr char kLayerPrefix[] = "model.layers.1.";  // the layer of the tour, on the last stage
constexpr const char* kTourPhases[] = {"attention", "dispatch", "experts", "combine"};

struct TourRow {
  std::string tensor, letters, numbers;
  std::string operation, axis, label;  // empty: no collective
};
using TourTables = std::map<std::string, std::vector<TourRow>>;  // by phase
TourTables ReadTourTables();

struct TourCall {
  std::string operation, label;
  int64_t bytes = 0;
};

// What happened in one phase on this rank.
struct TourPhase {
  std::map<std::string, std::vector<TourCall>> calls;  // by axis, in order
  std::map<std::string, Tensor> tensors;               // by the document's names
};

// Reads the flight records of all axes: what came since the last reading.
class TourRecorder {
 public:
  explicit TourRecorder(const GridCommunicators& axes);
  void Take(const std::string& phase);
  void Keep(const std::string& phase, const std::string& name, const Tensor& tensor);
  const TourPhase& operator[](const std::string& phase) { return phases_[phase]; }

 private:
  void TakeLine(const std::string& phase, const std::string& axis, absl::string_view line);

  std::vector<const Communicator*> axes_;
  std::map<std::string, int64_t> next_;
  std::map<std::string, TourPhase> phases_;
};

// The engine's actions for one microbatch, with a look after each step. In a warm-up the steps are
// taken as in training, without the head, and then once more as the warm-up takes them.
class TourWork : public PipelineWork {
 public:
  TourWork(const ModelContext& context, const ModelPart& part, const Batch& batch,
           const PassOptions& pass, bool warm_up, StepStats& stats, TourRecorder& recorder)
      : context_(context),
        part_(part),
        batch_(batch),
        pass_(pass),
        warm_up_(warm_up),
        stats_(stats),
        recorder_(recorder) {}

  Tensor Forward(int part, int microbatch, const Tensor& x) override;
  Tensor BackwardInput(int part, int microbatch, const Tensor& dy) override;
  void BackwardWeight(int part, int microbatch) override;
  Both ForwardBackward(int, int, const Tensor&, int, int, const Tensor&) override { return {}; }
  Tensor EmptyActivation() override;

 private:
  void StepForward();
  void StepBackward();
  void KeepEnds(const std::string& phase);
  Tensor Passed();
  Tensor WarmUpAlike(const Tensor& x);

  const ModelContext context_;
  const ModelPart& part_;
  const Batch& batch_;
  const PassOptions& pass_;
  bool warm_up_;
  StepStats& stats_;
  TourRecorder& recorder_;
  ModelPart::Saved saved_;
};

}  // namespace baleen::testing
