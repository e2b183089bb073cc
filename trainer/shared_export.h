// One Hugging Face checkpoint written by all ranks: every rank plans, rank 0 creates the files,
// each rank writes its share of whole tensors in place, rank 0 publishes.
//
// The output depends on the request alone, not on the number of ranks. After each phase the ranks
// agree: the lowest failing rank's error is everyone's, and nothing is left of the directory.
#pragma once

#include <string>

#include "checkpoints/hf_export.h"
#include "parallel/communicator.h"

namespace baleen {

// Every rank calls it with the same request; `values` is asked for the rank's own tensors only. A
// rank holds one band of rows at a time.
absl::Status ExportShared(const ExportRequest& request, const TensorValues& values,
                          const std::string& directory, Communicator& world);

}  // namespace baleen
