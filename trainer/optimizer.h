// ZeRO-1 AdamW: every rank of a group's axis keeps the moments of its even share of each bucket of
// the flat buffers (parameter_store.h).
//
//   GradientsReady    a bucket is reduce-scattered as soon as all its gradients are complete, while
//                     the backward of other layers still runs
//   ReduceGradients   the buckets that are left: each rank then has the sum of its own ranges
//   ComputeNorms      global norms of the two clip groups (main = all but the indexers, indexer),
//                     each element counted once
//   Update            AdamW on the own ranges; clip scale and the non-finite flag are read from
//                     device memory
//   GatherParameters  all-gather of the values
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "configs/schema/run_config.h"
#include "parallel/grid_communicators.h"
#include "trainer/model/parameter_store.h"

namespace baleen {

// This rank's share of one bucket: elements [begin, begin + count) of the group's flat buffer.
struct OptimizerShard {
  ParameterGroup group = ParameterGroup::kMain;
  Communicator* axis = nullptr;  // the ranks that share the bucket
  int bucket = 0;                // of ParameterStore::buckets()
  int64_t begin = 0;
  int64_t count = 0;
  Tensor m, v;
};

enum class ClipGroup : uint8_t { kMain, kIndexer };

class Optimizer {
 public:
  Optimizer(Context& context, const ParameterStore& parameters, const OptimizerConfig& config,
            const std::vector<ParameterGroup>& trained, const GridCommunicators& grid,
            Communicator& world);

  void ZeroGradients();
  // Parameters first .. end - 1 (ids) get no further gradient in this step. Every rank of an axis
  // says so in the same order. The shared embedding is left to ReduceGradients: the stages that
  // hold it finish at different times.
  void GradientsReady(int first, int end);
  void ReduceGradients();
  void ComputeNorms();
  // `step` counts updates of this optimizer from 1 (Adam's bias correction).
  void Update(double lr, int64_t step);
  void GatherParameters();

  // Gradient norms of the last ComputeNorms, before clipping; nothing for a group that does not
  // train. Waits for the device: the step asks it with the metrics.
  std::optional<double> Norm(ClipGroup group) const;
  // The last update was skipped because a gradient was not finite.
  bool skipped() const;

  const std::vector<OptimizerShard>& shards() const { return shards_; }

 private:
  struct Clip {
    bool used = false;
    double max_norm = 0;
    Tensor sum_of_squares_1;  // kF64
    Tensor control_2;
  };
  void Reduce(size_t shard);
  Clip& ClipOf(ParameterGroup group) { return clips_[group == ParameterGroup::kIndexer ? 1 : 0]; }

  Context& context_;
  const ParameterStore& parameters_;
  OptimizerConfig config_;
  Communicator& world_;
  std::vector<OptimizerShard> shards_;
  std::vector<int> shard_of_parameter_;  // index into shards_, -1: frozen
  std::vector<int> missing_;             // by shard: parameters whose gradients are not complete
  std::array<Clip, 2> clips_;
};

}  // namespace baleen
