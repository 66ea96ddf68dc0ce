"""fbnas run: the whole chain, from data to a measured file.

Every step leaves files behind and is skipped on resume when they are there, so that an interrupted
run loses at most the step under way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fbnas.commands import calibrate as calibrate_command
from fbnas.commands.budgets import (
    budgets_of,
    budgets_text,
    check_budgets,
    check_objective,
    kept_text,
    predict_,
)
from fbnas.commands.candidates import CHOICES, ranked_by_shared_weights
from fbnas.commands.compress import check_compression
from fbnas.commands.evaluate import is_missed
from fbnas.commands.folder import OutFolder
from fbnas.commands.front import FRONT, Chosen, write_front
from fbnas.commands.parts import (
    card_for,
    check_fraction,
    data_for,
    device_of,
    space_of,
)
from fbnas.commands.stages import Stage, final_measurement, print_stages, stages_of
from fbnas.commands.targets import choose_target, range_text, target_of
from fbnas.commands.teachers import SUPERNET, Sources, check_teacher, teacher_of
from fbnas.commands.train import report_epoch, start
from fbnas.errors import InputError, unknown
from fbnas.export import sidecar
from fbnas.files import read_json, write_json
from fbnas.latency import calibration
from fbnas.latency.devices import allowed_ratio
from fbnas.latency.profiling import AnyDevice, enliven_, profile, require_same_device
from fbnas.latency.table import LatencyTable
from fbnas.report import write_report
from fbnas.search import (
    Learned,
    Limit,
    SearchSettings,
    Target,
    best_within,
    build_objective,
    lowest_within,
    read_result,
    search,
)
from fbnas.space import Architecture, SearchSpace, build_network, save_network
from fbnas.training.augmentation import build_augmentation
from fbnas.training.data import Data
from fbnas.training.loop import train
from fbnas.training.settings import TrainingSettings, choose_device

SELECTION_ATTEMPTS = 3
HELD_OUT = 5  # whole networks that judge the table's correction


@dataclass(frozen=True)
class Chain:
    """What every step of the chain needs."""

    config: dict[str, Any]
    out: OutFolder
    space: SearchSpace
    data: Data
    device: AnyDevice

    @property
    def folder(self) -> Path:
        return self.out.folder

    @property
    def seed(self) -> int:
        return self.config["seed"]


def main(config: dict[str, Any]) -> int:
    _check(config)
    space, device = space_of(config), device_of(config)
    device.fingerprint()  # it answers, and has the runtime
    data = data_for(config, space)  # before the out folder: a typo must not cost an older run
    if config["table"] is not None:
        given = LatencyTable.load(config["table"])
        require_same_device(given, device)
        target_of(given, space, data.classes, budgets=config, fraction=config["target_fraction"])
    chain = Chain(config, OutFolder(config), space, data, device)
    headline(f"1/5 latency table of {device.name}: {device.runtime}, {device.precision}")
    table, calibrated = measured_table(chain)
    target = _target(chain, table)
    print(range_text(table, space, data.classes))
    budgets = budgets_text(target.limits(space, data.classes))
    headline(f"2/5 search in space {space.name} for {budgets}")
    learned = searched(chain, target)
    headline("3/5 candidates, measured as whole networks")
    chosen, candidates = chosen_architecture(chain, learned, target)
    judged_front(chain, chosen, learned, candidates)
    headline(f"4/5 training {chosen}")
    trained_network(chain, chosen)
    headline("5/5 compression, export and measurement of every stage")
    stages = stages_of(chain.config, chain.folder, chain.data, device, resume=chain.out.resume)
    noise_floor = final_measurement(stages, device, seed=chain.seed)
    return conclude(
        chain, target, chosen, stages, noise_floor, candidates=candidates, calibrated=calibrated
    )


def _check(config: dict[str, Any]) -> None:
    """Refuse what can be refused before anything is measured."""
    searching = SearchSettings.from_dict(config["search"])
    training = TrainingSettings.from_dict(config["training"])
    for settings in (searching, training):
        build_augmentation(**settings.augment)
        choose_device(settings.device)
    objective = build_objective(**config["objective"])
    check_compression(config)
    check_teacher("teacher", config["teacher"], words=(SUPERNET,))
    check_fraction(config["target_fraction"])
    check_budgets(config)
    check_objective(objective, config)
    if 0 < config["networks"] < calibration.LEAST_NETWORKS:
        raise InputError(
            f"networks={config['networks']}; expected 0, for no correction of the table, or at "
            f"least {calibration.LEAST_NETWORKS}."
        )
    for key, known in CHOICES.items():
        if config[key] not in known:
            raise unknown(key, config[key], known)
    if config["rank"] == "shared_weights" and config["ranked"] < config["candidates"]:
        raise InputError(
            f"ranked={config['ranked']} for candidates={config['candidates']}; expected at least "
            "as many are ranked as are measured."
        )


def headline(text: str) -> None:
    """Say which step begins."""
    print(f"\n== {text}", flush=True)


def measured_table(chain: Chain) -> tuple[LatencyTable, dict[str, Any] | None]:
    """Load or measure the table, and mend it by whole networks unless it was mended before."""
    given = chain.config["table"]
    path, record = chain.folder / "table.csv", chain.folder / "calibration.json"
    if record.is_file():  # a resumed run: the table is mended already
        return LatencyTable.load(path), read_json(record)
    if given is not None:
        table = LatencyTable.load(given)
        table.save(path)
    else:
        table = profile(
            chain.space, chain.device, path, classes=chain.data.classes, seed=chain.seed
        )
        noise = 100 * table.noise_floor
        print(f"{path}: {len(table.entries)} rows, noise floor {noise:.1f} %")
    if "correction_scale" in table.header or chain.config["networks"] == 0:
        return table, None
    found = calibration.calibrate(
        table,
        chain.space,
        chain.device,
        classes=chain.data.classes,
        networks=chain.config["networks"],
        held_out=HELD_OUT,
        seed=chain.seed,
    )
    print(calibrate_command.describe(found))
    if found.helps:
        table = calibration.apply(table, found, chain.space, classes=chain.data.classes)
    else:
        table = calibration.judged(table, found, chain.space)
    table.save(path)
    write_json(record, found.as_dict())
    return table, found.as_dict()


def _target(chain: Chain, table: LatencyTable) -> Target:
    """Pair the table with the budget; of one that cannot be met the table at least is kept."""
    config = chain.config
    try:
        return choose_target(
            table,
            chain.space,
            chain.data.classes,
            budgets=config,
            fraction=config["target_fraction"],
        )
    except InputError as error:
        raise InputError(
            f"{error} The table is measured: the same command with another budget and resume=true "
            "goes on from there."
        ) from error


def searched(chain: Chain, target: Target) -> Learned:
    """Search, or read back the search that is finished already."""
    folder = chain.folder / "search"
    if not (folder / "theta.json").is_file():
        search(
            chain.space,
            chain.data,
            [target],
            objective=build_objective(**chain.config["objective"]),
            settings=SearchSettings.from_dict(chain.config["search"]),
            seed=chain.seed,
            out=folder,
            resume=chain.out.resume,
        )
    return read_result(folder)[1][0]


def chosen_architecture(
    chain: Chain, learned: Learned, target: Target
) -> tuple[Architecture, list[dict[str, Any]]]:
    """Return the best candidate whose measured latency is within budget, and all that were tried.

    Candidates fit by the table. Where none fits when it is measured, the table is that much too
    optimistic, and the next are asked to be that much faster.
    """
    folder = chain.folder / "architectures"
    record = folder / "candidates.json"
    if record.is_file():
        return Architecture.load(folder / "chosen.yaml"), read_json(record)
    limit_ms, tried = target.budget_ms, []
    for _ in range(SELECTION_ATTEMPTS):
        candidates = _candidates(chain, learned, limit_ms)
        rows, noise_floor = _measure_candidates(chain, candidates)
        tried += rows
        allowed = allowed_ratio(noise_floor)
        fitting = [
            candidate
            for candidate, row in zip(candidates, rows, strict=True)
            if target.budget_ms is None or row["latency_ms"]["value"] <= target.budget_ms * allowed
        ]
        if target.budget_ms is None or fitting:
            chosen = fitting[0]
            break
        ratio = min(r["latency_ms"]["value"] / r["predicted_latency_ms"] for r in rows)
        fastest = min(range(len(rows)), key=lambda i: rows[i]["latency_ms"]["value"])
        chosen = candidates[fastest]
        print(f"none of {len(rows)} candidates fits; networks take {ratio:.3f} of the table's word")
        fastest_ms = lowest_within(learned.limits[0], learned.limits[1:])
        limit_ms = max(target.budget_ms / ratio, fastest_ms)
    for number, candidate in enumerate(candidates, start=1):
        candidate.save(folder / f"{number:02d}.yaml")
    chosen.save(folder / "chosen.yaml")
    write_json(record, tried)
    return chosen, tried


def _candidates(chain: Chain, learned: Learned, limit_ms: float | None) -> list[Architecture]:
    """The networks within the budgets that are worth measuring, the best by the rank first.

    `limit_ms` takes the place of the budget of latency.
    """
    latency, *others = learned.limits
    if limit_ms is not None:
        latency = replace(latency, budget=limit_ms)
    limits = (latency, *others)
    probable = best_within(learned.distribution, limits, count=chain.config["candidates"])
    if chain.config["rank"] == "probability":
        return probable
    found = ranked_by_shared_weights(
        chain.folder / "search",
        learned.distribution,
        limits,
        count=chain.config["candidates"],
        candidates=chain.config["ranked"],
        candidates_from=chain.config["candidates_from"],
        best=probable,
        data=chain.data,
        weights_fraction=chain.config["search"]["weights_fraction"],
        seed=chain.seed,
        device=choose_device(chain.config["search"]["device"]),
    )
    for architecture in found:
        predict_(chain.space, architecture, limits)
    return found


def _measure_candidates(
    chain: Chain, candidates: Sequence[Architecture]
) -> tuple[list[dict[str, Any]], float]:
    """Time whole untrained networks against each other: latency does not depend on weights."""
    shape = (chain.space.input_channels, chain.space.resolution, chain.space.resolution)
    files = []
    for number, candidate in enumerate(candidates, start=1):
        torch.manual_seed(chain.seed)
        network = build_network(chain.space, candidate, chain.data.classes)
        files.append(chain.folder / "candidates" / f"{number:02d}{chain.device.suffix}")
        chain.device.compile(enliven_(network), shape, files[-1])
    measurement = chain.device.measure_quietly(files, "Timing candidates", seed=chain.seed)
    rows = []
    for candidate, timing in zip(candidates, measurement.whole, strict=True):
        predicted_ms = candidate.provenance["predicted_latency_ms"]
        print(f"predicted {predicted_ms:.4g} ms, measured {timing.latency_ms:.4g} ms: {candidate}")
        rows.append(
            {
                "architecture": list(candidate.blocks),
                "predicted_latency_ms": predicted_ms,
                "latency_ms": timing.as_dict(),
            }
        )
    return rows, measurement.noise_floor


def judged_front(
    chain: Chain, chosen: Architecture, learned: Learned, candidates: list[dict[str, Any]]
) -> None:
    """Write what the shared weights say of the candidates and of baselines, unless it is there."""
    folder = chain.folder / "search"
    if (folder / FRONT).is_file():
        return
    write_front(
        folder,
        chain.space,
        [Chosen(chosen, learned.limits, learned.distribution)],
        chain.data,
        candidates=[Architecture(tuple(x["architecture"]), chain.space.name) for x in candidates],
        weights_fraction=chain.config["search"]["weights_fraction"],
        seed=chain.seed,
        device=choose_device(chain.config["search"]["device"]),
    )


def trained_network(chain: Chain, chosen: Architecture) -> None:
    """Train the chosen architecture into train/, unless it is there already."""
    folder = chain.folder / "train"
    if (folder / "network.yaml").is_file():
        return
    torch.manual_seed(chain.seed)
    supernet = str(chain.folder / "search") if chain.config["init"] == "supernet" else None
    settings = TrainingSettings.from_dict(chain.config["training"])
    result = train(
        start(chain.space, chosen, chain.data.classes, supernet),
        chain.data,
        settings=settings,
        seed=chain.seed,
        out=folder,
        resume=chain.out.resume,
        on_epoch=report_epoch(settings.epochs, every=5),
        teacher=teacher_of(chain.config["teacher"], chain.data, Sources(chain.folder / "search")),
    )
    save_network(folder, result.network, card_for(chain.space, chosen, chain.data))


def conclude(
    chain: Chain,
    target: Target,
    chosen: Architecture,
    stages: Sequence[Stage],
    noise_floor: float,
    *,
    candidates: list[dict[str, Any]],
    calibrated: dict[str, Any] | None,
) -> int:
    """Write result.json and the report, print the table and the verdict, return the exit code."""
    final = [stage for stage in stages if stage.accepted][-1]
    assert final.timing is not None
    model = chain.folder / f"model{chain.device.suffix}"
    model.write_bytes(final.path.read_bytes())
    if sidecar(final.path).is_file():
        sidecar(model).write_bytes(sidecar(final.path).read_bytes())
    limits = target.limits(chain.space, chain.data.classes)
    missed = target.budget_ms is not None and is_missed(
        final.timing.latency_ms, target.budget_ms, noise_floor
    )
    chain.out.finish(
        space=chain.space.name,
        architecture=list(chosen.blocks),
        **budgets_of(limits),
        **{x.key: chosen.provenance.get(x.key) for x in limits if x.name != "params"},
        latency_ms=final.timing.as_dict(),
        noise_floor=noise_floor,
        accuracy_top1=final.accuracy_top1,
        params=final.params,
        macs=final.macs,
        model_bytes=final.path.stat().st_size,
        model=model.name,
        planned=chain.device.kind == "roofline",
        final_stage=final.name,
        network=final.network,
        stages=[stage.as_dict(chain.folder) for stage in stages],
        candidates=candidates,
        calibration=calibrated,
        device=chain.device.fingerprint(),
    )
    page = write_report(chain.folder)
    print_stages(stages)
    print(f"\nreport: {page}\nmodel:  {model} ({final.name})")
    planned = chain.device.kind == "roofline"
    print(_verdict(final, chosen, limits, missed=missed, planned=planned))
    return 3 if missed else 0


def _verdict(
    final: Stage, chosen: Architecture, limits: Sequence[Limit], *, missed: bool, planned: bool
) -> str:
    """Say what was asked, predicted and measured; other budgets than latency by prediction."""
    assert final.timing is not None
    asked = f"asked {limits[0].budget:.4g} ms, " if limits[0].bounded else ""
    others = kept_text(chosen.provenance, limits)
    verdict = ": over budget" if missed else ": within budget" if asked else ""
    if planned:
        return (
            f"{asked}predicted {chosen.provenance['predicted_latency_ms']:.4g} ms, the file "
            f"{final.timing.latency_ms:.4g} ms{f', {others}' if others else ''}{verdict}, planned, "
            "not measured"
        )
    return (
        f"{asked}predicted {chosen.provenance['predicted_latency_ms']:.4g} ms, measured "
        f"{final.timing.latency_ms:.4g} ms ({final.timing.low_ms:.4g} to "
        f"{final.timing.high_ms:.4g}){f', {others}' if others else ''}{verdict}"
    )
