"""Rules that tie keys of different sections together."""

from collections.abc import Iterator

from swamla_titan.config.sections import Config


def contradictions(config: Config) -> Iterator[tuple[str, str, str]]:
    """(section, key, problem) for each pair of keys that cannot both hold."""
    data, training, schedule = config.data, config.training, config.lr_schedule
    if training.seq_len > config.model.max_seq_len:
        yield (
            "training",
            "seq_len",
            f"{training.seq_len} is longer than model.max_seq_len = {config.model.max_seq_len}; raise that or shorten this",
        )
    if data.source == "builtin" and data.path:
        yield (
            "data",
            "path",
            f'"{data.path}" would not be read by data.source = "builtin"; use "local" or remove the path',
        )
    if data.source != "builtin" and not data.path:
        wanted = "a file or folder" if data.source == "local" else "the name of a dataset"
        yield "data", "path", f'data.source = "{data.source}" needs {wanted} here'
    if data.name and data.source != "huggingface":
        yield "data", "name", f'"{data.name}" names a Hugging Face configuration, but data.source = "{data.source}"'
    if data.text_separator and data.source != "local":
        yield "data", "text_separator", f'applies to local text files, but data.source = "{data.source}"'
    if schedule.decay_steps and schedule.name != "wsd":
        yield "lr_schedule", "decay_steps", f'{schedule.decay_steps} applies to name = "wsd", not "{schedule.name}"'
    if schedule.warmup_steps + schedule.decay_steps > training.steps and schedule.decay_steps:
        total = schedule.warmup_steps + schedule.decay_steps
        yield (
            "lr_schedule",
            "decay_steps",
            f"warm-up and decay take {total} steps, more than training.steps = {training.steps}",
        )
    if config.validation.interval and not config.validation.path and config.validation.fraction == 0:
        yield "validation", "fraction", "0 holds nothing out: give validation.path, or set validation.interval = 0"
