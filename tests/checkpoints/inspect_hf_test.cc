#include "checkpoints/inspect_hf.h"

#include <filesystem>

#include "checkpoints/fp8_blocks.h"
#include "tests/checkpoints/hf_support.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;
using testing::MakeCheckpoint;
using testing::ReadText;
using testing::ScratchDirectory;
using testing::WriteText;

bool Has(const InspectReport& report, absl::string_view part) {
  return report.text.find(std::string(part)) != std::string::npos;
}

// Overwrites bytes of a stored tensor.
void Patch(const std::string& directory, const std::string& name, int64_t at,
           const std::string& bytes) {
  std::string path, text;
  {
    const auto checkpoint = HfCheckpoint::Open(directory);
    CHECK_OK(checkpoint.status());
    const CheckpointTensor& tensor = *checkpoint->Find(name);
    path = JoinPath(directory, tensor.shard);
    text = ReadText(path);
    const auto file = SafetensorsFile::Open(path);
    text.replace(static_cast<size_t>(file->header().header_bytes + tensor.begin + at), bytes.size(),
                 bytes);
  }
  WriteText(path, text);
}

TEST(InspectHf, ReportsACompleteCheckpoint) {
  ScratchDirectory scratch;
  MakeCheckpoint(scratch.File("hf"));
  ASSERT_OK_AND_ASSIGN(const InspectReport report,
                       InspectHf(scratch.File("hf"), InspectDepth::kValues));
  EXPECT_TRUE(report.healthy) << report.text;
  for (const absl::string_view part :
       {"model: deepseek_v3, 2 layers (1 dense, 1 MoE of 4 experts, 2 a token)",
        "MTP: layer 2; indexer: none", "F8_E4M3", "source hash: ", "every scale is a power of two",
        "0 NaN, 0 infinite", "model.layers.2.embed_tokens.weight equals model.embed_tokens.weight",
        "8  model.layers.*.mlp.experts.*.up_proj.weight",
        "initialised (a V3.2 run draws them from its seed): 15 tensors",
        "model.layers.2.shared_head.head.weight (duplicate of lm_head.weight)",
        "verdict: complete"}) {
    EXPECT_TRUE(Has(report, part)) << part << " not in\n" << report.text;
  }
}

TEST(InspectHf, FindsScalesThatAreNoPowersOfTwo) {
  ScratchDirectory scratch;
  MakeCheckpoint(scratch.File("hf"));
  const float scale = 0.3f;
  Patch(scratch.File("hf"), "model.layers.0.self_attn.o_proj.weight_scale_inv", 4,
        std::string(reinterpret_cast<const char*>(&scale), 4));
  ASSERT_OK_AND_ASSIGN(const InspectReport report,
                       InspectHf(scratch.File("hf"), InspectDepth::kHeaders));
  EXPECT_TRUE(report.healthy);
  EXPECT_TRUE(Has(report, "no power of two (used as they are): 1 tensors")) << report.text;
  EXPECT_TRUE(Has(report, "model.layers.*.self_attn.o_proj.weight"));
}

TEST(InspectHf, CountsNanAndInfinityAndUnequalCopiesOnlyWhenItReadsValues) {
  ScratchDirectory scratch;
  const std::string directory = scratch.File("hf");
  MakeCheckpoint(directory);
  Patch(directory, "model.layers.0.self_attn.q_a_proj.weight", 5, "\x7f");
  Patch(directory, "lm_head.weight", 10, std::string("\x80\x7f", 2));  // BF16 infinity
  ASSERT_OK_AND_ASSIGN(const InspectReport headers, InspectHf(directory, InspectDepth::kHeaders));
  EXPECT_TRUE(headers.healthy);
  ASSERT_OK_AND_ASSIGN(const InspectReport values, InspectHf(directory, InspectDepth::kValues));
  EXPECT_FALSE(values.healthy);
  EXPECT_TRUE(Has(values, "1 NaN, 1 infinite\n")) << values.text;
  EXPECT_TRUE(Has(values, "q_a_proj.weight: 1 NaN and 0 infinite of 7680 values"));
  EXPECT_TRUE(Has(values, "shared_head.head.weight DIFFERS from lm_head.weight"));
}

TEST(InspectHf, ListsWhatDoesNotFitTheModel) {
  ScratchDirectory scratch;
  const std::string directory = scratch.File("hf");
  MakeCheckpoint(directory);
  const std::string config = JoinPath(directory, "config.json");
  WriteText(config,
            testing::Replaced(ReadText(config), "\"vocab_size\": 96", "\"vocab_size\": 97"));
  ASSERT_OK_AND_ASSIGN(const InspectReport report, InspectHf(directory, InspectDepth::kHeaders));
  EXPECT_FALSE(report.healthy);
  EXPECT_TRUE(Has(report, "lm_head.weight: found [96, 160], config.json asks for [97, 160]"));
  EXPECT_THAT(InspectHf(scratch.File("none"), InspectDepth::kHeaders),
              HasStatus(absl::StatusCode::kDataLoss, "expected a directory"));
}

}  // namespace
}  // namespace baleen
