"""A compute node of the test cluster: a host with slurmd, which tests kill, cut off and restart."""

from tests.slurm.host import Host


class Node:
    def __init__(self, host: Host) -> None:
        self._host = host
        self._slurmd = host.folder / "run" / f"{host.name}.pid"
        self.name, self.address = host.name, host.address
        self.enter, self.inside, self.daemon = host.enter, host.inside, host.daemon

    def kill(self) -> None:
        """Cuts the power: no process of the node can clean up."""
        self._host.halt()

    def cut_off(self) -> None:
        """Cuts the network: jobs continue, and still see the shared file system."""
        self._host.cut_off()

    def reconnect(self) -> None:
        """Connects the network again. slurmd is told to register now; otherwise the controller looks again within a
        minute."""
        self._host.reconnect()
        self._host.enter(["kill", "-HUP", self._slurmd.read_text().strip()])

    def restart(self) -> None:
        """Switches the node off, if it is on, and on again. slurmd runs, and the controller uses the node once it has
        registered."""
        self._host.halt()
        self._host.boot()
        self._host.daemon(["slurmd", "-D", "-N", self.name])
