"""Downloads: only of what the user named, only by http(s), within limits."""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from napari_unet.errors import BadInput
from napari_unet.steps import Progress

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

MAX_DOWNLOAD = 4 << 30  # bytes
_TIMEOUT = 20  # seconds without a byte
_URL = re.compile(r"https?://", re.IGNORECASE)


def is_url(source: object) -> bool:
    """Tell whether something is an address on the web."""
    return bool(_URL.match(str(source)))


def open_url(url: str) -> Any:
    """Open an address, or say in words why that fails."""
    try:
        # Not urlopen's, which also reads local files.
        opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler,
            urllib.request.HTTPHandler,
            urllib.request.HTTPSHandler,
            urllib.request.HTTPDefaultErrorHandler,
            urllib.request.HTTPErrorProcessor,
            urllib.request.HTTPRedirectHandler,
        ):
            opener.add_handler(handler())
        request = urllib.request.Request(url, headers={"User-Agent": "napari-unet"})
        return opener.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            raise BadInput(
                f"{url[:200]} cannot be had: the server says {error.code} "
                f"{error.reason}. Check the address."
            ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise BadInput(
            f"{url[:200]} cannot be reached ({first_line(error)}). Check the address "
            "and the network, or download the package in a browser and choose the file."
        ) from error


def download_steps(url: str, path: Path) -> Generator[Progress, None, None]:
    """Download a file whole, with progress in kB."""
    yield Progress(0, 1, "connecting")
    with open_url(url) as stream, path.open("wb") as file:
        size, told = 0, time.monotonic()
        total = stream.length or 0  # where the server tells it
        try:
            # What has come, so that a slow server does not hold up a cancel.
            while chunk := stream.read1(1 << 16):
                size += file.write(chunk)
                if size > MAX_DOWNLOAD:
                    raise BadInput(
                        f"{url[:200]} has more than {MAX_DOWNLOAD >> 30} GB, which no "
                        "model needs. Check the address."
                    )
                if time.monotonic() - told > 0.2:
                    told = time.monotonic()
                    of = f" of {total / 1e6:.1f}" if total else ""
                    message = f"downloading, {size / 1e6:.1f}{of} MB"
                    yield Progress(size >> 10, max(total, size, 1024) >> 10, message)
        except (OSError, http.client.HTTPException) as error:
            raise _incomplete(url, size, total, error) from error
        if size < total:
            raise _incomplete(url, size, total, None)


def _incomplete(url: str, size: int, total: int, why: Exception | None) -> BadInput:
    reason = f" ({first_line(why)})" if why else ""
    return BadInput(
        f"The download of {url[:200]} broke off after {size} of {total or '?'} bytes"
        f"{reason}. Try again."
    )


def first_line(error: BaseException) -> str:
    """Return what an error says, as a part of a sentence."""
    lines = str(getattr(error, "reason", "") or error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
