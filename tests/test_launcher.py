"""run_train.sh and the scripts that find a Python, with stubs in place of Python: nothing is trained or installed."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.waiting import HANG

ROOT = Path(__file__).resolve().parent.parent

# Calls itself fit if asked (unless STUB_UNFIT is set), else writes down how it was called.
STUB = """#!/bin/sh
case "$1 $2" in
*/check_environment.py*) [ -z "$STUB_UNFIT" ] && echo "stub $0" || { echo "torch is not installed"; exit 1; } ;;
*swamla_titan.tools.preflight)
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
    ],
)
def test_what_stands_without_a_name_is_answered_with_names(repository: Repository, arguments: str, message: str):
    for processes in ("1", "2"):
        ran = repository.run("run_train.sh", *arguments.split(), PYTHON=str(repository.stub), NPROC=processes)
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
            "2 GPUs on each of 4 machines: FSDP training on 8 processes, which meet at ",
        ),
        (
            GPUS | MEETING | {"NNODES": "1:4"},
            "",
            "2 GPUs, 1 to 4 machines: FSDP training on 2 to 8 processes, which meet ",
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
    assert recorded[:3] == ["-m", "swamla_titan.parallel.agent", "--log-dir"]
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
    assert asked == f"-m swamla_titan.tools.preflight 4 4 {config} --training.steps 3\n"
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


def test_tests_run_in_the_repository_with_the_arguments_given(repository: Repository) -> None:
    ran = repository.run("run_tests.sh", "-k", "a or b", PYTHON=str(repository.stub))
    assert ran.returncode == 0
    recorded = repository.record.read_text().splitlines()
    assert recorded[:4] == ["-m", "pytest", "-k", "a or b"]
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
