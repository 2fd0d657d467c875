"""The examples and the code of the docs run as they stand, against a real server."""

import os
import re
import subprocess
import sys
from pathlib import Path

import av
import httpx
import pytest
from PIL import Image

from lora_files import demo_lora
from running import Running

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "http://localhost:30000"
SCRIPTS = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".sh")}
BLOCK = re.compile(r"(<!-- not run -->\n)?```(python|bash)\n(.*?)```", re.DOTALL)
PAGES = [ROOT / "README.md", ROOT / "docs/tutorial.md", ROOT / "docs/api.md"]


@pytest.fixture
def server(live_server: Running) -> str:
    """Address of a running server, without the last slash."""
    return live_server.url


def run(command: list[str], folder: Path, server: str) -> str:
    binaries = str(Path(sys.executable).parent)
    environ = {**os.environ, "PHOTOGRAM_URL": server, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    ran = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.load()
        return picture.size


def example(name: str) -> str:
    return str(ROOT / "examples" / name)


def test_every_example_has_a_test() -> None:
    tested = set(re.findall(r'example\("([^"]+)"\)', Path(__file__).read_text()))
    assert tested == SCRIPTS


def test_generate_image(server: str, tmp_path: Path) -> None:
    told = run([sys.executable, example("generate_image.py"), "a red circle", "circle.png"], tmp_path, server)
    assert "seed 7" in told
    assert size(tmp_path / "circle.png") == (256, 256)


def test_stream_partials(server: str, tmp_path: Path) -> None:
    run([sys.executable, example("stream_partials.py"), "a yellow star", "frames"], tmp_path, server)
    names = {path.name for path in (tmp_path / "frames").iterdir()}
    assert names == {"partial-0.png", "partial-1.png", "final.png"}
    assert {size(tmp_path / "frames" / name) for name in names} == {(256, 256)}


def test_many_clients(server: str, tmp_path: Path) -> None:
    told = run([sys.executable, example("many_clients.py"), "pictures"], tmp_path, server)
    assert "8 pictures in" in told
    assert [size(path) for path in (tmp_path / "pictures").iterdir()] == [(256, 256)] * 8


def test_curl(server: str, tmp_path: Path) -> None:
    run(["bash", example("curl.sh"), "output.png"], tmp_path, server)
    assert size(tmp_path / "output.png") == (256, 256)


def test_contact_sheet(server: str, tmp_path: Path) -> None:
    prompts = ["two red circles", "a striped circle", "a cat on stage", "four green squares", "a blue star", "a house",
               "a lighthouse in a storm"]  # fmt: skip
    run([sys.executable, example("contact_sheet.py"), "sheet.webp", *prompts], tmp_path, server)
    assert size(tmp_path / "sheet.webp") == (6 * 192, 2 * (192 + 30))


def test_lora_sheet(server: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("first", "second")):
        body = {"lora_nickname": name, "lora_path": str(demo_lora(tmp_path / f"{name}.safetensors", seed=seed))}
        assert httpx.post(f"{server}/v1/set_lora", json=body).status_code == 200
    assert httpx.post(f"{server}/v1/unmerge_lora_weights").status_code == 200
    run([sys.executable, example("lora_sheet.py"), "first", "second", "sheet.webp", "a red house"], tmp_path, server)
    assert size(tmp_path / "sheet.webp") == (11 * 144, 18 + 144)


def test_make_video(clip_server: Running, tmp_path: Path) -> None:
    told = run([sys.executable, example("make_video.py"), "a red circle", "clip.mp4"], tmp_path, clip_server.url)
    assert "17 frames, 1.06 s" in told
    with av.open(tmp_path / "clip.mp4") as container:
        assert container.streams.video[0].frames == 17
    assert size(tmp_path / "clip.webp") == (64, 64)


def test_continue_video(clip_server: Running, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (200, 60, 20)).save(tmp_path / "picture.png")
    run([sys.executable, example("continue_video.py"), "picture.png", "clips"], tmp_path, clip_server.url)
    lengths = {}
    for path in (tmp_path / "clips").iterdir():
        with av.open(path) as container:
            lengths[path.name] = container.streams.video[0].frames
    assert lengths == {"first.mp4": 17, "remix.mp4": 17, "longer.mp4": 33}


def test_clip_sheet(clip_server: Running, tmp_path: Path) -> None:
    run([sys.executable, example("clip_sheet.py"), "sheet.webp"], tmp_path, clip_server.url)
    assert size(tmp_path / "sheet.webp") == (8 * 144, 5 * (20 + 81))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, server: str, tmp_path: Path) -> None:
    run_page(page, server, tmp_path)


def test_the_code_of_the_page_of_clips_runs_from_top_to_bottom(clip_server: Running, tmp_path: Path) -> None:
    run_page(ROOT / "docs/videos.md", clip_server.url, tmp_path)


def run_page(page: Path, server: str, tmp_path: Path) -> None:
    script = ["import subprocess"]
    for unwanted, language, code in BLOCK.findall(page.read_text().replace(ADDRESS, server)):
        # Commands that install or serve are tested elsewhere; only what talks to a server is run here.
        if language == "bash" and "curl" in code and not unwanted:
            script.append(f"subprocess.run(['bash', '-euo', 'pipefail', '-c', {code!r}], check=True)")
        elif language == "python" and not unwanted:
            script.append(code)
    assert len(script) > 1
    assert '"error":{' not in run([sys.executable, "-c", "\n".join(script)], tmp_path, server)
