"""Use an installed tova_mlx as its users do, on a tiny model of random weights.

Run by `scripts/try_installs.py` in environments that have nothing but the package, and
read there by type checkers. Says the versions in its last line.
"""

import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache as cache_of_mlx_lm

import tova_mlx
from tova_mlx import (
    POLICIES,
    OptionError,
    PolicyKVCache,
    Report,
    convert,
    describe,
    load_prompt_cache,
    make_prompt_cache,
    revert,
    save_prompt_cache,
)

LIMIT, PROMPT, LENGTH = 12, 20, 40


def tiny_model() -> llama.Model:
    mx.random.seed(0)
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=100,
        )
    )


def generated(model: llama.Model, cache: list[PolicyKVCache]) -> list[int]:
    prompt = mx.arange(1, PROMPT + 1)
    steps = generate_step(prompt, model, max_tokens=LENGTH, prompt_cache=cache)
    return [int(token) for token, _ in steps]


def main() -> None:
    model = tiny_model()
    unbounded = generated(model, make_prompt_cache(model, None, policy="full"))
    for policy in POLICIES:
        wide = make_prompt_cache(model, PROMPT + LENGTH, policy=policy)
        assert generated(model, wide) == unbounded, policy
        if policy == "full":
            continue
        cache = make_prompt_cache(model, LIMIT, policy=policy)
        assert len(generated(model, cache)) == LENGTH
        report: Report = describe(cache)
        assert report.to_dict(), policy
        assert [c.size() for c in cache] == [LIMIT] * 2, policy
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "talk.safetensors")
            save_prompt_cache(file, cache)
            again, _ = load_prompt_cache(file)
        pairs = zip(cache, again, strict=True)
        assert all(mx.array_equal(a.positions, b.positions) for a, b in pairs), policy
    convert(model, LIMIT, policy="tova")
    assert len(generated(model, cache_of_mlx_lm(model))) == LENGTH
    revert(model)
    try:
        make_prompt_cache(model, 0)
    except OptionError as error:
        print(error)
    packages = [f"{name} {version(name)}" for name in ("mlx", "mlx-lm")]
    own = f"tova_mlx {tova_mlx.__version__}"
    print(", ".join([f"python {platform.python_version()}", own, *packages]))


if __name__ == "__main__":
    main()
