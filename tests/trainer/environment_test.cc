// environment.json: read back, and compared with what the process knows of itself.
#include "trainer/environment.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <filesystem>

#include "absl/strings/match.h"
#include "nlohmann/json.hpp"
#include "trainer/version.h"

namespace baleen {
namespace {

nlohmann::json Environment() {
  const auto world = MakeSelfCommunicator();
  return nlohmann::json::parse(GatherEnvironmentJson(Context::Cpu(), *world));
}

TEST(Environment, SaysHowTheProcessWasStarted) {
  const nlohmann::json json = Environment();
  EXPECT_EQ(json["baleen"], kVersion);
  EXPECT_EQ(json["directory"], std::filesystem::current_path().string());
  EXPECT_EQ(json["world_size"], 1);
  EXPECT_EQ(json["pid"], ::getpid());
  const auto command = json["command"].get<std::vector<std::string>>();
  ASSERT_FALSE(command.empty());
  EXPECT_TRUE(absl::EndsWith(command[0], "model_test")) << command[0];
  EXPECT_EQ(json["hosts"].size(), 1);
  EXPECT_EQ(json["hosts"][json["host"].get<std::string>()], "0");
}

TEST(Environment, NamesTheLibrariesOfThisSide) {
  const nlohmann::json json = Environment();
  const std::string mpi = json["libraries"]["mpi"];
  EXPECT_TRUE(absl::StrContains(mpi, "MPI")) << mpi;
  EXPECT_FALSE(absl::StrContains(mpi, '\0')) << "bytes after the text";
  EXPECT_TRUE(absl::StartsWith(json["libraries"]["hdf5"].get<std::string>(), "1."));
  // Nothing of a GPU in a run on the CPU.
  EXPECT_EQ(json["libraries"].size(), 2) << json["libraries"];
  EXPECT_FALSE(json.contains("gpus"));
}

TEST(Environment, NamesTheBuildAsTheLinkerDid) {
  const std::string id = Environment()["build_id"];
  ASSERT_EQ(id.size() % 2, 0);
  ASSERT_GE(id.size(), 16);
  const std::string command = "readelf -n /proc/" + std::to_string(::getpid()) +
                              "/exe 2>/dev/null | grep -q 'Build ID: " + id + "'";
  EXPECT_EQ(::system(command.c_str()), 0) << id;
}

TEST(Environment, KeepsToItsListOfVariables) {
  ::setenv("NCCL_IB_HCA", "mlx5_0 \xff", 1);  // no UTF-8
  ::setenv("BALEEN_TEST_SECRET", "hunter2", 1);
  const nlohmann::json json = Environment();
  ::unsetenv("NCCL_IB_HCA");
  ::unsetenv("BALEEN_TEST_SECRET");
  EXPECT_EQ(json["variables"]["NCCL_IB_HCA"], "mlx5_0 \xEF\xBF\xBD");
  EXPECT_FALSE(absl::StrContains(json.dump(), "hunter2"));
}

TEST(Environment, DrawsRangesOfRanksTogether) {
  EXPECT_EQ(RankRanges({}), "");
  EXPECT_EQ(RankRanges({3}), "3");
  EXPECT_EQ(RankRanges({0, 1, 2, 5}), "0-2,5");
  EXPECT_EQ(RankRanges({0, 2, 4, 5}), "0,2,4-5");
}

}  // namespace
}  // namespace baleen
