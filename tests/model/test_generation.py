"""Generation: greedy equals argmax of the full forward; what top_k and top_p leave; stops and refusals."""

import pytest
import torch

from swamla_titan.model.generation import Decoder, Options, generate, restrict, sample, stream
from tests.model.tiny import build, random_tokens

PROMPTS = [[3], [5, 9, 11, 2, 7, 30, 31, 32, 33], [1, 2]]


def greedy(model, prompt, count):
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


def test_temperature_zero_is_the_argmax_of_the_full_forward():
    model = build()
    assert generate(model, PROMPTS, 15, temperature=0) == [greedy(model, prompt, 15) for prompt in PROMPTS]


@pytest.mark.parametrize("prompts", [[[*range(50)], [7, 8], [*range(49, 9, -1)]], [[*range(32)] * 2, [5]]])
def test_to_the_last_token_that_the_model_can_give(prompts):
    """Its predecessors fill max_seq_len = 64; windows have wrapped around, and rows are of unequal length."""
    model = build()
    count = 64 - len(prompts[0]) + 1
    assert generate(model, prompts, count, temperature=0) == [greedy(model, prompt, count) for prompt in prompts]
    with pytest.raises(ValueError, match="max_seq_len = 64"):
        generate(model, prompts, count + 1)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-30}, {"temperature": 1e-6}])
def test_narrow_sampling_is_greedy(options):
    model = build()
    assert generate(model, PROMPTS, 10, **options) == generate(model, PROMPTS, 10, temperature=0)


def test_rows_do_not_depend_on_their_neighbours():
    model = build()
    together = generate(model, PROMPTS, 12, temperature=0)
    assert together == [generate(model, [prompt], 12, temperature=0)[0] for prompt in PROMPTS]


def test_stop_token_ends_a_row_and_all_rows_end_the_loop(monkeypatch):
    model = build()
    free = generate(model, PROMPTS, 15, temperature=0)
    stop = free[0][4]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert generate(model, PROMPTS, 15, temperature=0, stop_token=stop) == expected
    calls = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda *args: calls.append(1) or decode(*args))
    generate(model, PROMPTS[:1], 15, temperature=0, stop_token=stop)
    assert len(calls) == free[0].index(stop)


def test_sampling_follows_the_generator_and_the_mode_is_restored():
    model = build(dropout=0.3).train()
    first, again, other = (
        generate(model, PROMPTS, 10, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert model.training


def test_padding_columns_are_never_sampled():
    model = build()  # 50 real columns of 128
    with torch.no_grad():
        model.embedding.weight[50:] = 1e3  # if they took part, they would win
    out = generate(model, [[1]] * 8, 30, temperature=5.0)
    assert max(max(row) for row in out) < 50
    logits = torch.randn(4, 6)
    assert sample(logits, 100.0, 0, 1.0).shape == (4,)


def kept(logits, top_k, top_p):
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in restrict(logits, top_k, top_p)]


def test_top_k_and_top_p_leave_the_right_tokens():
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]])
    logits = probabilities.log()
    assert kept(logits, 0, 1.0) == [{0, 1, 2, 3}] * 2
    assert kept(logits, 2, 1.0)[0] == {1, 3}
    assert kept(logits, 9, 1.0) == [{0, 1, 2, 3}] * 2
    # The smallest set whose probability reaches top_p.
    assert kept(logits, 0, 0.35) == [{1}, {0}]
    assert kept(logits, 0, 0.65) == [{1, 3}, {0}]
    assert kept(logits, 0, 0.75) == [{1, 2, 3}, {0}]
    # top_p after top_k: of {1, 3} the first alone has 4/7.
    assert kept(logits, 2, 0.55)[0] == {1}
    assert kept(logits, 2, 0.65)[0] == {1, 3}


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_top_k_keeps_k_also_of_equals(top_k):
    equal, edge = [0.5] * 6, [2.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    found = kept(torch.tensor([equal, edge]), top_k, 1.0)
    assert [len(row) for row in found] == [top_k, top_k]
    assert 0 in found[1]
    assert top_k == 5 or 5 not in found[1]


def test_top_p_reached_exactly_is_enough():
    # Probabilities of exactly 1/4, whose sums are exact too.
    assert [len(row) for row in kept(torch.zeros(2, 4), 0, 0.5)] == [2, 2]
    assert [len(row) for row in kept(torch.zeros(2, 4), 0, 0.25)] == [1, 1]
    assert [len(row) for row in kept(torch.zeros(2, 4), 0, 0.75)] == [3, 3]
    assert [len(row) for row in kept(torch.zeros(2, 4), 2, 0.5)] == [1, 1]  # 1/2 each after top_k


@pytest.mark.parametrize("temperature", [1e-7, 1e-38, 1e-46, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature, dtype):
    logits = torch.tensor([[-300.0, 200.0, 199.0], [0.0, -1.0, -2.0], [7.0, 7.0, 7.0]], dtype=dtype)
    drawn = sample(logits, temperature, 0, 1.0)
    assert drawn[:2].tolist() == [1, 0]
    assert torch.equal(drawn, sample(logits, 0, 0, 1.0))


def test_the_smallest_temperature_that_divides_takes_large_logits():
    logits = torch.tensor([[1e5, -1e5, 99999.0], [-1e5, -99999.0, -1e5]])
    assert sample(logits, 1e-6, 0, 1.0).tolist() == [0, 1]
    assert sample(logits, 1e-6, 2, 0.5).tolist() == [0, 1]


def test_restricted_sampling_has_the_right_frequencies():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log().expand(4000, 4)
    drawn = sample(logits, 1.0, 3, 1.0, torch.Generator().manual_seed(0))
    frequencies = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(frequencies, torch.tensor([0.0, 4 / 9, 2 / 9, 3 / 9]), atol=0.03, rtol=0)
    hot = sample(logits, 2.0, 0, 1.0, torch.Generator().manual_seed(0))
    expected = (logits[0] / 2).softmax(dim=0)
    torch.testing.assert_close(torch.bincount(hot, minlength=4) / 4000, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([], {}, "at least one"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 50]], {}, "token 50: the vocabulary is 0 ... 49"),
        ([[1], [1] * 60], {"max_new_tokens": 6}, "prompt 1 has 60 tokens.*max_seq_len = 64"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_k": -1}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.1}, "top_p"),
        ([[1]], {"stop_token": 50}, "stop_token"),
    ],
)
def test_wrong_requests_are_refused(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(build(), prompts, **{"max_new_tokens": 3} | options)


def test_a_request_may_fill_the_model_to_its_end():
    assert len(generate(build(), [[1] * 60], 4, temperature=0)[0]) == 4
    assert len(generate(build(), [random_tokens(3).tolist()], 61)[0]) == 61


def test_a_decoder_serves_one_batch_after_another():
    model = build(mla_selective=True)
    decoder = Decoder(model, 2, 40, memory_budget=9)
    for prompts in ([[*range(20)], [3]], [[7], [1, 2]]):
        given = generate(model, prompts, 15, temperature=0, decoder=decoder)
        assert given == generate(model, prompts, 15, temperature=0, memory_budget=9)


def test_a_sequence_ends_behind_the_token_that_its_caller_says():
    model, seen = build(), []
    free = generate(model, PROMPTS, 12, temperature=0)

    def ends(number, token):
        seen.append((number, token))
        return len([each for each in seen if each[0] == number]) == (4, 12, 2)[number]

    given = generate(model, PROMPTS, 12, temperature=0, ends=ends)
    assert given == [free[0][:4], free[1], free[2][:2]]
    assert [token for number, token in seen if number == 1] == free[1]


def test_tokens_come_step_by_step_and_the_model_computes_no_further():
    model = build().train()
    steps, decode = [], model.decode
    model.decode = lambda *given: steps.append(1) or decode(*given)
    given = stream(model, PROMPTS, Options(12, temperature=0))
    first = [next(given) for _ in range(3)]
    assert len(steps) == 2
    assert [list(each) for each in zip(*first)] == [each[:3] for each in generate(model, PROMPTS, 3, temperature=0)]
    given.close()
    assert model.training
