"""Asynchronous tensor parallelism: gathers and scatter-sums in pieces, each under the matrix product of another piece.

The compiler does it. Its pass replaces a gather that feeds a product, and a product that feeds a scatter-sum, by fused
operators that read the other GPUs' memory directly (symmetric memory), which hides most of the communication.
"""

import warnings

from torch.distributed.device_mesh import DeviceMesh


def enable_async_tensor_parallel(mesh: DeviceMesh) -> None:
    """Have what is compiled from here on overlap the communication of `mesh` (World.weights["tensor"]).

    The ranks of `mesh` must be GPUs that reach each other's memory: of one host, or of one NVLink domain.
    """
    assert mesh.device_type == "cuda", "refused in distributed/mesh.py"
    import torch._inductor.config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    with warnings.catch_warnings():
        # Said to be needless, but the pass (torch 2.11 to 2.13) skips groups for which it was not called.
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(mesh.get_group().group_name)
