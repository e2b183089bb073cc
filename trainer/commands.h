// The subcommands of `baleen`. Each takes its own arguments (without the program and its name) and
// returns a Status that main() turns into the exit code; what it prints on success goes to stdout.
#pragma once

#include <string>
#include <vector>

#include "kernels/core/status.h"

namespace baleen {

using Arguments = std::vector<std::string>;

class Communicator;

// The one error of a command, on stderr; nothing for ok and for errors without a text.
void PrintOutcome(const absl::Status& status);

// The end of a command that ran on several ranks, which all hold the same status: rank 0 prints it,
// the others wait for that, since a launcher stops all ranks as soon as one has ended with an
// error. Returns the code without the text.
absl::Status PrintOnce(const absl::Status& status, Communicator& world);

struct Command {
  const char* name;
  const char* summary;  // one line
  const char* help;     // opens with the two commonest examples
  // argc and argv of the process for commands that start MPI.
  absl::Status (*run)(const Arguments& arguments, int* argc, char*** argv);
};

absl::Status TrainCommand(const Arguments& arguments, int* argc, char*** argv);
absl::Status PlanCommand(const Arguments& arguments, int* argc, char*** argv);
absl::Status InitCommand(const Arguments& arguments, int* argc, char*** argv);
absl::Status ExportCommand(const Arguments& arguments, int* argc, char*** argv);
absl::Status InspectCommand(const Arguments& arguments, int* argc, char*** argv);
absl::Status DataCommand(const Arguments& arguments, int* argc, char*** argv);
absl::Status ConfigCommand(const Arguments& arguments, int* argc, char*** argv);
absl::Status EvalCommand(const Arguments& arguments, int* argc, char*** argv);
absl::Status BenchCommand(const Arguments& arguments, int* argc, char*** argv);
absl::Status ReportCommand(const Arguments& arguments, int* argc, char*** argv);

// All of them, in the order of the help.
const std::vector<Command>& AllCommands();

}  // namespace baleen
