"""The real command with a model that has two row tables, one looked up by tokens and one by positions.

Any stage of a pipeline can compute with positions. The second has 2 rows, so some of three ranks or more have none.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.row_table import RowTable
from swamla_titan.parallel.pipeline import ModelStage
from tests.distributed.job import run

ROWS = 101  # neither 2 nor 3 ranks divide it
LAYER = "1"  # in front of which the second is added


def run_with_tables(config: str, *overrides: str) -> int:
    """`job.run`, of a model with tables."""
    with models_with_tables():
        return run(config, *overrides)


@contextlib.contextmanager
def models_with_tables() -> Iterator[None]:
    """Within, every model that this process makes has two tables."""
    made, made_stage, embed = SWAMLAModel.__init__, ModelStage.__init__, SWAMLAModel.embed

    def init(self: Any, config: ModelConfig) -> None:
        made(self, config)
        device = self.embedding.weight.device
        with torch.device(device):
            self.token_table, self.layer_table = RowTable(ROWS, config.dim), RowTable(2, config.dim)
        self.blocks[LAYER].register_forward_pre_hook(lambda block, inputs: add_by_position(self, block, *inputs))
        if device.type != "meta":
            self.init_weights(0)

    def init_stage(self: Any, *arguments: Any) -> None:
        made_stage(self, *arguments)
        if not self.is_first:
            del self.token_table
        if LAYER not in self.blocks:
            del self.layer_table

    def embed_with_table(self: Any, tokens: Tensor) -> Tensor:
        x = embed(self, tokens)
        return x + self.token_table(own_tokens(tokens, x) * 31 % ROWS, x.dtype)

    def add_by_position(self: Any, block: Any, x: Tensor, context: Any) -> tuple[Tensor, Any]:
        positions = context[block.kind].positions.expand(len(x), -1)
        return x + self.layer_table(own_tokens(positions, x) % 2, x.dtype), context

    SWAMLAModel.__init__, ModelStage.__init__ = init, init_stage  # type: ignore[method-assign]
    SWAMLAModel.embed = embed_with_table  # type: ignore[method-assign]
    try:
        yield
    finally:
        SWAMLAModel.__init__, ModelStage.__init__ = made, made_stage  # type: ignore[method-assign]
        SWAMLAModel.embed = embed  # type: ignore[method-assign]


def own_tokens(of_tokens: Tensor, x: Tensor) -> Tensor:
    """The columns of [B, t] of which this rank's residual stream is, which tensor-parallel ranks share."""
    ranks = of_tokens.shape[1] // x.shape[1]
    return of_tokens.chunk(ranks, 1)[dist.get_rank() % ranks] if ranks > 1 else of_tokens
