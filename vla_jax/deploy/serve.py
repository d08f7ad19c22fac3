"""An exported policy behind a websocket, as openpi's client speaks it, with /healthz and /metrics on the same port.

On connecting the client is sent metadata; then every message is an observation and is answered in order: by a binary message, or by a text
message when something is wrong with it. openpi's client raises a RuntimeError with that text. The connection stays usable.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import os
import signal
import stat
import sys
import time
import traceback
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jax.monitoring
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from vla_jax import __version__
from vla_jax.console import say
from vla_jax.deploy import observation, served, wire
from vla_jax.deploy.batching import Answer, Batcher, Busy
from vla_jax.deploy.counters import Counters, resident_bytes
from vla_jax.deploy.served import Served
from vla_jax.tokens.actions import MalformedTokens
from vla_jax.types import UserError

TOKEN_VARIABLE = "VLA_SERVE_TOKEN"
_SHORTEST_TOKEN = 16
_UNREAD, _SWEEP_S = 16 << 20, 1.0  # bytes that a client has not read, many times what is ever answered; how often they are looked at
_LONGEST_ID = 256
_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Settings:
    """max_batch: observations in one call of the model; queue: requests that may wait; max_mb: of one message; timeout_s: of a request,
    and of sending its answer; connections: at once."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 8
    queue: int = 64
    max_mb: float = 16
    timeout_s: float = 30.0
    connections: int = 64


def read_token(file: str) -> str:
    """From the file, else from the environment (VLA_SERVE_TOKEN); "": none is wanted. Raises: UserError for one that is no secret."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if file:
        path = Path(file).expanduser()
        token = path.read_bytes().decode("utf-8", "replace").strip()
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            say(f"others on this machine may read {path}: chmod 600 it")
    if (file or TOKEN_VARIABLE in os.environ) and (len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise UserError(
            f"the token in {file or TOKEN_VARIABLE} has {len(token)} characters; it must be ASCII of at least {_SHORTEST_TOKEN}, such as "
            "`openssl rand -hex 32` prints."
        )
    return token


class Server:
    """robots: at least one. Serves until `stop` is set, answers what was taken in, and ends."""

    def __init__(self, robots: dict[str, Served], settings: Settings, token: str = ""):
        self.robots, self.settings, self._token = robots, settings, token
        self.counters, self.stop, self.port = Counters(), asyncio.Event(), 0
        self._ready, self._in_hand = asyncio.Event(), 0
        self._open: set[ServerConnection] = set()
        self._batcher = Batcher(self._infer, most=settings.max_batch, depth=settings.queue, prepare=self._prepare)
        self._only = next(iter(robots)) if len(robots) == 1 else ""

    async def run(self, *, listening=lambda port: None) -> bool:
        """listening(port) is called once connections are taken. -> whether all that was taken in was answered."""
        s, quiet = self.settings, logging.getLogger("vla_jax.serve.websockets")
        quiet.setLevel(logging.CRITICAL)  # whoever sends garbage shall not fill the log
        how = {"max_size": int(s.max_mb * 1e6), "max_queue": 2, "compression": None, "logger": quiet, "close_timeout": 2}
        # no Origin: a web page that somebody on this machine has open shall not drive the robot
        async with serve(self._talk, s.host, s.port, process_request=self._http, origins=[None], server_header=None, **how) as server:
            self.port = server.sockets[0].getsockname()[1]
            listening(self.port)
            self._batcher.start()
            warming, stopping, sweeping = (asyncio.create_task(x) for x in (self._warm(), self.stop.wait(), self._sweep()))
            await asyncio.wait([warming, stopping], return_when=asyncio.FIRST_COMPLETED)
            if warming.done():
                warming.result()  # raises what it raised
                await stopping
            else:
                warming.cancel()
            try:
                return await self._drain()
            finally:
                sweeping.cancel()

    def _prepare(self) -> float:
        """-> seconds."""
        started = time.monotonic()
        for robot in self.robots.values():
            served.warm(robot, most=self.settings.max_batch, say=say, go_on=lambda: not self._batcher.ending)
        return time.monotonic() - started

    async def _warm(self) -> None:
        took = await asyncio.wrap_future(self._batcher.prepared)
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        self._ready.set()
        say(f"ready after {took:.1f} s: {', '.join(self.robots)}")

    def _compiled(self, name: str, seconds: float, **_) -> None:
        if name == _COMPILED:
            self.counters.add("vla_compiled_while_serving")

    async def _drain(self) -> bool:
        """What is in hand is answered, what comes now is told to come again."""
        done = await asyncio.to_thread(self._batcher.end, self.settings.timeout_s)
        until = time.monotonic() + self.settings.timeout_s
        while self._in_hand and time.monotonic() < until:
            await asyncio.sleep(0.01)
        return done and not self._in_hand

    def _http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers all but what is to become a websocket."""
        url = urlsplit(request.path)
        if url.path == "/healthz":
            state = self._state()
            return connection.respond(200 if state == "ok" else 503, state + "\n")
        if not self._admitted(request):
            self.counters.add("vla_refused_connections", why="token")
            return connection.respond(401, "this server wants a token: `Authorization: Api-Key TOKEN`\n")
        if url.path == "/metrics":
            answer = connection.respond(200, self.counters.text(self._gauges()))
            del answer.headers["Content-Type"]  # setting would add another
            answer.headers["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
            return answer
        if url.path != "/":
            return connection.respond(404, "here are /, a websocket, /healthz and /metrics\n")
        if (robot := _asked(request)) and robot not in self.robots:
            return connection.respond(404, f"no robot of that name here; there are: {', '.join(self.robots)}\n")
        if len(self._open) >= self.settings.connections:
            self.counters.add("vla_refused_connections", why="full")
            return connection.respond(503, f"{len(self._open)} connections are open, and no more are taken\n")
        return None

    def _admitted(self, request: Request) -> bool:
        if not self._token:
            return True
        given = request.headers.get_all("Authorization")
        _, _, token = (given[0] if len(given) == 1 else "").partition(" ")
        return hmac.compare_digest(token.encode("utf-8", "replace"), self._token.encode())

    def _state(self) -> str:
        if self.stop.is_set():
            return "ending"
        if not self._ready.is_set():
            return "warming up"
        return (
            "ok" if self._batcher.running_s() < self.settings.timeout_s else f"the model has not answered for {self.settings.timeout_s:g} s"
        )

    def _gauges(self) -> dict[str, float]:
        b = self._batcher
        gauges = {"vla_ready": self._state() == "ok", "vla_connections": len(self._open), "vla_waiting": b.waiting}
        gauges |= {"vla_model_calls": sum(b.calls.values()), "vla_model_observations": sum(n * c for n, c in list(b.calls.items()))}
        return gauges | {"process_resident_memory_bytes": resident_bytes()}

    async def _talk(self, connection: ServerConnection) -> None:
        self._open.add(connection)
        try:
            gone = asyncio.create_task(connection.wait_closed())
            ready = asyncio.create_task(self._ready.wait())
            await asyncio.wait([gone, ready], return_when=asyncio.FIRST_COMPLETED)
            for task in (gone, ready):
                task.cancel()
            if not self._ready.is_set():
                return
            named = _asked(connection.request)
            await self._send(connection, wire.pack(self._metadata(named)))
            async for data in connection:
                self._in_hand += 1
                started = time.monotonic()
                try:
                    answer, outcome, robot = await self._answer(data, named)
                    await self._send(connection, answer)
                    self.counters.add("vla_requests", outcome=outcome, robot=robot)
                    self.counters.took(f"vla_request_{'ok' if outcome == 'ok' else 'error'}", time.monotonic() - started)
                finally:
                    self._in_hand -= 1
        except ConnectionClosed:
            if connection in self._open:  # else it was let go
                self.counters.add("vla_closed_by_client_or_network")
        except TimeoutError:
            self._let_go(connection)
        finally:
            self._open.discard(connection)

    def _let_go(self, connection: ServerConnection) -> None:
        self._open.discard(connection)
        self.counters.add("vla_closed_as_too_slow")
        connection.transport.abort()

    async def _sweep(self) -> None:
        """Whoever pings and does not read is sent pongs all the same, and websockets does not wait for them to go: they would fill memory."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            for connection in [c for c in self._open if c.transport.get_write_buffer_size() > _UNREAD]:
                self._let_go(connection)

    async def _send(self, connection: ServerConnection, message: bytes | str) -> None:
        await asyncio.wait_for(connection.send(message), self.settings.timeout_s)

    def _metadata(self, named: str) -> dict:
        made = {
            n: {"spec": r.spec(), "limits": r.limits.describe() if r.limits else None, "prompt_tokens": r.prompt_tokens}
            for n, r in self.robots.items()
        }
        shown = {named: made[named]} if named else made
        return {
            "server": "vla_jax",
            "version": __version__,
            "robot": named or self._only,
            "robots": shown,
            "max_bytes": int(self.settings.max_mb * 1e6),
        }

    async def _answer(self, data: bytes | str, named: str) -> tuple[bytes | str, str, str]:
        """-> (what to send, outcome, robot)."""
        name = ""
        try:
            message = None if isinstance(data, str) else wire.unpack(data)
            if not isinstance(message, dict):
                raise wire.Malformed(f"a message is a map packed by msgpack, got {'text' if message is None else type(message).__name__}")
            name = self._robot(message, named)
            if type(ticket := message.get("request_id", 0)) not in (int, str) or len(str(ticket)) > _LONGEST_ID:
                raise observation.Unfit(f"request_id must be a whole number or text of at most {_LONGEST_ID} characters")
            seen = self.robots[name].check(message)
            if self.stop.is_set():
                raise Busy("the server is ending")
            found = await self._batcher.ask(name, seen, timeout_s=self.settings.timeout_s)
            return wire.pack(self._reply(found, message, seen)), "ok", name
        except wire.Malformed as e:
            return _error("malformed", str(e)), "malformed", name
        except observation.Unfit as e:
            return (
                _error("observation", str(e), self.robots[name].spec() if name else {"robots": list(self.robots)}),
                "observation",
                name,
            )
        except Busy as e:
            return _error("busy", f"{e}; nothing was done, ask again"), "busy", name
        except TimeoutError:
            return _error("timeout", f"no answer within {self.settings.timeout_s:g} s"), "timeout", name
        except MalformedTokens as e:
            return _error("tokens", f"the model's answer is no chunk of actions: {e}"), "tokens", name
        except Exception as e:
            say(f"a request failed:\n{traceback.format_exc()}")
            return _error("internal", f"{type(e).__name__}: {str(e)[:500]}"), "internal", name

    def _robot(self, message: dict, named: str) -> str:
        name = message.get("robot", named or self._only)
        if not isinstance(name, str) or name not in self.robots:
            said = repr(name[:80]) if isinstance(name, str) else f"(a {type(name).__name__})"
            raise observation.Unfit(f"robot {said} is not served; name one of {', '.join(self.robots)} in the observation or by ?robot=")
        return name

    def _reply(self, found: Answer, message: dict, seen: dict) -> dict:
        self.counters.took("vla_queue", found.queue_s)
        self.counters.took("vla_model", found.infer_s)
        out = dict(found.result)
        out["server_timing"] = {"infer_ms": found.infer_s * 1e3, "queue_ms": found.queue_s * 1e3, "batch": found.together}
        if "request_id" in message:
            out["request_id"] = message["request_id"]
        return out | ({"unused": seen["unused"]} if "unused" in seen else {})

    def _infer(self, robot: str, observations: list[dict]) -> list[dict]:
        return self.robots[robot].answers(observations, self.counters)


def run(robots: dict[str, Served], settings: Settings, token: str = "") -> int:
    """Until SIGTERM or SIGINT. -> exit code: 0 when all that was taken in was answered, else 1. Raises: UserError for an address in use."""

    heard = []

    async def main() -> bool:
        server, loop = Server(robots, settings, token), asyncio.get_running_loop()

        def stop(which: signal.Signals) -> None:
            say(f"{which.name}: ending; requests in hand are answered first")
            server.stop.set()
            for again in (signal.SIGTERM, signal.SIGINT):  # the second one ends at once
                loop.remove_signal_handler(again)

        for which in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(which, stop, which)
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host

        def listening(port: int) -> None:
            heard.append(port)
            say(f"listening on ws://{shown}:{port}")

        return await server.run(listening=listening)

    if settings.host not in ("127.0.0.1", "localhost", "::1"):
        say(
            f"{settings.host} is reached from other machines: {'a token is asked for, but it' if token else 'NO TOKEN is asked for, and what is sent'} "
            "travels unencrypted. Whoever reaches the port can take part in moving a robot: keep it in a private network or behind a tunnel."
        )
    if keeps_keys(sys.version_info[:3]):
        say(
            f"Python {sys.version.split()[0]} keeps every key of every message for ever (cpython#113993): clients that send ever new ones fill "
            "memory. Serve with Python 3.12.7 or later, or with 3.11."
        )
    try:
        done = asyncio.run(main())
    except OSError as e:
        if heard:
            raise
        raise UserError(f"cannot listen on {settings.host}:{settings.port}: {e.strerror or e}. Give another --port or --host.") from e
    say("ended" if done else "ended, with requests unanswered")
    return 0 if done else 1


def keeps_keys(python: tuple[int, int, int]) -> bool:
    """Whether interned text is never freed: msgpack interns the keys of maps."""
    return (3, 12, 0) <= python < (3, 12, 7)


def _asked(request: Request | None) -> str:
    with contextlib.suppress(ValueError):
        return parse_qs(urlsplit(request.path).query, max_num_fields=8).get("robot", [""])[0] if request else ""
    return ""


def _error(code: str, message: str, expected: dict | None = None) -> str:
    """What a client shows and ours takes apart (deploy.client)."""
    return f"vla-jax error {code}: {message}" + (f"\nexpected: {json.dumps(expected, indent=1)}" if expected else "")
