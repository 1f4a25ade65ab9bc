"""The share folder: who can read what in it, and when it is refused."""

import json
import os
import pwd
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_router.errors import ConfigError
from hpc_router.state.registry import Record, RecordKind, State
from hpc_router.state.run_directory import RunDir, make_run
from hpc_router.state.share_dir import (
    SharedRouter,
    check_share,
    claimed_share,
    group_id,
    is_share,
    make_share,
    open_share,
    read_token,
    remove_token,
    shared_record,
    write_router,
    write_token,
)
from hpc_router.state.user_tokens import create_token
from tests.support.users import (
    MEMBER,
    OTHER_MEMBER,
    OUTSIDER,
    OWNER,
    SHARED_GROUP,
    as_user,
    needs_root,
)

ROUTER = Record(
    RecordKind.ROUTER, "router-0.g2", "http://127.0.0.1:1", State.READY, {}, generation=2, nonce="n", node="n1",
    job_id="7", beat=3, beat_s=1.0,
)  # fmt: skip


@pytest.fixture
def group() -> str:
    """A group that this user is in."""
    return str(os.getgid())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "share"


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


def content(run: RunDir, router: Record | None = ROUTER) -> SharedRouter:
    return SharedRouter(str(run.path.resolve()), 32.0, router)


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_its_modes_do_not_depend_on_the_umask(path: Path, tmp_path: Path, group: str, umask: int) -> None:
    run = make_run(tmp_path / "run")
    before = os.umask(umask)
    try:
        share = claimed_share(path, group, run)
        write_router(share, content(run), group=group)
    finally:
        os.umask(before)
    assert (mode(path), mode(share.tokens), mode(share.router_json)) == ("0o750", "0o710", "0o640")
    path.chmod(0o777)
    make_share(path, group)
    assert mode(path) == "0o750", "an existing folder is closed to others"


def test_members_get_no_more_of_the_record_than_they_need(path: Path, tmp_path: Path, group: str) -> None:
    run = make_run(tmp_path / "run")
    share = claimed_share(path, group, run)
    write_router(share, content(run, shared_record(ROUTER)), group=group)
    found = open_share(path).router_file().read()
    assert found is not None
    assert found.router is not None
    assert (found.router.url, found.router.nonce, found.router.replica) == (ROUTER.url, "n", "router-0.g2")
    assert (found.router.node, found.router.job_id, found.router.beat) == (None, None, None)
    assert run.secret() not in share.router_json.read_text()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: path.parent.joinpath("share").write_text(""), "is not a folder"),
        (lambda path: path.symlink_to(path.parent), "is not a folder"),
        (lambda path: (path.mkdir(), (path / "thesis.tex").write_text("")), "has other files, such as 'thesis.tex'"),
        (lambda path: path.parent.chmod(0o770), "could be replaced by other users, who can write to"),
        (lambda path: path.parent.chmod(0o707), "could be replaced by other users, who can write to"),
    ],
)
def test_what_cannot_be_shared(path: Path, group: str, prepare: Callable[[Path], object], message: str) -> None:
    prepare(path)
    with pytest.raises(ConfigError, match=message) as refused:
        check_share(path, group)
    assert refused.value.key == "router.share_dir"
    with pytest.raises(ConfigError, match=message):
        make_share(path, group)


def test_a_sticky_folder_is_as_good_as_a_closed_one(path: Path, group: str) -> None:
    path.parent.chmod(0o1777)
    check_share(path, group)


def test_a_place_in_a_run_directory_is_refused(tmp_path: Path, group: str) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "latest").symlink_to("run")
    for place in (run.path, run.path / "share", tmp_path / "latest" / "share", run.logs / "share"):
        with pytest.raises(ConfigError, match="is inside the run directory"):
            check_share(place, group)
    with pytest.raises(ConfigError, match="there is no folder"):
        check_share(tmp_path / "nope" / "share", group)


def test_the_group_exists_and_has_the_owner() -> None:
    with pytest.raises(ConfigError, match=r"router\.share_group=no-such-group: there is no such group"):
        group_id("no-such-group")
    assert group_id(str(os.getgid())) == os.getgid()


@needs_root
def test_an_owner_who_is_not_in_the_group(tmp_path: Path) -> None:
    def refused() -> str:
        try:
            group_id("games")
        except ConfigError as error:
            return str(error)
        return "accepted"

    assert "you are not in this group (valid: nogroup)" in as_user(OUTSIDER, refused)
    assert as_user(OWNER, refused) == "accepted"


def test_a_folder_that_members_cannot_reach_is_a_warning(tmp_path: Path) -> None:
    closed = tmp_path / "home"
    closed.mkdir(mode=0o700)
    [warning] = check_share(closed / "share", str(os.getgid()))
    assert "members of" in warning
    assert "is closed to them" in warning


def test_a_folder_of_another_run_is_not_taken(path: Path, tmp_path: Path, group: str) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    write_router(claimed_share(path, group, first), content(first), group=group)
    claimed_share(path, group, first)
    with pytest.raises(ConfigError, match=f"belongs to the run {first.path}"):
        claimed_share(path, group, second)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "run": 1, "max_body_mb": 1, "router": null}',
     '{"schema": 1, "run": "/r", "max_body_mb": 1, "router": {"schema": 1}}'],
)  # fmt: skip
def test_a_damaged_file_names_no_router(path: Path, group: str, text: str) -> None:
    share = make_share(path, group)
    share.router_json.write_text(text)
    assert open_share(path).router_file().read() is None


def test_a_record_that_is_no_ready_router_is_refused(path: Path, tmp_path: Path, group: str) -> None:
    run, share = make_run(tmp_path / "run"), make_share(path, group)
    value = content(run).to_json()
    for key, wrong in (("kind", "expert"), ("state", "draining"), ("url", "file:///etc/passwd")):
        share.router_json.write_text(json.dumps(value | {"router": value["router"] | {key: wrong}}))
        assert open_share(path).router_file().read() is None


def test_which_folders_are_share_folders(path: Path, tmp_path: Path, group: str) -> None:
    run = make_run(tmp_path / "run")
    run.store_external_token("api-0.g1", "x")  # a run directory may also have a folder `tokens`
    make_share(path, group)
    assert [is_share(one) for one in (path, run.path, tmp_path, tmp_path / "nope")] == [True, False, False, False]


def test_only_the_newest_token_of_a_user_is_in_the_file(path: Path, tmp_path: Path, group: str) -> None:
    run, share = make_run(tmp_path / "run"), make_share(path, group)
    me = pwd.getpwuid(os.getuid()).pw_name
    older, older_text = create_token(run, me)
    newer, newer_text = create_token(run, me)
    assert write_token(share, me, older_text) is None
    assert write_token(share, me, newer_text) is None
    assert read_token(share, me) == newer_text
    remove_token(share, me, older.id)
    assert read_token(share, me) == newer_text
    remove_token(share, me, newer.id)
    assert read_token(share, me) is None
    assert write_token(share, "nobody-has-this-name", newer_text) == (
        "there is no Unix user nobody-has-this-name on this host"
    )
    assert list(share.tokens.iterdir()) == []


def test_without_access_control_lists_no_file_is_written(
    path: Path, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that only its mode protects would be open to the whole group, or to nobody."""

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", unsupported)
    share = make_share(path, group)
    assert "has no POSIX access control lists" in str(write_token(share, "nobody", "hpcr-x"))
    assert list(share.tokens.iterdir()) == []


@needs_root
def test_what_members_and_others_can_read(open_path: Path) -> None:
    """A real owner, two real members and a user outside the group; the owner is not root."""
    place = open_path / "place"
    place.mkdir()
    os.chown(place, OWNER.uid, OWNER.gid)
    path = place / "share"

    def share() -> None:
        run = make_run(place / "run")
        made = claimed_share(path, "games", run)
        write_router(made, content(run), group="games")
        assert write_token(made, "games", "the token of games") is None
        assert write_token(made, "man", "the token of man") is None

    def seen() -> dict[str, object]:
        files = [path, path / "router.json", path / "tokens", path / "tokens/games", path / "tokens/man"]
        found: dict[str, object] = {"write": os.access(path, os.W_OK) or os.access(path / "tokens", os.W_OK)}
        for file in files:
            try:
                found[str(file.relative_to(place))] = bool(list(file.iterdir()) if file.is_dir() else file.read_text())
            except OSError as error:
                found[str(file.relative_to(place))] = error.strerror
        try:
            opened = open_share(path)
        except ConfigError as error:
            return found | {"open": str(error)}
        return found | {"open": True, "mine": [read_token(opened, name) for name in ("games", "man")]}

    as_user(OWNER, share)
    no = "Permission denied"
    common = {"write": False, "share": True, "share/router.json": True, "share/tokens": no, "open": True}
    assert as_user(MEMBER, seen) == common | {
        "share/tokens/games": True, "share/tokens/man": no, "mine": ["the token of games", None],
    }  # fmt: skip
    assert as_user(OTHER_MEMBER, seen) == common | {
        "share/tokens/games": no, "share/tokens/man": True, "mine": [None, "the token of man"],
    }  # fmt: skip
    outside = as_user(OUTSIDER, seen)
    assert "only the members of a group can use a share folder" in outside.pop("open")
    assert set(outside.values()) == {no, False}
    assert not outside["write"]


@needs_root
@pytest.mark.parametrize("entry", ["folder", "tokens", "router", "token", "above"])
def test_what_another_user_has_put_there_is_refused(open_path: Path, entry: str) -> None:
    """A member, or a user who could write to a folder above, plants an address and a token for others to use."""
    run, path = make_run(open_path / "run"), open_path / "share"
    share = make_share(path, "games")
    write_router(share, content(run), group="games")
    write_token(share, "games", "hpcr-x")
    planted = {"folder": path, "tokens": share.tokens, "router": share.router_json, "token": share.tokens / "games"}
    if entry == "above":
        os.chown(open_path, OUTSIDER.uid, -1)
    elif entry == "folder":
        path.chmod(0o770)
    else:
        os.chown(planted[entry], OTHER_MEMBER.uid, -1)

    def used() -> object:
        try:
            opened = open_share(path)
            return [opened.router_file().read() is not None, read_token(opened, "games")]
        except ConfigError as error:
            return str(error)

    result = as_user(MEMBER, used)
    match entry:
        case "router":
            assert result[0] is False
        case "token":
            assert result == [True, None]
        case "above":
            assert "could be replaced by nobody" in result
        case _:
            assert "other users than the owner of" in result


@needs_root
def test_the_owner_refuses_a_folder_that_another_user_made(tmp_path: Path) -> None:
    path = tmp_path / "share"
    path.mkdir()
    os.chown(path, OUTSIDER.uid, -1)
    with pytest.raises(ConfigError, match="belongs to nobody, not to you"):
        make_share(path, "games")
    assert group_id("games") == SHARED_GROUP
