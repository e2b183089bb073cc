// What kind of work a kernel does, by its mangled name: a file or namespace of kernels/ops, or the
// naming habits of cuBLASLt, cuDNN and NCCL.
#pragma once

#include <string>

#include "absl/strings/string_view.h"

namespace baleen {

// "sparse attention backward", "GEMM", ...; "other" for what is not known.
std::string KernelKind(absl::string_view mangled_name);

// The name without parameters, namespaces and template arguments, for tables.
std::string ShortKernelName(const std::string& mangled_name);

}  // namespace baleen
