"""A tiny S3 server in memory for benchmarks: it answers every request after a fixed latency.

Lists, reads, writes (also conditionally) and removes objects of one process. Objects that are given as functions are
rendered when they are read, so that hundreds of thousands of small files need little memory.
"""

import asyncio
import bisect
import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_PAGE = 1000  # keys of one listing request, as on S3
_WRITTEN = datetime(2026, 11, 1, tzinfo=UTC)


@dataclass
class StubS3:
    """Serves `objects` (bucket/key -> content) at `url` until the process ends."""

    latency: float = 0.03  # seconds before each answer
    objects: dict[str, bytes | Callable[[], bytes]] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)  # by kind: LIST, GET, HEAD, PUT, DELETE
    url: str = ""
    _keys: list[str] | None = None

    def add(self, name: str, content: bytes | Callable[[], bytes], size: int = 0, etag: str = "") -> None:
        """An object given as a function needs its `size` and an `etag`."""
        self.objects[name] = content
        if isinstance(content, bytes):
            size, etag = len(content), hashlib.md5(content).hexdigest()
        self.sizes[name], self.etags[name], self._keys = size, f'"{etag}"', None

    def start(self) -> None:
        ready = threading.Event()

        async def serve() -> None:
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            ready.set()
            await server.serve_forever()

        threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
        ready.wait()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                method, target, _ = line.decode().split(" ", 2)
                headers = {}
                while (line := await reader.readline()).strip():
                    name, _, value = line.decode().partition(":")
                    headers[name.strip().lower()] = value.strip()
                if headers.get("expect"):
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await asyncio.sleep(self.latency)
                status, answered, content = self._answer(method, target, headers, body)
                lines = [f"HTTP/1.1 {status} -", f"Date: {format_datetime(datetime.now(UTC), usegmt=True)}"]
                lines += [f"{name}: {value}" for name, value in ({"Content-Length": len(content)} | answered).items()]
                writer.write("\r\n".join([*lines, "", ""]).encode() + (b"" if method == "HEAD" else content))
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _answer(
        self, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, object], bytes]:
        parts = urlsplit(target)
        name, query = unquote(parts.path).lstrip("/"), parse_qs(parts.query)
        if method == "GET" and "list-type" in query:
            self.requests["LIST"] += 1
            return 200, {"Content-Type": "application/xml"}, self._page(name.strip("/"), query)
        self.requests[method] += 1
        if method == "PUT":
            etag = self.etags.get(name)
            if (headers.get("if-none-match") == "*" and etag) or headers.get("if-match", etag) != etag:
                return 412, {}, b"<Error><Code>PreconditionFailed</Code><Message>no</Message></Error>"
            self.add(name, _unchunked(headers, body))
            return 200, {"ETag": self.etags[name]}, b""
        if method == "DELETE":
            for kept in (self.objects, self.sizes, self.etags):
                kept.pop(name, None)
            self._keys = None
            return 204, {}, b""
        if name not in self.objects:
            return 404, {}, b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>"
        about = {"ETag": self.etags[name], "Last-Modified": format_datetime(_WRITTEN, usegmt=True)}
        if method == "HEAD":
            return 200, about | {"Content-Length": self.sizes[name]}, b""
        found = self.objects[name]
        content = found if isinstance(found, bytes) else found()
        if "range" in headers:
            first, _, last = headers["range"].removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(content) - int(last))
            end = min(len(content), int(last) + 1) if first and last else len(content)
            about |= {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
            return 206, about, content[start:end]
        return 200, about, content

    def _page(self, bucket: str, query: dict[str, list[str]]) -> bytes:
        if self._keys is None:
            self._keys = sorted(self.objects)
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        start = f"{bucket}/{query.get('continuation-token', query.get('start-after', ['']))[0]}"
        at = bisect.bisect_left(self._keys, max(f"{bucket}/{prefix}", start))
        if at < len(self._keys) and self._keys[at] == start:
            at += 1
        listed: list[str] = []
        last, more = "", False
        while at < len(self._keys) and self._keys[at].startswith(f"{bucket}/{prefix}"):
            if len(listed) == _PAGE:
                more = True
                break
            name = self._keys[at]
            key = name[len(bucket) + 1 :]
            folder, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if found:
                listed.append(f"<CommonPrefixes><Prefix>{escape(prefix + folder)}/</Prefix></CommonPrefixes>")
                last = f"{prefix}{folder}/\U0010ffff"
                at = bisect.bisect_left(self._keys, f"{bucket}/{last}")
                continue
            listed.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>2026-11-01T00:00:00.000Z</LastModified>"
                f"<ETag>{escape(self.etags[name])}</ETag><Size>{self.sizes[name]}</Size>"
                "<StorageClass>STANDARD</StorageClass></Contents>"
            )
            last = key
            at += 1
        token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if more else ""
        return (
            f"<ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(listed)}</ListBucketResult>"
        ).encode()


def _unchunked(headers: dict[str, str], body: bytes) -> bytes:
    """The content of a body in chunks with signatures or checksums (aws-chunked)."""
    if "aws-chunked" not in headers.get("content-encoding", "") and "x-amz-decoded-content-length" not in headers:
        return body
    content, rest = b"", body
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        count = int(size.partition(b";")[0], 16)
        if not count:
            break
        content, rest = content + rest[:count], rest[count + 2 :]
    return content
