"""A server on this machine for tests of downloads."""

import base64
import hashlib
import http.server
import threading


class Server:
    """Serves bytes by path with ranges; can break off, change its file, or lie about its hash."""

    def __init__(self):
        self.files, self.requests = {}, []
        self.break_after, self.ranges, self.md5, self.tag = None, True, True, "v1"
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.answer(self)

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def answer(self, request):
        path = request.path.partition("?")[0]
        asked = request.headers.get("Range")
        self.requests.append((path, asked))
        if path not in self.files:
            request.send_error(404)
            return
        data, start = self.files[path], 0
        if asked and self.ranges and request.headers.get("If-Range") == f'"{self.tag}"':
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start >= len(data) > 0 and asked:
            request.send_error(416)
            return
        request.send_response(206 if start else 200)
        request.send_header("ETag", f'"{self.tag}"')
        request.send_header("Content-Length", str(len(data) - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        elif self.md5:
            digest = hashlib.md5(data).digest() if self.md5 is True else self.md5
            request.send_header("Content-MD5", base64.b64encode(digest).decode())
        request.end_headers()
        stop = len(data) if self.break_after is None else min(len(data), start + self.break_after)
        request.wfile.write(data[start:stop])


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
