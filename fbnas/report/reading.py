"""Reads what a command left in a folder: a run, a search, a training, or only a result."""

from pathlib import Path
from typing import Any

from fbnas.errors import InputError
from fbnas.files import read_json, read_jsonl, read_yaml
from fbnas.report.run import Choice, Rows, Run, Search, Target
from fbnas.report.shapes import Space, read_space
from fbnas.report.tables import Table, read_table

SEARCH_KEYS = ("epoch", "phase", "weights_loss", "weights_accuracy", "targets")
TARGET_KEYS = ("budget_ms", "expected_latency_ms", "entropy", "skips", "logits")
TRAINING_KEYS = ("epoch", "loss", "accuracy", "validation_loss", "validation_accuracy")
STAGE_KEYS = ("name", "accepted")
CANDIDATE_KEYS = ("architecture", "predicted_latency_ms", "latency_ms")
FRONT_KEYS = ("kind", "name", "architecture", "accuracy")
NETWORK_KEYS = ("predicted_ms", "corrected_ms", "measured_ms", "held_out")


def read_run(folder: Path) -> Run:
    """Read whatever a command left in `folder`.

    Raises:
        InputError: no such folder, nothing of ours in it, or a damaged file (named, with the line).
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; expected the out folder of fbnas run, search or train. "
            "Say which: fbnas report run=FOLDER"
        )
    search_folder = _folder_with(folder, "search", "targets")
    result = read_json(folder / "result.json") if (folder / "result.json").is_file() else {}
    training = _read_training(folder, result)
    if not result and search_folder is None and not training:
        raise InputError(
            f"{folder}: holds no result.json and no metrics.jsonl of a search or training; "
            "expected the out folder of fbnas run, search or train. "
            "Say which: fbnas report run=FOLDER"
        )
    _check_result(result, folder / "result.json")
    space = _read_space(folder, search_folder)
    search = _read_search(search_folder, space) if search_folder else None
    config = folder / "config.yaml"
    run = Run(
        folder=folder,
        result=result,
        config=read_yaml(config) if config.is_file() else {},
        space=space,
        search=search,
        training=training,
        tables=_read_tables(folder, search),
        choice=_choose(folder, result, search),
        front=_read_front(search_folder / "front.json") if search_folder else None,
    )
    _check_choice(run)
    return run


def _folder_with(folder: Path, part: str, key: str) -> Path | None:
    """Return folder/part or folder itself, whichever has a metrics.jsonl with `key` in its rows."""
    for place in (folder / part, folder):
        if (place / "metrics.jsonl").is_file():
            rows = read_jsonl(place / "metrics.jsonl")
            if rows and key in rows[0]:
                return place
    return None


def _read_space(folder: Path, search_folder: Path | None) -> Space | None:
    for file in (search_folder or folder, folder):
        if (file / "space.yaml").is_file():
            return read_space(read_yaml(file / "space.yaml"), file / "space.yaml")
    networks = (folder / "train" / "network.yaml", folder / "network.yaml")
    for file in (*networks, folder / "config.yaml"):  # the last is all that a search begins with
        content = read_yaml(file).get("space") if file.is_file() else None
        if content:
            return read_space(content, file)
    return None


def _read_search(folder: Path, space: Space | None) -> Search:
    metrics = _read_metrics(folder / "metrics.jsonl", SEARCH_KEYS)
    for row in metrics:
        for target in row["targets"]:
            _require(target, TARGET_KEYS, f"{folder / 'metrics.jsonl'}, epoch {row['epoch']}")
    path = folder / "theta.json"
    if not path.is_file():
        if space is None:
            raise InputError(
                f"{folder}: holds neither theta.json nor space.yaml; expected both. "
                "Go on with what was interrupted there: resume=true"
            )
        return Search(metrics, space.blocks, ())
    theta = read_json(path)
    _require(theta, ("blocks", "targets"), str(path))
    targets = []
    for target in theta["targets"]:
        _require(target, ("table", "budget_ms", "base_ms", "latency_ms"), str(path))
        targets.append(
            Target(
                str(target["table"]), target["budget_ms"], target["base_ms"], target["latency_ms"]
            )
        )
    return Search(metrics, tuple(theta["blocks"]), tuple(targets))


def _read_front(path: Path) -> dict[str, Any] | None:
    """Read the networks that a search judged at its end; older searches judged none."""
    if not path.is_file():
        return None
    front = read_json(path)
    _require(front, ("images", "networks"), str(path))
    for number, network in enumerate(front["networks"]):
        _require(network, FRONT_KEYS, f"{path}, networks[{number}]")
    return dict(front)


def _read_training(folder: Path, result: dict[str, Any]) -> dict[str, Rows]:
    training = {}
    networks = (stage.get("network") for stage in result.get("stages") or ())
    for part in dict.fromkeys(("train", *(x for x in networks if x), "pruned")):
        if (folder / part / "metrics.jsonl").is_file():
            training[part] = _read_metrics(folder / part / "metrics.jsonl", TRAINING_KEYS)
    if not training and _folder_with(folder, ".", "validation_accuracy"):
        training["train"] = _read_metrics(folder / "metrics.jsonl", TRAINING_KEYS)
    return {part: rows for part, rows in training.items() if rows}


def _read_metrics(path: Path, keys: tuple[str, ...]) -> Rows:
    """Read one row per epoch; of an epoch written twice (killed, resumed) the last counts."""
    rows = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        _require(row, keys, f"{path}, line {number}")
        rows[row["epoch"]] = row
    return [rows[epoch] for epoch in sorted(rows)]


def _read_tables(folder: Path, search: Search | None) -> tuple[Table, ...]:
    """Read the run's own table, or those the search names, as far as they are still there."""
    if (folder / "table.csv").is_file():
        return (read_table(folder / "table.csv"),)
    names = dict.fromkeys(target.table for target in search.targets) if search else ()
    places = [next((p for p in (Path(n), folder / n) if p.is_file()), None) for n in names]
    return tuple(read_table(path) for path in places if path is not None)


def _choose(folder: Path, result: dict[str, Any], search: Search | None) -> Choice | None:
    if result.get("architecture"):
        return Choice(
            tuple(result["architecture"]),
            "It is the first target's." if len(result.get("targets") or ()) > 1 else "",
            result.get("predicted_latency_ms"),
        )
    files = sorted((folder / "architectures").rglob("*.yaml"))
    if files:
        content = read_yaml(files[0])
        _require(content, ("blocks",), str(files[0]))
        predicted = content.get("predicted_latency_ms")
        return Choice(tuple(content["blocks"]), f"From {files[0].relative_to(folder)}.", predicted)
    for file in (folder / "train" / "network.yaml", folder / "network.yaml"):
        if file.is_file() and (blocks := read_yaml(file).get("blocks")):
            return Choice(tuple(blocks), f"From {file.relative_to(folder)}.", None)
    return _most_probable(search) if search and search.targets and search.epochs else None


def _most_probable(search: Search) -> Choice:
    target = search.targets[0]
    best = [
        max(range(len(row)), key=[-1.0 if p is None else p for p in row].__getitem__)
        for row in search.probabilities(len(search.epochs) - 1, 0)
    ]
    predicted = target.base_ms + sum(target.latency_ms[k][i] or 0.0 for k, i in enumerate(best))
    origin = "The most probable block of every layer; fbnas sample enforces the budget."
    return Choice(tuple(search.blocks[i] for i in best), origin, predicted)


def _check_choice(run: Run) -> None:
    if run.choice and run.space and len(run.choice.blocks) != len(run.space.layers):
        raise InputError(
            f"{run.folder}: the architecture has {len(run.choice.blocks)} blocks, space "
            f"{run.space.name} has {len(run.space.layers)} layers; expected the "
            "files of one run in a folder. Run its command again with overwrite=true."
        )


def _check_result(result: Any, path: Path) -> None:
    if not isinstance(result, dict):
        raise InputError(f"{path}: holds a {type(result).__name__}; expected an object.")
    for number, stage in enumerate(result.get("stages") or []):
        _require(stage, STAGE_KEYS, f"{path}, stages[{number}]")
    for number, candidate in enumerate(result.get("candidates") or []):
        _require(candidate, CANDIDATE_KEYS, f"{path}, candidates[{number}]")
    networks = (result.get("calibration") or {}).get("networks") or []
    for number, network in enumerate(networks):
        _require(network, NETWORK_KEYS, f"{path}, calibration.networks[{number}]")


def _require(row: Any, keys: tuple[str, ...], where: str) -> None:
    missing = [key for key in keys if not isinstance(row, dict) or key not in row]
    if missing:
        raise InputError(
            f"{where}: `{missing[0]}` is missing; expected {', '.join(keys)}. "
            "The file was edited or another version wrote it: run its command again."
        )
