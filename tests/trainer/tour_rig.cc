#include "tests/trainer/tour_rig.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kernels/core/check.h"
#include "kernels/core/file.h"

namespace baleen::testing {
namespace {

constexpr char kMtpPrefix[] = "model.layers.2.";

std::string Plain(absl::string_view cell) {
  std::string text(absl::StripAsciiWhitespace(cell));
  text.erase(std::remove(text.begin(), text.end(), '`'), text.end());
  return text;
}

}  // namespace

// ---- The document ------------------------------------------------------------------------------

TourTables ReadTourTables() {
  auto text = ReadFile("docs/parallelism.md", 1 << 20);
  CHECK(text.ok()) << text.status().ToString();
  TourTables tables;
  std::string phase;
  for (absl::string_view line : absl::StrSplit(*text, '\n')) {
    if (absl::StartsWith(line, "#"))
      phase = absl::StartsWith(line, "#### ") ? std::string(line.substr(5)) : "";
    if (phase.empty() || !absl::StartsWith(line, "| `")) continue;
    const std::vector<std::string> cells = absl::StrSplit(line, '|');
    CHECK_EQ(cells.size(), size_t{7}) << std::string(line);
    TourRow row{.tensor = Plain(cells[1]), .letters = Plain(cells[2]), .numbers = Plain(cells[3])};
    const std::string collective = Plain(cells[4]);
    if (!collective.empty()) {
      const std::vector<std::string> parts =
          absl::StrSplit(collective, absl::MaxSplits(absl::ByAnyChar(": "), 4));
      CHECK(parts.size() == 5 && parts[1] == "over") << collective;
      row.operation = parts[0];
      row.axis = parts[2];
      row.label = parts[4];
    }
    tables[phase].push_back(row);
  }
  return tables;
}

// ---- The record --------------------------------------------------------------------------------

TourRecorder::TourRecorder(const GridCommunicators& axes)
    : axes_({axes.tp.get(), axes.cp.get(), axes.dp.get(), axes.pp.get(), axes.cp_tp.get(),
             axes.dp_cp.get(), axes.stage.get(), axes.embedding.get(), axes.ep.get(),
             axes.edp.get()}) {}

void TourRecorder::Take(const std::string& phase) {
  for (const Communicator* axis : axes_) {
    for (absl::string_view line : absl::StrSplit(axis->FlightRecord(), '\n')) {
      if (!line.empty()) TakeLine(phase, axis->name(), line);
    }
  }
}

void TourRecorder::Keep(const std::string& phase, const std::string& name, const Tensor& tensor) {
  if (!tensor.empty()) phases_[phase].tensors[name] = tensor;
}

// "tp[0/2] #12 AllGather some label 640 bytes done"
void TourRecorder::TakeLine(const std::string& phase, const std::string& axis,
                            absl::string_view line) {
  std::vector<std::string> words = absl::StrSplit(line, ' ');
  ASSERT_GE(words.size(), 6u) << std::string(line);
  int64_t number = 0;
  TourCall call{.operation = words[2]};
  ASSERT_TRUE(absl::SimpleAtoi(words[1].substr(1), &number)) << std::string(line);
  ASSERT_TRUE(absl::SimpleAtoi(words[words.size() - 3], &call.bytes)) << std::string(line);
  if (number < next_[axis]) return;
  ASSERT_EQ(number, next_[axis]) << "the ring lost calls of " << axis;
  ++next_[axis];
  call.label = absl::StrJoin(words.begin() + 3, words.end() - 3, " ");
  // The MTP module's block is a block like any other.
  if (!absl::StartsWith(call.label, kMtpPrefix)) phases_[phase].calls[axis].push_back(call);
}

namespace {

void KeepAttention(const std::string& phase, const Mla::Saved& mla, TourRecorder& recorder) {
  const auto keep = [&](const char* name, const Tensor& tensor) {
    recorder.Keep(phase, absl::StrCat("saved.mla.", name), tensor);
  };
  keep("x_RD", mla.x_RD);
  keep("q_a", mla.q_a);
  keep("qr_R", mla.qr_R);
  keep("kv_a", mla.kv_a);
  keep("c_R", mla.c_R);
  keep("k_rope_R", mla.k_rope_R);
  keep("qr_G", mla.qr_G);
  keep("ids_GK", mla.ids_GK);
  keep("kv_TC", mla.kv_TC);
  keep("c_T", mla.c_T);
  keep("k_rope_T", mla.k_rope_T);
  keep("k_THQ", mla.k_THQ);
  keep("v_THV", mla.v_THV);
  keep("o_GHV", mla.o_GHV);
  keep("dout_GD", mla.dout_GD);
  keep("target_RK", mla.target_RK);
  keep("dqr_R", mla.dqr_R);
  keep("dq_a", mla.dq_a);
  keep("dc_R", mla.dc_R);
  keep("dkv_a", mla.dkv_a);
  if (mla.chunks.empty()) return;
  ASSERT_EQ(mla.chunks.size(), 1u);
  const Mla::Chunk& chunk = mla.chunks[0];
  keep("chunks[0].q_THQ", chunk.q_THQ);
  keep("chunks[0].q_absorbed_THC", chunk.q_absorbed_THC);
  keep("chunks[0].core.o_THV", chunk.core.o_THV);
  keep("chunks[0].core.lse_TH", chunk.core.lse_TH);
  keep("chunks[0].do_THV", chunk.do_THV);
  keep("chunks[0].dq_absorbed_THC", chunk.dq_absorbed_THC);
  keep("chunks[0].dq_THQ", chunk.dq_THQ);
}

void KeepExperts(const std::string& phase, const Moe::Saved& moe, TourRecorder& recorder) {
  const auto keep = [&](const char* name, const Tensor& tensor) {
    recorder.Keep(phase, absl::StrCat("saved.moe.", name), tensor);
  };
  keep("route.scores_TE", moe.route.scores_TE);
  keep("route.expert_ids_TA", moe.route.expert_ids_TA);
  keep("route.weights_TA", moe.route.weights_TA);
  keep("balance.counts_BE", moe.balance.counts_BE);
  keep("balance.prob_sum_BE", moe.balance.prob_sum_BE);
  keep("experts.rows_ND", moe.experts.rows_ND);
  keep("experts.weights_N", moe.experts.weights_N);
  keep("experts.gate", moe.experts.gate);
  keep("experts.hidden", moe.experts.hidden);
  keep("experts.dout_ND", moe.experts.dout_ND);
  keep("experts.dgate", moe.experts.dgate);
  keep("dweights_RA", moe.dweights_RA);
  keep("dlogits_RE", moe.dlogits_RE);
  keep("shared.x_GD", moe.shared.x_GD);
  keep("shared.hidden", moe.shared.inner.hidden);
  keep("shared.dy_GD", moe.shared.dy_GD);
  keep("shared.dgate", moe.shared.inner.dgate);
}

void KeepBlock(const std::string& phase, const Block::Saved& saved, TourRecorder& recorder) {
  recorder.Take(phase);
  const auto keep = [&](const char* name, const Tensor& tensor) {
    recorder.Keep(phase, absl::StrCat("saved.", name), tensor);
  };
  keep("x", saved.x);
  keep("ids_RK", saved.ids_RK);
  keep("h", saved.h);
  keep("h_norm", saved.h_norm);
  keep("shared_out", saved.shared_out);
  keep("mlp_out", saved.mlp_out);
  keep("dh_norm", saved.dh_norm);
  keep("dx", saved.dx);
  keep("dx_norm", saved.dx_norm);
  keep("indexer.q_RIJ", saved.indexer.q_RIJ);
  keep("indexer.k_RJ", saved.indexer.k_RJ);
  keep("indexer.w_RI", saved.indexer.w_RI);
  keep("indexer.k_TJ", saved.indexer.k_TJ);
  KeepAttention(phase, saved.mla, recorder);
  KeepExperts(phase, saved.moe, recorder);
}

}  // namespace

// ---- The work ----------------------------------------------------------------------------------

Tensor TourWork::Forward(int, int, const Tensor& x) {
  recorder_.Take("Messages");
  ModelPart::Begin(x, saved_);
  StepForward();
  KeepEnds(part_.layers().first ? "Embedding" : "none");
  for (const char* phase : kTourPhases) {
    StepForward();
    KeepBlock(absl::StrCat(warm_up_ ? "Warm-up: " : "Forward: ", phase), saved_.blocks[0],
              recorder_);
  }
  if (warm_up_) return WarmUpAlike(x);
  StepForward();
  KeepEnds("Head");
  EXPECT_FALSE(part_.ForwardStep(context_, batch_, pass_, stats_, saved_));
  return Passed();
}

Tensor TourWork::BackwardInput(int, int, const Tensor& dy) {
  recorder_.Take("Messages");
  ModelPart::Begin(dy, saved_);
  StepBackward();
  KeepEnds("backward ends");
  for (int phase = 3; phase >= 0; --phase) {
    StepBackward();
    KeepBlock(absl::StrCat("Backward: ", kTourPhases[phase]), saved_.blocks[0], recorder_);
  }
  StepBackward();
  return Passed();
}

void TourWork::BackwardWeight(int, int) {
  recorder_.Take("Messages");
  part_.BackwardWeight(context_, batch_, pass_, stats_, saved_);
  recorder_.Take("Weights");
}

Tensor TourWork::EmptyActivation() {
  return context_.context.Empty(DType::kF64, {batch_.num_rows(), context_.config.hidden_size});
}

void TourWork::StepForward() {
  ASSERT_TRUE(part_.ForwardStep(context_, batch_, pass_, stats_, saved_));
}
void TourWork::StepBackward() { ASSERT_TRUE(part_.BackwardStep(context_, batch_, pass_, saved_)); }

void TourWork::KeepEnds(const std::string& phase) {
  recorder_.Take(phase);
  for (const auto& [name, tensor] : {std::pair<const char*, Tensor>{"tokens_G", batch_.tokens_G},
                                     {"positions_G", batch_.positions_G},
                                     {"row_R", batch_.row_R},
                                     {"place_of_key_T", batch_.place_of_key_T}}) {
    recorder_.Keep(phase, absl::StrCat("batch.", name), tensor);
  }
  recorder_.Keep(phase, "saved.flow", saved_.flow);
  recorder_.Keep(phase, "saved.hidden", saved_.hidden);
  recorder_.Keep(phase, "saved.lm_loss_R", saved_.lm_loss_R);
  recorder_.Keep(phase, "saved.dhidden", saved_.dhidden);
}

Tensor TourWork::Passed() {
  recorder_.Keep("Messages", "saved.flow", saved_.flow);
  return std::move(saved_.flow);
}

// The steps were those of the pass that a warm-up really takes.
Tensor TourWork::WarmUpAlike(const Tensor& x) {
  const Tensor y = part_.WarmUp(context_, batch_, pass_, x, stats_);
  recorder_.Take("the real warm-up");
  EXPECT_EQ(y.empty(), part_.layers().last);
  return y;
}

}  // namespace baleen::testing
