"""Which tokens are kept, against token-by-token reading with ordinary caches."""

import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
import tiny
import zoo
from click.testing import CliRunner

from tova_mlx import POLICIES, make_prompt_cache
from tova_mlx.cli import main
from tova_mlx.errors import EvaluationError
from tova_mlx.evaluation.kept import (
    Kept,
    departures,
    first_survival,
    first_tokens,
    mean_lifetime,
    plot,
    recent_share,
)
from tova_mlx.evaluation.kinds import KINDS, decode, tag, token_kinds
from tova_mlx.evaluation.results import Results, Setting, settings

LENGTH, SIZE = 45, 12
BOUNDED = [name for name in POLICIES if name != "full"]
CASES = [
    (policy, {"granularity": granularity} if granularity else {})
    for policy in BOUNDED
    for granularity in (
        ("layer", "head") if "granularity" in POLICIES[policy].options else (None,)
    )
]


class Pieces:
    """A tokenizer whose tokens are these byte strings; None is a special one."""

    def __init__(self, pieces):
        self._pieces = pieces
        self.all_special_ids = [i for i, p in enumerate(pieces) if p is None]

    def decode(self, ids, clean_up_tokenization_spaces=True):
        assert not clean_up_tokenization_spaces
        text = b"".join(self._pieces[i] for i in ids).decode(errors="replace")
        # As sentencepiece does.
        return text.removeprefix(" ")


def kinds_of(*pieces):
    some = [p.encode() if isinstance(p, str) else p for p in pieces]
    return token_kinds(Pieces(some), list(range(len(some))))


def words(text):
    """The kind of each word or mark of a text, in order."""
    kinds, result, i = tag(text), [], 0
    assert len(kinds) == len(text)
    for part in text.split():
        i = text.index(part, i)
        result.append(kinds[i])
        i += len(part)
    return result


# The tagger


def test_a_sentence_has_the_kinds_that_a_reader_would_give():
    pieces = "The| dog| met| old| Anne| in| Bath|,| on| July| 1|,|000|.|\n\n|He| ran"
    assert kinds_of(*pieces.split("|")) == [
        *("function word", "other word", "other word", "other word", "proper noun"),
        *("function word", "proper noun", "punctuation", "function word"),
        *("proper noun", "number", "number", "number", "punctuation", "whitespace"),
        *("function word", "other word"),
    ]


def test_parts_of_a_word_have_the_kind_of_the_word():
    pieces = ("I", " saw", " Kelly", "n", "ch", " un", "w", "elcome", " where", "as")
    assert kinds_of(*pieces)[2:] == [
        *("proper noun",) * 3,
        *("other word",) * 3,
        *("function word",) * 2,
    ]
    assert kinds_of("we", " do", "n", "'", "t")[1:] == ["function word"] * 4


@pytest.mark.parametrize("mark", ["'", "’"])
def test_possessives_are_told_from_what_is_short_for_is(mark):
    assert kinds_of("Anne", mark, "s", " boat")[1:3] == ["possessive"] * 2
    assert kinds_of("a", " dog", mark + "s", " bone")[2] == "possessive"
    assert kinds_of("the", " boys", mark, " boat")[2] == "possessive"
    assert kinds_of("It", mark + "s", " late")[1] == "function word"
    assert kinds_of("he", " said", mark, " Go")[2] == "punctuation"


def test_a_token_with_marks_and_letters_has_the_kind_of_its_letters():
    assert kinds_of("and", ' "My', ' "', "...\n")[1:] == [
        *("function word", "punctuation", "punctuation"),
    ]


def test_names_are_words_with_a_capital_within_sentences():
    text = "Anne ran. Mr. Elliot saw Anne. Rain fell. The rain met Elliot."
    assert words(text) == [
        *("proper noun", "other word", "proper noun", "proper noun", "other word"),
        *("proper noun", "other word", "other word", "function word", "other word"),
        *("other word", "proper noun"),
    ]
    # At the beginning of sentences only, or more often without a capital: no name.
    assert words("Wit won. Wit lost.")[0] == "other word"
    assert words("a boat, the boat, The Boat")[-1] == "other word"
    # A paragraph and a quotation begin a sentence; an initial ends none.
    text = 'the\n\nRain fell, "Come here" to J. Smith'
    kinds = tag(text)
    for word in ("Rain", "Come"):
        assert kinds[text.index(word)] == "other word"
    assert kinds[text.index("Smith")] == "proper noun"


def test_characters_cut_into_several_tokens_and_special_tokens():
    smile = "😀".encode()
    pieces = [None, b" an", b" ", smile[:2], smile[2:], b"\xe2\x80", b"\x99", b" x"]
    tokenizer = Pieces(pieces)
    text, spans = decode(tokenizer, list(range(len(pieces))))
    assert text == "an 😀’ x"
    assert spans == [(0, 0), (0, 2), (2, 3), (3, 4), (3, 4), (4, 5), (4, 5), (5, 7)]
    kinds = token_kinds(tokenizer, list(range(len(pieces))))
    assert kinds[0] == "special"
    assert kinds[2:] == ["whitespace", *["punctuation"] * 4, "other word"]


def test_bytes_that_are_no_text_do_not_swallow_what_follows():
    pieces = [b"a", b"\xff", b" dog", b"\xe2"]
    assert kinds_of(*pieces)[2:] == ["other word", "punctuation"]
    assert len(decode(Pieces(pieces), [0, 1, 2, 3])[1]) == 4


# When tokens left


def reference(model, ids, policy, size, **options):
    """[layers, H', T] by looking at what ordinary caches hold after each token."""
    cache = make_prompt_cache(model, size, policy=policy, **options)
    held = []
    for token in ids:
        mx.eval(model(mx.array([[token]]), cache=cache), [c.state for c in cache])
        held.append([[set(h) for h in c.positions[0].tolist()] for c in cache])
    n, choosers = len(ids), len(held[-1][0])
    gone = np.full((len(cache), choosers, n), n)
    for layer in range(len(cache)):
        for head in range(choosers):
            for p in range(n):
                there = [p in held[t][layer][head] for t in range(p, n)]
                if not all(there):
                    gone[layer, head, p] = p + there.index(False)
                    assert not any(there[there.index(False) :])
    return gone


@pytest.fixture(scope="module")
def model():
    return tiny.make()


@pytest.fixture(scope="module")
def ids():
    return tiny.tokens(LENGTH)[0].tolist()


@pytest.mark.parametrize(("policy", "options"), CASES)
def test_departures_are_those_of_reading_token_by_token(model, ids, policy, options):
    expected = reference(model, ids, policy, SIZE, **options)
    for step in (1, 4, 7, LENGTH - 1, LENGTH, 256):
        got = departures(model, ids, Setting(policy, SIZE), step, **options)
        assert list(got) == [0, 1, 2]
        for layer, gone in got.items():
            assert np.array_equal(gone, expected[layer]), (layer, step)


def test_departures_over_several_blocks_of_a_step(model):
    ids = tiny.tokens(600)[0].tolist()
    for policy in ("tova", "h2o"):
        whole = departures(model, ids, Setting(policy, 40), 600)
        steps = departures(model, ids, Setting(policy, 40), 23)
        for layer in whole:
            assert np.array_equal(whole[layer], steps[layer])
            # One a step.
            for gone in whole[layer]:
                assert sorted(gone[gone < 600]) == list(range(40, 600))


@pytest.mark.parametrize(
    ("name", "layers", "choosers"),
    [("gemma3", [1, 3], 1), ("gemma3n", None, 1), ("longcat_flash", [0, 1], 2)],
)
def test_only_layers_that_we_bound_are_looked_at(name, layers, choosers):
    mx.random.seed(1)
    ids = mx.random.randint(1, zoo.VOCABULARY, (40,)).tolist()
    got = departures(zoo.make(name), ids, Setting("tova", 10), 7)
    assert got
    if layers is not None:
        assert list(got) == layers
    for gone in got.values():
        assert gone.shape == (choosers, 40)
        assert ((gone < 40).sum(axis=1) == 30).all()


@pytest.mark.parametrize("policy", ["tova", "h2o", "streaming"])
def test_shares_are_those_of_looking_at_each_step(model, ids, policy):
    for gone in departures(model, ids, Setting(policy, SIZE), 7).values():
        for newest in (SIZE, SIZE // 2, 1, LENGTH):
            expected = []
            for t in range(SIZE, LENGTH):
                shares = []
                for head in gone:
                    held = [p for p in range(t + 1) if head[p] > t]
                    assert len(held) == SIZE
                    shares.append(np.mean([p > t - newest for p in held]))
                expected.append(np.mean(shares))
            got = recent_share(gone, SIZE, newest)
            assert np.allclose(got, expected, atol=1e-12)


def test_lifetimes_are_kaplan_and_meiers(model, ids):
    chosen = np.array(ids) % 3 == 1
    for gone in departures(model, ids, Setting("vatp", SIZE), 7).values():
        means = []
        for head in gone:
            mean, stay = 0.0, 1.0
            # Steps d after its own, one after the other: who could be seen leaving
            # at d, and who did.
            for d in range(LENGTH):
                could = [p for p in range(LENGTH) if chosen[p] and p + d < LENGTH]
                could = [p for p in could if head[p] >= p + d]
                left = [p for p in could if head[p] == p + d]
                stay *= 1 - len(left) / len(could) if could else 1
                mean += stay
            means.append(mean)
        assert mean_lifetime(gone, chosen) == pytest.approx(np.mean(means))


def test_hand_worked_lifetime():
    # Of five steps: one leaves after 2 steps, one at once, three are there at the end.
    gone = np.array([[5, 3, 2, 5, 5]], np.int32)
    # At 0 a fifth of five, at 2 a half of two (those of steps 0 and 1): .8 .8 .4 .4 .4.
    assert mean_lifetime(gone, np.ones(5, bool)) == pytest.approx(2.8)
    assert first_survival(gone) == ([5, 2, 0, 2], [1, 0, 0, 1])


def test_a_windows_tokens_are_all_recent_and_live_as_long_as_it(model, ids):
    every = np.ones(LENGTH, bool)
    for gone in departures(model, ids, Setting("window", SIZE), 7).values():
        assert (recent_share(gone, SIZE, SIZE) == 1).all()
        assert (recent_share(gone, SIZE, SIZE // 2) == 0.5).all()
        assert mean_lifetime(gone, every) == SIZE
        assert mean_lifetime(gone, np.arange(LENGTH) % 5 == 0) == SIZE
        assert first_survival(gone) == ([SIZE] * 4, [0] * 4)


def test_streaming_keeps_the_first_four_to_the_end(model, ids):
    for gone in departures(model, ids, Setting("streaming", SIZE), 7).values():
        assert first_survival(gone) == (
            [LENGTH - i for i in range(4)],
            [1] * 4,
        )
        others = np.arange(LENGTH) >= 4
        assert mean_lifetime(gone, others) == SIZE - 4


# Rows


COMMON = {"model": "tiny", "dtype": "float32", "text": "random", "tokens": LENGTH}
WANTED = settings(("tova", "h2o"), (SIZE, 20))


def measured(directory, ids, step=7):
    results = Results(directory, COMMON, ("model", "dtype", "text", "tokens"))
    kinds = [KINDS[token % 3] for token in ids]
    return Kept(results, ids, kinds, step)


def test_rows_say_what_was_measured(model, ids, tmp_path):
    kept = measured(tmp_path, ids)
    done = list(kept.run(model, WANTED))
    assert [len(rows) for rows in done] == [1, 3, 3, 3, 3]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [r for rows in done for r in rows]
    [full], rows = done[0], done[2]
    assert (full["policy"], full["value"], full["layer"]) == ("full", 1, None)
    setting = Setting(rows[0]["policy"], rows[0]["max_kv_size"])
    gone = departures(model, ids, setting, 7)
    for layer, row in enumerate(rows):
        assert (row["task"], row["unit"], row["layer"]) == ("kept", "share", layer)
        assert row["n"] == LENGTH - SIZE
        share = recent_share(gone[layer], SIZE, SIZE)
        assert row["value"] == pytest.approx(share.mean())
        # Two blocks of as many steps as tokens kept.
        halves = share[: 2 * SIZE].reshape(2, SIZE).mean(axis=1)
        assert row["stderr"] == pytest.approx(abs(halves[0] - halves[1]) / 2)
        assert row["first_token_steps"] == row["first_tokens_steps"][0]
        assert sum(row["counts"].values()) == LENGTH
        assert list(row["counts"]) == list(KINDS[:3])
        for kind, ratio in row["relative"].items():
            expected = row["lifetimes"][kind] / row["lifetimes"]["all"]
            assert ratio == pytest.approx(expected)
    # One block only.
    assert done[-1][0]["stderr"] is None


def test_a_killed_run_goes_on_where_it_was(model, ids, tmp_path):
    whole = list(measured(tmp_path / "whole", ids).run(model, WANTED))
    part = measured(tmp_path / "part", ids).run(model, WANTED)
    for _ in range(3):
        next(part)
    path = tmp_path / "part" / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    # Killed while the third setting's last row was written.
    path.write_text("".join(lines[:-1]) + lines[-1][:40])
    again = measured(tmp_path / "part", ids)
    assert again.missing(WANTED) == WANTED[2:]
    began = []
    assert list(again.run(model, WANTED, began=began.append)) == whole
    assert began == WANTED[2:]
    assert len(path.read_text().splitlines()) == 1 + 4 * 3
    # Nothing is left to be read.
    done = measured(tmp_path / "part", ids)
    assert done.missing(WANTED) == []
    assert list(done.run(None, WANTED)) == whole


def test_rows_of_other_texts_do_not_count(model, ids, tmp_path):
    list(measured(tmp_path, ids).run(model, WANTED))
    other = Results(tmp_path, COMMON | {"text": "other"}, ("text",))
    assert Kept(other, ids, ["number"] * LENGTH, 7).missing(WANTED) == WANTED[1:]


def test_progress_counts_the_tokens_read(model, ids, tmp_path):
    read = []
    list(measured(tmp_path, ids).run(model, WANTED, read.append))
    assert sum(read) == 4 * LENGTH


def test_plot_is_not_empty(model, ids, tmp_path):
    from matplotlib.image import imread

    done = list(measured(tmp_path, ids).run(model, settings(("tova", "h2o"), (SIZE,))))
    path = plot(done, tmp_path / "kept.png")
    assert path is not None
    image = imread(path)
    assert image.shape[0] > 400
    assert image.shape[1] > 1000
    # The colours of both policies are there: a line and bars of each.
    for colour in ((0, 0x9E, 0x73), (0xCC, 0x79, 0xA7)):
        near = np.abs(image[..., :3] * 255 - colour).max(axis=-1) < 2
        assert near.sum() > 1000
    assert plot(done[:1], tmp_path / "full.png") is None


# Errors


@pytest.mark.parametrize(
    ("n", "wanted", "message"),
    [
        (20, 100, "The text: of 20 tokens none would leave with max_kv_size=20"),
        (0, 100, "The text: of 0 tokens"),
        (100, 20, "--tokens 20: of 20 tokens .* more --tokens"),
    ],
)
def test_a_text_of_which_nothing_would_leave_is_refused(n, wanted, message):
    with pytest.raises(EvaluationError, match=message):
        first_tokens(list(range(n)), wanted, WANTED)
    assert first_tokens(list(range(30)), 21, WANTED) == list(range(21))


def test_a_model_that_bounds_itself_is_refused(tmp_path, ids):
    kept = measured(tmp_path, ids)
    with pytest.raises(EvaluationError, match=r"mlx_lm\.models\.mamba bounds all its"):
        list(kept.run(zoo.make("mamba"), WANTED))


def run(*arguments):
    return CliRunner().invoke(main, ["eval", "kept", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nothing.txt", "--out", "x"), 2, "'nothing.txt' does not exist"),
        ((__file__,), 2, "Missing option '--out'"),
        (("nothing.txt", "--out", "x", "--tokens", "1"), 2, "not in the range x>=2"),
        (("nothing.txt", "--out", "x", "--policy", "lru"), 2, "'lru' is not one of"),
        (
            ("nothing.txt", "--out", "x", "--max-kv-size", "0"),
            2,
            "not in the range x>=1",
        ),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(arguments, code, message):
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""


def test_help_has_an_example_and_does_not_import_mlx():
    code = (
        "import sys; from tova_mlx.cli import main\n"
        "try: main(['eval', 'kept', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('mlx' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Example: tova-mlx eval kept" in done.stdout


# The real model


@pytest.mark.real_model
def test_a_real_run_prints_a_table_and_one_object(demo_path, text, tmp_path):
    file = tmp_path / "moby.txt"
    file.write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    arguments = (file, "--model", demo_path, "--tokens", 160, "--out", out)
    arguments += ("--policy", "tova", "--policy", "window", "--max-kv-size", 48)
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    table = result.stdout.splitlines()
    assert table[0].startswith("160 tokens read: ")
    found = [line.split() for line in table if line.startswith(("tova", "window"))]
    assert [line[:2] for line in found] == [["tova", "48"], ["window", "48"]]
    assert found[1][2:4] == ["100", "%"]
    assert (out / "kept.png").stat().st_size > 20_000
    # Again: nothing is read, and the same rows are given.
    again = run(*arguments, "--json")
    rows = json.loads(again.stdout)["rows"]
    assert len(rows) == 1 + 2 * 30
    assert len((out / "results.jsonl").read_text().splitlines()) == len(rows)
    for row in rows:
        assert {*COMMON, "seed", "versions", "command", "device", "date"} <= {*row}
        assert row["tokens"] == 160
        assert sum(row["counts"].values()) == 160
    tova = [row["value"] for row in rows if row["policy"] == "tova"]
    assert 0.4 < np.mean(tova) < 0.95
    short = run(*arguments[:3], "--tokens", 48, *arguments[5:])
    assert short.exit_code == 1
    assert short.stderr.startswith("Error: --tokens 48: of 48 tokens none would")
    assert len(short.stderr.splitlines()) == 1


@pytest.mark.real_model
def test_real_departures_are_those_of_reading_token_by_token(demo, text):
    model, tokenizer = demo
    ids = tokenizer.encode(text)[:80]
    expected = reference(model, ids, "tova", 30)
    got = departures(model, ids, Setting("tova", 30), 64)
    for layer, gone in got.items():
        assert np.array_equal(gone, expected[layer])


@pytest.mark.real_model
def test_the_real_tokenizers_tokens_are_told_apart(demo):
    _, tokenizer = demo
    text = (
        "“It’s late,” said Mr. Elliot’s maid, Kellynch 1760, naïve café 😀.\n\nDon't!"
    )
    ids = tokenizer.encode(text)
    decoded, spans = decode(tokenizer, ids)
    assert decoded == text
    assert [start for start, _ in spans] == sorted(start for start, _ in spans)
    kinds = token_kinds(tokenizer, ids)
    found = {}
    for (start, stop), kind in zip(spans, kinds, strict=True):
        found.setdefault(kind, set()).add(text[start:stop].strip())
    assert {"’", "s"} <= found["possessive"]
    assert {"Mr"} <= found["proper noun"]
    assert "1" in found["number"]
    assert {"It", "’", "s"} <= found["function word"]
    assert {"late", "said", "maid"} <= found["other word"]
