"""A package `lm_eval` of one task, for machines without it: what harness.py calls of the real one.

The task asks for the log-likelihoods of some continuations, and its metric is their mean.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

PROMPTS = [("The", {"max_gen_toks": 9}), ("A longer prompt", {"max_gen_toks": 9}), ("x", {"max_gen_toks": 3})]
WRITTEN: list[str] = []  # what was generated last
TEXTS = [("The quick", " brown fox"), ("", "once"), ("a" * 70, "b" * 5)]


class TemplateLM:
    """As the harness has it, so far as it is used."""

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1


class Task:
    """One that can be asked for its kind."""

    def __init__(self, kind: str) -> None:
        self.settings = {"output_type": kind}

    def get_config(self, key: str) -> Any:
        return self.settings.get(key)

    def set_config(self, key: str, value: Any) -> None:
        self.settings[key] = value

    def set_fewshot_seed(self, seed: int) -> None:
        self.settings["seed"] = seed


class TaskManager:
    """Knows the tasks `mean`, `fails` and `writes`."""

    all_tasks = ("mean", "fails", "writes")

    def __init__(self, include_defaults: bool) -> None:
        pass

    def load(self, names: list[str]) -> dict[str, Any]:
        return {"tasks": {name: Task("generate_until" if name == "writes" else "loglikelihood") for name in names}}


def evaluate(lm: Any, task_dict: Any, limit: int | None, bootstrap_iters: int, log_samples: bool) -> dict[str, Any]:
    """The results of the tasks, as the harness names them."""
    if "fails" in task_dict["tasks"]:
        raise KeyError("no such metric")
    if "writes" in task_dict["tasks"]:
        WRITTEN[:] = lm.generate_until([SimpleNamespace(args=each) for each in PROMPTS])
        return {"results": {"writes": {"alias": "writes", "count,none": len(WRITTEN)}}}
    asked = [
        ((context, text), list(context.encode()) or [lm.eot_token_id], list(text.encode()))
        for context, text in TEXTS[:limit]
    ]
    found = [score for score, _ in lm._loglikelihood_tokens(asked)]
    return {"results": {"mean": {"alias": "mean", "mean,none": sum(found) / len(found), "count,none": len(found)}}}


@contextmanager
def stub() -> Iterator[None]:
    """In place of the package, installed or not."""
    modules = {
        "lm_eval": ModuleType("lm_eval"),
        "lm_eval.api": ModuleType("lm_eval.api"),
        "lm_eval.api.model": SimpleNamespace(TemplateLM=TemplateLM),
        "lm_eval.evaluator": SimpleNamespace(evaluate=evaluate),
        "lm_eval.tasks": SimpleNamespace(TaskManager=TaskManager),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "swamla_titan.train.harness", raising=False)
        yield
        sys.modules.pop("swamla_titan.train.harness", None)
