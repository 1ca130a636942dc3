"""The choice of an implementation: one is taken, and each other one has a reason."""

from dataclasses import MISSING, dataclass, fields, replace

import pytest
import torch

from swamla_titan.kernels import device as kernel_device
from swamla_titan.kernels.attention import dispatch, hopper_window
from swamla_titan.kernels.attention.dispatch import (
    ATTENTION_BACKENDS,
    FUSED,
    IMPLEMENTATIONS,
    SELECTIVE,
    SELECTIVE_REFERENCE,
    Heads,
    Projections,
    Request,
    choose,
    fact,
)
from swamla_titan.kernels.attention.masks import MaskSpec

WINDOW = Request(torch.device("cuda"), torch.bfloat16, Heads(16, 16, 96, 96), MaskSpec(256, 4), 2048, False)
CAUSAL = replace(WINDOW, heads=Heads(16, 16, 192, 128), mask=MaskSpec())
GROUPED = replace(CAUSAL, heads=Heads(16, 4, 192, 128))
QKV, LATENT = Projections("qkv", 96), Projections("latent", 64)
H100, A100 = (9, 0), (8, 0)


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    """Nothing here touches a GPU: what is asked of one is answered."""
    monkeypatch.setattr(kernel_device, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "why_not_cudnn_heads", lambda *about: None)
    for name in ("why_not_hopper_kernel", "why_not_hopper_window"):
        monkeypatch.setattr(dispatch, name, lambda *about: "needs NVRTC")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: H100)


@pytest.mark.parametrize("asked", ATTENTION_BACKENDS)
@pytest.mark.parametrize("request_", [WINDOW, CAUSAL], ids=["window", "causal"])
@pytest.mark.parametrize("changes", [{}, {"has_documents": True}, {"chunk": 256}, {"device": torch.device("cpu")}])
def test_one_is_taken_and_every_other_one_has_a_reason(request_, changes, asked):
    choice = choose(replace(request_, **changes), asked)
    names = {each.name for each in IMPLEMENTATIONS}
    assert choice.why_not.keys() == names - {choice.implementation.name}
    assert all(choice.why_not.values())
    assert asked in choice.implementation.asked_by


@pytest.mark.parametrize("asked", ATTENTION_BACKENDS)
@pytest.mark.parametrize("changes", [{}, {"has_documents": True}, {"chunk": 256}, {"device": torch.device("cpu")}])
def test_what_selects_is_taken_by_implementations_of_that_alone(changes, asked):
    request = replace(CAUSAL, selects=True, **changes)
    choice = choose(request, asked)
    by_triton = asked != "reference" and request.device.type == "cuda"
    assert choice.implementation is (SELECTIVE if by_triton else SELECTIVE_REFERENCE)
    assert choice.form == "selection"
    others = [each.name for each in IMPLEMENTATIONS if each not in (SELECTIVE, SELECTIVE_REFERENCE)]
    assert {choice.why_not[name] for name in others} == {"model.mla_selective"}
    if not by_triton:
        assert choice.why_not[SELECTIVE.name] in ("needs a GPU", f"attention by {asked}")


@pytest.mark.parametrize(
    "request_, taken, name, why",
    [
        (WINDOW, "triton, windows", "flex", "comes after triton, windows"),
        (WINDOW, "triton, windows", "sdpa, causal", "a window of 256 tokens"),
        (replace(WINDOW, chunk=256), "flex", "triton, windows", "parallel.context"),
        (replace(WINDOW, dtype=torch.float32), "flex", "triton, windows", "not timed on such a device"),
        (
            replace(WINDOW, heads=Heads(16, 16, 80, 80)),
            "flex",
            "triton, windows",
            "takes no heads as wide as these in b",
        ),
        (replace(WINDOW, mask=MaskSpec(256, 65)), "flex", "triton, windows", "takes no more than 64 sinks"),
        (replace(WINDOW, device=torch.device("cpu")), "sdpa, masked", "triton, windows", "needs a GPU"),
        (CAUSAL, "sdpa, causal", "triton, documents", "comes after sdpa, causal"),
        (replace(CAUSAL, has_documents=True), "triton, documents", "sdpa, causal", "data.document_mask"),
        (replace(CAUSAL, chunk=256), "cudnn, causal by chunks", "sdpa, causal", "parallel.context"),
        (replace(CAUSAL, chunk=256, has_documents=True), "flex", "cudnn, causal by chunks", "data.document_mask"),
        (
            replace(GROUPED, has_documents=True),
            "flex",
            "triton, documents",
            "takes as many key heads as query heads, not",
        ),
        (replace(GROUPED, chunk=256), "flex", "cudnn, causal by chunks", "takes as many key heads as query heads, not"),
        (GROUPED, "sdpa, causal", "triton, documents", "takes as many key heads as query heads, not 4 for 16"),
    ],
)
def test_why_not(request_, taken, name, why):
    choice = choose(request_, "auto")
    assert choice.implementation.name == taken
    assert choice.why_not[name].startswith(why)
    names = [each.name for each in IMPLEMENTATIONS]
    is_faster = names.index(name) < names.index(taken)
    assert (f"{name}: {choice.why_not[name]}" in choice.refusals) == is_faster


@pytest.mark.parametrize(
    "request_, asked, fused, why",
    [
        (replace(WINDOW, projections=QKV), "auto", "triton, windows with their rotation", None),
        (replace(WINDOW, projections=QKV), "flex", "triton, windows with their rotation", "attention by flex"),
        (replace(WINDOW, projections=QKV._replace(why_apart="model.qk_norm")), "auto", None, "model.qk_norm"),
        (
            replace(WINDOW, projections=QKV._replace(why_apart="activation_checkpoint")),
            "auto",
            None,
            "activation_checkpoint",
        ),
        (replace(CAUSAL, projections=LATENT), "auto", "cudnn, causal with its rotation", None),
        (replace(CAUSAL, projections=LATENT), "sdpa", None, "attention by sdpa"),
        (replace(CAUSAL, projections=LATENT, chunk=256), "auto", None, "parallel.context"),
        (
            replace(CAUSAL, projections=LATENT, heads=Heads(16, 16, 196, 128)),
            "auto",
            None,
            "takes unrotated parts of heads of multiples of 8, not of 132",
        ),
        (
            replace(CAUSAL, projections=LATENT, has_documents=True),
            "auto",
            "triton, documents with their rotation",
            None,
        ),
        (replace(CAUSAL, projections=LATENT, has_documents=True), "flex", None, "data.document_mask"),
    ],
)
def test_the_rotation_is_fused_where_an_implementation_takes_it(request_, asked, fused, why):
    choice = choose(request_, asked)
    assert (choice.fused and choice.fused.name) == fused
    assert choice.why_not_fused == why
    fusable = {each.name for each in FUSED if each.layout == request_.projections.layout}
    assert fusable - {fused} <= choice.why_not.keys()


@dataclass(frozen=True)
class Capped(Request):
    """A request with a fact that no implementation knows."""

    cap: float = fact("model.cap", default=0.0)


class CappedReference(type(dispatch.REFERENCE)):
    name, asked_by, knows = "reference, capped", ATTENTION_BACKENDS, frozenset({"cap"})


@pytest.mark.parametrize("asked", ATTENTION_BACKENDS)
@pytest.mark.parametrize("request_", [WINDOW, CAUSAL], ids=["window", "causal"])
@pytest.mark.parametrize("projections", [QKV, LATENT])
def test_a_fact_that_an_implementation_does_not_know_is_refused(monkeypatch, request_, asked, projections):
    capped = Capped(**{each.name: getattr(request_, each.name) for each in fields(Request)}, cap=30.0)
    capped = replace(capped, projections=projections)
    with pytest.raises(AssertionError, match="no implementation knows cap"):
        choose(capped, asked)
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", [*IMPLEMENTATIONS, CappedReference()])
    choice = choose(capped, asked)
    assert (choice.implementation.name, choice.form, choice.fused) == ("reference, capped", "boolean", None)
    assert set(choice.why_not.values()) == {"model.cap"}
    usual = choose(replace(capped, cap=0.0), asked)
    assert usual.implementation is choose(request_, asked).implementation


def test_every_optional_field_of_a_request_is_a_fact_or_an_offer():
    optional = [each.name for each in fields(Request) if each.default is not MISSING]
    assert optional == ["projections", *replace(WINDOW, selects=True, chunk=256).facts]


EQUAL = replace(CAUSAL, heads=Heads(16, 16, 128, 128))


@pytest.mark.parametrize(
    "request_, asked, taken, why",
    [
        (CAUSAL, "auto", "cuda, causal", None),
        (CAUSAL, "triton", "cuda, causal", None),
        (replace(CAUSAL, has_documents=True), "auto", "cuda, causal", None),
        (CAUSAL, "flex", "sdpa, causal", "attention by flex"),
        (CAUSAL, "sdpa", "sdpa, causal", "attention by sdpa"),
        (replace(CAUSAL, chunk=256), "auto", "cudnn, causal by chunks", "parallel.context"),
        (replace(CAUSAL, selects=True), "auto", "triton, selective", "model.mla_selective"),
        (WINDOW, "auto", "triton, windows", "a window of 256 tokens"),
        (replace(WINDOW, seq_len=200), "auto", "sdpa, causal", "a window of 256 tokens"),
        (GROUPED, "auto", "sdpa, causal", "takes as many key heads as query heads, not 4 for 16"),
        (EQUAL, "auto", "sdpa, causal", "not timed on such a device"),
        (EQUAL, "triton", "cuda, causal", None),
    ],
)
def test_where_hopper_s_kernels_are_taken(monkeypatch, request_, asked, taken, why):
    monkeypatch.setattr(dispatch, "why_not_hopper_kernel", lambda *about: None)
    choice = choose(replace(request_, projections=LATENT), asked)
    assert choice.implementation.name == taken
    assert choice.why_not.get("cuda, causal") == why
    assert (choice.fused is dispatch.LATENT_HOPPER) == (why is None)
    assert choice.form in ("none", "documents") or why


def test_what_is_not_timed_on_a_device_is_taken_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: A100)
    assert choose(WINDOW, "auto").implementation is dispatch.FLEX
    assert choose(WINDOW, "triton").implementation is dispatch.WINDOW


def test_heads_between_16_bytes_are_copied_for_sdpa():
    both = torch.randn(2, 3, 5, 44, dtype=torch.bfloat16)  # unrotated keys and values of a head
    value = both[..., 20:]
    assert dispatch._aligned(value).is_contiguous()
    assert torch.equal(dispatch._aligned(value), value)
    wide = torch.randn(2, 3, 5, 256, dtype=torch.bfloat16)[..., 128:]
    assert dispatch._aligned(wide) is wide


@pytest.mark.parametrize(
    "request_, asked, taken, why",
    [
        (WINDOW, "auto", "cuda, windows", None),
        (replace(WINDOW, has_documents=True, heads=Heads(16, 4, 96, 96)), "triton", "cuda, windows", None),
        (WINDOW, "flex", "flex", "attention by flex"),
        (replace(WINDOW, chunk=256), "auto", "flex", "parallel.context"),
        (
            replace(WINDOW, dtype=torch.float32),
            "triton",
            "triton, windows",
            "takes no heads as wide as these in float32",
        ),
        (replace(WINDOW, mask=MaskSpec(256, 65)), "auto", "flex", "takes no more than 64 sinks"),
        (CAUSAL, "auto", "sdpa, causal", "no window"),
    ],
)
def test_where_hopper_s_kernels_of_windows_are_taken(monkeypatch, request_, asked, taken, why):
    monkeypatch.setattr(dispatch, "why_not_hopper_window", hopper_window.why_not_hopper_window)
    monkeypatch.setattr(hopper_window.cuda, "why_not_compiled", lambda: None)
    monkeypatch.setattr(hopper_window, "_cubin", lambda *about: b"")
    choice = choose(replace(request_, projections=QKV), asked)
    assert choice.implementation.name == taken
    assert choice.why_not.get("cuda, windows") == why
    assert (choice.fused is dispatch.ROTARY_HOPPER_WINDOW) == (why is None)
