// The model against transformers and an independent restatement: logits, losses, choices and every
// gradient of the fixtures (docs/fixtures.md), in fp32 and fp64.
#include <gtest/gtest.h>

#include <cmath>

#include "nlohmann/json.hpp"
#include "tests/support/random_tensor.h"
#include "tests/trainer/model_rig.h"

namespace baleen {
namespace {

using testing::Expectations;
using testing::ModelRig;
using testing::RigOptions;
using testing::ToDoubles;

const char kRoot[] = "tests/fixtures/";

struct FixtureCase {
  const char* fixture;
  const char* checkpoint;
  bool indexer;  // the checkpoint holds indexers
  bool mtp;
};

void PrintTo(const FixtureCase& c, std::ostream* out) { *out << c.fixture << "/" << c.checkpoint; }

double MaxRelative(const std::vector<double>& found, const std::vector<double>& expected) {
  CHECK_EQ(found.size(), expected.size());
  double worst = 0, largest = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    const double difference = std::fabs(found[i] - expected[i]);
    worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
    largest = std::max(largest, std::fabs(expected[i]));
  }
  return worst / largest;
}

nlohmann::json Losses(const std::string& fixture) {
  auto text = ReadFile(kRoot + fixture + "/expected.json", 1 << 20);
  CHECK(text.ok()) << text.status().ToString();
  return nlohmann::json::parse(*text)["losses"];
}

double Norm(const std::vector<double>& x) {
  double sum = 0;
  for (double v : x) sum += v * v;
  return std::sqrt(sum);
}

double Distance(const std::vector<double>& a, const std::vector<double>& b) {
  CHECK_EQ(a.size(), b.size());
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}

// Largest difference of a gradient from the stored one, in units of the tensor's norm: of the
// tensor itself, or of its products with the vectors u[i] = sqrt(2) cos(i + 1) from both sides.
double GradientDifference(const Expectations& expected, const std::string& name,
                          const Tensor& grad) {
  const std::vector<double> g = ToDoubles(grad);
  if (expected.Has("grad." + name)) {
    const std::vector<double> e = expected.Values("grad." + name);
    return Distance(g, e) / std::max(Norm(e), 1e-30);
  }
  if (!expected.Has("grad_norm." + name))
    return Norm(g) == 0 ? 0 : INFINITY;  // no gradient reaches it
  const double norm = expected.Values("grad_norm." + name)[0];
  if (norm == 0) return Norm(g) == 0 ? 0 : INFINITY;  // an expert without tokens
  const int64_t rows = grad.dim(0), cols = grad.dim(1);
  std::vector<double> by_row(rows, 0), by_col(cols, 0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      by_row[r] += g[r * cols + c] * std::sqrt(2.0) * std::cos(static_cast<double>(c + 1));
      by_col[c] += g[r * cols + c] * std::sqrt(2.0) * std::cos(static_cast<double>(r + 1));
    }
  }
  const double of_norm = std::fabs(Norm(g) - norm);
  return std::max({Distance(by_row, expected.Values("grad_rows." + name)),
                   Distance(by_col, expected.Values("grad_cols." + name)), of_norm}) /
         norm;
}

void ExpectGradients(ModelRig& rig, const std::string& path, double bound) {
  const Expectations expected(path);
  for (const Parameter& p : rig.store_.parameters()) {
    if (!rig.store_.trains(p.id)) continue;
    EXPECT_LE(GradientDifference(expected, p.name, rig.store_.grad(p.id)), bound)
        << path << " " << p.name;
  }
}

class HfFixture : public ::testing::TestWithParam<FixtureCase> {
 protected:
  std::string Path(const std::string& file) const {
    return absl::StrCat(kRoot, GetParam().fixture, "/", file);
  }
  RigOptions Options(AttentionForm attention, DType dtype) const {
    RigOptions options;
    options.checkpoint = Path(GetParam().checkpoint);
    options.dtype = dtype;
    options.use_indexer = GetParam().indexer;
    options.model.attention = attention;
    options.model.query_chunk = 37;  // chunks that do not divide the rows
    options.model.head_chunk = 41;
    return options;
  }
};

TEST_P(HfFixture, DenseLogitsAgree) {
  const Expectations expected(Path("expected_dense.safetensors"));
  const int64_t sequences = expected.ShapeOf("tokens")[0];
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    ModelRig rig(Options(AttentionForm::kDense, dtype));
    const Batch batch = rig.BatchOf(expected.Values("tokens"), sequences);
    const auto logits = rig.network().ForwardLogits(rig.context(), batch, false);
    EXPECT_LE(MaxRelative(ToDoubles(logits.lm_RW), expected.Values("logits")), 1e-4) << dtype;
  }
}

TEST_P(HfFixture, DenseGradientsAgree) {
  const Expectations expected(Path("expected_dense.safetensors"));
  const int64_t sequences = expected.ShapeOf("tokens")[0];
  ModelRig rig(Options(AttentionForm::kDense, DType::kF64));
  const Batch batch = rig.BatchOf(expected.Values("tokens"), sequences);
  PassOptions pass;
  pass.scales.lm = 1.0 / static_cast<double>(batch.num_rows());
  StepStats stats = rig.NewStats();
  ModelPart::Saved saved;
  rig.Train(batch, pass, stats, saved);
  const double loss = stats.lm_loss_1.data<double>()[0] * pass.scales.lm;
  EXPECT_NEAR(loss, Losses(GetParam().fixture)["lm_dense"].get<double>(), 1e-6);
  ExpectGradients(rig, Path("gradients_lm_dense.safetensors"), 1e-4);
}

TEST_P(HfFixture, SparseLogitsSelectionsAndRoutesAgree) {
  if (!GetParam().indexer) return;  // a V3.1 checkpoint has no indexer to select with
  const Expectations expected(Path("expected_sparse.safetensors"));
  const int64_t sequences = expected.ShapeOf("tokens")[0];
  for (const AttentionForm form : {AttentionForm::kSparse, AttentionForm::kMaskedDense}) {
    for (const DType dtype : {DType::kF32, DType::kF64}) {
      ModelRig rig(Options(form, dtype));
      const Batch batch = rig.BatchOf(expected.Values("tokens"), sequences);
      const auto logits = rig.network().ForwardLogits(rig.context(), batch, GetParam().mtp);
      EXPECT_LE(MaxRelative(ToDoubles(logits.lm_RW), expected.Values("logits")), 1e-4) << dtype;
      if (GetParam().mtp) {
        EXPECT_LE(MaxRelative(ToDoubles(logits.mtp_RW), expected.Values("mtp_logits")), 1e-4)
            << dtype;
      }
    }
  }
}

// Stored ids count from the sequence's first key, ours from the microbatch's.
std::vector<double> OwnIds(const Tensor& ids_TK, int64_t seq_length) {
  std::vector<double> ids = ToDoubles(ids_TK);
  const int64_t topk = ids_TK.dim(1);
  for (size_t i = 0; i < ids.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / topk;
    if (ids[i] >= 0) ids[i] -= static_cast<double>(row / seq_length * seq_length);
  }
  return ids;
}

TEST_P(HfFixture, SparseLossesAndGradientsAgree) {
  if (!GetParam().indexer) return;  // a V3.1 checkpoint has no indexer to select with
  const Expectations expected(Path("expected_sparse.safetensors"));
  const int64_t sequences = expected.ShapeOf("tokens")[0];
  const nlohmann::json losses = Losses(GetParam().fixture);
  for (const AttentionForm form : {AttentionForm::kSparse, AttentionForm::kMaskedDense}) {
    RigOptions options = Options(form, DType::kF64);
    options.model.indexer_loss = IndexerLossKind::kSparse;
    // One loss at a time: the stored gradients are those of each loss alone.
    for (const std::string loss : {"lm", "mtp", "kl"}) {
      if (loss == "mtp" && !GetParam().mtp) continue;
      ModelRig rig(options);
      const Batch batch = rig.BatchOf(expected.Values("tokens"), sequences);
      const auto rows = static_cast<double>(batch.num_rows());
      PassOptions pass;
      if (loss == "lm") pass.scales.lm = 1 / rows;
      if (loss == "mtp") pass.scales.mtp = 1 / (rows - static_cast<double>(sequences));
      if (loss == "kl") pass.scales.kl = 1 / rows;
      StepStats stats = rig.NewStats();
      ModelPart::Saved saved;
      rig.network().Forward(rig.context(), batch, pass, Tensor(), stats, saved);
      for (size_t layer = 0; layer < saved.blocks.size(); ++layer) {
        EXPECT_EQ(OwnIds(saved.blocks[layer].ids_RK, batch.seq_length),
                  expected.Values(absl::StrCat("ids.layer", layer)));
      }
      rig.network().BackwardInput(rig.context(), batch, pass, Tensor(), stats, saved);
      rig.network().BackwardWeight(rig.context(), batch, pass, stats, saved);
      ExpectGradients(rig, Path(absl::StrCat("gradients_", loss, "_sparse.safetensors")), 1e-4);
      if (loss == "lm") {
        EXPECT_NEAR(stats.lm_loss_1.data<double>()[0] / rows, losses["lm_sparse"].get<double>(),
                    1e-6);
      } else if (loss == "mtp") {
        EXPECT_NEAR(stats.mtp_loss_1.data<double>()[0] * pass.scales.mtp,
                    losses["mtp_sparse"].get<double>(), 1e-6);
      } else {
        double kl = 0;
        for (double sum : ToDoubles(stats.kl_L)) kl += sum / rows;
        EXPECT_NEAR(kl, losses["kl_sparse"].get<double>(), 1e-8);
      }
    }
  }
}

TEST_P(HfFixture, WarmUpLossAndIndexerGradientsAgree) {
  if (!GetParam().indexer) return;  // a V3.1 checkpoint has no indexer
  const Expectations expected(Path("expected_dense.safetensors"));
  const int64_t sequences = expected.ShapeOf("tokens")[0];
  RigOptions options = Options(AttentionForm::kDense, DType::kF64);
  options.model.indexer_loss = IndexerLossKind::kDense;
  options.model.key_tile = 19;
  options.trained = {ParameterGroup::kIndexer};
  ModelRig rig(options);
  const Batch batch = rig.BatchOf(expected.Values("tokens"), sequences);
  const auto rows = static_cast<double>(batch.num_rows());
  PassOptions pass;
  pass.scales.kl = 1 / rows;
  StepStats stats = rig.NewStats();
  rig.network().WarmUp(rig.context(), batch, pass, Tensor(), stats);
  double kl = 0;
  for (double sum : ToDoubles(stats.kl_L)) kl += sum / rows;
  EXPECT_NEAR(kl, Losses(GetParam().fixture)["kl_warmup"].get<double>(), 1e-8);
  ExpectGradients(rig, Path("gradients_kl_warmup.safetensors"), 1e-4);
}

TEST_P(HfFixture, BalanceLossAndGradientsAgree) {
  const bool sparse = std::string(GetParam().fixture) == "yarn40";
  const std::string kind = sparse ? "sparse" : "dense";
  if (!FileExists(Path("gradients_balance_" + kind + ".safetensors")))
    return;  // stored for two fixtures
  const Expectations expected(Path("expected_" + kind + ".safetensors"));
  const int64_t sequences = expected.ShapeOf("tokens")[0];
  ModelRig rig(Options(sparse ? AttentionForm::kSparse : AttentionForm::kDense, DType::kF64));
  const Batch batch = rig.BatchOf(expected.Values("tokens"), sequences);
  PassOptions pass;
  pass.scales.balance = 1;
  StepStats stats = rig.NewStats();
  ModelPart::Saved saved;
  rig.Train(batch, pass, stats, saved);
  EXPECT_NEAR(stats.balance_1.data<double>()[0],
              Losses(GetParam().fixture)["balance_" + kind].get<double>(), 1e-8);
  ExpectGradients(rig, Path("gradients_balance_" + kind + ".safetensors"), 1e-4);
}

INSTANTIATE_TEST_SUITE_P(Checkpoints, HfFixture,
                         ::testing::Values(FixtureCase{"yarn40", "bf16_v32", true, true},
                                           FixtureCase{"yarn4_fp8", "bf16_v32", true, true},
                                           FixtureCase{"yarn4_fp8", "fp8_v31", false, true},
                                           FixtureCase{"plain_rope", "bf16_v31", false, false},
                                           FixtureCase{"plain_rope", "fp8_v32", true, false}));

}  // namespace
}  // namespace baleen
