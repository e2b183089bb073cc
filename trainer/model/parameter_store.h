// ParameterStore: every parameter of a rank, as views into a few flat buffers.
//
// Modules declare what they need, then Allocate lays all of it out: one buffer of values per group,
// and one of gradients for the groups that train in this stage, each cut in buckets of consecutive
// parameters. Zero, reduce, norm, update and save are loops over ranges of those buffers (ZeRO-1
// cuts each bucket evenly); a frozen group owns no gradient at all.
//
// After an update a bucket's values arrive from other ranks beside what is computed meanwhile
// (BeginGather). Nobody need know: values leave the store through three functions only, value,
// StackedValue and bucket_values, and each makes what is computed next wait for its own bucket,
// where that is still on its way.
//
// Gradients begin a step without a value: the first product of a weight writes over what the last
// step left (sum), and what is asked for before any has written it is zero (grad).
#pragma once

#include <map>
#include <string>
#include <vector>

#include "kernels/core/box.h"
#include "kernels/core/context.h"
#include "kernels/ops/linear/matmul.h"
#include "parallel/grid_communicators.h"

namespace baleen {

// Decides the flat buffer, the clip group and the ranks that hold the same elements (the axis). A
// rank's gradient is its part of a sum over the axis, in every group: the reduction needs no other
// rule, and after it every element belongs to one rank, so that norms and saved states count it
// once.
enum class ParameterGroup : uint8_t {
  kMain,       // norms, latent projections, gates: whole on every rank; axis stage (dp x cp x tp)
  kTensor,     // heads, MLPs, head: cut over tp; axis dp x cp
  kEmbedding,  // the embedding table, cut over tp; axis dp x cp of the stages that hold it
  kExpert,     // routed experts, cut over ep; axis edp
  kIndexer,    // lightning indexers: whole on every rank; axis stage; clip group indexer
  kBuffer,     // e_score_correction_bias: no gradient, changed by its own rule; axis stage
};
constexpr int kNumParameterGroups = 6;
const char* ParameterGroupName(ParameterGroup group);
Communicator& AxisOf(ParameterGroup group, const GridCommunicators& grid);

// Which shards of the parameters a rank holds.
struct Placement {
  int tp_rank = 0, tp_size = 1;
  int ep_rank = 0, ep_size = 1;
};

// A parameter's values and gradient are the store's to give.
struct Parameter {
  int id = 0;
  std::string name;  // the checkpoint's
  Shape global_shape;
  Box box;  // what this rank holds of it
  ParameterGroup group = ParameterGroup::kMain;
  bool weight_decay = true;  // matrices decay, vectors (norms, biases) do not
  int bucket = 0;            // of ParameterStore::buckets()
  int64_t begin = 0;         // first element in the group's flat buffer

  int64_t num_elements() const { return NumElements(box.extent); }
};

// What is reduced, updated and gathered at once: a range of a group's flat buffer that holds
// consecutive parameters whole, and divides evenly over the group's axis.
struct Bucket {
  ParameterGroup group = ParameterGroup::kMain;
  int64_t begin = 0;
  int64_t count = 0;
  std::vector<int> parameters;  // ids
};

class ParameterStore {
 public:
  // Declares a parameter held whole, or the box of it that this rank holds. Returns its id.
  // `stacked`: it must follow the parameter declared before it without a gap (experts of one layer
  // form one [L, out, in] operand).
  int Declare(std::string name, Shape global_shape, ParameterGroup group, bool stacked = false);
  int DeclareBox(std::string name, Shape global_shape, Box box, ParameterGroup group,
                 bool stacked = false);

  // The even share of `rank` of `size` along dimension `dim`.
  int DeclareShard(std::string name, Shape global_shape, int dim, int rank, int size,
                   ParameterGroup group, bool stacked = false);

  // Lays the buffers out, values in `dtype` (kBF16 on GPUs: the working copy of the fp32 weights in
  // optimizer.h), gradients and kBuffer in StatisticsOf(dtype); each bucket is padded so that
  // ZeRO-1 cuts it evenly over its axis, and closed once it has `bucket_elements`. `trained`: the
  // groups that get gradients. Values are zero until loaded.
  static constexpr int64_t kBucketElements = int64_t{1} << 26;
  void Allocate(Context& context, DType dtype, const GridCommunicators& grid,
                const std::vector<ParameterGroup>& trained,
                int64_t bucket_elements = kBucketElements);

  const Parameter& at(int id) const { return parameters_[id]; }
  const Tensor& value(int id) const {
    Await(parameters_[id].bucket);
    return values_[id];
  }
  bool trains(int id) const { return !grads_[id].empty(); }
  // Of the step so far; an empty tensor while the group is frozen.
  const Tensor& grad(int id) const {
    if (!written_[id]) WriteZero(id);
    return grads_[id];
  }
  // For who now adds a product, or writes it where there is nothing yet, to all of it.
  struct GradientSum {
    Tensor tensor;
    Accumulate accumulate = Accumulate::kAdd;
  };
  GradientSum sum(int id) const { return {grads_[id], BeginSum(id, 1)}; }
  // Parameters first .. first + count - 1, declared stacked and of one shape, as [count, shape...].
  Tensor StackedValue(int first, int count) const;
  GradientSum StackedSum(int first, int count) const;

  const std::vector<Parameter>& parameters() const { return parameters_; }
  int size() const { return static_cast<int>(parameters_.size()); }
  // -1 when there is none of that name.
  int Find(const std::string& name) const;
  DType dtype() const { return dtype_; }  // of the values, kBuffer's apart
  // Of the rank's parameters, without padding.
  int64_t num_elements(ParameterGroup group) const { return buffers_[Index(group)].elements; }

  const std::vector<Bucket>& buckets() const { return buckets_; }
  // [count], flat; of the gradients an empty tensor while the group is frozen.
  Tensor bucket_values(int bucket) const;
  Tensor bucket_gradients(int bucket) const;
  // A step begins: nothing has been added to the gradients of a bucket.
  void ForgetGradients(int bucket);

  // Each rank of the bucket's axis has changed its even share of the values: gathers the shares,
  // beside what is computed next. Every rank of the axis calls it for the same buckets in the same
  // order. `axis` lives as long as somebody may ask for a value.
  void BeginGather(int bucket, Communicator& axis);

 private:
  struct FlatBuffer {
    Tensor value;          // [padded]
    Tensor grad;           // [padded], empty while frozen
    int64_t elements = 0;  // of the parameters, without padding
  };
  // A gather that nothing waits for yet.
  struct Arrival {
    Communicator* axis = nullptr;  // null: the bucket's values are there
    uint64_t call = 0;
  };
  static int Index(ParameterGroup group) { return static_cast<int>(group); }
  void Await(int bucket) const {
    if (arrivals_[bucket].axis != nullptr) WaitFor(arrivals_[bucket]);
  }
  static void WaitFor(Arrival& arrival);
  // Places the parameters of a group; returns the padded length of its buffer.
  int64_t LayOut(ParameterGroup group, int shards, int64_t bucket_elements);
  Tensor Stacked(const Tensor& buffer, int first, int count) const;
  // What the next product does to these gradients; they have a value behind it.
  Accumulate BeginSum(int first, int count) const;
  void WriteZero(int id) const;
  const Context* context_ = nullptr;  // that the buffers lie in
  std::vector<Parameter> parameters_;
  std::vector<Tensor> values_, grads_;  // by id
  mutable std::vector<bool> written_;   // by id: the gradient has a value
  std::vector<bool> stacked_;
  std::map<std::string, int> ids_;
  FlatBuffer buffers_[kNumParameterGroups];
  std::vector<Bucket> buckets_;
  // By bucket. A reader changes what the device waits for, not what the store holds.
  mutable std::vector<Arrival> arrivals_;
  DType dtype_ = DType::kF32;
};

}  // namespace baleen
