"""What is tried: every compression method at three strengths, and stacks of several."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fbnas.commands.composition import compose
from fbnas.compression import METHODS

RATIOS = (0.2, 0.4)  # of the channels, at which pruning and int8 are tried in both orders
INT8_PLAIN = ("compression.quantization.pays=false",)
# Folded layers bear less: in a stack that begins with qat all that is tuned after it is folded.
QAT_RATE = ("compression.qat.lr=0.01",)
QAT_FIRST_RATE = ("compression.fine_tuning.lr=0.01", "compression.qat.lr=null")


@dataclass(frozen=True)
class Trial:
    """One `fbnas compress`: methods in their order, and options that differ from the defaults.

    kind: none | control | method | stack | default. timed: it asks the device while it decides.
    """

    methods: tuple[str, ...]
    strength: str
    options: tuple[str, ...] = ()
    kind: str = "method"
    timed: bool = False

    @property
    def name(self) -> str:
        """In tables."""
        return " ".join(x for x in ("+".join(self.methods) or "none", self.strength) if x)

    @property
    def folder(self) -> str:
        """Where it leaves its files."""
        return re.sub(r"[^\w.+]+", "_", self.name)


def trials(work: str, seed: int, epochs: int) -> list[Trial]:
    """Everything that is tried with a seed; each name once.

    Args:
        work: folder of the study; later latency prunings take the layers that the first one timed.
        epochs: of the training that tickets repeat.
    """
    found = [Trial((), "", kind="none"), Trial((), "but fine-tuned", kind="control")]
    found += [*_pruned(work, seed), *_zeroed(work, seed, epochs)]
    found += [*_few_values(), *_int8(), *_taught(), *_orders(), *_stacks(work, seed)]
    found.append(default_trial())
    assert {name for trial in found for name in trial.methods} == {*METHODS, "int8"}
    return found


def default_trial() -> Trial:
    """What `fbnas run` does where nothing is said."""
    methods: Sequence[Any] = compose("run", [])["compression"]["methods"]
    return Trial(tuple(methods), "as fbnas run", kind="default", timed=True)


def base_folder(seed: int) -> str:
    """Of the network that all trials of a seed begin with."""
    return f"base_{seed}"


def _one(method: str, section: str, strengths: Sequence[Any], key: str, *more: str) -> list[Trial]:
    return [
        Trial((method,), f"{value:g}", (f"compression.{section}.{key}={value}", *more))
        for value in strengths
    ]


def _pruned(work: str, seed: int) -> list[Trial]:
    iterative = ("compression.iterative_pruning.step_ratio=0.15",
                 "compression.iterative_pruning.steps=6")  # fmt: skip
    return [
        *_one("channel_pruning", "pruning", (*RATIOS, 0.6), "ratio"),
        *_one("iterative_pruning", "iterative_pruning", (0.005, 0.01, 0.03), "max_accuracy_drop",
              *iterative),
        *(Trial(("latency_pruning",), f"{x:g}", _latency(work, seed, x), timed=True)
          for x in (0.8, 0.65, 0.5)),
    ]  # fmt: skip


def _latency(work: str, seed: int, fraction: float) -> tuple[str, ...]:
    """Prune to a fraction of the latency; the layers are timed by the first trial alone."""
    options = (f"compression.latency_pruning.latency={fraction}",)
    table = f"{work}/trials_{seed}/latency_pruning_0.8/channel_steps.csv"
    return options if fraction == 0.8 else (*options, f"compression.latency_pruning.table={table}")


def _zeroed(work: str, seed: int, epochs: int) -> list[Trial]:
    """Sparse networks; tickets by a round, two and three from the weights that the network had."""
    begun = (f"compression.lottery_ticket.rewind_to={work}/{base_folder(seed)}/first.safetensors",
             f"training.epochs={epochs}")  # fmt: skip
    tickets = [
        Trial(("lottery_ticket",), f"{sparsity:g}",
              (f"compression.lottery_ticket.rounds={rounds}",
               f"compression.lottery_ticket.fraction={1 - (1 - sparsity) ** (1 / rounds):.6f}",
               *begun))
        for sparsity, rounds in ((0.5, 1), (0.8, 2), (0.9, 3))
    ]  # fmt: skip
    return [*_one("sparsity", "sparsity", (0.5, 0.8, 0.9), "sparsity"), *tickets]


def _few_values() -> list[Trial]:
    return [
        *(Trial(("weight_sharing",), f"{2**bits} values", _shared(bits)) for bits in (6, 4, 3)),
        *_one("low_rank", "low_rank", (1.25, 1.5, 2.0), "speedup"),
        *_one("ternary", "ternary", (0.03, 0.05, 0.1), "threshold"),
        *_one("fixed_point", "fixed_point", (8, 6, 4), "bits"),
        Trial(("qat",), "as many bits as int8", QAT_RATE),  # 8, or 7 where 8 are cut off
        *_one("qat", "qat", (6, 4), "weight_bits", *QAT_RATE),
    ]


def _shared(bits: int) -> tuple[str, ...]:
    return tuple(f"compression.weight_sharing.{kind}_bits={bits}" for kind in ("conv", "linear"))


def _int8() -> list[Trial]:
    return [
        Trial(("int8",), "per tensor", (*INT8_PLAIN, "compression.quantization.per_channel=false")),
        Trial(("int8",), "per channel", INT8_PLAIN),
        Trial(("int8",), "equalised", (*INT8_PLAIN, "compression.quantization.equalise=true")),
        *(Trial(("int8",), ranges, (*INT8_PLAIN, f"compression.quantization.ranges={ranges}"))
          for ranges in ("percentile", "entropy")),
        Trial(("int8",), "symmetric", (*INT8_PLAIN,
                                       "compression.quantization.activations=symmetric")),
        Trial(("int8",), "mixed", timed=True),
    ]  # fmt: skip


def _taught() -> list[Trial]:
    """Distillation: what channel pruning leaves, fine-tuned by the network before it too."""
    teacher = (
        "compression.fine_tuning.teacher=uncompressed",
        f"compression.pruning.ratio={RATIOS[1]}",
    )
    lessons = {
        "half": ("training.distillation.alpha=0.5",),
        "alone": ("training.distillation.alpha=1.0",),
        "half and maps": (
            "training.distillation.alpha=0.5",
            "training.distillation.feature_weight=1.0",
        ),
    }
    return [
        Trial(("channel_pruning",), f"{RATIOS[1]:g} taught {name}", (*teacher, *options))
        for name, options in lessons.items()
    ]  # fmt: skip


def _orders() -> list[Trial]:
    """Pruning before int8 and after it, as far as that can be done."""
    found = []
    for ratio in RATIOS:
        pruning = f"compression.pruning.ratio={ratio}"
        found += [
            _stack(("channel_pruning", "int8"), f"{ratio:g}", pruning, *INT8_PLAIN),
            _stack(("channel_pruning", "qat"), f"{ratio:g}", pruning, *QAT_RATE),
            _stack(("qat", "channel_pruning", "int8"), f"{ratio:g}", pruning, *INT8_PLAIN,
                   *QAT_FIRST_RATE),
            _stack(("int8", "channel_pruning"), f"{ratio:g}", pruning),
        ]  # fmt: skip
    return found


def _stacks(work: str, seed: int) -> list[Trial]:
    pruning, sparse = f"compression.pruning.ratio={RATIOS[1]}", "compression.sparsity.sparsity=0.8"
    return [
        _stack(("channel_pruning", "int8"), f"{RATIOS[1]:g} distilled", pruning, *INT8_PLAIN,
               "compression.fine_tuning.teacher=uncompressed"),
        *(_stack(("sparsity", "weight_sharing"), f"{zeros:g}, {2**bits} values",
                 f"compression.sparsity.sparsity={zeros}", *_shared(bits))
          for zeros, bits in ((0.5, 6), (0.8, 4), (0.9, 4))),
        _stack(("channel_pruning", "sparsity", "weight_sharing"), "0.4, 0.8, 16 values", pruning,
               sparse, *_shared(4)),
        _stack(("sparsity", "qat"), "0.8, 8", sparse, *QAT_RATE),
        _stack(("low_rank", "int8"), "1.5", "compression.low_rank.speedup=1.5", *INT8_PLAIN),
        *(_stack(("channel_pruning", "int8"), f"{x:g} mixed", f"compression.pruning.ratio={x}",
                 timed=True) for x in (0.25, RATIOS[1])),
        *(_stack(("latency_pruning", "int8"), f"{x:g} mixed", *_latency(work, seed, x), timed=True)
          for x in (0.65, 0.5)),
        _stack(("latency_pruning", "qat"), "0.65", *_latency(work, seed, 0.65), *QAT_RATE,
               timed=True),
    ]  # fmt: skip


def _stack(methods: tuple[str, ...], strength: str, *options: str, timed: bool = False) -> Trial:
    return Trial(methods, strength, options, "stack", timed)
