#!/usr/bin/env bash
# Compares the losses in metrics.jsonl of two runs, step by step; exit 1 when they differ by more than the tolerance.
#
#   launch/compare_runs.sh RUN_A RUN_B                   run directories or metrics.jsonl files; tolerance 0: equal bits
#   launch/compare_runs.sh A B --tolerance 1e-12         of |a - b| / max(|a|, |b|)
#   launch/compare_runs.sh A B --keys lm_loss,grad_norm_main
#
# Also exit 1: a step, a validation or a key that only one of the two has (--common leaves those out), or no step in
# common. Exit 2: wrong usage; 4: a file that is missing or broken.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
case ${1:-} in
  -h | --help) print_help "${BASH_SOURCE[0]}" && exit 0 ;;
esac
exec python3 - "$@" <<'PYTHON'
import argparse
import json
import math
import os
import sys

LOSSES = "lm_loss,mtp_loss,balance_loss,indexer_kl,grad_norm_main,grad_norm_indexer"


def fail(code, message):
    print(f"compare_runs: {message}", file=sys.stderr)
    sys.exit(code)


def read(path):
    """{(kind, step): record}; of a step that was run twice (a resumed run) the last record counts."""
    if os.path.isdir(path):
        path = os.path.join(path, "metrics.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError as error:
        fail(4, f"{path}: {error.strerror}")
    records = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records[record.get("kind", "step"), record["step"]] = record
        except (ValueError, KeyError, AttributeError) as error:
            fail(4, f"{path}:{number}: no record of a step: {error}")
    if not records:
        fail(4, f"{path}: holds no step")
    return records


def difference(a, b):
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def main():
    parser = argparse.ArgumentParser(prog="launch/compare_runs.sh", add_help=False)
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--tolerance", type=float, default=0.0)
    parser.add_argument("--keys", default=LOSSES)
    parser.add_argument("--common", action="store_true")
    arguments = parser.parse_args()
    first, second = read(arguments.a), read(arguments.b)

    problems = []
    for place in sorted(set(first) ^ set(second)):
        problems.append(f"{place[0]} {place[1]} is only in {arguments.a if place in first else arguments.b}")
    largest, compared = {}, 0
    for place in sorted(set(first) & set(second)):
        for key in arguments.keys.split(","):
            a, b = first[place].get(key), second[place].get(key)
            if a is None and b is None:
                continue
            if a is None or b is None:
                problems.append(f"{place[0]} {place[1]}: {key} is only in {arguments.b if a is None else arguments.a}")
                continue
            compared += 1
            value = difference(float(a), float(b))
            name = key if place[0] == "step" else f"{place[0]} {key}"
            if name not in largest or value > largest[name][0]:
                largest[name] = (value, place[1], a, b)
    if arguments.common:
        problems = []
    if compared == 0:
        fail(1, f"{arguments.a} and {arguments.b} have no value of {arguments.keys} in common")
    for name, (value, step, a, b) in largest.items():
        print(f"{name:24s} largest difference {value:.3e} at step {step}: {a!r} and {b!r}")
    for problem in problems[:10]:
        print(problem)
    if len(problems) > 10:
        print(f"... and {len(problems) - 10} more")
    worst = max(value for value, *_ in largest.values())
    verdict = worst <= arguments.tolerance and not problems
    print(f"{'same' if verdict else 'DIFFERENT'}: {compared} values, largest relative difference {worst:.3e}, "
          f"tolerance {arguments.tolerance:g}")
    sys.exit(0 if verdict else 1)


main()
PYTHON
