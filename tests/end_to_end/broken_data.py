"""Broken token files and training states: faults for broken_inputs_test.py."""

import json
import os
import re
import shutil
import struct

from harness import Safetensors, read, run, write

HEADER = 34  # bytes of an .idx before its arrays
NEWEST = "run/checkpoints/step-00000004"


def patched(path, offset, content):
    """Breaks by writing `content` over a file's bytes; a negative offset counts from the end."""
    def act(folder):
        place = os.path.join(folder, path)
        data = bytearray(read(place, "rb"))
        at = offset + len(data) if offset < 0 else offset
        data[at:at + len(content)] = content
        write(place, bytes(data))
    return act


def cut(path, num_bytes):
    def act(folder):
        place = os.path.join(folder, path)
        write(place, read(place, "rb")[:-num_bytes])
    return act


def longer(path, content):
    return lambda folder: write(os.path.join(folder, path), read(os.path.join(folder, path), "rb") + content)


def removed(path):
    return lambda folder: os.remove(os.path.join(folder, path))


def tokens(name, act, *parts, words=("train", "run.yaml")):
    return {"kind": "token file", "name": name, "break": act, "words": list(words), "code": 4, "parts": parts}


def one_short_document(folder):
    write(folder + "/data/train.bin", struct.pack("<10H", *range(2, 12)))
    write(folder + "/data/train.idx", b"MMIDIDX\0\0" + struct.pack("<QBQQiqqq", 1, 8, 1, 2, 10, 0, 0, 1))


IDX, BIN = "data/train.idx", "data/train.bin"
NUM_SEQUENCES = 10
POINTERS = HEADER + 4 * NUM_SEQUENCES
DOCUMENTS = HEADER + 12 * NUM_SEQUENCES

TOKENS = [
    tokens("no .bin", removed(BIN), BIN, "No such file"),
    tokens("no .idx", removed(IDX), IDX, "No such file"),
    tokens("magic", patched(IDX, 0, b"MMIDIDY"), IDX, "bytes 0-8", "MMIDIDX"),
    tokens("version", patched(IDX, 9, b"\2"), IDX, "byte 9", "found 2", "expected 1"),
    tokens("type", patched(IDX, 17, b"\7"), IDX, "byte 17", "found 7 (f32)", "expected 1 (u8), 4 (i32) or 8 (u16)"),
    tokens("2^63 sequences", patched(IDX, 18, struct.pack("<Q", 1 << 63)),
           IDX, "byte 18", "9223372036854775808", "at most"),
    tokens("2^60 documents", patched(IDX, 26, struct.pack("<Q", 1 << 60)),
           IDX, "byte 26", "1152921504606846976", "at most"),
    tokens(".idx cut", cut(IDX, 8), IDX, "found 11", "at most 10"),
    tokens(".idx longer", longer(IDX, b"\0" * 8), IDX, "the file has 250 bytes", "expected 242"),
    tokens(".idx empty", lambda folder: write(os.path.join(folder, IDX), b""), IDX, "0 bytes", "header of 34"),
    tokens("negative length", patched(IDX, HEADER + 4 * 3, struct.pack("<i", -7)), IDX, "sequence 3", "found -7"),
    tokens("length beyond the file", patched(IDX, HEADER + 4 * 9, struct.pack("<i", 1 << 30)), IDX, "sequence 9", BIN),
    tokens("byte offset", patched(IDX, POINTERS + 8 * 3, struct.pack("<q", 1 << 40)),
           IDX, "byte offset of sequence 3", "found 1099511627776"),
    tokens("documents that do not end at the last sequence", patched(IDX, DOCUMENTS + 8 * 10, struct.pack("<q", 9)),
           IDX, "document index (10)", "found sequence 9", "expected 10"),
    tokens("documents that go back", patched(IDX, DOCUMENTS + 8 * 5, struct.pack("<q", 2)),
           IDX, "document index 5", "found sequence 2", "from 4 to 10"),
    tokens("documents that begin late", patched(IDX, DOCUMENTS, struct.pack("<q", 1)),
           IDX, "document index 0", "expected 0"),
    tokens(".bin cut", cut(BIN, 2), IDX, BIN, "truncated"),
    tokens(".bin of half a token more", longer(BIN, b"\0"), BIN, "multiple of 2"),
    tokens(".bin longer", longer(BIN, b"\0\0"), BIN, IDX, "expected"),
    tokens("less than one sample", one_short_document, "data/train", "10", "33"),
    tokens("token outside the vocabulary", patched(BIN, 2 * 5000, struct.pack("<H", 264)),
           "data/train", "264", "token 5000", words=("train", "run.yaml", "--dry-run")),
    tokens("token outside the tokenizer's vocabulary", patched(BIN, 2 * 5000, struct.pack("<H", 258)),
           "data/train", "258", "token 5000", words=("inspect", "data/train", "--verify")),
]


def state(name, act, *parts, words=("train", "run.yaml", "checkpoint.resume=" + NEWEST), code=4):
    return {"kind": "training state", "name": name, "break": act, "words": list(words), "code": code, "parts": parts}


def other_run(name, *overrides_and_parts):
    """The state is good, the run file asks for something else."""
    overrides = [word for word in overrides_and_parts if isinstance(word, tuple)][0]
    parts = [word for word in overrides_and_parts if not isinstance(word, tuple)]
    return state("other run: " + name, lambda folder: None, NEWEST, "belongs to another run", *parts,
                 words=("train", "run.yaml", *overrides))


def rehashed(old, new):
    """Changes the manifest and its hash: what only a newer or a hostile writer could have made."""
    def act(folder):
        path = os.path.join(folder, NEWEST, "manifest.json")
        text = read(path)
        assert old in text, text[:600]
        text = text.replace(old, new, 1)
        write(path, text)
        # The message about the wrong hash says what it should be.
        said = run("inspect", NEWEST, folder=folder)
        right = re.search(r"hash to ([0-9a-f]{32})", said.err + said.out)
        write(path, text.replace(json.loads(text)["hash"], right.group(1), 1))
    return act


def rank_file_of_step_2(folder):
    shutil.copy(os.path.join(folder, "run/checkpoints/step-00000002/rank-00000.h5"), os.path.join(folder, NEWEST))


def another_checkpoint_under_the_name(folder):
    path = os.path.join(folder, "v31/model-00001-of-00001.safetensors")
    file = Safetensors(path)
    file.header["__metadata__"] = {"format": "pt", "changed": "yes"}
    write(path, file.with_header())


def renamed(folder):
    os.rename(os.path.join(folder, NEWEST), os.path.join(folder, "run/checkpoints/step-00000009"))


MANIFEST, RANK_FILE = NEWEST + "/manifest.json", NEWEST + "/rank-00000.h5"
EXPORT = ("export", NEWEST, "--to", "out")

STATES = [
    state("torn manifest", cut(MANIFEST, 100), MANIFEST, "changed since it was written"),
    state("flipped bit in the manifest", patched(MANIFEST, 500, b"\x01"), MANIFEST, "hash to", "it says"),
    state("empty manifest", lambda folder: write(os.path.join(folder, MANIFEST), b""), MANIFEST, "no manifest"),
    state("no manifest", removed(MANIFEST), MANIFEST, "the file is missing"),
    state("flipped byte in a rank file", patched(RANK_FILE, 20000, b"\xff\x00\xff"), RANK_FILE, "hash", "manifest"),
    state("torn rank file", cut(RANK_FILE, 1), RANK_FILE, "bytes, the manifest says"),
    state("missing rank file", removed(RANK_FILE), RANK_FILE, "the file is missing"),
    state("rank file of another step", rank_file_of_step_2, RANK_FILE, "manifest"),
    state("directory of another name", renamed, "step-00000009", "manifest is of step 4",
          words=("train", "run.yaml", "checkpoint.resume=run/checkpoints/step-00000009")),
    state("no state at the path", lambda folder: None, "data", "manifest.json",
          words=("train", "run.yaml", "checkpoint.resume=data")),
    state("written by a newer Baleen", rehashed('"version": 1', '"version": 2'), MANIFEST, "format version 2", "up to 1",
          code=3),
    state("file name that leaves the directory", rehashed('"name":"rank-00000.h5"', '"name":"../00000.h5"'),
          MANIFEST, "../00000.h5", "not a plain file name"),
    state("piece outside its tensor", rehashed('"flat":[0,', '"flat":[1,'), MANIFEST),
    other_run("seed", ("run.seed=5",), "run.seed: the state has 1234, the run file 5"),
    other_run("data", ("data.train=[{path: data/validation}]",), "data.train", "data/train*1", "data/validation*1"),
    other_run("batch", ("stages.0.global_batch_size=8",), "global_batch_size: the state has 4, the run file 8"),
    other_run("model", ("model.checkpoint=sharded",), "model: the state has v31, the run file sharded"),
    other_run("sizes", ("dsa.index_topk=4",), "model sizes"),
    other_run("precision", ("precision.compute=fp64",), "precision.compute", "fp64"),
    state("frozen source changed", another_checkpoint_under_the_name, NEWEST, "v31", "changed since the state was saved",
          "found hash", words=("train", "run.yaml")),
    state("export: frozen source changed", another_checkpoint_under_the_name, NEWEST, "changed since the state was saved",
          words=EXPORT),
    state("export: flipped byte", patched(RANK_FILE, 20000, b"\xff\x00\xff"), RANK_FILE, "hash", words=EXPORT),
    state("export: torn manifest", cut(MANIFEST, 100), MANIFEST, "changed since it was written", words=EXPORT),
    state("export: no run file", removed("run/run.yaml"), NEWEST, "--run", words=EXPORT, code=2),
    state("inspect: flipped byte", patched(RANK_FILE, 20000, b"\xff\x00\xff"), NEWEST,
          words=("inspect", NEWEST, "--verify")),
]

CASES = TOKENS + STATES
