#include "trainer/report.h"

#include <optional>

#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "kernels/core/file.h"
#include "nlohmann/json.hpp"
#include "trainer/svg_chart.h"
#include "trainer/version.h"

namespace baleen {
namespace {

using Json = nlohmann::json;

struct RunMetrics {
  std::string name;
  std::vector<Json> steps, validations;
};

absl::StatusOr<RunMetrics> ReadMetrics(const std::string& run_dir) {
  const std::string path = JoinPath(run_dir, "metrics.jsonl");
  ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  const absl::string_view text(reinterpret_cast<const char*>(file.bytes().data()),
                               file.bytes().size());
  RunMetrics run;
  run.name = run_dir;
  std::optional<size_t> with_load;  // the last one is drawn, the others would fill the memory
  for (const absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    Json json = Json::parse(line.begin(), line.end(), nullptr, /*allow_exceptions=*/false);
    if (!json.is_object() || !json.contains("step") || !json["step"].is_number()) continue;
    if (json.value("kind", "step") == "validation") {
      run.validations.push_back(std::move(json));
      continue;
    }
    if (json.contains("expert_load")) {
      if (with_load) run.steps[*with_load].erase("expert_load");
      with_load = run.steps.size();
    }
    run.steps.push_back(std::move(json));
  }
  if (run.steps.empty()) return DataError(path, ": holds no step: nothing to report");
  return run;
}

ChartSeries Series(const std::vector<Json>& records, const char* key, std::string name,
                   bool dashed = false) {
  ChartSeries series{std::move(name), {}, dashed};
  for (const Json& record : records) {
    if (record.contains(key) && record[key].is_number()) {
      series.points.emplace_back(record["step"].get<double>(), record[key].get<double>());
    }
  }
  return series;
}

// One series per entry of an array-valued key.
std::vector<ChartSeries> LayerSeries(const std::vector<Json>& records, const char* key) {
  std::vector<ChartSeries> all;
  for (const Json& record : records) {
    if (!record.contains(key) || !record[key].is_array()) continue;
    for (size_t i = 0; i < record[key].size(); ++i) {
      if (all.size() <= i) all.push_back({absl::StrCat("layer ", i), {}, false});
      if (record[key][i].is_number())
        all[i].points.emplace_back(record["step"].get<double>(), record[key][i].get<double>());
    }
  }
  return all;
}

std::vector<std::pair<double, std::string>> StageMarks(const RunMetrics& run) {
  std::vector<std::pair<double, std::string>> marks;
  std::string stage;
  for (const Json& record : run.steps) {
    const std::string now = record.value("stage", "");
    if (now != stage) marks.emplace_back(record["step"].get<double>(), now);
    stage = now;
  }
  return marks;
}

int64_t FirstStepWithLoss(const RunMetrics& run) {
  for (const Json& record : run.steps) {
    if (record.contains("lm_loss")) return record["step"].get<int64_t>();
  }
  return 0;
}

// A run without the warm-up is drawn beside the stage that it is compared with.
void Shift(RunMetrics& run, int64_t steps) {
  for (auto* records : {&run.steps, &run.validations}) {
    for (Json& record : *records) record["step"] = record["step"].get<int64_t>() + steps;
  }
}

std::string StageTable(const RunMetrics& run) {
  std::string html =
      "<table><tr><th>stage</th><th>steps</th><th>tokens</th><th>lm loss</th><th>indexer "
      "KL</th><th>mass / best</th>"
      "<th>recall</th><th>tokens/s</th><th>skipped</th></tr>";
  const auto cell = [](const Json& first, const Json& last, const char* key) {
    if (!last.contains(key) || !last[key].is_number()) return std::string("<td></td>");
    if (!first.contains(key) || !first[key].is_number())
      return absl::StrFormat("<td>%.4g</td>", last[key].get<double>());
    return absl::StrFormat("<td>%.4g &rarr; %.4g</td>", first[key].get<double>(),
                           last[key].get<double>());
  };
  for (size_t begin = 0; begin < run.steps.size();) {
    size_t end = begin;
    const std::string stage = run.steps[begin].value("stage", "");
    size_t first_mass = run.steps.size(), last_mass = begin;
    while (end < run.steps.size() && run.steps[end].value("stage", "") == stage) {
      if (run.steps[end].contains("topk_mass")) {
        first_mass = std::min(first_mass, end);
        last_mass = end;
      }
      ++end;
    }
    const Json& first = run.steps[begin];
    const Json& last = run.steps[end - 1];
    absl::StrAppend(&html, "<tr><td>", HtmlEscape(stage), "</td><td>", end - begin, "</td><td>",
                    last.value("consumed_tokens", int64_t{0}), "</td>",
                    cell(first, last, "lm_loss"), cell(first, last, "indexer_kl"));
    if (first_mass < run.steps.size()) {
      const Json &m0 = run.steps[first_mass], &m1 = run.steps[last_mass];
      absl::StrAppendFormat(&html, "<td>%.3f / %.3f &rarr; %.3f / %.3f</td>",
                            m0.value("topk_mass", 0.0), m0.value("topk_mass_of_best", 0.0),
                            m1.value("topk_mass", 0.0), m1.value("topk_mass_of_best", 0.0));
      absl::StrAppend(&html, cell(m0, m1, "recall_at_k"));
    } else {
      html += "<td></td><td></td>";
    }
    absl::StrAppend(&html, cell(Json::object(), last, "tokens_per_second"),
                    cell(Json::object(), last, "skipped_steps"), "</tr>");
    begin = end;
  }
  return html + "</table>";
}

HeatMap ExpertLoad(const RunMetrics& run) {
  HeatMap map;
  for (auto record = run.steps.rbegin(); record != run.steps.rend(); ++record) {
    if (!record->contains("expert_load")) continue;
    map.title =
        absl::StrCat("tokens of each expert over the mean, step ", (*record)["step"].get<int64_t>(),
                     " (white 1, blue less, orange more)");
    for (const Json& row : (*record)["expert_load"]) {
      map.row_names.push_back(absl::StrCat("MoE ", map.row_names.size()));
      map.values.push_back(row.get<std::vector<double>>());
    }
    break;
  }
  return map;
}

void AppendSection(std::string& html, const std::string& title,
                   const std::vector<std::string>& figures) {
  std::string body;
  for (const std::string& figure : figures) {
    if (!figure.empty()) absl::StrAppend(&body, "<figure>", figure, "</figure>");
  }
  if (!body.empty()) absl::StrAppend(&html, "<h2>", title, "</h2>", body);
}

}  // namespace

absl::StatusOr<std::string> RunReport(const std::string& run_dir,
                                      const std::vector<std::string>& compare) {
  ASSIGN_OR_RETURN(const RunMetrics run, ReadMetrics(run_dir));
  std::vector<ChartSeries> losses = {Series(run.steps, "lm_loss", "lm loss"),
                                     Series(run.steps, "mtp_loss", "mtp loss"),
                                     Series(run.validations, "lm_loss", "validation lm loss")};
  for (const std::string& other : compare) {
    ASSIGN_OR_RETURN(RunMetrics metrics, ReadMetrics(other));
    const int64_t here = FirstStepWithLoss(run), there = FirstStepWithLoss(metrics);
    if (here > 0 && there > 0) Shift(metrics, here - there);
    losses.push_back(
        Series(metrics.steps, "lm_loss", absl::StrCat("lm loss of ", Basename(other)), true));
    losses.push_back(Series(metrics.validations, "lm_loss",
                            absl::StrCat("validation of ", Basename(other)), true));
  }
  const auto marks = StageMarks(run);
  const auto chart = [&](const char* title, std::vector<ChartSeries> series) {
    return SvgLineChart({title, "step", std::move(series), marks});
  };
  std::string html = absl::StrCat(
      "<!doctype html><html lang='en'><meta charset='utf-8'><title>", HtmlEscape(run_dir),
      "</title><style>body{font:15px/1.5 system-ui,sans-serif;max-width:860px;margin:2em "
      "auto;padding:0 1em;color:#111}"
      "svg{width:100%;height:auto}svg text{font:11px sans-serif;fill:#374151}svg "
      ".t{font-weight:bold;font-size:13px}"
      "figure{margin:1em 0}table{border-collapse:collapse;font-size:13px}td,th{border:1px solid "
      "#d1d5db;padding:4px 8px;"
      "text-align:left}</style><h1>",
      HtmlEscape(run_dir), "</h1>", StageTable(run));
  AppendSection(html, "Losses",
                {chart("losses", std::move(losses)),
                 chart("balance loss", {Series(run.steps, "balance_loss", "balance loss")})});
  AppendSection(html, "Lightning indexer",
                {chart("KL to the main attention, summed over layers",
                       {Series(run.steps, "indexer_kl", "KL")}),
                 chart("attention mass of the selected keys, and of the best selection",
                       {Series(run.steps, "topk_mass", "selected"),
                        Series(run.steps, "topk_mass_of_best", "best", true),
                        Series(run.steps, "recall_at_k", "recall")}),
                 chart("KL by layer (the last is the MTP module)",
                       LayerSeries(run.steps, "indexer_kl_per_layer")),
                 chart("selected mass by layer", LayerSeries(run.steps, "topk_mass_per_layer"))});
  AppendSection(html, "Experts",
                {SvgHeatMap(ExpertLoad(run)),
                 chart("expert load over the mean",
                       {Series(run.steps, "expert_load_max_over_mean", "largest"),
                        Series(run.steps, "expert_load_min", "smallest")})});
  AppendSection(html, "Optimizer",
                {chart("gradient norms", {Series(run.steps, "grad_norm_main", "main"),
                                          Series(run.steps, "grad_norm_indexer", "indexer")}),
                 chart("learning rate", {Series(run.steps, "lr", "lr")})});
  AppendSection(html, "Speed",
                {chart("tokens per second", {Series(run.steps, "tokens_per_second", "tokens/s")}),
                 chart("seconds a step", {Series(run.steps, "step_seconds", "seconds")})});
  absl::StrAppend(&html, "<p>Made by baleen ", kVersion, " from metrics.jsonl.</p></html>\n");
  return html;
}

}  // namespace baleen
