"""The loss against torch's cross_entropy on the real columns, and the z-loss formula."""

import pytest
import torch
import torch.nn.functional as F

from swamla_titan.kernels.cross_entropy import cross_entropy

VOCAB, PADDED = 50, 64


def example(dtype=torch.float64, ignored=(1, 4, 5)):
    logits = (3 * torch.randn(12, PADDED)).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (12,))
    targets[list(ignored)] = -100
    return logits, targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [(), (1, 4, 5)])
def test_equals_torch_in_value_and_gradient(smoothing, ignored):
    logits, targets = example(ignored=ignored)
    ours = cross_entropy(logits, targets, VOCAB, label_smoothing=smoothing)
    mean = F.cross_entropy(logits[:, :VOCAB], targets, ignore_index=-100, label_smoothing=smoothing)
    theirs = mean * (targets != -100).sum()
    torch.testing.assert_close(ours, theirs)
    (gradient,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(gradient, *torch.autograd.grad(theirs, logits))
    assert not gradient[:, VOCAB:].any()
    assert not gradient[list(ignored)].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_padding_columns_take_no_part(smoothing):
    logits, targets = example()
    loud = logits.detach().clone()
    loud[:, VOCAB:] = 1e4
    options = {"z_loss": 0.1, "label_smoothing": smoothing}
    assert torch.equal(cross_entropy(loud, targets, VOCAB, **options), cross_entropy(logits, targets, VOCAB, **options))


def test_z_loss_is_the_squared_log_partition_of_valid_targets():
    logits, targets = example()
    extra = cross_entropy(logits, targets, VOCAB, z_loss=0.3) - cross_entropy(logits, targets, VOCAB)
    log_partition = logits[:, :VOCAB].exp().sum(dim=1).log()
    torch.testing.assert_close(extra, 0.3 * (log_partition**2)[targets != -100].sum())


def test_bfloat16_logits_are_summed_in_float32():
    logits, targets = example(torch.bfloat16)
    ours = cross_entropy(logits, targets, VOCAB)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, cross_entropy(logits.float(), targets, VOCAB), rtol=0, atol=0)


def test_no_valid_target_gives_zero_and_zero_gradient():
    logits, targets = example(ignored=range(12))
    loss = cross_entropy(logits, targets, VOCAB, z_loss=0.1, label_smoothing=0.1)
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_compiles_to_one_graph_of_the_same_value():
    logits, targets = example(torch.float32)
    compiled = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    options = {"z_loss": 0.1, "label_smoothing": 0.1}
    ours, theirs = compiled(logits, targets, VOCAB, **options), cross_entropy(logits, targets, VOCAB, **options)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))
