"""The verb `token` in a run with a share folder."""

import os
import pwd
from pathlib import Path

import pytest

from hpc_router.cli.main import main
from hpc_router.cluster.planning.share_claim import claim_share
from hpc_router.config import frozen
from hpc_router.config.schema import Deployment, EngineConfig, ExpertConfig, PolicyConfig, RouterConfig
from hpc_router.state.run_directory import RunDir, make_run
from hpc_router.state.share_dir import open_share, read_token

ME = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = make_run(tmp_path / "run")
    router = RouterConfig(share_dir=str(tmp_path / "share"), share_group=str(os.getgid()))
    experts = {"math": ExpertConfig(model="m", engine=EngineConfig(kind="sim"))}
    deployment = Deployment(experts=experts, policy=PolicyConfig(kind="model_field"), router=router)
    made.config.write_text(frozen.to_yaml(deployment))
    claim_share(made, deployment)
    return made


def test_a_token_is_also_written_to_the_folder_until_it_is_revoked(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    share = open_share(tmp_path / "share")
    assert main(["token", "create", "--run", str(run.path), "--user", ME]) == 0
    shown = capsys.readouterr()
    assert read_token(share, ME) == shown.out.strip()
    assert f"# {ME} can read it in {share.tokens / ME}" in shown.err
    assert shown.out.strip() not in shown.err
    assert main(["token", "revoke", "--run", str(run.path), "--user", ME]) == 0
    assert read_token(share, ME) is None


def test_a_user_without_an_account_gets_the_token_from_the_owner(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["token", "create", "--run", str(run.path), "--user", "no-account@example"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("hpcr-")
    assert "because there is no Unix user no-account@example on this host; give it to its user" in shown.err


def test_a_folder_that_cannot_be_used_does_not_lose_the_token(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "share" / "thesis.tex").write_text("")
    assert main(["token", "create", "--run", str(run.path), "--user", ME]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("hpcr-")
    assert "not written to" in shown.err
    assert "has other files" in shown.err
