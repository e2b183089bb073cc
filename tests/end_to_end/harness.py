"""What the end-to-end tests share: the binary, a tiny model, runs of it, and files to look at and to break.

Every script is called as `NAME_test.py BINARY`, uses Python's standard library only and works in a temporary folder.
"""

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BINARY = ""

# 1 dense and 2 MoE layers and an MTP module, 4 expert groups, YaRN in effect; small enough for steps of milliseconds.
TINY_MODEL = """\
vocab_size: 264
hidden_size: 32
num_hidden_layers: 3
first_k_dense_replace: 1
num_nextn_predict_layers: 1
intermediate_size: 48
moe_intermediate_size: 16
n_routed_experts: 8
n_shared_experts: 1
num_experts_per_tok: 2
n_group: 4
topk_group: 2
routed_scaling_factor: 2.5
num_attention_heads: 2
q_lora_rank: 24
kv_lora_rank: 16
qk_nope_head_dim: 16
qk_rope_head_dim: 8
v_head_dim: 16
rope_scaling:
  type: yarn
  factor: 4
  original_max_position_embeddings: 16
  beta_fast: 32
  beta_slow: 1
  mscale: 1.0
  mscale_all_dim: 1.0
max_position_embeddings: 64
initializer_range: 0.1
"""

WARMUP = "{name: indexer-warmup, attention: dense, train: indexer, steps: %d, global_batch_size: 4, optimizer: {lr: 1.0e-2}}"
SPARSE = "{name: sparse, attention: sparse, train: all, steps: %d, global_batch_size: 4, optimizer: {lr: 1.0e-3}}"
DENSE = "{name: dense, attention: dense, train: all, steps: %d, global_batch_size: 4, optimizer: {lr: 1.0e-3}}"


def run_yaml(stages, checkpoint="v31", run_dir="run", sections=""):
    """A run file; `stages` are WARMUP, SPARSE, DENSE with their steps, `sections` more lines."""
    lines = [
        f"run: {{name: end-to-end, dir: {run_dir}}}",
        f"model: {{checkpoint: {checkpoint}}}",
        "data: {seq_length: 32, train: [{path: data/train}], validation: [{path: data/validation}]}",
        "stages:",
        *(f"  - {stage}" for stage in stages),
        "dsa: {index_topk: 8, index_n_heads: 2, index_head_dim: 16}",
        "validation: {interval: 0}",
        sections,
    ]
    return "\n".join(lines) + "\n"


class Result:
    """How a command ended, and what it said."""

    def __init__(self, words, code, out, err, seconds):
        self.words, self.code, self.out, self.err, self.seconds = words, code, out, err, seconds

    def __str__(self):
        return f"baleen {' '.join(self.words)}\nexit {self.code} after {self.seconds:.1f} s\n{self.out}{self.err}"


def _command(words, ranks):
    launcher = [ROOT + "/launch/mpirun.sh", "-np", str(ranks)] if ranks else []
    return [*launcher, BINARY, *words]


def run(*words, folder, ranks=0, timeout=120):
    """Runs a command to its end; `ranks` 0 calls the binary itself."""
    start = time.monotonic()
    done = subprocess.run(_command(words, ranks), cwd=folder, capture_output=True, text=True, errors="replace",
                          timeout=timeout, stdin=subprocess.DEVNULL)
    return Result(words, done.returncode, done.stdout, done.stderr, time.monotonic() - start)


def succeed(*words, folder, ranks=0, timeout=120):
    result = run(*words, folder=folder, ranks=ranks, timeout=timeout)
    if result.code != 0:
        raise AssertionError(str(result))
    return result


class Background:
    """A command that runs while the test looks on. Its output goes to a file, so that it never waits for a reader."""

    def __init__(self, *words, folder, ranks=0):
        self.words = words
        self.start = time.monotonic()
        self.output = tempfile.TemporaryFile("w+", errors="replace")
        self.process = subprocess.Popen(_command(words, ranks), cwd=folder, stdout=self.output, stderr=self.output,
                                        stdin=subprocess.DEVNULL, start_new_session=True)

    def running(self):
        return self.process.poll() is None

    def wait_until(self, condition, seconds=60, pause=0.002):
        """True once `condition()` holds; False when the command ended before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.running():
                return condition()
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"waited {seconds} s in vain\n{self.finish()}")
            time.sleep(pause)
        return True

    def kill(self):
        """SIGKILL to the launcher and every process below it (ranks have process groups of their own)."""
        for pid in reversed([self.process.pid, *descendants(self.process.pid)]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def finish(self, seconds=120):
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self.process.wait()
        self.output.seek(0)
        text = self.output.read()
        self.output.close()
        return Result(self.words, code, text, "", time.monotonic() - self.start)


def descendants(pid):
    """Process ids below `pid`, parents first."""
    children = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError):
                with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found = []
    queue = [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def read(path, mode="r"):
    with open(path, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
        return file.read()


def write(path, content):
    binary = isinstance(content, bytes)
    with open(path, "wb" if binary else "w", **({} if binary else {"encoding": "utf-8"})) as file:
        file.write(content)


def write_text_corpus(folder, files=12, words=400, seed=1):
    """Text with some structure: words of a small vocabulary, the next drawn by a table of the one before."""
    draw = random.Random(seed)
    vocabulary = "whales with baleen filter an ocean and keep what matters so does top k attention".split()
    following = {word: draw.sample(vocabulary, 4) for word in vocabulary}
    os.makedirs(folder)
    for i in range(files):
        word = draw.choice(vocabulary)
        text = []
        for _ in range(words):
            text.append(word)
            word = draw.choice(following[word])
        write(os.path.join(folder, f"{i:02}.txt"), " ".join(text))


def make_inputs(folder, dtypes=("fp8",)):
    """model.yaml, text/, data/train, data/validation, and random checkpoints: v31 (FP8) and v31-bf16."""
    write(os.path.join(folder, "model.yaml"), TINY_MODEL)
    write_text_corpus(os.path.join(folder, "text"))
    os.makedirs(os.path.join(folder, "data"))
    for name, inputs in (("train", range(2, 12)), ("validation", range(0, 2))):
        files = [f"text/{i:02}.txt" for i in inputs]
        succeed("data", "build", *files, "--to", f"data/{name}", "--tokenizer", "bytes", "--append-eod", folder=folder)
    for dtype in dtypes:
        name = "v31" if dtype == "fp8" else f"v31-{dtype}"
        succeed("init", "model.yaml", "--to", name, "--dtype", dtype, "--seed", "7", folder=folder)


def tree(folder):
    """{relative path: hash of the contents} of all files, links and directories below."""
    found = {}
    for parent, directories, files in os.walk(folder):
        for name in directories + files:
            path = os.path.join(parent, name)
            key = os.path.relpath(path, folder)
            if os.path.islink(path):
                found[key] = "link " + os.readlink(path)
            elif os.path.isfile(path):
                found[key] = hashlib.sha256(read(path, "rb")).hexdigest()
            else:
                found[key] = "directory" if os.path.isdir(path) else "special"
    return found


def changes(before, after):
    """What differs between two trees, as one readable line each."""
    return ([f"new: {path}" for path in sorted(after.keys() - before.keys())] +
            [f"gone: {path}" for path in sorted(before.keys() - after.keys())] +
            [f"changed: {path}" for path in sorted(before.keys() & after.keys()) if before[path] != after[path]])


def metrics(run_dir, kind="step"):
    records = [json.loads(line) for line in read(os.path.join(run_dir, "metrics.jsonl")).splitlines()]
    return [record for record in records if record["kind"] == kind]


def states(run_dir):
    """Names of the training states of a run, oldest first."""
    folder = os.path.join(run_dir, "checkpoints")
    if not os.path.isdir(folder):
        return []
    return sorted(name for name in os.listdir(folder) if name.startswith("step-") and name[5:].isdigit())


def manifest(run_dir, state=None):
    state = state or states(run_dir)[-1]
    return json.loads(read(os.path.join(run_dir, "checkpoints", state, "manifest.json")))


class Safetensors:
    """A safetensors file as header and data. Reads no more than the format says, checks nothing."""

    def __init__(self, path):
        content = read(path, "rb")
        (length,) = struct.unpack("<Q", content[:8])
        self.header = json.loads(content[8:8 + length])
        self.data = content[8 + length:]

    def names(self):
        return [name for name in self.header if name != "__metadata__"]

    def raw(self, name):
        begin, end = self.header[name]["data_offsets"]
        return self.data[begin:end]

    def with_header(self, text=None):
        """The file's bytes with this header (the object, or any text)."""
        text = json.dumps(self.header) if text is None else text
        encoded = text if isinstance(text, bytes) else text.encode()
        return struct.pack("<Q", len(encoded)) + encoded + self.data


def checkpoint_tensors(folder):
    """{name: (dtype, shape, bytes)} of a Hugging Face directory."""
    tensors = {}
    for shard in sorted(os.listdir(folder)):
        if shard.endswith(".safetensors"):
            file = Safetensors(os.path.join(folder, shard))
            for name in file.names():
                entry = file.header[name]
                tensors[name] = (entry["dtype"], entry["shape"], file.raw(name))
    return tensors


def relative_difference(a, b):
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b), math.ulp(0.0))


class Case(unittest.TestCase):
    """A test with a temporary folder of its own, and its class's inputs in `self.base`, made once."""

    dtypes = ("fp8",)
    longMessage = False  # a failure shows the command and its output once

    @classmethod
    def setUpClass(cls):
        cls.base = tempfile.mkdtemp(prefix="baleen-")
        cls.addClassCleanup(shutil.rmtree, cls.base, ignore_errors=True)
        make_inputs(cls.base, cls.dtypes)

    def write_run(self, name, stages, **options):
        write(os.path.join(self.base, name), run_yaml(stages, **options))

    def path(self, *parts):
        return os.path.join(self.base, *parts)

    def assertExit(self, result, code, *parts):
        self.assertEqual(result.code, code, str(result))
        for part in parts:
            self.assertIn(part, result.err + result.out, str(result))


def main():
    global BINARY
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} BINARY [unittest's arguments]")
    BINARY = os.path.abspath(sys.argv.pop(1))
    # The ranks of these tests are one machine's and may be root's, as in containers.
    os.environ.update({"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these tests are of the CPU, on machines with a GPU too
    unittest.main(module="__main__", verbosity=2)
