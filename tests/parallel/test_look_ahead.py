"""Look-ups that are prepared ahead: in which order, for which micro-batch, and with the same result as at once."""

import pytest
import torch

from swamla_titan.data import MicroBatch
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.annexes import ModelAnnexes
from swamla_titan.model.row_table import row_tables
from swamla_titan.parallel.pipeline import ModelStage
from swamla_titan.parallel.row_tables import look_ups_ahead

T = 12
TINY = ModelConfig(
    **{"num_layers": 2, "dim": 32, "num_heads": 2, "vocab_size": 50, "max_seq_len": T, "ffn_hidden_dim": 48},
    **{"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "swa_window": 5},
    engram={"layers": [0, 1], "orders": [2], "heads": 2, "d_mem": 8, "table_size": 37},  # type: ignore[arg-type]
)


def batches(count: int) -> list[MicroBatch]:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (count, 2, T), generator=draw)
    documents = (torch.rand(count, 2, T, generator=draw) < 0.2).cumsum(dim=-1)
    return [MicroBatch(tokens[i], tokens[i], documents[i], 2) for i in range(count)]


def test_each_is_prepared_before_the_one_before_it_is_computed(monkeypatch: pytest.MonkeyPatch):
    model, log = SWAMLAModel(TINY), list[tuple[str, int]]()
    given = batches(3)
    prepare = ModelAnnexes.prepare

    def logged(self: ModelAnnexes, tokens, document_ids):
        log.append(("prepare", next(i for i, batch in enumerate(given) if batch.tokens is tokens)))
        return prepare(self, tokens, document_ids)

    monkeypatch.setattr(ModelAnnexes, "prepare", logged)
    ahead = look_ups_ahead(model.annexes, given)
    assert log == [("prepare", 0)], "at once, whatever the caller does before it takes the first"
    for index, (batch, prepared) in enumerate(ahead):
        log.append(("forward", index))
        model(batch.tokens, batch.targets, batch.document_ids, prepared=prepared)
    order = [("prepare", 0), ("prepare", 1), ("forward", 0), ("prepare", 2), ("forward", 1), ("forward", 2)]
    assert log == order, "and none is prepared twice"


def test_the_gradients_are_those_of_look_ups_that_are_prepared_at_once():
    model, gradients = SWAMLAModel(TINY), []
    tables = row_tables(model).values()
    for ahead in (False, True):
        inputs = look_ups_ahead(model.annexes, batches(2)) if ahead else ((batch, None) for batch in batches(2))
        for batch, prepared in inputs:
            model(batch.tokens, batch.targets, batch.document_ids, prepared=prepared).backward()
        for table in tables:
            table.gradient.merge()
        gradients.append([table.gradient.dense(len(table.weight)) for table in tables])
        assert all(gradient.any() for gradient in gradients[-1])
        for table in tables:
            table.gradient.clear()
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_look_up_of_other_tokens_is_an_error():
    model = SWAMLAModel(TINY)
    one, other = batches(2)
    prepared = model.annexes.prepare(one.tokens, one.document_ids)
    model(one.tokens, document_ids=one.document_ids, prepared=prepared)
    for tokens, documents in (
        (other.tokens, one.document_ids),
        (one.tokens, other.document_ids),
        (one.tokens, None),
        (one.tokens[:1], one.document_ids),
        (one.tokens.clone(), one.document_ids),
    ):
        with pytest.raises(ValueError, match="prepared for other tokens"):
            model.annexes.look_up(tokens, documents, torch.float32, prepared=prepared)
    stage = ModelStage(TINY, 0, [range(2), range(2, 2)]).to_empty(device="cpu")
    with pytest.raises(ValueError, match="prepared for other tokens"):
        stage(other.tokens, other.document_ids, other.tokens, prepared=prepared)


def test_a_look_up_of_tokens_that_were_refilled_in_place_is_an_error():
    model = SWAMLAModel(TINY)
    for refilled in ("tokens", "document_ids"):
        one, other = batches(2)
        prepared = model.annexes.prepare(one.tokens, one.document_ids)
        getattr(one, refilled).copy_(getattr(other, refilled))
        with pytest.raises(ValueError, match="prepared for other tokens"):
            model.annexes.look_up(one.tokens, one.document_ids, torch.float32, prepared=prepared)


def test_without_annexes_nothing_is_prepared():
    model = SWAMLAModel(ModelConfig(**{**vars(TINY), "engram": {}}))
    assert [prepared for _, prepared in look_ups_ahead(model.annexes, batches(2))] == [None, None]
