"""The SWA-MLA language model on one device: embedding, blocks, norm, head, loss."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from swamla_titan.kernels.attention.dispatch import choose_for_prompts
from swamla_titan.kernels.cross_entropy import IGNORE
from swamla_titan.kernels.decode import Stream, fits, normed_linear
from swamla_titan.kernels.limits import AttentionBackend
from swamla_titan.model.annexes import Memories, ModelAnnexes, PreparedLookUp
from swamla_titan.model.blocks import Block
from swamla_titan.model.branch import SequenceContext
from swamla_titan.model.cache import DecodeCache
from swamla_titan.model.config import ModelConfig
from swamla_titan.model.context import FullSequences
from swamla_titan.model.init import initial_draws
from swamla_titan.model.layers import EPS, Embedding, Head, RMSNorm, build_norm
from swamla_titan.model.loss_head import LossHead


class SWAMLAModel(nn.Module):
    """Decoder-only language model of interleaved sliding-window and latent-attention blocks.

    Six attributes may be set from outside:
    `compute_dtype`: dtype of the activations; None: that of the weights.
    `attention_backend`: as kernels.attention of the configuration.
    `loss_head`: computes the loss, or logits, from the last activations and the head.
    `why_not_decode`: the text of the ValueError that `prefill` and `decode` raise; None: they work.
    `devices`: those that `spread` has put consecutive layers on, for `prefill` and `decode`; None: all are on one.
    `sequences`: which tokens of each sequence this process computes, and their context.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Build the layers and, unless on the meta device, draw their values with seed 0.

        Raises ValueError if config.vocab_size is 0, which stands for the tokenizer's.
        """
        super().__init__()
        if config.vocab_size == 0:
            raise ValueError("vocab_size = 0: set it to the number of ids of the tokenizer")
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.attention_backend: AttentionBackend = "auto"
        self.sequences = FullSequences()
        self.why_not_decode: str | None = None
        self.devices: list[torch.device] | None = None

        self.embedding = Embedding(config.padded_vocab_size, config.dim)
        # Keyed by layer number: a pipeline stage that drops some of them keeps the names of the others.
        self.blocks = nn.ModuleDict({str(i): Block(config, kind) for i, kind in enumerate(config.block_kinds)})
        self.annexes = ModelAnnexes(config)
        self.norm = build_norm(config)
        self.head = Head(config.dim, config.padded_vocab_size)
        self.loss_head = LossHead(config)
        self.tie_weights()
        self.register_load_state_dict_post_hook(_tie_again)
        if not self.embedding.weight.is_meta:
            self.init_weights(0)

    def spread(self, devices: list[torch.device]) -> None:
        """Leave the meta device, for memory of `devices`."""
        self.devices, share = devices, -(-len(self.blocks) // len(devices))
        for number, block in enumerate(self.blocks.values()):
            block.to_empty(device=devices[number // share])
        for module in self.children():
            if module is not self.blocks:
                module.to_empty(device=devices[0])
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make head and embedding share their weight if the config says so; nothing where a stage has but one."""
        embedding, head = getattr(self, "embedding", None), getattr(self, "head", None)
        if self.config.tie_embeddings and embedding is not None and head is not None:
            head.weight = embedding.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SWAMLAModel":
        # to_empty and every move off the meta device make a new parameter for each module that held a shared one.
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def init_weights(self, seed: int, write: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Draw all parameters; each from its own generator, see model/init.py.

        `write(parameter, value)` puts a full value, float32 on the CPU, into a parameter that may hold a shard of it.
        """

        @torch.no_grad()  # which holds for one thread
        def draw(each: Callable[[], object]) -> None:
            each()

        draws = initial_draws(self, self.config.num_layers, self.config.tie_embeddings, seed, write)
        # A normal value takes a core some 10 ns, a billion of them seconds; so all cores draw.
        with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
            list(pool.map(draw, draws))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def activation_dtype(self) -> torch.dtype:
        """Dtype of the residual stream: compute_dtype, or the weights' own."""
        return self.compute_dtype or next(self.parameters()).dtype

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        document_ids: Tensor | None = None,
        loss_denominator: Tensor | float | None = None,
        prepared: PreparedLookUp | None = None,
    ) -> Tensor:
        """Logits [B, T, vocab_size] of tokens [B, T] int64, or with `targets` [B, T] the loss, a float32 scalar.

        `document_ids` [B, T]: a document ends wherever the id changes, tokens see their own only, and positions
        restart in each. The loss is the mean cross-entropy over targets that are not -100 (0 if there are none), or
        their sum over `loss_denominator`: with the global batch's number of valid targets there, the losses of its
        micro-batches add up to the batch's mean, whatever each holds. z_loss and label_smoothing of the config apply in
        training mode only; eval() gives the plain cross-entropy. `prepared` is what `annexes.prepare` gave for these
        tokens, None: it is prepared now.

        Where several processes share each sequence (`sequences`), all are given full ones: each gives the logits of
        its own tokens, or its own share of the loss, and the shares add up to the loss.

        Token ids must be below vocab_size; that is not checked, for it would wait for the GPU. Raises ValueError for
        tensors of a wrong shape or dtype and for sequences longer than max_seq_len.
        """
        self._check(tokens, targets, document_ids)
        context = self.context(tokens.shape[1], document_ids, tokens.device)
        memories = self.annexes.look_up(tokens, document_ids, self.activation_dtype, targets, prepared)
        x = self.run_blocks(self.embed(self.sequences.local(tokens)), context, memories)
        x = self.norm(x)
        if targets is None:
            return self.loss_head.logits(self.head, x)
        if loss_denominator is None:
            loss_denominator = (targets != IGNORE).sum().clamp(min=1)
        loss: Tensor = self.loss_head(self.head, x, self.sequences.local(targets), loss_denominator)
        return loss

    def run_blocks(self, x: Tensor, context: SequenceContext, memories: Memories | None) -> Tensor:
        """The residual stream [B, T, dim] before the blocks -> after them; `memories` from annexes.look_up."""
        for layer, block in self.blocks.items():
            x = block(self.annexes.before(layer, x, memories), context)
        return x

    def context(
        self, seq_len: int, document_ids: Tensor | None = None, device: torch.device | None = None
    ) -> SequenceContext:
        """The context of all blocks for a forward pass of `seq_len` tokens, on `device` (None: the weights')."""
        device = device or self.device
        return self.sequences.context(
            self.config, seq_len, document_ids, device, self.activation_dtype, self.attention_backend
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, T] int64 -> [B, T, dim] in the activations' dtype, which all later layers keep."""
        x: Tensor = self.embedding(tokens)
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def loss(self, logits: Tensor, targets: Tensor, loss_denominator: Tensor | float) -> Tensor:
        """The loss of `forward` from the head's output [B, T, padded vocabulary]; targets are of full sequences."""
        return self.loss_head.loss(logits, self.sequences.local(targets), loss_denominator)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, cache: DecodeCache, lengths: Tensor | None = None) -> Tensor:
        """Read prompts into the cache: tokens [B, T] padded on the left -> logits after the last, [B, vocab_size].

        `lengths` [B] are the prompts' own lengths, None: all T. The tokens of the padding have no effect.
        """
        self._check_decoding(tokens)
        cache.start(tokens, lengths)
        real = None
        if lengths is not None:  # the padding is a document of its own
            real = torch.arange(tokens.shape[1], device=tokens.device) >= cache.clock.starts[:, None]  # [B, T]
        contexts = [self._context_of_prompts(tokens.shape[1], real, device) for device in cache.devices]
        memories = self.annexes.look_up(tokens, real, self.activation_dtype)
        x = self.embed(tokens)
        for name, block in self.blocks.items():
            assert isinstance(block, Block)
            x, number = self.annexes.prefill(name, x, memories, cache), cache.device_number[name]
            x = block.prefill(x.to(cache.devices[number]), contexts[number], cache.layers[name])
        x = x[:, -1].to(tokens.device)
        return self.loss_head.logits(self.head, self.norm(x))

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: DecodeCache) -> Tensor:
        """Append one token to each sequence, tokens [B, 1] -> logits of the next, [B, vocab_size]."""
        self._check_decoding(tokens)
        if tokens.shape != (cache.clock.starts.shape[0], 1):
            raise ValueError(
                f"tokens {tuple(tokens.shape)}: decode takes one per sequence, ({cache.clock.starts.shape[0]}, 1)"
            )
        cache.require_room()
        logits = self.decode_step(tokens, cache)
        cache.length += 1
        return logits

    @torch.no_grad()
    def decode_step(self, tokens: Tensor, cache: DecodeCache) -> Tensor:
        """What a GPU does of `decode`: the same for every token, and nothing waits for the host."""
        contexts = [cache.next_context(self.attention_backend, number) for number in range(len(cache.devices))]
        memories = self.annexes.look_up_next(tokens, cache, self.activation_dtype)
        stream = Stream(self.embed(tokens)[:, 0])
        for name, block in self.blocks.items():
            assert isinstance(block, Block)
            number, step = cache.device_number[name], cache.steps.get(name)
            device = cache.devices[number]
            if name in self.annexes:
                stream = Stream(self.annexes.decode(name, stream.sum()[:, None], memories, cache)[:, 0])
            if stream.x.device != device:
                stream = Stream(stream.sum().to(device))
            with torch.cuda.device_of(stream.x):  # Triton launches on the current one
                if step is not None:
                    stream = step(stream)
                else:
                    x = block.decode(stream.sum()[:, None], contexts[number], cache.layers[name])
                    stream = Stream(x[:, 0])
        if stream.x.device != tokens.device:
            stream = Stream(stream.sum().to(tokens.device))
        with torch.cuda.device_of(stream.x):
            head = cache.head_step or (lambda stream: self.loss_head.logits(self.head, self.norm(stream.sum())))
            logits = head(stream)
        for clock in cache.clocks:
            clock.length.add_(1)
        return logits

    def fused_head(self, dtype: torch.dtype) -> Callable[[Stream], Tensor] | None:
        """What computes the logits of the stream by kernels/decode.py; None: they cannot."""
        head, norm = self.head, self.norm
        if not head.is_plain(dtype) or type(norm) is not RMSNorm or not fits(head.weight):
            return None
        size = self.config.vocab_size
        return lambda stream: normed_linear(stream, norm.weight, EPS, head.weight)[1][:, :size]

    def _context_of_prompts(self, seq_len: int, real: Tensor | None, device: torch.device) -> SequenceContext:
        real = None if real is None else real.to(device)
        of_prompts = self.config, seq_len, real, device, self.activation_dtype, self.attention_backend
        return FullSequences(choose_for_prompts).context(*of_prompts)

    def _check_decoding(self, tokens: Tensor) -> None:
        if self.why_not_decode is not None:
            raise ValueError(self.why_not_decode)
        self._check(tokens, None, None)

    def _check(self, tokens: Tensor, targets: Tensor | None, document_ids: Tensor | None) -> None:
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(f"tokens {tuple(tokens.shape)} {tokens.dtype}: expected [batch, length] of torch.int64")
        if tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"tokens of length {tokens.shape[1]} exceed max_seq_len = {self.config.max_seq_len}: "
                "cut them, or build the model with a larger max_seq_len"
            )
        if targets is not None and (targets.shape != tokens.shape or targets.dtype != torch.int64):
            raise ValueError(
                f"targets {tuple(targets.shape)} {targets.dtype}: expected {tuple(tokens.shape)} of torch.int64"
            )
        if document_ids is not None and document_ids.shape != tokens.shape:
            raise ValueError(f"document_ids {tuple(document_ids.shape)}: expected {tuple(tokens.shape)}")


def _tie_again(model: nn.Module, incompatible_keys: object) -> None:
    # load_state_dict(assign=True) makes a new parameter for each name of a shared one.
    assert isinstance(model, SWAMLAModel)
    model.tie_weights()
