"""Scorer over HTTP: batches of PNGs are posted, and a number for each comes back.

POST URL   {"images": [{"index": 0, "png": BASE64, "prompt": "a star", "metadata": {}}, ...]}
200        {"scores": [{"index": 0, "score": 1.5}, ...]}, in any order; null is no score
"""

import base64
import hashlib
import http.client
import io
import json
import math
import socket
import ssl
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from sfumato.images import to_pil
from sfumato.rewards.code import read_address
from sfumato.rewards.reward import PromptRows, Reward, Score, ScorerError

LARGEST = 2**20  # bytes of a reply
LONGEST = 1e8  # seconds that sockets and timers can wait
PAUSES = (0.25, 8.0)  # seconds before the first repetition, and at most; each is twice the last


class _AgainError(Exception):
    """A request that may be repeated."""


@final
class HttpReward(Reward):
    """Score by a server of the user's. Images are rounded to 8 bits; there is no gradient.

    Requests are repeated after connection errors and replies 5xx, with growing pauses, until
    `timeout` is over. Redirects are not followed, no proxy is used, certificates are verified.
    """

    differentiable = False
    why_constant = "its images are sent as PNGs"

    def __init__(
        self, url: str, *, timeout: float = 60.0, with_rows: bool = False, cache: int = 10_000
    ) -> None:
        """Remember where to ask; nothing is sent yet.

        Args:
            timeout: seconds for a batch, all repetitions included.
            with_rows: send each prompt's row of the prompt table.
            cache: scores that are kept, by image and prompt; 0 asks every time.

        Raises:
            ValueError: if `url` is none of http or https.
        """
        super().__init__()
        self._address = read_address(url, "reward.url")
        self.title = url
        self.timeout = min(timeout, LONGEST)
        self.with_rows, self.cache = with_rows, cache
        self.rows: Mapping[str, Mapping[str, Any]] = {}
        self._known: OrderedDict[bytes, float] = OrderedDict()

    def prepare(self, rows: PromptRows) -> None:
        """Read the prompt tables, if their rows are to be sent."""
        self.rows = rows() if self.with_rows else {}

    @torch.no_grad()
    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Score:
        """Ask for the scores that are not known yet; a row without one is NaN.

        Raises:
            ScorerError: if the scorer does not answer within the time-out, or not with scores.
        """
        pictures = [to_pil(image) for image in images]
        keys = [
            hashlib.sha256(f"{picture.size} {prompt}\0".encode() + picture.tobytes()).digest()
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        new = {key: i for i, key in enumerate(keys) if key not in self._known}
        found = {key: self._known[key] for key in keys if key in self._known}
        if new:
            rows = [
                {
                    "index": place,
                    "png": _png(pictures[i]),
                    "prompt": prompts[i],
                    "metadata": self.rows.get(prompts[i], {}),
                }
                for place, i in enumerate(new.values())
            ]
            found |= dict(zip(new, self._ask(rows), strict=True))
        for key in dict.fromkeys(keys):
            if math.isfinite(found[key]):  # others are asked again
                self._known[key] = found[key]
                self._known.move_to_end(key)
        while len(self._known) > self.cache:
            self._known.popitem(last=False)
        return Score(torch.tensor([found[key] for key in keys], device=images.device))

    def _ask(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return the scores of rows, in their order."""
        body = json.dumps({"images": rows}, default=str).encode()
        end, pause = time.monotonic() + self.timeout, PAUSES[0]
        while True:
            try:
                return self._read(self._post(body, end), len(rows))
            except _AgainError as error:
                if time.monotonic() + pause >= end:
                    raise ScorerError(
                        f"the scorer {self.title} gave no answer in {self.timeout:g} seconds "
                        f"({error}); start it, or give it more time (reward.timeout), and run the "
                        "same command again"
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, PAUSES[1])

    def _post(self, body: bytes, end: float) -> bytes:
        """Return the body of a reply 200.

        Raises:
            _AgainError: after an error that may pass.
            ScorerError: after one that will not.
        """
        connection = self._connection(max(0.001, end - time.monotonic()))
        timer = threading.Timer(max(0.0, end - time.monotonic()), _cut, [connection])
        timer.start()  # a time-out of a socket begins anew with each byte
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", self._address.path, body, headers)
            reply = connection.getresponse()
            self._check(reply)
            text = reply.read(LARGEST + 1)
        except ssl.SSLCertVerificationError as error:
            raise ScorerError(
                f"the scorer {self.title} has a certificate that is not valid "
                f"({error.verify_message}); give it a valid one, and name the file of your own "
                "authority in SSL_CERT_FILE"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            late = time.monotonic() >= end
            reason = "it hangs" if late else " ".join(f"{type(error).__name__} {error}".split())
            raise _AgainError(reason) from error
        finally:
            timer.cancel()
            connection.close()
        if len(text) > LARGEST:
            raise ScorerError(
                f"the scorer {self.title} replied with more than {LARGEST:,} bytes; let it reply "
                "with a number for each image"
            )
        if time.monotonic() >= end:
            raise _AgainError("it hangs")
        if reply.length:
            raise _AgainError("its reply breaks off")
        return text

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        host, port = self._address.host, self._address.port
        if self._address.is_secure:
            return http.client.HTTPSConnection(
                host, port, timeout=timeout, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(host, port, timeout=timeout)

    def _check(self, reply: http.client.HTTPResponse) -> None:
        """Refuse all replies but 200."""
        if reply.status >= 500:
            raise _AgainError(f"it replied {reply.status} {reply.reason}")
        if 300 <= reply.status < 400:
            place = reply.headers.get("Location", "")[:200]
            raise ScorerError(
                f"the scorer {self.title} redirects to {place!r}, and redirects are not "
                "followed; give the address of the scorer itself as reward.url"
            )
        if reply.status != 200:
            raise ScorerError(
                f"the scorer {self.title} replied {reply.status} {reply.reason}; correct the "
                "scorer, or reward.url"
            )

    def _read(self, text: bytes, count: int) -> list[float]:
        """Return the scores of a reply by their index."""
        advice = 'it owes {"scores": [{"index": 0, "score": 1.5}, ...]}'
        wrong = f"the scorer {self.title} replied with {text[:80]!r}"
        try:
            rows = json.loads(text)["scores"]
            scores = {row["index"]: row["score"] for row in rows}
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise ScorerError(f"{wrong}, which holds no scores; {advice}") from error
        if len(rows) != count or scores.keys() != set(range(count)):
            raise ScorerError(
                f"{wrong}, which has {len(rows)} scores of {len(scores)} images for {count} "
                "images; give each index once"
            )
        values = [math.nan if scores[i] is None else scores[i] for i in range(count)]
        for value in values:
            if type(value) not in (int, float) or abs(value) > sys.float_info.max:
                raise ScorerError(f"{wrong}, where {repr(value)[:40]} is no number; {advice}")
        return [float(value) for value in values]


def _cut(connection: http.client.HTTPConnection) -> None:
    """End a connection whose time is over; whoever reads from it gets an error or its end."""
    if (found := connection.sock) is not None:
        with suppress(OSError):
            found.shutdown(socket.SHUT_RDWR)


def _png(picture: Any) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()
