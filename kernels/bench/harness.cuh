// Bench harness for kernels: device buffers, event timing with a flushed L2, the two ceilings every
// figure is put against (bf16 GEMM 8192^3 and device copy), selection patterns, table and JSON
// rows.
//
// Timing: the median of `repeats` event-timed calls, each after a write of 256 MiB that empties the
// 50-60 MB L2. Needs CUDA and cuBLAS only, so that it builds on a bare GPU machine.
#pragma once

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace baleen::bench {

inline void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

inline void CheckLaunch(const char* what) {
  Check(cudaGetLastError(), what);
  Check(cudaDeviceSynchronize(), what);
}

// --- Device memory --------------------------------------------------------------------------

template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t count) : count_(count) {
    Check(cudaMalloc(&data_, std::max<size_t>(count, 1) * sizeof(T)), "cudaMalloc");
  }
  explicit DeviceBuffer(const std::vector<T>& host) : DeviceBuffer(host.size()) { Upload(host); }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  T* get() const { return data_; }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }
  void Upload(const std::vector<T>& host) {
    Check(cudaMemcpy(data_, host.data(), bytes(), cudaMemcpyHostToDevice), "upload");
  }
  std::vector<T> Download() const {
    std::vector<T> host(count_);
    Check(cudaMemcpy(host.data(), data_, bytes(), cudaMemcpyDeviceToHost), "download");
    return host;
  }
  // Fills with 0xFF bytes: NaN in fp32 and bf16, so an element nobody writes shows.
  void Poison() { Check(cudaMemset(data_, 0xFF, bytes()), "poison"); }
  void Zero() { Check(cudaMemset(data_, 0, bytes()), "zero"); }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

// Bit mixer; the random numbers of element i of stream `seed` are Mix(seed, i).
__host__ __device__ inline uint32_t Mix(uint64_t seed, uint64_t index) {
  uint64_t z = (seed * 0x9E3779B97F4A7C15ull) + index * 0xD1B54A32D192ED03ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 16);
}
// Close to normal(0, 1): the sum of four uniforms, centred and scaled.
__host__ __device__ inline float NormalAt(uint64_t seed, uint64_t index) {
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += (Mix(seed, 4 * index + i) + 0.5f) * 2.3283064e-10f;
  return (sum - 2.0f) * 1.7320508f;
}

template <typename T>
__global__ void FillNormalKernel(T* data, size_t count, float scale, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    data[i] = T(scale * NormalAt(seed, i));
  }
}
template <typename T>
void FillNormal(DeviceBuffer<T>& buffer, float scale, uint64_t seed) {
  FillNormalKernel<<<1024, 256>>>(buffer.get(), buffer.size(), scale, seed);
  CheckLaunch("FillNormal");
}

// ||out - reference|| / ||reference||; NaN when any output is NaN, and NaN fails every comparison.
inline double RelativeError(const std::vector<double>& out, const std::vector<double>& reference) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    difference += (out[i] - reference[i]) * (out[i] - reference[i]);
    norm += reference[i] * reference[i];
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}
template <typename T>
std::vector<double> ToDouble(const std::vector<T>& values) {
  std::vector<double> out(values.size());
  for (size_t i = 0; i < values.size(); ++i)
    out[i] = static_cast<double>(static_cast<float>(values[i]));
  return out;
}

// --- Timing -----------------------------------------------------------------------------------

class Timer {
 public:
  Timer() : flush_(size_t{256} << 20) {
    Check(cudaEventCreate(&begin_), "event");
    Check(cudaEventCreate(&end_), "event");
  }
  ~Timer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

  // Median milliseconds of `work` (all its launches on the default stream), after two warm-ups.
  double MedianMs(const std::function<void()>& work, int repeats = 20) {
    for (int i = 0; i < 2; ++i) work();
    CheckLaunch("warm-up");
    std::vector<float> times;
    for (int i = 0; i < repeats; ++i) {
      Check(cudaMemsetAsync(flush_.get(), i, flush_.bytes()), "flush");
      Check(cudaEventRecord(begin_), "event");
      work();
      Check(cudaEventRecord(end_), "event");
      CheckLaunch("timed call");
      float ms = 0;
      Check(cudaEventElapsedTime(&ms, begin_, end_), "elapsed");
      times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

 private:
  DeviceBuffer<uint8_t> flush_;
  cudaEvent_t begin_, end_;
};

// TFLOP/s of cuBLAS bf16 -> bf16, fp32 accumulation, 8192^3, random data.
inline double GemmTflops(Timer& timer) {
  constexpr int kSize = 8192;
  DeviceBuffer<__nv_bfloat16> a(size_t{kSize} * kSize), b(a.size()), c(a.size());
  FillNormal(a, 1.0f, 1);
  FillNormal(b, 1.0f, 2);
  cublasHandle_t handle;
  if (cublasCreate(&handle) != CUBLAS_STATUS_SUCCESS) std::exit(1);
  const float one = 1, zero = 0;
  const double ms = timer.MedianMs([&] {
    cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, kSize, kSize, kSize, &one, a.get(), CUDA_R_16BF,
                 kSize, b.get(), CUDA_R_16BF, kSize, &zero, c.get(), CUDA_R_16BF, kSize,
                 CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
  });
  cublasDestroy(handle);
  return 2.0 * kSize * kSize * kSize / (ms * 1e9);
}

// TB/s (read + written) of a 2 GiB device-to-device copy.
inline double CopyTbs(Timer& timer) {
  DeviceBuffer<uint8_t> from(size_t{2} << 30), to(from.size());
  from.Zero();
  const double ms = timer.MedianMs(
      [&] { cudaMemcpyAsync(to.get(), from.get(), from.size(), cudaMemcpyDeviceToDevice); }, 10);
  return 2.0 * from.size() / (ms * 1e9);
}

// --- Selections ---------------------------------------------------------------------------------

// kRandom: each row draws its keys uniformly. kNear: groups of 32 rows draw from one pool of
// 1.5 * chosen keys (neighbours share two thirds), as a trained indexer's neighbouring rows do.
enum class IdPattern { kRandom, kNear };
inline const char* Name(IdPattern pattern) {
  return pattern == IdPattern::kRandom ? "rand" : "near";
}

// Marks `count` distinct members of [0, limit) in `bits`.
inline void MarkDistinct(std::mt19937_64& random, int limit, int count,
                         std::vector<uint64_t>& bits) {
  std::fill(bits.begin(), bits.end(), 0);
  // Robert Floyd's sampling: exactly `count` draws.
  for (int j = limit - count; j < limit; ++j) {
    int pick = static_cast<int>(random() % (j + 1));
    if (bits[pick >> 6] >> (pick & 63) & 1) pick = j;
    bits[pick >> 6] |= uint64_t{1} << (pick & 63);
  }
}
inline void AppendMarked(const std::vector<uint64_t>& bits, std::vector<int>& out) {
  for (size_t word = 0; word < bits.size(); ++word) {
    for (uint64_t rest = bits[word]; rest; rest &= rest - 1) {
      out.push_back(static_cast<int>(word * 64 + __builtin_ctzll(rest)));
    }
  }
}

// ids [rows, chosen], each row ascending and distinct, no padding; needs chosen <= keys.
inline std::vector<int32_t> MakeIds(IdPattern pattern, int rows, int keys, int chosen,
                                    uint64_t seed) {
  std::vector<int32_t> ids(size_t{static_cast<size_t>(rows)} * chosen);
  const int groups = (rows + 31) / 32;
  const int workers = std::max(1u, std::min(16u, std::thread::hardware_concurrency()));
  auto fill_groups = [&](int worker) {
    std::vector<uint64_t> bits((keys + 63) / 64);
    for (int group = worker; group < groups; group += workers) {
      std::mt19937_64 random(seed * 1000003 + group);
      const int pool_size = pattern == IdPattern::kNear ? std::min(keys, chosen * 3 / 2) : keys;
      std::vector<int> pool;
      if (pattern == IdPattern::kNear) {
        MarkDistinct(random, keys, pool_size, bits);
        AppendMarked(bits, pool);
      }
      std::vector<int> picks;
      for (int row = group * 32; row < std::min(rows, group * 32 + 32); ++row) {
        picks.clear();
        MarkDistinct(random, pool_size, chosen, bits);
        AppendMarked(bits, picks);
        for (int k = 0; k < chosen; ++k) {
          ids[size_t{static_cast<size_t>(row)} * chosen + k] =
              pool.empty() ? picks[k] : pool[picks[k]];
        }
      }
    }
  };
  std::vector<std::thread> threads;
  for (int worker = 0; worker < workers; ++worker) threads.emplace_back(fill_groups, worker);
  for (std::thread& thread : threads) thread.join();
  return ids;
}

// --- Report -------------------------------------------------------------------------------------

// Rows of named cells: printed as an aligned table, written as a JSON array of objects.
class Report {
 public:
  using Row = std::vector<std::pair<std::string, std::string>>;

  void Add(Row row) { rows_.push_back(std::move(row)); }
  void Print() const {
    for (size_t i = 0; i < rows_.size(); ++i) {
      const bool new_header = i == 0 || !SameKeys(rows_[i - 1], rows_[i]);
      if (new_header) PrintLine(rows_[i], /*keys=*/true);
      PrintLine(rows_[i], /*keys=*/false);
    }
  }
  void WriteJson(const std::string& path) const {
    std::FILE* file = std::fopen(path.c_str(), "w");
    if (file == nullptr) {
      std::fprintf(stderr, "cannot write %s\n", path.c_str());
      std::exit(1);
    }
    std::fputs("[\n", file);
    for (size_t i = 0; i < rows_.size(); ++i) {
      std::fputs("  {", file);
      for (size_t j = 0; j < rows_[i].size(); ++j) {
        std::fprintf(file, "%s\"%s\": \"%s\"", j ? ", " : "", rows_[i][j].first.c_str(),
                     rows_[i][j].second.c_str());
      }
      std::fputs(i + 1 < rows_.size() ? "},\n" : "}\n", file);
    }
    std::fputs("]\n", file);
    std::fclose(file);
  }

 private:
  static bool SameKeys(const Row& a, const Row& b) {
    if (a.size() != b.size()) return false;
    for (size_t i = 0; i < a.size(); ++i) {
      if (a[i].first != b[i].first) return false;
    }
    return true;
  }
  static void PrintLine(const Row& row, bool keys) {
    for (const auto& [key, value] : row) {
      const int width = static_cast<int>(std::max<size_t>(key.size(), 9)) + 2;
      std::printf("%-*s", width, keys ? key.c_str() : value.c_str());
    }
    std::printf("\n");
  }

  std::vector<Row> rows_;
};

// Prints what was timed and the GEMM once more, which tells how warm the card has become; writes it
// where a path is given.
inline void Finish(Timer& timer, const Report& report, const std::string& json) {
  report.Print();
  std::printf("GEMM again %.1f TF\n", GemmTflops(timer));
  if (!json.empty()) report.WriteJson(json);
}

inline std::string Number(double value, int digits = 1) {
  char text[32];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

}  // namespace baleen::bench
