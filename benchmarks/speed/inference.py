"""Speed of the inference engines, and of early exit on them: time saved per multiply-adds saved, and its overhead."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from exitkit.benchmarks.speed.row import Profile, Row, judged, not_run
from exitkit.benchmarks.speed.timing import Ratio, paired_ratios
from exitkit.benchmarks.speed.work import Work
from exitkit.inference.adaptive import AdaptiveInference
from exitkit.inference.engines import AutoEngine, FixedEngine, InferenceEngine, fixed, onnx_program, run_all
from exitkit.inference.export.programs import Piece, all_exits, missing_packages, pieces, write_program
from exitkit.inference.rule import ExitRule
from exitkit.inference.scores import scores
from exitkit.inference.thresholds import exit_counts, share_for_budget, thresholds
from exitkit.networks.cascade import MultiExitNetwork
from exitkit.networks.costs import cost
from exitkit.networks.folding import fold

Pass = Callable[[torch.Tensor], object]
"""images -> the outputs of all exits"""
_BATCH = 256
_IMAGES = 64
"""Images of which the mean latency is taken, one by one."""


def inference_rows(work: Work) -> Iterator[Row]:
    """Measure an operating point that saves half of the multiply-adds, and one image that leaves at the last exit."""
    limits = {"cpu": 0.9, "cuda": 0.75}
    for device, limit in limits.items():
        target = f"{device}: time saved per multiply-adds saved, at batch {_BATCH}, half of them saved"
        alone = f"{device}: a single image through all exits, in runs of the full network"
        if device == "cuda" and not torch.cuda.is_available():
            yield not_run(target, limit)
            yield not_run(alone, 1.05)
            continue
        yield judged(target, limit, saved(replace(work, batch=_BATCH, device=device)), at_least=True)
        yield judged(alone, 1.05, single(replace(work, batch=1, device=device, rounds=max(10 * work.rounds, 1))))


def halved(network: MultiExitNetwork) -> tuple[np.ndarray, float]:
    """Return the multiply-adds up to each exit [K], and the q whose operating point saves half of them."""
    costs = np.array([row.macs for row in cost(network)], dtype=np.float64)
    return costs, float(share_for_budget(costs, [costs[-1] / 2])[0])


class Engines:
    """The engines of one network, each prepared once, and the network without early exit on each of them."""

    def __init__(self, work: Work) -> None:
        self.network = work.build().eval()
        self.names = ["eager", "folded", *([] if missing_packages() else ["onnx"])]
        self._shape = (2, *work.shape)
        self._made: dict[str, FixedEngine] = {}

    def made(self, name: str) -> FixedEngine:
        """Return an engine."""
        if name not in self._made:
            self._made[name] = fixed(self.network, name)
        return self._made[name]

    @cached_property
    def auto(self) -> AutoEngine:
        """The engine that chooses among the others."""
        return AutoEngine([self.made(name) for name in self.names], self.network.num_exits)

    def stages(self, engine: InferenceEngine) -> Pass:
        """Return a function that runs all stages one by one, without decisions."""
        exits = self.network.num_exits
        return torch.inference_mode()(lambda images: run_all(engine.select(images, len(images)), exits, images))

    @cached_property
    def one_session(self) -> Pass:
        """The whole network as one session of onnxruntime."""
        return torch.inference_mode()(onnx_program(all_exits(self.network, torch.zeros(self._shape))))

    def full(self, name: str) -> Pass:
        """Return the plain network on an engine: one session, or its stages in a row."""
        return self.one_session if name == "onnx" else self.stages(self.made(name))


def saved(work: Work, engines: Engines | None = None, engine: str = "eager") -> Ratio:
    """Return the fraction of time saved / the fraction of multiply-adds saved, at the operating point of `halved`.

    A batch of one image stands for the mean latency: the images of a batch of 64 run one by one.
    """
    engines = engines or Engines(work)
    images = replace(work, batch=max(work.batch, _IMAGES)).data()[0]
    costs, q = halved(engines.network)
    with torch.inference_mode():
        logits = torch.stack(engines.network(images).logits, 1).float().cpu().numpy()
    confidences = scores(logits, "confidence")
    counts = exit_counts(len(confidences), len(costs), [q])
    rule = ExitRule("confidence", tuple(thresholds(confidences, counts)[0]))
    adaptive = AdaptiveInference(engines.network, rule, engine=engines.made(engine))
    operations = 1 - costs[adaptive(images).exits.cpu()].mean() / costs[-1]
    batches, full = images.split(work.batch), engines.full(engine)
    ratio = paired_ratios(lambda: list(map(adaptive, batches)), lambda: list(map(full, batches)), work.rounds)
    median, low, high = (float((1 - part) / operations) for part in (ratio.median, ratio.high, ratio.low))
    return Ratio(median, low, high, ratio.seconds)


def single(work: Work, engines: Engines | None = None, engine: str = "eager") -> Ratio:
    """Return the time of one image that leaves at the last exit, relative to the full network."""
    engines = engines or Engines(work)
    images, full = work.data()[0], engines.full(engine)
    unreachable = (2.0,) * (engines.network.num_exits - 1)  # unreachable, but the confidence of every exit is computed
    rule = ExitRule("confidence", (*unreachable, -np.inf))
    adaptive = AdaptiveInference(engines.network, rule, engine=engines.made(engine))
    return paired_ratios(lambda: adaptive(images), lambda: full(images), work.rounds, warmups=3)


def more_than_one_session(network: MultiExitNetwork, images: torch.Tensor, count: int = 6) -> dict[str, float]:
    """Return which operations of onnxruntime take longer in stages than in one session, as shares of one session."""
    folded, blank = fold(network), torch.zeros(2, *network.input_shape)
    stages = session_operations(list(pieces(folded, blank)), images)
    whole = session_operations([all_exits(folded, blank)], images)
    total = sum(whole.values())
    more = {f"{name}, beyond one session's": (stages[name] - whole.get(name, 0)) / total for name in stages}
    return dict(sorted(more.items(), key=lambda item: -item[1])[:count])


@torch.inference_mode()
def session_operations(programs: Sequence[Piece], images: torch.Tensor, passes: int = 50) -> dict[str, float]:
    """Run programs in a row as sessions of onnxruntime; return {operation: microseconds of a pass, by its profiler}."""
    # Imported when used: an extra.
    import onnxruntime

    took: Counter[str] = Counter()
    with TemporaryDirectory() as folder:
        sessions = []
        for number, piece in enumerate(programs):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.enable_profiling = 1, True
            options.profile_file_prefix = str(Path(folder, f"profile-{number}"))
            path = Path(folder, f"{number}.onnx")
            write_program(piece, path, "onnx")
            sessions.append(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))
        for _ in range(passes):
            arrays = [images.numpy()]
            for session, piece in zip(sessions, programs, strict=True):
                arrays = session.run(None, dict(zip(piece.names[0], arrays, strict=True)))[1:]
        for session in sessions:
            for event in json.loads(Path(session.end_profiling()).read_text()):
                if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
                    took[event["args"]["op_name"]] += event["dur"]
    return {name: microseconds / passes for name, microseconds in took.items()}


def engine_rows(work: Work) -> Iterator[Row | Profile]:
    """Measure the engines against each other, and early exit on the fastest one, at batch 1 and 256."""
    engines = Engines(work)
    for size, limit in ((1, 0.8), (_BATCH, 0.68)):
        sized = replace(work, batch=size)
        images, rounds = sized.data()[0], work.rounds if size > 1 else 10 * work.rounds
        run = {name: partial(engines.stages(engines.made(name)), images) for name in engines.names}
        ratio = paired_ratios(run["folded"], run["eager"], rounds, warmups=3)
        yield judged(f"engine folded: batch {size}, in runs of eager", limit, ratio)
        target = f"engine onnx: stages one by one, batch {size}, in runs of one session"
        if "onnx" in run:
            whole = partial(engines.one_session, images)
            row = judged(target, 1.1, paired_ratios(run["onnx"], whole, rounds, warmups=3))
            yield row
            if row.verdict == "missed":
                yield Profile(target, more_than_one_session(engines.network, images))
        else:
            yield not_run(target, 1.1)
        auto = partial(engines.stages(engines.auto), images)
        ratios = [paired_ratios(auto, run[name], rounds, warmups=3) for name in run]
        slowest = max(ratios, key=lambda ratio: ratio.median)
        yield judged(f"engine auto: batch {size}, in runs of the fastest engine", 1.05, slowest)
        best = engines.auto.choice(images, size).engine
        target = f"engine {best}: time saved per multiply-adds saved, batch {size}, half of them saved"
        yield judged(target, 0.9, saved(sized, engines, best), at_least=True)
        if size == 1:
            target = f"engine {best}: a single image through all exits, in runs of the full network"
            yield judged(target, 1.05, single(replace(sized, rounds=rounds), engines, best))
