#include "trainer/optimizer.h"

#include <algorithm>
#include <cmath>

#include "kernels/core/transfer.h"
#include "kernels/ops/adamw.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/reduce.h"

namespace baleen {

Optimizer::Optimizer(Context& context, const ParameterStore& parameters,
                     const OptimizerConfig& config, const std::vector<ParameterGroup>& trained,
                     const GridCommunicators& grid, Communicator& world)
    : context_(context), parameters_(parameters), config_(config), world_(world) {
  const ScopedUse use(context, "optimizer");
  shard_of_parameter_.assign(parameters.size(), -1);
  const std::vector<Bucket>& buckets = parameters.buckets();
  for (size_t index = 0; index < buckets.size(); ++index) {
    const Bucket& bucket = buckets[index];
    const ParameterGroup group = bucket.group;
    if (std::find(trained.begin(), trained.end(), group) == trained.end()) continue;
    const DType dtype = parameters.buffer(group).value.dtype();
    OptimizerShard shard;
    shard.group = group;
    shard.axis = &AxisOf(group, grid);
    shard.bucket = static_cast<int>(index);
    CHECK_EQ(bucket.count % shard.axis->size(), 0);
    shard.count = bucket.count / shard.axis->size();
    shard.begin = bucket.begin + shard.count * shard.axis->rank();
    shard.m = context.Zeros(dtype, {shard.count});
    shard.v = context.Zeros(dtype, {shard.count});
    for (const int id : bucket.parameters)
      shard_of_parameter_[id] = static_cast<int>(shards_.size());
    shards_.push_back(shard);
    Clip& clip = ClipOf(group);
    if (clip.used) continue;
    clip.used = true;
    clip.max_norm =
        group == ParameterGroup::kIndexer ? config.clip_grad.indexer : config.clip_grad.main;
    clip.sum_of_squares_1 = context.Zeros(DType::kF64, {1});
    clip.control_2 = context.Zeros(dtype, {2});
  }
}

void Optimizer::ZeroGradients() {
  missing_.clear();
  for (const OptimizerShard& shard : shards_) {
    const Bucket& bucket = parameters_.buckets()[shard.bucket];
    FillZero(context_, parameters_.buffer(shard.group).grad.Flat(bucket.begin, bucket.count));
    missing_.push_back(static_cast<int>(bucket.parameters.size()));
  }
}

void Optimizer::GradientsReady(int first, int end) {
  for (int id = first; id < end; ++id) {
    const int shard = shard_of_parameter_[id];
    if (shard < 0 || shards_[shard].group == ParameterGroup::kEmbedding) continue;
    if (--missing_[shard] == 0) Reduce(shard);
  }
}

void Optimizer::Reduce(size_t index) {
  const OptimizerShard& shard = shards_[index];
  const Bucket& bucket = parameters_.buckets()[shard.bucket];
  const Tensor& grad = parameters_.buffer(shard.group).grad;
  shard.axis->ReduceScatter("gradients", grad.Flat(bucket.begin, bucket.count),
                            grad.Flat(shard.begin, shard.count));
  missing_[index] = 0;
}

void Optimizer::ReduceGradients() {
  for (size_t index = 0; index < shards_.size(); ++index) {
    if (missing_[index] > 0) Reduce(index);
  }
}

void Optimizer::ComputeNorms() {
  for (Clip& clip : clips_) {
    if (clip.used) FillZero(context_, clip.sum_of_squares_1);
  }
  for (const OptimizerShard& shard : shards_) {
    AddSumOfSquares(context_, parameters_.buffer(shard.group).grad.Flat(shard.begin, shard.count),
                    ClipOf(shard.group).sum_of_squares_1);
  }
  // A group's axis is all ranks that hold the same elements, and own ranges are disjoint over it:
  // the sum over the world counts every element once.
  for (Clip& clip : clips_) {
    if (!clip.used) continue;
    world_.AllReduce("grad norm", clip.sum_of_squares_1);
    ClipControl(context_, clip.sum_of_squares_1, clip.max_norm, clip.control_2);
  }
  // All ranks and both groups skip together: a step is taken whole or not at all.
  if (clips_[0].used && clips_[1].used) {
    ShareSkipFlag(context_, clips_[0].control_2, clips_[1].control_2);
  }
}

void Optimizer::Update(double lr, int64_t step) {
  AdamwParams params{.lr = lr,
                     .beta1 = config_.betas[0],
                     .beta2 = config_.betas[1],
                     .eps = config_.eps,
                     .weight_decay = 0,
                     .step = step};
  for (const OptimizerShard& shard : shards_) {
    const FlatBuffer& buffer = parameters_.buffer(shard.group);
    const Tensor& control = ClipOf(shard.group).control_2;
    for (const int id : parameters_.buckets()[shard.bucket].parameters) {
      const Parameter& parameter = parameters_.at(id);
      const int64_t begin = std::max(parameter.begin, shard.begin);
      const int64_t end =
          std::min(parameter.begin + parameter.value.num_elements(), shard.begin + shard.count);
      if (begin >= end) continue;
      params.weight_decay = parameter.weight_decay ? config_.weight_decay : 0;
      AdamwUpdate(context_, params, buffer.value.Flat(begin, end - begin),
                  buffer.grad.Flat(begin, end - begin),
                  shard.m.Flat(begin - shard.begin, end - begin),
                  shard.v.Flat(begin - shard.begin, end - begin), control);
    }
  }
}

void Optimizer::GatherParameters() {
  for (const OptimizerShard& shard : shards_) {
    const Bucket& bucket = parameters_.buckets()[shard.bucket];
    const Tensor& value = parameters_.buffer(shard.group).value;
    shard.axis->AllGather("parameters", value.Flat(shard.begin, shard.count),
                          value.Flat(bucket.begin, bucket.count));
  }
}

std::optional<double> Optimizer::Norm(ClipGroup group) const {
  const Clip& clip = clips_[static_cast<int>(group)];
  if (!clip.used) return std::nullopt;
  return std::sqrt(CopyToHost(context_, clip.sum_of_squares_1).data<double>()[0]);
}

bool Optimizer::skipped() const {
  for (const Clip& clip : clips_) {
    if (!clip.used) continue;
    const Tensor sum_of_squares_1 = CopyToHost(context_, clip.sum_of_squares_1);
    if (!std::isfinite(sum_of_squares_1.data<double>()[0])) return true;
  }
  return false;
}

}  // namespace baleen
