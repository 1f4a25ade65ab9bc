"""Creates a tiny random Llama, or a LoRA adapter for one, so that real engines run offline on a CPU within seconds.

Run by path with an engine's interpreter (`PYTHON launch/tiny_model.py OUT --seed 1`). That interpreter has
transformers, tokenizers and torch but not hpc_router, so this file imports nothing of this project. The weights depend
only on the seed and the sizes. Responses are random printable ASCII text with exactly `max_tokens` tokens (see
`_suppress_special_tokens`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HEAD_DIM = 32  # minimum head size that all attention kernels of the engines support
VOCABULARY = 1024  # maximum; training stops earlier if no pair occurs twice
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\nTools you may call:\\n' }}
{%- for tool in tools %}{{- (tool | tojson) + '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}
{%- for call in message['tool_calls'] or [] %}{{- '\\n' + (call['function'] | tojson) }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

TEXT = """\
A cluster has many nodes and a few hundred accelerators, and a job waits in a queue until the scheduler finds a place.
The router reads the question, finds the domain it belongs to, and sends it to the expert that knows this domain.
An expert is a small model that was trained on one kind of text: code, mathematics, law, medicine, chemistry or prose.
def add(left, right): return left + right. class Stack: push, pop, peek. for index in range(10): print(index).
Write a function that sorts a list of numbers, counts the words in a file, or finds the shortest path in a graph.
The compiler reads the source, builds a tree, and writes machine code; a test says whether the program is right.
Solve the equation: the sum of two numbers is ten and their product is twenty one, so the numbers are three and seven.
The derivative of a product is the first factor times that of the second plus the second times that of the first.
Every prime number greater than two is odd. A triangle has three sides, and its angles add up to one hundred and eighty.
The court decided that the contract was void because one of the parties had not been told about the terms of the lease.
The law says that a tenant may leave after three months, that the owner must be told in writing, and who pays for it.
The patient has a fever and a cough; the doctor listens to the heart, asks about other symptoms and orders a blood test.
A vaccine teaches the immune system to recognise a virus before the virus arrives. Rest, water and sleep help patients.
Water boils at one hundred degrees. An acid and a base react to a salt and water; the reaction gives off heat.
The molecule has two atoms of hydrogen and one atom of oxygen. Energy is neither made nor lost, it changes its form.
It was raining when she came back to the old house by the river, and nobody had lit the lamp in the window.
He had walked the whole day through the forest, and in the evening he saw the lights of the village below the hill.
Once there was a king who had three sons, and the youngest of them could speak with the birds.
Hello, how are you today? What is the capital of France, and why does the moon change its shape from night to night?
Please explain in your own words how a plane stays in the air, how bread rises, and what the stars are made of.
Yes, that is right. No, I do not think so. Thank you very much for your help. Here is the answer to your question.
The first step is to read the problem with care, the second is to write down what is known and what is wanted.
Monday Tuesday Wednesday Thursday Friday Saturday Sunday; one two three four five six seven eight nine ten eleven.
red green blue yellow black white; spring summer autumn winter; north south east west; large small high low near far.
Once more: the router sends the question to the expert, the expert writes the answer, and the answer comes back.
"""


def build(out: Path, *, seed: int, layers: int, hidden: int, max_length: int) -> None:
    """Writes model and tokenizer to `out` atomically. Raises FileExistsError if it is not empty."""
    if hidden % HEAD_DIM or hidden < HEAD_DIM or layers < 1:
        raise ValueError(f"hidden must be a multiple of {HEAD_DIM} and layers at least 1, not {hidden} and {layers}")
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _atomic_folder(out) as folder:
        tokenizer = _tokenizer(max_length=max_length)
        tokenizer.save_pretrained(folder)
        _model(tokenizer, seed=seed, layers=layers, hidden=hidden, max_length=max_length).save_pretrained(folder)


def build_adapter(out: Path, *, model: Path, seed: int, rank: int) -> None:
    """Writes a LoRA adapter for the tiny `model` to `out`, in PEFT's format. Its weights are as large as the model's,
    so that the responses differ."""
    import torch
    from safetensors.torch import save_file

    shape = json.loads((model / "config.json").read_text(encoding="utf-8"))
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: int, columns: int) -> Any:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    weights: dict[str, Any] = {}
    for layer in range(shape["num_hidden_layers"]):
        for module, width in (("self_attn.o_proj", hidden), ("mlp.down_proj", inner)):
            at = f"base_model.model.model.layers.{layer}.{module}"
            raised = 4.0 * drawn(hidden, rank)
            raised[0] = 0.0  # the channel that `_suppress_special_tokens` uses
            weights |= {f"{at}.lora_A.weight": drawn(rank, width), f"{at}.lora_B.weight": raised}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "target_modules": ["o_proj", "down_proj"],
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
    }
    with _atomic_folder(out) as folder:
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        save_file(weights, folder / "adapter_model.safetensors")


@contextmanager
def _atomic_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `out` at the end of the block."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists: remove it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _tokenizer(*, max_length: int) -> Any:
    """Returns a byte-level BPE tokenizer, which encodes any text and does not depend on the seed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[END, START, STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=STOP,
        pad_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _model(tokenizer: Any, *, seed: int, layers: int, hidden: int, max_length: int) -> Any:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ends = [tokenizer.convert_tokens_to_ids(token) for token in (STOP, END)]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_DIM,
        num_key_value_heads=hidden // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=max_length,
        bos_token_id=None,
        eos_token_id=ends[0],
        pad_token_id=ends[1],
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # Initialised in order of name, because the library's own order may change between versions.
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                spread = 2.4 if name.startswith("lm_head") else 0.8
                weight.normal_(0.0, spread / hidden**0.5, generator=generator)
        _suppress_special_tokens(model, allowed=_text_tokens(tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=ends[1], do_sample=True, temperature=1.0, top_p=1.0
    )
    return model


def _text_tokens(tokenizer: Any) -> list[int]:
    """Returns the tokens that are printable ASCII text: no special tokens, no parts of multi-byte characters."""
    special = set(tokenizer.all_special_ids)
    return [
        index
        for index in range(len(tokenizer))
        if index not in special and (text := tokenizer.decode([index])).isascii() and text.isprintable()
    ]


def _suppress_special_tokens(model: Any, *, allowed: list[int]) -> None:
    """Makes all tokens outside `allowed` practically impossible, including end tokens.

    Channel 0 of the residual stream is constant: each embedding sets it and no layer changes it. It is positive after
    the last norm at every position, so a negative output weight on it lowers a token's logit for any prompt.
    """
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    model.lm_head.weight[:, 0] = -100.0
    model.lm_head.weight[allowed, 0] = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tiny_model", description="Write tiny random Llama models.")
    parser.add_argument(
        "out", type=Path, metavar="OUT", nargs="+", help="folder to create; each one gets the next seed"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights of the first OUT")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64, help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--max-length", type=int, default=2048, metavar="TOKENS", help="context length")
    parser.add_argument(
        "--adapter-of", type=Path, metavar="MODEL", help="write a LoRA adapter for this tiny model instead"
    )
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapter")
    chosen = parser.parse_args(arguments)
    try:
        for seed, out in enumerate(chosen.out, start=chosen.seed):
            if chosen.adapter_of is not None:
                build_adapter(out, model=chosen.adapter_of, seed=seed, rank=chosen.rank)
            else:
                build(out, seed=seed, layers=chosen.layers, hidden=chosen.hidden, max_length=chosen.max_length)
    except (ValueError, OSError) as error:
        parser.error(str(error))  # exits with status 2: an invalid value
    return 0


if __name__ == "__main__":
    sys.exit(main())
