"""What a search writes down: a row per epoch (console, JSON lines, TensorBoard) and its result."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fbnas.errors import InputError
from fbnas.files import append_jsonl, atomic_write, read_json, write_json, write_yaml
from fbnas.search.distribution import ArchitectureDistribution
from fbnas.search.objectives import Objective
from fbnas.search.supernet import Supernet
from fbnas.space.network import load_weights_
from fbnas.space.search_space import SearchSpace
from fbnas.training.schedules import cosine

if TYPE_CHECKING:
    from fbnas.search.loop import Learner
    from fbnas.search.settings import SearchSettings

log = logging.getLogger(__name__)


def epoch_row(
    epoch: int,
    settings: "SearchSettings",
    objective: Objective,
    learners: Sequence["Learner"],
    *,
    means: dict[str, tuple[float, float] | None],
    seconds: float,
) -> dict[str, Any]:
    """Describe an epoch, counted from 0, as plain JSON."""
    weights, theta = means["weights"], means["theta"]
    return {
        "epoch": epoch,
        "phase": "warmup" if epoch < settings.warmup else "search",
        "tau": settings.tau_at(epoch),
        "lr": settings.weights_lr * cosine(epoch, settings.epochs),
        "weights_loss": weights and weights[0],
        "weights_accuracy": weights and weights[1],
        "theta_loss": theta and theta[0],
        "theta_accuracy": theta and theta[1],
        "seconds": seconds,
        "targets": [_target_row(objective, learner) for learner in learners],
    }


def _target_row(objective: Objective, learner: "Learner") -> dict[str, Any]:
    distribution, budget_ms = learner.distribution, learner.target.budget_ms
    with torch.no_grad():
        expected_ms = learner.expected_ms()
        skips = distribution.expected_skips()
        one = torch.ones((), device=expected_ms.device)
        penalty = objective.loss(
            one, expected_ms, budget_ms=budget_ms, multiplier=learner.multiplier
        )
        stages = [layer.stage for layer in distribution.space.layers]
        return {
            "name": learner.target.name,
            "budget_ms": budget_ms,
            "expected_latency_ms": float(expected_ms),
            "latency_penalty": float(penalty - one),  # at a cross-entropy of 1
            "lambda": learner.multiplier,
            "entropy": float(distribution.entropy().mean()),
            "skips": float(skips.sum()),
            "skips_per_stage": [
                float(sum(skips[i] for i, s in enumerate(stages) if s == stage))
                for stage in range(stages[-1] + 1)
            ],
            "logits": _listed(distribution.logits, distribution.offered),
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
        append_jsonl(self.out / "metrics.jsonl", row)
        epoch = row["epoch"]
        for key in (
            "weights_loss",
            "weights_accuracy",
            "theta_loss",
            "theta_accuracy",
            "tau",
            "lr",
            "seconds",
        ):
            if row[key] is not None:
                self.writer.add_scalar(key, row[key], epoch)
        for number, (target, theta) in enumerate(zip(row["targets"], distributions, strict=True)):
            for key in ("expected_latency_ms", "budget_ms", "lambda", "entropy", "skips"):
                self.writer.add_scalar(f"target_{number}/{key}", target[key], epoch)
            image = theta.probabilities().detach().cpu()
            self.writer.add_image(f"target_{number}/theta", _enlarged(image), epoch)
        self.writer.flush()


def _enlarged(probabilities: Tensor) -> Tensor:
    """(layers, blocks) to a (1, 16 layers, 16 blocks) picture."""
    return probabilities.repeat_interleave(16, 0).repeat_interleave(16, 1).unsqueeze(0)


def _console_line(row: dict[str, Any]) -> str:
    parts = [f"epoch {row['epoch'] + 1:3d} {row['phase']:6s}"]
    for part in ("weights", "theta"):
        if row[f"{part}_loss"] is not None:
            accuracy = 100 * row[f"{part}_accuracy"]
            parts.append(f"{part} loss {row[f'{part}_loss']:.3f} acc {accuracy:5.1f} %")
    if row["phase"] == "search":
        for target in row["targets"]:
            parts.append(
                f"E[LAT] {target['expected_latency_ms']:.4g} of {target['budget_ms']:.4g} ms "
                f"lambda {target['lambda']:.2f} entropy {target['entropy']:.2f} "
                f"skips {target['skips']:.1f}"
            )
        parts.append(f"tau {row['tau']:.2f}")
    return " | ".join([*parts, f"{row['seconds']:.1f} s"])


@contextlib.contextmanager
def open_logbook(out: Path | None, history: Sequence[dict[str, Any]]) -> Iterator[Logbook]:
    """Open the logs of a search; with a history (a resumed search) they continue after it."""
    if out is None:
        yield Logbook(None, None)
        return
    from torch.utils.tensorboard import SummaryWriter

    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.jsonl").unlink(missing_ok=True)
    for row in history:  # rows of epochs after the checkpoint are redone, so they are dropped
        append_jsonl(out / "metrics.jsonl", row)
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=len(history) or None)
    try:
        yield Logbook(out, writer)
    finally:
        writer.close()


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
            "budget_ms": learner.target.budget_ms,
            "base_ms": learner.base_ms,
            "latency_ms": _listed(learner.latency_ms, learner.distribution.offered),
            "logits": _listed(learner.distribution.logits.detach(), learner.distribution.offered),
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
    """One target of a finished search, read back from theta.json."""

    def __init__(self, space: SearchSpace, target: dict[str, Any]) -> None:
        self.budget_ms: float = target["budget_ms"]
        self.base_ms: float = target["base_ms"]
        self.table: str = target["table"]
        self.latency_ms = _tensor(target["latency_ms"])
        self.distribution = ArchitectureDistribution(space)
        with torch.no_grad():
            self.distribution.logits.copy_(_tensor(target["logits"]).nan_to_num(0.0))


def _tensor(rows: list[list[float | None]]) -> Tensor:
    values = [[float("nan") if x is None else x for x in row] for row in rows]
    return torch.tensor(values, dtype=torch.double)


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
        learned = [Learned(space, target) for target in content["targets"]]
        classes = int(content["classes"])
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
