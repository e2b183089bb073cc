// Good YAML that is no good run file: each fault names place, key, expected and found.
#include <gmock/gmock.h>

#include <string>
#include <vector>

#include "tests/configs/run_texts.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::Edited;
using testing::HasStatus;
using ::testing::HasSubstr;
using testing::kGoodRun;
using ::testing::Not;
using testing::RunError;

struct Case {
  std::string from, to;            // an edit of kGoodRun
  std::vector<std::string> parts;  // of the message
};

// Every case is one fault and is told as one.
void ExpectOneError(const std::vector<Case>& cases) {
  for (const Case& c : cases) {
    SCOPED_TRACE(c.to);
    const std::string error = RunError(Edited(c.from, c.to));
    for (const std::string& part : c.parts) EXPECT_THAT(error, HasSubstr(part));
    EXPECT_THAT(error, HasSubstr("\n1 error. Nothing was started."));
  }
}

TEST(BrokenRun, TheGoodOneIsGood) {
  EXPECT_EQ(RunError(kGoodRun), "");
  const auto broken = ParseRunConfig("run.yaml", "x: 1\n");
  EXPECT_THAT(broken, HasStatus(absl::StatusCode::kInvalidArgument, "unknown key 'x'"));
}

TEST(BrokenRun, WrongTypesSayExpectedAndFound) {
  ExpectOneError({
      {"tensor: 2",
       "tensor: two",
       {"run.yaml:3:23: error: parallelism.tensor: expected an integer from 1 to 1048576, found "
        "'two'",
        "    3 | parallelism: {tensor: two}\n      |                       ^^^"}},
      {"tensor: 2", "tensor: \"2\"", {"found the quoted string '2'"}},
      {"tensor: 2", "tensor: [2]", {"parallelism.tensor: expected an integer", "found a list"}},
      {"tensor: 2", "tensor: {a: 2}", {"found a section"}},
      {"tensor: 2", "tensor:", {"found nothing"}},
      {"tensor: 2", "tensor: 2.0", {"found '2.0'"}},
      {"tensor: 2", "tensor: 1e1", {"found '1e1'"}},
      {"{tensor: 2}",
       "2",
       {"3:14: error: parallelism: expected a section {tensor, pipeline, ", "found '2'"}},
      {"{tensor: 2}", "", {"3:1: error: parallelism: expected a section", "found nothing"}},
      {"[{path: data/a}]",
       "data/a",
       {"6:10: error: data.train: expected a list of 1 to 10000 sections"}},
      {"[{path: data/a}]", "[]", {"found a list of 0"}},
      {"[{path: data/a}]",
       "[data/a]",
       {"6:11: error: data.train[0]: expected a section, found 'data/a'"}},
      {"",
       "deterministic: yes\n",
       {"17:16: error: deterministic: expected true or false, found 'yes'"}},
      {"", "deterministic: True\n", {"expected true or false, found 'True'"}},
      {"", "deterministic: \"true\"\n", {"found the quoted string 'true'"}},
      {"name: test", "name: true", {"run.name: expected a name", "a boolean; quote it"}},
      {"dir: runs/test", "dir: \"\"", {"run.dir: expected a string", "(empty)"}},
      {"dir: runs/test",
       "dir: \"a\\nb\"",
       {"run.dir: expected a string, found the quoted string 'a\\nb'", "line end"}},
      {"dir: runs/test", "dir: \"a\\0b\"", {"control character 0x00"}},
      {"dir: runs/test", "dir: \"a\\x9bb\"", {"control character 0x9b"}},
      {"name: test",
       "name: ../up",
       {"1:13: error: run.name: expected a name of letters", "found '../up'"}},
  });
}

TEST(BrokenRun, NumbersThatAreNoneOrTooLargeAreRefused) {
  ExpectOneError({
      {"tensor: 2", "tensor: 010", {"found '010' (looks octal"}},
      {"tensor: 2", "tensor: 0o10", {"only decimal numbers"}},
      {"tensor: 2", "tensor: 0x10", {"only decimal numbers"}},
      {"name: test",
       "name: test, seed: 9007199254740993",  // the bound and one: the same number as a double
       {"run.seed: expected an integer from 0 to 9007199254740992, found '9007199254740993'"}},
      {"tensor: 2", "tensor: 0", {"expected an integer from 1 to 1048576, found '0'"}},
      {"tensor: 2", "tensor: -2", {"found '-2'"}},
      {"tensor: 2", "tensor: 99999999999999999999", {"(more than 2^63-1)"}},
      {"tensor: 2", "tensor: 1_", {"an underscore stands between two digits"}},
      {"tensor: 2", "tensor: 1.5K1", {"found '1.5K1'"}},
      {"tensor: 2", "tensor: 1.0001K", {"(has a fraction"}},
      {"seq_length: 64", "seq_length: 9223372036854775807K", {"more than 2^63-1"}},
      {"lr: 1e-3",
       "lr: .nan",
       {"14:21: error: stages[0].optimizer.lr: expected a number above 0", "NaN is not accepted"}},
      {"lr: 1e-3", "lr: nan", {"NaN is not accepted"}},
      {"lr: 1e-3", "lr: .inf", {"infinity is not accepted"}},
      {"lr: 1e-3", "lr: -.Inf", {"infinity is not accepted"}},
      {"lr: 1e-3", "lr: 1e999", {"too large or too small for a double"}},
      {"lr: 1e-3", "lr: 1e-999", {"too large or too small for a double"}},
      {"lr: 1e-3", "lr: 0", {"expected a number above 0, found '0'"}},
      {"lr: 1e-3", "lr: -1e-3", {"expected a number above 0, found '-1e-3'"}},
      {"lr: 1e-3", "lr: 1e", {"expected a number above 0, found '1e'"}},
      {"lr: 1e-3", "lr: 0x1p3", {"only decimal"}},
      {"weight_decay: 0.2",
       "betas: [0.9, 1.0]",
       {"betas: expected a list of two numbers from 0 and below 1",
        "number 1 is '1.0', out of range"}},
      {"weight_decay: 0.2", "betas: [0.9]", {"a list of two numbers", "it has 1"}},
      {"weight_decay: 0.2", "betas: [0.9, x]", {"number 1 is 'x'"}},
      {"weight_decay: 0.2", "betas: 0.9", {"found '0.9'"}},
      {"path: data/a",
       "path: data/a, weight: 0",
       {"data.train[0].weight: expected a number above 0, found '0'"}},
      {"",
       "run2: 1\n",
       {"17:1: error: unknown key 'run2' at the top level", "did you mean 'run'?"}},
  });
}

TEST(BrokenRun, UnknownKeysAndWordsComeWithASuggestion) {
  ExpectOneError({
      {"    optimizer: {lr: 1e-3}",
       "    optimiser: {lr: 1e-3}",
       {"run.yaml:14:5: error: unknown key 'optimiser' in stages[0]",
        "   14 |     optimiser: {lr: 1e-3}\n      |     ^^^^^^^^^  did you mean 'optimizer'?"}},
      {"{tensor: 2}",
       "{tensro: 2}",
       {"3:15: error: unknown key 'tensro' in parallelism", "'tensor'?"}},
      {"{tensor: 2}", "{tp: 2}", {"did you mean 'tensor'?"}},
      {"{tensor: 2}", "{tensor_parallel_degree: 2}", {"did you mean 'tensor'?"}},
      {"", "tensor_model_parallel_size: 2\n", {"did you mean 'parallelism.tensor'?"}},
      {"", "expert-model-parallel-size: 2\n", {"did you mean 'parallelism.expert'?"}},
      {"", "learning_rate: 2\n", {"did you mean 'optimizer.lr'?"}},
      {"", "train_iters: 2\n", {"did you mean 'stages[].steps'?"}},
      {"    steps: 10",
       "    train_iters: 10",
       {"unknown key 'train_iters' in stages[0]", "did you mean 'steps'?"}},
      {"    optimizer: {lr: 1e-3}",
       "    lr: 1e-3",
       {"in stages[0]", "did you mean 'optimizer.lr'?"}},
      {"weight_decay: 0.2",
       "learning_rate: 2",
       {"unknown key 'learning_rate' in optimizer", "did you mean 'lr'?"}},
      {"micro_batch_size: 2", "micro-batch-size: 2", {"did you mean 'micro_batch_size'?"}},
      {"  seq_length: 64", "  sequence_length: 64", {"did you mean 'seq_length'?"}},
      {"{path: data/a}",
       "{path: data/a, wieght: 1}",
       {"in data.train[0]", "did you mean 'weight'?"}},
      {"", "save_interval: 2\n", {"did you mean 'checkpoint.interval'?"}},
      {"", "index_topk: 2\n", {"did you mean 'dsa.index_topk'?"}},
      {"", "zzqqxxyy: 2\n", {"unknown key 'zzqqxxyy' at the top level"}},
      {"attention: dense",
       "attention: dens",
       {"10:16: error: stages[0].attention: expected one of dense | sparse, found 'dens'",
        "did you mean 'dense'?"}},
      {"{tensor: 2}", "{schedule: 1F1B}", {"expected one of gpipe | 1f1b", "did you mean '1f1b'?"}},
      {"dir: runs/test", "dir: runs/test, device: gpu", {"did you mean 'cuda'?"}},
      {"", "precision: {compute: bfloat16}\n", {"did you mean 'bf16'?"}},
  });
  EXPECT_THAT(RunError(Edited("", "zzqqxxyy: 2\n")), Not(HasSubstr("did you mean")));
}

TEST(BrokenRun, MissingKeysAreNamedAtTheirSection) {
  ExpectOneError({
      {"    steps: 10\n",
       "",
       {"run.yaml:9:5: error: missing key 'steps' in stages[0]: expected an integer from 1"}},
      {"name: test, ", "", {"1:1: error: missing key 'name' in run: expected a name"}},
      {"    optimizer: {lr: 1e-3}\n",
       "",
       {"9:5: error: missing key 'lr' in stages[0].optimizer",
        "give it here or, for all stages, as optimizer.lr"}},
      {"  train: [{path: data/a}]\n",
       "  train: [{weight: 1}]\n",
       {"missing key 'path' in data.train[0]"}},
      {"{checkpoint: ckpt}",
       "{}",
       {"2:1: error: model: expected exactly one of 'checkpoint' and 'config', found none"}},
      {"{checkpoint: ckpt}",
       "{checkpoint: ckpt, config: a.yaml}",
       {"exactly one of", "found both"}},
  });
  EXPECT_THAT(RunError("run: {name: a, dir: b}\nmodel: {checkpoint: c}\n"),
              HasSubstr("missing key 'stages' at the top level"));
}

TEST(BrokenRun, RulesBetweenValuesAreChecked) {
  ExpectOneError({
      {"global_batch_size: 4",
       "global_batch_size: 5",
       {"13:24: error: global_batch_size = 5 is not a multiple of micro_batch_size = 2"}},
      {"name: sparse",
       "name: warmup",
       {"15:12: error: stages[1] is called 'warmup' as stages[0] is"}},
      {"{tensor: 2}",
       "{pipeline: 2, virtual_stages: 2}",
       {"parallelism.virtual_stages = 2, but schedule 1f1b has 1 part"}},
      {"{tensor: 2}", "{schedule: zbv, virtual_stages: 3}", {"a V of exactly 2 parts"}},
      {"{tensor: 2}", "{schedule: interleaved, virtual_stages: 1}", {"needs 2 or more parts"}},
      {"{tensor: 2}",
       "{pipeline: 2, layer_split: [1, 2, 3]}",
       {"layer_split has 3 numbers, expected 2 (pipeline 2 x 1 parts"}},
      {"{tensor: 2}", "{expert: 12, expert_node_size: 8}", {"one must divide the other"}},
      {"",
       "precision: {compute: fp32, gemm: fp8_block}\n",
       {"precision.gemm = fp8_block does not go with precision.compute = fp32"}},
      {"dir: runs/test}",
       "dir: runs/test, device: cuda}\nprecision: {compute: fp64}",
       {"fp64 runs on the cpu only"}},
      {"lr: 1e-3}",
       "lr: 1e-3}\n    lr_schedule: {warmup_steps: 11}",
       {"15:33: error: lr_schedule.warmup_steps = 11 is more than the 10 steps of stage warmup"}},
      {"lr: 1e-3}",
       "lr: 1e-3}\n    lr_schedule: {style: cosine, min_lr: 1}",
       {"lr_schedule.min_lr = 1 is more than optimizer.lr = 0.001"}},
  });
}

TEST(BrokenRun, WhatNoBackendHonoursIsToldByItsLine) {
  const std::string kSparse = "  - name: sparse";
  ExpectOneError({
      {"", "deterministic: false\n", {"17:16: error: deterministic = false: there is no faster"}},
      {"",
       "checkpoint: {async: true}\n",
       {"17:21: error: checkpoint.async = true: checkpoints are written in the foreground"}},
      {"attention: dense",
       "attention: sparse",
       {"attention: sparse with train: indexer (stage warmup) is not a recipe"}},
      {"",
       "precision: {compute: fp32}\ndsa: {indexer_dtype: bf16}\n",
       {"18:22: error: dsa.indexer_dtype = bf16 beside precision.compute = fp32"}},
      {"",
       "precision: {compute: bf16}\ndsa: {indexer_dtype: fp32}\n",
       {"18:22: error: dsa.indexer_dtype = fp32 beside precision.compute = bf16"}},
      {"attention: sparse, train: all",
       "attention: dense, train: all",
       {"stage sparse has no indexers", "follows stage warmup, which trains them"}},
      {"lr: 1e-4}",
       "lr: 1e-4}, checkpoint: {resume: never}",
       {"error: checkpoint.resume of stage sparse: it is asked once", "at the top level"}},
  });
  EXPECT_EQ(RunError(Edited("", "dsa: {indexer_dtype: bf16}\nprecision: {compute: bf16}\n")), "");
  EXPECT_EQ(RunError(Edited("", "checkpoint: {resume: never, async: false}\n")), "");
}

TEST(BrokenRun, AllFaultsAreToldAtOnceInTheOrderOfTheFile) {
  std::string text = Edited("tensor: 2", "tensor: two");
  text = absl::StrReplaceAll(text, {{"steps: 10", "stepz: 10"}, {"lr: 1e-4", "lr: -1"}});
  const std::string error = RunError(text + "deterministic: maybe\n", {"run.seed=-1"});
  const std::vector<std::string> in_order = {"run.yaml:3:23: error: ",
                                             "run.yaml:12:5: error: ",
                                             "run.yaml:15:100: error: ",
                                             "run.yaml:17:16: error: ",
                                             "command line: run.seed=-1: error: run.seed: expected",
                                             "5 errors. Nothing was started."};
  size_t at = 0;
  for (const std::string& part : in_order) {
    at = error.find(part, at);
    ASSERT_NE(at, std::string::npos) << part << "\n" << error;
  }
}

TEST(BrokenRun, AValueThatCouldNotBeReadBreaksNoRule) {
  // The number of steps is unknown here: nothing is said about a warm-up that is longer.
  const std::string error =
      RunError(Edited("    steps: 10", "    steps: x\n    lr_schedule: {warmup_steps: 5}"));
  EXPECT_THAT(error, HasSubstr("stages[0].steps: expected an integer"));
  EXPECT_THAT(error, HasSubstr("\n1 error. Nothing was started."));
}

TEST(BrokenRun, AnInheritedFaultIsToldOnce) {
  const std::string error = RunError(Edited("{tensor: 2}", "{virtual_stages: 2}"));
  EXPECT_THAT(error, HasSubstr("\n1 error."));
}

}  // namespace
}  // namespace baleen
