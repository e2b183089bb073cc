// ZeRO-1 AdamW: every rank of a group's axis keeps the master weights and moments of its even share
// of each bucket of the flat buffers (parameter_store.h).
//
//   GradientsReady    a bucket is reduce-scattered as soon as all its gradients are complete, while
//                     the backward of other layers still runs
//   ReduceRest        the buckets that are left, still beside what is computed
//   ReduceGradients   the same, and waits: each rank then has the sum of its own ranges
//   ComputeNorms      global norms of the two clip groups (main = all but the indexers, indexer),
//                     each element counted once
//   Update            AdamW on the own ranges, bucket by bucket in the order in which a forward
//                     needs them; clip scale and the non-finite flag are read from device memory.
//                     Each bucket's values are gathered behind its AdamW, beside that of the next
//                     ones and what else is computed until somebody asks for a value of it
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "configs/schema/run_config.h"
#include "kernels/ops/adamw.h"
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
  // The weights as they are updated and saved, kF32 (kF64 for kF64 buffers): the range of the
  // group's buffer itself, or beside bf16 buffers a tensor of its own. Of a frozen bf16 group: in
  // host memory, and only once SetValues was told to keep them (an earlier stage trained them).
  Tensor master;
  Tensor m, v;  // empty while frozen
  // Weight decay of the ranges of the share, as AdamwTensors has it.
  Tensor decay_begin_N1, decay_N;

  bool trains() const { return !m.empty(); }
};

enum class ClipGroup : uint8_t { kMain, kIndexer };

class Optimizer {
 public:
  Optimizer(Context& context, ParameterStore& parameters, const OptimizerConfig& config,
            const std::vector<ParameterGroup>& trained, const GridCommunicators& grid,
            Communicator& world);

  // Elements first .. of a parameter's box become `values` (flat, kF32 or kF64 as the masters are,
  // in host memory): the model's copy and, where they are in the rank's share, the masters.
  // kChanged: an earlier stage of the run changed them, so their masters are kept also while they
  // are frozen.
  enum class Origin : uint8_t { kSource, kChanged };
  void SetValues(int parameter, int64_t first, const Tensor& values, Origin origin);

  // No parameter has a gradient yet.
  void BeginStep();
  // Parameters first .. end - 1 (ids) get no further gradient in this step. Every rank of an axis
  // says so in the same order. The shared embedding is left to ReduceRest: the stages that hold it
  // finish at different times.
  void GradientsReady(int first, int end);
  void ReduceRest();
  void ReduceGradients();
  void ComputeNorms();
  // `step` counts updates of this optimizer from 1 (Adam's bias correction).
  void Update(double lr, int64_t step);

  // Gradient norms of the last ComputeNorms, before clipping; nothing for a group that does not
  // train. Waits for the device: the step asks it with the metrics.
  std::optional<double> Norm(ClipGroup group) const;
  // The last update was skipped because a gradient was not finite.
  bool skipped() const;

  // One of each bucket, frozen ones too, in the order of ParameterStore::buckets().
  const std::vector<OptimizerShard>& shards() const { return shards_; }

 private:
  struct Clip {
    bool used = false;
    double max_norm = 0;
    Tensor sum_of_squares_1;  // kF64
    Tensor control_2;
  };
  void AddTrainingState(OptimizerShard& shard);
  void Reduce(OptimizerShard& shard);
  void UpdateShard(const OptimizerShard& shard, const AdamwParams& params);
  // Of a tensor of the shard's bucket, the share.
  Tensor ShareOf(const OptimizerShard& shard, const Tensor& bucket) const;
  Clip& ClipOf(ParameterGroup group) { return clips_[group == ParameterGroup::kIndexer ? 1 : 0]; }

  Context& context_;
  ParameterStore& parameters_;
  OptimizerConfig config_;
  Communicator& world_;
  std::vector<OptimizerShard> shards_;
  std::vector<int> update_order_;  // of the shards that train
  std::vector<int> missing_;       // by shard: parameters whose gradients are not complete
  std::array<Clip, 2> clips_;
};

}  // namespace baleen
