"""The command line as its users meet it: in a process of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import photogram
from photogram.cli.doctor import verdict
from photogram.cli.flags import FlagParser, flags, hyphened
from photogram.cli.keys import with_keys
from photogram.core.config import ServeConfig
from photogram.core.errors import ConfigError


def run(*arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "photogram", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(environ or {})},
    )


def parse(*arguments: str, environ: dict[str, str] | None = None) -> ServeConfig:
    parser = FlagParser(prog="photogram serve", usage="", description="")
    parser.add_serve_flags()
    return with_keys(parser.config(parser.read(arguments)), environ or {})


def test_version() -> None:
    assert run("--version").stdout == f"photogram {photogram.__version__}\n"


def test_help_lists_every_flag() -> None:
    helped = run("serve", "--help")
    assert helped.returncode == 0
    assert all(flag.name in helped.stdout for flag in flags())


def test_without_flags_every_default_holds() -> None:
    assert parse() == ServeConfig()


def test_every_field_has_a_flag() -> None:
    assert {flag.field for flag in flags()} == set(ServeConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    "spelled", [["--max-queue", "3"], ["--max_queue", "3"], ["--max-queue=3"], ["--max_queue=3"]], ids=" ".join
)
def test_hyphen_or_underscore_equals_or_space(spelled: list[str]) -> None:
    assert parse(*spelled).max_queue == 3


def test_underscores_in_values_are_left_alone() -> None:
    assert parse("--served-model-name=my_model").served_model_name == "my_model"
    assert hyphened(["a_b", "--", "--x_y"]) == ["a_b", "--", "--x_y"]


def test_switches_turn_on_and_off() -> None:
    assert parse("--no-warmup").warmup is False
    assert parse("--no_metadata").metadata is False
    assert parse("--warmup").warmup is True
    assert parse("--deterministic").deterministic is True


def test_numbers_and_absent_values_have_their_types() -> None:
    config = parse("--hang-timeout-s", "2.5", "--worker-memory-gb", "4")
    assert (config.hang_timeout_s, config.worker_memory_gb, config.revision) == (2.5, 4.0, None)


def test_keys_come_from_flags_file_and_environment_once_each(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("from-file\n\n  also-file  \nfirst\n")
    config = parse(
        "--api-key", "first", "--api-key", "second", "--api-key-file", str(file),
        environ={"PHOTOGRAM_API_KEYS": "from-environment, first"},
    )  # fmt: skip
    assert config.api_key == ("first", "second", "from-file", "also-file", "from-environment")


def test_a_key_variable_without_a_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="PHOTOGRAM_API_KEYS"):
        parse(environ={"PHOTOGRAM_API_KEYS": " "})


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_key_file_without_a_key_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ConfigError, match="holds no key"):
        parse("--api-key-file", str(file))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "serve, generate or doctor"),
        (["sreve"], "'sreve'"),
        (["serve", "--port", "abc"], "--port 'abc': must be a whole number"),
        (["serve", "--port", "70000"], "--port 70000: must be between 0 and 65535"),
        (["serve", "--port"], "--port"),
        (["serve", "--prot", "1"], "did you mean --port?"),
        (["serve", "--precision", "fp8"], "--precision 'fp8': must be auto, fp32, bf16 or fp16"),
        (["serve", "--keep", "a while"], "--keep 'a while'"),
        (["serve", "--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
        (["serve", "--api-key="], "--api-key"),
        (["serve", "--warmup=false"], "--warmup"),
        (["serve", "--request-timeout-s", "nan"], "--request-timeout-s"),
        (["serve", "some/model", "--model-path", "other/model"], "two models"),
        (["serve", "one/model", "two/model"], "two/model"),
        (["generate", "-o", "x.png"], "--prompt"),
        (["generate", "--prompt", "a cat"], "--output"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_the_user_got_wrong_is_one_line_and_exit_code_2(arguments: list[str], told: str) -> None:
    refused = run(*arguments)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert told in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_a_model_that_is_none_is_one_line_and_exit_code_2(command: str, tmp_path: Path) -> None:
    more = {
        "serve": ["--port", "0", "--data-dir", str(tmp_path / "data")],
        "generate": ["--prompt", "x", "-o", str(tmp_path / "x.png")],
    }
    refused = run(command, "--model-path", str(tmp_path), *more[command])
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert str(tmp_path) in refused.stderr.splitlines()[-1]


def test_doctor_reports_what_there_is_and_exits_0(tmp_path: Path) -> None:
    report = run("doctor", "--data-dir", str(tmp_path), "--port", "0", "--device", "cpu")
    assert report.returncode == 0, report.stdout
    assert {"python", "torch", "diffusers", "memory", "disk", "port"} <= set(report.stdout.split())
    assert "PROBLEM" not in report.stdout


def test_doctor_plans_a_named_model_for_a_gpu_of_another_size(tmp_path: Path) -> None:
    flags = ["--data-dir", str(tmp_path), "--port", "0", "--device", "cpu", "--model-path", "demo-image"]
    report = run("doctor", *flags, "--memory-gb", "12")
    assert report.returncode == 0, report.stdout
    assert "demo-image fits a GPU with 12.0 GB" in report.stdout
    assert "everything on the device" in report.stdout
    too_small = run("doctor", *flags, "--memory-gb", "0.1")
    assert too_small.returncode == 1
    assert "demo-image does not fit a GPU with 0.1 GB" in too_small.stdout


def test_doctor_names_a_model_that_is_none(tmp_path: Path) -> None:
    report = run("doctor", "--data-dir", str(tmp_path), "--port", "0", "--device", "cpu", "--model-path", "no/such/dir")
    assert report.returncode == 1
    assert "PROBLEM  plan         --model-path 'no/such/dir': no such folder" in report.stdout


def test_doctor_tells_everything_that_is_in_the_way_and_exits_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        report = run("doctor", "--data-dir", str(tmp_path / "file/data"), "--port", str(port), "--device", "cuda:99")
    assert report.returncode == 1
    assert f"127.0.0.1:{port} cannot be listened on" in report.stdout
    assert "file is a file" in report.stdout
    assert "cuda:99 cannot be used" in report.stdout


@pytest.mark.parametrize(("weights", "told"), [(80, "fits"), (81, "tight"), (100, "tight"), (101, "too big")])
def test_what_fits_leaves_a_fifth_for_the_work(weights: int, told: str) -> None:
    assert verdict(weights, 100) == told
