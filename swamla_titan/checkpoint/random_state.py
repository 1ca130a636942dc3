"""The states of torch's random generators as tensors, so that a checkpoint can hold them."""

import torch


def random_state(device: torch.device, rank: int) -> dict[str, torch.Tensor]:
    """Copies of the CPU generator's state and, on CUDA, of the device's; uint8, named after the rank.

    Ranks draw different numbers (for dropout), so each has states of its own.
    """
    state = {f"rank-{rank}.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state[f"rank-{rank}.cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device, rank: int) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state[f"rank-{rank}.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[f"rank-{rank}.cuda"], device)


def random_state_problem(state: dict[str, torch.Tensor]) -> str | None:
    """What in the states of all ranks, which `random_state` gave, a generator would not take."""
    for name, each in state.items():
        if name.endswith(".cuda"):  # a seed and an offset of eight bytes each; the GPU draws four numbers at once
            offset = each.view(torch.int64)[1] % 4 if each.shape == (16,) and each.dtype == torch.uint8 else 1
            fits = int(offset) == 0
        else:
            try:
                torch.Generator().set_state(each)
                fits = True
            except (RuntimeError, TypeError):
                fits = False
        if not fits:
            return f"{name[:80]} is no state of a generator"
    return None
