"""Every model of the installed mlx-lm, tiny and with random weights.

One table of small sizes is offered to the ModelArgs of every family, which take the
names they know. CONFIGS holds what a family needs beyond it.
"""

import copy
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
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
    "moe_num_shared_experts": 1,
    "moe_k": 2,
    "moe_layer_start_index": 1,
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
    "state_size": 16,
    "ssm_state_size": 16,
    "time_step_rank": 4,
    "n_groups": 2,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 2,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
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

# Shared by several families.
YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
ROPES = {
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    "full_attention": {"rope_theta": 100000.0, "rope_type": "default"},
}
SCALED_QUERIES = {
    **SIZES["rope_parameters"],
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 16,
}
GEMMA4 = {"global_head_dim": 32, "rope_parameters": ROPES}
GRANITE = {
    "logits_scaling": 1.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 1.0,
}
KDA = {
    "num_heads": 2,
    "head_dim": 32,
    "short_conv_kernel_size": 4,
    "kda_layers": [1, 3],
}
LFM = {
    "layer_types": ["conv", "full_attention"] * 2,
    "block_dim": 64,
    "block_ff_dim": 64,
    "block_multiple_of": 4,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
}
LONGCAT = {
    "num_layers": 2,
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "zero_expert_num": 2,
    "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 32,
    "moe_topk": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
MINICPM = {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2.0}

CONFIGS: dict[str, dict] = {
    "afm7": {"hidden_dim": 64, "num_kv_reuse_layers": 2},
    "apertus": {"post_norm": True, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    # What its norms of queries and keys start with is zero, and made small here.
    "cohere": {"scale": 5.0},
    "dbrx": {
        "d_model": 64,
        "n_layers": 4,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": YARN},
    "deepseek_v32": {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 16},
    "deepseek_v41": {
        "head_dim": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "compress_ratios": [0, 4, 4, 4],
        "kv_source_layer_ids": [1],
        "index_source_layer_ids": [1, 3],
        "candidate_source_layer_id": 1,
        "candidate_topk_blocks": 2,
        "candidate_block_size": 2,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 3,
    },
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    # Without that norm, what the state adds outweighs what attention adds.
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_rms_norm": True},
    "gear": {
        "layer_types": [
            "conv_mixer",
            "sliding_attention",
            "full_attention",
            "conv_mixer",
        ]
    },
    "gemma3": {"text_config": {}},
    "gemma3n": {
        "text_config": {
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
            "altup_num_inputs": 2,
            "altup_coef_clip": 10.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
        }
    },
    "gemma4": {
        "text_config": {
            **GEMMA4,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "top_k_experts": 2,
        }
    },
    "gemma4_text": {
        **GEMMA4,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "glm_moe_dsa": {
        "index_head_dim": 32,
        "index_n_heads": 2,
        "index_topk": 16,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    "gpt2": {"n_ctx": 1024},
    "gpt_bigcode": {"n_inner": 64},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.5},
    "gptj": {"rotary_dim": 8},
    "granite": GRANITE,
    "granitemoe": GRANITE,
    "granitemoehybrid": {**GRANITE, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {
        "moe_topk": 2,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
        "cla_share_factor": 2,
    },
    "iquestloopcoder": {"loop_window_size": 16},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k25": {"text_config": {"rope_scaling": YARN}},
    "kimi_k3": {
        "text_config": {
            "linear_attn_config": KDA,
            "attn_res_block_size": 2,
            "mla_use_output_gate": True,
            "activation_situ_beta": 4.0,
            "activation_situ_linear_beta": 25.0,
        }
    },
    "kimi_linear": {"linear_attn_config": KDA, "model_max_length": 1024},
    "kimi_vl": {"text_config": {}},
    "lfm2": LFM,
    "lfm2-vl": {"text_config": LFM},
    "lfm2_moe": {**LFM, "use_expert_bias": True},
    "lille-130m": {"block_size": 1024},
    "llama4": {
        "text_config": {
            "num_experts_per_tok": 1,
            "attention_chunk_size": 72,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64,
        }
    },
    "llama4_text": {"intermediate_size_mlp": 64, "no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": {
        **LONGCAT,
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
    "mamba2": {"time_step_limit": [0.001, 100.0]},
    "mellum": {"rope_parameters": ROPES},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 72,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "head_dim": 24,
        "swa_head_dim": 24,
        "swa_v_head_dim": 16,
        "attention_value_scale": 0.7,
    },
    "minicpm": MINICPM,
    "minicpm3": {
        **MINICPM,
        "rope_scaling": {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
    },
    "minimax": {"rotary_dim": 8, "layer_types": None},
    "minimax_m3_vl": {
        "text_config": {
            "dense_intermediate_size": 64,
            "mlp_layer_types": ["dense"] + ["sparse"] * 3,
            "layer_types": ["full_attention", "sparse_attention"] * 2,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 4,
            "index_topk_blocks": 4,
        }
    },
    "ministral3": {"rope_parameters": SCALED_QUERIES},
    "mistral3": {
        "text_config": {"model_type": "ministral3", "rope_parameters": SCALED_QUERIES}
    },
    "mistral4": {"rope_parameters": SCALED_QUERIES},
    "nanbeige": {"num_loops": 2},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
            {
                "attention": {"n_heads_in_group": 4},
                "ffn": {"replace_with_linear": True},
            },
        ],
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe", "mlp", "attention"],
    },
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_allow_neg_eigval": True,
    },
    "openelm": {
        "num_transformer_layers": 4,
        "model_dim": 64,
        "ffn_dim_divisor": 16,
        "num_query_heads": [4, 4, 6, 6],
        "num_kv_heads": [2, 2, 3, 3],
        "ffn_multipliers": [0.5, 1.0, 1.0, 1.5],
    },
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 64,
        "gegelu_limit": 20.0,
    },
    "phimoe": {
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0] * 8,
            "short_factor": [1.0] * 8,
            "long_mscale": 1.2,
            "short_mscale": 1.2,
            "original_max_position_embeddings": 4096,
        }
    },
    "phixtral": {"num_vocab": VOCABULARY, "model_dim": 64, "rotary_dim": 8},
    "pixtral": {"text_config": {"model_type": "llama"}},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": 16},
    "prism_hadamard_qwen35": {
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": "model.layers.0.mlp.down_proj",
                "embedding": False,
                "dtype": "float16",
                "block": 512,
            }
        ],
        "text_config": {"num_experts": 0, "intermediate_size": 512},
    },
    "qwen": {"kv_channels": 16},
    "qwen2_vl": {"text_config": {"model_type": "qwen2_vl"}},
    "qwen3_5": {"text_config": {"num_experts": 0}},
    "qwen3_5_moe": {"text_config": {}},
    "qwen3_vl": {"text_config": {"model_type": "qwen3"}},
    "qwen3_vl_moe": {"text_config": {"model_type": "qwen3_moe"}},
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": 72,
        "block_types": ["recurrent", "attention"],
    },
    "rwkv7": {
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 8,
        "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
    # As published: no sliding layers.
    "smollm3": {"layer_types": ["full_attention"] * 4, "sliding_window": None},
    "spark2_5": {"rope_parameters": ROPES},
    "stablelm": {"use_qkv_bias": True},
    "step3p5": {
        "num_attention_groups": 2,
        "attention_other_setting": {
            "num_attention_heads": 6,
            "num_attention_groups": 3,
        },
        "moe_top_k": 2,
        "share_expert_dim": 32,
    },
}

# Those that cannot be built, or that cannot run.
BROKEN = {
    "olmo": "importing it ends the process without ai2-olmo, and with that package it "
    'still adds its mask to the scores, which is the string "causal" for a chunk',
    "muse_spark": "its norms, gates and routing are Metal kernels without a fallback",
}


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
    if name in BROKEN:
        raise NotImplementedError(f"{name}: {BROKEN[name]}")
    config = {**SIZES, "model_type": name, **CONFIGS.get(name, {})}
    scale = config.pop("scale", 2.5)
    if "text_config" in config:
        config["text_config"] = {**SIZES, "model_type": name, **config["text_config"]}
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    # A copy: some ModelArgs change the dicts in theirs.
    args = module.ModelArgs.from_dict(copy.deepcopy(config))
    # Bitnet's own layer multiplies packed weights, in a Metal kernel only.
    plain = {"BitLinear": nn.Linear} if name == "bitnet" else {}
    with mock.patch.dict(vars(module), plain):
        model = module.Model(args)
    if name == "phi3small":
        # Ids of the full vocabulary, where it writes to the logits.
        model._dummy_tokenizer_ids = mx.array([], mx.int32)

    def fill(path, a):
        if a.dtype == mx.uint32:  # quantized
            return mx.random.randint(0, 2**16, a.shape).astype(a.dtype)
        a = a.astype(mx.float32)
        if path.endswith(("scales", "biases")):
            return mx.random.uniform(-0.05, 0.05, a.shape)
        if a.ndim == 0 or path.endswith("signs"):
            return a
        if a.ndim == 1 and (a == 1).all():  # of a norm
            return mx.random.uniform(0.5, 2.5, a.shape)
        if not a.any():
            # One side of zero for a gain that is added to 1.
            a = mx.random.uniform(-0.5, 1.5 if a.ndim == 1 else 0.5, a.shape)
        return a * scale if a.ndim > 1 else a

    model.update(tree_map_with_path(fill, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model
