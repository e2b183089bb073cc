#include "trainer/bench/measure.h"

#include <algorithm>
#include <chrono>

#include "kernels/core/cuda_context.h"
#include "kernels/core/random.h"
#include "kernels/core/transfer.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/linear/matmul.h"
#include "parallel/agree.h"

namespace baleen {
namespace {

using Clock = std::chrono::steady_clock;

double Since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void Wait(const Context& context) {
  if (context.device().kind == DeviceKind::kCpu) return;
  if constexpr (kHaveCuda) context.cuda().HostWait(context.cuda().Record(context.stream()));
}

double Greatest(Communicator& world, const char* label, double value) {
  const Tensor tensor = Context::Cpu().Zeros(DType::kF64, {1});
  tensor.data<double>()[0] = value;
  world.AllReduce(label, tensor, ReduceOp::kMax);
  return tensor.data<double>()[0];
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

// The host's time in each phase.
class PhaseClock {
 public:
  explicit PhaseClock(const std::vector<std::string>& phases) {
    for (const std::string& phase : phases) times_.push_back({.name = phase});
  }
  void Begin(int phase) {
    End();
    phase_ = phase;
    start_ = Clock::now();
  }
  void End() {
    if (phase_ >= 0) times_[phase_].host_seconds += Since(start_);
    phase_ = -1;
  }
  const std::vector<PhaseTime>& times() const { return times_; }

 private:
  std::vector<PhaseTime> times_;
  int phase_ = -1;
  Clock::time_point start_;
};

// With a wait for the device at each border: else a phase would have the time it took to enqueue.
absl::Status TimeOnHost(const Context& context, const Workload& workload, Measured& measured) {
  PhaseClock clock(workload.phases);
  RETURN_IF_ERROR(workload.run([&](int phase) {
    Wait(context);
    clock.Begin(phase);
  }));
  Wait(context);
  clock.End();
  measured.phases = clock.times();
  for (PhaseTime& phase : measured.phases) phase.seconds = phase.host_seconds;
  return absl::OkStatus();
}

absl::Status TraceOnce(const Context& context, const Workload& workload, Measured& measured) {
  absl::StatusOr<std::unique_ptr<CudaTrace>> trace = CudaTrace::Start(context);
  if (!trace.ok()) {
    measured.no_trace = std::string(trace.status().message());
    return TimeOnHost(context, workload, measured);
  }
  // Recorded, but before the first mark: what a step leaves running for the next is then in it.
  RETURN_IF_ERROR(workload.run(nullptr));
  PhaseClock clock(workload.phases);
  RETURN_IF_ERROR(workload.run([&](int phase) {
    (*trace)->Mark(phase);
    clock.Begin(phase);
  }));
  (*trace)->Mark(static_cast<int>(workload.phases.size()));
  clock.End();
  ASSIGN_OR_RETURN(measured.records, (*trace)->Stop());
  measured.timeline = MakeTimeline(measured.records, workload.phases);
  measured.phases = measured.timeline->phases;
  for (size_t n = 0; n < measured.phases.size(); ++n) {
    measured.phases[n].host_seconds = clock.times()[n].host_seconds;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Measured> Measure(const Context& context, Communicator& world,
                                 const Workload& workload, const MeasureOptions& options) {
  for (int64_t step = 0; step < options.warmup; ++step) RETURN_IF_ERROR(workload.run(nullptr));
  Measured measured;
  context.pool().ResetPeak();
  for (int64_t step = 0; step < options.steps; ++step) {
    Wait(context);
    world.Barrier("bench step");
    const Clock::time_point start = Clock::now();
    RETURN_IF_ERROR(workload.run(nullptr));
    Wait(context);
    measured.step_seconds.push_back(Greatest(world, "step seconds", Since(start)));
  }
  measured.median_seconds = Median(measured.step_seconds);
  measured.uses = context.pool().Uses();
  measured.total = context.pool().Total();
  measured.total.peak_bytes = static_cast<int64_t>(
      Greatest(world, "memory peak", static_cast<double>(measured.total.peak_bytes)));
  const bool cuda = context.device().kind == DeviceKind::kCuda;
  RETURN_IF_ERROR(cuda && options.trace ? TraceOnce(context, workload, measured)
                                        : TimeOnHost(context, workload, measured));
  return measured;
}

double MatmulCeiling(const Context& context) {
  const bool cuda = context.device().kind == DeviceKind::kCuda;
  const int64_t n = cuda ? 8192 : 512;
  const Tensor host = Context::Cpu().Empty(DType::kF32, {n, n});
  const RandomStream random(1, NameStream("matmul ceiling"));
  for (int64_t i = 0; i < n * n; ++i) {
    // Random bits are what costs power in a product; their distribution is not.
    host.data<float>()[i] = i < (int64_t{1} << 20)
                                ? static_cast<float>(random.Uniform(static_cast<uint64_t>(i)) - 0.5)
                                : host.data<float>()[i - (int64_t{1} << 20) + 1];
  }
  const DType dtype = cuda ? DType::kBF16 : DType::kF32;
  const Tensor a = InDtype(context, CopyToDevice(context, host), dtype);
  const Tensor b = InDtype(context, CopyToDevice(context, host), dtype);
  const Tensor c = context.Empty(dtype, {n, n});
  const auto multiply = [&](int times) {
    Wait(context);
    const Clock::time_point start = Clock::now();
    for (int i = 0; i < times; ++i) {
      Matmul(context, AsMatrix(a), Transpose::kNo, AsMatrix(b), Transpose::kYes, AsMatrix(c));
    }
    Wait(context);
    return Since(start) / times;
  };
  multiply(cuda ? 100 : 1);  // a cold GPU's clocks are low for a while
  std::vector<double> seconds;
  for (int round = 0; round < 5; ++round) seconds.push_back(multiply(cuda ? 10 : 1));
  const auto side = static_cast<double>(n);
  return 2 * side * side * side / Median(seconds);
}

}  // namespace baleen
