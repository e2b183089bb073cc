#include "trainer/optimizer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/core/transfer.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/reduce.h"

namespace baleen {
namespace {

// Where two ranges of elements meet; empty (count <= 0) where they do not.
struct Overlap {
  int64_t begin = 0, end = 0;
  int64_t count() const { return end - begin; }
};
Overlap Meet(int64_t a_begin, int64_t a_count, int64_t b_begin, int64_t b_count) {
  return {std::max(a_begin, b_begin), std::min(a_begin + a_count, b_begin + b_count)};
}

// The share's ranges of one weight decay: vectors have none, and padding needs none.
struct DecayRanges {
  std::vector<int64_t> begin;
  std::vector<double> decay;
};
DecayRanges RangesOf(const ParameterStore& parameters, const OptimizerShard& shard,
                     double weight_decay) {
  DecayRanges ranges;
  const auto add = [&](int64_t begin, double decay) {
    if (!ranges.decay.empty() && ranges.decay.back() == decay) return;
    ranges.begin.push_back(begin);
    ranges.decay.push_back(decay);
  };
  int64_t end = 0;
  for (const int id : parameters.buckets()[shard.bucket].parameters) {
    const Parameter& parameter = parameters.at(id);
    const Overlap own = Meet(parameter.begin, parameter.num_elements(), shard.begin, shard.count);
    if (own.count() <= 0) continue;
    if (own.begin - shard.begin > end) add(end, 0);
    add(own.begin - shard.begin, parameter.weight_decay ? weight_decay : 0);
    end = own.end - shard.begin;
  }
  if (end < shard.count) add(end, 0);
  ranges.begin.push_back(shard.count);
  return ranges;
}

}  // namespace

Optimizer::Optimizer(Context& context, ParameterStore& parameters, const OptimizerConfig& config,
                     const std::vector<ParameterGroup>& trained, const GridCommunicators& grid,
                     Communicator& world)
    : context_(context), parameters_(parameters), config_(config), world_(world) {
  const ScopedUse use(context, "optimizer");
  const std::vector<Bucket>& buckets = parameters.buckets();
  for (size_t index = 0; index < buckets.size(); ++index) {
    const Bucket& bucket = buckets[index];
    const Tensor values = parameters.bucket_values(static_cast<int>(index));
    OptimizerShard shard;
    shard.group = bucket.group;
    shard.axis = &AxisOf(bucket.group, grid);
    shard.bucket = static_cast<int>(index);
    CHECK_EQ(bucket.count % shard.axis->size(), 0);
    shard.count = bucket.count / shard.axis->size();
    shard.begin = bucket.begin + shard.count * shard.axis->rank();
    const bool rounded = values.dtype() != StatisticsOf(values.dtype());
    if (!rounded) shard.master = ShareOf(shard, values);
    if (std::find(trained.begin(), trained.end(), bucket.group) != trained.end()) {
      if (rounded) shard.master = context.Zeros(StatisticsOf(values.dtype()), {shard.count});
      AddTrainingState(shard);
      update_order_.push_back(shard.bucket);
    }
    shards_.push_back(std::move(shard));
  }
  // Modules declare their parameters in the order of the forward.
  std::sort(update_order_.begin(), update_order_.end(), [&](int a, int b) {
    return buckets[a].parameters.front() < buckets[b].parameters.front();
  });
  missing_.assign(shards_.size(), 0);
}

Tensor Optimizer::ShareOf(const OptimizerShard& shard, const Tensor& bucket) const {
  return bucket.Flat(shard.begin - parameters_.buckets()[shard.bucket].begin, shard.count);
}

void Optimizer::AddTrainingState(OptimizerShard& shard) {
  const DType dtype = shard.master.dtype();
  const DType moments = config_.moments == MomentsDType::kBf16 ? DType::kBF16 : dtype;
  shard.m = context_.Zeros(moments, {shard.count});
  shard.v = context_.Zeros(moments, {shard.count});
  const DecayRanges ranges = RangesOf(parameters_, shard, config_.weight_decay);
  const Context host = context_.Host();
  const Tensor begin = host.Empty(DType::kI64, {static_cast<int64_t>(ranges.begin.size())});
  std::memcpy(begin.raw(), ranges.begin.data(), static_cast<size_t>(begin.bytes()));
  const Tensor decay = host.Empty(dtype, {static_cast<int64_t>(ranges.decay.size())});
  for (size_t n = 0; n < ranges.decay.size(); ++n) {
    if (dtype == DType::kF64) {
      decay.data<double>()[n] = ranges.decay[n];
    } else {
      decay.data<float>()[n] = static_cast<float>(ranges.decay[n]);
    }
  }
  shard.decay_begin_N1 = CopyToDevice(context_, begin);
  shard.decay_N = CopyToDevice(context_, decay);
  Clip& clip = ClipOf(shard.group);
  if (clip.used) return;
  clip.used = true;
  clip.max_norm =
      shard.group == ParameterGroup::kIndexer ? config_.clip_grad.indexer : config_.clip_grad.main;
  clip.sum_of_squares_1 = context_.Zeros(DType::kF64, {1});
  clip.control_2 = context_.Zeros(dtype, {2});
}

void Optimizer::SetValues(int id, int64_t first, const Tensor& values, Origin origin) {
  const Parameter& parameter = parameters_.at(id);
  const int64_t count = values.num_elements(), begin = parameter.begin + first;
  const Tensor value = parameters_.value(id).Reshaped({parameter.num_elements()});
  CHECK(values.dtype() == StatisticsOf(value.dtype()) && values.device() == Device{} &&
        first + count <= value.num_elements())
      << parameter.name << " from " << first << ": " << values.DebugString();
  const Tensor on_device = CopyToDevice(context_, values.Reshaped({count}));
  Copy(context_, InDtype(context_, on_device, value.dtype()), value.Flat(first, count));
  OptimizerShard& shard = shards_[parameter.bucket];
  if (value.dtype() == values.dtype()) return;  // the master is that range itself
  const Overlap own = Meet(begin, count, shard.begin, shard.count);
  if (own.count() <= 0) return;
  if (shard.master.empty()) {
    if (origin == Origin::kSource) return;
    shard.master = Context::Cpu().Zeros(values.dtype(), {shard.count});
  }
  Transfer(context_, values.Reshaped({count}).Flat(own.begin - begin, own.count()),
           shard.master.Flat(own.begin - shard.begin, own.count()));
}

void Optimizer::BeginStep() {
  for (const OptimizerShard& shard : shards_) {
    if (!shard.trains()) continue;
    parameters_.ForgetGradients(shard.bucket);
    missing_[shard.bucket] =
        static_cast<int>(parameters_.buckets()[shard.bucket].parameters.size());
  }
}

void Optimizer::GradientsReady(int first, int end) {
  for (int id = first; id < end; ++id) {
    OptimizerShard& shard = shards_[parameters_.at(id).bucket];
    if (!shard.trains() || shard.group == ParameterGroup::kEmbedding) continue;
    if (--missing_[shard.bucket] == 0) Reduce(shard);
  }
}

void Optimizer::Reduce(OptimizerShard& shard) {
  const Tensor gradients = parameters_.bucket_gradients(shard.bucket);
  shard.axis->Fork();  // the backward goes on beside it
  shard.axis->ReduceScatter("gradients", gradients, ShareOf(shard, gradients));
  missing_[shard.bucket] = 0;
}

void Optimizer::ReduceRest() {
  for (OptimizerShard& shard : shards_) {
    if (missing_[shard.bucket] > 0) Reduce(shard);
  }
}

void Optimizer::ReduceGradients() {
  ReduceRest();
  for (OptimizerShard& shard : shards_) shard.axis->Join();
}

void Optimizer::ComputeNorms() {
  for (Clip& clip : clips_) {
    if (clip.used) FillZero(context_, clip.sum_of_squares_1);
  }
  for (const OptimizerShard& shard : shards_) {
    if (!shard.trains()) continue;
    AddSumOfSquares(context_, ShareOf(shard, parameters_.bucket_gradients(shard.bucket)),
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
  const AdamwParams params{.lr = lr,
                           .beta1 = config_.betas[0],
                           .beta2 = config_.betas[1],
                           .eps = config_.eps,
                           .weight_decay = 0,  // by range
                           .step = step};
  for (const int index : update_order_) {
    const OptimizerShard& shard = shards_[index];
    UpdateShard(shard, params);
    parameters_.BeginGather(shard.bucket, *shard.axis);
  }
}

void Optimizer::UpdateShard(const OptimizerShard& shard, const AdamwParams& params) {
  // Asked for in any case: the last update's gather has read the share when this one writes it.
  const Tensor values = ShareOf(shard, parameters_.bucket_values(shard.bucket));
  const bool rounded = values.dtype() != shard.master.dtype();
  AdamwUpdate(context_, params,
              {.param = shard.master,
               .grad = ShareOf(shard, parameters_.bucket_gradients(shard.bucket)),
               .m = shard.m,
               .v = shard.v,
               .working = rounded ? values : Tensor(),
               .decay_begin_N1 = shard.decay_begin_N1,
               .decay_N = shard.decay_N},
              ClipOf(shard.group).control_2);
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
