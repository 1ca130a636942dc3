"""The tensor-parallel plan of an exported folder, under torchrun on CPU: python -m torch.distributed.run ... FOLDER."""

import sys

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

torch.manual_seed(0)
tokens = torch.randint(0, 257, (2, 40))
full, sharded = (
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, **options).eval()
    for options in ({}, {"tp_plan": "auto"})
)
if full.config.selection_head is not None:
    try:
        sharded(tokens)
    except ValueError as error:
        print(f"refused: {error}")
        sys.exit()
weight = sharded.model.blocks[0].attention.wqkv.weight
rows = weight.to_local().shape[0] if isinstance(weight, DTensor) else weight.shape[0]
assert rows == full.model.blocks[0].attention.wqkv.weight.shape[0] // 2
with torch.no_grad():
    assert torch.allclose(sharded(tokens).logits, full(tokens).logits, atol=1e-5)
options = {"max_new_tokens": 20, "do_sample": False}
assert torch.equal(sharded.generate(tokens[:, :10], **options), full.generate(tokens[:, :10], **options))
print("equal")
