// baleen report: metrics.jsonl of a run as one HTML file.
#include <cstdio>

#include "kernels/core/file.h"
#include "trainer/arguments.h"
#include "trainer/commands.h"
#include "trainer/report.h"

namespace baleen {

absl::Status ReportCommand(const Arguments& arguments, int*, char***) {
  ASSIGN_OR_RETURN(const ParsedArguments parsed,
                   ParsedArguments::Parse("report", arguments, {{"to"}, {"compare"}}));
  RETURN_IF_ERROR(
      parsed.CheckPositional(1, 1, "baleen report RUN_DIR [--to FILE] [--compare RUN_DIR]"));
  const std::string& run_dir = parsed.positional()[0];
  std::vector<std::string> compare;
  if (parsed.Has("compare")) compare.push_back(parsed.Value("compare", ""));
  ASSIGN_OR_RETURN(const std::string html, RunReport(run_dir, compare));
  const std::string path = parsed.Value("to", JoinPath(run_dir, "report.html"));
  RETURN_IF_ERROR(WriteFileDurably(path, html));
  std::printf("wrote %s\n", path.c_str());
  return absl::OkStatus();
}

}  // namespace baleen
