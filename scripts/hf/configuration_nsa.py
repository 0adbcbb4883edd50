"""The configuration of a transformer with native sparse attention (modeling_nsa.py)."""

from transformers import PretrainedConfig


class NsaConfig(PretrainedConfig):
    """Llama's configuration, and:

    Args:
        attention_bias: bias on q, k and v.
        nsa_qk_norm: RMSNorm on each q and k head.
        nsa_cmp_len, nsa_cmp_stride: length and stride of a compression window, in tokens.
        nsa_phi: compression of a window, "mean" or "linear".
        nsa_block, nsa_topk: size of a selection block in tokens, and how many of them a query selects.
        nsa_init_blocks, nsa_local_blocks: numbers of initial and local blocks, which are always selected.
        nsa_window: size of the sliding window in tokens.
        nsa_gate_per_token: all heads of a token share the three gates.
        nsa_scale: softmax scale; 0: 1/sqrt(head_dim).
        nsa_full_every: N: every N-th layer has full attention, the last of each N; 0: none.
        rope_factor, rope_low_freq, rope_high_freq, rope_original_len: Llama 3.1's RoPE scaling; rope_factor
            0: no scaling.
    """

    model_type = "nsa"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=3,
        head_dim=64,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        initializer_range=0.02,
        use_cache=True,
        attention_bias=False,
        tie_word_embeddings=False,
        rope_theta=10000.0,
        rope_factor=0.0,
        rope_low_freq=1.0,
        rope_high_freq=4.0,
        rope_original_len=8192,
        nsa_qk_norm=False,
        nsa_cmp_len=32,
        nsa_cmp_stride=16,
        nsa_phi="mean",
        nsa_block=64,
        nsa_topk=16,
        nsa_init_blocks=1,
        nsa_local_blocks=2,
        nsa_window=512,
        nsa_gate_per_token=False,
        nsa_scale=0.0,
        nsa_full_every=0,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.attention_bias = attention_bias
        self.rope_theta = rope_theta
        self.rope_factor = rope_factor
        self.rope_low_freq = rope_low_freq
        self.rope_high_freq = rope_high_freq
        self.rope_original_len = rope_original_len
        self.nsa_qk_norm = nsa_qk_norm
        self.nsa_cmp_len = nsa_cmp_len
        self.nsa_cmp_stride = nsa_cmp_stride
        self.nsa_phi = nsa_phi
        self.nsa_block = nsa_block
        self.nsa_topk = nsa_topk
        self.nsa_init_blocks = nsa_init_blocks
        self.nsa_local_blocks = nsa_local_blocks
        self.nsa_window = nsa_window
        self.nsa_gate_per_token = nsa_gate_per_token
        self.nsa_scale = nsa_scale
        self.nsa_full_every = nsa_full_every
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
