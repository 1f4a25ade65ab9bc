"""Prompts for a deployment, and what its router reports."""

import urllib.request

import openai

from tests.e2e.deployment import Deployed

PROMPTS = {
    "code": "Write a Python function that reverses a linked list.",
    "math": "A shop sells 12 apples for 3 dollars. How many dollars do 20 apples cost?",
    "medicine": "What are the symptoms and the treatment of bacterial pneumonia?",
    "law": "The tenant sued the landlord for breach of contract. Can the plaintiff recover damages?",
}


FAST = "cluster.reconcile_s=0.3"


def metrics(one: Deployed) -> dict[str, float]:
    request = urllib.request.Request(f"{one.url}/metrics", headers={"authorization": f"Bearer {one.token}"})
    with urllib.request.urlopen(request) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, _, value in (li.rpartition(" ") for li in lines if not li.startswith("#"))}


def gauges_are_zero(one: Deployed) -> bool:
    gauges = {k: v for k, v in metrics(one).items() if "requests_in_flight" in k or "requests_waiting{" in k}
    return bool(gauges) and not any(gauges.values())


def ask(client: openai.OpenAI, text: str, *, model: str = "auto") -> tuple[str, dict[str, str]]:
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": text}], max_tokens=4
    )
    return raw.parse().choices[0].message.content or "", dict(raw.headers)
