"""Every key of every section changes what it says it changes; [model] has its own tests in tests/model.

A case is a function, listed in CASES under its key. It trains for a few steps and looks at what the run did: what the
model was fed, weights and optimizer state in the checkpoint, the lines of metrics.jsonl, the files written.
"""

import gc
import json
import math
import multiprocessing
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swamla_titan.config.sections import KEYS, Config, Job, Training
from swamla_titan.data import IGNORED
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.blocks import Block
from swamla_titan.train.precision import set_precision_and_determinism
from tests.config.block_cases import BLOCK_CASES
from tests.config.checkpoint_cases import CHECKPOINT_CASES
from tests.config.fault_cases import FAULT_CASES
from tests.config.float8_cases import FLOAT8_CASES
from tests.config.optimizer_cases import OPTIMIZER_CASES
from tests.config.parallel_cases import PARALLEL_CASES
from tests.config.runner import EOT, STEPS, Run, Runner, as_text, before_every_call_of
from tests.conftest import WandbStub
from tests.train.faults import Fault
from tests.train.runs import checkpoint, metrics, terminal


@pytest.fixture
def run(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wandb: WandbStub) -> Runner:
    return Runner(tiny, tmp_path, capsys, wandb)


# [job]


def dump_folder(run: Runner) -> None:
    one, other = run(), run()
    assert one.folder != other.folder
    for each in (one, other):
        assert {"config.toml", "metrics.jsonl", "checkpoints", "logs"} <= {path.name for path in each.folder.iterdir()}


def seed(run: Runner) -> None:
    zero, one = (run("--optimizer.lr", "0", "--job.seed", number) for number in ("0", "1"))
    assert zero.text() != one.text()  # the order of the data
    a, b = zero.weights(), one.weights()  # the initial ones: the learning rate is 0
    assert not torch.equal(a["model.embedding.weight"], b["model.embedding.weight"])
    with_dropout = [
        run("--training.steps", "1", "--model.dropout", "0.5", "--job.seed", number).series() for number in ("0", "0")
    ]
    assert with_dropout[0] == with_dropout[1]


def deterministic(run: Runner) -> None:
    run("--job.deterministic", "false")
    assert not torch.are_deterministic_algorithms_enabled()
    run("--job.deterministic", "true")
    assert torch.are_deterministic_algorithms_enabled()


# [data]


def source(run: Runner) -> None:
    lines = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(50))
    local = run.local(rows_jsonl=lines)
    builtin = run("--data.source", "builtin", "--data.path", "", "--data.streams", "1").text()
    first, _, _ = builtin.partition("|")
    assert any(topic.startswith(first[:200]) for topic in topics.values())
    assert run(*local).text().startswith("line 0|line 1|")
    assert run(*local, "--data.source", "huggingface").text().startswith("line 0|line 1|")


def path(run: Runner) -> None:
    assert run(*run.local(a_txt="abc")).text().startswith("abc|abc|")
    assert run(*run.local(a_txt="xyz")).text().startswith("xyz|xyz|")


def hub_folder(run: Runner) -> tuple[str, ...]:
    """A data set of two configurations with two splits each, as the Hub stores them."""
    folder = run.folder / "hub"
    folder.mkdir()
    yaml = "---\nconfigs:\n"
    for name in ("red", "blue"):
        yaml += f"- config_name: {name}\n  data_files:\n"
        for split in ("train", "test"):
            yaml += f"  - split: {split}\n    path: {name}-{split}.jsonl\n"
            rows = [json.dumps({"text": f"{name} {split} {i}"}) for i in range(40)]
            (folder / f"{name}-{split}.jsonl").write_text("\n".join(rows))
    (folder / "README.md").write_text(yaml + "---\n")
    return (
        *("--data.source", "huggingface", "--data.path", str(folder), "--data.name", "red", "--data.streams", "1"),
        *("--data.shuffle_documents", "1", "--validation.fraction", "0"),
    )


def name(run: Runner) -> None:
    hub = hub_folder(run)
    assert run(*hub).text().startswith("red train 0|red train 1|")
    assert run(*hub, "--data.name", "blue").text().startswith("blue train 0|blue train 1|")


def split(run: Runner) -> None:
    assert run(*hub_folder(run), "--data.split", "test").text().startswith("red test 0|red test 1|")


def revision(run: Runner) -> None:
    """On a hub of two commits, of which the tag v1 means the first, and no word the newest."""
    import datasets
    import huggingface_hub

    hub = (*hub_folder(run), "--data.path", "someone/texts")
    configurations = {"c1": "red", "c2": "blue"}
    load = datasets.load_dataset

    def load_commit(path: str, name: str, *, revision: str, **keys: Any) -> Any:
        assert path == "someone/texts"
        return load(str(run.folder / "hub"), configurations[revision], **keys)

    def dataset_info(self: Any, path: str, *, revision: str | None, **keys: Any) -> SimpleNamespace:
        return SimpleNamespace(sha={"v1": "c1", None: "c2"}[revision])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_commit)
        patch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        for overrides, commit, color in ((("--data.revision", "v1"), "c1", "red"), ((), "c2", "blue")):
            result = run(*hub, *overrides)
            assert result.text().startswith(f"{color} train 0|{color} train 1|")
            assert f'revision = "{commit}"' in (result.folder / "config.toml").read_text()


def text_key(run: Runner) -> None:
    local = run.local(rows_jsonl="".join(json.dumps({"text": "one", "body": "two"}) + "\n" for _ in range(9)))
    assert run(*local).text().startswith("one|one|")
    assert run(*local, "--data.text_key", "body").text().startswith("two|two|")


def text_separator(run: Runner) -> None:
    local = run.local(a_txt="one##two##three")
    assert run(*local).text().startswith("one##two##three|one##")
    assert run(*local, "--data.text_separator", "##").text().startswith("one|two|three|one|")


def max_document_mib(run: Runner) -> None:
    local = run.local(a_txt="word " * 300_000)
    assert "data.max_document_mib = 1" in run.refusal(*local, "--data.max_document_mib", "1")
    run(*local, "--data.max_document_mib", "2")


def tokenizer(run: Runner) -> None:
    local = run.local(a_txt="hello world")
    assert run(*local).calls[0].tokens[0, :12].tolist() == [*b"hello world", EOT]
    gpt2 = run(*local, "--data.tokenizer", "gpt2", "--training.steps", "1")
    assert gpt2.calls[0].tokens[0, :3].tolist() == [31373, 995, 50256]
    assert gpt2.weights(1)["model.embedding.weight"].shape[0] == 50304


def streams(run: Runner) -> None:
    six, two = run(), run("--data.streams", "2")
    assert six.text() != two.text()
    for each, number in ((six, 6), (two, 2)):
        record = json.loads((checkpoint(each.folder, STEPS) / "train.json").read_text())
        assert sorted(map(int, record["cursors"])) == list(range(number))


def shuffle_documents(run: Runner) -> None:
    local = run.local(rows_jsonl="".join(json.dumps({"text": f"{i:03}"}) + "\n" for i in range(1000)))
    in_order = [f"{i:03}" for i in range(200)]
    assert run(*local).text().split("|")[:200] == in_order
    shuffled = run(*local, "--data.shuffle_documents", "20").text().split("|")[:200]
    assert shuffled != in_order
    for start in range(0, 200, 20):
        assert sorted(shuffled[start : start + 20]) == in_order[start : start + 20]


def num_workers(run: Runner) -> None:
    counts = []
    losses = []
    for number in ("0", "2"):
        with before_every_call_of(SWAMLAModel, lambda *_: counts.append(len(multiprocessing.active_children()))):
            losses.append(run("--data.num_workers", number, "--training.steps", "1").series())
    assert set(counts[: len(counts) // 2]) == {0}
    assert set(counts[len(counts) // 2 :]) == {2}
    assert losses[0] == losses[1]


def packing(run: Runner) -> None:
    local = run.local(rows_jsonl="".join(json.dumps({"text": f"{'text ' * (i % 9)}{i}"}) + "\n" for i in range(99)))
    assert all((call.targets[0] != IGNORED).all() for call in run(*local).calls)
    result = run(*local, "--data.packing", "best_fit", "--training.local_batch_size", "5")
    targets = [int((call.targets != IGNORED).sum()) for call in result.calls]
    assert result.series("padding") == [pytest.approx(1 - count / (5 * 64)) for count in targets]
    assert all(0 < share < 0.2 for share in result.series("padding"))
    assert result.series("tokens") == [5 * 64, 10 * 64, 15 * 64]


def document_mask(run: Runner) -> None:
    local = run.local(rows_jsonl="".join(json.dumps({"text": f"short {i}"}) + "\n" for i in range(99)))
    off, on = run(*local), run(*local, "--data.document_mask", "true")
    assert off.text() == on.text()
    assert off.calls[0].document_ids is None
    assert on.calls[0].document_ids[0, :17].tolist() == [0] * 8 + [1] * 8 + [2]
    assert off.series()[0] != on.series()[0]


def sources(run: Runner) -> None:
    mixture = '[{name = "a", path = "%s", weight = 0.75}, {name = "b", source = "builtin", weight = 0.25}]'
    local = dict(zip(*[iter(run.local(a_txt="abc"))] * 2))
    path = local.pop("--data.path")
    text = run(
        *(part for pair in local.items() for part in pair), "--data.path", "", "--data.sources", mixture % path
    ).text()
    assert "abc|abc|" in text
    assert any(topic[:40] in text for topic in topics.values())


# [training]


def seq_len(run: Runner) -> None:
    assert {call.tokens.shape[1] for call in run().calls} == {64}
    assert {call.tokens.shape[1] for call in run("--training.seq_len", "48").calls} == {48}


def local_batch_size(run: Runner) -> None:
    for size, micro_batches in ((1, 5), (2, 3), (5, 1)):
        calls = run("--training.local_batch_size", str(size)).calls
        assert {call.tokens.shape[0] for call in calls} == {size}
        assert len(calls) == micro_batches * STEPS


def global_batch_size(run: Runner) -> None:
    for size in (5, 7):
        result = run("--training.global_batch_size", str(size))
        assert sum(int((call.targets != IGNORED).sum()) for call in result.calls) == STEPS * size * 64
        assert result.series("tokens") == [step * size * 64 for step in (1, 2, 3)]


def steps(run: Runner) -> None:
    result = run("--training.steps", "5")
    assert list(metrics(result.folder)) == [1, 2, 3, 4, 5]
    assert len(result.calls) == 5 * 3


def stages(run: Runner) -> None:
    """Each stage begins with the first step that begins with so many tokens or more."""
    result = run("--training.stages", "[{tokens = 321, seq_len = 48, global_batch_size = 3}]")
    assert [tuple(call.tokens.shape) for call in result.calls] == [(2, 64)] * 6 + [(2, 48)] * 2
    assert result.series("tokens") == [5 * 64, 10 * 64, 10 * 64 + 3 * 48]


def max_grad_norm(run: Runner) -> None:
    """After one step the first moment is 1 - beta1 of the gradient that the optimizer got."""
    for clip in (0.25, 0.0):
        result = run("--training.max_grad_norm", str(clip), "--training.steps", "1")
        found = result.series("grad_norm")[0]
        assert found > 1
        assert result.moment("exp_avg", 1).norm().item() == pytest.approx(0.1 * (clip or found), rel=1e-4)


def compute_dtype(run: Runner) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        seen = set()
        with before_every_call_of(Block, lambda module, x, *_, seen=seen: seen.add(x.dtype)):
            result = run("--training.compute_dtype", str(dtype).removeprefix("torch."))
        assert seen == {dtype}
        assert {weight.dtype for weight in result.weights().values()} == {torch.float32}


def fp32_precision(run: Runner) -> None:
    """On the CPU it has no effect, so the switch is asked for a device that this machine need not have."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    for device, wanted, expected in (
        (cuda, "ieee", "highest"),
        (cuda, "tf32", "high"),
        (cuda, "ieee", "highest"),
        (cpu, "tf32", "highest"),
    ):
        set_precision_and_determinism(Config(training=Training(fp32_precision=wanted), job=Job(seed=1)), device)
        assert torch.get_float32_matmul_precision() == expected
        assert torch.backends.cudnn.allow_tf32 == (expected == "high")


def gc_interval(run: Runner) -> None:
    found = []

    def note(phase: str, about: dict[str, int]) -> None:
        if phase == "start" and inside and not gc.isenabled():
            found.append(about["generation"])

    gc.callbacks.append(note)
    try:
        with before_every_call_of(SWAMLAModel, lambda *_: inside.append(gc.isenabled())):
            # At checkpoints but the last all objects.
            for interval, checkpoints, collections in (("2", "9", [1]), ("3", "9", [1]), ("3", "2", [2, 1])):
                inside: list[bool] = []
                found.clear()
                steps = ("--training.steps", "4", "--checkpoint.interval", checkpoints)
                run("--training.gc_interval", interval, *steps)
                assert found == collections
                assert gc.get_freeze_count() == 0  # the process may go on
                assert set(inside) == {False}
            inside = []
            run("--training.gc_interval", "0")
            assert set(inside) == {True}
    finally:
        gc.callbacks.remove(note)


# [optimizer]


def lr(run: Runner) -> None:
    assert run("--optimizer.lr", "0.25", "--training.steps", "1", "--lr_schedule.min_lr_ratio", "1").series("lr") == [
        0.25
    ]
    still, moved = run("--optimizer.lr", "0").weights(), run("--optimizer.lr", "0.25").weights()
    assert not any(torch.equal(still[name], moved[name]) for name in still)


def beta1(run: Runner) -> None:
    first, second = (run("--optimizer.beta1", beta, "--training.steps", "1") for beta in ("0.9", "0.5"))
    torch.testing.assert_close(first.moment("exp_avg", 1) * 5, second.moment("exp_avg", 1))


def beta2(run: Runner) -> None:
    first, second = (run("--optimizer.beta2", beta, "--training.steps", "1") for beta in ("0.9", "0.5"))
    torch.testing.assert_close(first.moment("exp_avg_sq", 1) * 5, second.moment("exp_avg_sq", 1))


def eps(run: Runner) -> None:
    """A huge one leaves of the step lr * gradient / eps: nothing."""
    settings = ("--optimizer.lr", "0.01", "--optimizer.weight_decay", "0")
    start = run("--optimizer.lr", "0").weights()
    usual, held = run(*settings).weights(), run(*settings, "--optimizer.eps", "1e9").weights()
    for name, weight in start.items():
        assert (held[name] - weight).abs().max() < 1e-7
    assert (usual["model.embedding.weight"] - start["model.embedding.weight"]).abs().max() > 1e-3


def weight_decay(run: Runner) -> None:
    one = ("--training.steps", "1", "--lr_schedule.min_lr_ratio", "1", "--optimizer.lr")
    start = run(*one, "0").weights(1)
    without, with_decay = (run(*one, "0.01", "--optimizer.weight_decay", value).weights(1) for value in ("0", "10"))
    assert {weight.ndim for weight in start.values()} == {1, 2}
    for name, weight in start.items():
        expected = -0.01 * 10 * weight if weight.ndim == 2 and "blocks." in name else torch.zeros_like(weight)
        torch.testing.assert_close(with_decay[name] - without[name], expected, rtol=1e-3, atol=1e-7)


# [lr_schedule]


def learning_rates(run: Runner, *overrides: str) -> Any:
    return pytest.approx(run("--optimizer.lr", "1e-3", *overrides).series("lr"), rel=1e-6)


def schedule_name(run: Runner) -> None:
    common = ("--training.steps", "4", "--lr_schedule.min_lr_ratio", "0", "--lr_schedule.name")
    assert learning_rates(run, *common, "linear") == [0.75e-3, 0.5e-3, 0.25e-3, 0]
    cosine = [0.5e-3 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3, 4)]
    assert run("--optimizer.lr", "1e-3", *common, "cosine").series("lr") == pytest.approx(cosine, abs=1e-12)
    assert learning_rates(run, *common, "wsd") == [1e-3, 1e-3, 1e-3, 0]


def warmup_steps(run: Runner) -> None:
    flat = ("--lr_schedule.min_lr_ratio", "1", "--training.steps", "5")
    assert learning_rates(run, *flat, "--lr_schedule.warmup_steps", "4") == [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3]


def decay_steps(run: Runner) -> None:
    wsd = ("--lr_schedule.name", "wsd", "--training.steps", "4", "--lr_schedule.min_lr_ratio", "0")
    assert learning_rates(run, *wsd, "--lr_schedule.decay_steps", "2") == [1e-3, 1e-3, 0.5e-3, 0]


def min_lr_ratio(run: Runner) -> None:
    assert run("--optimizer.lr", "1e-3", "--lr_schedule.min_lr_ratio", "0.3").series("lr")[-1] == pytest.approx(0.3e-3)


# [validation]


def validation_interval(run: Runner) -> None:
    for interval, expected in (("0", []), ("1", [1, 2, 3]), ("2", [2, 3])):
        result = run("--validation.interval", interval)
        assert list(metrics(result.folder, "val_loss")) == expected
        assert bool(result.validation_calls) == bool(expected)


def validation_path(run: Runner) -> None:
    text = run.folder / "held-out.txt"
    text.write_text("validated on this")
    settings = ("--validation.interval", "3")
    with_path = run(*settings, "--validation.path", str(text))
    assert as_text(with_path.validation_calls).startswith("validated on this|")
    # Nothing is held out of the training data then.
    assert with_path.text() == run("--validation.fraction", "0").text()
    assert "validated" not in as_text(run(*settings).validation_calls)


def validation_fraction(run: Runner) -> None:
    local = run.local(rows_jsonl="".join(json.dumps({"text": f"{i:03}"}) + "\n" for i in range(40)))
    for fraction, number in (("0.1", 4), ("0.5", 20)):
        result = run(*local, "--validation.interval", "3", "--validation.fraction", fraction)
        documents = set(as_text(result.validation_calls).split("|")) - {""}
        trained = set(result.text().split("|")[:-1])  # the last one is cut
        assert len(documents) == number
        assert trained == {f"{i:03}" for i in range(40)} - documents


def max_tokens(run: Runner) -> None:
    for number in (100, 333):
        calls = run("--validation.interval", "3", "--validation.max_tokens", str(number)).validation_calls
        assert sum(int((call.targets != IGNORED).sum()) for call in calls) == number


def tasks(run: Runner) -> None:
    assert "generates text" in run.with_harness(run.refusal, "--validation.tasks", "writes")
    assert run.with_harness(run, "--validation.tasks", "mean").series("mean/count") == [3]
    assert run.with_harness(run).series("mean/count") == []


def tasks_interval(run: Runner) -> None:
    for interval, count in (("1", 3), ("2", 2), ("9", 1)):
        settings = ("--validation.tasks", "mean", "--validation.tasks_interval", interval)
        assert len(run.with_harness(run, *settings).series("mean/mean")) == count


def tasks_limit(run: Runner) -> None:
    limited = run.with_harness(run, "--validation.tasks", "mean", "--validation.tasks_limit", "2")
    assert limited.series("mean/count") == [2]


# [metrics]


def log_interval(run: Runner) -> None:
    result = run("--metrics.log_interval", "3", "--training.steps", "7")
    assert list(metrics(result.folder)) == [1, 3, 6, 7]  # and always the first and the last


def tensorboard(run: Runner) -> None:
    assert run().files("tensorboard/*") == []
    assert len(run("--metrics.tensorboard", "true").files("tensorboard/events.*")) == 1


def wandb(run: Runner) -> None:
    run()
    assert run.wandb.inits == []
    run("--metrics.wandb", "true")
    assert [step for step, _ in run.wandb.logged] == [1, 2, 3]


def wandb_project(run: Runner) -> None:
    run("--metrics.wandb", "true", "--metrics.wandb_project", "someone's")
    assert run.wandb.inits[0]["project"] == "someone's"


def progress_bar(run: Runner) -> None:
    for wanted in ("true", "false"):
        with terminal() as (stderr, read), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", stderr)
            run("--metrics.progress_bar", wanted)
            assert ("/3 [" in read()) == (wanted == "true")


def batch_digests(run: Runner) -> None:
    assert "batch_digests.jsonl" not in run().files("*.jsonl")
    result = run("--metrics.batch_digests", "true")
    lines = [json.loads(line) for line in (result.folder / "batch_digests.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert len({line["digest"] for line in lines}) == 3


# [profiling]


def optimizer_steps(run: Run, name: str) -> int:
    events = json.loads((run.folder / "traces" / name).read_text())["traceEvents"]
    return sum(event.get("name") == "Optimizer.step#GroupedOptimizer.step" for event in events)


def profiling_enabled(run: Runner) -> None:
    assert run().files("traces/*") == []
    result = run("--profiling.enabled", "true", "--profiling.start_step", "1", "--profiling.num_steps", "1")
    assert result.files("traces/*") == ["traces/steps-1-1.json"]
    assert optimizer_steps(result, "steps-1-1.json") == 1


def start_step(run: Runner) -> None:
    result = run("--profiling.enabled", "true", "--profiling.start_step", "2", "--profiling.num_steps", "1")
    assert result.files("traces/*") == ["traces/steps-2-2.json"]


def num_steps(run: Runner) -> None:
    result = run("--profiling.enabled", "true", "--profiling.start_step", "1", "--profiling.num_steps", "2")
    assert result.files("traces/*") == ["traces/steps-1-2.json"]
    assert optimizer_steps(result, "steps-1-2.json") == 2


# [fault_tolerance], each with steps that go wrong; what becomes of those: tests/train/test_bad_steps.py


def skip_bad_steps(run: Runner) -> None:
    nan = (Fault(2, "nan loss"),)
    assert list(metrics(run.with_faults(nan, 0), "skipped_steps").values()) == [0, 1, 1]
    folder = run.with_faults(nan, 1, "--fault_tolerance.skip_bad_steps", "false")
    assert metrics(folder, "skipped_steps") == {}
    contradiction = run.refusal("--fault_tolerance.skip_bad_steps", "false", "--fault_tolerance.spike_sigma", "6")
    assert "6.0 has no effect with fault_tolerance.skip_bad_steps = false" in contradiction


def max_bad_steps(run: Runner) -> None:
    nan = (Fault(1, "nan loss"), Fault(2, "nan loss"))
    for number, code in (("1", 1), ("2", 1), ("3", 0)):
        folder = run.with_faults(nan, code, "--fault_tolerance.max_bad_steps", number)
        assert max(metrics(folder)) == (3 if code == 0 else int(number))
    assert "expected a whole number >= 1" in run.refusal("--fault_tolerance.max_bad_steps", "0")


def spike_sigma(run: Runner) -> None:
    for sigma, skipped in (("0", 0), ("100", 1), ("1e30", 0)):
        window = ("--fault_tolerance.spike_window", "2") if sigma != "0" else ()
        settings = (*window, "--fault_tolerance.spike_sigma", sigma)
        assert metrics(run.with_faults((Fault(3, "spike"),), 0, *settings), "skipped_steps")[3] == skipped


def spike_window(run: Runner) -> None:
    for window, skipped in (("2", 1), ("3", 0)):  # only two good steps are known
        settings = ("--fault_tolerance.spike_window", window, "--fault_tolerance.spike_sigma", "100")
        assert metrics(run.with_faults((Fault(3, "spike"),), 0, *settings), "skipped_steps")[3] == skipped


CASES: dict[str, Callable[[Runner], None]] = {
    "job.dump_folder": dump_folder,
    "job.seed": seed,
    "job.deterministic": deterministic,
    "data.source": source,
    "data.path": path,
    "data.name": name,
    "data.split": split,
    "data.revision": revision,
    "data.text_key": text_key,
    "data.text_separator": text_separator,
    "data.max_document_mib": max_document_mib,
    "data.tokenizer": tokenizer,
    "data.streams": streams,
    "data.shuffle_documents": shuffle_documents,
    "data.num_workers": num_workers,
    "data.sources": sources,
    "data.packing": packing,
    "data.document_mask": document_mask,
    "training.seq_len": seq_len,
    "training.local_batch_size": local_batch_size,
    "training.global_batch_size": global_batch_size,
    "training.steps": steps,
    "training.max_grad_norm": max_grad_norm,
    "training.compute_dtype": compute_dtype,
    "training.fp32_precision": fp32_precision,
    "training.gc_interval": gc_interval,
    "training.stages": stages,
    "optimizer.lr": lr,
    "optimizer.beta1": beta1,
    "optimizer.beta2": beta2,
    "optimizer.eps": eps,
    "optimizer.weight_decay": weight_decay,
    "lr_schedule.name": schedule_name,
    "lr_schedule.warmup_steps": warmup_steps,
    "lr_schedule.decay_steps": decay_steps,
    "lr_schedule.min_lr_ratio": min_lr_ratio,
    **OPTIMIZER_CASES,
    **PARALLEL_CASES,
    **BLOCK_CASES,
    **FLOAT8_CASES,
    **CHECKPOINT_CASES,
    "validation.interval": validation_interval,
    "validation.path": validation_path,
    "validation.fraction": validation_fraction,
    "validation.max_tokens": max_tokens,
    "validation.tasks": tasks,
    "validation.tasks_interval": tasks_interval,
    "validation.tasks_limit": tasks_limit,
    "metrics.log_interval": log_interval,
    "metrics.tensorboard": tensorboard,
    "metrics.wandb": wandb,
    "metrics.wandb_project": wandb_project,
    "metrics.progress_bar": progress_bar,
    "metrics.batch_digests": batch_digests,
    "profiling.enabled": profiling_enabled,
    "profiling.start_step": start_step,
    "profiling.num_steps": num_steps,
    "fault_tolerance.skip_bad_steps": skip_bad_steps,
    "fault_tolerance.max_bad_steps": max_bad_steps,
    "fault_tolerance.spike_sigma": spike_sigma,
    "fault_tolerance.spike_window": spike_window,
    **FAULT_CASES,
}


@pytest.mark.parametrize("key", CASES)
def test_the_key_changes_what_it_says(key, run):
    CASES[key](run)


def test_every_key_has_a_case():
    assert {name for name in KEYS if not name.startswith("model.")} == CASES.keys()


def test_the_same_run_twice_gives_the_same_losses(run):
    """Without this a difference between two runs would show nothing."""
    one, other = run(), run()
    assert one.series() == other.series()
    assert one.text() == other.text()
    assert all(later != earlier for earlier, later in pairwise(one.series()))
