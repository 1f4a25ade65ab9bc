"""A sentence encoder as a teacher: texts -> unit vectors, by mean pooling over its last layer.

Any folder or hub id that transformers can load. Its own vocabulary is text as well: every whole word in it is a
passage that the student can learn from, so that it knows words which no training prompt holds.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from hpc_router.errors import ConfigError
from hpc_router.routing.features import Floats

BATCH: Final = 64
MAX_TOKENS: Final = 128
MAX_WORDS: Final = 40_000

Progress = Callable[[str, int, int], None]
"""What is done, how far, of how much."""


class Teacher(Protocol):
    """What a student needs of an encoder."""

    def words(self) -> list[str]: ...

    def encode(self, texts: Sequence[str], *, what: str, progress: Progress) -> Floats:
        """texts x dimensions, of length one."""

    def fingerprint(self) -> str: ...


class Encoder:
    def __init__(self, source: str) -> None:
        """Raises ConfigError where it cannot be loaded."""
        try:
            import torch
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging as noise
        except ImportError as error:
            raise ConfigError(
                f"features=distilled needs {error.name}: pip install 'hpc-router[train]' (or features=lexical)"
            ) from error
        noise.set_verbosity_error()
        noise.disable_progress_bar()
        self._torch = torch
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
            self._model: Any = AutoModel.from_pretrained(source).eval()
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().split("\n")[0]
            raise ConfigError(f"encoder={source}: no sentence encoder could be loaded: {first}") from error
        self.source = source

    @property
    def dimensions(self) -> int:
        return int(self._model.config.hidden_size)

    def fingerprint(self) -> str:
        """Of its weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def words(self) -> list[str]:
        """The whole words of its vocabulary, sorted."""
        marks = ("\u0120", "\u2581")  # how byte-level and sentence-piece vocabularies mark a word's beginning
        tokens = list(self._tokenizer.get_vocab())
        marked = [token[1:] for token in tokens if token.startswith(marks)]
        words = marked or [token for token in tokens if not token.startswith("##")]
        return sorted({word.lower() for word in words if len(word) > 1 and word.isascii() and word.isalnum()})[
            :MAX_WORDS
        ]

    def encode(self, texts: Sequence[str], *, what: str, progress: Progress) -> Floats:
        torch, order = self._torch, sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), BATCH):
                progress(what, start, len(order))
                batch = order[start : start + BATCH]
                tokens = self._tokenizer(
                    [texts[i] for i in batch],
                    padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt",
                )  # fmt: skip
                hidden, mask = self._model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
                pooled = (hidden * mask).sum(1) / mask.sum(1)
                vectors[batch] = torch.nn.functional.normalize(pooled, dim=1).numpy()
        progress(what, len(order), len(order))
        return vectors


def is_local(source: str) -> bool:
    return Path(source).exists()
