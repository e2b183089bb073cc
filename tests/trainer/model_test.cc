// Properties of the whole model: sparse over all keys is dense, recompute changes no bit, the
// warm-up touches nothing but the indexers, microbatches add up, and memory stays below any L x L
// array.
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "absl/strings/match.h"
#include "kernels/core/random.h"
#include "tests/support/random_tensor.h"
#include "tests/trainer/model_rig.h"

namespace baleen {
namespace {

using testing::ModelRig;
using testing::RelativeError;
using testing::RigOptions;
using testing::SameBits;
using testing::TinyConfig;
using testing::ToDoubles;

std::vector<double> RandomTokens(int64_t sequences, int64_t length, uint64_t seed) {
  const RandomStream random(seed, NameStream("tokens"));
  std::vector<double> tokens(sequences * (length + 1));
  for (size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<double>(random.Integer(i) % 96);
  return tokens;
}

PassOptions AllLosses(const Batch& batch) {
  PassOptions pass;
  const auto rows = static_cast<double>(batch.num_rows());
  pass.scales = {.lm = 1 / rows, .mtp = 0.3 / rows, .kl = 1 / rows, .balance = 0.01};
  return pass;
}

struct TrainedRig {
  std::unique_ptr<ModelRig> rig;
  StepStats stats;
};

TrainedRig TrainOnce(const RigOptions& options, int64_t length = 40) {
  TrainedRig result;
  result.rig = std::make_unique<ModelRig>(options, TinyConfig(), 11);
  const Batch batch = result.rig->BatchOf(RandomTokens(2, length, 5), 2);
  result.stats = result.rig->NewStats();
  ModelPart::Saved saved;
  result.rig->Train(batch, AllLosses(batch), result.stats, saved);
  return result;
}

TEST(Model, SparseOverAllKeysEqualsDenseForwardAndBackward) {
  RigOptions dense;
  dense.model.attention = AttentionForm::kDense;
  const TrainedRig reference = TrainOnce(dense);
  for (const AttentionForm form : {AttentionForm::kSparse, AttentionForm::kMaskedDense}) {
    RigOptions sparse;
    sparse.model.attention = form;
    sparse.index_topk = 40;
    const TrainedRig found = TrainOnce(sparse);
    EXPECT_NEAR(found.stats.lm_loss_1.data<double>()[0],
                reference.stats.lm_loss_1.data<double>()[0], 1e-9);
    for (const Parameter& p : found.rig->store_.parameters()) {
      if (!found.rig->store_.trains(p.id) || p.group == ParameterGroup::kIndexer) continue;
      const Tensor& expected = reference.rig->store_.grad(reference.rig->store_.Find(p.name));
      EXPECT_LE(RelativeError(found.rig->store_.grad(p.id), expected), 1e-11) << p.name;
    }
  }
}

// What is told may be sent away: it does not change any more. A block's MLP is told while the
// gradients of its attention are still to come.
TEST(Model, TellsOfEachGradientOnceAndWhenItIsWhole) {
  for (const bool weights_with_input : {false, true}) {
    RigOptions options;
    options.model.attention = AttentionForm::kSparse;
    options.model.weights_with_input = weights_with_input;
    ModelRig rig(options, TinyConfig(), 11);
    const ParameterStore& store = rig.store_;
    std::map<int, std::vector<double>> told;
    int mlps = 0;
    const GradientsReady ready = [&](int first, int end) {
      for (int id = first; id < end; ++id) {
        if (!store.trains(id)) continue;
        EXPECT_TRUE(told.emplace(id, ToDoubles(store.grad(id))).second)
            << store.at(id).name << " is told twice";
      }
      const std::string& name = store.at(end - 1).name;
      if (!absl::StrContains(name, ".mlp.") || absl::StrContains(name, ".layers.3.")) return;
      const Tensor& attention = store.grad(store.Find(absl::StrCat(
          name.substr(0, name.find(".mlp.")), ".self_attn.kv_a_proj_with_mqa.weight")));
      for (int64_t i = 0; i < attention.num_elements(); ++i)
        ASSERT_EQ(attention.data<double>()[i], 0) << "formed before " << name << " was told";
      ++mlps;
    };
    const Batch batch = rig.BatchOf(RandomTokens(2, 40, 5), 2);
    const PassOptions pass = AllLosses(batch);
    StepStats stats = rig.NewStats();
    ModelPart::Saved saved;
    const ModelPart& network = rig.network();
    network.Forward(rig.context(), batch, pass, Tensor(), stats, saved);
    network.BackwardInput(rig.context(), batch, pass, Tensor(), stats, saved,
                          weights_with_input ? ready : nullptr);
    network.BackwardWeight(rig.context(), batch, pass, stats, saved, ready);
    EXPECT_EQ(mlps, 3);
    for (const Parameter& p : store.parameters()) {
      if (!store.trains(p.id) || p.group == ParameterGroup::kEmbedding) continue;
      ASSERT_EQ(told.count(p.id), 1u) << p.name;
      EXPECT_TRUE(told[p.id] == ToDoubles(store.grad(p.id))) << p.name;
    }
  }
}

// Also when the backward forms each block's weight gradients right behind its input's.
TEST(Model, RecomputeGivesTheSameBits) {
  for (const AttentionForm form : {AttentionForm::kDense, AttentionForm::kSparse}) {
    RigOptions options;
    options.dtype = DType::kF32;
    options.model.attention = form;
    options.model.indexer_loss =
        form == AttentionForm::kSparse ? IndexerLossKind::kSparse : IndexerLossKind::kNone;
    const TrainedRig reference = TrainOnce(options);
    for (int variant = 1; variant < 6; ++variant) {
      options.model.recompute = static_cast<RecomputeMode>(variant % 3);
      options.model.weights_with_input = variant >= 3;
      const TrainedRig found = TrainOnce(options);
      EXPECT_EQ(found.stats.lm_loss_1.data<double>()[0],
                reference.stats.lm_loss_1.data<double>()[0]);
      for (const Parameter& p : found.rig->store_.parameters()) {
        if (!found.rig->store_.trains(p.id)) continue;
        EXPECT_TRUE(SameBits(found.rig->store_.grad(p.id),
                             reference.rig->store_.grad(reference.rig->store_.Find(p.name))))
            << p.name;
      }
    }
  }
}

TEST(Model, RecomputeKeepsLessBetweenForwardAndBackward) {
  int64_t previous = INT64_MAX;
  for (const RecomputeMode mode :
       {RecomputeMode::kNone, RecomputeMode::kSelective, RecomputeMode::kFull}) {
    RigOptions options;
    options.model.attention = AttentionForm::kSparse;
    options.model.recompute = mode;
    ModelRig rig(options, TinyConfig(), 11);
    const Batch batch = rig.BatchOf(RandomTokens(1, 256, 5), 1);
    StepStats stats = rig.NewStats();
    ModelPart::Saved saved;
    rig.network().Forward(rig.context(), batch, AllLosses(batch), Tensor(), stats, saved);
    const int64_t held = rig.context_.pool().Uses().at("activations").bytes;
    EXPECT_LT(held, previous);
    previous = held;
  }
}

TEST(Model, WeightGradientsWithTheInputsHoldOneBlockAtATime) {
  int64_t peaks[2];
  for (const bool with_input : {false, true}) {
    RigOptions options;
    options.model.attention = AttentionForm::kSparse;
    options.model.recompute = RecomputeMode::kFull;
    options.model.weights_with_input = with_input;
    ModelRig rig(options, TinyConfig(), 11);
    const Batch batch = rig.BatchOf(RandomTokens(1, 256, 5), 1);
    StepStats stats = rig.NewStats();
    ModelPart::Saved saved;
    rig.network().Forward(rig.context(), batch, AllLosses(batch), Tensor(), stats, saved);
    rig.context_.pool().ResetPeak();
    rig.network().BackwardInput(rig.context(), batch, AllLosses(batch), Tensor(), stats, saved);
    peaks[with_input] = rig.context_.pool().Uses().at("activations").peak_bytes;
  }
  // 3 blocks against one.
  EXPECT_LT(peaks[1], peaks[0] * 2 / 3) << peaks[0];
}

TEST(Model, GradientsAgreeWithCentralDifferencesOfTheWholeLoss) {
  RigOptions options;
  options.model.attention = AttentionForm::kSparse;
  ModelRig rig(options, TinyConfig(), 3);
  const Batch batch = rig.BatchOf(RandomTokens(1, 24, 9), 1);
  const PassOptions pass = AllLosses(batch);
  StepStats stats = rig.NewStats();
  ModelPart::Saved saved;
  rig.Train(batch, pass, stats, saved);
  const auto loss = [&] {
    StepStats s = rig.NewStats();
    ModelPart::Saved unused;
    PassOptions forward = pass;
    forward.train = false;
    rig.network().Forward(rig.context(), batch, forward, Tensor(), s, unused);
    return s.lm_loss_1.data<double>()[0] * pass.scales.lm +
           s.mtp_loss_1.data<double>()[0] * pass.scales.mtp +
           s.balance_1.data<double>()[0] * pass.scales.balance;
  };
  // A few elements of every parameter: selections and routes are constant over so small a step.
  for (const Parameter& p : rig.store_.parameters()) {
    if (!rig.store_.trains(p.id) || p.group == ParameterGroup::kIndexer) continue;
    const int64_t count = p.num_elements();
    for (int64_t i : {count / 7, count / 2, count - 1}) {
      double& x = rig.store_.value(p.id).data<double>()[i];
      const double before = x, step = 1e-6;
      x = before + step;
      const double above = loss();
      x = before - step;
      const double below = loss();
      x = before;
      EXPECT_NEAR(rig.store_.grad(p.id).data<double>()[i], (above - below) / (2 * step), 2e-8)
          << p.name << " " << i;
    }
  }
}

TEST(Model, TwoMicrobatchesAddUpToOneOfBoth) {
  RigOptions options;
  options.model.attention = AttentionForm::kSparse;
  options.model.indexer_loss = IndexerLossKind::kSparse;
  const std::vector<double> tokens = RandomTokens(2, 32, 21);
  ModelRig whole(options, TinyConfig(), 4), parts(options, TinyConfig(), 4);
  const Batch both = whole.BatchOf(tokens, 2);
  const PassOptions pass = AllLosses(both);
  StepStats stats = whole.NewStats();
  ModelPart::Saved saved;
  whole.Train(both, pass, stats, saved);
  StepStats part_stats = parts.NewStats();
  for (int half = 0; half < 2; ++half) {
    const std::vector<double> own(tokens.begin() + half * 33, tokens.begin() + (half + 1) * 33);
    ModelPart::Saved own_saved;
    parts.Train(parts.BatchOf(own, 1), pass, part_stats, own_saved);
  }
  EXPECT_NEAR(stats.lm_loss_1.data<double>()[0], part_stats.lm_loss_1.data<double>()[0], 1e-10);
  for (const Parameter& p : whole.store_.parameters()) {
    if (whole.store_.trains(p.id))
      EXPECT_LE(
          RelativeError(parts.store_.grad(parts.store_.Find(p.name)), whole.store_.grad(p.id)),
          1e-11)
          << p.name;
  }
}

TEST(Model, WarmUpOwnsNoGradientButTheIndexersAndNoArrayOfAllPairs) {
  RigOptions options;
  options.dtype = DType::kF32;
  options.model.attention = AttentionForm::kDense;
  options.model.indexer_loss = IndexerLossKind::kDense;
  options.model.key_tile = 64;
  options.trained = {ParameterGroup::kIndexer};
  const ModelConfig config = TinyConfig();
  ModelRig rig(options, config, 2);
  for (const Parameter& p : rig.store_.parameters()) {
    EXPECT_EQ(rig.store_.trains(p.id), p.group == ParameterGroup::kIndexer) << p.name;
  }
  // Peak activations grow linearly: four times the length takes less than five times the bytes, and
  // far less than one fp32 array of all pairs of the longer length.
  std::vector<int64_t> peaks;
  for (const int64_t length : {512, 2048}) {
    const Batch batch = rig.BatchOf(RandomTokens(1, length, 8), 1);
    PassOptions pass;
    pass.scales.kl = 1.0 / static_cast<double>(length);
    StepStats stats = rig.NewStats();
    rig.context_.pool().ResetPeak();
    rig.network().WarmUp(rig.context(), batch, pass, Tensor(), stats);
    peaks.push_back(rig.context_.pool().Uses().at("activations").peak_bytes);
  }
  EXPECT_LT(peaks[1], 5 * peaks[0]);
  EXPECT_LT(peaks[1], int64_t{2048} * 2048 * 4);
}

TEST(Model, MeasuresAPerfectSelectionAsPerfect) {
  RigOptions options;
  options.model.attention = AttentionForm::kSparse;
  options.index_topk = 64;  // more than any row has: everything is selected
  ModelRig rig(options, TinyConfig(), 6);
  const Batch batch = rig.BatchOf(RandomTokens(1, 48, 8), 1);
  PassOptions pass = AllLosses(batch);
  pass.measure_indexer = true;
  StepStats stats = rig.NewStats();
  ModelPart::Saved saved;
  rig.network().Forward(rig.context(), batch, pass, Tensor(), stats, saved);
  for (int64_t layer = 0; layer < 4; ++layer) {
    const double rows = stats.sampled_rows_L.data<double>()[layer];
    EXPECT_EQ(rows, 32);
    EXPECT_NEAR(stats.mass_L.data<double>()[layer] / rows, 1, 1e-12);
    EXPECT_NEAR(stats.recall_L.data<double>()[layer] / rows, 1, 1e-12);
  }
}

TEST(Model, CountsEveryTokenOfEveryMoeLayer) {
  RigOptions options;
  options.model.attention = AttentionForm::kDense;
  const TrainedRig trained = TrainOnce(options);
  const int64_t* counts = trained.stats.expert_counts_LE.data<int64_t>();
  for (int64_t layer = 0; layer < 4; ++layer) {
    int64_t total = 0;
    for (int64_t e = 0; e < 8; ++e) total += counts[layer * 8 + e];
    EXPECT_EQ(total, layer == 0 ? 0 : 80 * 3) << layer;  // layer 0 is dense, layer 3 the MTP module
  }
}

}  // namespace
}  // namespace baleen
