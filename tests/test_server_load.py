"""scripts/load_server.py in short, and a server that fails in the midst."""

import json
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from mlx_lm import load
from test_serve import chat, serving, user

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import load_server
import server_abuse

pytestmark = pytest.mark.real_model
LIMIT = 40


@pytest.fixture(scope="module")
def stormed(small_path):
    model, tokenizer = load(str(small_path))[:2]
    asked = load_server.questions(12)
    for question in asked:
        load_server.answer_alone(model, tokenizer, question, LIMIT)
    arguments = ("--model", str(small_path), "--max-kv-size", str(LIMIT))
    return load_server.storm(arguments, asked, clients=6, context=100)


def test_a_storm_leaves_all_answers_right(stormed):
    assert load_server.wrong(stormed) == [], stormed
    assert stormed["answers_checked"] == 20
    assert stormed["equal"] + len(stormed["different"]) == 20
    assert stormed["abuse"].keys() > server_abuse.ABUSES.keys()
    assert stormed["resident_most"] < stormed["resident_warm"] + 300e6
