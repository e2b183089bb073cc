#include "kernels/core/check.h"

#include <cstdio>
#include <cstdlib>

namespace baleen::check_internal {

Failure::Failure(const char* file, int line, const std::string& what) {
  stream_ << file << ":" << line << ": CHECK failed: " << what << " ";
}

Failure::~Failure() {
  std::fprintf(stderr, "%s\n", stream_.str().c_str());
  std::fflush(stderr);
  std::abort();
}

}  // namespace baleen::check_internal
