// Internal: the CPU definition behind embedding.h, for float and double. table [W, D] from id
// vocab_begin on.
#pragma once

#include <cstdint>

namespace baleen {

template <typename T>
void EmbeddingLookupCpu(int64_t tokens, int64_t W, int64_t D, int64_t vocab_begin,
                        const int32_t* ids, const T* table, T* y);
template <typename T>
void EmbeddingBackwardCpu(int64_t tokens, int64_t W, int64_t D, int64_t vocab_begin,
                          const int32_t* ids, const T* dy, T* dtable);

}  // namespace baleen
