"""A local stand-in for Google Cloud Storage: its JSON interface as far as TensorStore and gcsfs use it, with generations and their conditions.

Objects live in memory. `requests` counts what was asked; `fail` says which requests are answered with 403: no right, which is not tried again.
"""

import collections
import http.server
import itertools
import json
import threading
import urllib.parse
from pathlib import Path


class Store:
    def __init__(self, folder: Path | None = None):
        """folder: whose files are the objects of every bucket to begin with."""
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.uploads: dict[str, tuple[str, dict]] = {}
        self.numbers, self.lock, self.requests, self.fail = itertools.count(1), threading.RLock(), collections.Counter(), lambda line: False
        for file in (f for f in Path(folder).rglob("*") if f.is_file()) if folder else ():
            self.put(str(file.relative_to(folder)), file.read_bytes())
        # room for all reads that are asked for at once: those that a queue of five turns away come back a minute later
        quiet = lambda self, *of: None  # a client that was killed leaves its connections broken
        several = {"request_queue_size": 1024, "daemon_threads": True, "handle_error": quiet}
        self._server = type("Several", (http.server.ThreadingHTTPServer,), several)(
            ("127.0.0.1", 0), type("Here", (_Handler,), {"store": self})
        )
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def put(self, name: str, data: bytes) -> dict:
        self.objects[name] = bytes(data), next(self.numbers)
        return self.told(name)

    def told(self, name: str) -> dict:
        data, generation = self.objects[name]
        when = "2026-01-01T00:00:00.000Z"
        told = {"kind": "storage#object", "name": name, "bucket": "vla", "size": str(len(data)), "generation": str(generation)}
        return told | {"metageneration": "1", "timeCreated": when, "updated": when, "storageClass": "STANDARD"}

    def env(self) -> dict[str, str]:
        """In which gs:// is this store."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GCE_METADATA_ROOT": self.address.removeprefix("http://"),
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which asks the real service what kind of bucket it is
            "JAX_PLATFORMS": "cpu",
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; the second would wait 40 ms for the client's acknowledgement
    store: Store

    def do_GET(self):
        self._serve("GET")

    def do_POST(self):
        self._serve("POST")

    def do_PUT(self):
        self._serve("PUT")

    def do_DELETE(self):
        self._serve("DELETE")

    def _serve(self, verb):
        body = self._body()
        url = urllib.parse.urlparse(self.path)
        asked = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        with self.store.lock:
            self.store.requests[verb] += 1
            if self.store.fail(f"{verb} {self.path}"):
                return self._answer(403, b"")
            if url.path.startswith("/upload/") or url.path.startswith("/resumable/"):
                return self._upload(asked, body)
            bucket, found, key = url.path.partition("/o/")
            for word in ("/rewriteTo/", "/copyTo/"):
                source, copied, target = key.partition(word)
                if verb == "POST" and copied:
                    return self._copy(urllib.parse.unquote(source), urllib.parse.unquote(target.partition("/o/")[2]))
            name = urllib.parse.unquote(key)
            if not found:
                if bucket.endswith("/o") and verb == "GET":
                    return self._list(asked)
                return self._json({"kind": "storage#bucket", "name": "vla"}) if bucket.endswith("/b/vla") else self._answer(404, b"")
            if name not in self.store.objects:
                return self._answer(404, b"")
            data, generation = self.store.objects[name]
            if verb == "DELETE":
                if asked.get("ifGenerationMatch", str(generation)) != str(generation):
                    return self._answer(412, b"")
                del self.store.objects[name]
                return self._answer(204, b"")
            if asked.get("ifGenerationNotMatch") == str(generation):
                return self._answer(304, b"")
            if asked.get("ifGenerationMatch", str(generation)) != str(generation):
                return self._answer(412, b"")
            if asked.get("alt") != "media":
                return self._json(self.store.told(name))
            self._media(data, generation)

    def _media(self, data, generation):
        headers = {"x-goog-generation": generation}
        if "Range" not in self.headers:
            return self._answer(200, data, headers)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        first, last = (int(first), min(int(last or len(data)), len(data) - 1)) if first else (len(data) - int(last), len(data) - 1)
        if first >= len(data):
            return self._answer(416, b"", headers)
        self._answer(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _list(self, asked):
        prefix, mark, names, below = asked.get("prefix", ""), asked.get("delimiter", ""), [], set()
        low, high = asked.get("startOffset", ""), asked.get("endOffset") or "\uffff"
        for name in sorted(n for n in self.store.objects if n.startswith(prefix) and low <= n < high):
            inner, cut, _ = name[len(prefix) :].partition(mark) if mark else ("", "", "")
            if cut:
                below.add(prefix + inner + mark)
            else:
                names.append(name)
        self._json({"kind": "storage#objects", "items": [self.store.told(n) for n in names], "prefixes": sorted(below)})

    def _upload(self, asked, body):
        kind = asked.get("uploadType")
        if kind == "resumable" and "upload_id" not in asked:
            told = json.loads(body or b"{}")
            number = str(next(self.store.numbers))
            self.store.uploads[number] = asked.get("name") or told["name"], asked
            place = f"{self.store.address}/upload/storage/v1/b/vla/o?uploadType=resumable&upload_id={number}"
            return self._answer(200, b"", {"Location": place})
        name = asked.get("name", "")
        if kind == "resumable":
            name, asked = self.store.uploads[asked["upload_id"]]
        elif kind == "multipart":  # --boundary, headers, blank line, JSON, --boundary, headers, blank line, bytes, --boundary--
            mark = b"--" + self.headers["Content-Type"].partition("boundary=")[2].strip("\"'").encode()
            parts = [
                part.partition(b"\r\n\r\n")[2] if b"\r\n\r\n" in part else part.partition(b"\n\n")[2] for part in body.split(mark)[1:3]
            ]
            end = b"\r\n" if parts[1].endswith(b"\r\n") else b"\n"
            name, body = json.loads(parts[0])["name"], parts[1].removesuffix(end)
        now = str(self.store.objects[name][1]) if name in self.store.objects else "0"
        if asked.get("ifGenerationMatch", now) != now:
            return self._answer(412, b"")
        self._json(self.store.put(name, body))

    def _copy(self, source, target):
        if source not in self.store.objects:
            return self._answer(404, b"")
        told = self.store.put(target, self.store.objects[source][0])
        size = told["size"]
        self._json({"kind": "storage#rewriteResponse", "done": True, "totalBytesRewritten": size, "objectSize": size, "resource": told})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            out = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, told):
        self._answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _answer(self, code, body, headers=()):
        self.send_response(code)
        for key, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if code not in (204, 304):
            self.wfile.write(body)

    def log_message(self, *args):
        pass
