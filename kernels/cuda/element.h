// The element types that kernels for GPUs are made for. Plain C++: host code names them too.
#pragma once

namespace baleen {

enum class CudaElement : unsigned char { kF32, kBF16 };

}  // namespace baleen
