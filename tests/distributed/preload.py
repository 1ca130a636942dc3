"""What the server of rank processes imports before it forks the first: each rank then starts with all of it.

Without the last few, each rank of a test of float8 or of compiled blocks imports for three seconds. Frozen, the
server's objects are passed over by a rank's garbage collector, which would otherwise copy every page they lie on.
"""

import gc

import pytest  # noqa: F401
import torch._dynamo.backends.debugging
import torch._inductor.compile_fx
import torch.distributed.checkpoint
import torch.profiler  # noqa: F401

import swamla_titan.quantization.float8  # noqa: F401
import tests.distributed.job  # noqa: F401

gc.collect()
gc.freeze()
