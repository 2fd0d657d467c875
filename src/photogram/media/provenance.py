"""How a picture or a clip was made, written into its file and read back.

PNG carries text chunks (`Software`, `Description`, `photogram`) and XMP; JPEG and WebP carry EXIF (`Software`,
`ImageDescription`, `UserComment`) and XMP; MP4 carries `description`, `comment` and XMP. `Description` is the prompt
for people and other programs; `photogram`, `UserComment` and `comment` are the whole `Provenance` as JSON. Nothing
here tells the time, the request or the file's quality: the same request makes the same metadata.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from xml.sax.saxutils import quoteattr

import av
import msgspec
from PIL import Image

from .. import __version__
from ..core.card import ModelCard
from ..core.errors import RequestError
from ..core.request import GenerateRequest, LoraTarget, OutputSpec, QualityMode

_SOFTWARE, _DESCRIPTION, _USER_COMMENT, _EXIF_IFD = 0x0131, 0x010E, 0x9286, 0x8769
_JPEG_SEGMENT_BYTES = 65533
_EXIF_HEADER = b"Exif\0\0"
_XMP_HEADER = b"http://ns.adobe.com/xap/1.0/\0"
_ASCII, _UNICODE = b"ASCII\0\0\0", b"UNICODE\0"
_GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


class UsedLora(msgspec.Struct, frozen=True, omit_defaults=True):
    nickname: str
    strength: float
    target: LoraTarget = "all"


class Provenance(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is needed to make the picture again. `size` is the file's, `generated_size` the model's, as ``WxH``.

    `shortened` is true where a JPEG's 64 KB of metadata could not hold the prompts in full.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int
    steps: int
    guidance_scale: float | None = None
    size: str
    generated_size: str
    num_frames: int | None = None
    fps: int | None = None
    model: str
    revision: str | None = None
    quality_mode: QualityMode = "exact"
    loras: tuple[UsedLora, ...] = ()
    software: str = f"photogram {__version__}"
    shortened: bool = False


# `software` is written even where it is this version's default: another version reads it.
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Provenance)


def describe(request: GenerateRequest, output: OutputSpec, card: ModelCard) -> Provenance:
    """Return how `request` is made by the served model."""
    return Provenance(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        size=f"{output.width}x{output.height}",
        generated_size=f"{request.width}x{request.height}",
        num_frames=request.num_frames if output.format == "mp4" else None,
        fps=request.fps if output.format == "mp4" else None,
        model=card.name,
        revision=card.revision,
        quality_mode=request.quality_mode,
        loras=used_loras(request),
    )


def used_loras(request: GenerateRequest) -> tuple[UsedLora, ...]:
    """Return a request's LoRAs, without where their files lie."""
    return tuple(UsedLora(use.nickname, use.strength, use.target) for use in request.loras)


def png_texts(provenance: Provenance) -> tuple[tuple[str, str], ...]:
    """Return the text chunks of a PNG, (keyword, text)."""
    return (
        ("Software", provenance.software),
        # NUL ends a text in PNG; the JSON below has it escaped.
        ("Description", provenance.prompt.replace("\0", "\N{REPLACEMENT CHARACTER}")),
        ("photogram", _json(provenance)),
        ("XML:com.adobe.xmp", _xmp(provenance)),
    )


def exif_and_xmp(provenance: Provenance, *, segments: bool) -> tuple[bytes, bytes]:
    """Return an EXIF block (with its ``Exif`` header) and an XMP packet.

    With `segments` (JPEG) each has to fit 64 KB: prompts beyond that are shortened, and `shortened` says so.
    """
    if not segments:
        return _exif(provenance), _xmp(provenance).encode()
    exif = _fitting(provenance, _exif, _JPEG_SEGMENT_BYTES)
    xmp = _fitting(provenance, lambda it: _xmp(it).encode(), _JPEG_SEGMENT_BYTES - len(_XMP_HEADER))
    return exif, xmp


def clip_texts(provenance: Provenance) -> dict[str, str]:
    """Return the metadata of an MP4 file."""
    return {"description": provenance.prompt, "comment": _json(provenance)}


def xmp_packet(provenance: Provenance) -> bytes:
    """Return the XMP packet of a file that has room for a whole one."""
    return _xmp(provenance).encode()


def read_provenance(data: bytes) -> Provenance | None:
    """Return what a PNG, JPEG, WebP or MP4 file made by photogram says of itself, None where it says nothing.

    Raises RequestError when the bytes are neither a picture nor a clip.
    """
    text: object
    try:
        if data[4:8] == b"ftyp":
            with av.open(io.BytesIO(data), "r", format="mp4") as container:
                return _parsed(container.metadata.get("comment"))
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            text = image.info.get("photogram")
            if text is None:
                text = _comment_text(image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b""))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, av.FFmpegError) as error:
        raise RequestError(f"the file is no readable picture or clip ({error}).", param="image") from error
    return _parsed(text)


def _parsed(text: object) -> Provenance | None:
    if not isinstance(text, str) or not text.startswith("{"):
        return None
    try:
        return _decoder.decode(text.encode())  # Pillow's own kind of str is none to msgspec
    except msgspec.DecodeError:
        return None  # another program's comment that happens to begin with a brace


def _json(provenance: Provenance) -> str:
    return _encoder.encode({"software": provenance.software, **msgspec.to_builtins(provenance)}).decode()


def _exif(provenance: Provenance) -> bytes:
    text = _json(provenance)
    # A byte-order mark is not wanted: readers take the order of the EXIF block, which Pillow writes little-endian.
    comment = _ASCII + text.encode() if text.isascii() else _UNICODE + text.encode("utf-16-le")
    exif = Image.Exif()
    exif[_SOFTWARE] = provenance.software
    # EXIF calls this field ASCII; UTF-8 is what programs write and read there.
    exif[_DESCRIPTION] = provenance.prompt.replace("\0", " ").encode()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = comment
    return exif.tobytes()


def _comment_text(comment: object) -> str:
    if isinstance(comment, bytes) and comment.startswith(_UNICODE):
        return comment[len(_UNICODE) :].decode("utf-16-le", "replace")
    if isinstance(comment, bytes) and comment.startswith(_ASCII):
        return comment[len(_ASCII) :].decode("ascii", "replace")
    return ""


def _xmp(provenance: Provenance) -> str:
    """Return an XMP packet: the prompt, the program, the parameters, and that the picture is made by a model."""
    return (
        '<?xpacket begin="\N{ZERO WIDTH NO-BREAK SPACE}" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:photogram="urn:photogram:1"'
        f" xmp:CreatorTool={_attribute(provenance.software)}"
        f' Iptc4xmpExt:DigitalSourceType="{_GENERATED}"'
        f" photogram:parameters={_attribute(_json(provenance))}/>"
        '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )


def _attribute(text: str) -> str:
    # JSON escapes the control characters; these two are all that is left of what XML cannot hold.
    return quoteattr(text.replace("\ufffe", "\N{REPLACEMENT CHARACTER}").replace("\uffff", "\N{REPLACEMENT CHARACTER}"))


def _fitting(provenance: Provenance, block: Callable[[Provenance], bytes], limit_bytes: int) -> bytes:
    length = max(len(provenance.prompt), len(provenance.negative_prompt or ""))
    made = block(provenance)
    while len(made) > limit_bytes and length:
        length = length * 7 // 8
        negative = None if provenance.negative_prompt is None else provenance.negative_prompt[:length]
        provenance = msgspec.structs.replace(
            provenance, prompt=provenance.prompt[:length], negative_prompt=negative, shortened=True
        )
        made = block(provenance)
    return made
