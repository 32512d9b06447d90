"""Every command in processes of its own, as a user types them one after another.

Where nothing is evicted the text is that of mlx-lm without tova_mlx; where tokens are,
it is the same whichever way it is asked for.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.models import llama
from mlx_lm.utils import save_config, save_model
from test_serve import chat, serving, user

pytestmark = pytest.mark.real_model

ALONE = Path(__file__).parent / "alone.py"
TOKENS = 12
BEFORE = "Name three rivers of Europe and say where each of them ends. " * 4 + "Please."
AFTER = " Then name a town at one of them."
QUESTION = BEFORE + AFTER
TURNS = [QUESTION, "And which of them is the longest?"]
ROOMY, TIGHT = "4096", "40"


def process(*command, stdin=""):
    """What a command prints, in a new process."""
    done = subprocess.run(
        [sys.executable, *command],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def alone(jobs):
    return json.loads(process(str(ALONE), stdin=json.dumps(jobs)))


def lines(*questions):
    return "\n".join(questions) + "\n"


@pytest.fixture(scope="module")
def drafts(demo_path, small_path, tmp_path_factory):
    """Draft models by how much of what they draft is accepted; "all" is the model.

    It is random and attends to few tokens at a time, so that a wrong one in any cache
    gives another text at once.
    """
    paths = {"none": small_path}
    # The same weights, but "some" tells places apart in another way.
    for name, theta in (("all", 10000.0), ("some", 9000.0)):
        config = {
            "model_type": "llama",
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "intermediate_size": 64,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rms_norm_eps": 1e-5,
            "vocab_size": 49152,
            "rope_theta": theta,
            "tie_word_embeddings": False,
        }
        mx.random.seed(0)
        model = llama.Model(llama.ModelArgs.from_dict(config))
        spiky = tree_map(lambda a: a * 3 if a.ndim > 1 else a, model.parameters())
        model.update(spiky)
        paths[name] = path = tmp_path_factory.mktemp(name)
        save_model(path, model)
        save_config(config, config_path=path / "config.json")
        for file in demo_path.glob("*token*"):
            shutil.copy(file, path)
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def plain_file(tmp_path_factory):
    return str(tmp_path_factory.mktemp("plain") / "prompt.safetensors")


@pytest.fixture(scope="module")
def theirs(demo_path, drafts, plain_file):
    """What mlx-lm makes of the questions by itself, and of drafts; a file it saved."""
    model = {"model": drafts["all"], "max_tokens": TOKENS}
    turns = {"model": str(demo_path), "max_tokens": TOKENS, "turns": TURNS}
    raw = model | {"turns": [BEFORE], "how": "raw"}
    file = {"model": drafts["all"], "prompt": BEFORE, "file": plain_file}
    jobs = {
        "one": ("run", model | {"turns": [QUESTION]}),
        "raw": ("run", raw),
        "turns": ("run", turns),
        "appended": ("run", turns | {"how": "appended"}),
        "file": ("save", file),
        "all": ("run", drafting(drafts, "all")),
        "some": ("run", drafting(drafts, "some")),
    }
    return dict(zip(jobs, alone(list(jobs.values())), strict=True))


def drafting(drafts, draft, **options):
    job = {"model": drafts["all"], "turns": [QUESTION], "max_tokens": 32}
    return job | {"draft": drafts[draft], "num_draft_tokens": 3} | options


class Ways:
    """The ways to one text: each takes the cache's options and a draft model."""

    def __init__(self, model, folder):
        self.model, self.folder = ["--model", str(model)], folder
        self.limit = ["--max-tokens", str(TOKENS)]

    def generate(self, options, *more, prompt=QUESTION):
        command = ["generate", prompt, *more, *options, *self.model, *self.limit]
        return process("-m", "tova_mlx", *command)[:-1]

    def tool(self, options, *arguments, draft=None, stdin=""):
        command = ["-m", "tova_mlx", "run", *options, *arguments]
        if draft is not None:
            command += ["--draft-model", draft]
        return process(*command, stdin=stdin)

    def run_generate(self, options, draft=None, more=()):
        arguments = ("generate", *self.model, *self.limit, "--verbose", "F", *more)
        return self.tool(options, *arguments, "--prompt", QUESTION, draft=draft)[:-1]

    def save(self, options):
        file = str(self.folder / "prompt")
        arguments = ("cache_prompt", *self.model, "--prompt", BEFORE)
        self.tool(options, *arguments, "--prompt-cache-file", file)
        return file

    def go_on(self, options, file, draft=None):
        """The text after a file, whose model goes on."""
        arguments = ("generate", *self.limit, "--verbose", "F", "--prompt", AFTER)
        more = ("--prompt-cache-file", file)
        return self.tool(options, *arguments, *more, draft=draft)[:-1]

    def saved_first(self, options, draft=None):
        return self.go_on(options, self.save(options), draft)

    def chat(self, options, *lines_in):
        command = ["-m", "tova_mlx", "chat", *self.model, *self.limit, *options]
        return process(*command, stdin=lines(*lines_in))

    def chat_saved(self, options):
        file = self.folder / "talk"
        first = self.chat(options, TURNS[0], f"/save {file}")
        return first + self.chat(options, f"/load {file}", TURNS[1])

    def serve(self, options, draft=None):
        more = [] if draft is None else ["--draft-model", draft]
        messages, texts = [], []
        with serving(*self.model, *options, *more, "--log-level", "ERROR") as (_, to):
            for question in TURNS:
                messages.append(user(question))
                said = chat(to, messages, max_tokens=TOKENS).choices[0].message
                messages.append({"role": "assistant", "content": said.content})
                texts.append(said.content)
        return texts


@pytest.fixture
def ways(drafts, tmp_path):
    return Ways(drafts["all"], tmp_path)


@pytest.fixture
def talks(demo_path, tmp_path):
    """The same of a real model: its answers split into the tokens it wrote."""
    return Ways(demo_path, tmp_path)


def of(policy, size=ROOMY, *more):
    return ["--policy", policy, "--max-kv-size", size, *more]


# Nothing is evicted.


def test_generate_gives_mlx_lms_text(ways, theirs):
    assert ways.generate(of("tova")) == theirs["one"]["texts"][0]
    raw = ways.generate(of("keydiff"), "--no-chat-template", prompt=BEFORE)
    assert raw == theirs["raw"]["texts"][0]


@pytest.mark.parametrize(
    ("policy", "draft"), [("window", "some"), ("h2o", "none"), ("full", "all")]
)
def test_mlx_lms_generate_gives_its_own_text(ways, theirs, drafts, policy, draft):
    got = ways.run_generate(of(policy), drafts[draft])
    assert got == theirs["one"]["texts"][0]


@pytest.mark.parametrize(("policy", "draft"), [("streaming", "some"), ("vatp", None)])
def test_a_saved_prompt_gives_the_text_of_one_prompt(
    ways, theirs, drafts, policy, draft
):
    got = ways.saved_first(of(policy), drafts.get(draft))
    assert got == theirs["one"]["texts"][0]


@pytest.mark.parametrize("draft", [None, "some"])
def test_a_file_of_mlx_lm_itself_goes_on(ways, theirs, drafts, plain_file, draft):
    got = ways.go_on(of("full"), plain_file, drafts.get(draft))
    assert got == theirs["one"]["texts"][0]


def test_a_chat_gives_mlx_lms_text(talks, theirs):
    assert talks.chat(of("fade"), *TURNS) == lines(*theirs["turns"]["texts"])


def test_mlx_lms_chat_gives_its_own_text(talks, theirs):
    arguments = ("chat", *talks.model, *talks.limit)
    said = talks.tool(of("vatp"), *arguments, stdin=lines(*TURNS))
    for text in theirs["appended"]["texts"]:
        before, _, said = said.partition(text)
        assert before.endswith("\n")
        assert re.match(r"\s+\S*\d+ tokens", said)


def test_the_server_gives_mlx_lms_text(talks, theirs, demo_path):
    assert talks.serve(of("full"), str(demo_path)) == theirs["turns"]["texts"]


# Tokens are evicted.


@pytest.mark.parametrize(
    ("policy", "drafted", "saved"),
    [
        ("window", None, "some"),
        ("streaming", "all", None),
        ("h2o", "some", None),
        ("vatp", "none", None),
        ("keydiff", "some", None),
        ("fade", None, "none"),
        ("tova", "some", "all"),
    ],
)
def test_one_text_whether_drafted_or_saved_first(
    ways, theirs, drafts, policy, drafted, saved
):
    options = of(policy, TIGHT)
    want = ways.generate(options)
    assert want != theirs["one"]["texts"][0]
    if drafted is not None:
        # More at a time than the caches can take back unless told.
        more = ("--num-draft-tokens", "20") if policy == "tova" else ()
        assert ways.run_generate(options, drafts[drafted], more) == want
    if saved is not None:
        assert ways.saved_first(options, drafts[saved]) == want


def test_two_turns_in_one_chat_or_two_or_on_a_server(talks, drafts, demo_path):
    options = of("tova", TIGHT, "--granularity", "head")
    want = talks.chat(options, *TURNS)
    assert talks.chat_saved(options) == want
    assert lines(*talks.serve(options, str(demo_path))) == want


# How much of what is drafted is accepted.


def test_as_many_drafts_are_accepted_as_without_us(drafts, theirs):
    def ours(draft, policy, size):
        how = {"policy": policy, "max_kv_size": int(size)}
        return "run", drafting(drafts, draft, convert=how)

    roomy = [ours("some", "fade", ROOMY), ours("all", "vatp", ROOMY)]
    tight = [ours("all", policy, TIGHT) for policy in ("tova", "h2o", "window")]
    counts = [result["drafted"][0] for result in alone(roomy + tight)]
    every, some = (theirs[name]["drafted"][0] for name in ("all", "some"))
    assert 4 < some < every == 24
    assert counts[:2] == [some, every]
    assert min(counts[2:]) >= every - 1
