// The signal that asks a run to save and end (checkpoint.signal): remembered by a handler, honoured
// at the end of a step.
#pragma once

#include "configs/schema/run_config.h"

namespace baleen {

// From now on `signal` is remembered and kills no more. The one listened to before has its default
// effect again, and has it now if it came meanwhile: it was not meant for this run.
void ListenFor(CheckpointSignal signal);

// True once the signal came to this process.
bool StopSignalled();

}  // namespace baleen
