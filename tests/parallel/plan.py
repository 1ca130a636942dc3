"""A small model and batch for what is applied to blocks, and what a forward and backward pass of it did."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swamla_titan.config.sections import ActivationCheckpoint
from swamla_titan.model import ModelConfig, SWAMLAModel

# Every width a multiple of 16, for float8.
SMALL = {
    "num_layers": 3,
    "dim": 64,
    "num_heads": 2,
    "vocab_size": 50,
    "max_seq_len": 64,
    "swa_window": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,  # as wide as queries and keys, else SDPA on a CPU has no attention operator
}
MODES = {
    "none": ActivationCheckpoint(),
    "blocks": ActivationCheckpoint(mode="selective", selective="blocks", every_n_blocks=3),
    "operators": ActivationCheckpoint(mode="selective", selective="operators"),
    "full": ActivationCheckpoint(mode="full"),
    # of residual branches; the second of three blocks is a SWA block
    "attention": ActivationCheckpoint(mode="full", modules="attention"),
    "feed_forward": ActivationCheckpoint(mode="full", modules="feed_forward"),
    "both": ActivationCheckpoint(mode="full", modules="both"),
    "attention of one": ActivationCheckpoint(mode="selective", selective="blocks", modules="attention"),
    "operators of both": ActivationCheckpoint(mode="selective", modules="both"),
}
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
PRODUCT = torch.ops.aten.mm.default


def small_model(dtype: torch.dtype = torch.float64, **changes: Any) -> SWAMLAModel:
    """In training mode, with weights large enough for each part to matter in the gradients."""
    model = SWAMLAModel(ModelConfig(**(SMALL | changes))).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def batch(rows: int = 2) -> Tensor:
    return torch.randint(0, 50, (rows, 64), generator=torch.Generator().manual_seed(1))


def gradients(model: SWAMLAModel) -> dict[str, Tensor]:
    """By name, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found


class Witness(TorchDispatchMode):
    """Counts operators, and knows which of the memory that they made is still held."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[Any] = Counter()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Compiled code repeats what may draw random numbers from within this one.
        self.operators[args[1] if operator is torch.ops.higher_order.run_with_rng_state else operator] += 1
        out = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def held(self) -> int:
        """Bytes."""
        return sum(size for storage, size in self._made.values() if not storage.expired())


@dataclass
class Seen:
    loss: float
    gradients: dict[str, Tensor]
    kept: int  # bytes held between the passes
    forward: Counter[Any] = field(default_factory=Counter)
    backward: Counter[Any] = field(default_factory=Counter)


def watch(model: SWAMLAModel, tokens: Tensor, seed: int = 5) -> Seen:
    """A step's two passes, watched."""
    model.zero_grad()
    torch.manual_seed(seed)
    with Witness() as forward:
        loss = model(tokens, tokens)
    kept = forward.held()
    with Witness() as backward:
        loss.backward()
    return Seen(loss.item(), gradients(model), kept, forward.operators, backward.operators)


def watch_compiled(model: SWAMLAModel, tokens: Tensor) -> Seen:
    """The same of code that was compiled with operators left in it; no mode may watch its forward pass."""
    model(tokens, tokens).backward()
    model.zero_grad()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, tokens)
    with Witness() as backward:
        loss.backward()
    return Seen(loss.item(), gradients(model), sum(saved.values()), backward=backward.operators)
