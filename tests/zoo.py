"""Every model of the installed mlx-lm, tiny and with random weights.

One table of small sizes is offered to the ModelArgs of every family, which take the
names they know. CONFIGS holds what a family needs beyond it.
"""

import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import mlx.core as mx
import mlx_lm.models
from mlx.utils import tree_map_with_path

VOCABULARY = 101

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": False,
    "use_bias": False,
    "use_qk_norm": True,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 72,
    "sliding_window_pattern": 2,
    # Other names of the same.
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "n_kv_heads": 2,
    "n_positions": 1024,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "partial_rotary_factor": 0.5,
    # Mixtures of experts: the first layer is dense.
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_freq": 1,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    # Latent attention.
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    # Layers with a state in place of keys.
    "layer_group_size": 2,
    "group_norm_size": 1,
    "conv_kernel": 4,
    "conv_L_cache": 3,
    "use_conv_bias": True,
    "conv_bias": True,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}

CONFIGS: dict[str, dict] = {}


def families() -> list[str]:
    """Names of the modules of mlx-lm with a Model and its ModelArgs."""
    found = []
    for module in pkgutil.iter_modules(mlx_lm.models.__path__):
        spec = importlib.util.find_spec(f"mlx_lm.models.{module.name}")
        # Read, not imported: one of them ends the process where a package is missing.
        source = Path(spec.origin).read_text(encoding="utf-8")
        if re.search(r"^class ModelArgs\b", source, re.M) and re.search(
            r"^(class|from .* import) Model\b", source, re.M
        ):
            found.append(module.name)
    return sorted(found)


def make(name: str, seed: int = 0):
    """A tiny model of a family in float32, with spiky attention."""
    config = {**SIZES, "model_type": name, **CONFIGS.get(name, {})}
    scale = config.pop("scale", 2.5)
    if "text_config" in config:
        config["text_config"] = {**SIZES, **config["text_config"]}
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))

    def fill(path, a):
        if not mx.issubdtype(a.dtype, mx.floating):
            return a
        a = a.astype(mx.float32)
        if not a.any():
            return mx.random.uniform(-0.5, 0.5, a.shape)
        return a * scale if a.ndim > 1 else a

    model.update(tree_map_with_path(fill, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model
