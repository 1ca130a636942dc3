"""run_train.sh and the scripts that find a Python, with stubs in place of Python: nothing is trained or installed."""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.waiting import HANG

ROOT = Path(__file__).resolve().parents[2]

# Calls itself fit if asked (unless STUB_UNFIT is set), else writes down how it was called.
STUB = """#!/bin/sh
case "$1 $2" in
*/check_environment.py*) [ -z "$STUB_UNFIT" ] && echo "stub $0" || { echo "torch is not installed"; exit 1; } ;;
*swamla_titan.launch.preflight)
  echo "$@" >"$RECORD.preflight"
  exit "${STUB_PREFLIGHT:-0}"
  ;;
*)
  {
    printf '%s\\n' "$@"
    echo "cuda=${CUDA_VISIBLE_DEVICES-unset}"
    echo "threads=${OMP_NUM_THREADS-unset}"
    echo "unshared=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE-unset}"
    echo "pythonpath=$PYTHONPATH"
    echo "cwd=$PWD"
  } >"$RECORD"
  exit "${STUB_EXIT:-0}"
  ;;
esac
"""


TOOLS = ("bash", "sh", "cat", "dirname", "env", "getconf", "grep", "mkdir", "mktemp", "rm", "sed", "touch", "tr")


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


ODD_NUMBERS = (
    "18446744073709551617",
    "1_000",
    "0x10",
    "010",
    "+2",
    "1e3",
    " 2",
    "2 ",
    "2.0",
    "1025",
    "\u0662",
    "\u00b2",
    "a[0]",
)
ODD_IDS = ("a/b", "../../x", "a b", "a\nb", "a\tb", "\x1b[2J", " ", "x" * 101, "\u00e9", "$(id)", "a\\b")


class Repository:
    """A copy of the launcher's files and a caller's folder elsewhere; only this folder's `bin` has a Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "repository"
        self.caller = folder / "caller"
        self.record = folder / "record"
        self.bin = folder / "bin"
        self.caller.mkdir(parents=True)
        (self.root / "train_configs").mkdir(parents=True)
        (self.root / "train_configs/debug.toml").touch()
        for name in ("run_train.sh", "run_tests.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        shutil.copytree(ROOT / "scripts", self.root / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        self.stub = write_script(folder / "stub", STUB)
        for command in TOOLS:
            path = shutil.which(command)
            assert path
            self.bin.mkdir(exist_ok=True)
            (self.bin / command).symlink_to(path)

    def run(self, script: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        environment = {"PATH": str(self.bin), "HOME": os.environ["HOME"], "RECORD": str(self.record)}
        command = [str(self.root / script), *arguments]
        return subprocess.run(
            command, cwd=self.caller, env=environment | variables, capture_output=True, text=True, timeout=HANG
        )

    def train(self, *arguments: str, **variables: str) -> list[str]:
        """What the stub wrote down, after a run that must succeed."""
        ran = self.run("run_train.sh", *arguments, PYTHON=str(self.stub), **variables)
        assert ran.returncode == 0, ran.stderr
        return self.record.read_text().splitlines()

    def set_gpus(self, count: int) -> None:
        lines = "\n".join(f"echo 'GPU {index}: a GPU'" for index in range(count))
        write_script(self.bin / "nvidia-smi", f"#!/bin/sh\n{lines}\n")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


@pytest.mark.parametrize("overrides", [(), ("--training.steps", "3", "--job.dump_folder=a b")])
def test_default_config_and_overrides_pass_unchanged(repository: Repository, overrides: tuple[str, ...]) -> None:
    recorded = repository.train(*overrides)
    config = f"{repository.root}/train_configs/debug.toml"
    assert recorded[: 4 + len(overrides)] == ["-m", "swamla_titan", "train", config, *overrides]
    assert f"pythonpath={repository.root}" in recorded
    assert f"cwd={repository.caller}" in recorded


def test_config_of_the_callers_folder_comes_before_the_repositorys(repository: Repository) -> None:
    (repository.root / "mine.toml").touch()
    assert repository.train("mine.toml")[3] == f"{repository.root}/mine.toml"
    (repository.caller / "mine.toml").touch()
    assert repository.train("mine.toml", "--a.b", "1")[3:6] == ["mine.toml", "--a.b", "1"]
    absolute = str(repository.caller / "mine.toml")
    assert repository.train(absolute)[3] == absolute


def test_a_temporary_folder_of_no_use_gives_way(repository: Repository, tmp_path: Path) -> None:
    """Schedulers leave behind that of another job."""
    (tmp_path / "file").touch()
    for bad in (tmp_path / "gone", tmp_path / "file", Path("/proc")):
        ran = repository.run("run_train.sh", PYTHON=str(repository.stub), TMPDIR=str(bad))
        assert ran.returncode == 0
        assert f"run_train.sh: no file can be written in TMPDIR={bad}: /tmp is used\n" in ran.stderr
    good = repository.run("run_train.sh", PYTHON=str(repository.stub), TMPDIR=str(tmp_path))
    assert (good.returncode, "TMPDIR" in good.stderr) == (0, False)


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>&1", "2> >(exit)"])
@pytest.mark.parametrize("arguments, code", [("", 0), ("no-such-file", 2)])
def test_streams_that_are_gone_change_no_exit_code(
    repository: Repository, streams: str, arguments: str, code: int
) -> None:
    call = f"#!/bin/bash\n{repository.root}/run_train.sh {arguments} {streams}"
    write_script(repository.root / "call", call)
    assert repository.run("call", PYTHON=str(repository.stub)).returncode == code


def test_pythonpath_is_kept(repository: Repository) -> None:
    assert f"pythonpath={repository.root}:/elsewhere" in repository.train(PYTHONPATH="/elsewhere")


@pytest.mark.parametrize(
    "variables, gpus",
    [({"NGPU": "1"}, 1), ({"NGPU": "8", "NNODES": "4"}, 32), ({"NGPU": "8", "NNODES": "2:4"}, 32), ({"NPROC": "3"}, 3)],
)
def test_a_dry_run_is_one_process_that_is_told_of_how_many(
    repository: Repository, variables: dict[str, str], gpus: int
) -> None:
    recorded = repository.train("--job.seed", "5", "--dry-run", **variables)
    config = f"{repository.root}/train_configs/debug.toml"
    expected = ["train", "--gpus", str(gpus), config, "--job.seed", "5", "--dry-run"]
    assert recorded[: 2 + len(expected)] == ["-m", "swamla_titan", *expected]
    assert f"pythonpath={repository.root}" in recorded
    assert not Path(f"{repository.record}.preflight").exists()


@pytest.mark.parametrize("code", [1, 2, 75])
def test_exit_code_of_a_process_alone_arrives(repository: Repository, code: int) -> None:
    ran = repository.run("run_train.sh", PYTHON=str(repository.stub), STUB_EXIT=str(code))
    assert ran.returncode == code


@pytest.mark.parametrize("ngpu", ["0", "none"])
def test_ngpu_zero_hides_the_gpus(repository: Repository, ngpu: str) -> None:
    assert "cuda=" in repository.train(NGPU=ngpu, CUDA_VISIBLE_DEVICES="0,1")


@pytest.mark.parametrize("variables", [{"NGPU": "1"}, {"NNODES": "1"}, {"NNODES": "1:1"}, {"NGPU": ""}])
def test_one_process_leaves_the_gpus_alone(repository: Repository, variables: dict[str, str]) -> None:
    assert "cuda=unset" in repository.train(**variables)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"NGPU": "-1"}, "NGPU=-1: expected"),
        ({"NGPU": "two"}, "NGPU=two: expected"),
        ({"NGPU": "01"}, "NGPU=01: expected"),
        ({"NPROC": "0"}, "NPROC=0: expected"),
        ({"NPROC": "3", "NGPU": "2"}, "NPROC=3 is for the CPU, and 2 GPUs take a process each: set NGPU=0"),
        ({"NNODES": "4:"}, "NNODES=4:: expected"),
        ({"NNODES": "0"}, "NNODES=0: expected"),
        ({"NNODES": "4:1"}, "NNODES=4:1: the smaller number stands first, NNODES=1:4"),
        ({"NNODES": "2"}, "NNODES=2 needs RDZV_ENDPOINT=HOST:PORT"),
        ({"NNODES": "1:4"}, "NNODES=1:4 needs RDZV_ENDPOINT=HOST:PORT"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "node0"}, "RDZV_ENDPOINT=node0: expected HOST:PORT"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "node0:0"}, "RDZV_ENDPOINT=node0:0: expected HOST:PORT"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "node0:65536"}, "ports 1 to 65535"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "node0:029400"}, "ports 1 to 65535"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "fe80::1:29400"}, "an IPv6 address as [ADDRESS]:PORT"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "no de:29400"}, "expected HOST:PORT"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "node0/x:29400"}, "expected HOST:PORT"),
        ({"NNODES": "1:18446744073709551617"}, "NNODES=1:18446744073709551617: expected a number of machines, 1 to"),
        ({"NNODES": "1:2:3"}, "NNODES=1:2:3: expected"),
        ({"NGPU": "18446744073709551617"}, "NGPU=18446744073709551617: expected"),
        ({"MAX_RESTARTS": "9" * 300}, "MAX_RESTARTS=" + "9" * 80 + "...: expected a number"),
        ({"LOG_RANK": "18446744073709551616"}, "the processes of this machine are 0 to 0"),
        ({"LOG_RANK": "0,*"}, "LOG_RANK=0,*: expected numbers of processes"),
        ({"LOG_RANK": ","}, "LOG_RANK=,: expected numbers of processes"),
        ({"LOG_RANK": "00"}, "LOG_RANK=00: the processes of this machine are"),
        *(({"NPROC": text}, f"NPROC={text}: expected a number of processes, 1 to 1024") for text in ODD_NUMBERS),
        ({"NPROC": "2\n3"}, "NPROC=$'2\\n3'...: expected a number"),
        *(({"RDZV_ID": text}, "expected at most 100 letters, digits") for text in ODD_IDS),
        ({"MAX_RESTARTS": "many"}, "MAX_RESTARTS=many: expected a number"),
        ({"LOG_RANK": "all"}, "LOG_RANK=all: expected numbers of processes"),
        ({"LOG_RANK": "0,2", "NPROC": "2"}, "LOG_RANK=0,2: the processes of this machine are 0 to 1"),
    ],
)
def test_refusals(repository: Repository, variables: dict[str, str], message: str) -> None:
    ran = repository.run("run_train.sh", PYTHON=str(repository.stub), **variables)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert not repository.record.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("debug 8 2048", "8 2048: settings have names, write --training.local_batch_size 8 --training.seq_len 2048 ("),
        ("debug 8", "8: settings have names, write --training.local_batch_size 8 ("),
        ("8 2048", "write --training.local_batch_size 8 --training.seq_len 2048 ("),
        ("debug 8 2048 100", "--training.seq_len 2048 --training.steps 100 ("),
        ("debug --optimizer.lr 1e-3 8 2048", "write --training.local_batch_size 8 --training.seq_len 2048 ("),
        ("debug --optimizer.lr=1e-3 --dry-run 8", "8: settings have names, write --training.local_batch_size 8 ("),
        ("debug training.steps=3", "training.steps=3: two dashes are missing, write --training.steps=3"),
        ("debug other.toml", "other.toml: one configuration is taken, and after it settings as --section.key value"),
        ("debug --training.steps 3 4 five", "five: one configuration is taken"),
        ("''  --dry-run", "an empty argument: one configuration is taken"),
        ("debug ''", "an empty argument: one configuration is taken"),
        ("debug '\n\x1b[2J'", r"$'\n\E[2J'...: one configuration is taken"),
    ],
)
def test_what_stands_without_a_name_is_answered_with_names(repository: Repository, arguments: str, message: str):
    for processes in ("1", "2"):
        ran = repository.run("run_train.sh", *shlex.split(arguments), PYTHON=str(repository.stub), NPROC=processes)
        assert ran.returncode == 2
        assert message in ran.stderr
        assert len(ran.stderr.splitlines()) == 1
        assert not repository.record.exists()


def test_values_of_settings_are_no_arguments_of_their_own(repository: Repository) -> None:
    given = (
        "debug",
        "--training.steps",
        "3",
        "--parallel.dp_shard",
        "-1",
        "--data.name=8",
        "--job.dump_folder",
        "a.b=c",
    )
    assert repository.train(*given)[4:11] == list(given[1:])


GPUS, CPU = {"NGPU": "2"}, {"NGPU": "", "CUDA_VISIBLE_DEVICES": ""}
MEETING = {"RDZV_ENDPOINT": "node0:29400"}


@pytest.mark.parametrize(
    "variables, arguments, said",
    [
        (CPU, "", "no GPU: training on the CPU, 1 process"),
        (CPU | {"NPROC": "3"}, "", "no GPU: FSDP training on the CPU, 3 processes"),
        ({"NGPU": "0"}, "", "NGPU=0: training on the CPU, 1 process"),
        ({"NGPU": "1"}, "", "1 GPU: training on 1 process"),
        (GPUS, "", "2 GPUs: FSDP training on 2 processes"),
        (GPUS, "--parallel.data_parallel ddp", "2 GPUs: DDP training on 2 processes"),
        (GPUS, "--parallel.data_parallel=hsdp", "2 GPUs: HSDP training on 2 processes"),
        (GPUS, "--parallel.tensor 2", "2 GPUs: training on 2 processes"),
        (
            GPUS | MEETING | {"NNODES": "4"},
            "",
            "2 GPUs on each of 4 machines: FSDP training on 8 processes, rendezvous endpoint ",
        ),
        (
            GPUS | MEETING | {"NNODES": "1:4"},
            "",
            "2 GPUs, 1 to 4 machines: FSDP training on 2 to 8 processes, rendezvous endpoint ",
        ),
    ],
)
def test_what_was_found_is_said_before_python_is_started(
    repository: Repository, variables: dict[str, str], arguments: str, said: str
) -> None:
    ran = repository.run("run_train.sh", "debug", *arguments.split(), PYTHON=str(repository.stub), **variables)
    assert ran.returncode == 0
    assert ran.stderr.startswith(f"run_train.sh: {said}")
    assert ran.stderr.splitlines()[1].startswith("using stub")


@pytest.mark.parametrize(
    "text, way",
    [
        ("", "FSDP "),
        ('[parallel]\ndata_parallel = "ddp"   # a copy each\n', "DDP "),
        ('[parallel]\n  data_parallel="hsdp"\n', "HSDP "),
        ('parallel.data_parallel = "ddp"\n', "DDP "),
        ("[parallel]\ntensor = 8\n", ""),
        ("[parallel]\ntensor = 1\n", "FSDP "),
        ("[parallel]\npipeline = 12\n", ""),
        ('# data_parallel = "ddp"\n', "FSDP "),
    ],
)
def test_how_weights_are_shared_is_read_from_the_file(repository: Repository, text: str, way: str) -> None:
    (repository.caller / "mine.toml").write_text(text)
    ran = repository.run("run_train.sh", "mine.toml", PYTHON=str(repository.stub), NGPU="2")
    assert ran.stderr.startswith(f"run_train.sh: 2 GPUs: {way}training on 2 processes\n")


UUIDS = ("GPU-11111111-aaaa", "GPU-11112222-bbbb", "GPU-33333333-cccc", "GPU-44444444-dddd")


@pytest.mark.parametrize(
    "visible, count",
    [
        ("-1", 0),
        ("", 0),
        (" ", 0),
        ("none", 0),
        ("NoDevFiles", 0),
        ("-1,0", 0),
        ("0,-1,1", 1),
        ("0,1", 2),
        (" 0 , 1 ", 2),
        ("0,,1", 1),
        ("0,1,", 2),
        ("0,0", 0),
        ("0,1,00", 0),
        ("0,7,1", 1),
        ("4", 0),
        ("0,18446744073709551616", 1),
        ("3,2,1,0", 4),
        ("1x,2y", 2),
        ("0,GPU-33333333-cccc", 1),
        ("GPU-33333333-cccc", 1),
        ("GPU-3,GPU-4", 2),
        ("GPU-3,0", 1),
        ("GPU-1111", 0),
        ("GPU-99999999", 0),
        ("GPU-3,GPU-3", 0),
        ("MIG-1234,MIG-5678", 1),
        ("\u0661", 0),
    ],
)
def test_gpus_are_counted_as_cuda_counts_them(repository: Repository, visible: str, count: int) -> None:
    lines = "\n".join(f"echo 'GPU {index}: NVIDIA H200 (UUID: {uuid})'" for index, uuid in enumerate(UUIDS))
    write_script(repository.bin / "nvidia-smi", f"#!/bin/sh\n{lines}\n")
    recorded = repository.train(CUDA_VISIBLE_DEVICES=visible)
    assert f"cuda={visible}" in recorded
    if count > 1:
        assert f"--nproc-per-node={count}" in recorded
    else:
        assert recorded[1] == "swamla_titan"
        ran = repository.run("run_train.sh", PYTHON=str(repository.stub), CUDA_VISIBLE_DEVICES=visible, NPROC="2")
        assert (ran.returncode, "1 GPUs take a process each" in ran.stderr) == ((2, True) if count else (0, False))


def test_without_nvidia_smi_the_entries_are_taken_at_their_word(repository: Repository) -> None:
    assert "--nproc-per-node=2" in repository.train(CUDA_VISIBLE_DEVICES="5,7")
    assert "--nproc-per-node=2" in repository.train(CUDA_VISIBLE_DEVICES="GPU-1,GPU-2")
    assert repository.train(CUDA_VISIBLE_DEVICES="-1")[1] == "swamla_titan"


def test_what_other_launchers_left_is_left_out_and_named(repository: Repository) -> None:
    write_script(repository.stub, STUB.replace('echo "cwd=$PWD"', 'echo "cwd=$PWD"; env'))
    left = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "node7", "TORCHELASTIC_RUN_ID": "x\ny", "LOCAL_RANK": ""}
    ran = repository.run("run_train.sh", PYTHON=str(repository.stub), **left)
    assert ran.returncode == 0
    said = "left out, as other launchers and earlier runs leave them in the environment: RANK=0 WORLD_SIZE=2 "
    assert said + "MASTER_ADDR=node7 TORCHELASTIC_RUN_ID=$'x\\ny'...\n" in ran.stderr
    recorded = repository.record.read_text().splitlines()
    assert not [line for line in recorded if line.partition("=")[0] in left]
    ran = repository.run("run_train.sh", PYTHON=str(repository.stub), SLURM_PROCID="3", OMPI_COMM_WORLD_SIZE="4")
    assert "left out" not in ran.stderr


@pytest.mark.parametrize("through", ["absolute", "relative", "chain", "PATH", "folder"])
def test_through_a_symbolic_link_it_finds_its_repository(repository: Repository, tmp_path: Path, through: str) -> None:
    (repository.bin / "readlink").symlink_to(str(shutil.which("readlink")))
    script, elsewhere = repository.root / "run_train.sh", tmp_path / "else where\n"
    elsewhere.mkdir()
    link = elsewhere / "train"
    if through == "absolute":
        link.symlink_to(script)
    elif through == "folder":
        (elsewhere / "there").symlink_to(repository.root)
        link = elsewhere / "there/run_train.sh"
    else:
        (elsewhere / "first").symlink_to(os.path.relpath(script, elsewhere))
        link.symlink_to("first")
    command = "train" if through == "PATH" else str(link)
    path = f"{elsewhere}:{repository.bin}" if through == "PATH" else str(repository.bin)
    environment = {"PATH": path, "RECORD": str(repository.record), "PYTHON": str(repository.stub), "CDPATH": "/:/tmp"}
    ran = subprocess.run(
        ["bash", "-c", 'exec "$0" debug', command],
        cwd=repository.caller,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    config = Path(repository.record.read_text().split("\ntrain\n")[1].split("\ncuda=")[0])
    assert config.samefile(repository.root / "train_configs/debug.toml")


def test_blanks_and_line_breaks_in_paths_and_a_shell_set_to_other_things(
    repository: Repository, tmp_path: Path
) -> None:
    odd = tmp_path / "a b\nc 'd\n"
    shutil.copytree(repository.root, odd / "repository")
    (tmp_path / "env.sh").write_text("echo said by BASH_ENV\nset -f\n")
    repository.root, repository.caller = odd / "repository", odd
    (odd / "my config.toml").touch()
    more = {
        "BASH_ENV": str(tmp_path / "env.sh"),
        "SHELLOPTS": "noglob:noclobber:errexit",
        "BASHOPTS": "failglob:nullglob",
    }
    more |= {"CDPATH": "/", "PYTHONPATH": ":/elsewhere::", "NPROC": "2", "POSIXLY_CORRECT": "1"}
    environment = {
        "PATH": str(repository.bin),
        "RECORD": str(repository.record),
        "PYTHON": str(repository.stub),
    }  # no HOME
    ran = subprocess.run(
        [str(odd / "repository/run_train.sh"), "my config.toml", "--job.dump_folder", "x\ny"],
        cwd=odd,
        env=environment | more,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    recorded = repository.record.read_text()
    assert "\nswamla_titan\ntrain\nmy config.toml\n--job.dump_folder\nx\ny\n" in recorded
    assert f"\npythonpath={odd}/repository:/elsewhere\n" in recorded


def test_python_imports_nothing_from_the_current_folder(repository: Repository) -> None:
    write_script(repository.stub, STUB.replace('echo "cwd=$PWD"', 'echo "safe=$PYTHONSAFEPATH"'))
    assert {"safe=1", f"pythonpath={repository.root}"} <= set(repository.train())
    assert {"safe=1", f"pythonpath={repository.root}"} <= set(repository.train(NPROC="2"))
    # 3.10 does not know that variable.
    write_script(repository.stub, STUB.replace('echo "stub $0"', 'echo "Python 3.10.13 at $0"'))
    assert f"pythonpath={repository.root}:{repository.root}/swamla_titan/safe_path" in repository.train()


def test_a_folder_that_was_removed_is_refused(repository: Repository) -> None:
    command = f'rmdir "$PWD" && exec {repository.root}/run_train.sh'
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(repository.stub)}
    ran = subprocess.run(
        ["bash", "-c", command], cwd=repository.caller, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 2
    assert "run_train.sh: the current folder has been removed; go to one that is there\n" in ran.stderr


def test_a_folder_with_the_name_of_a_shipped_config_is_none(repository: Repository) -> None:
    (repository.caller / "debug").mkdir()
    assert repository.train("debug")[3] == f"{repository.root}/train_configs/debug.toml"


def test_the_name_of_a_shipped_config_will_do(repository: Repository) -> None:
    recorded = repository.train("debug", "--training.steps", "5")
    assert recorded[3:6] == [f"{repository.root}/train_configs/debug.toml", "--training.steps", "5"]


def test_missing_config_is_refused_before_the_environment_is_looked_for(repository: Repository) -> None:
    ran = repository.run("run_train.sh", "absent.toml")
    assert ran.returncode == 2
    assert "no file absent.toml in" in ran.stderr


def test_every_gpu_that_is_there_is_used(repository: Repository) -> None:
    repository.set_gpus(4)
    assert "--nproc-per-node=4" in repository.train()
    assert "--nproc-per-node=2" in repository.train(CUDA_VISIBLE_DEVICES="2,3")
    assert repository.train(CUDA_VISIBLE_DEVICES="3")[1] == "swamla_titan"
    assert repository.train(NGPU="1")[1] == "swamla_titan"


def test_several_gpus_of_one_machine_go_through_torchrun(repository: Repository) -> None:
    recorded = repository.train("debug", "--training.steps", "3", NGPU="4", LOG_RANK="1,3", MAX_RESTARTS="0")
    config = f"{repository.root}/train_configs/debug.toml"
    assert recorded[:3] == ["-m", "swamla_titan.launch.agent", "--log-dir"]
    flags = recorded[4 : recorded.index("-m", 1)]
    assert flags == [
        *("--signals-to-handle", "SIGQUIT"),
        *("--nnodes=1", "--nproc-per-node=4", "--max-restarts=0"),
        *("--local-ranks-filter=1,3", "--redirects=0:2,2:2"),
        *("--standalone", "--local-addr=127.0.0.1"),
    ]
    assert recorded[4 + len(flags) :][:7] == [
        "-m",
        "swamla_titan",
        "train",
        config,
        "--training.steps",
        "3",
        "cuda=unset",
    ]
    assert "unshared=1" in recorded
    asked = Path(f"{repository.record}.preflight").read_text()
    assert asked == f"-m swamla_titan.launch.preflight 4 4 {config} --training.steps 3\n"
    assert not Path(recorded[3]).parent.exists()  # the folder of the launch


def test_machines_meet_at_the_endpoint(repository: Repository) -> None:
    recorded = repository.train(NGPU="8", NNODES="2", RDZV_ENDPOINT="node0:29400", LOG_RANK="0,1,2,3,4,5,6,7")
    expected = ["--rdzv-backend=c10d", "--rdzv-endpoint=node0:29400", "--rdzv-id=swamla-titan", "unshared=1"]
    assert {"--nnodes=2", "--nproc-per-node=8", "--max-restarts=3", *expected} <= set(recorded)
    assert not any(line.startswith(("--standalone", "--local-addr", "--redirects")) for line in recorded)
    assert Path(f"{repository.record}.preflight").read_text().split()[2:4] == ["16", "8"]
    # An elastic run of one process a machine goes through torchrun even where it may start alone.
    recorded = repository.train(NGPU="0", NNODES="1:4", RDZV_ENDPOINT="[::1]:5", RDZV_ID="mine")
    expected = ["--nnodes=1:4", "--nproc-per-node=1", "--rdzv-endpoint=[::1]:5", "--rdzv-id=mine", "cuda="]
    assert set(expected) <= set(recorded)
    assert Path(f"{repository.record}.preflight").read_text().split()[2:4] == ["1,2,3,4", "0"]


def test_processes_on_the_cpu_share_its_cores(repository: Repository) -> None:
    write_script(repository.bin / "nproc", "#!/bin/sh\necho 12\n")
    recorded = repository.train(NGPU="0", NPROC="5")
    assert {"--nproc-per-node=5", "threads=2", "cuda="} <= set(recorded)
    assert "threads=1" in repository.train(NPROC="13")
    assert "threads=7" in repository.train(NPROC="5", OMP_NUM_THREADS="7")
    assert "threads=unset" in repository.train(NPROC="1")


def test_what_is_wrong_is_said_before_torchrun_starts(repository: Repository) -> None:
    ran = repository.run("run_train.sh", PYTHON=str(repository.stub), NPROC="2", STUB_PREFLIGHT="2")
    assert ran.returncode == 2
    assert Path(f"{repository.record}.preflight").exists()
    assert not repository.record.exists()


def test_help(repository: Repository) -> None:
    ran = repository.run("run_train.sh", "--help")
    assert ran.returncode == 0
    for word in ("usage:", "CONFIG", "NGPU", "NPROC", "NNODES", "RDZV_ENDPOINT", "RDZV_ID", "MAX_RESTARTS", "LOG_RANK"):
        assert word in ran.stdout


@pytest.mark.parametrize(
    "arguments, on_all_cores",
    [
        ((), True),
        (("-k", "a or b"), True),
        (("-m", "slow", "tests/train"), True),
        (("-n", "3"), False),
        (("-n0",), False),
        (("-p", "no:xdist"), False),
        (("--pdb",), False),
        (("tests/test_x.py::test_y",), False),
        (("-m", "gpu"), False),
        (("-m", "gpu and not slow"), False),
        (("-m", "slow and not gpu"), True),
    ],
)
def test_tests_run_in_the_repository_with_the_arguments_given(
    repository: Repository, arguments: tuple[str, ...], on_all_cores: bool
) -> None:
    ran = repository.run("run_tests.sh", *arguments, PYTHON=str(repository.stub))
    assert ran.returncode == 0
    recorded = repository.record.read_text().splitlines()
    cores = ("-n", "auto", "--maxprocesses", "16", "--dist", "worksteal") if on_all_cores else ()
    given = ["-m", "pytest", *cores, *arguments]
    assert recorded[: len(given)] == given
    assert f"cwd={repository.root}" in recorded


def test_order_in_which_a_python_is_looked_for(repository: Repository) -> None:
    active = write_script(repository.caller / "active/bin/python", STUB)
    own = write_script(repository.root / ".venv/bin/python", STUB)
    on_path = write_script(repository.bin / "python3", STUB)

    def found(**variables: str) -> str:
        ran = repository.run("scripts/environment.sh", **variables)
        assert ran.stderr == f"using stub {ran.stdout}"
        return ran.stdout.strip()

    environment = {"VIRTUAL_ENV": str(repository.caller / "active")}
    assert found(PYTHON=str(repository.stub), **environment) == str(repository.stub)
    assert found(**environment) == str(active)
    assert found() == str(own)
    (repository.root / ".venv/.incomplete").touch()  # an installation was cut off
    assert found() == str(on_path)


def test_python_that_cannot_be_used_is_an_error(repository: Repository) -> None:
    ran = repository.run("scripts/environment.sh", PYTHON=str(repository.stub), STUB_UNFIT="1")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "cannot be used: torch is not installed" in ran.stderr
    ran = repository.run("scripts/environment.sh", PYTHON="absent")
    assert (ran.returncode, ran.stderr) == (2, "error: PYTHON=absent: no such command\n")


def test_no_python_at_all_is_an_error(repository: Repository) -> None:
    ran = repository.run("scripts/environment.sh")
    assert ran.returncode == 1
    assert "no Python that pyproject.toml allows is on PATH" in ran.stderr


def test_python_without_venv_names_the_package_to_install(repository: Repository) -> None:
    # New enough, without what the project requires, and without venv.
    write_script(repository.bin / "python3.11", '#!/bin/sh\ncase "$2" in *version_info*) exit 0 ;; *) exit 1 ;; esac\n')
    ran = repository.run("scripts/environment.sh")
    assert ran.returncode == 1
    assert "apt-get install python3-venv" in ran.stderr
    assert not (repository.root / ".venv").exists()


def write_project(folder: Path, *dependencies: str, dev: str = "", python: str = ">=3.10") -> Path:
    path = folder / "pyproject.toml"
    path.write_text(
        f'[project]\nname = "x"\nrequires-python = "{python}"\ndependencies = {list(dependencies)}\n'
        f"[project.optional-dependencies]\ndev = {[dev] if dev else []}\n"
    )
    return path


def install_fake(folder: Path, name: str, version: str) -> None:
    information = folder / "site" / f"{name}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def check(folder: Path, pyproject: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "scripts/check_environment.py"), "--pyproject", str(pyproject), *arguments]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(folder / "site")}, capture_output=True, text=True
    )


@pytest.mark.parametrize("installed", ["2.11.0+cu130", "2.13.0+cpu", "2.13.5"])
def test_versions_in_range_fit(tmp_path: Path, installed: str) -> None:
    install_fake(tmp_path, "fake_torch", installed)
    ran = check(tmp_path, write_project(tmp_path, "fake-torch>=2.11,<2.14", "absent>=1; python_version < '3'"))
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.startswith("Python 3.")


@pytest.mark.parametrize("installed", ["2.10.0+cpu", "2.14.0"])
def test_versions_out_of_range_are_named(tmp_path: Path, installed: str) -> None:
    install_fake(tmp_path, "fake_torch", installed)
    ran = check(tmp_path, write_project(tmp_path, "absent>=1", "fake-torch>=2.11,<2.14"))
    assert ran.returncode == 1
    missing, wrong = ran.stdout.splitlines()
    assert missing == "absent>=1 is not installed"
    assert wrong.startswith("fake-torch")
    assert wrong.endswith(f"{installed} is installed")


def test_extras_count_only_if_named(tmp_path: Path) -> None:
    pyproject = write_project(tmp_path, dev="absent==0.17.*")
    assert check(tmp_path, pyproject).returncode == 0
    ran = check(tmp_path, pyproject, "--extras", "dev")
    assert (ran.returncode, ran.stdout) == (1, "absent==0.17.* is not installed\n")
    ran = check(tmp_path, pyproject, "--extras", "dev,other")
    assert (ran.returncode, ran.stdout) == (1, "pyproject.toml has no extra other; it has dev\n")


def test_python_out_of_range_is_named(tmp_path: Path) -> None:
    ran = check(tmp_path, write_project(tmp_path, python=">=4"))
    assert ran.returncode == 1
    assert ran.stdout.startswith("Python >=4 is needed, this is 3.")


@pytest.fixture
def installer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("install_requirements")


@pytest.mark.parametrize(
    "offered, chosen",
    [
        ("2.15.0, 2.14.0+cpu, 2.13.1, 2.13.0+cpu, 2.13.0, 2.12.0+cpu, 2.9.0", "2.13.0+cpu"),
        ("2.13.0+cu130, 2.13.0, 2.10.0+cpu", None),
    ],
)
def test_newest_cpu_build_in_range(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch, offered: str, chosen: "str | None"
) -> None:
    monkeypatch.setattr(installer, "pip", lambda *arguments: f"torch (2.15.0)\nAvailable versions: {offered}\n")
    torch = installer.packaging("requirements").Requirement("torch>=2.11,<2.14")
    assert installer.newest_cpu_build(torch, []) == chosen
