// What a GPU did, and when: a record of every kernel, copy and memset between Start and Stop, from
// CUPTI (libcupti, of the CUDA toolkit or PyTorch's wheels), loaded when first asked for.
//
// Marks divide the record: a memset of a few bytes on the compute stream that stands in the record
// where the host stood when it was enqueued. One trace at a time, one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/core/context.h"
#include "kernels/core/status.h"

namespace baleen {

enum class DeviceWork : uint8_t { kKernel, kCopy, kSet, kMark };

struct DeviceRecord {
  DeviceWork work = DeviceWork::kKernel;
  std::string name;  // a kernel's mangled name; "HtoD" and the like of a copy
  int stream = 0;    // the driver's number of the stream
  double begin = 0;  // seconds on the GPU's clock since the trace's first record
  double end = 0;
  int64_t bytes = 0;  // of copies and memsets
  int mark = 0;       // kMark: the number given to Mark
};

class CudaTrace {
 public:
  // EnvironmentError where libcupti is missing, this build had no cupti.h, or another tool
  // (profiler, debugger) holds it.
  static absl::StatusOr<std::unique_ptr<CudaTrace>> Start(const Context& context);
  ~CudaTrace();
  CudaTrace(const CudaTrace&) = delete;
  CudaTrace& operator=(const CudaTrace&) = delete;

  // `number`: 0 .. kMarks - 1.
  void Mark(int number);
  // Waits for the GPU. The records in the order of their begin.
  absl::StatusOr<std::vector<DeviceRecord>> Stop();

  static constexpr int kMarks = 256;

 private:
  struct State;
  explicit CudaTrace(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace baleen
