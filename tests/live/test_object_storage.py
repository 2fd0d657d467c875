"""The seed document's edit and download examples with finished files on a real S3 server."""

import json
import subprocess

import httpx
from PIL import Image

from running import Running

from .test_edits import CURL_EDIT, opened
from .test_seed_examples import shell


def test_the_seeds_examples_work_with_files_in_an_object_store(weed, tmp_path):
    server = Running(tmp_path / "server", "--storage", "s3://pictures/live", "--no-warmup", env=weed.env).start()
    try:
        Image.new("RGB", (256, 256), "navy").save(tmp_path / "local_input_image.png")
        item = json.loads(shell(CURL_EDIT, server, tmp_path))["data"][0]
        assert opened(item["b64_json"]).size == (1024, 1024)
        item = json.loads(shell(CURL_EDIT.replace("=b64_json", "=url"), server, tmp_path))["data"][0]
        assert item["url"].startswith(f"{weed.endpoint}/pictures/live/img_")
        content = f"{server.url}/v1/images/{item['id']}/content"
        subprocess.run(["curl", "-sS", "-L", content, "-o", str(tmp_path / "output.png")], check=True)
        assert (tmp_path / "output.png").read_bytes() == httpx.get(item["url"]).content
        assert Image.open(tmp_path / "output.png").size == (1024, 1024)
    finally:
        server.stop()
