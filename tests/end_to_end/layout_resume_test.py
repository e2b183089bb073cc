#!/usr/bin/env python3
"""A state of one layout goes on under another, without a flag or a conversion: losses of the unbroken run, in fp64 within
1e-9; stages of different layouts in one job; exports of one state from 10 layouts, byte for byte; eval on any layout.

  layout_resume_test.py BINARY
"""

import json
import os
import shutil
import sys

import harness
from harness import (DENSE, SPARSE, WARMUP, Background, changes, checkpoint_tensors, manifest, metrics,
                     relative_difference, run, states, succeed, tree)

MOST = 1e-9
NUMBERS = ("lm_loss", "mtp_loss", "indexer_kl", "balance_loss", "grad_norm_main", "grad_norm_indexer", "topk_mass",
           "recall_at_k")
EXPECTED = {"indexer-warmup": {"indexer_kl", "grad_norm_indexer", "topk_mass", "recall_at_k"}, "sparse": set(NUMBERS)}
SECTIONS = "checkpoint: {interval: 0, keep: 0}\nmetrics: {indexer_interval: 1}\nrouter: {bias_update_speed: 1.0e-3}\n"
FP64 = SECTIONS + "precision: {compute: fp64}\n"
# One step that moves no value: what is saved after it is the state before it, as another layout's ranks hold it.
STILL = ("{name: still, attention: sparse, train: all, steps: 1, global_batch_size: 4, optimizer: {lr: 1.0e-30}, "
         "router: {bias_update_speed: 0}}")

ONE = {}
# What is saved under the first goes on under the others.
SPARSE_PAIRS = (
    (ONE, ({"tensor": 2, "pipeline": 2, "expert": 2},
           {"tensor": 2, "context": 2, "pipeline": 2, "expert": 4, "schedule": "zbv"})),
    ({"tensor": 2, "pipeline": 2, "expert": 4, "data": 2}, (ONE, {"context": 4, "expert": 4})),
    ({"context": 2, "pipeline": 3}, ({"data": 4, "expert": 2}, {"tensor": 2})),
    ({"data": 4, "expert": 4}, ({"tensor": 2, "context": 2, "data": 2},)),
)
WARMUP_PAIRS = (
    ({"tensor": 2, "context": 2}, ({"pipeline": 3}, {"data": 2, "expert": 2})),
    ({"pipeline": 2, "data": 2, "schedule": "interleaved", "layer_split": "[1,1,1,0]"}, (ONE,)),
)
EXPORT_LAYOUTS = (
    ONE,
    {"data": 4},
    {"tensor": 2},
    {"context": 4},
    {"pipeline": 3},
    {"data": 4, "expert": 4},
    {"tensor": 2, "pipeline": 2, "expert": 2},
    {"tensor": 2, "context": 2, "expert": 4},
    {"pipeline": 2, "schedule": "dualpipev"},
    {"tensor": 2, "context": 2, "pipeline": 2, "expert": 4},
)


def ranks_of(layout):
    ranks = 1
    for axis in ("tensor", "context", "pipeline", "data"):
        ranks *= layout.get(axis, 1)
    return ranks


def overrides(layout, prefix="parallelism"):
    """Words of the command line; `data` is what is left of the ranks."""
    return [f"{prefix}.{key}={value}" for key, value in layout.items() if key != "data"]


def with_layout(stage, layout):
    inside = ", ".join(f"{key}: {value}" for key, value in layout.items() if key != "data")
    return f"{stage[:-1]}, parallelism: {{{inside}}}}}"


class LayoutResume(harness.Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        for name, stages in (("warmup", [WARMUP % 4]), ("sparse", [SPARSE % 4]), ("both", [WARMUP % 2, SPARSE % 2])):
            cls.write_run(cls, f"{name}.yaml", stages, run_dir=name, sections=FP64)
            cls.train(cls, f"{name}.yaml", name, ONE)

    def train(self, file, directory, layout, *words):
        return succeed("train", file, f"run.dir={directory}", *overrides(layout), *words, folder=self.base,
                       ranks=ranks_of(layout))

    def assert_same_numbers(self, whole, directory, what):
        """Each step once, and its numbers those of the unbroken run; returns the largest relative difference."""
        ours, theirs = metrics(self.path(directory)), metrics(self.path(whole))
        self.assertEqual([record["step"] for record in ours], [1, 2, 3, 4], what)
        largest = 0.0
        for one, other in zip(ours, theirs):
            for key in ("step", "stage", "stage_step", "consumed_tokens", "lr"):
                self.assertEqual(one[key], other[key], f"{what}, {key}")
            self.assertEqual({key for key in NUMBERS if key in one}, EXPECTED[one["stage"]])
            for key in EXPECTED[one["stage"]]:
                difference = relative_difference(one[key], other[key])
                largest = max(largest, difference)
                self.assertLessEqual(difference, MOST, f"{what}, step {one['step']}, {key}: {one[key]!r} {other[key]!r}")
        self.assertEqual(len({record.get("lm_loss", record["indexer_kl"]) for record in ours}), 4, "numbers stand still")
        ours, theirs = manifest(self.path(directory))["metadata"], manifest(self.path(whole))["metadata"]
        self.assertEqual(ours | {"layout": ""}, theirs | {"layout": ""}, what)
        return largest

    def digest(self, state):
        """{tensor: hash}, and the hash of the whole under "state"."""
        found = {}
        for line in succeed("inspect", state, "--digest", folder=self.base).out.splitlines():
            words = line.split()
            if words[0] == "digest":
                found[words[2] if words[2] != "whole" else "state"] = words[1]
        return found

    def check_pairs(self, name, pairs):
        for saved, others in pairs:
            self.train(f"{name}.yaml", f"{name}-half", saved, "stages.0.steps=2")
            self.assertEqual(states(self.path(f"{name}-half")), ["step-00000002"])
            for layout in others:
                shutil.copytree(self.path(f"{name}-half"), self.path("resumed"))
                result = self.train(f"{name}.yaml", "resumed", layout)
                self.assertIn("resuming after step 2 ", result.err)
                what = f"{name} saved under {saved}, resumed under {layout}"
                largest = self.assert_same_numbers(name, "resumed", what)
                print(f"\n{what}: {largest:.1e}", end="", file=sys.stderr)
                shutil.rmtree(self.path("resumed"))
            shutil.rmtree(self.path(f"{name}-half"))

    def test_sparse_training_goes_on_under_another_layout(self):
        self.check_pairs("sparse", SPARSE_PAIRS)

    def test_the_warmup_goes_on_under_another_layout(self):
        self.check_pairs("warmup", WARMUP_PAIRS)

    def test_stages_of_different_layouts_in_one_job(self):
        rows, mixed = {"context": 4}, {"tensor": 2, "pipeline": 2, "expert": 2}
        for name, first, second in (("rows-mixed", rows, mixed), ("mixed-rows", mixed, rows)):
            stages = [with_layout(WARMUP % 2, first), with_layout(SPARSE % 2, second)]
            self.write_run(f"{name}.yaml", stages, run_dir=name, sections=FP64)
            succeed("train", f"{name}.yaml", folder=self.base, ranks=4)
            largest = self.assert_same_numbers("both", name, name)
            print(f"\n{name}: {largest:.1e}", end="", file=sys.stderr)
            layouts = [manifest(self.path(name), state)["metadata"]["layout"] for state in states(self.path(name))]
            self.assertEqual(len(set(layouts)), 2, layouts)

    def test_killed_at_the_hand_over_and_resumed_under_a_third_layout(self):
        stages = [with_layout(WARMUP % 2, {"context": 4}), with_layout(SPARSE % 2, {"tensor": 2, "pipeline": 2})]
        self.write_run("killed.yaml", stages, run_dir="killed", sections=FP64)
        running = Background("train", "killed.yaml", folder=self.base, ranks=4)
        met = running.wait_until(lambda: os.path.isdir(self.path("killed", "checkpoints", "step-00000002")), pause=0.0005)
        running.kill()
        result = running.finish()
        self.assertTrue(met, str(result))
        self.assertNotEqual(result.code, 0, str(result))
        self.assertEqual(states(self.path("killed")), ["step-00000002"])
        third = {"tensor": 1, "pipeline": 3, "context": 2, "expert": 2}
        # The warm-up's context 4 does not fit 6 ranks; it is done and asks for none.
        result = succeed("train", "killed.yaml", *overrides(third, "stages.1.parallelism"), folder=self.base, ranks=6)
        self.assertIn("resuming after step 2 ", result.err)
        self.assert_same_numbers("both", "killed", "killed")

    def test_exports_of_one_state_from_ten_layouts_are_the_same_bytes(self):
        self.write_run("export.yaml", [SPARSE % 2, STILL], run_dir="export", sections=SECTIONS)
        self.train("export.yaml", "export", ONE)
        shutil.rmtree(self.path("export", "checkpoints", "step-00000003"))
        values = {name: digest for name, digest in self.digest("export/checkpoints/step-00000002").items()
                  if "/" not in name and name != "state"}
        self.assertGreater(len(values), 100)
        exports = {}
        for index, layout in enumerate(EXPORT_LAYOUTS):
            directory = f"export-{index}"
            shutil.copytree(self.path("export"), self.path(directory))
            self.train("export.yaml", directory, layout)
            files = [f for f in os.listdir(self.path(directory, "checkpoints", "step-00000003")) if f.endswith(".h5")]
            self.assertEqual(len(files), ranks_of(layout))
            digest = self.digest(f"{directory}/checkpoints/step-00000003")
            self.assertEqual({name: digest[name] for name in values}, values, f"the still step moved values: {layout}")
            for dtype in ("fp8", "bf16"):
                succeed("export", directory, "--to", "hf", "--dtype", dtype, folder=self.base)
                found = tree(self.path("hf"))
                self.assertIn("model.safetensors.index.json", found)
                self.assertEqual(changes(exports.setdefault(dtype, found), found), [], f"{dtype} from {layout}")
                if index == 0:
                    tensors = checkpoint_tensors(self.path("hf"))
                    bias = tensors["model.layers.1.mlp.gate.e_score_correction_bias"][2]
                    self.assertGreater(bias, bytes(len(bias)), "the router's bias never moved")
                shutil.rmtree(self.path("hf"))
            shutil.rmtree(self.path(directory))
        self.assertNotEqual(exports["fp8"], exports["bf16"])

    def test_eval_gives_the_same_numbers_on_every_layout(self):
        def evaluate(layout):
            result = succeed("eval", "sparse.yaml", "--checkpoint", "sparse", "--json", "--steps", "1",
                             *overrides(layout), folder=self.base, ranks=ranks_of(layout))
            return self.flat(json.loads(result.out))

        whole = evaluate(ONE)
        self.assertGreater(len(whole), 40)
        largest = 0.0
        for layout in ({"tensor": 2}, {"pipeline": 2}, {"context": 2}, {"tensor": 2, "pipeline": 2, "expert": 2}):
            found = evaluate(layout)
            self.assertEqual(found.keys(), whole.keys())
            for key, value in whole.items():
                difference = relative_difference(found[key], value)
                largest = max(largest, difference)
                self.assertLessEqual(difference, MOST, f"{layout}, {key}: {found[key]!r}, on one rank {value!r}")
        print(f"\neval: {largest:.1e}", end="", file=sys.stderr)

    def flat(self, value, path=""):
        """{path: number} of nested objects and lists."""
        if isinstance(value, (dict, list)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            return {k: v for key, item in items for k, v in self.flat(item, f"{path}/{key}").items()}
        return {path: value}

    def test_a_layout_that_cannot_be_is_refused_before_anything_is_written(self):
        before = tree(self.base)
        cases = (
            (2, {"tensor": 4}, ("tensor 4 x pipeline 1 x context 1 = 4 does not divide the 2 ranks", "start 4 ranks")),
            (3, {"tensor": 3}, ("parallelism.tensor = 3 does not divide the model's num_attention_heads = 2",)),
            (3, {"context": 3}, ("data.seq_length = 32", "the next that fits is 36")),
            (3, {"expert": 3}, ("parallelism.expert = 3 does not divide the model's n_routed_experts = 8",)),
            (3, {}, ("global_batch_size = 4 is no multiple of micro_batch_size 1 x data 3",)),
            (5, {"pipeline": 5}, ("stage 'sparse'", "layers")),
        )
        state = "checkpoint.resume=sparse/checkpoints/step-00000004"
        for index, (ranks, layout, parts) in enumerate(cases):
            # In the run's own directory; and from a named state into a new one.
            words = [state, "run.dir=new"] if index % 2 else []
            result = run("train", "sparse.yaml", "stages.0.steps=6", *words, *overrides(layout), folder=self.base,
                         ranks=ranks)
            self.assertExit(result, 2, *parts)
            self.assertEqual(changes(before, tree(self.base)), [], str(result))

    def test_a_stage_that_would_lose_trained_indexers_is_refused(self):
        before = set(os.listdir(self.base))
        self.write_run("lost.yaml", [WARMUP % 2, DENSE % 2, SPARSE % 2], run_dir="lost", sections=FP64)
        result = run("train", "lost.yaml", folder=self.base)
        self.assertExit(result, 2, "stage dense", "stage indexer-warmup", "indexers")
        self.assertEqual(set(os.listdir(self.base)) - before, {"lost.yaml"})

    def test_digests_tell_states_apart_and_damage_from_health(self):
        first = self.digest("both/checkpoints/step-00000002")
        last = self.digest("both/checkpoints/step-00000004")
        self.assertRegex(first["state"], r"^[0-9a-f]{32}$")
        self.assertNotEqual(first["state"], last["state"])
        indexer = "model.layers.1.self_attn.indexer.wk.weight"
        for name in (indexer, "adam_m/" + indexer, "adam_v/" + indexer):
            self.assertNotEqual(first[name], last[name])
        self.assertEqual(first, self.digest("both/checkpoints/step-00000002"))
        shutil.copytree(self.path("both"), self.path("broken"))
        path = self.path("broken", "checkpoints", "step-00000004", "rank-00000.h5")
        content = bytearray(harness.read(path, "rb"))
        content[len(content) // 2] ^= 1
        harness.write(path, bytes(content))
        state = "broken/checkpoints/step-00000004"
        result = run("inspect", state, "--digest", folder=self.base)
        self.assertExit(result, 4, "rank-00000.h5", "damaged")
        self.assertNotIn("digest ", result.out)
        self.assertExit(run("inspect", state, "--digest", "--verify", folder=self.base), 2, "not both")
        self.assertExit(run("inspect", "data/train", "--digest", folder=self.base), 4, "holds no training state")
        self.assertExit(run("inspect", "v31", "--digest", folder=self.base), 4, "holds no training state")
        shutil.rmtree(self.path("broken"))


if __name__ == "__main__":
    harness.main()
