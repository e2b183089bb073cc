#!/usr/bin/env python3
"""What a run says of itself is true, and no more than is worth its bytes: banner, metrics.jsonl, eval.

  report_test.py BINARY
"""

import os

import harness
from harness import DENSE, SPARSE, WARMUP, metrics, read, succeed, write

STEPS = 7
INTERVAL = 3


class Report(harness.Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.write_run(cls, "run.yaml", [WARMUP % STEPS, SPARSE % STEPS],
                      sections=f"metrics: {{indexer_interval: {INTERVAL}}}\ncheckpoint: {{interval: 2, keep: 0}}")
        cls.write_run(cls, "dense.yaml", [DENSE % 2], run_dir="dense", sections="metrics: {indexer_interval: 0}")
        cls.trained = succeed("train", "run.yaml", folder=cls.base)
        cls.dense = succeed("train", "dense.yaml", folder=cls.base)

    def test_the_load_of_each_expert_is_in_measured_steps_alone(self):
        measured = {1, 3, 6, 7}
        for record in metrics(self.path("run")):
            said = str(record)
            self.assertEqual("expert_load" in record, record["stage_step"] in measured, said)
            self.assertEqual("recall_at_k" in record, record["stage_step"] in measured, said)
            for key in ("expert_load_max_over_mean", "expert_load_min"):
                self.assertIn(key, record, said)
            for layer in record.get("expert_load", []):
                self.assertEqual(len(layer), 8, said)
                self.assertAlmostEqual(sum(layer) / 8, 1, delta=5e-4)
                self.assertEqual(layer, [round(load, 3) for load in layer])
        for record in metrics(self.path("dense")):  # metrics.indexer_interval: 0
            self.assertNotIn("expert_load", record)
            self.assertIn("expert_load_max_over_mean", record)

    def test_a_resumed_run_cuts_the_records_in_place(self):
        path = self.path("run", "metrics.jsonl")
        lines = read(path).splitlines(keepends=True)
        inode = os.stat(path).st_ino
        with open(path, "a", encoding="utf-8") as file:
            file.write('{"kind":"step","step":15,"stage":"sparse"}\n{"kind":"st')
        succeed("train", "run.yaml", folder=self.base)
        self.assertEqual(read(path), "".join(lines))
        self.assertEqual(os.stat(path).st_ino, inode)

    def test_inspect_counts_the_records_and_shows_the_last(self):
        result = succeed("inspect", "run", folder=self.base)
        self.assertIn(f'metrics.jsonl: {2 * STEPS} records; the last: {{"kind":"step","step":{2 * STEPS},', result.out)
        os.mkdir(self.path("begun"))
        write(self.path("begun", "run.yaml"), "")
        write(self.path("begun", "metrics.jsonl"), "")
        self.assertIn("metrics.jsonl: 0 records\n", succeed("inspect", "begun", folder=self.base).out)

    def test_the_banner_of_a_stage_without_indexers_speaks_of_none(self):
        (kernels,) = [line for line in self.dense.err.splitlines() if line.startswith("kernels ")]
        self.assertEqual(kernels, "kernels   attention dense", self.dense.err)
        for kernels in [line for line in self.trained.err.splitlines() if line.startswith("kernels ")]:
            self.assertIn("; indexer full precision", kernels)

    def test_eval_says_that_an_indexer_is_untrained(self):
        note = "indexer tensors are neither in the checkpoint nor in a training state"
        result = succeed("eval", "run.yaml", "--steps", "1", folder=self.base)
        self.assertIn(note, result.err)
        self.assertNotIn(note, result.out)
        for state in ("step-00000002", "step-00000014"):  # of the warm-up and of the sparse stage
            result = succeed("eval", "run.yaml", "--steps", "1", "--checkpoint", f"run/checkpoints/{state}", folder=self.base)
            self.assertNotIn(note, result.err)
        result = succeed("eval", "run.yaml", "--steps", "1", "model.checkpoint=null", "model.config=model.yaml", folder=self.base)
        self.assertIn("model.yaml: all weights are random", result.err)


if __name__ == "__main__":
    harness.main()
