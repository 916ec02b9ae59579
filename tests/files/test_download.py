"""Downloads: resumed, verified, remembered, by one process at a time; nothing looks whole before it is."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cmtool.errors import DataError, OfflineError, UserError
from cmtool.files.download import Download, Remote, _alone, download, fetch
from cmtool.units import human_bytes, human_time
from tests.files.server import Server, names_in

BODY = bytes(range(256)) * 5000
MD5 = hashlib.md5(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch, tmp_path):
    made = Server()
    monkeypatch.setenv("CMTOOL_OFFLINE", "0")
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    yield made
    made.http.shutdown()


@pytest.fixture
def untagged(monkeypatch):
    """A server that names no version of its file: serves BODY on 127.0.0.1; `stop` cuts an answer short, `ranges` says whether it resumes; `asked` logs."""
    monkeypatch.setenv("CMTOOL_OFFLINE", "0")

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


def fetch_it(server, target, md5=MD5, **kw):
    return download(Download(server["url"], target, size=len(BODY), digest=f"md5:{md5}"), **kw)


def test_fetched_whole_verified_and_reported(untagged, tmp_path):
    seen = []
    path = fetch_it(untagged, tmp_path / "d" / "file", progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == BODY and seen[-1] == (len(BODY), len(BODY))
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_resumes_or_starts_over(untagged, tmp_path, ranges):
    untagged["stop"] = 500_000
    with pytest.raises((DataError, OfflineError)):
        fetch_it(untagged, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    untagged.update(stop=None, ranges=ranges)
    assert fetch_it(untagged, tmp_path / "file").read_bytes() == BODY
    assert untagged["asked"][0] is None and untagged["asked"][-1].startswith("bytes=")


def test_a_whole_part_is_kept_and_a_wrong_file_is_removed(untagged, tmp_path):
    (tmp_path / "file.part").write_bytes(BODY)
    assert fetch_it(untagged, tmp_path / "file").read_bytes() == BODY
    with pytest.raises(DataError, match="its MD5 is another"):
        fetch_it(untagged, tmp_path / "other", md5="0" * 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_no_network_says_what_to_do_by_hand(untagged, tmp_path, monkeypatch):
    untagged["url"] = untagged["url"].replace("/file", "/gone")
    with pytest.raises(OfflineError, match="404") as caught:
        fetch_it(untagged, tmp_path / "file")
    assert "by hand" in caught.value.hint and str(tmp_path / "file") in caught.value.hint
    untagged["url"] = "http://127.0.0.1:9/file"
    with pytest.raises(OfflineError, match="could not be fetched"):
        fetch_it(untagged, tmp_path / "file")
    monkeypatch.setenv("CMTOOL_OFFLINE", "1")
    with pytest.raises(OfflineError, match="forbids"):
        fetch_it(untagged, tmp_path / "file")


def test_a_broken_download_is_resumed_where_it_stopped(server, tmp_path):
    data = bytes(range(256)) * 40
    server.files["/f.bin"], server.break_after = data, 4000
    target, seen = tmp_path / "f.bin", []
    with pytest.raises(UserError, match=r"stopped after 4 kB of 10\.2 kB") as caught:
        download(Download(f"{server.url}/f.bin", target))
    assert "resume" in caught.value.hint
    assert not target.exists()
    server.break_after = None
    download(Download(f"{server.url}/f.bin", target), lambda done, total: seen.append((done, total)))
    assert target.read_bytes() == data
    assert [asked for _, asked in server.requests] == [None, "bytes=4000-"]
    assert seen[-1] == (len(data), len(data))
    assert names_in(tmp_path) == ["f.bin"]


def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path):
    server.files["/f.bin"], server.break_after = b"a" * 5000, 2000
    with pytest.raises(UserError, match="stopped"):
        download(Download(f"{server.url}/f.bin", tmp_path / "f.bin"))
    server.files["/f.bin"], server.break_after, server.tag = b"b" * 5000, None, "v2"
    download(Download(f"{server.url}/f.bin", tmp_path / "f.bin"))
    assert (tmp_path / "f.bin").read_bytes() == b"b" * 5000


@pytest.mark.parametrize(
    ("size", "sha256", "md5", "reason"),
    [
        (99, None, True, "it has 100 bytes instead of 99"),
        (None, "0" * 64, True, "its SHA-256 is another"),
        (None, None, b"0" * 16, "its MD5 is another"),
    ],
)
def test_a_file_of_wrong_length_or_hash_is_removed(server, tmp_path, size, sha256, md5, reason):
    server.files["/f.bin"], server.md5 = b"x" * 100, md5
    with pytest.raises(UserError, match=reason):
        download(Download(f"{server.url}/f.bin", tmp_path / "f.bin", size=size, digest=sha256 and f"sha256:{sha256}"))
    assert names_in(tmp_path) == []


def test_a_whole_part_is_taken_and_a_right_hash_passes(server, tmp_path):
    data = b"y" * 100
    server.files["/f.bin"] = data
    (tmp_path / "f.bin.part").write_bytes(data)
    (tmp_path / "f.bin.part.json").write_text(json.dumps({"url": f"{server.url}/f.bin", "tag": '"v1"', "md5": None}))
    download(Download(f"{server.url}/f.bin", tmp_path / "f.bin", digest=f"sha256:{hashlib.sha256(data).hexdigest()}"))
    assert (tmp_path / "f.bin").read_bytes() == data


def test_missing_files_and_silent_servers(server, tmp_path):
    with pytest.raises(UserError, match="answered 404"):
        download(Download(f"{server.url}/none", tmp_path / "none"))
    with pytest.raises(OfflineError, match="could not be fetched"):
        download(Download("http://127.0.0.1:9/f", tmp_path / "f"))
    assert names_in(tmp_path) == []


def test_two_processes_do_not_write_into_one_part(server, tmp_path):
    server.files["/f.bin"] = b"x" * 100
    with (
        _alone(Download("", tmp_path / "f.bin")),
        pytest.raises(UserError, match=r"f\.bin is being fetched by another process"),
    ):
        download(Download(f"{server.url}/f.bin", tmp_path / "f.bin"))
    download(Download(f"{server.url}/f.bin", tmp_path / "f.bin"))
    assert names_in(tmp_path) == ["f.bin"]


def test_published_files_resume_too(server, tmp_path):
    """Reference statistics have no digest that is known: the version that the server names decides."""
    data = bytes(range(256)) * 40
    server.files["/stats.npz"], server.break_after, server.md5 = data, 4000, False
    remote = Remote("the statistics", f"{server.url}/stats.npz", "references", "stats.npz")
    said = []
    with pytest.raises(DataError, match="stopped after 4 kB"):
        fetch(remote, said.append)
    server.break_after = None
    assert fetch(remote, said.append).read_bytes() == data
    assert [asked for _, asked in server.requests] == [None, "bytes=4000-"]
    assert said == [f"downloading the statistics from {remote.url}"] * 2
    assert fetch(remote, said.append) == remote.path and len(server.requests) == 2
    wrong = Remote("the weights", remote.url, "weights", "w.pt", sha256="0" * 64)
    with pytest.raises(DataError, match="its SHA-256 is another"):
        fetch(wrong)
    assert names_in(tmp_path) == ["cache/references/stats.npz"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(5, "5 bytes"), (1536, "1.54 kB"), (999_600, "1 MB"), (2e9, "2 GB"), (15.7e9, "15.7 GB"), (4e12, "4 TB")],
)
def test_sizes_as_people_read_them(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (40, "40 s"),
        (89.6, "90 s"),
        (700, "12 min"),
        (11_100, "3 h 05 min"),
        (3.5 * 86_400, "3.5 days"),
        (35 * 86_400, "35 days"),
    ],
)
def test_lengths_of_time_as_people_read_them(seconds, text):
    assert human_time(seconds) == text
