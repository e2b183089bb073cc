// Reading a run file: stages inherit, overrides win, origins are kept, printing reads back.
#include "configs/schema/run_file.h"

#include <gmock/gmock.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "tests/configs/run_texts.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::Edited;
using ::testing::ElementsAre;
using testing::HasStatus;
using ::testing::HasSubstr;
using testing::kGoodRun;
using ::testing::Not;
using testing::RunError;

LoadedRun Load(const std::string& text, const std::vector<std::string>& overrides = {}) {
  auto loaded = ParseRunConfig("run.yaml", text, overrides);
  EXPECT_TRUE(loaded.ok()) << loaded.status().message();
  if (loaded.ok()) return *loaded;
  LoadedRun empty;  // with what the tests index, so that one fault does not end them all
  empty.config.stages.resize(2);
  empty.config.data.train.resize(2);
  for (StageConfig& stage : empty.config.stages) stage.data.train.resize(2);
  return empty;
}

TEST(RunFile, GivesWhatItSaysAndDefaultsForTheRest) {
  const RunConfig config = Load(kGoodRun).config;
  EXPECT_EQ(config.run.name, "test");
  EXPECT_EQ(config.run.seed, 1234);
  EXPECT_EQ(config.model.checkpoint, "ckpt");
  EXPECT_EQ(config.model.config, std::nullopt);
  EXPECT_EQ(config.parallelism.tensor, 2);
  EXPECT_EQ(config.parallelism.pipeline, 1);
  EXPECT_EQ(config.parallelism.virtual_stages, std::nullopt);
  EXPECT_THAT(config.optimizer.betas, ElementsAre(0.9, 0.95));
  EXPECT_EQ(config.optimizer.weight_decay, 0.2);
  EXPECT_EQ(config.data.train[0].weight, 1.0);
  EXPECT_EQ(config.checkpoint.resume.mode, ResumeMode::kAuto);
  EXPECT_EQ(config.checkpoint.signal, CheckpointSignal::kUsr1);
  EXPECT_TRUE(config.deterministic);
  ASSERT_EQ(config.stages.size(), 2u);
  EXPECT_EQ(config.stages[0].train, TrainMode::kIndexer);
  EXPECT_EQ(config.stages[1].attention, AttentionMode::kSparse);
}

TEST(RunFile, AStageHoldsItsWholeEffectiveConfiguration) {
  const std::string text =
      Edited("    optimizer: {lr: 1e-3}",
             "    optimizer: {lr: 1e-3, clip_grad: {indexer: 0.5}}\n    parallelism: {context: 4}\n"
             "    data: {train: [{path: x}, {path: y, weight: 3}]}\n    micro_batch_size: 1");
  const RunConfig config = Load(text).config;
  const StageConfig& warmup = config.stages[0];
  EXPECT_EQ(warmup.parallelism.tensor, 2) << "from the top level";
  EXPECT_EQ(warmup.parallelism.context, 4) << "of its own";
  EXPECT_EQ(warmup.optimizer.lr, 1e-3);
  EXPECT_EQ(warmup.optimizer.weight_decay, 0.2);
  EXPECT_EQ(warmup.optimizer.clip_grad.indexer, 0.5);
  EXPECT_EQ(warmup.optimizer.clip_grad.main, 1.0);
  EXPECT_EQ(warmup.data.seq_length, 64);
  ASSERT_EQ(warmup.data.train.size(), 2u) << "a list replaces the inherited one";
  EXPECT_EQ(warmup.data.train[1].weight, 3);
  EXPECT_EQ(warmup.micro_batch_size, 1);
  const StageConfig& sparse = config.stages[1];
  EXPECT_EQ(sparse.parallelism.context, 1) << "nothing leaks from the stage before";
  EXPECT_EQ(sparse.data.train.size(), 1u);
  EXPECT_EQ(sparse.micro_batch_size, 2);
}

TEST(RunFile, ARequiredKeyMayComeFromTheTopOrFromEveryStage) {
  EXPECT_EQ(RunError(Edited("weight_decay: 0.2", "lr: 3e-4")), "");
  const std::string from_top = absl::StrReplaceAll(Edited("weight_decay: 0.2", "lr: 3e-4"),
                                                   {{"    optimizer: {lr: 1e-3}\n", ""}});
  EXPECT_EQ(Load(from_top).config.stages[0].optimizer.lr, 3e-4);
  EXPECT_EQ(Load(from_top).config.stages[1].optimizer.lr, 1e-4);
}

TEST(RunFile, OriginsNameLineDefaultOrCommandLine) {
  const LoadedRun loaded = Load(kGoodRun, {"parallelism.expert=2", "stages.0.steps=7"});
  const auto origin = [&](const std::string& key) {
    const auto at = loaded.origins.find(key);
    return at == loaded.origins.end() ? "none" : at->second.ToString();
  };
  EXPECT_EQ(origin("parallelism.tensor"), "run.yaml:3");
  EXPECT_EQ(origin("parallelism.expert"), "command line");
  EXPECT_EQ(origin("parallelism.context"), "default");
  EXPECT_EQ(origin("data.train.0.path"), "run.yaml:6");
  EXPECT_EQ(origin("data.train.0.weight"), "default");
  EXPECT_EQ(origin("stages.0.steps"), "command line");
  EXPECT_EQ(origin("stages.0.optimizer.lr"), "run.yaml:14");
  EXPECT_EQ(origin("stages.0.optimizer.eps"), "none") << "inherited";
  EXPECT_EQ(origin("optimizer.eps"), "default");
}

TEST(Overrides, LaterOnesWinOverEarlierOnesAndOverTheFile) {
  const RunConfig config = Load(kGoodRun, {"parallelism.tensor=4", "--parallelism.tensor=8",
                                           "optimizer.betas=[0.8, 0.9]", "--micro-batch-size=1",
                                           "stages.1.optimizer.lr=2e-5", "optimizer.betas.0=0.7",
                                           "dsa={index_topk: 1Ki}", "stages.0.name=first"})
                               .config;
  EXPECT_EQ(config.parallelism.tensor, 8);
  EXPECT_EQ(config.micro_batch_size, 1);
  EXPECT_THAT(config.optimizer.betas, ElementsAre(0.7, 0.9));
  EXPECT_EQ(config.stages[1].optimizer.lr, 2e-5);
  EXPECT_EQ(config.stages[1].dsa.index_topk, 1024);
  EXPECT_EQ(config.stages[0].name, "first");
}

TEST(Overrides, AnEmptyValueTakesAKeyBackAndAnIndexPastTheEndAppends) {
  const RunConfig config = Load(kGoodRun, {"model.checkpoint=", "model.config=tiny.yaml",
                                           "data.train.1.path=b", "data.train.1.weight=2"})
                               .config;
  EXPECT_EQ(config.model.checkpoint, std::nullopt);
  EXPECT_EQ(config.model.config, "tiny.yaml");
  ASSERT_EQ(config.data.train.size(), 2u);
  EXPECT_EQ(config.stages[0].data.train[1].path, "b");
}

TEST(Overrides, FaultsAreCitedAsTheyWereTyped) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"stages.0.optimizer.lr=abc",
       "stages[0].optimizer.lr: expected a number above 0, found 'abc'"},
      {"stages.5.steps=1",
       "stages is a list of 2: expected a number from 0 to 2 after it, found '5'"},
      {"stages.x.steps=1", "found 'x'"},
      {"steps", "expected key.path=value"},
      {"=3", "'' is no path of keys"},
      {"a..b=3", "'a..b' is no path of keys"},
      {"a b=3", "'a b' is no path of keys"},
      {"--optimiser.lr=1",
       "unknown key 'optimiser' at the top level\n      | did you mean 'optimizer'?"},
      {"parallelism.tp=1", "unknown key 'tp' in parallelism\n      | did you mean 'tensor'?"},
      {"micro_batch_size.x=1",
       "micro_batch_size is neither a section nor a list; it is '2' (run.yaml:7)"},
      {"parallelism=3", "parallelism: expected a section"},
      {"parallelism.tensor=",
       "parallelism.tensor: expected an integer from 1 to 1048576, found nothing"},
      {"optimizer.betas=[0.9", "not YAML: end of sequence flow not found"},
      {"optimizer.betas=*x", "an alias (*name)"},
      {"run.name=a\nb: 2", "not YAML"},
      {"stages.0.global_batch_size=3",
       "global_batch_size = 3 is not a multiple of micro_batch_size = 2"},
      {"run.seed=1e5", "run.seed: expected an integer"},
  };
  for (const auto& [text, message] : cases) {
    SCOPED_TRACE(text);
    const std::string error = RunError(kGoodRun, {text});
    const std::string cited = absl::StrReplaceAll(text, {{"\n", "\\n"}});
    EXPECT_THAT(error, HasSubstr("command line: " + cited + ": error: "));
    EXPECT_THAT(error, HasSubstr(message));
    EXPECT_THAT(error, HasSubstr("\n1 error. Nothing was started."));
  }
}

TEST(PrintRun, ReadsBackToTheSameConfiguration) {
  const LoadedRun loaded = Load(
      Edited(
          "",
          "checkpoint: {resume: runs/x/checkpoints/step-00000010}\nlosses: {balance: 1.0e-20}\n"),
      {"stages.1.parallelism.schedule=zbv", "run.name=1e5", "run.dir='a: b # \"c\"'",
       "dsa.index_topk=64", "data.validation=[{path: v, weight: 0.1}]", "stages.0.validation={}",
       "parallelism.layer_split=[]", "optimizer.eps=1e-300"});
  const std::string text = PrintRunConfig(loaded);
  const LoadedRun again = Load(text);
  EXPECT_EQ(loaded.config, again.config) << text;
  EXPECT_EQ(again.config.run.name, "1e5");
  EXPECT_EQ(again.config.run.dir, "a: b # \"c\"");
  EXPECT_EQ(again.config.optimizer.eps, 1e-300);
  EXPECT_EQ(again.config.checkpoint.resume.path, "runs/x/checkpoints/step-00000010");
}

TEST(PrintRun, SaysWhereEachValueComesFrom) {
  const std::string text = PrintRunConfig(Load(kGoodRun, {"parallelism.expert=2"}));
  const auto line = [&](const std::string& key) {
    const size_t begin = text.find("\n" + key) + 1;
    return text.substr(begin, text.find('\n', begin) - begin);
  };
  EXPECT_THAT(line("  tensor: 2"), HasSubstr("# run.yaml:3"));
  EXPECT_THAT(line("  expert: 2"), HasSubstr("# command line"));
  EXPECT_THAT(line("  context: 1"), HasSubstr("# default"));
  EXPECT_THAT(line("      lr: 0.001"), HasSubstr("# run.yaml:14"));
  EXPECT_THAT(text, Not(HasSubstr("  lr: 0.0 "))) << "the top level gives none";
}

TEST(ConfigErrorAt, PointsAtTheValueThatIsInEffect) {
  const LoadedRun loaded = Load(kGoodRun, {"parallelism.expert=48"});
  const auto message = [&](const std::string& key) {
    return std::string(ConfigErrorAt(loaded, key, "does not fit").message());
  };
  EXPECT_EQ(message("parallelism.tensor"),
            "run.yaml:3:23: error: does not fit\n"
            "    3 | parallelism: {tensor: 2}\n"
            "      |                       ^\n"
            "1 error. Nothing was started.");
  EXPECT_THAT(message("stages.1.parallelism.tensor"), HasSubstr("run.yaml:3:23: error"))
      << "inherited";
  EXPECT_THAT(message("stages.0.optimizer.lr"), HasSubstr("run.yaml:14:21: error"));
  EXPECT_THAT(message("stages.0.parallelism.expert"),
              HasSubstr("command line: parallelism.expert=48: error: does not fit"));
  EXPECT_EQ(message("parallelism.context"),
            "run.yaml:3:1: error: does not fit\n"
            "    3 | parallelism: {tensor: 2}\n"
            "      | ^^^^^^^^^^^  note: parallelism.context is not given; its default is 1\n"
            "1 error. Nothing was started.");
  EXPECT_THAT(
      message("router.bias_update_speed"),
      HasSubstr("run.yaml: error: does not fit\n      | note: router.bias_update_speed is not "
                "given; its default is 0.0"));
  EXPECT_THAT(ConfigErrorAt(loaded, "run", "x"),
              HasStatus(absl::StatusCode::kInvalidArgument, "x"));
  const std::string both(
      ConfigErrorsAt(loaded, {{"stages.1.steps", "second"}, {"run.name", "first"}}).message());
  EXPECT_LT(both.find("first"), both.find("second"));
  EXPECT_THAT(both, HasSubstr("2 errors."));
  EXPECT_TRUE(ConfigErrorsAt(loaded, {}).ok());
}

TEST(ValidateRunConfig, SeesWhatTheTrainerChangedInMemory) {
  LoadedRun loaded = Load(kGoodRun);
  EXPECT_TRUE(ValidateRunConfig(loaded).ok());
  loaded.config.stages[1].global_batch_size = 9;
  EXPECT_THAT(ValidateRunConfig(loaded), HasStatus(absl::StatusCode::kInvalidArgument,
                                                   "global_batch_size = 9 is not a multiple"));
}

TEST(RunFile, DefaultStageHasTheDefaultsOfTheFile) {
  StageConfig stage = DefaultStageConfig();
  const RunConfig config = Load(kGoodRun).config;
  EXPECT_EQ(stage.router, config.router);
  EXPECT_EQ(stage.checkpoint, config.checkpoint);
  EXPECT_EQ(stage.optimizer.eps, 1e-8);
  EXPECT_EQ(stage.optimizer.lr, 0);
  EXPECT_EQ(stage.micro_batch_size, 1);
}

TEST(RunFile, EveryRunFileOfTheRepositoryLoadsAndReadsBack) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("configs/run")) {
    if (entry.path().extension() != ".yaml") continue;
    SCOPED_TRACE(entry.path().string());
    ++count;
    ASSERT_OK_AND_ASSIGN(const LoadedRun loaded, LoadRunConfig(entry.path().string()));
    EXPECT_EQ(Load(PrintRunConfig(loaded)).config, loaded.config);
    const auto& model = loaded.config.model.config;
    if (model) {
      ASSERT_OK_AND_ASSIGN(const ModelConfig shape, LoadModelYaml(*model));
      EXPECT_GT(shape.hidden_size, 0);
    }
  }
  EXPECT_GE(count, 3);
}

TEST(RunFile, PublishedRecipeHasThePapersNumbers) {
  ASSERT_OK_AND_ASSIGN(const LoadedRun loaded, LoadRunConfig("configs/run/deepseek_v31_671b.yaml"));
  const auto tokens = [](const StageConfig& s) {
    return s.steps * s.global_batch_size * s.data.seq_length;
  };
  ASSERT_EQ(loaded.config.stages.size(), 2u);
  EXPECT_EQ(tokens(loaded.config.stages[0]), 2097152000);
  EXPECT_EQ(tokens(loaded.config.stages[1]), 943718400000);
  EXPECT_EQ(loaded.config.stages[0].optimizer.lr, 1e-3);
  EXPECT_EQ(loaded.config.stages[1].optimizer.lr, 7.3e-6);
  EXPECT_EQ(loaded.config.stages[1].dsa.index_topk, 2048);
}

TEST(ChangedKeys, SaysWhatIsInEffectBeforeAndAfter) {
  const RunConfig before = Load(kGoodRun).config;
  const auto changed = [&](const std::vector<std::string>& overrides) {
    return ChangedKeys(before, Load(kGoodRun, overrides).config);
  };
  EXPECT_THAT(changed({}), ElementsAre());
  EXPECT_THAT(changed({"losses.mtp=0.5"}), ElementsAre(HasSubstr("losses.mtp 0.1 -> 0.5")));
  EXPECT_THAT(changed({"stages.1.losses.mtp=0.5"}), ElementsAre("stages.1.losses.mtp 0.1 -> 0.5"));
  EXPECT_THAT(changed({"run.seed=7", "stages.0.steps=9"}),
              ElementsAre("run.seed 1234 -> 7", HasSubstr("stages.0.steps ")));
  EXPECT_THAT(changed({"data.validation=[{path: v}]"}),
              ElementsAre("data.validation.0.path (absent) -> v",
                          HasSubstr("data.validation.0.weight (absent) -> 1")));
}

TEST(RunFile, AFileThatCannotBeReadIsAConfigurationError) {
  const auto missing = LoadRunConfig("no/such/run.yaml");
  EXPECT_THAT(missing, HasStatus(absl::StatusCode::kInvalidArgument, "run file: no/such/run.yaml"));
  EXPECT_THAT(LoadRunConfig("configs"), HasStatus(absl::StatusCode::kInvalidArgument, "configs"));
  const std::string path = ::testing::TempDir() + "/large.yaml";
  std::ofstream(path) << std::string((1 << 20) + 1, '#');
  EXPECT_THAT(LoadRunConfig(path), HasStatus(absl::StatusCode::kInvalidArgument, "1048577 bytes"));
}

}  // namespace
}  // namespace baleen
