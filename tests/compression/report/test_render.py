from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pifa_vllm.compression.report.render import render_html, render_model_card
from pifa_vllm.compression.report.schema import CompressionReport, Evaluation
from tests.compression.report.sample_report import SHAPES, module, sample_report

HOSTILE = "<img src=x onerror=alert(1)>`\"'|${{7*7}}\n# Owned\n---"
VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Collects a page's elements and text, and checks that they nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


def hostile_report() -> CompressionReport:
    return sample_report(
        model=HOSTILE,
        architecture=HOSTILE,
        fingerprint=HOSTILE,
        command=HOSTILE,
        created=HOSTILE,
        calibration={"source": "text", "name": HOSTILE, HOSTILE: HOSTILE},
        options={HOSTILE: {HOSTILE: [HOSTILE]}},
        versions={HOSTILE: HOSTILE},
        evaluation=[Evaluation(model=HOSTILE, metric=HOSTILE, value=1.0, data=HOSTILE)],
        modules=[
            module("q_proj", 0, 24).model_copy(update={"name": HOSTILE, "kind": HOSTILE, "output_error": 0.9})
        ],
    )


def test_the_page_stands_alone() -> None:
    html = render_html(sample_report())
    page = Page(html)
    assert page.count("script") == page.count("link") == page.count("img") == 0
    assert not any(name in attributes for _, attributes in page.elements for name in ("src", "href"))
    assert "url(" not in html
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html


def test_the_page_shows_the_figures() -> None:
    report = sample_report(depth=3)
    html = render_html(report)
    page = Page(html)
    assert f"{100 * report.density:.2f} %" in page.text
    assert "1 min 15 s" in page.text
    assert "1.20 GB of memory" in page.text
    assert report.command in page.text
    assert "some unseen text" in page.text
    assert all(x.name in page.text for x in report.modules)
    # One column per module and one full-rank ground per kind; one dot and one hover target per error.
    assert page.count("rect") == len(report.modules) + len(SHAPES)
    assert page.count("circle") == 2 * (len(report.modules) + len(report.layers))
    assert "layer 2: rank 24 of 64, density 0.609" in html


def test_nothing_from_outside_is_taken_for_markup() -> None:
    html = render_html(hostile_report())
    page = Page(html)
    assert "img" not in [tag for tag, _ in page.elements]
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "{{7*7}}" in page.text


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 1},
        {"modules": [], "layers": []},
        {"evaluation": [], "created": None, "model_dense_bytes": None, "model_kept_bytes": None},
        {"representation": "lowrank", "method": "svd", "calibration": {}},
        {"modules": [module("q_proj", 0, 64, dense=True, density=1.0, output_error=0.0)]},
    ],
)
def test_unusual_runs_render(changes: dict[str, Any]) -> None:
    report = sample_report(**changes)
    Page(render_html(report))
    assert render_model_card(report).startswith("---\n")


def test_reports_survive_json_and_refuse_what_json_cannot_hold() -> None:
    report = sample_report()
    assert CompressionReport.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(ValidationError):
        module("q_proj", 0, 24, output_error=float("nan"))
    with pytest.raises(ValidationError):
        sample_report(typo=1)


def front_matter(card: str) -> tuple[dict[str, Any], str]:
    _, front, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(front), body


def test_the_card_says_how_to_use_the_model() -> None:
    front, body = front_matter(render_model_card(sample_report()))
    assert front["library_name"] == "transformers"
    assert {"pifa", "vllm"} <= set(front["tags"])
    assert "license" not in front
    assert "base_model" not in front
    for needed in ("pip install 'pifa-vllm[cuda]'", "vllm serve DIR", "import pifa_vllm", "random weights"):
        assert needed in body
    assert "| dense | some unseen text | 16,384 | perplexity | 19.26 |  |" in body
    assert "pifa-vllm compress models/sample out --density 0.6" in body
    assert "from the text file some.txt, seed 3" in body


def test_both_pages_say_what_the_gradients_were_asked_for() -> None:
    report = sample_report(options={"allocation": "sensitivity", "metric": "outputs"})
    plain = sample_report(options={"allocation": "uniform", "metric": "inputs"})
    for render in (render_model_card, render_html):
        for words in ("in the metric of their outputs", "Ranks are divided among the modules"):
            assert words in render(report)
            assert words not in render(plain)


def test_the_card_of_dense_weights_does_not_promise_savings() -> None:
    front, body = front_matter(render_model_card(sample_report(representation="lowrank")))
    assert "pifa" not in front["tags"]
    assert "no\nsmaller than the dense model" in body
    assert "import pifa_vllm" not in body


def test_licence_and_language_come_from_the_source_card() -> None:
    source = (
        "---\r\nlicense: other\r\nlicense_name: llama3\r\nlanguage: [en, de]\r\nextra: x\r\n---\r\n# Title"
    )
    front, body = front_matter(render_model_card(sample_report(), source))
    assert (front["license"], front["license_name"], front["language"]) == ("other", "llama3", ["en", "de"])
    assert "extra" not in front
    assert "The source model's: other." in body


@pytest.mark.parametrize(
    "card", [None, "", "no front matter", "---\n: [broken\n---\n", "---\n- a list\n---\n"]
)
def test_a_source_card_without_licence_is_said(card: str | None) -> None:
    front, body = front_matter(render_model_card(sample_report(), card))
    assert "license" not in front
    assert "names none" in body


def test_the_hub_cache_tells_the_base_model() -> None:
    path = "/data/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/93efa2f0"
    front, body = front_matter(render_model_card(sample_report(model=path)))
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert "`HuggingFaceTB/SmolLM2-135M`" in body


def test_hostile_names_do_not_break_the_card() -> None:
    front, body = front_matter(render_model_card(hostile_report(), f"---\nlicense: {'x' * 20}\n---\n"))
    assert set(front) == {"library_name", "pipeline_tag", "license", "tags"}
    outside_fences = re.sub(r"^(`{3,}).*?^\1$", "", body, flags=re.MULTILINE | re.DOTALL)
    outside_code = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", outside_fences)
    assert "<img" not in outside_code
    assert not re.search(r"^# Owned", outside_fences, re.MULTILINE)
    assert "<img src=x onerror=alert(1)>" in body
