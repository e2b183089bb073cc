// RunLock: one run directory, one owner. `run.lock` names host, process, job and start; a second
// run gets an EnvironmentError (exit 3) that repeats them.
//
// The file appears complete or not at all (written aside, then link(2), which fails where it
// exists, as O_EXCL does) and its owner holds flock on it. A lock is stale, and taken over, only
// when its flock is free and its process is gone: its host is this host and the process is not
// there (or the id belongs to one that started later), or it was an earlier start of this Slurm
// job. On another host, where none of that can be known, the message says what to look at and which
// file to remove.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/core/file.h"
#include "kernels/core/status.h"

namespace baleen {

class RunLock {
 public:
  // `job` is the scheduler's id or empty, "42 restart 1" where it was requeued.
  static absl::StatusOr<RunLock> Acquire(const std::string& run_dir, const std::string& job);
  RunLock(RunLock&&) noexcept = default;
  RunLock& operator=(RunLock&&) = delete;
  // Removes the file, if it is still this lock's.
  ~RunLock();

  const std::string& path() const { return path_; }

 private:
  RunLock(std::string path, FileDescriptor file) : path_(std::move(path)), file_(std::move(file)) {}
  std::string path_;
  FileDescriptor file_;
};

}  // namespace baleen
