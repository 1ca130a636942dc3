"""The folder that receives everything a run writes."""

import logging
from pathlib import Path

from swamla_titan.errors import UserError


def prepare_folder(folder: Path, config_text: str) -> None:
    """Make the dump folder and write the resolved configuration; raises UserError where that is impossible.

    What else will be written there is tried first, so that a folder in which a run cannot work is left as it is.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("checkpoints", "logs"):
            (folder / name).mkdir(exist_ok=True)
        (folder / "metrics.jsonl").open("a").close()
        (folder / "config.toml").write_text(config_text)
    except OSError as error:
        reason = f"{error.filename} is a file" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"job.dump_folder = {folder}: cannot be written ({reason})") from None


def log_to_folder(folder: Path, rank: int) -> None:
    """Also append them to logs/rank-N.log under the dump folder."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "logs" / f"rank-{rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("swamla_titan").addHandler(handler)
