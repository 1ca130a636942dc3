"""What tests take from the machine that they run on: nothing of its user's settings."""

import os
import signal
import sys
import time

# Other launchers, schedulers, terminals and this program's own: each would change what a test sees. Where torch, the
# compilers and GPUs are is the machine's to say, and stays.
_PREFIXES = ("SLURM_", "PET_", "TORCHELASTIC_", "RDZV_", "OMPI_", "PMI_", "WANDB_", "SWAMLA_TITAN_", "PYTEST_ADDOPTS")
_NAMES = (
    *("NGPU", "NPROC", "NNODES", "MAX_RESTARTS", "LOG_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "COLUMNS", "LINES"),
    *("PYTHONIOENCODING", "PYTHONUTF8", "PYTHONWARNINGS", "PYTHONDEVMODE", "PYTHONSAFEPATH", "PYTHONOPTIMIZE"),
    "PYTHONDONTWRITEBYTECODE",
    *("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "PY_COLORS", "TQDM_DISABLE", "LANGUAGE"),
    *("TORCH_LOGS", "TORCH_DISTRIBUTED_DEBUG", "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"),
    *("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"),
)


def pin() -> None:
    """Take the user's settings out of this process, and so of those that tests start."""
    for name in list(os.environ):
        if name in _NAMES or name.startswith(_PREFIXES) or name.startswith("LC_"):
            del os.environ[name]
    os.environ |= {"LANG": "C.UTF-8", "TZ": "UTC"}
    time.tzset()
    sys.dont_write_bytecode = False  # else each process that a test starts compiles the program anew
    os.umask(0o022)
    # A shell without job control starts what is in the background deaf to Ctrl-C, and children would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Models this small are fastest on one thread, and threads that wait for a busy core make them ten times slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
