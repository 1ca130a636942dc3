"""Checks of a package that has one annex more (toy.patch); tests/model/test_toy_annex.py runs them on a copy.

Nothing here, and nothing in the package but what the patch touches, knows what the toy looks up.
"""

from dataclasses import replace

import pytest
import torch

from swamla_titan.config import Config, Override, load_config
from swamla_titan.config.sections import ActivationCheckpoint, Compile, Optimizer, Training
from swamla_titan.data.batches import MicroBatch
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.cache import DecodeCache
from swamla_titan.model.flops import training_flops
from swamla_titan.optim import build_optimizer, group_table, set_learning_rate
from swamla_titan.parallel.model_parts import ParallelModel
from swamla_titan.tools.plan import plan
from swamla_titan.tools.plan_report import report

WITHOUT = ModelConfig(
    num_layers=3,
    dim=64,
    num_heads=2,
    vocab_size=50,
    max_seq_len=64,
    swa_window=6,
    swa_sink_size=3,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
)
MODEL = replace(WITHOUT, **{"previous": {"layers": [0, 2], "width": 16}})
CONFIG = Config(
    model=MODEL,
    training=Training(seq_len=24, local_batch_size=2, global_batch_size=2, compute_dtype="float32"),
    compile=Compile(enabled=False),
    optimizer=Optimizer(name="muon"),
)


def batch() -> MicroBatch:
    tokens = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0] * 11 + [1] * 13, [0] * 24])
    return MicroBatch(tokens, tokens.roll(-1, 1), ids, 2)


def model() -> SWAMLAModel:
    made = SWAMLAModel(MODEL).to(torch.float64).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return made


def test_documents_do_not_see_each_other():
    made, given = model(), batch()
    other = given.tokens.clone()
    other[0, :11] = 7
    logits = [made(tokens, None, given.document_ids) for tokens in (given.tokens, other)]
    assert torch.equal(logits[0][0, 11:], logits[1][0, 11:])
    assert not torch.equal(logits[0][0, :11], logits[1][0, :11])


def test_decoding_equals_the_full_forward_pass():
    made, text = model(), torch.randint(0, 50, (1, 20))
    cache = DecodeCache(made, 1, 20)
    logits = made.prefill(text[:, :8], cache, torch.tensor([8]))
    for length in range(8, 20):
        with torch.no_grad():
            torch.testing.assert_close(logits, made(text[:, :length])[:, -1], rtol=0, atol=1e-11)
        logits = made.decode(text[:, length : length + 1], cache)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_it_trains_beside_muon_recomputed_or_not(mode):
    config = replace(CONFIG, activation_checkpoint=ActivationCheckpoint(mode=mode))
    parallel_model = ParallelModel(config, World.alone(torch.device("cpu")))
    parallel_model.init_weights(0)
    (part,) = parallel_model.parts
    table = part.annexes["0"]["previous"].table.weight
    before, losses = table.detach().clone(), []
    optimizer = build_optimizer(part, config.optimizer)
    set_learning_rate(optimizer, 0.01)
    for _ in range(4):
        losses.append(parallel_model.train_step([batch()], 48.0).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    moved = (table != before).any(dim=1)
    looked_up = set(batch().tokens.unique().tolist()) | {50}
    assert 0 < moved.sum() <= len(looked_up)
    assert all(row in looked_up for row in moved.nonzero().flatten().tolist())


def test_flops_groups_and_plan_count_it():
    up = 2 * 16 * 64  # of both layers
    assert training_flops(MODEL, 24) - training_flops(WITHOUT, 24) == 6 * 24 * up
    tables = [row for row in group_table(MODEL, CONFIG.optimizer) if row.kind.rule == "rows"]
    assert sum(row.elements for row in tables) == 2 * 51 * 16
    assert any("previous.table" in line for line in report(plan(CONFIG, 1)))


def test_its_keys_come_from_its_section_and_are_held_against_the_model(tmp_path):
    file = tmp_path / "a.toml"
    lines = "[data]", 'source = "builtin"', "[training]", "seq_len = 64", "[model]", 'flavor = "debug"'
    file.write_text("\n".join((*lines, "[model.previous]", "layers = [1]")))
    assert load_config(file).model.previous.layers == (1,)
    assert load_config(file, [Override("model.previous", "width", "8")]).model.previous.width == 8
    with pytest.raises(UserError, match="there is no layer 9"):
        load_config(file, [Override("model.previous", "layers", "9")])
