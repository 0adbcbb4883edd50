"""A transformer with grouped-query attention and native sparse attention (arXiv 2502.11089) in plain PyTorch.

The attention of query t combines three branches by gates: compressed windows of keys, the blocks of keys with
the highest scores of the compressed branch, and a sliding window. Every nsa_full_every-th layer has full causal
attention instead. All masks are dense: this code shows what
the model computes, and is slower than the kernels that it was trained with. Where the Python package
flash_sparse_attention is installed, batches without padding on a GPU are computed by these kernels."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_nsa import NsaConfig

try:
    from flash_sparse_attention import native_sparse_attention
except ImportError:
    native_sparse_attention = None

# Newer releases of transformers call the cache `cache`, older ones `past_key_values`.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class NsaRMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def inv_freq(config, device):
    """Returns RoPE's frequencies, float64 [head_dim / 2], with Llama 3.1's scaling if the model has it."""
    half = config.head_dim // 2
    f = config.rope_theta ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    if config.rope_factor:
        wavelength, original = 2 * math.pi / f, config.rope_original_len
        low, high = config.rope_low_freq, config.rope_high_freq
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        f = (1 - smooth) * f / config.rope_factor + smooth * f
    return f


def rotate(x, positions, frequencies):
    """RoPE: rotates the channels c and c + d/2 of x [B, H, N, d] by the angle positions [B, N] * frequencies
    [d/2]. The angles are computed in float64, because in float32 they are off by 0.03 rad at position
    1,000,000."""
    angle = positions[:, None, :, None].double() * frequencies
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def dense_attention(q, k, v, mask, scale):
    """Softmax attention of q [B, H, Nq, d] to the keys of mask [B or 1, H or 1, Nq, N]; None: causal, Nq = N.
    k, v: [B, Hkv, N, d]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)


def kernels_take(q):
    """Returns whether the kernels of flash_sparse_attention compute attention for q [B, H, Nq, d]."""
    return (
        native_sparse_attention is not None
        and q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] in (64, 128)
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


class NsaAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        c, d = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(c, heads * d, bias=config.attention_bias)
        self.k_proj = nn.Linear(c, kv_heads * d, bias=config.attention_bias)
        self.v_proj = nn.Linear(c, kv_heads * d, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * d, c, bias=False)
        if config.nsa_qk_norm:
            self.q_norm = NsaRMSNorm(d, config.rms_norm_eps)
            self.k_norm = NsaRMSNorm(d, config.rms_norm_eps)
        self.is_full = config.nsa_full_every > 0 and (layer_idx + 1) % config.nsa_full_every == 0
        if self.is_full:
            return
        self.gate_proj = nn.Linear(c, 3 if config.nsa_gate_per_token else 3 * heads)
        if config.nsa_phi == "linear":
            length = config.nsa_cmp_len
            mean = torch.eye(d).repeat(kv_heads, length, 1) / length
            self.compress_k = nn.Parameter(mean.clone())
            self.compress_pe = nn.Parameter(torch.zeros(kv_heads, length, d))
            self.compress_v = nn.Parameter(mean.clone())

    def compress(self, x, weight, pe):
        """Returns the compressed windows [B, H, windows, d] of x [B, H, N, d]."""
        x = x.unfold(2, self.config.nsa_cmp_len, self.config.nsa_cmp_stride)  # [B, H, windows, d, length]
        if weight is None:
            return x.mean(-1, dtype=torch.float32).to(x.dtype)
        x = x.transpose(-1, -2)
        if pe is not None:
            x = x + pe[:, None]
        return torch.matmul(x.flatten(-2), weight)

    def select_blocks(self, p, positions, num_blocks):
        """Returns which blocks each query selects, bool [B, Hkv, Nq, num_blocks].

        Args:
            p: probabilities of the compressed branch, [B, Hkv, Nq, windows], summed over the heads of a KV head.
            positions: of the queries, [B, Nq].
        """
        c = self.config
        # strides that window i and block j share: cell r of window i is the stride i + r
        scores = p.new_zeros(*p.shape[:3], num_blocks)
        first = torch.arange(p.shape[-1], device=p.device) * c.nsa_cmp_stride
        for cell in range(c.nsa_cmp_len // c.nsa_cmp_stride):
            scores.index_add_(3, (first + cell * c.nsa_cmp_stride) // c.nsa_block, p)
        block = torch.arange(num_blocks, device=p.device)
        own = (positions // c.nsa_block)[:, None, :, None]  # the query's block
        always = (block < c.nsa_init_blocks) | (block > own - c.nsa_local_blocks)
        scores = scores.masked_fill(always, torch.inf).masked_fill(block > own, -torch.inf)
        # a stable sort: of equal scores, the lower index comes first
        chosen = scores.sort(dim=-1, descending=True, stable=True).indices[..., : c.nsa_topk]
        selected = torch.zeros_like(scores, dtype=torch.bool).scatter_(3, chosen, True)
        return selected & (block <= own)

    def attend(self, q, k, v, positions, frequencies):
        """Returns the outputs of the three branches, [B, H, Nq, d] each.

        Args:
            q: [B, H, Nq, d] before RoPE.
            k, v: [B, Hkv, N, d] before RoPE; key n is at position n.
            positions: of the queries, [B, Nq].
        """
        c = self.config
        batch, heads, nq, d = q.shape
        kv_heads, n = k.shape[1:3]
        group = heads // kv_heads
        scale = c.nsa_scale or d**-0.5
        # positions of keys, the same for all sequences
        q = rotate(q, positions, frequencies)
        key = torch.arange(n, device=q.device)
        rotated = rotate(k, key[None], frequencies)
        row = positions[:, None, :, None]  # [B, 1, Nq, 1]

        # compressed branch: windows that lie in the query's past
        blocks = (n + c.nsa_block - 1) // c.nsa_block
        if n >= c.nsa_cmp_len:
            linear = c.nsa_phi == "linear"
            kc = self.compress(k, self.compress_k if linear else None, self.compress_pe if linear else None)
            vc = self.compress(v, self.compress_v if linear else None, None)
            first = torch.arange(kc.shape[2], device=q.device) * c.nsa_cmp_stride
            kc = rotate(kc, first[None], frequencies)
            visible = (first + c.nsa_cmp_len - 1 <= row)[:, :, None]  # [B, 1, 1, Nq, windows]
            grouped = q.view(batch, kv_heads, group, nq, d)
            s = scale * torch.matmul(grouped, kc[:, :, None].transpose(-1, -2)).float()
            s = s.masked_fill(~visible, torch.finfo(s.dtype).min)
            p = s.softmax(-1) * visible  # 0 for a query that sees no window
            compressed = torch.matmul(p.to(v.dtype), vc[:, :, None]).view(batch, heads, nq, d)
            selected = self.select_blocks(p.sum(2).detach(), positions, blocks)
        else:
            compressed = torch.zeros_like(q)
            selected = torch.ones(batch, kv_heads, nq, blocks, dtype=torch.bool, device=q.device)

        def branch(mask):  # softmax attention to the keys of mask [B, Hkv or 1, Nq, N]
            mask = mask.expand(batch, kv_heads, nq, n).repeat_interleave(group, dim=1)
            return dense_attention(q, rotated, v, mask, scale)

        causal = key <= row
        in_blocks = selected.repeat_interleave(c.nsa_block, dim=-1)[..., :n]
        return compressed, branch(causal & in_blocks), branch(causal & (key > row - c.nsa_window))

    def attend_fully(self, q, k, v, positions, order, frequencies):
        """Returns the output of full causal attention, [B, Nq, H, d]. Arguments as for `attend` and `forward`."""
        key = torch.arange(k.shape[2], device=q.device)
        scale = self.config.nsa_scale or q.shape[-1] ** -0.5
        q, k = rotate(q, positions, frequencies), rotate(k, key[None], frequencies)
        square = order is None and q.shape[2] == k.shape[2]  # needs no mask in memory
        mask = None if square else key <= positions[:, None, :, None]
        return dense_attention(q, k, v, mask, scale).transpose(1, 2)

    def attend_by_kernels(self, q, k, v, gate_logits, frequencies):
        """Returns the gated sum of the three branches, [B, Nq, H, d]. The queries are the last ones of their
        sequences.

        Args:
            q, k, v: as for `attend`.
            gate_logits: [B, Nq, H or 1, 3].
        """
        c = self.config
        batch, _, nq, _ = q.shape
        n, linear = k.shape[2], c.nsa_phi == "linear"
        sequence = torch.arange(batch + 1, device=q.device)
        segments = torch.tensor([[0, n - nq, nq]], device=q.device).repeat(batch, 1)
        segments[:, 0] = sequence[:-1]
        q, k, v = (y.transpose(1, 2).flatten(0, 1).contiguous() for y in (q, k, v))
        gate_logits = gate_logits.flatten(0, 1)
        o = native_sparse_attention(
            *(q, k, v, gate_logits[:, 0] if c.nsa_gate_per_token else gate_logits),
            *((self.compress_k, self.compress_pe, self.compress_v) if linear else (None, None, None)),
            n * sequence,
            segments=segments,
            inv_freq=frequencies,
            cmp_len=c.nsa_cmp_len,
            cmp_stride=c.nsa_cmp_stride,
            block=c.nsa_block,
            topk=c.nsa_topk,
            init_blocks=c.nsa_init_blocks,
            local_blocks=c.nsa_local_blocks,
            window=c.nsa_window,
            scale=c.nsa_scale or None,
        )
        return o.unflatten(0, (batch, nq))

    def forward(self, x, positions, order, frequencies, cache=None):
        """x [B, Nq, C] -> [B, Nq, C]. `order` [B, N] sorts the keys by their positions; None: they are
        sorted."""
        c = self.config
        batch, nq, _ = x.shape
        q, k, v = (
            proj(x).view(batch, nq, -1, c.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if c.nsa_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if cache is not None:
            # the cache holds k before RoPE, which the compression reads
            k, v = cache.update(k, v, self.layer_idx)
        if order is not None:
            index = order[:, None, :, None].expand_as(k)
            k, v = k.gather(2, index), v.gather(2, index)
        gate_logits = None if self.is_full else self.gate_proj(x).view(batch, nq, -1, 3)
        if self.is_full:
            o = self.attend_fully(q, k, v, positions, order, frequencies)
        elif order is None and kernels_take(q):
            o = self.attend_by_kernels(q, k, v, gate_logits, frequencies)
        else:
            branches = self.attend(q, k, v, positions, frequencies)
            gates = gate_logits.float().sigmoid().transpose(1, 2)
            o = sum(gates[..., i, None] * o_i for i, o_i in enumerate(branches)).transpose(1, 2)
        return self.o_proj(o.to(x.dtype).reshape(batch, nq, -1))


class NsaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class NsaDecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = NsaAttention(config, layer_idx)
        self.mlp = NsaMLP(config)
        self.input_layernorm = NsaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = NsaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, positions, order, frequencies, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), positions, order, frequencies, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class NsaPreTrainedModel(PreTrainedModel):
    config_class = NsaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["NsaDecoderLayer"]
    _skip_keys_device_placement = [CACHE_NAME]

    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, NsaRMSNorm):
            nn.init.ones_(module.weight)


class NsaModel(NsaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NsaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = NsaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        output_attentions=None,
        **kwargs,
    ):
        """attention_mask [B, N] is 0 for padding, on any side, of the N tokens up to the last one. Positions
        count the tokens that are no padding. Raises ValueError for another mask, for position_ids that begin
        again within a row, as those of packed documents do, and for output_attentions. hidden_states has the
        input of each layer, and last_hidden_state."""
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions:
            raise ValueError("output_attentions: native sparse attention does not keep its weights; leave it out")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: must be [batch, tokens], 0 for padding; "
                "with a static cache leave out cache_implementation"
            )
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0
        n = past + x.shape[1]
        order = None
        if attention_mask is None or bool(attention_mask.all()):
            positions = torch.arange(past, n, device=x.device).expand(x.shape[0], -1)
            if position_ids is not None and x.shape[1] > 1 and bool((position_ids.diff(dim=-1) < 0).any()):
                raise ValueError("position_ids begin again within a row: give each document a row of its own")
        else:
            # the keys of a sequence, then its padding: key n is at position n
            order = attention_mask.to(torch.int).sort(dim=1, descending=True, stable=True).indices
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        frequencies = inv_freq(self.config, x.device)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = () if output_hidden_states else None
        for layer in self.layers:
            if output_hidden_states:
                hidden_states += (x,)
            x = layer(x, positions, order, frequencies, cache)
        x = self.norm(x)
        if output_hidden_states:
            hidden_states += (x,)
        return BaseModelOutputWithPast(
            last_hidden_state=x, hidden_states=hidden_states, **{CACHE_NAME: cache}
        )


class NsaForCausalLM(NsaPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = NsaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        output_hidden_states=None,
        output_attentions=None,
        **kwargs,
    ):
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
