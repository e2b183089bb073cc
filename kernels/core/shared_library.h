// Libraries of the host that are loaded when first needed: cuBLASLt, cuDNN, NCCL. The binary links
// none of them, so that it starts, and trains on the CPU, on machines that have none.
#pragma once

#include <string>
#include <vector>

#include "kernels/core/check.h"
#include "kernels/core/status.h"

namespace baleen {

class SharedLibrary {
 public:
  // Opens the first of `names` that the loader finds (LD_LIBRARY_PATH, the binary's run path, the
  // system's folders), or that lies in /usr/local/cuda/lib64. It stays open to the process's end.
  // EnvironmentError names what was tried and `purpose`.
  static absl::StatusOr<SharedLibrary> Open(const std::vector<std::string>& names,
                                            absl::string_view purpose);

  // The function of this name and type; aborts when the library lacks it.
  template <typename Function>
  Function* Find(const char* function) const {
    return reinterpret_cast<Function*>(FindAddress(function));
  }
  const std::string& name() const { return name_; }

 private:
  SharedLibrary(void* handle, std::string name) : handle_(handle), name_(std::move(name)) {}
  void* FindAddress(const char* function) const;

  void* handle_;  // never closed: device code of the library may still run
  std::string name_;
};

}  // namespace baleen
