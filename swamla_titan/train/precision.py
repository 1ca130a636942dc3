"""Precision, determinism and seeds: process-wide switches in one place, set before anything compiles."""

import os
import random

import numpy as np
import torch

from swamla_titan.config import Config


def set_precision_and_determinism(config: Config, device: torch.device, rank: int = 0) -> None:
    """Set the precision of float32 matmuls, determinism (job.deterministic) and the seeds of this rank.

    TF32 of matmuls goes through `torch.set_float32_matmul_precision` alone, because torch raises on a mix with its
    newer `fp32_precision` attributes, and the compiler reads both, which only this call keeps consistent. cuDNN, which
    computes convolutions, has a switch of its own, which torch leaves on. On the CPU float32 stays exact, because TF32
    would mean bfloat16 matmuls there on some processors.
    """
    tf32 = config.training.fp32_precision == "tf32" and device.type == "cuda"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if config.job.deterministic:
        # cuBLAS is reproducible only with a fixed workspace, and reads this when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    random.seed(config.job.seed)
    np.random.seed(config.job.seed % 2**32)
    torch.manual_seed(seed_of(config.job.seed, rank, 0))


def seed_of(seed: int, rank: int, step: int) -> int:
    """The seed of torch's generators on a rank, for a run that starts at `step` without a saved random state."""
    # Ranks read different tokens, so their dropout must differ. Any odd multipliers would do.
    return (seed + 0x9E3779B97F4A7C15 * rank + 0xBF58476D1CE4E5B9 * step) % 2**63
