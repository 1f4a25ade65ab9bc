"""The student of a sentence encoder, trained by the command as a user gives it, by the environment that trains."""

import os
import subprocess
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from hpc_router.routing.artefact import MANIFEST, TABLES, read
from hpc_router.routing.classifier import Classifier
from tests.needs import ROOT, engine_python
from tests.routing.training.samples import SHARED, WORDS, prompts, written

pytestmark = pytest.mark.e2e

TINY_ENCODER = """
import sys
from pathlib import Path
import torch
from transformers import BertConfig, BertModel, BertTokenizer
torch.manual_seed(0)
folder, words = Path(sys.argv[1]), sys.argv[2].split()
folder.mkdir()
vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
(folder / "vocab.txt").write_text("\\n".join(vocabulary) + "\\n")
BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
"""


def test_the_student_is_trained_the_same_twice_and_knows_the_encoders_words(tmp_path: Path) -> None:
    python = engine_python("train")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    encoder = tmp_path / "encoder"
    words = " ".join(dict.fromkeys([*SHARED, *chain.from_iterable(WORDS.values()), "zeppelin"]))
    subprocess.run([python, "-c", TINY_ENCODER, encoder, words], env=environment, check=True, timeout=120)
    data = written(tmp_path / "data.jsonl", prompts())
    for name in ("a", "b"):
        keys = [f"data={data}", "method=exemplars", f"encoder={encoder}", f"output={tmp_path / name}"]
        argv = [str(python), "-m", "launch.train_classifier", *keys]
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    for file in (MANIFEST, TABLES):
        one, other = ((tmp_path / name / file).read_bytes() for name in ("a", "b"))
        assert one.replace(b"/a", b"/b") == other
    artefact = read(tmp_path / "a")
    assert "zeppelin" in artefact.terms  # in no prompt
    classifier = Classifier(artefact)
    right = [classifier.classify(str(row["prompt"])).expert == row["domain"] for row in prompts(seed=1)]
    assert np.mean(right) > 0.8
