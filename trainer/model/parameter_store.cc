#include "trainer/model/parameter_store.h"

#include <algorithm>
#include <utility>

#include "kernels/core/check.h"
#include "kernels/ops/elementwise.h"

namespace baleen {
namespace {

// Every parameter (or stack) starts on 64 elements, so that vector loads of any dtype are aligned.
constexpr int64_t kAlignment = 64;

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

const char* ParameterGroupName(ParameterGroup group) {
  switch (group) {
    case ParameterGroup::kMain:
      return "main";
    case ParameterGroup::kTensor:
      return "tensor";
    case ParameterGroup::kEmbedding:
      return "embedding";
    case ParameterGroup::kExpert:
      return "expert";
    case ParameterGroup::kIndexer:
      return "indexer";
    case ParameterGroup::kBuffer:
      return "buffer";
  }
  return "";
}

Communicator& AxisOf(ParameterGroup group, const GridCommunicators& grid) {
  switch (group) {
    case ParameterGroup::kTensor:
      return *grid.dp_cp;
    case ParameterGroup::kEmbedding:
      return *grid.embedding;
    case ParameterGroup::kExpert:
      return *grid.edp;
    case ParameterGroup::kMain:
    case ParameterGroup::kIndexer:
    case ParameterGroup::kBuffer:
      break;
  }
  return *grid.stage;
}

int ParameterStore::Declare(std::string name, Shape global_shape, ParameterGroup group,
                            bool stacked) {
  Box box = WholeBox(global_shape);
  return DeclareBox(std::move(name), std::move(global_shape), std::move(box), group, stacked);
}

int ParameterStore::DeclareShard(std::string name, Shape global_shape, int dim, int rank, int size,
                                 ParameterGroup group, bool stacked) {
  CHECK_EQ(global_shape[dim] % size, 0) << name << " over " << size;
  Box box = WholeBox(global_shape);
  box.extent[dim] /= size;
  box.offset[dim] = box.extent[dim] * rank;
  return DeclareBox(std::move(name), std::move(global_shape), std::move(box), group, stacked);
}

int ParameterStore::DeclareBox(std::string name, Shape global_shape, Box box, ParameterGroup group,
                               bool stacked) {
  const int id = static_cast<int>(parameters_.size());
  CHECK(ids_.emplace(name, id).second) << name << " declared twice";
  CHECK(!stacked || (id > 0 && parameters_[id - 1].group == group)) << name << " cannot be stacked";
  Parameter parameter;
  parameter.id = id;
  parameter.name = std::move(name);
  parameter.weight_decay = global_shape.size() >= 2;
  parameter.global_shape = std::move(global_shape);
  parameter.box = std::move(box);
  parameter.group = group;
  buffers_[Index(group)].elements += NumElements(parameter.box.extent);
  parameters_.push_back(std::move(parameter));
  stacked_.push_back(stacked);
  return id;
}

int64_t ParameterStore::LayOut(ParameterGroup group, int shards, int64_t bucket_elements) {
  Bucket bucket{.group = group};
  int64_t end = 0;
  const auto close = [&] {
    if (bucket.parameters.empty()) return;
    bucket.count = RoundUp(end - bucket.begin, kAlignment * shards);
    end = bucket.begin + bucket.count;
    buckets_.push_back(std::exchange(bucket, {.group = group, .begin = end}));
  };
  for (int id = 0; id < size(); ++id) {
    Parameter& parameter = parameters_[id];
    if (parameter.group != group) continue;
    if (!stacked_[id]) {
      if (end - bucket.begin >= bucket_elements) close();
      end = RoundUp(end, kAlignment);
    }
    parameter.begin = end;
    parameter.bucket = static_cast<int>(buckets_.size());
    end += parameter.num_elements();
    bucket.parameters.push_back(id);
  }
  close();
  return end;
}

void ParameterStore::Allocate(Context& context, DType dtype, const GridCommunicators& grid,
                              const std::vector<ParameterGroup>& trained, int64_t bucket_elements) {
  context_ = &context;
  dtype_ = dtype;
  for (int g = 0; g < kNumParameterGroups; ++g) {
    const auto group = static_cast<ParameterGroup>(g);
    FlatBuffer& buffer = buffers_[g];
    const int64_t padded = LayOut(group, AxisOf(group, grid).size(), bucket_elements);
    {
      const ScopedUse use(context, "parameters");
      buffer.value =
          context.Zeros(group == ParameterGroup::kBuffer ? StatisticsOf(dtype) : dtype, {padded});
    }
    if (std::find(trained.begin(), trained.end(), group) != trained.end()) {
      const ScopedUse use(context, "gradients");
      buffer.grad = context.Zeros(StatisticsOf(dtype), {padded});
    }
  }
  arrivals_.resize(buckets_.size());
  for (Parameter& parameter : parameters_) {
    const FlatBuffer& buffer = buffers_[Index(parameter.group)];
    const int64_t count = parameter.num_elements();
    values_.push_back(buffer.value.Flat(parameter.begin, count).Reshaped(parameter.box.extent));
    const bool trains = !buffer.grad.empty();
    grads_.push_back(trains
                         ? buffer.grad.Flat(parameter.begin, count).Reshaped(parameter.box.extent)
                         : Tensor());
  }
  written_.assign(parameters_.size(), true);
}

Tensor ParameterStore::Stacked(const Tensor& buffer, int first, int count) const {
  const Parameter& front = parameters_[first];
  for (int id = first + 1; id < first + count; ++id) {
    CHECK(stacked_[id] && parameters_[id].box.extent == front.box.extent) << parameters_[id].name;
  }
  Shape shape = front.box.extent;
  const int64_t elements = NumElements(shape);
  shape.insert(shape.begin(), count);
  return buffer.Flat(front.begin, elements * count).Reshaped(shape);
}

Tensor ParameterStore::StackedValue(int first, int count) const {
  Await(parameters_[first].bucket);  // what is stacked is in one bucket
  return Stacked(buffers_[Index(parameters_[first].group)].value, first, count);
}

void ParameterStore::WriteZero(int id) const {
  FillZero(*context_, grads_[id]);
  written_[id] = true;
}

// Of a stack in which some have a value and some have none, the latter become zero.
Accumulate ParameterStore::BeginSum(int first, int count) const {
  const auto begin = written_.begin() + first, end = begin + count;
  const bool any = std::find(begin, end, true) != end;
  for (int id = first; id < first + count; ++id) {
    if (any && !written_[id]) WriteZero(id);
    written_[id] = true;
  }
  return any ? Accumulate::kAdd : Accumulate::kOverwrite;
}

ParameterStore::GradientSum ParameterStore::StackedSum(int first, int count) const {
  return {Stacked(buffers_[Index(parameters_[first].group)].grad, first, count),
          BeginSum(first, count)};
}

Tensor ParameterStore::bucket_values(int index) const {
  Await(index);
  const Bucket& bucket = buckets_[index];
  return buffers_[Index(bucket.group)].value.Flat(bucket.begin, bucket.count);
}

Tensor ParameterStore::bucket_gradients(int index) const {
  const Bucket& bucket = buckets_[index];
  const Tensor& grad = buffers_[Index(bucket.group)].grad;
  if (grad.empty()) return {};
  for (const int id : bucket.parameters) {
    if (!written_[id]) WriteZero(id);
  }
  return grad.Flat(bucket.begin, bucket.count);
}

void ParameterStore::ForgetGradients(int index) {
  for (const int id : buckets_[index].parameters) written_[id] = !trains(id);
}

void ParameterStore::BeginGather(int index, Communicator& axis) {
  CHECK(arrivals_[index].axis == nullptr) << "bucket " << index << " is on its way";
  if (axis.size() == 1) return;
  const Tensor values = bucket_values(index);
  const int64_t share = values.num_elements() / axis.size();
  const uint64_t call =
      axis.BeginAllGather("parameters", values.Flat(axis.rank() * share, share), values);
  arrivals_[index] = {&axis, call};
}

void ParameterStore::WaitFor(Arrival& arrival) {
  arrival.axis->Wait(arrival.call);
  arrival = {};
}

int ParameterStore::Find(const std::string& name) const {
  const auto found = ids_.find(name);
  return found == ids_.end() ? -1 : found->second;
}

}  // namespace baleen
