#!/usr/bin/env python3
"""Broken inputs at the command line: each is refused within 5 s by exit code 2 or 4 and a message that names file,
place, found and expected; nothing is written, nothing crashes.

  broken_inputs_test.py BINARY
"""

import collections
import concurrent.futures
import os
import re
import shutil
import sys

import harness
from broken_checkpoints import CASES as CHECKPOINTS
from broken_data import CASES as DATA
from broken_run_files import CASES as RUN_FILES, RUN_FILE
from harness import changes, run, succeed, tree, write

MOST_SECONDS = 5
LEAST_CASES = {"run file": 20, "safetensors": 10, "index.json": 6, "config.json": 8, "token file": 8,
               "training state": 8}
CRASH = re.compile(r"Segmentation|terminate called|Aborted|CHECK failed|Sanitizer|runtime error|core dumped")


class BrokenInputs(harness.Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        write(os.path.join(cls.base, "run.yaml"), RUN_FILE)
        shutil.rmtree(os.path.join(cls.base, "text"))
        succeed("export", "v31", "--to", "sharded", "--format", "v3.1", "--shard-bytes", "60000", folder=cls.base)
        succeed("train", "run.yaml", "stages.0.steps=4", folder=cls.base)
        os.rename(os.path.join(cls.base, "run"), os.path.join(cls.base, "kept-run"))

    def broken_copy(self, case, number):
        folder = self.path(f"case-{number:03}")
        inputs = ["model.yaml", "v31", "sharded", "data", "run.yaml"]
        os.mkdir(folder)
        for name in inputs:
            copy = shutil.copytree if os.path.isdir(self.path(name)) else shutil.copy
            copy(self.path(name), os.path.join(folder, name))
        if case["kind"] == "training state":
            shutil.copytree(self.path("kept-run"), os.path.join(folder, "run"))
        case["break"](folder)
        return folder

    def faults(self, case, number):
        """What a case does other than it should, as lines."""
        folder = self.broken_copy(case, number)
        before = tree(folder)
        result = run(*case["words"], folder=folder, ranks=case.get("ranks", 0), timeout=60)
        faults = changes(before, tree(folder))
        if result.code != case["code"]:
            faults.append(f"exit code {result.code}, expected {case['code']}")
        if result.seconds > MOST_SECONDS:
            faults.append(f"took {result.seconds:.1f} s")
        if CRASH.search(result.err):
            faults.append("crashed")
        faults += [f"the message does not say {part!r}" for part in case["parts"] if part not in result.err]
        shutil.rmtree(folder)
        return faults, result

    def test_each_is_refused_with_a_message_and_nothing_written(self):
        cases = RUN_FILES + CHECKPOINTS + DATA
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            outcomes = list(pool.map(self.faults, cases, range(len(cases))))
        passed, slowest = collections.Counter(), collections.Counter()
        text = []
        for case, (faults, result) in zip(cases, outcomes):
            kind = case["kind"]
            passed[kind] += not faults
            slowest[kind] = max(slowest[kind], result.seconds)
            if faults:
                text.append(f"{kind}: {case['name']}\n  " + "\n  ".join(faults) + f"\n{result}")
        count = collections.Counter(case["kind"] for case in cases)
        print(f"\n{'kind':16} {'refused':>9} {'slowest':>9}", file=sys.stderr)
        for kind in LEAST_CASES:
            print(f"{kind:16} {passed[kind]:4}/{count[kind]:<4} {slowest[kind]:7.2f} s", file=sys.stderr)
        print(f"{'all':16} {passed.total():4}/{len(cases):<4}", file=sys.stderr)
        self.assertEqual(text, [], "\n" + "\n".join(text))
        for kind, least in LEAST_CASES.items():
            self.assertGreaterEqual(count[kind], least, kind)

    def test_the_inputs_are_good_before_they_are_broken(self):
        for words in (["train", "run.yaml", "--dry-run"],
                      ["train", "run.yaml", "model.checkpoint=sharded", "--dry-run"],
                      ["inspect", "v31", "--verify"], ["inspect", "sharded", "--verify"],
                      ["inspect", "data/train", "--verify"], ["inspect", "kept-run", "--verify"]):
            self.assertExit(run(*words, folder=self.base), 0)

    def test_a_case_without_a_fault_is_found_out(self):
        harmless = {"kind": "run file", "name": "harmless", "break": lambda folder: None, "code": 2,
                    "words": ["train", "run.yaml"], "parts": ["some message"]}
        faults, _ = self.faults(harmless, 999)
        self.assertIn("exit code 0, expected 2", faults)
        self.assertIn("the message does not say 'some message'", faults)
        self.assertIn("new: run/checkpoints", faults)

    def test_a_token_outside_the_vocabulary_ends_training_where_it_is_met(self):
        # Training reads what it needs, no more: only --dry-run and inspect look at all tokens before.
        shutil.copytree(self.path("data"), self.path("bad-data"))
        data = bytearray(harness.read(self.path("bad-data", "train.bin"), "rb"))
        data[0::20] = b"\x08" * len(data[0::20])
        data[1::20] = b"\x01" * len(data[1::20])
        write(self.path("bad-data", "train.bin"), bytes(data))
        result = run("train", "run.yaml", "run.dir=bad-run", "data.train=[{path: bad-data/train}]", folder=self.base)
        self.assertExit(result, 4, "bad-data/train", "264")
        self.assertLess(result.seconds, MOST_SECONDS)
        self.assertFalse(os.path.exists(self.path("bad-run", "run.lock")))
        self.assertEqual(os.listdir(self.path("bad-run", "checkpoints")), [])

    def with_bytes(self, name, tensor, offset, content):
        """A copy of the checkpoint in which `content` stands at this offset of a tensor's data."""
        shutil.copytree(self.path("v31"), self.path(name))
        shard = self.path(name, "model-00001-of-00001.safetensors")
        file = harness.Safetensors(shard)
        begin = file.header[tensor]["data_offsets"][0] + offset
        file.data = file.data[:begin] + content + file.data[begin + len(content):]
        write(shard, file.with_header())

    def test_a_weight_that_is_not_finite_ends_loading_at_its_tensor(self):
        # Bytes of FP8, bf16 or fp32 in row 3: NaN and infinity look alike to a loss, not to a reader of weights.
        norm, expert = "model.norm.weight", "model.layers.1.mlp.experts.5.up_proj.weight"
        header = harness.Safetensors(self.path("v31", "model-00001-of-00001.safetensors")).header
        self.assertEqual((header[norm]["dtype"], header[expert]["dtype"]), ("F32", "F8_E4M3"))
        columns = header[expert]["shape"][1]
        self.with_bytes("nan-norm", norm, 4 * 3, b"\x00\x00\xc0\x7f")
        self.with_bytes("infinite-norm", norm, 4 * 3, b"\x00\x00\x80\xff")
        self.with_bytes("nan-expert", expert, 3 * columns + 7, b"\x7f")
        for name, place, value, count in (("nan-norm", f"{norm}[3]", "nan", "1 NaN"),
                                          ("infinite-norm", f"{norm}[3]", "-inf", "1 infinit"),
                                          ("nan-expert", f"{expert}[3, 7]", "nan", "1 NaN")):
            said = f"{name}/model-00001-of-00001.safetensors: {place} is {value}: expected finite weights"
            model = f"model.checkpoint={name}"
            for words in (["train", "run.yaml", f"run.dir={name}-run", model],
                          ["eval", "run.yaml", model, "data.validation=[{path: data/validation}]"]):
                for ranks in ((0, 2) if name == "nan-expert" else (0,)):
                    result = run(*words, folder=self.base, ranks=ranks)
                    self.assertExit(result, 4, said, "baleen inspect --verify")
                    self.assertLess(result.seconds, MOST_SECONDS)
            self.assertFalse(os.path.exists(self.path(f"{name}-run", "run.lock")))
            # The dry run reads names and sizes, no weights, and does not say that it had.
            dry = run("train", "run.yaml", f"run.dir={name}-dry", model, "--dry-run", folder=self.base)
            self.assertExit(dry, 0)
            self.assertExit(run("inspect", name, folder=self.base), 0, "complete")
            self.assertExit(run("inspect", name, "--verify", folder=self.base), 4, count, place.split("[")[0])

    def run_beside(self, variables, *words):
        """run() as a launcher of another MPI starts it: with ranks in the environment, in a world of one."""
        os.environ.update(variables)
        try:
            return run(*words, folder=self.base)
        finally:
            for name in variables:
                del os.environ[name]

    def test_ranks_that_mpi_does_not_see_are_no_runs_of_their_own(self):
        hydra = {"PMI_SIZE": "4", "PMI_RANK": "2"}
        for variables, words in ((hydra, ["train", "run.yaml", "run.dir=lone"]),
                                 ({"SLURM_STEP_NUM_TASKS": "4"}, ["train", "run.yaml", "run.dir=lone"]),
                                 (hydra, ["export", "v31", "--to", "lone", "--format", "v3.1"]),
                                 (hydra, ["init", "model.yaml", "--to", "lone"])):
            result = self.run_beside(variables, *words)
            self.assertExit(result, 3, f"the launcher started 4 processes ({next(iter(variables))}), but MPI sees one",
                            "mpirun")
            self.assertFalse(os.path.exists(self.path("lone")))
        alone = self.run_beside({"PMI_SIZE": "1", "PMI_RANK": "0"}, "train", "run.yaml", "run.dir=lone", "--dry-run")
        self.assertExit(alone, 0)


if __name__ == "__main__":
    harness.main()
