"""The kinds of panels that the dashboards are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from grafana_foundation_sdk.builders import common, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
# What selects the servers that the reader has chosen.
WHERE = 'instance=~"$instance"'

Panel = TypeVar("Panel", timeseries.Panel, stat.Panel, table.Panel)
Query = tuple[str, str]  # PromQL, legend


def rate(metric: str, labels: str = WHERE) -> str:
    """PromQL for a counter's increase per second, over the interval that fits the graph."""
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def percentiles(histogram: str) -> list[Query]:
    """The median, p90 and p99 of what came in lately, over the chosen servers."""
    buckets = f"sum by (le) ({rate(histogram + '_bucket')})"
    return [
        (f"histogram_quantile({q}, {buckets})", name)
        for q, name in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"))
    ]


def with_queries(
    panel: Panel, queries: Sequence[Query], *, instant: bool = False, as_table: bool = False
) -> Panel:
    """Give a panel its queries: at most eight."""
    for letter, (expression, legend) in zip("ABCDEFGH", queries, strict=False):
        query = (
            prometheus.Dataquery().ref_id(letter).expr(expression).legend_format(legend).datasource(SOURCE)
        )
        query = query.instant() if instant else query.range()
        panel.with_target(query.format(PromQueryFormat.TABLE) if as_table else query)
    return panel.datasource(SOURCE)


def graph(
    title: str, unit: str, queries: Sequence[Query], *, text: str = "", width: int = 12, stacked: bool = False
) -> timeseries.Panel:
    """Lines over time, `width` of 24 columns wide."""
    legend = common.VizLegendOptions().display_mode(shapes.LegendDisplayMode.LIST)
    panel = timeseries.Panel().title(title).description(text).unit(unit).min(0).span(width).height(8)
    panel.legend(legend.placement(shapes.LegendPlacement.BOTTOM).show_legend(True)).line_width(1)
    panel.tooltip(common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI))
    panel.fill_opacity(40 if stacked else 8)
    if stacked:
        panel.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL).group("A"))
    return with_queries(panel, queries)


def number(
    title: str, unit: str, query: str, *, text: str = "", width: int = 4, decimals: int | None = None
) -> stat.Panel:
    """One number, as it is now."""
    panel = stat.Panel().title(title).description(text).unit(unit).span(width).height(4)
    panel.graph_mode(shapes.BigValueGraphMode.NONE).color_mode(shapes.BigValueColorMode.NONE)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    if decimals is not None:
        panel.decimals(decimals)
    return with_queries(panel, [(query, "")], instant=True)


def lamp(title: str, query: str, *, text: str) -> stat.Panel:
    """A number that is 1 when all is well, as a word on a colour."""
    words = {"0": ("no", "red"), "1": ("yes", "green")}
    options = {
        value: models.ValueMappingResult(text=word, color=color) for value, (word, color) in words.items()
    }
    panel = number(title, "none", query, text=text).color_mode(shapes.BigValueColorMode.BACKGROUND)
    return panel.mappings([models.ValueMap(options=options)])


def listing(title: str, query: str, *, text: str, width: int) -> table.Panel:
    """The labels of an info metric."""
    hidden = {"Time": True, "Value": True, "__name__": True, "job": True}
    only_labels = models.DataTransformerConfig(id_val="organize", options={"excludeByName": hidden})
    panel = table.Panel().title(title).description(text).span(width).height(4)
    panel.with_transformation(only_labels)
    return with_queries(panel, [(query, "")], instant=True, as_table=True)
