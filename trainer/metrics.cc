#include "trainer/metrics.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <deque>

#include "absl/strings/str_format.h"
#include "kernels/core/file.h"
#include "nlohmann/json.hpp"

namespace baleen {
namespace {

using Json = nlohmann::ordered_json;

void Put(Json& json, const char* key, const std::optional<double>& value) {
  if (value) json[key] = *value;
}

void Put(Json& json, const char* key, const std::vector<double>& values) {
  if (!values.empty()) json[key] = values;
}

// Three digits behind the point: what a heat map shows, in a third of the bytes.
Json InThousandths(const std::vector<std::vector<double>>& rows) {
  Json json = Json::array();
  for (const std::vector<double>& row : rows) {
    Json& values = json.emplace_back(Json::array());
    for (const double value : row) values.push_back(std::round(value * 1000) / 1000);
  }
  return json;
}

class JsonlSink : public MetricsSink {
 public:
  JsonlSink(FileDescriptor file, std::string path, const Log& log)
      : file_(std::move(file)), path_(std::move(path)), log_(log) {}
  void Step(const StepRecord& record) override { Write(ToJson(record)); }
  void Validation(const ValidationRecord& record) override { Write(ToJson(record)); }

 private:
  void Write(const std::string& json) {
    const std::string line = json + "\n";
    size_t written = 0;
    while (written < line.size()) {
      const ssize_t n = ::write(file_.get(), line.data() + written, line.size() - written);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) {
        if (!complained_)
          log_.Error(path_, ": cannot write metrics, training goes on: ", std::strerror(errno));
        complained_ = true;
        return;
      }
      written += static_cast<size_t>(n);
    }
  }
  FileDescriptor file_;
  std::string path_;
  Log log_;
  bool complained_ = false;
};

// The step of one line's record; nothing where the line is none.
std::optional<int64_t> StepOf(absl::string_view line) {
  const Json json = Json::parse(line.begin(), line.end(), nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer())
    return std::nullopt;
  return json["step"].get<int64_t>();
}

// The bytes of metrics.jsonl up to its last whole record of `last_step` or before. Records are in
// the order of steps: seen from the end, all that a resumed run does again comes first, and no more
// than that is read.
size_t BytesUpTo(absl::string_view text, int64_t last_step) {
  if (last_step <= 0) return 0;
  size_t end = text.rfind('\n') + 1;  // 0 where there is no whole line
  while (end > 0) {
    const size_t before = end >= 2 ? text.rfind('\n', end - 2) : absl::string_view::npos;
    const size_t begin = before == absl::string_view::npos ? 0 : before + 1;
    const std::optional<int64_t> step = StepOf(text.substr(begin, end - 1 - begin));
    if (step && *step <= last_step) return end;
    end = begin;
  }
  return 0;
}

// In place and durably: the records of days are not written again for the last few.
absl::Status CutRecords(const std::string& path, int file, int64_t resume_step) {
  ASSIGN_OR_RETURN(const MappedFile mapped, MappedFile::Open(path));
  const absl::Span<const uint8_t> bytes = mapped.bytes();
  const size_t kept =
      BytesUpTo({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, resume_step);
  if (kept == bytes.size()) return absl::OkStatus();
  if (::ftruncate(file, static_cast<off_t>(kept)) != 0 || ::fsync(file) != 0) {
    return EnvironmentError(path, ": cannot cut to the ", kept, " bytes up to step ", resume_step,
                            ": ", std::strerror(errno));
  }
  return absl::OkStatus();
}

// "2h05m", "3m20s", "41s".
std::string Duration(double seconds) {
  const auto s = static_cast<int64_t>(seconds);
  if (s >= 3600) return absl::StrFormat("%dh%02dm", s / 3600, s / 60 % 60);
  if (s >= 60) return absl::StrFormat("%dm%02ds", s / 60, s % 60);
  return absl::StrFormat("%ds", s);
}

std::string Count(double n) {
  if (n >= 1e6) return absl::StrFormat("%.2fM", n / 1e6);
  if (n >= 1e4) return absl::StrFormat("%.1fk", n / 1e3);
  return absl::StrFormat("%.0f", n);
}

class ConsoleSink : public MetricsSink {
 public:
  ConsoleSink(int64_t interval, const Log& log) : interval_(interval), log_(log) {}

  void Step(const StepRecord& r) override {
    if (r.stage != stage_) {
      stage_ = r.stage;
      seconds_.clear();
    }
    seconds_.push_back(r.step_seconds);
    if (seconds_.size() > kWindow) seconds_.pop_front();
    const bool shown =
        interval_ > 0 && (r.stage_step % interval_ == 0 || r.stage_step == r.stage_steps);
    if (shown || r.skipped) log_.Info(Line(r));
  }
  void Validation(const ValidationRecord& r) override {
    std::string line =
        absl::StrFormat("%s validation after step %d | loss %.4f", r.stage, r.step, r.lm_loss);
    if (r.mtp_loss) absl::StrAppendFormat(&line, " | mtp %.4f", *r.mtp_loss);
    log_.Info(line);
  }

 private:
  static constexpr size_t kWindow = 50;

  std::string Line(const StepRecord& r) const {
    std::string line = absl::StrFormat(
        "%s %*d/%d %5.1f%%", r.stage, static_cast<int>(absl::StrCat(r.stage_steps).size()),
        r.stage_step, r.stage_steps,
        100.0 * static_cast<double>(r.stage_step) / static_cast<double>(r.stage_steps));
    if (r.lm_loss) absl::StrAppendFormat(&line, " | loss %.4f", *r.lm_loss);
    if (r.mtp_loss) absl::StrAppendFormat(&line, " | mtp %.4f", *r.mtp_loss);
    if (r.indexer_kl) absl::StrAppendFormat(&line, " | kl %.4f", *r.indexer_kl);
    if (r.topk_mass) absl::StrAppendFormat(&line, " | mass %.3f", *r.topk_mass);
    if (r.grad_norm_main) absl::StrAppendFormat(&line, " | gnorm %.2f", *r.grad_norm_main);
    if (r.grad_norm_indexer) absl::StrAppendFormat(&line, " | ignorm %.2f", *r.grad_norm_indexer);
    absl::StrAppendFormat(&line, " | %.2f s | %s tok/s", r.step_seconds,
                          Count(r.tokens_per_second));
    if (r.mfu) absl::StrAppendFormat(&line, " | mfu %.1f%%", 100 * *r.mfu);
    absl::StrAppendFormat(&line, " | %.2f GiB",
                          static_cast<double>(r.memory_peak_bytes) / (1 << 30));
    absl::StrAppend(&line, " | eta ",
                    Duration(Median() * static_cast<double>(r.stage_steps - r.stage_step)));
    if (seconds_.size() == 1) line += " (warming)";
    if (r.skipped) line += " | SKIPPED: a gradient was not finite";
    if (r.data_wait_seconds > 0.05 * r.step_seconds) {
      absl::StrAppendFormat(&line, " | waited %.2f s for data", r.data_wait_seconds);
    }
    return line;
  }
  double Median() const {
    std::vector<double> sorted(seconds_.begin(), seconds_.end());
    std::nth_element(sorted.begin(), sorted.begin() + sorted.size() / 2, sorted.end());
    return sorted[sorted.size() / 2];
  }

  int64_t interval_;
  Log log_;
  std::string stage_;
  std::deque<double> seconds_;
};

}  // namespace

std::string ToJson(const StepRecord& r) {
  Json json;
  json["kind"] = "step";
  json["step"] = r.step;
  json["stage"] = r.stage;
  json["stage_step"] = r.stage_step;
  json["stage_steps"] = r.stage_steps;
  json["consumed_tokens"] = r.consumed_tokens;
  Put(json, "lm_loss", r.lm_loss);
  Put(json, "mtp_loss", r.mtp_loss);
  Put(json, "indexer_kl", r.indexer_kl);
  Put(json, "balance_loss", r.balance_loss);
  Put(json, "grad_norm_main", r.grad_norm_main);
  Put(json, "grad_norm_indexer", r.grad_norm_indexer);
  json["lr"] = r.lr;
  json["step_seconds"] = r.step_seconds;
  json["tokens_per_second"] = r.tokens_per_second;
  json["tokens_per_second_per_device"] = r.tokens_per_second_per_device;
  Put(json, "mfu", r.mfu);
  json["model_tflops"] = r.model_tflops;
  json["memory_peak_bytes"] = r.memory_peak_bytes;
  Put(json, "expert_load_max_over_mean", r.expert_load_max_over_mean);
  Put(json, "expert_load_min", r.expert_load_min);
  if (!r.expert_load.empty()) json["expert_load"] = InThousandths(r.expert_load);
  Put(json, "topk_mass", r.topk_mass);
  Put(json, "topk_mass_of_best", r.topk_mass_of_best);
  Put(json, "recall_at_k", r.recall_at_k);
  Put(json, "topk_ties", r.topk_ties);
  if (r.selection_hash) json["selection_hash"] = *r.selection_hash;
  Put(json, "indexer_kl_per_layer", r.indexer_kl_per_layer);
  Put(json, "topk_mass_per_layer", r.topk_mass_per_layer);
  Put(json, "topk_mass_of_best_per_layer", r.topk_mass_of_best_per_layer);
  Put(json, "recall_at_k_per_layer", r.recall_at_k_per_layer);
  json["data_wait_seconds"] = r.data_wait_seconds;
  json["skipped_steps"] = r.skipped_steps;
  if (r.skipped) json["skipped"] = true;
  return json.dump();
}

std::string ToJson(const ValidationRecord& r) {
  Json json;
  json["kind"] = "validation";
  json["step"] = r.step;
  json["stage"] = r.stage;
  json["lm_loss"] = r.lm_loss;
  Put(json, "mtp_loss", r.mtp_loss);
  return json.dump();
}

absl::StatusOr<std::unique_ptr<MetricsSink>> OpenJsonlSink(const std::string& path,
                                                           int64_t resume_step, const Log& log) {
  if (!FileExists(path)) RETURN_IF_ERROR(WriteFileDurably(path, ""));
  FileDescriptor file(::open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC));
  if (!file) return EnvironmentError(path, ": cannot open for writing: ", std::strerror(errno));
  RETURN_IF_ERROR(CutRecords(path, file.get(), resume_step));
  return std::make_unique<JsonlSink>(std::move(file), path, log);
}

std::unique_ptr<MetricsSink> MakeConsoleSink(int64_t interval, const Log& log) {
  return std::make_unique<ConsoleSink>(interval, log);
}

}  // namespace baleen
