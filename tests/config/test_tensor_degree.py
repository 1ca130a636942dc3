"""What tensor parallelism needs of a model's shape, with the numbers, without torch.distributed."""

import subprocess
import sys
from dataclasses import replace

import pytest

from swamla_titan.config.tensor_degree import FFN_GROUP, tensor_parallel_problems
from swamla_titan.model import FLAVORS, ModelConfig
from swamla_titan.model.feed_forward import GROUP

FITS = ModelConfig(dim=768, num_heads=12, num_kv_heads=6, ffn_hidden_dim=768, vocab_size=50257)


@pytest.mark.parametrize("tensor", [1, 2, 3, 6])
def test_nothing_to_say_where_all_divides(tensor):
    assert tensor_parallel_problems(FITS, tensor, 2048 * 3) == []


@pytest.mark.parametrize(
    "changes, tensor, seq_len, expected",
    [
        ({"num_heads": 16, "num_kv_heads": 0}, 3, 33, "does not divide model.num_heads = 16: parallel.tensor = 1"),
        ({"num_kv_heads": 4}, 6, 36, "parallel.tensor = 6 does not divide model.num_kv_heads = 4: parallel.tensor = 2"),
        ({"ffn_hidden_dim": 640}, 2, 64, "does not divide the 5 groups of 128 in a feed-forward width of 640"),
        ({"ffn_hidden_dim": 96}, 2, 64, "does not divide the 3 groups of 32 in a feed-forward width of 96"),
        ({}, 2, 63, "parallel.tensor = 2 does not divide 63 tokens of a row: parallel.tensor = 1 divides all"),
        (
            {"vocab_size": 1000},
            3,
            63,
            "padded to 1024: parallel.tensor = 1 divides all, or set model.vocab_size = 1152",
        ),
    ],
)
def test_each_number_that_does_not_divide_is_named_with_a_way_out(changes, tensor, seq_len, expected):
    model = replace(FITS, **changes)
    (problem,) = tensor_parallel_problems(model, tensor, seq_len)
    assert expected in problem
    way_out = int(problem.split("parallel.tensor = ")[2].split()[0])
    assert tensor_parallel_problems(model, way_out, seq_len) == []


def test_the_larger_vocabulary_that_is_suggested_divides():
    assert tensor_parallel_problems(replace(FITS, vocab_size=1152), 3) == []


def test_what_is_not_known_yet_or_not_used_is_no_problem():
    assert tensor_parallel_problems(replace(FITS, vocab_size=0), 3) == []
    all_mla = replace(FITS, num_kv_heads=1, swa_layers_per_cycle=0)
    assert tensor_parallel_problems(all_mla, 3) == []
    assert FFN_GROUP == GROUP


@pytest.mark.parametrize("flavor", ["small", "base", "large", "xl", "150m", "400m", "800m", "2b"])
def test_the_flavors_can_be_shared_by_two(flavor):
    assert tensor_parallel_problems(replace(FLAVORS[flavor], vocab_size=50257), 2, 2048) == []


def test_it_does_not_import_torch():
    program = "import sys, swamla_titan.config.tensor_degree; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
