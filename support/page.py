"""A page to draw a digit on and see it read, served to this computer alone."""

import contextlib
import json
import socket
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

PAGE = Path(__file__).with_suffix(".html")
LARGEST = 1_000_000  # bytes of a picture
PORTS = range(8000, 8100)


class Handler(BaseHTTPRequestHandler):
    """Answers GET / with the page, and POST / of a picture with what `server.read` says of it."""

    timeout = 10  # seconds that a client may say nothing

    def do_GET(self):
        if self.is_allowed():
            self.answer(200, "text/html; charset=utf-8", PAGE.read_bytes())

    def do_POST(self):
        if not self.is_allowed():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            self.refuse(413, f"a picture has at most {LARGEST:,} bytes, and says how many")
            return
        try:
            answer = self.server.read(self.rfile.read(int(length)))
        except ValueError as error:
            self.refuse(422, str(error))
            return
        self.answer(200, "application/json", json.dumps(answer).encode())

    def is_allowed(self):
        """Whether the request comes from this page: another site's browser tab names itself, or its host."""
        hosts = [urlsplit(f"//{self.headers.get('Host', '')}").hostname]
        if "Origin" in self.headers:
            hosts.append(urlsplit(self.headers["Origin"]).hostname)
        if any(host not in ("127.0.0.1", "localhost") for host in hosts):
            self.refuse(403, "this page is for 127.0.0.1 alone")
        elif self.path != "/":
            self.refuse(404, "there is one page here: /")
        else:
            return True
        return False

    def refuse(self, status, sentence):
        self.answer(status, "text/plain; charset=utf-8", sentence.encode())

    def answer(self, status, kind, content):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def finish(self):
        """Reads the rest of a refused request: were it closed before, its sender could miss the answer."""
        with contextlib.suppress(OSError):  # the client has hung up
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read1(65536):
                pass
        super().finish()

    def log_message(self, *arguments):
        """Prints nothing: a stroke is many requests."""


def make_server(read):
    """Returns a server on 127.0.0.1, on the first free port from 8000 on, not yet serving.

    Args:
        read: takes a picture's bytes; returns what `json` can write, or raises ValueError with a sentence.

    Raises:
        OSError: no port is free.
    """
    for port in PORTS:
        try:
            server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except OSError:
            if port == PORTS[-1]:
                raise
            continue
        server.read = read
        return server
    return None


def serve(read):
    """Serves the page until Ctrl-C, and opens it where there is a browser; `read` as for `make_server`."""
    with make_server(read) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"Draw a digit on {address} (Ctrl-C ends this)")
        webbrowser.open(address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
