"""The commands `plan` and `train --dry-run`: what would be trained, and whether the run can begin."""

import dataclasses
from pathlib import Path

from swamla_titan.config import Config, with_vocabulary
from swamla_titan.config.sections import MOST_RANKS
from swamla_titan.config.stability import stability_advice
from swamla_titan.config.toml import shown
from swamla_titan.data import described, load_tokenizer, uneven
from swamla_titan.distributed.degrees import fit_degrees
from swamla_titan.distributed.mesh import ELSEWHERE, World
from swamla_titan.errors import UserError
from swamla_titan.escaping import one_line
from swamla_titan.launch.process_group import device_here, launched_rank
from swamla_titan.launch.worker import launched_size
from swamla_titan.tools.plan import Plan, plan, ranks_asked_for
from swamla_titan.tools.plan_report import report
from swamla_titan.train.setup import Setup, rehearse


def print_plan(config: Config, gpus: int | None) -> None:
    """Print the plan on `gpus` ranks, None: as many as the degrees of the configuration multiply to.

    Raises UserError if the degrees do not fit, or the tokenizer, whose vocabulary the model needs, cannot be had.
    """
    ranks = _positive(gpus) or ranks_asked_for(config.parallel)
    config = with_vocabulary(config, load_tokenizer(config.data.tokenizer).vocab_size)
    lines = list(report(plan(config, ranks)))
    if gpus is None:
        print("(no --gpus: the product of the degrees in [parallel], -1 taken as 1)")
    print("\n".join(lines))


def dry_run(config: Config, gpus: int | None) -> None:
    """Raise UserError for what `train` would refuse on `gpus` ranks (None: those that the launcher started); print.

    Writes nothing. Where there is no GPU here, those of the run are elsewhere, and what only they can tell is left out.
    Under a launcher rank 0 prints.
    """
    ranks = _positive(gpus) or launched_size()
    here = device_here()
    world = World.planned(fit_degrees(config.parallel, ranks), here if here.type == "cuda" else ELSEWHERE)
    setup = rehearse(config, world)
    found = dataclasses.replace(plan(setup.config, ranks), choices=setup.choices)
    if launched_rank() == 0:
        _print(setup, found)


def _print(setup: Setup, found: Plan) -> None:
    config, corpus, newest = setup.config, setup.corpus, setup.origin.path
    if newest is None:
        begin = "begins at step 1"
    elif setup.train_state.step < config.training.steps:
        begin = f"continues from {newest}"
    else:
        begin = f"has taken all {config.training.steps} steps, see {newest}"
    print("\n".join(report(found)))
    for advice in stability_advice(config):
        print(f"warning: {one_line(advice)}")
    data = f"{corpus.source.describe()}; {described(corpus.segments[-1])}"
    run = one_line(f"{Path(config.job.dump_folder)} {begin}")
    print(f"\ndata: {one_line(data)}\nrun: {run}\ndry run: nothing is refused, nothing was written")
    if warning := uneven(corpus.source, corpus.segments[-1], config.training.seq_len):
        print(f"warning: {one_line(warning)}")


def _positive(gpus: int | None) -> int | None:
    if gpus is not None and not 1 <= gpus <= MOST_RANKS:
        raise UserError(f"--gpus {shown(gpus)}: expected a number from 1 to {MOST_RANKS}")
    return gpus
