"""What tests of every folder share: the packages beside them by name, folders of tiny families, a live server."""

import functools
import http.server
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Bits are compared: one thread keeps the order of every sum.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

# Slow machines run these too; in CI the same cases are tried every time.
hypothesis.settings.register_profile("photogram", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("photogram")

if TYPE_CHECKING:
    from running import Running
    from storage.weed import Weed

# The packages beside this file by name, and `tools`, whose judge says whether a drawn picture is right.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


@pytest.fixture(scope="session")
def families_root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="session")
def family_folder(families_root):
    """Return the folder of a tiny family, made on first use."""
    from families import folder

    return lambda name: folder(name, families_root)


@pytest.fixture(scope="session")
def live_server(tmp_path_factory) -> Iterator["Running"]:
    """`photogram serve` with the built-in image model, warm, shared by all tests that do it no harm."""
    from running import serve

    server = serve(tmp_path_factory.mktemp("live"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def clip_model(family_folder, tmp_path_factory) -> Path:
    """A folder with a tiny model of Wan 2.2 TI2V's classes: random weights, a few small frames in a second or so."""
    folder = tmp_path_factory.mktemp("clips") / "tiny-wan"
    shutil.copytree(family_folder("wan-2.2-ti2v"), folder)
    card = {
        "default_width": 64,
        "default_height": 64,
        "default_frames": 17,
        "default_fps": 16,
        "default_steps": 2,
        "max_frames": 33,
        "max_native_pixels": 64 * 64,
    }
    (folder / "photogram.json").write_text(json.dumps(card))
    return folder


@pytest.fixture(scope="session")
def picture_url(tmp_path_factory) -> Iterator[str]:
    """Address of a picture on another server of this machine."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (320, 180), (30, 90, 200)).save(folder / "input_image.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/input_image.png"
        server.shutdown()


@pytest.fixture(scope="session")
def clip_server(clip_model, picture_url, tmp_path_factory) -> Iterator["Running"]:
    """`photogram serve` with a tiny model of clips, warm, shared by all tests that do it no harm.

    It may fetch the picture of `picture_url`.
    """
    from running import serve

    host = picture_url.split("/")[2]
    flags = ["--model-path", str(clip_model), "--allow-url-host", host]
    server = serve(tmp_path_factory.mktemp("live-clips"), flags)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def weed(tmp_path_factory) -> Iterator["Weed"]:
    """SeaweedFS, a real S3 server, started once for all tests that want one."""
    from storage.weed import Weed

    server = Weed(tmp_path_factory.mktemp("weed")).start()
    yield server
    server.kill()
