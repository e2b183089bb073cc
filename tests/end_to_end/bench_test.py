#!/usr/bin/env python3
"""baleen bench on the CPU: every stage is measured, figures agree with one another, nothing is left behind, wrong flags
are named.

  bench_test.py BINARY
"""

import json
import os

import harness
from harness import DENSE, SPARSE, WARMUP, read, run, succeed, tree, write

PHASES = ["batch", "begin", "forward", "backward_input", "backward_weight", "pipeline", "statistics", "reduce", "norms",
          "update", "summary"]


class Bench(harness.Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        text = harness.run_yaml([DENSE % 1, WARMUP % 1, SPARSE % 1]).replace("checkpoint: v31", "config: model.yaml")
        write(os.path.join(cls.base, "bench.yaml"), text)
        os.makedirs(os.path.join(cls.base, "temporary"), exist_ok=True)
        os.environ["TMPDIR"] = os.path.join(cls.base, "temporary")

    def bench(self, *words, ranks=0):
        path = os.path.join(self.base, "bench.json")
        succeed("bench", *words, "--json", "bench.json", folder=self.base, ranks=ranks)
        figures = json.loads(read(path))
        os.remove(path)
        return figures

    def test_every_stage_is_measured_and_its_phases_make_up_the_step(self):
        before = tree(self.base)
        figures = self.bench("step", "bench.yaml", "--steps", "2", "--warmup", "1")
        self.assertEqual(figures["device"], "CPU")
        self.assertGreater(figures["matmul_flops"], 0)
        self.assertEqual([r["stage"] for r in figures["results"]], ["dense", "indexer-warmup", "sparse"])
        for result in figures["results"]:
            self.assertEqual(len(result["step_seconds"]), 2)
            self.assertEqual(result["tokens"], 4 * 32)
            self.assertAlmostEqual(result["tokens_per_second"] * result["seconds"], result["tokens"], 6)
            self.assertEqual([phase["name"] for phase in result["phases"]], PHASES)
            # One more step than the timed ones: a loaded machine may take several times as long.
            total = sum(phase["seconds"] for phase in result["phases"])
            self.assertGreater(total, result["seconds"] / 20)
            self.assertLess(total, result["seconds"] * 20)
            self.assertFalse(result["skipped"])
            self.assertGreater(result["peak_bytes"], 0)
            # The planner runs the same code dry.
            self.assertLess(abs(result["plan"]["peak_bytes"] / result["peak_bytes"] - 1), 0.05)
        dense, warmup, sparse = figures["results"]
        self.assertGreater(dense["lm_loss"], 0)
        self.assertEqual(warmup["lm_loss"], 0)
        self.assertGreater(warmup["indexer_kl"], 0)
        self.assertGreater(sparse["indexer_kl"], 0)
        self.assertEqual(tree(self.base), before)

    def test_only_sparse_stages_are_measured_with_each_kind_of_keys(self):
        figures = self.bench("step", "bench.yaml", "--ids", "indexer,near,random", "--steps", "1", "--warmup", "0")
        self.assertEqual([(r["stage"], r["ids"]) for r in figures["results"]],
                         [("dense", "indexer"), ("indexer-warmup", "indexer"), ("sparse", "indexer"),
                          ("sparse", "near"), ("sparse", "random")])

    def test_layer_measures_one_block_phase_by_phase(self):
        for block in ("dense", "moe"):
            figures = self.bench("layer", "bench.yaml", "--block", block, "--steps", "1", "--stage", "sparse,dense")
            self.assertEqual([r["what"] for r in figures["results"]], ["layer, " + block] * 2)
            for result in figures["results"]:
                taken = {phase["name"]: phase["seconds"] for phase in result["phases"]}
                for phase in ("forward attention", "forward experts", "backward attention", "weights"):
                    self.assertGreater(taken[phase], 0, phase)
                self.assertLess(result["seconds"], result["step_seconds"][0])

    def test_ranks_share_a_step(self):
        figures = self.bench("step", "bench.yaml", "--stage", "sparse", "--steps", "1", "--ids", "near",
                             "parallelism.context=2", ranks=2)
        self.assertEqual([r["ranks"] for r in figures["results"]], [2])

    def test_ops_are_timed_beside_the_ceilings(self):
        before = tree(self.base)
        figures = self.bench("ops", "bench.yaml", "--steps", "2", "--ops", "sparse_attention.*,gemm.o.*,adamw",
                             "--tokens", "32,64", "--ids", "near", "--rows", "16")
        self.assertEqual(figures["device"], "CPU")
        self.assertEqual(figures["timing"], "wall clock")
        for ceilings in (figures["ceilings"], figures["ceilings_after"]):
            for name in ("matmul_flops", "fp8_flops", "copy_bytes_per_second"):
                self.assertGreater(ceilings[name], 0)
        self.assertEqual([(r["op"], r.get("keys")) for r in figures["results"]],
                         [("sparse_attention.forward", 32), ("sparse_attention.forward", 64),
                          ("sparse_attention.backward", 32), ("sparse_attention.backward", 64),
                          ("gemm.o.forward", None), ("gemm.o.dgrad", None), ("gemm.o.wgrad", None),
                          ("gemm.o.wgrad_first", None), ("adamw", None)])
        for result in figures["results"]:
            self.assertEqual(len(result["all_seconds"]), 2)
            self.assertAlmostEqual(result["bytes_per_second"] * result["seconds"] / result["bytes"], 1, 6)
            self.assertAlmostEqual(result["of_copy"] * figures["ceilings"]["copy_bytes_per_second"]
                                   / result["bytes_per_second"], 1, 6)
        self.assertEqual(tree(self.base), before)

    def test_ops_print_one_line_each_and_go_on_where_one_does_not_fit(self):
        text = succeed("bench", "ops", "bench.yaml", "--steps", "1", "--ops", "indexer.topk", "--tokens", "32,256Ki",
                       "--rows", "256Ki", folder=self.base).out
        lines = [line for line in text.splitlines() if line.startswith("indexer.topk")]
        self.assertEqual(len(lines), 2)
        self.assertIn("CPU definition", lines[0])
        self.assertIn("does not fit: needs 256.", lines[1])
        self.assertIn("1 measured; goals: 0 met, 0 missed; 1 did not fit", text)

    def test_wrong_words_exit_2_and_are_named(self):
        for words, parts in (
                ([], ["baleen bench step|layer|ops RUN.yaml"]),
                (["steps", "bench.yaml"], ["'steps'", "'step', 'layer' or 'ops'"]),
                (["ops", "bench.yaml", "--ops", "adam"], ["no op is called 'adam'", "adamw"]),
                (["ops", "bench.yaml", "--ids", "indexer"], ["--ids indexer", "near and random"]),
                (["ops", "bench.yaml", "--tokens", "4Ki,x"], ["--tokens 4Ki,x: 'x'"]),
                (["ops", "bench.yaml", "--block", "moe"], ["bench ops: no flag --block"]),
                (["ops", "bench.yaml", "parallelism.tensor=3"], ["not divisible by parallelism.tensor = 3"]),
                (["step", "bench.yaml", "--stage", "spares"], ["spares", "dense, indexer-warmup, sparse"]),
                (["step", "bench.yaml", "--ids", "far"], ["far", "indexer, near and random"]),
                (["step", "bench.yaml", "--block", "moe"], ["--block", "layer"]),
                (["layer", "bench.yaml", "--block", "mtp"], ["mtp", "moe and dense"]),
                (["layer", "bench.yaml", "parallelism.pipeline=2"], ["parallelism.pipeline = 2", "set it to 1"]),
                (["step", "bench.yaml", "--steps", "0"], ["--steps", "'0'"]),
                (["step", "bench.yaml", "--trace", "t", "--no-trace"], ["exclude each other"]),
                (["step", "bench.yaml", "--jsn", "t"], ["no flag --jsn"]),
                (["step", "bench.yaml", "optimizer.lrr=1"], ["lrr"])):
            result = run("bench", *words, folder=self.base)
            self.assertExit(result, 2, *parts)

    def test_a_trace_on_the_cpu_is_refused(self):
        result = run("bench", "step", "bench.yaml", "--stage", "dense", "--steps", "1", "--trace", "t.json",
                     folder=self.base)
        self.assertExit(result, 3, "--trace t.json", "CPU")
        self.assertFalse(os.path.exists(os.path.join(self.base, "t.json")))


if __name__ == "__main__":
    harness.main()
