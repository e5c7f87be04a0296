import fcntl
import hashlib
import http.server
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recsys_lightning.data.download import download, verify
from recsys_lightning.errors import InputError

BODY = random.Random(0).randbytes(300_000)
DIGEST = hashlib.sha256(BODY).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves one body on loopback, and misbehaves as told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = BODY
        self.etag: str | None = '"one"'
        self.knows_range = True
        self.ignores_if_range = False
        self.says_length = True
        self.sends_chunks = False
        self.cuts: list[int] = []  # after how many bytes to hang up, a request each
        self.failures: list[int] = []  # HTTP errors to answer first
        self.location: str | None = None
        self.requests: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/data.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(dict(self.headers.items()))
        if server.failures:
            self.send_error(server.failures.pop(0))
            return
        if server.location is not None:
            self.send_response(302)
            self.send_header("Location", server.location)
            self.end_headers()
            return
        start = self.range_start()
        if start is not None and start >= len(server.body):
            self.send_error(416)
            return
        body = server.body[start or 0 :]
        self.send_response(200 if start is None else 206)
        if server.sends_chunks:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:70_000], body[70_000:], b""))
        elif server.says_length:
            self.send_header("Content-Length", str(len(body)))
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        if server.etag is not None:
            self.send_header("ETag", server.etag)
        self.end_headers()
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def range_start(self) -> int | None:
        wanted = self.headers.get("Range")
        same = self.server.ignores_if_range or self.headers.get("If-Range") == self.server.etag
        if not wanted or not self.server.knows_range or not same:
            return None
        return int(wanted.removeprefix("bytes=").rstrip("-"))


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(server: Server, path: Path, attempts: int = 3, **options: Any) -> None:
    download(server.url, path, attempts=attempts, backoff_s=0.001, timeout_s=5, **options)


def assert_whole(path: Path, body: bytes = BODY) -> None:
    """The target, its record, and nothing else in the folder."""
    assert path.read_bytes() == body
    assert verify(path)
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([path.name, path.name + ".json"])


def test_a_download_is_recorded_with_address_size_and_digest(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "new" / "data.gz"
    fetch(server, path, sha256=DIGEST.upper())
    assert_whole(path)
    assert json.loads((tmp_path / "new" / "data.gz.json").read_text()) == {
        "url": server.url,
        "bytes": 300_000,
        "sha256": DIGEST,
    }


def test_a_download_cut_at_any_byte_resumes_to_the_identical_file(server: Server, tmp_path: Path) -> None:
    offsets = [0, 1, 299_999, *random.Random(1).sample(range(300_000), 20)]
    for offset in offsets:
        path = tmp_path / str(offset) / "data.gz"
        server.cuts, server.requests = [offset], []
        with pytest.raises(InputError, match=r"--data\.raw_dir DIR"):
            fetch(server, path, attempts=1)
        assert not path.exists()
        fetch(server, path)
        assert_whole(path)
        assert server.requests[1].get("Range") == (f"bytes={offset}-" if offset else None)


def test_a_connection_that_keeps_breaking_gets_there_as_long_as_it_moves(server: Server, tmp_path: Path) -> None:
    server.cuts = [30_000] * 9
    fetch(server, tmp_path / "data.gz", attempts=2)
    assert_whole(tmp_path / "data.gz")
    assert len(server.requests) == 10


def test_a_truncated_body_never_becomes_the_target(server: Server, tmp_path: Path) -> None:
    server.knows_range, server.cuts = False, [1000] * 3
    with pytest.raises(InputError, match=r"data\.gz: the connection closed after 1,000 of 300,000 bytes \(3 attempts"):
        fetch(server, tmp_path / "data.gz", attempts=3)
    assert not (tmp_path / "data.gz").exists()
    assert len(server.requests) == 3


def test_a_server_without_range_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.knows_range, server.cuts = False, [123_456]
    fetch(server, tmp_path / "data.gz")
    assert_whole(tmp_path / "data.gz")


def test_a_server_without_validators_is_not_asked_to_resume(server: Server, tmp_path: Path) -> None:
    server.etag, server.cuts = None, [123_456]
    fetch(server, tmp_path / "data.gz")
    assert_whole(tmp_path / "data.gz")
    assert "Range" not in server.requests[1]


@pytest.mark.parametrize("ignores_if_range", [False, True])
def test_parts_of_two_versions_are_never_joined(server: Server, tmp_path: Path, ignores_if_range: bool) -> None:
    server.cuts = [100_000]
    with pytest.raises(InputError):
        fetch(server, tmp_path / "data.gz", attempts=1)
    server.body, server.etag, server.ignores_if_range = BODY[::-1], '"two"', ignores_if_range
    fetch(server, tmp_path / "data.gz")
    assert_whole(tmp_path / "data.gz", BODY[::-1])


def test_a_part_longer_than_the_resource_is_started_over(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000]
    with pytest.raises(InputError):
        fetch(server, tmp_path / "data.gz", attempts=1)
    (tmp_path / "data.gz.part").write_bytes(BODY + b"more")
    fetch(server, tmp_path / "data.gz")
    assert_whole(tmp_path / "data.gz")


def test_a_part_of_another_address_is_not_used(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.gz.part").write_bytes(b"x" * 1000)
    (tmp_path / "data.gz.part.json").write_text(json.dumps({"url": "https://example.org/x", "validator": '"one"'}))
    fetch(server, tmp_path / "data.gz")
    assert_whole(tmp_path / "data.gz")


def test_a_wrong_digest_is_refused_and_discarded(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"SHA-256 is {DIGEST}, expected {'0' * 64}"):
        fetch(server, tmp_path / "data.gz", sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("says_length", [False, True])
def test_more_bytes_than_the_limit_are_refused(server: Server, tmp_path: Path, says_length: bool) -> None:
    server.says_length = says_length
    with pytest.raises(InputError, match="limit is 299,999" if says_length else "does not say how long"):
        fetch(server, tmp_path / "data.gz", max_bytes=299_999)
    assert not (tmp_path / "data.gz").exists()


def test_a_chunked_body_is_whole_or_refused(server: Server, tmp_path: Path) -> None:
    server.sends_chunks, server.knows_range = True, False
    fetch(server, tmp_path / "whole" / "data.gz")
    assert_whole(tmp_path / "whole" / "data.gz")
    for cut in (3, 60_000, 70_009, 70_012, 299_000, 300_018):
        server.cuts = [cut]
        with pytest.raises(InputError, match="cannot download"):
            fetch(server, tmp_path / "data.gz", attempts=1)
        assert not (tmp_path / "data.gz").exists()
    with pytest.raises(InputError, match="larger than the limit of 299,999 bytes"):
        fetch(server, tmp_path / "data.gz", max_bytes=299_999)
    assert not (tmp_path / "data.gz").exists()


def test_two_processes_do_not_write_one_part(server: Server, tmp_path: Path) -> None:
    with (tmp_path / "data.gz.part").open("wb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is downloading"):
            fetch(server, tmp_path / "data.gz")
    fetch(server, tmp_path / "data.gz")
    assert_whole(tmp_path / "data.gz")


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server: Server, tmp_path: Path) -> None:
    server.failures = [503, 429]
    fetch(server, tmp_path / "data.gz")
    assert_whole(tmp_path / "data.gz")
    server.failures, server.requests = [404], []
    with pytest.raises(InputError, match=r"cannot download http.*data\.gz: HTTP 404 .*--data\.raw_dir DIR"):
        fetch(server, tmp_path / "other.gz")
    assert len(server.requests) == 1
    assert not list(tmp_path.glob("other*"))


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with Server() as server:
        url = server.url
    with pytest.raises(InputError, match=rf"cannot download {url}: .*refused.*2 attempts in a row"):
        download(url, tmp_path / "data.gz", attempts=2, backoff_s=0.001)


@pytest.mark.parametrize(
    "location", ["http://192.0.2.1/data.gz", "http://localhost.example.org/data.gz", "ftp://127.0.0.1/x", "file:///x"]
)
def test_a_redirect_away_from_https_is_refused(server: Server, tmp_path: Path, location: str) -> None:
    server.location = location
    with pytest.raises(InputError, match=f"{location}.* is not (https|allowed)"):
        fetch(server, tmp_path / "data.gz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://192.0.2.1/x", "ftp://example.org/x", "file:///etc/hostname", "data.gz"])
def test_only_https_is_fetched(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="is not https"):
        download(url, tmp_path / "x")


def test_a_whole_target_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    fetch(server, tmp_path / "data.gz")
    fetch(server, tmp_path / "data.gz", sha256=DIGEST)
    assert len(server.requests) == 1


def test_a_changed_target_is_reported_and_left_as_it_is(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "data.gz"
    fetch(server, path)
    damaged = BODY[:1000] + bytes([BODY[1000] ^ 1]) + BODY[1001:]
    path.write_bytes(damaged)
    assert not verify(path)
    with pytest.raises(InputError, match="delete both to download again"):
        fetch(server, path)
    assert path.read_bytes() == damaged


def test_a_file_of_the_user_is_accepted_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "data.gz").write_bytes(b"mine")
    assert verify(tmp_path / "data.gz")
    assert not verify(tmp_path / "absent.gz")


def test_links_do_not_lead_the_download_elsewhere(server: Server, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "data.gz.part").symlink_to(victim)
    with pytest.raises(InputError, match="cannot write"):
        fetch(server, folder / "data.gz")
    assert victim.read_bytes() == b"precious"
    (folder / "data.gz.part").unlink()
    (folder / "data.gz").symlink_to(tmp_path / "nowhere")
    fetch(server, folder / "data.gz")
    assert_whole(folder / "data.gz")
    assert not (tmp_path / "nowhere").exists()
