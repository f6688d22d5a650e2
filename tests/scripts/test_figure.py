"""One style for every picture: colours that stand out, and labels at the ends of lines."""

import pytest
from benchmarks.harness import figure as style
from benchmarks.network.schemes import SCHEMES


def luminance(color):
    """Relative luminance of `#rrggbb` (WCAG 2.1)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("background", ["#ffffff", "#131416"])  # light, and furo's dark
def test_every_colour_stands_out_on_light_and_on_dark(background):
    for color in (style.INK, *style.COLORS.values()):
        assert contrast(color, background) >= 3, (color, contrast(color, background))


def test_a_scheme_has_one_colour_and_every_scheme_has_one():
    for scheme in SCHEMES:
        assert style.color(scheme) == style.color(scheme.removesuffix("-mpi") + "-mpi")
    assert style.color("gtopk-tree-mpi") == style.color("gtopk") != style.color("topk")
    with pytest.raises(ValueError, match="'nosuch'"):
        style.color("nosuch")


def test_labels_stand_at_the_ends_and_apart(tmp_path):
    from matplotlib.text import Text

    ends = {"a": 1.0, "b": 1.001, "c": 1.002, "d": 5.0}
    with style.figure(tmp_path / "new" / "lines.png") as (drawn, axes):
        axis = axes[0][0]
        lines = [axis.plot([0, 1], [0, y], label=name)[0] for name, y in ends.items()]
        style.label_ends(axis, lines)
        drawn.draw_without_rendering()
        boxes = [Text.get_window_extent(text) for text in axis.texts]  # without the line that leads to it
        texts = [text.get_text() for text in axis.texts]
    assert texts == list(ends)  # from below
    points = 72 / drawn.dpi
    for below, above in zip(boxes, boxes[1:]):
        assert (above.y0 + above.y1 - below.y0 - below.y1) / 2 * points > 9
    assert all(box.x0 > axis.get_window_extent().x1 for box in boxes)
    assert (tmp_path / "new" / "lines.png").stat().st_size > 1000
