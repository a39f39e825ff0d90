"""A drawing page with live predictions, served on localhost."""

import json
import os
import sys
import threading
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image, ImageDraw

from support.exits import RunError

PAGE = Path(__file__).with_suffix(".html")
MAX_BYTES = 1_000_000  # of a drawing
PORT = 8000  # or any free port if it is taken
HOSTS = "127.0.0.1", "localhost"


class Handler(BaseHTTPRequestHandler):
    """GET / returns the page; POST / returns JSON: `server.classify` of the drawing in the body."""

    timeout = 10  # socket timeout, seconds
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(explain)s"

    def do_GET(self):
        if self.check_request():
            self.answer("text/html; charset=utf-8", PAGE.read_bytes())

    def do_POST(self):
        if not self.check_request():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BYTES:
            self.send_error(413, explain=f"Content-Length must be given and at most {MAX_BYTES:,} bytes")
            return
        try:
            answer = self.server.classify(draw(self.rfile.read(int(length))))
        except RunError as error:
            self.send_error(422, explain=str(error))
            return
        self.answer("application/json", json.dumps(answer).encode())

    def check_request(self):
        """Sends an error and returns False for other paths, other hosts and cross-origin requests.

        The check of the Host header rejects DNS rebinding.
        """
        origin = self.headers.get("Origin", "http://localhost").removeprefix("http://")
        if any(name.split(":")[0] not in HOSTS for name in (self.headers.get("Host", ""), origin)):
            port = self.server.server_port
            advice = f"forward the port with ssh -L {port}:127.0.0.1:{port} HOST"
            self.send_error(403, explain=f"this page is only for http://{HOSTS[0]}:{port}/ ({advice})")
        elif urlsplit(self.path).path != "/":
            self.send_error(404, explain="the only page is /")
        else:
            return True
        return False

    def answer(self, content_type, content):
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        """Disables request logging."""


def draw(content):
    """Draws strokes with a round pen, as the page does.

    The page sends strokes, as some browsers change the pixels that a page reads from its canvas.

    Args:
        content: bytes of JSON: a list of strokes, each a list of points [x, y] from 0 to 280.

    Returns:
        A `PIL.Image` of 280 x 280 pixels, black on white.

    Raises:
        RunError: the content is not of this form.
    """
    image = Image.new("L", (280, 280), 255)
    pen = ImageDraw.Draw(image)
    try:
        for stroke in json.loads(content):
            points = [(float(x), float(y)) for x, y in stroke]
            pen.line(points, fill=0, width=20)
            for x, y in points:
                pen.ellipse((x - 10, y - 10, x + 10, y + 10), fill=0)
    except (OverflowError, TypeError, ValueError) as error:
        raise RunError("the drawing is not a list of strokes") from error
    return image


class Server(ThreadingHTTPServer):
    allow_reuse_address = os.name != "nt"  # on Windows, a second server would share the port of the first

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # the client has disconnected
            super().handle_error(request, client_address)


def make_server(classify):
    """Returns a server on 127.0.0.1 that is not yet serving.

    Args:
        classify: function of a `PIL.Image`; returns an object for `json.dumps`, or raises RunError.
    """
    try:
        server = Server((HOSTS[0], PORT), Handler)
    except OSError:
        server = Server((HOSTS[0], 0), Handler)
    server.classify = classify
    return server


def serve(classify):
    """Serves the page until Ctrl-C, and opens it if there is a browser; `classify` as for `make_server`."""
    with make_server(classify) as server:
        address = f"http://{HOSTS[0]}:{server.server_port}/"
        print(f"Draw a digit on {address} (Ctrl-C to stop)")
        # In a thread: a browser in the terminal would otherwise wait for the server, and the server for it.
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        server.serve_forever()
