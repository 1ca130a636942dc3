"""Which kernels are chosen for a GPU, decided on a CPU."""

from dataclasses import replace

import pytest
import torch

from swamla_titan.config import Config
from swamla_titan.config.sections import ActivationCheckpoint, Data, Float8, Kernels, Parallel, Training
from swamla_titan.distributed.mesh import World
from swamla_titan.errors import UserError
from swamla_titan.kernels import device as kernel_device
from swamla_titan.kernels.attention import dispatch
from swamla_titan.kernels.attention.dispatch import LATENT, LATENT_DOCUMENTS, ROTARY_WINDOW
from swamla_titan.model import ModelConfig, SWAMLAModel
from swamla_titan.model.blocks import SwiGLU
from swamla_titan.model.loss_head import FusedLossHead, LossHead
from swamla_titan.parallel import kernels
from swamla_titan.parallel.kernels import attention_choices, choose_kernels, validate_attention, validate_elementwise
from swamla_titan.train.startup_summary import elementwise_of

CPU = torch.device("cpu")
TRITON = Kernels(attention="triton", elementwise="triton")


@pytest.fixture(autouse=True)
def _without_nvrtc(monkeypatch):
    """As here, on a machine with a GPU too."""
    for name in ("why_not_hopper_kernel", "why_not_hopper_window"):
        monkeypatch.setattr(dispatch, name, lambda *about: "needs NVRTC")


def chosen(
    own,
    checkpointing="none",
    selective="operators",
    modules="block",
    documents=False,
    context=1,
    device=CPU,
    others=None,
    **changes,
):
    """What of loss, SwiGLU and the rotation of both kinds of attention is computed by our kernels."""
    config = ModelConfig(num_layers=3, dim=128, num_heads=2, vocab_size=100, **changes)
    with torch.device("meta"):
        model = SWAMLAModel(config)
    choices = Config(
        kernels=own,
        model=config,
        activation_checkpoint=ActivationCheckpoint(mode=checkpointing, selective=selective, modules=modules),
        data=Data(document_mask=documents),
        parallel=Parallel(context=context),
    )
    choose_kernels(model, replace(choices, **(others or {})), device)
    first, second, mla = (block.attention.fused_attention for block in model.blocks.values())
    assert type(first) is type(second)
    activations = {type(block.feed_forward.activation) for block in model.blocks.values()}
    assert len(activations) == 1
    assert activations <= {SwiGLU, kernels.TritonSwiGLU}
    ours = {
        "loss": isinstance(model.loss_head, FusedLossHead),
        "swiglu": activations == {kernels.TritonSwiGLU},
        "swa": first is not None and first.implementation is ROTARY_WINDOW,
        "mla": mla is not None and mla.implementation in (LATENT, LATENT_DOCUMENTS),
    }
    assert ours["loss"] or type(model.loss_head) is LossHead
    assert [first, mla].count(None) == [ours[part] for part in ("swa", "mla")].count(False)
    return " ".join(part for part, is_ours in ours.items() if is_ours)


@pytest.mark.parametrize(
    "how, expected",
    [
        ({"own": Kernels()}, ""),
        ({"own": Kernels(loss="fused")}, "loss"),
        ({"own": Kernels(elementwise="triton")}, "swiglu swa mla"),
        ({"own": Kernels(elementwise="triton"), "qk_norm": True}, "swiglu mla"),
        ({"own": Kernels(elementwise="triton"), "documents": True}, "swiglu swa"),
        ({"own": Kernels(elementwise="triton"), "context": 2}, "swiglu swa"),
        ({"own": Kernels(elementwise="triton"), "checkpointing": "selective"}, "swiglu"),
        ({"own": Kernels(elementwise="triton"), "checkpointing": "selective", "selective": "blocks"}, "swiglu swa mla"),
        ({"own": Kernels(elementwise="triton"), "checkpointing": "selective", "modules": "attention"}, "swiglu"),
        (
            {"own": Kernels(elementwise="triton"), "checkpointing": "selective", "modules": "feed_forward"},
            "swiglu swa mla",
        ),
        ({"own": Kernels(elementwise="triton"), "checkpointing": "full"}, "swiglu swa mla"),
        ({"own": Kernels(elementwise="triton", attention="reference")}, "swiglu swa"),
        ({"own": Kernels(elementwise="triton"), "qk_nope_head_dim": 20}, "swiglu swa"),
    ],
    ids=str,
)
def test_what_is_chosen(monkeypatch, how, expected):
    monkeypatch.setattr(dispatch, "why_not_cudnn_heads", lambda *about: None)
    assert chosen(**how) == expected


H100, A100 = (9, 0), (8, 0)
WIDE = ModelConfig(dim=1536, num_heads=16, swa_window=8)


@pytest.mark.parametrize(
    "gpu, changes, expected",
    [
        (H100, {}, "loss swiglu swa mla"),
        (A100, {}, "loss"),  # not timed there
        (H100, {"training": Training(compute_dtype="float32")}, ""),
        (H100, {"parallel": Parallel(tensor=2)}, "swiglu swa mla"),
        (H100, {"parallel": Parallel(pipeline=2)}, "swiglu swa mla"),
        (H100, {"float8": Float8(recipe="tensorwise", output_head=True)}, "swiglu swa mla"),
        (H100, {"kernels": Kernels(loss="plain", elementwise="plain")}, ""),
        (H100, {"data": Data(document_mask=True)}, "loss swiglu swa mla"),
        (H100, {"data": Data(document_mask=True), "kernels": Kernels(attention="flex")}, "loss swiglu swa"),
        (A100, {"data": Data(document_mask=True), "kernels": Kernels(elementwise="triton")}, "loss swiglu swa"),
        (A100, {"data": Data(document_mask=True), "kernels": TRITON}, "loss swiglu swa mla"),
        (None, {}, ""),
    ],
    ids=str,
)
def test_what_is_chosen_by_itself(monkeypatch, gpu, changes, expected):
    monkeypatch.setattr(dispatch, "why_not_cudnn_heads", lambda *about: None)
    for module in (kernels, kernel_device):
        monkeypatch.setattr(module, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    assert chosen(Kernels(), device=torch.device("cuda" if gpu else "cpu"), others=changes) == expected


@pytest.mark.parametrize("gpu, elementwise", [(H100, "plain"), (A100, "auto")])
def test_the_choice_says_that_elementwise_kernels_are_off(monkeypatch, gpu, elementwise):
    for module in (kernels, kernel_device):
        monkeypatch.setattr(module, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "why_not_cudnn_heads", lambda *about: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    config = Config(model=WIDE, kernels=Kernels(elementwise=elementwise))
    choices = attention_choices(config, torch.device("cuda"))
    assert {(choice.fused, choice.why_not_fused) for choice in choices.values()} == {(None, "kernels.elementwise")}
    ours = attention_choices(replace(config, kernels=Kernels(elementwise="triton")), torch.device("cuda"))
    assert [choice.fused for choice in ours.values()] == [ROTARY_WINDOW, LATENT]
    assert [c.implementation for c in choices.values()] == [c.implementation for c in ours.values()]


def test_without_cudnn_mla_rotates_apart():
    assert chosen(Kernels(elementwise="triton")) == "swiglu swa"


@pytest.mark.parametrize(
    "model, attention, said",
    [
        (WIDE, "auto", "SWA by triton and MLA by triton"),
        (replace(WIDE, qk_norm=True), "auto", "SWA by torch (model.qk_norm) and MLA by triton"),
        (WIDE, "flex", "SWA by torch (attention by flex) and MLA by triton"),
        (WIDE, "sdpa", "SWA by torch (attention by sdpa) and MLA by torch (attention by sdpa)"),
        (WIDE, "reference", "SWA by torch (attention by reference) and MLA by torch (attention by reference)"),
        (replace(WIDE, swa_layers_per_cycle=0), "auto", "MLA by triton"),
        (replace(WIDE, mla_selective=True), "auto", "SWA by triton and MLA by torch (model.mla_selective)"),
    ],
)
def test_what_is_said_of_it(monkeypatch, model, attention, said):
    monkeypatch.setattr(kernel_device, "has_triton", lambda: True)
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "why_not_cudnn_heads", lambda *about: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = Config(model=model, kernels=Kernels(elementwise="triton", attention=attention))
    cuda = torch.device("cuda")

    def summary(config: Config) -> str | None:
        return elementwise_of(config, kernels.attention_choices(config, cuda), cuda)

    assert summary(config) == f"SwiGLU by triton, rotation of {said}"
    unknown = replace(model, vocab_size=0)  # before the tokenizer is read
    native = replace(config, model=unknown, float8=Float8(recipe="native"))
    assert summary(native) == f"SwiGLU with its cast to float8, rotation of {said}"
    assert summary(replace(config, kernels=Kernels(attention=attention))) == summary(config)
    assert summary(replace(config, kernels=Kernels(elementwise="plain"))) is None


def test_summaries_say_that_attention_is_selective(monkeypatch):
    monkeypatch.setattr(kernel_device, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: H100)
    config = Config(model=replace(WIDE, mla_selective=True))
    for device, said in (("cuda", "SWA by triton, MLA by triton, selective"), ("cpu", "MLA by reference, selective")):
        assert kernels.attention_summary(attention_choices(config, torch.device(device))).endswith(said)


def test_flex_beside_selective_attention_computes_the_windows_or_is_refused(monkeypatch):
    monkeypatch.setattr(kernel_device, "has_triton", lambda: True)
    model, gpu = replace(WIDE, mla_selective=True), World.alone(torch.device("cuda"))
    config = Config(model=model, kernels=Kernels(attention="flex"))
    validate_attention(config, gpu)
    choices = attention_choices(config, gpu.device)
    assert kernels.attention_summary(choices) == "SWA by flex, MLA by triton, selective"
    with pytest.raises(UserError, match=r'kernels\.attention = "flex" model\.mla_selective; with "auto"'):
        validate_attention(replace(config, model=replace(model, swa_layers_per_cycle=0)), gpu)


@pytest.mark.parametrize("device, triton", [("cpu", True), ("cuda", False)])
def test_kernels_that_cannot_run_are_refused(monkeypatch, device, triton):
    monkeypatch.setattr(kernels, "has_triton", lambda: triton)
    with pytest.raises(UserError, match="needs a GPU, and the package triton"):
        validate_elementwise(Config(kernels=Kernels(elementwise="triton")), World.alone(torch.device(device)))


def test_a_limit_of_the_kernel_is_reported_before_masks_that_others_of_its_kind_are_for():
    latent = replace(WIDE, swa_layers_per_cycle=0)
    config = Config(model=latent, kernels=Kernels(attention="triton"), data=Data(document_mask=True))
    assert attention_choices(config, CPU)["mla"].why_not["triton, windows"] == "no window"
    with pytest.raises(UserError, match=r'kernels\.attention = "triton" needs a GPU; with "auto"'):
        validate_attention(config, World.alone(CPU))
