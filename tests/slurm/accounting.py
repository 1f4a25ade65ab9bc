"""The test cluster's accounting: MariaDB, slurmdbd and what sacctmgr must know before slurmctld starts.

Rules: in this order, or slurmctld hangs. MariaDB listens on a socket only, in a folder of root's, so it needs no
password; it forgets to write to disk, which nobody needs here.
"""

from collections.abc import Sequence

from tests.slurm.configuration import ACCOUNT, Shape
from tests.slurm.host import Host, answers
from tests.support.waiting import eventually_sync


def start_accounting(controller: Host, shape: Shape, *, users: Sequence[str]) -> None:
    """Returns with `users` in the account ACCOUNT of a cluster that slurmdbd knows; munge is starting or up."""
    database = shape.database_socket
    data, pid = database.with_name("data"), database.with_name("pid")
    # fmt: off
    small = ["--no-defaults", "--user=root", f"--datadir={data}", "--innodb-log-file-size=8M"]
    controller.enter(["mariadb-install-db", *small, "--skip-test-db", "--skip-name-resolve",
                      "--auth-root-authentication-method=normal"])
    controller.daemon(["mariadbd", *small, "--skip-networking", "--skip-grant-tables", f"--socket={database}",
                       f"--pid-file={pid}", "--innodb-flush-log-at-trx-commit=0"])
    # fmt: on
    eventually_sync(lambda: answers(database))
    eventually_sync(lambda: answers(shape.munge_socket))
    controller.daemon(["slurmdbd", "-D"], environment={"MYSQL_UNIX_PORT": str(database)})
    eventually_sync(lambda: answers((controller.address, 6819)))
    for what in (
        ["cluster", "hpcr"],
        ["account", ACCOUNT, "Cluster=hpcr"],
        ["user", ",".join(users), f"Account={ACCOUNT}"],
    ):
        controller.enter(["sacctmgr", "--immediate", "--quiet", "add", *what])
