"""A Llama of two layers with its own tokenizer, in the hub's file layout, made on the spot and always the same.

Tests of the trainer use it as base model: `write_tiny_model(folder)` takes well under a second and needs no network.
The tokenizer is byte-level BPE of 256 bytes, a few merges and the special tokens <s>, </s>, <pad>; like Llama's it puts
<s> in front of every text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
HIDDEN_SIZE = 32
INTERMEDIATE_SIZE = 64
LAYERS = 2
HEADS = 4
KV_HEADS = 2
MAX_POSITIONS = 256

_CORPUS = [
    "### Instruction\nName the capital of France.\n\n### Answer\nThe capital of France is Paris.",
    "### Instruction\nWhat grows in the garden?\n\n### Context\nRoses grow in it.\n\n### Answer\nRoses grow there.",
    "Summarize the chat dialogue:\nAmy: Are you coming?\nBen: Yes, at eight.\n---\nSummary:\nBen will come at eight.",
    "The quick brown fox jumps over the lazy dog. Numbers: 0 1 2 3 4 5 6 7 8 9.",
]


def write_tiny_tokenizer(folder: Path) -> int:
    """Write tokenizer.json and its two companions into `folder`; returns the size of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "model_max_length": MAX_POSITIONS,
            "clean_up_tokenization_spaces": False,
        },
    )
    _write_json(folder / "special_tokens_map.json", {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD})
    return int(tokenizer.get_vocab_size())


def write_tiny_model(folder: Path, *, sharded: bool = False, dtype: str = "float32", seed: int = 0) -> Path:
    """Write config, generation config, tokenizer and weights into `folder` and return it. Needs no torch.

    `sharded` spreads the weights over several files with an index; `dtype` is float32 or bfloat16.
    """
    vocabulary = write_tiny_tokenizer(folder)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN_SIZE // HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **ends,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", ends)
    _write_weights(folder, _weights(vocabulary, seed), dtype, shards=3 if sharded else 1)
    return folder


def write_tiny_bloom(folder: Path, seed: int = 0) -> Path:
    """A BLOOM of two layers with the same tokenizer: alibi, fused query_key_value, tied embeddings. Needs torch."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    vocabulary = write_tiny_tokenizer(folder)
    torch.manual_seed(seed)
    config = BloomConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN_SIZE,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    BloomForCausalLM(config).save_pretrained(folder)
    return folder


def _weights(vocabulary: int, seed: int) -> dict[str, Any]:
    """Llama's tensors by name, float32: norms are one, everything else is normal with deviation 0.02."""
    # RandomState's stream is frozen for good, a Generator's may change with numpy.
    random = np.random.RandomState(seed)
    kv_size = HIDDEN_SIZE // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN_SIZE)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", HIDDEN_SIZE), ("k", kv_size), ("v", kv_size), ("o", HIDDEN_SIZE)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, HIDDEN_SIZE)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (INTERMEDIATE_SIZE, HIDDEN_SIZE)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (INTERMEDIATE_SIZE, HIDDEN_SIZE)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN_SIZE, INTERMEDIATE_SIZE)
        shapes[f"{prefix}.input_layernorm.weight"] = (HIDDEN_SIZE,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN_SIZE,)
    shapes["model.norm.weight"] = (HIDDEN_SIZE,)
    shapes["lm_head.weight"] = (vocabulary, HIDDEN_SIZE)
    return {
        name: np.ones(shape, "<f4") if len(shape) == 1 else random.normal(0, 0.02, shape).astype("<f4")
        for name, shape in shapes.items()
    }


def _write_weights(folder: Path, weights: dict[str, Any], dtype: str, *, shards: int) -> None:
    names = list(weights)
    size = -(-len(names) // shards)
    weight_map, total = {}, 0
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = bytearray()
        for name in names[number * size : (number + 1) * size]:
            values = weights[name]
            # bfloat16 is the upper half of a float32; cutting instead of rounding is good enough for random weights
            raw = values.tobytes() if dtype == "float32" else (values.view("<u4") >> 16).astype("<u2").tobytes()
            header[name] = {
                "dtype": "F32" if dtype == "float32" else "BF16",
                "shape": list(values.shape),
                "data_offsets": [len(data), len(data) + len(raw)],
            }
            data += raw
            weight_map[name] = file
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
        total += len(data)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write = {"llama": write_tiny_model, "bloom": write_tiny_bloom}[sys.argv[2] if len(sys.argv) > 2 else "llama"]
    write(Path(sys.argv[1]))
