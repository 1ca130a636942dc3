"""`generate`: continue prompts with the model of a checkpoint: of the command, of a file, or as they are typed."""

import codecs
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from swamla_titan.checkpoint.manifest import CONFIG, VOCABULARY
from swamla_titan.checkpoint.reader import stored_groups
from swamla_titan.checkpoint.records import read_train_state, use_annex_record
from swamla_titan.checkpoint.state import Average, load_weights, require_weights
from swamla_titan.checkpoint.store import find_checkpoint
from swamla_titan.config import Config, load_config
from swamla_titan.config.schedule import Position, Schedule
from swamla_titan.data import Tokenizer, load_tokenizer
from swamla_titan.errors import UserError
from swamla_titan.escaping import several_lines
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.generation import Decoder, Options, check_prompts, stream
from swamla_titan.model.row_table import row_tables
from swamla_titan.system.written_aside import output_file, write_output
from swamla_titan.train.step import GROUPS

LARGEST_SEED = 2**63 - 1  # of torch's generators
DEFAULT_PROMPT = ("The",)  # of the command


class LoadedModel(NamedTuple):
    """What a checkpoint holds of what is needed here; the tokenizer only where it came from a file."""

    config: Config
    tokenizer: Tokenizer | None
    model: SWAMLAModel


def load_model(
    path: Path, ema: bool, device: torch.device | None = None, dtype: torch.dtype | None = None, gpus: int = 1
) -> LoadedModel:
    """The content of a checkpoint; UserError if it does not fit together. `device`: None: a GPU, if there is one.

    `dtype`: of the weights; None: on a GPU what the run computed in, and float32 on a CPU, which is no slower in it.
    `gpus`: over how many GPUs the layers are spread, if `device` is None.
    Tables of embeddings are kept in the memory of the host if the run kept them there, or if a GPU has no room.
    """
    config = _trained_config(path)
    if not config.model.vocab_size:
        raise UserError(f"{path / CONFIG} lacks model.vocab_size")
    vocabulary = path / VOCABULARY
    tokenizer = load_tokenizer(str(vocabulary)) if vocabulary.exists() else None
    if tokenizer and tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(f"{vocabulary} has {tokenizer.vocab_size} tokens, and the model {config.model.vocab_size}")
    devices = [device] if device else devices_for(gpus)
    device = devices[0]
    with torch.device("meta"):
        model = SWAMLAModel(config.model)
    require_weights(path, model, ema)  # before there is memory for what nobody stored
    if config.parallel.tables_on_host or not _fits(model, devices):
        for table in row_tables(model).values():
            table.keep_on_host(device)
    model.spread(devices)
    load_weights(path, model, ema)
    use_annex_record(path, config, model, tokenizer)
    if dtype is None and device.type == "cuda":
        dtype = getattr(torch, config.training.compute_dtype)
    return LoadedModel(config, tokenizer, model.to(dtype or torch.float32).eval())


def _trained_config(path: Path) -> Config:
    """The configuration of a checkpoint, with the values that training.stages had given to its last step."""
    config = load_config(path / CONFIG)
    if not config.training.stages:
        return config
    state = read_train_state(path)
    return Schedule.of(config, Position(state.step, state.tokens, state.sequences)).stage(state.step).config


def devices_for(gpus: int) -> list[torch.device]:
    """So many GPUs, or where there is none and one was asked for, the CPU; UserError if there are fewer."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not 1 <= gpus <= max(here, 1):
        raise UserError(f"gpus = {gpus}: torch sees {here} here")
    return [torch.device("cuda", number) for number in range(gpus)] if here else [torch.device("cpu")]


def _fits(model: SWAMLAModel, devices: list[torch.device]) -> bool:
    """Whether devices have memory for all weights in float32, as checkpoints hold them."""
    if devices[0].type != "cuda":
        return True
    free = sum(torch.cuda.mem_get_info(device)[0] for device in devices)
    return sum(each.nbytes for each in model.parameters()) <= free


@dataclass(frozen=True)
class Sampling(Options):
    """How texts are continued: as `stream` has it, by which seed, and the strings before which a continuation ends."""

    seed: int = 0
    stop: tuple[str, ...] = ()

    def validate(self) -> None:
        """As in Options."""
        super().validate()
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"seed = {str(self.seed)[:40]}: expected 0 ... {LARGEST_SEED}")
        if "" in self.stop:
            raise ValueError("stop: an empty string stands before every text")


class Continuation:
    """The text of one sequence's new tokens as they come: whole characters, up to the first of the `stop` strings.

    `text` is what is certain: bytes of a character, and a text that may begin a stop string, wait for the next tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.text, self.tokens = "", 0
        self.is_stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def add(self, token: int) -> bool:
        """Add a token; whether a stop string has come with it."""
        self.tokens += 1
        self._add(self._decoder.decode(self._tokenizer.token_bytes(token)))
        return self.is_stopped

    def finish(self) -> None:
        """Nothing comes behind what was added."""
        if not self.is_stopped:
            self._add(self._decoder.decode(b"", final=True))
            self.text, self._held = self.text + self._held * (not self.is_stopped), ""

    def _add(self, text: str) -> None:
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        self.is_stopped = bool(found)
        certain = min(found) if found else len(self._held) - self._possible()
        self.text, self._held = self.text + self._held[:certain], self._held[certain:]

    def _possible(self) -> int:
        """Characters at the end that may begin a stop string."""
        begins = (stop[:n] for stop in self._stop for n in range(1, len(stop)))
        return max((len(each) for each in begins if self._held.endswith(each)), default=0)


class Writer:
    """Continues texts by the model of a checkpoint; batches of equal size share caches and CUDA graph."""

    def __init__(self, loaded: LoadedModel, sampling: Sampling) -> None:
        self.config, tokenizer, self.model = loaded
        self.tokenizer = tokenizer or load_tokenizer(self.config.data.tokenizer)
        self.sampling = sampling
        self._generator = torch.Generator(device=self.model.device).manual_seed(sampling.seed)
        self._decoder: Decoder | None = None

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt that leave room for the new ones."""
        return self.config.model.max_seq_len - self.sampling.max_new_tokens + 1

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text; errors as of `_prompts`."""
        return _prompts(tuple(texts), self.tokenizer, self.config.data.document_mask)

    def write(self, prompts: list[list[int]], longest: int = 0) -> Iterator[list[Continuation]]:
        """The continuations of a batch, after each token; the last time they are complete.

        `longest`: tokens of the longest prompt of later batches, for which room is made as well. Raises UserError for
        prompts and options that the model cannot take.
        """
        self._check(prompts)
        continuations = [Continuation(self.tokenizer, self.sampling.stop) for _ in prompts]
        try:
            options = replace(
                self.sampling,
                stop_token=self.tokenizer.eot_id,
                generator=self._generator,
                ends=lambda number, token: continuations[number].add(token),
                decoder=self._decoder_of(prompts, longest),
            )
            for _ in stream(self.model, prompts, options):
                yield continuations
        except ValueError as error:
            raise UserError(str(error)) from None
        for each in continuations:
            each.finish()
        yield continuations

    def complete(self, prompts: list[list[int]], batch_size: int) -> list[Continuation]:
        """The complete continuations, of batches of prompts of about the same length, in the prompts' order."""
        self._check(prompts)
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        found: dict[int, Continuation] = {}
        for begin in range(0, len(order), batch_size):
            batch = sorted(order[begin : begin + batch_size])
            *_, last = self.write([prompts[number] for number in batch], len(prompts[order[0]]))
            found |= zip(batch, last)
        return [found[number] for number in range(len(prompts))]

    def _check(self, prompts: list[list[int]]) -> None:
        try:
            check_prompts(self.model, prompts, self.sampling.max_new_tokens, self.tokenizer.eot_id)
        except ValueError as error:
            raise UserError(str(error)) from None

    def _decoder_of(self, prompts: list[list[int]], longest: int) -> Decoder:
        room = max(longest, *map(len, prompts)) + self.sampling.max_new_tokens - 1
        has = self._decoder
        if has is None or has.batch != len(prompts) or has.max_tokens < room:
            self._decoder = None  # its memory is free before another is made
            self._decoder = Decoder(self.model, len(prompts), room, self.sampling.memory_budget)
        assert self._decoder is not None
        return self._decoder


def generate_from_checkpoint(
    checkpoint: str,
    prompt: tuple[str, ...],
    prompts: str | None = None,
    output: str | None = None,
    interactive: bool = False,
    ema: bool = False,
    dtype: str | None = None,
    batch_size: int = 64,
    gpus: int = 1,
    **sampling: Any,
) -> None:
    """Continue prompts up to the end-of-text token, a stop string or `max_new_tokens`; `sampling` as of Sampling.

    The texts of `prompt`, or of the file `prompts`, or if `interactive` those that are typed, line after line. They are
    printed with their continuations, a single one token by token, or written to the file `output`. `ema`: by the
    average of the weights (ema.decay). `gpus`: over how many the layers are spread.

    What a terminal would take for a command is printed escaped. Raises UserError for a checkpoint or file that cannot
    be used, and for sampling values or lengths out of range.
    """
    options = Sampling(**sampling)
    try:
        options.validate()  # before a checkpoint is read, which may take a minute
    except ValueError as error:
        raise UserError(str(error)) from None
    if batch_size < 1:
        raise UserError(f"batch_size = {batch_size}: expected >= 1")
    is_given = prompt != DEFAULT_PROMPT
    if interactive and (is_given or prompts or output):
        raise UserError("--interactive takes its prompts from the keyboard: leave out --prompt, --prompts and --output")
    if is_given and prompts:
        raise UserError("--prompt and --prompts: give texts or a file of them, not both")
    records = [{"prompt": _as_text(each)} for each in prompt] if prompts is None else read_prompts(prompts)
    file = None if output is None else output_file(output)
    devices_for(gpus)
    writer = Writer(_load(checkpoint, ema, dtype, gpus), options)
    if interactive:
        _converse(writer)
        return
    tokens = writer.prompts([record["prompt"] for record in records])
    if not file and len(records) == 1:
        _print_as_it_comes(records[0]["prompt"], writer.write(tokens))
        return
    continuations = writer.complete(tokens, batch_size)
    if file:
        write_output(file, "".join(_lines(records, continuations, options)))
        return
    for record, continuation in zip(records, continuations):
        print(several_lines(record["prompt"] + continuation.text))
        print("-" * 40)


def read_prompts(name: str) -> list[dict[str, Any]]:
    """The prompts of a file, each as {"prompt": text} with whatever else stands beside it.

    A .jsonl file has an object with the key "prompt", or a string, in each line; any other file a text in each. Empty
    lines are skipped. Raises UserError, with the line, for what cannot be read.
    """
    try:
        lines = Path(name).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8").removesuffix("\r")
            record = json.loads(text) if name.endswith(".jsonl") and text.strip() else text
        except (ValueError, RecursionError):
            kind = "JSON in UTF-8" if name.endswith(".jsonl") else "UTF-8"
            raise UserError(f"{name}, line {number}: no {kind}") from None
        record = {"prompt": record} if isinstance(record, str) else record
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise UserError(f'{name}, line {number}: expected a string, or an object with a string "prompt"')
        if text.strip():
            found.append(record)
    if not found:
        raise UserError(f"{name}: no prompts")
    return found


def _load(checkpoint: str, ema: bool, dtype: str | None, gpus: int) -> LoadedModel:
    found: dict[Path, LoadedModel] = {}

    def load(path: Path) -> None:
        if not ema or Average.group in stored_groups(path):
            found[path] = load_model(path, ema, dtype=None if dtype is None else getattr(torch, dtype), gpus=gpus)

    path = find_checkpoint(checkpoint, GROUPS, load)
    if path not in found:
        raise UserError(f"{path} holds no average of the weights: it was trained with ema.decay = 0")
    return found[path]


def _print_as_it_comes(prompt: str, written: Iterator[list[Continuation]]) -> None:
    """Print a prompt, and of its continuation what is new after each token; errors come before anything is printed."""
    shown = 0
    for number, [continuation] in enumerate(written):
        if number == 0:
            print(several_lines(prompt), end="")
        new, shown = continuation.text[shown:], len(continuation.text)
        print(several_lines(new), end="", flush=bool(new))
    print()


def _converse(writer: Writer) -> None:
    print("A line is a prompt. Ctrl-C ends its continuation, Ctrl-D the conversation.", file=sys.stderr)
    while True:
        try:
            line = _as_text(input("> "))
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            if line:
                _print_as_it_comes(line, writer.write(writer.prompts([line]), writer.longest_prompt))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print()


def _lines(records: list[dict[str, Any]], continuations: list[Continuation], sampling: Sampling) -> Iterator[str]:
    """A line of JSON for each prompt: what its record has, its continuation, how many tokens, and why it ended."""
    for record, each in zip(records, continuations):
        ended = "stop" if each.is_stopped else "length" if each.tokens == sampling.max_new_tokens else "eot"
        yield json.dumps(record | {"text": each.text, "tokens": each.tokens, "ended": ended}) + "\n"


def _as_text(argument: str) -> str:
    """An argument of the command as the text that it is in UTF-8, whatever encoding the locale has.

    Bytes that are no UTF-8 stay the halves of characters that Python makes of them.
    """
    try:
        return argument.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # other halves of characters, which no argument of a process holds
        return argument


def _prompts(texts: tuple[str, ...], tokenizer: Tokenizer, document_mask: bool) -> list[list[int]]:
    """The tokens of each prompt. An empty one starts as a document does, after the end of the one before it.

    Raises UserError for an empty one under document_mask, where the end of another document predicts a document's first
    token, together with that document's text. Alone at position 0 the model has hardly ever seen it.
    """
    prompts = [tokenizer.encode(text) for text in texts]
    if document_mask and not all(prompts):
        raise UserError(
            "an empty prompt: this model was trained with data.document_mask = true, and nothing stands before the "
            "first token of a document there that the text could be drawn from. Give the first word with --prompt"
        )
    return [prompt or [tokenizer.eot_id] for prompt in prompts]
