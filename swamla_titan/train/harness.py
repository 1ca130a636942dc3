"""Tasks of lm-evaluation-harness, on a model that all ranks compute.

Rank 0 reads the tasks and their documents, and leads: it sends what the harness asks of the model to the other ranks,
which compute their share. This module needs the package lm_eval, see `require_harness` (validation.py).
"""

import contextlib
import difflib
import io
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from swamla_titan.data import Tokenizer
from swamla_titan.distributed.mesh import World, all_gather_dict, broadcast_from_rank_0
from swamla_titan.errors import RunFailed, UserError
from swamla_titan.train.policy import Values
from swamla_titan.train.scoring import Request, Scorer

logger = logging.getLogger(__name__)

_FEW_SHOT_SEED = 1234  # the harness's own default
_MOST_NEW_TOKENS = 256  # likewise, where a task does not say
Result = TypeVar("Result")


class Prompt(NamedTuple):
    """A text to continue: its tokens, and how, up to the first of the `stop` strings."""

    tokens: list[int]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop: tuple[str, ...]


Generate = Callable[[Sequence[Prompt]], list[str]]


class HarnessModel(TemplateLM):
    """The harness's view of a model; rank 0 has it. `call` computes requests or prompts on all ranks."""

    def __init__(self, tokenizer: Tokenizer, longest: int, call: Callable[[Any], Any]) -> None:
        """`longest`: tokens of a prompt together with what is generated."""
        super().__init__()
        self._tokens, self._longest, self._call = tokenizer, longest, call

    @property
    def eot_token_id(self) -> int:
        """Stands before a text without context, as in training."""
        return self._tokens.eot_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """The tokens of a text; there are no special ones to add."""
        return self._tokens.encode(string)

    def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = self._call([Request(context, text) for _, context, text in requests])
        return [(each[0], each[1]) for each in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, each after the end of another."""
        texts = [self._tokens.encode(request.args[0]) for request in requests]
        return [each[0] for each in self._call([Request([self.eot_token_id], text) for text in texts])]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each up to the first of its task's strings that end it."""
        found: list[str] = self._call([self._prompt(*request.args) for request in requests])
        return found

    def _prompt(self, context: str, options: dict[str, Any]) -> Prompt:
        most = min(int(options.get("max_gen_toks", _MOST_NEW_TOKENS)), self._longest - 1)
        # The last new token is never read. A context that is too long loses its beginning.
        tokens = self._tokens.encode(context)[-(self._longest - most + 1) :] or [self.eot_token_id]
        temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
        ends = options.get("until") or ()
        stop = tuple(filter(None, [ends] if isinstance(ends, str) else ends))
        return Prompt(tokens, most, temperature, int(options.get("top_k", 0)), float(options.get("top_p", 1.0)), stop)


class Tasks:
    """Tasks, loaded once; rank 0 alone holds them. All ranks call each method."""

    def __init__(self, names: Sequence[str], world: World, generates: bool) -> None:
        """Raises UserError for tasks that there are not, or whose data cannot be had; `generates`: see `run`."""
        self.world = world
        self._loaded: dict[str, Any] = {}
        broadcast_from_rank_0(world, lambda: self._loaded.update(_load(names, generates)))

    def run(
        self,
        tokenizer: Tokenizer,
        scorer: Scorer,
        generate: Generate | None,
        longest: int,
        limit: int,
        bootstraps: int = 0,
    ) -> Values:
        """The metrics of all tasks, as TASK/METRIC; empty on ranks but 0.

        `generate`: continues prompts, which ranks share; None: no task does. `limit`: documents of each task, 0: all.
        Standard errors are by so many `bootstraps`. What the harness raises becomes a RunFailed, on all ranks.
        """

        def work(asked: list[Any]) -> list[Any]:
            if generate is None or not isinstance(asked[0], Prompt):
                return scorer(asked)
            own = range(self.world.rank, len(asked), self.world.size)
            texts = generate([asked[index] for index in own])
            found = all_gather_dict(self.world, dict(zip(own, texts)))
            return [found[index] for index in range(len(asked))]

        def lead(call: Callable[[list[Any]], list[Any]]) -> Values:
            model = HarnessModel(tokenizer, longest, lambda asked: call(asked) if asked else [])
            with _quiet(), _random_states_kept():
                results = evaluate(
                    lm=model,
                    task_dict=self._loaded,
                    limit=limit or None,
                    bootstrap_iters=bootstraps,
                    log_samples=False,
                )
            return _values(results)

        return led_by_rank_0(self.world, lead, work) or {}


def led_by_rank_0(
    world: World, lead: Callable[[Callable[[Any], Any]], Result], work: Callable[[Any], Any]
) -> Result | None:
    """`lead(call)` on rank 0, where `call(asked)` is `work(asked)` on all ranks; None on the others.

    What `lead` itself raises becomes a RunFailed on all ranks; what `work` raises stays what it is, on the rank that
    raised it.
    """
    if not world.is_rank_0:
        while (asked := broadcast_from_rank_0(world, lambda: None)) is not None:
            work(asked)
        return None
    raised: list[BaseException] = []

    def call(asked: Any) -> Any:
        shared = broadcast_from_rank_0(world, lambda: asked)
        try:
            return work(shared)
        except BaseException as error:
            raised.append(error)
            raise

    try:
        result = lead(call)
    except Exception as error:
        if raised:
            raise raised[0] from None
        failure = RunFailed(f"the tasks could not be evaluated ({type(error).__name__}: {error})")
        return broadcast_from_rank_0(world, lambda: _raise(failure))
    broadcast_from_rank_0(world, lambda: None)
    return result


def _raise(error: RunFailed) -> Any:
    raise error


def _load(names: Sequence[str], generates: bool) -> dict[str, Any]:
    """What the harness calls a TaskDict, of names that it knows and of paths of YAML files."""
    try:
        with _quiet():
            # To read all that the package has takes seconds.
            manager = TaskManager(include_defaults=not all(name.endswith((".yaml", ".yml")) for name in names))
            unknown = [name for name in names if not name.endswith((".yaml", ".yml")) and name not in manager.all_tasks]
            if unknown:
                near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                raise UserError(f"lm-evaluation-harness has no task {unknown[0][:80]!r}{hint}")
            loaded = manager.load(list(names))
    except UserError:
        raise
    except Exception as error:  # whatever a file, a hub or the harness raises
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"the tasks {', '.join(names)} cannot be loaded ({type(error).__name__}: {reason})") from None
    for name, task in loaded["tasks"].items():
        if task.get_config("output_type") == "generate_until" and not generates:
            raise UserError(
                f"the task {name} generates text, which a run does not do: give it to `swamla-titan evaluate` instead"
            )
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEW_SHOT_SEED)
    return dict(loaded)


def _values(results: Any) -> Values:
    """TASK/METRIC -> value, of tasks and groups; a filter that is not the plain one follows the metric."""
    found: Values = {}
    for task, metrics in itertools.chain(results["results"].items(), (results.get("groups") or {}).items()):
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if isinstance(value, int | float) and not isinstance(value, bool) and kind:
                found[f"{task}/{metric}" + ("" if kind == "none" else f"/{kind}")] = float(value)
    return found


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Seeds Python's and numpy's generators as the harness does by itself, and puts their states back."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(_FEW_SHOT_SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs a dozen lines a task, of which warnings remain, and shows bars of its progress."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(before)
