// Two outcomes of one case, compared to the last bit.
#pragma once

#include <gtest/gtest.h>

#include "tests/trainer/layout_rig.h"

namespace baleen::testing {

inline void ExpectSamePieces(const std::vector<StepOutcome::Piece>& a,
                             const std::vector<StepOutcome::Piece>& b, const char* what) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].name, b[i].name);
    EXPECT_TRUE(a[i].values == b[i].values) << what << a[i].name;
  }
}

inline void ExpectSameStep(const StepOutcome& a, const StepOutcome& b) {
  EXPECT_EQ(a.lm_loss, b.lm_loss);
  EXPECT_EQ(a.mtp_loss, b.mtp_loss);
  EXPECT_EQ(a.balance, b.balance);
  EXPECT_EQ(a.kl, b.kl);
  EXPECT_EQ(a.norm_main, b.norm_main);
  EXPECT_EQ(a.norm_indexer, b.norm_indexer);
  EXPECT_EQ(a.expert_counts, b.expert_counts);
  EXPECT_EQ(a.selection_hash, b.selection_hash);
  ExpectSamePieces(a.gradients, b.gradients, "gradient of ");
  ExpectSamePieces(a.values, b.values, "value of ");
}

}  // namespace baleen::testing
