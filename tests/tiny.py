"""A tiny Llama with spiky attention, and ways to feed it."""

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models import gemma2, llama

VOCABULARY = 101


def make(seed: int = 0, n_heads: int = 6, n_kv_heads: int = 2, head_dim: int = 8):
    mx.random.seed(seed)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=8 * n_heads,
            num_hidden_layers=3,
            intermediate_size=64,
            num_attention_heads=n_heads,
            num_key_value_heads=n_kv_heads,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
            head_dim=head_dim,
        )
    )
    model.update(tree_map(lambda a: a * 3 if a.ndim > 1 else a, model.parameters()))
    return model


def make_own_attention(n_kv_heads: int = 2):
    """A tiny Gemma 2, which computes its own attention."""
    mx.random.seed(2)
    return gemma2.Model(
        gemma2.ModelArgs(
            model_type="gemma2",
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=32,
            num_attention_heads=4,
            head_dim=8,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
            num_key_value_heads=n_kv_heads,
        )
    )


def feed(model, tokens, cache, chunk):
    """Logits of tokens [B, T] fed in chunks; an int or a list of sizes."""
    sizes = [chunk] * tokens.shape[1] if isinstance(chunk, int) else chunk
    outputs, start = [], 0
    for size in sizes:
        if start >= tokens.shape[1]:
            break
        outputs.append(model(tokens[:, start : start + size], cache=cache))
        mx.eval(outputs[-1], [c.state for c in cache])
        start += size
    return mx.concatenate(outputs, axis=1)


def tokens(length: int, batch: int = 1, seed: int = 1):
    mx.random.seed(seed)
    return mx.random.randint(0, VOCABULARY, (batch, length))
