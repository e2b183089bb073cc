#!/usr/bin/env python3
"""Init, import and export hold a few bands of rows, however large the checkpoint and its tensors.

  export_memory_test.py BINARY

Every command runs under RLIMIT_DATA (heap and private writable mappings; what goes beyond is refused), set to what the
same command needs for a tiny checkpoint, plus the bytes of the large one's largest tensor; the whole checkpoint is
several times that. RssAnon of each rank is sampled. Mapped safetensors are page cache: they count as RssFile.
"""

import os
import resource
import shutil
import subprocess
import sys
import time
import unittest

import harness
from harness import TINY_MODEL, descendants, succeed, write

MIB = 1 << 20
LARGE = {"vocab_size: 264": "vocab_size: 8192", "hidden_size: 32": "hidden_size: 2560",
         "num_hidden_layers: 3": "num_hidden_layers: 2", "moe_intermediate_size: 16": "moe_intermediate_size: 512",
         "\nintermediate_size: 48": "\nintermediate_size: 4096", "n_routed_experts: 8": "n_routed_experts: 16"}
# embed_tokens and lm_head, BF16.
LARGEST_TENSOR = 8192 * 2560 * 2


def status(pid):
    """Bytes of the Rss and Vm lines of a process; nothing of others than baleen."""
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    if fields["Name"] != os.path.basename(harness.BINARY):
        return {}
    return {key: int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile", "VmData") if key in fields}


def measure(*words, folder, ranks, limit=0):
    """Runs a command to its end; the largest value of each field over its processes and its time."""
    command = [harness.BINARY, *words]
    if ranks:
        command = [harness.ROOT + "/launch/mpirun.sh", "-np", str(ranks), *command]
    restrict = (lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))) if limit else None
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, preexec_fn=restrict)
    peaks = {"RssAnon": 0, "RssFile": 0, "VmData": 0}
    while process.poll() is None:
        for pid in [process.pid, *descendants(process.pid)]:
            try:
                for key, value in status(pid).items():
                    peaks[key] = max(peaks[key], value)
            except (OSError, KeyError):
                continue
        time.sleep(0.005)
    output = process.communicate()[0]
    return process.returncode, output, peaks


class ExportMemory(unittest.TestCase):
    longMessage = False

    @classmethod
    def setUpClass(cls):
        cls.base = harness.tempfile.mkdtemp(prefix="baleen-memory-")
        cls.addClassCleanup(shutil.rmtree, cls.base, ignore_errors=True)
        write(os.path.join(cls.base, "tiny.yaml"), TINY_MODEL)
        text = TINY_MODEL
        for old, new in LARGE.items():
            assert old in text, old
            text = text.replace(old, new)
        write(os.path.join(cls.base, "large.yaml"), text)
        for dtype in ("fp8", "bf16"):
            succeed("init", "tiny.yaml", "--to", f"tiny-{dtype}", "--dtype", dtype, folder=cls.base)

    def size(self, name):
        folder = os.path.join(self.base, name)
        return sum(os.path.getsize(os.path.join(folder, file)) for file in os.listdir(folder))

    def check(self, title, command, source, to, ranks, options=()):
        """`command` of the tiny source without a limit, then of the large one under the tiny one's need + a tensor."""
        code, output, tiny = measure(command, f"tiny{source}", "--to", "tiny-out", *options, folder=self.base,
                                     ranks=ranks)
        self.assertEqual(code, 0, output)
        shutil.rmtree(os.path.join(self.base, "tiny-out"))
        limit = tiny["VmData"] + LARGEST_TENSOR
        code, output, large = measure(command, f"large{source}", "--to", to, *options, folder=self.base, ranks=ranks,
                                      limit=limit)
        self.assertEqual(code, 0, f"{title} under RLIMIT_DATA {limit / MIB:.0f} MiB\n{output}")
        total = max(self.size(to), self.size("large-fp8"))
        print(f"\n{title}, {max(1, ranks)} ranks: checkpoint {total / MIB:.0f} MiB, largest tensor "
              f"{LARGEST_TENSOR / MIB:.0f} MiB, RLIMIT_DATA {limit / MIB:.0f} MiB, peak RssAnon "
              f"{large['RssAnon'] / MIB:.1f} MiB (tiny: {tiny['RssAnon'] / MIB:.1f}), RssFile "
              f"{large['RssFile'] / MIB:.0f} MiB", file=sys.stderr)
        self.assertGreater(large["RssAnon"], 0)
        self.assertLess(large["RssAnon"], tiny["RssAnon"] + LARGEST_TENSOR)
        self.assertGreater(total, 4 * limit)

    def test_memory_is_that_of_a_band_of_rows(self):
        # One after the other: each step's output is the next one's source.
        self.check("init fp8", "init", ".yaml", "large-fp8", 2)
        self.check("export fp8 -> bf16", "export", "-fp8", "large-bf16", 0, ("--dtype", "bf16"))
        self.check("export bf16 -> fp8", "export", "-bf16", "large-again", 2)
        # The limit is one: less than a band does not do.
        code, _, _ = measure("export", "large-fp8", "--dtype", "bf16", "--to", "none", folder=self.base, ranks=0,
                             limit=6 * MIB)
        self.assertNotEqual(code, 0)


if __name__ == "__main__":
    harness.main()
