"""Accounting of the test cluster: MariaDB, slurmdbd, and the entries that slurmctld needs before it starts.

Rules: these start in this order, or slurmctld hangs. The database is created before slurmdbd starts: beside Debian 13's
libmariadb, a slurmdbd that finds none creates it and then dies. MariaDB listens only on a socket in a folder of root
and needs no password. It does not write safely to disk, because the data are not kept.
"""

from collections.abc import Sequence

from tests.slurm.configuration import ACCOUNT, DATABASE, Shape
from tests.slurm.host import Host, answers
from tests.support.waiting import eventually_sync


def start_accounting(controller: Host, shape: Shape, *, users: Sequence[str]) -> None:
    """Starts accounting with `users` in the account ACCOUNT of a cluster that slurmdbd knows. munge is starting or
    up."""
    database = shape.database_socket
    data, pid, first = (database.with_name(name) for name in ("data", "pid", "first.sql"))
    first.write_text(f"CREATE DATABASE IF NOT EXISTS {DATABASE};\n")
    # fmt: off
    small = ["--no-defaults", "--user=root", f"--datadir={data}", "--innodb-log-file-size=8M"]
    controller.enter(["mariadb-install-db", *small, "--skip-test-db", "--skip-name-resolve",
                      "--auth-root-authentication-method=normal"])
    controller.daemon(["mariadbd", *small, "--skip-networking", "--skip-grant-tables", f"--socket={database}",
                       f"--pid-file={pid}", f"--init-file={first}", "--innodb-flush-log-at-trx-commit=0"])
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
