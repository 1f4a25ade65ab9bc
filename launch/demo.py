"""`make demo`: the whole system on this machine, with real engines, in minutes.

Creates five tiny random models, starts five experts and a router, sends a dozen prompts from different domains with the
official openai client, prints each prompt's expert and the reason, and stops everything. The responses are nonsense
because the models are random; the routing is real.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import openai
from rich.console import Console
from rich.table import Table

from hpc_router.state.run_directory import RunDir, open_run
from launch import tiny_model

WIDTH: Final = 124
EXPERTS: Final = ("code", "math", "medicine", "law", "generalist")
PROMPTS: Final = (
    "Write a Python function that merges two sorted lists.",
    "My C program crashes with a segmentation fault when I free the same pointer twice. Why?",
    "Write a SQL query that counts the orders of every customer.",
    "A train covers 180 km in two hours. How many km does it cover in five hours at the same speed?",
    "Find the roots of x^2 - 5x + 6 = 0.",
    "What is the probability of drawing two aces from a deck of 52 cards?",
    "What are the symptoms of iron deficiency anaemia, and how is it treated?",
    "Is it safe to take ibuprofen together with blood pressure medication?",
    "The landlord kept my deposit after the lease ended. Can the tenant sue for damages?",
    "Under what conditions is an oral contract enforceable in court?",
    "What is the capital of Australia?",
    "Ζητώ μια ιδέα για το Σαββατοκύριακο",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.demo", description=__doc__)
    parser.add_argument("--engine-python", type=Path, default=Path(".venv-transformers/bin/python"), metavar="PYTHON")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/demo"), help="folder for the models and the run directory"
    )
    arguments = parser.parse_args()
    if not arguments.engine_python.exists():
        parser.error(f"{arguments.engine_python} does not exist: `make demo` creates it")
    folder = arguments.folder.absolute()
    console = Console(markup=False)
    console.width = max(console.width, WIDTH)
    create_models(folder / "models", python=arguments.engine_python, console=console)
    os.environ |= {"TINY_MODELS": str(folder / "models"), "ENGINE_PYTHON": str(arguments.engine_python.absolute())}
    run = folder / "run"
    try:
        if run_verb("up", "--run", str(run), "--wait", "all", "topology=tiny"):
            return 1
        console.print(send_all(open_run(run), console=console))
    except KeyboardInterrupt:
        return 130
    finally:
        if run.exists():
            run_verb("down", "--run", str(run))
    return 0


def run_verb(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "hpc_router.cli", *arguments], check=False).returncode


def create_models(folder: Path, *, python: Path, console: Console) -> None:
    """Creates the missing models, one per expert. Their seeds are consecutive, in the order of EXPERTS."""
    missing = [expert for expert in EXPERTS if not (folder / expert / "config.json").exists()]
    if missing:
        console.print(f"creating tiny random models: {', '.join(missing)}")
        seed = str(EXPERTS.index(missing[0]))
        command = [str(python), tiny_model.__file__, *(str(folder / expert) for expert in missing), "--seed", seed]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def send_all(run: RunDir, *, console: Console) -> Table:
    url = subprocess.check_output(
        [sys.executable, "-m", "hpc_router.cli", "url", "--run", str(run.path)], text=True
    ).strip()
    table = Table("prompt", "expert", "reason", "first token", title="model: auto")
    with openai.OpenAI(base_url=f"{url}/v1", api_key=run.token()) as client, console.status("sending prompts"):
        for prompt in PROMPTS:
            expert, reason, first_token_s = send(client, prompt)
            table.add_row(prompt, expert, reason, f"{first_token_s * 1000:.0f} ms")
    return table


def send(client: openai.OpenAI, prompt: str) -> tuple[str, str, float]:
    """Sends a prompt and streams the response. Returns expert, reason and seconds to the first non-empty content."""
    started = time.perf_counter()
    with client.chat.completions.with_streaming_response.create(
        model="auto", messages=[{"role": "user", "content": prompt}], max_tokens=24, stream=True
    ) as response:
        first_token_s = None
        for chunk in response.parse():
            if first_token_s is None and chunk.choices and chunk.choices[0].delta.content:
                first_token_s = time.perf_counter() - started
    assert first_token_s is not None, "a response without content"
    return response.headers["x-expert"], response.headers["x-route-reason"], first_token_s


if __name__ == "__main__":
    sys.exit(main())
