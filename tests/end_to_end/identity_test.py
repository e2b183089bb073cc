#!/usr/bin/env python3
"""What a run takes for its own when it goes on: its model, its data, its run file; and what it says of changes.

  identity_test.py BINARY
"""

import json
import os
import re
import shutil
import signal

import harness
from harness import DENSE, SPARSE, WARMUP, Background, changes, manifest, metrics, read, run, states, succeed, tree, write


class Identity(harness.Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.write_run(cls, "run.yaml", [WARMUP % 2, SPARSE % 2])
        succeed("train", "run.yaml", "stages.1.steps=1", folder=cls.base)

    def copy(self, name):
        """A folder of its own with all inputs and the run, after three of its four steps."""
        folder = self.path("of-" + name)
        shutil.copytree(self.base, folder, ignore=shutil.ignore_patterns("of-*"))
        return folder

    def at_the_hand_over(self, name):
        folder = self.copy(name)
        shutil.rmtree(os.path.join(folder, "run/checkpoints/step-00000003"))
        return folder

    def test_other_weights_of_the_same_shapes_are_another_source(self):
        folder = self.at_the_hand_over("weights")
        shutil.rmtree(os.path.join(folder, "v31"))
        succeed("init", "model.yaml", "--to", "v31", "--dtype", "fp8", "--seed", "99", folder=folder)
        before = tree(folder)
        for words in (["train", "run.yaml"], ["export", "run", "--to", "out"], ["eval", "run.yaml", "--checkpoint", "run"]):
            self.assertExit(run(*words, folder=folder), 4, "v31: changed since the state was saved", "frozen tensors")
        self.assertEqual(changes(before, tree(folder)), [])

    def test_a_state_that_knows_its_source_by_headers_alone_goes_on_with_a_warning(self):
        folder = self.at_the_hand_over("headers")
        state = os.path.join(folder, "run/checkpoints/step-00000002")
        path = os.path.join(state, "manifest.json")
        text, cut = re.subn(r'"([0-9a-f]{32})\+[0-9a-f]{32}"', r'"\1"', read(path))
        self.assertEqual(cut, 1)
        write(path, text)
        said = run("inspect", state, folder=folder)  # the message about the wrong hash says what it should be
        right = re.search(r"hash to ([0-9a-f]{32})", said.err + said.out).group(1)
        write(path, text.replace(json.loads(text)["hash"], right))
        self.assertExit(run("train", "run.yaml", folder=folder), 0, "by config, index and headers alone", "done: 4 steps")

    def test_eval_refuses_the_frozen_weights_of_another_model(self):
        folder = self.at_the_hand_over("eval")
        succeed("init", "model.yaml", "--to", "other", "--dtype", "fp8", "--seed", "8", folder=folder)
        result = run("eval", "run.yaml", "--checkpoint", "run", "model.checkpoint=other", folder=folder)
        self.assertExit(result, 4, "v31: not the run file's model, which is other: set model.checkpoint to v31")

    def test_token_files_that_hold_something_else_are_refused(self):
        folder = self.copy("tokens")
        files = [f"text/{i:02}.txt" for i in range(2, 7)]
        build = ["data", "build", *files, "--to", "data/train", "--tokenizer", "bytes", "--append-eod"]
        before = tree(folder)
        self.assertExit(run(*build, folder=folder), 2, "data/train.bin exists", "remove", "--to")
        self.assertEqual(changes(before, tree(folder)), [])
        for suffix in ("bin", "idx", "json"):
            os.remove(os.path.join(folder, f"data/train.{suffix}"))
        succeed(*build, folder=folder)
        result = run("train", "run.yaml", folder=folder)
        self.assertExit(result, 4, "stages.1.data.train (what the files hold)", "the state has 10 documents",
                        "the run file 5 documents")
        # The files of a stage that is over may go; nobody forgets what they were.
        folder = self.copy("stages")
        saved = manifest(os.path.join(folder, "run"))["metadata"]["extra"]
        for suffix in ("bin", "idx"):
            shutil.move(os.path.join(folder, f"data/train.{suffix}"), os.path.join(folder, f"data/moved.{suffix}"))
            shutil.copy(os.path.join(folder, f"data/moved.{suffix}"), os.path.join(folder, f"data/sparse.{suffix}"))
        self.assertExit(run("train", "run.yaml", folder=folder), 4, "data/train: no token file of this name")
        shutil.copytree(self.path("data"), os.path.join(folder, "data"), dirs_exist_ok=True)
        succeed("train", "run.yaml", folder=folder)
        self.assertEqual({**manifest(os.path.join(folder, "run"))["metadata"]["extra"]}, saved)

    def test_a_resume_says_which_keys_changed(self):
        folder = self.copy("changed")
        result = succeed("train", "run.yaml", "losses.mtp=0.5", "stages.1.optimizer.lr=2e-3", folder=folder)
        for line in ("losses.mtp 0.1 -> 0.5", "stages.1.optimizer.lr 0.001 -> 0.002", "stages.1.steps 1 -> 2"):
            self.assertIn("changed since the last start: " + line, result.err)
        self.assertEqual(result.err.count("changed since"), 3, str(result))
        # A start like the one before says nothing.
        again = succeed("train", "run.yaml", "losses.mtp=0.5", "stages.1.optimizer.lr=2e-3", folder=folder)
        self.assertNotIn("changed since", again.err)
        for override, part in (("dsa.hadamard=true", "stages.1.dsa.hadamard: the state has false, the run file true"),
                               ("data.first_sample=4", "stages.0.data.first_sample: the state has 0, the run file 4")):
            self.assertExit(run("train", "run.yaml", override, folder=folder), 4, part)

    def test_a_control_reads_the_samples_of_the_stage_it_stands_beside(self):
        # All keys are selected, so the sparse stage's first step is a step of dense attention.
        every_key = ["dsa.index_topk=32", "router.bias_update_speed=0", "stages.1.steps=3"]
        succeed("train", "run.yaml", "run.dir=beside", *every_key, folder=self.base)
        self.write_run("control.yaml", [DENSE % 1])
        losses = {}
        for first in (0, 8):  # the warm-up takes 2 steps of 4
            succeed("train", "control.yaml", f"run.dir=control{first}", f"data.first_sample={first}", folder=self.base)
            losses[first] = metrics(self.path(f"control{first}"))[0]["lm_loss"]
        beside = [record["lm_loss"] for record in metrics(self.path("beside")) if record["stage"] == "sparse"]
        self.assertLess(harness.relative_difference(losses[8], beside[0]), 1e-5)
        self.assertGreater(harness.relative_difference(losses[0], beside[0]), 1e-4)

    def test_a_run_file_that_is_the_run_directorys_own_is_kept(self):
        os.makedirs(self.path("own"))
        text = "# A comment that nobody would write again.\n" + harness.run_yaml([DENSE % 1], run_dir="own")
        write(self.path("own/run.yaml"), text)
        succeed("train", "own/run.yaml", folder=self.base)
        self.assertEqual(read(self.path("own/run.yaml.given")), text)
        self.assertNotIn("A comment", read(self.path("own/run.yaml")))
        # The second start finds the effective values there: the first text stays.
        succeed("train", "own/run.yaml", "stages.0.steps=2", folder=self.base)
        self.assertEqual(read(self.path("own/run.yaml.given")), text)

    def test_a_job_id_of_any_letters_names_a_state(self):
        os.environ["SLURM_JOB_ID"] = "x;rm -rf /../" + "y" * 300
        try:
            self.assertExit(run("train", "run.yaml", "run.dir=job", folder=self.base), 0, "done:")
        finally:
            del os.environ["SLURM_JOB_ID"]
        self.assertTrue(states(self.path("job")))

    def test_the_signal_while_mpi_starts_is_remembered(self):
        running = Background("train", "run.yaml", "run.dir=early", "stages.1.steps=2000", folder=self.base)
        # MPI's threads are the first; the run file is not read before them.
        self.assertTrue(running.wait_until(lambda: self.threads(running.process.pid) > 1, pause=0.0002))
        os.kill(running.process.pid, signal.SIGUSR1)
        self.assertExit(running.finish(), 75, "preempted after step 1;")

    def threads(self, pid):
        try:
            return len(os.listdir(f"/proc/{pid}/task"))
        except OSError:
            return 0

    def test_another_signal_than_the_run_files_still_kills(self):
        running = Background("train", "run.yaml", "run.dir=other", "stages.1.steps=2000", "checkpoint.signal=USR2",
                             folder=self.base)
        self.assertTrue(running.wait_until(lambda: self.threads(running.process.pid) > 1, pause=0.0002))
        os.kill(running.process.pid, signal.SIGUSR1)
        self.assertEqual(running.finish().code, -signal.SIGUSR1)

    def test_messages_say_where_a_model_or_a_state_was_looked_for(self):
        folder = self.at_the_hand_over("messages")
        os.rename(os.path.join(folder, "v31"), os.path.join(folder, "moved"))
        self.assertExit(run("export", "run", "--to", "out", folder=folder), 4, "the model of run/run.yaml", folder,
                        "v31: expected a directory", "symbolic link")
        os.symlink("moved", os.path.join(folder, "v31"))
        succeed("export", "run", "--to", "out", folder=folder)
        for path in ("run", "Auto"):
            self.assertExit(run("train", "run.yaml", f"checkpoint.resume={path}", folder=folder), 4, path,
                            "auto, never or the path of one state: RUN/checkpoints/step-XXXXXXXX")


if __name__ == "__main__":
    harness.main()
