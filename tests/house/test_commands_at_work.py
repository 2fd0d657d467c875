"""`photogram serve` and `photogram generate` with a real engine and a tiny pipeline."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from families import folder
from photogram.media.provenance import Provenance, read_provenance


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folder("flux-2-klein", tmp_path_factory.mktemp("families")))


def generate(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "photogram", "generate", "--size", "64x48", "--steps", "2", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


def provenance(path: Path) -> Provenance:
    found = read_provenance(path.read_bytes())
    assert found is not None
    return found


def test_generate_writes_the_pictures_asked_for_and_names_them(model: str, tmp_path: Path) -> None:
    made = generate(
        "--model-path", model, "--prompt", "a cube", "-n", "2", "--seed", "5", "-o", "cube.png", cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    assert sorted(line.split()[0] for line in made.stdout.splitlines()) == ["cube-1.png", "cube-2.png"]
    for number in (1, 2):
        with Image.open(tmp_path / f"cube-{number}.png") as picture:
            assert picture.size == (64, 48)
        told = provenance(tmp_path / f"cube-{number}.png")
        assert (told.prompt, told.seed, told.steps) == ("a cube", 4 + number, 2)


def test_generate_changes_a_picture(model: str, tmp_path: Path) -> None:
    Image.new("RGB", (96, 64), "red").save(tmp_path / "red.jpg")
    made = generate(
        "--model-path", model, "--prompt", "greener", "--image", "red.jpg", "-o", "green.webp", cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    with Image.open(tmp_path / "green.webp") as picture:
        assert (picture.format, picture.size) == ("WEBP", (64, 48))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prompt", "x", "--size", "64", "-o", "x.png"], "size '64'"),
        (["--prompt", "x", "--n", "11", "-o", "x.png"], "'n': 11"),
        (["--prompt", "x", "--seed", "soon", "-o", "x.png"], "'seed'"),
        (["--prompt", "x", "--width", "128", "-o", "x.png"], "disagrees"),
        (["--prompt", "x", "--image", "missing.png", "-o", "x.png"], "missing.png"),
        (["--prompt", "x", "-o", "x.gif"], "x.gif"),
        (["--prompt", "x", "-o", "nowhere/x.png"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_generate_tells_what_is_wrong_before_it_loads_the_model(
    arguments: list[str], told: str, tmp_path: Path
) -> None:
    refused = generate("--model-path", "/no/such/model", *arguments, cwd=tmp_path)
    assert refused.returncode == 2
    assert told in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.fixture
def serving(model: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "photogram", "serve", model, "--port", "0", "--data-dir", str(tmp_path / "data")]
    environ = {**os.environ, "PHOTOGRAM_API_KEYS": "secret"}
    process = subprocess.Popen(
        [*command, "--no-warmup"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ
    )
    yield process
    process.kill()
    process.wait()


def test_serve_says_in_five_lines_how_to_try_it_and_the_line_works(
    serving: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert serving.stdout is not None
    lines = [serving.stdout.readline() for _ in range(5)]
    assert [line.split()[0] for line in lines] == ["model", "device", "url", "try", "docs"]
    assert "secret" not in "".join(lines)

    pasted = lines[3].removeprefix("try").strip()
    environ = {**os.environ, "PHOTOGRAM_API_KEY": "secret"}
    subprocess.run(["bash", "-euo", "pipefail", "-c", pasted], cwd=tmp_path, env=environ, timeout=240, check=True)
    with Image.open(tmp_path / "picture.png") as picture:
        picture.load()

    serving.send_signal(signal.SIGTERM)
    rest, _ = serving.communicate(timeout=60)
    assert rest == ""
    assert serving.returncode == 0


def test_serve_warns_of_being_open_to_the_network_without_a_key(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "photogram", "serve", str(tmp_path), "--host", "0.0.0.0", "--port", "0"]
    served = subprocess.run(
        [*command, "--data-dir", str(tmp_path / "data")], capture_output=True, text=True, timeout=120
    )
    assert served.returncode == 2
    assert "listening on 0.0.0.0 without a key" in served.stderr
