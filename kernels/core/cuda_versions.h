// Versions of what a run on a GPU depends on, for environment.json.
#pragma once

#include <map>
#include <string>

namespace baleen {

// By name: driver, cuda_driver (the newest CUDA that the driver knows), cuda_runtime, cublaslt,
// cudnn. One that cannot be asked is missing. After MakeCudaContext; not in a build without CUDA.
std::map<std::string, std::string> CudaVersions();

}  // namespace baleen
