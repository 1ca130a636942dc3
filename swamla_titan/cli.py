"""The command `swamla-titan`: parses its arguments, then calls the room that does the work."""

import contextlib
import errno
import io
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from swamla_titan import commands
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
        if overrides and not isinstance(command, commands.TakesKeys):
            raise UserError(f"--{overrides[0].section}.{overrides[0].key}: this command takes no configuration keys")
        code = _run(command, overrides)
        return code if isinstance(command, commands.Train) else _or_failed_output(code)
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
            commands.Command,
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
        case commands.Train(config=name, dry_run=True, gpus=gpus):
            from swamla_titan.tools.plan_report import dry_run
            from swamla_titan.train import log_to_console

            log_to_console(logging.WARNING)
            dry_run(load(name), gpus)
        case commands.Train(gpus=int()):
            raise UserError("--gpus is for --dry-run: training uses the processes that ./run_train.sh starts, see NGPU")
        case commands.Train(config=name):
            config = load(name)
            from swamla_titan.train import log_to_console, train

            log_to_console(logging.INFO if logs_to_console() else logging.WARNING)
            for line in warnings if logs_to_console() else ():
                logging.getLogger("swamla_titan.config").warning("%s", line)
            return train(config, _memory_advice)
        case commands.Plan(config=name, gpus=gpus):
            from swamla_titan.tools.plan_report import print_plan

            print_plan(load(name), gpus)
        case commands.Check(config=name):
            from swamla_titan.tools.check import check

            return check(name, overrides)
        case commands.Generate():
            from swamla_titan.tools.generate import generate_from_checkpoint

            generate_from_checkpoint(**vars(command))
        case commands.Export():
            from swamla_titan.tools.export import export

            export(**vars(command))
        case commands.Evaluate():
            from swamla_titan.tools.evaluate import evaluate_checkpoint

            evaluate_checkpoint(**vars(command))
        case commands.DataPrepare(source=source, out=out):
            from swamla_titan.tools.prepare import prepare

            if command.tokenizer is not None:
                overrides = [*overrides, Override("data", "tokenizer", command.tokenizer)]
            data = load_source(source, overrides, warnings.append).data
            code = prepare(data, out, command.deduplicate, command.processes, command.only)
        case commands.DataInspect(source=source, step=step):
            from swamla_titan.tools.inspect_data import inspect

            config = load_source(source, overrides, warnings.append)
            code = inspect(config, step, command.sequences, command.documents, command.verify)
        case commands.DataBench(source=source, seconds=seconds, workers=workers):
            from swamla_titan.tools.bench_data import bench

            bench(load_source(source, overrides, warnings.append), seconds, workers)
        case commands.Watch(run=name):
            from swamla_titan.tools.watch import watch

            watch(name)
        case commands.Report():
            from swamla_titan.tools.report import report

            report(**vars(command))
        case commands.ConfigList():
            _list_configs()
        case commands.ConfigShow(config=name):
            print(to_toml(load(name), comments=True))
        case commands.ConfigCopy(config=name, destination=destination):
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
