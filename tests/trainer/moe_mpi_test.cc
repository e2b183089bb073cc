// The MoE module with its experts on several ranks against the same module on one rank that has all
// tokens: outputs, input gradients, balance loss, and every piece of every weight gradient.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <optional>

#include "kernels/ops/moe/permute.h"
#include "parallel/expert_exchange.h"
#include "parallel/mpi_communicator.h"
#include "tests/support/random_tensor.h"
#include "trainer/model/moe.h"

namespace baleen {
namespace {

using testing::RandomTensor;
using testing::RelativeError;

constexpr double kTolerance = 1e-12;
constexpr int64_t kSequences = 2;  // of one data-parallel rank
constexpr int64_t kLength = 16;    // divides in 2 * 8 chunks
constexpr double kBalanceScale = 0.3;

ModelConfig SmallConfig() {
  ModelConfig c;
  c.hidden_size = 12;
  c.moe_intermediate_size = 8;
  c.n_routed_experts = 8;
  c.n_shared_experts = 1;
  c.num_experts_per_tok = 3;
  c.n_group = 4;
  c.topk_group = 2;
  return c;
}

struct Layout {
  int ranks = 1, tensor = 1, context = 1, expert = 1;
  int node_size = 0;
  int64_t rows_over_minimum = -1;  // bound on expert rows; -1: none
  bool drop = false;               // selective recompute
  double favour = 0;               // bias of experts 0 and 1: everything to the first rank
};

// What the module reads of a batch.
Batch BatchOf(const Context& context, int64_t sequences, const RowShare& share) {
  Batch batch;
  batch.num_sequences = sequences;
  batch.seq_length = kLength;
  const std::vector<int32_t> rows = ZigzagRows(sequences, kLength, share.rank(), share.size());
  std::vector<int32_t> sequence_of_row;
  for (const int32_t row : rows) sequence_of_row.push_back(static_cast<int32_t>(row / kLength));
  const Shape shape = {static_cast<int64_t>(rows.size())};
  batch.row_R = testing::IntTensorOf(context, shape, rows);
  batch.sequence_R = testing::IntTensorOf(context, shape, sequence_of_row);
  return batch;
}

// A module with its parameters, forward and backward over some rows.
class Rig {
 public:
  Rig(const GridCommunicators& axes, const Placement& placement, ModelOptions options,
      double favour)
      : axes_(axes),
        options_(std::move(options)),
        moe_(config_, "model.layers.3", placement, store_) {
    store_.Allocate(context_, DType::kF64, axes,
                    {ParameterGroup::kMain, ParameterGroup::kTensor, ParameterGroup::kExpert});
    for (const Parameter& p : store_.parameters()) {
      Fill(p);
      if (p.group != ParameterGroup::kBuffer) continue;
      for (int e = 0; e < 2; ++e) store_.value(p.id).data<double>()[e] += favour;
    }
  }

  void Run(const Batch& batch, const Tensor& x_RD, const Tensor& dy_RD, bool drop) {
    const ModelContext model{context_, config_, options_, store_, rope_, axes_};
    moe_.Dispatch(model, batch, x_RD, /*balance_loss=*/true, saved_);
    const Tensor shared = moe_.Experts(model, saved_);
    y_RD = moe_.Combine(model, shared, saved_);
    const Tensor balance_1 = context_.Zeros(DType::kF64, {1});
    moe_.AddBalanceLoss(model, batch, saved_, balance_1);
    balance_loss = balance_1.data<double>()[0];
    if (drop) moe_.DropExpanded(saved_);
    moe_.BackwardCombine(model, dy_RD, saved_);
    moe_.BackwardExperts(model, saved_);
    dx_RD = moe_.BackwardDispatch(model, batch, kBalanceScale, saved_);
    moe_.BackwardWeight(model, saved_);
  }

  const ParameterStore& store() const { return store_; }
  const ExpertPlan& plan() const { return saved_.plan; }
  const Context& context() const { return context_; }
  Tensor y_RD, dx_RD;
  double balance_loss = 0;

 private:
  // The box of a random tensor that the name decides.
  void Fill(const Parameter& p) {
    const Tensor whole =
        RandomTensor(context_, DType::kF64, p.global_shape, std::hash<std::string>()(p.name), 0.4);
    CopyBox(whole, p, store_.value(p.id));
  }
  static void CopyBox(const Tensor& whole, const Parameter& p, const Tensor& value) {
    const int64_t columns = p.box.extent.back(), whole_columns = p.global_shape.back();
    const int64_t rows = p.num_elements() / columns;
    const int64_t first_row = p.box.extent.size() == 2 ? p.box.offset[0] : 0;
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(value.data<double>() + r * columns,
                  whole.data<double>() + (first_row + r) * whole_columns + p.box.offset.back(),
                  columns * sizeof(double));
    }
  }

  Context context_ = Context::Cpu();
  const GridCommunicators& axes_;
  ModelConfig config_ = SmallConfig();
  ModelOptions options_;
  ParameterStore store_;
  RopeTable rope_;
  Moe moe_;
  Moe::Saved saved_;
};

// The piece of the whole gradient that a rank holds.
std::vector<double> Piece(const Tensor& whole, const Parameter& p) {
  std::vector<double> values;
  const int64_t columns = p.box.extent.back(), rows = p.num_elements() / columns;
  const int64_t first_row = p.box.extent.size() == 2 ? p.box.offset[0] : 0;
  for (int64_t r = 0; r < rows; ++r) {
    const double* const row =
        whole.data<double>() + (first_row + r) * p.global_shape.back() + p.box.offset.back();
    values.insert(values.end(), row, row + columns);
  }
  return values;
}

class MoeLayoutTest : public ::testing::Test {
 protected:
  // Returns the number of rounds; nothing on a rank that is left over.
  std::optional<size_t> Check(const Layout& layout) {
    const auto part = world_->Split(world_->rank() / layout.ranks, world_->rank(), "part");
    if (part->size() < layout.ranks) return std::nullopt;
    SCOPED_TRACE(absl::StrCat("ranks ", layout.ranks, " tp ", layout.tensor, " cp ", layout.context,
                              " ep ", layout.expert, " node ", layout.node_size, " rows ",
                              layout.rows_over_minimum, " rank ", part->rank()));
    const auto grid = ProcessGrid::Make(
        layout.ranks,
        {.tensor = layout.tensor, .expert = layout.expert, .context = layout.context});
    CHECK_OK(grid.status());
    const GridCommunicators axes = SplitGrid(*part, *grid, {0}, layout.node_size);
    const ProcessGrid::Coordinates at = grid->At(part->rank());
    ModelOptions options;
    const ModelConfig config = SmallConfig();
    if (layout.rows_over_minimum >= 0) {
      options.expert_rows =
          layout.rows_over_minimum +
          MinimumExpertRows(layout.expert, config.n_routed_experts / layout.expert,
                            config.num_experts_per_tok, layout.node_size);
    }
    Rig rig(axes, {at.tp, layout.tensor, at.ep, layout.expert}, options, layout.favour);
    const Context& context = rig.context();

    const int64_t sequences = kSequences * grid->dp_size();
    const Shape shape = {sequences * kLength, config.hidden_size};
    const Tensor x = RandomTensor(context, DType::kF64, shape, 5);
    const Tensor dy = RandomTensor(context, DType::kF64, shape, 6);
    const Batch batch = BatchOf(context, kSequences, {at.cp, layout.context, at.tp, layout.tensor});
    const auto own = [&](const Tensor& of_all) {
      const int64_t begin = at.dp * kSequences * kLength;
      return GatherRows(context, of_all.Rows(begin, begin + kSequences * kLength), batch.row_R);
    };
    rig.Run(batch, own(x), own(dy), layout.drop);
    if (options.expert_rows > 0) {
      EXPECT_LE(rig.plan().max_held_rows(), options.expert_rows);
    }

    const GridCommunicators self = MakeSelfGrid();
    Rig whole(self, Placement(), ModelOptions(), layout.favour);
    whole.Run(BatchOf(context, sequences, RowShare()), x, dy, /*drop=*/false);

    EXPECT_LE(RelativeError(rig.y_RD, own(whole.y_RD)), kTolerance);
    EXPECT_LE(RelativeError(rig.dx_RD, own(whole.dx_RD)), kTolerance);
    const Tensor loss = testing::TensorOf(context, DType::kF64, {1}, {rig.balance_loss});
    part->AllReduce("balance", loss);
    EXPECT_NEAR(loss.data<double>()[0], whole.balance_loss, kTolerance * whole.balance_loss);
    CompareGradients(rig, whole, axes);
    return rig.plan().rounds.size();
  }

  void CompareGradients(const Rig& rig, const Rig& whole, const GridCommunicators& axes) {
    int64_t experts = 0;
    for (const Parameter& p : rig.store().parameters()) {
      if (!rig.store().trains(p.id)) continue;
      AxisOf(p.group, axes).AllReduce(p.name, rig.store().grad(p.id));
      const Tensor& expected = whole.store().grad(whole.store().Find(p.name));
      EXPECT_LE(RelativeError(testing::ToDoubles(rig.store().grad(p.id)), Piece(expected, p)),
                kTolerance)
          << p.name;
      experts += p.group == ParameterGroup::kExpert;
    }
    EXPECT_EQ(experts, 3 * SmallConfig().n_routed_experts / axes.ep->size());
  }

  std::unique_ptr<Communicator> world_ = WrapMpiWorld();
};

std::vector<Layout> Fitting(int ranks) {
  std::vector<Layout> layouts = {
      {},
      {.ranks = 2, .expert = 2},
      {.ranks = 2, .tensor = 2, .expert = 2},
      {.ranks = 2, .context = 2},
      {.ranks = 4, .expert = 4},
      {.ranks = 4, .expert = 2},
      {.ranks = 4, .tensor = 2, .expert = 4, .node_size = 2},
      {.ranks = 8, .expert = 8, .node_size = 4},
      {.ranks = 8, .tensor = 2, .context = 2, .expert = 4},
      {.ranks = 8, .tensor = 2, .context = 2, .expert = 8, .node_size = 2},
      {.ranks = 8, .tensor = 2, .context = 4, .expert = 2},
  };
  std::erase_if(layouts, [&](const Layout& layout) { return layout.ranks > ranks; });
  return layouts;
}

TEST_F(MoeLayoutTest, EveryLayoutIsTheModuleOfOneRank) {
  for (const Layout& layout : Fitting(world_->size())) EXPECT_EQ(Check(layout).value_or(1), 1u);
}

TEST_F(MoeLayoutTest, RecomputeSendsTheRowsAgain) {
  for (Layout layout : Fitting(world_->size())) {
    layout.drop = true;
    Check(layout);
  }
}

TEST_F(MoeLayoutTest, RoundsHoldFewerRowsAndGiveTheSame) {
  for (Layout layout : Fitting(world_->size())) {
    for (const int64_t slack : {0, 20}) {
      layout.rows_over_minimum = slack;
      layout.drop = slack > 0;
      const std::optional<size_t> rounds = Check(layout);
      if (slack == 0 && rounds) {
        EXPECT_GT(*rounds, 1u);
      }
    }
  }
}

TEST_F(MoeLayoutTest, EveryTokenToOneRankAndNoneToTheOthers) {
  for (Layout layout : Fitting(world_->size())) {
    layout.favour = 100;
    Check(layout);
    layout.rows_over_minimum = 0;
    Check(layout);
  }
}

}  // namespace
}  // namespace baleen
