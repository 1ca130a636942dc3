"""Where the numbers of a run go: one line on the console, metrics.jsonl, TensorBoard, Weights & Biases."""

import json
import logging
import math
import secrets
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from swamla_titan.config.sections import Metrics
from swamla_titan.errors import UserError

logger = logging.getLogger(__name__)

Values = dict[str, float | int]


class MetricsLogger:
    """Sends the values of a step to every destination that the configuration asks for.

    metrics.jsonl gets one object per call, appended and flushed; a key that does not apply is left out.
    """

    def __init__(self, config: Metrics, folder: Path, run_config: dict[str, Any], step: int, steps: int) -> None:
        self._wandb = _start_wandb(config, folder, run_config) if config.wandb else None
        self._file = _open_for_appending(folder / "metrics.jsonl")
        self._tensorboard = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # imported late: it takes a second

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        show = config.progress_bar and sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=not show, dynamic_ncols=True, leave=False)

    def advance(self) -> None:
        """One more step is done; moves the progress bar only."""
        self._bar.update()

    def log(self, step: int, values: Values, line: str) -> None:
        """Write the values of a step everywhere, and `line` to the console and the log."""
        # JSON has no word for NaN or infinity; null keeps the line readable by any reader.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step} | finite) + "\n")
        self._file.flush()
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)
        logger.info(line)

    def close(self) -> None:
        """Flush and close every destination."""
        self._bar.close()
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def step_line(step: int, steps: int, values: Values, eta_seconds: float) -> str:
    """The console's line for a step; parts that do not apply are left out."""
    width = len(str(steps))
    parts = [
        f"step {step:>{width}}/{steps}",
        f"loss {values['loss']:.4f}",
        f"grad norm {values['grad_norm']:.3f}",
        f"lr {values['lr']:.2e}",
        f"{_thousands(values['tokens_per_second'])} tokens/s",
    ]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    parts.append(f"{values['memory_gib']:.2f} GiB")
    parts.append(f"ETA {_clock(eta_seconds)}")
    return " | ".join(parts)


def _thousands(rate: float) -> str:
    return f"{rate / 1000:.1f}K" if rate >= 1000 else f"{rate:.0f}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def _open_for_appending(path: Path) -> Any:
    """Open a file of lines; a last line that a crash cut short is ended, so that the next one starts on its own."""
    file = path.open("a+b")
    if file.tell() > 0:
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.write(b"\n")
    file.close()
    return path.open("a", encoding="utf-8")


def require_wandb() -> Any:
    """The package `wandb`; raises UserError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("metrics.wandb = true needs the package: pip install wandb, or set it to false") from None
    return wandb


def _start_wandb(config: Metrics, folder: Path, run_config: dict[str, Any]) -> Any:
    # The id lies in the dump folder, so a resumed run goes on in its own W&B run. The folder's name would not do:
    # it may be that of another run of the same project.
    id_file = folder / "wandb" / "run-id.txt"
    if not id_file.exists():
        id_file.parent.mkdir(exist_ok=True)
        id_file.write_text(secrets.token_hex(8))
    return require_wandb().init(
        project=config.wandb_project,
        name=folder.resolve().name,
        id=id_file.read_text().strip(),
        resume="allow",
        dir=folder,
        config=run_config,
    )
