#!/usr/bin/env python3
"""The scripts of launch/ and the menu: they parse, answer --help, and do what their first lines say."""

import glob
import json
import os
import re
import shutil
import subprocess
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SCRIPTS = sorted(glob.glob(ROOT + "/launch/*.sh") + [ROOT + "/launch/slurm.sbatch", ROOT + "/.ci/run"])


def run(*words, **options):
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


class Scripts(unittest.TestCase):
    def test_every_script_parses(self):
        for script in SCRIPTS:
            self.assertEqual(run("bash", "-n", script).stderr, "", script)

    def test_every_script_stops_at_errors(self):
        for script in SCRIPTS:
            if os.path.basename(script) != "lib.sh":
                with open(script, encoding="utf-8") as file:
                    self.assertRegex(file.read(), r"(?m)^set -(eu|u)o pipefail$", script)

    def test_help_is_the_comment_at_the_top(self):
        for name in ("setup", "build", "test", "compare_runs", "bundle", "gpu_tests", "bench_ops", "bench_proxies"):
            answer = run("bash", f"launch/{name}.sh", "--help")
            self.assertEqual(answer.returncode, 0, answer.stderr)
            self.assertIn(f"launch/{name}.sh", answer.stdout)
            self.assertNotIn("set -euo", answer.stdout)

    def test_unknown_words_exit_2(self):
        self.assertEqual(run("bash", "launch/setup.sh", "--nonsense").returncode, 2)
        self.assertEqual(run("bash", "launch/build.sh", "--nonsense").returncode, 2)
        self.assertEqual(run("bash", "launch/test.sh", "--label", "nonsense").returncode, 2)
        self.assertEqual(run("bash", "launch/bundle.sh", "--nonsense").returncode, 2)
        self.assertEqual(run("bash", "launch/bundle.sh", "configs").returncode, 2)  # not a bundle: stays
        self.assertEqual(run("bash", "launch/gpu_tests.sh", "--sanitize", "nonsense").returncode, 2)


class Benches(unittest.TestCase):
    """The scripts that measure, with a false binary."""

    SCRIPTS = {"bench_ops": "memory", "bench_proxies": "step8"}

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.binary = os.path.join(self.folder, "baleen")

    def bench(self, script, *words, exit_code=0):
        with open(self.binary, "w", encoding="utf-8") as file:
            file.write(f"#!/bin/sh\necho \"$@\"\nexit {exit_code}\n")
        os.chmod(self.binary, 0o755)
        return run("bash", f"launch/{script}.sh", *words, env={**os.environ, "BALEEN": self.binary})

    def test_a_folder_and_known_words_are_wanted(self):
        for script in self.SCRIPTS:
            for words in ((), ("--nonsense",), (self.folder, "nonsense")):
                answer = self.bench(script, *words)
                self.assertEqual(answer.returncode, 2, words)
                self.assertIn(f"launch/{script}.sh --help", answer.stderr)

    def test_each_run_leaves_what_it_printed_in_the_folder(self):
        for script, word in self.SCRIPTS.items():
            results = os.path.join(self.folder, script)
            self.assertEqual(self.bench(script, results, word).returncode, 0)
            (printed,) = glob.glob(os.path.join(results, word + ".*"))
            with open(printed, encoding="utf-8") as file:
                self.assertRegex(file.read(), rf"^bench \w+ configs/run/.* --json {results}/{word}.json")

    def test_a_run_that_fails_makes_the_script_fail(self):
        for script, word in self.SCRIPTS.items():
            answer = self.bench(script, self.folder, word, exit_code=7)
            self.assertEqual(answer.returncode, 1)
            self.assertIn("exit code 7", answer.stdout)


class Setup(unittest.TestCase):
    """With a PATH that has the tools of the script itself and a false apt-get, and little else."""

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        for tool in ("bash", "env", "sed", "tr", "mktemp", "tail", "rm", "dirname", "cat", "nproc"):
            os.symlink(shutil.which(tool), os.path.join(self.folder, tool))

    def setup(self, *words):
        return run("bash", "launch/setup.sh", *words, env={"PATH": self.folder})

    def add(self, name, text):
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write("#!/bin/bash\n" + text)
        os.chmod(path, 0o755)

    def test_installs_nothing_when_all_is_there(self):
        answer = run("bash", "launch/setup.sh")
        self.assertEqual((answer.returncode, answer.stdout, answer.stderr), (0, "", ""))

    def test_check_names_what_is_missing_and_why(self):
        answer = self.setup("--check")
        self.assertEqual(answer.returncode, 3)
        self.assertRegex(answer.stdout, r"cmake +configures the build \(no command cmake\)")
        self.assertRegex(answer.stderr, r"by hand.*\n.*\bg\+\+ cmake ninja-build ccache\b")

    def test_says_what_to_install_by_hand_without_apt(self):
        answer = self.setup()
        self.assertEqual(answer.returncode, 3)
        self.assertRegex(answer.stderr, r"no apt-get on this machine; install these packages by hand.*\n +g\+\+ cmake")

    @unittest.skipIf(os.geteuid() != 0, "as root apt-get is called without sudo")
    def test_calls_apt_get_with_the_missing_packages_only(self):
        self.add("cmake", "true\n")
        self.add("apt-get", f'echo "$DEBIAN_FRONTEND $*" >>{self.folder}/calls\n')
        answer = self.setup()
        with open(self.folder + "/calls", encoding="utf-8") as file:
            update, install = file.read().splitlines()
        self.assertRegex(update, r"^noninteractive .* update$")
        self.assertRegex(install, r"^noninteractive .* install --no-install-recommends g\+\+ ninja-build ")
        self.assertNotRegex(install, r" cmake( |$)")
        # The false apt-get installed nothing, and that is noticed.
        self.assertEqual(answer.returncode, 3)
        self.assertIn("still not found", answer.stderr)

    @unittest.skipIf(os.geteuid() != 0, "as root apt-get is called without sudo")
    def test_shows_why_apt_get_failed(self):
        self.add("apt-get", 'echo "E: no room left"; case "$*" in *install*) exit 100;; esac\n')
        answer = self.setup()
        self.assertEqual(answer.returncode, 3)
        self.assertIn("E: no room left", answer.stderr)
        self.assertIn("by hand", answer.stderr)


class CompareRuns(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)

    def write(self, name, records):
        os.makedirs(os.path.join(self.folder, name))
        with open(os.path.join(self.folder, name, "metrics.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        return os.path.join(self.folder, name)

    def compare(self, a, b, *words):
        first = self.write("a", a)
        second = self.write("b", b)
        return run("bash", "launch/compare_runs.sh", first, second, *words)

    def test_equal_runs_are_the_same(self):
        steps = [{"kind": "step", "step": n, "lm_loss": 5.0 / n} for n in (1, 2, 3)]
        answer = self.compare(steps, steps)
        self.assertEqual(answer.returncode, 0, answer.stdout)
        self.assertIn("same: 3 values", answer.stdout)

    def test_finds_the_largest_difference_and_its_step(self):
        a = [{"kind": "step", "step": n, "indexer_kl": 2.0} for n in (1, 2, 3)]
        b = [dict(a[0]), dict(a[1], indexer_kl=2.002), dict(a[2], indexer_kl=2.001)]
        answer = self.compare(a, b, "--tolerance", "1e-4")
        self.assertEqual(answer.returncode, 1)
        self.assertRegex(answer.stdout, r"indexer_kl +largest difference 9\.99\de-04 at step 2")

    def test_a_tolerance_is_honoured(self):
        a, b = [{"step": 1, "lm_loss": 1.0}], [{"step": 1, "lm_loss": 1.0 + 1e-7}]
        answer = self.compare(a, b, "--tolerance", "1e-6")
        self.assertEqual(answer.returncode, 0, answer.stdout)

    def test_one_bit_is_a_difference(self):
        answer = self.compare([{"step": 1, "lm_loss": 1.0}], [{"step": 1, "lm_loss": 1.0000000000000002}])
        self.assertEqual(answer.returncode, 1)

    def test_a_missing_step_or_key_is_a_difference(self):
        a = [{"step": 1, "lm_loss": 1.0, "mtp_loss": 1.0}, {"step": 2, "lm_loss": 1.0}]
        answer = self.compare(a, [{"step": 1, "lm_loss": 1.0}])
        self.assertEqual(answer.returncode, 1)
        self.assertIn("step 2 is only in", answer.stdout)
        self.assertIn("mtp_loss is only in", answer.stdout)

    def test_validation_and_training_losses_are_not_mixed(self):
        a = [{"kind": "step", "step": 1, "lm_loss": 1.0}, {"kind": "validation", "step": 1, "lm_loss": 2.0}]
        answer = self.compare(a, [a[0], dict(a[1], lm_loss=3.0)])
        self.assertEqual(answer.returncode, 1)
        self.assertIn("validation lm_loss", answer.stdout)

    def test_nothing_in_common_is_not_the_same(self):
        self.assertEqual(self.compare([{"step": 1, "a": 1.0}], [{"step": 1, "a": 1.0}]).returncode, 1)

    def test_a_broken_file_exits_4(self):
        good = self.write("a", [{"step": 1, "lm_loss": 1.0}])
        bad = self.write("b", ["no record"])
        answer = run("bash", "launch/compare_runs.sh", good, bad)
        self.assertEqual(answer.returncode, 4)
        self.assertIn("b/metrics.jsonl:1:", answer.stderr)
        self.assertEqual(run("bash", "launch/compare_runs.sh", good, self.folder + "/none").returncode, 4)


class Presets(unittest.TestCase):
    def test_each_preset_builds_in_its_own_folder_and_the_menu_knows_it(self):
        with open(ROOT + "/CMakePresets.json", encoding="utf-8") as file:
            presets = json.load(file)
        names = [preset["name"] for preset in presets["configurePresets"] if not preset.get("hidden")]
        self.assertEqual(names, ["host", "host-asan", "cuda", "release", "bundle"])
        self.assertEqual(presets["configurePresets"][0]["binaryDir"], "${sourceDir}/build/${presetName}")
        with open(ROOT + "/Makefile", encoding="utf-8") as file:
            self.assertIn("PRESET=" + "|".join(names), file.read())

    def test_every_menu_entry_is_one_line(self):
        with open(ROOT + "/Makefile", encoding="utf-8") as file:
            text = file.read()
        entries = re.findall(r"(?m)^([a-z-]+): +## .*\n((?:\t.*\n?)*)", text)
        for name, recipe in entries:
            self.assertEqual(recipe.count("\n\t") + 1, 1, name)
        phony = re.search(r"\.PHONY: (.*)", text).group(1).split()
        self.assertEqual([name for name, _ in entries], phony)


if __name__ == "__main__":
    unittest.main()
