"""The report as a reader sees it, in headless Chromium: charts, filters, token KL, hostile text, phone, dark mode."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chromium import FAINT, chromium, wait
from report_run import STAGES, Texts, is_right, write_run, write_sweep
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from searche1_lite.report import write_report
from searche1_lite.report.escaping import visible


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("report") / "my-run"))


@pytest.fixture
def look(browser: Chrome) -> Iterator[Callable[..., Chrome]]:
    """Opens a report and waits for its first trajectory; afterwards the console must hold no error."""

    def opened(path: Path, anchor: str = "", width: int = 1280, scheme: str = "light", viewer: bool = True) -> Chrome:
        metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get("about:blank")  # so that another anchor loads the page anew
        browser.get_log("browser")
        browser.get(path.as_uri() + anchor)
        if viewer:
            wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#detail .column"))
        return browser

    yield opened
    assert browser.get_log("browser") == []


def choose(browser: Chrome, name: str, value: str) -> None:
    Select(browser.find_element(By.ID, f"filter-{name}")).select_by_visible_text(value)


def count(browser: Chrome) -> str:
    return browser.find_element(By.ID, "count").text


def texts(browser: Chrome, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements(By.CSS_SELECTOR, selector)]


def test_every_chart_is_drawn(look: Callable[..., Chrome], run: Path) -> None:
    browser = look(run)
    plots = browser.find_elements(By.CSS_SELECTOR, "figure.card > svg")
    assert len(plots) == 16
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('figure.card > svg')].map((svg) => {"
        "const box = svg.getBoundingClientRect(), drawn = svg.getBBox();"
        "return [box.width, box.height, drawn.width, drawn.height, svg.querySelectorAll('path').length]})"
    )
    assert all(width > 200 and height > 100 and w > 200 and h > 100 and n > 5 for width, height, w, h, n in boxes)
    figures = browser.find_element(By.CSS_SELECTOR, "#chart-em details")
    figures.find_element(By.TAG_NAME, "summary").click()
    assert "round1.ofsd 0.790 0.740–0.840" in figures.text


def test_filters_show_the_right_questions(look: Callable[..., Chrome], run: Path) -> None:
    browser = look(run)
    assert count(browser) == "20 of 20 questions", "it begins with the rollouts that have token KL"
    for outcome, questions in {"all right": 4, "all wrong": 4, "mixed": 12}.items():
        choose(browser, "outcome", outcome)
        assert count(browser) == f"{questions} of 20 questions"
    choose(browser, "outcome", "any")
    browser.find_element(By.ID, "filter-kl").click()
    assert count(browser) == "8 of 20 questions"
    choose(browser, "hops", "2")
    assert count(browser) == "3 of 20 questions", "1, 4 and 7"
    browser.find_element(By.ID, "filter-kl").click()
    browser.find_element(By.ID, "filter-text").send_keys("peru? (1")
    assert count(browser) == "5 of 20 questions", "1, 10, 13, 16 and 19"
    assert len(texts(browser, "#questions li")) == 5
    wait(browser, lambda: texts(browser, "#detail h3") == ["What is the capital of Peru? (1)"])


def test_evaluations_are_filtered_by_what_changed_since_the_stage_before(
    look: Callable[..., Chrome], run: Path
) -> None:
    browser = look(run)
    for stage, name in enumerate(STAGES):
        choose(browser, "file", f"{name} evaluation")
        right = sum(is_right(stage, n) for n in range(40))
        choose(browser, "outcome", "right")
        assert count(browser) == f"{right} of 40 questions"
        choose(browser, "outcome", "any")
        assert browser.find_element(By.ID, "filter-change").is_enabled() == (stage > 0)
        if stage:
            now, before = ([is_right(s, n) for n in range(40)] for s in (stage, stage - 1))
            improved = sum(n and not b for n, b in zip(now, before, strict=True))
            worse = sum(b and not n for n, b in zip(now, before, strict=True))
            for change, questions in {"improved": improved, "got worse": worse, "same": 40 - improved - worse}.items():
                choose(browser, "change", change)
                assert count(browser) == f"{questions} of 40 questions"
            choose(browser, "change", "any")


def test_an_evaluated_question_is_shown_at_every_stage(look: Callable[..., Chrome], run: Path) -> None:
    browser = look(run, "#trajectory=round1.ofsd.evaluation/test-10/0")
    assert browser.find_element(By.CSS_SELECTOR, "#detail h3").text == "What is the capital of Peru? (10)"
    assert texts(browser, ".column h4") == STAGES
    # Right at stage 2 by 10 mod 4, wrong by 10 mod 5.
    assert texts(browser, ".column .answer") == ["Answer: Quito"] * 3
    browser = look(run, "#trajectory=round1.ofsd.evaluation/test-5/0")
    assert texts(browser, ".column .badge") == ["wrong", "right", "improved", "wrong", "got worse"]
    assert browser.find_element(By.CSS_SELECTOR, ".column.here h4").text == "round1.ofsd"


def test_siblings_stand_side_by_side_the_reference_first(look: Callable[..., Chrome], run: Path) -> None:
    browser = look(run, "#trajectory=round1.ofsd.rollouts/train-3/0")
    columns = browser.find_elements(By.CSS_SELECTOR, ".column")
    assert len({column.location["y"] for column in columns}) == 1
    assert texts(browser, ".column header h4") == ["sample 0", "sample 3", "sample 1", "sample 2"]
    assert texts(browser, ".column .role") == ["reference", "student"]
    assert "reward 0, F1 0.00, 1 search" in columns[1].text and "Answer: Quito" in columns[1].text
    documents = columns[0].find_element(By.CSS_SELECTOR, "details.found")
    assert "Lima is the capital of Peru. 2" not in documents.text
    documents.find_element(By.TAG_NAME, "summary").click()
    assert "capital of Peru 0" in documents.text and "Lima is the capital of Peru. 2" in documents.text


def test_a_token_tells_its_kl_to_pointer_finger_and_keyboard(look: Callable[..., Chrome], run: Path) -> None:
    browser = look(run, "#trajectory=round1.ofsd.rollouts/train-3/0")
    tip = browser.find_element(By.ID, "tip")
    tokens = browser.find_elements(By.CSS_SELECTOR, ".column.student .token")
    assert "".join(token.get_property("textContent") for token in tokens).startswith("<think> look it up</think>")
    assert [token.get_attribute("class") for token in tokens[:3]] == ["token k0", "token k5", "token k0"]
    assert not tip.is_displayed()
    ActionChains(browser).move_to_element(tokens[1]).perform()
    wait(browser, tip.is_displayed)
    assert tip.text == "KL 2.31 nats, teacher: ' mayor'"
    ActionChains(browser).move_to_element(browser.find_element(By.CSS_SELECTOR, "#detail h3")).perform()
    wait(browser, lambda: not tip.is_displayed())
    tokens[2].click()
    assert tip.text == "KL 0.00 nats, teacher: ' it'"
    tokens[2].send_keys(Keys.ARROW_LEFT)
    assert tip.text == "KL 2.31 nats, teacher: ' mayor'" and browser.switch_to.active_element == tokens[1]
    assert tokens[1].get_attribute("aria-describedby") == "tip"
    tokens[1].send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()
    # A piece that is empty goes with the next one, and both tell theirs.
    part = next(token for token in tokens if token.get_property("textContent") == " so")
    part.click()
    assert tip.text == "KL 0.50 nats, teacher: 'é'\nKL 2.31 nats, teacher: ' mayor'"


def test_a_question_can_be_linked_to_and_walked_through_by_keyboard(look: Callable[..., Chrome], run: Path) -> None:
    browser = look(run)
    Select(browser.find_element(By.ID, "filter-order")).select_by_visible_text("as in the file")
    rows = browser.find_elements(By.CSS_SELECTOR, "#questions button")
    rows[4].send_keys(Keys.ENTER)
    wait(browser, lambda: texts(browser, "#detail h3") == ["What is the capital of Peru? (4)"])
    assert browser.current_url.endswith("#trajectory=round1.ofsd.rollouts/train-4/0")
    assert [row.get_attribute("aria-current") for row in rows].index("true") == 4
    browser.find_element(By.XPATH, "//button[contains(., 'Next question')]").send_keys(Keys.SPACE)
    wait(browser, lambda: texts(browser, "#detail h3") == ["What is the capital of Peru? (5)"])
    browser.back()
    wait(browser, lambda: texts(browser, "#detail h3") == ["What is the capital of Peru? (4)"])
    for control in browser.find_elements(By.CSS_SELECTOR, ".filters select, .filters input"):
        assert browser.find_elements(By.CSS_SELECTOR, f"label[for='{control.get_attribute('id')}']")


ATTACK = (
    "</script></title></textarea></style></svg><script>document.title = 'owned'</script>"
    "<img src=x onerror=\"document.title = 'owned'\"><svg onload=alert(1)><!-- --><a href='javascript:alert(1)'>x</a>"
    "\x00\x07\x1b[31m\u202e\u2028 & &lt;b&gt; ' \" `"
)


def test_hostile_text_is_shown_as_text(look: Callable[..., Chrome], tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=document.title='owned'>"
    run = write_report(write_run(folder, questions=3, asked=3, texts=Texts(*[ATTACK] * 6)))
    for anchor in ("#trajectory=round1.ofsd.rollouts/train-2/0", "#trajectory=round1.grpo.rollouts/train-2/0"):
        browser = look(run, anchor)
        assert browser.find_element(By.TAG_NAME, "h1").text == folder.name
        shown = visible(ATTACK)
        heading = browser.find_element(By.CSS_SELECTOR, "#detail h3").get_property("textContent")
        assert heading == f"{shown} (2)" and "␀␇␛[31m⟨U+202E⟩⟨U+2028⟩" in heading
        column = browser.find_element(By.CSS_SELECTOR, ".column")
        column.find_element(By.CSS_SELECTOR, "details.found summary").click()
        assert column.find_element(By.CSS_SELECTOR, ".found li b").get_property("textContent") == shown
        assert column.find_element(By.CSS_SELECTOR, ".found li p").get_property("textContent") == f"{shown} 0"
        assert column.find_element(By.CSS_SELECTOR, ".query").get_property("textContent") == f"{shown} 0"
        assert column.find_element(By.CSS_SELECTOR, ".answer").get_property("textContent") == f"Answer: {shown}"
        assert shown.replace(" ", "") in column.get_property("textContent").replace(" ", "")
        assert browser.title == f"{folder.name}: searche1-lite", "no script of theirs has run"
        strangers = "img, iframe, object, embed, #viewer svg, #viewer a, #viewer script, #viewer style"
        assert not browser.find_elements(By.CSS_SELECTOR, strangers)


def test_a_hostile_sweep_is_shown_as_text(look: Callable[..., Chrome], tmp_path: Path) -> None:
    sweep = write_report(write_sweep(tmp_path / "sweep", ATTACK, ATTACK, ATTACK), runs=True)
    browser = look(sweep, viewer=False)
    assert browser.title != "owned" and not browser.find_elements(By.CSS_SELECTOR, "img, script")
    assert browser.find_element(By.TAG_NAME, "h1").get_property("textContent") == visible(ATTACK)
    assert browser.find_element(By.CSS_SELECTOR, "#failed td.text").get_property("textContent") == visible(ATTACK)
    assert len(browser.find_elements(By.CSS_SELECTOR, "figure.card > svg")) == 5
    browser.find_element(By.LINK_TEXT, "open").click()
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#detail .column"))
    assert browser.title == "seed 0: searche1-lite"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_in_dark(
    look: Callable[..., Chrome], run: Path, tmp_path: Path, scheme: str
) -> None:
    browser = look(run, "#trajectory=round1.ofsd.rollouts/train-3/0", scheme=scheme)
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(251, 251, 249)") == (scheme == "light")
    for details in browser.find_elements(By.CSS_SELECTOR, ".column details"):
        browser.execute_script("arguments[0].open = true", details)
    assert browser.execute_script(FAINT) == []
    browser.get(run.as_uri() + "#trajectory=round1.ofsd.evaluation/test-5/0")
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".column.here"))
    assert browser.execute_script(FAINT) == []
    browser = look(write_report(write_sweep(tmp_path / "sweep")), scheme=scheme, viewer=False)
    assert browser.execute_script(FAINT) == []


def test_every_shade_of_kl_keeps_its_text_readable(look: Callable[..., Chrome], run: Path) -> None:
    for scheme in ("light", "dark"):
        browser = look(run, scheme=scheme)
        browser.execute_script(
            "document.querySelectorAll('.column .token').forEach((t, i) => { t.className = `token k${i % 7}`; })"
        )
        grounds = browser.execute_script(
            "const steps = [...document.querySelectorAll('.scale span[class]')];"
            "return steps.map((step) => getComputedStyle(step).backgroundColor)"
        )
        assert len(set(grounds)) == 7 and browser.execute_script(FAINT) == []


def test_on_a_phone_nothing_is_wider_than_the_page(look: Callable[..., Chrome], run: Path, tmp_path: Path) -> None:
    wide = Texts(question="Who" + "o" * 300, document="x" * 2000, title="t" * 300, wrong="w" * 300)
    long = write_report(write_run(tmp_path / ("long-name-" * 12), questions=3, asked=3, texts=wide))
    sweep = write_report(write_sweep(tmp_path / "sweep", "n" * 200, "v" * 200, "e" * 2000))
    for path in (run, long, sweep):
        browser = look(path, width=375, viewer=path != sweep)
        for details in browser.find_elements(By.TAG_NAME, "details"):
            browser.execute_script("arguments[0].open = true", details)
        assert browser.execute_script("return document.documentElement.scrollWidth") == 375
    browser = look(run, width=375)
    columns = browser.find_elements(By.CSS_SELECTOR, ".column")
    assert 250 < columns[0].size["width"] < 375
    size = (
        "return Math.min(...[...document.querySelectorAll('.plot text')].map((t) => t.getBoundingClientRect().height))"
    )
    assert browser.execute_script(size) >= 10, "labels of plots stay readable"


def test_ten_thousand_trajectories_open_and_are_filtered(look: Callable[..., Chrome], tmp_path: Path) -> None:
    run = write_report(write_run(tmp_path / "large", questions=800, siblings=5, asked=700, watched=64))
    browser = look(run)
    assert count(browser) == "800 of 800 questions"
    assert len(browser.find_elements(By.CSS_SELECTOR, "#questions li")) == 40
    choose(browser, "outcome", "mixed")
    assert count(browser) == f"{sum(0 < n % 6 < 5 for n in range(800))} of 800 questions"
    choose(browser, "file", "round1.grpo evaluation")
    choose(browser, "change", "improved")
    improved = sum(is_right(1, n) and not is_right(0, n) for n in range(700))
    assert count(browser) == f"{improved} of 700 questions"
    browser.find_element(By.XPATH, "//button[contains(., 'Next ›')]").click()
    assert browser.find_element(By.ID, "page").text == f"page 2 of {-(-improved // 40)}"
