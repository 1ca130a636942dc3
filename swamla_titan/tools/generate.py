"""`generate`: continue prompts with the model of a checkpoint."""

from pathlib import Path
from typing import NamedTuple

import torch

from swamla_titan.checkpoint.manifest import CONFIG, VOCABULARY
from swamla_titan.checkpoint.reader import stored_groups
from swamla_titan.checkpoint.records import use_annex_record
from swamla_titan.checkpoint.state import Average, load_weights, require_weights
from swamla_titan.checkpoint.store import find_checkpoint
from swamla_titan.config import Config, load_config
from swamla_titan.data import Tokenizer, load_tokenizer
from swamla_titan.errors import UserError
from swamla_titan.escaping import several_lines
from swamla_titan.model import SWAMLAModel
from swamla_titan.model.generation import check_options, generate
from swamla_titan.model.row_table import row_tables
from swamla_titan.train.step import GROUPS

LARGEST_SEED = 2**63 - 1  # of torch's generators


class LoadedModel(NamedTuple):
    """What a checkpoint holds of what is needed here; the tokenizer only where it came from a file."""

    config: Config
    tokenizer: Tokenizer | None
    model: SWAMLAModel


def load_model(path: Path, ema: bool, device: torch.device | None = None) -> LoadedModel:
    """The content of a checkpoint; UserError if it does not fit together. `device`: None: a GPU, if there is one.

    Tables of embeddings are kept in the memory of the host if the run kept them there, or if a GPU has no room.
    """
    config = load_config(path / CONFIG)
    if not config.model.vocab_size:
        raise UserError(f"{path / CONFIG} lacks model.vocab_size")
    vocabulary = path / VOCABULARY
    tokenizer = load_tokenizer(str(vocabulary)) if vocabulary.exists() else None
    if tokenizer and tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(f"{vocabulary} has {tokenizer.vocab_size} tokens, and the model {config.model.vocab_size}")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = SWAMLAModel(config.model)
    require_weights(path, model, ema)  # before there is memory for what nobody stored
    if config.parallel.tables_on_host or not _fits(model, device):
        for table in row_tables(model).values():
            table.keep_on_host(device)
    model.to_empty(device=device)
    load_weights(path, model, ema)
    use_annex_record(path, config, model, tokenizer)
    if device.type == "cuda":  # a CPU is exact, and no slower, in float32
        model.to(getattr(torch, config.training.compute_dtype))
    return LoadedModel(config, tokenizer, model.eval())


def _fits(model: SWAMLAModel, device: torch.device) -> bool:
    """Whether a device has memory for all weights in float32, as checkpoints hold them."""
    return (
        device.type != "cuda" or sum(each.nbytes for each in model.parameters()) <= torch.cuda.mem_get_info(device)[0]
    )


def generate_from_checkpoint(
    checkpoint: str,
    prompt: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    ema: bool = False,
    memory_budget: int | None = None,
) -> None:
    """Print each prompt with its continuation, which ends at the end-of-text token or after `max_new_tokens`.

    `ema`: by the average of the weights (ema.decay). `memory_budget`: tokens that layers with selective attention keep.

    What a terminal would take for a command is printed escaped. Raises UserError for a checkpoint that cannot be used,
    and for sampling values or lengths out of range.
    """
    _check_options(max_new_tokens, temperature, top_k, top_p, seed)
    found: dict[Path, LoadedModel] = {}

    def load(path: Path) -> None:
        if not ema or Average.group in stored_groups(path):
            found[path] = load_model(path, ema)

    path = find_checkpoint(checkpoint, GROUPS, load)
    if path not in found:
        raise UserError(f"{path} holds no average of the weights: it was trained with ema.decay = 0")
    config, tokenizer, model = found[path]
    tokenizer = tokenizer or load_tokenizer(config.data.tokenizer)
    prompt = tuple(map(_as_text, prompt))
    prompts = _prompts(prompt, tokenizer, config.data.document_mask)
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    try:
        continuations = generate(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_token=tokenizer.eot_id,
            generator=generator,
            memory_budget=memory_budget,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    for text, tokens in zip(prompt, continuations):
        print(several_lines(text + tokenizer.decode([token for token in tokens if token != tokenizer.eot_id])))
        if len(prompt) > 1:
            print("-" * 40)


def _check_options(max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """Raise UserError for options out of range before a checkpoint is read, which may take a minute."""
    try:
        check_options(max_new_tokens, temperature, top_k, top_p)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed = {str(seed)[:40]}: expected 0 ... {LARGEST_SEED}")


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
