"""Sets up a run: resolves and validates everything once, before the model is built and anything is written.

Errors of configuration, machine, data and checkpoint are raised here, in the order of `set_up`. Elsewhere are only
those of processes and devices (launch/process_group.py), the lock of the dump folder, and what a write there, a login
at W&B or a full GPU shows. The phases can be called alone:

    set_up_machine  precision and determinism, and whether this machine can do what is configured: VALIDATIONS
    set_up_inputs   the checkpoint to resume from, the data as it recorded them, "auto", the micro-batch, validation
    set_up_resume   the fingerprint of the run, and the train state that it continues from

Rank 0 does what only one rank may do, and broadcasts the result. If one rank fails, all raise its error.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from swamla_titan.checkpoint.dump_folder import prepare_folder, validate_exclusive, validate_folder
from swamla_titan.checkpoint.initial_load import InitialLoad, find_initial_load
from swamla_titan.checkpoint.manifest import ANNEX_RECORD, CONFIG, DATA, VOCABULARY
from swamla_titan.checkpoint.records import (
    AnnexRecord,
    TrainState,
    compressed_vocabulary,
    data_record,
    validation_record,
)
from swamla_titan.checkpoint.resume import Origin, find_origin, require_same_data, run_fingerprint
from swamla_titan.checkpoint.store import Checkpoints, DamagedCheckpoints
from swamla_titan.config import Config, to_toml, with_vocabulary
from swamla_titan.config.mixture import weights_of
from swamla_titan.config.rules import retry_seconds
from swamla_titan.config.schedule import Position, Schedule, TrainingStage
from swamla_titan.data import (
    HELD_OUT_TEXT,
    BatchLoader,
    Mixture,
    TrainingData,
    ValidationSet,
    ValidationText,
    load_tokenizer,
    open_corpus,
    open_mixture,
    pack,
    pinned,
    prepare_workers,
    shapes_of,
    validation_text,
    weights_by_stage,
    with_segments,
)
from swamla_titan.distributed.mesh import World, all_ranks_or_raise, broadcast_from_rank_0
from swamla_titan.errors import Damaged, UserError
from swamla_titan.model.annexes import annexes_of
from swamla_titan.optim import validate_optimizer_device
from swamla_titan.parallel.activation_checkpoint import validate_recomputation
from swamla_titan.parallel.compile import validate_cache_folder, warm_compiler
from swamla_titan.parallel.float8 import resolve_auto, validate_float8
from swamla_titan.parallel.kernels import validate_attention, validate_elementwise
from swamla_titan.parallel.row_tables import validate_host_memory
from swamla_titan.system.machine import allow_open_files, needed
from swamla_titan.train.logging import require_wandb
from swamla_titan.train.precision import set_precision_and_determinism
from swamla_titan.train.step import GROUPS, RunState, micro_batch_size_of
from swamla_titan.train.validation import MixtureValidator, TaskValidator, Validation, Validator, require_harness

Result = TypeVar("Result")
Opened = Callable[[Origin | TrainingData], object]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run: a checkpoint and data, both opened."""

    config: Config  # with the tokenizer's vocabulary, and without "auto"
    choices: list[str]  # how "auto" was resolved, and why
    world: World
    checkpoints: Checkpoints
    origin: Origin  # the checkpoint to resume from, if there is one
    corpus: TrainingData
    validation_texts: dict[str, ValidationText]  # of each source of a mixture, else under ""
    validations: list[Validation]
    validation: dict[str, Any] | None  # see validation_record
    annex_record: AnnexRecord | None  # None: the model has no annexes
    initial: InitialLoad | None  # what a new run begins with in place of drawn weights


@dataclass(frozen=True)
class Setup(Inputs):
    """Everything that a run is made of, except its model and its outputs."""

    fingerprint: dict[str, Any]  # what must be equal for a checkpoint to be resumed
    files: dict[str, bytes]  # by name, of each checkpoint, so that it can be used elsewhere
    train_state: TrainState  # where the run stands
    schedule: Schedule  # from there on

    @property
    def stage(self) -> TrainingStage:
        """The stage of the next step."""
        return self.schedule.stage(self.train_state.step + 1)

    def open_loader(self, num_workers: int | None = None) -> BatchLoader:
        """The batches of this rank, from the run's position on; `num_workers` None: as configured."""
        with self.checkpoints.loading(self.origin.path):
            return all_ranks_or_raise(
                self.world,
                lambda: BatchLoader(
                    self.corpus,
                    shapes_of(self.schedule),
                    rank=self.world.data_rank,
                    world_size=self.world.degrees.data,
                    num_workers=num_workers,
                    cursors=self.train_state.cursors or None,
                    excluded=self.train_state.excluded,
                    first=self.train_state.sequences,
                ),
            )

    def prepare_folder(self) -> None:
        """Make the dump folder, with the resolved configuration and held-out text; UserError if that is impossible."""
        folder = Path(self.config.job.dump_folder)
        prepare_folder(folder, to_toml(self.config))
        for name, text in self.validation_texts.items():
            text.keep(_held_out_file(folder, name))

    def build_state(self) -> RunState:
        """Build model, optimizers and other state that training changes, and load the checkpoint if there is one."""
        with self.checkpoints.loading(self.origin.path):
            state = RunState(self.config, self.world, self.origin.path, self.train_state.step, self.initial)
        if self.annex_record:
            for part in state.model.parts:
                part.annexes.use(self.annex_record.vocabulary.ids, self.annex_record.vocabulary.size)
        return state


# Validations before the data are opened, in this order, by the subjects of `check`.
VALIDATIONS: dict[str, Callable[[Config, World], object]] = {
    "files": lambda config, world: validate_open_files(config),
    "compile": lambda config, world: validate_cache_folder(config.compile),
    "attention": validate_attention,
    "elementwise": validate_elementwise,
    "matmuls": lambda config, world: validate_float8(config, world.device, world.degrees),
    "recompute": lambda config, world: validate_recomputation(config, world.device),
    "optimizer": lambda config, world: validate_optimizer_device(config.optimizer, world.device),
    "tables": validate_host_memory,
    "metrics": lambda config, world: config.metrics.wandb and require_wandb(),
    "tasks": lambda config, world: config.validation.tasks and require_harness("validation.tasks"),
    "folder": lambda config, world: validate_folder(Path(config.job.dump_folder)),
}


def validate_open_files(config: Config) -> None:
    """Raise this process's limit of open files; UserError if it may not open as many as a run needs."""
    with needed("the run cannot be started"):
        allow_open_files(config.data.num_workers)


def validate(config: Config, world: World) -> None:
    """Raise UserError if this machine, or this number of ranks, cannot run the configuration."""
    for validation in VALIDATIONS.values():
        validation(config, world)


def set_up(config: Config, world: World, damaged: dict[Path, str] | None = None) -> Setup:
    """Set up a run, in all phases; all ranks call this.

    `damaged`: see `from_newest_intact`. Raises UserError, on every rank, for anything wrong with configuration,
    machine, tokenizer, data or checkpoint, and DamagedCheckpoints where an older one may be intact.
    """
    set_up_machine(config, world)
    return set_up_resume(set_up_inputs(config, world, damaged))


def rehearse(config: Config, world: World) -> Setup:
    """Raise the errors that `train` would, in its order, without starting a process or writing anything."""
    validate_open_files(config)
    validate_exclusive(Path(config.job.dump_folder))
    validate(config, world)
    return rehearse_inputs(config, world)


def rehearse_inputs(config: Config, world: World, opened: Opened = lambda result: None) -> Setup:
    """The part of `rehearse` after the validation of this machine; `opened`: see `set_up_inputs`."""

    def resumed(damaged: dict[Path, str]) -> Setup:
        setup = set_up_resume(set_up_inputs(config, world, damaged, opened))
        setup.open_loader(num_workers=0).close()
        return setup

    return from_newest_intact(resumed)


def set_up_machine(config: Config, world: World) -> None:
    """Set precision and determinism, validate this machine, and start helper processes."""
    set_precision_and_determinism(config, world.device, world.rank)
    # The compiler's processes start first, because they are needed first; they end with this process in any case.
    all_ranks_or_raise(world, lambda: warm_compiler(config.compile, world.device))
    all_ranks_or_raise(world, lambda: validate(config, world))
    all_ranks_or_raise(world, lambda: prepare_workers(config.data.num_workers))


def set_up_inputs(
    config: Config, world: World, damaged: dict[Path, str] | None = None, opened: Opened = lambda result: None
) -> Inputs:
    """Find the checkpoint to resume from, open the data as it recorded them, and resolve "auto" for the device.

    `opened` is called with the checkpoint and with the data, each as soon as it is found.
    """
    checkpoints = Checkpoints(
        Path(config.job.dump_folder) / "checkpoints",
        config.checkpoint.keep_latest,
        world.with_new_host_group(),
        config.checkpoint.keep_every,
        damaged,
        GROUPS,
    )
    origin, initial = find_origin(checkpoints), None
    if origin.path is None:
        found = find_initial_load(config, world, GROUPS)
        origin, initial = (found, None) if isinstance(found, Origin) else (origin, found)
    opened(origin)
    config = dataclasses.replace(config, data=broadcast_from_rank_0(world, lambda: pinned(config.data)))
    with checkpoints.loading(origin.path):
        config, corpus = all_ranks_or_raise(world, lambda: open_data(config, origin.data))
        texts = broadcast_from_rank_0(world, lambda: _validation_texts(config, corpus))
    opened(corpus)
    require_same_data(world, corpus)
    segments = broadcast_from_rank_0(world, lambda: [each.segments for each in corpus.corpora])
    corpus = with_segments(corpus, segments)
    # "auto" is resolved after the tokenizer, because the head's share of the operations depends on the vocabulary.
    config, choices = resolve_auto(config, world, initial.optimizer if initial else origin.optimizer)
    all_ranks_or_raise(world, lambda: validate_optimizer_device(config.optimizer, world.device))
    longest = Schedule.of(config).longest  # in which validation computes, so that its losses are one curve
    size, seq_len, mask = micro_batch_size_of(longest, world), longest.training.seq_len, config.data.document_mask
    held_out = {name: pack(text.tokens, seq_len, corpus.tokenizer, mask) for name, text in texts.items()}
    validation = validation_record(origin.data, _fingerprint(config, held_out))
    validations = all_ranks_or_raise(world, lambda: _on_held_out(config, world, held_out, size, validation))
    if config.validation.tasks:
        validations.append(TaskValidator(longest.config, world, corpus.tokenizer, size))
    record = None
    if annexes_of(config.model):
        # Rank 0 decides, because other versions of Python have other Unicode tables.
        before = initial.annex_record if initial else origin.annex_record
        ids = broadcast_from_rank_0(world, lambda: compressed_vocabulary(corpus.tokenizer, before))
        record = AnnexRecord.of(config.model, ids)
    require_fit = initial.require_fit if initial else lambda config: None
    broadcast_from_rank_0(world, lambda: require_fit(config))
    return Inputs(config, choices, world, checkpoints, origin, corpus, texts, validations, validation, record, initial)


def _validation_texts(config: Config, corpus: TrainingData) -> dict[str, ValidationText]:
    """What validation reads: under "", or where it is held out of a mixture, an equal share of each source."""
    validation, folder = config.validation, Path(config.job.dump_folder)
    if not validation.interval:
        return {}
    corpora = dict(zip(corpus.names, corpus.corpora))
    if validation.path:
        corpora = {"": dataclasses.replace(corpus.corpora[0], data=corpus.data)}
    validation = dataclasses.replace(validation, max_tokens=-(-validation.max_tokens // len(corpora)))
    found = {name: validation_text(each, validation, _held_out_file(folder, name)) for name, each in corpora.items()}
    return {name: text for name, text in found.items() if text}


def _held_out_file(folder: Path, name: str) -> Path:
    return folder / (f"held_out.{name}.npz" if name else HELD_OUT_TEXT)


def _fingerprint(config: Config, held_out: dict[str, ValidationSet]) -> str | None:
    """Of the text that validation reads; None: there is none."""
    weights = weights_of(config.data)
    own = [
        f"{name} {weights[name]:g}: {each.fingerprint}" if name else each.fingerprint for name, each in held_out.items()
    ]
    return "; ".join(own) or None


def _on_held_out(
    config: Config, world: World, held_out: dict[str, ValidationSet], size: int, record: dict[str, Any] | None
) -> list[Validation]:
    number, interval = record["set"] if record else 1, config.validation.interval
    if held_out.keys() <= {""}:
        return [Validator(each, world, size, interval, number) for each in held_out.values()]
    return [MixtureValidator(held_out, weights_of(config.data), world, size, interval, number)]


def set_up_resume(inputs: Inputs) -> Setup:
    """Compare the run with the checkpoint to resume from; raises UserError if it belongs to another run."""
    config, world, corpus = inputs.config, inputs.world, inputs.corpus
    fingerprint, details = run_fingerprint(config, corpus, inputs.annex_record), corpus.changes
    train_state = broadcast_from_rank_0(
        world, lambda: inputs.origin.resume(fingerprint, config.checkpoint.allow, details, corpus)
    )
    schedule = Schedule.of(config, Position(train_state.step, train_state.tokens, train_state.sequences))
    if isinstance(corpus, Mixture) and inputs.origin.train_state:
        before = inputs.origin.train_state.fingerprint
        if any(before.get(name) != now for name, now in fingerprint.items() if not name.startswith("model.")):
            corpus = corpus.begun_at(train_state.sequences, train_state.cursors, weights_by_stage(schedule))
    files = all_ranks_or_raise(world, lambda: _files(config, corpus, inputs.validation))
    files |= {ANNEX_RECORD: inputs.annex_record.to_bytes()} if inputs.annex_record else {}
    resumed = vars(inputs) | {"corpus": corpus}
    return Setup(**resumed, fingerprint=fingerprint, files=files, train_state=train_state, schedule=schedule)


def from_newest_intact(build: Callable[[dict[Path, str]], Result]) -> Result:
    """The result of `build(damaged)`, which is called again whenever a checkpoint turns out damaged as it is loaded.

    `damaged` maps the checkpoints that were found damaged to what is wrong with them.
    """
    damaged: dict[Path, str] = {}
    while True:
        try:
            return build(damaged)
        except DamagedCheckpoints as found:
            damaged = found.damaged


def open_data(config: Config, recorded: dict[str, Any] | None = None) -> tuple[Config, TrainingData]:
    """Open the training data; also returns the configuration with the tokenizer's vocabulary.

    `recorded`: the data record of the checkpoint to resume from. Raises Damaged where this program would not write such
    a record.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    config = with_vocabulary(config, tokenizer.vocab_size)
    data = dataclasses.replace(config.data, retry_seconds=retry_seconds(config))
    try:
        opened = data, config.validation, config.job.seed, tokenizer
        if data.sources:
            corpus: TrainingData = open_mixture(*opened, recorded)
        else:
            corpus = open_corpus(*opened, None if recorded and "sources" in recorded else recorded)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        if recorded is None:
            raise
        # It is valid JSON, but not of the form that this program writes.
        raise Damaged(f"{DATA}: not a data record of this program's checkpoints ({error!r})") from error
    if isinstance(corpus, Mixture) and not (recorded and "sources" in recorded):
        corpus = dataclasses.replace(corpus, pieces=tuple(weights_by_stage(Schedule.of(config))))
    return config, corpus


def _files(config: Config, corpus: TrainingData, validation: dict[str, Any] | None) -> dict[str, bytes]:
    """The resolved configuration, the data record, and the vocabulary if it is a file.

    The vocabulary is read now, because the file may be gone when a checkpoint is written.
    """
    files = {CONFIG: to_toml(config).encode(), DATA: data_record(corpus, validation)}
    vocabulary = Path(config.data.tokenizer)
    if vocabulary.suffix == ".tiktoken":
        try:
            files[VOCABULARY] = vocabulary.read_bytes()
        except OSError as error:
            raise UserError(f"data.tokenizer: {vocabulary} cannot be read ({error.strerror})") from None
    return files
