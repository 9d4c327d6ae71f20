"""Dataset of questions and images for TRL."""

import base64
import binascii
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset  # pyright: ignore[reportMissingTypeStubs]

from rtap_core.errors import ConfigError
from rtap_training.data.questions import Question, message
from rtap_training.tasks.base import PicturedQuestion
from rtap_training.tasks.jsonl import MAX_PATH


def build_dataset(
    questions: Sequence[Question], template: str = "", system_prompt: str = "", *, sees_images: bool
) -> Dataset:
    """Dataset with the columns ``prompt``, ``row`` (question index) and, for questions with images, ``image``.

    Raises ConfigError if the policy is text-only, if only some questions have an image, or if one cannot be opened.
    """
    pictured = [q for q in questions if isinstance(q, PicturedQuestion)]
    if pictured and not sees_images:
        raise ConfigError(
            f"{len(pictured)} questions have images, but the policy has no vision encoder; use a vision-language policy"
        )
    if pictured and len(pictured) < len(questions):
        raise ConfigError(
            f"{len(pictured)} of {len(questions)} questions have an image; give an image to all questions or to none"
        )
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    rows: list[dict[str, Any]] = [
        {"prompt": [*system, {"role": "user", "content": message(q, template)}], "row": row}
        | ({"image": open_image(q.image)} if isinstance(q, PicturedQuestion) else {})
        for row, q in enumerate(questions)
    ]
    return Dataset.from_list(rows)


def open_image(image: str) -> Any:
    """Open an image file, base64 text or a data URL as a PIL image. Raises ConfigError."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("questions with images need the package pillow; install it") from error
    try:
        if len(image) < MAX_PATH and Path(image).is_file():
            source: Any = image
        else:
            source = io.BytesIO(base64.b64decode(image.rpartition("base64,")[2], validate=True))
        with Image.open(source) as opened:
            return opened.convert("RGB")
    except (OSError, binascii.Error) as error:  # PIL errors are OSErrors
        raise ConfigError(f"{image[:80]!r} is neither an image file nor a base64 image: {error}") from error
