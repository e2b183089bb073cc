// Whether block FP8 works on a context's device, before a run relies on it: cuBLASLt's scale
// layouts and the experts' kernel are checked on products of whole numbers whose scales differ from
// block to block. All sums are exact in fp32, so every element must have the definition's bits.
//
// A library or a GPU that lays scales out otherwise would give sums that are wrong, not errors.
#pragma once

#include "absl/status/status.h"
#include "kernels/core/context.h"

namespace baleen {

// EnvironmentError names the product that is wrong. About 0.1 s on a GPU; nothing to do elsewhere.
absl::Status CheckFp8(const Context& context);

}  // namespace baleen
