// main() of MPI tests.
#include "tests/support/mpi_tests.h"

int main(int argc, char** argv) { return baleen::testing::RunTestsOnRanks(argc, argv); }
