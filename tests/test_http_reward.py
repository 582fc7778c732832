"""A scorer over HTTP: what is sent, what may come back, and scorers that die, hang or babble."""

import base64
import io
import json
import math
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import assert_explained
from runs import PROMPTS, assert_same_state, command, in_processes, metrics, start
from test_own_reward import DDPO, table
from toy import use_toy

from sfumato.compose import compose_train
from sfumato.config import HttpRewardConfig
from sfumato.rewards import remote
from sfumato.rewards.build import build_reward
from sfumato.rewards.remote import HttpReward
from sfumato.rewards.reward import ScorerError

Reply = tuple[int, Mapping[str, str], bytes]
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def decode(row: Mapping[str, Any]) -> torch.Tensor:
    with Image.open(io.BytesIO(base64.b64decode(row["png"])), formats=["PNG"]) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def brightness(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"index": row["index"], "score": decode(row).mean().item()} for row in rows]


def answer(scores: Any) -> Reply:
    return 200, {}, json.dumps({"scores": scores}).encode()


class Scorer:
    """A server whose behaviour a test chooses: a function from the rows of a request to a reply."""

    def __init__(self) -> None:
        self.requests: list[list[dict[str, Any]]] = []
        self.act: Callable[[list[dict[str, Any]]], Reply] = lambda rows: answer(brightness(rows))
        scorer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                rows = json.loads(self.rfile.read(length))["images"]
                scorer.requests.append(rows)
                status, headers, body = scorer.act(rows)
                if not status:  # die
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def handle(self) -> None:
                with suppress(OSError):
                    super().handle()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.scheme = "http"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server.server_address[1]}/score?a=b"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def scorer() -> Iterator[Scorer]:
    made = Scorer()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.02, 0.1))


def ask(scorer: Scorer, timeout: float = 20.0, **settings: Any) -> torch.Tensor:
    return HttpReward(scorer.url, timeout=timeout, **settings)(IMAGES, PROMPTS[:4])


def test_images_are_sent_as_png_with_their_prompts(scorer: Scorer) -> None:
    reward = build_reward(HttpRewardConfig(url=scorer.url))
    assert not reward.differentiable
    value = reward(IMAGES.clone().requires_grad_(), PROMPTS[:4])
    assert not value.requires_grad and value.dtype == torch.float32
    pixels = (IMAGES * 255).round() / 255
    assert torch.allclose(value, pixels.mean((1, 2, 3)), atol=1e-6)
    (rows,) = scorer.requests
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [row["prompt"] for row in rows] == PROMPTS[:4]
    assert torch.equal(torch.stack([decode(row) for row in rows]), pixels)
    assert all(row["metadata"] == {} for row in rows)


@pytest.mark.parametrize("with_rows", [True, False])
def test_rows_of_the_table_are_sent_where_they_are_wanted(scorer: Scorer, with_rows: bool) -> None:
    reward = build_reward(HttpRewardConfig(url=scorer.url, metadata=with_rows))
    reward.prepare(lambda: {PROMPTS[0]: {"answer": 7}})
    reward(IMAGES[:2], PROMPTS[:2])
    assert [row["metadata"] for row in scorer.requests[0]] == [
        {"answer": 7} if with_rows else {},
        {},
    ]


@pytest.mark.parametrize("order", [[3, 1, 0, 2], [3, 2, 1, 0]])
def test_scores_out_of_order_are_put_in_order(scorer: Scorer, order: Sequence[int]) -> None:
    expected = ask(scorer)
    scorer.act = lambda rows: answer([brightness(rows)[i] for i in order])
    assert torch.equal(ask(scorer), expected)


def test_images_without_a_score_are_nan_and_asked_again(scorer: Scorer) -> None:
    some = [1, None, 2.5, float("nan")]
    scorer.act = lambda rows: answer([{"index": i, "score": some[i]} for i in range(len(rows))])
    reward = HttpReward(scorer.url)
    assert [str(v) for v in reward(IMAGES, PROMPTS[:4]).tolist()] == ["1.0", "nan", "2.5", "nan"]
    reward(IMAGES, PROMPTS[:4])
    asked = [[row["prompt"] for row in rows] for rows in scorer.requests]
    assert asked == [PROMPTS[:4], [PROMPTS[1], PROMPTS[3]]]


def test_scores_are_kept_by_image_and_prompt_and_the_oldest_go(scorer: Scorer) -> None:
    reward = HttpReward(scorer.url, cache=3)
    first = reward(IMAGES[:2], PROMPTS[:2])
    assert torch.equal(reward(IMAGES[:2], PROMPTS[:2]), first)
    assert len(scorer.requests) == 1
    reward(IMAGES[:2], ["another", PROMPTS[1]])
    assert [row["prompt"] for row in scorer.requests[1]] == ["another"]
    repeated = reward(IMAGES[[3, 3, 3]], ["x", "x", "x"])
    assert len(scorer.requests[2]) == 1 and len(set(repeated.tolist())) == 1
    reward(IMAGES[:2], PROMPTS[:2])  # four have been scored, and the first of them is forgotten
    assert [row["prompt"] for row in scorer.requests[3]] == [PROMPTS[0]]
    assert len(reward._known) == 3
    ask(scorer, cache=0)
    reward = HttpReward(scorer.url, cache=0)
    assert torch.equal(reward(IMAGES, PROMPTS[:4]), reward(IMAGES, PROMPTS[:4]))
    assert len(scorer.requests) == 7


# --- Scorers that fail


@pytest.mark.parametrize("fault", [0, 500, 503])
def test_what_may_pass_is_asked_again(scorer: Scorer, fault: int) -> None:
    """A connection that ends, and replies 5xx."""

    def act(rows: list[dict[str, Any]]) -> Reply:
        return answer(brightness(rows)) if len(scorer.requests) > 3 else (fault, {}, b"")

    scorer.act = act
    assert ask(scorer).isfinite().all()
    assert len(scorer.requests) == 4 and scorer.requests[0] == scorer.requests[3]


def hang(rows: Sequence[Any]) -> Reply:
    time.sleep(30)
    return answer(brightness(rows))


LATE: dict[str, Callable[[list[dict[str, Any]]], Reply]] = {
    "dies": lambda rows: (0, {}, b""),
    "hangs": hang,
    "promises more": lambda rows: (200, {"Content-Length": "99999"}, b"{"),
    "is overloaded": lambda rows: (503, {}, b"busy"),
}


@pytest.mark.parametrize("kind", LATE)
def test_a_scorer_that_does_not_answer_ends_within_the_time_out(scorer: Scorer, kind: str) -> None:
    scorer.act = LATE[kind]
    began = time.monotonic()
    with pytest.raises(ScorerError) as caught:
        ask(scorer, timeout=1.0)
    assert time.monotonic() - began < 15
    assert_explained(str(caught.value), scorer.url, "1 seconds", "gave no answer")
    assert len(scorer.requests) > 1 or kind == "hangs"


@contextmanager
def raw_server(act: Callable[[socket.socket], None]) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    try:
                        connection.recv(1000)
                        act(connection)
                    except OSError:
                        pass

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"


def drip(start: bytes) -> Callable[[socket.socket], None]:
    def act(connection: socket.socket) -> None:
        connection.sendall(start)
        for _ in range(300):
            time.sleep(0.1)
            connection.sendall(b" ")

    return act


@pytest.mark.parametrize(
    "start", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"]
)
def test_a_reply_that_drips_ends_within_the_time_out(start: bytes) -> None:
    began = time.monotonic()
    with raw_server(drip(start)) as url, pytest.raises(ScorerError, match="in 1 seconds"):
        HttpReward(url, timeout=1.0)(IMAGES, PROMPTS[:4])
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("text", [b"\x00\xff" * 99, b"220 smtp ready\r\n", b"HTTP/1.1 x y\r\n\r\n"])
def test_what_is_not_http_is_an_error(text: bytes) -> None:
    with raw_server(lambda c: c.sendall(text)) as url, pytest.raises(ScorerError) as caught:
        HttpReward(url, timeout=1.0)(IMAGES, PROMPTS[:4])
    assert "\n" not in str(caught.value) and url in str(caught.value)


def test_a_scorer_that_is_not_there(scorer: Scorer) -> None:
    scorer.close()
    with pytest.raises(ScorerError, match=r"ConnectionRefusedError.*; start it, or give"):
        ask(scorer, timeout=0.5)


def scores(*values: Any) -> bytes:
    return json.dumps({"scores": [{"index": i, "score": v} for i, v in enumerate(values)]}).encode()


RUBBISH = {
    "no JSON": b"<html>hello</html>",
    "nothing": b"",
    "bytes": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "a list": b"[1, 2, 3, 4]",
    "numbers alone": b'{"scores": [1, 2, 3, 4]}',
    "another key": b'{"rewards": []}',
    "null": b'{"scores": null}',
    "fewer": scores(1, 2, 3),
    "more": scores(1, 2, 3, 4, 5),
    "none": b'{"scores": []}',
    "twice": b'{"scores": [%s]}' % b",".join([b'{"index": 0, "score": 1}'] * 4),
    "another index": scores(1, 2, 3, 4).replace(b'"index": 3', b'"index": 4'),
    "negative": scores(1, 2, 3, 4).replace(b'"index": 3', b'"index": -1'),
    "a text as index": scores(1, 2, 3, 4).replace(b'"index": 3', b'"index": "3"'),
    "a list as index": scores(1, 2, 3, 4).replace(b'"index": 3', b'"index": [3]'),
    "no index": scores(1, 2, 3, 4).replace(b'"index": 3, ', b""),
    "a text": scores(1, 2, 3, "4"),
    "true": scores(1, 2, 3, True),
    "a list of one": scores(1, 2, 3, [4]),
    "infinite": scores(1, 2, 3, float("inf")),
    "huge": scores(1, 2, 3, 4).replace(b'"score": 4', b'"score": 4' + b"0" * 400),
    "longer": scores(1, 2, 3, 4).replace(b'"score": 4', b'"score": 4' + b"0" * 9000),
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_rubbish_ends_the_run_at_once(scorer: Scorer, kind: str) -> None:
    scorer.act = lambda rows: (200, {}, RUBBISH[kind])
    with pytest.raises(ScorerError) as caught:
        ask(scorer)
    message = str(caught.value)
    assert scorer.url in message and "\n" not in message and len(message) < 500
    assert "owes" in message or "give each index once" in message
    assert len(scorer.requests) == 1


@pytest.mark.parametrize("status", [201, 204, 400, 401, 404, 413, 429])
def test_other_replies_end_the_run_at_once(scorer: Scorer, status: int) -> None:
    scorer.act = lambda rows: (status, {}, b"")
    with pytest.raises(ScorerError) as caught:
        ask(scorer)
    assert_explained(str(caught.value), scorer.url, status, "correct the scorer")
    assert len(scorer.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_refused(scorer: Scorer, status: int) -> None:
    other = Scorer()
    scorer.act = lambda rows: (status, {"Location": other.url}, b"")
    with pytest.raises(ScorerError) as caught:
        ask(scorer)
    assert_explained(str(caught.value), scorer.url, other.url, "redirects are not followed")
    assert not other.requests and len(scorer.requests) == 1
    other.close()


@pytest.mark.parametrize("length", [None, "3000000"])
def test_a_reply_that_is_too_large_is_refused(scorer: Scorer, length: str | None) -> None:
    body = scores(1, 2, 3, 4) + b" " * 3_000_000
    headers = {"Content-Length": str(len(body))} if length is None else {"Content-Length": length}
    scorer.act = lambda rows: (200, headers, body)
    with pytest.raises(ScorerError, match=r"more than 1,048,576 bytes; let it reply"):
        ask(scorer)


def test_no_proxy_is_used(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Scorer()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, other.url)
    monkeypatch.delenv("no_proxy", raising=False)
    assert ask(scorer).isfinite().all() and not other.requests
    other.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("certificate") / "both.pem"
    subject = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *(*subject, "-keyout", str(file), "-out", f"{file}.crt"),
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("openssl makes no certificate here")
    file.write_text(file.read_text() + Path(f"{file}.crt").read_text())
    return file


@pytest.mark.parametrize("trusted", [True, False])
def test_a_certificate_that_nobody_vouches_for_is_refused(
    scorer: Scorer, certificate: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    scorer.server.socket = context.wrap_socket(scorer.server.socket, server_side=True)
    scorer.scheme = "https"
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
        assert ask(scorer).isfinite().all()
        return
    with pytest.raises(ScorerError) as caught:
        ask(scorer)
    assert_explained(str(caught.value), scorer.url, None, "certificate that is not valid")
    assert not scorer.requests


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://a/b", "http://", "http:///score", "http://a:x/",
     "http://a:99999/", "file:///etc/passwd", "https://[::1/", "http://a b/", "http://a/b c",
     "http://a/\n", "http://a..b/", f"http://{'a' * 80}/"],
)  # fmt: skip
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError) as caught:
        build_reward(HttpRewardConfig(url=url))
    assert_explained(str(caught.value), "reward.url", url)


@pytest.mark.parametrize(
    "url",
    ["http://u:hidden@a/", "http://:hidden@a/", "http://u:hid@hidden@a:x/", "u:hidden@a",
     "https://u:hid/hidden@a/", "http://u:hidden@a:99999/", "ftp://u:hidden@a/"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["reward", "reward.parts.a", "validation.rewards.a"])
def test_a_password_in_an_address_is_neither_shown_nor_stored(
    tmp_path: Path, url: str, key: str
) -> None:
    kinds = [f"{key}.kind=http", f"{key}.url={url}"]
    if key == "reward":
        kinds = ["reward=http", f"reward.url={url}"]
    elif key == "reward.parts.a":
        kinds.insert(0, "reward=weighted")
    with pytest.raises(ValueError) as caught:
        start(command(tmp_path, "run", *DDPO, *kinds))
    assert_explained(str(caught.value), f"{key}.url", "***@", "without a name or a password")
    assert "hid" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", ["/é?q=日", "/a%20b", "/a;b=[1]?c='d'"])
def test_paths_are_percent_encoded(
    scorer: Scorer, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    handler = scorer.server.RequestHandlerClass
    parse: Any = handler.parse_request

    def note(self: Any) -> bool:
        good = parse(self)
        asked.append(self.path)
        return good

    monkeypatch.setattr(handler, "parse_request", note)
    url = f"http://127.0.0.1:{scorer.server.server_address[1]}{path}"
    HttpReward(url, timeout=20.0)(IMAGES, PROMPTS[:4])
    assert [unquote(each) for each in asked] == [unquote(path)] and asked[0].isascii()


@pytest.mark.parametrize("timeout", [1e7, 1e12, math.inf])
def test_a_long_time_out_is_no_error(scorer: Scorer, timeout: float) -> None:
    expected = [IMAGES[i].mul(255).round().div(255).mean().item() for i in range(4)]
    assert ask(scorer, timeout).tolist() == pytest.approx(expected, abs=1e-5)


def test_an_address_may_be_ipv6() -> None:
    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6

    made = Scorer()
    try:
        server = Server(("::1", 0), made.server.RequestHandlerClass)
    except OSError:
        pytest.skip("no IPv6 here")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://[::1]:{server.server_address[1]}/"
    assert HttpReward(url, timeout=20.0)(IMAGES, PROMPTS[:4]).shape == (4,)
    server.shutdown()
    server.server_close()
    made.close()


def test_a_gradient_through_http_is_refused_with_the_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reward=http is not differentiable, and objective=draft"):
        compose_train(command(tmp_path, "run", "reward=http", "reward.url=http://127.0.0.1:1/"))


# --- Runs


def run_of(folder: Path, name: str, scorer: Scorer, *more: str) -> list[str]:
    return command(folder, name, "reward=http", f"reward.url={scorer.url}", *DDPO, *more)


def test_ddpo_over_http(scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_toy(monkeypatch)
    data = ("reward.metadata=true", f"data.prompts={table(tmp_path)}")
    start(run_of(tmp_path, "run", scorer, *data))
    rows = metrics(tmp_path / "run")
    assert len(rows) == 7 and rows[-1]["reward_queries"] == 24
    assert all(0 < row["reward"] < 1 and row["left_out"] == 0 for row in rows[1:])
    sent = [row for rows in scorer.requests for row in rows]
    assert all(row["metadata"]["prompt"] == row["prompt"] for row in sent)


def test_two_processes_ask_as_one_does(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each asks for its own images, and all are compared."""
    use_toy(monkeypatch)
    small = ("training.max_steps=3", "validation.every_steps=0")
    for name, processes in (("one", 1), ("two", 2)):
        given = run_of(tmp_path, name, scorer, *small)
        in_processes(processes, lambda _, given=given: start(given))
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    for left, right in zip(one, two, strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-4)
    assert one[-1]["reward_queries"] == 16


@pytest.mark.parametrize("fault", ["dies", "hangs", "rubbish"])
def test_a_run_whose_scorer_failed_goes_on_from_its_checkpoint(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    use_toy(monkeypatch)
    small = ("validation.every_steps=0", "reward.timeout=1")
    start(run_of(tmp_path, "whole", scorer, *small))
    good, asked = scorer.act, len(scorer.requests)

    def act(rows: list[dict[str, Any]]) -> Reply:
        if len(scorer.requests) - asked < 4:
            return good(rows)
        return {**LATE, "rubbish": lambda rows: (200, {}, b"?")}[fault](rows)

    scorer.act = act
    again = run_of(tmp_path, "run", scorer, *small)
    with pytest.raises(ScorerError, match=re.escape(scorer.url)):
        start(again)
    scorer.act = good
    assert start(again).step == 6
    assert_same_state(tmp_path / "run", tmp_path / "whole")


def test_another_scorer_is_refused_unless_it_is_allowed(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_toy(monkeypatch)
    small = ("validation.every_steps=0",)
    start(run_of(tmp_path, "run", scorer, *small, "training.max_steps=2"))
    other = Scorer()
    more = (*small, "training.max_steps=4", "reward.timeout=30", "reward.cache=5")
    with pytest.raises(ValueError, match=r"reward\.url.*allow_changed=\[reward\.url\]"):
        start(run_of(tmp_path, "run", other, *more))
    assert not other.requests
    allowed = run_of(tmp_path, "run", other, *more, "allow_changed=[reward.url]")
    assert start(allowed).step == 4
    other.close()


def test_a_held_out_scorer_may_be_given_more_time(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its error advises."""
    use_toy(monkeypatch)
    room = "validation.rewards.x"
    given = command(tmp_path, "run", f"{room}.kind=http", f"{room}.url={scorer.url}")
    start([*given, "training.max_steps=3"])
    assert start([*given, f"{room}.timeout=99", f"{room}.cache=5"]).step == 6
    with pytest.raises(ValueError, match=f"{room}.metadata: False -> True"):
        start([*given, f"{room}.metadata=true"])


def test_the_server_of_the_documentation_scores(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
    (text,) = re.findall(r"```python\n(# scorer\.py\n.*?)```", page, re.DOTALL)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert "8000" in text
    (tmp_path / "scorer.py").write_text(text.replace("8000", str(port)))
    process = subprocess.Popen([sys.executable, str(tmp_path / "scorer.py")])
    try:
        value = HttpReward(f"http://127.0.0.1:{port}/", timeout=60.0)(IMAGES, PROMPTS[:4])
    finally:
        process.kill()
        process.wait()
    assert value.shape == (4,) and value.isfinite().all() and len(set(value.tolist())) == 4
