"""Which share of the rows of all tables training has looked up: since it began, and since the last log line."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from swamla_titan.distributed.dtensor import local
from swamla_titan.distributed.mesh import World
from swamla_titan.optim.grouped import GroupedOptimizer
from swamla_titan.train.policy import Policy


class TouchedRows(Policy):
    """Reads the optimizer's `touched`, which holds of each row the number of the step that last looked it up.

    Rows of steps that were skipped as bad do not count.
    """

    def __init__(self, optimizers: Sequence[GroupedOptimizer], world: World) -> None:
        """`optimizers`: of this rank's parts of the model."""
        self._world = world
        self._states: list[Mapping[str, Tensor]] = [
            optimizer.state[weight] for optimizer in optimizers for weight in optimizer.tables
        ]
        self._since = [state["step"].clone() for state in self._states]

    def is_needed(self) -> bool:
        """Whether any rank has tables; all ranks call this."""
        return self._world.all_reduce_max(float(bool(self._states))) > 0

    def begin(self, step: int) -> None:
        """Count from here on."""
        for state, since in zip(self._states, self._since):
            since.copy_(state["step"])

    @contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """A rewind takes the numbers of steps back."""
        yield
        if doing == "rewind":
            self.begin(0)

    def metrics(self) -> dict[str, float | int]:
        """The two shares; waits for the device. All ranks call this."""
        counts = torch.zeros(3, dtype=torch.float64, device=self._world.device)
        for state, since in zip(self._states, self._since):
            touched = local(state["touched"])
            rows = torch.full_like(since, touched.numel(), dtype=torch.float64)
            counts += torch.stack(((touched > 0).sum(), (touched > since).sum(), rows)).to(counts.device)
        self.begin(0)
        if self._world.size > 1:
            dist.all_reduce(counts)
        ever, lately, rows_of_all = counts.tolist()
        return {"table_rows_touched": ever / rows_of_all, "table_rows_touched_lately": lately / rows_of_all}
