"""The page in a real browser: it renders, asks the network for nothing, and hovering works; hostile text stays text."""

import json
import shutil
import time

import pytest

from bupo.report.page import render
from bupo.run_folder import write_text
from tests.support.results import TOKENS, everything

webdriver = pytest.importorskip("selenium.webdriver")
LAYERS = 5


@pytest.fixture(scope="module")
def browser_and_page(tmp_path_factory):
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs chromium and chromedriver (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    switches = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    switches += "disable-component-update disable-sync disable-dev-shm-usage window-size=1200,1000"
    for switch in (*switches.split(), f"user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    data = everything(tokens=TOKENS)
    data.samples["sums", "tiny"][0]["response"] = "".join(TOKENS)
    yield made, write_text(tmp_path_factory.mktemp("page") / "report.html", render("Report on tiny", data))
    made.quit()


@pytest.fixture
def opened(browser_and_page):
    """The page in the browser, its logs empty before."""
    browser, page = browser_and_page
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(page.as_uri())
    return browser


def find(browser, selector: str):
    return browser.find_element("css selector", selector)


def part(browser, name: str):
    return find(browser, f'[data-part="{name}"]')


def hover(browser, layer: int, token: int) -> str:
    """Point at the middle of a cell (both from 1) and return what is shown."""
    canvas = part(browser, "map")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    width, height = (int(part(browser, side).get_attribute("data-cell") or 0) for side in ("map", "layers"))
    size = canvas.size
    x = (token - 0.5) * width - size["width"] / 2
    y = (LAYERS - layer + 0.5) * height - size["height"] / 2
    webdriver.ActionChains(browser).move_to_element_with_offset(canvas, round(x), round(y)).perform()
    return part(browser, "tip").text


def pixel(browser, layer: int, token: int) -> list[int]:
    """The colour in the middle of a cell (both from 1)."""
    return browser.execute_script(
        """const [l, t] = arguments, map = document.querySelector('[data-part=map]');
        const w = +map.dataset.cell, h = +document.querySelector('[data-part=layers]').dataset.cell;
        const ratio = map.width / parseFloat(map.style.width);
        return [...map.getContext('2d').getImageData((t - .5) * w * ratio, (l - .5) * h * ratio, 1, 1).data]""",
        LAYERS - layer + 1, token,
    )  # fmt: skip


def test_it_renders_without_errors_and_asks_the_network_for_nothing(opened):
    assert part(opened, "map").size["height"] > 100
    assert all(svg.size["width"] > 200 for svg in opened.find_elements("css selector", "figure svg"))
    opened.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    outside = [url for url in urls if not url.startswith("data:")]
    assert [url.rsplit("/", 1)[-1] for url in outside] == ["report.html"]  # so the log does see requests
    assert opened.get_log("browser") == []


def test_hovering_shows_the_cell(opened):
    shown = hover(opened, layer=2, token=7)
    numbers = "entropy 2.600, log-prob −2.000, rank 13, KL to final 1.500"
    assert [text for text in ("Layer 2, token 7: plain", numbers, "first2.6", "62.5 %") if text not in shown] == []
    assert "Layer 5, token 1" in hover(opened, layer=5, token=1)
    assert "KL to final –" in part(opened, "tip").text
    webdriver.ActionChains(opened).move_to_element(find(opened, "#explorer h3")).perform()
    assert not part(opened, "tip").is_displayed()
    assert opened.get_log("browser") == []


def test_colours_follow_the_values_and_the_chosen_measure(opened):
    lightest, darkest = [253, 231, 37, 255], [68, 1, 84, 255]
    assert pixel(opened, 5, 7) == lightest  # the largest entropy
    assert sum(pixel(opened, 1, 1)) < sum(pixel(opened, 3, 4)) < sum(pixel(opened, 5, 7))
    find(opened, "input[value=kl]").click()
    assert pixel(opened, 5, 7) == darkest  # none against itself
    assert pixel(opened, 1, 7) == lightest
    assert pixel(opened, 1, 1) not in (lightest, darkest)  # no value
    assert part(opened, "high").text == "≥ 2.00 nats"
    find(opened, "input[value=logprob]").click()
    assert pixel(opened, 1, 1) != darkest
    assert pixel(opened, 5, 7) == darkest
    assert part(opened, "high").text == "0.00"


def test_the_keyboard_reaches_every_cell(opened):
    find(opened, "input[value=entropy]").click()
    keys = webdriver.ActionChains(opened)
    keys.send_keys(webdriver.Keys.TAB).perform()
    assert opened.switch_to.active_element == part(opened, "map")
    assert "Layer 5, token 1" in part(opened, "tip").text
    keys.send_keys(webdriver.Keys.ARROW_DOWN, webdriver.Keys.ARROW_RIGHT, webdriver.Keys.ARROW_RIGHT).perform()
    assert "Layer 4, token 3" in part(opened, "tip").text
    keys.send_keys(webdriver.Keys.END, *[webdriver.Keys.ARROW_UP] * 3).perform()
    assert "Layer 5, token 7" in part(opened, "tip").text
    keys.send_keys(webdriver.Keys.ESCAPE).perform()
    assert not part(opened, "tip").is_displayed()


def test_another_sample_has_its_own_size_and_measures(opened):
    from selenium.webdriver.support.select import Select

    find(opened, "input[value=kl]").click()
    Select(part(opened, "sample")).select_by_visible_text("sums/2")
    assert part(opened, "text").text == "ab"
    assert not find(opened, "input[value=kl]").is_enabled()
    assert find(opened, "input[value=entropy]").is_selected()
    assert opened.get_log("browser") == []


def test_groups_are_filtered_by_reward(opened):
    low, high = opened.find_elements("css selector", "#groups input")
    for field, keys, shown in ((low, "0.5", 2), (high, "0.2", 0), (low, webdriver.Keys.BACKSPACE * 3, 2)):
        field.send_keys(keys)
        assert find(opened, "#groups [role=status]").text == f"{shown} of 6 responses"
        assert len(opened.find_elements("css selector", ".group:not([hidden])")) == (2 if shown else 0)
    high.send_keys(webdriver.Keys.BACKSPACE * 3)
    assert find(opened, "#groups [role=status]").text == "6 of 6 responses"
    assert opened.get_log("browser") == []


def test_hostile_text_is_shown_as_text(opened):
    # the only scripts are the data block, the explorer and the filter
    for value, expected in (
        ("[window.owned ?? null, document.scripts.length, document.images.length]", [None, 3, 0]),
        ("[...document.querySelectorAll('[data-part=text] span')].slice(0, 5).map(s => s.textContent)", TOKENS[:5]),
        ("document.title", "Report on tiny"),
    ):
        assert opened.execute_script(f"return {value}") == expected
    assert TOKENS[0] in opened.execute_script("return document.querySelector('#samples details').textContent")
    assert "<img␣src=x" in hover(opened, layer=3, token=3)


def test_no_other_script_of_the_page_can_run(opened):
    """Even markup that got onto the page by a mistake would be inert."""
    opened.execute_script(
        """document.body.insertAdjacentHTML('beforeend', '<img src="data:," onerror="window.owned = 1">');
        const s = document.createElement('script'); s.text = 'window.owned = 2'; document.body.append(s)"""
    )
    time.sleep(0.2)  # an image's handler would run in a task of its own
    assert opened.execute_script("return window.owned") is None
    assert [entry for entry in opened.get_log("browser") if "Content Security Policy" in entry["message"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_window_in_either_colour_scheme(opened, scheme):
    media, size = [{"name": "prefers-color-scheme", "value": scheme}], {"width": 360, "height": 800}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "deviceScaleFactor": 2, "mobile": True})
    try:
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 360
        channels = opened.execute_script("return getComputedStyle(document.body).color.match(/\\d+/g).map(Number)")
        assert (sum(channels) > 380) is (scheme == "dark")
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
