// What the main() of tests on several ranks does, whatever else it checks before.
#pragma once

namespace baleen::testing {

// Starts MPI and runs all tests on every rank: rank 0 prints progress, the others their failures.
// One rank's failure is the result of all.
int RunTestsOnRanks(int argc, char** argv);

}  // namespace baleen::testing
