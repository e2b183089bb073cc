#include "kernels/core/shared_library.h"

#include <dlfcn.h>

namespace baleen {

absl::StatusOr<SharedLibrary> SharedLibrary::Open(const std::vector<std::string>& names,
                                                  absl::string_view purpose) {
  std::string tried;
  for (const std::string& name : names) {
    for (const std::string& path : {name, absl::StrCat("/usr/local/cuda/lib64/", name)}) {
      // Local: our own functions of the same names (cublaslt_forward.cc) must not become its own.
      if (void* handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
        return SharedLibrary(handle, path);
      }
      const char* reason = ::dlerror();
      absl::StrAppend(&tried, "\n  ", reason != nullptr ? reason : path);
    }
  }
  return EnvironmentError(purpose, ": no ", names.front(),
                          " could be loaded; install it or add its folder to LD_LIBRARY_PATH",
                          tried);
}

void* SharedLibrary::FindAddress(const char* function) const {
  void* address = ::dlsym(handle_, function);
  CHECK(address != nullptr) << name_ << " has no function " << function
                            << ": it is older than the one Baleen was built with";
  return address;
}

}  // namespace baleen
