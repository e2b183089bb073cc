#!/usr/bin/env python3
"""Every command answers as its --help says: help, versions, unknown words, inspect, config, report, dry run, the lock.

  commands_test.py BINARY
"""

import json
import os
import re
import shutil

import harness
from harness import SPARSE, WARMUP, Background, changes, metrics, read, run, succeed, tree, write


class Commands(harness.Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        write(os.path.join(cls.base, "run.yaml"),
              harness.run_yaml([WARMUP % 4, SPARSE % 4],
                               sections="checkpoint: {interval: 2}\nmetrics: {indexer_interval: 2}"))
        succeed("train", "run.yaml", folder=cls.base)

    def commands(self):
        result = run("--help", folder=self.base)
        self.assertExit(result, 0)
        return re.findall(r"(?m)^  (\w+) ", result.out)

    def test_help_of_every_command_shows_two_examples(self):
        names = self.commands()
        self.assertEqual(set(names), {"train", "plan", "eval", "export", "init", "inspect", "data", "config", "bench",
                                      "report"})
        for name in names:
            for flag in ("--help", "-h"):
                result = run(name, flag, folder=self.base)
                self.assertExit(result, 0)
                examples = re.findall(rf"(?m)^  (?:mpirun -n \d+ )?baleen {name} \S", result.out)
                self.assertGreaterEqual(len(examples), 2, result.out)
                self.assertEqual(result.err, "")

    def test_plan_says_bytes_and_speed_of_every_stage_without_ranks(self):
        result = succeed("plan", "run.yaml", "--world", "4", "--schedule", folder=self.base)
        for part in ("on 4 ranks", "stage 'indexer-warmup'", "stage 'sparse'", "parameters", "fits", "bubble", "predicted"):
            self.assertIn(part, result.out)
        stages = json.loads(succeed("plan", "run.yaml", "--world", "4", "--json", folder=self.base).out)["stages"]
        self.assertEqual([stage["world"] for stage in stages], [4, 4])

    def test_version_is_one_line(self):
        result = run("--version", folder=self.base)
        self.assertExit(result, 0)
        self.assertRegex(result.out, r"^baleen \d+\.\d+\.\d+\n$")

    def test_unknown_words_exit_2_and_name_the_word(self):
        before = tree(self.base)
        for words, parts in (
                ([], ["usage: baleen COMMAND"]),
                (["trian"], ["no command 'trian'", "train"]),
                (["train"], ["no run file", "baleen train RUN.yaml"]),
                (["train", "run.yaml", "--fast"], ["no flag --fast", "--dry-run"]),
                (["train", "-n", "4", "run.yaml"], ["no flag -n", "--dry-run"]),
                (["init", "model.yaml", "--into", "x"], ["no flag --into", "--to"]),
                (["init", "model.yaml"], ["--to DIR is missing"]),
                (["init", "model.yaml", "--to"], ["--to needs a value"]),
                (["init", "model.yaml", "--to", "--seed", "3"], ["--to needs a value"]),
                (["init", "model.yaml", "--to", "x", "--to", "y"], ["--to is given twice"]),
                (["init", "model.yaml", "--to", "x", "--dtype", "fp4"], ["fp4", "fp8", "bf16"]),
                (["init", "model.yaml", "--to", "x", "--seed", "minus"], ["--seed", "minus", "whole number"]),
                (["init", "model.yaml", "other.yaml", "--to", "x"], ["found 2", "baleen init MODEL.yaml"]),
                (["export", "run", "--to", "x", "--format", "v4"], ["v4", "v3.2 or v3.1"]),
                (["export", "run", "--to", "x", "--shard-bytes", "0"], ["--shard-bytes", "'0'", "1 or more"]),
                (["inspect", "--verify=yes", "run"], ["--verify takes no value"]),
                (["inspect"], ["baleen inspect PATH"]),
                (["data", "biuld"], ["expected 'build'"]),
                (["data", "build", "text", "--to", "x", "--document-per", "line"], ["line", "file or directory"]),
                (["config", "chek", "run.yaml"], ["'chek'", "check|print"]),
                (["config", "check"], ["no run file"]),
                (["eval", "run.yaml", "--checkpiont", "run"], ["no flag --checkpiont", "--checkpoint"]),
                (["report"], ["baleen report RUN_DIR"]),
                (["plan"], ["baleen plan RUN.yaml"]),
                (["plan", "run.yaml", "--gpu", "tpu"], ["tpu", "h100, h200 and cpu"]),
                (["plan", "run.yaml", "--world", "none"], ["--world", "none", "whole number"]),
                (["plan", "run.yaml", "--world", "2147483648"], ["--world = 2147483648", "at most"]),
        ):
            with self.subTest(" ".join(words)):
                self.assertExit(run(*words, folder=self.base), 2, *parts)
        self.assertEqual(changes(before, tree(self.base)), [])

    def test_inspect_knows_every_kind_of_path(self):
        before = tree(self.base)
        for path, parts in (
                ("v31", ["deepseek_v3", "model.layers.*.mlp.experts.*.gate_proj.weight", "F8_E4M3", "complete"]),
                ("run", ["run directory run", "8 records", "step-00000008"]),
                ("run/checkpoints", ["step-00000008"]),
                ("run/checkpoints/step-00000008", ["sparse", "rank-00000.h5"]),
                ("data/train", ["documents   10\n", "tokens"]),
        ):
            for flags in ([], ["--verify"]):
                with self.subTest(" ".join([path, *flags])):
                    self.assertExit(run("inspect", path, *flags, folder=self.base), 0, *parts)
        self.assertExit(run("inspect", "nowhere", folder=self.base), 4, "nowhere")
        self.assertExit(run("inspect", "text", folder=self.base), 4, "text: found neither config.json", "manifest.json")
        self.assertEqual(changes(before, tree(self.base)), [])

    def test_help_of_a_command_is_its_own_page(self):
        page = succeed("train", "--help", folder=self.base).out
        self.assertEqual(succeed("help", "train", folder=self.base).out, page)
        self.assertNotEqual(succeed("help", folder=self.base).out, page)
        self.assertExit(run("help", "tarin", folder=self.base), 2, "no command 'tarin'")

    def test_an_export_without_the_trained_indexers_says_so(self):
        words = ["export", "run", "--to", "dense", "--format", "v3.1"]
        self.assertExit(run(*words, folder=self.base), 0, "the trained ones are not in this export")
        shutil.rmtree(self.path("dense"))

    def test_what_config_print_says_loads_again(self):
        printed = succeed("config", "print", "run.yaml", "stages.1.optimizer.lr=3e-4", folder=self.base).out
        self.assertIn("run.yaml:1", printed)
        self.assertIn("command line", printed)
        write(self.path("printed.yaml"), printed)
        self.assertExit(run("config", "check", "printed.yaml", folder=self.base), 0, "printed.yaml: ok")
        again = succeed("config", "print", "printed.yaml", folder=self.base).out

        def without_origins(text):
            return [line.partition("#")[0].rstrip() for line in text.splitlines() if line.partition("#")[0].strip()]

        self.assertEqual(without_origins(again), without_origins(printed))
        # A run writes the same file for itself.
        self.assertExit(run("config", "check", "run/run.yaml", folder=self.base), 0)

    def test_schema_and_reference_name_every_section(self):
        schema = succeed("config", "schema", folder=self.base).out
        reference = succeed("config", "reference", folder=self.base).out
        for section in ("parallelism", "stages", "dsa", "checkpoint", "lr_schedule"):
            self.assertIn(f'"{section}"', schema)
            self.assertIn(f"### {section}", reference)

    def test_report_is_one_file_without_outside_references(self):
        succeed("report", "run", "--to", "report.html", folder=self.base)
        html = read(self.path("report.html"))
        self.assertIn("<svg", html)
        self.assertNotIn("http", html)
        self.assertIn("indexer-warmup", html)
        shutil.copytree(self.path("run"), self.path("run2"))
        succeed("report", "run2", "--compare", "run", folder=self.base)
        self.assertIn("<svg", read(self.path("run2", "report.html")))
        shutil.rmtree(self.path("run2"))
        self.assertExit(run("report", "data", folder=self.base), 4, "metrics.jsonl")

    def test_dry_run_says_the_plan_and_writes_nothing(self):
        before = tree(self.base)
        for directory in ("run.dir=fresh", "run.dir=run"):
            result = run("train", "run.yaml", directory, "--dry-run", folder=self.base)
            self.assertExit(result, 0, "indexer-warmup", "sparse", "grid", "data/train", "nothing was trained or written")
        self.assertEqual(changes(before, tree(self.base)), [])

    def test_eval_compares_selections(self):
        result = succeed("eval", "run.yaml", "--checkpoint", "run", "--steps", "1", folder=self.base)
        for word in ("dense", "sparse", "random", "last"):
            self.assertIn(word, result.out)

    def test_metrics_have_the_keys_that_apply(self):
        steps = metrics(self.path("run"))
        self.assertEqual([record["step"] for record in steps], list(range(1, 9)))
        for record in steps:
            for key in ("stage", "consumed_tokens", "indexer_kl", "grad_norm_indexer", "lr", "step_seconds",
                        "tokens_per_second", "tokens_per_second_per_device", "memory_peak_bytes", "topk_ties",
                        "expert_load_max_over_mean", "expert_load_min", "data_wait_seconds"):
                self.assertIn(key, record)
            sparse = record["stage"] == "sparse"
            for key in ("lm_loss", "mtp_loss", "balance_loss", "grad_norm_main"):
                self.assertEqual(key in record, sparse, key)
        for record in (steps[0], steps[3], steps[4], steps[7]):
            for key in ("topk_mass", "recall_at_k", "topk_mass_per_layer", "recall_at_k_per_layer"):
                self.assertIn(key, record)

    def test_never_resuming_spares_the_run_that_is_there(self):
        before = tree(self.path("run"))
        result = run("train", "run.yaml", "checkpoint.resume=never", folder=self.base)
        self.assertExit(result, 2, "run/checkpoints/step-00000008", "checkpoint.resume = never", "run.dir")
        self.assertEqual(changes(before, tree(self.path("run"))), [])

    def test_a_device_that_is_not_there_is_an_error(self):
        result = run("train", "run.yaml", "run.dir=fresh", "run.device=cuda", folder=self.base)
        self.assertExit(result, 3, "run.device = cuda", "run.device: cpu")
        self.assertFalse(os.path.exists(self.path("fresh")))

    def test_a_finished_run_has_nothing_left_to_do(self):
        before = tree(self.path("run", "checkpoints"))
        result = succeed("train", "run.yaml", folder=self.base)
        self.assertIn("resuming after step 8", result.err)
        self.assertIn("done: 8 steps", result.err)
        self.assertIn("nothing was left to train", result.err)
        self.assertEqual(changes(before, tree(self.path("run", "checkpoints"))), [])
        self.assertEqual([record["step"] for record in metrics(self.path("run"))], list(range(1, 9)))

    def test_of_two_runs_in_one_directory_the_second_exits_3_and_names_the_first(self):
        self.write_run("long.yaml", [SPARSE % 100000], run_dir="shared", sections="checkpoint: {interval: 0}")
        first = Background("train", "long.yaml", folder=self.base)
        lock = self.path("shared", "run.lock")
        # Once a step is written the first run has long been the owner.
        metrics_file = self.path("shared", "metrics.jsonl")
        self.assertTrue(first.wait_until(lambda: os.path.exists(metrics_file) and os.path.getsize(metrics_file) > 0))
        owner = re.search(r"(?m)^pid (\d+)$", read(lock)).group(1)
        before = {key: value for key, value in tree(self.path("shared")).items()
                  if "metrics" not in key and "tensorboard" not in key}
        second = run("train", "long.yaml", folder=self.base)
        self.assertExit(second, 3, "shared/run.lock", f"process {owner}", "host", "belongs to another run")
        after = tree(self.path("shared"))
        self.assertEqual(changes(before, {key: after.get(key) for key in before}), [])
        self.assertTrue(first.running())
        first.kill()
        first.finish()
        # The dead owner's lock is taken over.
        third = run("train", "long.yaml", "stages.0.steps=1", folder=self.base)
        self.assertExit(third, 0, "done: 1 steps")
        self.assertFalse(os.path.exists(lock))


if __name__ == "__main__":
    harness.main()
