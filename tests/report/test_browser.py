"""The page in a real browser: it renders, asks the network for nothing, and hovering works; hostile text stays text."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from bupo.errors import InputError
from bupo.report.page import data_block, write_page
from bupo.report.results import ExploredTokens
from tests.support.results import everything, explored

LAYERS = 5
HOSTILE = [
    "</script><script>window.owned = 1</script>",
    "<!--<script>",
    "<img src=x onerror='window.owned=1'>",
    "\u2028",
    "\u202eright to left",
    "\ud800",
    "plain",
]


def page(path: Path) -> Path:
    data = everything(tokens=HOSTILE)
    data.samples[0]["responses"][0]["response"] = "".join(HOSTILE)
    return write_page(path, "Report on tiny", data)


def test_the_data_block_cannot_be_left_and_comes_back_whole():
    content = explored(HOSTILE)
    text = str(data_block([("tiny", ExploredTokens.parse(content))]))
    assert not set("<>&\u2028\u2029") & set(text)
    assert text.isascii()
    assert json.loads(text)["models"] == [{"name": "tiny", "samples": content["samples"]}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(samples=[]), "samples: List should have at least 1 item"),
        (lambda c: c["samples"][0].update(tokens=[]), "samples.0.tokens"),
        (lambda c: c["samples"][0].pop("entropy"), "samples.0.entropy: Field required"),
        (lambda c: c["samples"][0]["kl"][2].pop(), "kl has 6 values for 7 tokens"),
        (lambda c: c["samples"][0]["top"].pop(), "top has 4 values for 5 layers"),
    ],
)
def test_an_incomplete_token_file_is_refused(change, words):
    content = explored(HOSTILE)
    change(content)
    with pytest.raises(InputError) as refusal:
        ExploredTokens.parse(content, "tokens.json")
    assert words in str(refusal.value)


# in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs chromium and chromedriver (Debian: chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for switch in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1200,1000",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


@pytest.fixture(scope="module")
def written(tmp_path_factory, browser) -> Path:
    return page(tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def opened(browser, written):
    """The page in the browser, its logs empty before."""
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(written.as_uri())
    return browser


def requests(browser) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def find(browser, selector: str):
    from selenium.webdriver.common.by import By

    return browser.find_element(By.CSS_SELECTOR, selector)


def part(browser, name: str):
    return find(browser, f'[data-part="{name}"]')


def hover(browser, layer: int, token: int) -> str:
    """Point at the middle of a cell (both from 1) and return what is shown."""
    from selenium.webdriver import ActionChains

    canvas = part(browser, "map")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    width, height = (int(part(browser, side).get_attribute("data-cell") or 0) for side in ("map", "layers"))
    size = canvas.size
    x = (token - 0.5) * width - size["width"] / 2
    y = (LAYERS - layer + 0.5) * height - size["height"] / 2
    ActionChains(browser).move_to_element_with_offset(canvas, round(x), round(y)).perform()
    return part(browser, "tip").text


def pixel(browser, layer: int, token: int) -> list[int]:
    """The colour in the middle of a cell (both from 1)."""
    return browser.execute_script(
        """const [l, t] = arguments, map = document.querySelector('[data-part=map]');
        const w = +map.dataset.cell, h = +document.querySelector('[data-part=layers]').dataset.cell;
        const ratio = map.width / parseFloat(map.style.width);
        return [...map.getContext('2d').getImageData((t - .5) * w * ratio, (l - .5) * h * ratio, 1, 1).data]""",
        LAYERS - layer + 1,
        token,
    )


def test_it_renders_without_errors_and_asks_the_network_for_nothing(opened):
    assert part(opened, "map").size["height"] > 100
    assert all(svg.size["width"] > 200 for svg in opened.find_elements("css selector", "figure svg"))
    opened.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    urls = requests(opened)
    assert [url for url in urls if url.endswith("report.html")]  # the log does see requests
    assert not [url for url in urls if not url.startswith(("file:", "data:"))]
    assert len([url for url in urls if url.startswith("file:")]) == 1
    assert opened.get_log("browser") == []


def test_hovering_shows_the_cell(opened):
    shown = hover(opened, layer=2, token=7)
    assert "Layer 2, token 7: plain" in shown
    assert "entropy 2.600, log-prob −2.000, rank 13, KL to final 1.500" in shown
    assert "first2.6" in shown
    assert "62.5 %" in shown
    assert "Layer 5, token 1" in hover(opened, layer=5, token=1)
    assert "KL to final –" in part(opened, "tip").text
    from selenium.webdriver import ActionChains

    ActionChains(opened).move_to_element(find(opened, "#explorer h3")).perform()
    assert not part(opened, "tip").is_displayed()
    assert opened.get_log("browser") == []


def test_colours_follow_the_values_and_the_chosen_measure(opened):
    lightest, darkest = [253, 231, 37, 255], [68, 1, 84, 255]
    assert pixel(opened, 5, 7) == lightest  # the largest entropy
    assert pixel(opened, 1, 1) != lightest
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
    from selenium.webdriver import ActionChains, Keys

    find(opened, "input[value=entropy]").click()
    keys = ActionChains(opened)
    keys.send_keys(Keys.TAB).perform()
    assert opened.switch_to.active_element == part(opened, "map")
    assert "Layer 5, token 1" in part(opened, "tip").text
    keys.send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    assert "Layer 4, token 3" in part(opened, "tip").text
    keys.send_keys(Keys.END, Keys.ARROW_UP, Keys.ARROW_UP, Keys.ARROW_UP).perform()
    assert "Layer 5, token 7" in part(opened, "tip").text
    keys.send_keys(Keys.ESCAPE).perform()
    assert not part(opened, "tip").is_displayed()


def test_another_sample_has_its_own_size_and_measures(opened):
    from selenium.webdriver.support.select import Select

    find(opened, "input[value=kl]").click()
    Select(part(opened, "sample")).select_by_visible_text("sums/2")
    assert part(opened, "text").text == "ab"
    assert not find(opened, "input[value=kl]").is_enabled()
    assert find(opened, "input[value=entropy]").is_selected()
    assert opened.get_log("browser") == []


def test_hostile_text_is_shown_as_text(opened):
    assert opened.execute_script("return window.owned") is None
    assert opened.execute_script("return document.scripts.length") == 2  # the data block and the explorer
    assert opened.execute_script("return document.images.length") == 0
    content = opened.execute_script(
        "return [...document.querySelectorAll('[data-part=text] span')].slice(0, 5).map(s => s.textContent)"
    )
    assert content == HOSTILE[:5]
    assert HOSTILE[0] in opened.execute_script("return document.querySelector('#samples details').textContent")
    assert "<img␣src=x" in hover(opened, layer=3, token=3)
    assert opened.execute_script("return document.title") == "Report on tiny"


def test_no_other_script_of_the_page_can_run(opened):
    """Even markup that got onto the page by a mistake would be inert."""
    opened.execute_script(
        "document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=\"window.owned = 1\">')"
    )
    opened.execute_script(
        "const s = document.createElement('script'); s.text = 'window.owned = 2'; document.body.append(s)"
    )
    time.sleep(0.2)  # an image's handler would run in a task of its own
    assert opened.execute_script("return window.owned") is None
    refused = [entry["message"] for entry in opened.get_log("browser")]
    assert [message for message in refused if "Content Security Policy" in message]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_window_in_either_colour_scheme(opened, scheme):
    opened.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 360
        channels = opened.execute_script("return getComputedStyle(document.body).color.match(/\\d+/g).map(Number)")
        assert (sum(channels) > 380) is (scheme == "dark")
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
