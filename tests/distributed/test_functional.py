"""Collectives called as operators have gradients whatever else has been imported."""

import subprocess
import sys

from tests.waiting import HANG

SCRIPT = """
import torch
import torch.distributed as dist
from swamla_titan.distributed.collectives import OPERATORS, waited
from tests.waiting import HANG

store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
x = torch.ones(2, 3, requires_grad=True)
waited(OPERATORS.all_gather_into_tensor(2 * x, 1, dist.group.WORLD.group_name)).sum().backward()
print(x.grad.unique().tolist())
"""


def test_the_module_alone_is_enough_for_a_gradient():
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=HANG)
    assert ran.stdout.strip() == "[2.0]", ran.stderr
