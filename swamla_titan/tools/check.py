"""`check`: probes whether this machine and a configuration are fit for training; a line each, with a remedy."""

import copy
import json
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from swamla_titan.checkpoint.dump_folder import validate_exclusive
from swamla_titan.checkpoint.resume import Origin
from swamla_titan.config import Config, Override, find_config, load_config, with_vocabulary
from swamla_titan.config.schedule import configs_of_stages
from swamla_titan.config.sections import Parallel
from swamla_titan.config.stability import stability_advice
from swamla_titan.data import (
    BatchLoader,
    Corpus,
    Shape,
    Tokenizer,
    TrainingData,
    labelled,
    load_tokenizer,
    micro_batch_size,
)
from swamla_titan.distributed.degrees import fit_degrees
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, UserError
from swamla_titan.escaping import one_line, several_lines
from swamla_titan.kernels.limits import FLOAT8_CAPABILITY
from swamla_titan.launch.process_group import device_here, validate_launch
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.annexes import annexes_of
from swamla_titan.model.counts import parameter_counts
from swamla_titan.optim import group_table, state_bytes
from swamla_titan.parallel.float8 import (
    Resolved,
    float8_coverage,
    float8_moments_advice,
    may_save_by_float8_moments,
    resolve_auto,
)
from swamla_titan.parallel.kernels import attention_choices, attention_summary, choose_kernels
from swamla_titan.quantization.coverage import LinearCoverage, table, warnings
from swamla_titan.quantization.float8 import convert_to_float8
from swamla_titan.tools.plan import plan, ranks_asked_for
from swamla_titan.train.precision import set_precision_and_determinism
from swamla_titan.train.setup import VALIDATIONS, rehearse_inputs
from swamla_titan.train.startup_summary import elementwise_of
from swamla_titan.train.throughput import peak_flops

SAMPLE = "naïve café → 漢字 🙂\n\tdef f(x):  return x**2\n<|endoftext|>"
_SHOWN = 200  # characters of the data
_OTHER_TOKENIZER = "choose another data.tokenizer"

# One block of each kind.
SMALL = ModelConfig(
    num_layers=len(ModelConfig.kinds()),
    dim=192,
    num_heads=2,
    vocab_size=256,
    max_seq_len=512,
    **{f"{kind}_layers_per_cycle": 1 for kind in ModelConfig.kinds()},  # type: ignore[arg-type]
)


class Finding(NamedTuple):
    """One line of the report: `state` is ok, warning or failure."""

    state: str
    subject: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.state:<8} {self.subject:<11} {self.text}" + (f"  -> {self.remedy}" if self.remedy else "")
        return several_lines(text)


def _failure(subject: str, error: UserError) -> Finding:
    return Finding("failure", subject, str(error), "choose another job.dump_folder" if subject == "folder" else "")


Probe = Callable[[Config, torch.device], Finding | list[Finding]]


def check(name: str | None, overrides: Sequence[Override] = ()) -> int:
    """Print the report; returns 0 without failures, 2 if the configuration or its data are at fault, else 1."""
    if overrides and name is None:
        raise UserError("give a configuration too: swamla-titan check CONFIG --section.key value")
    device = device_here()
    config, inputs, about_input = (Config(), [_tokenizer], []) if name is None else _configured(name, overrides, device)
    set_precision_and_determinism(config, device)
    disk = _disk if about_input and inputs else _free_disk
    about_machine = _answers([_python, _torch, _gpu, _tf32, _float8, _attention, disk], config, device)
    about_input += _answers(inputs, config, device)
    failed = {finding.subject for finding in about_input if finding.state == "failure"}
    if len(failed) > 1:  # other errors of a run may have the same cause
        about_input = [each for each in about_input if each.subject != "run"]
    about_input = [each for each in about_input if each.state == "failure" or each.subject not in failed]
    for finding in about_machine + about_input:
        print(finding, flush=True)
    if name is not None and any(finding.state == "failure" for finding in about_input):
        return EXIT_BAD_INPUT
    return EXIT_FAILED if any(finding.state == "failure" for finding in about_machine) else EXIT_DONE


def _configured(
    name: str, overrides: Sequence[Override], device: torch.device
) -> tuple[Config, list[Probe], list[Finding]]:
    """The configuration, the probes for it, and findings on the file itself; without probes if that is invalid."""
    without_effect: list[str] = []
    try:
        loaded = load_config(find_config(name), overrides, without_effect.append)
        config, choices = _decided(loaded, device)
    except UserError as error:
        remedy = "`swamla-titan config show debug` explains each key"
        return Config(), [], [Finding("failure", "config", str(error), remedy)]
    probes: list[Probe] = [_processes, _validated, _folder, _tokenizer, _data(loaded), _model, _optimizer, _stability]
    probes += [_matmuls] if config.float8.recipe != "off" else []
    found = [Finding("ok", "config", f"{name} is valid")]
    found += [Finding("warning", "config", line) for line in without_effect]
    found += [Finding("ok", "auto", choice) for choice in choices]
    return config, probes, found


def _answers(probes: Sequence[Probe], config: Config, device: torch.device) -> list[Finding]:
    answers = [_answer(probe, config, device) for probe in probes]
    return [finding for found in answers for finding in ([found] if isinstance(found, Finding) else found)]


def _answer(probe: Probe, config: Config, device: torch.device) -> Finding | list[Finding]:
    """A probe's findings; an error of the probe is reported as a failure, and the report continues."""
    subject = probe.__name__.removeprefix("_")
    try:
        return probe(config, device)
    except UserError as error:
        return _failure(subject, error)
    except Exception as error:
        return Finding("failure", subject, f"{type(error).__name__}: {error}")


def _python(config: Config, device: torch.device) -> Finding:
    # Always ok, because the package cannot be installed under a Python that it does not support.
    return Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")


def _torch(config: Config, device: torch.device) -> Finding:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    others = ", ".join(f"{name} {metadata.version(name)}" for name in ("torchao", "datasets"))
    text = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {others}"
    if not (2, 11) <= release < (2, 14):
        return Finding("failure", "torch", text, "install a tested version: pip install 'torch>=2.11,<2.14'")
    return Finding("ok", "torch", text)


def _gpu(config: Config, device: torch.device) -> Finding:
    if device.type == "cpu":
        has_driver = shutil.which("nvidia-smi") is not None
        remedy = "torch sees no GPU: is it a CPU build, or does the driver suit CUDA?" if has_driver else ""
        return Finding("warning" if has_driver else "ok", "gpu", f"none, {torch.get_num_threads()} CPU threads", remedy)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    text = f"{len(names)} x {names[0]}, {memory:.0f} GiB ({free:.0f} free)"
    if free < 0.9 * memory:
        return Finding("warning", "gpu", text, "another program holds GPU memory: see nvidia-smi")
    if peak_flops(device) is None:
        return Finding("warning", "gpu", text, "its peak is not in train/throughput.py, so no MFU will be reported")
    return Finding("ok", "gpu", text)


def _tf32(config: Config, device: torch.device) -> Finding:
    """The precision of float32 matmuls, measured: TF32 keeps 10 bits of mantissa, which the error shows."""
    switch = f"torch.get_float32_matmul_precision() is {torch.get_float32_matmul_precision()}"
    if device.type == "cpu":
        return Finding("ok", "tf32", f"float32 matmuls are exact on the CPU; {switch}")
    matrix = torch.randn(512, 512, device=device)
    exact = matrix.double() @ matrix.double()
    error = ((matrix @ matrix).double() - exact).norm() / exact.norm()
    found = "tf32" if error > 1e-5 else "ieee"
    text = f"float32 matmuls are {found} (relative error {error:.0e}); {switch}"
    wanted = config.training.fp32_precision
    if found != wanted:
        remedy = f'training.fp32_precision = "{wanted}" has no effect: an old GPU, or NVIDIA_TF32_OVERRIDE is set'
        return Finding("warning", "tf32", text, remedy)
    return Finding("ok", "tf32", text)


def _float8(config: Config, device: torch.device) -> Finding:
    """Whether this machine has float8 matmuls, and with a recipe, whether its gradients are close to plain ones."""
    text, recipe = "no GPU: emulated only", config.float8.recipe
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        able = (major, minor) >= FLOAT8_CAPABILITY
        text = f"compute capability {major}.{minor}: {'yes' if able else 'no, needs 8.9'}"
        recipe = recipe if able else "off"
    if recipe == "off":
        return Finding("ok", "float8", text)
    model = SWAMLAModel(SMALL).to(device)
    model.attention_backend = "reference"
    plain = copy.deepcopy(model)
    convert_to_float8(model, replace(config.float8, linear_layers="all", output_head=False), device)
    model.compute_dtype = getattr(torch, config.training.compute_dtype)
    error = _gradients_apart(model, plain, config, device)
    text += f"; {recipe}: gradients within {error:.0e} of plain ones"
    # Three bits of mantissa forward and two or three backward are 0.1 off; a kernel compiled wrongly was 0.6 and more.
    if not error < 0.2:
        return Finding("failure", "float8", text, "these versions of torch and Triton compute float8 wrongly")
    return Finding("ok", "float8", text)


def _attention(config: Config, device: torch.device) -> list[Finding]:
    """The run's implementations of attention; and gradients of a small model, compared with plain attention."""
    if device.type != "cuda":  # because `_validated` reports the error of a run without GPUs
        config = replace(config, kernels=replace(config.kernels, elementwise="plain"))
    chosen = list(dict.fromkeys(line for each in configs_of_stages(config) for line in _choices(each, device)))
    selects: dict[str, Any] = config.model.quantities("selects")
    small = replace(SMALL, **selects)
    model = SWAMLAModel(small).to(device)
    with torch.no_grad():  # with smaller weights, attention is too uniform to depend on which keys are visible
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    plain = copy.deepcopy(model)
    plain.attention_backend = "reference"
    tried = replace(config, model=small, parallel=Parallel(), training=replace(config.training, seq_len=512))
    choose_kernels(model, tried, device)
    dtype = model.compute_dtype = getattr(torch, config.training.compute_dtype)
    error = _gradients_apart(model, plain, config, device)
    text = f"tried on a small model: {config.training.compute_dtype} gradients within {error:.0e} of plain ones"
    # Faults, such as a missing gradient, other heads' keys or no sinks, give errors of 0.1 and more. Selective
    # attention accumulates rounding errors over queries: up to 0.1 in 16 bits, where faults give 1.
    limit = 0.2 if any(selects.values()) else 2e-2 if dtype == torch.float32 else 7e-2
    is_right = error < limit
    remedy = "" if is_right else "these versions of torch and the driver compute attention wrongly"
    found = Finding("ok" if is_right else "failure", "attention", text, remedy)
    return [*(Finding("ok", "attention", each) for each in chosen), found]


def _choices(config: Config, device: torch.device) -> Iterator[str]:
    """The run's implementations of attention, and why others do not compute it."""
    choices = attention_choices(config, device)
    for kind, choice in choices.items():
        yield from (f"{kind.upper()} not by {each}" for each in choice.refusals)
    elementwise = elementwise_of(config, choices, device)
    yield attention_summary(choices) + (f"; {elementwise}" if elementwise else "")


def _gradients_apart(model: SWAMLAModel, plain: SWAMLAModel, config: Config, device: torch.device) -> float:
    """The largest relative error of a matrix' gradient, by norms; NaN if any is."""
    tokens = torch.randint(SMALL.vocab_size, (2, SMALL.max_seq_len), device=device)
    documents = (torch.rand(tokens.shape, device=device) < 0.01).cumsum(1) if config.data.document_mask else None
    for each in (model, plain):
        each(tokens, tokens, documents).backward()
    errors = [
        (_gradient(ours) - _gradient(theirs)).norm() / _gradient(theirs).norm()
        for ours, theirs in zip(model.parameters(), plain.parameters())
        if ours.ndim == 2
    ]
    return torch.stack(errors).max().item()


def _gradient(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weight).double() if weight.grad is None else weight.grad.double()


def _existing(config: Config) -> Path:
    """The dump folder, or the nearest one above it that exists."""
    folder = Path(config.job.dump_folder).resolve()
    return next(parent for parent in [folder, *folder.parents] if parent.exists())


def _free_disk(config: Config, device: torch.device) -> Finding:
    existing = _existing(config)
    return Finding("ok", "disk", f"{shutil.disk_usage(existing).free / 2**30:.1f} GiB free under {existing}")


def _disk(config: Config, device: torch.device) -> Finding:
    """Free space against what the run's checkpoints take."""
    try:
        resolved = _resolved(config)
    except UserError:
        return _free_disk(config, device)  # the lines on tokenizer and model report why the size is unknown
    total, _ = parameter_counts(resolved.model)
    existing = _existing(config)
    free = shutil.disk_usage(existing).free
    size = total * (8 if config.ema.decay else 4) + _state_bytes(resolved)  # weights and their average are float32
    needed = size * ((config.checkpoint.keep_latest or 10) + 1)  # one more than is kept exists while it is written
    text = f"{free / 2**30:.1f} GiB free under {existing}; checkpoints take {needed / 2**30:.1f} GiB"
    if free < needed:
        return Finding("failure", "disk", text, "free some space, lower checkpoint.keep_latest or move job.dump_folder")
    return Finding("ok", "disk", text)


def _processes(config: Config, device: torch.device) -> list[Finding]:
    validate_launch(config.parallel, [_ranks(config)], 1)
    return []


def _world(config: Config, device: torch.device) -> World:
    return World.planned(fit_degrees(config.parallel, _ranks(config)), device)


def _validated(config: Config, device: torch.device) -> list[Finding]:
    """The errors of a run before it opens its data."""
    world, found = _world(config, device), []
    for subject, validation in VALIDATIONS.items():
        try:
            validation(config, world)
        except UserError as error:
            found.append(_failure(subject, error))
    return found


def _folder(config: Config, device: torch.device) -> Finding:
    validate_exclusive(Path(config.job.dump_folder))
    return Finding("ok", "folder", f"{config.job.dump_folder} can be written")


def _tokenizer(config: Config, device: torch.device) -> Finding:
    tokenizer = load_tokenizer(config.data.tokenizer)
    ids = tokenizer.encode(SAMPLE)
    text = f"{config.data.tokenizer}: {tokenizer.vocab_size} tokens, sample of {len(SAMPLE)} characters in {len(ids)}"
    if tokenizer.decode(ids) != SAMPLE:
        return Finding("failure", "tokenizer", f"{text} does not decode to itself", _OTHER_TOKENIZER)
    return Finding("ok", "tokenizer", f"{text}, round trip exact")


def _data(loaded: Config) -> Probe:
    """A probe of the data and of the checkpoint to resume from; `loaded` has each "auto" of the file."""

    def data(config: Config, device: torch.device) -> list[Finding]:
        opened: list[Origin | TrainingData] = []
        failure = []
        try:
            rehearse_inputs(loaded, _world(loaded, device), opened.append)
        except UserError as error:
            if opened and isinstance(opened[-1], Origin):
                raise
            failure = [Finding("failure", "run", str(error))]
        found = [each for each in opened if not isinstance(each, Origin)]
        of_corpora = (
            [line for label, each in labelled(found[-1]) for line in _of_corpus(label, each, loaded, device)]
            if found
            else []
        )
        return of_corpora + failure

    return data


def _of_corpus(label: str, corpus: Corpus, config: Config, device: torch.device) -> list[Finding]:
    """The lines on the data of a source and on its first sequence."""
    where = f"{corpus.data.source} {corpus.data.path}".strip()
    text = f"{label}{where}: {corpus.source.description}"
    faults = {fault.file: fault for fault in [*corpus.source.unreadable, *corpus.faults]}
    state, remedy = "ok", ""
    if faults:
        state = "warning"
        remedy = f"{len(faults)} of its files cannot be read and are skipped: {next(iter(faults.values()))}"
    return [Finding(state, "data", text, remedy), *_answers([_sequence(corpus)], config, device)]


def _sequence(corpus: Corpus) -> Probe:
    """A probe of the first sequence that a run would train on: decoding and encoding must give it back."""

    def sequence(config: Config, device: torch.device) -> Finding:
        with BatchLoader(corpus, [Shape(0, 1, config.training.seq_len)], num_workers=0) as loader:
            batch = next(loader)
        tokenizer, tokens = corpus.tokenizer, batch.text(0)
        ends = [index for index, token in enumerate(tokens) if token == tokenizer.eot_id]
        pieces = [tokens[begin + 1 : end] for begin, end in pairwise([-1, *ends, len(tokens)])]
        count = sum(map(bool, pieces))
        found = f"{len(tokens)} tokens of {count} document" + ("" if count == 1 else "s")
        if lost := _lost(tokenizer, pieces):
            text = f"{found}; decoded and encoded once more they are others: {_quoted(tokenizer.decode(lost[0]))}"
            return Finding("failure", "sequence", text, _OTHER_TOKENIZER)
        # The sequence may cut characters at its ends.
        text = " ".join(tokenizer.decode(piece).strip("\ufffd") for piece in pieces if piece)
        text = f"{found}, decoded and encoded once more without loss; it begins: {_quoted(text)}"
        return Finding("warning" if batch.excluded else "ok", "sequence", text)

    return sequence


def _lost(tokenizer: Tokenizer, pieces: list[list[int]]) -> list[list[int]]:
    """The pieces, each the tokens between two ends of text, that decoding and encoding do not give back."""
    texts = [tokenizer.decode(piece) for piece in pieces]
    again = [tokenizer.encode(text) for text in texts]
    # The sequence may cut the first and the last piece inside a word; then the tokens may differ, but not the text.
    full = slice(1, len(pieces) - 1)
    lost = [piece for piece, tokens in zip(pieces[full], again[full]) if tokens != piece]
    return lost + [piece for piece, text, tokens in zip(pieces, texts, again) if tokenizer.decode(tokens) != text]


def _quoted(text: str) -> str:
    """The beginning of a text, in quotes on one line."""
    return one_line(json.dumps(text[:_SHOWN], ensure_ascii=False)) + ("..." if len(text) > _SHOWN else "")


def _model(config: Config, device: torch.device) -> Finding:
    model = _resolved(config).model
    total, without_embeddings = parameter_counts(model)
    text = f"{total:,} parameters, {without_embeddings:,} without embeddings"
    return Finding("ok", "model", "; ".join([text, *(annex.summary(model) for annex in annexes_of(model).values())]))


def _matmuls(config: Config, device: torch.device) -> Finding:
    """The linear layers that float8 converts, and what may make it slower than bfloat16."""
    config = _resolved(config)
    coverage = float8_coverage(config)
    text = "\n         ".join(table(coverage, config.float8.recipe))
    doubts = "; ".join(dict.fromkeys(doubt for each in configs_of_stages(config) for doubt in _doubts(coverage, each)))
    return Finding("warning" if doubts else "ok", "matmuls", text, doubts)


def _doubts(coverage: list[LinearCoverage], config: Config) -> Iterator[str]:
    training = config.training
    return warnings(coverage, config, micro_batch_size(training.local_batch_size, training.global_batch_size, 1))


def _optimizer(config: Config, device: torch.device) -> Finding:
    resolved = _resolved(config)
    rows = group_table(resolved.model, config.optimizer)
    of_groups = "; ".join(f"{row.kind}: {row.elements:,} parameters" for row in rows)
    state = f"state of {_state_bytes(resolved) / 2**30:.2f} GiB over the ranks that share a copy"
    text = f"{config.optimizer.name}, {state}; {of_groups}"
    if may_save_by_float8_moments(config):
        saved = plan(resolved, _ranks(config)).worst.saved_by_float8_moments
        return Finding("ok", "optimizer", text, float8_moments_advice(saved) if saved else "")
    return Finding("ok", "optimizer", text)


def _stability(config: Config, device: torch.device) -> Finding:
    advice = stability_advice(config)
    return Finding("warning" if advice else "ok", "stability", "; ".join(advice) or "warm-up, sinks and clipping")


def _state_bytes(config: Config) -> int:
    """The bytes of the optimizer's state, over all shards of the model."""
    with torch.device("meta"):
        return state_bytes(SWAMLAModel(config.model), config.optimizer)


def _decided(config: Config, device: torch.device) -> Resolved:
    """The configuration with each "auto" resolved for this machine."""
    try:
        sized = _resolved(config)
    except UserError:
        sized = config  # the lines on tokenizer and model report why
    choice = resolve_auto(sized, _world(config, device))
    return Resolved(replace(choice.config, model=config.model), choice.lines)


def _ranks(config: Config) -> int:
    """The GPUs of this machine if the configuration fits them, else the product of its degrees."""
    here = max(torch.cuda.device_count(), 1)
    try:
        return fit_degrees(config.parallel, here).size
    except UserError:
        return ranks_asked_for(config.parallel)


def _resolved(config: Config) -> Config:
    return with_vocabulary(config, load_tokenizer(config.data.tokenizer).vocab_size)
