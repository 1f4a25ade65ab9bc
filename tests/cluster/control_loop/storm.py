"""One storm: a deployment on the simulated Slurm, faults drawn from a seed, and the rules that must hold throughout.

Everything is the product but Slurm's commands, the agents and the clock: the control loops, the launcher, the files.
"""

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final
from unittest.mock import patch

from hpc_router.cluster.commands import down as down_module
from hpc_router.cluster.control_loop import desired_state
from hpc_router.cluster.control_loop.loop import ControlLoop
from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.config import frozen
from hpc_router.config.schema import Deployment, EngineConfig, ExpertConfig, HandoverMode
from hpc_router.errors import HpcRouterError
from hpc_router.state import job_reader
from hpc_router.state.atomic_files import load_json
from hpc_router.state.job_records import FailureReason, JobDir
from hpc_router.state.registry import split_replica
from hpc_router.state.run_directory import RunDir, make_run
from tests.cluster.control_loop.fake_slurm import Agent, FakeJob, FakeSlurm, HostDied

LIMIT_S: Final = 320.0
WARN_S: Final = 30.0
DRAIN_S: Final = 20.0
ASK_S: Final = 30.0
STORM_S: Final = 250.0
FAILED_SUBMISSIONS: Final = (
    "unanswered", "unanswered-but-submitted", "lost", "orphan", "host-dies", "host-dies-after-sbatch"
)  # fmt: skip
CALM_S: Final = 400.0
"""After the storm everything must be ready again within this time."""
UNKNOWN_S: Final = 150.0
"""Longest time, while the controller answers a control loop, for which a job may run that no record names."""


class Broken(AssertionError):
    """A rule was broken. The text ends with the newest events of the storm."""


@dataclass
class Loop:
    """A control loop beside a router, or at the login node (`router` None)."""

    control: ControlLoop
    router: str | None = None


@dataclass
class Storm:
    seed: int
    run: RunDir
    calm: bool = False
    """Only what belongs to normal operation: walltimes, a controller that answers slowly, changed time limits."""
    trace: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.counts = {"math": self.random.randint(1, 2), "code": 1}
        modes: list[HandoverMode] = ["overlap"] if self.calm else ["overlap", "overlap", "drain_first", "none"]
        self.handover = self.random.choice(modes)
        self.per_job = 2 if self.random.random() < 0.2 else 1
        engine = EngineConfig(kind="sim")
        self.deployment = Deployment(
            experts={n: ExpertConfig(model="m", engine=engine, replicas=c) for n, c in self.counts.items()}
        )
        self.deployment.policy.kind = "model_field"
        self.deployment.cluster = replace(
            self.deployment.cluster, kind="slurm", drain_s=DRAIN_S, warn_s=WARN_S, handover_margin_s=30.0, ask_s=ASK_S,
            handover=self.handover, replicas_per_job=self.per_job,
        )  # fmt: skip
        self.run.config.write_text(frozen.to_yaml(self.deployment))
        self.run.write_desired({"router": True})
        self.slurm = FakeSlurm(
            self.run, dict.fromkeys(("n1", "n2", "n3", "n4"), 2), LIMIT_S, WARN_S, self._draw,
            meanwhile=self._meanwhile, log=self._log, asked_to_end=self._check_end,
        )  # fmt: skip
        self.loops = [Loop(self._new_loop())]
        self.depth = 0
        self.checking = False
        self.reader = job_reader.JobReader(self.run, clock=self.slurm.time)
        self.io_errors_until = 0.0
        self.unknown_s: defaultdict[str, float] = defaultdict(float)
        self.no_router_since: float | None = None
        self.were_ready: dict[str, int] = {}
        self.is_down = False

    def _new_loop(self) -> ControlLoop:
        return ControlLoop(self.run, deployment=self.deployment, clock=self.slurm.time)

    def _draw(self, what: str) -> float:
        low, high = {"load": (15.0, 40.0), "drain": (0.0, 15.0), "queue": (0.0, 8.0), "early": (0.0, 30.0)}[what]
        return self.random.uniform(low, high)

    def _log(self, text: str) -> None:
        self.trace.append(f"{self.slurm.now - 2e9:7.1f} {text}")

    # The storm.

    def play(self) -> None:
        """Raises Broken."""
        try:
            self._run_until(lambda: self._all_ready(), limit_s=240.0, what="ready after `up`")
            self.were_ready = self.ready_counts()
            until = self.slurm.now + STORM_S
            while self.slurm.now < until:
                self._strike()
                self._tick(self.random.uniform(3.0, 20.0) if not self.calm else self.random.uniform(3.0, 9.0))
            self._end_storm()
            if not self.calm:
                self._run_until(lambda: self._all_ready(), limit_s=CALM_S, what="ready after the storm")
            self._down()
        except Broken:
            raise
        except Exception as error:
            raise Broken(self._told(f"{type(error).__name__}: {error}")) from error

    def _strike(self) -> None:
        if self.calm:
            kinds: list[tuple[float, Callable[[], None]]] = [(0.04, self._lag), (0.02, self._change_limit)]
        else:
            kinds = [
                (0.03, self._lose_node), (0.05, self._restore_node), (0.03, self._preempt), (0.03, self._cancel),
                (0.03, self._kill), (0.03, self._crash), (0.02, self._hang), (0.02, self._vanish),
                (0.02, self._lose_step), (0.03, self._away),
                (0.06, self._lag), (0.03, self._change_limit), (0.03, self._scale), (0.02, self._stall),
                (0.04, self._io_errors), (0.08, self._fail_submission), (0.03, self._login_loop),
            ]  # fmt: skip
        for chance, strike in kinds:
            if self.random.random() < chance:
                strike()

    def _running(self) -> list[tuple[FakeJob, Agent]]:
        jobs = [job for job in self.slurm.jobs.values() if job.state == "RUNNING" and job.node not in self.slurm.lost]
        return [(job, agent) for job in jobs for agent in job.agents if agent.phase in ("loading", "ready", "draining")]

    def _one(self) -> tuple[FakeJob, Agent] | None:
        running = self._running()
        return self.random.choice(running) if running else None

    def _lose_node(self) -> None:
        left = [node for node in self.slurm.nodes if node not in self.slurm.lost]
        if len(left) > 2:
            node = self.random.choice(left)
            self._log(f"node {node} is lost")
            self.slurm.lose_node(node)

    def _restore_node(self) -> None:
        for node in list(self.slurm.lost)[:1]:
            self._log(f"node {node} is back")
            self.slurm.restore_node(node)

    def _preempt(self) -> None:
        if (one := self._one()) is not None:
            grace_s = self.random.choice([0.0, 10.0, 60.0])
            self._log(f"{one[1].replica} is preempted, grace {grace_s:g} s")
            self.slurm.preempt(one[0], grace_s)

    def _cancel(self) -> None:
        waiting = [job for job in self.slurm.jobs.values() if not job.over]
        if waiting:
            job = self.random.choice(waiting)
            self._log(f"a person cancels {job.name}")
            self.slurm.cancel(job)

    def _kill(self) -> None:
        if (one := self._one()) is not None:
            self._log(f"{one[1].replica} is killed")
            self.slurm.kill(one[0], [one[1]], final="FAILED")

    def _crash(self) -> None:
        if (one := self._one()) is not None:
            self._log(f"{one[1].replica} crashes")
            self.slurm.crash(*one, FailureReason.CRASHED)

    def _hang(self) -> None:
        """Not a router: its loop hangs with it, and only `drain` or the walltime ends that."""
        if (one := self._one()) is not None and not one[1].is_router:
            self._log(f"{one[1].replica} hangs")
            one[1].hung = True

    def _vanish(self) -> None:
        if (one := self._one()) is not None:
            self._log(f"{one[1].replica} vanishes")
            self.slurm.vanish(one[0])

    def _lose_step(self) -> None:
        """Not a router, for the same reason as in `_hang`."""
        if (one := self._one()) is not None and not one[1].is_router:
            self._log(f"{one[1].replica} is gone, and Slurm does not know")
            self.slurm.lose_step(one[0])

    def _away(self) -> None:
        self.slurm.away_until = self.slurm.now + self.random.uniform(10.0, 120.0)
        self._log(f"the controller is away until {self.slurm.away_until - 2e9:.1f}")

    def _lag(self) -> None:
        self.slurm.lag_s = 0.0 if self.slurm.lag_s else self.random.uniform(0.0, 5.0 if self.calm else 25.0)
        self._log(f"answers of the controller take {self.slurm.lag_s:.1f} s")

    def _change_limit(self) -> None:
        if (one := self._one()) is not None and one[0].started_at is not None and one[0].ends_at is not None:
            left_s = one[0].ends_at - self.slurm.now
            more_s = self.random.uniform(-0.2 if left_s > 250 else 0.0, 0.3) * LIMIT_S
            self._log(f"the time limit of {one[1].replica} changes by {more_s:.0f} s")
            one[0].limit_s += more_s

    def _scale(self) -> None:
        counts = {**self.counts, "math": self.random.randint(1, 3)}

        def scale(control: ControlLoop) -> None:
            desired_state.scale(self.run, self.deployment, counts, control.preview().observed)
            self.counts = counts

        self._log(f"scale math={counts['math']}")
        self._verb(scale)

    def _stall(self) -> None:
        self.slurm.stalled_until = self.slurm.now + self.random.uniform(5.0, 60.0)
        self._log("the file system stalls")

    def _io_errors(self) -> None:
        self.io_errors_until = self.slurm.now + self.random.uniform(5.0, 40.0)
        self._log(f"some reads fail until {self.io_errors_until - 2e9:.1f}")

    def _fail_submission(self) -> None:
        kind = self.random.choice(FAILED_SUBMISSIONS)
        self.slurm.failures.append(kind)

    def _login_loop(self) -> None:
        if self.loops and self.loops[0].router is None:
            self._log("the loop at the login node ends")
            del self.loops[0]
        else:
            self._log("a loop starts at the login node")
            self.loops.insert(0, Loop(self._new_loop()))

    def _end_storm(self) -> None:
        slurm = self.slurm
        slurm.away_until = slurm.stalled_until = slurm.lag_s = 0.0
        slurm.failures.clear()
        self.io_errors_until = 0.0
        for node in list(slurm.lost):
            slurm.restore_node(node)
        self._log("the storm is over")
        if not self.calm:  # slots that were given up are tried again
            self._verb(lambda control: desired_state.want_up(self.run, control.preview().observed))

    def _verb(self, body: Callable[[ControlLoop], None]) -> None:
        try:
            body(self._new_loop())
        except (HpcRouterError, OSError) as error:
            self._log(f"the verb fails: {error}")

    # Time, loops and rules.

    def _run_until(self, done: Callable[[], bool], *, limit_s: float, what: str) -> None:
        until = self.slurm.now + limit_s
        while not done():
            if self.slurm.now > until:
                raise Broken(self._told(f"not {what} within {limit_s:g} s"))
            self._tick(6.0)

    def _tick(self, seconds: float) -> None:
        self.slurm.step(seconds)
        self._follow_routers()
        for loop in list(self.loops):
            self._pass(loop)
        self.checking = True  # the rules read the same files
        self._check(seconds)
        self.checking = False

    def _follow_routers(self) -> None:
        """A loop runs beside each router that has started; `up` is repeated when there has been none for a minute."""
        routers = {a.replica for job, a in self._running() if a.is_router and a.phase != "loading" and not a.hung}
        self.loops = [loop for loop in self.loops if loop.router is None or loop.router in routers]
        known = {loop.router for loop in self.loops}
        self.loops += [Loop(self._new_loop(), name) for name in sorted(routers - known)]
        if any(a.is_router for job in self.slurm.jobs.values() if not job.over for a in job.agents) or self.loops:
            self.no_router_since = None
        elif self.no_router_since is None:
            self.no_router_since = self.slurm.now
        elif self.slurm.now > self.no_router_since + 60:
            self._log("up is repeated")
            self.loops = [Loop(self._new_loop())]

    def _pass(self, loop: Loop) -> None:
        try:
            if loop.router is None or loop.control.leads(loop.router):
                loop.control.publish(loop.control.run_pass())
        except (HpcRouterError, OSError) as error:
            self._log(f"a pass fails: {error}")
        except HostDied:
            self._log("the host of the loop dies")
            self.loops = [other for other in self.loops if other is not loop]

    def _meanwhile(self, seconds: float) -> None:
        """A command takes this long; other loops run meanwhile."""
        self.slurm.step(seconds)
        if self.depth < 1:
            self.depth += 1
            try:
                for loop in self.loops[1:] if self.random.random() < 0.5 else ():
                    self._pass(loop)
            finally:
                self.depth -= 1

    def load_json(self, path: Path) -> dict[str, object]:
        if self.slurm.now < self.io_errors_until and not self.checking and self.random.random() < 0.1:
            raise OSError(5, "Input/output error", str(path))
        return load_json(path)

    def ready_counts(self) -> dict[str, int]:
        return Counter(split_replica(a.replica)[0] for _, a in self._running() if a.phase == "ready" and not a.hung)

    def _all_ready(self) -> bool:
        ready = self.ready_counts()
        return all(ready[name] >= count for name, count in {**self.counts, ROUTER: 1}.items())

    def _check(self, seconds: float) -> None:
        slurm = self.slurm
        names = Counter(slurm.submissions)
        self._must(all(count == 1 for count in names.values()), f"submitted twice: {names.most_common(1)}")
        serving: Counter[str] = Counter()
        for job in slurm.jobs.values():
            if job.over:
                continue
            for agent in job.agents:
                records = self.reader.read(agent.replica)
                info = records.info if records is not None else None
                known = info is not None and info.job_id == job.job_id
                wanted = known and records is not None and records.stop is None and job.node not in slurm.lost
                if wanted and agent.phase in ("waiting", "loading", "ready") and not agent.hung:
                    serving[agent.replica.rpartition(".")[0]] += 1
                self.unknown_s[agent.replica] += (
                    0 if known or slurm.now < slurm.away_until or not self.loops else seconds
                )
                self._must(
                    self.unknown_s[agent.replica] <= UNKNOWN_S, f"no record knows job {job.job_id} of {agent.replica}"
                )
        self._must(all(count <= 2 for count in serving.values()), f"more than two live generations: {serving}")
        excluded = slurm.excluded()
        self._must(len(excluded) <= len(slurm.nodes) // 4, f"too many nodes are excluded: {excluded}")
        if self.calm and self.were_ready:
            ready = self.ready_counts()
            fewer = {name: ready[name] for name, count in self.were_ready.items() if ready[name] < count}
            self._must(not fewer, f"a handover left fewer ready: {fewer}")

    def _check_end(self, job: FakeJob, agent: Agent) -> None:
        """The product ends a replica that serves only when another generation of its slot serves, when nobody wants the
        slot, or when the replica was asked to end or given up before."""
        if self.is_down or agent.phase != "ready" or agent.hung or job.node in self.slurm.lost:
            return
        expert, number, _ = split_replica(agent.replica)
        folder = JobDir(self.run, agent.replica)
        if int(number) >= {**self.counts, ROUTER: 1}[expert] or folder.exit() is not None:
            return
        stop = folder.stop()
        if stop is not None and stop.drain_at is not None and stop.drain_at < self.slurm.now:
            return
        slot = agent.replica.rpartition(".")[0]
        serving = [a.replica for _, a in self._running() if a.phase == "ready" and not a.hung]
        others = [name for name in serving if name.rpartition(".")[0] == slot and name != agent.replica]
        self._must(bool(others), f"{agent.replica} is asked to end, and nothing else serves in its slot")

    def _down(self) -> None:
        self._log("down")
        self.is_down = True
        self.were_ready = {}
        until = self.slurm.now + 400.0

        def sleep(seconds: float) -> None:
            self._must(self.slurm.now < until, "down did not end")
            self.slurm.step(max(seconds, 6.0))
            self._follow_routers()
            for loop in list(self.loops):
                self._pass(loop)

        with patch.object(time, "sleep", sleep):
            down_module.down(self.run)
        left = [job.name for job in self.slurm.jobs.values() if not job.over]
        self._must(not left, f"left after down: {left}")
        self._tick(60.0)
        left = [job.name for job in self.slurm.jobs.values() if not job.over]
        self._must(not left, f"submitted after down: {left}")

    def _must(self, holds: bool, what: str) -> None:
        if not holds:
            raise Broken(self._told(what))

    def _told(self, what: str) -> str:
        head = f"seed {self.seed}{' (calm)' if self.calm else ''}: {what}; handover={self.handover}"
        return "\n".join([f"{head}, replicas_per_job={self.per_job}", *self.trace[-60:]])


@contextmanager
def storm(seed: int, folder: Path, *, calm: bool = False) -> Iterator[Storm]:
    """The storm of a seed, with its clock and its Slurm in place of the real ones."""
    made = Storm(seed, make_run(folder / f"seed-{seed}"), calm=calm)
    slurm = made.slurm
    launchers, loops = "hpc_router.cluster.launchers", "hpc_router.cluster.control_loop"
    with (
        patch("time.time", slurm.time),
        patch("time.monotonic", slurm.time),
        patch("os.fsync", lambda _: None),
        patch(f"{launchers}.slurm.launcher.run_slurm_command", slurm.command),
        patch(f"{launchers}.slurm.squeue.run_slurm_command", slurm.command),
        patch(f"{launchers}.slurm.sinfo.run_slurm_command", slurm.command),
        patch(f"{launchers}.slurm.launcher.submit_all", slurm.submit_all),
        patch(f"{launchers}.submitit.process._executor", slurm.executor),
        patch(f"{loops}.loop.ask_to_drain", slurm.drain_calls),
        patch(f"{loops}.liveness._unanswering", slurm.unanswering),
        patch(f"{loops}.liveness._accepting", slurm.accepting),
        patch(f"{loops}.liveness._refusing", slurm.refusing),
        patch("hpc_router.state.job_reader.load_json", made.load_json),
        patch.object(down_module, "sweep", lambda _: None),
        patch(f"{loops}.loop.deployment_of", lambda _: made.deployment),
    ):
        yield made
