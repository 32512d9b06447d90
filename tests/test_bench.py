"""What `bench` measures, in which order, and how it goes on; no times are judged."""

import importlib
import json
import sys
from collections import Counter
from dataclasses import asdict

import mlx.core as mx
import pytest
import tiny
from click.testing import CliRunner
from mlx.utils import tree_flatten
from mlx_lm.models import gemma3_text, llama, qwen3_moe
from mlx_lm.models.cache import KVCache, RotatingKVCache

from tova_mlx import PolicyKVCache, TOVACache, describe
from tova_mlx.benchmark import bench as measuring
from tova_mlx.benchmark import bound, decoding, report
from tova_mlx.benchmark.baselines import FULL
from tova_mlx.benchmark.cases import bytes_read, caches_of, fill
from tova_mlx.benchmark.decoding import BLOCK, Case, decode, interleaved
from tova_mlx.benchmark.reading import DECODED, Job, read_contexts
from tova_mlx.cli import main, models
from tova_mlx.errors import EvaluationError
from tova_mlx.evaluation.results import Setting
from tova_mlx.hooks import registration

command = importlib.import_module("tova_mlx.cli.bench")

LAYERS, SIZE, CONTEXTS = 3, 16, (24, 40)
# Keys and values of a token: 2 heads of 8 numbers each, float32.
TOKEN = 2 * 2 * 8 * 4
WEIGHT = 4
TOVA, ROTATING = Setting("tova", SIZE), Setting("rotating", SIZE)
OPTIONS = ("--context", "40", "--context", "24", "--max-kv-size", str(SIZE))
OPTIONS += ("--prefill-step-size", "8", "--steps", "5", "--bandwidth", "10")
POLICIES = ("--policy", "rotating", "--policy", "h2o", "--policy", "tova")


class Reader:
    """Reads in this process. jobs: what it was given; stops before `stop`."""

    def __init__(self, model):
        self.model, self.jobs, self.stop = model, [], None

    def __call__(self, path, job):
        self.jobs.append(job)
        if job.setting == self.stop:
            raise KeyboardInterrupt
        # As a process gets it, and says what it found.
        job = Job.of(json.loads(json.dumps(asdict(job))))
        said = []
        for found in read_contexts(self.model, job, said.append):
            yield from said
            said.clear()
            yield json.loads(json.dumps(found.to_dict()))


@pytest.fixture(scope="module")
def model():
    return tiny.make()


@pytest.fixture
def reader(model, monkeypatch):
    monkeypatch.setattr(models, "load", lambda _: (model, None, "/models/tiny"))
    made = Reader(model)
    monkeypatch.setattr(command, "_read_in_process", made)
    return made


def run(out, *arguments, options=OPTIONS):
    command = ["bench", "--out", str(out), *options, *arguments]
    return CliRunner().invoke(main, command)


def measured(out, *arguments, options=OPTIONS):
    result = run(out, "--json", *arguments, options=options)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def rows_by_case(rows):
    return {(Setting.of(r), r["context"], r["unit"]): r for r in rows}


def job(tmp_path, setting, contexts=CONTEXTS, full_up_to=4096):
    return Job(setting, contexts, 8, 0, full_up_to, str(tmp_path))


def read(model, setting, context, sizes=()):
    """Caches that have read a context, or in steps of these sizes."""
    caches = caches_of(model, setting)
    sizes = list(sizes) or [8] * (context // 8)
    mx.eval(tiny.feed(model, tiny.tokens(sum(sizes)), caches, sizes))
    return caches


# Rows.


def test_every_case_has_every_row_and_what_it_takes_to_repeat_it(tmp_path, reader):
    got = measured(tmp_path, *POLICIES)
    rows = rows_by_case(got["rows"])
    settings = [FULL, TOVA, ROTATING, Setting("h2o", SIZE)]
    units = (*measuring.READ, "decode_ms")
    assert set(rows) == {(s, c, u) for s in settings for c in CONTEXTS for u in units}
    assert len(got["rows"]) == len(rows)
    for row in rows.values():
        assert row["task"] == "bench"
        assert row["tokens"] == row["context"]
        assert row["value"] > 0
        assert row["model"] == "tiny"
        assert row["dtype"] == "float32"
        assert row["stderr"] is None
        names = ("prefill_step_size", "seed", "versions", "device", "command", "date")
        assert set(names) <= set(row)
    for row in (r for r in rows.values() if r["unit"] == "decode_ms"):
        assert row["n"] == BLOCK
        assert row["p20"] <= row["value"] <= row["p80"]
    on_disk = (tmp_path / "results.jsonl").read_text().splitlines()
    assert sorted(map(json.loads, on_disk), key=str) == sorted(got["rows"], key=str)
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert got["plot"] == str(tmp_path / "bench.png")
    # Caches in files are for a run that was stopped.
    assert not (tmp_path / "caches").exists()


def test_cache_bytes_are_those_of_the_caches_at_that_length(tmp_path, model, reader):
    rows = rows_by_case(measured(tmp_path, *POLICIES)["rows"])
    for setting, context, unit in rows:
        if unit == "cache_bytes":
            # At each length a few are decoded, two more than are asked for.
            decoded = [1] * (DECODED + 2)
            sizes = [8] * 3 + decoded + ([8] * 2 + decoded) * (context == 40)
            caches = read(model, setting, context, sizes)
            got = rows[setting, context, unit]["value"]
            assert got == sum(c.nbytes for c in caches), setting
            if setting != FULL:
                assert got <= describe(caches).totals["bytes_at_most"]
    kinds = [rows[s, 24, "cache_bytes"]["caches"] for s in (FULL, ROTATING, TOVA)]
    assert kinds == [["KVCache"], ["RotatingKVCache"], ["TOVACache"]]


def test_the_bound_is_what_a_hand_count_says(tmp_path, model, reader):
    rows = rows_by_case(measured(tmp_path, *POLICIES)["rows"])
    # Embeddings of 101 tokens are looked up; the output has weights of its own.
    hidden, wide, heads = 48, 64, 16
    layer = 2 * hidden * hidden + 2 * hidden * heads + 3 * hidden * wide + 2 * hidden
    weights = WEIGHT * (LAYERS * layer + 101 * hidden + hidden)
    # Of a full layer a slot more is attended to, the one that the new token takes.
    slots = SIZE + 1
    by_hand = {
        (FULL, 24): LAYERS * 24 * TOKEN,
        (FULL, 40): LAYERS * 40 * TOKEN,
        (ROTATING, 40): LAYERS * SIZE * TOKEN,
        # Beside keys and values a position; with h2o, which goes by the head, a score.
        (TOVA, 40): LAYERS * slots * (TOKEN + 4),
        (Setting("h2o", SIZE), 24): LAYERS * slots * (TOKEN + 2 * (4 + 4)),
    }
    for case, nbytes in by_hand.items():
        row = rows[(*case, "decode_ms")]
        assert row["bytes_read"] == nbytes, case
        assert row["weights_read"] == weights
        # 10 GB/s, as was given.
        assert row["bound_ms"] == pytest.approx(1e3 * (weights + nbytes) / 10e9)
        assert row["ratio_to_bound"] == pytest.approx(row["value"] / row["bound_ms"])
        assert row["bandwidth_is"] == "given"


def test_ratios_are_of_medians_in_the_same_run(tmp_path, reader):
    rows = rows_by_case(measured(tmp_path, *POLICIES)["rows"])
    for (setting, context, unit), row in rows.items():
        if unit != "decode_ms":
            continue
        others = {"full": (FULL, context), "rotating": (ROTATING, context)}
        others["first_context"] = (setting, 24)
        if setting == FULL:
            del others["rotating"]
        want = {
            f"ratio_to_{name}": row["value"] / rows[(*other, unit)]["value"]
            for name, other in others.items()
            if other != (setting, context)
        }
        bound = {"ratio_to_bound": row["value"] / row["bound_ms"]}
        got = {name: row[name] for name in row if name.startswith("ratio_")}
        assert got == pytest.approx(want | bound)


def test_the_tied_output_is_read_and_experts_are_as_many_as_are_chosen():
    args = {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 50,
    }
    tied = llama.Model(llama.ModelArgs(**args, tie_word_embeddings=True))
    whole = sum(a.nbytes for _, a in mlx_leaves(tied))
    assert bound.weights_read(tied) == whole
    more = {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 8,
        "head_dim": 8,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
        "norm_topk_prob": True,
    }
    experts = qwen3_moe.Model(qwen3_moe.ModelArgs(**{**args, **more}))
    whole = sum(a.nbytes for _, a in mlx_leaves(experts))
    one = WEIGHT * 3 * 8 * 16
    assert bound.weights_read(experts) == whole - 6 * one


def mlx_leaves(model):
    return tree_flatten(model.parameters())


def test_bandwidth_is_bytes_by_the_fastest_time(monkeypatch):
    monkeypatch.setattr(bound, "_BYTES", 2**20)
    clock = iter([0, 4, 10, 12, *([20, 25] * 10)])
    monkeypatch.setattr(bound.time, "perf_counter", lambda: next(clock))
    assert bound.bandwidth() == 2**20 / 2


def test_a_bandwidth_that_is_given_later_counts(tmp_path, reader, monkeypatch):
    first = rows_by_case(measured(tmp_path, *POLICIES)["rows"])
    monkeypatch.setattr(measuring.Bench, "_decode", None)
    later = measured(tmp_path, *POLICIES, "--bandwidth", "40")["rows"]
    for key, row in rows_by_case(later).items():
        if key[2] == "decode_ms":
            assert row["value"] == first[key]["value"]
            assert row["bound_ms"] == pytest.approx(first[key]["bound_ms"] / 4)
            assert row["ratio_to_bound"] == pytest.approx(
                4 * first[key]["ratio_to_bound"]
            )


# Reading.


def test_full_past_what_it_reads_is_filled_up_to_the_last_step(tmp_path, model):
    said = []
    some = job(tmp_path, FULL, full_up_to=24)
    found = list(read_contexts(model, some, said.append))
    assert [f.filled for f in found] == [0, 32]
    assert found[0].seconds is not None
    assert found[1].seconds is None
    assert found[1].caches == sum(c.nbytes for c in read(model, FULL, 40))
    assert sum(said) == some.tokens() == 24 + 8
    # Only of `full`, and nothing of it is kept for decoding.
    bounded = list(read_contexts(model, job(tmp_path, TOVA, full_up_to=0), said.append))
    assert [f.filled for f in bounded] == [0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "tova-16-24.safetensors",
        "tova-16-40.safetensors",
    ]


def test_a_filled_case_has_no_prefill_speed(tmp_path, reader):
    rows = rows_by_case(measured(tmp_path, "--read-full-up-to", "24")["rows"])
    assert (FULL, 24, "prefill_tps") in rows
    assert (FULL, 40, "prefill_tps") not in rows
    assert rows[FULL, 40, "cache_bytes"]["filled"] == 32
    # And is not missed by a second run.
    reader.jobs.clear()
    measured(tmp_path, "--read-full-up-to", "24")
    assert reader.jobs == []


def test_what_decodes_has_read_what_was_saved(tmp_path, model):
    list(read_contexts(model, job(tmp_path, TOVA), lambda n: None))
    list(read_contexts(model, job(tmp_path, ROTATING), lambda n: None))
    how = measuring.How(CONTEXTS, 8, 0, 1, 4096)
    bench = measuring.Bench(Nothing(tmp_path), [FULL, TOVA, ROTATING], how)
    bench._folder = tmp_path
    # As in a process in which nothing of ours was made.
    registration.uninstall(PolicyKVCache, TOVACache)
    cases = bench.cases(model)
    assert [(c.setting, c.context) for c in cases] == [
        (s, c) for s in (FULL, TOVA, ROTATING) for c in CONTEXTS
    ]
    full = [c for c in cases if c.setting == FULL]
    # One for all lengths, and each begins at its own.
    assert full[0].caches is full[1].caches
    for case in cases:
        case.begin()
        seen = {getattr(c, "seen", c.offset) for c in case.caches}
        # Two steps more than were decoded, and those at the length before.
        extra = DECODED + 2
        steps = (1 + CONTEXTS.index(case.context)) * extra
        assert seen == {case.context + (0 if case.setting == FULL else steps)}


class Nothing:
    """Results of no run yet."""

    name = "x"

    def __init__(self, directory):
        self.directory = directory


def test_random_entries_are_as_many_as_real_ones(model):
    filled, real = caches_of(model, FULL), read(model, FULL, 40)
    fill(model, filled, 40)
    assert bytes_read(filled) == bytes_read(real) == LAYERS * 40 * TOKEN
    assert [c.offset for c in filled] == [40] * LAYERS
    assert all(isinstance(c, KVCache) for c in filled)
    rotating = caches_of(model, ROTATING)
    assert all(isinstance(c, RotatingKVCache) and c.keep == 4 for c in rotating)


# Decoding.


def test_decoding_takes_two_steps_more_than_it_times(model):
    caches = read(model, TOVA, 24)
    assert len(decode(model, caches, 3)) == 3
    assert {c.seen for c in caches} == {24 + 3 + 2}
    assert decoding.TAKEN == BLOCK + 2


def test_every_case_has_its_turn_in_every_round_in_another_order(model, monkeypatch):
    turns = []

    def decode(model, caches, n):
        turns.append((caches[0].name, caches[0].offset))
        caches[0].offset += n + 2
        return [float(len(turns))] * n

    class Cache:
        def __init__(self, name, offset):
            self.name, self.offset = name, offset

    monkeypatch.setattr(decoding, "decode", decode)
    whole = [Cache("full", 0)]
    cases = [Case(FULL, c, whole, resets=True) for c in (10, 20)]
    cases += [Case(TOVA, c, [Cache(f"tova {c}", c)]) for c in (10, 20)]
    steps = []
    times = interleaved(model, cases, rounds=6, seed=0, progress=steps.append)
    rounds = [turns[i : i + 4] for i in range(0, len(turns), 4)]
    assert len(rounds) == 7
    for i, some in enumerate(rounds):
        # Of `full` at its context each time; the others go on.
        names = Counter(f"{n} {o}" if n == "full" else n for n, o in some)
        assert names == Counter(["full 10", "full 20", "tova 10", "tova 20"])
        assert ("tova 10", 10 + i * (BLOCK + 2)) in some
    assert len({tuple(n for n, _ in some) for some in rounds}) > 3
    # The first round is not timed.
    assert [len(t) for t in times] == [6 * BLOCK] * 4
    assert min(t for some in times for t in some) > 4
    assert sum(steps) == 4 * 7 * (BLOCK + 2) == measuring.steps_to_decode(4, 6)


# Going on.


def test_a_second_run_measures_nothing_and_says_so(tmp_path, reader, monkeypatch):
    first = measured(tmp_path, *POLICIES)
    assert [j.setting for j in reader.jobs][:2] == [FULL, TOVA]
    reader.jobs.clear()
    monkeypatch.setattr(measuring.Bench, "_decode", None)
    result = run(tmp_path, *POLICIES, "--json")
    assert json.loads(result.stdout)["rows"] == first["rows"]
    assert "has all of it; nothing is measured" in result.stderr
    assert reader.jobs == []


def test_another_policy_is_decoded_with_all_and_read_alone(tmp_path, reader):
    before = rows_by_case(measured(tmp_path, "--policy", "tova")["rows"])
    after = rows_by_case(measured(tmp_path, *POLICIES)["rows"])
    for key, row in before.items():
        # Decode times that are compared are of one run.
        same = after[key] == row
        assert same == (key[2] != "decode_ms")
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    count = Counter(json.loads(line)["unit"] for line in lines)
    cases = len(CONTEXTS) * 4
    assert count["cache_bytes"] == count["prefill_tps"] == cases
    assert count["decode_ms"] == cases + len(CONTEXTS) * 2


def test_ctrl_c_keeps_what_is_done_and_the_next_run_goes_on(tmp_path, reader):
    reader.stop = ROTATING
    result = run(tmp_path, *POLICIES)
    assert result.exit_code == 130
    assert "Interrupted." in result.stderr
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    done = {(json.loads(line)["policy"], json.loads(line)["unit"]) for line in lines}
    assert done == {(p, u) for p in ("full", "tova") for u in measuring.READ}
    assert (tmp_path / "bench.png").exists()
    reader.jobs.clear()
    reader.stop = None
    got = rows_by_case(measured(tmp_path, *POLICIES)["rows"])
    assert [j.setting for j in reader.jobs] == [ROTATING, Setting("h2o", SIZE)]
    assert len(got) == 4 * len(CONTEXTS) * 4


def test_ctrl_c_while_decoding_does_not_read_again(tmp_path, reader, monkeypatch):
    def press(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "interleaved", press)
        assert run(tmp_path, *POLICIES).exit_code == 130
    reader.jobs.clear()
    got = rows_by_case(measured(tmp_path, *POLICIES)["rows"])
    assert reader.jobs == []
    assert len(got) == 4 * len(CONTEXTS) * 4


def test_caches_go_where_a_run_was_killed_after_its_last_row(
    tmp_path, reader, monkeypatch
):
    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measuring.shutil, "rmtree", kill)
        assert run(tmp_path, *POLICIES).exit_code == 130
    assert list((tmp_path / "caches").rglob("*.safetensors"))
    measured(tmp_path, *POLICIES)
    assert not (tmp_path / "caches").exists()


def test_another_way_to_measure_is_another_run(tmp_path, reader):
    measured(tmp_path, "--policy", "tova")
    reader.jobs.clear()
    measured(tmp_path, "--policy", "tova", "--seed", "1")
    assert [j.setting for j in reader.jobs] == [FULL, TOVA]
    assert {j.seed for j in reader.jobs} == {1}


# Settings.


def test_bits_and_recall_are_settings_of_ours_only(tmp_path, monkeypatch):
    wide = tiny.make(head_dim=64)
    monkeypatch.setattr(models, "load", lambda _: (wide, None, "/models/wide"))
    monkeypatch.setattr(command, "_read_in_process", Reader(wide))
    options = ("--context", "80", "--max-kv-size", "32", "--prefill-step-size", "32")
    options += ("--steps", "1", "--bandwidth", "10", "--kv-group-size", "32")
    options += ("--kv-bits", "8", "--recall", "16", "--policy", "tova")
    got = measured(tmp_path, "--policy", "rotating", options=options)
    rows = rows_by_case(got["rows"])
    bits = (("8h", 8), 32)
    assert {key[0] for key in rows} == {
        FULL,
        Setting("rotating", 32),
        *(Setting("tova", 32, *b, r) for b in (bits, (None, None)) for r in (None, 16)),
    }
    plain, packed = (
        rows[Setting("tova", 32, *b), 80, "cache_bytes"]["value"]
        for b in (((None, None)), bits)
    )
    assert packed < plain / 2


def test_quantised_full_is_ours_and_really_reads(tmp_path, monkeypatch):
    wide = tiny.make(head_dim=32)
    monkeypatch.setattr(models, "load", lambda _: (wide, None, "/models/wide"))
    monkeypatch.setattr(command, "_read_in_process", Reader(wide))
    options = ("--context", "48", "--max-kv-size", "32", "--steps", "1")
    options += ("--kv-bits", "8", "--kv-group-size", "32", "--policy", "full")
    options += ("--bandwidth", "10", "--read-full-up-to", "0")
    rows = rows_by_case(measured(tmp_path, options=options)["rows"])
    packed = Setting("full", None, ("8h", 8), 32)
    assert rows[packed, 48, "cache_bytes"]["caches"] == ["PolicyKVCache"]
    assert (packed, 48, "prefill_tps") in rows
    assert rows[packed, 48, "decode_ms"]["bytes_read"] > 0


def hybrid():
    """A tiny Gemma 3: every second layer has a window of its own."""
    mx.random.seed(3)
    return gemma3_text.Model(
        gemma3_text.ModelArgs(
            model_type="gemma3_text",
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=tiny.VOCABULARY,
            sliding_window=12,
            sliding_window_pattern=2,
        )
    )


def test_a_model_whose_own_caches_differ_really_reads_with_full(tmp_path, monkeypatch):
    model = hybrid()
    monkeypatch.setattr(models, "load", lambda _: (model, None, "/models/hybrid"))
    monkeypatch.setattr(command, "_read_in_process", made := Reader(model))

    def press(*_, **__):
        raise KeyboardInterrupt

    more = ("--policy", "tova", "--policy", "rotating", "--read-full-up-to", "0")
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "interleaved", press)
        assert run(tmp_path, *more).exit_code == 130
    # What `full` has read is in a file, too; without it, it is read again.
    (file,) = tmp_path.glob("caches/*/full-40.safetensors")
    file.unlink()
    made.jobs.clear()
    rows = rows_by_case(measured(tmp_path, *more)["rows"])
    assert [(j.setting, j.contexts) for j in made.jobs] == [(FULL, (40,))]
    kinds = {s.policy: rows[s, 40, "cache_bytes"]["caches"] for s, *_ in rows}
    assert kinds == {
        "full": ["RotatingKVCache", "KVCache"],
        "tova": ["RotatingKVCache", "TOVACache"],
        "rotating": ["RotatingKVCache"],
    }
    filled = {row["filled"] for row in rows.values() if "filled" in row}
    assert filled == {0}
    # One layer keeps all, or as many as it may; the other the window of the model.
    row, other = (rows[s, 40, "decode_ms"] for s in (FULL, ROTATING))
    assert (row["bytes_read"] - other["bytes_read"]) % TOKEN == 0
    assert other["bytes_read"] == (12 + SIZE) * TOKEN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--policy", "rotating", "--max-kv-size", "4"),
            "rotating: --max-kv-size 4 leaves",
        ),
        (("--policy", "streaming", "--max-kv-size", "4"), "--max-kv-size 4 leaves no"),
        (("--max-kv-size", "0"), "0 is not in the range"),
        (("--context", "1"), "'--context': 1 is not in the range"),
        (("--steps", "0"), "'--steps': 0 is not in the range"),
        (("--bandwidth", "0"), "'--bandwidth': 0.0 is not in the range"),
        (("--bandwidth", "nan"), "nan is not a finite number"),
        (("--policy", "lru"), "'lru' is not one of"),
        (("--kv-group-size", "32"), "does nothing without --kv-bits"),
        (("--recall", "8"), "recall"),
    ],
)
def test_a_value_that_cannot_work_is_a_usage_error(tmp_path, arguments, message):
    # If it is not refused, there is no model to go on with.
    result = run(tmp_path, *arguments, "--model", "./nothing", options=())
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_directory_is_a_usage_error(tmp_path):
    (tmp_path / "file").touch()
    result = run(tmp_path / "file", "--model", "./nothing")
    assert result.exit_code == 2
    assert "is a file" in result.stderr


def test_bytes_are_tokens_by_what_a_setting_takes(tmp_path, reader):
    options = ("--context", "40", "--steps", "1", "--bandwidth", "10")
    options += ("--prefill-step-size", "8", "--max-kv-size", "1/2")
    got = measured(tmp_path, "--policy", "rotating", options=options)["rows"]
    (size,) = {r["max_kv_size"] for r in got} - {None}
    # A window has a slot more, and positions.
    assert 16 <= size < 20


# What is printed.


def test_without_matplotlib_there_is_a_word_and_no_figure(
    tmp_path, reader, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(tmp_path, "--policy", "tova")
    assert result.exit_code == 0, result.stderr
    assert "No figure: Plots need matplotlib. Run: pip install" in result.stderr
    assert not (tmp_path / "bench.png").exists()
    assert "tova" in result.stdout


def test_the_table_says_what_it_means_and_what_to_type(tmp_path, reader):
    result = run(tmp_path, *POLICIES)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "About 1 min: 4 settings read, each in a process" in result.stderr
    assert "8 cases decode in turn" in result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["full", "full"]
    assert any(
        line.startswith("Bound: ") and "10.0 GB/s (given)" in line for line in lines
    )
    assert lines[-2].startswith("tova 16: a decode step at 40 tokens takes ")
    assert "of rotating's; caches of" in lines[-2]
    assert lines[-1].startswith(
        "A larger model: tova-mlx bench --max-kv-size 1024 --model"
    )


def fabricated(policy, context, unit, value, **more):
    size = None if policy == "full" else SIZE
    row = {"policy": policy, "max_kv_size": size, "context": context, "unit": unit}
    common = {"model": "m", "dtype": "d", "prefill_step_size": 8, "device": "here"}
    return row | {"value": value} | common | more


def test_the_figure_has_a_panel_for_each_and_a_line_for_each_setting(
    tmp_path, monkeypatch
):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))
    rows = [
        fabricated(p, c, u, c, **({"p20": c - 1, "p80": c + 2} if u[0] == "d" else {}))
        for p in ("full", "tova", "rotating")
        for c in (64, 128)
        for u in (*measuring.READ, "decode_ms")
    ]
    report.plot(rows, tmp_path)
    (figure,) = figures
    assert len(figure.axes) == 3
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        assert [t.get_text() for t in axes.get_xticklabels()] == ["64", "128"]
        assert axes.get_legend_handles_labels()[1] == ["full", "tova 16", "rotating 16"]
    bars = figure.axes[0].containers[1][2][0].get_segments()
    assert [list(s[:, 1]) for s in bars] == [[63, 66], [127, 130]]
    pyplot.close(figure)
    assert report.plot([fabricated("full", 64, "prefill_tps", 1)], tmp_path) is None


def test_a_table_of_what_a_stopped_run_has_is_no_error():
    rows = [fabricated("tova", 64, "cache_bytes", 2_000_000, n=1)]
    assert report.table(rows).splitlines()[2].split() == ["tova", "16", "64", "2.0"]
    assert report.sentences(rows) == []


# Processes.


def test_a_process_that_fails_is_one_line(tmp_path):
    with pytest.raises(EvaluationError, match=r"read with tova 16 ended with 1 \(.*no"):
        list(command._read_in_process(str(tmp_path / "no"), job(tmp_path, TOVA)))


@pytest.mark.real_model
def test_each_setting_reads_in_a_process_of_its_own(small_path, tmp_path):
    options = ("--context", "64", "--max-kv-size", "16", "--prefill-step-size", "32")
    options += ("--steps", "1", "--bandwidth", "10", "--policy", "fade")
    got = measured(tmp_path, "--model", str(small_path), options=options)
    rows = rows_by_case(got["rows"])
    fade = Setting("fade", 16)
    assert {key[0] for key in rows} == {FULL, fade}
    row = rows[fade, 64, "peak_memory_bytes"]
    # Keys and values of both layers: 4 heads of 512 numbers.
    assert row["value"] > row["weights_bytes"] + 2 * 17 * 2 * 4 * 512 * 4
    # The model of this process is not in it.
    assert row["value"] < 3 * row["weights_bytes"]
