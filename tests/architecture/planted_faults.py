"""Faults planted in a small clean tree, one at a time: includes_test must find each, at its place, and nothing else."""

import os
import tempfile

CLEAN = {
    "README.md": "x\n" * 100,
    "Makefile": "all:\n\ttrue\n",
    "kernels/core/tensor.h": "#include <vector>\n",
    "kernels/cuda/warp.cuh": "#include <cuda_bf16.h>\n",
    "kernels/ops/norm.h": '#include "kernels/core/tensor.h"\n',
    "kernels/ops/norm_cuda.h": "#include <cstdint>\n",
    "kernels/ops/norm_tiles.cuh": '#include "kernels/cuda/warp.cuh"\n',
    "kernels/ops/norm_cuda.cu": '#include "kernels/ops/norm_cuda.h"\n#include "kernels/ops/norm_tiles.cuh"\n',
    "kernels/bench/norm_bench.cu": '#include "kernels/ops/norm_cuda.h"\n',
    "configs/schema/run.h": '#include "kernels/core/tensor.h"\n#include "absl/strings/string_view.h"\n',
    "configs/schema/run.cc": '#include "yaml-cpp/yaml.h"\n',
    "checkpoints/state.cc": '#include <hdf5.h>\n\n#include "kernels/ops/norm.h"\n#include "configs/schema/run.h"\n',
    "data/loader.h": '#include "kernels/core/tensor.h"\n',
    "parallel/mpi.cc": '#include <mpi.h>\n\n#include "kernels/ops/norm.h"\n',
    "parallel/grid.h": "#include <string>\n",
    "trainer/model/mla.cc": '#include "parallel/grid.h"\n#include "kernels/ops/norm.h"\n',
    "trainer/step.cc": '#include "trainer/model/mla.h"\n#include "data/loader.h"\n#include "checkpoints/state.h"\n',
    "tests/ops/CMakeLists.txt": "baleen_test(NAME ops SOURCES norm_test.cc cuda/plan_test.cc)\n",
    "tests/ops/cuda/plan_test.cc": "TEST(Plan, FitsTheSharedMemory) {}\n",
    "tests/ops/norm_test.cc": '#include <mpi.h>\n\n#include "tests/support/r.h"\nTEST(Norm, DividesByTheRoot) {}\n',
    "tests/support/r.h": '#include "kernels/core/tensor.h"\n',
    "build/x/CMakeFiles/a.cc": '#include "trainer/step.h"\t\n',
}
BOXES = ["kernels", "kernels/core", "kernels/cuda", "kernels/ops", "kernels/bench", "configs", "configs/schema",
         "checkpoints", "data", "parallel", "trainer", "trainer/model", "tests", "tests/ops", "tests/support"]
CLEAN.update({box + "/README.md": "purpose\n" for box in BOXES})

# file, its new contents (None: removed), the place and a part of the message
PLANTED = [
    ("kernels/core/tensor.h", '#include "kernels/ops/norm.h"\n', "kernels/core/tensor.h:1: kernels/core includes"),
    ("kernels/ops/norm.h", '\n#include "parallel/grid.h"\n', "kernels/ops/norm.h:2: kernels/ops includes"),
    ("kernels/ops/norm.h", "#include <mpi.h>\n", "kernels/ops/norm.h:1: kernels/ops includes mpi.h"),
    ("kernels/ops/norm_cuda.cu", '#include "absl/status/status.h"\n', "norm_cuda.cu:1: device code includes absl"),
    ("kernels/ops/norm_cuda.cu", '#include "kernels/core/tensor.h"\n', "norm_cuda.cu:1: device code includes kernels"),
    ("kernels/ops/norm_cuda.h", '#include "kernels/ops/norm.h"\n', "norm_cuda.h:1: device code includes kernels"),
    ("kernels/cuda/warp.cuh", "#include <nlohmann/json.hpp>\n", "warp.cuh:1: device code includes nlohmann"),
    ("configs/schema/run.h", '#include "checkpoints/state.h"\n', "run.h:1: configs/schema includes"),
    ("checkpoints/state.cc", '#include "data/loader.h"\n', "state.cc:1: checkpoints includes data/loader.h"),
    ("checkpoints/state.cc", '#include "yaml-cpp/yaml.h"\n', "state.cc:1: checkpoints includes yaml-cpp"),
    ("trainer/step.cc", "#include <hdf5.h>\n", "step.cc:1: trainer includes hdf5.h: only checkpoints, data may"),
    ("data/loader.h", '#include "parallel/grid.h"\n', "loader.h:1: data includes parallel/grid.h"),
    ("parallel/grid.h", '  #  include "checkpoints/state.h"\n', "grid.h:1: parallel includes checkpoints"),
    ("trainer/model/mla.cc", '#include "trainer/step.h"\n', "mla.cc:1: trainer/model includes trainer/step.h"),
    ("trainer/model/mla.cc", '#include "data/loader.h"\n', "mla.cc:1: trainer/model includes data/loader.h"),
    ("trainer/step.cc", '#include "kernels/cuda/warp.cuh"\n', "step.cc:1: trainer includes kernels/cuda"),
    ("trainer/step.cc", '#include "tests/support/r.h"\n', "step.cc:1: trainer includes tests/support"),
    ("trainer/step.cc", '#include "step.h"\n', 'step.cc:1: "step.h": include paths start'),
    ("trainer/step.cc", '#include "../data/loader.h"\n', "step.cc:1: \"../data/loader.h\": include paths start"),
    ("trainer/step.cc", "#include <data/loader.h>\n", "step.cc:1: <data/loader.h>: Baleen's own"),
    ("util/strings.cc", "\n", "util/strings.cc:1: the folder util is no box"),
    ("trainer/step.cc", "int x;\n" * 501, "trainer/step.cc:501: 501 lines"),
    ("launch/tool.sh", "true\n" * 501, "launch/tool.sh:501: 501 lines"),
    ("data/README.md", "x\n" * 61, "data/README.md:61: 61 lines"),
    ("data/README.md", None, "data/README.md:1: is missing"),
    ("trainer/step.cc", "\tint x;\n", "trainer/step.cc:1: a tab"),
    ("trainer/step.cc", "int x; \n", "trainer/step.cc:1: space at the end"),
    ("tests/ops/other_test.cc", "TEST(A, B) {}\n", "tests/ops/other_test.cc:1: no baleen_test"),
    ("tests/ops/cuda/other_test.cc", "TEST(A, B) {}\n", "tests/ops/cuda/other_test.cc:1: no baleen_test"),
    ("tests/ops/helper.cc", "TEST(A, B) {}\n", "tests/ops/helper.cc:1: holds tests"),
    ("tests/ops/norm_test.cc", "int x;\n", "tests/ops/norm_test.cc:1: a test file without a test"),
    ("tests/ops/norm_test.cc", "TEST(Norm, divides_by) {}\n", "norm_test.cc:1: TEST(Norm, divides_by)"),
    ("tests/ops/norm_test.cc", '#include "tests/data/d.h"\nTEST(N, A) {}\n', "norm_test.cc:1: tests/ops includes"),
]


def write(root, path, text):
    full = os.path.join(root, path)
    os.makedirs(os.path.dirname(full), exist_ok=True)
    with open(full, "w", encoding="utf-8") as file:
        file.write(text)


def all_found(check_tree):
    """True when the clean tree has no fault and every planted one is found."""
    good = True
    with tempfile.TemporaryDirectory() as root:
        for path, text in CLEAN.items():
            write(root, path, text)
        faults, _ = check_tree(root)
        if faults:
            print("self-test: faults in a clean tree:", *faults, sep="\n  ")
            good = False
        for path, text, expected in PLANTED:
            if text is None:
                os.remove(os.path.join(root, path))
            else:
                write(root, path, text)
            if path.startswith("launch/"):  # a folder that exists needs its README
                write(root, "launch/README.md", "purpose\n")
            faults, _ = check_tree(root)
            if len(faults) != 1 or expected not in faults[0]:
                print(f"self-test: planted {text!r:.60} in {path}; expected one fault with '{expected}', found:",
                      *faults, sep="\n  ")
                good = False
            if path in CLEAN:
                write(root, path, CLEAN[path])
            else:
                os.remove(os.path.join(root, path))
    return good
