"""Process-wide switches of numerics: one place, set before anything compiles."""

import os
import random

import numpy as np
import torch

from swamla_titan.config import Config


def set_numerics(config: Config, device: torch.device, rank: int = 0) -> None:
    """Precision of float32 products, determinism and seeds.

    TF32 goes through `torch.set_float32_matmul_precision` alone: torch refuses a mix with its newer
    `fp32_precision` attributes, and the compiler reads both but only this call keeps the two in step.
    On the CPU float32 stays exact, as TF32 there would mean bfloat16 products on some processors.
    """
    tf32 = config.training.fp32_precision == "tf32" and device.type == "cuda"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if config.job.deterministic:
        # cuBLAS is reproducible only with a fixed workspace, and reads this when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    random.seed(config.job.seed)
    np.random.seed(config.job.seed % 2**32)
    torch.manual_seed(seed_of(config.job.seed, rank, 0))


def seed_of(seed: int, rank: int, step: int) -> int:
    """Seed of torch's generators on a rank, at the start of the run, or at a step that it has no saved state of."""
    # Ranks hold different tokens, and their dropout must differ. Any odd multipliers would do.
    return (seed + 0x9E3779B97F4A7C15 * rank + 0xBF58476D1CE4E5B9 * step) % 2**63
