// Values that arrive after an update: every way to them waits, for their own bucket, and the update
// begins their gathers in the order in which a forward asks. Gradients, which begin a step without
// a value.
#include "trainer/model/parameter_store.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "absl/strings/str_split.h"
#include "configs/schema/run_config.h"
#include "parallel/pretend_communicator.h"
#include "tests/support/random_tensor.h"
#include "tests/trainer/late_gathers.h"
#include "trainer/optimizer.h"

namespace baleen::testing {
namespace {

// Rank 0 of two, of which the other holds the same. Two layers with a matrix and a stack of two
// vectors each; every matrix and every stack is a bucket, all of other sizes.
class ArrivingValues : public ::testing::Test {
 protected:
  ArrivingValues() {
    axes_.stage = Late("stage");
    for (int layer = 0; layer < 2; ++layer) {
      matrix_[layer] = store_.Declare(absl::StrCat(layer, ".matrix"), {2 + 4 * layer, 64},
                                      ParameterGroup::kMain);
      stack_[layer] = store_.Declare(absl::StrCat(layer, ".first"), {128 + 128 * layer},
                                     ParameterGroup::kIndexer);
      store_.Declare(absl::StrCat(layer, ".second"), {128 + 128 * layer}, ParameterGroup::kIndexer,
                     /*stacked=*/true);
    }
    store_.Allocate(context_, DType::kF32, axes_, kGroups, /*bucket_elements=*/1);
    for (int id = 0; id < store_.size(); ++id) {
      // Held from before the update, as nobody outside of a test does.
      early_.push_back(store_.value(id));
      for (int64_t i = 0; i < early_[id].num_elements(); ++i) early_[id].data<float>()[i] = 1;
    }
  }

  std::unique_ptr<Communicator> Late(const char* name) {
    return MakeLateGathers(MakePretendCommunicator(0, 2, name, &log_));
  }
  void BeginAll() {
    for (size_t bucket = 0; bucket < store_.buckets().size(); ++bucket)
      store_.BeginGather(static_cast<int>(bucket), *axes_.stage);
  }
  // Of the other rank's half.
  static bool Arrived(const Tensor& values) {
    return values.data<float>()[values.num_elements() - 1] == 1;
  }

  Context context_ = Context::Cpu();
  const std::vector<ParameterGroup> kGroups = {ParameterGroup::kMain, ParameterGroup::kIndexer};
  CommunicationLog log_;
  GridCommunicators axes_ = MakeSelfGrid();
  ParameterStore store_;
  int matrix_[2] = {}, stack_[2] = {};  // ids
  std::vector<Tensor> early_;           // by id
};

TEST_F(ArrivingValues, WhoAsksForAValueWaitsForItsBucketOnly) {
  ASSERT_EQ(store_.buckets().size(), 4u);
  BeginAll();
  for (int layer = 0; layer < 2; ++layer) EXPECT_FALSE(Arrived(early_[matrix_[layer]]));
  EXPECT_TRUE(Arrived(store_.value(matrix_[0])));
  EXPECT_FALSE(Arrived(early_[matrix_[1]]));
  EXPECT_FALSE(Arrived(early_[stack_[0] + 1]));
  EXPECT_TRUE(Arrived(store_.value(matrix_[1])));
}

TEST_F(ArrivingValues, SoDoesWhoAsksForAStackOrAWholeBucket) {
  BeginAll();
  EXPECT_FALSE(Arrived(early_[stack_[0] + 1]));
  EXPECT_TRUE(Arrived(store_.StackedValue(stack_[0], 2)));
  EXPECT_FALSE(Arrived(early_[stack_[1] + 1]));
  EXPECT_TRUE(Arrived(store_.bucket_values(store_.at(stack_[1]).bucket)));
}

TEST_F(ArrivingValues, GradientsWaitForNothing) {
  BeginAll();
  store_.grad(matrix_[0]);
  store_.StackedSum(stack_[0], 2);
  for (const Parameter& p : store_.parameters()) store_.bucket_gradients(p.bucket);
  for (int layer = 0; layer < 2; ++layer) {
    EXPECT_FALSE(Arrived(early_[matrix_[layer]]));
    EXPECT_FALSE(Arrived(early_[stack_[layer] + 1]));
  }
}

TEST_F(ArrivingValues, OneRankAloneGathersNothing) {
  const auto alone = MakePretendCommunicator(0, 1, "stage", &log_);
  store_.BeginGather(0, *alone);
  EXPECT_TRUE(Arrived(early_[matrix_[0]]));
  EXPECT_EQ(alone->FlightRecord(), "");
}

TEST_F(ArrivingValues, AnUpdateGathersInTheOrderOfTheForward) {
  const auto world = Late("world");
  Optimizer optimizer(context_, store_, DefaultStageConfig().optimizer, kGroups, axes_, *world);
  for (int step = 1; step <= 2; ++step) {  // the second finds the first one's values on their way
    optimizer.BeginStep();
    for (const Parameter& p : store_.parameters()) {
      for (int64_t i = 0; i < p.num_elements(); ++i) store_.grad(p.id).data<float>()[i] = 1;
    }
    optimizer.ReduceGradients();
    optimizer.ComputeNorms();
    optimizer.Update(0.1, step);
  }
  std::vector<std::string> bytes;
  for (const absl::string_view line : absl::StrSplit(axes_.stage->FlightRecord(4), '\n')) {
    const std::vector<std::string> words = absl::StrSplit(line, ' ');
    if (words.size() < 5) continue;
    EXPECT_EQ(words[2] + " " + words[3], "AllGather parameters") << line;
    bytes.push_back(words[4]);
  }
  // Of the first layer's matrix and stack, then of the second's.
  EXPECT_EQ(bytes, (std::vector<std::string>{"512", "1024", "1536", "2048"}));
  for (const Parameter& p : store_.parameters()) {
    const Tensor value = store_.value(p.id);
    // Adam's steps of equal gradients are lr each, weight decay aside.
    for (int64_t i = 0; i < p.num_elements(); ++i)
      ASSERT_NEAR(value.data<float>()[i], 0.8, 0.05) << p.name << " " << i;
  }
}

// As ArrivingValues, one rank, with what a step before has left in every gradient.
class StepOfGradients : public ArrivingValues {
 protected:
  StepOfGradients() {
    for (const Bucket& bucket : store_.buckets()) {
      const Tensor all = store_.bucket_gradients(Index(bucket));
      std::fill_n(all.data<float>(), all.num_elements(), 7.0f);
      store_.ForgetGradients(Index(bucket));
    }
  }
  int Index(const Bucket& bucket) const {
    return static_cast<int>(&bucket - store_.buckets().data());
  }
  static void ExpectAll(const Tensor& found, float expected) {
    for (int64_t i = 0; i < found.num_elements(); ++i)
      ASSERT_EQ(found.data<float>()[i], expected) << i;
  }
};

TEST_F(StepOfGradients, TheFirstProductIsWrittenTheNextAreAdded) {
  EXPECT_EQ(store_.sum(matrix_[0]).accumulate, Accumulate::kOverwrite);
  EXPECT_EQ(store_.sum(matrix_[0]).accumulate, Accumulate::kAdd);
  EXPECT_EQ(store_.sum(matrix_[1]).accumulate, Accumulate::kOverwrite);
  EXPECT_EQ(store_.StackedSum(stack_[0], 2).accumulate, Accumulate::kOverwrite);
  EXPECT_EQ(store_.StackedSum(stack_[0], 2).accumulate, Accumulate::kAdd);
  EXPECT_EQ(store_.sum(stack_[0]).accumulate, Accumulate::kAdd);
}

TEST_F(StepOfGradients, WhatNothingWroteIsZeroOnceAskedFor) {
  ExpectAll(store_.grad(matrix_[0]), 0);
  store_.grad(matrix_[0]).data<float>()[0] = 3;
  EXPECT_EQ(store_.grad(matrix_[0]).data<float>()[0], 3);
  EXPECT_EQ(store_.sum(matrix_[0]).accumulate, Accumulate::kAdd);
}

TEST_F(StepOfGradients, AStackWithOneGradientIsAddedTo) {
  const Tensor second = store_.grad(stack_[1] + 1);
  second.data<float>()[0] = 3;
  const ParameterStore::GradientSum sum = store_.StackedSum(stack_[1], 2);
  EXPECT_EQ(sum.accumulate, Accumulate::kAdd);
  ExpectAll(sum.tensor.Rows(0, 1), 0);
  EXPECT_EQ(second.data<float>()[0], 3);
}

TEST_F(StepOfGradients, AWholeBucketHasWhatWasWrittenAndZeros) {
  const ParameterStore::GradientSum sum = store_.sum(stack_[0] + 1);
  std::fill_n(sum.tensor.data<float>(), sum.tensor.num_elements(), 3.0f);
  const Tensor bucket = store_.bucket_gradients(store_.at(stack_[0]).bucket);
  const int64_t count = sum.tensor.num_elements();
  ASSERT_EQ(bucket.num_elements(), 2 * count);
  ExpectAll(bucket.Flat(0, count), 0);
  ExpectAll(bucket.Flat(count, count), 3);
}

using ArrivingValuesDeathTest = ArrivingValues;
TEST_F(ArrivingValuesDeathTest, AGatherUnderWayIsNotBegunAgain) {
  store_.BeginGather(0, *axes_.stage);
  EXPECT_DEATH(store_.BeginGather(0, *axes_.stage), "bucket 0 is on its way");
}

}  // namespace
}  // namespace baleen::testing
