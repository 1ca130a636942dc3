"""Settings of a SwaMLA language model: blocks of sliding-window attention with sinks, and of latent attention."""

from typing import Any

from transformers import PreTrainedConfig


class SwamlaConfig(PreTrainedConfig):
    """The content of config.json.

    `layer_types` says of each block whether its attention is "sliding_attention" or "full_attention" (multi-head latent
    attention), and `rope_parameters` has the rotary base and scaling of each of the two. A query of a sliding block
    sees the latest `sliding_window` keys, itself among them, and the first `sliding_window_sinks` of its document.
    `padded_vocab_size` counts the rows of the embedding, of which those from `vocab_size` on stand for no token; logits
    leave them out. `intermediate_group` is the number of gate projections that lie together in `gate_up`, before
    as many of the up projections. `selection_head`: the head that selects in selective attention; None: not selective.
    `engram`: layers, sizes and hashes of the n-gram memory; None: there is none.
    """

    model_type = "swamla"
    keys_to_ignore_at_inference = ("cache", "past_key_values")
    # Fused weights are laid out so that consecutive rows are full heads, or gates with their up projections.
    base_model_tp_plan = {  # noqa: RUF012 (transformers' form)
        "blocks.*.attention.wqkv": "colwise",
        "blocks.*.attention.wq": "colwise",
        "blocks.*.attention.wq_b": "colwise",
        "blocks.*.attention.wkv_b": "colwise",
        "blocks.*.attention.wo": "rowwise",
        "blocks.*.feed_forward.gate_up": "colwise",
        "blocks.*.feed_forward.down": "rowwise",
    }

    def __init__(
        self,
        vocab_size: int = 50257,
        padded_vocab_size: int | None = None,
        hidden_size: int = 1024,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int = 2816,
        intermediate_group: int = 32,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        norm: str = "rmsnorm",
        rms_norm_eps: float = 1e-6,
        tie_word_embeddings: bool = True,
        layer_types: list[str] | None = None,
        sliding_window: int = 256,
        sliding_window_sinks: int = 4,
        qk_norm: bool = False,
        q_lora_rank: int | None = None,
        kv_lora_rank: int = 256,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        selection_head: int | None = None,
        rope_parameters: dict[str, dict[str, Any]] | None = None,
        residual_dropout: float = 0.0,
        engram: dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.padded_vocab_size = padded_vocab_size or vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.intermediate_group = intermediate_group
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.norm = norm
        self.rms_norm_eps = rms_norm_eps
        self.tie_word_embeddings = tie_word_embeddings
        cycle = "sliding_attention", "sliding_attention", "full_attention"
        self.layer_types = layer_types or [cycle[layer % 3] for layer in range(num_hidden_layers)]
        self.sliding_window = sliding_window
        self.sliding_window_sinks = sliding_window_sinks
        self.qk_norm = qk_norm
        self.q_lora_rank = q_lora_rank
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.selection_head = selection_head
        self.rope_parameters = rope_parameters or {
            layer_type: {"rope_type": "default", "rope_theta": 10000.0}
            for layer_type in dict.fromkeys(self.layer_types)
        }
        self.residual_dropout = residual_dropout
        self.engram = engram
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        super().__init__(**kwargs)

    def convert_rope_params_to_dict(self, *unused: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing: `rope_parameters` is complete, and the first 5.x releases would add keys beside the layer types."""
        return kwargs
