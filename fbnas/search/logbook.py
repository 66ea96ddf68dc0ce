"""What a search writes down: a row per epoch (console, JSON lines, TensorBoard) and its result."""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fbnas.errors import InputError
from fbnas.files import (
    append_jsonl,
    atomic_write,
    read_json,
    read_jsonl,
    write_json,
    write_yaml,
)
from fbnas.search.choice import choice_words
from fbnas.search.distribution import ArchitectureDistribution
from fbnas.search.objectives import Objective
from fbnas.search.selection import Limit
from fbnas.search.supernet import Supernet
from fbnas.search.target import (
    costs_of,
    latency_limit,
    limit_as_dict,
    limit_from_dict,
    params_limit,
)
from fbnas.space.network import load_weights_
from fbnas.space.search_space import SearchSpace
from fbnas.training.reading import wait_words

if TYPE_CHECKING:
    from fbnas.search.loop import Learner
    from fbnas.search.settings import SearchSettings

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


def epoch_row(
    epoch: int,
    settings: "SearchSettings",
    objective: Objective,
    learners: Sequence["Learner"],
    *,
    means: dict[str, tuple[float, float] | None],
    seconds: float,
    data_wait_seconds: float,
) -> dict[str, Any]:
    """Describe an epoch, counted from 0, as plain JSON."""
    weights, theta = means["weights"], means["theta"]
    return {
        "epoch": epoch,
        "phase": "warmup" if epoch < settings.warmup else "search",
        "tau": settings.tau_at(epoch),
        "lr": settings.weights_lr_at(epoch, settings.epochs),
        "theta_lr": settings.theta_lr_at(epoch) if epoch >= settings.warmup else 0.0,
        "weights_loss": weights and weights[0],
        "weights_accuracy": weights and weights[1],
        "theta_loss": theta and theta[0],
        "theta_accuracy": theta and theta[1],
        "seconds": seconds,
        "data_wait_seconds": data_wait_seconds,
        "targets": [_target_row(objective, learner) for learner in learners],
    }


def _target_row(objective: Objective, learner: "Learner") -> dict[str, Any]:
    distribution = learner.distribution
    with torch.no_grad():
        skips, entropy = distribution.expected_skips(), distribution.entropy()
        return {
            "name": learner.target.name,
            "budget_ms": learner.target.budget_ms,
            "expected_latency_ms": float(learner.expected(learner.limits[0])),
            "latency_penalty": _penalty(objective, learner),
            "lambda": learner.multipliers.get("latency", 0.0),
            "limits": [_limit_row(learner, limit) for limit in learner.limits[1:] if limit.bounded],
            "entropy": float(entropy.mean()),
            "entropy_per_stage": [float(part.mean()) for part in _by_stage(distribution, entropy)],
            "skips": float(skips.sum()),
            "skips_per_stage": [float(part.sum()) for part in _by_stage(distribution, skips)],
            "logits": _listed(distribution.logits, distribution.offered),
        }


def _by_stage(distribution: ArchitectureDistribution, values: Tensor) -> list[Tensor]:
    """Values of the layers (layers,), stage by stage."""
    stages = torch.tensor([layer.stage for layer in distribution.space.layers])
    return [values[stages == stage] for stage in range(int(stages[-1]) + 1)]


def _penalty(objective: Objective, learner: "Learner") -> float:
    """What the objective adds for latency, at a cross-entropy of 1; 0 without a budget of it."""
    latency = learner.limits[0]
    if not latency.bounded:
        return 0.0
    expected_ms = learner.expected(latency)
    one = torch.ones((), device=expected_ms.device)
    multiplier = learner.multipliers["latency"]
    loss = objective.loss(one, expected_ms, budget_ms=latency.budget, multiplier=multiplier)
    return float(loss - one)


def _limit_row(learner: "Learner", limit: Limit) -> dict[str, Any]:
    """A budget beside latency, and what theta expects; of a maximum: of the most probable."""
    if limit.kind == "sum":
        expected = float(learner.expected(limit))
    else:
        expected = limit.of(learner.distribution.probabilities().argmax(dim=1).tolist())
    return {
        "name": limit.name,
        "unit": limit.unit,
        "budget": limit.budget,
        "expected": expected,
        "lambda": learner.multipliers.get(limit.name),
    }


def _listed(values: Tensor, offered: Tensor) -> list[list[float | None]]:
    """(layers, blocks) as JSON: null where a block is not offered."""
    return [
        [value if known else None for value, known in zip(row, mask, strict=True)]
        for row, mask in zip(values.tolist(), offered.tolist(), strict=True)
    ]


class Logbook:
    """Writes each epoch to the console and, with a folder, to metrics.jsonl and TensorBoard."""

    def __init__(self, out: Path | None, writer: Any) -> None:
        self.out, self.writer = out, writer

    def write(self, row: dict[str, Any], distributions: Sequence[ArchitectureDistribution]) -> None:
        """Log one epoch."""
        log.info("%s", _console_line(row))
        if self.out is None:
            return
        append_jsonl(self.out / METRICS, row)
        epoch = row["epoch"]
        for key in (
            "weights_loss",
            "weights_accuracy",
            "theta_loss",
            "theta_accuracy",
            "tau",
            "lr",
            "theta_lr",
            "seconds",
            "data_wait_seconds",
        ):
            if row[key] is not None:
                self.writer.add_scalar(key, row[key], epoch)
        for number, (target, theta) in enumerate(zip(row["targets"], distributions, strict=True)):
            for key in ("expected_latency_ms", "budget_ms", "lambda", "entropy", "skips"):
                if target[key] is not None:
                    self.writer.add_scalar(f"target_{number}/{key}", target[key], epoch)
            for key in ("entropy_per_stage", "skips_per_stage"):
                for stage, value in enumerate(target[key]):
                    self.writer.add_scalar(f"target_{number}/{key}/{stage}", value, epoch)
            for limit in target["limits"]:
                for key in ("expected", "budget", "lambda"):
                    if limit[key] is not None:
                        tag = f"target_{number}/{limit['name']}/{key}"
                        self.writer.add_scalar(tag, limit[key], epoch)
            image = theta.probabilities().detach().cpu()
            self.writer.add_image(f"target_{number}/theta", _enlarged(image), epoch)
        self.writer.flush()

    def write_tables(self, learners: Sequence["Learner"]) -> None:
        """Put each target's latencies into TensorBoard, as text and as a picture beside theta's."""
        if self.out is None:
            return
        for number, learner in enumerate(learners):
            tag = f"target_{number}/table"
            self.writer.add_text(tag, _table_text(learner), 0)
            shares = learner.latency_ms.nan_to_num(0.0)
            self.writer.add_image(tag, _enlarged(shares / shares.max().clamp(min=1e-30)), 0)

    def write_choices(self, epoch: int, learners: Sequence["Learner"]) -> None:
        """Say what each target would be given now."""
        for number, learner in enumerate(learners):
            cost, blocks = choice_words(learner)
            name = f" for {learner.target.name}" if learner.target.name else ""
            log.info("epoch %3d would choose%s, %s:\n    %s", epoch + 1, name, cost, blocks)
            if self.out is not None:
                self.writer.add_text(f"target_{number}/choice", f"{cost}:\n\n    {blocks}", epoch)


def _enlarged(shares: Tensor) -> Tensor:
    """(layers, blocks), 0 to 1, to a (1, 16 layers, 16 blocks) picture."""
    return shares.repeat_interleave(16, 0).repeat_interleave(16, 1).unsqueeze(0)


def _table_text(learner: "Learner") -> str:
    """What blocks cost a target in ms, as Markdown: a row per layer, a column per block."""
    space = learner.distribution.space
    lines = [
        f"{learner.target.name or 'Latency'}: {learner.base_ms:.4g} ms for stem, head and "
        "classifier, and for the block of each layer, in ms:",
        "",
        "| layer | " + " | ".join(space.blocks) + " |",
        "|---" * (len(space.blocks) + 1) + "|",
    ]
    for layer, row in zip(space.layers, _listed(learner.latency_ms, space.offered), strict=True):
        costs = ["" if cost is None else f"{cost:.4g}" for cost in row]
        lines.append(" | ".join([f"| {layer.index}: {layer}", *costs]) + " |")
    return "\n".join(lines)


def _console_line(row: dict[str, Any]) -> str:
    parts = [f"epoch {row['epoch'] + 1:3d} {row['phase']:6s}"]
    for part in ("weights", "theta"):
        if row[f"{part}_loss"] is not None:
            accuracy = 100 * row[f"{part}_accuracy"]
            parts.append(f"{part} loss {row[f'{part}_loss']:.3f} acc {accuracy:5.1f} %")
    if row["phase"] == "search":
        for target in row["targets"]:
            parts.append(_target_words(target))
        parts.append(f"tau {row['tau']:.2f}")
    return " | ".join([*parts, f"{row['seconds']:.1f} s{wait_words(row)}"])


def _target_words(target: dict[str, Any]) -> str:
    budget = target["budget_ms"]
    words = f"E[LAT] {target['expected_latency_ms']:.4g}"
    words += " ms" if budget is None else f" of {budget:.4g} ms lambda {target['lambda']:.2f}"
    for limit in target["limits"]:
        words += (
            f" {limit['name']} {limit['expected']:.4g} of {limit['budget']:.4g} {limit['unit']}"
        )
        words += "" if limit["lambda"] is None else f" lambda {limit['lambda']:.2f}"
    return f"{words} entropy {target['entropy']:.2f} skips {target['skips']:.1f}"


@contextlib.contextmanager
def open_logbook(out: Path | None, epochs: int) -> Iterator[Logbook]:
    """Open the logs of a search; of one that is resumed, they continue after so many epochs.

    Rows of epochs after the checkpoint are redone, so they are dropped.

    Raises:
        InputError: metrics.jsonl lacks rows that were written before the checkpoint.
    """
    if out is None:
        yield Logbook(None, None)
        return
    from torch.utils.tensorboard import SummaryWriter

    out.mkdir(parents=True, exist_ok=True)
    kept = read_history(out)[:epochs] if epochs else []
    if len(kept) < epochs:
        raise InputError(
            f"{out / METRICS} holds {len(kept)} rows and the checkpoint {epochs} epochs; expected "
            "the file as the search left it: restore it, or start again with overwrite=true."
        )
    atomic_write(out / METRICS, "".join(json.dumps(row) + "\n" for row in kept))
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=epochs or None)
    try:
        yield Logbook(out, writer)
    finally:
        writer.close()


def read_history(out: Path) -> list[dict[str, Any]]:
    """Return a row per epoch of a search."""
    path = out / METRICS
    return read_jsonl(path) if path.is_file() else []


def write_result(
    out: Path, space: SearchSpace, learners: Sequence["Learner"], supernet: Supernet
) -> None:
    """Write space.yaml, theta.json and supernet.safetensors."""
    from safetensors.torch import save

    write_yaml(out / "space.yaml", space.to_dict())
    tensors = {k: v.detach().cpu().contiguous() for k, v in supernet.state_dict().items()}
    atomic_write(out / "supernet.safetensors", save(tensors))
    targets = [
        {
            "table": learner.target.name,
            "resolution": learner.target.resolution,
            "budget_ms": learner.target.budget_ms,
            "base_ms": learner.base_ms,
            "latency_ms": _listed(learner.latency_ms, space.offered),
            "logits": _listed(learner.distribution.logits.detach(), learner.distribution.offered),
            "limits": [limit_as_dict(limit) for limit in learner.limits[1:]],
        }
        for learner in learners
    ]
    write_json(
        out / "theta.json",
        {
            "space": space.name,
            "classes": supernet.classes,
            "blocks": list(space.blocks),
            "targets": targets,
        },
    )


class Learned:
    """One target of a finished search, read back from theta.json.

    `limits` are all costs that the table and the space told, latency first, with their budgets.
    `resolution`: None where the target was searched at the space's.
    """

    def __init__(self, space: SearchSpace, target: dict[str, Any], *, classes: int) -> None:
        self.resolution: int | None = target.get("resolution")  # older searches wrote none
        space = space.at(self.resolution)
        self.budget_ms: float | None = target["budget_ms"]
        self.base_ms: float = target["base_ms"]
        self.table: str = target["table"]
        self.latency_ms = costs_of(target["latency_ms"])
        stored = target.get("limits")  # older searches wrote none
        self.limits = (
            latency_limit(self.latency_ms, self.base_ms, self.budget_ms),
            *([params_limit(space, classes)] if stored is None else map(limit_from_dict, stored)),
        )
        logits = costs_of(target["logits"])  # null too where no budget allows a block
        self.distribution = ArchitectureDistribution(space, ~logits.isnan())
        with torch.no_grad():
            self.distribution.logits.copy_(logits.nan_to_num(0.0))


def read_result(out: Path) -> tuple[SearchSpace, list[Learned], int]:
    """Read what `write_result` wrote: the space, what each target learned, number of classes.

    Raises:
        InputError: no finished search there, or damaged files.
    """
    if not (out / "theta.json").is_file():
        raise InputError(
            f"{out}: no theta.json there; expected the folder of a finished search (fbnas search "
            f"out={out})."
        )
    space = SearchSpace.load(out / "space.yaml")
    content = read_json(out / "theta.json")
    try:
        classes = int(content["classes"])
        learned = [Learned(space, target, classes=classes) for target in content["targets"]]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{out / 'theta.json'}: {error}; expected the file that fbnas search wrote for space "
            f"{space.name}. Search again, or restore the file."
        ) from error
    return space, learned, classes


def read_supernet(out: Path, space: SearchSpace, classes: int) -> Supernet:
    """Read the shared weights of a finished search.

    Raises:
        InputError: no such file, damaged, or of another space.
    """
    supernet = Supernet(space, classes)
    load_weights_(supernet, out / "supernet.safetensors")
    return supernet.eval()
