"""Resolving and parsing, without a server: hypothesis over anything a client may send, and the size rules."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photogram.core.config import ServeConfig
from photogram.core.errors import NotFound, RequestError, TooLarge
from photogram.core.messages import Submit
from photogram.core.wire import pack
from photogram.server.body import open_envelopes, parse_plain
from photogram.server.fields import Field, coerce
from photogram.server.forms import BodyLimits, nest, read_multipart
from photogram.server.resolve import Resolver
from photogram.server.schemas import image_fields
from photogram.server.sizes import Size, asked_size, drawn_size

from .fake_engine import image_card

CARD = image_card()
CONFIG = ServeConfig()
RESOLVER = Resolver(config=CONFIG)
NAMES = sorted(
    {name for field in image_fields(200) for name in (field.name, *field.aliases)}
    | set(CARD.parameters)
    | {"extra_body", "extra_params", "user", "unknown"}
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["2", "true", "64x64", "auto"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
sensible = st.fixed_dictionaries(
    {"prompt": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)},
    optional={
        "n": st.sampled_from([1, "2", 10, None]),
        "size": st.builds("{}x{}".format, st.integers(1, 5000), st.integers(1, 5000)),
        "seed": st.integers(0, 2**63 - 1),
        "steps": st.integers(-2, 300),
        "guidance_scale": st.floats(),
        "output_format": st.sampled_from(["png", "jpg", "webp", "gif"]),
        "sigmas": json_values,
        "prompt_2": st.text(),
        "stream": st.sampled_from([True, "false", 0, None]),
        "partial_images": st.integers(-1, 4),
    },
)


def check(call) -> None:
    assert 1 <= len(call.drawings) <= 10
    for drawing in call.drawings:
        request, output = drawing.request, drawing.output
        assert 0 < len(request.prompt) <= 32_000
        assert request.width % CARD.size_multiple == 0
        assert request.height % CARD.size_multiple == 0
        assert request.width * request.height <= CARD.max_native_pixels
        assert min(output.width, output.height) >= 16
        assert output.width * output.height <= CONFIG.max_pixels
        assert 0 <= output.compression <= 100
        assert 1 <= request.num_inference_steps <= CONFIG.max_steps
        assert 0 <= request.seed <= 2**63 - 1
        assert 0 <= request.guidance_scale <= 100
        assert 0 <= request.partial_images <= 3
        assert -10 <= request.priority <= 10
        assert set(request.extra) <= set(CARD.parameters) | {"true_cfg_scale"}
        # What passes here must pass to the worker and into the store.
        pack(Submit(request=request))
        msgspec.json.encode(request)


@settings(deadline=None, max_examples=400)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), json_values, max_size=8) | sensible)
def test_any_object_is_a_request_within_bounds_or_a_request_error(body):
    fields = dict(body)
    try:
        open_envelopes(fields)
        call = RESOLVER.images(fields, CARD, "anonymous")
    except RequestError as error:
        error.message.encode()
        return
    check(call)


@settings(deadline=None, max_examples=200)
@given(sensible)
def test_errors_name_a_field_that_was_sent(body):
    refused_for: str | None = "prompt"
    try:
        check(RESOLVER.images(body, CARD, "anonymous"))
    except RequestError as error:
        refused_for = error.param
    assert refused_for in body


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200) | json_values.map(lambda value: repr(value).encode("utf-8", "replace")), st.booleans())
def test_any_bytes_are_an_object_or_a_request_error(data, is_form):
    try:
        fields = parse_plain(data, is_form=is_form)
    except RequestError:
        return
    assert isinstance(fields, dict)


form_names = st.text(st.sampled_from("ab[]0."), max_size=10)


@settings(deadline=None)
@given(st.lists(st.tuples(form_names, st.text(max_size=3)), max_size=8))
def test_any_form_names_are_an_object_or_a_request_error(pairs):
    try:
        assert isinstance(nest(pairs), dict)
    except RequestError:
        pass


def multipart(data: bytes, boundary: str, chunk: int, **limits):
    async def chunks():
        for start in range(0, len(data), chunk):
            yield data[start : start + chunk]

    return asyncio.run(read_multipart(f"multipart/form-data; boundary={boundary}", chunks(), BodyLimits(**limits)))


pieces = st.sampled_from(
    [
        b"--b",
        b"--",
        b"\r\n",
        b"\n",
        b'content-disposition: form-data; name="x"',
        b'content-disposition: form-data; name="image"; filename="y"',
        b"content-type: text/plain",
        b": ",
        b"\0",
        b"\xff",
        b"word",
    ]
)


@settings(deadline=None, max_examples=300)
@given(st.lists(pieces | st.binary(max_size=6), max_size=30).map(b"".join), st.integers(1, 50))
def test_any_multipart_bytes_are_a_form_or_an_error_of_ours(data, chunk):
    try:
        texts, uploads = multipart(data, "b", chunk)
    except (RequestError, TooLarge):
        return
    for upload in uploads:
        upload.file.close()
    assert all(isinstance(text, str) for _, text in texts)


def form(*parts: tuple[str, bytes]) -> bytes:
    return b"".join(b"--b\r\n" + head.encode() + b"\r\n\r\n" + body + b"\r\n" for head, body in parts) + b"--b--\r\n"


@pytest.mark.parametrize("chunk", [1, 7, 1000, 1 << 22])
def test_multipart_keeps_texts_and_files_whole_however_they_are_cut(chunk):
    big = bytes(range(256)) * (8000 if chunk > 1 else 40)
    data = form(
        ('Content-Disposition: form-data; name="prompt"', "Käse".encode()),
        ('content-disposition: form-data; name="image[]"; filename="ü.png"\r\nContent-Type: image/png', big),
        ('Content-Disposition: form-data; name="image[]"', b"\x89PNG\xff"),
    )
    texts, uploads = multipart(data, "b", chunk)
    assert texts == [("prompt", "Käse")]
    assert [(upload.name, upload.filename, upload.content_type) for upload in uploads] == [
        ("image[]", "ü.png", "image/png"),
        ("image[]", None, None),
    ]
    assert [upload.file.read() for upload in uploads] == [big, b"\x89PNG\xff"]
    assert uploads[0].size_bytes == len(big)
    for upload in uploads:
        upload.file.close()


def test_text_parts_may_be_larger_than_a_mebibyte_but_not_than_the_limit():
    part = 'Content-Disposition: form-data; name="image[url]"'
    texts, _ = multipart(form((part, b"x" * 3_000_000)), "b", 1 << 16)
    assert len(texts[0][1]) == 3_000_000
    with pytest.raises(TooLarge):
        multipart(form((part, b"x" * 2000), (part, b"x" * 2000)), "b", 100, body_bytes=3000)


@pytest.mark.parametrize(
    ("pairs", "value"),
    [
        ([("a", "1"), ("b", "2")], {"a": "1", "b": "2"}),
        ([("a[]", "1")], {"a": ["1"]}),
        ([("a[]", "1"), ("a[]", "2")], {"a": ["1", "2"]}),
        ([("a", "1"), ("a", "2")], {"a": ["1", "2"]}),
        ([("a[0]", "1"), ("a[1]", "2")], {"a": ["1", "2"]}),
        ([("a[b]", "1"), ("a[c][d]", "2")], {"a": {"b": "1", "c": {"d": "2"}}}),
        (
            [("loras[][path]", "p"), ("loras[][path]", "q"), ("loras[][scale]", "1")],
            {"loras": [{"path": "p", "scale": "1"}, {"path": "q"}]},
        ),
        ([("a[", "1"), ("[b]", "2")], {"a[": "1", "[b]": "2"}),
    ],
)
def test_flat_names_nest(pairs, value):
    assert nest(pairs) == value


# --- fields -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "given_value", "read_value"),
    [
        ("int", "2", 2),
        ("int", " 2 ", 2),
        ("int", 2.0, 2),
        ("int", "2.0", 2),
        ("int", "", None),
        ("int", None, None),
        ("float", "5", 5.0),
        ("float", 5, 5.0),
        ("bool", "true", True),
        ("bool", "False", False),
        ("bool", 1, True),
        ("bool", "0", False),
        ("bool", "", None),
        ("str", "", ""),
        ("json", '{"a": [1]}', {"a": [1]}),
        ("json", "plain", "plain"),
    ],
)
def test_coercion(kind, given_value, read_value):
    value = coerce(given_value, Field(name="x", kind=kind, help=""), "x")
    assert value == read_value
    assert type(value) is type(read_value)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("int", "1_000"),
        ("int", "٣"),
        ("int", True),
        ("int", "1" * 5000),
        ("int", "1e400"),
        ("float", "nan"),
        ("float", [1]),
        ("float", 10**400),
        ("bool", 2),
        ("bool", "maybe"),
        ("str", 5),
        ("str", "\ud800"),
        ("json", "{"),
        ("json", float("inf")),
        ("json", 2**64),
        ("json", [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]),
    ],
)
def test_coercion_refuses(kind, value):
    with pytest.raises(RequestError) as caught:
        coerce(value, Field(name="x", kind=kind, help=""), "x")
    assert caught.value.param == "x"
    assert len(caught.value.message) < 300


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1280x720", "1280X720", "1280*720", "1280×720", " 1280 x 720 "])
def test_spellings_of_a_size(text):
    assert asked_size(text, None, None) == Size(1280, 720)


@pytest.mark.parametrize("text", ["auto", "AUTO", "", "  ", None])
def test_size_left_to_the_model(text):
    assert asked_size(text, None, None) is None


def test_width_and_height():
    assert asked_size(None, 640, 480) == Size(640, 480)
    assert asked_size("auto", 640, 480) == Size(640, 480)
    assert asked_size("640x480", 640, 480) == Size(640, 480)


def card_of(multiple: int, native: int | None, min_side: int = 16):
    return image_card(size_multiple=multiple, max_native_pixels=native, min_side=min_side)


@pytest.mark.parametrize(
    ("asked", "multiple", "native", "drawn"),
    [
        ("1280x720", 32, None, "1280x736"),
        ("1024x1024", 16, 256 * 256, "256x256"),
        ("256x256", 16, 256 * 256, "256x256"),
        ("250x258", 16, 256 * 256, "256x256"),
        ("100x100", 16, 256 * 256, "112x112"),
        ("1920x1080", 16, 256 * 256, "336x192"),
        ("16x128", 16, 256 * 256, "16x128"),
    ],
)
def test_drawn_sizes(asked, multiple, native, drawn):
    assert str(drawn_size(asked_size(asked, None, None), card_of(multiple, native))) == drawn


@settings(deadline=None, max_examples=500)
@given(
    st.integers(16, 4096),
    st.integers(16, 4096),
    st.sampled_from([8, 16, 32, 64]),
    st.sampled_from([None, 128 * 128, 256 * 256, 1024 * 1024]),
)
def test_drawn_size_is_legal_covers_or_keeps_the_aspect(width, height, multiple, native):
    card = card_of(multiple, native)
    drawn = drawn_size(Size(width, height), card)
    assert drawn.width % multiple == drawn.height % multiple == 0
    assert min(drawn.width, drawn.height) >= multiple
    if native is None or (drawn.width >= width and drawn.height >= height):
        assert 0 <= drawn.width - width < multiple
        assert 0 <= drawn.height - height < multiple
    else:
        assert drawn.width * drawn.height <= native
        # Nearly all of the count is used where the aspect allows it.
        if max(width, height) <= 2 * min(width, height) and multiple <= 16 and native >= 256 * 256:
            assert drawn.width * drawn.height >= native * 0.8
            assert abs(drawn.width / drawn.height / (width / height) - 1) < 0.15


# --- defaults -----------------------------------------------------------------------------------------------------


def resolved(card=CARD, config=CONFIG, **body):
    return Resolver(config=config).images({"prompt": "a cube", **body}, card, "anonymous")


def test_absent_fields_have_the_cards_defaults():
    [drawing] = resolved().drawings
    request = drawing.request
    assert (request.num_inference_steps, request.guidance_scale, request.task) == (4, 2.5, "T2I")
    assert (drawing.output.width, drawing.output.height, drawing.output.format) == (64, 48, "png")
    assert drawing.output.compression == 75
    assert request.timeout_s == CONFIG.request_timeout_s


def test_steps_given_win_over_quality():
    [drawing] = resolved(quality="high", steps=3).drawings
    assert drawing.request.num_inference_steps == 3


def test_a_request_without_a_negative_prompt_has_the_models_own():
    card = image_card(default_negative_prompt=" ")

    def negative_prompt(card=card, **body):
        [drawing] = resolved(card, **body).drawings
        return drawing.request.negative_prompt

    assert negative_prompt() == " "
    assert negative_prompt(negative_prompt="blurry") == "blurry"
    assert negative_prompt(CARD) is None


def test_true_cfg_scale_is_the_pipelines_own_argument_or_else_guidance():
    own = image_card(parameters={"true_cfg_scale": "float"})
    [drawing] = resolved(own, true_cfg_scale=3, guidance_scale=1).drawings
    assert (drawing.request.extra, drawing.request.guidance_scale) == ({"true_cfg_scale": 3.0}, 1.0)
    [drawing] = resolved(true_cfg_scale=3).drawings
    assert (drawing.request.extra, drawing.request.guidance_scale) == ({}, 3.0)
    assert resolved(true_cfg_scale=3, guidance_scale=1).ignored == ("true_cfg_scale",)


def test_deterministic_by_request_or_by_flag():
    assert resolved(deterministic="true").drawings[0].request.deterministic
    assert resolved(config=ServeConfig(deterministic=True)).drawings[0].request.deterministic
    assert not resolved().drawings[0].request.deterministic


def test_quality_mode_by_request_or_by_flag():
    def mode_of(config=CONFIG, **body):
        return resolved(config=config, **body).drawings[0].request.quality_mode

    fast = ServeConfig(quality_mode="fast")
    assert (mode_of(), mode_of(quality_mode="high"), mode_of(quality_mode="HIGH")) == ("exact", "high", "high")
    assert (mode_of(fast), mode_of(fast, quality_mode="exact")) == ("fast", "exact")


def test_a_mode_that_can_leave_nothing_out_of_so_few_steps_says_so():
    assert resolved(quality_mode="fast", steps=30).warnings == ()
    [said] = resolved(quality_mode="fast", steps=4).warnings
    assert "4 steps" in said
    # A server's default is nobody's wish.
    assert resolved(config=ServeConfig(quality_mode="fast"), steps=4).warnings == ()


def test_null_means_absent():
    nothing = {name: None for name in NAMES if name != "prompt"}
    first, second = resolved(**nothing).drawings[0], resolved().drawings[0]
    assert first.output == second.output
    assert first.request.num_inference_steps == second.request.num_inference_steps


def test_strict_names_accept_the_served_name_and_path():
    config = ServeConfig(strict_model=True)
    for name in ("acme/painter-1", "/models/painter", None, ""):
        resolved(config=config, model=name)
    with pytest.raises(NotFound):
        resolved(config=config, model="dall-e-3")


def test_limits_are_named():
    with pytest.raises(RequestError, match="--max-pixels"):
        resolved(config=ServeConfig(max_pixels=1000), size="64x64")
    with pytest.raises(RequestError, match="between 1 and 7"):
        resolved(config=ServeConfig(max_steps=7), steps=8)
