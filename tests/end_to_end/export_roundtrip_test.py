#!/usr/bin/env python3
"""What goes through Baleen without training comes out with the bytes it came with; what trained has V3.2's names and
dtypes.

  export_roundtrip_test.py BINARY
"""

import json
import os

import harness
from harness import SPARSE, WARMUP, changes, checkpoint_tensors, read, run, succeed, tree, write

# Of a V3.2 FP8 checkpoint, per layer.
INDEXER_DTYPES = {
    "wq_b.weight": "F8_E4M3", "wq_b.weight_scale_inv": "F32", "wk.weight": "F8_E4M3", "wk.weight_scale_inv": "F32",
    "weights_proj.weight": "BF16", "k_norm.weight": "F32", "k_norm.bias": "F32",
}
# 32 wide matrices have one partial block; these sides give a partial block behind a whole one, as 200 = 128 + 72.
PARTIAL = {"hidden_size: 32": "hidden_size: 200", "kv_lora_rank: 16": "kv_lora_rank: 136"}


def is_indexer(name):
    return ".indexer." in name


class ExportRoundtrip(harness.Case):
    dtypes = ("fp8", "bf16")

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # Norms and biases that are not 1 and 0, so that a wrong copy shows.
        for source in ("v31", "v31-bf16"):
            path = os.path.join(cls.base, source, "model-00001-of-00001.safetensors")
            file = harness.Safetensors(path)
            data = bytearray(file.data)
            for name in file.names():
                begin, end = file.header[name]["data_offsets"]
                if file.header[name]["dtype"] == "F32" and not name.endswith("_scale_inv"):
                    for at in range(begin, end, 4):
                        data[at] = (at * 37 + 11) % 256  # the low bits of the fraction
            file.data = bytes(data)
            write(path, file.with_header())
        for dtype, source in (("fp8", "v31"), ("bf16", "v31-bf16")):
            write(os.path.join(cls.base, f"{dtype}.yaml"),
                  harness.run_yaml([WARMUP % 3], checkpoint=source, run_dir=f"run-{dtype}"))
            succeed("train", f"{dtype}.yaml", folder=cls.base)

    def assert_same_old_tensors(self, source, export):
        old, new = checkpoint_tensors(self.path(source)), checkpoint_tensors(self.path(export))
        self.assertGreater(len(old), 100)
        for name, tensor in old.items():
            self.assertIn(name, new)
            self.assertEqual(new[name][:2], tensor[:2], name)
            self.assertTrue(new[name][2] == tensor[2], f"{name}: other bytes in {export}")
        added = new.keys() - old.keys()
        self.assertEqual([name for name in added if not is_indexer(name)], [])
        return new, added

    def assert_config_is_v32(self, source, export):
        old = json.loads(read(self.path(source, "config.json")))
        new = json.loads(read(self.path(export, "config.json")))
        self.assertEqual(new["model_type"], "deepseek_v32")
        self.assertEqual(new["architectures"], ["DeepseekV32ForCausalLM"])
        self.assertEqual((new["index_topk"], new["index_n_heads"], new["index_head_dim"]), self.index_sizes)
        same = {key: value for key, value in old.items() if key not in ("model_type", "architectures", "auto_map")}
        self.assertEqual({key: new.get(key) for key in same}, same)

    def check_export(self, words, source, export):
        succeed("export", *words, "--to", export, folder=self.base)
        tensors, added = self.assert_same_old_tensors(source, export)
        self.assertEqual(len(added) % 4, 0)  # three layers and the MTP layer
        self.assert_config_is_v32(source, export)
        self.assertExit(run("inspect", export, "--verify", folder=self.base), 0, "deepseek_v32", "complete")
        return tensors, added

    def check_all_indexers(self, tensors, added, dtypes):
        expected = {f"model.layers.{layer}.self_attn.indexer.{name}": dtype
                    for layer in range(4) for name, dtype in dtypes.items()}
        self.assertEqual({name: tensors[name][0] for name in added}, expected)

    def test_untrained_fp8_keeps_every_byte(self):
        self.index_sizes = (2048, 64, 128)
        tensors, added = self.check_export(["v31", "--format", "v3.2", "--dtype", "fp8"], "v31", "untrained-fp8")
        self.check_all_indexers(tensors, added, INDEXER_DTYPES)

    def test_untrained_bf16_keeps_every_byte(self):
        self.index_sizes = (2048, 64, 128)
        tensors, added = self.check_export(["v31-bf16", "--format", "v3.2", "--dtype", "bf16"], "v31-bf16",
                                           "untrained-bf16")
        self.assertEqual({tensors[name][0] for name in added if "k_norm" not in name}, {"BF16"})

    def test_v31_comes_out_as_the_same_v31(self):
        succeed("export", "v31", "--to", "again", folder=self.base)
        _, added = self.assert_same_old_tensors("v31", "again")
        self.assertEqual(added, set())
        self.assertEqual(json.loads(read(self.path("again", "config.json"))),
                         json.loads(read(self.path("v31", "config.json"))))

    def test_warmed_up_fp8_changes_the_indexers_alone(self):
        self.index_sizes = (8, 2, 16)
        tensors, added = self.check_export(["run-fp8"], "v31", "warm-fp8")
        self.check_all_indexers(tensors, added, INDEXER_DTYPES)
        for name in added:
            if name.endswith("k_norm.weight"):
                self.assertNotEqual(set(tensors[name][2]), {0x00, 0x80, 0x3f}, "no step changed " + name)

    def test_warmed_up_bf16_changes_the_indexers_alone(self):
        self.index_sizes = (8, 2, 16)
        tensors, added = self.check_export(["run-bf16", "--dtype", "bf16"], "v31-bf16", "warm-bf16")
        self.assertEqual({tensors[name][0] for name in added if "k_norm" not in name}, {"BF16"})

    def test_exporting_twice_gives_the_same_bytes_from_run_and_state(self):
        succeed("export", "run-fp8", "--to", "first", folder=self.base)
        succeed("export", "run-fp8/checkpoints/step-00000003", "--to", "second", folder=self.base)
        self.assertEqual(changes(tree(self.path("first")), tree(self.path("second"))), [])

    def test_shards_hold_the_same_tensors_as_one_file(self):
        succeed("export", "run-fp8", "--to", "one", folder=self.base)
        succeed("export", "run-fp8", "--to", "many", "--shard-bytes", "30000", folder=self.base)
        shards = [name for name in os.listdir(self.path("many")) if name.endswith(".safetensors")]
        self.assertGreater(len(shards), 3)
        self.assertEqual(checkpoint_tensors(self.path("many")), checkpoint_tensors(self.path("one")))
        index = json.loads(read(self.path("many", "model.safetensors.index.json")))
        self.assertEqual(set(index["weight_map"].values()), set(shards))
        self.assertExit(run("inspect", "many", "--verify", folder=self.base), 0, "complete")

    def test_sparse_training_changes_what_it_trains_and_exports_whole(self):
        self.write_run("sparse.yaml", [WARMUP % 2, SPARSE % 2], run_dir="run-sparse")
        succeed("train", "sparse.yaml", folder=self.base)
        succeed("export", "run-sparse", "--to", "sparse", folder=self.base)
        self.assertExit(run("inspect", "sparse", "--verify", folder=self.base), 0, "complete")
        old, new = checkpoint_tensors(self.path("v31")), checkpoint_tensors(self.path("sparse"))
        self.assertEqual(old.keys() - new.keys(), set())
        for name in ("model.norm.weight", "model.layers.0.self_attn.q_a_proj.weight", "lm_head.weight"):
            self.assertNotEqual(new[name][2], old[name][2], name)
        # bias_update_speed is 0: the router's bias stays.
        bias = "model.layers.1.mlp.gate.e_score_correction_bias"
        self.assertEqual(new[bias], old[bias])
        # The MTP layer's copies are copies still.
        self.assertEqual(new["model.layers.3.embed_tokens.weight"], new["model.embed_tokens.weight"])
        self.assertEqual(new["model.layers.3.shared_head.head.weight"], new["lm_head.weight"])

    def test_partial_blocks_keep_every_byte(self):
        text = harness.TINY_MODEL
        for old, new in PARTIAL.items():
            text = text.replace(old, new)
        write(self.path("partial.yaml"), text)
        succeed("init", "partial.yaml", "--to", "partial", folder=self.base)
        tensors = checkpoint_tensors(self.path("partial"))
        scale = tensors["model.layers.0.self_attn.q_a_proj.weight_scale_inv"]
        self.assertEqual(scale[1], [1, 2])
        self.index_sizes = (2048, 64, 128)
        self.check_export(["partial", "--format", "v3.2"], "partial", "partial-v32")

    def test_an_export_that_exists_is_not_overwritten(self):
        os.mkdir(self.path("full"))
        write(self.path("full", "notes.txt"), "mine")
        before = tree(self.base)
        for words in (["export", "run-fp8", "--to", "full"], ["export", "v31", "--to", "v31"],
                      ["init", "model.yaml", "--to", "v31"]):
            result = run(*words, folder=self.base)
            self.assertIn(result.code, (2, 3), str(result))
            self.assertIn(words[-1], result.err)
            self.assertRegex(result.err, "not empty|exists")
        self.assertEqual(changes(before, tree(self.base)), [])

    def test_tokenizer_files_pass_through(self):
        files = {"tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": "x"}', "generation_config.json": "{}"}
        for name, text in files.items():
            write(self.path("v31-bf16", name), text)
        succeed("export", "v31-bf16", "--dtype", "bf16", "--to", "with-tokenizer", folder=self.base)
        for name, text in files.items():
            self.assertEqual(read(self.path("with-tokenizer", name)), text)


if __name__ == "__main__":
    harness.main()
