"""The student of a sentence encoder, trained by the command as a user gives it, by the environment that trains."""

import os
import subprocess
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from hpc_router.routing.artefact import MANIFEST, TABLES, read
from hpc_router.routing.classifier import Classifier
from tests.routing.training.encoders import tiny_bert
from tests.routing.training.samples import SHARED, WORDS, prompts, written
from tests.support.needs import ROOT, engine_python

pytestmark = pytest.mark.e2e


def test_the_student_is_trained_the_same_twice_and_knows_the_encoders_words(tmp_path: Path) -> None:
    """Both at once: most of the time is the import of torch."""
    python = engine_python("train")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = dict.fromkeys([*SHARED, *chain.from_iterable(WORDS.values()), "zeppelin"])
    encoder = tiny_bert(tmp_path / "encoder", [*words])
    data = written(tmp_path / "data.jsonl", prompts())

    def trains(name: str) -> subprocess.Popen[str]:
        keys = [f"data={data}", "method=exemplars", f"encoder={encoder}", f"output={tmp_path / name}"]
        argv = [str(python), "-m", "launch.train_classifier", *keys]
        return subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    both = [trains("a"), trains("b")]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    for file in (MANIFEST, TABLES):
        one, other = ((tmp_path / name / file).read_bytes() for name in ("a", "b"))
        assert one.replace(b"/a", b"/b") == other
    artefact = read(tmp_path / "a")
    assert "zeppelin" in artefact.terms  # in no prompt
    classifier = Classifier(artefact)
    right = [classifier.classify(str(row["prompt"])).expert == row["domain"] for row in prompts(seed=1)]
    assert np.mean(right) > 0.8
