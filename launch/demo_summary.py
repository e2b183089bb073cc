"""Prints what a demo run showed, from the files it left: python3 launch/demo_summary.py runs/demo"""
import json
import os
import sys


def records(run, kind):
    with open(os.path.join(run, "metrics.jsonl"), encoding="utf-8") as file:
        return [r for r in map(json.loads, file) if r["kind"] == kind]


def main(folder):
    with open(os.path.join(folder, "handover.json"), encoding="utf-8") as file:
        handover = json.load(file)
    with open(os.path.join(folder, "end.json"), encoding="utf-8") as file:
        end = json.load(file)
    sparse_run = os.path.join(folder, "sparse")
    steps = records(sparse_run, "step")
    warm = [r for r in steps if r["stage"] == steps[0]["stage"]]
    measured = [r for r in warm if "topk_mass" in r]
    control = records(os.path.join(folder, "control"), "validation")[-1]["lm_loss"]

    dense = handover["dense"]["lm_loss"]
    added = {name: handover[name]["lm_loss"] - dense for name in ("sparse", "random", "last")}
    sparse_end = end["sparse"]["lm_loss"]
    first, last = measured[0], measured[-1]
    rows = [
        ("dense validation loss before", f"{dense:.4f}"),
        ("indexer KL, start -> end of warm-up", f"{warm[0]['indexer_kl']:.4f} -> {warm[-1]['indexer_kl']:.4f}"),
        ("mass of selected keys / of the best", f"{first['topk_mass']:.3f} / {first['topk_mass_of_best']:.3f} -> "
                                                f"{last['topk_mass']:.3f} / {last['topk_mass_of_best']:.3f}"
                                                f"   (ratio {last['topk_mass'] / last['topk_mass_of_best']:.3f})"),
        ("hand-over: loss the trained indexer adds", f"{added['sparse']:+.4f}"),
        ("hand-over: loss a random selection adds", f"{added['random']:+.4f}"),
        ("hand-over: loss the last keys add", f"{added['last']:+.4f}"),
        ("sparse validation loss after", f"{sparse_end:.4f}"),
        ("dense control after the same batches", f"{control:.4f}   (sparse is {100 * (sparse_end / control - 1):+.2f} %)"),
        ("V3.2 checkpoint", os.path.join(folder, "tiny-v32")),
        ("report", os.path.join(sparse_run, "report.html")),
    ]
    for name, value in rows:
        print(f"  {name:42s} {value}")


if __name__ == "__main__":
    main(sys.argv[1])
