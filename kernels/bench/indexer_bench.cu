// Checks and times the indexer's kernels: scores, exact top-k, backward on the selected set.
//
// Usage: indexer_bench check|gemm|topk|scores|backward... (run in turn; check_scores,
// check_backward and check_small are parts of check, backward_near_32k is one of backward). Checks
// compare with the double definitions of indexer_reference.h on fresh random inputs and poisoned
// outputs; the exit code is 1 if one fails. The chip is power limited: what runs right after gemm
// is slower.
#include <cuda_fp8.h>

#include <climits>
#include <cstring>
#include <ctime>

#include "kernels/bench/harness.cuh"
#include "kernels/bench/indexer_reference.h"
#include "kernels/ops/indexer/indexer_backward_cuda.h"
#include "kernels/ops/indexer/indexer_scores_cuda.h"
#include "kernels/ops/indexer/topk_select_cuda.h"

namespace baleen::bench {
namespace {

int failures = 0;

void Expect(bool good, const char* what, double value) {
  std::printf("  %-52s %-10.3g %s\n", what, value, good ? "ok" : "FAILED");
  if (!good) ++failures;
}

template <typename T>
bool SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// --- Top-k ------------------------------------------------------------------------------------

enum class Scores { kNormal, kFewValues, kPlateau, kConstant, kRising, kHidden, kZeros, kInfinite };

float ScoreAt(Scores kind, uint64_t seed, int row, int i, int keys) {
  const uint64_t index = static_cast<uint64_t>(row) * keys + i;
  const float x = NormalAt(seed, index);
  const uint32_t mix = Mix(seed + 77, index);
  switch (kind) {
    case Scores::kNormal:
      return x;
    case Scores::kFewValues:
      return std::round(x * 4) / 4;
    case Scores::kPlateau:
      return mix % 100 < 98 ? 0.0f : x;  // the threshold lies on the plateau at 0
    case Scores::kConstant:
      return -1.5f;
    case Scores::kRising:
      return static_cast<float>(i);
    // All winners sit outside the 64-byte pieces that an even sample of a long row reads.
    case Scores::kHidden:
      return i > keys - 2400 ? 10 + x : x;
    case Scores::kZeros:
      return mix & 1 ? 0.0f : -0.0f;
    case Scores::kInfinite:
      return mix % 3 == 0 ? -INFINITY : mix % 50 == 0 ? INFINITY : x;
  }
  return 0;
}

struct TopkCase {
  const char* name;
  Scores scores;
  int rows, keys, topk;
  bool windows;
  int nan_row = -1;
};

void CheckTopk(const TopkCase& c, uint64_t seed) {
  const int64_t stride = c.keys + (c.windows ? 3 : 0);
  std::vector<float> scores(c.rows * stride, NAN);
  Windows windows;
  for (int t = 0; t < c.rows; ++t) {
    for (int i = 0; i < c.keys; ++i) scores[t * stride + i] = ScoreAt(c.scores, seed, t, i, c.keys);
    const int a = Mix(seed + 5, t) % (c.keys + 1), b = Mix(seed + 6, t) % (c.keys + 1);
    windows.begin.push_back(c.windows ? std::min(a, b) : 0);
    windows.end.push_back(c.windows ? std::max(a, b) + (t == 0 ? c.keys : 0) : c.keys);
    for (int i = 0; i < c.keys && c.windows; ++i) {
      if (i < windows.begin[t] || i >= windows.end[t])
        scores[t * stride + i] = NAN;  // must not matter
    }
  }
  if (c.nan_row >= 0) scores[c.nan_row * stride + c.keys / 2] = NAN;
  DeviceBuffer<float> device_scores(scores);
  DeviceBuffer<int32_t> begin(windows.begin), end(windows.end),
      ids(static_cast<size_t>(c.rows) * c.topk), ties(c.rows),
      nan_row(std::vector<int32_t>{INT_MAX});
  DeviceBuffer<float> chosen(ids.size());
  TopkSelectArgs args{
      device_scores.get(), stride,       begin.get(), end.get(),    c.rows, c.keys, c.topk,
      ids.get(),           chosen.get(), ties.get(),  nan_row.get()};
  chosen.Poison();
  ids.Poison();
  ties.Poison();
  Check(LaunchTopkSelect(args, nullptr), "LaunchTopkSelect");
  CheckLaunch("topk");
  const std::vector<int32_t> got = ids.Download(), got_ties = ties.Download();
  const std::vector<float> got_scores = chosen.Download();
  ids.Zero();
  Check(LaunchTopkSelect(args, nullptr), "LaunchTopkSelect");
  CheckLaunch("topk");
  int wrong = SameBits(got, ids.Download()) ? 0 : 1, first_nan = INT_MAX;
  for (int t = 0; t < c.rows; ++t) {
    const TopkRow row = ReferenceTopk(&scores[t * stride], windows.begin[t],
                                      std::min(c.keys, windows.end[t]), c.topk);
    if (row.has_nan) first_nan = std::min(first_nan, t);
    bool same = row.ties_cut == got_ties[t];
    for (int i = 0; i < c.topk; ++i) {
      const size_t at = static_cast<size_t>(t) * c.topk + i;
      same &= row.ids[i] == got[at] &&
              got_scores[at] == (row.ids[i] < 0 ? 0.0f : scores[t * stride + row.ids[i]]);
    }
    wrong += !same;
  }
  wrong += nan_row.Download()[0] != first_nan;
  char text[96];
  std::snprintf(text, sizeof text, "topk %s %dx%d k %d%s", c.name, c.rows, c.keys, c.topk,
                c.windows ? " windows" : "");
  Expect(wrong == 0, text, wrong);
}

void CheckAllTopk(uint64_t seed) {
  const TopkCase cases[] = {
      {"normal", Scores::kNormal, 5, 8192, 2048, false},
      {"normal", Scores::kNormal, 40, 9001, 2048, true},
      {"normal", Scores::kNormal, 3, 131072, 2048, false},
      {"normal", Scores::kNormal, 9, 70001, 2048, true},
      {"normal", Scores::kNormal, 7, 2048, 2048, false},
      {"normal", Scores::kNormal, 33, 4099, 512, true},
      {"normal", Scores::kNormal, 9, 30011, 1, true},
      {"normal", Scores::kNormal, 9, 37, 5, true},
      {"normal", Scores::kNormal, 4, 1, 2048, false},
      {"nan", Scores::kNormal, 6, 20000, 2048, false, 4},
      {"nan", Scores::kNormal, 6, 1500, 2048, false, 2},
      {"few values", Scores::kFewValues, 6, 16385, 2048, true},
      {"few values", Scores::kFewValues, 3, 131072, 2048, false},
      {"plateau", Scores::kPlateau, 6, 32768, 2048, false},
      {"plateau", Scores::kPlateau, 6, 65537, 2048, true},
      {"plateau", Scores::kPlateau, 6, 6001, 512, true},
      {"constant", Scores::kConstant, 3, 40000, 2048, true},
      {"rising", Scores::kRising, 3, 100003, 2048, false},
      {"hidden", Scores::kHidden, 3, 131072, 2048, false},
      {"signed zeros", Scores::kZeros, 4, 12000, 2048, true},
      {"infinite", Scores::kInfinite, 6, 25000, 2048, true},
  };
  for (const TopkCase& c : cases) CheckTopk(c, ++seed);
}

void TimeTopk(Timer& timer, Report& report) {
  constexpr int kTopk = 2048;
  constexpr double kPeer[] = {0.070, 0.106, 0.154, 0.260, 0.519};  // FlashInfer, us a row
  int column = 0;
  for (int keys = 8192; keys <= 131072; keys *= 2, ++column) {
    const int rows = keys == 131072 ? 2048 : 4096;
    DeviceBuffer<float> scores(static_cast<size_t>(rows) * keys);
    DeviceBuffer<int32_t> ids(static_cast<size_t>(rows) * kTopk), ties(rows), nan_row(1);
    DeviceBuffer<float> chosen(ids.size());
    TopkSelectArgs args{scores.get(), keys,      nullptr, nullptr,    rows,         keys,
                        kTopk,        ids.get(), nullptr, ties.get(), nan_row.get()};
    for (const Scores kind : {Scores::kNormal, Scores::kPlateau, Scores::kHidden}) {
      if (kind == Scores::kNormal) {
        FillNormal(scores, 1.0f, 11);
      } else {
        std::vector<float> host(scores.size());
        for (int t = 0; t < 8; ++t) {
          for (int i = 0; i < keys; ++i)
            host[static_cast<size_t>(t) * keys + i] = ScoreAt(kind, 3, t, i, keys);
        }
        for (int t = 8; t < rows; ++t) {
          std::memcpy(&host[static_cast<size_t>(t) * keys],
                      &host[static_cast<size_t>(t % 8) * keys], keys * sizeof(float));
        }
        scores.Upload(host);
      }
      const double ms = timer.MedianMs([&] { LaunchTopkSelect(args, nullptr); }, 10);
      args.chosen_scores_TK = chosen.get();
      const double with_scores = timer.MedianMs([&] { LaunchTopkSelect(args, nullptr); }, 10);
      args.chosen_scores_TK = nullptr;
      report.Add({{"topk", std::to_string(kTopk)},
                  {"scores", kind == Scores::kNormal    ? "normal"
                             : kind == Scores::kPlateau ? "plateau"
                                                        : "hidden"},
                  {"keys", std::to_string(keys)},
                  {"rows", std::to_string(rows)},
                  {"ms", Number(ms, 3)},
                  {"us_per_row", Number(ms * 1e3 / rows, 4)},
                  {"with_scores_us_per_row", Number(with_scores * 1e3 / rows, 4)},
                  {"one_read_TB/s", Number(4.0 * rows * keys / (ms * 1e9), 2)},
                  {"x_FlashInfer", Number(kPeer[column] / (ms * 1e3 / rows), 2)}});
      if (keys != 131072 && keys != 8192) break;
    }
  }
}

// --- Scores -----------------------------------------------------------------------------------

__global__ void FillE4m3Kernel(__nv_fp8_e4m3* data, size_t count, float scale, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    data[i] = __nv_fp8_e4m3(scale * NormalAt(seed, i));
  }
}

template <typename T>
void FillMatrix(DeviceBuffer<T>& buffer, uint64_t seed) {
  if constexpr (sizeof(T) == 1) {
    FillE4m3Kernel<<<1024, 256>>>(buffer.get(), buffer.size(), 60.0f, seed);
    CheckLaunch("FillE4m3");
  } else {
    FillNormal(buffer, 1.0f, seed);
  }
}

const char* Name(IndexerDtype dtype) { return dtype == IndexerDtype::kBf16 ? "bf16" : "e4m3"; }

template <typename T>
void CheckScores(IndexerDtype dtype, int rows, int keys, int heads, uint64_t seed) {
  DeviceBuffer<T> q(static_cast<size_t>(rows) * heads * kIndexDim),
      k(static_cast<size_t>(keys) * kIndexDim);
  DeviceBuffer<float> w(static_cast<size_t>(rows) * heads), k_scale(keys);
  FillMatrix(q, seed);
  FillMatrix(k, seed + 1);
  FillNormal(w, 0.011f, seed + 2);
  std::vector<float> scales(keys, 1.0f);
  if (sizeof(T) == 1) {
    for (int s = 0; s < keys; ++s) scales[s] = 0.5f + (Mix(seed, s) & 1023) / 512.0f;
  }
  k_scale.Upload(scales);
  Windows windows;
  for (int t = 0; t < rows; ++t) {
    const int a = Mix(seed + 5, t) % (keys + 1), b = Mix(seed + 6, t) % (keys + 1);
    windows.begin.push_back(t % 11 == 3 ? b
                                        : std::min(a, b));  // some windows are empty or reversed
    windows.end.push_back(std::max(a, b) - (t % 11 == 3 ? keys : 0));
    if (t % 7 == 0) windows.begin[t] = 0, windows.end[t] = keys;
  }
  const int64_t stride = keys + 5;
  DeviceBuffer<int32_t> begin(windows.begin), end(windows.end);
  DeviceBuffer<float> scores(rows * stride);
  scores.Poison();
  IndexerScoresArgs args{q.get(),   k.get(), w.get(), nullptr, k_scale.get(), begin.get(),
                         end.get(), rows,    keys,    heads,   scores.get(),  stride};
  Check(LaunchIndexerScores(dtype, args, nullptr), "LaunchIndexerScores");
  CheckLaunch("scores");
  const std::vector<double> reference =
      ReferenceScores(ToDouble(q.Download()), ToDouble(k.Download()), ToDouble(w.Download()),
                      ToDouble(scales), windows, rows, keys, heads);
  const std::vector<float> got = scores.Download();
  std::vector<double> out, wanted;
  int stray = 0;
  for (int t = 0; t < rows; ++t) {
    for (int s = 0; s < stride; ++s) {
      const float x = got[t * stride + s];
      const bool inside = s < keys && s >= windows.begin[t] && s < windows.end[t];
      if (inside) {
        out.push_back(x);
        wanted.push_back(reference[static_cast<size_t>(t) * keys + s]);
      } else {
        stray += !std::isnan(x);  // as poisoned
      }
    }
  }
  const double error = RelativeError(out, wanted);
  char text[96];
  std::snprintf(text, sizeof text, "scores %s %dx%d heads %d", Name(dtype), rows, keys, heads);
  Expect(error < (dtype == IndexerDtype::kBf16   ? 1e-5
                  : dtype == IndexerDtype::kE4m3 ? 5e-4
                                                 : 3e-3) &&
             stray == 0,
         text, error + stray);
}

void CheckAllScores(uint64_t seed) {
  for (const int heads : {64, 32}) {
    CheckScores<__nv_bfloat16>(IndexerDtype::kBf16, 37, 1003, heads, seed);
    CheckScores<__nv_bfloat16>(IndexerDtype::kBf16, 601, 77, heads, seed + 20);
    CheckScores<__nv_fp8_e4m3>(IndexerDtype::kE4m3, 37, 1003, heads, seed + 10);
    CheckScores<__nv_fp8_e4m3>(IndexerDtype::kE4m3, 1, 3001, heads, seed + 30);
    CheckScores<__nv_fp8_e4m3>(IndexerDtype::kE4m3, 701, 65, heads, seed + 40);
    CheckScores<__nv_fp8_e4m3>(IndexerDtype::kE4m3, 5, 37001, heads, seed + 50);
    CheckScores<__nv_bfloat16>(IndexerDtype::kBf16, 5, 37001, heads, seed + 60);
  }
}

template <typename T>
void TimeScores(Timer& timer, Report& report, IndexerDtype dtype, int heads, int rows, int keys,
                bool causal) {
  DeviceBuffer<T> q(static_cast<size_t>(rows) * heads * kIndexDim),
      k(static_cast<size_t>(keys) * kIndexDim);
  DeviceBuffer<float> w(static_cast<size_t>(rows) * heads), k_scale(std::vector<float>(keys, 1.0f));
  DeviceBuffer<float> scores(static_cast<size_t>(rows) * keys);
  FillMatrix(q, 1);
  FillMatrix(k, 2);
  FillNormal(w, 0.011f, 3);
  std::vector<int32_t> ends(rows, keys);
  double pairs = 0;
  for (int t = 0; t < rows; ++t) {
    if (causal) ends[t] = keys - rows + t + 1;
    pairs += ends[t];
  }
  DeviceBuffer<int32_t> end(ends);
  IndexerScoresArgs args{q.get(),   k.get(), w.get(), nullptr, k_scale.get(), nullptr,
                         end.get(), rows,    keys,    heads,   scores.get(),  keys};
  const double ms =
      timer.MedianMs([&] { Check(LaunchIndexerScores(dtype, args, nullptr), "scores"); }, 10);
  report.Add({{"scores", Name(dtype)},
              {"heads", std::to_string(heads)},
              {"rows", std::to_string(rows)},
              {"keys", std::to_string(keys)},
              {"window", causal ? "causal" : "full"},
              {"ms", Number(ms, 3)},
              {"TF", Number(2.0 * pairs * heads * kIndexDim / (ms * 1e9))},
              {"write_TB/s", Number(4.0 * pairs / (ms * 1e9), 3)}});
}

void TimeAllScores(Timer& timer, Report& report) {
  const auto time_all = [&](int heads, int rows, int keys, bool causal) {
    TimeScores<__nv_bfloat16>(timer, report, IndexerDtype::kBf16, heads, rows, keys, causal);
    TimeScores<__nv_fp8_e4m3>(timer, report, IndexerDtype::kE4m3, heads, rows, keys, causal);
  };
  for (int keys = 4096; keys <= 131072; keys *= 2) time_all(64, 4096, keys, false);
  for (const int keys : {4096, 32768}) time_all(32, 4096, keys, false);
  for (const int keys : {8192, 32768}) time_all(64, keys, keys, true);
}

// --- Backward ---------------------------------------------------------------------------------

// Inputs and outputs of one call.
struct BackwardCase {
  BackwardCase(int rows, int keys, int heads, int topk, const std::vector<int32_t>& host_ids,
               const std::vector<float>& host_target, uint64_t seed)
      : q(static_cast<size_t>(rows) * heads * kIndexDim),
        k(static_cast<size_t>(keys) * kIndexDim),
        w(static_cast<size_t>(rows) * heads),
        ids(host_ids),
        target(host_target),
        loss(rows),
        dw(w.size()),
        dq(q.size()),
        dk(k.size()),
        workspace(IndexerBackwardWorkspaceBytes(rows, keys, topk)) {
    FillNormal(q, 1.0f, seed);
    FillNormal(k, 1.0f, seed + 1);
    FillNormal(w, 0.011f, seed + 2);
    args = {q.get(),    k.get(),  w.get(),  ids.get(), target.get(),   nullptr,
            1.0f / 128, 0.37f,    rows,     keys,      heads,          topk,
            loss.get(), dw.get(), dq.get(), dk.get(),  workspace.get()};
  }
  void Poison() {
    for (DeviceBuffer<float>* buffer : {&loss, &dw}) buffer->Poison();
    dq.Poison();
    workspace.Poison();
    FillNormal(dk, 1e-3f, 99);
  }

  DeviceBuffer<__nv_bfloat16> q, k;
  DeviceBuffer<float> w;
  DeviceBuffer<int32_t> ids;
  DeviceBuffer<float> target, loss, dw;
  DeviceBuffer<__nv_bfloat16> dq;
  DeviceBuffer<float> dk;
  DeviceBuffer<uint8_t> workspace;
  IndexerBackwardArgs args;
};

void CheckBackward(int rows, int keys, int heads, int topk, int pad, bool given_scores,
                   uint64_t seed) {
  const int chosen = std::min(topk, keys) - pad;
  const std::vector<int32_t> picks = MakeIds(IdPattern::kRandom, rows, keys, chosen, seed);
  std::vector<int32_t> ids(static_cast<size_t>(rows) * topk, -1);
  std::vector<float> target(ids.size(), NAN);  // must not be read where the id is -1
  for (int t = 0; t < rows; ++t) {
    const int valid = t == 1 ? 0 : t % 5 == 2 ? chosen / 3 : chosen;
    double sum = 0;
    for (int i = 0; i < valid; ++i) {
      const size_t at = static_cast<size_t>(t) * topk + i;
      ids[at] = picks[static_cast<size_t>(t) * chosen + i];
      target[at] = Mix(seed, at) % 7 == 0 ? 0.0f : std::exp(2 * NormalAt(seed, at));
      sum += target[at];
    }
    for (int i = 0; i < valid; ++i) target[static_cast<size_t>(t) * topk + i] *= 128 / sum;
  }
  BackwardCase c(rows, keys, heads, topk, ids, target, seed);
  const IndexerGradients reference = ReferenceBackward(
      ToDouble(c.q.Download()), ToDouble(c.k.Download()), ToDouble(c.w.Download()), ids,
      ToDouble(target), c.args.target_scale, c.args.grad_scale, rows, keys, heads, topk);
  DeviceBuffer<float> scores(
      std::vector<float>(reference.score_TK.begin(), reference.score_TK.end()));
  if (given_scores) c.args.scores_TK = scores.get();
  c.Poison();
  Check(LaunchIndexerBackward(c.args, nullptr), "LaunchIndexerBackward");
  CheckLaunch("backward");
  const std::vector<float> loss = c.loss.Download(), dw = c.dw.Download(), dk = c.dk.Download();
  const std::vector<__nv_bfloat16> dq = c.dq.Download();
  c.Poison();
  const std::vector<float> dk_before = c.dk.Download();
  Check(LaunchIndexerBackward(c.args, nullptr), "LaunchIndexerBackward");
  CheckLaunch("backward");
  const bool same = SameBits(loss, c.loss.Download()) && SameBits(dw, c.dw.Download()) &&
                    SameBits(dk, c.dk.Download()) && SameBits(dq, c.dq.Download());
  std::vector<double> dk_added(dk.size());
  for (size_t i = 0; i < dk.size(); ++i) dk_added[i] = static_cast<double>(dk[i]) - dk_before[i];
  char text[96];
  std::snprintf(text, sizeof text, "backward %dx%d heads %d k %d%s", rows, keys, heads, topk,
                given_scores ? " given" : "");
  const double errors[] = {
      RelativeError(ToDouble(loss), reference.loss_T), RelativeError(ToDouble(dw), reference.dw_TI),
      RelativeError(ToDouble(dq), reference.dq_TIJ), RelativeError(dk_added, reference.dk_SJ)};
  const double limits[] = {2e-5, 5e-3, 5e-3, 5e-3};
  const char* names[] = {"loss", "dw", "dq", "dk"};
  for (int i = 0; i < 4; ++i)
    Expect(errors[i] < limits[i], (std::string(text) + " " + names[i]).c_str(), errors[i]);
  Expect(same, (std::string(text) + " same bits").c_str(), same);
}

void CheckSmallBackward(uint64_t seed) {
  CheckBackward(13, 300, 64, 130, 7, false, seed);
  CheckBackward(7, 1000, 32, 64, 0, true, seed + 10);
}

void CheckAllBackward(uint64_t seed) {
  CheckSmallBackward(seed);
  CheckBackward(301, 3000, 64, 2048, 1, false, seed + 20);
  CheckBackward(64, 2100, 64, 2048, 0, true, seed + 30);
}

void TimeBackward(Timer& timer, Report& report, IdPattern pattern, int keys, int repeats) {
  constexpr int kRows = 4096, kTopk = 2048, kHeads = 64;
  const std::vector<int32_t> ids = MakeIds(pattern, kRows, keys, kTopk, 5);
  BackwardCase c(kRows, keys, kHeads, kTopk, ids, std::vector<float>(ids.size(), 128.0f / kTopk),
                 7);
  DeviceBuffer<float> scores(ids.size());
  FillNormal(scores, 0.5f, 8);
  c.Poison();
  Report::Row row = {
      {"backward", Name(pattern)}, {"keys", std::to_string(keys)}, {"rows", std::to_string(kRows)}};
  for (const bool given : {false, true}) {
    c.args.scores_TK = given ? scores.get() : nullptr;
    const double ms =
        timer.MedianMs([&] { Check(LaunchIndexerBackward(c.args, nullptr), "backward"); }, repeats);
    row.push_back({given ? "scores_given_ms" : "ms", Number(ms, 3)});
    row.push_back({given ? "scores_given_us/token" : "us/token", Number(ms * 1e3 / kRows, 4)});
  }
  report.Add(row);
}

}  // namespace
}  // namespace baleen::bench

int main(int argc, char** argv) {
  using namespace baleen::bench;
  Timer timer;
  Report report;
  const uint64_t seed = std::time(nullptr);
  for (int i = 1; i < argc; ++i) {
    const std::string what = argv[i];
    if (what == "gemm") {
      report.Add(
          {{"bf16_gemm_TF", Number(GemmTflops(timer))}, {"copy_TB/s", Number(CopyTbs(timer), 2)}});
    } else if (what == "check") {
      std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
      CheckAllTopk(seed);
      CheckAllScores(seed);
      CheckAllBackward(seed);
    } else if (what == "check_scores") {
      CheckAllScores(seed);
    } else if (what == "check_backward") {
      CheckAllBackward(seed);
    } else if (what == "check_small") {
      CheckSmallBackward(seed);
    } else if (what == "backward_near_32k") {
      TimeBackward(timer, report, IdPattern::kNear, 32768, 3);
    } else {
      std::fprintf(stderr, "unknown word %s: check, gemm, topk, scores, backward\n", argv[i]);
      return 2;
    }
  }
  report.Print();
  if (failures > 0) std::printf("%d FAILED\n", failures);
  return failures > 0 ? 1 : 0;
}
