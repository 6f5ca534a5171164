"""The page of `ask --web`, in headless Chromium and over the wire: answers, stopping, tabs, keyboard, hostile text."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from chromium import FAINT, chromium, wait
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from searche1_lite.config import ModelConfig, load_config
from searche1_lite.data.trajectory import Passage
from searche1_lite.policy.adapter import save_adapter
from searche1_lite.policy.model import load_policy
from searche1_lite.report.escaping import visible
from searche1_lite.runtime.console import RichTasks
from searche1_lite.serve.ask import Asker
from searche1_lite.serve.http_server import GuardedServer
from searche1_lite.serve.place import Place, listen
from searche1_lite.serve.web.app import PAGE_PATHS, create_app
from searche1_lite.serve.web.desk import MOST_WAITING, Desk
from searche1_lite.train.session import Session
from tests.conftest import ShelfRetriever

QUESTION = "What is the mayor of Port Mitu?"
TOKEN = "correct-horse-battery-staple"
# So long an answer, if it is sampled at random, that there is time to stop it.
LONG = ["protocol.max_turn_tokens=20000", "protocol.max_completion_tokens=20000", "protocol.max_invalid_turns=1000"]
ATTACK = (
    "</script></title></textarea></style><script>document.title = 'owned'</script><img src=x onerror=\"document.title"
    " = 'owned'\"><svg onload=alert(1)><!-- --><a href='javascript:alert(1)'>x</a>\x07\x1b[31m\u202e & &lt;b&gt; ' ` \""
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that answers otherwise than the base."""
    folder = tmp_path_factory.mktemp("adapter") / "own"
    model, _ = load_policy(ModelConfig(name="demo", lora_rank=8, lora_alpha=16), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def asker(adapter: Path) -> Asker:
    return Asker(Session(load_config("demo", None, LONG), RichTasks(quiet=True), adapter), adapter)


class Page:
    """A server in a thread, and its address."""

    def __init__(self, place: Place, desk: Desk) -> None:
        self.place, self.desk = place, desk
        ready = threading.Event()
        app = create_app(desk)
        self._server = GuardedServer(app, place, PAGE_PATHS, lambda url: ready.set(), desk.stop)
        self._thread = threading.Thread(target=self._server.start)
        self._thread.start()
        assert ready.wait(60)

    def stop(self) -> None:
        self._server.stop()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def request(self, path: str, body: object = None, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.place.port, timeout=120)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is None:
            connection.request("GET", path, headers=named)
        else:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json", **named})
        return connection.getresponse()

    def ask(self, question: str, **settings: object) -> list[dict]:
        return [json.loads(line) for line in self.request("/api/ask", {"question": question, **settings})]


@contextmanager
def served(asker: Asker, token: str | None = None) -> Iterator[Page]:
    desk = Desk(asker)
    page = Page(listen("127.0.0.1", 0, token), desk)
    try:
        yield page
    finally:
        page.stop()
        desk.close()


@pytest.fixture(scope="module")
def page(asker: Asker) -> Iterator[Page]:
    with served(asker) as page:
        yield page


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as chrome:
        yield chrome


@pytest.fixture
def browser(chrome: Chrome, page: Page) -> Iterator[Chrome]:
    """With the page open; afterwards the console must hold no error."""
    look(chrome)
    chrome.get_log("browser")
    load(chrome, page)
    yield chrome
    chrome.execute_script("sessionStorage.clear()")
    assert [entry for entry in chrome.get_log("browser") if "status of 4" not in entry["message"]] == []


def load(browser: Chrome, page: Page, anchor: str = "") -> None:
    browser.get("about:blank")
    browser.get(f"{page.place.url}/{anchor}")
    wait(browser, lambda: texts(browser, ".facts dd") or browser.find_element(By.ID, "unlock").is_displayed())


def look(browser: Chrome, width: int = 1280, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def texts(browser: Chrome | WebElement, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements(By.CSS_SELECTOR, selector)]


def box(browser: Chrome) -> WebElement:
    return browser.find_element(By.ID, "question")


def status(browser: Chrome) -> str:
    return browser.find_element(By.ID, "status").text


def put(browser: Chrome, field: str, value: str) -> None:
    element = browser.find_element(By.ID, field)
    if not element.is_displayed():
        browser.find_element(By.CSS_SELECTOR, "#settings summary").click()
    element.send_keys(Keys.CONTROL, "a")
    element.send_keys(value)


def answered(browser: Chrome, count: int = 1) -> WebElement:
    """The newest answer, once that many are complete."""
    wait(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "article:not(.busy)")) >= count)
    wait(browser, lambda: not browser.find_element(By.ID, "stop").is_enabled())
    return browser.find_element(By.TAG_NAME, "article")


def ask(browser: Chrome, question: str, count: int = 1) -> WebElement:
    box(browser).clear()
    box(browser).send_keys(question, Keys.ENTER)
    return answered(browser, count)


def begin_long(browser: Chrome) -> None:
    """Asks what takes long to answer, and waits for the first words of it."""
    put(browser, "temperature", "100")
    box(browser).send_keys(QUESTION, Keys.ENTER)
    wait(browser, lambda: texts(browser, "article.busy .thought, article.busy .told, article.busy .search"))


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def idle(page: Page) -> bool:
    return not page.desk._jobs


def test_an_answer_stands_out_with_its_searches_and_sources(browser: Chrome, page: Page) -> None:
    assert browser.switch_to.active_element == box(browser)
    article = ask(browser, QUESTION)
    assert article.find_element(By.TAG_NAME, "h3").text == QUESTION
    assert texts(article, ".answer") == ["Dofa Togu"] and status(browser) == "Answer: Dofa Togu"
    assert texts(article, ".thought")[0] == "find mayor" and texts(article, ".query") == ["Port Mitu mayor"]
    assert "<think>" not in article.text
    assert browser.switch_to.active_element == box(browser), "the next question can be typed at once"
    found = article.find_element(By.CSS_SELECTOR, ".search details")
    assert "found Port Mitu" in found.text and "Port Mitu: country Rofe." not in found.text, "folded"
    found.find_element(By.TAG_NAME, "summary").click()
    assert "Port Mitu: country Rofe." in found.text
    sources = article.find_elements(By.CSS_SELECTOR, ".sources li")
    plain = next(source for source in sources if "[2717]" in source.text)
    assert plain.text == "Port Mitu [2717]\nPort Mitu: mayor Dofa Togu." and texts(plain, "mark") == ["Dofa Togu"]
    assert "1 search; 18 tokens;" in article.text
    article.find_element(By.CSS_SELECTOR, ".written summary").click()
    assert "<think> find mayor</think><search> Port Mitu mayor</search>" in article.text
    requested = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert {*map(Path, requested)} == {
        Path(f"{page.place.url}/{p}") for p in ("page.css", "page.js", "api/session", "api/ask")
    }


def test_the_page_is_used_by_keyboard_alone(browser: Chrome) -> None:
    def press(*keys: str) -> WebElement:
        ActionChains(browser).send_keys(*keys).perform()
        return browser.switch_to.active_element

    press(QUESTION, Keys.ENTER)
    answered(browser)
    names = []
    at = press(Keys.TAB)
    while at.tag_name != "body" and len(names) < 40:
        names.append(at.get_attribute("id") or at.text.partition("\n")[0].partition(" k 3")[0])
        outline = browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", at)
        assert outline == "solid" and at.is_displayed(), names[-1]
        at = press(Keys.TAB)
    assert names[:5] == ["ask", "compare", "adapter", "Settings", "save"], "what can do nothing is left out"
    assert names[5:7] == ["Ask again", "Link to this question"] and names[7].startswith("found Port Mitu")
    assert names[8] == "All that was written" and len(names) in (9, 10)
    for control in browser.find_elements(By.CSS_SELECTOR, "input:not([hidden]), textarea"):
        assert control.get_property("labels"), control.get_attribute("id")
    box(browser).send_keys(Keys.TAB, Keys.TAB)
    assert press(Keys.ENTER).get_attribute("id") == "compare", "the focus stays where it is"
    answered(browser, 2)
    press(Keys.TAB, Keys.SPACE)
    assert not browser.find_element(By.ID, "adapter").is_selected()
    press(Keys.TAB, Keys.ENTER)
    assert press(Keys.TAB).get_attribute("id") == "k"
    # Once it is reached, the first link leads past the form.
    browser.execute_script("document.activeElement.blur()")
    browser.refresh()
    wait(browser, lambda: texts(browser, ".facts dd"))
    skip = browser.find_element(By.CLASS_NAME, "skip")
    skip.send_keys(Keys.ENTER)
    assert browser.switch_to.active_element.get_attribute("id") == "answers"


def test_a_link_fills_its_question_in_and_asks_nothing(browser: Chrome, page: Page) -> None:
    ask(browser, QUESTION)
    link = browser.find_element(By.LINK_TEXT, "Link to this question").get_attribute("href")
    assert link == f"{page.place.url}/#q=What%20is%20the%20mayor%20of%20Port%20Mitu%3F" == browser.current_url
    load(browser, page, link.partition("/")[2].partition("/")[2].partition("/")[2])
    wait(browser, lambda: box(browser).get_property("value") == QUESTION)
    assert browser.switch_to.active_element == box(browser) and "Enter asks it" in status(browser)
    assert not texts(browser, "article") and idle(page)
    assert not browser.execute_script(
        "return performance.getEntriesByType('resource').some((entry) => entry.name.includes('ask'))"
    )
    box(browser).send_keys(Keys.ENTER)
    assert texts(answered(browser), ".answer") == ["Dofa Togu"]


def test_settings_count_from_the_next_question_on(browser: Chrome) -> None:
    put(browser, "k", "1")
    first = ask(browser, QUESTION)
    assert len(first.find_elements(By.CSS_SELECTOR, ".search li")) == 1 and "k=1, max_searches=4" in first.text
    put(browser, "k", "0")
    box(browser).send_keys(Keys.ENTER)
    assert "Passages (k): " in status(browser), "refused before it is sent"
    browser.find_element(By.ID, "defaults").click()
    put(browser, "max_searches", "0")
    browser.find_element(By.ID, "adapter").click()
    second = ask(browser, "What is the country of the capital of Rofe?", 2)
    (none,) = texts(second, ".answer")
    assert none == "No answer: it used up its searches (max_searches=0) and asked for more."
    assert not second.find_elements(By.CSS_SELECTOR, ".sources") and status(browser) == none


def test_the_adapter_is_switched_off_and_compared(browser: Chrome, asker: Asker) -> None:
    assert texts(browser, "#adapter-name") == ["own"]
    browser.find_element(By.ID, "adapter").click()
    base = ask(browser, QUESTION)
    assert texts(base, ".answer") == ["Dofa Togu"] and "base; k=3" in base.text
    browser.find_element(By.ID, "adapter").click()
    box(browser).clear()
    box(browser).send_keys(QUESTION)
    browser.find_element(By.ID, "compare").click()
    both = answered(browser, 2)
    columns = both.find_elements(By.CSS_SELECTOR, ".column")
    assert texts(both, "h4") == ["Base", "Adapter own"] and len({column.location["y"] for column in columns}) == 1
    assert texts(columns[0], ".query") == ["Port Mitu mayor"] and texts(columns[0], ".answer") == ["Dofa Togu"]
    expected = asker.answer(QUESTION)
    assert texts(columns[1], ".query") == [visible(search.query) for search in expected.searches]
    for column in columns:
        assert re.search(r"\d+ search(es)?.*; \d+ tokens; \d+\.\d\d s", column.text)


@pytest.mark.parametrize("way", ["escape", "button"])
def test_an_answer_is_stopped_and_the_next_one_is_as_ever(browser: Chrome, page: Page, way: str) -> None:
    begin_long(browser)
    if way == "escape":
        ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    else:
        browser.find_element(By.ID, "stop").click()
    assert texts(answered(browser), ".broken") == ["Stopped."] and status(browser) == "Stopped."
    assert browser.switch_to.active_element == box(browser)
    wait(browser, lambda: idle(page))
    browser.find_element(By.ID, "defaults").click()
    assert texts(ask(browser, QUESTION, 2), ".answer") == ["Dofa Togu"]


def test_an_answer_is_stopped_when_its_tab_is_left(browser: Chrome, page: Page) -> None:
    begin_long(browser)
    assert not idle(page)
    browser.get("about:blank")
    wait(browser, lambda: idle(page))
    load(browser, page)


def test_of_two_tabs_one_waits_for_the_other_and_says_so(browser: Chrome, page: Page) -> None:
    begin_long(browser)
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    load(browser, page)
    box(browser).send_keys(QUESTION, Keys.ENTER)
    wait(browser, lambda: status(browser) == "Waiting: one question is being answered first.")
    assert texts(browser, "article .answer") == [status(browser)]
    second = browser.current_window_handle
    browser.switch_to.window(first)
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    browser.switch_to.window(second)
    assert texts(answered(browser), ".answer") == ["Dofa Togu"], "with its own settings, not those of the other tab"
    browser.close()
    browser.switch_to.window(first)


def test_hostile_text_is_shown_as_text(
    browser: Chrome, page: Page, asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(end: str) -> str:
        """Has a passage found that would like to be more than text; the policy sees no more than its beginning."""
        text = f"Port Mitu: mayor Vepi Givo. {ATTACK} {end}."
        monkeypatch.setattr(asker.work, "retriever", ShelfRetriever([Passage("<b>9", "Port Mitu <i>", text)]))
        return text

    found("")
    answer = page.ask(QUESTION)[-1]["record"]["answer"].strip()
    text = found(answer)
    article = ask(browser, QUESTION)
    assert texts(article, ".answer") == [visible(answer)]
    article.find_element(By.CSS_SELECTOR, ".search summary").click()
    passage = article.find_element(By.CSS_SELECTOR, ".search li")
    assert passage.find_element(By.TAG_NAME, "p").get_property("textContent") == visible(text)
    assert texts(passage, "b, small") == ["Port Mitu <i>", "[<b>9]"]
    (source,) = article.find_elements(By.CSS_SELECTOR, ".sources li")
    quote = source.find_element(By.TAG_NAME, "q").get_property("textContent")
    assert "<img src=x onerror=\"document.title = 'owned'\">" in quote and "␛[31m⟨U+202E⟩" in quote
    assert texts(source, "b, small") == ["Port Mitu <i>", "[<b>9]"] and visible(answer) in texts(source, "mark")[0]
    hostile = "Who is <img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>?"
    load(browser, page, "#q=" + hostile.replace(" ", "%20"))
    wait(browser, lambda: box(browser).get_property("value") == hostile)
    box(browser).send_keys(Keys.ENTER)
    answered(browser)
    assert texts(browser, "article h3") == [hostile]
    assert browser.title == "ask: searche1-lite"
    assert not browser.find_elements(
        By.CSS_SELECTOR, "img, svg, iframe, object, main script, main style, article a:not([href^='#'])"
    )
    caught = browser.execute_script("try { document.body.innerHTML = 'x' } catch (error) { return error.name }")
    assert caught == "TypeError", "not even our own script could make markup of text"
    browser.get_log("browser")


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("", "the question is empty; write one"),
        (" \n ", "the question is empty; write one"),
        ("x" * 3000, "the question has 3,000 characters; with protocol.max_prompt_tokens=128 at most 2,048 are read"),
        ("Who\x1b[2J?", "the question holds a control character, U+001B; take it out"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(browser: Chrome, page: Page, question: str, reason: str) -> None:
    browser.execute_script("arguments[0].value = arguments[1]", box(browser), question)
    box(browser).send_keys(Keys.ENTER)
    wait(browser, lambda: reason in status(browser))
    assert "\n" not in status(browser) and not texts(browser, "article")
    response = page.request("/api/ask", {"question": question})
    assert response.status == 422 and reason in json.loads(response.read())["error"]


def test_a_prompt_beyond_its_budget_is_told_in_the_answers_place(browser: Chrome) -> None:
    article = ask(browser, "Who? " * 200)
    assert "the prompt of question" in status(browser) and texts(article, ".broken") == [status(browser)]


def test_earlier_questions_are_gone_through_and_saved(browser: Chrome, tmp_path: Path) -> None:
    ask(browser, QUESTION)
    ask(browser, "What is the country of Port Mitu?", 2)
    box(browser).send_keys(Keys.ARROW_UP)
    assert box(browser).get_property("value") == QUESTION
    box(browser).send_keys(Keys.ARROW_DOWN)
    assert box(browser).get_property("value") == "What is the country of Port Mitu?"
    assert texts(browser, "article h3") == ["What is the country of Port Mitu?", QUESTION], "the newest first"
    put(browser, "k", "2")
    browser.find_element(By.ID, "compare").click()
    answered(browser, 3)
    options = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", options)
    browser.find_element(By.ID, "save").click()
    wait(browser, lambda: (tmp_path / "answers.jsonl").is_file())
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["question"] for record in records] == [
        QUESTION, "What is the country of Port Mitu?", "What is the country of Port Mitu?"
    ]  # fmt: skip
    assert list(records[2]) == ["question", "base", "adapter"] and records[2]["base"]["stopped"] == "answer"
    assert records[0]["searches"][0]["passages"][0]["id"] == "2717"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_in_dark(browser: Chrome, scheme: str) -> None:
    look(browser, scheme=scheme)
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(251, 251, 249)") == (scheme == "light")
    browser.find_element(By.ID, "adapter").click()
    put(browser, "max_searches", "0")
    assert "No answer" in ask(browser, "What is the country of the capital of Rofe?").text
    browser.find_element(By.ID, "defaults").click()
    browser.find_element(By.ID, "compare").click()
    answered(browser, 2)
    ask(browser, "Who? " * 200, 3)
    for details in browser.find_elements(By.TAG_NAME, "details"):
        browser.execute_script("arguments[0].open = true", details)
    assert browser.execute_script(FAINT) == []


def test_on_a_phone_nothing_is_wider_than_the_page(browser: Chrome) -> None:
    look(browser, width=360)
    put(browser, "max_searches", "4")
    ask(browser, QUESTION)
    box(browser).send_keys(Keys.TAB)
    browser.find_element(By.ID, "compare").click()
    both = answered(browser, 2)
    ask(browser, "Who" + "o" * 100 + "?", 3)
    for details in browser.find_elements(By.TAG_NAME, "details"):
        browser.execute_script("arguments[0].open = true", details)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    columns = both.find_elements(By.CSS_SELECTOR, ".column")
    assert columns[0].location["y"] < columns[1].location["y"], "one below the other"


def test_a_token_is_asked_for_and_forgotten_with_the_tab(chrome: Chrome, asker: Asker) -> None:
    with served(asker, TOKEN) as page:
        assert page.request("/api/session").status == 401
        assert page.request("/api/ask", {"question": QUESTION}).status == 401
        look(chrome)
        load(chrome, page)
        field = chrome.find_element(By.ID, "token")
        wait(chrome, field.is_displayed)
        assert chrome.switch_to.active_element == field
        field.send_keys("a-token-that-is-wrong", Keys.ENTER)
        wait(chrome, lambda: status(chrome) == "That is not the token.")
        field.send_keys(TOKEN, Keys.ENTER)
        wait(chrome, lambda: not field.is_displayed() and texts(chrome, ".facts dd"))
        assert texts(ask(chrome, QUESTION), ".answer") == ["Dofa Togu"]
        assert chrome.execute_script("return [localStorage.length, document.cookie]") == [0, ""]
    box(chrome).send_keys(Keys.ENTER)
    wait(chrome, lambda: "is the server still running?" in status(chrome))
    chrome.get("about:blank")
    chrome.get_log("browser")


def test_pages_of_other_origins_can_neither_ask_nor_read(chrome: Chrome, page: Page, asker: Asker) -> None:
    with served(asker) as other:
        load(chrome, other)
        fetched = chrome.execute_async_script(
            "const [address, done] = arguments;"
            "const ask = (mode) => fetch(address + '/api/ask', {method: 'POST', mode, body: '{}'});"
            "Promise.allSettled([ask('cors'), ask('no-cors'), fetch(address + '/api/session')])"
            ".then((all) => done(all.map(({ status }) => status)))",
            page.place.url.replace("127.0.0.1", "localhost"),
        )
        assert fetched == ["rejected"] * 3, "by its own policy"
        chrome.get_log("browser")
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{page.place.port + 1}"):
        assert page.request("/api/ask", {"question": QUESTION}, origin=origin).status == 403
    assert page.request("/api/session", host="evil.example").status == 403
    assert page.request("/api/session", sec_fetch_site="cross-site", sec_fetch_mode="no-cors").status == 403
    assert page.request("/", sec_fetch_site="cross-site", sec_fetch_mode="navigate").status == 200, "a link from there"
    assert idle(page)


def test_the_page_allows_nothing_inline_and_nothing_from_elsewhere(page: Page) -> None:
    for path in PAGE_PATHS:
        response = page.request(path)
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy and "trusted-types" in policy
        text = response.read().decode()
        assert not re.search(r"https?://|innerHTML|insertAdjacent|document\.write|eval\(|style=|onclick", text)


def test_requests_choose_no_files_and_tell_none(page: Page, asker: Asker) -> None:
    for extra in ({"adapter": "/etc"}, {"path": "/etc"}, {"k": "3"}, {"k": 3.5}, {"compare": 1}, {"seed": True}):
        response = page.request("/api/ask", {"question": QUESTION, **extra})
        assert response.status == 422 and list(json.loads(response.read())) == ["error"]
    for impossible in (
        {"k": 0},
        {"k": 101},
        {"temperature": 1e-9},
        {"temperature": float("nan")},
        {"max_searches": -1},
    ):
        response = page.request("/api/ask", {"question": QUESTION, **impossible})
        assert response.status == 422 and "is impossible; give" in json.loads(response.read())["error"]
    for path in ("/../pyproject.toml", "/page.html", "/%2e%2e/cli.py", "/api", "/openapi.json"):
        assert page.request(path).status == 404
    assert page.request("/api/ask").status == 405
    session = json.loads(page.request("/api/session").read())
    assert session["adapter"] == "own" and str(asker.adapter) not in json.dumps(session)


def test_what_happens_is_streamed_and_adds_up(page: Page, asker: Asker) -> None:
    notes = page.ask(QUESTION)
    assert [note["type"] for note in notes if note["type"] != "reasoned"] == ["began", "searched", "found", "answer"]
    assert notes[-1]["record"] | {"seconds": 0} == asker.answer(QUESTION).to_dict() | {"seconds": 0}
    with page.request("/api/ask", {"question": QUESTION, "temperature": 100.0}) as response:
        assert json.loads(response.readline())["type"] == "began" and json.loads(response.readline())
        assert not idle(page), "told while there is more to come"
    sides = [note["side"] for note in page.ask(QUESTION, compare=True) if note["type"] == "began"]
    assert sides == ["base", "adapter"]


def test_no_more_questions_wait_than_there_is_room_for(page: Page, asker: Asker) -> None:
    waiting = []
    for number in range(MOST_WAITING + 1):
        response = page.request("/api/ask", {"question": QUESTION, "temperature": 100.0})
        first = json.loads(response.readline())
        assert first == ({"type": "waiting", "ahead": number} if number else {"type": "began", "side": "adapter"})
        waiting.append(response)
    refused = page.request("/api/ask", {"question": QUESTION})
    assert refused.status == 503 and "many questions wait" in json.loads(refused.read())["error"]
    for response in waiting:
        response.close()
    wait_until(lambda: idle(page))
    assert page.ask(QUESTION)[-1]["answer"] == "Dofa Togu", "those that nobody waits for are not answered"


def test_questions_that_come_at_once_take_no_more_places_than_there_are(page: Page) -> None:
    body = json.dumps({"question": QUESTION, "temperature": 100.0}).encode()
    head = f"POST /api/ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    request = f"{head}Content-Type: application/json\r\n\r\n".encode() + body
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", page.place.port), 120)) for _ in range(64)
        ]
        for client in clients:
            client.sendall(request)
        taken = [client.recv(12).endswith(b"200") for client in clients]
    assert taken.count(True) == MOST_WAITING + 1
    wait_until(lambda: idle(page))
    assert page.ask(QUESTION)[-1]["answer"] == "Dofa Togu", "those that nobody waits for are not answered"


def test_a_search_that_hangs_keeps_neither_a_stop_nor_the_end_waiting(
    asker: Asker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, released = threading.Event(), threading.Event()

    class Hanging:
        name = "hanging"

        def search(self, queries: list[str], k: int) -> list:
            asked.set()
            assert released.wait(120)
            return [[] for _ in queries]

    monkeypatch.setattr(asker.work, "retriever", Hanging())
    with served(asker) as page:
        response = page.request("/api/ask", {"question": QUESTION})
        assert asked.wait(60)
        page.desk.stop()
        assert json.loads(response.read().splitlines()[-1]) == {"type": "stopped"}
    assert not released.is_set(), "it is at an end while the search is not"
    released.set()


def test_a_failure_is_told_in_a_line_and_the_session_goes_on(
    page: Page, asker: Asker, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        name = "broken"

        def search(self, queries: list[str], k: int) -> list:
            raise RuntimeError("no index at /secret/place")

    monkeypatch.setattr(asker.work, "retriever", Broken())
    notes = page.ask(QUESTION)
    assert notes[-1] == {"type": "error", "error": "answering failed; the terminal says more"}
    assert capfd.readouterr().err == "error: RuntimeError: no index at /secret/place\n"
    monkeypatch.undo()
    assert page.ask(QUESTION)[-1]["answer"] == "Dofa Togu"


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "searche1_lite", "ask", "--preset", "demo", "--web", *words]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_a_signal_and_stops_its_answers(tmp_path: Path, number: int) -> None:
    with subprocess.Popen(
        [*command(tmp_path, "--port", "0", *LONG)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SEARCHE1_LITE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stderr
        match = None
        while match is None:
            line = process.stderr.readline()
            assert line, "it ended"
            match = re.fullmatch(r"serving on http://127\.0\.0\.1:(\d+) \(Ctrl-C ends it\)\n", line)
        connection = http.client.HTTPConnection("127.0.0.1", int(match[1]), timeout=120)
        asked = json.dumps({"question": QUESTION, "temperature": 100})
        connection.request("POST", "/api/ask", asked, {"content-type": "application/json"})
        response = connection.getresponse()
        assert json.loads(response.readline()) == {"type": "began", "side": "adapter"}
        process.send_signal(number)
        assert response.read().endswith(b'{"type": "stopped"}\n')
        assert process.wait(60) == 0 and process.stderr.read() == ""


def test_a_mistake_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, reason in (
            (["--port", port], f"port {port} of 127.0.0.1 is taken; end what uses it, or give another with --port"),
            (["--host", "0.0.0.0"], "0.0.0.0 can be reached from other machines: give a token with --token"),
            (["--host", "0.0.0.0", "--token", "weak"], "the token of --token has to have 16 or more"),
            (["Who?"], "--web takes its questions on the page"),
            (["--json"], "--web takes its questions on the page"),
            (["--adapter", "nowhere"], "nowhere holds no adapter"),
        ):
            ran = subprocess.run(command(tmp_path, *words), cwd=tmp_path, capture_output=True, text=True)
            assert ran.returncode == 2 and ran.stdout == ""
            assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1 and reason in ran.stderr
