"""The server, with a policy that has no model: what is answered, refused, put together, and that nothing is lost."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fake_policy import FakePolicy, observation, served
from hypothesis import given, settings
from hypothesis import strategies as st

msgpack, websockets = pytest.importorskip("msgpack"), pytest.importorskip("websockets")
from websockets.sync.client import connect  # noqa: E402

from vla_jax.deploy import limits, serve, wire  # noqa: E402
from vla_jax.deploy.client import Client, ServerError  # noqa: E402
from vla_jax.types import UserError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
TOKEN = "a-token-that-is-long-enough"


@contextlib.contextmanager
def running(robots, token="", **how):
    """A server in a thread, from when it listens; .url, .port, .ends() -> whether all was answered."""
    listening, result = threading.Event(), concurrent.futures.Future()

    class Running:
        def ends(self):
            self.loop.call_soon_threadsafe(self.server.stop.set)
            return result.result(30)

        def get(self, path, **headers):
            link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
            link.request("GET", path, headers=headers)
            answer = link.getresponse()
            return answer.status, answer.read().decode(), answer.headers

        def until_ready(self):
            until = time.monotonic() + 20
            while self.get("/healthz")[0] != 200:
                assert time.monotonic() < until
                time.sleep(0.01)

    here = Running()

    async def main():
        here.loop, here.server = asyncio.get_running_loop(), serve.Server(robots, serve.Settings(**{"port": 0, **how}), token)

        def heard(port):
            here.port, here.url = port, f"ws://127.0.0.1:{port}"
            listening.set()

        return await here.server.run(listening=heard)

    thread = threading.Thread(target=lambda: result.set_result(asyncio.run(main())))
    thread.start()
    try:
        assert listening.wait(20)
        yield here
    finally:
        if not result.done():
            here.loop.call_soon_threadsafe(here.server.stop.set)
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def arm():
    """One server for what leaves it as it was."""
    with running({"tabletop_arm": served(FakePolicy(), limit=limits.Settings())}, max_mb=1, timeout_s=5) as here:
        here.until_ready()
        yield here


def plain(here, **how):
    """openpi's client by hand: connects, takes the metadata."""
    link = connect(here.url + "/", compression=None, max_size=None, proxy=None, **how)
    return link, msgpack.unpackb(link.recv(timeout=20))


def by_hand(x):
    return {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": list(x.shape)}


FLAT = {
    "observation/image": by_hand(np.zeros((8, 8, 3), np.uint8)),
    "observation/wrist_image": by_hand(np.zeros((8, 8, 3), np.uint8)),
    "observation/state": by_hand(np.array([0.25, 0.5, 0], np.float32)),
    "prompt": "push",
}


def test_the_wire_by_hand(arm):
    """As openpi's client does it, with msgpack alone: flat keys, metadata first, text for an error, and on it goes."""
    link, metadata = plain(arm)
    with link:
        assert metadata["robot"] == "tabletop_arm" and metadata["robots"]["tabletop_arm"]["spec"]["control_hz"] == 10
        link.send(msgpack.packb(FLAT))
        reply = msgpack.unpackb(link.recv(timeout=20))
        actions = reply["actions"]
        assert actions[b"__ndarray__"] is True and actions[b"dtype"] == "<f4" and actions[b"shape"] == [2, 3]
        assert np.array_equal(np.frombuffer(actions[b"data"], "<f4"), np.full(6, 0.75, np.float32))
        assert reply["server_timing"]["infer_ms"] >= 0 and reply["well_formed"] is True and "unused" not in reply
        link.send(msgpack.packb({k: v for k, v in FLAT.items() if k != "prompt"}))
        assert link.recv(timeout=20).startswith("vla-jax error observation: prompt must be text")
        link.send(msgpack.packb({**FLAT, "request_id": "a", "observation/colour": 1}))
        reply = msgpack.unpackb(link.recv(timeout=20))
        assert reply["request_id"] == "a" and reply["unused"] == ["observation/colour"]


def test_openpis_client(arm):
    theirs = pytest.importorskip("openpi_client.websocket_client_policy")
    client = theirs.WebsocketClientPolicy("127.0.0.1", arm.port)
    assert client.get_server_metadata()["server"] == "vla_jax"
    seen = {"observation/image": np.zeros((8, 8, 3), np.uint8), "observation/wrist_image": np.zeros((3, 8, 8), np.uint8), "prompt": "push"}
    reply = client.infer({**seen, "observation/state": np.array([0.5, 0, 0])})
    assert np.array_equal(reply["actions"], np.full((2, 3), 0.5, np.float32))
    with pytest.raises(RuntimeError, match=r"Error in inference server:\nvla-jax error observation: state must have shape \[3\]"):
        client.infer({**seen, "observation/state": np.zeros(4)})
    assert client.infer({**seen, "state": [0.25, 0.25, 0.25]})["actions"][0, 0] == 0.75


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o: o.pop("state"), "there is no state: send 3 numbers as 'state'"),
        (
            lambda o: o["images"].pop("wrist"),
            r"there is no picture of 'wrist': send it as images\['wrist'\] or as one of observation/wrist_image",
        ),
        (
            lambda o: o["images"].update(base=np.zeros((4, 4, 3), np.float32)),
            r"'base' must be uint8 \[h, w, 3\] RGB, got float32 \[4, 4, 3\]",
        ),
        (lambda o: o["images"].update(base=np.zeros((4, 4, 4), np.uint8)), r"got uint8 \[4, 4, 4\]"),
        (lambda o: o["images"].update(base=np.zeros((0, 4, 3), np.uint8)), "sides of 1 to 4096"),
        (lambda o: o["images"].update(base=b"jpeg"), "got bytes"),
        (
            lambda o: o["images"].update(front=np.zeros((4, 4, 3), np.uint8)),
            "images holds 'front', which this policy does not take; it takes base, wrist",
        ),
        (lambda o: o.update(images=[1]), "images must be a map"),
        (lambda o: o.update(state=np.zeros(5)), r"state must have shape \[3\] \(q1, q2, gripper\), got \[5\]"),
        (lambda o: o.update(state=np.zeros((1, 1, 3))), r"got \[1, 1, 3\]"),
        (lambda o: o.update(state=[1, [2], 3]), "state must be numbers, got list"),
        (lambda o: o.update(state="1,2,3"), "state must be numbers, got str"),
        (lambda o: o.update(state=np.array([1, 2, np.nan])), "state holds a number that is not finite"),
        (lambda o: o.update(state=np.array([1, 2, 1e300])), "state holds a number that is not finite"),
        (lambda o: o.update(state=np.array([True, False, True])), "state must be numbers"),
        (lambda o: o.update(prompt=b"push"), "prompt must be text"),
        (lambda o: o.update(prompt="x" * 5000), "prompt must be text of at most 4096"),
        (
            lambda o: o.update(prompt="x" * 87),
            r"the instruction has 87 tokens, and 97 in all precede the actions; this server takes instructions of 64 \(--prompt-tokens\), and 96",
        ),
        (lambda o: o.update(last_action=np.zeros(2)), r"last_action must have shape \[3\] \(dq1, dq2, gripper\)"),
        (lambda o: o.update(robot="r2d2"), "robot 'r2d2' is not served; name one of tabletop_arm"),
        (lambda o: o.update(robot=["a"]), r"robot \(a list\) is not served"),
        (lambda o: o.update(robot="r" * 1000), "robot 'r{80}' is not served"),
    ],
)
def test_a_wrong_observation_is_answered_with_what_was_expected(arm, change, said):
    with Client(arm.url) as client:
        wrong = observation(0.5)
        change(wrong)
        with pytest.raises(ServerError, match=said) as caught:
            client.act(wrong)
        assert caught.value.code == "observation" and "expected: {" in str(caught.value)
        assert client.act(observation(0.5))["actions"][0, 0] == 0.5


values = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
arrays = st.builds(
    lambda shape, dtype: by_hand(np.zeros(shape, dtype)),
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from(["u1", "f4", "f8", "i8", "?", "S2"]),
)
nested = st.recursive(
    values | arrays, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3), max_leaves=5
)
keys = (
    st.sampled_from(["images", "state", "prompt", "robot", "request_id", "last_action", *FLAT])
    | st.text(max_size=5)
    | st.binary(max_size=4)
)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300) | st.dictionaries(keys, nested, max_size=6).map(msgpack.packb))
def test_whatever_comes_is_answered_by_an_error(arm, data):
    if "fuzzed" not in arm.__dict__:
        arm.fuzzed, _ = plain(arm)
    arm.fuzzed.send(data)
    answer = arm.fuzzed.recv(timeout=20)
    assert isinstance(answer, str) and re.match("vla-jax error (malformed|observation): ", answer), answer


@settings(max_examples=150, deadline=None)
@given(keys, nested)
def test_one_odd_value_in_a_good_observation(arm, key, value):
    """It is answered, by actions or by an error that is not ours."""
    if "fuzzed" not in arm.__dict__:
        arm.fuzzed, _ = plain(arm)
    arm.fuzzed.send(msgpack.packb({**FLAT, key: value}))
    answer = arm.fuzzed.recv(timeout=20)
    assert isinstance(answer, bytes) or re.match("vla-jax error (malformed|observation): ", answer), answer


def test_after_all_that_it_still_acts(arm):
    with Client(arm.url) as client:
        assert client.act(observation(0.5))["actions"][0, 0] == 0.5
    assert "internal" not in arm.get("/metrics")[1]


@pytest.mark.parametrize(
    "sent",
    [
        b"\0\xff" * 500,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 500,
        b"POST / HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: \xff\r\n\r\n",
        b"",
    ],
)
def test_garbage_instead_of_http(arm, sent):
    with socket.create_connection(("127.0.0.1", arm.port), timeout=20) as raw:
        raw.sendall(sent)
        raw.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while raw.recv(4096):
                pass
    assert arm.get("/healthz")[0] == 200


@pytest.mark.parametrize("kind", ["text", "broken frame"])
def test_what_is_no_binary_message(arm, kind):
    link, _ = plain(arm)
    with link:
        if kind == "text":
            link.send("hello")
            assert "a message is a map packed by msgpack, got text" in link.recv(timeout=20)
        else:
            link.socket.sendall(b"\xff\xff\xff\xff\xff\xff")  # bits that are reserved
            with pytest.raises(websockets.exceptions.ConnectionClosed):
                link.recv(timeout=20)
    assert arm.get("/healthz")[0] == 200


def test_a_message_that_is_too_large(arm):
    big = observation(0.5)
    big["images"]["base"] = np.zeros((600, 600, 3), np.uint8)  # 1.08 MB
    with Client(arm.url) as client:
        with pytest.raises(ServerError, match="the server takes 1000000: send smaller pictures"):
            client.act(big)
        assert client.act(observation(0.5))["actions"][0, 0] == 0.5
        client.metadata["max_bytes"] = 10**9  # a client that does not look
        with pytest.raises(ServerError, match="the server takes no message of 10"):
            client.act(big)
        assert client.act(observation(0.5))["actions"][0, 0] == 0.5


def test_metrics_are_prometheus(arm):
    parser = pytest.importorskip("prometheus_client.parser")
    with Client(arm.url) as client:
        for _ in range(5):
            client.act(observation(3.0))  # 1 % to 99 % of a normal distribution reach to about 2.3
        status, text, headers = arm.get("/metrics")
    assert status == 200 and headers.get_all("Content-Type") == ["text/plain; version=0.0.4; charset=utf-8"]
    found = {
        s.name: s for family in parser.text_string_to_metric_families(text) for s in family.samples if not s.labels.get("kind") == "rate"
    }
    assert found["vla_limited_total"].value >= 5 * 2 * 2 and found["vla_ready"].value == 1 and found["vla_connections"].value >= 1
    assert found["process_resident_memory_bytes"].value > 1e7
    quantiles = re.findall(r'vla_request_ok_seconds\{quantile="(.*?)"\} (\S+)', text)
    assert [q for q, _ in quantiles] == ["0.5", "0.9", "0.99"] and [float(v) for _, v in quantiles] == sorted(
        float(v) for _, v in quantiles
    )


def test_limits_are_applied_and_said(arm):
    with Client(arm.url) as client:
        reply = client.act(observation(9.0))
        shown = client.metadata["robots"]["tabletop_arm"]["limits"]
    high = np.array([x["high"] if x["high"] is not None else 9.0 for x in shown], np.float32)
    assert np.array_equal(reply["actions"], np.tile(high, (2, 1))) and (high[:2] < 4).all()
    assert reply["limits"] == {"range": 4, "rate": 0, "of": 6, "dims": ["dq1", "dq2"], "unanchored": []}


def test_a_state_outside_of_training_is_named_and_counted(arm):
    with Client(arm.url) as client:
        high = observation(0.0)
        s = FakePolicy().stats["state"]
        high["state"] = np.array([s.max[0], s.min[1], s.mean[2]], np.float32)  # the ends themselves are within
        assert client.act(high)["outside"] == []
        before = arm.get("/metrics")[1]
        high["state"] = np.array([s.max[0] + 1, 0, s.min[2] - 1], np.float32)
        assert client.act(high)["outside"] == ["q1", "gripper"]
        count = lambda text: float((re.findall(r'vla_outside_total\{dim="gripper",robot="tabletop_arm"\} (\S+)', text) or [0])[0])
        assert count(arm.get("/metrics")[1]) == count(before) + 1


def test_paths_origins_and_robots(arm):
    assert arm.get("/etc/passwd")[0] == 404 and arm.get("/")[0] == 426 and arm.get("/?robot=r2d2")[0] == 404
    with pytest.raises(websockets.exceptions.InvalidStatus, match="403"):
        plain(arm, origin="http://evil.example")
    with pytest.raises(ServerError, match="refused: .*404.*there are: tabletop_arm"):
        Client(arm.url, robot="r2d2")


def test_a_step_before_is_sent_with_all_its_pictures_or_none():
    """Another number of pictures would be another shape to compile for."""
    policy, one = FakePolicy(), np.zeros((4, 4, 3), np.uint8)
    policy.history = 2
    robot = served(policy)
    now = {"state": np.zeros((2, 3), np.float32), "prompt": "push"}
    both = {"base": one, "wrist": one}
    assert robot.check({**now, "images": both})
    assert robot.check({**now, "images": both | {"base@-1": one, "wrist@-1": one}})
    with pytest.raises(ValueError, match=r"of a step before now send all pictures \(base@-1, wrist@-1\) or none, got wrist@-1"):
        robot.check({**now, "images": both | {"wrist@-1": one}})


def test_ready_only_when_warm():
    policy, warm = FakePolicy(), threading.Event()
    policy.lengths = lambda **_: warm.wait(20) and range(32, 97, 32)
    with running({"tabletop_arm": served(policy)}) as here:
        assert here.get("/healthz")[:2] == (503, "warming up\n") and "vla_ready 0" in here.get("/metrics")[1]
        with pytest.raises(TimeoutError, match="no connection"):
            Client(here.url, connect_s=0.3)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            waiting = pool.submit(Client, here.url, connect_s=20)  # is held until then, as openpi's would be
            time.sleep(0.1)
            assert not waiting.done()
            warm.set()
            with waiting.result(20) as client:
                assert client.act(observation(1.0))["actions"][0, 0] == 1
        assert here.get("/healthz")[:2] == (200, "ok\n")


def test_it_ends_while_warming_up():
    """And no thread of it goes on compiling."""
    policy = FakePolicy()
    policy.act = lambda observations, **_: time.sleep(0.3) or [None] * len(observations)
    with running({"tabletop_arm": served(policy)}, max_batch=1024) as here:
        assert here.get("/healthz")[0] == 503
        started = time.monotonic()
        assert here.ends() and time.monotonic() - started < 2
        assert not here.server._batcher._thread.is_alive()


def test_a_warm_up_that_fails_ends_the_server():
    policy = FakePolicy()
    policy.lengths = lambda **_: 1 / 0
    server = serve.Server({"tabletop_arm": served(policy)}, serve.Settings(port=0))
    with pytest.raises(ZeroDivisionError):
        asyncio.run(server.run())


def test_those_who_wait_are_answered_by_one_call():
    hold = threading.Event()
    arm, slider = FakePolicy(hold=hold), FakePolicy("tabletop_slider", hold=hold)
    with running({"tabletop_arm": served(arm), "tabletop_slider": served(slider)}, max_batch=4) as here, contextlib.ExitStack() as stack:
        here.until_ready()
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(16))
        clients = [stack.enter_context(Client(here.url, robot="tabletop_arm", timeout_s=20)) for _ in range(8)]
        other = stack.enter_context(Client(here.url, timeout_s=20))
        first = pool.submit(clients[0].act, observation(0))
        until = time.monotonic() + 10
        while not arm.calls and time.monotonic() < until:
            time.sleep(0.005)
        seen = observation(9, robot="tabletop_slider")
        seen["images"] = {v: np.zeros((4, 4, 3), np.uint8) for v in slider.views}
        rest = [pool.submit(c.act, observation(i)) for i, c in enumerate(clients) if i]
        rest.append(pool.submit(other.act, seen))  # names its robot in the observation
        while "vla_waiting 8" not in here.get("/metrics")[1] and time.monotonic() < until:
            time.sleep(0.005)
        hold.set()
        values = [f.result(20)["actions"][0, 0] for f in [first, *rest]]
        batches = [f.result()["server_timing"]["batch"] for f in [first, *rest]]
    assert values == list(range(8)) + [9]  # each its own
    assert sorted(map(len, arm.calls)) == [1, 3, 4] and list(map(len, slider.calls)) == [1]
    assert batches[0] == 1 and sorted(batches[1:8]) == [3] * 3 + [4] * 4 and batches[8] == 1


def test_a_full_queue_says_so_and_nothing_is_lost():
    hold = threading.Event()
    policy = FakePolicy(hold=hold)
    with running({"tabletop_arm": served(policy)}, queue=2, max_batch=1) as here, contextlib.ExitStack() as stack:
        here.until_ready()
        links = [plain(here)[0] for _ in range(5)]
        for i, link in enumerate(links):
            stack.callback(link.close)
            link.send(wire.pack(observation(i)))
            until = time.monotonic() + 10
            while i < 3 and len(policy.calls) + here.server._batcher.waiting <= i and time.monotonic() < until:
                time.sleep(0.005)
        for link in links[3:]:  # one is in hand, two wait
            assert link.recv(timeout=20) == "vla-jax error busy: 2 requests wait already; nothing was done, ask again"
        with (
            concurrent.futures.ThreadPoolExecutor() as pool,
            Client(here.url, timeout_s=20) as patient,
            Client(here.url, timeout_s=0.2) as hasty,
        ):
            with pytest.raises(ServerError, match="busy"):
                hasty.act(observation(5))
            asks = pool.submit(patient.act, observation(7))
            time.sleep(0.2)
            hold.set()
            assert asks.result(20)["actions"][0, 0] == 7
        assert [wire.unpack(link.recv(timeout=20))["actions"][0, 0] for link in links[:3]] == [0, 1, 2]
        links[4].send(wire.pack(observation(4)))
        assert wire.unpack(links[4].recv(timeout=20))["actions"][0, 0] == 4


def test_time_outs_and_a_model_that_hangs():
    hold = threading.Event()
    with running({"tabletop_arm": served(FakePolicy(hold=hold))}, timeout_s=0.5) as here:
        here.until_ready()
        link, _ = plain(here)
        link.send(wire.pack(observation(1)))
        assert link.recv(timeout=20) == "vla-jax error timeout: no answer within 0.5 s"
        assert here.get("/healthz")[:2] == (503, "the model has not answered for 0.5 s\n")
        link.send(wire.pack(observation(2)))  # waits in the queue, and is not computed when it has timed out
        assert "timeout" in link.recv(timeout=20)
        assert here.server._batcher.waiting == 0
        hold.set()
        link.send(wire.pack(observation(3)))
        assert wire.unpack(link.recv(timeout=20))["actions"][0, 0] == 3
        link.close()
        assert here.get("/healthz")[0] == 200


def test_a_late_answer_never_comes_for_another_request():
    hold = threading.Event()
    with running({"tabletop_arm": served(FakePolicy(hold=hold))}) as here:
        here.until_ready()
        with Client(here.url, timeout_s=0.3) as client:
            with pytest.raises(TimeoutError, match="no answer from ws://.* within 0"):
                client.act(observation(1))
            with pytest.raises(TimeoutError):
                client._until_connected(time.monotonic() + 20)
                client.exchange(wire.pack(observation(1)), timeout_s=0.1)
            assert client._socket is None  # what still comes, comes to nobody
            hold.set()
            client.timeout_s = 20
            assert client.act(observation(2))["actions"][0, 0] == 2
            client._socket.send(wire.pack(observation(3, request_id=77)))  # and one that comes all the same is refused
            with pytest.raises(ServerError, match="an answer to another request came"):
                client.act(observation(4))
            assert client.act(observation(5))["actions"][0, 0] == 5


def test_one_request_spoils_no_other():
    hold = threading.Event()
    policy = FakePolicy(hold=hold)
    with running({"tabletop_arm": served(policy, limit=limits.Settings())}) as here, contextlib.ExitStack() as stack:
        here.until_ready()
        links = [plain(here)[0] for _ in range(4)]
        for link, prompt in zip(links, ["push", "push", "break", "nan"]):
            stack.callback(link.close)
            link.send(wire.pack(observation(0.5, prompt)))
            time.sleep(0.1)
        hold.set()
        answers = [link.recv(timeout=20) for link in links]
    assert [wire.unpack(a)["actions"][0, 0] for a in answers[:2]] == [0.5, 0.5]
    assert answers[2].startswith("vla-jax error internal: RuntimeError: the model broke")
    assert "the model's action is not finite in dq1, dq2, gripper" in answers[3]


def test_names_of_keys_joined_states_and_holding():
    names = {"base": ("cam",), "state": ("joints", "grip")}
    with running({"tabletop_arm": served(FakePolicy(), names=names, malformed="hold")}) as here, Client(here.url) as client:
        seen = {"cam": np.zeros((4, 4, 3), np.uint8), "wrist": np.zeros((4, 4, 3), np.uint8), "joints": np.array([1, 2]), "prompt": "odd"}
        seen |= {"grip": 4.0, "last_action": np.zeros(3)}
        reply = client.act(seen)
        assert reply["actions"][0, 0] == 7 and reply["well_formed"] is False
        with pytest.raises(ServerError, match="last_action is missing: this server holds it"):
            client.act({k: v for k, v in seen.items() if k != "last_action"})
        with pytest.raises(ServerError, match=r"parts joints, grip have shapes \[\[2\], \[1, 1\]\]"):
            client.act({**seen, "grip": np.zeros((1, 1))})


def test_tokens(capfd, tmp_path, monkeypatch):
    secret = tmp_path / "token"
    secret.write_text(TOKEN + "\n")
    secret.chmod(0o644)
    assert serve.read_token(str(secret)) == TOKEN and "chmod 600" in capfd.readouterr().err
    secret.chmod(0o600)
    assert serve.read_token(str(secret)) == TOKEN and not capfd.readouterr().err
    assert serve.read_token("") == ""
    monkeypatch.setenv("VLA_SERVE_TOKEN", TOKEN)
    assert serve.read_token("") == TOKEN
    for odd in ("", "short", "umlauts-\u00e4\u00f6\u00fc-are-not-sent"):
        monkeypatch.setenv("VLA_SERVE_TOKEN", odd)
        with pytest.raises(UserError, match="VLA_SERVE_TOKEN has .* characters") as caught:
            serve.read_token("")
        assert not odd or odd not in str(caught.value)
    monkeypatch.delenv("VLA_SERVE_TOKEN")
    secret.write_bytes(bytes(range(128, 200)))  # what /dev/urandom gives
    with pytest.raises(UserError, match="must be ASCII of at least"):
        serve.read_token(str(secret))
    with running({"tabletop_arm": served(FakePolicy())}, TOKEN) as here:
        here.until_ready()  # healthz wants none
        for headers in (
            {},
            {"Authorization": "Api-Key wrong"},
            {"Authorization": TOKEN},
            {"Authorization": f"Api-Key {TOKEN}x"},
            {"Authorization": "Api-Key \u00e4"},
        ):
            assert here.get("/metrics", **headers)[0] == 401
        assert here.get("/metrics", Authorization=f"Bearer {TOKEN}")[0] == 200
        for token in ("", "wrong", TOKEN[:-1]):
            with pytest.raises(ServerError, match="refused: .*401.*wants a token"):
                Client(here.url, token=token)
        with Client(here.url, token=TOKEN) as client:
            assert client.act(observation(1.0))["actions"][0, 0] == 1
        monkeypatch.setenv("VLA_SERVE_TOKEN", TOKEN)
        Client(here.url).close()
    seen = capfd.readouterr()
    assert TOKEN not in seen.out + seen.err


def test_no_more_connections_than_allowed():
    with running({"tabletop_arm": served(FakePolicy())}, connections=2) as here:
        here.until_ready()
        links = [plain(here)[0] for _ in range(2)]
        with pytest.raises(websockets.exceptions.InvalidStatus, match="503"):
            plain(here)
        links.pop().close()
        with Client(here.url, connect_s=20) as client:  # tries again
            assert client.act(observation(1.0))["actions"][0, 0] == 1
        links.pop().close()


def test_a_client_that_reads_nothing_is_let_go():
    """Its answers fill the network's buffers; then it is cut off, and others never notice."""
    policy = FakePolicy()
    policy.steps = 400_000  # 4.8 MB an answer
    with running({"tabletop_arm": served(policy)}, timeout_s=1) as here:
        here.until_ready()
        link, _ = plain(here, max_queue=1)
        until, data = time.monotonic() + 20, wire.pack(observation(1.0))
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            while "vla_closed_as_too_slow" not in here.get("/metrics")[1] and time.monotonic() < until:
                link.send(data)
                time.sleep(0.05)
        assert "vla_closed_as_too_slow_total 1" in here.get("/metrics")[1]
        assert "vla_connections 0" in here.get("/metrics")[1]


def test_a_client_that_pings_and_reads_nothing_is_let_go():
    """Each ping is answered, whether or not the answers before it were read: a gigabyte a minute, if nobody looks."""
    ping = b"\x89\xfd" + bytes(4) + bytes(125)  # masked by zeros
    with running({"tabletop_arm": served(FakePolicy())}) as here, socket.socket() as link:
        here.until_ready()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect(("127.0.0.1", here.port))
        upgrade = {
            "Host": "x",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": "A" * 22 + "==",
            "Sec-WebSocket-Version": "13",
        }
        link.sendall(("GET / HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in upgrade.items()) + "\r\n").encode())
        assert link.recv(12) == b"HTTP/1.1 101"
        link.settimeout(20)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(400):  # 100 MB, of which less than a fifth may stay
                link.sendall(ping * 2000)
        until = time.monotonic() + 20
        while "vla_connections 0" not in here.get("/metrics")[1] and time.monotonic() < until:
            time.sleep(0.05)
        said = here.get("/metrics")[1]
        assert "vla_connections 0" in said and "vla_closed_as_too_slow_total 1" in said and "by_client" not in said
        with Client(here.url) as client:
            assert client.act(observation(1.0))["actions"][0, 0] == 1


@pytest.mark.parametrize("odd", [None, True, 1.5, [], "x" * 300], ids=str)
def test_a_request_id_is_short(arm, odd):
    """It comes back with the answer."""
    link, _ = plain(arm)
    with link:
        link.send(msgpack.packb({**FLAT, "request_id": odd}))
        assert "vla-jax error observation: request_id must be a whole number or text of at most 256 characters" in link.recv(timeout=20)


def test_what_was_not_used_is_named_in_short(arm):
    link, _ = plain(arm)
    with link:
        link.send(msgpack.packb({**FLAT, **{f"observation/{i:03d}" + "x" * 300: 1 for i in range(200)}}))
        said = msgpack.unpackb(link.recv(timeout=20))["unused"]
        assert len(said) == 20 and said[0] == "observation/000" + "x" * 45


def test_the_client_survives_a_new_server_but_not_another_policy():
    with running({"tabletop_arm": served(FakePolicy())}) as here:
        client = Client(here.url, timeout_s=20)
        assert client.act(observation(1.0))["actions"][0, 0] == 1
        port = here.port
        assert here.ends()
    client.timeout_s = 0.3
    with pytest.raises(TimeoutError, match="no connection to"):
        client.act(observation(2.0))
    client.timeout_s = 20
    with running({"tabletop_arm": served(FakePolicy())}, port=port):
        assert client.act(observation(3.0))["actions"][0, 0] == 3
    other = FakePolicy()
    other.steps = 7
    with running({"tabletop_arm": served(other)}, port=port), pytest.raises(ServerError, match="serves another policy now"):
        client.act(observation(4.0))


def test_nobody_listens_is_said_in_time():
    started = time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(TimeoutError, match="no connection to .*refused"):
            Client(f"ws://127.0.0.1:{free.getsockname()[1]}", connect_s=0.3)
    assert time.monotonic() - started < 5
    with pytest.raises(ServerError, match="refused"):
        Client("http//nonsense")


def process(seconds: float, **environment):
    """A server of its own process -> (process, url)."""
    here = Path(__file__).parent
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")]),
        **environment,
    }
    made = subprocess.Popen([sys.executable, str(here / "fake_policy.py"), str(seconds)], stderr=subprocess.PIPE, text=True, env=env)
    url = made.stderr.readline().split("listening on ")[1].strip()
    while "ready after" not in made.stderr.readline():
        assert made.poll() is None
    return made, url


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_what_is_in_hand(which):
    """Six clients ask without pause; every request is answered, told to come again, or cut off before it was taken in."""
    server, url = process(0.05)
    outcomes, ended = [], threading.Event()

    def ask(number):
        link = connect(url, compression=None, proxy=None)
        link.recv()
        try:
            for i in range(10_000):
                link.send(wire.pack(observation(number + i)))
                answer = link.recv(timeout=20)
                if isinstance(answer, str):
                    outcomes.append("busy" if answer.startswith("vla-jax error busy: the server is ending") else answer)
                    return
                assert wire.unpack(answer)["actions"][0, 0] == number + i
                outcomes.append("answered")
        except websockets.exceptions.ConnectionClosed as e:
            outcomes.append(("closed", e.rcvd.code if e.rcvd else None))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    time.sleep(0.6)
    server.send_signal(which)
    code = server.wait(20)
    ended.set()
    for t in threads:
        t.join(20)
        assert not t.is_alive()
    assert code == 0 and "ended\n" in server.stderr.read()
    server.stderr.close()
    assert outcomes.count("answered") > 6 and set(outcomes) <= {"answered", "busy", ("closed", 1001)}, set(outcomes)
    assert len(outcomes) - outcomes.count("answered") == 6  # each thread's last


def test_a_request_in_hand_is_answered_after_the_signal():
    server, url = process(1.0)
    with Client(url, timeout_s=20) as client, concurrent.futures.ThreadPoolExecutor() as pool:
        asked = pool.submit(client.act, observation(3))
        time.sleep(0.3)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        assert not asked.done()
        assert asked.result(20)["actions"][0, 0] == 3
    assert server.wait(20) == 0
    server.stderr.close()


def test_the_token_is_in_no_argument_and_no_log():
    server, url = process(0.0, VLA_SERVE_TOKEN=TOKEN)
    command = Path(f"/proc/{server.pid}/cmdline")
    assert not command.exists() or TOKEN.encode() not in command.read_bytes()
    with pytest.raises(ServerError, match="401"):
        Client(url, token="wrong" * 5)
    Client(url, token=TOKEN).close()
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0 and TOKEN not in server.stderr.read()
    server.stderr.close()


def test_other_hosts_are_warned_of_and_used_ports_said(capfd, monkeypatch):
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        with pytest.raises(UserError, match="cannot listen on 127.0.0.1:.*Give another --port"):
            serve.run({"tabletop_arm": served(FakePolicy())}, serve.Settings(port=used.getsockname()[1]))
        assert "reached from other machines" not in capfd.readouterr().err
        with pytest.raises(UserError, match="cannot listen"):
            serve.run({"tabletop_arm": served(FakePolicy())}, serve.Settings(host="192.0.2.1"))  # of no machine
    assert "reached from other machines: NO TOKEN is asked for, and what is sent travels unencrypted" in capfd.readouterr().err


def test_a_python_that_keeps_keys_is_said(capfd, monkeypatch):
    assert [serve.keeps_keys(v) for v in ((3, 11, 9), (3, 12, 0), (3, 12, 6), (3, 12, 7), (3, 13, 0))] == [False, True, True, False, False]
    for said in (False, True):
        monkeypatch.setattr(serve, "keeps_keys", lambda _, said=said: said)
        with pytest.raises(UserError, match="cannot listen"):
            serve.run({"tabletop_arm": served(FakePolicy())}, serve.Settings(host="192.0.2.1"))
        assert ("Serve with Python 3.12.7 or later" in capfd.readouterr().err) == said


def test_the_client_needs_no_jax(arm):
    code = f"""
import sys
import numpy as np
from vla_jax.deploy.client import Client
with Client({arm.url!r}) as client:
    image = np.zeros((8, 8, 3), np.uint8)
    reply = client.act({{"images": {{"base": image, "wrist": image}}, "state": np.array([0.5, 0, 0]), "prompt": "push"}})
assert reply["actions"].shape == (2, 3) and reply["actions"][0, 0] == 0.5
ours = sorted(m for m in sys.modules if m.startswith("vla_jax."))
assert ours == ["vla_jax.deploy", "vla_jax.deploy.client", "vla_jax.deploy.wire"], ours
heavy = [m for m in sys.modules if m.split(".")[0] in ("jax", "jaxlib", "flax", "cv2", "yaml", "tensorflow", "scipy")]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
