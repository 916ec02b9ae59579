"""The studio without a browser: its answers are those of its shell commands, and nobody else gets any."""

from __future__ import annotations

import base64
import http.client
import io
import json
import shlex
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cmtool as package
from cmtool.editing.tasks import TASKS
from cmtool.errors import UserError
from cmtool.studio.server import StudioServer
from cmtool.studio.work import Workshop, open_uri, png_uri, reduced
from tests.cli.tiny import write_model


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("studio"), num_classes=2, names=["disk", "ring"])


@pytest.fixture(scope="module")
def workshop(model_file):
    return Workshop(package.load(model_file, "cpu"), str(model_file))


@pytest.fixture
def photo():
    return np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.fixture
def mask():
    pixels = np.zeros((8, 8, 1), dtype=np.uint8)
    pixels[2:6, 2:6] = 255
    return pixels


def pixels_of(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


@pytest.mark.parametrize("task", TASKS)
def test_an_edit_is_what_its_command_makes(workshop, cmtool, workdir, photo, mask, task):
    asked = {"task": task, "picture": png_uri(photo), "mask": png_uri(mask), "num": "3", "seed": "5", "label": "ring",
             "factor": "2", "sigma": "0.4"}  # fmt: skip
    answer = workshop.ask("edit", asked)
    for given in answer["inputs"]:
        (workdir / given["name"]).write_bytes(base64.b64decode(given["uri"].split(",")[1]))
    words = shlex.split(answer["command"])
    assert words[:3] == ["cmtool", "edit", task]
    said = cmtool(*words[1:])
    assert said.code == 0, said.err
    made = [np.asarray(Image.open(path)) for path in said.out.split()]
    assert len(made) == len(answer["images"]) == (1 if task == "denoise" else 3)
    assert all(np.array_equal(a, pixels_of(b)) for a, b in zip(made, answer["images"], strict=True))


def test_samples_and_walks_are_what_their_commands_make(workshop, cmtool, workdir):
    answer = workshop.ask("sample", {"seed": 7, "label": "disk"})
    assert cmtool(*shlex.split(answer["command"])[1:]).code == 0
    assert np.array_equal(np.asarray(Image.open("photo.png")), pixels_of(answer["images"][0]))
    walk = workshop.ask("walk", {"from": 3, "to": "4", "place": 12, "label": ""})
    words = [word.replace("walk.gif", "frames") for word in shlex.split(walk["command"])[1:]]
    assert cmtool(*words).code == 0
    frame = np.asarray(Image.open(sorted(Path("frames").glob("*.png"))[12]))
    assert np.abs(frame.astype(int) - pixels_of(walk["images"][0])).max() <= 1


def test_what_is_transparent_is_generated_where_no_mask_is_painted(workshop, cmtool, workdir, photo, mask):
    images = []
    for hidden in (photo, 255 - photo):
        erased = np.dstack([np.where(mask > 0, hidden, photo), 255 - mask[..., 0]])
        answer = workshop.ask("edit", {"task": "inpaint", "picture": png_uri(erased), "num": 1, "label": "ring"})
        assert [given["name"] for given in answer["inputs"]] == ["photo.png"]
        images.append(pixels_of(answer["images"][0]))
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0][mask[..., 0] == 0], photo[mask[..., 0] == 0])
    (workdir / "photo.png").write_bytes(base64.b64decode(answer["inputs"][0]["uri"].split(",")[1]))
    said = cmtool(*shlex.split(answer["command"])[1:])
    assert said.code == 0, said.err
    assert np.array_equal(np.asarray(Image.open("edited.png")), images[0])
    with pytest.raises(UserError, match="nothing transparent"):
        workshop.ask("edit", {"task": "inpaint", "picture": png_uri(photo)})


def test_it_says_what_the_model_can_do(workshop, tmp_path):
    about = workshop.ask("about", {})
    assert about["classes"] == ["disk", "ring"] and about["tasks"] == list(TASKS) and about["factors"] == [2, 4]
    gray = Workshop(package.load(write_model(tmp_path, channels=1), "cpu"), "gray")
    assert "colorize" not in gray.ask("about", {})["tasks"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"task": "paint"}, "unknown edit 'paint'"),
        ({"picture": "data:image/png;base64,AAAA"}, "the picture is no picture"),
        ({"picture": "data:image/svg+xml;base64,AAAA"}, "the picture is no picture"),
        ({"picture": None}, "the picture is no picture"),
        ({"picture": png_uri(np.zeros((4, 4, 3), dtype=np.uint8))}, "is 4 x 4, and the model works on 8 x 8"),
        ({"mask": png_uri(np.zeros((8, 8, 1), dtype=np.uint8))}, "the mask is empty"),
        ({"num": 1000}, "must lie between 1 and 16"),
        ({"num": "many"}, "is no number"),
        ({"num": 1e400}, "is no number"),
        ({"label": "cube"}, "unknown label 'cube'"),
        ({"seed": -1}, "must lie between"),
        ({"task": "superres", "factor": 3}, "does not divide"),
    ],
)
def test_wrong_requests_are_one_sentence(workshop, photo, mask, change, sentence):
    asked = {"task": "inpaint", "picture": png_uri(photo), "mask": png_uri(mask)}
    with pytest.raises(UserError, match=sentence):
        workshop.ask("edit", asked | change)


def test_pictures_survive_their_addresses(photo):
    assert np.array_equal(np.asarray(open_uri(png_uri(photo), 8, "it")), photo)
    assert np.array_equal(reduced(np.full((4, 4, 1), 7, dtype=np.uint8), 2), np.full((2, 2, 1), 7))
    assert reduced(np.array([[[0], [1]], [[1], [0]]], dtype=np.uint8), 2) == 1  # a half is rounded up


@pytest.fixture(scope="module")
def server(workshop):
    with StudioServer(workshop) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


def request(server, method, path, body=None, host=None, token=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    headers = {"Host": host or f"127.0.0.1:{server.server_port}"} | ({"X-Token": token} if token else {})
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read(), answer


def test_the_page_is_given_to_the_token_alone(server):
    status, page, answer = request(server, "GET", f"/?token={server.token}")
    assert status == 200 and b"cmtool studio" in page and b"{{token}}" not in page
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    for path in ("/", "/?token=wrong", f"/?token={server.token}x", "/studio.js", "/?token="):
        assert request(server, "GET", path)[0] == 403
    assert request(server, "GET", f"/../secret?token={server.token}")[0] == 404


def test_the_model_answers_the_token_alone(server):
    status, body, _ = request(server, "POST", "/api/about", b"{}", token=server.token)
    assert status == 200 and json.loads(body)["side"] == 8
    assert request(server, "POST", "/api/about", b"{}")[0] == 403
    assert request(server, "POST", "/api/about", b"{}", token="x" * 32)[0] == 403


def test_a_foreign_name_for_this_machine_is_refused(server):
    assert request(server, "POST", "/api/about", b"{}", host="evil.example", token=server.token)[0] == 403
    assert request(server, "GET", f"/?token={server.token}", host=f"evil.example:{server.server_port}")[0] == 403


def test_bad_requests_are_answered(server):
    for body in (b"", b"{}"):
        assert request(server, "POST", "/api/about", body, token=server.token)[0] == 200
    for body in (b"[]", b"{", b"\xff"):
        assert request(server, "POST", "/api/about", body, token=server.token)[0] == 400
    status, body, _ = request(server, "POST", "/api/destroy", b"{}", token=server.token)
    assert status == 400 and "unknown action" in json.loads(body)["error"]
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.putrequest("POST", "/api/about")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    assert connection.getresponse().status == 413


def test_it_listens_on_this_machine_alone_and_says_when_it_cannot(server, workshop):
    assert server.server_address[0] == "127.0.0.1"
    assert len(server.token) >= 32
    with pytest.raises(UserError, match=r"port \d+ cannot be used"):
        StudioServer(workshop, server.server_port)


def test_without_any_model_it_says_what_to_do(cmtool, workdir, monkeypatch):
    import cmtool.interop.published as names

    monkeypatch.setattr(names, "DEMOS", workdir / "none")
    said = cmtool("studio", "--no-browser")
    assert said.code == 1 and "there is no consistency model of images" in said.err
