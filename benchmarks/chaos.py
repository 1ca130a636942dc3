"""A soak: a small run is hurt at random for half an hour, and must end as one that nobody hurt.

    python benchmarks/chaos.py --minutes 30 --seed 1 --json chaos.json
    python benchmarks/chaos.py --processes 2,1,3

It trains under ./run_train.sh, on two processes of the CPU or on the GPUs that are there, to the last step; then anew,
until the time is over. Meanwhile ranks, loaders, torchrun and the launcher are killed, stopped and signalled, the power
is cut, the disk is full for a moment and the newest checkpoint is damaged; a command that has ended is given again, as
its user would. Some gradients are no numbers, in the reference as well. Compared with the reference, bit for bit: the
metrics of each step, and the tensors, counters and data cursors of the last checkpoint. No start may go back further
than to the newest intact checkpoint. With several numbers of processes each start of the command draws one; sums then
have other roundings, so that numbers must agree within --tolerance, and the order of the data exactly.

Linux. Prints a table last; exit code 1 if anything was lost or differs.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.chaos_compare import differences
from benchmarks.chaos_faults import Fault, check_code, faults_for
from benchmarks.chaos_job import Failure, Job, Moments, Progress, steps_of_checkpoints
from swamla_titan.checkpoint.manifest import damage_of
from tests.train.runs import checkpoint

CONFIG = """
[job]
deterministic = true
[model]
flavor = "debug"
num_layers = 3
dim = 64
num_heads = 2
swa_window = 16
dropout = {dropout}
[data]
source = "builtin"
tokenizer = "byte"
streams = 6
shuffle_documents = 8
num_workers = 1
[training]
seq_len = 64
local_batch_size = 1
global_batch_size = 5
steps = {steps}
compute_dtype = "float32"
fp32_precision = "ieee"
[optimizer]
lr = 1e-3
[lr_schedule]
warmup_steps = 10
[compile]
enabled = false
[checkpoint]
interval = 3
keep_latest = 3
[validation]
interval = 20
fraction = 0.1
max_tokens = 1024
[metrics]
log_interval = 1
tensorboard = false
[fault_tolerance]
step_timeout = 20.0
first_step_timeout = 200.0
"""
ALSO = 0.2  # share of faults that strike while the job still recovers from the one before
RECOVERY = 400.0  # seconds after which a job that has not trained a step is given up


@dataclass
class Effect:
    """How a job came through one kind of fault, each time."""

    seconds: list[float] = field(default_factory=list)  # until the next step was trained
    repeated: list[int] = field(default_factory=list)  # steps


Table = dict[str, Effect]


class Soak:
    """One run to its last step, and what is done to it meanwhile."""

    def __init__(self, job: Job, processes: list[int], draw: random.Random, table: Table) -> None:
        self.job, self.processes, self.draw, self.table = job, processes, draw, table
        self.moments = Moments(draw)
        self.damaged: set[int] = set()  # steps whose checkpoints were spoilt; what is not saved again stays so
        self._queue: list[Fault] = []

    def run(self, is_over: Callable[[], bool]) -> None:
        """Train to the end, with faults until `is_over()`. Raises Failure where the job does what it must not."""
        self._start()
        while self.job.code() is None:
            if is_over():
                self.job.end(600)
                break
            fault = self._next_fault()
            if getattr(self.moments, self.draw.choice(fault.moments))(self.job):
                self._strike(fault)
        if self.job.code() != 0:
            raise Failure(f"ended with {self.job.code()} where nothing was done to it; {self.job.described()}")

    def _start(self) -> None:
        self.job.processes = self.draw.choice(self.processes)
        print(f"{time.strftime('%H:%M:%S')} started on {self.job.processes}", flush=True)
        self.job.start()

    def _next_fault(self) -> Fault:
        """All of them, in random order, before one comes again."""
        while not self._queue or (self._queue[-1].shared and self.job.processes == 1):
            self._queue = faults_for(max(self.processes))
            self.draw.shuffle(self._queue)
            if self.job.processes == 1:
                self._queue.sort(key=lambda fault: not fault.shared)
        return self._queue.pop()

    def _strike(self, fault: Fault) -> None:
        folder = self.job.folder
        before, saved = Progress.of(folder), max(self._saved(), default=0)
        print(f"{time.strftime('%H:%M:%S')} step {before.step}: {fault.name}", flush=True)
        began = time.monotonic()
        fault.inject(self.job, self.draw)
        if fault.damages and self.job.code() is not None:
            whole = whole_checkpoints(folder)
            self.damaged |= set(steps_of_checkpoints(folder)) - whole
            saved = max(whole, default=0)
        faults = [fault]
        if fault.deadly and not fault.damages and self.draw.random() < ALSO and self.job.code() is None:
            faults += self._strike_again()
        self._recover(faults, before, saved, began)

    def _saved(self) -> set[int]:
        """The steps of the checkpoints without those that this soak has spoilt, unless they were saved again."""
        steps = set(steps_of_checkpoints(self.job.folder))
        spoilt = steps & self.damaged
        return steps - (spoilt - whole_checkpoints(self.job.folder)) if spoilt else steps

    def _strike_again(self) -> list[Fault]:
        """A rank is killed while it starts."""
        (again,) = [each for each in faults_for(1) if each.name == "kill -9 of a rank"]
        if not self.moments.starting(self.job):
            return []
        print("         and, while it starts, kill -9 of a rank", flush=True)
        again.inject(self.job, self.draw)
        return [again]

    def _recover(self, faults: list[Fault], before: Progress, saved: int, began: float) -> None:
        """Wait for the first step of a new start, or for the end of the run; the command is given again if it ends."""
        end = began + RECOVERY
        started: Progress | None = None  # as a new start found things
        while True:
            code, now = self.job.code(), Progress.of(self.job.folder)
            if code == 0:
                return
            if code is not None:
                if all(code not in fault.codes for fault in faults):
                    check_code(code, faults[0])
                self.job.wait_until_gone()
                self._start()
            if now.starts > before.starts and (started is None or started.starts < now.starts):
                if now.resumed < saved:
                    raise Failure(f"went on from step {now.resumed}, and {saved} was saved; {self.job.described()}")
                started = now
            if started and now.lines > started.lines:
                break
            if not faults[0].deadly and now.lines >= before.lines + 20:
                started = before  # it came through without a new start
                break
            if time.monotonic() > end:
                raise Failure(f"no step in {RECOVERY:.0f} s after {faults[0].name}; {self.job.described()}")
            time.sleep(0.02)
        effect = self.table[" + ".join(fault.name for fault in faults)]
        effect.seconds.append(time.monotonic() - began)
        effect.repeated.append(max(0, started.step - started.resumed) if started is not before else 0)


def whole_checkpoints(folder: Path) -> set[int]:
    """The steps of the checkpoints without damage."""
    return {step for step in steps_of_checkpoints(folder) if not damage_of(checkpoint(folder, step))}


def count_gpus() -> int:
    """GPUs of this machine; 0 without a driver."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def faults_of(table: Table) -> int:
    """How many faults the job has recovered from."""
    return sum(len(effect.seconds) for effect in table.values())


def print_table(table: Table) -> None:
    width = max(map(len, table), default=10)
    print(f"| {'fault':<{width}} | times | median s | max s | steps repeated, median | max |")
    print(f"|{'-' * (width + 2)}|------:|---------:|------:|-----------------------:|----:|")
    for name, effect in sorted(table.items()):
        seconds, steps = effect.seconds, effect.repeated
        print(
            f"| {name:<{width}} | {len(seconds):5} | {statistics.median(seconds):8.1f} | {max(seconds):5.1f} | "
            f"{statistics.median(steps):22.0f} | {max(steps):3} |"
        )


def soak(arguments: argparse.Namespace, folder: Path) -> tuple[Table, list[str], int]:
    """Runs hurt until the time is over; returns the table, what was wrong, and the number of runs."""
    draw = random.Random(arguments.seed)
    gpus = count_gpus()
    processes = arguments.processes or [gpus or 2]
    steps = arguments.steps
    config = folder / "chaos.toml"
    config.write_text(CONFIG.format(steps=steps, dropout=0.1 if len(processes) == 1 else 0.0))
    spoiled = ",".join(map(str, sorted(draw.sample(range(2, steps), 3))))
    environment = {
        "CHAOS_NAN_STEPS": spoiled,
        "PYTHONPATH": f"{Path(__file__).resolve().parent / 'chaos_site'}",
        "NGPU": str(processes[0] if gpus else 0),
    }
    tolerance = arguments.tolerance if len(processes) > 1 else 0.0
    table: Table = defaultdict(Effect)
    end, runs = time.monotonic() + 60 * arguments.minutes, 0

    def is_over() -> bool:
        return time.monotonic() > end and faults_of(table) >= arguments.faults

    with tempfile.TemporaryDirectory() as temporary:
        print(f"reference: {steps} steps on {processes[0]} processes, no numbers in steps {spoiled}", flush=True)
        reference = folder / "reference"
        with Job(config, reference, Path(temporary), processes[0], **environment) as job:
            job.start()
            if job.end(1200) != 0:
                return table, [f"the reference failed; {job.described()}"], runs
        while not is_over():
            runs += 1
            run = folder / f"run-{runs}"
            print(f"run {runs}", flush=True)
            with Job(config, run, Path(temporary), processes[0], **environment) as job:
                hurt = Soak(job, processes, draw, table)
                try:
                    hurt.run(is_over)
                except Failure as failure:
                    return table, [f"run {runs}: {failure}"], runs
            if found := differences(run, reference, steps, tolerance, hurt.damaged):
                return table, [f"run {runs}: {each}" for each in found], runs
    return table, [], runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="the last run may take longer")
    parser.add_argument("--faults", type=int, default=0, help="at least so many, however long a slow machine takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150, help="of a run")
    parser.add_argument(
        "--processes",
        type=lambda text: [int(number) for number in text.split(",")],
        help="ranks, as in 2; or several numbers, as in 2,1,3: each start draws one (default: the GPUs, or 2)",
    )
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative, with several numbers of processes")
    parser.add_argument("--folder", type=Path, help="keep the dump folders here; must be new")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if not Path("/proc/self/environ").exists():
        parser.error("it finds processes in /proc, which this system does not have")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=arguments.folder is None)
        table, wrong, runs = soak(arguments, folder.resolve())
    print_table(table)
    print(f"{runs} runs of {arguments.steps} steps, {faults_of(table)} faults, seed {arguments.seed}")
    print("\n".join(wrong) or "nothing was lost, and nothing differs")
    if arguments.json:
        figures = {name: vars(effect) for name, effect in table.items()}
        arguments.json.write_text(json.dumps({"runs": runs, "faults": figures, "wrong": wrong}, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
