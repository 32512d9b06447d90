"""Every model of the installed mlx-lm keeps the contract, or is refused and named."""

import functools
import sys
from pathlib import Path

import pytest
import zoo
from contract import outcome

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import model_table  # noqa: E402

FAMILIES = zoo.families()
outcome = functools.cache(outcome)
pytestmark = pytest.mark.every_model


@pytest.mark.parametrize("policy", model_table.POLICIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_keeps_the_contract_or_is_refused(name, policy):
    result = outcome(name, policy)
    if result.reason is None:
        assert result.caches
    elif name not in zoo.BROKEN:
        # Named, with what to do instead.
        assert result.reason.startswith("mlx_lm.models.")
        assert "Use " in result.reason


def test_at_most_twelve_are_refused_and_the_table_says_which(capsys):
    outcomes = {(n, p): outcome(n, p) for n in FAMILIES for p in model_table.POLICIES}
    summary = model_table.summary(outcomes)
    refused = summary["refused"]
    with capsys.disabled():
        print(f"\n{model_table.counts(summary)}")
    assert len(FAMILIES) > 100
    assert sorted([*summary["passed"], *refused]) == FAMILIES
    assert len(refused) <= 12
    assert model_table.block("models") == model_table.table(outcomes)


def test_what_a_policy_cannot_do_with_a_model_another_can():
    # Own attention: not seen, but a window needs no look at it.
    assert outcome("gemma2", "tova").reason is not None
    assert outcome("gemma2", "streaming").bounded == 4
    # Latents: the values attended to are not those that are stored.
    assert outcome("deepseek_v3", "fade").reason is not None
    assert outcome("deepseek_v3", "tova").bounded == 4


def test_only_what_a_model_does_not_bound_itself_is_bounded():
    assert (outcome("qwen3").bounded, outcome("qwen3").caches) == (4, 4)
    assert (outcome("gemma3").bounded, outcome("gemma3").caches) == (2, 4)
    assert outcome("mamba").bounded == 0
    # Two layers attend to what two others keep.
    assert (outcome("gemma3n").bounded, outcome("gemma3n").caches) == (1, 2)
