"""Questions as TRL reads them, images included."""

import base64
import binascii
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset  # pyright: ignore[reportMissingTypeStubs]

from rtap_core.errors import ConfigError
from rtap_training.questions import Question
from rtap_training.tasks.base import PicturedQuestion
from rtap_training.tasks.jsonl import MAX_PATH


def build_dataset(questions: Sequence[Question], *, sees_images: bool) -> Dataset:
    """Columns ``prompt``, ``row`` (the question's index) and, where there are any, ``image``.

    Raises ConfigError where a policy without eyes is asked about images, where only some questions have one, and where
    one cannot be opened.
    """
    pictured = [q for q in questions if isinstance(q, PicturedQuestion)]
    if pictured and not sees_images:
        raise ConfigError("these questions have images, but the policy is a language model without a vision encoder")
    if pictured and len(pictured) < len(questions):
        raise ConfigError(
            f"{len(pictured)} of {len(questions)} questions have an image; processors take all or none in a batch"
        )
    rows: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": q.question}], "row": row}
        | ({"image": open_image(q.image)} if isinstance(q, PicturedQuestion) else {})
        for row, q in enumerate(questions)
    ]
    return cast(Any, Dataset).from_list(rows)


def open_image(image: str) -> Any:
    """The PIL image of a file, or of base64 with or without the head of a data URL. Raises ConfigError."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("questions with images need the package pillow") from error
    try:
        if len(image) < MAX_PATH and Path(image).is_file():
            source: Any = image
        else:
            source = io.BytesIO(base64.b64decode(image.rpartition("base64,")[2], validate=True))
        with Image.open(source) as opened:
            return opened.convert("RGB")
    except (OSError, binascii.Error) as error:  # PIL's own errors are OSErrors
        raise ConfigError(f"{image[:80]!r} is neither an image file nor base64 of one: {error}") from error
