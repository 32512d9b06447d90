"""The server's store after speculative decoding, and what it checks, without HTTP."""

from itertools import islice
from types import SimpleNamespace

import mlx.core as mx
import pytest
import tiny
import zoo
from mlx_lm import server
from mlx_lm.generate import speculative_generate_step
from mlx_lm.models.cache import (
    ArraysCache,
    KVCache,
    LRUPromptCache,
    RotatingKVCache,
    make_prompt_cache,
)

from tova_mlx import convert
from tova_mlx.errors import ModelLoadError, UnsupportedModelError
from tova_mlx.hooks.generation import generator
from tova_mlx.hooks.handler import _NUMBERS, request_handler
from tova_mlx.hooks.layers import leaves
from tova_mlx.hooks.server import PromptStore, Provider, check_draft
from tova_mlx.models.conversion import pin_in_new_caches
from tova_mlx.models.rows import takes_rows

PROMPT = tiny.tokens(30).tolist()[0]
NEXT = [7, 3, 11]


def pair(seed, **options):
    """A model, and one that drafts for it: the same for seed 0."""
    models = tiny.make(0), tiny.make(seed)
    for model in models:
        convert(model, **options)
    return models


def converse(models, n):
    """Answer the prompt with n tokens as the server does: its key and its caches."""
    model, draft = models
    caches = make_prompt_cache(model) + make_prompt_cache(draft)
    steps = speculative_generate_step(
        mx.array(PROMPT),
        *models,
        num_draft_tokens=3,
        max_tokens=50,
        prompt_cache=caches,
    )
    key = PROMPT + [token for token, _, _ in islice(steps, n)]
    steps.close()
    return key, caches


def fetched(key, caches, tokens):
    store = PromptStore()
    store.insert_cache("model", key, caches)
    return store.fetch_nearest_cache("model", tokens)


def read(model, tokens, caches=None):
    """The logits after the last of the tokens."""
    caches = make_prompt_cache(model) if caches is None else caches
    return model(mx.array([tokens]), cache=caches)[0, -1]


def check_read(models, caches, tokens, rest):
    """All caches have seen what is not left, and the model goes on as if anew."""
    assert rest
    assert tokens[-len(rest) :] == rest
    seen = {c.offset for c in leaves(caches)}
    assert seen == {len(tokens) - len(rest)}
    model, draft = models
    mine, its = caches[: len(model.layers)], caches[len(model.layers) :]
    for one, part in ((model, mine), (draft, its)):
        assert mx.allclose(read(one, rest, part), read(one, tokens), atol=1e-4)


def named(options):
    return f"{options['policy']} {options['max_kv_size']}"


OPTIONS = [
    {"policy": "full", "max_kv_size": None},
    {"policy": "tova", "max_kv_size": 100},
    {"policy": "tova", "max_kv_size": 12},
    {"policy": "fade", "max_kv_size": 12},
    {"policy": "window", "max_kv_size": 12},
]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("seed", [0, 1], ids=["accepted", "rejected"])
@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_a_second_turn_goes_on_after_drafts_without_a_gap(options, seed, n):
    models = pair(seed, **options)
    key, caches = converse(models, n)
    tokens = key + NEXT
    got, rest = fetched(key, caches, tokens)
    check_read(models, got, tokens, rest)
    # The draft model's caches lack two tokens at most.
    assert len(rest) <= len(NEXT) + 2


def test_mlx_lms_own_store_leaves_a_gap():
    models = pair(0, **OPTIONS[0])
    key, caches = converse(models, 4)
    store = LRUPromptCache()
    store.insert_cache("model", key, caches)
    got, rest = store.fetch_nearest_cache("model", key + NEXT)
    assert min(c.offset for c in leaves(got)) < len(key + NEXT) - len(rest)


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_the_very_same_tokens_leave_one_to_read(options):
    models = pair(0, **options)
    key, caches = converse(models, 5)
    got, rest = fetched(key, caches, key)
    check_read(models, got, key, rest)


def test_a_prompt_that_another_one_begins_with_is_taken_from_it():
    models = pair(0, **OPTIONS[0])
    key, caches = converse(models, 8)
    tokens = [*key[:20], 5]
    got, rest = fetched(key, caches, tokens)
    check_read(models, got, tokens, rest)
    assert len(rest) <= 3


def test_what_cannot_be_taken_back_is_read_anew():
    models = pair(0, **OPTIONS[2])
    key, caches = converse(models, 5)
    # As when nothing was drafted for many tokens: the draft model saw none of them.
    model, layers = models[0], len(models[0].layers)
    more = list(range(20))
    read(model, more, caches[:layers])
    tokens = [*key, *more, 1]
    assert fetched(key + more, caches, tokens) == (None, tokens)


def rows(cache, n):
    cache.update_and_fetch(mx.zeros((1, 1, n, 4)), mx.zeros((1, 1, n, 4)))
    return cache


def test_layers_without_a_position_stay_with_the_others():
    key = list(range(10))
    caches = [rows(KVCache(), 10), ArraysCache(2)]
    got, rest = fetched(key, caches, [*key, 1])
    assert rest == [1]
    assert got[0].offset == 10
    # Nothing can take their last token back.
    assert fetched(key, caches, key) == (None, key)
    assert fetched(key, [ArraysCache(2)], key) == (None, key)
    got, rest = fetched(key, [ArraysCache(2)], [*key, 1])
    assert (len(got), rest) == (1, [1])


def test_a_full_sliding_window_gives_nothing_back():
    key = list(range(10))
    full, room = rows(RotatingKVCache(8), 10), rows(RotatingKVCache(80), 10)
    assert fetched(key, [full], key) == (None, key)
    got, rest = fetched(key, [room], key)
    assert (got[0].offset, rest) == (9, [9])


def test_nothing_stored_is_nothing_fetched():
    assert PromptStore().fetch_nearest_cache("model", [1, 2]) == (None, [1, 2])
    assert fetched([5], [rows(KVCache(), 1)], [5]) == (None, [5])


def provided(model):
    return SimpleNamespace(
        model=model,
        adapter_path=None,
        draft_model=None,
        trust_remote_code=False,
        chat_template="",
        pipeline=False,
    )


def test_what_cannot_be_found_leaves_the_model_that_is_loaded(monkeypatch):
    def load(self, *paths):
        self.reset()
        self.model_key, self.model = paths, tiny.make()

    def find(name):
        if name != "tiny":
            raise ModelLoadError(name)

    monkeypatch.setattr(server.ModelProvider, "_load", load)
    provider = Provider(provided("tiny"), find)
    first = provider.model
    for paths in (("gpt-4",), ("default_model", None, "gpt-4")):
        with pytest.raises(ModelLoadError):
            provider.load(*paths)
        assert provider.load("default_model", None, "default_model")[0] is first


def test_a_draft_model_beside_shared_layers_is_refused(monkeypatch):
    check_draft(tiny.make())
    shared = zoo.make("gemma3n")
    with pytest.raises(UnsupportedModelError, match="2 caches for 4 layers"):
        check_draft(shared)

    def load(self, *paths):
        self.model, self.draft_model = shared, paths[2] and tiny.make()

    monkeypatch.setattr(server.ModelProvider, "_load", load)
    arguments = provided("shared")
    assert Provider(arguments).model is shared
    provider = Provider(arguments)
    with pytest.raises(UnsupportedModelError, match="2 caches for 4 layers"):
        provider.load("shared", None, "tiny")
    # Or the next request would be answered with it.
    assert (provider.model, provider.draft_model, provider.model_key) == (None,) * 3
    arguments.draft_model = "tiny"
    with pytest.raises(UnsupportedModelError, match="--draft-model"):
        Provider(arguments)


@pytest.mark.parametrize("name", ["gemma2", "gpt_bigcode", "phi3small"])
def test_a_model_that_mixes_the_rows_of_a_batch_answers_one_by_one(name, monkeypatch):
    assert takes_rows(tiny.make())

    def load(self, *_):
        self.model, self.draft_model, self.is_batchable = models.pop(), None, True

    monkeypatch.setattr(server.ModelProvider, "_load", load)
    models = [zoo.make(name), tiny.make()]
    for takes in (True, False):
        provider = Provider(provided("a"), takes_rows=takes_rows)
        assert provider.is_batchable is takes


def test_a_stored_prompt_that_pins_otherwise_is_read_again():
    model = tiny.make()
    convert(model, 12)
    pin_in_new_caches(model, 3)
    caches = make_prompt_cache(model)
    read(model, PROMPT, caches)
    store = PromptStore()
    store.insert_cache("model", PROMPT, caches)
    tokens = PROMPT + NEXT
    for pinned, there in ((None, True), (3, True), (4, False), (0, False)):
        store.pinned = pinned
        got, rest = store.fetch_nearest_cache("model", tokens)
        assert (got is not None) == there
        assert rest == (NEXT if there else tokens)


def codes(text):
    return [ord(c) for c in text]


def told(*messages):
    return [{"role": role, "content": content} for role, content in messages]


QUESTION = told(("user", "Why?"))
SYSTEM = told(("system", "Be brief."))
TURNS = told(("user", "Why?"), ("assistant", "So."), ("user", "And?"))


@pytest.mark.parametrize(
    ("messages", "begins"),
    [
        (QUESTION, "<u>"),
        ([*SYSTEM, *QUESTION], "<s>Be brief.<u>"),
        ([*SYSTEM, *SYSTEM, *QUESTION], "<s>Be brief.<s>Be brief.<u>"),
        ([*SYSTEM, *TURNS], "<s>Be brief.<u>"),
        ([*QUESTION, *SYSTEM, *QUESTION], "<u>"),
    ],
)
@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("kind", ["chat", "text", "no template", "begins otherwise"])
def test_a_conversation_pins_what_comes_before_its_first_question(
    messages, begins, drafts, kind, monkeypatch
):
    def tokenize(self, tokenizer, request, args):
        if request.request_type == "text":
            return codes(request.prompt), "and more"
        parts = [f"<{m['role'][0]}>{m['content']}" for m in request.messages]
        long = "[long]" if kind == "begins otherwise" and len(parts) > 3 else ""
        return codes(long + "".join(parts) + "<a>"), "and more"

    monkeypatch.setattr(server.ResponseGenerator, "_tokenize", tokenize)
    pins = {}
    kind_of = generator(pytest.fail, pins.__setitem__)
    # That needs a model.
    monkeypatch.setattr(kind_of, "_rehearse", lambda *_: None)
    answers = object.__new__(kind_of)
    answers.prompt_cache = PromptStore()
    draft = "draft" if drafts else None
    answers.model_provider = SimpleNamespace(model="model", draft_model=draft)
    request = SimpleNamespace(
        request_type="text" if kind == "text" else "chat",
        messages=[dict(m) for m in messages],
        prompt="Be brief.",
    )
    tokenizer = SimpleNamespace(has_chat_template=kind != "no template")
    prompt, _ = answers._tokenize(tokenizer, request, None)
    other = kind == "begins otherwise" and len(messages) > 3
    want = 0 if other or kind in ("text", "no template") else len(begins)
    assert prompt[:want] == codes(begins)[:want]
    assert pins == dict.fromkeys(["model", "draft"] if drafts else ["model"], want)
    assert answers.prompt_cache.pinned == want
    assert request.messages == messages


@pytest.mark.parametrize("most", [None, 4])
def test_more_drafts_than_can_be_taken_back_are_refused(most, monkeypatch):
    monkeypatch.setattr(
        server.APIHandler, "validate_model_parameters", lambda self: None
    )
    handler = object.__new__(request_handler(most))
    others = ("requested_draft_model", "seed", "stream_options", "logit_bias")
    vars(handler).update(dict.fromkeys((*others, "chat_template_kwargs")), body={})
    vars(handler).update(dict.fromkeys(_NUMBERS, 1))
    handler.num_draft_tokens = 4
    handler.validate_model_parameters()
    handler.num_draft_tokens = 5
    if most is None:
        handler.validate_model_parameters()
        return
    with pytest.raises(ValueError, match="at most 4"):
        handler.validate_model_parameters()
