#include "kernels/core/cuda_trace.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <utility>

#include "kernels/core/cuda_check.h"
#include "kernels/core/cuda_context.h"
#include "kernels/core/shared_library.h"
#if __has_include(<cupti.h>)
#include <cupti.h>
#define BALEEN_HAVE_CUPTI 1
#endif

namespace baleen {
namespace {

constexpr int kMarkValue = 0xB5;  // no other memset of Baleen writes anything but zeros

}  // namespace

#ifdef BALEEN_HAVE_CUPTI
namespace {

constexpr size_t kBufferBytes = size_t{8} << 20;
// Where the toolkit has it: beside, not among its other libraries.
constexpr char kToolkitCupti[] = "/usr/local/cuda/extras/CUPTI/lib64/libcupti.so.13";

// CUPTI's functions that a trace needs.
struct Cupti {
  decltype(&cuptiActivityRegisterCallbacks) register_callbacks;
  decltype(&cuptiActivityEnable) enable;
  decltype(&cuptiActivityDisable) disable;
  decltype(&cuptiActivityFlushAll) flush;
  decltype(&cuptiActivityGetNextRecord) next_record;
  decltype(&cuptiGetResultString) result_string;

  std::string Text(CUptiResult result) const {
    const char* text = nullptr;
    result_string(result, &text);
    return text != nullptr ? text : absl::StrCat("error ", static_cast<int>(result));
  }
};

constexpr CUpti_ActivityKind kKinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL,
                                         CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET};

absl::StatusOr<const Cupti*> LoadCupti() {
  static const absl::StatusOr<Cupti> loaded = []() -> absl::StatusOr<Cupti> {
    ASSIGN_OR_RETURN(const SharedLibrary library,
                     SharedLibrary::Open({"libcupti.so.13", kToolkitCupti, "libcupti.so"},
                                         "tracing the GPU"));
    Cupti cupti;
#define BALEEN_FIND(member, function) \
  cupti.member = library.Find<std::remove_pointer_t<decltype(cupti.member)>>(function)
    BALEEN_FIND(register_callbacks, "cuptiActivityRegisterCallbacks");
    BALEEN_FIND(enable, "cuptiActivityEnable");
    BALEEN_FIND(disable, "cuptiActivityDisable");
    BALEEN_FIND(flush, "cuptiActivityFlushAll");
    BALEEN_FIND(next_record, "cuptiActivityGetNextRecord");
    BALEEN_FIND(result_string, "cuptiGetResultString");
#undef BALEEN_FIND
    return cupti;
  }();
  RETURN_IF_ERROR(loaded.status());
  return &*loaded;
}

// CUPTI's callbacks carry no argument: what they fill is the running trace's, and they may come
// from a thread of CUPTI's.
struct Filled {
  std::mutex mutex;
  const Cupti* cupti = nullptr;
  bool active = false;
  std::vector<std::pair<DeviceRecord, uint64_t>> records;  // with the begin in nanoseconds
  std::vector<uint64_t> ends;
};
Filled& filled() {
  static auto* const state = new Filled();
  return *state;
}

const char* CopyName(uint8_t kind) {
  switch (kind) {
    case CUPTI_ACTIVITY_MEMCPY_KIND_HTOD:
      return "HtoD";
    case CUPTI_ACTIVITY_MEMCPY_KIND_DTOH:
      return "DtoH";
    case CUPTI_ACTIVITY_MEMCPY_KIND_DTOD:
      return "DtoD";
    default:
      return "other";
  }
}

// The leading members of these structs are the same in all of CUPTI 13.
void Keep(const CUpti_Activity* activity, Filled& into) {
  DeviceRecord record;
  uint64_t begin = 0, end = 0;
  switch (activity->kind) {
    case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL:
    case CUPTI_ACTIVITY_KIND_KERNEL: {
      const auto* kernel = reinterpret_cast<const CUpti_ActivityKernel10*>(activity);
      record.name = kernel->name != nullptr ? kernel->name : "?";
      record.stream = static_cast<int>(kernel->streamId);
      begin = kernel->start, end = kernel->end;
      break;
    }
    case CUPTI_ACTIVITY_KIND_MEMCPY: {
      const auto* copy = reinterpret_cast<const CUpti_ActivityMemcpy6*>(activity);
      record.work = DeviceWork::kCopy;
      record.name = CopyName(copy->copyKind);
      record.stream = static_cast<int>(copy->streamId);
      record.bytes = static_cast<int64_t>(copy->bytes);
      begin = copy->start, end = copy->end;
      break;
    }
    case CUPTI_ACTIVITY_KIND_MEMSET: {
      const auto* set = reinterpret_cast<const CUpti_ActivityMemset4*>(activity);
      const bool mark = (set->value & 0xFF) == kMarkValue;
      record.work = mark ? DeviceWork::kMark : DeviceWork::kSet;
      record.name = "memset";
      record.stream = static_cast<int>(set->streamId);
      record.bytes = static_cast<int64_t>(set->bytes);
      record.mark = mark ? static_cast<int>(set->bytes) - 1 : 0;
      begin = set->start, end = set->end;
      break;
    }
    default:
      return;
  }
  into.records.emplace_back(std::move(record), begin);
  into.ends.push_back(end);
}

void CUPTIAPI GiveBuffer(uint8_t** buffer, size_t* size, size_t* max_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, kBufferBytes));
  *size = *buffer != nullptr ? kBufferBytes : 0;
  *max_records = 0;
}

void CUPTIAPI TakeBuffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
  {
    Filled& into = filled();
    const std::lock_guard<std::mutex> lock(into.mutex);
    CUpti_Activity* record = nullptr;
    while (into.active && valid > 0 &&
           into.cupti->next_record(buffer, valid, &record) == CUPTI_SUCCESS) {
      Keep(record, into);
    }
  }
  std::free(buffer);
}

}  // namespace

struct CudaTrace::State {
  Context context;
  const Cupti* cupti;
  Tensor marks;
};

absl::StatusOr<std::unique_ptr<CudaTrace>> CudaTrace::Start(const Context& context) {
  ASSIGN_OR_RETURN(const Cupti* const cupti, LoadCupti());
  static const CUptiResult registered = cupti->register_callbacks(GiveBuffer, TakeBuffer);
  auto state = std::make_unique<State>(State{context, cupti, Tensor()});
  state->marks = context.Empty(DType::kU8, {kMarks});
  CUDA_CHECK(cudaStreamSynchronize(static_cast<cudaStream_t>(context.stream())));
  {
    Filled& into = filled();
    const std::lock_guard<std::mutex> lock(into.mutex);
    CHECK(!into.active) << "a trace runs already";
    into.cupti = cupti;
    into.active = true;
    into.records.clear();
    into.ends.clear();
  }
  std::unique_ptr<CudaTrace> trace(new CudaTrace(std::move(state)));
  CUptiResult result = registered;
  for (const CUpti_ActivityKind kind : kKinds) {
    if (result == CUPTI_SUCCESS) result = cupti->enable(kind);
  }
  if (result == CUPTI_SUCCESS) return trace;
  return EnvironmentError("CUPTI cannot trace the GPU (", cupti->Text(result),
                          "): is a profiler or debugger attached, or are performance counters "
                          "closed to this user?");
}

CudaTrace::~CudaTrace() {
  for (const CUpti_ActivityKind kind : kKinds) state_->cupti->disable(kind);
  Filled& into = filled();
  const std::lock_guard<std::mutex> lock(into.mutex);
  into.active = false;
}

absl::StatusOr<std::vector<DeviceRecord>> CudaTrace::Stop() {
  CUDA_CHECK(cudaDeviceSynchronize());
  const CUptiResult result = state_->cupti->flush(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  if (result != CUPTI_SUCCESS) {
    return EnvironmentError("CUPTI gives no records: ", state_->cupti->Text(result));
  }
  Filled& into = filled();
  const std::lock_guard<std::mutex> lock(into.mutex);
  uint64_t first = UINT64_MAX;
  for (const auto& [record, begin] : into.records) first = std::min(first, begin);
  std::vector<DeviceRecord> records;
  for (size_t n = 0; n < into.records.size(); ++n) {
    auto& [record, begin] = into.records[n];
    record.begin = static_cast<double>(begin - first) * 1e-9;
    record.end = static_cast<double>(into.ends[n] - first) * 1e-9;
    records.push_back(std::move(record));
  }
  into.records.clear();
  into.ends.clear();
  std::stable_sort(records.begin(), records.end(),
                   [](const DeviceRecord& a, const DeviceRecord& b) { return a.begin < b.begin; });
  return records;
}

#else  // a build without cupti.h

struct CudaTrace::State {
  Context context;
  Tensor marks;
};

absl::StatusOr<std::unique_ptr<CudaTrace>> CudaTrace::Start(const Context&) {
  return EnvironmentError(
      "this build cannot trace the GPU: cupti.h was not there when it was compiled");
}
CudaTrace::~CudaTrace() = default;
absl::StatusOr<std::vector<DeviceRecord>> CudaTrace::Stop() { return std::vector<DeviceRecord>(); }

#endif

CudaTrace::CudaTrace(std::unique_ptr<State> state) : state_(std::move(state)) {}

void CudaTrace::Mark(int number) {
  CHECK(number >= 0 && number < kMarks) << number;
  CUDA_CHECK(cudaMemsetAsync(state_->marks.raw(), kMarkValue, static_cast<size_t>(number) + 1,
                             static_cast<cudaStream_t>(state_->context.stream())));
}

}  // namespace baleen
