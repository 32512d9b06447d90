"""Loads the long-range tasks: questions about long documents, and texts to go on with.

Files of JSON lines, from a path or a dataset repository on the Hugging Face hub:

- SQuALITY (Wang et al. 2022, arXiv 2205.11465; github.com/nyu-mll/SQuALITY, the
  plain-text files): a story, questions, several summaries for each;
- QASPER (Dasigi et al. 2021, arXiv 2105.03011) as packed by L-Eval (An et al. 2023,
  arXiv 2307.11088; github.com/OpenLMLab/LEval, scientific_qa.jsonl): a paper,
  questions, answers.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import EvaluationError, reason_of
from .lines import read_text

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(.+\.jsonl))?")
_SQUALITY = (
    "SQuALITY has one object a line: document, questions (question_text, responses "
    "(response_text))."
)
_QASPER = (
    "L-Eval's QASPER has one object a line: input, instructions and as many outputs."
)


class Example(NamedTuple):
    """One thing to ask for. `source`: number of the document, from 0."""

    source: int
    document: str
    question: str
    references: tuple[str, ...]


def load_squality(source: str, n: int, documents: int | None = None) -> list[Example]:
    """`n` questions of SQuALITY or all there are, from as many stories as can be.

    documents: use no more than the first so many.
    source: a file or hub id, see `find`. Raises EvaluationError.
    """
    found = []
    for i, line in enumerate(_lines(find(source, "--squality"), _SQUALITY)):
        document = line.get("document", str)
        found.append(
            [
                Example(
                    i,
                    document,
                    question.get("question_text", str),
                    tuple(
                        r.get("response_text", str) for r in question.each("responses")
                    ),
                )
                for question in line.each("questions")
            ]
        )
    return _spread(found[:documents], n, source)


def load_qasper(source: str, n: int, documents: int | None = None) -> list[Example]:
    """`n` questions of QASPER or all there are, from as many papers as can be.

    L-Eval repeats some papers for other judges than F1; those lines are left out, as
    its own scoring leaves them out. It lists a question once per annotator; here it is
    one question with several references, as QASPER scores it.
    documents: use no more than the first so many.
    source: a file or hub id, see `find`. Raises EvaluationError.
    """
    found = []
    for i, line in enumerate(_lines(find(source, "--qasper"), _QASPER)):
        document = line.get("input", str)
        questions = line.strings("instructions")
        answers = line.get("outputs", list)
        if len(questions) != len(answers):
            raise EvaluationError(
                f"{line.where}: {len(questions)} instructions and {len(answers)} "
                f"outputs. {_QASPER}"
            )
        if line.values.get("evaluation", "f1") != "f1":
            continue
        known: dict[str, tuple[str, ...]] = {}
        for question, answer in zip(questions, answers, strict=True):
            known[question] = known.get(question, ()) + line.references(answer)
        found.append([Example(i, document, *pair) for pair in known.items()])
    return _spread(found[:documents], n, source)


def load_story(text: str, n: int, n_tokens: int, tokenizer: Any) -> list[Example]:
    """`n` passages of about `n_tokens` tokens from all over a text, none overlapping.

    Each starts at a paragraph if there is one. Raises EvaluationError.
    """
    examples = []
    for i in range(n):
        part = text[len(text) * i // n : len(text) * (i + 1) // n]
        if i:
            part = part[part.find("\n\n") + 1 :].lstrip()
        # No token is longer than 16 characters on average.
        ids = tokenizer.encode(part[: 16 * n_tokens], add_special_tokens=False)
        if len(ids) < n_tokens:
            raise EvaluationError(
                f"The text is too short: part {i + 1} of {n} has {len(ids)} tokens, "
                f"and --story-tokens is {n_tokens}. Give a longer text, fewer "
                "--examples or a smaller --story-tokens."
            )
        # A cut character at the end becomes U+FFFD.
        passage = tokenizer.decode(ids[:n_tokens]).rstrip("\ufffd")
        examples.append(Example(i, passage, "", ()))
    return examples


def find(source: str, option: str) -> Path:
    """The file that `source` names: a path, `owner/name` or `owner/name/FILE.jsonl`.

    The last two are dataset repositories on the hub; the second has one .jsonl file.
    Raises EvaluationError.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    match = _HUB_ID.fullmatch(source)
    if match is None or path.exists() or (source.count("/") == 1 and path.suffix):
        raise EvaluationError(
            f"{option} {source}: no such file, and no hub id (owner/name or "
            "owner/name/FILE.jsonl). Check the path."
        )
    from huggingface_hub import HfApi, hf_hub_download

    repository, name = match.groups()
    try:
        if name is None:
            files = HfApi().list_repo_files(repository, repo_type="dataset")
            name = _only([f for f in files if f.endswith(".jsonl")], source, option)
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except EvaluationError:
        raise
    except Exception as error:
        # Anything may come from a network; the reason is all a user can use.
        raise EvaluationError(
            f"{option} {source}: no such file, and it cannot be had from the hub "
            f"({reason_of(error)}). Check the name and the network, or give a local "
            "file."
        ) from error


def _only(files: list[str], source: str, option: str) -> str:
    if len(files) == 1:
        return files[0]
    if not files:
        raise EvaluationError(
            f"{option} {source}: the repository has no .jsonl file. Convert its data, "
            "or give a local file."
        )
    some = ", ".join(files[:5]) + (", …" if len(files) > 5 else "")
    raise EvaluationError(
        f"{option} {source}: the repository has {len(files)} .jsonl files ({some}). "
        f"Name one: {source}/{files[0]}"
    )


class _Object:
    """A JSON object that says where it stands when something is missing."""

    def __init__(self, values: Any, where: str, form: str):
        if not isinstance(values, dict):
            raise EvaluationError(
                f"{where}: {type(values).__name__}, not an object. {form}"
            )
        self.values, self.where, self.form = values, where, form

    def get(self, name: str, kind: type) -> Any:
        if name not in self.values:
            raise EvaluationError(f"{self.where}: no field '{name}'. {self.form}")
        value = self.values[name]
        if not isinstance(value, kind) or not value:
            what = "is empty" if isinstance(value, kind) else f"is no {kind.__name__}"
            raise EvaluationError(f"{self.where}: '{name}' {what}. {self.form}")
        return value

    def each(self, name: str) -> Iterator["_Object"]:
        for i, item in enumerate(self.get(name, list), 1):
            yield _Object(item, f"{self.where}, {name} {i}", self.form)

    def strings(self, name: str) -> list[str]:
        items = self.get(name, list)
        if not all(isinstance(item, str) for item in items):
            raise EvaluationError(
                f"{self.where}: '{name}' is not all text. {self.form}"
            )
        return items

    def references(self, answer: Any) -> tuple[str, ...]:
        """One answer, or several to choose the best of."""
        answers = [answer] if isinstance(answer, str) else answer
        return tuple(
            _Object({"outputs": answers}, self.where, self.form).strings("outputs")
        )


def _lines(path: Path, form: str) -> Iterator[_Object]:
    text = read_text(path, form)
    if not text.strip():
        raise EvaluationError(f"{path} is empty. {form}")
    # Not splitlines: documents may hold U+2028, which JSON leaves as it is.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise EvaluationError(
                    f"{where}: not JSON ({reason_of(error)}). {form}"
                ) from error
            yield _Object(values, where, form)


def _spread(documents: Sequence[list[Example]], n: int, source: str) -> list[Example]:
    """The first question of every document, then the second ones …, `n` in all."""
    if not documents:
        raise EvaluationError(
            f"{source}: no line is scored by F1 (the field 'evaluation'). {_QASPER}"
        )
    longest = max(map(len, documents), default=0)
    rounds = ([d[i] for d in documents if i < len(d)] for i in range(longest))
    return [example for some in rounds for example in some][:n]
