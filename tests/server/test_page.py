"""The page in a browser: a conversation, its speed, what the model says of itself, and errors."""

from __future__ import annotations

import shutil
import threading

import pytest
import served
import uvicorn

from awq_jax.serve import Engine
from awq_jax.server.app import app
from awq_jax.server.metrics import Metrics
from awq_jax.server.running import Server
from awq_jax.server.service import Settings

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="apt-get install chromium chromium-driver")


@pytest.fixture(scope="module")
def address():
    engine = Engine(served.model(num_hidden_layers=1, max_position_embeddings=256), slots=1, length=200, chunk=64)
    made, ready, found = app(engine, Settings("tiny", ("secret",)), Metrics()), threading.Event(), []
    server = Server(
        uvicorn.Config(made, log_config=None, port=0), made.state.service, lambda at: (found.append(at), ready.set())
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    assert ready.wait(20)
    yield found[0]
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


def test_a_conversation(address, browser):
    browser.get(address)

    def one(name):
        return browser.find_element(By.ID, name)

    def until(says):
        WebDriverWait(browser, 30).until(lambda _: says())

    until(lambda: "API key" in one("explain").get_attribute("textContent"))
    browser.execute_script("document.querySelector('details').open = true")
    one("key").send_keys("secret\t")
    until(lambda: one("model").text == "tiny")
    assert "1 slots of 200 tokens" in one("explain").text
    one("temperature").send_keys("0")
    one("most").send_keys("12")
    for turn in (1, 2):
        one("text").send_keys(f"Hello {turn}\n")
        until(lambda turn=turn: len(browser.find_elements(By.CLASS_NAME, "assistant")) == turn)
        until(lambda: one("send").text == "Send" and "tokens/s" in one("speed").text)
        shown = [box.get_attribute("textContent") for box in browser.find_elements(By.CLASS_NAME, "message")]
        assert shown[-2] == f"Hello {turn}"
        assert shown[-1]
        browser.execute_script("document.getElementById('speed').textContent = ''")
    one("most").clear()
    one("text").send_keys("x" * 300 + "\n")
    until(lambda: browser.find_elements(By.CLASS_NAME, "error"))
    assert "there is room for 200" in browser.find_element(By.CLASS_NAME, "error").text
    one("reset").click()
    assert not browser.find_elements(By.CLASS_NAME, "message")
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE" and "40" not in e["message"]] == []
