"""Figures: a look for every line, the same in all of them, however many there are."""

import itertools

import pytest

from tova_mlx.errors import EvaluationError
from tova_mlx.evaluation import kept
from tova_mlx.evaluation.plots import line_of, new_figure, pyplot, save, styles
from tova_mlx.evaluation.results import shown

# As committed figures show them.
COLOURS = {
    "window": "#0072B2",
    "streaming": "#D55E00",
    "h2o": "#009E73",
    "tova": "#CC79A7",
    "vatp": "#56B4E9",
    "fade": "#E69F00",
    "keydiff": "#000000",
    "full": "#555555",
}
OWN = [f"own_{i}" for i in range(12)]


def row(policy, size=64, **values):
    size = None if policy == "full" else size
    return {"policy": policy, "max_kv_size": size, **values}


def test_known_policies_keep_their_colours_whatever_else_is_drawn():
    for names in (COLOURS, reversed(COLOURS), [*OWN, *COLOURS], ["fade"]):
        looks = styles(row(name) for name in names)
        for name, look in looks.items():
            if name in COLOURS:
                assert look["color"] == COLOURS[name]
                assert look["linestyle"] == ("--" if name == "full" else "-")


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    save(new_figure()[0], path)
    whole = path.read_bytes()
    assert whole.startswith(b"\x89PNG")

    def half(figure, name, **_):
        name.write_bytes(whole[:99])
        raise OSError(28, "No space left on device")

    figure, _ = new_figure()
    monkeypatch.setattr(type(figure), "savefig", half)
    with pytest.raises(EvaluationError, match=r"figure.png: cannot be written \(No sp"):
        save(figure, path)
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_matplotlib_without_a_directory_of_its_own_is_one_line(monkeypatch):
    import matplotlib

    def nowhere(*_, **__):
        raise OSError("Matplotlib requires access to a writable cache directory")

    monkeypatch.setattr(matplotlib, "use", nowhere)
    with pytest.raises(EvaluationError, match="Set MPLCONFIGDIR to one that can"):
        pyplot()


def test_the_name_of_a_file_that_is_no_text_can_be_drawn(tmp_path):
    # As Python has a name in Latin-1.
    name = shown("caf\udce9")
    assert name == "caf\N{REPLACEMENT CHARACTER}"
    figure, _ = new_figure()
    figure.suptitle(name)
    save(figure, tmp_path / "figure.png")
    assert shown("Größe 世界") == "Größe 世界"


def test_lines_differ_in_more_than_the_label():
    policies = ["full", *COLOURS, *OWN]
    storages = [{}, {"kv_bits": [8, 8], "kv_group_size": 64}]
    storages.append({"kv_bits": [8, 4], "kv_group_size": 32})
    rows = [row(p, **s) for p, s in itertools.product(policies, storages)]
    looks = styles(rows)
    assert len(looks) == 3 * (len(COLOURS) + len(OWN))
    seen = {
        tuple(str(look.get(k)) for k in ("color", "marker", "linestyle"))
        for look in looks.values()
    }
    assert len(seen) == len(looks)
    # A policy is told by its colour and mark, however it is stored.
    for policy in OWN:
        some = [looks[line_of(row(policy, **s))] for s in storages]
        assert len({(look["color"], look["marker"]) for look in some}) == 1


def test_the_figure_of_what_is_kept_takes_a_dozen_policies(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(kept, "save", lambda figure, _: figures.append(figure))
    common = {"model": "m", "text": "t", "tokens": 99, "counts": {"number": 20}}
    common |= {"value": 0.5, "lifetimes": {"all": 4.0, "number": 2.0}}
    names = ["tova", *OWN, "window"]
    kept.plot([[row(n, layer=i, **common) for i in (0, 1)] for n in names], tmp_path)
    (figure,) = figures
    shares, lifetimes = figure.axes
    assert len(shares.lines) == len(lifetimes.containers) == 14
    bars = [c[0] for c in lifetimes.containers]
    assert len({(b.get_facecolor(), b.get_hatch()) for b in bars}) == 14
    # The legend is not wider than the figure.
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    pyplot.close(figure)
