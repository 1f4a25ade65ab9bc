"""The content of prompt files, and the errors for invalid lines."""

from pathlib import Path

import pytest

from hpc_router.errors import ConfigError
from hpc_router.routing.training.dataset import deduplicated, read_corpus, read_rows


def test_prompts_texts_and_request_bodies_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "one", "domain": "d"}\n\n{"text": "two", "expert": "e", "id": "x"}\n'
        '{"model": "auto", "messages": [{"role": "user", "content": "three"}], "correct": {"e": true}}\n'
    )
    rows = read_rows(path)
    assert [(row.id, row.text, row.label) for row in rows] == [(0, "one", "d"), ("x", "two", "e"), (3, "three", None)]
    assert rows[2].correct == {"e": 1.0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"prompt": 3}', "'prompt' must be"),
        (b'{"domain": "x"}', "no text"),
        (b'{"prompt": "x", "expert": 3}', '"expert" must be a non-empty string'),
        (b'{"prompt": "x", "correct": {"a": "yes"}}', '"correct" must be an object that maps experts to numbers'),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
    ids=str,
)
def test_an_error_names_the_invalid_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + line + b"\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: .*" + message):
        read_rows(path)


def test_an_empty_or_absent_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(ConfigError, match="contains no prompt"):
        read_rows(tmp_path / "a")
    with pytest.raises(ConfigError, match="No such file"):
        read_rows(tmp_path / "b")


def test_repeats_and_empty_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": " "}\n{"prompt": "ONE "}\n{"prompt": "\\ud800"}\n')
    rows, left_out = deduplicated(read_rows(path), path=path, need_label=False)
    assert ([row.text for row in rows], left_out) == (["one"], 3)


def test_a_prompt_with_two_labels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "one", "domain": "a"}\n{"prompt": "One", "domain": "b"}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl:2: the same prompt as line 1"):
        deduplicated(read_rows(path), path=path, need_label=True)


def test_a_corpus_is_plain_text_or_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one\n\ntwo\none\n")
    (tmp_path / "b").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_corpus(tmp_path / "a") == read_corpus(tmp_path / "b") == ["one", "two"]
