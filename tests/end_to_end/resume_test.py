#!/usr/bin/env python3
"""Stop, kill -9 and resume give the bits of an unbroken run, across the hand-over too (2 ranks, fp32).

  resume_test.py BINARY
"""

import glob
import os
import random
import shutil
import signal
import sys
import time

import harness
from harness import SPARSE, WARMUP, Background, manifest, metrics, read, run, states, succeed, write

RANKS = 2
STAGE_STEPS = 6
INTERVAL = 2
LAST = 2 * STAGE_STEPS
SECTIONS = f"checkpoint: {{interval: {INTERVAL}, keep: 3}}\nmetrics: {{indexer_interval: 3}}\nrouter: {{bias_update_speed: 1.0e-3}}"


class Resume(harness.Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.whole = os.path.join(cls.base, "whole")
        cls.write_run(cls, "whole.yaml", [WARMUP % STAGE_STEPS, SPARSE % STAGE_STEPS], run_dir="whole", sections=SECTIONS)
        began = time.monotonic()
        succeed("train", "whole.yaml", folder=cls.base, ranks=RANKS)
        cls.seconds = time.monotonic() - began

    def start(self, name, *overrides):
        return Background("train", "whole.yaml", f"run.dir={name}", *overrides, folder=self.base, ranks=RANKS)

    def finish(self, name):
        return succeed("train", "whole.yaml", f"run.dir={name}", folder=self.base, ranks=RANKS)

    def lines(self, name):
        """Whole lines of metrics.jsonl so far: steps done."""
        path = self.path(name, "metrics.jsonl")
        return read(path).count("\n") if os.path.exists(path) else 0

    def saving(self, name):
        return glob.glob(self.path(name, "checkpoints", "*.tmp.*"))

    def assert_same_bits(self, name):
        """The run is complete, has each step once, and is the unbroken run bit for bit."""
        ours, theirs = metrics(self.path(name)), metrics(self.whole)
        self.assertEqual([record["step"] for record in ours], list(range(1, LAST + 1)))
        for one, other in zip(ours, theirs):
            for key in ("stage", "stage_step", "consumed_tokens", "lr", "lm_loss", "mtp_loss", "balance_loss",
                        "indexer_kl", "indexer_kl_per_layer", "grad_norm_main", "grad_norm_indexer", "expert_load",
                        "topk_mass", "recall_at_k_per_layer"):
                self.assertEqual(one.get(key), other.get(key), f"{name}, step {one['step']}, {key}")
        self.assertEqual(states(self.path(name))[-1], f"step-{LAST:08}")
        for state in set(states(self.path(name))) & set(states(self.whole)):
            ours, theirs = manifest(self.path(name), state), manifest(self.whole, state)
            self.assertGreater(len(theirs["tensors"]), 20)
            for one, other in zip(ours["tensors"], theirs["tensors"]):
                self.assertEqual(one, other, f"{name}, {state}, {one['name']}")  # names, boxes, hashes of the pieces
            self.assertEqual(len(ours["tensors"]), len(theirs["tensors"]))
            self.assertEqual(ours["metadata"], theirs["metadata"])
        self.assertEqual(self.saving(name), [])
        self.assertFalse(os.path.exists(self.path(name, "run.lock")))

    def kill_when(self, name, condition):
        """Runs until `condition`, kills everything, and says how far it had come: (steps, newest state)."""
        running = self.start(name)
        met = running.wait_until(condition, pause=0.0005)
        running.kill()
        result = running.finish()
        self.assertTrue(met, f"the run was over too soon\n{result}")
        self.assertNotEqual(result.code, 0, str(result))
        newest = int(states(self.path(name))[-1][5:]) if states(self.path(name)) else 0
        return self.lines(name), newest

    def resumed_from(self, result):
        before, found, after = result.err.partition("resuming after step ")
        return int(after.split()[0]) if found else 0

    def test_the_unbroken_run_saves_values_and_moments(self):
        names = {tensor["name"] for tensor in manifest(self.whole)["tensors"]}
        for prefix in ("", "adam_m/", "adam_v/"):
            self.assertIn(prefix + "model.layers.1.mlp.experts.3.up_proj.weight", names)
            self.assertIn(prefix + "model.layers.3.self_attn.indexer.wk.weight", names)
        self.assertIn("model.layers.1.mlp.gate.e_score_correction_bias", names)
        # The comparison sees a difference: two states of the run have other hashes.
        earlier = manifest(self.whole, f"step-{LAST - INTERVAL:08}")
        self.assertNotEqual(earlier["tensors"], manifest(self.whole)["tensors"])

    def test_killed_four_times_and_restarted_by_the_same_command(self):
        name = "killed"
        done, newest = self.kill_when(name, lambda: self.lines(name) >= 3)
        self.assertGreaterEqual(done, 3)
        self.assertLessEqual(done - newest, INTERVAL)
        # While a state is written: its temporary directory is there.
        self.kill_when(name, lambda: any(".tmp." in path and int(path.split("step-")[1][:8]) > newest
                                         for path in self.saving(name)))
        # Right at the hand-over: the last state of the warm-up is published, no step of the sparse stage is done.
        handover = self.path(name, "checkpoints", f"step-{STAGE_STEPS:08}")
        done, newest = self.kill_when(name, lambda: os.path.isdir(handover))
        self.assertEqual(newest, STAGE_STEPS)
        self.assertLess(done, STAGE_STEPS + 2)
        # In the sparse stage: no more than INTERVAL steps are lost.
        done, newest = self.kill_when(name, lambda: self.lines(name) >= STAGE_STEPS + 3)
        self.assertGreaterEqual(newest, STAGE_STEPS)
        result = self.finish(name)
        self.assertEqual(self.resumed_from(result), newest)
        self.assertLessEqual(done - newest, INTERVAL)
        self.assert_same_bits(name)

    def test_killed_at_random_moments(self):
        name = "random"
        draw = random.Random(20)
        kills, whole = 0, self.seconds
        while kills < 8:
            running = self.start(name)
            # Of the first run a part is always left: a restart has less to do, and may end before its moment.
            time.sleep(draw.uniform(0.2, 0.6) * whole)
            if not running.running():
                self.assertEqual(running.finish().code, 0)
                if kills or whole < 0.1:
                    break
                whole /= 2  # the unbroken run was timed on a busier machine
                shutil.rmtree(self.path(name))
                continue
            running.kill()
            running.finish()
            kills += 1
        self.assertGreater(kills, 0)
        print(f"\nkilled {kills} times at random moments", file=sys.stderr)
        self.finish(name)
        self.assert_same_bits(name)

    def test_killed_while_saving_leaves_a_state_that_is_whole(self):
        name = "saving"
        interrupted = 0
        for _ in range(6):
            running = self.start(name)
            seen = set(self.saving(name))
            if not running.wait_until(lambda: set(self.saving(name)) - seen, pause=0.0002):
                running.finish()
                break
            running.kill()
            running.finish()
            interrupted += bool(self.saving(name))
            for state in states(self.path(name)):
                self.assertExit(run("inspect", f"{name}/checkpoints/{state}", "--verify", folder=self.base), 0)
        self.assertGreater(interrupted, 0, "no save was interrupted")
        print(f"\n{interrupted} saves were interrupted", file=sys.stderr)
        self.finish(name)
        self.assert_same_bits(name)

    def test_one_dead_rank_ends_the_others_and_the_run_goes_on(self):
        name = "rank"
        running = self.start(name)
        self.assertTrue(running.wait_until(lambda: self.lines(name) >= 3))
        ranks = [pid for pid in harness.descendants(running.process.pid) if self.is_rank(pid)]
        self.assertEqual(len(ranks), RANKS)
        os.kill(ranks[-1], signal.SIGKILL)
        start = time.monotonic()
        self.assertNotEqual(running.finish(30).code, 0)
        self.assertLess(time.monotonic() - start, 10)
        self.finish(name)
        self.assert_same_bits(name)

    def is_rank(self, pid):
        try:
            return os.path.samefile(f"/proc/{pid}/exe", harness.BINARY)
        except OSError:
            return False

    def stop(self, name, steps):
        """SIGUSR1 to mpirun once `steps` are done: a checkpoint of the step in hand, exit code 75."""
        running = self.start(name)
        self.assertTrue(running.wait_until(lambda: self.lines(name) >= steps))
        os.kill(running.process.pid, signal.SIGUSR1)
        result = running.finish()
        self.assertExit(result, 75, "preempted after step", "start the same command again")
        newest = int(states(self.path(name))[-1][5:])
        self.assertEqual(self.lines(name), newest)  # nothing is lost
        self.assertGreaterEqual(newest, steps)
        self.assertFalse(os.path.exists(self.path(name, "run.lock")))
        return newest

    def test_stopped_by_a_signal_in_each_stage(self):
        name = "stopped"
        step = self.stop(name, 1)
        self.assertLess(step, STAGE_STEPS)
        # A state of the warm-up has the indexers alone; the rest is named by its source.
        saved = manifest(self.path(name))
        for tensor in saved["tensors"]:
            self.assertIn(".indexer.", tensor["name"])
        (source,) = saved["metadata"]["sources"]
        self.assertEqual(source["path"], "v31")
        self.assertRegex(source["hash"], r"^[0-9a-f]{32}\+[0-9a-f]{32}$")  # headers, data
        self.assertIn("model.layers.1.mlp.experts.3.up_proj.weight", source["tensors"])
        self.assertFalse([frozen for frozen in source["tensors"] if ".indexer." in frozen])
        step = self.stop(name, STAGE_STEPS + 1)
        self.assertGreater(step, STAGE_STEPS)
        self.assertLess(step, LAST)
        # All trains now: nothing is left to a source.
        self.assertEqual([source["tensors"] for source in manifest(self.path(name))["metadata"]["sources"]], [])
        self.assertEqual(self.resumed_from(self.finish(name)), step)
        self.assert_same_bits(name)

    def test_stopped_by_a_signal_that_the_launcher_had_blocked(self):
        """A process inherits what its parent blocks; left so, the run would never hear of its end."""
        name = "blocked"
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        try:
            running = Background("train", "whole.yaml", f"run.dir={name}", folder=self.base)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.assertTrue(running.wait_until(lambda: self.lines(name) >= 1))
        os.kill(running.process.pid, signal.SIGUSR1)
        self.assertExit(running.finish(), 75, "preempted after step")
        self.assertEqual(self.lines(name), int(states(self.path(name))[-1][5:]))

    def test_a_damaged_state_is_set_aside_and_the_one_before_is_taken(self):
        name = "damaged"
        shutil.copytree(self.whole, self.path(name))
        shutil.rmtree(self.path(name, "checkpoints", f"step-{LAST:08}"))
        newest = states(self.path(name))[-1]
        file = self.path(name, "checkpoints", newest, "rank-00001.h5")
        content = bytearray(read(file, "rb"))
        content[len(content) // 2] ^= 1
        write(file, bytes(content))
        result = self.finish(name)
        self.assertEqual(self.resumed_from(result), LAST - 2 * INTERVAL)
        for part in ("damaged", "rank-00001.h5", newest + ".corrupt"):
            self.assertIn(part, result.err)
        self.assertTrue(os.path.isdir(self.path(name, "checkpoints", newest + ".corrupt")))
        shutil.rmtree(self.path(name, "checkpoints", newest + ".corrupt"))
        self.assert_same_bits(name)

    def test_a_torn_line_of_metrics_is_cut(self):
        name = "torn"
        shutil.copytree(self.whole, self.path(name))
        shutil.rmtree(self.path(name, "checkpoints", f"step-{LAST:08}"))
        text = read(self.path(name, "metrics.jsonl"))
        write(self.path(name, "metrics.jsonl"), text + text[:50])
        self.finish(name)
        self.assert_same_bits(name)


if __name__ == "__main__":
    harness.main()
