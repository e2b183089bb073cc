// A fresh directory for a test, removed at its end: in memory where that is possible, since some
// tests sync thousands of files.
#pragma once

#include <stdlib.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <system_error>

#include "kernels/core/check.h"
#include "kernels/core/file.h"

namespace baleen::testing {

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    const std::filesystem::path memory = "/dev/shm";
    const bool usable = ::access(memory.c_str(), W_OK) == 0;
    path_ = ((usable ? memory : std::filesystem::temp_directory_path()) / "baleen_test_XXXXXX")
                .string();
    CHECK(::mkdtemp(path_.data()) != nullptr) << path_;
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

  const std::string& path() const { return path_; }
  std::string File(const std::string& name) const { return JoinPath(path_, name); }

 private:
  std::string path_;
};

}  // namespace baleen::testing
