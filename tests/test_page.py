"""The drawing page: its server, and the page in a real browser."""

import base64
import http.client
import io
import json
import os
import re
import shutil
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

import pytest
from PIL import Image, ImageChops, ImageFilter

import evaluate
from conftest import WEIGHTS
from support import checkpoint
from support.handwriting import page
from support.handwriting.reading import ImageError, read_digit


@pytest.fixture
def port(monkeypatch, capsys):
    """The port of the page's server, which reads with a trained Model_3; it ends as with Ctrl-C."""
    made = []
    monkeypatch.setattr(page, "PORT", 0)  # any free one
    monkeypatch.setattr(page.webbrowser, "open", made.append)
    real = page.make_server

    def make_server(classify):
        made.append(real(classify))
        return made[-1]

    monkeypatch.setattr(page, "make_server", make_server)
    args = evaluate.parse_args([str(WEIGHTS / "Model_3.pth"), "--draw", "--device", "cpu"])
    models = [checkpoint.load(WEIGHTS / "Model_3.pth")]
    serving = threading.Thread(target=evaluate.serve_page, args=(models, args), daemon=True)
    serving.start()
    while len(made) < 2:
        time.sleep(0.01)
    server, address = made
    assert server.server_address[0] == "127.0.0.1"
    assert address == f"http://127.0.0.1:{server.server_port}/"
    assert capsys.readouterr().out == f"Draw a digit on {address} (Ctrl-C to stop)\n"
    yield server.server_port
    server.shutdown()
    serving.join()


def ask(port, body=None, method="POST", path="/", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    kind = {"GET": "text/html", "POST": "application/json"}[method]
    kind = kind if answer.status == 200 else "text/plain"
    assert answer.getheader("Content-Type").split(";")[0] == kind
    return answer.status, answer.read().decode()


@pytest.fixture
def serve():
    """Serves the page with another function than `evaluate.py`'s; returns the port."""
    servers = []

    def serve(classify):
        servers.append(page.make_server(classify))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].server_port

    def stop():
        while servers:
            server = servers.pop()
            server.shutdown()
            server.server_close()

    serve.stop = stop
    yield serve
    stop()


SEVEN = json.dumps([[(70, 50), (210, 50), (130, 230)]])


def test_a_drawing_is_read_as_the_same_picture_from_a_file(port, tmp_path, call):
    status, text = ask(port, SEVEN)
    answer = json.loads(text)
    page.draw(SEVEN).save(tmp_path / "seven.png")
    output = call("evaluate.py", WEIGHTS / "Model_3.pth", "--device", "cpu", "--images", "seven.png").stdout
    probabilities = answer["probabilities"]
    assert status == 200 and len(answer["image"]) == 784 and max(answer["image"]) == 255
    assert probabilities.index(max(probabilities)) == 7 and sum(probabilities) == pytest.approx(1)
    assert f"seven.png: 7 ({max(probabilities):.1%}), " in output


def test_strokes_are_drawn_as_thick_and_as_round_as_on_the_page():
    image = page.draw("[[[50, 100], [200, 100]], [[250, 250]]]")
    assert image.getbbox() == (0, 0, 280, 280) and image.size == (280, 280)
    assert ImageChops.invert(page.draw("[[[100, 50]]]")).getbbox() == (90, 40, 111, 61)
    for x, y, gray in [
        (41, 100, 0),
        (38, 100, 255),
        (125, 91, 0),
        (125, 88, 255),
        (125, 112, 255),
        (250, 259, 0),
        (257, 257, 0),
        (259, 259, 255),
    ]:
        assert image.getpixel((x, y)) == gray, (x, y)


def test_an_invalid_drawing_gets_a_status_and_a_message_and_the_server_keeps_running(port):
    for body in "7", "", "[7]", "[[7]]", '[[["a", "b"]]]', '{"a": 1}', b"\xff\x00", f"[[[{10**400}, 1]]]":
        assert ask(port, body) == (422, "the drawing is not a list of strokes"), body
    assert ask(port, "[]") == (422, "the image is empty: nothing stands out from the background")
    for length in "8000000", "-1", "seven", "":
        sentence = f"Content-Length must be given and at most {page.MAX_BYTES:,} bytes"
        assert ask(port, b"7", Content_Length=length) == (413, sentence)
    assert ask(port, json.dumps(1_000 * json.loads(SEVEN)))[0] == 200  # a long drawing


def test_other_sites_and_other_paths_are_rejected(port):
    picture = SEVEN
    assert ask(port, method="GET")[1].startswith("<!DOCTYPE html>")
    assert ask(port, picture, Origin=f"http://127.0.0.1:{port}")[0] == 200
    assert ask(port, picture, Host="localhost:9000", Origin="http://localhost:9000")[0] == 200  # ssh -L
    advice = f"forward the port with ssh -L {port}:127.0.0.1:{port} HOST"
    refusal = 403, f"this page is only for http://127.0.0.1:{port}/ ({advice})"
    for headers in (
        {"Host": "["},
        {"Host": "evil.example"},
        {"Host": "localhost.evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
        {"Origin": "http://localhost.evil.example"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ):
        assert ask(port, picture, **headers) == ask(port, method="GET", **headers) == refusal
    assert ask(port, method="GET", path="/?vscodeBrowserReqId=1")[0] == 200
    assert ask(port, picture, path="/other")[0] == 404
    assert ask(port, method="GET", path="/../train.py")[0] == 404


def test_a_browser_in_the_terminal_does_not_block_the_server(monkeypatch):
    """It runs in the foreground, and the page is served to it."""
    pages, servers, make_server = [], [], page.make_server
    monkeypatch.setattr(page, "make_server", lambda read: servers.append(make_server(read)) or servers[0])

    def show(address):
        try:
            pages.append(urlopen(address, timeout=10).read())
        except OSError as error:
            pages.append(error)

    monkeypatch.setattr(page.webbrowser, "open", show)
    threading.Thread(target=page.serve, args=(None,), daemon=True).start()
    while not pages:
        time.sleep(0.01)
    servers[0].shutdown()
    assert pages == [page.PAGE.read_bytes()]


def test_a_silent_client_is_disconnected_after_a_while():
    assert 1 <= page.Handler.timeout <= 10


def test_twenty_requests_four_at_once_and_clients_that_hang_up(port, capsys):
    reset = struct.pack("ii", 1, 0)  # close without waiting, so that writing to the client fails
    for start in b"GET / HTTP/1.1", b"POST / HTTP/1.1\r\nContent-Length: 5000", b"GET /other HTTP/1.1":
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                client.sendall(start + b"\r\nHost: 127.0.0.1\r\n\r\nhalf")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(port, SEVEN), range(20)))
    assert {status for status, _ in answers} == {200} and len({text for _, text in answers}) == 1
    assert capsys.readouterr().err == ""


def test_a_free_port_is_used_if_the_usual_one_is_taken(port, monkeypatch):
    monkeypatch.setattr(page, "PORT", port)
    other = page.make_server(None)
    assert other.server_port != port and other.server_address[0] == "127.0.0.1"
    other.server_close()


@pytest.mark.skipif(os.name == "nt", reason="Windows would let two servers share a port")
def test_the_usual_port_is_used_again_at_once(monkeypatch):
    monkeypatch.setattr(page, "PORT", 0)
    for _ in range(2):
        server = page.make_server(None)
        assert page.PORT in (0, server.server_port)
        monkeypatch.setattr(page, "PORT", server.server_port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with socket.create_connection(("127.0.0.1", page.PORT)) as client:
            client.sendall(b"GET / HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
            while client.recv(65_536):  # until the server closes the connection
                pass
        server.shutdown()
        server.server_close()


def test_the_page_needs_nothing_from_the_network():
    text = page.PAGE.read_text()
    assert "http://" not in text and "https://" not in text and "src=" not in text
    assert '<link rel="icon" href="data:,">' in text


STROKES = {  # points of a square of 100 x 100
    0: [[(50, 15), (30, 25), (22, 50), (30, 78), (50, 88), (70, 78), (78, 50), (70, 25), (50, 15)]],
    1: [[(50, 12), (50, 88)]],
    3: [[(28, 22), (50, 12), (70, 24), (66, 42), (48, 48), (68, 56), (74, 74), (52, 88), (28, 80)]],
    7: [[(25, 18), (75, 18), (60, 50), (45, 88)]],
}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless Chromium."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromium-driver: see .ci/run")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync":
        options.add_argument(f"--{flag}")
    options.add_argument("--disable-background-networking")
    options.add_argument("--disable-component-update")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.add_argument("--window-size=760,900")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    chromium = webdriver.Chrome(options=options, service=service)
    yield chromium
    chromium.quit()


@pytest.fixture
def browser(chromium):
    """The same Chromium for all tests, without the last one's screen."""
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {})
    return chromium


class Drawer:
    """Draws on the page with a mouse, a pen or a finger, and reads what it shows."""

    def __init__(self, browser, port):
        self.browser = browser
        browser.get(f"http://127.0.0.1:{port}/")
        self.paper = browser.find_element("id", "paper")

    def draw(self, strokes, kind="mouse", scale=1.0, left=0.0, top=0.0):
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        size = self.paper.size["width"]
        for stroke in strokes:
            actions = ActionChains(self.browser, 10, devices=[PointerInput(kind, kind)])
            pointer = actions.w3c_actions.pointer_action
            points = [((left + scale * x) / 100 - 0.5, (top + scale * y) / 100 - 0.5) for x, y in stroke]
            for step, (x, y) in enumerate(points):
                pointer.move_to(self.paper, round(x * size), round(y * size))
                if not step:
                    pointer.pointer_down()
            pointer.pointer_up()
            actions.perform()
        return self.answer()

    def answer(self):
        """The digit with the longest bar, once no request is pending."""
        deadline = time.monotonic() + 10
        while self.browser.execute_script("return busy || (strokes.length && asked !== changes)"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        best = self.browser.find_elements("css selector", "#bars .best th")
        return int(best[0].text) if best else None

    def seen(self):
        """The image that the model saw, a list of 784 pixels, or None."""
        if not self.browser.find_element("id", "figure").is_displayed():
            return None
        script = "return [...seen.getImageData(0, 0, 28, 28).data].filter((_, i) => i % 4 === 0)"
        return self.browser.execute_script(script)


def test_digits_drawn_in_a_browser_are_read_as_they_are_drawn(port, browser):
    drawer = Drawer(browser, port)
    assert drawer.answer() is None and drawer.seen() is None
    for digit, strokes in STROKES.items():
        assert drawer.draw(strokes) == digit
        browser.find_element("id", "clear").click()
        assert drawer.answer() is None and drawer.seen() is None
    for kind in "touch", "pen":
        assert drawer.draw(STROKES[3], kind) == 3
        browser.find_element("css selector", "body").send_keys("\ue00c")  # Escape
        assert drawer.answer() is None
    assert drawer.draw(STROKES[7], scale=0.3, left=65, top=5) == 7  # small, in a corner
    browser.find_element("id", "clear").click()


def test_the_answer_is_large_and_undo_and_keys_take_strokes_back(port, browser):
    drawer = Drawer(browser, port)
    shown = lambda name: browser.find_element("id", name).text  # noqa: E731
    assert shown("invitation") == "Draw a digit here" and shown("digit") == ""
    drawer.draw(STROKES[1])
    assert shown("invitation") == "" and shown("digit") == "1" and re.fullmatch(r"\d+\.\d%", shown("message"))
    drawer.draw([[(85, 20), (85, 80)]])
    assert "this looks like more than one digit" in shown("message")
    browser.find_element("id", "undo").click()
    assert drawer.answer() == 1 and "digit" not in shown("message")
    body = browser.find_element("css selector", "body")
    for key in "\ue003", "\ue017", "\ue00c":  # Backspace, Delete, Escape
        drawer.draw(STROKES[1])
        body.send_keys(key)
        assert drawer.answer() is None and shown("digit") == ""
    for key, left in (("z",), 2), (("\ue009", "z"), 1), (("x",), 2), (("\ue03d", "z"), 1):  # \ue03d: Command
        clear = browser.find_element("id", "clear")
        clear.click()
        for stroke in [[(30, 20), (30, 80)]], [[(70, 20), (70, 80)]]:
            drawer.draw(stroke)
        body.send_keys(*key)
        assert browser.execute_script("return strokes.length") == left, key


def test_the_paper_shows_where_the_pointer_was_and_what_the_model_reads(port, browser):
    """Line, corner, dot, and what is left after an undo and after both buttons."""
    drawer = Drawer(browser, port)
    strokes = [(20, 30), (80, 30)], [(20, 80), (40, 40), (60, 80)], [(80, 60)]
    steps = [lambda stroke=stroke: drawer.draw([stroke]) for stroke in strokes]
    steps += [browser.find_element("id", name).click for name in ("undo", "undo", "clear")]
    known = {}
    for number, step in zip((1, 2, 3, 2, 1, 0), steps):
        step()
        drawer.answer()
        found = browser.execute_script("return strokes")
        assert len(found) == number and known.setdefault(number, found) == found
        for points, stroke in zip(strokes, found):
            ends = [2.8 * value for point in (points[0], points[-1]) for value in point]
            assert stroke[0] + stroke[-1] == pytest.approx(ends, abs=2)
        url = browser.execute_script("return paper.toDataURL()")
        shown = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("L")
        drawn = page.draw(json.dumps(found))
        assert drawer.seen() == (read_digit(drawn).flatten().tolist() if found else None)
        missing = ImageChops.subtract(shown, drawn.filter(ImageFilter.MaxFilter(3)))  # one pixel may differ
        extra = ImageChops.subtract(drawn.filter(ImageFilter.MinFilter(3)), shown)
        assert sum(missing.histogram()[200:]) + sum(extra.histogram()[200:]) < 10, number


def test_the_bars_are_as_long_as_their_probabilities(port, browser):
    drawer = Drawer(browser, port)
    drawer.draw(STROKES[3])
    for row in browser.find_elements("css selector", "#bars tr"):
        bar, percent = row.find_element("css selector", "i"), row.find_elements("css selector", "td")[1].text
        whole = bar.find_element("xpath", "..").rect["width"] - 16  # without its padding
        assert bar.rect["width"] / whole == pytest.approx(float(percent[:-1]) / 100, abs=0.02)
    browser.find_element("id", "clear").click()
    assert drawer.answer() is None
    for row in browser.find_elements("css selector", "#bars tr"):
        bar, (_, percent) = row.find_element("css selector", "i"), row.find_elements("css selector", "td")
        assert (bar.rect["width"], percent.text) == (0, "")


@pytest.mark.parametrize("width, height", [(390, 844), (844, 390), (1280, 720), (360, 640)])
def test_everything_fits_without_scrolling_and_follows_dark_mode(port, browser, width, height):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": width < 1000}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    drawer = Drawer(browser, port)
    assert drawer.draw(STROKES[7], "touch" if width < 1000 else "mouse") == 7
    script = """
        return [...document.querySelectorAll("body *")].every(part => {
            const box = part.getBoundingClientRect();
            return box.bottom <= innerHeight + 1 && box.right <= innerWidth + 1 && box.left >= -1;
        });
    """
    assert browser.execute_script(script)
    assert browser.execute_script("return document.documentElement.scrollHeight <= innerHeight")
    assert browser.execute_script("return innerWidth") == width  # not zoomed out
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    for part, key, value in (
        ("h1", "color", "rgb(255, 255, 255)"),
        ("#bars i", "background-color", "rgb(86, 180, 233)"),  # lighter than on a light page
        ("#bars .best", "font-weight", "700"),
        ("#seen", "image-rendering", "pixelated"),
    ):
        assert browser.execute_script(script, part, key) == value


def test_the_page_says_if_the_server_has_stopped(browser, serve):
    answer = {"probabilities": [0.1] * 10, "image": [0] * 784, "warning": ""}
    drawer = Drawer(browser, serve(lambda content: answer))
    serve.stop()
    for _ in range(2):  # a connection that the browser opened in advance may answer the first time
        drawer.draw(STROKES[1])
    assert drawer.answer() is None and not browser.find_element("id", "figure").is_displayed()
    assert browser.find_element("id", "message").text.startswith("The server has stopped")


def test_a_bug_in_the_server_is_shown_on_standard_error(serve, capfd):
    with pytest.raises(http.client.RemoteDisconnected):
        ask(serve(lambda image: 1 / 0), SEVEN)
    serve.stop()
    assert "ZeroDivisionError" in capfd.readouterr().err


@pytest.fixture
def requests(monkeypatch):
    """The method, the path and the status of each answer of the server."""
    requests, send_response = [], page.Handler.send_response

    def send(handler, status, *rest):
        requests.append((handler.command, handler.path, status))
        send_response(handler, status, *rest)

    monkeypatch.setattr(page.Handler, "send_response", send)
    return requests


def test_a_tap_is_a_dot_and_nothing_is_sent_before_there_is_ink(port, browser, requests):
    drawer = Drawer(browser, port)
    browser.find_element("id", "undo").click()
    browser.find_element("id", "clear").click()
    assert drawer.answer() is None and {method for method, _, _ in requests} == {"GET"}
    assert not browser.find_element("id", "figure").is_displayed()
    assert drawer.draw([[(50, 50)]]) is not None and sum(drawer.seen()) > 50 * 255
    assert browser.find_element("id", "message").text.endswith(": this may not be a digit")
    drawer.draw(STROKES[3])
    assert {(path, status) for _, path, status in requests} == {("/", 200)}  # and no favicon is asked for


def events(browser, *steps):
    """Sends pointer events to the paper: type, x and y in percent, and further fields."""
    for kind, x, y, fields in steps:
        script = """
            const [kind, x, y, fields] = arguments, box = paper.getBoundingClientRect();
            paper.setPointerCapture = id => window.captured = id;
            const place = {clientX: box.left + box.width * x / 100, clientY: box.top + box.height * y / 100};
            paper.dispatchEvent(new PointerEvent(kind, {bubbles: true, ...place, ...fields}));
        """
        browser.execute_script(script, kind, x, y, fields)


def test_one_finger_or_the_main_button_draws_and_a_lost_release_ends_the_stroke(port, browser):
    drawer = Drawer(browser, port)
    first, second = {"pointerId": 5, "buttons": 1}, {"pointerId": 6, "buttons": 1}
    events(browser, ("pointerdown", 30, 20, first), ("pointerdown", 80, 20, second))
    events(
        browser,
        ("pointermove", 30, 80, first),
        ("pointermove", 80, 80, second),
        ("pointerup", 80, 80, second),
    )
    events(browser, ("pointermove", 30, 90, first), ("pointerup", 30, 90, first))
    assert (
        browser.execute_script("return strokes.map(stroke => stroke.length)") == [3] and drawer.answer() == 1
    )
    assert browser.execute_script("return captured") == 5  # so that the stroke goes on outside the paper
    events(browser, ("pointerdown", 50, 50, {"pointerId": 7, "button": 2, "buttons": 2}))
    events(browser, ("pointermove", 60, 50, {"pointerId": 7, "buttons": 2}))
    assert browser.execute_script("return strokes.length") == 1
    events(browser, ("pointerdown", 50, 20, first), ("pointermove", 50, 30, {"pointerId": 5, "buttons": 0}))
    events(browser, ("pointermove", 60, 60, first))
    assert browser.execute_script("return strokes.map(stroke => stroke.length)") == [3, 1]
    events(browser, ("pointerdown", 20, 20, first), ("pointercancel", 20, 20, first))
    events(browser, ("pointerdown", 80, 20, second), ("pointerup", 80, 20, second))
    assert browser.execute_script("return strokes.splice(2).length") == 2
    for end in "dispatchEvent(new Event('blur'))", "undo()":
        events(browser, ("pointerdown", 20, 20, second))
        browser.execute_script(end)
        events(browser, ("pointermove", 30, 30, second), ("pointermove", 40, 40, second))
    assert browser.execute_script("return strokes.map(stroke => stroke.length)") == [3, 1, 1]


def test_an_answer_to_a_drawing_that_was_cleared_is_dropped(browser, serve):
    waiting, release = threading.Event(), threading.Event()

    def read(content):
        waiting.set()
        release.wait(10)
        return {"probabilities": [1.0] + [0.0] * 9, "image": [255] * 784, "warning": ""}

    drawer = Drawer(browser, serve(read))
    events(
        browser,
        ("pointerdown", 50, 50, {"pointerId": 1, "buttons": 1}),
        ("pointerup", 50, 50, {"pointerId": 1}),
    )
    assert waiting.wait(10)
    browser.find_element("id", "clear").click()
    release.set()
    while browser.execute_script("return busy"):
        time.sleep(0.01)
    assert drawer.answer() is None and browser.find_element("id", "digit").text == ""


def test_the_reason_why_a_drawing_cannot_be_read_replaces_the_answer(browser, serve):
    answers = [{"probabilities": [1.0] + [0.0] * 9, "image": [255] * 784, "warning": ""}]

    def read(content):
        if not answers:
            raise ImageError("the drawing is too faint")
        return answers.pop()

    drawer = Drawer(browser, serve(read))
    for expected, message in (0, "100.0%"), (None, "the drawing is too faint"):
        events(
            browser,
            ("pointerdown", 50, 50, {"pointerId": 1, "buttons": 1}),
            ("pointerup", 50, 50, {"pointerId": 1}),
        )
        assert drawer.answer() == expected and browser.find_element("id", "message").text == message
    assert browser.find_element("id", "digit").text == ""


def test_the_page_reads_as_text_and_announces_the_answer_once(port, browser):
    drawer = Drawer(browser, port)
    browser.execute_script("window.timers = []; setTimeout = (call, delay) => timers.push([call, delay])")
    browser.execute_script("clearTimeout = id => delete timers[id - 1]")
    assert drawer.draw(STROKES[3]) == 3
    browser.execute_script("timers = timers.filter(call => call)")
    assert browser.execute_script("return timers.length") == 1  # the others were replaced
    browser.execute_script("timers[0][0]()")
    assert browser.execute_script("return timers[0][1]") >= 500
    assert re.fullmatch(r"3 \d+\.\d%", browser.execute_script("return $('announcement').textContent"))
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    names = {(node["role"]["value"], node["name"]["value"]) for node in nodes if node.get("name")}
    assert browser.find_element("id", "announcement").aria_role == "status"
    assert ("image", "Paper to draw a digit on") in names and ("image", "28 x 28 pixels") in names
    assert ("table", "Probability of each digit") in names and ("rowheader", "3") in names
    best = browser.find_element("css selector", "#bars .best").text
    assert re.fullmatch(r"3\s+\d+\.\d%", best)
    browser.find_element("id", "clear").send_keys("\ue007")  # Enter
    assert browser.switch_to.active_element.get_attribute("id") == "clear" and drawer.answer() is None


def test_all_of_the_paper_can_be_reached_at_400_percent(port, browser):
    metrics = {"width": 320, "height": 256, "deviceScaleFactor": 4, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    drawer = Drawer(browser, port)
    box = browser.execute_script("return paper.getBoundingClientRect().toJSON()")
    assert box["left"] >= 0 and box["top"] >= 0 and box["right"] <= 320 and box["bottom"] <= 256
    assert drawer.draw(STROKES[7]) == 7
