"""Faults over several processes, which torchrun itself starts, on one machine and on two."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from tests import test_distributed as small

ROOT = Path(__file__).parents[2]
TRIES = int(os.environ.get("TRIES", 3))  # of each fault
RUN = (
    "--dataset cifar10-sample --width 8 --batch-size 64 --epochs 2 --max-train-batches 12 "
    "--max-test-batches 2 --lr 0.01 --precision fp32 --device cpu --checkpoint-seconds 0"
).split()
STEPS = 24  # of such a run
TIMEOUT = 5  # seconds of --process-timeout, where a fault is noticed by nothing else
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


class Outcome(NamedTuple):
    """What one fault did."""

    landed: bool
    lost: bool  # it cost anything, or took too long
    seconds: float  # until all were gone
    said: str


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Job:
    """Processes of one run, started by one torchrun for each machine."""

    def __init__(self, folder: Path, *flags: str, agents: list[list[str]], script: str = "main.py"):
        self.folder = folder
        self.log = folder.parent / f"{time.monotonic_ns()}.log"
        words = [script, *RUN, "--output", str(folder), "--resume", *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with self.log.open("w") as log:
            self.agents = [
                subprocess.Popen([*agent, *words], cwd=ROOT, env=environment, stdout=log, stderr=log)
                for agent in agents
            ]

    def ranks(self) -> dict[int, int]:
        """The process id of each rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                rank = re.search(r"\0RANK=(\d+)\0", (path / "environ").read_text())
                if rank and parent in [agent.pid for agent in self.agents]:
                    found[int(rank[1])] = int(path.name)
        return found

    def wait_for_step(self, step: int) -> dict[int, int]:
        """Wait until the run has got so far; the process id of each rank."""
        while small.newest(self.folder) < step and self.agents[0].poll() is None:
            time.sleep(0.005)
        return self.ranks()

    def ended(self, seconds: float, orphans: list[int] | None = None) -> list[int | None]:
        """Wait until all are gone: the exit codes of the torchruns. What is still there then is killed.

        Args:
            orphans: processes that may outlive their torchrun.
        """
        deadline = time.monotonic() + seconds
        for agent in self.agents:
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.wait(max(0.1, deadline - time.monotonic()))
        while any(map(alive, orphans or [])) and time.monotonic() < deadline:
            time.sleep(0.05)
        codes = [agent.poll() for agent in self.agents]
        left = [pid for pid in orphans or [] if alive(pid)]
        for pid in [*left, *self.ranks().values(), *(agent.pid for agent in self.agents)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for agent in self.agents:
            agent.wait()
        return codes

    def lines(self) -> list[str]:
        """What the run said of its end."""
        return [line for line in self.log.read_text().splitlines() if line.startswith("main.py: ")]


def one_machine(world: int = 2, restarts: int = 0) -> list[list[str]]:
    """The torchrun of a run on one machine."""
    flags = ["--standalone", "--nproc-per-node", str(world), "--max-restarts", str(restarts)]
    return [[*TORCHRUN, *flags]]


def two_machines(networks: bool = True) -> list[list[str]]:
    """The torchruns of a run on two machines: network namespaces, or both on the loopback device."""
    port = random.randrange(20000, 30000)
    agents = []
    for number in range(2):
        host, own = ("10.77.0.1", f"10.77.0.{number + 1}") if networks else ("127.0.0.1", "127.0.0.1")
        inside = ["ip", "netns", "exec", f"run{number}"] if networks else []
        device = f"GLOO_SOCKET_IFNAME={f'run{number}' if networks else 'lo'}"
        flags = f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint {host}:{port}"
        flags += f" --rdzv-conf is_host={1 - number} --local-addr {own} --rdzv-id {port}"
        agents.append([*inside, "env", device, *TORCHRUN, *flags.split()])
    return agents


@contextlib.contextmanager
def two_networks():
    """Two network namespaces with a link between them and none to anywhere else."""
    commands = [
        *(f"netns add run{k}" for k in range(2)),
        "link add run0 netns run0 type veth peer name run1 netns run1",
        *(f"-n run{k} addr add 10.77.0.{k + 1}/24 dev run{k}" for k in range(2)),
        *(f"-n run{k} link set {device} up" for k in range(2) for device in (f"run{k}", "lo")),
    ]
    try:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        yield
    finally:
        for k in range(2):
            subprocess.run(["ip", "netns", "del", f"run{k}"], capture_output=True)


def cut(job: Job, pids: dict[int, int]) -> None:
    """Take the link between the two machines down."""
    subprocess.run("ip -n run1 link set run1 down".split(), check=True)


def agent_killed(job: Job, pids: dict[int, int]) -> None:
    """Kill the last torchrun, and leave its processes."""
    job.agents[-1].kill()


def machine_lost(job: Job, pids: dict[int, int]) -> None:
    """Kill a torchrun and its process in one moment."""
    job.agents[1].kill()
    os.kill(pids[1], signal.SIGKILL)


def send(number: int, rank: int) -> Callable[[Job, dict[int, int]], None]:
    """A fault: a signal to a rank."""
    return lambda job, pids: os.kill(pids[rank], number)


def attempt(
    agents: list[list[str]],
    fault: Callable,
    flags: tuple[str, ...],
    expected: str,
    within: float,
    seed: int,
) -> Outcome:
    """One fault at a random step, then a resume by two processes of one machine."""
    with tempfile.TemporaryDirectory() as root:
        job = Job(Path(root) / "run", *flags, agents=agents)
        pids = job.wait_for_step(random.Random(seed).randrange(1, STEPS - 4))
        landed = job.agents[0].poll() is None and len(pids) == 2
        begin = time.monotonic()
        fault(job, pids)
        job.ended(within + 60, list(pids.values()))
        seconds, said = time.monotonic() - begin, sorted(set(job.lines()))
        again = Job(job.folder, agents=one_machine())
        lost = again.ended(300) != [0] or small.weights_of(job.folder) != expected
        if lost or seconds > within or not said:
            print(
                seed, seconds, said, job.log.read_text()[-3000:], again.log.read_text()[-1000:], sep="\n"
            )
        return Outcome(landed, lost or seconds > within or not said, seconds, " / ".join(said))


def whole(world: int = 2) -> str:
    """The weights of a run that nothing interrupts."""
    with tempfile.TemporaryDirectory() as root:
        job = Job(Path(root) / "run", agents=one_machine(world))
        assert job.ended(300) == [0], job.log.read_text()[-2000:]
        return small.weights_of(job.folder)


def on_one(fault: Callable, within: float, *flags: str) -> Callable[[str, int], Outcome]:
    """A fault on one machine, and the seconds within which all must be gone."""
    return lambda expected, seed: attempt(one_machine(), fault, flags, expected, within, seed)


def on_two(fault: Callable, within: float, *flags: str) -> Callable[[str, int], Outcome]:
    """The same on two machines."""

    def call(expected: str, seed: int) -> Outcome:
        with two_networks():
            return attempt(two_machines(), fault, flags, expected, within, seed)

    return call


def restarted(expected: str, seed: int) -> Outcome:
    """SIGKILL of one process; torchrun starts all anew, by itself."""
    with tempfile.TemporaryDirectory() as root:
        job = Job(Path(root) / "run", agents=one_machine(restarts=1))
        pids = job.wait_for_step(random.Random(seed).randrange(1, STEPS - 4))
        begin = time.monotonic()
        os.kill(pids[seed % 2], signal.SIGKILL)
        codes = job.ended(300)
        seconds = time.monotonic() - begin
        lost = codes != [0] or small.weights_of(job.folder) != expected
        return Outcome(len(pids) == 2, lost, seconds, "")


def terminated(expected: str, seed: int) -> Outcome:
    """SIGTERM to torchrun: one checkpoint at an agreed step, from which the run goes on."""
    with tempfile.TemporaryDirectory() as root:
        job = Job(Path(root) / "run", "--checkpoint-seconds", "1e9", agents=one_machine())
        job.wait_for_step(random.Random(seed).choice((0, 12)))
        time.sleep(random.Random(seed).random())
        begin, before = time.monotonic(), small.newest(job.folder)
        job.agents[0].terminate()
        job.ended(60)
        seconds, said, landed = time.monotonic() - begin, job.lines(), before < STEPS
        again = Job(job.folder, agents=one_machine())
        lost = again.ended(300) != [0] or small.weights_of(job.folder) != expected
        wrong = said != ["main.py: stopped by SIGTERM; --resume continues the run"]
        if lost or wrong:
            print(seed, said, job.log.read_text()[-2000:], sep="\n")
        return Outcome(landed, lost or wrong, seconds, " / ".join(said))


def same_on_two_machines(expected: str, seed: int) -> Outcome:
    """No fault: two machines end with the bits of one machine with two processes."""
    begin = time.monotonic()
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as root:
        networks = os.geteuid() == 0
        if networks:
            stack.enter_context(two_networks())
        job = Job(Path(root) / "run", agents=two_machines(networks))
        lost = job.ended(300) != [0, 0] or small.weights_of(job.folder) != expected
        if lost:
            print(job.log.read_text()[-2000:])
    kind = "network namespaces" if networks else "both on the loopback device"
    return Outcome(True, lost, time.monotonic() - begin, kind)


def controls() -> dict[str, bool]:
    """What must go wrong where a guard is missing, and whether it did."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        alone = small.fit()["weights"]
        unsynced = small.results_of(2, root / "a", small.fit, sync_norm=False)[0]["weights"]
        uninterrupted = small.results_of(3, root / "b", small.fit_unprimed)[0]["weights"]
        small.results_of(3, root / "c", small.fit_unprimed, root / "run", stop_at=2)
        resumed = small.results_of(3, root / "d", small.fit_unprimed, root / "run", resume=True)
        both = small.results_of(2, root / "e", small.fit)[0]["weights"]
        swallowed = small.weights_after_a_loss(root / "f", guarded=False)
    return {
        "norms not synced: differs": small.apart(unsynced, alone) > 1e-2,
        "buckets not primed: a resume differs": not torch.equal(uninterrupted, resumed[0]["weights"]),
        "the old `held`: half an update is saved": not torch.equal(swallowed, both),
    }


SLOW = ("--process-timeout", str(TIMEOUT))
FAULTS: dict[str, Callable[[str, int], Outcome]] = {
    "SIGKILL of rank 0": on_one(send(signal.SIGKILL, 0), 15),
    "SIGKILL of rank 1": on_one(send(signal.SIGKILL, 1), 15),
    "SIGKILL of a rank, --max-restarts 1": restarted,
    "SIGKILL of torchrun": on_one(agent_killed, 15),
    "SIGTERM to torchrun": terminated,
    "SIGSTOP of rank 0": on_one(send(signal.SIGSTOP, 0), TIMEOUT + 45, *SLOW),
    "SIGSTOP of rank 1": on_one(send(signal.SIGSTOP, 1), TIMEOUT + 45, *SLOW),
    "two machines, no fault": same_on_two_machines,
    "two machines: one is lost": on_two(machine_lost, 60),
    "two machines: the link is cut": on_two(cut, TIMEOUT + 60, *SLOW),
}
