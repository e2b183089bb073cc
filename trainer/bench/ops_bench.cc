#include "trainer/bench/ops_bench.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <thread>

#include "kernels/core/cuda_context.h"
#include "kernels/core/cuda_timer.h"
#include "kernels/core/cuda_trace.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/linear/fp8_linear.h"
#include "kernels/ops/linear/matmul.h"

namespace baleen {
namespace {

using Clock = std::chrono::steady_clock;

// H100 and H200 have 50 and 60 MB of L2. Written twice: while the GPU does that the host enqueues
// the call, so that launches are no part of its time unless they are slower than the kernels.
constexpr int64_t kFlushBytes = int64_t{256} << 20;
// A call's repetitions end when they have taken this long; three at least.
constexpr double kMostSeconds = 0.5;
constexpr size_t kFewestCalls = 3;
constexpr int64_t kCeilingCalls = 20;
// Kept free for the driver, the libraries and the pool's rounding.
constexpr int64_t kReservedBytes = int64_t{4} << 30;
// Operands and results of the products beside which ops run.
constexpr int64_t kProductBytes = int64_t{1} << 30;

bool OnCuda(const Context& context) { return context.device().kind == DeviceKind::kCuda; }

class OpTimer {
 public:
  explicit OpTimer(Context& context) : context_(context) {
    if (!OnCuda(context)) return;
    const ScopedUse use(context, "bench flush");
    flush_ = context.Empty(DType::kU8, {kFlushBytes});
  }

  double Seconds(const std::function<void()>& call) const {
    if constexpr (kHaveCuda) {
      if (OnCuda(context_)) {
        FillZero(context_, flush_);
        FillZero(context_, flush_);
        return CudaSeconds(context_, call);
      }
    }
    const Clock::time_point start = Clock::now();
    call();
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

  // The first call of all makes plans and loads code; it does not count. After each call one of
  // `beside`, timed too.
  std::vector<double> Repeat(const std::function<void()>& call, int64_t times,
                             const std::function<void()>& beside = nullptr,
                             std::vector<double>* beside_seconds = nullptr) const {
    const double first = Seconds(call);
    if (first < kMostSeconds) Seconds(call);
    std::vector<double> seconds;
    double sum = 0;
    while (seconds.size() < static_cast<size_t>(times) &&
           (seconds.size() < kFewestCalls || sum < kMostSeconds)) {
      seconds.push_back(Seconds(call));
      sum += seconds.back();
      if (beside) beside_seconds->push_back(Seconds(beside));
    }
    return seconds;
  }

 private:
  Context& context_;
  Tensor flush_;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

// Kernels that one call launches; nothing where the GPU cannot be traced.
std::vector<WorkTime> KernelsOf(const Context& context, const std::function<void()>& call,
                                std::string& no_trace) {
  const absl::StatusOr<std::unique_ptr<CudaTrace>> trace = CudaTrace::Start(context);
  if (!trace.ok()) {
    no_trace = std::string(trace.status().message());
    return {};
  }
  (*trace)->Mark(0);
  call();
  (*trace)->Mark(1);
  const auto records = (*trace)->Stop();
  if (!records.ok()) {
    no_trace = std::string(records.status().message());
    return {};
  }
  return MakeTimeline(*records, {"call"}).kernels;
}

// A square product of the matmul's dtype or of block FP8, as a ceiling.
struct Product {
  double flops = 0;
  std::function<void()> run;
};

Product BigMatmul(OpInputs& inputs) {
  const Context& context = inputs.context();
  const int64_t n = OnCuda(context) ? 8192 : 512;
  const Tensor a = inputs.Normal({n, n}), b = inputs.Normal({n, n});
  const Tensor c = context.Empty(inputs.dtype(), {n, n});
  return {2 * static_cast<double>(n * n * n), [=, &context] {
            Matmul(context, AsMatrix(a), Transpose::kNo, AsMatrix(b), Transpose::kYes, AsMatrix(c));
          }};
}

Product BigFp8Product(OpInputs& inputs) {
  const Context& context = inputs.context();
  const int64_t n = OnCuda(context) ? 8192 : 128;
  const Fp8Operand a = QuantiseRows(context, inputs.Normal({n, n}));
  const Fp8Operand b = QuantiseWeight(context, inputs.Normal({n, n}), Fp8Side::kColumns);
  return {2 * static_cast<double>(n * n * n), [=, &context] { Fp8Product(context, a, b); }};
}

// By the same method as the ops' own figures: single calls, the L2 emptied before each.
double CeilingFlops(const Product& product, const OpTimer& timer) {
  // A cold GPU's clocks are low for a while. Back to back these products would draw so much power
  // that the clocks sank again, for longer than the measurement takes.
  timer.Repeat(product.run, kCeilingCalls);
  return product.flops / Median(timer.Repeat(product.run, kCeilingCalls));
}

// Long calls draw so much power that clocks stay low for a while: what is timed right behind half a
// second of them takes up to 1.3 times as long. So a GPU rests as long as it has worked.
void Rest(const Context& context, const std::vector<double>& seconds) {
  constexpr double kLongest = 0.5;
  if (!OnCuda(context)) return;
  const double worked = std::accumulate(seconds.begin(), seconds.end(), 0.0);
  std::this_thread::sleep_for(std::chrono::duration<double>(std::min(worked, kLongest)));
}

double CopyBytesPerSecond(Context& context, const OpTimer& timer) {
  const int64_t bytes = OnCuda(context) ? int64_t{1} << 30 : int64_t{64} << 20;
  const Tensor from = context.Zeros(DType::kU8, {bytes}), to = context.Zeros(DType::kU8, {bytes});
  return 2 * static_cast<double>(bytes) /
         Median(timer.Repeat([&] { Copy(context, from, to); }, kCeilingCalls));
}

}  // namespace

double OpResult::Share(const OpCeilings& ceilings) const {
  switch (op.bound) {
    case OpBound::kMatmul:
      return FlopsPerSecond() / (product_flops > 0 ? product_flops : ceilings.matmul_flops);
    case OpBound::kFp8Matmul:
      return FlopsPerSecond() / (product_flops > 0 ? product_flops : ceilings.fp8_flops);
    case OpBound::kCopy:
      return BytesPerSecond() / ceilings.bytes_per_second;
  }
  return 0;
}

double OpResult::Figure(const OpCeilings& ceilings) const {
  switch (goal->unit) {
    case GoalUnit::kTeraflops:
      return FlopsPerSecond() * 1e-12;
    case GoalUnit::kMicrosecondsRow:
      return MicrosecondsRow();
    case GoalUnit::kPercent:
      return 100 * Share(ceilings);
  }
  return 0;
}

OpCeilings MeasureCeilings(OpInputs& inputs) {
  Context& context = inputs.context();
  OpCeilings ceilings;
  const OpTimer timer(context);
  ceilings.matmul_flops = CeilingFlops(BigMatmul(inputs), timer);
  if (Fp8Operands(inputs.dtype(), OnCuda(context))) {
    ceilings.fp8_flops = CeilingFlops(BigFp8Product(inputs), timer);
  }
  ceilings.bytes_per_second = CopyBytesPerSecond(context, timer);
  return ceilings;
}

int64_t UsableMemory(const Context& context) {
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return context.cuda().properties().total_bytes - kReservedBytes -
             context.pool().Total().bytes - kFlushBytes - kProductBytes;
    }
  }
  return static_cast<int64_t>(::sysconf(_SC_AVPHYS_PAGES)) * ::sysconf(_SC_PAGE_SIZE);
}

int64_t NeededBytes(const OpCase& op, DType dtype) {
  Context dry = Context::Dry();
  OpInputs inputs(dry, dtype, /*seed=*/0);
  op.make(inputs).run();
  return dry.pool().Total().peak_bytes;
}

std::vector<OpResult> BenchOps(OpInputs& inputs, const OpSizes& sizes,
                               const std::vector<OpCase>& cases, const OpsOptions& options,
                               const std::function<void(const OpResult&)>& on_result,
                               std::string& no_trace) {
  Context& context = inputs.context();
  const OpTimer timer(context);
  // Ready only if some op takes turns with them.
  const auto any = [&](OpBound bound) {
    return std::any_of(cases.begin(), cases.end(),
                       [&](const OpCase& op) { return op.bound == bound; });
  };
  const Product matmul = any(OpBound::kMatmul) ? BigMatmul(inputs) : Product();
  const Product fp8 = any(OpBound::kFp8Matmul) ? BigFp8Product(inputs) : Product();
  std::vector<OpResult> results;
  for (const OpCase& op : cases) {
    OpResult result{.op = op};
    result.op.make = nullptr;
    result.needed_bytes = NeededBytes(op, sizes.dtype);
    result.fits = result.needed_bytes <= options.memory_bytes;
    if (result.fits) {
      const OpCall call = op.make(inputs);
      const Product& beside = op.bound == OpBound::kFp8Matmul ? fp8 : matmul;
      std::vector<double> beside_seconds;
      result.seconds = op.bound == OpBound::kCopy
                           ? timer.Repeat(call.run, options.steps)
                           : timer.Repeat(call.run, options.steps, beside.run, &beside_seconds);
      if (!beside_seconds.empty()) result.product_flops = beside.flops / Median(beside_seconds);
      result.median = Median(result.seconds);
      result.low = *std::min_element(result.seconds.begin(), result.seconds.end());
      result.high = *std::max_element(result.seconds.begin(), result.seconds.end());
      result.flops = call.flops;
      result.bytes = call.bytes;
      result.goal = GoalOf(op, sizes, call.bytes);
      if (!call.kernel.empty()) result.op.kernel = call.kernel;
      if (options.trace && OnCuda(context) && no_trace.empty())
        result.kernels = KernelsOf(context, call.run, no_trace);
      Rest(context, result.seconds);
    }
    on_result(result);
    results.push_back(std::move(result));
  }
  return results;
}

}  // namespace baleen
