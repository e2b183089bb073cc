#!/usr/bin/env python3
"""Holds the tree to its layers: includes point downwards, files stay short, tests and READMEs are where they belong.

  python3 tests/architecture/includes_test.py            test the test on planted faults, then check the tree
  python3 tests/architecture/includes_test.py --root DIR  another tree

A fault is printed as path:line: what is wrong and what is allowed. docs/architecture.md explains the layers.
"""

import argparse
import os
import re
import sys

# Box (a folder, one CMake library) -> the boxes it may include besides itself. Everything not listed is forbidden.
ALLOWED = {
    "kernels/core": [],
    "kernels/cuda": [],
    "kernels/ops": ["kernels/core", "kernels/cuda"],
    "kernels/bench": ["kernels/ops", "kernels/cuda", "kernels/core"],
    "configs/schema": ["kernels/core"],
    "checkpoints": ["kernels/ops", "configs/schema", "kernels/core"],
    "data": ["kernels/ops", "configs/schema", "kernels/core"],
    "parallel": ["kernels/ops", "configs/schema", "kernels/core"],
    "trainer/model": ["kernels/ops", "kernels/core", "configs/schema", "parallel"],
    "trainer": ["trainer/model", "checkpoints", "data", "parallel", "configs/schema", "kernels/ops", "kernels/core"],
    "trainer/bench": ["trainer", "trainer/model", "checkpoints", "data", "parallel", "configs/schema", "kernels/ops",
                      "kernels/core"],
}
# Folders that only sort a box's files: they belong to the box above.
GROUPS = ["kernels/ops/attention", "kernels/ops/indexer", "kernels/ops/linear", "kernels/ops/moe"]
# Libraries that stay behind one box's door. Others (Abseil, JSON) are free, but see below for device code.
DOORS = {
    "mpi.h": ["parallel"],
    "hdf5.h": ["checkpoints", "data"],
    "yaml-cpp/": ["configs/schema"],
    "nccl.h": ["parallel"],
}
# Whose cases run on GPUs too, from the one executable there is for those.
TESTS_ON_GPUS = {"tests/cuda": ["tests/trainer"]}
# Device code compiles by the second only without these.
HOST_LIBRARIES = ("absl/", "yaml-cpp/", "nlohmann/", "hdf5", "mpi.h", "gtest/", "gmock/")

CODE = (".cc", ".h", ".cu", ".cuh", ".inc")
LIMITED = CODE + (".py", ".sh")
TEXT = LIMITED + (".md", ".yaml", ".cmake", ".txt", ".sbatch")
MAX_LINES = 500
MAX_README_LINES = 60
# Beside the boxes; the README at the top may be longer.
README_FOLDERS = ["cmake", "configs", "docs", "kernels", "launch", "tests", "tests/architecture", "tests/checkpoints",
                  "tests/configs", "tests/core", "tests/cuda", "tests/data", "tests/end_to_end", "tests/fixtures",
                  "tests/fuzz", "tests/ops", "tests/parallel", "tests/support", "tests/trainer"]
SKIPPED_TOP = re.compile(r"^(build.*|runs|dist|demo|logs|\..*)$")

INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]')
TEST_MACRO = re.compile(r"^(?:TYPED_)?TEST(?:_[FP])?\s*\(\s*(\w+)\s*,\s*(\w+)\s*\)", re.MULTILINE)
SENTENCE = re.compile(r"^[A-Z][A-Za-z0-9]*$")


def walk(root):
    """Paths of the tree's own files, relative, sorted."""
    for folder, folders, names in os.walk(root):
        if folder == root:
            folders[:] = [name for name in folders if not SKIPPED_TOP.match(name) or name == ".ci"]
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def box_of(path):
    folder = os.path.dirname(path)
    return os.path.dirname(folder) if folder in GROUPS else folder


def read(root, path):
    with open(os.path.join(root, path), encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def is_device(path):
    return path.endswith((".cu", ".cuh", "_cuda.h")) or path.startswith("kernels/cuda/")


def check_device_include(included, quoted):
    if included.startswith(HOST_LIBRARIES):
        return f"device code includes {included}: it may include CUDA, kernels/cuda and its own *_cuda.h only"
    if quoted and not (included.startswith("kernels/cuda/")
                       or re.match(r"kernels/ops/(\w+/)?\w+(_cuda\.h|\.cuh)$", included)):
        return f"device code includes {included}: allowed are kernels/cuda/*, *_cuda.h and *.cuh of kernels/ops"
    return None


def check_include(box, path, included, quoted, top_folders):
    """What is wrong with one include, or None."""
    if "/" not in included and quoted:
        return f'"{included}": include paths start at the repository root'
    if included.startswith(("./", "../")) or "/../" in included:
        return f'"{included}": include paths start at the repository root'
    own = included.split("/")[0] in top_folders
    if own and not quoted:
        return f"<{included}>: Baleen's own headers are included in quotes"
    if box.startswith("tests"):
        allowed = [box, "tests/support", *TESTS_ON_GPUS.get(box, [])]
        if included.startswith("tests/") and os.path.dirname(included) not in allowed:
            return f"{box} includes {included}: a test folder may include itself, tests/support and the libraries"
        return None
    if is_device(path) and box != "kernels/bench":
        fault = check_device_include(included, quoted)
        if fault:
            return fault
    for library, boxes in DOORS.items():
        if included.startswith(library) and box not in boxes:
            return f"{box} includes {included}: only {', '.join(boxes)} may"
    if not own:
        return None
    target = box_of(included)
    if target != box and target not in ALLOWED[box]:
        return f"{box} includes {included}: it may include only {', '.join([box] + ALLOWED[box])}"
    return None


def check_code(root, path, text, top_folders):
    box = box_of(path)
    if box not in ALLOWED and not box.startswith("tests"):
        yield f"{path}:1: the folder {box or '.'} is no box of the architecture (docs/architecture.md)"
        return
    for number, line in enumerate(text.split("\n"), 1):
        match = INCLUDE.match(line)
        if not match:
            continue
        fault = check_include(box, path, match.group(2), match.group(1) == '"', top_folders)
        if fault:
            yield f"{path}:{number}: {fault}"


def check_text(path, text):
    lines = text.split("\n")
    count = len(lines) - (lines[-1] == "")
    name = os.path.basename(path)
    if path.endswith(LIMITED) and count > MAX_LINES:
        yield f"{path}:{count}: {count} lines, at most {MAX_LINES}: split it by idea"
    if name == "README.md" and "/" in path and count > MAX_README_LINES:
        yield f"{path}:{count}: {count} lines, a folder's README has at most {MAX_README_LINES}"
    for number, line in enumerate(lines, 1):
        if "\t" in line:
            yield f"{path}:{number}: a tab"
        if line != line.rstrip():
            yield f"{path}:{number}: space at the end of the line"


def check_tests(root, path, text):
    """Test files are tests/<folder>/<file>_test.cc, named in a CMakeLists.txt, their names sentences."""
    folder, name = os.path.split(path)
    tests = TEST_MACRO.findall(text)
    if not name.endswith("_test.cc"):
        if tests:
            yield f"{path}:1: holds tests, but its name does not end in _test.cc"
        return
    if not re.match(r"^tests/[a-z_]+/([a-z_]+/)?[a-z0-9_]+_test\.cc$", path):
        yield f"{path}:1: test files are tests/<folder>/<file>_test.cc"
    if not tests:
        yield f"{path}:1: a test file without a test"
    for suite, test in tests:
        if not (SENTENCE.match(suite) and SENTENCE.match(test)):
            yield f"{path}:1: TEST({suite}, {test}): names are sentences in CamelCase"
    if not is_built(root, folder, name):
        yield f"{path}:1: no baleen_test of {folder}/CMakeLists.txt builds it"


def is_built(root, folder, name):
    """Its folder's CMakeLists.txt takes every *_test.cc or names it, or that of the folder above names it."""
    above, last = os.path.split(folder)
    for where, wanted in ((folder, "*_test.cc"), (folder, name), (above, f"{last}/{name}")):
        cmake = os.path.join(root, where, "CMakeLists.txt")
        if os.path.exists(cmake) and wanted in read(root, where + "/CMakeLists.txt"):
            return True
    return False


def check_readmes(root):
    for folder in sorted(list(ALLOWED) + README_FOLDERS):
        if os.path.isdir(os.path.join(root, folder)) and not os.path.exists(os.path.join(root, folder, "README.md")):
            yield f"{folder}/README.md:1: is missing: purpose, main types, how to add one"


def check_tree(root):
    paths = list(walk(root))
    top_folders = {path.split("/")[0] for path in paths if "/" in path} | {box.split("/")[0] for box in ALLOWED}
    faults = []
    for path in paths:
        if not path.endswith(TEXT):
            continue
        text = read(root, path)
        faults += check_text(path, text)
        if path.endswith(CODE):
            faults += check_code(root, path, text, top_folders)
        if path.startswith("tests/") and path.endswith(".cc"):
            faults += check_tests(root, path, text)
    faults += check_readmes(root)
    return faults, len(paths)


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", default=os.path.dirname(os.path.dirname(here)))
    arguments = parser.parse_args()
    sys.path.insert(0, here)
    import planted_faults
    if not planted_faults.all_found(check_tree):
        return 1
    faults, num_files = check_tree(arguments.root)
    for fault in faults:
        print(fault)
    print(f"{num_files} files, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
