"""Broken run and model files, and overrides: faults for broken_inputs_test.py."""

import os

from harness import TINY_MODEL, read, write

RUN_FILE = """\
run:
  name: broken
  dir: run
model:
  checkpoint: v31
data:
  seq_length: 32
  train:
    - {path: data/train}
stages:
  - name: indexer-warmup
    attention: dense
    train: indexer
    steps: 6
    global_batch_size: 4
    optimizer: {lr: 1.0e-3}
dsa: {index_topk: 8, index_n_heads: 2, index_head_dim: 16}
checkpoint: {interval: 2}
"""


def replaced(old, new, file="run.yaml"):
    """Breaks by replacing the one place where `old` stands."""
    def act(folder):
        path = os.path.join(folder, file)
        text = read(path)
        assert text.count(old) == 1, (old, text.count(old))
        write(path, text.replace(old, new))
    return act


def appended(text):
    return lambda folder: write(os.path.join(folder, "run.yaml"), RUN_FILE + text)


def added(text):
    return lambda folder: write(os.path.join(folder, "run.yaml"), read(os.path.join(folder, "run.yaml")) + text)


def both(first, second):
    def act(folder):
        first(folder)
        second(folder)
    return act


def whole(content):
    return lambda folder: write(os.path.join(folder, "run.yaml"), content)


def from_model_file(old, new):
    """A run from random weights whose model file is broken."""
    def act(folder):
        replaced("checkpoint: v31", "config: model.yaml")(folder)
        replaced(old, new, "model.yaml")(folder)
    return act


def run_file(name, act, *parts, words=(), code=2, ranks=0):
    return {"kind": "run file", "name": name, "break": act, "words": ["train", "run.yaml", *words], "code": code,
            "parts": parts, "ranks": ranks}


def override(name, word, *parts):
    return run_file("override: " + name, lambda folder: None, *parts, words=[word])


CASES = [
    run_file("unknown key", replaced("seq_length", "seq_lenght"),
             "run.yaml:7:3", "unknown key 'seq_lenght' in data", "did you mean 'seq_length'"),
    run_file("key given twice", replaced("  dir: run\n", "  dir: run\n  dir: other\n"), "run.yaml:4:3", "dir", "line 3"),
    run_file("word where a number belongs", replaced("steps: 6", "steps: ten"),
             "run.yaml:14:12", "stages[0].steps", "ten", "integer"),
    run_file("list where a section belongs", replaced("checkpoint: {interval: 2}", "checkpoint: [2]"),
             "run.yaml:18", "checkpoint", "list"),
    run_file("alias", replaced("checkpoint: v31", "checkpoint: &a v31\n  config: *a"), "run.yaml:5:15", "anchor"),
    run_file("tag", replaced("steps: 6", "steps: !!int 6"), "run.yaml:14", "tag"),
    run_file("two documents", appended("---\nrun: {name: second}\n"), "run.yaml:19", "document"),
    run_file("bracket left open", replaced("{interval: 2}", "{interval: 2"), "run.yaml:"),
    run_file("tab as indentation", replaced("  name: broken", "\tname: broken"), "run.yaml:2", "tab"),
    run_file("not UTF-8", whole(RUN_FILE.replace("broken", "br\udce9ken").encode(errors="surrogateescape")),
             "run.yaml:2", "UTF-8"),
    run_file("empty", whole(""), "run.yaml:1:1", "expected sections, found nothing"),
    run_file("a list at the top", whole("- run\n- model\n"), "run.yaml:1:1", "list"),
    run_file("larger than 1 MiB", appended("# " + "x" * (1 << 20) + "\n"), "run.yaml", "1048576"),
    run_file("nested 10000 deep", appended("x: " + "[" * 10000 + "]" * 10000 + "\n"), "run.yaml:19", "deep"),
    run_file("a directory", lambda folder: (os.remove(folder + "/run.yaml"), os.mkdir(folder + "/run.yaml")),
             "run file", "run.yaml", "regular file"),
    run_file("missing", lambda folder: os.remove(folder + "/run.yaml"), "run file", "run.yaml", "No such file"),
    run_file("missing key", replaced("  name: broken\n", ""), "run.yaml:1:1", "missing key 'name' in run", "expected a name"),
    run_file("no stages", replaced(RUN_FILE[RUN_FILE.index("stages:"):RUN_FILE.index("dsa:")], "stages: []\n"),
             "run.yaml:10", "stages", "1"),
    run_file("two models", replaced("checkpoint: v31", "checkpoint: v31\n  config: model.yaml"),
             "run.yaml:4", "model", "checkpoint", "config", "one"),
    run_file("no model", replaced("model:\n  checkpoint: v31", "model: {}"), "run.yaml:4", "checkpoint", "config"),
    run_file("NaN", replaced("lr: 1.0e-3", "lr: .nan"), "run.yaml:16", "optimizer.lr", ".nan", "number"),
    run_file("number out of range", replaced("lr: 1.0e-3", "lr: -1.0"), "run.yaml:16", "optimizer.lr", "-1", "above 0"),
    run_file("integer beyond 64 bits", replaced("steps: 6", "steps: 99999999999999999999"),
             "run.yaml:14:12", "stages[0].steps", "99999999999999999999", "1000000000"),
    run_file("yes for true", replaced("seq_length: 32", "seq_length: 32\n  document_mask: yes"),
             "run.yaml:8:18", "data.document_mask", "yes", "true or false"),
    run_file("no such word", replaced("attention: dense", "attention: spars"),
             "run.yaml:12:16", "attention", "spars", "dense", "sparse"),
    run_file("stages of one name", replaced("dsa:", RUN_FILE[RUN_FILE.index("  - name"):RUN_FILE.index("dsa:")] + "dsa:"),
             "run.yaml:17", "stages[1]", "'indexer-warmup'", "stages[0]"),
    run_file("sparse attention that trains the indexer alone", replaced("attention: dense", "attention: sparse"),
             "indexer-warmup", "attention: sparse", "train: indexer", "attention: dense"),
    run_file("batch no multiple of the micro batch", appended("micro_batch_size: 3\n"),
             "run.yaml", "global_batch_size = 4", "micro_batch_size = 3"),
    run_file("batch no multiple of the ranks", lambda folder: None,
             "indexer-warmup", "global_batch_size = 4", "data 3 = 3", "6", ranks=3),
    run_file("layout larger than the world", appended("parallelism: {tensor: 3}\n"),
             "tensor 3", "1 rank"),
    run_file("heads that do not divide", both(replaced("train: indexer", "train: all"), added("parallelism: {tensor: 3}\n")),
             "indexer-warmup", "parallelism.tensor = 3", "num_attention_heads = 2", "nearest that fit: 2", ranks=3),
    run_file("experts that do not divide", appended("parallelism: {expert: 3}\n"),
             "indexer-warmup", "parallelism.expert = 3", "n_routed_experts = 8", "2 or 4", ranks=3),
    run_file("experts over more ranks than a pipeline stage has", appended("parallelism: {expert: 2, pipeline: 2}\n"),
             "parallelism.expert = 2", "does not divide the 1 ranks", ranks=2),
    run_file("sequence that does not divide", appended("parallelism: {context: 2}\n"),
             "indexer-warmup", "data.seq_length = 30", "2 x tensor x context = 4", "32",
             words=["data.seq_length=30"], ranks=2),
    run_file("layers that do not add up", appended("parallelism: {pipeline: 2, layer_split: [1, 9]}\n"),
             "indexer-warmup", "layer_split = [1, 9]", "the sum is 4", "3 layers", ranks=2),
    run_file("too few microbatches for the schedule",
             both(replaced("train: indexer", "train: all"),
                  added("parallelism: {pipeline: 2, schedule: dualpipev}\nmicro_batch_size: 2\n")),
             "indexer-warmup", "dualpipev", "2 microbatches", "4 microbatches", ranks=2),
    run_file("more parts than layers", appended("parallelism: {pipeline: 4, schedule: zbv}\n"),
             "indexer-warmup", "3 layers", "8", ranks=4),
    run_file("schedule without its parts", appended("parallelism: {schedule: dualpipev, virtual_stages: 3}\n"),
             "run.yaml:19", "virtual_stages = 3", "dualpipev", "2 parts"),
    run_file("warm-up longer than the stage", appended("lr_schedule: {warmup_steps: 7}\n"),
             "run.yaml:19", "warmup_steps = 7", "6 steps"),
    run_file("double precision on a GPU", replaced("  dir: run", "  dir: run\n  device: cuda\nprecision: {compute: fp64}"),
             "run.yaml:5", "precision.compute = fp64", "cpu"),
    run_file("half precision on the CPU", appended("precision: {compute: bf16}\n"),
             "precision.compute = bf16", "cuda", "fp32"),
    run_file("a GPU where none is", replaced("  dir: run", "  dir: run\n  device: cuda"),
             "run.device = cuda", "run.device: cpu", code=3),
    run_file("FP8 GEMMs beside fp32", appended("precision: {gemm: fp8_block, compute: fp32}\n"),
             "precision.gemm = fp8_block", "precision.compute"),
    run_file("half precision moments on the CPU", replaced("{lr: 1.0e-3}", "{lr: 1.0e-3, moments: bf16}"),
             "optimizer.moments = bf16", "fp32"),
    run_file("half precision indexer on the CPU", replaced("index_topk: 8,", "index_topk: 8, indexer_dtype: bf16,"),
             "dsa.indexer_dtype = bf16", "fp32"),
    run_file("faster than deterministic", appended("deterministic: false\n"), "deterministic = false", "leave it true"),
    run_file("checkpoints in the background", replaced("{interval: 2}", "{interval: 2, async: true}"),
             "checkpoint.async = true", "false"),
    run_file("resume asked of a later stage",
             replaced("dsa:", RUN_FILE[RUN_FILE.index("  - name"):RUN_FILE.index("dsa:")].replace("indexer-warmup", "second")
                      + "    checkpoint: {resume: never}\ndsa:"),
             "second", "checkpoint.resume", "top level"),
    run_file("Hadamard of a width that is no power of two",
             replaced("index_head_dim: 16", "index_head_dim: 24, hadamard: true"),
             "indexer-warmup", "dsa.hadamard = true needs an index_head_dim that is a power of two, found 24"),
    run_file("more microbatches than a schedule takes", replaced("global_batch_size: 4", "global_batch_size: 16777216"),
             "indexer-warmup", "global_batch_size = 16777216 over micro_batch_size 1 x data 1 makes 16777216",
             "at most 65536"),
    run_file("sequence longer than the model's", replaced("seq_length: 32", "seq_length: 65"),
             "data.seq_length = 65", "max_position_embeddings = 64"),
    run_file("indexer narrower than its rotation", replaced("index_head_dim: 16", "index_head_dim: 4"),
             "index_head_dim = 4", "qk_rope_head_dim = 8"),
    run_file("no such checkpoint", replaced("checkpoint: v31", "checkpoint: v32"),
             "v32", "expected a directory", code=4),
    run_file("no such token file", replaced("data/train", "data/trian"), "data/trian: no token file", "data/trian.bin and data/trian.idx", code=4),
    run_file("no such state", replaced("{interval: 2}", "{resume: runs/1/checkpoints/step-00000001}"),
             "runs/1/checkpoints/step-00000001", "no such training state", code=4),
    run_file("model file: unknown key", from_model_file("hidden_size: 32", "hiden_size: 32"),
             "model.yaml:2:1", "unknown key 'hiden_size'", "did you mean 'hidden_size'"),
    run_file("model file: groups that do not divide", from_model_file("n_group: 4", "n_group: 3"),
             "model.yaml", "n_group = 3", "n_routed_experts = 8"),
    run_file("model file: missing", replaced("checkpoint: v31", "config: models/tiny.yaml"),
             "models/tiny.yaml", "No such file"),
    override("no such key", "optimzer.lr=1e-4", "command line: optimzer.lr=1e-4", "'optimzer'", "'optimizer'"),
    override("no value", "steps", "command line: steps", "key.path=value"),
    override("out of range", "stages.0.steps=-1", "command line: stages.0.steps=-1", "-1", "1 to 1000000000"),
    override("no such stage", "stages.7.steps=3", "command line: stages.7.steps=3", "a list of 1", "found '7'"),
    override("broken list", "optimizer.betas=[0.9", "command line: optimizer.betas=[0.9"),
]

assert TINY_MODEL.count("n_group: 4") == 1
