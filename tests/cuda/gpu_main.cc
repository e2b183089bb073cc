// main() of the tests that need a GPU: exit code 77 where there is none, which CTest and
// launch/gpu_tests.sh count as skipped. MPI only where mpirun or srun started the process: tests of
// aborting start it anew. `--planted_fault=TOOL` runs no test, but a kernel with a fault
// (planted_fault.h).
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/core/cuda_context.h"
#include "tests/cuda/planted_fault.h"
#include "tests/support/mpi_tests.h"

namespace {

// compute-sanitizer hands out what it found at calls that synchronise, and our contexts wait by
// asking events: without this its reports are lost, and every test looks clean.
void HandOutReports() { cudaDeviceSynchronize(); }

class HandsOutReports : public ::testing::EmptyTestEventListener {
  void OnTestEnd(const ::testing::TestInfo&) override { HandOutReports(); }
};

}  // namespace

int main(int argc, char** argv) {
  if (baleen::CudaDeviceCount() == 0) {
    std::fprintf(stderr, "no GPU is visible: skipped\n");
    return 77;
  }
  constexpr char kPlantedFault[] = "--planted_fault=";
  if (argc > 1 && std::strncmp(argv[1], kPlantedFault, std::strlen(kPlantedFault)) == 0) {
    const bool known = baleen::testing::PlantFault(argv[1] + std::strlen(kPlantedFault));
    HandOutReports();
    return known ? 0 : 2;
  }
  for (const char* variable : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"}) {
    if (std::getenv(variable) != nullptr) return baleen::testing::RunTestsOnRanks(argc, argv);
  }
  ::testing::InitGoogleTest(&argc, argv);
  ::testing::UnitTest::GetInstance()->listeners().Append(new HandsOutReports);
  return RUN_ALL_TESTS();
}
