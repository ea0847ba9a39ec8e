"""The container images of the stages, as written into a compiled pipeline.

Set TUTELAGE_IMAGE_LIGHT and TUTELAGE_IMAGE_TRAIN when compiling to use images of another registry. The run parameter
`pod_image` replaces the training image of a single run, without compiling again.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version


def _installed_version() -> str:
    try:
        return version("tutelage")
    except PackageNotFoundError:  # the source tree on sys.path without an installation
        return "latest"


VERSION = _installed_version()
LIGHT_IMAGE = os.environ.get("TUTELAGE_IMAGE_LIGHT") or f"tutelage/light:{VERSION}"
TRAIN_IMAGE = os.environ.get("TUTELAGE_IMAGE_TRAIN") or f"tutelage/train:{VERSION}"
