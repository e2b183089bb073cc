// A microbatch of the loader as this rank's rows and keys (trainer/model/batch.h).
#pragma once

#include "data/loader.h"
#include "trainer/model/batch.h"

namespace baleen {

Batch MakeBatch(const Context& context, const Microbatch& microbatch, const RowShare& share);

}  // namespace baleen
