#include "trainer/device_table.h"

#include <unistd.h>

#include "absl/strings/str_cat.h"

namespace baleen {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;

// kernels/bench, H100 80GB HBM3: GEMM 8192^3, copy, and the kernels' results at 128K keys
// (RESULTS_*.md); attention in the 192/128 form and grouped GEMM as measured inside steps of the
// 671B proxy (RESULTS.md). Masked attention is counted over the listed keys and works on all of the
// window: its rates are those of 8K tokens, where 2048 of 4096 keys are listed.
DeviceSpec H100() {
  DeviceSpec device;
  device.name = "h100";
  device.description =
      "H100 80 GB: GEMM bf16 794 TF, fp8 blocks 1150 TF, copy 3.02 TB/s, "
      "sparse attention 520/342 TF, "
      "indexer 680 TF (fp8 1000), dense attention 655/450 TF, grouped GEMM 715 TF (measured); "
      "NVLink 360 GB/s "
      "in nodes of 8, network 40 GB/s a GPU, 20 us a call, 3 GiB for driver and libraries "
      "(assumed)";
  device.memory_bytes = int64_t{81079} << 20;  // 79.18 GiB: what CUDA offers
  device.reserved_bytes = 3 * kGiB;
  device.matmul_flops = 794e12;
  device.op_flops = {
      {"grouped_matmul", 715e12},
      {"fp8_matmul", 1150e12},          // 1160 to 1307 with weights, 850 to 1000 of their gradients
      {"fp8_grouped_matmul", 1000e12},  // assumed
      {"Attention", 655e12},
      {"AttentionBackward", 450e12},
      {"MaskedAttention", 255e12},
      {"MaskedAttentionBackward", 185e12},
      {"SparseAttention", 520e12},
      {"SparseAttentionBackward", 342e12},
      {"IndexerScores", 680e12},
      {"IndexerScoresFp8", 1000e12},  // causal, as the row above
      {"SparseIndexerLoss", 190e12},  // 0.53 us a row of 64 heads and 2048 keys
      {"DenseIndexerLoss", 665e12},
  };
  device.memory_bandwidth = 3.02e12;
  device.node_bandwidth = 360e9;
  device.network_bandwidth = 40e9;
  device.call_seconds = 20e-6;
  device.ranks_per_node = 8;
  return device;
}

DeviceSpec H200() {
  DeviceSpec device = H100();
  device.name = "h200";
  device.description =
      "H200 141 GB: as h100 (same cores, GEMM 769 to 798 TF measured), copy 4.3 TB/s (measured)";
  device.memory_bytes = int64_t{139} << 30;
  device.memory_bandwidth = 4.3e12;
  return device;
}

// One core a rank: the CPU backend's own matmul.
DeviceSpec Cpu() {
  DeviceSpec device;
  device.name = "cpu";
  device.description =
      "CPU: one core a rank, matmul 30 GF/s, 5 GB/s of memory and between ranks (assumed); all "
      "ranks share the memory of this host";
  device.memory_bytes = static_cast<int64_t>(::sysconf(_SC_PHYS_PAGES)) * ::sysconf(_SC_PAGESIZE);
  device.matmul_flops = 30e9;
  device.memory_bandwidth = 5e9;
  device.node_bandwidth = 5e9;
  device.network_bandwidth = 5e9;
  device.call_seconds = 5e-6;
  device.ranks_per_node = 1 << 20;
  return device;
}

}  // namespace

absl::StatusOr<DeviceSpec> FindDevice(const std::string& name) {
  if (name == "h100") return H100();
  if (name == "h200") return H200();
  if (name == "cpu") return Cpu();
  return ConfigError("--gpu ", name, ": known are h100, h200 and cpu");
}

std::string DefaultDevice(DeviceChoice choice) {
  return choice == DeviceChoice::kCuda ? "h100" : "cpu";
}

}  // namespace baleen
