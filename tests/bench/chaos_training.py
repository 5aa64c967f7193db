"""Kills processes of a training at random steps, runs its command again until it ends with 0, and compares its history
with that of an undisturbed run: the sample ids and the loss of each step, and the weights of the last checkpoint.

Starts a Ray of two nodes on loopback, draws a small dataset, and trains a tiny model of the stage demo on three workers
of both nodes, once without disturbance. Then each kill takes a kind of process (driver, training worker, read task,
raylet of the second node) and a step at random. A killed node is started again at once. Ends with 1 if any history
deviates. Only processes that this script started are killed. Takes a minute per kill.

    python tests/bench/chaos_training.py --kills 6 --seed 0
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil
from chaos import ROOT, Cluster, Running, wait_for

_STEPS: Final = 80
_WORKERS: Final = 3  # of 0.9 CPUs each, on nodes of two
_RUNS: Final = 5  # of the command after a kill, until it must have ended with 0
_SETTINGS: Final = (
    "log_every=1", "checkpoint_every=8", f"evaluate_every={_STEPS}", "batch_size=12", "micro_batch=4", "streams=6",
    "resolution=32", "model.depth=1", "model.dim=64",
)  # fmt: skip
_TITLES: Final = {"worker": "ray::RayTrainWorker", "read task": "ray::ReadSamples"}
_VICTIMS: Final = ("driver", "worker", "read task", "raylet")
_START: Final = re.compile(r"started in .*?first batch ([\d.]+) s")


@dataclass(frozen=True)
class History:
    """What a run has trained."""

    ids: dict[int, list[str]]  # by step, of the last time that it was taken
    losses: dict[int, float]
    weights: dict[str, str]  # SHA-256 of the files of the last checkpoint

    @classmethod
    def of(cls, run: Path) -> "History":
        parts: dict[int, dict[int, list[str]]] = {}
        for line in map(json.loads, (run / "audit").read_text().splitlines()):
            parts.setdefault(line["step"], {})[line["rank"]] = line["ids"]
        ids = {step: [id for _, part in sorted(of.items()) for id in part] for step, of in parts.items()}
        files = sorted(run.glob(f"demo/checkpoints/step-{_STEPS:08d}/*.safetensors"))
        weights = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        return cls(ids, logged(run), weights)

    def deviations(self, expected: "History") -> list[str]:
        found = []
        for name, ours, theirs in (
            ("samples", expected.ids, self.ids),
            ("losses", expected.losses, self.losses),
            ("files", expected.weights, self.weights),
        ):
            other = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            found += [f"other {name}: {other[:5]}"] if other else []
        return found


def logged(run: Path) -> dict[int, float]:
    """The loss of each step."""
    file = run / "demo/metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return {line["step"]: line["loss"] for line in whole}


@dataclass(frozen=True)
class Kill:
    """The result of one kill."""

    victim: str
    step: int  # the newest that was logged
    codes: tuple[int, ...]  # exit codes of the command
    repeated: int  # steps that were taken again
    first_batches: tuple[float, ...]  # seconds that each start waited for its first batch
    seconds: float  # from the kill to the end
    deviations: tuple[str, ...]

    def __str__(self) -> str:
        codes, batches = (", ".join(map(str, each)) for each in (self.codes, self.first_batches))
        return (
            f"{self.victim:10} at step {self.step:3}  exits {codes:8} repeated {self.repeated:3} steps, first batches "
            f"after {batches} s, done {self.seconds:5.1f} s later: {'; '.join(self.deviations) or 'identical'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6, help="Default: 6.")
    parser.add_argument("--seed", type=int, default=0, help="Default: 0.")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the nodes as well
    rng = random.Random(args.seed)
    planned: list[str] = []
    while len(planned) < args.kills:
        planned += rng.sample(_VICTIMS, len(_VICTIMS))
    started, kills = time.monotonic(), []
    with Trainings.started() as trainings:
        for number, victim in enumerate(planned[: args.kills], 1):
            kills.append(trainings.kill(victim, rng.randint(2, _STEPS - 8), rng))
            print(f"{number:3} {kills[-1]}", flush=True)
    print_row(kills, time.monotonic() - started)
    sys.exit(any(kill.deviations for kill in kills))


def print_row(kills: Sequence[Kill], seconds: float) -> None:
    same = Counter(kill.victim for kill in kills if not kill.deviations)
    every = Counter(kill.victim for kill in kills)
    cells = ", ".join(f"{victim} {same[victim]} of {every[victim]}" for victim in every)
    alone = sum(kill.codes == (0,) for kill in kills)
    print(
        f"\n| training: {len(kills)} kills; samples, losses and weights identical to an undisturbed run | {cells} "
        f"({alone} went on by themselves); {seconds / 60:.0f} min |"
    )


@dataclass
class Trainings:
    """A cluster, a dataset, and the history of an undisturbed run."""

    folder: Path
    cluster: Cluster
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @classmethod
    @contextmanager
    def started(cls) -> Iterator["Trainings"]:
        folder = Path(tempfile.mkdtemp(prefix="hdm-"))  # short, because paths of sockets have at most 107 bytes
        try:
            with Cluster.started(folder) as cluster:
                trainings = cls(folder, cluster)
                try:
                    trainings._make_dataset()
                    running = trainings._start("undisturbed")
                    assert running.wait() == 0, running.output
                    print(f"undisturbed: first batch after {', '.join(_START.findall(running.output))} s", flush=True)
                    yield trainings
                finally:
                    for process in trainings.processes:
                        process.kill()
                        process.wait()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def kill(self, victim: str, step: int, rng: random.Random) -> Kill:
        """Trains, kills a process of this kind when this step is logged, and runs the command until it ends with 0."""
        run = self.folder / "killed"
        shutil.rmtree(run, ignore_errors=True)
        running = self._start("killed")
        wait_for(lambda: running.has_ended or max(logged(run), default=0) >= step)
        assert not running.has_ended, running.output
        reached = max(logged(run))
        with suppress(psutil.NoSuchProcess):
            self._process(victim, running, rng).kill()
        killed = time.monotonic()
        if victim == "raylet":
            self.cluster.restart_second()
        codes, output = [running.wait()], running.output
        while codes[-1] and len(codes) < _RUNS:
            running = self._start("killed")
            codes.append(running.wait())
            output += running.output
        deviations = [line for line in output.splitlines() if "Traceback" in line][:1]
        if codes[-1] == 0:
            deviations += History.of(run).deviations(History.of(self.folder / "undisturbed"))
        else:
            deviations.append(f"not done after {_RUNS} runs: {running.output.splitlines()[-1]}")
        taken = sum(json.loads(line)["rank"] == 0 for line in (run / "audit").read_text().splitlines())
        batches = tuple(map(float, _START.findall(output)))
        seconds = time.monotonic() - killed
        return Kill(victim, reached, tuple(codes), taken - _STEPS, batches, seconds, tuple(deviations))

    def _process(self, victim: str, running: Running, rng: random.Random) -> psutil.Process:
        if victim == "driver":
            return psutil.Process(running.process.pid)
        if victim == "raylet":
            return self.cluster.nodes[1].raylet
        found: list[psutil.Process] = []
        wait_for(lambda: found.extend(p for p, title in self.cluster.workers() if _TITLES[victim] in title) or found)
        return rng.choice(found)

    def _start(self, name: str) -> Running:
        """The training in this run folder, from its newest checkpoint."""
        run = self.folder / name
        command = [
            "trainer/run.py", "--stage", "demo", "--dataset", self.folder / "dataset", "--run", run, "--workers",
            _WORKERS, "--steps", _STEPS, "--audit", run / "audit", "--prompts", self.folder / "prompts",
            *(part for setting in _SETTINGS for part in ("--set", setting)),
        ]  # fmt: skip
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=ROOT, env=self.cluster.environment(), stdout=output,
                stderr=output,
            )  # fmt: skip
        self.processes.append(process)
        return Running(process, log)

    def _make_dataset(self) -> None:
        raw, dataset = self.folder / "raw", self.folder / "dataset"
        (self.folder / "prompts").write_text("red star\nblue fish\n")
        for job in (
            ("pipeline/sample_data.py", "--images", 150, "--out", raw),
            ("pipeline/ingest.py", "--raw", raw, "--dataset", dataset),
            ("pipeline/caption.py", "--dataset", dataset),
            ("pipeline/curate.py", "--stage", "demo", "--dataset", dataset),
        ):
            command = [sys.executable, *map(str, job)]
            subprocess.run(command, cwd=ROOT, env=self.cluster.environment(), check=True, capture_output=True)


if __name__ == "__main__":
    main()
