"""What mlx-lm generates in a process of its own, without tova_mlx unless asked.

Reads a JSON list of jobs from stdin and prints one of results; for test_processes.
"""

import json
import runpy
import sys
from functools import cache
from pathlib import Path

BLAS = Path(__file__).parents[1] / "tova_mlx" / "hooks" / "blas.py"
# Fast matrix products, without importing the package.
runpy.run_path(str(BLAS))["load_openblas"]()

import mlx.core as mx  # noqa: E402
from mlx_lm import load, stream_generate  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache  # noqa: E402


@cache
def loaded(path, role):
    model, tokenizer = load(path)
    model.set_dtype(mx.float32)
    return model, tokenizer


def user(text):
    return {"role": "user", "content": text}


def run(model, turns, *, max_tokens, draft=None, how="whole", convert=None, **options):
    """The texts of the turns, and how many tokens were drafted.

    how: the template on all turns so far, or on each, "appended" to what the cache
    holds; "raw" without one.
    """
    model, tokenizer = loaded(model, "model")
    models = [model]
    if draft is not None:
        models.append(options.setdefault("draft_model", loaded(draft, "draft")[0]))
    if convert is not None:
        import tova_mlx

        for each in models:
            tova_mlx.convert(each, **convert)
    caches = make_prompt_cache(model) if how == "appended" else None
    messages, texts, drafted = [], [], []
    for turn in turns:
        messages = [] if how == "appended" else messages
        messages.append(user(turn))
        prompt = turn
        if how != "raw":
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        made = stream_generate(
            *(model, tokenizer, prompt),
            max_tokens=max_tokens,
            prompt_cache=caches,
            **options,
        )
        pieces = list(made)
        texts.append("".join(p.text for p in pieces))
        drafted.append(sum(p.from_draft for p in pieces))
        messages.append({"role": "assistant", "content": texts[-1]})
    return {"texts": texts, "drafted": drafted}


def save(model, prompt, file):
    """A prompt read as `mlx_lm cache_prompt` reads it, in a file as it writes it."""
    name = model
    model, tokenizer = loaded(name, "model")
    tokens = tokenizer.apply_chat_template(
        [user(prompt)], add_generation_prompt=False, continue_final_message=True
    )
    caches = make_prompt_cache(model)
    for _ in generate_step(mx.array(tokens), model, max_tokens=0, prompt_cache=caches):
        pass
    save_prompt_cache(file, caches, {"model": name, "tokenizer_config": "{}"})


if __name__ == "__main__":
    jobs = json.load(sys.stdin)
    results = [{"run": run, "save": save}[name](**job) for name, job in jobs]
    asked = any("convert" in job for _, job in jobs)
    assert asked == ("tova_mlx" in sys.modules)
    json.dump(results, sys.stdout)
