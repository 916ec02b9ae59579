import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cmtool.data.cache import download, human_bytes
from cmtool.errors import DataError, OfflineError

BODY = bytes(range(256)) * 5000
MD5 = hashlib.md5(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """Serves BODY on 127.0.0.1; `stop` cuts an answer short, `ranges` says whether it resumes; `asked` logs."""
    monkeypatch.delenv("CMTOOL_OFFLINE")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state["asked"].append(self.headers.get("Range"))
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if state["ranges"] else 0
            if self.path != "/file":
                return self.send_error(404)
            if start >= len(BODY):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(BODY) - start))
            self.end_headers()
            self.wfile.write(BODY[start : state["stop"]])

        def log_message(self, *_):
            pass

    state = {"asked": [], "stop": None, "ranges": True}
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    state["url"] = f"http://127.0.0.1:{made.server_port}/file"
    yield state
    made.shutdown()
    made.server_close()


def fetch(server, target, md5=MD5, **kw):
    return download(server["url"], target, md5, len(BODY), **kw)


def test_fetched_whole_verified_and_reported(server, tmp_path):
    seen = []
    path = fetch(server, tmp_path / "d" / "file", progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == BODY and seen[-1] == (len(BODY), len(BODY))
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_resumes_or_starts_over(server, tmp_path, ranges):
    server["stop"] = 500_000
    with pytest.raises((DataError, OfflineError)):
        fetch(server, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    server.update(stop=None, ranges=ranges)
    assert fetch(server, tmp_path / "file").read_bytes() == BODY
    assert server["asked"][0] is None and server["asked"][-1].startswith("bytes=")


def test_a_whole_part_is_kept_and_a_wrong_file_is_removed(server, tmp_path):
    (tmp_path / "file.part").write_bytes(BODY)
    assert fetch(server, tmp_path / "file").read_bytes() == BODY
    with pytest.raises(DataError, match="MD5 differs"):
        fetch(server, tmp_path / "other", md5="0" * 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_no_network_says_what_to_do_by_hand(server, tmp_path, monkeypatch):
    server["url"] = server["url"].replace("/file", "/gone")
    with pytest.raises(OfflineError, match="404") as caught:
        fetch(server, tmp_path / "file")
    assert "by hand" in caught.value.hint and str(tmp_path / "file") in caught.value.hint
    server["url"] = "http://127.0.0.1:9/file"
    with pytest.raises(OfflineError, match="could not be fetched"):
        fetch(server, tmp_path / "file")
    monkeypatch.setenv("CMTOOL_OFFLINE", "1")
    with pytest.raises(OfflineError, match="forbids"):
        fetch(server, tmp_path / "file")


@pytest.mark.parametrize(("count", "text"), [(5, "5 bytes"), (1536, "1.54 kB"), (2e9, "2 GB"), (15.7e9, "15.7 GB")])
def test_sizes_as_people_read_them(count, text):
    assert human_bytes(count) == text
