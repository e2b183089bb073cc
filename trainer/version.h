// The version that --version, checkpoints and environment.json name.
#pragma once

namespace baleen {

inline constexpr char kVersion[] = "0.1.0";

}  // namespace baleen
