"""A compute node of the test cluster: a host with slurmd on it, to be killed, cut off and brought back by tests."""

from tests.slurm.host import Host


class Node:
    def __init__(self, host: Host) -> None:
        self._host = host
        self._slurmd = host.folder / "run" / f"{host.name}.pid"
        self.name, self.address = host.name, host.address
        self.enter, self.inside, self.daemon = host.enter, host.inside, host.daemon

    def kill(self) -> None:
        """The power cut: nothing on the node ends in order."""
        self._host.halt()

    def cut_off(self) -> None:
        """Pull the network cable: jobs go on running, and still see the shared file system."""
        self._host.cut_off()

    def reconnect(self) -> None:
        """Plug it in again. slurmd is told to register now: the controller by itself looks again within a minute."""
        self._host.reconnect()
        self._host.enter(["kill", "-HUP", self._slurmd.read_text().strip()])

    def restart(self) -> None:
        """Off, where it is on, and on again: slurmd runs, and the controller takes it back once it has registered."""
        self._host.halt()
        self._host.boot()
        self._host.daemon(["slurmd", "-D", "-N", self.name])
