#!/usr/bin/env python3
"""What the documents say about the repository is true: files they name exist, run files they show are valid, the
commands and exit codes they list are those of the binary.

  documents_test.py BINARY
"""

import glob
import os
import re
import subprocess
import sys
import tempfile
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BINARY = ""

# Not in the tree: x stands for any op, and what a run writes.
PLACEHOLDER = re.compile(r"(^|/)x[._]")
MADE = re.compile(r"^(checkpoints/(tiny|DeepSeek|step|latest)|data/(tiny|corpus|long_context))")


def documents():
    found = glob.glob(ROOT + "/*.md") + glob.glob(ROOT + "/docs/**/*.md", recursive=True)
    for folder in ("kernels", "configs", "checkpoints", "cmake", "data", "parallel", "trainer", "launch", "tests"):
        found += glob.glob(f"{ROOT}/{folder}/**/README.md", recursive=True)
    return sorted(found)


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def run(*words):
    return subprocess.run([BINARY, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


class Documents(unittest.TestCase):
    def test_links_lead_to_files(self):
        for document in documents():
            for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", read(document)):
                if "://" not in target:
                    path = os.path.join(os.path.dirname(document), target)
                    self.assertTrue(os.path.exists(path), f"{document}: {target}")

    def test_paths_in_code_spans_exist(self):
        """`trainer/step.cc` in a text must be a file; patterns are expanded."""
        first = "kernels|configs|checkpoints|data|parallel|trainer|launch|tests|docs|cmake"
        missing = []
        for document in documents():
            text = re.sub(r"(?s)```.*?```", "", read(document))
            for path in re.findall(rf"`((?:{first})/[A-Za-z0-9_./*-]+)`", text):
                if not PLACEHOLDER.search(path) and not MADE.match(path) and not glob.glob(os.path.join(ROOT, path)):
                    missing.append(f"{os.path.relpath(document, ROOT)}: {path}")
        self.assertEqual(missing, [])

    def test_files_in_the_tables_of_a_folder_exist(self):
        """The first column of a table in a folder's README names files of that folder."""
        missing = []
        for document in documents():
            folder = os.path.dirname(document)
            if folder == ROOT or folder.startswith(ROOT + "/docs"):
                continue
            for cell in re.findall(r"(?m)^\| (`[^|]*`) \|", read(document)):
                for name in re.findall(r"`([a-z0-9_*/-]+(?:\.[a-z]+|/)?)", cell):
                    if not PLACEHOLDER.search(name) and not glob.glob(os.path.join(folder, name)):
                        missing.append(f"{os.path.relpath(document, ROOT)}: {name}")
        self.assertEqual(missing, [])

    def test_headers_are_in_the_readme_of_their_folder(self):
        missing = []
        for folder in ("checkpoints", "configs/schema", "data", "kernels/core", "kernels/cuda", "parallel", "trainer",
                       "trainer/bench", "trainer/model"):
            text = read(f"{ROOT}/{folder}/README.md")
            for header in sorted(glob.glob(f"{ROOT}/{folder}/*.h") + glob.glob(f"{ROOT}/{folder}/*.cuh")):
                if f"`{os.path.basename(header)}`" not in text:
                    missing.append(f"{folder}/README.md: {os.path.basename(header)}")
        self.assertEqual(missing, [])

    def test_shown_run_files_are_valid(self):
        shown = 0
        for document in documents():
            for block in re.findall(r"(?s)```yaml\n(.*?)```", read(document)):
                if not re.search(r"(?m)^stages:", block):
                    continue
                shown += 1
                with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
                    file.write(block)
                    file.flush()
                    answer = run("config", "check", file.name)
                self.assertEqual(answer.returncode, 0, f"{document}:\n{answer.stderr}")
        self.assertGreaterEqual(shown, 2)

    def test_run_files_of_the_repository_are_valid(self):
        files = glob.glob(ROOT + "/configs/run/*.yaml")
        self.assertGreaterEqual(len(files), 2)
        for file in files:
            answer = run("config", "check", file)
            self.assertEqual(answer.returncode, 0, answer.stderr)

    def test_the_readme_lists_the_commands(self):
        commands = re.findall(r"(?m)^  ([a-z]+) +\S", run("--help").stdout)
        self.assertGreaterEqual(len(commands), 8)
        listed = re.findall(r"(?m)^\| `baleen ([a-z]+)", read(ROOT + "/README.md"))
        self.assertEqual(sorted(set(listed)), sorted(commands))

    def test_exit_codes_are_those_of_the_source(self):
        source = dict(re.findall(r"(kExit\w+) = (\d+)", read(ROOT + "/trainer/exit_code.h")))
        listed = re.findall(r"(?m)^\| (\d+) \|", read(ROOT + "/docs/exit_codes.md"))
        self.assertEqual(sorted(listed), sorted(source.values()))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: documents_test.py BINARY [unittest arguments]")
    BINARY = os.path.abspath(sys.argv.pop(1))
    unittest.main()
