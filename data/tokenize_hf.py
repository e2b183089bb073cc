#!/usr/bin/env python3
"""Token ids by a Hugging Face tokenizer.json; data/tokenizer.cc starts this and talks to it.

Standard output: one line of JSON, {"vocab_size", "bos_id", "eos_id", "sha256"} or {"error",
"fault"}; then for each request (u64 texts; u64 bytes and the bytes of each) the answer (u64 ids
and i32 ids of each). All little-endian.
"""

import argparse
import hashlib
import json
import pathlib
import struct
import sys


def fail(message, fault):
    print(json.dumps({"error": message, "fault": fault}), flush=True)
    sys.exit(1)


def config_token(tokenizer_path, key):
    """The text of bos_token or eos_token in tokenizer_config.json beside the tokenizer, or None."""
    path = pathlib.Path(tokenizer_path).with_name("tokenizer_config.json")
    if not path.is_file():
        return None
    token = json.loads(path.read_text(encoding="utf-8")).get(key)
    return token.get("content") if isinstance(token, dict) else token


def load(path):
    try:
        from tokenizers import Tokenizer
    except ImportError:
        fail("a tokenizer.json needs the Python package tokenizers, which "
             f"{sys.executable} does not find; install it: {sys.executable} -m pip install "
             "tokenizers (or build with --tokenizer bytes)", "environment")
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the package raises plain Exception
        fail(f"{path}: not a tokenizer.json that the package tokenizers can read: {error}", "data")
    tokenizer.encode_special_tokens = True  # "<eos>" inside a document is text, not a document end
    return tokenizer


def token_id(tokenizer, text, where):
    if text is None:
        return -1
    number = tokenizer.token_to_id(text)
    if number is None:
        fail(f"{where}: the token {text!r} is not in the vocabulary", "data")
    return number


def read_exactly(stream, size):
    data = stream.read(size)
    if len(data) != size:
        sys.exit(0)  # the other side has closed: no more requests
    return data


def serve(tokenizer, source, sink):
    while True:
        (num_texts,) = struct.unpack("<Q", read_exactly(source, 8))
        texts = []
        for _ in range(num_texts):
            (size,) = struct.unpack("<Q", read_exactly(source, 8))
            texts.append(read_exactly(source, size).decode("utf-8"))
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
            sink.write(struct.pack(f"<Q{len(encoding.ids)}i", len(encoding.ids), *encoding.ids))
        sink.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="path of tokenizer.json")
    parser.add_argument("--eod-token", help="text of the token that ends a document")
    options = parser.parse_args()
    path = options.tokenizer
    tokenizer = load(path)
    eos = options.eod_token or config_token(path, "eos_token")
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    header = {
        "vocab_size": max(ids) + 1,
        "bos_id": token_id(tokenizer, config_token(path, "bos_token"), path),
        "eos_id": token_id(tokenizer, eos, path),
        "sha256": hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest(),
    }
    print(json.dumps(header), flush=True)
    serve(tokenizer, sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
