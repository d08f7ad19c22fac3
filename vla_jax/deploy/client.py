"""The robot's side of `vla-jax serve`: numpy, msgpack and websockets, no jax.

with Client("ws://gpu:8000", robot="bridge_dataset") as policy:
    reply = policy.act({"images": {"base": image}, "state": state, "prompt": "put the carrot on the plate"})
    reply["actions"]  # f32[k a] in robot units
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import time
from urllib.parse import quote

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import ClientConnection, connect

from vla_jax.deploy import wire

TOKEN_VARIABLE = "VLA_SERVE_TOKEN"
_ERROR = re.compile(r"vla-jax error (\w+): (.*)", re.DOTALL)
_AGAIN = ("busy",)  # nothing was done: asked again until the time is over
_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0


class ServerError(RuntimeError):
    """The server's own words. code: malformed, observation, robot, busy, timeout, tokens, internal or refused."""

    def __init__(self, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.code = code


class Client:
    """One connection, made anew where it breaks; not for several threads at once. timeout_s: of a whole `act`, with all its tries.

    token: else the environment's VLA_SERVE_TOKEN. connect_s: how long the first connection may take, the server's warm-up included.
    Raises: TimeoutError, ServerError.
    """

    def __init__(self, url: str, *, robot: str = "", token: str = "", timeout_s: float = 5.0, connect_s: float = 60.0):
        self.url = url.rstrip("/") + (f"/?robot={quote(robot, errors='replace')}" if robot else "/")
        self._token, self.timeout_s = token or os.environ.get(TOKEN_VARIABLE, ""), timeout_s
        self._socket: ClientConnection | None = None
        self._sent, self.metadata = 0, {}
        self._until_connected(time.monotonic() + connect_s)

    @property
    def spec(self) -> dict:
        """Of the robot that was named, or of the only one. Raises: ServerError."""
        name = self.metadata["robot"]
        if name not in self.metadata["robots"]:
            raise ServerError("robot", f"name one of {', '.join(self.metadata['robots'])}")
        return self.metadata["robots"][name]["spec"]

    def act(self, observation: dict) -> dict:
        """-> {"actions": f32[k a], "well_formed", "limits", "outside", "server_timing"}. A broken connection and a full server are tried again until
        timeout_s. Raises: TimeoutError; ServerError, when the server refuses the observation or fails."""
        until, pause = time.monotonic() + self.timeout_s, _PAUSE_S
        self._sent += 1
        data = wire.pack({**observation, "request_id": self._sent})
        if len(data) > self.metadata["max_bytes"]:
            raise ServerError(
                "malformed", f"the observation has {len(data)} bytes, the server takes {self.metadata['max_bytes']}: send smaller pictures"
            )
        while True:
            try:
                self._until_connected(until)
                answer = self.exchange(data, timeout_s=until - time.monotonic())
                if isinstance(answer, bytes):
                    reply = wire.unpack(answer)
                    if reply.get("request_id") != self._sent:  # an old answer must never move a robot
                        raise ServerError("internal", "an answer to another request came")
                    return reply
                raise _said(answer)
            except ServerError as e:
                if e.code not in _AGAIN or time.monotonic() + pause > until:
                    if e.code == "internal":
                        self.close()
                    raise
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            except (ConnectionClosed, OSError) as e:
                self.close()
                if isinstance(e, TimeoutError):
                    raise
                if isinstance(e, ConnectionClosed) and e.rcvd and e.rcvd.code == 1009:
                    raise ServerError("malformed", f"the server takes no message of {len(data)} bytes") from e

    def exchange(self, data: bytes | str, *, timeout_s: float) -> bytes | str:
        """Sends one message and waits for its answer, as they are. Raises: TimeoutError, and the connection is closed, so that a late answer
        is never taken for another's; ConnectionClosed."""
        try:
            self._socket.send(data)
            return self._socket.recv(timeout=max(timeout_s, 0))
        except TimeoutError:
            self.close()
            raise TimeoutError(f"no answer from {self.url} within {timeout_s:.3g} s") from None

    def close(self) -> None:
        if self._socket:
            # whoever is in a hurry does not wait for goodbyes
            self._socket.close_timeout = 0.2
            with contextlib.suppress(OSError, ConnectionClosed):
                self._socket.close()
        self._socket = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _until_connected(self, until: float) -> None:
        pause, last = _PAUSE_S, ""
        while self._socket is None:
            if (left := until - time.monotonic()) <= 0:
                raise TimeoutError(f"no connection to {self.url}{f' ({last})' if last else ''}")
            try:
                self._connect(left)
            except InvalidURI as e:
                raise ServerError("refused", str(e)) from e
            except InvalidHandshake as e:
                last, status = str(e), getattr(getattr(e, "response", None), "status_code", 503)
                if status in (400, 401, 403, 404):  # will be the same next time
                    body = getattr(e.response, "body", None) or b""
                    raise ServerError("refused", f"{last}: {bytes(body).decode(errors='replace').strip()}") from e
            except (OSError, ConnectionClosed, EOFError) as e:
                last = str(e) or type(e).__name__
            if self._socket is None:
                time.sleep(max(0.0, min(pause, until - time.monotonic())))
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _connect(self, left: float) -> None:
        headers = {"Authorization": f"Api-Key {self._token}"} if self._token else None
        how = {"compression": None, "max_size": 1 << 26, "proxy": None, "additional_headers": headers, "open_timeout": left}
        started, made = time.monotonic(), connect(self.url, **how)
        try:
            metadata = wire.unpack(made.recv(timeout=max(left - (time.monotonic() - started), 0)))
        except BaseException:
            made.close_timeout = 0.2
            made.close()
            raise
        if self.metadata and metadata.get("robots") != self.metadata["robots"]:  # the robot's program has checked another policy
            made.close()
            raise ServerError("refused", f"{self.url} serves another policy now: its spec or limits changed. Check them, and start anew.")
        # a send into a network that is gone would wait for minutes; receiving has a timeout of its own
        whole = max(self.timeout_s, 0.1)
        made.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(whole), int(whole % 1 * 1e6)))
        self.metadata, self._socket = metadata, made


def _said(text: str) -> ServerError:
    found = _ERROR.fullmatch(text)
    return ServerError(*found.groups()) if found else ServerError("internal", text)
