#include "kernels/core/cuda_versions.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <fstream>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "kernels/core/shared_library.h"

namespace baleen {
namespace {

// 13000 is CUDA 13.0.
std::string CudaVersionText(int version) {
  return absl::StrCat(version / 1000, ".", version % 1000 / 10);
}

// 130100 is cuBLAS 13.1.0; cuDNN 9 counts in the same way.
std::string LibraryVersionText(size_t version) {
  return absl::StrCat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

// "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue ...": its first number with a
// dot. The words before it differ between kinds of driver.
std::string DriverVersion() {
  std::ifstream file("/proc/driver/nvidia/version");
  std::string line, word;
  std::getline(file, line);
  std::istringstream words(line);
  while (words >> word) {
    if (word.find('.') != std::string::npos &&
        word.find_first_not_of("0123456789.") == std::string::npos) {
      return word;
    }
  }
  return "";
}

}  // namespace

std::map<std::string, std::string> CudaVersions() {
  std::map<std::string, std::string> versions;
  if (const std::string driver = DriverVersion(); !driver.empty()) versions["driver"] = driver;
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) {
    versions["cuda_driver"] = CudaVersionText(version);
  }
  if (cudaRuntimeGetVersion(&version) == cudaSuccess) {
    versions["cuda_runtime"] = CudaVersionText(version);
  }
  versions["cublaslt"] = LibraryVersionText(cublasLtGetVersion());
  const auto cudnn = SharedLibrary::Open({"libcudnn.so.9"}, "cuDNN (attention)");
  if (cudnn.ok()) {
    versions["cudnn"] = LibraryVersionText(cudnn->Find<size_t()>("cudnnGetVersion")());
  }
  return versions;
}

}  // namespace baleen
