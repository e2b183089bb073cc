// What baleen bench prints and writes.
#pragma once

#include <string>
#include <vector>

#include "trainer/bench/step_bench.h"

namespace baleen {

// What all results of one call share.
struct BenchDevice {
  std::string name;  // "NVIDIA H100 80GB HBM3", "CPU"
  bool cuda = false;
  double matmul_flops = 0;  // measured in this call
};

std::string BenchText(const BenchDevice& device, const BenchResult& result);
std::string BenchJson(const BenchDevice& device, const std::vector<BenchResult>& results);

}  // namespace baleen
