"""The bar says how far, how fast and how long still, and only to a terminal."""

import io
import re
from types import SimpleNamespace

import pytest

from tova_mlx import progress
from tova_mlx.progress import Bar


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    screen = Screen()
    # pytest puts its own in place of `sys.stderr` after fixtures.
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=screen))
    return screen


def test_a_bar_tells_rate_and_time_left_and_goes(screen):
    with Bar(200, unit="rows") as bar:
        bar._bar.mininterval = 0
        bar.say("tova", 256)
        for _ in range(3):
            bar.advance(50)
        said = screen.getvalue()
        assert "75% |" in said
        assert re.search(
            r"tova 256 .*\| 150/200 \[ *[\d.]+ rows/s, \d+:\d+ left\]", said
        )
        bar.advance(50)
    assert re.search(r"200/200 .*\r +\r$", screen.getvalue())


def test_a_prompt_has_as_many_tokens_as_its_reader_says(screen):
    with Bar() as bar:
        bar._bar.mininterval = 0
        bar.reached(0, 30)
        bar.reached(10, 30)
        assert "10/30" in screen.getvalue()
        bar.reached(30, 30)
        assert screen.getvalue().endswith("\r")


def test_work_that_is_short_shows_no_bar(screen):
    with Bar(delay=60) as bar:
        bar.reached(0, 30)
        bar.reached(30, 30)
    assert screen.getvalue().strip() == ""


def test_nothing_is_said_to_a_pipe(capsys):
    with Bar(3, "Anything") as bar:
        bar.say("something else")
        bar.advance(3)
    assert capsys.readouterr() == ("", "")
