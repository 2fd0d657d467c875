"""What a clip begins with, and what the served model makes of it: a picture, a clip to draw anew, one to go on with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..core.card import ModelCard
from ..core.errors import RequestError
from ..core.request import Task
from .fields import shown
from .sizes import Size

Start = Literal["picture", "redraw", "extend"]
"""A first frame; a clip that is drawn anew as the prompt says; a clip that goes on after its last frame."""

_TASKS: dict[Start | None, Task] = {None: "T2V", "picture": "I2V", "redraw": "V2V", "extend": "I2V"}
_MISSING: dict[Start, str] = {
    "picture": "makes clips from a prompt alone and takes no input picture",
    "redraw": "does not draw clips anew",
    "extend": "does not go on from a picture, and so cannot extend a clip",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """`param` is the request's field and `folder` the one for the server's copies.

    Of a clip, `num_frames` are its frames at `fps` a second, which is a whole number where the clip is this server's
    own; `video_id` is its id then.
    """

    start: Start
    param: str
    folder: Path
    size: Size
    num_frames: int = 1
    fps: float = 1.0
    video_id: str | None = None

    @property
    def picture(self) -> Path:
        """The first frame, at the size that is drawn."""
        return self.folder / "first.png"

    @property
    def clip(self) -> Path:
        """The clip's frames, in the form of `GenerateRequest.video`."""
        return self.folder / "clip.npy"

    @property
    def sound(self) -> Path:
        """The sound of a clip that goes on, in the form of `OutputSpec.continues_sound`."""
        return self.folder / "sound.npy"


def clip_task(card: ModelCard, start: Start | None, param: str, asked: str | None = None) -> Task:
    """Return the task by which the model makes a clip with this start (None: from the prompt alone).

    Raises RequestError where it cannot, or where the request asks for another one; `param` is the field to name.
    """
    if card.media != "video":
        raise RequestError(
            f"Model '{card.name}' makes pictures; send the request to /v1/images/generations.",
            param="model",
            code="unsupported_by_model",
        )
    task = _TASKS[start]
    if task not in card.tasks and (task == "V2V" or "TI2V" not in card.tasks):
        if start is None:
            raise RequestError(
                f"Missing required parameter: '{param}': model '{card.name}' needs an input picture.",
                param=param,
                code="missing_required_parameter",
            )
        message = f"'{param}': model '{card.name}' {_MISSING[start]}."
        raise RequestError(message, param=param, code="unsupported_by_model")
    if asked is not None and (asked.upper() not in card.tasks or asked.upper() not in (task, "TI2V")):
        raise RequestError(
            f"task_type {shown(asked)}: this request is {task}, and model '{card.name}' does {', '.join(card.tasks)}.",
            param="task_type",
            code="unsupported_task",
        )
    return task if task in card.tasks else "TI2V"
