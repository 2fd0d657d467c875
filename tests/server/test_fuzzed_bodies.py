"""Bodies of any bytes: each is refused in the API's own shape or served, and none is a fault of the server."""

from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

CORPUS = sorted((Path(__file__).parents[1] / "fuzz" / "corpus" / "bodies").iterdir())
KINDS = ("application/json", "multipart/form-data; boundary=b", "application/x-www-form-urlencoded")
PATHS = ("/v1/images/generations", "/v1/images/edits", "/v1/videos", "/v1/files", "/v1/set_lora")

# Pieces that mean something to one of the parsers, so that random bodies get past its first line.
PIECES = st.sampled_from(
    [b"--b\r\n", b"--b--\r\n", b'Content-Disposition: form-data; name="prompt"\r\n', b'; filename="a.png"', b"\r\n\r\n",
     b"Content-Type: image/png\r\n", b'{"prompt":', b'"a cat"', b"}", b"[", b"]", b",", b'"n":', b'"size":', b"null",
     b"1e400", b"-0", b"prompt=", b"&", b"%", b"%ff", b"loras=", b"image[]=", b"\x00", b"\xff\xfe", b"\xed\xa0\x80"]
)  # fmt: skip
BODIES = st.one_of(
    st.binary(max_size=200), st.lists(st.one_of(PIECES, st.binary(max_size=6)), max_size=24).map(b"".join)
)


def check(server, path: str, kind: str, body: bytes) -> None:
    answer = server.post(path, content=body, headers={"content-type": kind})
    if answer.status_code == 200:
        return
    assert answer.status_code in (400, 404, 413, 415), (path, kind, body, answer.text)
    error = answer.json()["error"]
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_bodies_that_once_were_thought_of_are_answered(server, case):
    for path in PATHS:
        for kind in KINDS:
            check(server, path, kind, case.read_bytes())


@hypothesis.settings(max_examples=250, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(body=BODIES, kind=st.sampled_from(KINDS), path=st.sampled_from(PATHS))
def test_bodies_of_any_bytes_are_answered(server, body, kind, path):
    check(server, path, kind, body)
