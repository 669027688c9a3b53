import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from awq_jax.cli import chart, tables
from awq_jax.report import LayerReport, Report, size, summary


def layer(path, before=0.01, after=0.002, **changes):
    fields = {"group": path, "shape": (64, 32), "bits": 4, "group_size": 32, "symmetric": False}
    fields |= {"bytes_before": 8192, "bytes_after": 1088, "error_rtn": before, "error": after, "scale": "folded"}
    return LayerReport(path, **(fields | changes))


def report(layers, skipped=None):
    config = {"bits": 4, "group_size": 32, "symmetric": False, "method": "awq+gptq"}
    return Report(config, layers, skipped or {}, 16384, {"calibrate": 2.0, "search": 1.25}, 1 << 20, 1 << 18)


MIXED = report(
    [
        layer("layers/0/q/kernel", 0.01, 0.001, ratio=0.45, clipped=0.125),
        layer("layers/1/q/kernel", 0.02, 0.03),
        layer("layers/0/o/kernel", 0.04, 0.02, scale="none", reason="no norm before it"),
        layer("layers/1/o/kernel", 0.04, 0.02, scale="none", reason="no norm before it"),
        layer("mixer/kernel", 0.04, 0.02, scale="explicit", reason="a gather reads <w>"),
    ],
    {"lm_head/kernel": "produces the model's output"},
)


class Page(HTMLParser):
    """Collects tags, attributes and text; checks that tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.rows, self.words = [], [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.rows += tag == "tr"
        self.links += [v for k, v in attrs if k in ("src", "href") or "url(" in str(v)]
        if tag not in ("meta", "line", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.rows += tag == "tr"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)


def test_table_has_sizes_bits_seconds_worst_layers_and_every_exception():
    text = str(MIXED)
    assert "4.25, scales" in text  # 1088 bytes * 8 / 2048 weights
    assert "1.00 MiB before, 256.00 KiB after (4.00x smaller)" in text
    assert "3.2 (calibrate 2.0, search 1.2)" in text
    assert "16,384 tokens" in text
    worst = [line for line in text.splitlines() if "kernel" in line and "0.03" in line]
    assert worst[0].split()[0] == "layers/1/q/kernel"
    assert "layers/*/o/kernel (2): no norm before it" in text
    assert "mixer/kernel: a gather reads <w>" in text
    assert "lm_head/kernel: produces the model's output" in text


def test_typical_error_is_the_geometric_mean():
    rows = dict(summary(report([layer("a", 0.01, 0.001), layer("b", 0.0001, 0.00001)])))
    assert rows["typical error"] == "0.001 rounded to nearest, 0.0001 as stored"


def test_html_is_well_formed_self_contained_and_lists_every_weight():
    text = tables.html(MIXED, "a <script>alert(1)</script> & more")
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert "<script" not in text
    assert "http" not in text
    assert "a <script>alert(1)</script> & more" in page.words
    assert page.rows == 1 + len(MIXED.layers) + len(MIXED.config)
    words = " ".join(page.words)
    for expected in ("no norm before it", "a gather reads <w>", "produces the model's output", "12.5%", "0.45"):
        assert expected in words
    assert text.count('class="worse"') == 1


def test_hostile_paths_are_escaped_everywhere():
    evil = 'x"><img src=http://a onerror=b>'
    one = layer(evil, scale="none", reason=evil)
    page = Page(tables.html(report([one], {evil: evil})))
    assert page.links == []


def test_picture_places_errors_on_a_log_axis():
    svg = ET.fromstring(chart.errors([layer("a", 0.1, 0.001), layer("b", 0.01, 0.01)]))
    dots = {c: [float(e.attrib["cy"]) for e in svg.iter("circle") if e.attrib["class"] == c] for c in ("rtn", "stored")}
    assert dots["rtn"][0] < dots["rtn"][1] == dots["stored"][1] < dots["stored"][0]
    decade = dots["rtn"][1] - dots["rtn"][0]
    assert dots["stored"][0] - dots["stored"][1] == pytest.approx(decade)
    grid = [float(e.attrib["y1"]) for e in svg.iter("line") if e.attrib["class"] == "grid"]
    assert min(grid) <= min(dots["rtn"]) + 0.1
    assert max(grid) >= max(dots["stored"]) - 0.1


@pytest.mark.parametrize("count", [1, 11, 12, 13, 210, 999, 5000])
def test_picture_has_one_column_per_weight_and_few_labels(count):
    svg = ET.fromstring(chart.errors([layer(f"w{i}") for i in range(count)]))
    at = [float(e.attrib["cx"]) for e in svg.iter("circle") if e.attrib["class"] == "stored"]
    assert at == sorted(at)
    assert len(at) == count
    assert chart.LEFT < at[0] <= at[-1] < chart.WIDTH
    labels = [int(t.text) for t in svg.iter("text") if t.text and re.fullmatch(r"\d+", t.text) and not len(t)]
    assert labels[0] == 1
    assert len(labels) <= 13
    assert max(labels) <= count


def test_weights_without_errors_or_with_an_error_of_zero():
    none = report([layer("a", None, None, scale="none")])
    assert "No picture" in tables.html(none)
    assert "typical error" not in str(none)
    zero = report([layer("a", 0.0, 0.0), layer("b", 0.1, 0.01)])
    ET.fromstring(chart.errors(zero.layers))
    Page(tables.html(zero))


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (5 << 40, "5120.00 GiB")]
)
def test_sizes(count, expected):
    assert size(count) == expected
