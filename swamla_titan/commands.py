"""The commands of `swamla-titan`, and what each takes; docstrings are its help. cli.py parses and runs them."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, subcommand


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
TakesKeys = Train | Plan | Check | ConfigShow | DataPrepare | DataInspect | DataBench  # --section.key value
