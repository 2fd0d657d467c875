"""The examples of SGLang Diffusion's API page for images, as a user pastes them; only the address differs."""

import base64
import io
import json
import os
import subprocess
import sys

from PIL import Image

PYTHON_EXAMPLE = """
import base64
from openai import OpenAI

client = OpenAI(api_key="sk-proj-1234567890", base_url="http://localhost:30010/v1")

img = client.images.generate(
prompt="A calico cat playing a piano on stage",
size="1024x1024",
n=1,
response_format="b64_json",
)

image_bytes = base64.b64decode(img.data[0].b64_json)
with open("output.png", "wb") as f:
    f.write(image_bytes)
"""

CURL_EXAMPLE = r"""
curl -sS -X POST "http://localhost:30010/v1/images/generations" \
-H "Content-Type: application/json" \
-H "Authorization: Bearer sk-proj-1234567890" \
-d '{
"prompt": "A calico cat playing a piano on stage",
"size": "1024x1024",
"n": 1,
"response_format": "b64_json"
}'
"""

CURL_MODELS = 'curl -sS -X GET "http://localhost:30010/models"'

CURL_CONTENT = r"""
curl -sS -L "http://localhost:30010/v1/images/<IMAGE_ID>/content" \
-H "Authorization: Bearer sk-proj-1234567890" \
-o output.png
"""


def shell(script: str, server, folder) -> str:
    done = subprocess.run(
        ["bash", "-ec", script.replace("http://localhost:30010", server.url)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"no_proxy": "*"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_example_writes_a_png_of_the_size_asked_for(live_server, tmp_path):
    source = PYTHON_EXAMPLE.replace("http://localhost:30010", live_server.url)
    subprocess.run([sys.executable, "-c", source], cwd=tmp_path, check=True, timeout=300)
    with Image.open(tmp_path / "output.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1024, 1024))
        # A picture, not one flat colour.
        assert len(set(picture.convert("RGB").resize((32, 32)).get_flattened_data())) > 20


def test_curl_example_answers_with_a_picture(live_server, tmp_path):
    answer = json.loads(shell(CURL_EXAMPLE, live_server, tmp_path))
    picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert (picture.format, picture.size) == ("PNG", (1024, 1024))


def test_url_response_is_relative_and_its_content_can_be_fetched(live_server, tmp_path):
    asked = CURL_EXAMPLE.replace('"b64_json"', '"url"')
    item = json.loads(shell(asked, live_server, tmp_path))["data"][0]
    assert item["url"] == f"/v1/images/{item['id']}/content"
    assert "b64_json" not in item or item["b64_json"] is None
    shell(CURL_CONTENT.replace("<IMAGE_ID>", item["id"]), live_server, tmp_path)
    with Image.open(tmp_path / "output.png") as picture:
        assert picture.size == (1024, 1024)


def test_models_answers_the_seven_keys(live_server, tmp_path):
    facts = json.loads(shell(CURL_MODELS, live_server, tmp_path))
    assert facts["pipeline_class"] == "Flux2KleinPipeline"
    assert facts["pipeline_name"] == "flux2_klein_pipeline"
    assert facts["task_type"] == "TI2I"
    assert facts["num_gpus"] == 1
    assert facts["dit_precision"] == facts["vae_precision"] == "fp32"
    assert facts["model_path"] == "demo-image"


def test_quality_presets_work_in_both_spellings_and_png_ignores_them(live_server, tmp_path):
    def fetch(**fields) -> bytes:
        body = {"prompt": "a red circle", "seed": 5, "response_format": "b64_json"} | fields
        script = f"curl -sS http://localhost:30010/v1/images/generations -d '{json.dumps(body)}'"
        return base64.b64decode(json.loads(shell(script, live_server, tmp_path))["data"][0]["b64_json"])

    sizes = [
        len(fetch(output_format="jpeg", **{"output-quality": word})) for word in ("low", "medium", "high", "maximum")
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    assert fetch(output_format="jpeg", output_quality="low", **{"output-compression": 100}) == fetch(
        output_format="jpeg", output_compression=100
    )
    assert fetch(output_quality="low") == fetch(output_quality="maximum")
