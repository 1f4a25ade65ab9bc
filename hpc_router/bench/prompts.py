"""The prompts of the load: the built-in prompts, or those of a JSON Lines file.

The built-in prompts were written for this project, a few for each domain of `topology=sim`. They are enough to send
requests to every expert, but too few to evaluate a classifier.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hpc_router.errors import ConfigError
from hpc_router.state.atomic_files import lines_of


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """One prompt, and its domain if that is known."""

    text: str
    domain: str | None = None


_BUILT_IN: Final = {
    "code": (
        "Write a Python function that returns the longest word of a sentence, with a unit test.",
        "Why does my C++ program leak memory when an exception leaves the constructor?",
        "Write an SQL query that joins two tables and counts the rows of each group.",
        "Explain what a deadlock between two threads is and how a lock order prevents it.",
        "Refactor this JavaScript function so that it awaits the fetch calls in parallel.",
        "Implement a binary search over a sorted array in Rust and state its complexity.",
    ),
    "math": (
        "Solve the equation 3x^2 - 12x + 9 = 0 for x.",
        "What is the derivative of x^3 sin(x)?",
        "A tank fills in 6 hours and empties in 9 hours. How long does it take with both valves open?",
        "What is the probability that two dice show a sum of 8?",
        "Prove that the sum of two odd integers is even.",
        "Find the area of a triangle whose sides are 7, 8 and 9 cm long.",
    ),
    "medicine": (
        "Which symptoms distinguish viral from bacterial pneumonia, and how is each treated?",
        "A patient with diabetes has a fasting glucose of 14 mmol/l. Which therapy comes first?",
        "What are the side effects of beta blockers in elderly patients?",
        "How is a deep vein thrombosis diagnosed?",
        "Which vaccine does a pregnant woman need, and in which trimester?",
        "What does an elevated troponin mean after chest pain?",
    ),
    "law": (
        "Can a landlord evict a tenant who reported mould to the authorities?",
        "What must a plaintiff prove to win damages for breach of contract?",
        "Is a verbal agreement about the sale of a house enforceable in court?",
        "When does a statute of limitations begin to run for a hidden defect?",
        "May an employer dismiss a worker without notice after one theft?",
        "What is the difference between a trademark and a copyright?",
    ),
    "general": (
        "Suggest three things to do in Lisbon on a rainy Sunday.",
        "How do I keep basil alive on a window sill?",
        "Write a friendly note that thanks a neighbour for feeding the cat.",
        "What makes sourdough bread taste sour?",
        "Tell me a short story about a lighthouse keeper and a seagull.",
        "Which films should somebody see who likes slow science fiction?",
    ),
}


def built_in() -> list[BenchPrompt]:
    """Returns the built-in prompts."""
    return [BenchPrompt(text, domain) for domain, texts in _BUILT_IN.items() for text in texts]


def read_prompts(path: Path) -> list[BenchPrompt]:
    """Returns the prompts of a file: JSON lines with `prompt` and optionally `domain`. Raises ConfigError with the
    line."""
    found = [_prompt(line, f"{path}:{number}") for number, line in lines_of(path)]
    if not found:
        raise ConfigError(f"bench.prompts={path}: the file has no prompt")
    return found


def _prompt(line: str, place: str) -> BenchPrompt:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not JSON ({error})") from error
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str) or not value["prompt"].strip():
        raise ConfigError(f'{place}: no text at "prompt" (valid: {{"prompt": "...", "domain": "..."}})')
    if not isinstance(value.get("domain"), str | None):
        raise ConfigError(f'{place}: "domain" is not text')
    return BenchPrompt(value["prompt"], value.get("domain"))
