"""Records what short deterministic runs compute; two records show whether a change of the code has changed any of it.

    python scripts/record_runs.py --root OTHER_CHECKOUT --out before.json      # its ./run_train.sh, its package
    python scripts/record_runs.py --out after.json                             # of this repository
    python scripts/record_runs.py --compare before.json after.json [--summary]

--only takes patterns of case names ("fsdp-*"). --device cuda takes the cases for one GPU instead. --list names them.

A case is one run or several, each going on from the checkpoint of the one before. Recorded are the exit codes, every
number of metrics.jsonl that no clock or memory decides, the digest of each tensor of the newest checkpoint and what
train.json says beside them. The opening lines of the log are recorded too, and compared with --summary only, because
their wording may change.

Most runs on the CPU are forks of one process that has imported torch and the program, with the environment that
torchrun gives its workers: a rank then starts in a tenth of a second. `launched` cases, and all those of a GPU, go
through ./run_train.sh. A rank computes on one thread.
"""

import argparse
import fnmatch
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

LIMIT = 900.0  # seconds that one run may take
# Of metrics.jsonl: what depends on clock, speed or memory of the machine.
MEASURED = re.compile("^time$|tokens_per_second|tflops|mfu|_gib$|_seconds$")

COMMON = """
[job]
dump_folder = "{folder}/run"
deterministic = true
[model]
flavor = "debug"
num_layers = 3
dropout = 0.1
[data]
source = "local"
path = "{folder}/text"
tokenizer = "byte"
streams = 6
shuffle_documents = 8
num_workers = 0
[training]
local_batch_size = 2
global_batch_size = 5
steps = 5
[lr_schedule]
warmup_steps = 2
[optimizer]
lr = 1e-3
[compile]
enabled = false
[checkpoint]
interval = 100
[validation]
interval = 3
fraction = 0.1
max_tokens = 1024
[metrics]
log_interval = 1
tensorboard = false
"""


class Run(NamedTuple):
    """One start of the command on `ranks` processes.

    `settings` are SECTION.KEY=VALUE, separated by spaces, over those of SIZES; without a value a key of these is left
    out.
    """

    settings: str = ""
    ranks: int = 1
    launched: bool = False


ONE_BY_ONE = "training.local_batch_size=1"
UNTIED = "model.tie_embeddings=false model.norm=dynamic_tanh data.document_mask=true model.z_loss=1e-3"
HSDP = "parallel.data_parallel=hsdp parallel.dp_replicate=2"
DDP = "parallel.data_parallel=ddp"
EVERY = f"parallel.reduce_every_micro_batch=true {ONE_BY_ONE}"
PIPELINE = f"parallel.pipeline=2 {ONE_BY_ONE}"
FOUR_LAYERS = "model.num_layers=4"
FLOAT8 = "float8.linear_layers=all float8.recipe="
RECOMPUTED = "activation_checkpoint.mode="
MUON = "optimizer.name=muon"


def _plans() -> dict[str, Run]:
    return {
        "fsdp-2": Run("", 2),
        "fsdp-3-untied": Run(UNTIED, 3),
        "fsdp-2-every": Run(f"{EVERY} {UNTIED}", 2),
        "fsdp-2-always": Run(f"parallel.reshard_after_forward=always {ONE_BY_ONE}", 2),
        "fsdp-3-fused-loss": Run(f"kernels.loss=fused {UNTIED}", 3),
        "hsdp-2x2": Run(f"{HSDP} {UNTIED}", 4),
        "hsdp-2x2-every": Run(f"{HSDP} {EVERY}", 4),
        "hsdp-2-cp-2": Run(f"{HSDP} parallel.dp_shard=1 parallel.context=2", 4),
        "ddp-2": Run(DDP, 2),
        "ddp-3": Run(f"{DDP} {ONE_BY_ONE}", 3),
        "tp-2": Run("parallel.tensor=2", 2),
        "tp-2-untied": Run(f"parallel.tensor=2 {UNTIED}", 2),
        "cp-2": Run("parallel.context=2", 2),
        "cp-4-untied": Run(f"parallel.context=4 {UNTIED}", 4),
        "cp-2-ddp-2-fused-loss": Run(f"parallel.context=2 {DDP} kernels.loss=fused {UNTIED}", 4),
        "cp-2-reference": Run("parallel.context=2 kernels.attention=reference", 2),
        "pp-2": Run(PIPELINE, 2),
        "pp-3-untied": Run(f"parallel.pipeline=3 {ONE_BY_ONE} {UNTIED}", 3),
        "fsdp-2-tp-2": Run("parallel.tensor=2", 4),
        "ddp-2-tp-2": Run(f"parallel.tensor=2 {DDP}", 4),
        "fsdp-2-cp-2-untied": Run(f"parallel.context=2 parallel.dp_shard=2 {UNTIED}", 4),
        "tp-2-cp-2": Run("parallel.context=2 parallel.tensor=2", 4),
        "fsdp-2-pp-2": Run(PIPELINE, 4),
        "tp-2-pp-2-untied": Run(f"{PIPELINE} parallel.tensor=2 {UNTIED}", 4),
        "cp-2-pp-2": Run(f"{PIPELINE} parallel.context=2", 4),
        "hsdp-2x2-tp-2": Run(f"{HSDP} parallel.dp_shard=2 parallel.tensor=2", 8),
        "fsdp-2-tp-2-pp-2": Run(f"{PIPELINE} parallel.tensor=2", 8),
        **{
            f"pp-2-{schedule}": Run(f"{PIPELINE} parallel.pipeline_schedule={schedule} {FOUR_LAYERS}", 2)
            for schedule in ("GPipe", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble")
        },
        "launched-fsdp-2": Run("data.num_workers=1", 2, launched=True),
        "launched-pp-2-tp-2": Run(f"{PIPELINE} parallel.tensor=2", 4, launched=True),
    }


def _float8() -> dict[str, Run]:
    scheduled = f"{PIPELINE} parallel.pipeline_schedule=ZBVZeroBubble {FOUR_LAYERS}"
    return {
        "native-head-bf16": Run(f"{FLOAT8}native float8.output_head=true training.compute_dtype=bfloat16"),
        "native-e4m3-fast": Run(f"{FLOAT8}native float8.gradient_dtype=e4m3 float8.fast_accumulation=true"),
        "native-loss-scaling": Run(f"{FLOAT8}native float8.loss_scaling=true"),
        "native-adamw_fp8": Run(f"{FLOAT8}native optimizer.name=auto"),
        "native-recomputed": Run(f"{FLOAT8}native {RECOMPUTED}selective"),
        **{recipe: Run(FLOAT8 + recipe) for recipe in ("native", "tensorwise", "rowwise", "rowwise_with_gw_hp")},
        "rowwise-head": Run(f"{FLOAT8}rowwise float8.output_head=true"),
        "fsdp-2-native": Run(f"{FLOAT8}native", 2),
        "fsdp-2-rowwise": Run(f"{FLOAT8}rowwise", 2),
        "hsdp-2x2-native": Run(f"{FLOAT8}native {HSDP}", 4),
        "ddp-3-native": Run(f"{FLOAT8}native {DDP} {ONE_BY_ONE}", 3),
        "fsdp-2-tp-2-native": Run(f"{FLOAT8}native parallel.tensor=2", 4),
        "fsdp-2-tensorwise": Run(f"{FLOAT8}tensorwise", 2),
        "hsdp-2x2-tensorwise": Run(f"{FLOAT8}tensorwise {HSDP}", 4),
        "tp-2-native": Run(f"{FLOAT8}native parallel.tensor=2", 2),
        "tp-2-rowwise": Run(f"{FLOAT8}rowwise parallel.tensor=2", 2),
        "cp-2-native": Run(f"{FLOAT8}native parallel.context=2", 2),
        "pp-2-native-ZBVZeroBubble": Run(f"{FLOAT8}native {scheduled}", 2),
    }


def _optimizers() -> dict[str, Run]:
    multipliers = '{"embedding.weight"=0.5,"*.wo.weight"=2.0}'
    return {
        **{name: Run(f"optimizer.name={name}") for name in ("lion", "muon", "adamw8bit", "adamw4bit", "adamw_fp8")},
        "adamw-bf16-moments": Run("optimizer.moments=bfloat16 lr_schedule.name=wsd"),
        "adamw-multipliers": Run(f"optimizer.lr_multipliers={multipliers} optimizer.decay_embeddings=true {UNTIED}"),
        "muon-original": Run(f"{MUON} optimizer.muon_adjust_lr_fn=original optimizer.moments=bfloat16"),
        "fsdp-3-muon": Run(MUON, 3),
        "tp-2-muon": Run(f"{MUON} parallel.tensor=2", 2),
        "pp-2-muon": Run(f"{MUON} {PIPELINE}", 2),
        "fsdp-2-adamw8bit": Run("optimizer.name=adamw8bit", 2),
        "tp-2-adamw4bit": Run("optimizer.name=adamw4bit parallel.tensor=2", 2),
        "ema": Run("ema.decay=0.9 validation.use_ema=true"),
        "fsdp-2-ema": Run("ema.decay=0.9 validation.use_ema=true lr_schedule.name=linear", 2),
    }


def _models() -> dict[str, Run]:
    return {
        "alone": Run(),
        "untied": Run(f"{UNTIED} model.label_smoothing=0.1"),
        "untied-document-mask-reference": Run(f"{UNTIED} kernels.attention=reference"),
        "document-mask": Run("data.document_mask=true"),
        "reference": Run("kernels.attention=reference"),
        "sdpa": Run("kernels.attention=sdpa"),
        "fused-loss": Run("kernels.loss=fused model.z_loss=1e-3"),
        "bfloat16": Run("training.compute_dtype=bfloat16"),
        "qk-norm-grouped": Run("model.qk_norm=true model.num_kv_heads=1"),
        "q-lora": Run("model.q_lora_rank=24 model.mla_rope_theta=5000"),
        "swa-alone": Run("model.mla_layers_per_cycle=0 model.rope_scaling=2.0"),
        "mla-alone": Run("model.swa_layers_per_cycle=0 model.swa_window="),
        "whole-window": Run("model.swa_window=64"),
        "tp-2-q-lora-qk-norm": Run("parallel.tensor=2 model.q_lora_rank=32 model.qk_norm=true", 2),
        "cp-2-window-of-a-shard": Run("parallel.context=2 model.swa_window=40 model.swa_sink_size=0", 2),
        "cp-2-bfloat16": Run("parallel.context=2 training.compute_dtype=bfloat16", 2),
    }


def _recomputation() -> dict[str, Run]:
    blocks = f"{RECOMPUTED}selective activation_checkpoint.selective=blocks activation_checkpoint.every_n_blocks=2"
    return {
        "recomputed-operators": Run(f"{RECOMPUTED}selective"),
        "recomputed-blocks": Run(blocks),
        **{
            f"recomputed-{modules}": Run(f"{RECOMPUTED}full activation_checkpoint.modules={modules}")
            for modules in ("block", "attention", "feed_forward", "both")
        },
        "fsdp-2-recomputed": Run(f"{RECOMPUTED}full", 2),
        "tp-2-recomputed-operators": Run(f"{RECOMPUTED}selective parallel.tensor=2", 2),
        "tp-2-recomputed": Run(f"{RECOMPUTED}full parallel.tensor=2 kernels.attention=reference", 2),
        "pp-2-recomputed-operators": Run(f"{RECOMPUTED}selective {PIPELINE}", 2),
        "cp-2-recomputed": Run(f"{RECOMPUTED}full parallel.context=2", 2),
    }


ENGRAM = (
    "model.engram.layers=[0,2] model.engram.heads=2 model.engram.d_mem=16 model.engram.table_size=101 "
    "data.document_mask=true"
)


def _memory() -> dict[str, Run]:
    """Engram and selective attention."""
    plans = {
        "": ("", 1),
        "fsdp-2-": ("", 2),
        "tp-2-cp-2-": ("parallel.tensor=2 parallel.context=2", 4),
        "pp-2-": (f"{PIPELINE} parallel.pipeline_schedule=ZBVZeroBubble {FOUR_LAYERS}", 2),
    }
    return {
        **{f"{plan}engram": Run(f"{ENGRAM} {keys}", ranks) for plan, (keys, ranks) in plans.items()},
        "engram-averaged": Run(f"{ENGRAM} ema.decay=0.9"),
        "selective": Run("model.mla_selective=true data.document_mask=true"),
        "tp-2-selective": Run("model.mla_selective=true parallel.tensor=2", 2),
    }


# Every norm above the mean of the last two good ones is a spike: some are, some are not.
SPIKES = (
    "fault_tolerance.spike_sigma=0.05 fault_tolerance.spike_window=2 optimizer.lr=0.02 training.steps=16 "
    "lr_schedule.min_lr_ratio=1 training.global_batch_size=3"
)
REWINDS = (
    f"{SPIKES} fault_tolerance.max_bad_steps=2 fault_tolerance.max_rewinds=9 checkpoint.interval=2 "
    "checkpoint.keep_latest=0"
)
COMPILED = "compile.enabled=true"

CPU: dict[str, Run | tuple[Run, ...]] = {
    **_models(),
    **_plans(),
    **_float8(),
    **_optimizers(),
    **_recomputation(),
    **_memory(),
    "compiled": Run(f"{COMPILED} data.document_mask=true"),
    "fsdp-2-compiled": Run(COMPILED, 2),
    "tp-2-compiled": Run(f"{COMPILED} parallel.tensor=2", 2),
    "cp-2-compiled": Run(f"{COMPILED} parallel.context=2", 2),
    "pp-2-compiled-recomputed": Run(f"{COMPILED} {PIPELINE} {RECOMPUTED}full activation_checkpoint.modules=both", 2),
    "compiled-native-recomputed-operators": Run(f"{COMPILED} {FLOAT8}native {RECOMPUTED}selective"),
    "spikes": Run(SPIKES),
    "rewinds": Run(REWINDS),
    "fsdp-2-rewinds": Run(REWINDS, 2),
    # Each plan goes on from the checkpoint of the one before.
    "fsdp-3, then pp-2-fsdp-2, then tp-2": (
        Run("training.steps=2", 3),
        Run(f"{PIPELINE} training.steps=4", 4),
        Run("parallel.tensor=2 training.steps=6", 2),
    ),
    "muon-fsdp-2, then alone": (Run(f"{MUON} training.steps=3", 2), Run(f"{MUON} training.steps=5")),
}

CUDA: dict[str, Run | tuple[Run, ...]] = {
    "bf16": Run(COMPILED),
    "bf16-eager": Run(),
    "bf16-dropout-eager": Run("model.dropout=0.1"),
    "native": Run(f"{COMPILED} {FLOAT8}native float8.output_head=true"),
    "native-fast-adamw_fp8": Run(f"{COMPILED} {FLOAT8}native float8.fast_accumulation=true optimizer.name=auto"),
    "tensorwise": Run(f"{COMPILED} {FLOAT8}tensorwise"),
    "rowwise-eager": Run(f"{FLOAT8}rowwise"),
    "document-mask": Run(f"{COMPILED} data.document_mask=true"),
    "document-mask-flex": Run(f"{COMPILED} data.document_mask=true kernels.attention=flex"),
    "triton": Run(f"{COMPILED} kernels.attention=triton kernels.elementwise=triton"),
    "sdpa": Run(f"{COMPILED} kernels.attention=sdpa kernels.elementwise=plain kernels.loss=plain"),
    "qk-norm-q-lora": Run(f"{COMPILED} model.qk_norm=true model.q_lora_rank=128"),
    "recomputed": Run(f"{COMPILED} {RECOMPUTED}full"),
    "recomputed-operators": Run(f"{COMPILED} {RECOMPUTED}selective"),
    "native-recomputed-operators": Run(f"{COMPILED} {FLOAT8}native {RECOMPUTED}selective"),
    "muon": Run(f"{COMPILED} {MUON}"),
    "float32": Run(f"{COMPILED} training.compute_dtype=float32 training.fp32_precision=ieee"),
}

CASES = {"cpu": CPU, "cuda": CUDA}
# What all cases of a device share. On a GPU: heads as wide as our kernels take, sequences longer than their tiles.
SIZES = {
    "cpu": "model.dim=64 model.num_heads=2 model.swa_window=16 training.seq_len=64 training.compute_dtype=float32",
    "cuda": "model.flavor=small model.dim=512 model.num_heads=4 model.max_seq_len=1024 model.dropout=0 "
    "training.seq_len=1024 training.global_batch_size=4 validation.max_tokens=8192",
}


def record(root: Path, device: str, names: list[str], jobs: int, out: Path) -> bool:
    """Run the cases with the program in `root`, and write to `out` what they computed, case by case.

    Returns whether every run ended with 0.
    """
    sys.path.insert(0, str(root))
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": _path(root), "LANG": "C.UTF-8"}
    if device == "cpu":
        os.environ |= {"NGPU": "0", "CUDA_VISIBLE_DEVICES": ""}
        _import_program()
    found: dict[str, Any] = {}
    begun = time.perf_counter()
    with _temporary_folder() as shared:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(shared / "cache")
        _write_text(shared / "text")
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(jobs, mp_context=fork) as pool:
            futures = {pool.submit(_record_case, root, device, name, shared): name for name in names}
            for future in as_completed(futures):
                name = futures[future]
                found[name] = future.result()
                codes = found[name]["exit codes"]
                print(f"{time.perf_counter() - begun:6.1f} s  {name}: {codes}", file=sys.stderr, flush=True)
                output = found[name].pop("output")
                if any(codes):
                    print(output, file=sys.stderr, flush=True)
                out.write_text(json.dumps({name: found[name] for name in names if name in found}, indent=1))
    return not any(code for case in found.values() for code in case["exit codes"])


@contextmanager
def _temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """As tempfile.TemporaryDirectory, whose finalizer forks of this process would run when they end."""
    folder = Path(tempfile.mkdtemp(prefix="record-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _path(root: Path) -> str:
    return os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))


def _import_program() -> None:
    """What every rank needs, before it is forked: it starts with all of it. Nothing here starts a thread."""
    for name in ("torch.distributed.checkpoint", "torch._dynamo", "torch._inductor.compile_fx", "torchao.optim"):
        importlib.import_module(name)
    for name in ("swamla_titan.cli", "swamla_titan.train"):
        module = importlib.import_module(name)
        assert Path(str(module.__file__)).is_relative_to(sys.path[0]), f"{name} comes from {module.__file__}"
    gc.collect()
    gc.freeze()


def _write_text(folder: Path) -> None:
    """Forty documents of made-up words, the same on every machine."""
    draw = random.Random(0)
    words = ["".join(draw.choice("abdegiklmnorstu") for _ in range(draw.randint(2, 8))) for _ in range(300)]
    folder.mkdir()
    for number in range(40):
        text = " ".join(words[min(draw.randrange(300), draw.randrange(300))] for _ in range(draw.randint(40, 500)))
        (folder / f"{number:02}.txt").write_text(text, encoding="ascii")


def _record_case(root: Path, device: str, name: str, shared: Path) -> dict[str, Any]:
    case = CASES[device][name]
    with _temporary_folder(shared) as folder:
        (folder / "text").symlink_to(shared / "text")
        config = folder / "case.toml"
        config.write_text(COMMON.format(folder=folder))
        codes = []
        for run in [case] if isinstance(case, Run) else case:
            settings = dict(setting.split("=", 1) for setting in f"{SIZES[device]} {run.settings}".split())
            command = [str(config), *(part for key, value in settings.items() if value for part in (f"--{key}", value))]
            if device == "cuda":
                codes.append(_launched(root, command, folder / "output.txt", NGPU="1"))
            elif run.launched:
                codes.append(_launched(root, command, folder / "output.txt", NGPU="0", NPROC=str(run.ranks)))
            else:
                codes += _forked(command, folder / "output.txt", run.ranks)
        return {"exit codes": codes, "output": (folder / "output.txt").read_text()[-3000:], **_results(folder / "run")}


def _launched(root: Path, command: list[str], output: Path, **environment: str) -> int:
    with output.open("a") as file:
        process = subprocess.Popen(
            [str(root / "run_train.sh"), *command],
            env=os.environ | environment,
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()


def _forked(command: list[str], output: Path, size: int) -> list[int]:
    """The exit codes of all ranks; of one that ran past the limit, -9."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(command, output, rank, size, port)) for rank in range(size)]
    for each in ranks:
        each.start()
    end = time.monotonic() + LIMIT
    for each in ranks:
        each.join(max(0.0, end - time.monotonic()))
        each.kill()  # nothing, if it has ended
        each.join()
    return [each.exitcode or 0 for each in ranks]


def _rank(command: list[str], output: Path, rank: int, size: int, port: int) -> None:
    """`python -m swamla_titan train`, as torchrun starts it where there are several ranks."""
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if size > 1:
        os.environ |= {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": "0"},
            **{"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
    sys.argv = ["swamla-titan", "train", *command]
    runpy.run_module("swamla_titan", run_name="__main__", alter_sys=True)


def _results(run: Path) -> dict[str, Any]:
    """What a dump folder says of the run."""
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    if not checkpoints:
        return {}
    state = json.loads((checkpoints[-1] / "train.json").read_text())
    del state["versions"]
    return {
        "checkpoints": [path.name for path in checkpoints],
        "metrics": _metrics(run / "metrics.jsonl"),
        "tensors": dict(_digests(checkpoints[-1])),
        "train.json": state,
        "summary": _summary(run / "logs" / "rank-0.log", run),
    }


def _metrics(path: Path) -> dict[str, list[list[float]]]:
    """name -> [step, value] of each line that has it."""
    found: dict[str, list[list[float]]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        for name, value in line.items():
            if name != "step" and not MEASURED.search(name):
                found.setdefault(name, []).append([line["step"], value])
    return found


def _digests(checkpoint: Path) -> Iterator[tuple[str, str]]:
    """(name, type, shape and SHA-256) of every tensor of a checkpoint, by torch's own reader."""
    import torch
    import torch.distributed.checkpoint as dcp

    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    for name, tensor in sorted(tensors.items()):
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        yield name, f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


def _summary(path: Path, run: Path) -> list[str]:
    """The lines that open the log, without times and places."""
    lines = []
    for line in path.read_text().splitlines():
        line = re.sub(r"^[-0-9T:,. ]+([A-Z]+) swamla_titan[.a-z_]*: ", r"\1 ", line).replace(str(run.parent), "")
        lines.append(line)
        if re.search("a new run$|resumed from", line):
            break
    return lines


def compare(before: dict[str, Any], after: dict[str, Any], with_summary: bool) -> int:
    """Print what differs between two records; returns how many cases do."""
    different = 0
    for name in [*before, *(name for name in after if name not in before)]:
        one, other = before.get(name, {}), after.get(name, {})
        lines = list(_differences(one, other))
        different += bool(lines)
        if with_summary and one and other and one.get("summary") != other.get("summary"):
            old, new = one.get("summary", []), other.get("summary", [])
            lines += [f"- {line}" for line in old if line not in new] + [f"+ {line}" for line in new if line not in old]
        if lines:
            print(f"{name}:\n  " + "\n  ".join(lines))
    print(f"{len(before)} and {len(after)} cases: {different} differ")
    return different


def _differences(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    if not one or not other:
        yield f"only in the {'first' if one else 'second'} record"
        return
    if one["exit codes"] != other["exit codes"]:
        yield f"exit codes: {one['exit codes']} | {other['exit codes']}"
        return
    for key in ("checkpoints", "train.json"):
        if one.get(key) != other.get(key):
            yield f"{key}: {_brief(one.get(key))} | {_brief(other.get(key))}"
    for key in ("metrics", "tensors"):
        old, new = one.get(key, {}), other.get(key, {})
        wrong = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        for name in wrong[:6]:
            yield f"{key}, {name}: {_brief(old.get(name))} | {_brief(new.get(name))}"
        if wrong[6:]:
            yield f"{key}: and {len(wrong) - 6} more of {len(old)}"


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:120]} ... {text[-30:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="repository whose program runs")
    parser.add_argument("--out", type=Path, help="file for the record")
    parser.add_argument("--device", choices=CASES, default="cpu")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cases to run, or to compare")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cases at a time")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--summary", action="store_true", help="with --compare: show other opening lines too")
    arguments = parser.parse_args()

    def wanted(names: Iterable[str]) -> list[str]:
        return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in arguments.only)]

    if arguments.compare:
        records = [json.loads(path.read_text()) for path in arguments.compare]
        one, other = ({name: each[name] for name in wanted(each)} for each in records)
        return int(compare(one, other, arguments.summary) > 0)
    names = wanted(CASES[arguments.device])
    if arguments.list:
        print(*names, sep="\n")
        return 0
    if not arguments.out:
        parser.error("--out is needed")
    return int(not record(arguments.root.resolve(), arguments.device, names, arguments.jobs, arguments.out))


if __name__ == "__main__":
    sys.exit(main())
