#!/usr/bin/env python3
"""`baleen export` and `baleen init` under mpirun: the same bytes from any number of ranks and from states that any number
of ranks saved; one error and nothing left when a rank fails; no MPI without a launcher.

  parallel_export_test.py BINARY
"""

import contextlib
import os
import shutil
import subprocess

import harness
from harness import SPARSE, WARMUP, changes, read, run, succeed, tree, write

RANKS = (1, 2, 3, 4, 8)
# An optimizer step that moves no weight: the state holds every parameter, as saved by that step's ranks.
STILL = SPARSE.replace("name: sparse", "name: still").replace("1.0e-3", "1.0e-30") % 1
LAST = "step-00000005"
# 4 tensors of 10 MB, so that a limit on file sizes that MPI's own files pass stops a rank in the middle.
WIDE = {"vocab_size: 264": "vocab_size: 20000", "hidden_size: 32": "hidden_size: 256"}


@contextlib.contextmanager
def environment(**variables):
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_script(script, *words, folder, ranks):
    """A command under mpirun, each rank through a shell script that ends with `exec "$@"`."""
    command = [harness.ROOT + "/launch/mpirun.sh", "-np", str(ranks), "sh", "-c", script, "sh", harness.BINARY, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    return harness.Result(words, done.returncode, done.stdout, done.stderr, 0)


class ParallelExport(harness.Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        write(os.path.join(cls.base, "run.yaml"), harness.run_yaml([WARMUP % 2, SPARSE % 2, STILL]))
        succeed("train", "run.yaml", "checkpoint.interval=1", "checkpoint.keep=2", folder=cls.base)
        # The last, still step once more on 1, 2 and 4 ranks, from the state before it.
        shutil.rmtree(os.path.join(cls.base, "run", "checkpoints", LAST))
        for ranks in (1, 2, 4):
            shutil.copytree(os.path.join(cls.base, "run"), os.path.join(cls.base, f"run-{ranks}"))
            succeed("train", "run.yaml", f"run.dir=run-{ranks}", folder=cls.base, ranks=ranks)

    def export_tree(self, *words, ranks, to):
        result = succeed(*words, "--to", to, folder=self.base, ranks=ranks)
        self.assertEqual(result.out.count("wrote "), 1, str(result))
        found = tree(self.path(to))
        shutil.rmtree(self.path(to))
        return found

    def check_ranks(self, *words):
        alone = self.export_tree(*words, ranks=0, to="alone")
        self.assertIn("model.safetensors.index.json", alone)
        for ranks in RANKS:
            self.assertEqual(changes(alone, self.export_tree(*words, ranks=ranks, to="shared")), [], f"{ranks} ranks")
        return alone

    def test_a_checkpoint_is_the_same_from_any_number_of_ranks(self):
        self.check_ranks("export", "v31", "--format", "v3.2")
        shards = self.check_ranks("export", "v31", "--dtype", "bf16", "--shard-bytes", "30000")
        self.assertGreater(len(shards), 5)

    def test_states_of_any_number_of_ranks_give_the_same_bytes_on_any_number(self):
        one = self.check_ranks("export", "run-1")
        self.assertEqual(changes(one, self.export_tree("export", "run", ranks=0, to="before")), [])
        for saved in (2, 4):
            files = [name for name in os.listdir(self.path(f"run-{saved}", "checkpoints", LAST))
                     if name.endswith(".h5")]
            self.assertEqual(len(files), saved)
            for ranks in (0, 3, 8):
                found = self.export_tree("export", f"run-{saved}", ranks=ranks, to="shared")
                self.assertEqual(changes(one, found), [], f"saved by {saved}, exported by {ranks}")

    def test_init_is_the_same_from_any_number_of_ranks(self):
        self.assertEqual(self.check_ranks("init", "model.yaml", "--seed", "7"), tree(self.path("v31")))

    def assert_fails_once(self, result, code, text):
        """All ranks end with one error, said once, and the folder is as it was."""
        self.assertEqual(result.code, code, str(result))
        self.assertEqual(result.err.count(text), 1, str(result))
        self.assertEqual(result.err.count("ERROR") + result.err.count("error:"), 1, str(result))
        self.assertNotIn("wrote", result.out)
        self.assertEqual(changes(self.before, tree(self.base)), [])

    def test_a_target_that_exists_is_refused_once(self):
        os.makedirs(self.path("full", "mine"))
        self.before = tree(self.base)
        for words in (["export", "run-2"], ["export", "v31"], ["init", "model.yaml"]):
            self.assert_fails_once(run(*words, "--to", "full", folder=self.base, ranks=3), 2,
                                   "rank 0: full: exists and is not an empty directory")

    def test_bad_words_are_refused_once(self):
        self.before = tree(self.base)
        self.assert_fails_once(run("export", "v31", folder=self.base, ranks=3), 2, "--to DIR is missing")
        self.assert_fails_once(run("export", "nowhere", "--to", "out", folder=self.base, ranks=3), 4, "nowhere: found")

    def test_a_full_disk_is_found_before_the_work(self):
        # A limit on file sizes stands for a full disk; rank 0 reserves the space of every file.
        self.make_wide()
        self.before = tree(self.base)
        limit = 'if [ "$OMPI_COMM_WORLD_RANK" = 0 ]; then trap "" XFSZ; ulimit -f 32768; fi; exec "$@"'
        self.assert_fails_once(run_script(limit, "export", "wide", "--to", "out", folder=self.base, ranks=3), 3,
                               "model-00001-of-00001.safetensors: cannot reserve")

    def test_a_rank_that_fails_in_the_middle_stops_all(self):
        self.make_wide()
        self.before = tree(self.base)
        limit = 'if [ "$OMPI_COMM_WORLD_RANK" = 1 ]; then trap "" XFSZ; ulimit -f 32768; fi; exec "$@"'
        for words in (["export", "wide"], ["export", "wide", "--dtype", "bf16"], ["init", "wide.yaml"]):
            result = run_script(limit, *words, "--to", "out", folder=self.base, ranks=3)
            self.assert_fails_once(result, 3, "File too large")
            self.assertIn("rank 1: out.tmp.", result.err)

    def make_wide(self):
        if os.path.exists(self.path("wide")):
            return
        text = harness.TINY_MODEL
        for old, new in WIDE.items():
            text = text.replace(old, new)
        write(self.path("wide.yaml"), text)
        succeed("init", "wide.yaml", "--to", "wide", folder=self.base, ranks=2)
        self.assertGreater(os.path.getsize(self.path("wide", "model-00001-of-00001.safetensors")), 32 << 20)

    def test_a_damaged_state_file_is_named_once(self):
        shutil.copytree(self.path("run-4"), self.path("damaged"))
        file = self.path("damaged", "checkpoints", LAST, "rank-00002.h5")
        content = bytearray(read(file, "rb"))
        content[len(content) // 2] ^= 1
        write(file, bytes(content))
        self.before = tree(self.base)
        for ranks in (2, 3, 8):
            self.assert_fails_once(run("export", "damaged", "--to", "out", folder=self.base, ranks=ranks), 4,
                                   "rank-00002.h5: the contents changed since they were written")
        shutil.rmtree(self.path("damaged"))

    def test_without_a_launcher_no_mpi_is_needed(self):
        with environment(OMPI_MCA_pml="there-is-no-such-thing"):
            alone = self.export_tree("export", "run-4", ranks=0, to="alone")
            self.assertNotEqual(run("train", "run.yaml", folder=self.base).code, 0)
            # srun without PMI: one export per task would be wrong.
            with environment(SLURM_STEP_NUM_TASKS="2"):
                self.assertNotEqual(run("export", "run-4", "--to", "none", folder=self.base).code, 0)
        self.assertFalse(os.path.exists(self.path("none")))
        self.assertEqual(changes(alone, self.export_tree("export", "run-4", ranks=2, to="shared")), [])


if __name__ == "__main__":
    harness.main()
