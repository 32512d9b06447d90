"""scripts/faults.py in short: kills, full disks and odd streams do no harm.

The whole of it is in results/trust/faults.json.
"""

import json
from pathlib import Path

import pytest
from fault_ends import ENDINGS, end
from fault_writers import WRITERS, Undisturbed, Writer, chosen_steps, disturb
from faults import Place

RESULTS = Path(__file__).parents[1] / "results" / "trust" / "faults.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("faults"))


# A program that writes a page: carefully, or in one of three careless ways.
PROGRAM = """\
import os, sys, tempfile
how, path = sys.argv[1:]
page = "<p>" + "caf\\u00e9 " * 100 + "</html>"
new = path if how == "in_place" else path + ".new"
if how == "whole":
    sys.path.insert(0, os.environ["PYTHONPATH"].rpartition(":")[2])
    from tova_mlx.files import written_whole
    from pathlib import Path
    try:
        with written_whole(Path(path)) as new:
            new.write_text(page, encoding="utf-8")
    except OSError as error:
        sys.exit(f"Error: {error.strerror}")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    sys.exit()
if how == "leaving":
    new = tempfile.mktemp(dir=os.path.dirname(path))
if how == "deleting" and os.path.exists(path):
    os.remove(path)
with open(new, "w", encoding="utf-8") as file:
    file.write(page)
if new != path:
    os.rename(new, path)
"""


def found_by_disturbing(place, how, kind):
    (place.root / "program.py").write_text(PROGRAM)
    words = f"{{root}}/program.py {how} {{work}}/page.html"
    writer = Writer("page", words, before=(words, ""))
    calm = Undisturbed.of(place, writer)
    steps = chosen_steps(calm.steps, 99)
    assert steps == [*range(len(calm.steps))]
    return [p for at in steps for p in disturb(place, writer, calm, kind, at)]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("in_place", "page.html is torn"),
        ("deleting", "page.html is lost"),
        ("leaving", "the next start leaves"),
    ],
)
def test_careless_writing_is_found(place, how, said):
    found = found_by_disturbing(place, how, "kill")
    assert any(problem.startswith(said) for problem in found)


@pytest.mark.parametrize("kind", ["kill", "full", "interrupt"])
def test_careful_writing_survives_at_every_step(place, kind):
    assert found_by_disturbing(place, "whole", kind) == []


@pytest.mark.parametrize(
    ("name", "kind", "step"),
    [("run cache_prompt", "kill", "mlx")],
)
def test_a_command_survives(place, name, kind, step):
    writer = next(w for w in WRITERS if w.name == name)
    calm = Undisturbed.of(place, writer)
    at = next(i for i, what in enumerate(calm.steps) if what.startswith(step))
    assert disturb(place, writer, calm, kind, at) == []


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("stdout full", "--help"),
        ("stdout full", "generate"),
        ("streams of ASCII", "generate --json"),
        ("a locale of ASCII alone", "run chat"),
    ],
)
def test_a_command_ends_well(place, name, command):
    ending = next(e for e in ENDINGS if e.name == name)
    assert end(place, ending, command) == []


def test_the_committed_run_tried_every_command_and_lost_nothing():
    report = json.loads(RESULTS.read_text())
    assert report["survived"] == report["tries"] >= 370
    assert report["left_out"] == []
    rows = {(row["fault"], row["command"]) for row in report["rows"]}
    for writer in WRITERS:
        for fault in ("kill -9 while writing", "disk full while writing"):
            assert (fault, writer.name) in rows
    for ending in ENDINGS:
        assert {(ending.name, command) for command in ending.commands} <= rows
