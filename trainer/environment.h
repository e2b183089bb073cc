// environment.json: what a run was computed with, for who wants its numbers again. Its fields:
//   baleen, build_id, compiler   this binary; build_id is the linker's hash of it (readelf -n)
//   command, directory           as it was started; paths in run files are taken from there
//   world_size, hosts, gpus      the ranks of each host and kind of GPU, as ranges
//   libraries                    versions, in words; what cannot be asked is left out
//   variables                    some of the environment, never the whole: it may hold secrets
#pragma once

#include <string>
#include <vector>

#include "kernels/core/context.h"
#include "parallel/communicator.h"

namespace baleen {

// Every rank calls it; rank 0's command, libraries and variables are those of the text.
std::string GatherEnvironmentJson(const Context& context, Communicator& world);

// A sorted list of ranks with ranges drawn together: {0, 1, 2, 5} is "0-2,5".
std::string RankRanges(const std::vector<int>& ranks);

}  // namespace baleen
