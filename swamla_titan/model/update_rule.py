"""What a module declares of how the optimizer moves its parameters."""

from dataclasses import dataclass


@dataclass(frozen=True)
class UpdateRule:
    """How a module's own parameters move, whatever optimizer.name is; a module declares it as `update_rule`.

    `by_rows`: Adam with float32 moments, of the rows that a step looked up; for RowTable and its subclasses alone.
    `lr_multiplier`: a factor of the learning rate, beside that of optimizer.lr_multipliers. `decays`: False: no weight
    decay; where rows that were looked up move alone, they alone decay.
    """

    by_rows: bool = False
    lr_multiplier: float = 1.0
    decays: bool = True
