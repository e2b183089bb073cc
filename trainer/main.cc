// baleen COMMAND ARGUMENTS: finds the command, runs it, prints its one error, returns its exit
// code.
#include <cstdio>
#include <string>

#include "absl/strings/string_view.h"
#include "kernels/core/log.h"
#include "trainer/commands.h"
#include "trainer/exit_code.h"
#include "trainer/version.h"

namespace baleen {
namespace {

void PrintUsage(std::FILE* out) {
  std::fprintf(out, "baleen %s: DeepSeek-V3.1 checkpoint in, sparse attention model (V3.2) out\n\n",
               kVersion);
  std::fprintf(out, "usage: baleen COMMAND [ARGUMENTS]      baleen COMMAND --help\n\n");
  for (const Command& command : AllCommands())
    std::fprintf(out, "  %-9s %s\n", command.name, command.summary);
}

const Command* Find(absl::string_view name) {
  for (const Command& command : AllCommands()) {
    if (name == command.name) return &command;
  }
  return nullptr;
}

bool AsksForHelp(const Arguments& arguments) {
  for (const std::string& argument : arguments) {
    if (argument == "--help" || argument == "-h") return true;
  }
  return false;
}

int Main(int argc, char** argv) {
  if (argc < 2) {
    PrintUsage(stderr);
    return kExitConfig;
  }
  std::string name = argv[1];
  const bool help = name == "--help" || name == "-h" || name == "help";
  if (help && argc == 2) {
    PrintUsage(stdout);
    return kExitOk;
  }
  if (help) name = argv[2];
  if (name == "--version") {
    std::printf("baleen %s\n", kVersion);
    return kExitOk;
  }
  const Command* command = Find(name);
  if (command == nullptr) {
    PrintUsage(stderr);
    WriteLog(Severity::kError, "", absl::StrCat("no command '", name, "'"));
    return kExitConfig;
  }
  const Arguments arguments(argv + 2, argv + argc);
  if (help || AsksForHelp(arguments)) {
    std::fputs(command->help, stdout);
    return kExitOk;
  }
  const absl::Status status = command->run(arguments, &argc, &argv);
  PrintOutcome(status);
  return ExitCodeOf(status);
}

}  // namespace
}  // namespace baleen

int main(int argc, char** argv) { return baleen::Main(argc, argv); }
