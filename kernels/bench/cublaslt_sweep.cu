// Looks for a better kernel than the one cuBLASLt names first, for the products of the model's
// layers: the tiles, clusters and options of its Hopper algorithm that cublasLtMatmulAlgoCheck
// accepts, those first whose tiles read little and fill the waves of multiprocessors,
//
//   fill = m n / (waves multiprocessors tile_m tile_n)      m runs along a row of C
//
// each called once. The best then take turns with cuBLASLt's first suggestion, with what a run
// takes today (matmul_choices_cuda.h) and with an 8192^3 product, the L2 emptied before each call,
// and are compared with the first suggestion's result and bit by bit with a second call.
//
// Usage: cublaslt_sweep [--seconds=2] WORD...
//   q_a.wgrad                     sweeps it for so many seconds; layers and passes: kLayers, Pass
//   q_a.dgrad@32768               with other rows
//   q_a.wgrad 221/5/6 414/3/5     only these in turns: tile, cluster, option by cuBLASLt's numbers
// The exit code is 1 if a kernel gives other bits twice or a result that is far off.
#include <cublasLt.h>

#include <chrono>
#include <cstring>
#include <optional>
#include <set>
#include <tuple>

#include "kernels/bench/harness.cuh"
#include "kernels/ops/linear/matmul_choices_cuda.h"

namespace baleen::bench {
namespace {

constexpr size_t kWorkspace = size_t{32} << 20;  // as much as a run gives cuBLASLt
constexpr int kCalls = 15;                       // in turns
constexpr size_t kFinalists = 6;
constexpr uint32_t kOptions = 8;  // CUBLASLT_ALGO_CAP_CUSTOM_OPTION_MAX of the algorithm is 7

struct NamedSize {
  uint32_t id;
  int m, n;
};
// {23, 128, 256} of CUBLASLT_MATMUL_TILE_128x256 = 23: run_cublaslt_sweep.sh reads the header.
constexpr NamedSize kTiles[] = {BALEEN_CUBLASLT_TILES};
// CUBLASLT_CLUSTER_SHAPE_...; the first three are tried with each tile, all with the best.
constexpr NamedSize kClusters[] = {{3, 2, 1}, {5, 1, 2}, {2, 1, 1}, {4, 4, 1},
                                   {8, 1, 4}, {6, 2, 2}, {7, 4, 2}, {9, 2, 4}};

int failures = 0;

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void CheckBlas(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  std::fprintf(stderr, "%s: cuBLASLt says %s\n", what, cublasLtGetStatusString(status));
  std::exit(1);
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// --- Products, row major: y = x W^T, dx = dy W, dW += dy^T x ------------------------------------

enum class Pass { kForward, kInput, kWeight, kFirstWeight };  // the first overwrites dW
constexpr const char* kPassNames[] = {"forward", "dgrad", "wgrad", "wgrad_first"};

struct Layer {
  const char* name;
  int64_t rows, in, out;
};
// DeepSeek-V3.2's linear layers, by the names of `baleen bench ops`.
constexpr Layer kLayers[] = {
    {"q_a", 8192, 7168, 1536},         {"kv_a", 8192, 7168, 576},
    {"q_b", 8192, 1536, 24576},        {"kv_b", 8192, 512, 32768},
    {"o", 8192, 16384, 7168},          {"mlp_gate", 8192, 7168, 18432},
    {"mlp_down", 8192, 18432, 7168},   {"shared_gate", 8192, 7168, 2048},
    {"shared_down", 8192, 2048, 7168}, {"index_q", 8192, 1536, 8192},
    {"head", 4096, 7168, 129280},
};

// As cuBLASLt sees it, which counts by columns: C^T = B^T A^T.
struct Product {
  std::string name;
  Pass pass = Pass::kForward;
  int64_t m = 0, n = 0, k = 0;
  cudaDataType_t c_type = CUDA_R_16BF;
  float beta = 0;
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;

  size_t c_bytes() const { return size_t(m) * n * (c_type == CUDA_R_32F ? 4 : 2); }
  double Tflops(double ms) const { return 2.0 * m * n * k / (ms * 1e9); }
};

Product MakeProduct(const Layer& layer, Pass pass, int64_t rows) {
  const bool forward = pass == Pass::kForward;
  const bool weight = pass == Pass::kWeight || pass == Pass::kFirstWeight;
  Product p;
  p.pass = pass;
  p.m = forward ? layer.out : layer.in;
  p.n = weight ? layer.out : rows;
  p.k = forward ? layer.in : weight ? rows : layer.out;
  if (weight) p.c_type = CUDA_R_32F;
  if (pass == Pass::kWeight) p.beta = 1;
  CheckBlas(cublasLtMatmulDescCreate(&p.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "product");
  const auto operand = [&](cublasLtMatmulDescAttributes_t which, bool transposed, int64_t rows_of,
                           int64_t cols, cublasLtMatrixLayout_t& layout) {
    const cublasOperation_t operation = transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    CheckBlas(cublasLtMatmulDescSetAttribute(p.desc, which, &operation, sizeof operation),
              "transpose");
    if (transposed) std::swap(rows_of, cols);
    CheckBlas(cublasLtMatrixLayoutCreate(&layout, CUDA_R_16BF, rows_of, cols, rows_of), "operand");
  };
  operand(CUBLASLT_MATMUL_DESC_TRANSA, forward, p.m, p.k, p.a);
  operand(CUBLASLT_MATMUL_DESC_TRANSB, weight, p.k, p.n, p.b);
  CheckBlas(cublasLtMatrixLayoutCreate(&p.c, p.c_type, p.m, p.n, p.m), "result");
  return p;
}

// --- Kernels ------------------------------------------------------------------------------------

struct Kernel {
  std::string what;
  MatmulKernelChoice choice = {};
  cublasLtMatmulAlgo_t algo = {};
  double ms = 0;
  std::vector<double> turns;
};
bool Faster(const Kernel& x, const Kernel& y) { return x.ms < y.ms; }

// Tiles of C, a cluster's tiles always together.
struct Fill {
  double waves = 0, share = 0;
  int m = 0, n = 0;
};
Fill FillOf(const Product& p, const MatmulKernelChoice& choice, int multiprocessors) {
  Fill fill;
  NamedSize cluster = {0, 1, 1};
  for (const NamedSize& tile : kTiles) {
    if (tile.id == choice.tile) fill.m = tile.m, fill.n = tile.n;
  }
  for (const NamedSize& known : kClusters) {
    if (known.id == choice.cluster) cluster = known;
  }
  if (fill.m == 0) return fill;
  const auto tiles = [](int64_t size, int64_t tile, int64_t together) {
    return (size + tile * together - 1) / (tile * together) * together;
  };
  fill.waves =
      double(tiles(p.m, fill.m, cluster.m) * tiles(p.n, fill.n, cluster.n)) / multiprocessors;
  fill.share =
      double(p.m) * p.n / (std::ceil(fill.waves) * multiprocessors * double(fill.m) * fill.n);
  return fill;
}

template <typename T>
bool Set(cublasLtMatmulAlgo_t& algo, cublasLtMatmulAlgoConfigAttributes_t attribute, T value) {
  return cublasLtMatmulAlgoConfigSetAttribute(&algo, attribute, &value, sizeof value) ==
         CUBLAS_STATUS_SUCCESS;
}

__global__ void CompareKernel(const void* left, const void* right, size_t count, bool f32,
                              float* greatest) {
  float difference = 0, value = 0;
  bool differ = false;
  const auto at = [&](const void* values, size_t i) {
    return f32 ? static_cast<const float*>(values)[i]
               : float(static_cast<const __nv_bfloat16*>(values)[i]);
  };
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const float a = at(left, i), b = at(right, i), apart = fabsf(a - b);
    difference = apart <= difference ? difference : apart;  // keeps a NaN
    value = fmaxf(value, fabsf(b));
    differ |= __float_as_uint(a) != __float_as_uint(b);
  }
  // Of numbers that are not negative the bits are ordered as they are; a NaN's are above them.
  atomicMax(reinterpret_cast<int*>(greatest), __float_as_int(difference));
  atomicMax(reinterpret_cast<int*>(greatest + 1), __float_as_int(value));
  if (differ) greatest[2] = 1;
}

// A product's operands and results.
class Runner {
 public:
  Runner(cublasLtHandle_t handle, const Product& p)
      : handle_(handle),
        a_(size_t(p.m) * p.k),
        b_(size_t(p.n) * p.k),
        c_(p.c_bytes()),
        first_(p.c_bytes()),
        expected_(p.c_bytes()),
        workspace_(kWorkspace),
        greatest_(3) {
    FillNormal(a_, 1.0f, 1);
    FillNormal(b_, 1.0f, 2);
    if (p.c_type == CUDA_R_32F) {
      FillNormalKernel<<<1024, 256>>>(reinterpret_cast<float*>(first_.get()), p.c_bytes() / 4, 1.0f,
                                      uint64_t{3});
    }
    CheckLaunch("operands");
  }

  cublasStatus_t Run(const Product& p, const Kernel& kernel) {
    const float one = 1;
    return cublasLtMatmul(handle_, p.desc, &one, a_.get(), p.a, b_.get(), p.b, &p.beta, c_.get(),
                          p.c, c_.get(), p.c, &kernel.algo, workspace_.get(), kWorkspace, nullptr);
  }
  void Fresh(const Product& p, const Kernel& kernel) {
    Check(cudaMemcpy(c_.get(), first_.get(), p.c_bytes(), cudaMemcpyDeviceToDevice), "C");
    CheckBlas(Run(p, kernel), "product");
    CheckLaunch("product");
  }
  void Keep(const Product& p) {
    Check(cudaMemcpy(expected_.get(), c_.get(), p.c_bytes(), cudaMemcpyDeviceToDevice), "keep");
  }
  // The greatest difference to what was kept, as a share of its greatest value; the same bits?
  std::pair<double, bool> Compare(const Product& p) {
    greatest_.Zero();
    CompareKernel<<<1024, 256>>>(c_.get(), expected_.get(), size_t(p.m) * p.n,
                                 p.c_type == CUDA_R_32F, greatest_.get());
    CheckLaunch("compare");
    const std::vector<float> found = greatest_.Download();
    return {found[0] / found[1], found[2] == 0};
  }
  cublasLtHandle_t handle() const { return handle_; }

 private:
  cublasLtHandle_t handle_;
  DeviceBuffer<__nv_bfloat16> a_, b_;
  DeviceBuffer<uint8_t> c_, first_, expected_, workspace_;
  DeviceBuffer<float> greatest_;
};

Kernel Suggested(cublasLtHandle_t handle, const Product& p) {
  cublasLtMatmulPreference_t preference = nullptr;
  CheckBlas(cublasLtMatmulPreferenceCreate(&preference), "preference");
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    CheckBlas(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value),
              "preference");
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspace);
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
         static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  for (const auto operand :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    prefer(operand, uint32_t{16});
  }
  cublasLtMatmulHeuristicResult_t result = {};
  int found = 0;
  CheckBlas(cublasLtMatmulAlgoGetHeuristic(handle, p.desc, p.a, p.b, p.c, p.c, preference, 1,
                                           &result, &found),
            "suggestion");
  CheckBlas(found > 0 ? result.state : CUBLAS_STATUS_NOT_SUPPORTED, "suggestion");
  cublasLtMatmulPreferenceDestroy(preference);
  Kernel kernel = {"first suggestion", {}, result.algo};
  size_t written = 0;
  const auto get = [&](cublasLtMatmulAlgoConfigAttributes_t attribute, auto& value) {
    cublasLtMatmulAlgoConfigGetAttribute(&kernel.algo, attribute, &value, sizeof value, &written);
  };
  get(CUBLASLT_ALGO_CONFIG_TILE_ID, kernel.choice.tile);
  get(CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, kernel.choice.cluster);
  get(CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, kernel.choice.custom);
  return kernel;
}

// As matmul_cuda.cu configures it; nothing where cuBLASLt has no such kernel for the product.
std::optional<Kernel> Configured(cublasLtHandle_t handle, const Product& p,
                                 const MatmulKernelChoice& choice, const char* what) {
  Kernel kernel = {what, choice};
  CheckBlas(cublasLtMatmulAlgoInit(handle, CUBLAS_COMPUTE_32F, CUDA_R_32F, CUDA_R_16BF, CUDA_R_16BF,
                                   p.c_type, p.c_type, kMatmulAlgorithm, &kernel.algo),
            "algorithm");
  cublasLtMatmulHeuristicResult_t checked = {};
  if (!Set(kernel.algo, CUBLASLT_ALGO_CONFIG_TILE_ID, choice.tile) ||
      !Set(kernel.algo, CUBLASLT_ALGO_CONFIG_STAGES_ID, kMatmulStages) ||
      !Set(kernel.algo, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, choice.cluster) ||
      !Set(kernel.algo, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, choice.custom) ||
      cublasLtMatmulAlgoCheck(handle, p.desc, p.a, p.b, p.c, p.c, &kernel.algo, &checked) !=
          CUBLAS_STATUS_SUCCESS ||
      checked.workspaceSize > kWorkspace) {
    return std::nullopt;
  }
  return kernel;
}

// --- The sweep ----------------------------------------------------------------------------------

// Milliseconds of one call on an empty L2.
double OneCall(Runner& runner, const Product& p, const Kernel& kernel) {
  static DeviceBuffer<uint8_t>* const flush = new DeviceBuffer<uint8_t>(size_t{256} << 20);
  static cudaEvent_t begin = nullptr, end = nullptr;
  if (begin == nullptr) Check(cudaEventCreate(&begin), "event");
  if (end == nullptr) Check(cudaEventCreate(&end), "event");
  Check(cudaMemsetAsync(flush->get(), 1, flush->bytes()), "flush");
  Check(cudaEventRecord(begin), "event");
  CheckBlas(runner.Run(p, kernel), "product");
  Check(cudaEventRecord(end), "event");
  CheckLaunch("product");
  float ms = 0;
  Check(cudaEventElapsedTime(&ms, begin, end), "elapsed");
  return ms;
}

class Sweep {
 public:
  Sweep(Runner& runner, const Product& product, int multiprocessors, double until)
      : runner_(runner), product_(product), multiprocessors_(multiprocessors), until_(until) {}

  // The fastest, one a tile.
  std::vector<Kernel> Best() {
    for (const auto& [score, tile] : Tiles()) {
      for (size_t c = 0; c < 3; ++c) Options(tile, static_cast<uint16_t>(kClusters[c].id));
    }
    const bool late = Now() > until_;
    until_ = std::max(until_, Now() + 0.5);
    for (const Kernel& kernel : Fastest(8)) {
      for (const NamedSize& cluster : kClusters)
        Options(kernel.choice.tile, static_cast<uint16_t>(cluster.id));
    }
    std::vector<Kernel> best = Fastest(3 * kFinalists);
    for (Kernel& kernel : best) {  // one call is not enough to tell
      kernel.ms = Median(
          {kernel.ms, OneCall(runner_, product_, kernel), OneCall(runner_, product_, kernel)});
    }
    std::printf("  %zu configurations tried, %zu run%s\n", tried_.size(), timed_.size(),
                late ? ", time was up before the end" : "");
    std::sort(best.begin(), best.end(), Faster);
    if (best.size() > kFinalists) best.resize(kFinalists);
    return best;
  }

 private:
  // By what tiles waste and read; kv_a's dgrad, where narrow tiles were slower, gives the weight.
  std::vector<std::pair<double, uint32_t>> Tiles() const {
    std::vector<std::pair<double, uint32_t>> order;
    for (const NamedSize& tile : kTiles) {
      const int area = tile.m * tile.n;
      if (std::min(tile.m, tile.n) < 64 || area < 96 * 128 || area > 256 * 192) continue;
      const double share = FillOf(product_, {tile.id, 2, 0}, multiprocessors_).share;
      order.push_back({22 * (1.0 / tile.m + 1.0 / tile.n) - share, tile.id});
    }
    std::sort(order.begin(), order.end());
    return order;
  }

  void Options(uint32_t tile, uint16_t cluster) {
    for (uint32_t custom = 0; custom < kOptions; ++custom) {
      if (Now() > until_) return;
      if (!tried_.insert({tile, cluster, custom}).second) continue;
      auto kernel = Configured(runner_.handle(), product_, {tile, cluster, custom}, "");
      // The first call loads the kernel.
      if (!kernel || runner_.Run(product_, *kernel) != CUBLAS_STATUS_SUCCESS) continue;
      kernel->ms = OneCall(runner_, product_, *kernel);
      timed_.push_back(*kernel);
    }
  }

  std::vector<Kernel> Fastest(size_t count) {
    std::sort(timed_.begin(), timed_.end(), Faster);
    std::vector<Kernel> fastest;
    std::set<uint32_t> tiles;
    for (const Kernel& kernel : timed_) {
      if (fastest.size() < count && tiles.insert(kernel.choice.tile).second) {
        fastest.push_back(kernel);
      }
    }
    return fastest;
  }

  Runner& runner_;
  const Product& product_;
  const int multiprocessors_;
  double until_;  // Now()
  std::set<std::tuple<uint32_t, uint16_t, uint32_t>> tried_;
  std::vector<Kernel> timed_;
};

std::optional<MatmulKernelChoice> TableChoice(const Product& p) {
  const MatmulPass pass = p.pass == Pass::kForward ? MatmulPass::kForward
                          : p.pass == Pass::kInput ? MatmulPass::kInput
                                                   : MatmulPass::kWeight;
  return ChooseMatmulKernel({pass, p.n, p.m, p.k});
}

void PrintKernel(const Product& p, const Kernel& kernel, int multiprocessors, double first_ms,
                 double ceiling, std::pair<double, bool> checked) {
  const Fill fill = FillOf(p, kernel.choice, multiprocessors);
  const double ms = Median(kernel.turns), tflops = p.Tflops(ms);
  const bool good = checked.first < 0x1p-7 && checked.second;
  if (!good) ++failures;
  std::printf(
      "  %-16s %3u/%u/%u  %3d x %-3d %7.2f waves, fill %.3f  %8.4f ms %6.1f TF %6.3f x "
      "%6.1f %% of 8192^3  differs %.1e, twice %s\n",
      kernel.what.c_str(), kernel.choice.tile, unsigned{kernel.choice.cluster},
      kernel.choice.custom, fill.m, fill.n, fill.waves, fill.share, ms, tflops, first_ms / ms,
      100 * tflops / ceiling, checked.first, good ? "equal" : "FAILED");
}

struct Ceiling {
  Product product;
  Runner runner;
};

void TakeTurns(Runner& runner, const Product& p, std::vector<Kernel>& kernels, Ceiling& square,
               int multiprocessors) {
  Kernel ceiling = Suggested(runner.handle(), square.product);
  for (const Kernel& kernel : kernels) OneCall(runner, p, kernel);
  for (int call = 0; call < kCalls; ++call) {
    ceiling.turns.push_back(OneCall(square.runner, square.product, ceiling));
    for (Kernel& kernel : kernels) kernel.turns.push_back(OneCall(runner, p, kernel));
  }
  for (const Kernel& kernel : kernels) {
    runner.Fresh(p, kernels[0]);
    runner.Keep(p);
    runner.Fresh(p, kernel);
    const double difference = runner.Compare(p).first;
    runner.Keep(p);
    runner.Fresh(p, kernel);
    PrintKernel(p, kernel, multiprocessors, Median(kernels[0].turns),
                square.product.Tflops(Median(ceiling.turns)),
                {difference, runner.Compare(p).second});
  }
}

std::optional<Product> Named(const std::string& word) {
  const size_t at = word.find('@');
  for (const Layer& layer : kLayers) {
    for (const Pass pass : {Pass::kForward, Pass::kInput, Pass::kWeight, Pass::kFirstWeight}) {
      const std::string name = std::string(layer.name) + "." + kPassNames[static_cast<int>(pass)];
      if (word.substr(0, at) != name) continue;
      const int64_t rows = at == word.npos ? layer.rows : std::stoll(word.substr(at + 1));
      Product p = MakeProduct(layer, pass, rows);
      p.name = word;
      return p;
    }
  }
  return std::nullopt;
}

// `named`: these alone; none: what a sweep finds.
void Compete(cublasLtHandle_t handle, const Product& p, double seconds,
             const std::vector<MatmulKernelChoice>& named, Ceiling& ceiling, int multiprocessors) {
  std::printf("%s\n", p.name.c_str());
  Runner runner(handle, p);
  std::vector<Kernel> kernels = {Suggested(handle, p)};
  const auto add = [&](const MatmulKernelChoice& choice, const char* what) {
    const auto kernel = Configured(handle, p, choice, what);
    if (kernel) kernels.push_back(*kernel);
    if (!kernel) std::printf("  %-16s %3u refused by cuBLASLt\n", what, choice.tile);
  };
  if (const auto choice = TableChoice(p)) add(*choice, "today");
  for (const MatmulKernelChoice& choice : named) add(choice, "named");
  if (named.empty()) {
    for (Kernel& kernel : Sweep(runner, p, multiprocessors, Now() + seconds).Best()) {
      kernels.push_back(kernel);
    }
  }
  TakeTurns(runner, p, kernels, ceiling, multiprocessors);
}

int Main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what was found before a hang is seen
  cublasLtHandle_t handle = nullptr;
  CheckBlas(cublasLtCreate(&handle), "handle");
  int multiprocessors = 0;
  Check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "device");
  std::printf("cuBLASLt %zu, %d multiprocessors\n", cublasLtGetVersion(), multiprocessors);
  const Product square = MakeProduct({"square", 8192, 8192, 8192}, Pass::kForward, 8192);
  Ceiling ceiling = {square, {handle, square}};
  for (int i = 0; i < 20; ++i) OneCall(ceiling.runner, square, Suggested(handle, square));
  double seconds = 2;
  for (int i = 1; i < argc; ++i) {
    if (std::sscanf(argv[i], "--seconds=%lf", &seconds) == 1) continue;
    const std::optional<Product> product = Named(argv[i]);
    if (!product) {
      std::fprintf(stderr, "cublaslt_sweep: unknown product %s\n", argv[i]);
      return 2;
    }
    std::vector<MatmulKernelChoice> named;
    MatmulKernelChoice choice = {};
    while (i + 1 < argc && std::sscanf(argv[i + 1], "%u/%hu/%u", &choice.tile, &choice.cluster,
                                       &choice.custom) == 3) {
      named.push_back(choice);
      ++i;
    }
    Compete(handle, *product, seconds, named, ceiling, multiprocessors);
  }
  std::printf("%d checks failed\n", failures);
  return failures > 0 ? 1 : 0;
}

}  // namespace
}  // namespace baleen::bench

int main(int argc, char** argv) { return baleen::bench::Main(argc, argv); }
