"""Sentence encoders for tests: a tiny model folder that transformers loads, and an encoder in plain numpy."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from hpc_router.routing.features import Floats
from hpc_router.routing.training.encoder import ProgressCallback

HIDDEN = 32
INNER = 64
MAX_POSITIONS = 128
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


class WordSums:
    """Encodes a text as the sum of random directions, one per word."""

    def __init__(self, words: Sequence[str], *, dimensions: int = 8) -> None:
        self.dimensions = dimensions
        self._words = list(words)

    def words(self) -> list[str]:
        return self._words

    def fingerprint(self) -> str:
        return f"word-sums-{self.dimensions}"

    def encode(self, texts: Sequence[str], *, stage: str, progress: ProgressCallback) -> Floats:
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in text.split() or [""]:
                row += np.random.default_rng(zlib.crc32(word.encode())).standard_normal(self.dimensions)
            row /= np.linalg.norm(row)
        return vectors


def write_tiny_bert(folder: Path, words: Sequence[str]) -> Path:
    """Write a one-layer BERT with random weights whose vocabulary is `words`."""
    folder.mkdir()
    vocabulary = [*SPECIAL, *words]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": MAX_POSITIONS}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = {
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": len(vocabulary), "hidden_size": HIDDEN,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": INNER, "type_vocab_size": 2,
        "max_position_embeddings": MAX_POSITIONS, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rng, layer = np.random.default_rng(0), "encoder.layer.0"
    weights = {
        "embeddings.word_embeddings.weight": (len(vocabulary), HIDDEN),
        "embeddings.position_embeddings.weight": (MAX_POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
        f"{layer}.attention.self.query.weight": (HIDDEN, HIDDEN),
        f"{layer}.attention.self.key.weight": (HIDDEN, HIDDEN),
        f"{layer}.attention.self.value.weight": (HIDDEN, HIDDEN),
        f"{layer}.attention.output.dense.weight": (HIDDEN, HIDDEN),
        f"{layer}.intermediate.dense.weight": (INNER, HIDDEN),
        f"{layer}.output.dense.weight": (HIDDEN, INNER),
        "pooler.dense.weight": (HIDDEN, HIDDEN),
    }
    tensors = {name: (0.02 * rng.standard_normal(shape)).astype(np.float32) for name, shape in weights.items()}
    for name, shape in weights.items():
        if "embeddings" not in name:
            tensors[name.replace("weight", "bias")] = np.zeros(shape[0], np.float32)
    for norm in ("embeddings", f"{layer}.attention.output", f"{layer}.output"):
        tensors[f"{norm}.LayerNorm.weight"] = np.ones(HIDDEN, np.float32)
        tensors[f"{norm}.LayerNorm.bias"] = np.zeros(HIDDEN, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
