"""Images with what they were made from inside: PNG, WebP and JPEG."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.ExifTags import IFD, Base

from autoencoder.common.weights import replacing
from autoencoder.images.files import save_png

FORMATS = {"png": "PNG", "webp": "WEBP", "jpg": "JPEG"}
QUALITY = 95  # of WebP and JPEG
UNICODE = b"UNICODE\0"  # how a UserComment of EXIF says that UTF-16 follows


def save_image(image: Image.Image, path: Path, parameters: Mapping[str, Any]) -> None:
    """Write an image of the kind that its suffix says, by one rename, with `parameters` as JSON.

    In a PNG they are the text chunk "parameters"; in the others, the UserComment of EXIF, as other tools have it.
    """
    text = json.dumps(parameters, ensure_ascii=False)
    if path.suffix == ".png":
        save_png(image, path, {"parameters": text})
        return
    exif = Image.Exif()
    exif[IFD.Exif] = {Base.UserComment: UNICODE + text.encode("utf-16-be")}
    with replacing(path) as partial:
        image.save(partial, format=FORMATS[path.suffix[1:]], quality=QUALITY, exif=exif)


def read_parameters(path: Path) -> dict[str, Any]:
    """What `save_image` wrote into an image; nothing where it holds nothing of the kind."""
    with Image.open(path) as image:  # reads the header only
        if path.suffix == ".png":
            text = image.text.get("parameters", "")
        else:
            comment = image.getexif().get_ifd(IFD.Exif).get(Base.UserComment, b"")
            text = comment.removeprefix(UNICODE).decode("utf-16-be") if comment.startswith(UNICODE) else ""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
