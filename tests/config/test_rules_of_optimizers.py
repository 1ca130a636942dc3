"""Keys of [optimizer], [ema] and [validation] that cannot hold together with others."""

import pytest

from swamla_titan.config.optimizer_rules import optimizer_conflicts
from swamla_titan.config.sections import EMA, Config, Optimizer, Parallel, Validation
from swamla_titan.model import FLAVORS, ModelConfig
from swamla_titan.model.annex_config import EngramConfig

OFFLOADED = Parallel(cpu_offload=True)


@pytest.mark.parametrize(
    "config, keys, way_out",
    [
        (Config(optimizer=Optimizer(moments="bfloat16", beta2=0.995)), ("moments", "beta2"), 'or "float32"'),
        (Config(optimizer=Optimizer(moments="bfloat16", beta1=0.999)), ("moments", "beta1"), "use beta1 <= 0.99"),
        (
            Config(optimizer=Optimizer(name="lion", moments="bfloat16", beta2=0.999)),
            ("moments", "beta2"),
            "use beta2 <= 0.99",
        ),
        (
            Config(optimizer=Optimizer(name="muon", moments="bfloat16", muon_momentum=0.995)),
            ("moments", "muon_momentum"),
            "use muon_momentum <= 0.99",
        ),
        (Config(optimizer=Optimizer(name="muon"), parallel=OFFLOADED), ("name", "parallel.cpu_offload"), '"lion"'),
        (Config(optimizer=Optimizer(name="adamw_fp8"), parallel=OFFLOADED), ("name", "parallel.cpu_offload"), "adamw"),
        (
            Config(model=ModelConfig(engram=EngramConfig((1,))), parallel=OFFLOADED),
            ("parallel.cpu_offload", "model.engram.layers"),
            "the tables of engram are looked up on the device",
        ),
        (
            Config(optimizer=Optimizer(lr_multipliers={"norm.weight": 1.0, "blocks.9.*": 2.0}), model=FLAVORS["debug"]),
            ("lr_multipliers", "model.flavor", "model.num_layers"),
            '"blocks.9.*" matches no parameter',
        ),
        (
            Config(optimizer=Optimizer(lr_multipliers={"head.*": 2.0}), model=FLAVORS["debug"]),
            ("lr_multipliers", "model.flavor", "model.num_layers"),
            "the head is the embedding's (model.tie_embeddings); among them are embedding.weight",
        ),
    ],
)
def test_refused(config: Config, keys: tuple[str, ...], way_out: str):
    [found] = optimizer_conflicts(config)
    assert found.keys == tuple(key if "." in key else f"optimizer.{key}" for key in keys)
    assert way_out in found.problem


@pytest.mark.parametrize(
    "config",
    [
        Config(optimizer=Optimizer(name="lion", moments="bfloat16", beta2=0.99), parallel=OFFLOADED),
        Config(optimizer=Optimizer(name="muon", muon_ns_steps=6, moments="bfloat16")),
        Config(ema=EMA(decay=0.9), validation=Validation(use_ema=True)),
        Config(optimizer=Optimizer(lr_multipliers={"*": 1.0, "blocks.5.*": 2.0}), model=FLAVORS["debug"]),
    ],
)
def test_allowed(config: Config):
    assert list(optimizer_conflicts(config)) == []
