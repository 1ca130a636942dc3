"""validation.tasks: lm-evaluation-harness in the loop; the tests of the real package need it installed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from swamla_titan.cli import main
from swamla_titan.data.tokenizer import ByteTokenizer
from tests.distributed.job import run as run_rank
from tests.distributed.ranks import on_ranks
from tests.tiny_config import tiny_config
from tests.train.harness_stub import stub
from tests.train.runs import assert_same_checkpoint, checkpoint, metrics, train

QUICK = ("--data.num_workers", "0", "--lr_schedule.warmup_steps", "0", "--validation.interval", "0")
STEPS = ("--training.steps", "3", "--validation.tasks_interval", "2")


def test_tasks_are_logged_at_their_interval_and_change_nothing(tiny, tmp_path, capsys):
    ema = ("--ema.decay", "0.9")
    assert train(tiny, *QUICK, *ema, "--training.steps", "3", "--job.dump_folder", str(tmp_path / "without")) == 0
    with stub():
        assert train(tiny, *QUICK, *ema, *STEPS, "--validation.tasks", "mean", "--metrics.tensorboard", "true") == 0
    assert_same_checkpoint(checkpoint(tmp_path / "run", 3), checkpoint(tmp_path / "without", 3))
    values = metrics(tmp_path / "run", "mean/mean")
    assert list(values) == [2, 3]
    assert f"validation: mean/mean {values[2]:.4f}" in "".join(capsys.readouterr())
    assert any(b"mean/mean" in path.read_bytes() for path in (tmp_path / "run" / "tensorboard").iterdir())
    with stub():
        output = str(tmp_path / "results.json")
        assert main(["evaluate", str(tmp_path / "run"), "--tasks", "mean", "--output", output]) == 0
    assert json.loads(Path(output).read_text())["tasks"]["mean/mean"] == pytest.approx(values[3], 1e-5)


def test_what_a_run_cannot_do_is_refused_before_it_writes(tiny, tmp_path, capsys):
    for tasks, words in (
        ("writes", "the task writes generates text"),
        ("men", "has no task 'men'; did you mean mean?"),
    ):
        with stub():
            assert train(tiny, *QUICK, *STEPS, "--validation.tasks", tasks) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_a_task_that_fails_does_not_end_the_run(tiny, tmp_path, capsys):
    with stub():
        assert train(tiny, *QUICK, *STEPS, "--validation.tasks", "fails") == 0
    assert "the tasks could not be evaluated (KeyError" in "".join(capsys.readouterr())
    assert metrics(tmp_path / "run", "mean/mean") == {}


def test_what_a_task_asks_of_generated_text():
    with stub():
        from swamla_titan.train.harness import HarnessModel

        asked = []
        model = HarnessModel(ByteTokenizer(), 20, lambda prompts: asked.extend(prompts) or ["one"] * len(prompts))
        greedy = {"until": [";", ". ", ""], "max_gen_toks": 6, "temperature": 0.7}
        sampled = {"until": "three", "do_sample": True, "temperature": 0.7, "top_p": 0.9}
        requests = [("x" * 30 + "end", greedy), ("", {}), ("a", sampled)]
        assert model.generate_until([SimpleNamespace(args=each) for each in requests]) == ["one"] * 3
    assert asked[0] == (list(b"x" * 12 + b"end"), 6, 0.0, 0, 1.0, (";", ". "))  # 15 tokens and 5 of the 6 new are read
    assert asked[1] == ([256], 19, 0.0, 0, 1.0, ())
    assert asked[2] == (list(b"a"), 19, 0.7, 0, 0.9, ("three",))


def trained(config: str, *overrides: str) -> int:
    with stub():
        return run_rank(config, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [("--parallel.tensor", "2"), ("--parallel.pipeline", "2"), ()])
def test_all_ranks_score_tasks(tmp_path, plan):
    config = tiny_config(tmp_path)
    shared = (*QUICK, *STEPS, "--model.dropout", "0", "--validation.tasks", "mean")
    with stub():
        assert train(config, *shared, "--job.dump_folder", str(tmp_path / "one")) == 0
    assert on_ranks(2, trained, str(config), *shared, *plan) == [0, 0]
    found, expected = (metrics(tmp_path / name, "mean/mean") for name in ("run", "one"))
    assert found == pytest.approx(expected, 1e-4)


# By the real package.


def write_tasks(folder: Path) -> dict[str, str]:
    """Tasks that need no network, by name: paths of YAML files, over documents of our own."""
    documents = [
        {
            "text": f"Number {i} follows number {i - 1}.",
            "choices": [*[" yes", " no way"][: 1 + i % 2], " zzz"],
            "gold": 0,
        }
        for i in range(7)
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    common = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {}\ntest_split: test\n"
    kinds = {
        "choices": 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\nmetric_list:\n'
        "  - metric: acc\n",
        "rolling": 'output_type: loglikelihood_rolling\ndoc_to_target: "{{text}}"\nmetric_list:\n'
        "  - metric: bits_per_byte\n",
        "writing": 'output_type: generate_until\ndoc_to_target: "{{text}}"\nmetric_list:\n  - metric: exact_match\n'
        'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 5\n',
    }
    paths = {}
    for name, content in kinds.items():
        prompt = '""' if name == "rolling" else '"{{text}}"'
        paths[name] = str(folder / f"{name}.yaml")
        head = common.format(folder / "documents.jsonl")
        Path(paths[name]).write_text(f"task: {name}\n{head}doc_to_text: {prompt}\n{content}")
    return paths


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "tasks").mkdir()
    return write_tasks(tmp_path / "tasks")


@pytest.mark.slow
def test_the_real_harness_scores_a_run_and_its_checkpoint_alike(tiny, tmp_path, tasks):
    assert train(tiny, *QUICK, *STEPS, "--validation.tasks", f"{tasks['choices']}, {tasks['rolling']}") == 0
    output = str(tmp_path / "results.json")
    assert main(["evaluate", str(tmp_path / "run"), "--tasks", *tasks.values(), "--output", output]) == 0
    found = json.loads(Path(output).read_text())["tasks"]
    for name in ("choices/acc", "rolling/bits_per_byte"):
        assert metrics(tmp_path / "run", name)[3] == pytest.approx(found[name], 1e-5)
    assert found["writing/exact_match"] == 0
    assert 7 < found["rolling/bits_per_byte"] < 9  # hardly trained


@pytest.mark.slow
def test_the_real_harness_refuses_to_generate_in_a_run(tiny, tmp_path, tasks, capsys):
    assert train(tiny, *QUICK, *STEPS, "--validation.tasks", tasks["writing"]) == 2
    assert "the task writing generates text" in capsys.readouterr().err
