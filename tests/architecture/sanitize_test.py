#!/usr/bin/env python3
"""launch/gpu_tests.sh --sanitize and launch/sanitize.py, with false tools that print recorded reports."""

import configparser
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
EXPECTED = ROOT + "/launch/racecheck.expected"

# What compute-sanitizer prints (2025.3 of CUDA 13.0).
BEGIN = "========= COMPUTE-SANITIZER\n"
PASSED = "[       OK ] Cuda.A (3 ms)\n[  PASSED  ] 1 test.\n"
CLEAN = {
    "memcheck": BEGIN + PASSED + "========= ERROR SUMMARY: 0 errors\n",
    "racecheck": BEGIN + PASSED + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
}
OVERRUN = BEGIN + """========= Invalid __global__ write of size 4 bytes
=========     at baleen::testing::<unnamed>::PlantedMemcheckFault+0x60 in planted_fault_support.cu:15
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7f3c7ec00100 is out of bounds
=========
""" + PASSED + "========= ERROR SUMMARY: 64 errors\n"


def hazard(kind, function, first, then, byte=0):
    """Accesses are (kind, file, line)."""
    places = [f"=========     {access} Thread ({32 * n + 95},0,0) at void baleen::<unnamed>::{function}<(bool)0>(const "
              f"baleen::Args &, int)+0x{16 * line:x} in {file}:{line}\n"
              for n, (access, file, line) in enumerate((first, then))]
    return (f"========= Error: Potential {kind} hazard detected at __shared__ 0x{byte:x} in block (1,0,0) :\n" +
            "".join(places) + "=========     Current Value : 255, Incoming Value : 255\n========= \n")


def racecheck(*hazards, passed=PASSED):
    count = len(hazards)
    return (BEGIN + "".join(hazards) + passed +
            f"========= RACECHECK SUMMARY: {count} hazards displayed ({count} errors, 0 warnings)\n")


PLANTED_RACE = racecheck(hazard("RAW", "PlantedRacecheckFault", ("Write", "planted_fault_support.cu", 19),
                                ("Read", "planted_fault_support.cu", 20)))


def line_of(file, code):
    """The numbers of the lines that an entry's code means."""
    (path,) = glob.glob(f"{ROOT}/kernels/**/{file}", recursive=True)
    with open(path, encoding="utf-8") as source:
        lines = [(number, line.strip()) for number, line in enumerate(source, 1)]
    if code.endswith("..."):
        return [number for number, line in lines if line.startswith(code[:-3].rstrip())]
    return [number for number, line in lines if line == code]


class Sanitize(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        os.makedirs(self.folder + "/bin")
        os.makedirs(self.folder + "/logs")
        self.tests = self.program("bin/baleen_gpu_tests", f"echo \"$*\" >>{self.folder}/listed; cat {self.folder}/list")
        # Prints PLACE.log, of a test or of the planted fault; a second time PLACE.again.
        self.program("compute-sanitizer", f"""
          echo "$*" >>{self.folder}/calls
          place=${{!#}}; place={self.folder}/${{place##*=}}
          cat "$place.log"
          if [[ -e $place.again ]]; then mv "$place.again" "$place.log"; fi
          if [[ -e $place.sleep ]]; then sleep 20; fi""")
        self.expected = self.write("expected", "")

    def write(self, name, text):
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path

    def program(self, name, text):
        path = self.write(name, "#!/bin/bash\n" + text + "\n")
        os.chmod(path, 0o755)
        return path

    def sanitize(self, tool, logs, *words, planted=None):
        """logs: {test: what it prints}."""
        self.write(tool + ".log", planted or {"memcheck": OVERRUN, "racecheck": PLANTED_RACE}[tool])
        suites = {}
        for test, text in logs.items():
            self.write(test + ".log", text)
            suites.setdefault(test.split(".")[0], []).append(test.split(".")[1])
        self.write("list", "".join(f"{s}.\n" + "".join(f"  {n}\n" for n in names) for s, names in suites.items()))
        return subprocess.run(
            [sys.executable, "-B", "launch/sanitize.py", "--tool", tool, "--tests", self.tests, "--logs",
             self.folder + "/logs", "--expected", self.expected, *words],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
            env={**os.environ, "PATH": self.folder + ":" + os.environ["PATH"]})

    def assertFails(self, answer, pattern):
        self.assertEqual(answer.returncode, 1, answer.stdout + answer.stderr)
        self.assertRegex(answer.stdout, pattern)

    def assertClean(self, answer, pattern):
        self.assertEqual(answer.returncode, 0, answer.stdout + answer.stderr)
        self.assertRegex(answer.stdout, pattern)

    # --- What runs. ---

    def test_every_test_runs_in_a_process_of_its_own(self):
        logs = {"CudaA.One": CLEAN["memcheck"], "CudaA.Two": CLEAN["memcheck"], "CudaB.One": CLEAN["memcheck"]}
        answer = self.sanitize("memcheck", logs, "--jobs", "2")
        self.assertClean(answer, "memcheck: 3 tests, 2 at a time, .* 3 clean, 0 failed")
        with open(self.folder + "/calls", encoding="utf-8") as file:
            calls = file.read().splitlines()
        self.assertEqual(len(calls), 4)  # and the planted fault
        self.assertEqual(sorted(call.split("--gtest_filter=")[1] for call in calls[1:]), sorted(logs))
        for call in calls:
            self.assertIn("--tool memcheck ", call)
            self.assertIn("--kernel-name kernel_substring=6baleen ", call)

    def test_tests_that_the_tools_disturb_are_left_out(self):
        for given, chosen in (("*", "*-"), ("Cuda*", "Cuda*-"), ("Cuda*-CudaA.*", "Cuda*-CudaA.*:")):
            self.sanitize("memcheck", {"CudaA.One": CLEAN["memcheck"]}, "--filter", given)
            with open(self.folder + "/listed", encoding="utf-8") as file:
                listed = file.read().splitlines()[-1]
            self.assertIn(f"--gtest_filter={chosen}*OnRanks.*:*DeathTest.*:", listed)

    def test_some_are_left_out_under_one_tool(self):
        for tool, left_out in (("memcheck", False), ("racecheck", True)):
            self.sanitize(tool, {"CudaA.One": CLEAN[tool]})
            with open(self.folder + "/listed", encoding="utf-8") as file:
                self.assertEqual("CudaFp8Linear.*" in file.read().splitlines()[-1], left_out, tool)

    def test_tests_know_their_tool(self):
        text = f"echo $BALEEN_SANITIZER >{self.folder}/tool; place=${{!#}}; cat {self.folder}/${{place##*=}}.log"
        self.program("compute-sanitizer", text)
        self.assertClean(self.sanitize("racecheck", {"CudaA.One": CLEAN["racecheck"]}), "1 clean")
        with open(self.folder + "/tool", encoding="utf-8") as file:
            self.assertEqual(file.read().strip(), "racecheck")

    def test_the_longest_run_first(self):
        longest_last = ["CudaA.One", "CudaDenseTarget.One", "CudaMaskedAttention.IsTheDefinitionX"]
        self.sanitize("racecheck", {test: CLEAN["racecheck"] for test in longest_last})
        with open(self.folder + "/calls", encoding="utf-8") as file:
            ran = [call.split("--gtest_filter=")[1] for call in file.read().splitlines()[1:]]
        self.assertEqual(ran, longest_last[::-1])

    def test_no_test_at_all_is_a_failure(self):
        self.assertFails(self.sanitize("memcheck", {}), "0 tests")

    # --- What fails. ---

    def test_a_tool_that_does_not_see_the_planted_fault_fails(self):
        for tool in ("memcheck", "racecheck"):
            answer = self.sanitize(tool, {"CudaA.One": CLEAN[tool]}, planted=CLEAN[tool])
            self.assertFails(answer, "does not report a planted fault")

    def test_a_report_fails_and_is_shown(self):
        logs = {"CudaA.One": CLEAN["memcheck"], "CudaA.Two": OVERRUN}
        said = "FAILED CudaA.Two: 64 reports, first: Invalid __global__ write"
        self.assertFails(self.sanitize("memcheck", logs), said)

    def test_a_test_that_fails_or_dies_fails(self):
        failed = CLEAN["memcheck"].replace(PASSED, "a.cc:7: Failure\n[  FAILED  ] 1 test, listed below:\n")
        answer = self.sanitize("memcheck", {"CudaA.One": failed})
        self.assertFails(answer, "FAILED CudaA.One: the test did not pass: a.cc:7")
        answer = self.sanitize("memcheck", {"CudaA.One": BEGIN})
        self.assertFails(answer, "FAILED CudaA.One: memcheck ended without its summary")

    def test_a_test_that_hangs_is_ended_and_fails(self):
        self.write("CudaA.One.sleep", "")
        start = time.monotonic()
        answer = self.sanitize("racecheck", {"CudaA.One": CLEAN["racecheck"]}, "--timeout", "0.5")
        self.assertFails(answer, "FAILED CudaA.One: .*killed after")
        self.assertLess(time.monotonic() - start, 15)  # it would have slept for 20 s

    def test_what_the_tool_says_of_itself_fails(self):
        said = "========= Internal Sanitizer Error: it didn't track the launch.\n"
        text = CLEAN["racecheck"].replace(BEGIN, BEGIN + said)
        self.assertFails(self.sanitize("racecheck", {"CudaA.One": text}), "FAILED CudaA.One: Internal Sanitizer Error")

    def test_what_found_no_memory_beside_others_runs_again_alone(self):
        full = BEGIN + "CHECK failed: made.status() GPU 0: out of memory\n========= ERROR SUMMARY: 0 errors\n"
        self.write("CudaA.One.again", CLEAN["memcheck"])
        self.assertClean(self.sanitize("memcheck", {"CudaA.One": full}), "1 clean, 0 failed")
        self.assertFails(self.sanitize("memcheck", {"CudaA.One": full}), "FAILED CudaA.One: the test did not pass")

    # --- Expected races. ---

    WRITER, READER = "sparse_attention_forward_cuda.cu", "sparse_attention_forward_consumer.cuh"
    STORE, LOAD = "s.num_blocks = num_blocks;", "const int num_blocks = s.num_blocks;"
    ENTRY = f"""[the list]
first = Read {READER} | {LOAD}
then = Write {WRITER} | {STORE}
ordered = by a barrier
"""

    def race_of_the_entry(self, away=0, byte=0):
        (write,), (read,) = line_of(self.WRITER, self.STORE), line_of(self.READER, self.LOAD)
        return hazard("WAR", "RunConsumer", ("Read", self.READER, read + away), ("Write", self.WRITER, write), byte)

    def test_an_expected_race_is_known_by_the_code_of_its_lines(self):
        self.expected = self.write("expected", self.ENTRY)
        text = racecheck(*(self.race_of_the_entry(byte=byte) for byte in range(4)))
        self.assertClean(self.sanitize("racecheck", {"CudaA.One": text}), "expected, 4 hazards: the list")
        with open(self.folder + "/logs/racecheck-CudaA.One.log", encoding="utf-8") as file:
            self.assertEqual(file.read().count("hazard detected"), 2)  # not all of them
        answer = self.sanitize("racecheck", {"CudaA.One": racecheck(self.race_of_the_entry(away=2))})
        self.assertFails(answer, r"FAILED CudaA.One: race, 1 hazards: Read \S+:\d+ \| .* -- then Write .*num_blocks;")

    def test_the_opposite_order_is_another_race(self):
        other = self.ENTRY.replace("first", "last").replace("then", "first").replace("last", "then")
        self.expected = self.write("expected", other)
        answer = self.sanitize("racecheck", {"CudaA.One": racecheck(self.race_of_the_entry())})
        self.assertFails(answer, "FAILED CudaA.One: race, 1 hazards")

    def test_every_race_must_be_expected(self):
        self.expected = self.write("expected", self.ENTRY)
        for away in ((0, 1), (1, 0)):
            text = racecheck(*(self.race_of_the_entry(away=lines) for lines in away))
            self.assertFails(self.sanitize("racecheck", {"CudaA.One": text}), "FAILED CudaA.One: race, 1 hazards")

    def test_an_entry_may_list_pairs(self):
        (write,), (read,) = line_of(self.WRITER, self.STORE), line_of(self.READER, self.LOAD)
        other = "BarrierWait(&s.q_full, parity);"
        (beside,) = line_of(self.READER, other)
        lines = f"first = Read {self.READER} | {self.LOAD}\n  Read {self.READER} | {other}\n"
        races = {file_line: racecheck(hazard("WAR", "RunConsumer", ("Read", self.READER, file_line[0]),
                                             ("Write",) + file_line[1]))
                 for file_line in ((read, (self.WRITER, write)), (beside, (self.WRITER, write)),
                                   (beside, (self.READER, beside)), (read, (self.READER, beside)))}
        store = f"Write {self.WRITER} | {self.STORE}"
        for then, clean in ((store, (0, 1)), (f"{store}\n  Write {self.READER} | BarrierWait(&s.q_full, ...", (0, 2))):
            self.expected = self.write("expected", f"[pairs]\n{lines}then = {then}\nordered = by a barrier\n")
            for number, text in enumerate(races.values()):
                with self.subTest(then=then, number=number):
                    answer = self.sanitize("racecheck", {"CudaA.One": text})
                    self.assertEqual(answer.returncode, 0 if number in clean else 1, answer.stdout)

    def test_an_entry_with_too_few_pairs_is_refused(self):
        more = f"  Write {self.WRITER} | {self.STORE}\nordered"
        self.expected = self.write("expected", self.ENTRY.replace("ordered", more))
        answer = self.sanitize("racecheck", {"CudaA.One": CLEAN["racecheck"]})
        self.assertEqual(answer.returncode, 1)
        self.assertIn("[the list] has 1 lines of `first` and 2 of `then`", answer.stderr)

    def test_races_in_kernels_of_libraries_are_not_ours(self):
        text = racecheck(self.race_of_the_entry().replace("baleen::", "cutlass::"))
        self.assertClean(self.sanitize("racecheck", {"CudaA.One": text}), "1 clean, 0 failed")

    def test_an_expected_race_does_not_excuse_a_test_that_fails(self):
        self.expected = self.write("expected", self.ENTRY)
        text = racecheck(self.race_of_the_entry(), passed="[  FAILED  ] 1 test, listed below:\n")
        self.assertFails(self.sanitize("racecheck", {"CudaA.One": text}), "the test did not pass")

    def test_a_race_without_lines_fails(self):
        text = racecheck(re.sub(r" in \S+:\d+", "", self.race_of_the_entry()))
        self.expected = self.write("expected", self.ENTRY)
        self.assertFails(self.sanitize("racecheck", {"CudaA.One": text}), "without -lineinfo")

    def test_a_report_that_cannot_be_read_fails(self):
        self.expected = self.write("expected", self.ENTRY)
        for old, new, said in (("Potential", "Something new:", "FAILED CudaA.One: 1 reports"),
                               ("Read Thread", "Reads", "that launch/sanitize.py cannot read")):
            text = racecheck(self.race_of_the_entry()).replace(old, new)
            self.assertFails(self.sanitize("racecheck", {"CudaA.One": text}), said)

    def test_where_the_tool_cannot_leave_libraries_out_all_is_watched(self):
        dead = BEGIN + "========= Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception.\n"
        self.write("CudaA.One.again", CLEAN["racecheck"])
        self.assertClean(self.sanitize("racecheck", {"CudaA.One": dead}), "1 clean, 0 failed")
        with open(self.folder + "/calls", encoding="utf-8") as file:
            first, second = file.read().splitlines()[1:]
        self.assertIn("--kernel-name", first)
        self.assertNotIn("--kernel-name", second)

    def test_an_entry_that_no_longer_appears_is_noticed(self):
        self.expected = self.write("expected", self.ENTRY)
        logs = {"CudaA.One": CLEAN["racecheck"]}
        self.assertClean(self.sanitize("racecheck", logs), "notice: did not appear.*the list")
        self.assertNotIn("notice", self.sanitize("racecheck", logs, "--filter", "CudaA*").stdout)

    def test_every_entry_names_code_that_is_there_and_says_why(self):
        parser = configparser.ConfigParser(delimiters=("=",), comment_prefixes=("#",), interpolation=None)
        parser.read(EXPECTED)
        for name in parser.sections():
            self.assertGreater(len(parser[name]["ordered"]), 80, name)
            first, then = (parser[name][key].splitlines() for key in ("first", "then"))
            self.assertIn(len(then), (1, len(first)), name)
            for line in first + then:
                kind, file, code = re.match(r"(Write|Read) (\S+) \| (.+)$", line).groups()
                self.assertEqual(len(line_of(file, code)), 1, f"{name}: {file}: {code}")

    # --- The script in front. ---

    def test_gpu_tests_hands_over_and_returns_what_it_found(self):
        self.program("nvidia-smi", "case \"$*\" in *memory.free*) echo 20000 ;; *) echo H100 ;; esac")
        self.write("memcheck.log", OVERRUN)
        self.write("list", "CudaA.\n  One\n")
        for text, code in ((CLEAN["memcheck"], 0), (OVERRUN, 1)):
            self.write("CudaA.One.log", text)
            answer = subprocess.run(
                ["bash", "launch/gpu_tests.sh", "--sanitize", "memcheck", "--bundle", self.folder, "--logs",
                 self.folder + "/logs"], cwd=ROOT, capture_output=True, text=True, timeout=60,
                env={**os.environ, "PATH": self.folder + ":" + os.environ["PATH"]})
            self.assertEqual(answer.returncode, code, answer.stdout + answer.stderr)
            self.assertIn("memcheck: 1 tests, ", answer.stdout)

    def test_gpu_tests_refuses_unknown_tools_and_jobs(self):
        for words in (("--sanitize", "nonsense"), ("--sanitize", "memcheck", "--jobs", "many"), ("--jobs", "0")):
            answer = subprocess.run(["bash", "launch/gpu_tests.sh", *words], cwd=ROOT, capture_output=True, text=True)
            self.assertEqual(answer.returncode, 2, words)


if __name__ == "__main__":
    unittest.main()
