#include "checkpoints/hdf5_version.h"

#include <hdf5.h>

#include "absl/strings/str_cat.h"

namespace baleen {

std::string Hdf5Version() {
  unsigned major = 0, minor = 0, release = 0;
  if (H5get_libversion(&major, &minor, &release) < 0) return "";
  return absl::StrCat(major, ".", minor, ".", release);
}

}  // namespace baleen
