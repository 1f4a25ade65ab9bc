"""Log files have a limited size, report lost bytes, and limit the lines of each statement."""

import logging
from pathlib import Path

from hpc_router.state.log_file import BURST, LogFile, LogFileHandler, RateLimit, rotated_path


def test_a_log_is_rotated_by_rename_and_one_older_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LogFile(path, limit=10)
    for number in range(7):
        log.write(b"line %d\n" % number)
        assert path.exists()
    log.close()
    assert rotated_path(path).read_bytes() == b"line 4\nline 5\n"
    assert path.read_bytes() == b"line 6\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "log.1"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_size_of_an_existing_log_counts(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"0123456789x")
    LogFile(path, limit=10).write(b"y")
    assert rotated_path(path).read_bytes() == b"0123456789x"
    assert path.read_bytes() == b"y"


def test_a_failed_write_raises_nothing_and_is_reported_later(tmp_path: Path) -> None:
    folder = tmp_path / "away"
    log = LogFile(folder / "log")
    log.write(b"lost\n")
    log.skip(7)
    folder.mkdir()
    log.write(b"kept\n")
    assert (folder / "log").read_bytes() == b"... 12 bytes could not be written\nkept\n"


def test_one_statement_cannot_flood_the_log(tmp_path: Path) -> None:
    """Other statements are not limited by it, and the omitted lines are counted."""
    now = 0.0
    logger = logging.getLogger("flood")
    logger.setLevel(logging.INFO)
    handler = LogFileHandler(LogFile(tmp_path / "log"))
    handler.addFilter(RateLimit(clock=lambda: now))
    logger.addHandler(handler)
    refused = "refused %d"
    try:
        for seconds in (0.0, 1.0, 2.5):
            now = seconds
            for number in range(1000):
                logger.info(refused, number)
            logger.info("another statement")
    finally:
        logger.removeHandler(handler)
    lines = (tmp_path / "log").read_text().splitlines()
    flood = [line for line in lines if line.startswith("refused")]
    assert flood[:BURST] == [f"refused {number}" for number in range(BURST)]
    assert flood[BURST:] == [
        f"refused 0 ({1000 - BURST} more lines like this were left out)",
        "refused 0 (999 more lines like this were left out)",
    ]
    assert lines.count("another statement") == 3
