from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pifa_vllm.compression.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    axis_steps,
    line_chart,
    rank_columns,
)


@settings(max_examples=50, deadline=None)
@given(st.floats(min_value=1e-9, max_value=1e9))
def test_axes_reach_just_beyond_the_data(highest: float) -> None:
    steps = axis_steps(highest)
    assert steps[0] == 0
    assert 3 <= len(steps) <= 6
    assert steps[-2] < highest * (1 + 1e-9) <= steps[-1] * (1 + 1e-8)


def test_an_axis_without_data_has_a_scale() -> None:
    assert axis_steps(0.0) == [0.0, 1.0]


@example({"q": [5e-324]})
@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.lists(st.floats(min_value=0, max_value=1e3), min_size=1, max_size=90),
        max_size=4,
    )
)
def test_lines_and_their_names_stay_on_the_canvas(values: dict[str, list[float]]) -> None:
    chart = line_chart({name: list(enumerate(line)) for name, line in values.items()})
    for line in chart.lines:
        for point in line.points:
            assert LEFT <= point.x <= WIDTH - RIGHT
            assert TOP - 0.1 <= point.y <= HEIGHT - BOTTOM
    places = sorted(line.label_y for line in chart.lines)
    assert all(later - earlier >= 12.9 for earlier, later in pairwise(places))
    assert all(0 <= place <= HEIGHT - BOTTOM for place in places)
    assert len({tick.at for tick in chart.x_ticks}) == len(chart.x_ticks)


def test_points_are_where_their_values_say() -> None:
    chart = line_chart({"q": [(0, 0.0), (1, 0.5), (2, 1.0)]}, highest=1.0)
    low, middle, high = chart.lines[0].points
    assert (low.x, low.y) == (LEFT, HEIGHT - BOTTOM)
    assert (high.x, high.y) == (WIDTH - RIGHT, TOP)
    assert middle.y == (low.y + high.y) / 2
    assert middle.title == "q, layer 1: 0.5000"
    assert [tick.label for tick in chart.x_ticks] == ["0", "1", "2"]


def test_ranks_are_columns_on_the_full_rank() -> None:
    columns = rank_columns([(0, 64, 1.0), (1, 16, 0.4)], 64, width=100.0, height=40.0)
    assert [(c.x, c.y, c.height) for c in columns] == [(0.0, 0.0, 40.0), (50.0, 30.0, 10.0)]
    assert columns[1].title == "layer 1: rank 16 of 64, density 0.400"
