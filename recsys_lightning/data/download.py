"""Downloads that are whole or absent: resumed, counted, hashed, and only then put in place."""

import fcntl
import hashlib
import http.client
import ipaddress
import json
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import IO, Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from recsys_lightning.errors import InputError
from recsys_lightning.files import replacing, sync_folder

log = logging.getLogger(__name__)

MAX_BYTES = 16 * 2**30
_CHUNK_BYTES = 2**18
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}


class _TransientError(Exception):
    """A failure that may be gone at the next attempt."""


def download(
    url: str,
    path: Path,
    sha256: str | None = None,
    max_bytes: int = MAX_BYTES,
    *,
    attempts: int = 5,
    backoff_s: float = 1.0,
    timeout_s: float = 30.0,
) -> None:
    """Fetch `url` to `path`, or raise and leave no file there.

    Bytes go to ``<name>.part``, which a later call resumes while the server still has the same resource. The part
    takes the target's place in one step after its size and digest are checked; ``<name>.json`` records where it came
    from, its size and its SHA-256. A target that is there already and agrees with its record is left alone.

    Args:
        url: an ``https`` address. Plain ``http`` is for loopback hosts only; redirects keep to the same rule.
        path: the target file.
        sha256: the digest that the file must have, in hex.
        max_bytes: refuse anything larger.
        attempts: how many times in a row a download may fail without getting further.
        backoff_s: the wait after the first failure; it doubles with each further one.
        timeout_s: how long to wait for the server at any one time.

    Raises:
        InputError: the address is not allowed, the server does not deliver, or the file is not the expected one.
    """
    _check_address(url, url)
    if path.exists():
        _check_present(path, sha256)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked_part(path, url) as part:
            if not path.exists():  # another process may have finished it while this one waited for the lock
                _fetch_with_retries(url, path, part, max_bytes, attempts, backoff_s, timeout_s)
                _put_in_place(url, path, part, sha256)
    except OSError as error:
        raise InputError(f"cannot write {error.filename or path}: {error.strerror or error}; {_cure()}") from error


def verify(path: Path) -> bool:
    """Whether a file has the size and SHA-256 that its download recorded; a file without a record counts as good."""
    record_path = _record_path(path)
    if not path.is_file():
        return False
    if not record_path.is_file():
        return True
    record = _read_json(record_path)
    return path.stat().st_size == record.get("bytes") and _digest(path) == record.get("sha256")


def _cure() -> str:
    return "or fetch the file by other means and name its folder with --data.raw_dir DIR"


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _part_path(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _part_record_path(path: Path) -> Path:
    return path.with_name(path.name + ".part.json")


def _check_present(path: Path, sha256: str | None) -> None:
    # The user may have put his own file over ours, so a file that disagrees is never overwritten.
    if not verify(path):
        raise InputError(
            f"{path} is not what its record {_record_path(path).name} says (size or SHA-256 differ); delete both to "
            "download again, or delete the record alone to use the file as it is"
        )
    if sha256 is not None and _digest(path) != sha256.lower():
        raise InputError(f"{path}: SHA-256 is {_digest(path)}, expected {sha256.lower()}; delete it to download again")


def _is_loopback(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_address(url: str, first_url: str) -> None:
    scheme = urllib.parse.urlsplit(url).scheme.lower()
    # A public server must not be able to send us to a service of this machine, so loopback only follows loopback.
    if scheme == "https" or (scheme == "http" and _is_loopback(url) and _is_loopback(first_url)):
        return
    how = "is not https" if url == first_url else f"redirects to {url}, which is not https"
    raise InputError(f"{first_url} {how}; name an https address, {_cure()}")


class _HttpsRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects only to addresses that could have been asked for in the first place."""

    def __init__(self, first_url: str) -> None:
        self.first_url = first_url

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        _check_address(newurl, self.first_url)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextmanager
def _locked_part(path: Path, url: str) -> Iterator[BinaryIO]:
    """The part file, open for this process alone."""
    part_path = _part_path(path)
    # O_NOFOLLOW: a link left in the folder must not make us write elsewhere.
    descriptor = os.open(part_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "r+b") as part:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process is downloading {url} to {part_path}; wait for it to finish") from error
        # Between opening and locking the other process may have renamed this very file to the target.
        if not part_path.exists() or not os.path.samestat(os.fstat(part.fileno()), part_path.stat()):
            raise InputError(f"another process has just downloaded {url} to {path}; run the command again")
        try:
            yield part
        finally:
            if part_path.exists() and part_path.stat().st_size == 0:
                part_path.unlink()
                _part_record_path(path).unlink(missing_ok=True)


def _fetch_with_retries(
    url: str, path: Path, part: BinaryIO, max_bytes: int, attempts: int, backoff_s: float, timeout_s: float
) -> None:
    furthest = 0
    failures = 0
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(path.name, total=None)
        while True:
            try:
                _fetch(url, path, part, max_bytes, timeout_s, progress, task)
                return
            except _TransientError as error:
                size = _size(part)
                failures = 1 if size > furthest else failures + 1
                furthest = max(furthest, size)
                if failures >= attempts:
                    raise InputError(
                        f"cannot download {url}: {error} ({failures} attempts in a row, {size:,} bytes so far); "
                        f"run the command again to go on, {_cure()}"
                    ) from error
                log.warning("%s: %s; attempt %d of %d follows", url, error, failures + 1, attempts)
                time.sleep(backoff_s * 2 ** (failures - 1))


def _fetch(
    url: str, path: Path, part: BinaryIO, max_bytes: int, timeout_s: float, progress: Progress, task: TaskID
) -> None:
    """Make the part whole, from where it stands when the server agrees that it is the same resource."""
    start, validator = _resume_point(url, path, part)
    request = urllib.request.Request(url, headers={"User-Agent": "recsys-lightning"})  # noqa: S310 (address is checked)
    if validator is not None:
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", validator)
    with _open(request, url, timeout_s, part) as response:
        total, start = _expected(response, start, url, part)
        found = _validator(response.headers)
        if start and found not in (None, validator):  # some servers know Range and not If-Range
            part.truncate(0)
            raise _TransientError("the file on the server has changed; starting over")
        if total is not None and total > max_bytes:
            raise InputError(f"{url} has {total:,} bytes, the limit is {max_bytes:,}; check the address, {_cure()}")
        part.truncate(start)
        part.seek(start)
        _write_json(_part_record_path(path), {"url": url, "validator": validator if start else found})
        progress.update(task, total=total, completed=start)
        _copy(response, part, url, max_bytes, progress, task)
    if total is not None and _size(part) != total:
        raise _TransientError(f"the connection closed after {_size(part):,} of {total:,} bytes")


def _resume_point(url: str, path: Path, part: BinaryIO) -> tuple[int, str | None]:
    """Where to go on, and the mark by which the server can tell that the resource has not changed."""
    record_path = _part_record_path(path)
    record = _read_json(record_path) if record_path.is_file() else {}
    validator = record.get("validator")
    if _size(part) == 0 or record.get("url") != url or not isinstance(validator, str):
        return 0, None
    return _size(part), validator


def _open(request: urllib.request.Request, url: str, timeout_s: float, part: BinaryIO) -> http.client.HTTPResponse:
    handlers: list[urllib.request.BaseHandler] = [_HttpsRedirects(url)]
    if _is_loopback(url):
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        response = urllib.request.build_opener(*handlers).open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.truncate(0)
            raise _TransientError("the server has no bytes where the part ends; starting over") from error
        if error.code in _TRANSIENT_STATUS:
            raise _TransientError(f"HTTP {error.code} {error.reason}") from error
        raise InputError(
            f"cannot download {url}: HTTP {error.code} {error.reason}; check the name, {_cure()}"
        ) from error
    except urllib.error.URLError as error:
        raise _TransientError(str(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(str(error) or type(error).__name__) from error
    assert isinstance(response, http.client.HTTPResponse)  # noqa: S101 (narrows the type: http and https only)
    return response


def _expected(response: http.client.HTTPResponse, start: int, url: str, part: BinaryIO) -> tuple[int | None, int]:
    """The size of the whole resource (None: sent in chunks, which carry their own end) and where this body begins."""
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        first, total = _content_range(response.headers.get("Content-Range", ""))
        if total is None or first != start:
            part.truncate(0)
            raise _TransientError("the server sent another range than asked for; starting over")
        return total, start
    length = response.headers.get("Content-Length", "")
    if length.isdecimal():
        return int(length), 0
    if response.headers.get("Transfer-Encoding", "").lower() == "chunked":
        return None, 0
    raise InputError(f"{url}: the server does not say how long the file is, so it cannot be told whole; {_cure()[3:]}")


def _content_range(header: str) -> tuple[int | None, int | None]:
    """First byte and total of ``bytes 5-9/10``."""
    unit, _, rest = header.partition(" ")
    span, _, total = rest.partition("/")
    first = span.partition("-")[0]
    if unit != "bytes" or not first.isdecimal() or not total.isdecimal():
        return None, None
    return int(first), int(total)


def _validator(headers: Message) -> str | None:
    etag = headers.get("ETag")
    # RFC 9110, 13.1.5: a weak tag does not promise equal bytes.
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def _copy(
    response: http.client.HTTPResponse, part: BinaryIO, url: str, max_bytes: int, progress: Progress, task: TaskID
) -> None:
    try:
        while chunk := _receive(response):
            part.write(chunk)
            if part.tell() > max_bytes:
                raise InputError(f"{url} is larger than the limit of {max_bytes:,} bytes; check the address, {_cure()}")
            progress.advance(task, len(chunk))
    finally:
        part.flush()
        os.fsync(part.fileno())


def _receive(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(str(error) or type(error).__name__) from error


def _put_in_place(url: str, path: Path, part: BinaryIO, sha256: str | None) -> None:
    part_path = _part_path(path)
    digest = _digest(part_path)
    if sha256 is not None and digest != sha256.lower():
        part_path.unlink()
        _part_record_path(path).unlink(missing_ok=True)
        raise InputError(f"{url}: SHA-256 is {digest}, expected {sha256.lower()}; it was discarded, {_cure()[3:]}")
    # The record first: a file of ours without one would pass for a file of the user's.
    _write_json(_record_path(path), {"url": url, "bytes": _size(part), "sha256": digest})
    part_path.replace(path)
    sync_folder(path.parent)
    _part_record_path(path).unlink(missing_ok=True)


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(values, indent=2).encode() + b"\n")
