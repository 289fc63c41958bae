"""Throughput and latency of an exported network's service against the arrival rate, with and without early exit.

    python -m exitkit.benchmarks.timing.load DEPLOYED [IMAGES.npy]

Starts `run.py --serve` on this machine and sends it single images at random times (a Poisson process), whether or not
earlier ones have been answered. Latency counts from the moment at which an image was due. The client runs on the same
machine, and the same images come at the same times in every way to serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from exitkit.errors import UserError

try:
    import httpx
except ImportError:  # an extra
    raise SystemExit("exitkit: the load needs httpx; pip install 'exitkit[serve]'") from None

LOADS = (0.25, 0.5, 0.75, 1.0, 1.5)
"""Arrivals per second, as shares of what the full network serves."""
_CLIENTS = 8
_PATIENCE = 60.0


@contextlib.contextmanager
def service(folder: Path, options: Sequence[str]) -> Iterator[str]:
    """Start the service of a bundle on a free port of this machine; yield its address.

    Raises:
        UserError: it does not start.
    """
    words = [sys.executable, str(folder / "run.py"), "--serve", "0", *options]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            line = process.stdout.readline()
            if not line:
                first = (process.stderr.read().splitlines() or ["no message"])[0]
                raise UserError(f"the service does not start: {first}")
            yield line.split()[2]
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


async def capacity(address: str, bodies: Sequence[bytes], seconds: float) -> float:
    """Return the images per second that the service answers to 8 clients that each wait for their answer."""
    done, began = 0, time.perf_counter()

    async def ask_on(client: httpx.AsyncClient, first: int) -> None:
        nonlocal done
        number = first
        while time.perf_counter() - began < seconds:
            (await client.post(f"{address}/predict", content=bodies[number % len(bodies)])).raise_for_status()
            number, done = number + _CLIENTS, done + 1

    async with httpx.AsyncClient(timeout=_PATIENCE) as client:
        await asyncio.gather(*(ask_on(client, first) for first in range(_CLIENTS)))
    return done / (time.perf_counter() - began)


async def at_rate(address: str, bodies: Sequence[bytes], rate: float, seconds: float) -> dict[str, Any]:
    """Send images at random times, and return what became of them.

    Args:
        address: the service.
        bodies: what is sent, drawn at random.
        rate: images per second.
        seconds: how long.

    Returns:
        `served` (images per second from the first arrival to the last answer), `refused` (share), `exit` (mean, from
        1), and percentiles of latency in milliseconds: `p50`, `p95`, `p99`.
    """
    generator = np.random.default_rng(0)
    due = np.cumsum(generator.exponential(1 / rate, size=max(round(rate * seconds), 1)))
    drawn = generator.integers(len(bodies), size=len(due))
    began = time.perf_counter()
    latencies: list[float] = []
    exits: list[int] = []

    async def ask(client: httpx.AsyncClient, moment: float, body: bytes) -> None:
        await asyncio.sleep(max(began + moment - time.perf_counter(), 0))
        answer = await client.post(f"{address}/predict", content=body)
        if answer.status_code == 503:
            return
        latencies.append(time.perf_counter() - began - moment)
        exits.append(answer.raise_for_status().json()["exit"])

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)  # none waits for another's answer
    async with httpx.AsyncClient(timeout=httpx.Timeout(_PATIENCE, pool=None), limits=limits) as client:
        moments = zip(due.tolist(), drawn.tolist(), strict=True)
        await asyncio.gather(*(ask(client, moment, bodies[number]) for moment, number in moments))
    took = time.perf_counter() - began
    p50, p95, p99 = (1000 * np.quantile(latencies, (0.5, 0.95, 0.99))).tolist() if latencies else [float("nan")] * 3
    refused = 1 - len(latencies) / len(due)
    return {
        "served": len(latencies) / took,
        "refused": refused,
        "exit": float(np.mean(exits)) if exits else float("nan"),
        **{"p50": p50, "p95": p95, "p99": p99},
    }


def measure(
    folder: Path, bodies: Sequence[bytes], ways: Mapping[str, Sequence[str]], rates: Sequence[float], seconds: float
) -> list[dict[str, Any]]:
    """Return rows of `rate`, `way` and the values of `at_rate`.

    Args:
        folder: the bundle.
        bodies: what is sent.
        ways: {name: options of run.py --serve}; the first is the full network.
        rates: images per second; empty: `LOADS` of the full network's capacity.
        seconds: time per rate and way.

    Raises:
        UserError: the service does not start.
    """
    rows = []
    chosen = list(rates)
    for way, options in ways.items():
        with service(folder, options) as address:
            able = asyncio.run(capacity(address, bodies, min(seconds, 3)))  # also a warm-up
            chosen = chosen or [load * able for load in LOADS]
            for rate in chosen:
                rows.append({"rate": rate, "way": way, **asyncio.run(at_rate(address, bodies, rate, seconds))})
    return sorted(rows, key=lambda row: row["rate"])


def read_bodies(folder: Path, images: Path | None) -> list[bytes]:
    """Return the images of an .npy file, or the examples of the bundle, as bodies of requests.

    Raises:
        UserError: they can't be read.
    """
    path = images or folder / "examples.npy"
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(f"{path} can't be read; expected images [N, C, H, W] written by numpy.save") from None
    bodies = []
    for image in array:
        file = io.BytesIO()
        np.save(file, image)
        bodies.append(file.getvalue())
    if not bodies:
        raise UserError(f"{path} has no images")
    return bodies


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows as a table."""
    drawn = Table()
    for number, name in enumerate(
        ("arrivals/s", "way", "served/s", "refused", "mean exit", "p50 ms", "p95 ms", "p99 ms")
    ):
        drawn.add_column(name, justify="left" if number == 1 else "right", no_wrap=True)
    for row in rows:
        values = [f"{row[key]:.1f}" for key in ("exit", "p50", "p95", "p99")]
        drawn.add_row(
            f"{row['rate']:.0f}", row["way"], f"{row['served']:.0f}", f"{100 * row['refused']:.0f} %", *values
        )
    return drawn


@click.command()
@click.argument("folder", metavar="DEPLOYED", type=click.Path(path_type=Path))
@click.argument("images", metavar="[IMAGES.npy]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--rate", "rates", type=float, multiple=True, help="Images per second; repeatable.  [default: by capacity]"
)
@click.option("--seconds", type=float, default=10.0, show_default=True, help="Time per rate.")
@click.option("--p99", type=int, help="Also serve all exits with a controller of this bound, in milliseconds.")
@click.option("--threads", type=int, default=1, show_default=True, help="CPU threads of the network.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    folder: Path,
    images: Path | None,
    rates: tuple[float, ...],
    seconds: float,
    p99: int | None,
    threads: int,
    as_json: bool,
) -> None:
    """Measure throughput and latency of an exported network's service, with and without early exit."""
    try:
        if not all(math.isfinite(value) and value > 0 for value in (seconds, *rates)):
            raise UserError("rate and seconds: expected finite numbers above 0")
        bodies = read_bodies(folder, images)
        fixed = ["--threads", str(threads)]
        ways = {"all exits": [*fixed, "--point", "100%"], "early exit": fixed}
        if p99 is not None:
            ways[f"p99 {p99} ms"] = [*fixed, "--point", "100%", "--p99", str(p99)]
        rows = measure(folder, bodies, ways, rates, seconds)
    except UserError as error:
        raise SystemExit(_refuse(error)) from None
    except httpx.HTTPError as error:
        raise SystemExit(_refuse(UserError(f"the service refuses an image: {_reason(error)}"))) from None
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        Console(highlight=False).print(table(rows))


def _reason(error: httpx.HTTPError) -> str:
    if not isinstance(error, httpx.HTTPStatusError):
        return str(error) or type(error).__name__
    try:
        return str(error.response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return str(error.response.status_code)


def _refuse(error: UserError) -> int:
    click.echo(f"exitkit: {error}", err=True)
    return 2


if __name__ == "__main__":
    main()
