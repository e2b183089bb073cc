#!/usr/bin/env python3
"""1 and 4 data-parallel ranks compute the same losses: in fp64 within 1e-12 over 20 steps of every recipe.

  data_parallel_test.py BINARY
"""

import sys

import harness
from harness import DENSE, SPARSE, WARMUP, metrics, relative_difference, succeed

MOST = 1e-12
STEPS = 20
NUMBERS = ("lm_loss", "mtp_loss", "indexer_kl", "balance_loss", "grad_norm_main", "grad_norm_indexer")
# What a recipe reports; a key that is missing must not pass as equal.
EXPECTED = {"indexer-warmup": {"indexer_kl", "grad_norm_indexer"},
            "sparse": {"lm_loss", "mtp_loss", "indexer_kl", "balance_loss", "grad_norm_main", "grad_norm_indexer"},
            "dense": {"lm_loss", "mtp_loss", "balance_loss", "grad_norm_main"}}


class DataParallel(harness.Case):
    def compare(self, name, stages, sections="", data=()):
        """Trains on 1 and on 4 ranks; the largest relative difference of each number."""
        largest = {}
        records = {}
        for ranks in (1, 4):
            directory = f"{name}-{ranks}"
            self.write_run(f"{directory}.yaml", stages, run_dir=directory,
                           sections="precision: {compute: fp64}\ncheckpoint: {interval: 0}\n" + sections)
            succeed("train", f"{directory}.yaml", *data, folder=self.base, ranks=ranks)
            records[ranks] = metrics(self.path(directory))
        self.assertEqual(len(records[1]), STEPS * len(stages))
        self.assertEqual([r["step"] for r in records[4]], [r["step"] for r in records[1]])
        for one, four in zip(records[1], records[4]):
            stage = one["stage"]
            self.assertEqual(four["stage"], stage)
            self.assertEqual({key for key in NUMBERS if key in one}, EXPECTED[stage])
            self.assertEqual({key for key in NUMBERS if key in four}, EXPECTED[stage])
            for key in EXPECTED[stage]:
                difference = relative_difference(one[key], four[key])
                largest[stage, key] = max(largest.get((stage, key), 0.0), difference)
                self.assertLessEqual(difference, MOST, f"{name}, step {one['step']}, {key}: {one[key]!r} on 1 rank, "
                                                       f"{four[key]!r} on 4")
        print(f"\n{name}: largest relative differences of {STEPS} steps", file=sys.stderr)
        for (stage, key), difference in sorted(largest.items()):
            print(f"  {stage:15} {key:18} {difference:.1e}", file=sys.stderr)
        # The runs are no constants: losses move.
        for stage in {record["stage"] for record in records[1]}:
            key = "indexer_kl" if stage == "indexer-warmup" else "lm_loss"
            values = [record[key] for record in records[1] if record["stage"] == stage]
            self.assertEqual(len(set(values)), len(values))
            self.assertLess(min(values[-5:]), values[0])
        return records

    def test_dense(self):
        self.compare("dense", [DENSE % STEPS], "router: {bias_update_speed: 1.0e-3}")

    def test_warmup_then_sparse(self):
        self.compare("sparse", [WARMUP % STEPS, SPARSE % STEPS])

    def test_document_mask(self):
        # Documents of about 2200 tokens: every sample of the short ones has a border or two.
        harness.write_text_corpus(self.path("short"), files=200, words=8, seed=3)
        succeed("data", "build", "short", "--to", "data/short", "--tokenizer", "bytes", "--append-eod", folder=self.base)
        blend = "data.train=[{path: data/short}]"
        masked = self.compare("masked", [WARMUP % STEPS, SPARSE % STEPS], data=(blend, "data.document_mask=true"))
        # The mask is in effect: without it the first loss is another.
        self.write_run("open.yaml", [SPARSE % 1], run_dir="open", sections="precision: {compute: fp64}")
        succeed("train", "open.yaml", blend, folder=self.base)
        succeed("train", "open.yaml", blend, "run.dir=closed", "data.document_mask=true", folder=self.base)
        self.assertNotEqual(metrics(self.path("open"))[0]["lm_loss"], metrics(self.path("closed"))[0]["lm_loss"])
        self.assertEqual(len(masked[1]), 2 * STEPS)


if __name__ == "__main__":
    harness.main()
