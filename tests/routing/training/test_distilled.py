"""The student of a sentence encoder, trained with the command in the training environment."""

import os
import subprocess
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from hpc_router.routing.artefact import MANIFEST, TABLES, read
from hpc_router.routing.classifier import Classifier
from tests.routing.training.encoders import write_tiny_bert
from tests.routing.training.samples import SHARED, WORDS, prompts, write_jsonl
from tests.support.needs import ROOT, engine_python

pytestmark = pytest.mark.e2e


def test_two_trainings_give_the_same_bytes_and_the_student_knows_the_encoders_words(tmp_path: Path) -> None:
    """Both trainings run at the same time, because importing torch takes most of it."""
    python = engine_python("train")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = dict.fromkeys([*SHARED, *chain.from_iterable(WORDS.values()), "zeppelin"])
    encoder = write_tiny_bert(tmp_path / "encoder", [*words])
    data = write_jsonl(tmp_path / "data.jsonl", prompts())

    def start_training(name: str) -> subprocess.Popen[str]:
        keys = [f"data={data}", "method=exemplars", f"encoder={encoder}", f"output={tmp_path / name}"]
        argv = [str(python), "-m", "launch.train_classifier", *keys]
        return subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    processes = [start_training("a"), start_training("b")]
    stderr = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], stderr
    for file in (MANIFEST, TABLES):
        one, other = ((tmp_path / name / file).read_bytes() for name in ("a", "b"))
        assert one.replace(b"/a", b"/b") == other
    artefact = read(tmp_path / "a")
    assert "zeppelin" in artefact.terms  # occurs in no prompt
    classifier = Classifier(artefact)
    right = [classifier.classify(str(row["prompt"])).expert == row["domain"] for row in prompts(seed=1)]
    assert np.mean(right) > 0.8
