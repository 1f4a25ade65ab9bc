"""Prompts of three invented domains: each has words of its own, and some words are shared by all."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

WORDS = {
    "astronomy": ["star", "planet", "orbit", "telescope", "galaxy", "comet", "moon", "nebula", "light", "eclipse"],
    "cooking": ["flour", "oven", "butter", "recipe", "simmer", "onion", "garlic", "bake", "sauce", "pepper"],
    "sailing": ["mast", "rudder", "harbour", "anchor", "tide", "keel", "sail", "rope", "wind", "deck"],
}
SHARED = ["what", "is", "the", "best", "way", "to", "explain", "how", "this", "works", "and", "why"]


def prompts(*, each: int = 30, seed: int = 0) -> list[dict[str, object]]:
    rng = random.Random(seed)
    rows: list[dict[str, object]] = []
    for number in range(each):
        for domain, words in WORDS.items():
            text = " ".join([*rng.sample(SHARED, 4), *rng.sample(words, 4)])
            rows.append({"prompt": f"{text} {number}?", "domain": domain})
    return rows


def write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path
