#include "checkpoints/hf_export.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "checkpoints/fp8_blocks.h"
#include "kernels/core/context.h"
#include "kernels/core/random.h"
#include "tests/checkpoints/hf_support.h"
#include "tests/support/random_tensor.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;
using testing::IsOk;
using testing::MakeCheckpoint;
using testing::ReadAll;
using testing::ReadFloats;
using testing::ScratchDirectory;
using testing::TinyModel;

constexpr char kQA[] = "model.layers.0.self_attn.q_a_proj.weight";

absl::StatusOr<Tensor> NoValues(const std::string& name, const Box&) {
  return absl::InternalError("asked for " + name);
}

// Values of a name: random, a function of the name.
absl::StatusOr<Tensor> WholeRandom(const std::string& name) {
  for (const CatalogEntry& entry : TensorCatalog(TinyModel(), {.with_indexer = true})) {
    if (entry.name != name) continue;
    return testing::RandomTensor(Context::Cpu(), DType::kF32, entry.shape, NameStream(name));
  }
  return absl::InternalError("unknown " + name);
}

absl::StatusOr<Tensor> RandomValues(const std::string& name, const Box& band) {
  ASSIGN_OR_RETURN(const Tensor whole, WholeRandom(name));
  return whole.Rows(band.offset[0], band.offset[0] + band.extent[0]);
}

bool IsIndexer(const std::string& name) { return name.find(".indexer.") != std::string::npos; }

struct Source {
  ScratchDirectory scratch;
  std::string directory = scratch.File("source");
  explicit Source(ExportDType dtype = ExportDType::kFp8,
                  HfArchitecture architecture = HfArchitecture::kV31) {
    MakeCheckpoint(directory, dtype, architecture);
  }
};

bool SameBytes(const HfCheckpoint& a, const HfCheckpoint& b, const std::string& name) {
  const CheckpointTensor* x = a.Find(name);
  const CheckpointTensor* y = b.Find(name);
  return x != nullptr && y != nullptr && x->dtype == y->dtype && x->shape == y->shape &&
         *a.RawBytes(name) == *b.RawBytes(name);
}

TEST(HfExport, UntrainedSameDTypeIsByteIdenticalFileByFile) {
  for (const ExportDType dtype : {ExportDType::kFp8, ExportDType::kBF16}) {
    Source source(dtype);
    testing::WriteText(JoinPath(source.directory, "tokenizer.json"), "{}");
    ASSERT_OK_AND_ASSIGN(const HfCheckpoint checkpoint, HfCheckpoint::Open(source.directory));
    const std::string out = source.scratch.File("out");
    ASSERT_THAT(ExportHf({.model = checkpoint.config(),
                          .architecture = HfArchitecture::kV31,
                          .dtype = dtype,
                          .source = &checkpoint,
                          .max_shard_bytes = 100'000},
                         NoValues, out),
                IsOk());
    EXPECT_EQ(ReadAll(out), ReadAll(source.directory));
  }
}

TEST(HfExport, AfterAWarmUpOnlyTheIndexersAreNew) {
  Source source;
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint before, HfCheckpoint::Open(source.directory));
  const std::string out = source.scratch.File("v32");
  ASSERT_THAT(
      ExportHf({.model = TinyModel(), .source = &before, .trained = IsIndexer}, RandomValues, out),
      IsOk());
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint after, HfCheckpoint::Open(out));
  for (const std::string& name : before.TensorNames()) {
    EXPECT_TRUE(SameBytes(before, after, name)) << name;
  }
  EXPECT_TRUE(after.config().has_indexer);
  EXPECT_EQ(after.config().index_topk, TinyModel().index_topk);
  EXPECT_THAT(after.Account(after.config(), {.with_indexer = true}).ToStatus("out"), IsOk());
  // 7 tensors a layer, the MTP layer's too: wq_b and wk with scales, weights_proj, k_norm twice.
  EXPECT_EQ(after.TensorNames().size(), before.TensorNames().size() + 3 * 7);
  EXPECT_EQ(after.Find("model.layers.2.self_attn.indexer.wk.weight")->dtype, DType::kF8E4M3);
  EXPECT_EQ(after.Find("model.layers.2.self_attn.indexer.weights_proj.weight")->dtype,
            DType::kBF16);
  EXPECT_EQ(after.Find("model.layers.2.self_attn.indexer.k_norm.bias")->dtype, DType::kF32);
}

TEST(HfExport, TrainedValuesAreQuantisedInWholeBlocks) {
  Source source;
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint before, HfCheckpoint::Open(source.directory));
  const std::string out = source.scratch.File("out");
  ASSERT_THAT(ExportHf({.model = TinyModel(),
                        .source = &before,
                        .trained = [](const std::string&) { return true; }},
                       RandomValues, out),
              IsOk());
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint after, HfCheckpoint::Open(out));
  const Tensor values = *WholeRandom(kQA);
  const Shape grid = Fp8ScaleShape(values.shape());
  std::vector<uint8_t> bytes(static_cast<size_t>(values.num_elements()));
  std::vector<float> scales(static_cast<size_t>(NumElements(grid)));
  QuantiseFp8(values.data<float>(), values.dim(0), values.dim(1), bytes.data(), scales.data());
  EXPECT_EQ(*after.RawBytes(kQA), absl::MakeConstSpan(bytes));
  EXPECT_EQ(*after.Scales(kQA), scales);
  // The MTP layer's copies follow what trained, not the source.
  EXPECT_EQ(*after.RawBytes("model.layers.2.embed_tokens.weight"),
            *after.RawBytes("model.embed_tokens.weight"));
  EXPECT_EQ(*after.RawBytes("model.layers.2.shared_head.head.weight"),
            *after.RawBytes("lm_head.weight"));
  EXPECT_FALSE(SameBytes(before, after, "lm_head.weight"));
}

TEST(HfExport, FrozenFp8LeavesAsBf16WithItsDequantisedValues) {
  Source source;
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint before, HfCheckpoint::Open(source.directory));
  const std::string out = source.scratch.File("bf16");
  ASSERT_THAT(ExportHf({.model = TinyModel(),
                        .dtype = ExportDType::kBF16,
                        .source = &before,
                        .trained = IsIndexer},
                       RandomValues, out),
              IsOk());
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint after, HfCheckpoint::Open(out));
  EXPECT_FALSE(after.hf_config().fp8);
  for (const std::string& name : after.TensorNames()) {
    EXPECT_NE(after.Find(name)->dtype, DType::kF8E4M3) << name;
    if (IsIndexer(name)) continue;
    // E4M3 times a power of two fits BF16 exactly.
    EXPECT_EQ(ReadFloats(after, name), ReadFloats(before, name)) << name;
  }
  // And back: quantising what was quantised gives the same values.
  ASSERT_THAT(
      ExportHf({.model = TinyModel(), .source = &after}, NoValues, source.scratch.File("fp8")),
      IsOk());
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint again, HfCheckpoint::Open(source.scratch.File("fp8")));
  for (const std::string& name : before.TensorNames()) {
    if (WeightOfScale(name)) continue;
    EXPECT_EQ(ReadFloats(again, name), ReadFloats(before, name)) << name;
  }
}

TEST(HfExport, Bf16NormsAndMissingCopiesOfASourceAreHandled) {
  ScratchDirectory scratch;
  // A source as V3's: norms in BF16; and without the MTP layer's copies.
  std::vector<PlannedTensor> tensors;
  for (const CatalogEntry& entry : TensorCatalog(TinyModel(), {})) {
    if (entry.duplicate_of.empty()) tensors.push_back({entry.name, entry.shape, DType::kBF16});
  }
  ASSERT_OK_AND_ASSIGN(ShardPlan plan, PlanShards(tensors, int64_t{1} << 30));
  const std::string config =
      HfConfigText({.model = TinyModel(), .architecture = HfArchitecture::kV31});
  ASSERT_OK_AND_ASSIGN(HfWriter writer, HfWriter::Create(scratch.File("v3"), std::move(plan),
                                                         {.config_json = config}));
  for (const PlannedTensor& tensor : tensors) {
    const std::vector<float> values(static_cast<size_t>(NumElements(tensor.shape)), 0.75f);
    ASSERT_THAT(writer.WriteValues(tensor.name, values), IsOk());
  }
  ASSERT_THAT(writer.Finish(), IsOk());
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint source, HfCheckpoint::Open(scratch.File("v3")));
  const auto trained = [](const std::string& name) {
    return IsIndexer(name) || name == "model.norm.weight";
  };
  ASSERT_THAT(ExportHf({.model = TinyModel(),
                        .dtype = ExportDType::kBF16,
                        .source = &source,
                        .trained = trained},
                       RandomValues, scratch.File("out")),
              IsOk());
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint out, HfCheckpoint::Open(scratch.File("out")));
  EXPECT_EQ(out.Find("model.layers.0.input_layernorm.weight")->dtype, DType::kBF16);
  EXPECT_EQ(out.Find("model.norm.weight")->dtype, DType::kF32);  // trained: V3.2's dtype
  EXPECT_EQ(*out.RawBytes("model.layers.2.embed_tokens.weight"),
            *out.RawBytes("model.embed_tokens.weight"));
}

TEST(HfExport, TheShardSizeAndTheSourceShardingDoNotChangeTensors) {
  Source source;
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint before, HfCheckpoint::Open(source.directory));
  ASSERT_THAT(ExportHf({.model = TinyModel(),
                        .architecture = HfArchitecture::kV31,
                        .source = &before,
                        .max_shard_bytes = int64_t{1} << 40},
                       NoValues, source.scratch.File("one")),
              IsOk());
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint one, HfCheckpoint::Open(source.scratch.File("one")));
  EXPECT_EQ(one.ShardNames().size(), 1u);
  EXPECT_EQ(one.TensorNames(), before.TensorNames());
  for (const std::string& name : one.TensorNames()) EXPECT_TRUE(SameBytes(one, before, name));
}

TEST(HfExport, SharesHoldEachTensorOnceAndAreBalanced) {
  Source source;
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint before, HfCheckpoint::Open(source.directory));
  ASSERT_OK_AND_ASSIGN(const ExportPlan plan,
                       PlanExport({.model = TinyModel(), .source = &before, .trained = IsIndexer}));
  const auto bytes_of = [&](size_t index) {
    const std::string& name = plan.tensors[index].name;
    const auto scale = plan.shards.places.find(ScaleName(name));
    return plan.shards.places.at(name).bytes +
           (scale == plan.shards.places.end() ? 0 : scale->second.bytes);
  };
  int64_t largest = 0, total = 0;
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    largest = std::max(largest, bytes_of(i));
    total += bytes_of(i);
  }
  EXPECT_EQ(total, plan.shards.total_bytes);
  for (const int num_ranks : {1, 2, 3, 5, 1000}) {
    std::set<size_t> seen;
    int64_t most = 0, least = total;
    for (int rank = 0; rank < num_ranks; ++rank) {
      int64_t load = 0;
      for (const size_t index : ShareOf(plan, rank, num_ranks)) {
        EXPECT_TRUE(seen.insert(index).second) << plan.tensors[index].name << " twice";
        load += bytes_of(index);
      }
      most = std::max(most, load);
      least = std::min(least, load);
    }
    EXPECT_EQ(seen.size(), plan.tensors.size()) << num_ranks;
    EXPECT_LE(most - least, largest) << num_ranks;
  }
}

TEST(HfExport, SharesWrittenInAnyOrderGiveTheSameFiles) {
  Source source;
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint before, HfCheckpoint::Open(source.directory));
  const ExportRequest request{.model = TinyModel(),
                              .dtype = ExportDType::kBF16,
                              .source = &before,
                              .trained = IsIndexer,
                              .max_shard_bytes = 100'000};
  ASSERT_THAT(ExportHf(request, RandomValues, source.scratch.File("one")), IsOk());
  ASSERT_OK_AND_ASSIGN(const ExportPlan plan, PlanExport(request));
  constexpr int kRanks = 3;
  ASSERT_OK_AND_ASSIGN(HfWriter first, HfWriter::Create(source.scratch.File("three"), plan.shards,
                                                        {.config_json = plan.config_json}));
  for (int rank = kRanks - 1; rank >= 0; --rank) {
    ASSERT_OK_AND_ASSIGN(HfWriter writer, HfWriter::Attach(first.staging_directory(), plan.shards));
    BandBuffer buffer;
    for (const size_t index : ShareOf(plan, rank, kRanks)) {
      ASSERT_THAT(ExportOne(plan.tensors[index], &before, RandomValues, buffer, writer), IsOk());
    }
    ASSERT_THAT(writer.Sync(), IsOk());
    first.AddWritten(writer.written());
  }
  ASSERT_THAT(first.Finish(), IsOk());
  EXPECT_EQ(ReadAll(source.scratch.File("three")), ReadAll(source.scratch.File("one")));
}

// Wider than a band, as the large models' tensors are: what is encoded band by band has the bytes
// of the whole.
TEST(HfExport, TensorsOfSeveralBandsComeOutWhole) {
  ModelConfig model = TinyModel();
  model.intermediate_size = 16500;
  model.vocab_size = 13200;
  const std::string gate = "model.layers.0.mlp.gate_proj.weight";
  ASSERT_EQ(RowBands({16500, 160}).size(), 2u);
  ScratchDirectory scratch;
  const InitRequest init{.model = model, .init = {.seed = 3}};
  ASSERT_THAT(InitHfCheckpoint(init, scratch.File("fp8")), IsOk());
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint fp8, HfCheckpoint::Open(scratch.File("fp8")));
  const CheckpointTensor* stored = fp8.Find(gate);
  ASSERT_NE(stored, nullptr);
  ASSERT_EQ(stored->shape, (Shape{16500, 160}));
  std::vector<float> values(16500 * 160);
  FillInitial({.name = gate, .shape = stored->shape}, init.init, WholeBox(stored->shape),
              DType::kF32, values.data());
  std::vector<uint8_t> bytes(values.size());
  std::vector<float> scales(129 * 2);
  QuantiseFp8(values.data(), 16500, 160, bytes.data(), scales.data());
  EXPECT_EQ(*fp8.RawBytes(gate), absl::MakeConstSpan(bytes));
  EXPECT_EQ(*fp8.Scales(gate), scales);
  // Read band by band, written as BF16: the same values.
  ASSERT_THAT(ExportHf({.model = model,
                        .architecture = HfArchitecture::kV31,
                        .dtype = ExportDType::kBF16,
                        .source = &fp8},
                       NoValues, scratch.File("bf16")),
              IsOk());
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint bf16, HfCheckpoint::Open(scratch.File("bf16")));
  EXPECT_EQ(ReadFloats(bf16, gate), ReadFloats(fp8, gate));
  EXPECT_EQ(ReadFloats(bf16, "lm_head.weight"), ReadFloats(fp8, "lm_head.weight"));
}

TEST(HfExport, FailuresLeaveNothingBehind) {
  Source source;
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint before, HfCheckpoint::Open(source.directory));
  // A callback that fails halfway.
  EXPECT_THAT(ExportHf({.model = TinyModel(), .source = &before, .trained = IsIndexer}, NoValues,
                       source.scratch.File("out")),
              HasStatus(absl::StatusCode::kInternal, "indexer"));
  // Values with a NaN in them.
  const auto nan_values = [](const std::string& name, const Box& band) -> absl::StatusOr<Tensor> {
    ASSIGN_OR_RETURN(const Tensor tensor, RandomValues(name, band));
    tensor.data<float>()[0] = std::nanf("");
    return tensor;
  };
  EXPECT_THAT(ExportHf({.model = TinyModel(), .source = &before, .trained = IsIndexer}, nan_values,
                       source.scratch.File("out")),
              HasStatus(absl::StatusCode::kOutOfRange, "element 0"));
  // The wrong model for this source.
  ModelConfig wider = TinyModel();
  wider.intermediate_size = 200;
  EXPECT_THAT(ExportHf({.model = wider, .source = &before, .trained = IsIndexer}, RandomValues,
                       source.scratch.File("out")),
              HasStatus(absl::StatusCode::kDataLoss,
                        "found [192, 160], the model to export has [200, 160]"));
  // Onto itself.
  EXPECT_THAT(ExportHf({.model = TinyModel(), .source = &before, .trained = IsIndexer},
                       RandomValues, source.directory),
              HasStatus(absl::StatusCode::kInvalidArgument, "not an empty directory"));
  EXPECT_EQ(source.scratch.List(), std::vector<std::string>{"source"});
}

}  // namespace
}  // namespace baleen
