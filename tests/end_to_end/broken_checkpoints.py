"""Broken Hugging Face checkpoints (safetensors, index, config.json): faults for broken_inputs_test.py."""

import json
import os
import struct

from harness import Safetensors, read, write

SHARD = "v31/model-00001-of-00001.safetensors"
INDEX = "v31/model.safetensors.index.json"
CONFIG = "v31/config.json"
NORM = "model.norm.weight"  # F32 [32]
LINEAR = "model.layers.0.self_attn.q_a_proj.weight"  # FP8 [24, 32]


def case(kind, name, act, parts, source="v31", words=None):
    return {"kind": kind, "name": name, "break": act, "parts": parts, "code": 4,
            "words": words or ["train", "run.yaml", f"model.checkpoint={source}"]}


def shard(name, act, *parts, words=None):
    """`act(Safetensors)` changes it in place, or returns the new bytes."""
    def broken(folder):
        path = os.path.join(folder, SHARD)
        file = Safetensors(path)
        content = act(file)
        write(path, file.with_header() if content is None else content)
    return case("safetensors", name, broken, [SHARD, *parts], words=words)


def whole_file(folder_act, name, *parts):
    return case("safetensors", name, folder_act, parts)


def index(name, act, *parts, source="v31", path=INDEX):
    """`act(object)` changes the index in place, or returns the new text."""
    def broken(folder):
        place = os.path.join(folder, path)
        value = json.loads(read(place))
        text = act(value)
        write(place, json.dumps(value) if text is None else text)
    return case("index.json", name, broken, parts, source)


def config(name, act, *parts):
    def broken(folder):
        place = os.path.join(folder, CONFIG)
        value = json.loads(read(place))
        text = act(value)
        write(place, json.dumps(value) if text is None else text)
    return case("config.json", name, broken, [CONFIG, *parts])


def keys(**values):
    return lambda value: value.update(values)


def without(key):
    return lambda value: value.pop(key) and None


def entry(name, **values):
    """Changes a tensor's dtype, shape or data_offsets."""
    return lambda file: file.header[name].update(values)


def shifted(name, by, more_data=b""):
    def act(file):
        file.header[name]["data_offsets"] = [offset + by for offset in file.header[name]["data_offsets"]]
        file.data += more_data
    return act


def last_name(file):
    return max(file.names(), key=lambda name: file.header[name]["data_offsets"][1])


def hole_before_the_last(file):
    shifted(last_name(file), 4, b"\0" * 4)(file)


def scale_value(value):
    def act(file):
        begin, end = file.header[LINEAR + "_scale_inv"]["data_offsets"]
        file.data = file.data[:begin] + struct.pack("<f", value) + file.data[end:]
    return act


def without_tensor(name):
    """The checkpoint without one tensor: taken from shard and index, no hole left."""
    def act(folder):
        path = os.path.join(folder, SHARD)
        file = Safetensors(path)
        begin, end = file.header.pop(name)["data_offsets"]
        file.data = file.data[:begin] + file.data[end:]
        for other in file.names():
            offsets = file.header[other]["data_offsets"]
            if offsets[0] >= end:
                file.header[other]["data_offsets"] = [offset - (end - begin) for offset in offsets]
        write(path, file.with_header())
        value = json.loads(read(os.path.join(folder, INDEX)))
        del value["weight_map"][name]
        write(os.path.join(folder, INDEX), json.dumps(value))
    return act


def with_tensor(name):
    def act(folder):
        path = os.path.join(folder, SHARD)
        file = Safetensors(path)
        file.header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [len(file.data), len(file.data) + 4]}
        file.data += b"\0" * 4
        write(path, file.with_header())
        value = json.loads(read(os.path.join(folder, INDEX)))
        value["weight_map"][name] = os.path.basename(SHARD)
        write(os.path.join(folder, INDEX), json.dumps(value))
    return act


def shard_as_link_to(target):
    def act(folder):
        os.remove(os.path.join(folder, SHARD))
        os.symlink(target, os.path.join(folder, SHARD))
    return act


def header_text(old, new):
    return lambda file: file.with_header(json.dumps(file.header).replace(old, new, 1))


def second_shard(folder):
    return sorted(name for name in os.listdir(folder + "/sharded") if name.endswith(".safetensors"))[1]


def in_the_wrong_shard(value):
    names = sorted(set(value["weight_map"].values()))
    value["weight_map"][NORM] = names[0] if value["weight_map"][NORM] != names[0] else names[1]


SAFETENSORS = [
    shard("empty", lambda file: b"", "0 bytes", "at least 8"),
    shard("cut by a byte", lambda file: file.with_header()[:-1], "header describes", "the file has", "truncated"),
    shard("cut in the header", lambda file: file.with_header()[:1000], "header should end at byte", "only 1000"),
    shard("header length 2^63", lambda file: struct.pack("<Q", 1 << 63) + file.with_header()[8:],
          "9223372036854775808", "the limit is 100000000"),
    shard("header length beyond the file", lambda file: struct.pack("<Q", 90_000_000) + file.with_header()[8:],
          "header should end at byte 90000008", "truncated"),
    shard("header is no JSON", lambda file: file.with_header("{" + json.dumps(file.header)),
          "not valid JSON", "line 1, column 2"),
    shard("tensor named twice", header_text("{", '{"%s": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, ' % NORM),
          NORM, "twice"),
    shard("tensors overlap", lambda file: shifted(last_name(file), -4)(file), "begins at byte", "overlap"),
    shard("hole between tensors", hole_before_the_last, "begins at byte", "a hole before it"),
    shard("trailing bytes", lambda file: file.with_header() + b"\0", "trailing bytes"),
    shard("dtype that is none of ours", entry(LINEAR, dtype="F8_E8M0"), LINEAR, "F8_E8M0", "expected one of", "F8_E4M3"),
    shard("dtype that does not fit the bytes", entry(NORM, dtype="BF16"), NORM, "expected 64 bytes for BF16[32]"),
    shard("integers for weights", entry(NORM, dtype="I32"), NORM, "I32", "F32"),
    shard("shape that config.json does not give", entry(LINEAR, shape=[32, 24]), LINEAR, "[32, 24]", "[24, 32]"),
    shard("shape larger than any file", entry(NORM, shape=[1 << 40, 1 << 40]), NORM, "larger than any file"),
    shard("negative offset", entry(NORM, data_offsets=[-4, 124]), NORM, "-4", "0 to 2^53"),
    shard("offset with a fraction", entry(NORM, data_offsets=[0.5, 128.5]), NORM, "found a number", "an integer"),
    shard("control characters in a name", header_text(f'"{NORM}"', '"model.\\u001b[31mnorm"'), "control characters"),
    shard("name that is not UTF-8", lambda file: file.with_header(json.dumps(file.header).encode().replace(
        NORM.encode(), b"model.n\xffrm.weight")), "UTF-8", "byte"),
    shard("scale that is negative", scale_value(-1.0), LINEAR + "_scale_inv", "block [0, 0] is -1", "0 or more"),
    shard("scale that is infinite", scale_value(float("inf")), LINEAR + "_scale_inv", "block [0, 0] is inf", "finite"),
    whole_file(without_tensor(LINEAR + "_scale_inv"), "missing scale", "v31", LINEAR, "F8_E4M3", LINEAR + "_scale_inv"),
    whole_file(without_tensor(NORM), "missing tensor", "v31", NORM, "missing", "[32]"),
    whole_file(with_tensor("model.layers.0.self_attn.q_proj.weight"), "unknown tensor",
               "v31", "model.layers.0.self_attn.q_proj.weight"),
    whole_file(shard_as_link_to("/dev/zero"), "device for a file", SHARD, "regular file"),
    whole_file(shard_as_link_to("."), "directory for a file", SHARD, "regular file"),
]

INDEXES = [
    index("path out of the directory", lambda v: v["weight_map"].update({NORM: "../v31/" + os.path.basename(SHARD)}),
          INDEX, NORM, "../v31/", "not a plain name"),
    index("absolute path", lambda v: v["weight_map"].update({NORM: "/etc/passwd.safetensors"}),
          INDEX, NORM, "/etc/passwd.safetensors", "not a plain name"),
    index("NUL in a file name", lambda v: v["weight_map"].update({NORM: "a\0.safetensors"}), INDEX, NORM),
    index("not a safetensors file", lambda v: v["weight_map"].update({NORM: "pytorch_model.bin"}),
          INDEX, NORM, "pytorch_model.bin", ".safetensors"),
    case("index.json", "missing shard", lambda folder: os.remove(f"{folder}/sharded/{second_shard(folder)}"),
         ["sharded/model-00002-of-", "No such file"], "sharded"),
    index("tensor in the wrong shard", in_the_wrong_shard, NORM, "model-0000", source="sharded",
          path="sharded/model.safetensors.index.json"),
    index("tensor in no shard", lambda v: v["weight_map"].update({"model.extra.weight": os.path.basename(SHARD)}),
          INDEX, "model.extra.weight", os.path.basename(SHARD), "does not have it"),
    index("tensor not listed", lambda v: v["weight_map"].pop(NORM) and None, SHARD, NORM, "does not list"),
    index("not JSON", lambda v: "weight_map: {}", INDEX, "not valid JSON", "column 1"),
    index("cut off", lambda v: json.dumps(v)[:-30], INDEX, "not valid JSON", "missing closing quote"),
    index("tensor listed twice", lambda v: json.dumps(v).replace(
        '"weight_map": {', '"weight_map": {"%s": "%s", ' % (NORM, os.path.basename(SHARD)), 1), INDEX, NORM, "twice"),
    index("no weight_map", without("weight_map"), INDEX, "weight_map", "missing"),
    index("number for a file", lambda v: v["weight_map"].update({NORM: 1}), INDEX, NORM, "file name", "an integer"),
    case("index.json", "missing beside several shards",
         lambda folder: os.remove(folder + "/sharded/model.safetensors.index.json"),
         ["sharded", "model.safetensors.index.json", "model.safetensors"], "sharded"),
]

CONFIGS = [
    case("config.json", "missing", lambda folder: os.remove(os.path.join(folder, CONFIG)), [CONFIG, "No such file"]),
    config("not JSON", lambda v: "{'model_type': 'deepseek_v3'}", "not valid JSON", "line 1, column 2"),
    config("key given twice", lambda v: json.dumps(v).replace("{", '{"vocab_size": 3, ', 1), "vocab_size", "twice"),
    config("another model", keys(model_type="llama"), "model_type", '"llama"', "deepseek_v3"),
    config("missing key", without("hidden_size"), "hidden_size", "nothing", "an integer"),
    config("string for a number", keys(hidden_size="32"), "hidden_size", '"32"', "an integer"),
    config("groups that do not divide", keys(n_group=3), "n_group = 3", "n_routed_experts = 8"),
    config("more groups chosen than there are", keys(topk_group=5), "topk_group = 5", "n_group = 4"),
    config("tied embeddings", keys(tie_word_embeddings=True), "tie_word_embeddings", "true", "false"),
    config("another activation", keys(hidden_act="gelu"), "hidden_act", '"gelu"', '"silu"'),
    config("blocks of another size", lambda v: v["quantization_config"].update(weight_block_size=[64, 64]),
           "quantization_config.weight_block_size", "[64,64]", "[128,128]"),
    config("another RoPE", lambda v: v["rope_scaling"].update(type="linear"), "rope_scaling.type", '"linear"', '"yarn"'),
    config("a billion layers", keys(num_hidden_layers=10**9), "num_hidden_layers = 1000000000", "the limit is 1000000"),
    config("indexer keys in V3", keys(index_topk=8), "index_topk", "8", "deepseek_v3"),
    config("two MTP layers", keys(num_nextn_predict_layers=2), "num_nextn_predict_layers = 2", "0 or 1"),
    case("config.json", "sizes of other weights", lambda folder: config("", keys(hidden_size=64))["break"](folder),
         ["v31", "model.embed_tokens.weight", "[264, 32]", "[264, 64]"]),
    case("config.json", "inspect: missing key", lambda folder: config("", without("n_group"))["break"](folder),
         [CONFIG, "n_group", "nothing"], words=["inspect", "v31"]),
]

CASES = SAFETENSORS + INDEXES + CONFIGS
