"""The command `swamla-titan`: parses its arguments, then calls the room that does the work."""

import contextlib
import errno
import io
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, subcommand

from swamla_titan.config import (
    Config,
    Override,
    find_config,
    load_config,
    load_source,
    shipped_configs,
    split_overrides,
    to_toml,
)
from swamla_titan.config.shipped import checkout
from swamla_titan.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, RankFailed, RunFailed, UserError
from swamla_titan.escaping import one_line, several_lines
from swamla_titan.launch.ranks import logs_to_console
from swamla_titan.launch.worker import report_bad_input
from swamla_titan.system.console import lost_output, open_console
from swamla_titan.system.machine import explain

if TYPE_CHECKING:
    from swamla_titan.distributed.mesh import World


@dataclass
class Train:
    """Train, or continue from the newest checkpoint in job.dump_folder.

    Any key of the file can be overridden: `--section.key value`; of a table in a list, by its name or number:
    `--data.sources.NAME.key value`. `swamla-titan config show CONFIG` lists all keys.
    """

    config: Positional[str]
    """A TOML file or the name of a shipped configuration."""

    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the plan, or the errors by which training would not start; write nothing."""

    gpus: int | None = None
    """With --dry-run: GPUs of the run; default: the processes that the launcher started."""


@dataclass
class Plan:
    """Show mesh, batch, shards and memory of a configuration on any number of GPUs; none need be here."""

    config: Positional[str]
    """A TOML file or the name of a shipped configuration."""

    gpus: int | None = None
    """GPUs of the run; default: the product of the degrees in [parallel], with 1 for -1."""


@dataclass
class Check:
    """Report whether this machine, and a configuration, are fit for training."""

    config: Positional[str | None] = None
    """A TOML file or the name of a shipped configuration; without it only the machine is checked."""


@dataclass
class Generate:
    """Continue prompts with a trained model."""

    checkpoint: Positional[str]
    """A checkpoint folder, or the dump folder of a run: its newest intact checkpoint."""

    prompt: tuple[str, ...] = ("The",)
    """Texts to continue. A single one is printed token by token."""

    prompts: str | None = None
    """A file of texts to continue: a text in each line, or in a .jsonl file an object with "prompt"."""

    output: str | None = None
    """File to write, or to replace once all is written: a line of JSON for each prompt, with what its own line had,
    "text", "tokens" and why it "ended" (eot, stop, length)."""

    interactive: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Ask for a text, continue it, and ask for the next."""

    max_new_tokens: int = 200
    """Most tokens to add to each prompt."""

    temperature: float = 0.8
    """0 takes the likeliest token every time; higher is more varied."""

    top_k: int = 0
    """Sample among the k likeliest tokens only; 0: among all."""

    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""

    seed: int = 0
    """Seed of the sampling."""

    stop: tuple[str, ...] = ()
    """Texts before which a continuation ends."""

    batch_size: int = 64
    """Most prompts that are computed together."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and computation. Default: what the run computed in on a GPU, float32 on a CPU."""

    gpus: int = 1
    """Spread the layers over so many GPUs, for a model that one has no room for."""

    ema: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Use the average of the weights, which a run with ema.decay keeps."""

    memory_budget: int | None = None
    """Tokens of a text that layers with selective attention (model.mla_selective) keep; they drop those of which later
    ones selected most. Default: all."""


@dataclass
class Export:
    """Write a trained model as a Hugging Face folder, which loads without this program."""

    checkpoint: Positional[str]
    """A checkpoint folder, or the dump folder of a run: its newest intact checkpoint."""

    out: Positional[str]
    """Folder to write; it must not exist, or be empty."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights."""

    ema: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The average of the weights, which a run with ema.decay keeps."""

    format: Literal["safetensors", "dcp", "torch"] = "safetensors"
    """Of the file with the weights: transformers loads safetensors and torch, torch.distributed.checkpoint dcp."""

    push_to_hub: str | None = None
    """Name of a repository on the Hugging Face Hub, to which the folder is uploaded."""


@dataclass
class Evaluate:
    """Score a trained model by tasks of lm-evaluation-harness and by its loss on local text.

    Under torchrun the ranks share the work, each with a copy of the model.
    """

    checkpoint: Positional[str]
    """A checkpoint folder, or the dump folder of a run: its newest intact checkpoint."""

    tasks: tuple[str, ...] = ()
    """Tasks by name, with commas or spaces between, or paths of YAML files; needs the extra `eval`."""

    text: tuple[str, ...] = ()
    """Text files, or folders of them, for loss, perplexity and bits per byte."""

    ema: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Evaluate the average of the weights, which a run with ema.decay keeps."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of weights and activations; default: on GPUs that of training, on a CPU float32."""

    limit: int = 0
    """Maximum number of documents of each task and of each text; 0: all."""

    output: str | None = None
    """JSON file to write, or to replace once all is written: the results."""


@dataclass
class DataPrepare:
    """Tokenize a source into shards, which train with data.source = "shards"; the same command continues after a kill.

    Keys of [data] can be given as `--data.key value`.
    """

    source: Positional[str]
    """A file or folder of text, the name of a dataset, or a configuration, whose [data] it reads."""

    out: Positional[str]
    """Folder for the shards; it must not exist, be empty, or hold what an earlier start prepared."""

    tokenizer: str | None = None
    """As data.tokenizer."""

    only: str | None = None
    """Of a configuration with [[data.sources]] the name of the source to prepare."""

    deduplicate: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Of documents with equal text keep the first."""

    processes: int = 0
    """Processes that tokenize; 0: one for each core."""


@dataclass
class DataInspect:
    """Show what a run reads: documents and their lengths, what is held out, and the sequences of a step as text.

    Any key of the configuration can be given as `--section.key value`.
    """

    source: Positional[str]
    """A configuration; or a file or folder of text, a folder of prepared shards, or the name of a dataset."""

    step: int = 1
    """Step whose sequences are shown. It is found by reading the steps before it, in prepared shards at once."""

    sequences: int = 1
    """Sequences that are shown of the step; 0: all."""

    documents: int = 1000
    """Documents that are read for the lengths; 0: all. Of prepared shards those of all are known."""

    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compare all files of prepared shards with their digests first."""


@dataclass
class DataBench:
    """Measure how fast this machine reads and tokenizes the data, and makes batches of it.

    Any key of the configuration can be given as `--section.key value`.
    """

    source: Positional[str]
    """A configuration; or a file or folder of text, a folder of prepared shards, or the name of a dataset."""

    seconds: float = 5.0
    """Time of each measurement."""

    workers: tuple[int, ...] = ()
    """Values of data.num_workers to try; default: 0, 1, 2, 4, ... up to the cores."""


@dataclass
class DataCommand:
    """Prepare data as shards, show what a run reads, or measure how fast."""

    action: (
        Annotated[DataPrepare, subcommand("prepare")]
        | Annotated[DataInspect, subcommand("inspect")]
        | Annotated[DataBench, subcommand("bench")]
    )


@dataclass
class Watch:
    """Follow a run in the terminal: loss, speed, time left, events; Ctrl-C quits. In a pipe it prints lines."""

    run: Positional[str]
    """The dump folder of a run, which may be stopped and started again meanwhile."""


@dataclass
class Report:
    """Write an HTML page on a run, or on several in comparison: curves, events, goodput, cost. It needs no network."""

    runs: Positional[tuple[str, ...]]
    """Dump folders of runs; others are compared with the first."""

    out: str = "report.html"
    """File to write; it may replace an earlier report."""

    price: float | None = None
    """Price of a GPU-hour, for the cost."""


@dataclass
class ConfigList:
    """List the shipped configurations and the model flavors with their true parameter counts."""


@dataclass
class ConfigShow:
    """Print a configuration with every key resolved and explained."""

    config: Positional[str]
    """A TOML file or the name of a shipped configuration."""


@dataclass
class ConfigCopy:
    """Copy a shipped configuration to a file of your own."""

    config: Positional[str]
    """Name of a shipped configuration, or a TOML file."""

    destination: Positional[str]
    """File to write; it must not exist."""


@dataclass
class ConfigCommand:
    """List, show or copy configurations."""

    action: (
        Annotated[ConfigList, subcommand("ls")]
        | Annotated[ConfigShow, subcommand("show")]
        | Annotated[ConfigCopy, subcommand("cp")]
    )


Command = (
    Annotated[Train, subcommand("train")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Check, subcommand("check")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[DataCommand, subcommand("data")]
    | Annotated[Watch, subcommand("watch")]
    | Annotated[Report, subcommand("report")]
    | Annotated[ConfigCommand, subcommand("config")]
)


_SHOWN = 300  # characters of an argument that the parser's error may quote as they are


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (see `swamla_titan.errors`)."""
    open_console()
    logs = True
    try:
        logs = logs_to_console()
        overrides, rest = split_overrides(sys.argv[1:] if arguments is None else arguments)
        _refuse_numbers(rest)
        command = _parsed(rest)
        command = getattr(command, "action", command)
        if overrides and not isinstance(
            command, Train | Plan | Check | ConfigShow | DataPrepare | DataInspect | DataBench
        ):
            raise UserError(f"--{overrides[0].section}.{overrides[0].key}: this command takes no configuration keys")
        code = _run(command, overrides)
        return code if isinstance(command, Train) else _or_failed_output(code)
    except UserError as error:
        if logs:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except RunFailed as error:
        if logs or isinstance(error, RankFailed):  # which no other rank reports
            print(f"failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    except MemoryError:  # of which too little is left for a longer message
        print("error: this machine, or a limit set for the process (ulimit -v), has no more memory", file=sys.stderr)
        report_bad_input()
        return EXIT_BAD_INPUT
    except Exception as error:
        reason = explain(error)
        if reason is None:
            raise
        print(f"error: {one_line(reason)}", file=sys.stderr)
        report_bad_input()
        return EXIT_BAD_INPUT


def _refuse_numbers(arguments: list[str]) -> None:
    """Raise UserError for numbers without a key; other launchers accept those, and the parser's error has no remedy."""
    if arguments[:1] not in (["train"], ["plan"], ["check"]):
        return
    keys = "training.local_batch_size", "training.seq_len", "training.steps"
    numbers = [
        each
        for before, each in zip(["", *arguments], arguments)
        if each.isdecimal() and (before == "--dry-run" or not before.startswith("--"))  # others are options' values
    ]
    if numbers:
        named = " ".join(f"--{key} {number}" for key, number in zip(keys, numbers))
        raise UserError(f"{' '.join(numbers)}: settings have names, write {named}")


def _parsed(arguments: list[str]) -> Any:
    """The command that the arguments name; raises SystemExit after help or an error was printed."""

    def parse() -> Any:
        return tyro.cli(
            Command,
            prog="swamla-titan",
            description="Pretraining for hybrid sliding-window + latent-attention language models.",
            args=arguments,
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
        )

    if all(argument.isprintable() and len(argument) <= _SHOWN for argument in arguments):
        return parse()
    printed = io.StringIO()  # because tyro quotes arguments without escaping them
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return parse()
    except SystemExit:
        print(_brief(several_lines(printed.getvalue())), end="", file=sys.stderr)
        raise


def _brief(text: str) -> str:
    """Cut out the middle of a text of many lines, and of long lines."""
    lines = text.splitlines(keepends=True)
    lines = lines if len(lines) <= 60 else [*lines[:20], "...\n", *lines[-20:]]
    return "".join(line if len(line) <= 400 else f"{line[:200]} ... {line[-100:]}" for line in lines)


def _or_failed_output(code: int) -> int:
    """`code`, or 1 if standard output could not be written; a reader such as `head` may close it early."""
    lost = lost_output()
    if lost is None or lost.errno in (errno.EPIPE, errno.EIO):
        return code
    print(f"failed: standard output could not be written ({lost.strerror})", file=sys.stderr)
    return code or EXIT_FAILED


def _memory_advice(config: Config, world: "World") -> list[str]:
    from swamla_titan.tools.savings import advice  # late, because few runs need it

    return advice(config, world)


def _run(command: object, overrides: list[Override]) -> int:
    # Imports are late, because torch and others take seconds, for which `--help` should not wait.
    warnings: list[str] = []
    code = EXIT_DONE

    def load(name: str) -> Config:
        return load_config(find_config(name), overrides, warnings.append)

    match command:
        case Train(config=name, dry_run=True, gpus=gpus):
            from swamla_titan.tools.plan_report import dry_run
            from swamla_titan.train import log_to_console

            log_to_console(logging.WARNING)
            dry_run(load(name), gpus)
        case Train(gpus=int()):
            raise UserError("--gpus is for --dry-run: training uses the processes that ./run_train.sh starts, see NGPU")
        case Train(config=name):
            config = load(name)
            from swamla_titan.train import log_to_console, train

            log_to_console(logging.INFO if logs_to_console() else logging.WARNING)
            for line in warnings if logs_to_console() else ():
                logging.getLogger("swamla_titan.config").warning("%s", line)
            return train(config, _memory_advice)
        case Plan(config=name, gpus=gpus):
            from swamla_titan.tools.plan_report import print_plan

            print_plan(load(name), gpus)
        case Check(config=name):
            from swamla_titan.tools.check import check

            return check(name, overrides)
        case Generate():
            from swamla_titan.tools.generate import generate_from_checkpoint

            generate_from_checkpoint(**vars(command))
        case Export():
            from swamla_titan.tools.export import export

            export(**vars(command))
        case Evaluate():
            from swamla_titan.tools.evaluate import evaluate_checkpoint

            evaluate_checkpoint(**vars(command))
        case DataPrepare(source=source, out=out):
            from swamla_titan.tools.prepare import prepare

            if command.tokenizer is not None:
                overrides = [*overrides, Override("data", "tokenizer", command.tokenizer)]
            data = load_source(source, overrides, warnings.append).data
            code = prepare(data, out, command.deduplicate, command.processes, command.only)
        case DataInspect(source=source, step=step):
            from swamla_titan.tools.inspect_data import inspect

            config = load_source(source, overrides, warnings.append)
            code = inspect(config, step, command.sequences, command.documents, command.verify)
        case DataBench(source=source, seconds=seconds, workers=workers):
            from swamla_titan.tools.bench_data import bench

            bench(load_source(source, overrides, warnings.append), seconds, workers)
        case Watch(run=name):
            from swamla_titan.tools.watch import watch

            watch(name)
        case Report():
            from swamla_titan.tools.report import report

            report(**vars(command))
        case ConfigList():
            _list_configs()
        case ConfigShow(config=name):
            print(to_toml(load(name), comments=True))
        case ConfigCopy(config=name, destination=destination):
            _copy_config(name, destination)
    for line in warnings if logs_to_console() else ():  # last, because a refused command prints its error alone
        print(f"warning: {one_line(line)}", file=sys.stderr)
    return code


def _list_configs() -> None:
    """Print each shipped configuration with its first comment line, and the flavors with their parameter counts."""
    from swamla_titan.model.counts import flavor_table

    print("Configurations (use a name or a path):")
    for name, path in shipped_configs().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").removeprefix(f" {name}:").strip()
        print(f"  {name:<16} {first}")
    print("\nModel flavors (parameters with the GPT-2 vocabulary, `debug` with bytes):")
    print("\n".join(flavor_table()))


def _copy_config(name: str, destination: str) -> None:
    """Copy a configuration; raises UserError if the destination exists or cannot be written."""
    source, target = find_config(name), Path(destination)
    if target.is_dir():
        target = target / source.name
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; choose another name or remove it")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    command = "./run_train.sh" if checkout() else "swamla-titan train"
    print(one_line(f"{target} written; train with: {command} {target}"))
