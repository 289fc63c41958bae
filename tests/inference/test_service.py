"""The service answers as the runner does, whoever else asks, and refuses what it can't answer in one line."""

import asyncio
import base64
import contextlib
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from scipy import stats

from exitkit.inference.export import runner as running
from exitkit.inference.export import service as serving
from exitkit.inference.export.bundle import logits_by_stage
from exitkit.inference.export.service import Busy, Controller, Executor, Metrics, Waiting, application

from bundles import NAMES, pixels, tiny_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def runner(folder):
    return running.open_runner(folder, threads=1)


def at(runner, point, images):
    """Class and exit of images, by the runner itself at an operating point."""
    exported = running.Runner.__new__(running.Runner)
    exported.policy, exported.programs = runner.points[point], runner.programs
    logits, exits = exported(images)
    return list(zip(logits.argmax(1).tolist(), exits.tolist(), strict=True))


@contextlib.contextmanager
def served(runner, **options):
    """The address of a service in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application(runner, **options), log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def url(runner):
    with served(runner, max_bytes=100_000, seconds=0.5, queue=200) as address:
        yield address


def png(image):
    file = io.BytesIO()
    Image.fromarray(image[0]).save(file, "png")
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# The executor


def test_images_of_many_requests_get_the_runners_answers_at_their_operating_points(runner):
    images, points = runner.normalised(pixels(60)), ["cheap", "default", "100%"] * 20
    executor = Executor(runner, size=7)
    futures = [executor.submit(images[row : row + 1], point)[0] for row, point in enumerate(points)]
    answers = [future.result(10) for future in futures]
    executor.stop()
    expected = {point: at(runner, point, images) for point in runner.points}
    assert [(each.predicted, each.exit_index) for each in answers] == [
        expected[point][row] for row, point in enumerate(points)
    ]
    assert {each.exit_index for each in answers} == {0, 1} and [each.point for each in answers] == points
    with pytest.raises(RuntimeError, match="stop"):
        executor.submit(images[:1], "default")


def test_the_confidence_is_that_of_the_rule_with_its_temperatures(runner, monkeypatch):
    images, point = runner.normalised(pixels(8)), "default"
    heat = [3.0] * len(runner.programs)
    monkeypatch.setitem(runner.points, point, {**runner.points[point], "temperatures": heat})
    executor = Executor(runner, size=8)
    answers = [future.result(10) for future in executor.submit(images, point)]
    executor.stop()
    logits = logits_by_stage(runner, images)
    for row, answer in enumerate(answers):
        z = logits[row, answer.exit_index].astype(np.float64) / 3
        assert answer.confidence == pytest.approx(np.exp(z - z.max()).max() / np.exp(z - z.max()).sum())


def test_images_that_remain_fill_up_the_batches_of_later_stages(runner, monkeypatch):
    sizes = [[], []]

    def counted(index, program):
        return lambda arrays: (sizes[index].append(len(arrays[0])), program(arrays))[1]

    monkeypatch.setattr(runner, "programs", [counted(k, program) for k, program in enumerate(runner.programs)])
    images = runner.normalised(pixels(160))
    executor = Executor(runner, size=16, wait=60)
    executor.start = lambda: None  # everything has come before it starts
    futures = executor.submit(images, "default")
    executor._stopping = True
    executor.run()
    assert all(future.done() for future in futures)
    remaining = sum(answer.exit_index for answer in (future.result() for future in futures))
    assert sizes[0] == [16] * 10
    assert sizes[1] == [16] * (remaining // 16) + [remaining % 16] * (remaining % 16 > 0)
    assert 40 < remaining < 120


def test_the_next_stage_is_the_late_one_then_the_deepest_full_one_then_the_longest_waiting(runner):
    executor = Executor(runner, size=2, wait=1)
    executor.queues = [executor.queues[0], executor.queues[1], type(executor.queues[0])()]

    def wait(index, *times):
        executor.queues[index].clear()
        executor.queues[index].extend(Waiting(None, "default", [], None, moment) for moment in times)

    wait(0, 9.9)
    assert executor.choose(10) == 0
    wait(1, 9.8)
    assert executor.choose(10) == 1
    wait(0, 9.9, 9.9)
    assert executor.choose(10) == 0
    wait(2, 9.95, 9.95)
    assert executor.choose(10) == 2
    wait(1, 8.5)
    assert executor.choose(10) == 1
    wait(0, 1, 1)  # who has not begun waits for its turn
    assert executor.choose(10) == 1


def test_the_images_of_clients_that_are_gone_are_not_computed(runner):
    executor = Executor(runner)
    executor.start = lambda: None
    futures = executor.submit(runner.normalised(pixels(4)), "default")
    assert futures[1].cancel() and futures[3].cancel()
    executor._stopping = True
    executor.run()
    assert [future.cancelled() for future in futures] == [False, True, False, True]
    assert all(isinstance(futures[row].result(), serving.Answer) for row in (0, 2)) and executor._open == 0


def test_an_image_that_fails_fails_alone(runner, monkeypatch):
    def picky(arrays):
        if (arrays[0] > 1e9).any():
            raise ValueError("too bright\nand a second line")
        return first(arrays)

    first, second = runner.programs
    monkeypatch.setattr(runner, "programs", [picky, second])
    images = runner.normalised(pixels(9))
    images[4] = 1e10
    executor = Executor(runner, size=9)
    futures = executor.submit(images, "default")
    errors = [future.exception(10) for future in futures]
    assert [row for row, error in enumerate(errors) if error] == [4] and str(errors[4]) == "too bright"
    assert executor._open == 0
    executor.stop()


def test_an_executor_that_dies_leaves_nobody_waiting(runner, monkeypatch):
    class Killed(BaseException):
        pass

    def deadly(arrays):
        raise Killed("no memory")

    monkeypatch.setattr(runner, "programs", [deadly, deadly])
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    executor = Executor(runner, size=2)
    futures = executor.submit(runner.normalised(pixels(5)), "default")
    for future in futures:
        with pytest.raises(RuntimeError, match="the stages can't be computed: Killed: no memory"):
            future.result(10)
    with served(runner) as address:
        assert httpx.get(f"{address}/health").status_code == 200
        died = httpx.post(f"{address}/predict", content=npy(pixels(1)))
        assert died.status_code == 503 and "can't be computed" in died.json()["error"]
        assert httpx.get(f"{address}/health").status_code == 503


def test_more_images_than_may_wait_are_refused(runner):
    executor = Executor(runner, limit=5)
    executor.start = lambda: None
    images = runner.normalised(pixels(6))
    with pytest.raises(Busy):
        executor.submit(images, "default")
    executor.submit(images[:5], "default")
    with pytest.raises(Busy, match="5 images wait already"):
        executor.submit(images[:1], "default")


# Drift


@pytest.mark.parametrize("degrees", range(1, 12))
def test_the_tail_of_chi_squared_is_scipys(degrees):
    for statistic in (0.0, 1e-6, 0.5, 1.0, 4.2, 11.0, 60.0, 400.0):
        expected = stats.chi2.sf(statistic, degrees)
        assert serving.chi_squared_tail(statistic, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_the_test_of_equal_shares_is_scipys_and_pools_rare_exits():
    for reference, counts in (([50, 30, 20], [400, 350, 250]), ([500, 300, 200, 90], [51, 29, 11, 9])):
        expected = stats.chi2_contingency([reference, counts], correction=False).pvalue
        assert serving.same_shares(reference, counts) == pytest.approx(expected, rel=1e-9)
    pooled = stats.chi2_contingency([[500, 203], [60, 40]], correction=False).pvalue
    assert serving.same_shares([500, 200, 3], [60, 39, 1]) == pytest.approx(pooled, rel=1e-9)
    assert serving.same_shares([100, 0], [20, 0]) == 1 and serving.same_shares([10, 10], [1, 0]) == 1


def test_equal_traffic_is_rarely_called_drift_and_changed_traffic_is():
    generator = np.random.default_rng(0)
    shares = [0.5, 0.2, 0.2, 0.1]
    drawn = [[generator.multinomial(size, shares).tolist() for size in (500, 2000)] for _ in range(1000)]
    alarms = np.mean([serving.same_shares(*pair) < 0.05 for pair in drawn])
    assert 0.03 < alarms < 0.07
    assert serving.same_shares([250, 100, 100, 50], [800, 400, 500, 300]) < 1e-3


def test_metrics_are_those_of_the_recent_answers():
    points = [{"name": "default", "shares": [0.5, 0.5], "images": 100}]
    metrics = Metrics(2, points)
    assert metrics.snapshot()["latency_ms"] == {"p50": None, "p95": None, "p99": None}
    for number in range(200):
        metrics.record(serving.Answer(0, int(number >= 150), 0.95 if number % 2 else 0.05, "default"), number / 1000)
    taken = metrics.snapshot()
    assert taken["exit_shares"] == [0.75, 0.25] and taken["answered"] == 200
    assert taken["latency_ms"]["p50"] == pytest.approx(99.5) and taken["latency_ms"]["p99"] == pytest.approx(197.01)
    assert taken["confidence"]["counts"] == [100, 0, 0, 0, 0, 0, 0, 0, 0, 100]
    (drift,) = taken["drift"]
    assert drift["expected"] == [0.5, 0.5] and drift["actual"] == [0.75, 0.25] and drift["p_value"] < 1e-4


# The controller


def simulated(rates, controller=None, seconds=20.0, full=0.010):
    """Latencies [second of arrival, seconds] of a queue of one server, and the share of the cost that was used."""
    generator = np.random.default_rng(0)
    free, found = 0.0, []
    waiting = []  # (end of service, latency) that the controller has not seen yet
    costs = {"30%": 0.3, "50%": 0.5, "75%": 0.75, "100%": 1.0}
    for phase, rate in enumerate(rates):
        now, end = phase * seconds, (phase + 1) * seconds
        while (now := now + generator.exponential(1 / rate)) < end:
            point = "100%"
            if controller is not None:
                for done, latency in [each for each in waiting if each[0] <= now]:
                    controller.observe(latency)
                    waiting.remove((done, latency))
                point = controller.update(now, max(free - now, 0.0))
            free = max(free, now) + full * costs[point]
            waiting.append((free, free - now))
            found.append((now, free - now, costs[point]))
    return np.array(found)


@pytest.mark.parametrize("rates", [(30, 120, 30), (30, 180, 30), (30, 250, 30), (60, 150, 60)])
def test_a_controller_keeps_the_bound_as_load_rises_and_comes_back(rates):  # the full network serves 100 per second
    names = ["30%", "50%", "75%", "100%"]
    without, found = simulated(rates), simulated(rates, Controller(names, "100%", 0.2))

    def during(table, phase):
        return table[(table[:, 0] > 20 * phase + 2) & (table[:, 0] < 20 * (phase + 1))]

    assert np.quantile(during(without, 1)[:, 1], 0.99) > 3
    assert np.quantile(during(found, 1)[:, 1], 0.99) < 0.2
    assert during(found, 1)[:, 2].mean() > 0.6 * 100 / rates[1]  # it uses most of what the machine can do
    assert all(np.quantile(during(found, phase)[:, 1], 0.99) < 0.2 for phase in (0, 2))
    assert during(found, 2)[-1, 2] > during(found, 1)[:, 2].mean()


def test_a_controller_keeps_few_latencies_while_nobody_asks_for_its_point():
    controller = Controller(["a", "b"], "b", 0.1)
    for _ in range(20_000):
        controller.observe(0.01)
    assert len(controller._latencies) <= 10_000


def test_a_controller_never_passes_its_start_and_climbs_more_slowly_after_each_failure():
    controller = Controller(["a", "b", "c"], "b", 0.1)
    moment = iter(np.arange(0.0, 1000.0, 0.25))
    for _ in range(100):
        assert controller.update(next(moment), 0.0) == "b"

    def climb():
        steps = 0
        while controller.point == "a":
            controller.update(next(moment), 0.0)
            steps += 1
        return steps

    found = []
    for _ in range(6):
        controller.observe(0.09)
        assert controller.update(next(moment), 0.0) == "a"
        found.append(climb())
    assert found == [4, 8, 16, 32, 32, 32]
    assert Controller(["a", "b", "c"], "c", 0.1).update(0.0, 0.21) == "a"


# Requests


def test_one_image_and_many_are_answered_as_by_the_runner(url, runner):
    images = pixels(12)
    expected = at(runner, "default", runner.normalised(images))
    for row in range(3):
        for body in (png(images[row]), npy(images[row]), npy(runner.normalised(images[row : row + 1]))):
            answer = httpx.post(f"{url}/predict", content=body).raise_for_status().json()
            assert (answer["index"], answer["exit"] - 1) == expected[row]
            assert answer["class"] == NAMES[answer["index"]] and answer["point"] == "default"
            assert 1 / 3 <= answer["confidence"] <= 1
    files = json.dumps({"images": [base64.b64encode(png(image)).decode() for image in images]}).encode()
    for body in (npy(images), files):
        answers = httpx.post(f"{url}/predict-batch", content=body).raise_for_status().json()["answers"]
        assert [(each["index"], each["exit"] - 1) for each in answers] == expected


def test_a_request_selects_its_operating_point(url):
    bright = npy(np.full((1, 4, 4), 255, np.uint8))
    exits = {}
    for point in ("cheap", "default", "100%"):
        answer = httpx.post(f"{url}/predict", content=bright, headers={"Operating-Point": point}).json()
        exits[point] = answer["exit"]
        assert answer["point"] == point
    assert exits == {"cheap": 1, "default": 1, "100%": 2}
    refused = httpx.post(f"{url}/predict", content=bright, headers={"Operating-Point": "50%"})
    assert refused.status_code == 400 and "expected one of cheap, default, 100%" in refused.json()["error"]


def test_health_and_metrics(url):
    httpx.post(f"{url}/predict-batch", content=npy(pixels(100, seed=3)))
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "run": "tiny", "point": "default"}
    metrics = httpx.get(f"{url}/metrics").json()
    assert metrics["answered"] >= 100 and sum(metrics["exit_shares"]) == pytest.approx(1)
    assert sum(metrics["confidence"]["counts"]) == metrics["recent"] and metrics["latency_ms"]["p99"] > 0
    assert {row["point"] for row in metrics["drift"]} >= {"default"}


BAD = {
    "nothing": ("/predict", b"", 400, "it is not an image"),
    "text": ("/predict", b"hello", 400, "it is not an image"),
    "half a png": ("/predict", png(pixels(1)[0])[:40], 400, "can't be read"),
    "half an array": ("/predict", npy(pixels(1)[0])[:-3], 400, "is not an array"),
    "an array of objects": ("/predict", npy(np.array([{}, []], dtype=object)), 400, "is not an array"),
    "a header that lies": ("/predict", npy(pixels(1)).replace(b"(1, 1, 4, 4)", b"(9**9,4,4,)"), 400, "is not an array"),
    "another shape": ("/predict", npy(np.zeros((3, 4, 4), np.uint8)), 400, "has the shape [1, 3, 4, 4]"),
    "a number": ("/predict", npy(np.uint8(3)), 400, "has the shape []"),
    "several images": ("/predict", npy(pixels(2)), 400, "expected one image, or /predict-batch"),
    "integers": ("/predict", npy(np.zeros((1, 4, 4), np.int64)), 400, "has the dtype int64"),
    "not finite": ("/predict", npy(np.full((1, 4, 4), np.nan)), 400, "not finite"),
    "overflow": ("/predict", npy(np.full((1, 4, 4), 1e300)), 400, "not finite"),
    "no images": ("/predict-batch", npy(np.zeros((0, 1, 4, 4), np.uint8)), 400, "N at least 1"),
    "no JSON": ("/predict-batch", b"{", 400, "list is missing"),
    "JSON without images": ("/predict-batch", b"[]", 400, "list is missing"),
    "an empty list": ("/predict-batch", b'{"images": []}', 400, "list is missing"),
    "deep JSON": ("/predict-batch", b"[" * 50_000, 400, "list is missing"),
    "no base64": ("/predict-batch", b'{"images": ["?"]}', 400, "the image 0 is not in base64"),
    "a number as image": ("/predict-batch", b'{"images": [1]}', 400, "the image 0 is not in base64"),
    "no image in base64": ("/predict-batch", b'{"images": ["aGVsbG8="]}', 400, "the image 0 can't be read"),
    "too many images": ("/predict-batch", npy(pixels(201)), 413, "expected at most 200"),
    "too many bytes": ("/predict", bytes(100_001), 413, "larger than 100000 bytes"),
    "no such place": ("/predictions", b"", 404, "Not Found"),
    "of another method": ("/health", b"", 405, "Method Not Allowed"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_can_not_be_answered_is_refused_in_one_line(bad, url):
    path, body, status, words = BAD[bad]
    refused = httpx.post(url + path, content=body)
    assert refused.status_code == status, refused.text
    (line,) = refused.json()["error"].splitlines()
    assert words in line, line
    assert httpx.post(f"{url}/predict", content=npy(pixels(1))).status_code == 200


def test_a_body_of_unknown_length_is_read_up_to_the_limit(url):
    sent = []

    def chunks():
        for _ in range(100):
            sent.append(1)
            yield bytes(50_000)

    with contextlib.suppress(httpx.TransportError):  # the server may close before all is sent
        assert httpx.post(f"{url}/predict", content=chunks()).status_code == 413
    assert httpx.get(f"{url}/metrics").json()["refused"]["413"] >= 1


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(url):
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "png")
    refused = httpx.post(f"{url}/predict", content=file.getvalue())
    assert refused.status_code == 400 and "9000 x 9000 pixels" in refused.json()["error"]


def test_slow_clients_are_told_off_and_keep_nobody_waiting(url):
    port = int(url.rpartition(":")[2])
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n"
    with contextlib.ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(40)]
        for number, slow in enumerate(sockets):
            slow.sendall(head + b"few" if number % 2 else head[:20])  # half of them do not end their headers
        began = time.monotonic()
        assert httpx.post(f"{url}/predict", content=npy(pixels(1))).status_code == 200
        assert time.monotonic() - began < 5
        sockets[1].settimeout(20)
        assert b"408" in sockets[1].recv(100)
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_full_queue_is_told_with_the_time_to_try_again(runner, monkeypatch):
    release = threading.Event()
    first, second = runner.programs
    monkeypatch.setattr(runner, "programs", [lambda arrays: (release.wait(20), first(arrays))[1], second])

    async def ask(address):
        async with httpx.AsyncClient(timeout=30) as client:
            asked = [asyncio.create_task(client.post(f"{address}/predict", content=npy(pixels(1)))) for _ in range(3)]
            done, _ = await asyncio.wait(asked, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            release.set()
            return [task.result() for task in done], await asyncio.gather(*asked)

    with served(runner, queue=2) as address:
        refused, answers = asyncio.run(ask(address))
    assert [each.status_code for each in refused] == [503] and refused[0].headers["Retry-After"] == "1"
    assert sorted(each.status_code for each in answers) == [200, 200, 503]


def test_many_requests_at_once_get_their_own_answers(url, runner):
    images = pixels(120, seed=5)
    expected = at(runner, "default", runner.normalised(images))

    async def ask():
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=20)) as client:
            asked = [client.post(f"{url}/predict", content=npy(image)) for image in images]
            return await asyncio.gather(*asked)

    answers = [answer.raise_for_status().json() for answer in asyncio.run(ask())]
    assert [(each["index"], each["exit"] - 1) for each in answers] == expected


def test_a_bound_of_latency_moves_the_service_along_its_points(runner, monkeypatch):
    first, second = runner.programs
    monkeypatch.setattr(runner, "programs", [first, lambda arrays: (time.sleep(0.05), second(arrays))[1]])
    with served(runner, p99=0.02) as address:
        for _ in range(60):
            httpx.post(f"{address}/predict", content=npy(np.zeros((1, 4, 4), np.uint8)))
            if (point := httpx.get(f"{address}/health").json()["point"]) == "cheap":
                break
        assert point == "cheap"
    with pytest.raises(ValueError, match="the operating point 7% is unknown"):
        application(runner, point="7%")


# The command


@contextlib.contextmanager
def command(folder, *options):
    """A process of run.py --serve, and its address."""
    words = [sys.executable, folder / "run.py", "--threads", "1", "--serve", *map(str, options)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving on http://127.0.0.1:"), (line, process.stderr.read() if not line else "")
        yield process, line.split()[2]
    finally:
        process.kill()
        process.wait(10)


def test_a_killed_service_starts_again_on_its_port_and_ends_at_an_interrupt(folder):
    with command(folder, "0") as (process, address):
        assert httpx.post(f"{address}/predict", content=(folder / "example.png").read_bytes()).status_code == 200
        process.kill()
        process.wait(10)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{address}/health", timeout=5)
    port = address.rpartition(":")[2]
    with command(folder, port, "--point", "100%", "--max-mb", "1") as (process, again):
        assert again == address
        answer = httpx.post(f"{address}/predict", content=(folder / "example.png").read_bytes()).json()
        assert answer["exit"] == 2 and answer["point"] == "100%"
        taken = subprocess.run(
            [sys.executable, folder / "run.py", "--serve", port], capture_output=True, text=True, timeout=60
        )
        assert taken.returncode == 2 and taken.stderr.startswith(f"run.py: can't serve on 127.0.0.1, port {port}: ")
        assert len(taken.stderr.splitlines()) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0 and process.stderr.read() == ""


def test_answers_are_sent_without_delay():
    with serving.listen("127.0.0.1", 0) as listener:
        with socket.create_connection(listener.getsockname()):
            connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_service_that_can_not_start_says_why_in_one_line(folder, tmp_path, monkeypatch, capsys):
    def says(words, place, *options):
        assert running.main(["--serve", "0", *options], place) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("run.py: ") and words in line, line

    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "stage-2.onnx").unlink()
    says("has no complete export", copy)
    says("expected IMAGES, --check or --serve", folder, "--check")
    assert running.main(["x.png", "--max-mb", "3"], folder) == 2
    assert "--max-mb is an option of --serve" in capsys.readouterr().err
    says("is no whole number from 1", folder, "--p99", "0")
    monkeypatch.setitem(sys.modules, "serve", None)
    says("serve.py is missing", folder)
    monkeypatch.setitem(sys.modules, "serve", serving)
    says("the operating point 7% is unknown", folder, "--point", "7%")
    says("can't serve on 999.0.0.1", folder, "--host", "999.0.0.1")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    says("pip install starlette uvicorn", folder)
