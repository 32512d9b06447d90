"""The list of scripts/mutants.py: every mistake can still be made, and is one."""

import ast
from collections import Counter
from pathlib import Path

import pytest
from core_bugs import MUTANTS, TESTS

PACKAGE = Path(__file__).parents[1] / "tova_mlx"
TEXTS = {p: p.read_text(encoding="utf-8") for p in sorted(PACKAGE.rglob("*.py"))}
PARSED = {p: ast.dump(ast.parse(text)) for p, text in TEXTS.items()}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mistake_can_be_made_in_one_place(mutant):
    places = Counter({p: text.count(mutant.old) for p, text in TEXTS.items()})
    assert places.total() == 1, f"{mutant.old!r} is there {places.total()} times"
    (place, _), *_ = places.most_common(1)
    # Another program, and one that Python reads: not a change of a comment.
    changed = TEXTS[place].replace(mutant.old, mutant.new)
    assert ast.dump(ast.parse(changed)) != PARSED[place]


def test_every_area_has_mistakes_of_its_own_names():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 60
    counts = Counter(m.area for m in MUTANTS)
    assert set(counts) == set(TESTS)
    for area, n in counts.items():
        assert n >= (8 if area in ("policies", "scan", "journal") else 5), area


def test_the_tests_that_are_to_see_them_are_there():
    wanted = {t for m in MUTANTS for t in m.tests} | {
        t for ts in TESTS.values() for t in ts
    }
    for test in wanted:
        file, _, name = test.partition("::")
        text = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert f"def {name}" in text


def test_what_must_be_seen_has_no_excuse():
    for mutant in MUTANTS:
        if mutant.area in ("policies", "scan", "journal"):
            assert not mutant.stays, mutant.name
