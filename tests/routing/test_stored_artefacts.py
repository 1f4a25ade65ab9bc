"""Artefacts that an earlier version wrote load and decide as they did then.

`stored_artefacts/` has one artefact of each kind that this version could write on 29 November 2026 (schema 2: norm
`terms` and `space`, with and without offsets, with measured quality), and its decisions then.
"""

import json
from pathlib import Path

import pytest

from hpc_router.routing.artefact import MANIFEST, TABLES, read
from hpc_router.routing.classifier import Classifier

STORED = Path(__file__).parent / "stored_artefacts"
DECISIONS = json.loads((STORED / "decisions.json").read_text())


@pytest.mark.parametrize("name", sorted(DECISIONS))
def test_an_artefact_of_an_earlier_version_decides_as_it_did(name: str) -> None:
    classifier = Classifier(read(STORED / name))
    for text, cluster, expert, score, margin, runner_up, known_terms in DECISIONS[name]:
        decided = classifier.classify(text)
        assert (decided.cluster, decided.expert, decided.runner_up) == (cluster, expert, runner_up), text
        assert decided.score == pytest.approx(score, abs=1e-5)
        assert decided.margin == (None if margin is None else pytest.approx(margin, abs=1e-5))
        assert decided.known_terms == known_terms, text


@pytest.mark.parametrize("name", sorted(DECISIONS))
def test_writing_it_again_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    read(STORED / name).write(tmp_path / "again")
    for file in (MANIFEST, TABLES):
        assert (tmp_path / "again" / file).read_bytes() == (STORED / name / file).read_bytes()
