// Libraries loaded when first needed.
#include "kernels/core/shared_library.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;

TEST(SharedLibrary, FindsFunctionsOfTheFirstThatIsThere) {
  ASSERT_OK_AND_ASSIGN(const SharedLibrary library,
                       SharedLibrary::Open({"libnone_such.so.3", "libm.so.6"}, "cosines"));
  EXPECT_EQ(library.name(), "libm.so.6");
  EXPECT_EQ(library.Find<double(double)>("cos")(0.0), 1.0);
}

TEST(SharedLibrary, SaysWhatWasTriedAndWhatFor) {
  const auto library = SharedLibrary::Open({"libnone_such.so.3"}, "matrix products");
  EXPECT_THAT(library, HasStatus(absl::StatusCode::kFailedPrecondition, "matrix products: no "));
  EXPECT_THAT(library, HasStatus(absl::StatusCode::kFailedPrecondition, "LD_LIBRARY_PATH"));
  EXPECT_THAT(library, HasStatus(absl::StatusCode::kFailedPrecondition,
                                 "/usr/local/cuda/lib64/libnone_such.so.3"));
}

TEST(SharedLibraryDeathTest, NamesAFunctionThatTheLibraryLacks) {
  ASSERT_OK_AND_ASSIGN(const SharedLibrary library, SharedLibrary::Open({"libm.so.6"}, "cosines"));
  EXPECT_DEATH(library.Find<void()>("no_such_function"), "libm.so.6 has no function no_such_fun");
}

}  // namespace
}  // namespace baleen
