"""The states of torch's random generators as tensors, so that a checkpoint can hold them."""

import torch


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Copies of the CPU generator's state and, on CUDA, of the device's; uint8."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
