// The commands that read and write files in one process: inspect, data, config.
#include <algorithm>
#include <cstdio>

#include "absl/strings/ascii.h"
#include "absl/strings/str_split.h"
#include "checkpoints/inspect_hf.h"
#include "checkpoints/state_inspect.h"
#include "checkpoints/state_manifest.h"
#include "checkpoints/state_reader.h"
#include "configs/schema/run_file.h"
#include "data/build.h"
#include "data/inspect_tokens.h"
#include "kernels/core/file.h"
#include "trainer/arguments.h"
#include "trainer/commands.h"

namespace baleen {
namespace {

void Print(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  if (!text.empty() && text.back() != '\n') std::fputc('\n', stdout);
}

absl::Status Healthy(bool healthy, const std::string& path) {
  if (healthy) return absl::OkStatus();
  return DataError(path, ": not healthy: see the lines marked above");
}

// True for a training state, a folder of them and a run directory, as InspectCommand knows them.
bool HoldsStates(const std::string& path) {
  if (FileExists(JoinPath(path, "config.json"))) return false;
  return FileExists(JoinPath(path, kManifestName)) || DirectoryExists(path);
}

// The last line of a run's metrics and what its checkpoints hold.
absl::Status InspectRun(const std::string& path, StateDepth depth) {
  std::string text = absl::StrCat("run directory ", path, "\n");
  const std::string metrics = JoinPath(path, "metrics.jsonl");
  if (FileExists(metrics)) {
    ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(metrics));
    const absl::string_view lines = absl::StripTrailingAsciiWhitespace(
        {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()});
    const auto records = lines.empty() ? 0 : std::count(lines.begin(), lines.end(), '\n') + 1;
    absl::StrAppend(&text, "metrics.jsonl: ", records, " records");
    if (records > 0) {
      absl::StrAppend(&text, "; the last: ", lines.substr(lines.rfind('\n') + 1).substr(0, 600));
    }
    text += "\n";
  }
  Print(text);
  const std::string checkpoints = JoinPath(path, "checkpoints");
  if (!DirectoryExists(checkpoints)) return absl::OkStatus();
  ASSIGN_OR_RETURN(const StateReport report, InspectState(checkpoints, depth));
  Print(report.text);
  return Healthy(report.healthy, checkpoints);
}

}  // namespace

absl::Status InspectCommand(const Arguments& arguments, int*, char***) {
  ASSIGN_OR_RETURN(
      const ParsedArguments parsed,
      ParsedArguments::Parse("inspect", arguments, {{"verify", false}, {"digest", false}}));
  RETURN_IF_ERROR(parsed.CheckPositional(1, 1, "baleen inspect PATH [--verify | --digest]"));
  const std::string& path = parsed.positional()[0];
  const bool verify = parsed.Has("verify");
  const bool digest = parsed.Has("digest");
  if (verify && digest) return ConfigError("baleen inspect: give --verify or --digest, not both");
  const StateDepth depth = digest   ? StateDepth::kDigest
                           : verify ? StateDepth::kContents
                                    : StateDepth::kManifest;
  if (digest && !HoldsStates(path)) {
    return DataError("baleen inspect --digest: ", path,
                     " holds no training state (a directory step-XXXXXXXX, a folder of them, or "
                     "a run directory)");
  }
  if (FileExists(JoinPath(path, "config.json"))) {
    ASSIGN_OR_RETURN(const InspectReport report,
                     InspectHf(path, verify ? InspectDepth::kValues : InspectDepth::kHeaders));
    Print(report.text);
    return Healthy(report.healthy, path);
  }
  if (FileExists(JoinPath(path, kManifestName))) {
    ASSIGN_OR_RETURN(const StateReport report, InspectState(path, depth));
    Print(report.text);
    return Healthy(report.healthy, path);
  }
  if (FileExists(JoinPath(path, "run.yaml")) || DirectoryExists(JoinPath(path, "checkpoints"))) {
    return InspectRun(path, depth);
  }
  if (DirectoryExists(path)) {
    ASSIGN_OR_RETURN(const std::vector<StateDirectory> states, ListStates(path));
    if (states.empty()) {
      return DataError(path, ": found neither config.json (a Hugging Face checkpoint), nor ",
                       kManifestName,
                       " (a training state), nor step-XXXXXXXX (training states), nor run.yaml (a "
                       "run directory)");
    }
    ASSIGN_OR_RETURN(const StateReport report, InspectState(path, depth));
    Print(report.text);
    return Healthy(report.healthy, path);
  }
  if (!FileExists(path) && !FileExists(path + ".bin") && !FileExists(path + ".idx")) {
    return DataError(path, ": there is no such file or directory, and no token file ", path,
                     ".bin with ", path, ".idx");
  }
  ASSIGN_OR_RETURN(const std::string report,
                   InspectTokens(path, verify ? TokenScan::kAllTokens : TokenScan::kIndexOnly));
  Print(report);
  return absl::OkStatus();
}

absl::Status DataCommand(const Arguments& arguments, int*, char***) {
  if (arguments.empty() || arguments[0] != "build") {
    return ConfigError(
        "baleen data: expected 'build'; usage: baleen data build IN... --to PREFIX --tokenizer "
        "bytes");
  }
  ASSIGN_OR_RETURN(const ParsedArguments parsed,
                   ParsedArguments::Parse("data build", {arguments.begin() + 1, arguments.end()},
                                          {{"to"},
                                           {"tokenizer"},
                                           {"append-eod", false},
                                           {"document-per"},
                                           {"extensions"},
                                           {"max-file-bytes"},
                                           {"eod-token"}}));
  RETURN_IF_ERROR(parsed.CheckPositional(
      1, -1, "baleen data build IN... --to PREFIX --tokenizer bytes|tokenizer.json"));
  BuildOptions options;
  options.documents.inputs = parsed.positional();
  options.prefix = parsed.Value("to", "");
  if (options.prefix.empty()) return ConfigError("baleen data build: --to PREFIX is missing");
  options.tokenizer.tokenizer = parsed.Value("tokenizer", "bytes");
  options.tokenizer.eod_token = parsed.Value("eod-token", "");
  options.append_eod = parsed.Has("append-eod");
  const std::string per = parsed.Value("document-per", "file");
  if (per != "file" && per != "directory") {
    return ConfigError("baleen data build: --document-per = '", per,
                       "': expected file or directory");
  }
  options.documents.document_per = per == "file" ? DocumentPer::kFile : DocumentPer::kDirectory;
  if (parsed.Has("extensions")) {
    options.documents.extensions =
        absl::StrSplit(parsed.Value("extensions", ""), ',', absl::SkipEmpty());
  }
  ASSIGN_OR_RETURN(options.documents.max_file_bytes, parsed.Integer("max-file-bytes", 0, 0));
  ASSIGN_OR_RETURN(const BuildReport report, BuildTokens(options));
  Print(Describe(report, options.prefix));
  return absl::OkStatus();
}

absl::Status ConfigCommand(const Arguments& arguments, int*, char***) {
  const std::string usage =
      "baleen config check|print RUN.yaml [key=value ...], or baleen config schema|reference";
  if (arguments.empty()) return ConfigError("baleen config: usage: ", usage);
  if (arguments[0] == "schema") {
    Print(RunConfigJsonSchema());
    return absl::OkStatus();
  }
  if (arguments[0] == "reference") {
    Print(RunConfigReference());
    return absl::OkStatus();
  }
  if (arguments[0] != "check" && arguments[0] != "print") {
    return ConfigError("baleen config: '", arguments[0], "' is none of its words; usage: ", usage);
  }
  if (arguments.size() < 2)
    return ConfigError("baleen config ", arguments[0], ": no run file; usage: ", usage);
  ASSIGN_OR_RETURN(const LoadedRun loaded,
                   LoadRunConfig(arguments[1], {arguments.begin() + 2, arguments.end()}));
  Print(arguments[0] == "print" ? PrintRunConfig(loaded) : absl::StrCat(arguments[1], ": ok"));
  return absl::OkStatus();
}

}  // namespace baleen
