// The policies behind MakeSchedule: each returns one rank's compute actions. P ranks, M
// microbatches, rank r; numbers that a policy cannot have were refused before.
#pragma once

#include "parallel/schedule.h"

namespace baleen {

Program GpipeProgram(const ScheduleSpec& spec, int rank);
Program OneFOneBProgram(const ScheduleSpec& spec, int rank);
Program ZbH1Program(const ScheduleSpec& spec, int rank);
Program InterleavedProgram(const ScheduleSpec& spec, int rank);
Program ZbvProgram(const ScheduleSpec& spec, int rank);
Program DualPipeVProgram(const ScheduleSpec& spec, int rank);

// Forward-only variants, for one part a rank, looped parts and the V.
Program ForwardProgram(const ScheduleSpec& spec, int rank);
Program InterleavedForwardProgram(const ScheduleSpec& spec, int rank);
Program VForwardProgram(const ScheduleSpec& spec, int rank);

}  // namespace baleen
