"""Runs the GPU tests of one rank under compute-sanitizer, a process each, several at once, and judges what
the tool reports. launch/gpu_tests.sh --sanitize TOOL calls it.

Only kernels of namespace baleen are watched: those of cuBLASLt, cuDNN and NCCL are not ours. First a planted fault
runs that the tool must report; else it sees nothing, and "clean" would mean nothing. Every report is a failure, but
for races that launch/racecheck.expected names and explains.
"""

import argparse
import collections
import concurrent.futures
import configparser
import functools
import glob
import os
import re
import signal
import subprocess
import sys
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")

# Left out under every tool, and why.
LEFT_OUT = {
    "*OnRanks.*": "several ranks",
    "*DeathTest.*": "abort on purpose, in a process of their own",
    "CudaTrace.*": "CUPTI serves one tool at a time",
    "CudaTimer.*": "measures times, which the tools change",
    "CudaBenchOps.*": "holds times to limits; its ops have tests of their own",
    "CudaPool.HandsFreedMemoryOutAgainWithoutTheDriver": "asks how much of the GPU is free while others run",
}
# Left out under one tool.
LEFT_OUT_UNDER = {
    "racecheck": {
        "CudaFp8Linear.*": "of ours only quantisers run, raced by CudaFp8Quantise.*; beside cuBLASLt's kernels for FP8"
                           " racecheck 2025.3 fails unless it watches those too, which takes minutes",
        "CudaIndexerFp8Step.*": "a step of ops that have tests of their own; beside cuBLASLt as above, and watching"
                                " all of it takes more memory than a machine has",
        "CudaIndexerScores.SelectTheDefinitionsKeys": "raced by AreTheDefinitionsInsideTheWindows and CudaTopkSelect.*",
        "CudaIndexerScores.NotANumberReachesTheSelection": "the same launches on other values",
        "CudaSparseAttention.PackedQueriesAgreeWithSingleOnes": "raced by PackedQueriesGiveTheDefinition, with less",
        "CudaSparseAttention.QueriesThatShareNothingAreNotPackedInTheBackward": "the backward's two kinds are raced by"
                                                                                " Packed* and OnTensorCores*",
        "CudaSparseAttention.TheSameInputsGiveTheSameBits": "each kernel twice; raced by *GiveTheDefinition* and, with"
                                                            " many queries a block, *ChunkAfterChunk",
        "CudaSparseAttention.GeneralAddsUpChunkAfterChunk": "13 times the kernels of GeneralTakesTheLargeWidthsInF32",
        "CudaAttentionOnTensorCores.GivesTheSameBitsTwice": "each kernel twice; raced by IsTheDefinition*",
        "CudaAttention.GivesTheSameBitsTwice": "each kernel twice; raced by IsTheDefinition*",
    },
}
# Begun first, the longest of all first (of a measured run): what is left at the end then is short.
LONGEST = (
    "CudaAttentionOnTensorCores.Keeps", "CudaSparseAttention.GeneralGives", "CudaSparseAttention.QueriesDivided",
    "CudaMaskedAttention.IsTheDefinition", "CudaGroupedMatmul.", "CudaSparseAttention.PackedQueriesGive",
    "CudaAttention.IsTheDefinitionOnMixed", "CudaIndexerScores.", "CudaDenseIndexerLoss.Gives",
    "CudaAttentionOnTensorCores.", "CudaSparseAttention.", "CudaMaskedAttention.TakesLong", "CudaSparseBackwardRows.",
    "CudaAttention.IsTheDefinition", "CudaDenseIndexerLoss.", "CudaSparseIndexerLoss.", "CudaSelectionQuality.",
    "CudaAttentionBackward.", "CudaAttention.ARow", "CudaDenseTarget", "CudaMaskedAttention.Gives",
)
# A place that races: what it does, in which function, and where the binary has line information, file and line.
Access = collections.namedtuple("Access", "kind function file line")
Outcome = collections.namedtuple("Outcome", "test problems races seconds alone")


def options_of(tool, watch_all=False):
    options = ["--tool", tool, "--error-exitcode", "99", "--target-processes", "application-only"]
    if tool == "racecheck":
        # Every hazard byte by byte, which is stricter than the tool's own analysis of them.
        options += ["--racecheck-report", "hazard", "--print-limit", "0", "--show-backtrace", "no"]
    if tool == "memcheck":
        # Room between allocations, so that a step too far does not land in the next one; and the order of frees.
        options += ["--padding", "64", "--track-stream-ordered-races", "all"]
    if not watch_all and tool != "initcheck":  # that must see all writes, also those of libraries
        options += ["--kernel-name", "kernel_substring=6baleen"]  # as names are mangled: _ZN6baleen...
    return options


# --- What the tool prints. ---

HAZARD = re.compile(r"=========\s+(?:\w+: )?Potential (RAW|WAR|WAW) hazard detected")
ACCESS = re.compile(r"=========\s+(Write|Read) Thread \S+ at (.+?)\+0x[0-9a-f]+(?: in ([^\s:]+):(\d+))?\s*$")
SUMMARY = re.compile(r"========= (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards? displayed)")
OF_HAZARD = re.compile(r"=========\s*(Current Value : .*)?$")  # behind the accesses
kShownOfEachRace = 2  # a race is reported for every byte and every block


@functools.lru_cache(maxsize=1 << 14)  # there may be millions of lines, and most are the same
def access_of(line):
    m = ACCESS.match(line)
    return m and Access(m[1], m[2], m[3], int(m[4] or 0))


class Report:
    """Reads line by line what a tool prints: `races` {(access, later access): hazards}, `text` the rest."""

    def __init__(self):
        self.races, self.lines, self.hazard, self.known = collections.Counter(), [], None, False

    def add(self, line):
        if self.hazard:
            self.hazard.append(line)
            if len(self.hazard) == 3:
                self.end_hazard()
        elif "hazard detected" in line and HAZARD.match(line):
            self.hazard = [line]
        elif not (self.known and OF_HAZARD.match(line)):
            self.lines.append(line)
            self.known = False

    def end_hazard(self):
        race = tuple(access_of(line) for line in self.hazard[1:])
        if None in race:
            race = None
        self.races[race] += 1
        self.known = race is not None and self.races[race] > kShownOfEachRace
        if not self.known:
            self.lines += self.hazard
        self.hazard = None

    @property
    def text(self):
        return "\n".join(self.lines)


def problems_of(tool, report):
    """What is wrong, whatever the list of expected races says."""
    problems, text = [], report.text
    summary = SUMMARY.findall(text)
    if report.races[None]:
        problems.append("a race that launch/sanitize.py cannot read")
    if not summary:
        problems.append(f"{tool} ended without its summary")
    elif int(summary[-1]) != sum(report.races.values()):
        first = re.search(r"^========= (?!COMPUTE-SANITIZER)(\S.*)$", text, re.MULTILINE)
        problems.append(f"{summary[-1]} reports, first: {first.group(1) if first else '?'}")
    for line in re.findall(r"^========= (.*Internal Sanitizer Error.*|Error: .*|Warning: Detected overflow.*)$", text,
                           re.MULTILINE):
        if "hazard" not in line and "process didn't terminate" not in line:
            problems.append(line)
    if not re.search(r"^\[  (PASSED|SKIPPED)  ?\] 1 test", text, re.MULTILINE):
        wrong = re.search(r"^.*(CHECK failed|: Failure$).*$", text, re.MULTILINE)
        problems.append(f"the test did not pass{': ' + wrong.group(0)[:200] if wrong else ''}")
    return problems


# --- Expected races. ---


class Expected:
    """An entry of launch/racecheck.expected: pairs of accesses by the code of their lines, and why they do not race."""

    def __init__(self, name, section):
        self.name, self.ordered, self.hazards = name, section["ordered"], 0
        first, then = ([re.match(r"(Write|Read) (\S+) \| (.+)$", line).groups()
                        for line in section[key].splitlines()] for key in ("first", "then"))
        if len(then) not in (1, len(first)):
            sys.exit(f"baleen: error: launch/racecheck.expected: [{name}] has {len(first)} lines of `first` and "
                     f"{len(then)} of `then`: expected as many, or one of `then` for all")
        self.pairs = list(zip(first, then if len(then) == len(first) else then * len(first)))

    def covers(self, race):
        return any(all(kind == found.kind and file == found.file and is_line(code, code_at(found.file, found.line))
                       for (kind, file, code), found in zip(pair, race)) for pair in self.pairs)


def is_line(code, line):
    """Whether an entry's `code` says what the line says; `...` at its end stands for the rest."""
    return line.startswith(code[:-3].rstrip()) if code.endswith("...") else line == code


def read_expected(path):
    parser = configparser.ConfigParser(delimiters=("=",), comment_prefixes=("#",), interpolation=None)
    with open(path, encoding="utf-8") as file:
        parser.read_file(file)
    return [Expected(name, parser[name]) for name in parser.sections()]


@functools.lru_cache(maxsize=None)
def code_at(file, line):
    """The code of a line of the kernels' sources: lines move with every edit, what they say does not."""
    paths = glob.glob(f"{ROOT}/kernels/**/{file or '?'}", recursive=True)
    if len(paths) != 1:
        return ""
    with open(paths[0], encoding="utf-8") as source:
        lines = source.read().splitlines()
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""


def unexpected(races, expected):
    """What to say of the races that no entry covers."""
    texts = []
    for race, hazards in races.items():
        if race is None or not any("baleen::" in side.function for side in race):  # a library's
            continue
        entry = next((e for e in expected if e.covers(race)), None)
        if entry:
            entry.hazards += hazards
            continue
        sides = [f"{side.kind} {side.file}:{side.line} | {code_at(side.file, side.line) or 'no source'}"
                 if side.file else f"{side.kind} in {side.function} (no lines: a binary without -lineinfo?)"
                 for side in race]
        texts.append(f"race, {hazards} hazards: {sides[0]} -- then {sides[1]}")
    return sorted(texts)


# --- Running. ---


class Runner:
    def __init__(self, arguments):
        self.a = arguments
        self.ports = collections.deque(49152 + 32 * n for n in range(arguments.jobs))
        self.running = set()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.end)

    def end(self, number, _):
        for process in list(self.running):
            os.killpg(process.pid, signal.SIGKILL)
        print(f"  ended by signal {number}: what is not shown did not run", flush=True)
        os._exit(128 + number)

    def tests(self):
        left_out = ":".join([*LEFT_OUT, *LEFT_OUT_UNDER.get(self.a.tool, {})])
        chosen = f"{self.a.filter}{':' if '-' in self.a.filter else '-'}{left_out}"
        words = [self.a.tests, "--gtest_list_tests", f"--gtest_filter={chosen}"]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"baleen: error: {' '.join(words)}: exit code {done.returncode}: {done.stderr.strip()}")
        names, suite = [], ""
        for line in done.stdout.splitlines():
            word = line.split("#")[0].rstrip()
            if word.startswith(" ") and "DISABLED_" not in word:
                names.append(suite + word.strip())
            elif word.endswith("."):
                suite = word
        return sorted(names, key=lambda name: next((n for n, of in enumerate(LONGEST) if name.startswith(of)), 99))

    def run(self, name, *words, watch_all=False):
        """The report on the tests' binary called with `words`, and the seconds it took."""
        port = self.ports.popleft()  # each process has a connection of its own to its tool
        command = ["compute-sanitizer", *options_of(self.a.tool, watch_all), "--port", str(port), self.a.tests, *words]
        report, start = Report(), time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                   text=True, errors="replace", env={**os.environ, "BALEEN_SANITIZER": self.a.tool})
        self.running.add(process)
        timer = threading.Timer(self.a.timeout, os.killpg, (process.pid, signal.SIGKILL))  # the tool and the test
        timer.start()
        for line in process.stdout:
            report.add(line.rstrip("\n"))
        process.wait()
        self.running.discard(process)
        if timer.finished.is_set():
            report.add(f"========= Error: killed after {self.a.timeout:g} s")
        timer.cancel()
        self.ports.append(port)
        log = os.path.join(self.a.logs, f"{self.a.tool}-{name.replace('/', '_')}.log")
        with open(log, "w", encoding="utf-8") as file:
            file.write(report.text + "\n")
        return report, time.monotonic() - start

    def sees_a_planted_fault(self):
        report, _ = self.run("planted-fault", f"--planted_fault={self.a.tool}")
        kernel = f"Planted{self.a.tool.capitalize()}Fault"
        summary = SUMMARY.findall(report.text)
        return bool(summary) and int(summary[-1]) > 0 and re.search(f"^=========.*{kernel}", report.text, re.MULTILINE)

    def judge(self, test):
        words = ["--gtest_color=no", f"--gtest_filter={test}"]
        report, seconds = self.run(test, *words)
        # Seen under racecheck 2025.3, in kernels of cuBLASLt, only where others are watched than they.
        if "failed to handle a hardware exception" in report.text:
            report, seconds = self.run(test, *words, watch_all=True)
        problems = problems_of(self.a.tool, report)
        return Outcome(test, problems, report.races, seconds, bool(problems) and "out of memory" in report.text)


def main():
    parser = argparse.ArgumentParser(prog="launch/sanitize.py")
    parser.add_argument("--tool", choices=TOOLS, required=True)
    parser.add_argument("--tests", required=True, help="baleen_gpu_tests")
    parser.add_argument("--filter", default="*", help="positive patterns of GoogleTest")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600, help="of one test, in seconds")
    parser.add_argument("--logs", default=".")
    parser.add_argument("--expected", default=os.path.join(ROOT, "launch/racecheck.expected"))
    runner = Runner(parser.parse_args())
    a, start = runner.a, time.monotonic()
    expected = read_expected(a.expected) if a.tool == "racecheck" else []
    if not runner.sees_a_planted_fault():
        log = os.path.join(a.logs, f"{a.tool}-planted-fault.log")
        print(f"  FAILED: {a.tool} does not report a planted fault, so it would report no other; see {log}."
              " Where the tool does not fit the driver, put a newer toolkit's compute-sanitizer first in PATH")
        return 1

    failed, outcomes = [], []

    def show(outcome):
        problems = outcome.problems + unexpected(outcome.races, expected)
        failed.extend([outcome.test] if problems else [])
        for problem in problems:
            print(f"  FAILED {outcome.test}: {problem}", flush=True)
        outcomes.append(outcome)
        with open(os.path.join(a.logs, f"{a.tool}-seconds.tsv"), "a", encoding="utf-8") as file:
            file.write(f"{outcome.seconds:.1f}\t{outcome.test}\t{len(problems)}\n")

    tests, alone = runner.tests(), []
    with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
        for future in concurrent.futures.as_completed([pool.submit(runner.judge, test) for test in tests]):
            if future.result().alone:
                alone.append(future.result().test)
            else:
                show(future.result())
    for test in alone:  # the tools take memory too: what did not fit beside others has the GPU for itself now
        show(runner.judge(test))

    for entry in expected:
        if entry.hazards:
            print(f"  expected, {entry.hazards} hazards: {entry.name}")
        elif a.filter == "*":
            print(f"  notice: did not appear, drop it from {os.path.basename(a.expected)}? {entry.name}")
    slowest = sorted(outcomes, key=lambda o: -o.seconds)[:5]
    print("  slowest: " + ", ".join(f"{o.test} {o.seconds:.0f} s" for o in slowest))
    print(f"  {a.tool}: {len(tests)} tests, {a.jobs} at a time, {time.monotonic() - start:.0f} s: "
          f"{len(tests) - len(failed)} clean, {len(failed)} failed")
    return 1 if failed or not tests else 0


if __name__ == "__main__":
    sys.exit(main())
