// What a device can do, for predictions: ceilings measured with Baleen's own benches where there
// are such, assumptions where there are not (each row says which). A prediction is the sum over ops
// of the larger of its work over the ceiling and its bytes over the memory bandwidth.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "configs/schema/run_config.h"
#include "kernels/core/dtype.h"
#include "kernels/core/status.h"

namespace baleen {

struct DeviceSpec {
  std::string name;                        // as --gpu takes it
  std::string description;                 // for the report, with what is assumed
  int64_t memory_bytes = 0;                // of one GPU; cpu: of the host
  int64_t reserved_bytes = 0;              // driver, code and buffers of libraries
  double matmul_flops = 0;                 // a second
  std::map<std::string, double> op_flops;  // ops with another ceiling than matmul, by name
  double memory_bandwidth = 0;             // bytes a second, read and written together
  // Bytes a second that one rank sends to ranks of its node, and beyond; seconds of one call.
  double node_bandwidth = 0;
  double network_bandwidth = 0;
  double call_seconds = 0;
  int ranks_per_node = 1;
};

// h100, h200, cpu. ConfigError names those that there are.
absl::StatusOr<DeviceSpec> FindDevice(const std::string& name);
std::string DefaultDevice(DeviceChoice choice);  // cuda: h100; else cpu

}  // namespace baleen
