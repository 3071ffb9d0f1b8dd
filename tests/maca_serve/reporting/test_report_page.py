"""The report in a real browser."""

import re

import chromium
import pytest
from maca_serve import compare

pytestmark = pytest.mark.skipif(chromium.FOUND is None, reason="no Chromium is installed")

# Widest reach of anything that does not stand in a box of its own that scrolls.
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
COLOURS = """(() => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).slice(0, 3).map(Number);
  const paper = rgb(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll('p, td, th, h1, h2, h3, dt, dd, pre, code, b, svg text')]
    .map(e => rgb(getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color']))
    .map(ink => [ink, paper]);
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return tmp_path_factory.mktemp("report") / "report.html"


@pytest.fixture
def report(fake_vllm, base, quantized, text, page):
    """A comparison with everything in it, written once."""
    if not page.is_file():
        compare(
            base,
            [quantized],
            text=text,
            lengths=[40, 64, 128],
            windows=4,
            limit=4,
            tasks=["continuation", "needle", "copy"],
            names=["base", "a-name-that-is-long-enough-to-need-a-line-of-its-own"],
            output=page.parent,
        )
    return page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_renders(report, width, dark):
    with chromium.Browser(width, dark=dark) as browser:
        browser.open(report)
        assert browser.evaluate("document.querySelectorAll('svg').length") >= 7
        assert browser.evaluate(OVERFLOW) == 0
        assert browser.evaluate("window.innerWidth") == width
        pairs = browser.evaluate(COLOURS)
        assert browser.logged == []
        outside = [each for each in browser.requested if not each.startswith("data:")]
        assert outside == [report.as_uri()]
    # Readable: WCAG's 4.5 for text, against the page's own background.
    assert len(pairs) > 100
    assert min(contrast(*pair) for pair in pairs) >= 4.5
    assert (luminance(pairs[0][1]) < 0.1) == dark


def test_the_checks_see_what_they_are_for(report, tmp_path):
    """Something wide, a request and an error of a page that has them."""
    broken = tmp_path / "broken.html"
    html = re.sub(r"<meta http-equiv[^>]+>", "", report.read_text())
    extra = "<div style='width: 500px'>x</div><img src='http://127.0.0.1:9/x.png'>"
    broken.write_text(html.replace("</body>", f"{extra}<script>nope()</script></body>"))
    with chromium.Browser(390) as browser:
        browser.open(broken)
        assert browser.evaluate(OVERFLOW) > 0
        assert "http://127.0.0.1:9/x.png" in browser.requested
        assert any("nope is not defined" in line for line in browser.logged)


def luminance(rgb):
    """Relative luminance of WCAG 2."""
    parts = [c / 255 for c in rgb]
    red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
