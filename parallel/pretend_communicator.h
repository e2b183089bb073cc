// PretendCommunicator: one rank of a world that does not exist. Every call returns at once and is
// counted; with it and a dry context (kernels/core/context.h) one process runs any rank of any
// layout.
//
// Every other rank is taken to hold what this one holds. What a host reads to go on is filled
// accordingly: an all-reduced sum is size times the own, every gathered part is the own, rank r
// sends what this rank would send itself. That are counts (all of kI64), names of experts (kI32 up
// to 8 MiB) and small sums (others up to 64 KiB); the rest, and what Recv receives, is left as it
// is.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "parallel/communicator.h"

namespace baleen {

struct CommunicationLog {
  struct Key {
    std::string communicator;  // its name: "tp", "ep", ...
    std::string label;         // of the call: "layers.3 dispatch"
    std::string operation;     // "AllGather", ...
    auto operator<=>(const Key&) const = default;
  };
  struct Count {
    int64_t calls = 0;
    int64_t bytes_sent = 0;  // by this rank
  };
  std::map<Key, Count> counts;
};

// What leaves a rank is counted as the collectives of this folder send it, which is also the least
// that any algorithm sends: AllGather size - 1 times the part, ReduceScatter the same, AllReduce
// both, AllToAllV all but the own block, Broadcast the tensor once, Recv nothing. Calls of a
// communicator of one rank are not counted. `log` outlives the communicator.
//
// Split is a programming error: who pretends knows the sizes, and makes each axis by itself.
std::unique_ptr<Communicator> MakePretendCommunicator(int rank, int size, std::string name,
                                                      CommunicationLog* log);

}  // namespace baleen
