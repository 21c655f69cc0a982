"""Serve the built site on this machine: python hooks/serve.py [--port 8000]. A wrong address gets the 404 page."""

import argparse
import functools
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(SimpleHTTPRequestHandler):
    def send_error(self, code, message=None, explain=None):
        page = Path(self.directory) / "404.html"
        if code != 404 or not page.is_file():
            return super().send_error(code, message, explain)
        body = page.read_bytes()
        self.send_response(404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


Handler.extensions_map |= {".py": "text/plain; charset=utf-8", ".ipynb": "application/json", ".woff2": "font/woff2"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--site", default="site", help="the built site")
    args = parser.parse_args()
    if not (Path(args.site) / "index.html").is_file():
        print(f"there is no site in {args.site}: make build", file=sys.stderr)
        return 2
    try:
        server = ThreadingHTTPServer(("127.0.0.1", args.port), functools.partial(Handler, directory=args.site))
    except OSError as error:
        print(f"cannot serve on port {args.port}: {error.strerror}; another: make site PORT=8001", file=sys.stderr)
        return 2
    print(f"http://127.0.0.1:{args.port}  (Ctrl+C stops it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
