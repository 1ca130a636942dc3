"""metrics.jsonl and the other places where the numbers of a run go."""

import builtins
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from swamla_titan.config import load_config
from swamla_titan.data import BatchLoader, Shape, open_corpus
from swamla_titan.errors import RunFailed
from swamla_titan.metrics import METRICS, step_line
from swamla_titan.model import FLAVORS, SWAMLAModel
from swamla_titan.model.counts import training_flops_per_token
from swamla_titan.train import throughput
from swamla_titan.train.logging import MetricsLogger
from swamla_titan.train.throughput import PEAK_BF16_FLOPS, Throughput, peak_flops
from swamla_titan.train.trainer import Trainer
from tests.distributed.job import before_step
from tests.train.runs import checkpoint, metrics, terminal, train

FAST = ("--data.num_workers", "0", "--training.steps", "4", "--validation.interval", "2")
# The contract's keys of a step, but for those of a GPU and of the policy for bad steps, which is not there.
STEP_KEYS = {
    *("step", "tokens", "loss", "grad_norm", "lr", "tokens_per_second", "memory_gib", "data_seconds", "step_seconds"),
    *("skipped_steps", "time", "epoch"),
}
VALIDATION_KEYS = {"val_loss", "val_bits_per_byte"}
GPU_KEYS = {"tokens_per_second_per_gpu", "tflops_per_gpu", "mfu"}


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_has_the_contract_s_keys_and_none_that_does_not_apply(tiny, tmp_path):
    begin = time.time()
    assert train(tiny, *FAST) == 0
    found = lines(tmp_path / "run")
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    times = [begin - 0.001, *(line["time"] for line in found), time.time() + 0.001]
    assert times == sorted(times)
    for line in found:
        assert line.keys() == (STEP_KEYS if line["step"] % 2 else STEP_KEYS | VALIDATION_KEYS)
        assert 0 < line["data_seconds"] < line["step_seconds"]
        assert line["tokens_per_second"] == pytest.approx(5 * 64 / line["step_seconds"])
        assert 0.05 < line["memory_gib"] < 64
    assert metrics(tmp_path / "run", "tokens") == {step: step * 5 * 64 for step in (1, 2, 3, 4)}
    assert list(metrics(tmp_path / "run", "val_loss")) == [2, 4]


def test_tokens_are_those_of_the_whole_run_after_a_resume(tiny, tmp_path):
    assert train(tiny, *FAST, "--training.steps", "2") == 0
    assert train(tiny, *FAST) == 0
    assert metrics(tmp_path / "run", "tokens") == {step: step * 5 * 64 for step in (1, 2, 3, 4)}


def test_the_loss_is_the_mean_over_the_targets_of_the_global_batch(tiny, tmp_path):
    """Recomputed from the initial weights and the first batch, row by row, by torch's own cross-entropy."""
    assert train(tiny, *FAST, "--model.dropout", "0", "--optimizer.lr", "0", "--training.steps", "1") == 0
    config = load_config(tmp_path / "run" / "config.toml")
    model = SWAMLAModel(config.model)
    model.init_weights(config.job.seed)
    corpus = open_corpus(config.data, config.validation, config.job.seed)
    with BatchLoader(corpus, [Shape(0, 5, 64)]) as loader:
        batch = next(loader)
    assert batch.tokens.shape == (5, 64)
    losses = [
        torch.nn.functional.cross_entropy(model(row[None])[0], targets, reduction="none")
        for row, targets in zip(batch.tokens, batch.targets)
    ]
    assert metrics(tmp_path / "run")[1] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many seconds pass; no others do."""
    now = 1000.0

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now))
    return pass_time


def test_times_are_means_over_the_steps_since_the_line_before(pass_time):
    clock = Throughput(torch.device("cpu"), 1, flops_per_token=1.0, tokens_per_step=100)
    for _ in range(2):  # and begin again with each reading
        for _ in range(3):
            with clock.data_wait():
                pass_time(0.5)
            pass_time(1.5)
        values = clock.metrics()
        assert values["data_seconds"] == pytest.approx(0.5)
        assert values["step_seconds"] == pytest.approx(2)
        assert values["tokens_per_second"] == pytest.approx(50)


def test_validation_and_checkpoints_are_not_counted_as_training(pass_time):
    clock = Throughput(torch.device("cpu"), 1, flops_per_token=1.0, tokens_per_step=100)
    with clock.data_wait():
        pass_time(1)
    with clock.pause("validation"):
        pass_time(5)
    assert clock.metrics()["step_seconds"] == pytest.approx(1)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_mfu_is_tokens_per_second_of_a_gpu_times_flops_over_its_peak(monkeypatch, name, peak):
    """On a GPU that is there in name only: time and memory are what torch would say."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 3 << 30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: None)
    gpu = torch.device("cuda", 0)
    assert peak_flops(gpu) == peak
    flops = training_flops_per_token(FLAVORS["debug"], 256)
    clock = Throughput(gpu, num_devices=4, flops_per_token=flops, tokens_per_step=1_000_000)
    with clock.data_wait():
        pass
    values = clock.metrics()
    per_gpu = values["tokens_per_second"] / 4
    assert values["tokens_per_second_per_gpu"] == pytest.approx(per_gpu)
    assert values["tflops_per_gpu"] == pytest.approx(per_gpu * flops / 1e12)
    assert values["memory_gib"] == 3
    if peak is None:
        assert "mfu" not in values
    else:
        assert values["mfu"] == pytest.approx(per_gpu * flops / peak)
        assert peak in PEAK_BF16_FLOPS.values()
    assert (
        values.keys() - {"mfu"} | {"step", "time", "epoch", "tokens", "loss", "grad_norm", "lr", "skipped_steps", "mfu"}
        == STEP_KEYS | GPU_KEYS
    )


# metrics.jsonl as a file


def test_a_last_line_that_a_crash_cut_short_is_ended_before_the_next(tiny, tmp_path):
    assert train(tiny, *FAST, "--training.steps", "2") == 0
    path = tmp_path / "run" / "metrics.jsonl"
    before = path.read_text()
    path.write_text(before + '{"step": 3, "lo')
    assert train(tiny, *FAST) == 0
    after = path.read_text()
    assert after.startswith(before + '{"step": 3, "lo\n{"step": 3, ')
    whole = [line for line in after.splitlines() if line.endswith("}")]
    assert [json.loads(line)["step"] for line in whole] == [1, 2, 3, 4]


def test_lines_are_appended_as_they_come_and_never_rewritten(tiny, tmp_path):
    assert train(tiny, *FAST, "--training.steps", "2") == 0
    path = tmp_path / "run" / "metrics.jsonl"
    before = path.read_text()
    assert train(tiny, *FAST) == 0
    assert path.read_text().startswith(before)

    folder = tmp_path / "alone"
    folder.mkdir()
    log = MetricsLogger(load_config(tmp_path / "run" / "config.toml"), folder, step=0)
    log.log(1, {"loss": 1.5}, "a line")
    assert lines(folder) == [{"step": 1, "loss": 1.5}]  # there before the file is closed

    def fail() -> None:
        with log.one_line():
            log.log(2, {"loss": 1.25}, "a line")
            log.log(2, {"val_loss": 1.0}, "validation")
            raise RunFailed("later")

    with pytest.raises(RunFailed):
        fail()
    assert lines(folder)[1:] == [{"step": 2, "loss": 1.25, "val_loss": 1.0}]
    log.close()


# the console


def test_the_step_s_line_leaves_out_what_does_not_apply():
    values = {"loss": 1.25, "grad_norm": 0.5, "lr": 3e-4, "tokens_per_second": 181234.0, "memory_gib": 40.128}
    assert step_line(7, 1000, values, 3 * 3600 + 62.4) == (
        "step    7/1000 | loss 1.2500 | grad norm 0.500 | lr 3.00e-04 | 181.2K tokens/s | 40.13 GiB | ETA 3:01:02"
    )
    assert "| MFU 43.2% |" in step_line(7, 10, values | {"mfu": 0.432}, 0)
    assert "| 999 tokens/s |" in step_line(7, 10, values | {"tokens_per_second": 999.4}, 0)


@pytest.mark.parametrize(
    "seconds, shown", [(0, "0:00:00"), (59.4, "0:00:59"), (59.6, "0:01:00"), (3599.7, "1:00:00"), (360000, "100:00:00")]
)
def test_the_time_left(seconds, shown):
    values = {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "tokens_per_second": 1.0, "memory_gib": 1.0}
    assert step_line(1, 2, values, seconds).endswith(f"| ETA {shown}")


def test_the_time_left_is_the_steps_left_at_the_pace_of_now(tiny, tmp_path, capsys):
    assert train(tiny, *FAST, "--metrics.log_interval", "4") == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if "| ETA " in line]
    assert shown[-1].endswith("| ETA 0:00:00")
    first = metrics(tmp_path / "run", "step_seconds")[1]
    left = round(3 * first)
    assert shown[0].endswith(f"| ETA 0:00:{left:02d}")


def test_the_progress_bar_is_for_terminals(tiny, monkeypatch, capsys):
    assert train(tiny, *FAST) == 0
    assert capsys.readouterr().err == ""
    with terminal() as (stderr, read), monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        assert train(tiny, *FAST, "--training.steps", "6") == 0
        shown = read()
    # A resumed run's bar starts where the run stands.
    assert "4/6 [" in shown
    assert "6/6 [" in shown


# TensorBoard


def test_tensorboard_gets_every_number_of_every_line(tiny, tmp_path):
    settings = (*FAST, "--metrics.tensorboard", "true")
    assert train(tiny, *settings, "--training.steps", "2") == 0
    assert train(tiny, *settings) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = {name: METRICS[name].tag for name in STEP_KEYS - {"step", "time"} | VALIDATION_KEYS}
    assert tags["loss"] == "loss/train"  # beside loss/validation
    assert set(events.Tags()["scalars"]) == set(tags.values())
    for name, tag in tags.items():
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert found == pytest.approx(metrics(tmp_path / "run", name), rel=1e-6), name


def test_tensorboard_has_the_configuration_as_text_and_as_hyperparameters(tiny, tmp_path):
    assert train(tiny, *FAST, "--metrics.tensorboard", "true", "--training.steps", "1") == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("config/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    written = (tmp_path / "run" / "config.toml").read_text()
    assert [line.removeprefix("    ") for line in shown.splitlines()] == written.splitlines()
    start = HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info
    assert (
        start.hparams["model.num_layers"].number_value == load_config(tmp_path / "run" / "config.toml").model.num_layers
    )
    assert start.hparams["optimizer.name"].string_value == "adamw"


# Weights & Biases


def test_wandb_gets_the_project_the_configuration_and_every_line(tiny, tmp_path, wandb):
    assert train(tiny, *FAST, "--metrics.wandb", "true", "--metrics.wandb_project", "mine") == 0
    (start,) = wandb.inits
    assert (start["project"], start["name"], start["resume"]) == ("mine", "run", "allow")
    assert start["config"]["model"]["dim"] == 64
    assert start["config"]["model"]["vocab_size"] == 257
    assert [{"step": step} | values for step, values in wandb.logged] == lines(tmp_path / "run")
    assert wandb.finished == 1


def test_a_resumed_run_goes_on_in_its_wandb_run_and_another_of_the_same_name_does_not(tiny, tmp_path, wandb):
    settings = (*FAST, "--metrics.wandb", "true")
    assert train(tiny, *settings, "--training.steps", "2") == 0
    assert train(tiny, *settings) == 0
    assert train(tiny, *settings, "--job.dump_folder", str(tmp_path / "elsewhere" / "run")) == 0
    first, resumed, other = wandb.inits
    assert first["id"] == resumed["id"]
    assert other["name"] == first["name"]
    assert other["id"] != first["id"]
    # A moved folder is still the same run.
    (tmp_path / "run").rename(tmp_path / "moved")
    assert train(tiny, *settings, "--training.steps", "5", "--job.dump_folder", str(tmp_path / "moved")) == 0
    assert wandb.inits[-1]["id"] == first["id"]


class UsageError(Exception):
    """As wandb.errors has one."""


class CommError(Exception):
    """Likewise."""


def test_without_an_account_a_run_is_refused_and_nobody_is_asked(tiny, tmp_path, wandb, capsys, monkeypatch):
    def init(**_):
        assert not sys.stdin.isatty()
        assert sys.stdin.read() == ""
        raise UsageError("No API key configured. Use `wandb login`\nto log in.")

    with terminal() as (screen, _):
        monkeypatch.setattr(sys, "stdin", screen)
        monkeypatch.setattr(wandb, "init", init)
        assert train(tiny, *FAST, "--metrics.wandb", "true") == 2
        assert sys.stdin is screen
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in ("No API key configured. Use `wandb login` to log in.", "WANDB_API_KEY", "WANDB_MODE=offline", "false"):
        assert part in error
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("error", [CommError("no route"), TimeoutError("no answer"), ConnectionError("reset")])
def test_a_service_that_does_not_answer_ends_no_run(tiny, tmp_path, wandb, capsys, monkeypatch, error):
    def init(**_):
        raise error

    monkeypatch.setattr(wandb, "init", init)
    assert train(tiny, *FAST, "--metrics.wandb", "true") == 0
    said = f"Weights & Biases gets no metrics until the next start ({type(error).__name__}: {error})"
    assert capsys.readouterr().out.count(said) == 1
    assert lines(tmp_path / "run")


def test_a_package_that_is_broken(tiny, capsys, monkeypatch):
    real = builtins.__import__

    def broken(name, *arguments, **keys):
        if name == "wandb":
            raise TypeError("Descriptors cannot be created directly.\nSecond line")
        return real(name, *arguments, **keys)

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(builtins, "__import__", broken)
    assert train(tiny, *FAST, "--metrics.wandb", "true") == 2
    error = capsys.readouterr().err
    assert "the package cannot be imported (TypeError: Descriptors" in error
    assert error.count("\n") == 1


def test_without_the_package_a_run_that_asks_for_it_is_refused(tiny, tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **keys):
        if name == "wandb":
            raise ImportError("No module named 'wandb'")
        return real(name, *arguments, **keys)

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    assert train(tiny, *FAST, "--metrics.wandb", "true") == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# profiles and the log


def traced_steps(path: Path) -> int:
    events = json.loads(path.read_text())["traceEvents"]
    return sum(event.get("name") == "Optimizer.step#GroupedOptimizer.step" for event in events)


def test_a_profile_holds_the_steps_asked_for_and_training_goes_on(tiny, tmp_path):
    assert train(tiny, *FAST) == 0
    asked = ("--profiling.enabled", "true", "--profiling.start_step", "2", "--profiling.num_steps", "2")
    assert train(tiny, *FAST, *asked, "--job.dump_folder", str(tmp_path / "traced")) == 0
    (trace,) = (tmp_path / "traced" / "traces").iterdir()
    assert trace.name == "steps-2-3.json"
    assert traced_steps(trace) == 2
    assert metrics(tmp_path / "traced") == metrics(tmp_path / "run")


def test_a_profile_that_the_run_s_end_cuts_short_is_written(tiny, tmp_path):
    asked = ("--profiling.enabled", "true", "--profiling.start_step", "3", "--profiling.num_steps", "9")
    assert train(tiny, *FAST, *asked) == 0
    (trace,) = (tmp_path / "run" / "traces").iterdir()
    assert trace.name == "steps-3-4.json"
    assert traced_steps(trace) == 2


@pytest.mark.parametrize("error, traces, waits", [(ZeroDivisionError, 0, 0), (RunFailed, 1, 2)])
def test_a_profile_is_dropped_without_waiting_for_the_device_if_a_rank_may_be_alone_in_its_trouble(
    tiny, tmp_path, monkeypatch, error, traces, waits
):
    """Where all ranks end together it is written. torch's own profiler waits once more than this program."""
    waited: list[int] = []

    def fail_on_a_gpu(trainer: Trainer) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
        assert trainer.profiler._profile is not None
        assert trainer.profiler._profile.profiler is not None
        trainer.profiler._profile.profiler.use_device = "cuda"
        raise error("no memory is left")

    monkeypatch.setattr(Trainer, "run", Trainer.run)  # restored afterwards
    before_step(3, fail_on_a_gpu)
    asked = ("--profiling.enabled", "true", "--profiling.start_step", "2", "--profiling.num_steps", "9")
    if error is RunFailed:
        assert train(tiny, *FAST, *asked) == 1
    else:
        with pytest.raises(error):
            train(tiny, *FAST, *asked)
    assert len(waited) == waits
    assert len(list((tmp_path / "run").glob("traces/*"))) == traces
    with torch.profiler.profile():  # torch has one profiler a process, and it is free again
        pass


def test_the_log_in_the_folder_says_what_the_console_says(tiny, tmp_path, capsys):
    assert train(tiny, *FAST) == 0
    shown = [line.split(" ", 2)[2] for line in capsys.readouterr().out.splitlines()]
    logged = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert any(line.startswith("validation: loss") for line in shown)
    for line in shown:
        assert line in logged, line
    assert f"checkpoint {checkpoint(tmp_path / 'run', 4)}" in logged
