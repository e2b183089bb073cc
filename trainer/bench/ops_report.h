// What baleen bench ops prints and writes.
#pragma once

#include <string>
#include <vector>

#include "trainer/bench/bench_report.h"
#include "trainer/bench/ops_bench.h"

namespace baleen {

// The ceilings and the columns' names.
std::string OpsHeading(const BenchDevice& device, const OpCeilings& ceilings);
// One line, with its line break.
std::string OpLine(const BenchDevice& device, const OpCeilings& ceilings, const OpResult& result);
// Goals met and missed, what did not fit, the ceilings once more.
std::string OpsSummary(const BenchDevice& device, const OpCeilings& before, const OpCeilings& after,
                       const std::vector<OpResult>& results, const std::string& no_trace);

std::string OpsJson(const BenchDevice& device, const OpSizes& sizes, const OpCeilings& before,
                    const OpCeilings& after, const std::vector<OpResult>& results);

}  // namespace baleen
