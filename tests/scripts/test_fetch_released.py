"""fetch_released.py against a server of the form of Google Drive's; and timm's line on weights it does not have."""

import http.server
import re
import threading

import fetch_released
import pytest
import timm
import torch
from helpers.commands import call, refuse
from helpers.golden import GOLDEN

from lip_resnet.models.published import RELEASED, RELEASED_FOLDER

PAGE = """<html><title>LIP</title><a href="https://drive.google.com/file/d/{key}/view?usp=drive_web" target="_blank">
<div class="flip-entry-title">lip_densenet_121.pth</div></a>
<a href="https://drive.google.com/drive/folders/xyz">old</a></html>"""
KEY = "1" * 33


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        data, status, kind = self.server.file, 200, "application/octet-stream"
        if self.path.startswith("/list"):
            data, kind = PAGE.format(key=KEY).encode(), "text/html"
        elif self.server.page:
            data, kind = b"<html>Quota exceeded</html>", "text/html"
        else:
            assert f"id={KEY}" in self.path
            first = int((re.findall(r"bytes=(\d+)-$", self.headers.get("Range", "")) or [0])[0])
            self.server.starts.append(first)
            if first >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data, status = data[first:], 206 if first else 200
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if kind != "text/html" and self.server.breaks:
            data, self.close_connection = data[: self.server.breaks.pop(0)], True
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def drive(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.file, server.starts, server.breaks, server.page = b"", [], [], False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(fetch_released, "LIST", f"{url}/list")
    monkeypatch.setattr(fetch_released, "FILE", url + "/download?id={}")
    monkeypatch.setattr(fetch_released, "PAUSES", (0.0, 0.0))
    yield server
    server.shutdown()
    server.server_close()


def test_a_broken_download_goes_on(capsys, monkeypatch, drive, tmp_path):
    """Within a command and in the next one; then the file is identified and loaded strictly."""
    shapes = GOLDEN["lip_densenet121"]["state_dict"]
    torch.save({key: torch.full(shape, 0.5) for key, shape in shapes.items()}, tmp_path / "whole.pth")
    drive.file = (tmp_path / "whole.pth").read_bytes()
    drive.breaks[:] = [1000, 2000, 3000]
    folder = tmp_path / "new" / "released"
    arguments = (folder, "--models", "lip_densenet121")
    code, _, err = call(capsys, monkeypatch, fetch_released, *arguments)
    assert (code, drive.starts) == (2, [0, 1000, 3000])
    assert f"the connection broke after 6,000 of {len(drive.file):,} bytes; by hand: open {RELEASED_FOLDER}" in err
    assert [path.name for path in folder.iterdir()] == ["lip_densenet_121.pth.part"]
    code, out, err = call(capsys, monkeypatch, fetch_released, *arguments)
    assert (code, drive.starts[3:]) == (0, [6000]), err
    assert (folder / "lip_densenet_121.pth").read_bytes() == drive.file
    assert [path.name for path in folder.iterdir()] == ["lip_densenet_121.pth"]
    assert "network   lip_densenet121, 1000 classes" in out
    assert "NOT checked" in out


def test_parts_and_pages(drive, tmp_path):
    """A part that is whole, one that is too long, and a page where the file should be."""
    drive.file, path, part = b"0123456789", tmp_path / "x", tmp_path / "x.part"
    for before in (b"", b"01234", b"0123456789", b"0123456789abc"):
        part.write_bytes(before)
        fetch_released.download(fetch_released.FILE.format(KEY), path)
        assert path.read_bytes() == drive.file
        assert not part.exists()
    drive.page = True
    with pytest.raises(OSError, match="answers with a page"):
        fetch_released.download(fetch_released.FILE.format(KEY), path)
    assert path.read_bytes() == drive.file


def test_what_cannot_be_fetched_is_named(capsys, monkeypatch, drive, tmp_path):
    line = refuse(capsys, monkeypatch, fetch_released, tmp_path, "--models", "lip_resnet50")
    assert "cannot download lip_resnet-50.pth: the folder's page names lip_densenet_121.pth; by hand: open" in line
    (tmp_path / "lip_resnet-50.pth").write_text("saved by hand")
    assert "not a checkpoint" in call(capsys, monkeypatch, fetch_released, tmp_path, "--models", "lip_resnet50")[2]
    shapes = GOLDEN["lip_densenet121"]["state_dict"]
    torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "lip_resnet-50.pth")
    err = call(capsys, monkeypatch, fetch_released, tmp_path, "--models", "lip_resnet50")[2]
    assert "holds lip_densenet121, not lip_resnet50" in err
    monkeypatch.setattr(fetch_released, "LIST", "http://127.0.0.1:9/none")
    line = refuse(capsys, monkeypatch, fetch_released, tmp_path, "--models", "lip_resnet101")
    assert "cannot download lip_resnet-101.pth: <urlopen error" in line
    assert f"save the files in {tmp_path}" in line


def test_timm_says_where_the_weights_are(tmp_path):
    for name, file in RELEASED.items():
        with pytest.raises(RuntimeError, match=rf"{re.escape(file)} of {re.escape(RELEASED_FOLDER)}: .*fetch_released"):
            timm.create_model(name, pretrained=True)
    with pytest.raises(RuntimeError, match="no weights of lip_resnet18 are released, only of lip_resnet50, "):
        timm.create_model("lip_resnet18", pretrained=True)
    state = timm.create_model("lip_resnet18", num_classes=3).state_dict()
    torch.save(state, tmp_path / "mine.pth")
    overlay = {"file": str(tmp_path / "mine.pth"), "num_classes": 3}
    loaded = timm.create_model("lip_resnet18", num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
