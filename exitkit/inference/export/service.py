"""Serves an exported network over HTTP, with early exit, in batches of images that came at different times.

`python run.py --serve PORT` starts it; `application` returns it as an ASGI application, for a service of your own.

| request | body | answer |
|---|---|---|
| POST /predict | an image file, or an array [C, H, W] written by numpy.save | class, exit, confidence |
| POST /predict-batch | an array [N, C, H, W], or JSON {"images": [image files in base64]} | {"answers": [...]} |
| GET /health | | 200, or 503 when no predictions can be made |
| GET /metrics | | exit shares, latencies, confidences, drift |

The header Operating-Point selects an operating point by its name. Errors are JSON: {"error": one line}.

Needs starlette, and uvicorn for --serve. Part of exitkit, MIT licence.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import concurrent.futures
import contextlib
import io
import json
import math
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

POINT_HEADER = "operating-point"
_WINDOW = 2000
"""Images that the metrics are about: the most recent ones."""
_LEAST = 5
"""Smallest expected count of an exit in the chi-squared test; rarer exits count together with a neighbour."""
_PIXELS = 50_000_000


class Answer(NamedTuple):
    """What an image was answered: class and exit from 0, the largest probability there, and the operating point."""

    predicted: int
    exit_index: int
    confidence: float
    point: str


class Waiting(NamedTuple):
    """An image before a stage: its input of the stage and its memory of the policy, with one row each."""

    future: concurrent.futures.Future[Answer]
    point: str
    state: list[Any]
    memory: Any
    since: float


class Busy(RuntimeError):
    """Too many images wait."""


class Executor(threading.Thread):
    """Computes stages on images of many requests; the images that remain fill up the batches of the later stages.

    The next batch is taken before the stage where an image has waited for longer than `wait`; else before the deepest
    stage where a full batch waits; else where the longest-waiting image is. So nothing waits while the machine is
    idle, and late stages run on full batches under load.

    Args:
        runner: the exported network (`Runner` of run.py).
        size: largest batch.
        wait: seconds that an image may wait before a later stage for a full batch.
        limit: largest number of images that have no answer yet.
    """

    def __init__(self, runner: Any, *, size: int = 32, wait: float = 0.005, limit: int = 1024) -> None:
        super().__init__(daemon=True, name="stages")
        self.runner, self.size, self.wait, self.limit = runner, size, wait, limit
        self.queues: list[deque[Waiting]] = [deque() for _ in runner.programs]
        self.changed = threading.Condition()
        self.failed: str | None = None
        self._open = 0
        self._stopping = False

    def submit(self, images: Any, point: str) -> list[concurrent.futures.Future[Answer]]:
        """Take images [N, C, H, W], all or none; their answers come by the futures.

        Raises:
            Busy: too many images wait.
            RuntimeError: the executor has ended.
        """
        now = time.monotonic()
        with self.changed:
            if self.failed or self._stopping:
                raise RuntimeError(self.failed or "the service stops")
            if self._open + len(images) > self.limit:
                raise Busy(f"{self._open} images wait already; try again later")
            if self.ident is None:
                self.start()
            futures: list[concurrent.futures.Future[Answer]] = [concurrent.futures.Future() for _ in images]
            for row, future in enumerate(futures):
                self.queues[0].append(Waiting(future, point, [images[row : row + 1]], None, now))
            self._open += len(images)
            self.changed.notify()
        return futures

    def oldest(self) -> float:
        """Return how long the first image has waited that no stage has been computed for, in seconds."""
        with self.changed:
            return time.monotonic() - self.queues[0][0].since if self.queues[0] else 0.0

    def stop(self, seconds: float = 10.0) -> None:
        """Answer what waits, and end."""
        with self.changed:
            self._stopping = True
            self.changed.notify()
        if self.ident is not None:
            self.join(seconds)

    def run(self) -> None:
        """Compute batches until the executor is stopped."""
        batch: list[Waiting] = []
        try:
            while True:
                with self.changed:
                    while not any(self.queues) and not self._stopping:
                        self.changed.wait()
                    if not any(self.queues):
                        return
                    index = self.choose(time.monotonic())
                    queue = self.queues[index]
                    batch = [queue.popleft() for _ in range(min(self.size, len(queue)))]
                self._compute(index, batch)
        except BaseException as error:
            self.failed = f"the stages can't be computed: {type(error).__name__}: {error}".splitlines()[0]
            raise
        finally:
            with self.changed:
                self.failed = self.failed or "the service has stopped"
                for item in (*batch, *(item for queue in self.queues for item in queue)):
                    _fail(item.future, RuntimeError(self.failed))  # those of the last batch may have been answered

    def choose(self, now: float) -> int:
        """Return the stage whose next batch is computed; an image waits before at least one."""
        heads = {index: queue[0] for index, queue in enumerate(self.queues) if queue}
        late = [index for index, head in heads.items() if index and now - head.since > self.wait]
        if late:
            return min(late, key=lambda index: heads[index].since)
        full = [index for index in heads if len(self.queues[index]) >= self.size]
        return max(full) if full else min(heads, key=lambda index: heads[index].since)

    def _compute(self, index: int, batch: list[Waiting]) -> None:
        """Compute a stage for a batch; if that fails, for each image alone, so that one can't spoil the others."""
        gone = [item.future.cancelled() for item in batch]
        self._close(sum(gone))
        batch = [item for item, left in zip(batch, gone, strict=True) if not left]
        if not batch:
            return
        try:
            steps = self._decided(index, batch)
        except Exception as error:  # of the policy (outputs that are not finite), or of onnxruntime or torch
            if len(batch) > 1:
                for item in batch:
                    self._compute(index, [item])
                return
            self._close(1)
            _fail(batch[0].future, RuntimeError(str(error).splitlines()[0] if str(error) else type(error).__name__))
            return
        for item, step in zip(batch, steps, strict=True):
            if isinstance(step, Answer):
                self._close(1)
                with contextlib.suppress(concurrent.futures.InvalidStateError):  # the client is gone
                    item.future.set_result(step)
            else:
                with self.changed:
                    self.queues[index + 1].append(step)

    def _decided(self, index: int, batch: list[Waiting]) -> list[Answer | Waiting]:
        """Return the answer of each image that leaves at an exit, and the others as they wait before the next stage."""
        states = [item.state for item in batch]
        logits, *state = self.runner.programs[index]([np.concatenate(parts) for parts in zip(*states, strict=True)])
        steps: list[Any] = [None] * len(batch)
        now = time.monotonic()
        for point in {item.point for item in batch}:
            rows = [row for row, item in enumerate(batch) if item.point == point]
            memory = _merged([batch[row].memory for row in rows])
            outputs, leaves, memory = self.runner.decide(index, logits[rows], memory, point)
            heat = self.runner.points.get(point, self.runner.policy).get("temperatures")
            for place, row in enumerate(rows):
                if leaves[place]:
                    steps[row] = _answer(outputs[place], index, point, heat[index] if heat else 1.0)
                else:
                    after = [part[row : row + 1] for part in state]
                    steps[row] = Waiting(batch[row].future, point, after, _row(memory, place), now)
        return steps

    def _close(self, images: int) -> None:
        """Count images that have been answered or given up."""
        with self.changed:
            self._open -= images


def _answer(outputs: Any, index: int, point: str, temperature: float) -> Answer:
    """Return the answer of an exit; its confidence is the largest probability, calibrated if the policy is."""
    z = outputs.astype(np.float64) / temperature
    return Answer(int(z.argmax()), index, float(1 / np.exp(z - z.max()).sum()), point)


def _row(memory: Any, row: int) -> Any:
    """Return one row of a memory: a pytree of arrays."""
    if isinstance(memory, tuple):
        return tuple(_row(part, row) for part in memory)
    return None if memory is None else memory[row : row + 1]


def _merged(memories: Sequence[Any]) -> Any:
    """Return the memories of several images as one."""
    first = memories[0]
    if isinstance(first, tuple):
        return tuple(_merged(parts) for parts in zip(*memories, strict=True))
    return None if first is None else np.concatenate(memories)


def _fail(future: concurrent.futures.Future[Answer], error: Exception) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        future.set_exception(error)


class Controller:
    """Moves along the operating points, so that the 99th percentile of latency stays below a bound as load rises.

    Every `interval` seconds: above half of the bound, it moves to the next point of lower cost (to the first one above
    twice the bound); after `calm` intervals below a fifth of it, back to the next point of higher cost. A step back
    that has to be undone within 20 intervals doubles `calm`, up to 32, and one that lasts resets it to 4.

    Args:
        points: names of the points, from the lowest cost to the highest.
        start: the point of highest cost that is used.
        bound: seconds.
        interval: seconds.
    """

    def __init__(self, points: Sequence[str], start: str, bound: float, interval: float = 0.2) -> None:
        self.points, self.bound, self.interval = list(points), bound, interval
        self.highest = self.index = self.points.index(start)
        self.calm = 4
        # Without limit they would grow while all requests name their operating point, since `update` is not called.
        self._latencies: deque[float] = deque(maxlen=10_000)
        self._changed = self._rose_at = -math.inf
        self._calm_for = 0

    @property
    def point(self) -> str:
        """The name of the current operating point."""
        return self.points[self.index]

    def observe(self, latency: float) -> None:
        """Take the latency of one answered image, in seconds."""
        self._latencies.append(latency)

    def update(self, now: float, oldest: float) -> str:
        """Return the operating point to use.

        Args:
            now: the time, in seconds.
            oldest: how long the oldest image has waited, in seconds.
        """
        if now - self._changed < self.interval:
            return self.point
        measured = float(np.quantile(self._latencies, 0.99)) if self._latencies else 0.0
        latency = max(measured, oldest)
        self._changed = now
        self._latencies.clear()
        undone = now - self._rose_at <= 20 * self.interval
        if latency > 0.5 * self.bound:
            self.calm = min(2 * self.calm, 32) if undone else self.calm
            self.index = 0 if latency > 2 * self.bound else max(self.index - 1, 0)
            self._calm_for, self._rose_at = 0, -math.inf
        elif latency < 0.2 * self.bound and self.index < self.highest:
            self._calm_for += 1
            if self._calm_for >= self.calm:
                self.calm = self.calm if undone or self._rose_at == -math.inf else 4
                self.index, self._calm_for, self._rose_at = self.index + 1, 0, now
        else:
            self._calm_for = 0
        return self.point


def chi_squared_tail(statistic: float, degrees: int) -> float:
    """Return the probability that a chi-squared variable is at least `statistic`, in closed form."""
    half = statistic / 2
    if degrees % 2 == 0:
        terms, first = range(degrees // 2), 0.0
    else:
        terms, first = range(1, (degrees + 1) // 2), math.erfc(math.sqrt(half))
    shift = 0.0 if degrees % 2 == 0 else -0.5
    if half == 0:
        return 1.0
    return first + sum(math.exp((n + shift) * math.log(half) - half - math.lgamma(n + shift + 1)) for n in terms)


def same_shares(reference: Sequence[float], counts: Sequence[int]) -> float:
    """Return the p-value of the chi-squared test that two samples of exits have the same shares.

    Args:
        reference: number of reference images that left at each exit, [K].
        counts: number of served images that left at each exit, [K].
    """
    columns: list[list[float]] = [[0.0, 0.0]]
    total = sum(reference) + sum(counts)
    smaller = min(sum(reference), sum(counts))
    for pair in zip(reference, counts, strict=True):
        if sum(columns[-1]) * smaller >= _LEAST * total:
            columns.append([0.0, 0.0])
        columns[-1] = [have + more for have, more in zip(columns[-1], pair, strict=True)]
    if len(columns) > 1 and sum(columns[-1]) * smaller < _LEAST * total:
        last = columns.pop()
        columns[-1] = [have + more for have, more in zip(columns[-1], last, strict=True)]
    if len(columns) < 2:
        return 1.0
    statistic = 0.0
    for row in (0, 1):
        share = sum(column[row] for column in columns) / total
        statistic += sum((column[row] - sum(column) * share) ** 2 / (sum(column) * share) for column in columns)
    return chi_squared_tail(statistic, len(columns) - 1)


class Metrics:
    """What was answered recently, and how many requests were refused.

    Args:
        exits: number of exits.
        points: `points` of policy.json.
    """

    def __init__(self, exits: int, points: Sequence[Mapping[str, Any]]) -> None:
        self.exits = exits
        self.expected = {row["name"]: [share * row["images"] for share in row["shares"]] for row in points}
        self.recent: deque[tuple[Answer, float]] = deque(maxlen=_WINDOW)
        self.answered = 0
        self.refused: Counter[int] = Counter()

    def record(self, answer: Answer, latency: float) -> None:
        """Take one answer, and the seconds from the complete request to it."""
        self.recent.append((answer, latency))
        self.answered += 1

    def snapshot(self) -> dict[str, Any]:
        """Return the metrics, for JSON."""
        answers = [answer for answer, _ in self.recent]
        latencies = [1000 * latency for _, latency in self.recent]
        quantiles = np.quantile(latencies, (0.5, 0.95, 0.99)).tolist() if latencies else [None] * 3
        bars = np.histogram([answer.confidence for answer in answers], bins=10, range=(0, 1))[0].tolist()
        counts = self._counts(answers)
        return {
            "answered": self.answered,
            "refused": {str(status): count for status, count in sorted(self.refused.items())},
            "recent": len(answers),
            "exit_shares": [count / max(len(answers), 1) for count in counts],
            "latency_ms": dict(zip(("p50", "p95", "p99"), quantiles, strict=True)),
            "confidence": {"from": 0, "to": 1, "counts": bars},
            "drift": self._drift(answers),
        }

    def _counts(self, answers: Sequence[Answer]) -> list[int]:
        exits = np.array([answer.exit_index for answer in answers], dtype=np.int64)
        counts: list[int] = np.bincount(exits, minlength=self.exits).tolist()
        return counts

    def _drift(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """Return, per operating point in use, expected and actual exit shares, and the p-value of their equality."""
        rows = []
        for point, images in Counter(answer.point for answer in answers).items():
            reference = self.expected.get(point)
            if reference is None or not sum(reference):
                continue
            counts = self._counts([answer for answer in answers if answer.point == point])
            shares = {"expected": [count / sum(reference) for count in reference]}
            shares["actual"] = [count / images for count in counts]
            rows.append({"point": point, "images": images, **shares, "p_value": same_shares(reference, counts)})
        return rows


class _Service:
    """The handlers of the requests."""

    def __init__(
        self, runner: Any, executor: Executor, controller: Controller | None, point: str, limit: int, seconds: float
    ) -> None:
        self.runner, self.executor, self.controller, self.point = runner, executor, controller, point
        self.limit, self.seconds = limit, seconds
        self.metrics = Metrics(len(runner.programs), runner.policy.get("points", []))

    async def predict(self, request: Request) -> Response:
        """Answer one image."""
        body, began = await self.body(request), time.monotonic()
        images = await self.decoded(self.image, body)
        return JSONResponse((await self.answers(request, images, began))[0])

    async def predict_batch(self, request: Request) -> Response:
        """Answer several images."""
        body, began = await self.body(request), time.monotonic()
        images = await self.decoded(self.images, body)
        return JSONResponse({"answers": await self.answers(request, images, began)})

    async def health(self, request: Request) -> Response:
        """Say whether predictions can be made."""
        if self.executor.failed:
            raise HTTPException(503, self.executor.failed)
        return JSONResponse({"status": "ok", "run": self.runner.policy.get("run"), "point": self.current()})

    async def report(self, request: Request) -> Response:
        """Return the metrics."""
        return JSONResponse(self.metrics.snapshot() | {"point": self.current()})

    def current(self) -> str:
        """Return the operating point of requests that do not name one."""
        if self.controller is None:
            return self.point
        return self.controller.update(time.monotonic(), self.executor.oldest())

    async def body(self, request: Request) -> bytes:
        """Return the body of a request, of which no more than the limit is read."""
        announced = request.headers.get("content-length", "")
        large = HTTPException(413, f"the body is larger than {self.limit} bytes")
        if announced.isdecimal() and int(announced) > self.limit:
            raise large
        chunks, size = [], 0
        try:
            async with asyncio.timeout(self.seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > self.limit:
                        raise large
                    chunks.append(chunk)
        except TimeoutError:
            raise HTTPException(408, f"the body did not come within {self.seconds:g} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the client went before the body had come") from None
        return b"".join(chunks)

    async def decoded(self, decode: Any, body: bytes) -> Any:
        """Return the images of a body, decoded in another thread."""
        try:
            return await run_in_threadpool(decode, body)
        except ValueError as error:
            raise HTTPException(400, f"the image {error}".splitlines()[0]) from None
        except RuntimeError as error:  # Pillow is not installed
            raise HTTPException(500, str(error)) from None

    def image(self, body: bytes) -> Any:
        """Return the image of a body, [1, C, H, W]."""
        if not body.startswith(b"\x93NUMPY"):
            return self.runner.picture(io.BytesIO(body), _PIXELS)
        array = _array(body)
        array = array[None] if array.ndim == len(self.runner.policy["input_shape"]) else array
        if array.ndim and len(array) > 1:
            raise ValueError(f"has the shape {list(array.shape)}; expected one image, or /predict-batch")
        return self.runner.checked(array)

    def images(self, body: bytes) -> Any:
        """Return the images of a body, [N, C, H, W]."""
        if body.startswith(b"\x93NUMPY"):
            return self.runner.checked(_array(body))
        expected = 'list is missing; expected an array of numpy.save, or JSON {"images": [image files in base64]}'
        try:
            files = json.loads(body)["images"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(expected) from None
        if not isinstance(files, list) or not files:
            raise ValueError(expected)
        images = []
        for number, text in enumerate(files):
            try:
                images.append(self.runner.picture(io.BytesIO(base64.b64decode(text, validate=True)), _PIXELS))
            except (binascii.Error, TypeError):
                raise ValueError(f"{number} is not in base64") from None
            except ValueError as error:
                raise ValueError(f"{number} {error}") from None
        return np.concatenate(images)

    async def answers(self, request: Request, images: Any, began: float) -> list[dict[str, Any]]:
        """Return the answers to images, for JSON."""
        point = request.headers.get(POINT_HEADER) or self.current()
        if point not in self.runner.points and point != self.point:
            expected = ", ".join(self.runner.points)
            raise HTTPException(400, f"the operating point {point!r:.40} is unknown; expected one of {expected}")
        if len(images) > self.executor.limit:
            raise HTTPException(413, f"{len(images)} images are too many; expected at most {self.executor.limit}")
        try:
            futures = self.executor.submit(images, point)
            answers = await asyncio.gather(*map(asyncio.wrap_future, futures))
        except Busy as error:
            raise HTTPException(503, str(error), {"Retry-After": "1"}) from None
        except RuntimeError as error:
            raise HTTPException(503 if self.executor.failed else 500, str(error)) from None
        latency = time.monotonic() - began
        for answer in answers:
            self.metrics.record(answer, latency)
            if self.controller is not None:
                self.controller.observe(latency)
        names = self.runner.policy["class_names"]
        return [
            {
                "class": names[answer.predicted],
                "index": answer.predicted,
                "exit": answer.exit_index + 1,
                "confidence": answer.confidence,
                "point": answer.point,
            }
            for answer in answers
        ]

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Return an error as JSON of one line."""
        assert isinstance(error, HTTPException)
        self.metrics.refused[error.status_code] += 1
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def _array(body: bytes) -> Any:
    try:
        return np.load(io.BytesIO(body), allow_pickle=False)
    except Exception:  # numpy raises errors of many types for a damaged file
        raise ValueError("is not an array; expected what numpy.save writes") from None


def application(
    runner: Any,
    *,
    point: str | None = None,
    p99: float | None = None,
    size: int = 32,
    wait: float = 0.005,
    queue: int = 1024,
    max_bytes: int = 10_000_000,
    seconds: float = 10.0,
) -> Starlette:
    """Return the service as an ASGI application.

    Args:
        runner: the exported network (`Runner` of run.py).
        point: operating point of requests that do not name one; None: the chosen one.
        p99: bound of the 99th percentile of latency in seconds, that a `Controller` keeps; None: no controller.
        size, wait, queue: of the `Executor`.
        max_bytes: largest body of a request.
        seconds: time in which a body has to come.

    Raises:
        ValueError: the point is unknown, or there is no table of points to move along.
    """
    names = list(runner.points)
    start = point or "default"
    if point is not None and point not in names:
        raise ValueError(f"the operating point {point} is unknown; expected one of {', '.join(names)}")
    if p99 is not None and start not in names:
        raise ValueError("policy.json has no operating points; expected an export with a table of them")
    controller = Controller(names, start, p99) if p99 is not None else None
    executor = Executor(runner, size=size, wait=wait, limit=queue)
    service = _Service(runner, executor, controller, start, max_bytes, seconds)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(executor.stop)

    routes = [
        Route("/predict", service.predict, methods=["POST"]),
        Route("/predict-batch", service.predict_batch, methods=["POST"]),
        Route("/health", service.health),
        Route("/metrics", service.report),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: service.refuse}, lifespan=lifespan)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that waits for connections.

    Raises:
        RuntimeError: the address can't be used; the message is one line.
    """
    try:
        listener = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise RuntimeError(f"can't serve on {host}, port {port}: {getattr(error, 'strerror', None) or error}") from None
    # Connections inherit it. Without it, the second packet of an answer waits 40 ms for the client's acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def serve(runner: Any, host: str, port: int, **options: Any) -> None:
    """Serve requests until the process is interrupted; see `application` for the options.

    Raises:
        RuntimeError: the address can't be used; the message is one line.
        ValueError: see `application`.
    """
    # Imported when used: an application of your own may run in another server.
    import uvicorn

    app = application(runner, **options)
    listener = listen(host, port)
    url = f"http://{host}:{listener.getsockname()[1]}"
    print(f"serving on {url} (POST /predict and /predict-batch, GET /health and /metrics); Ctrl-C ends it", flush=True)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=10, limit_concurrency=1000
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
