"""Real commands in fresh processes, with faults: killed, a full disk, Ctrl-C.

`Place` is a directory with a tiny model and texts, where commands run; `WRITERS` are
the commands that write files, each with how it is told that a file is whole. The faults
happen at the n-th step of a command's work on files, see `faulty/sitecustomize.py`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
HOOK = Path(__file__).parent / "faulty"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines on stderr that name an error."""
        names = ("Error:", "not prepared:")
        return [line for line in self.err.splitlines() if any(n in line for n in names)]

    @property
    def last(self) -> str:
        """The end of what it said."""
        return " | ".join(self.err.strip().splitlines()[-2:])[-300:]

    @property
    def has_traceback(self) -> bool:
        words = ("Traceback", "Exception ignored", "core dumped", "terminate called")
        return any(word in self.err + self.out for word in words)


class Place:
    """A directory `work` for what commands write, beside a model and texts."""

    def __init__(self, root: Path):
        # Names as people have them.
        self.root, self.work = root, root / "wörk"
        self.model, self.novel = root / "model", root / "Größe_世界.txt"
        self.log = root / "steps"
        if not self.model.exists():
            self.model.mkdir(parents=True)
            make_model(self.model)
            excerpt = ROOT / "scripts" / "moby_dick_excerpt.txt"
            words = excerpt.read_text(encoding="utf-8")
            self.novel.write_text(words[:2500], encoding="utf-8")

    def environment(self, **more: str | None) -> dict[str, str]:
        """That of a command; None: without that name."""
        own = {
            "PYTHONPATH": str(ROOT),
            "OPENBLAS_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(self.root / "cache"),
            "MPLCONFIGDIR": str(self.root / "matplotlib"),
            "PYTHONDONTWRITEBYTECODE": "1",
            # As a shell on a terminal has it.
            "NO_COLOR": "1",
        }
        named = {**os.environ, **own, **more}
        return {name: value for name, value in named.items() if value is not None}

    def fill(self, words: str) -> list[str]:
        """The words of a command, with places of this directory for their names."""
        names = ("root", "work", "model", "novel")
        places = {name: str(getattr(self, name)) for name in names}
        places["tests"] = str(HOOK.parent)
        return [word.format(**places) for word in words.split()]

    def run(
        self,
        words: str,
        stdin: str = "",
        fault: tuple[str, int] | None = None,
        *,
        shell: str = 'exec "$@"',
        **environment: str | None,
    ) -> Done:
        """Run a command to its end.

        fault: kind and step, see `faulty`; None: none, and steps are not counted.
        shell: of bash, which runs the command as "$@".
        """
        env = self.environment(**environment)
        if fault is not None:
            self.log.unlink(missing_ok=True)
            kind, at = fault
            told = {"under": str(self.work), "log": str(self.log)}
            env["TOVA_FAULT"] = json.dumps({**told, "kind": kind, "at": at})
            env["PYTHONPATH"] = os.pathsep.join([str(HOOK), env["PYTHONPATH"]])
        shell = shell.replace("{work}", str(self.work))
        done = subprocess.run(
            ["bash", "-c", shell, "bash", sys.executable, *self.fill(words)],
            input=stdin.replace("{work}", str(self.work)).encode(),
            capture_output=True,
            env=env,
            cwd=self.root,
            timeout=600,
            # A job in the background of a shell inherits that Ctrl-C is ignored.
            start_new_session=True,
            preexec_fn=default_interrupt,
        )
        out, err = (s.decode(errors="replace") for s in (done.stdout, done.stderr))
        return Done(done.returncode, out, err)

    def steps(self) -> list[str]:
        """What the last command with a fault did to files, a line a step."""
        if not self.log.exists():
            return []
        return [line.strip() for line in self.log.read_text().splitlines()]

    def clear(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()

    def restore(self, files: dict[str, bytes]) -> None:
        """Have these files in `work`, and no others."""
        self.clear()
        self.put(files)

    def put(self, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            path = self.work / name
            if name.endswith("/"):
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def files(self) -> dict[str, bytes]:
        """All that is below `work` by name; those of directories end with a slash."""
        found = {}
        for path in sorted(self.work.rglob("*")):
            name = str(path.relative_to(self.work))
            if path.is_dir():
                found[f"{name}/"] = b""
            else:
                found[name] = path.read_bytes()
        return found


def default_interrupt() -> None:
    """Let Ctrl-C raise in Python, whatever this process was told."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def make_model(path: Path) -> None:
    """Save a random Llama of two layers, with a token for each byte of a text."""
    import mlx.core as mx
    from mlx_lm.models import llama
    from mlx_lm.utils import save_config, save_model
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(alphabet) + 1,
        "eos_token_id": len(alphabet),
        "max_position_embeddings": 4096,
    }
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    save_model(path, model)
    save_config(config, config_path=path / "config.json")
