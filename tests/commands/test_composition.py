"""Every config with every command that takes it, files of the user's own, and --help."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fbnas.commands import COMMANDS, main
from fbnas.commands.composition import compose, describe, groups_of
from fbnas.commands.compress import check_compression
from fbnas.commands.sweep import plan
from fbnas.compression import METHODS
from fbnas.errors import InputError
from fbnas.latency.devices import Device
from fbnas.search import build_objective
from fbnas.shipped import configs_folder, shipped_names
from fbnas.space import SearchSpace

GROUPS = sorted(folder.name for folder in configs_folder().iterdir() if folder.is_dir())
REQUIRED = {
    "profile": ["table=t.csv"],
    "search": ["table=t.csv"],
    "sample": ["run=r"],
    "train": ["architecture=fbnet_a"],
    "compress": ["model=m"],
    "export": ["model=m"],
    "evaluate": ["model=m"],
    "calibrate": ["table=t.csv"],
    "count": ["architecture=fbnet_a"],
    "report": ["run=r"],
}
NEEDED = {
    ("data", "image_folder"): ["data.path=p"],
    ("data", "huggingface"): ["data.path=p"],
    ("device", "ssh"): ["device.host=p"],
}
TINY = {
    "resolution": 8,
    "stem": {"channels": 8, "stride": 1},
    "stages": [{"channels": 8, "layers": 2, "stride": 2}],
    "head": 16,
    "blocks": ["k3_e1", "skip"],
}


def given(command: str, group: str, name: str) -> list[str]:
    return [*REQUIRED.get(command, []), f"{group}={name}", *NEEDED.get((group, name), [])]


CASES = [
    (command, group, name)
    for command in COMMANDS
    for group in groups_of(command)
    for name in shipped_names(group)
]


def test_every_shipped_group_is_taken_by_a_command() -> None:
    taken = {group for command in COMMANDS for group in groups_of(command)} | {"architecture"}
    assert taken == set(GROUPS)
    assert {file.stem for file in configs_folder().glob("*.yaml")} == set(COMMANDS)


@pytest.mark.parametrize(("command", "group", "name"), CASES)
def test_every_config_composes_with_every_command_that_takes_its_group(
    command: str, group: str, name: str
) -> None:
    config = compose(command, given(command, group, name))
    shipped = yaml.safe_load((configs_folder() / group / f"{name}.yaml").read_text())
    recipe = shipped.pop("defaults", None) is not None and group == "compression"
    if recipe:  # states what differs; the rest is default's
        for part, values in shipped.items():
            found = config[group][part]
            assert found == ({**found, **values} if isinstance(found, dict) else values)
    elif group == "experiment":
        for part, values in shipped.items():
            if part in config:
                assert {key: config[part][key] for key in values} == values
    else:
        stated = [x.partition("=")[0] for x in NEEDED.get((group, name), [])]
        assert config[group] == {**shipped, **{key.partition(".")[2]: "p" for key in stated}}


@pytest.mark.parametrize("name", shipped_names("compression"))
def test_every_recipe_of_compression_is_accepted_and_its_examples_compose(name: str) -> None:
    for command in ("compress", "run"):
        check_compression(compose(command, given(command, "compression", name)))
    opening = (configs_folder() / "compression" / f"{name}.yaml").read_text()
    examples = [shlex.split(x) for x in re.findall(r"^# +fbnas (.+)$", opening, flags=re.M)]
    for command, *overrides in examples:
        assert f"compression={name}" in overrides
        check_compression(compose(command, overrides))
    assert name == "default" or {x[0] for x in examples} == {"compress", "run"}


@pytest.mark.parametrize("name", [*METHODS, "int8", "deep_compression"])
def test_every_method_has_a_recipe_by_which_a_run_applies_it(name: str) -> None:
    applied = compose("run", [f"compression={name}"])["compression"]["methods"]
    if name == "deep_compression":
        assert applied == ["sparsity", "weight_sharing"]
    else:
        assert name in applied


@pytest.mark.parametrize("command", ["compress", "run"])
def test_layers_may_have_sparsities_of_their_own(command: str) -> None:
    given_ = ["model=x", "method=sparsity"] if command == "compress" else []
    layers = "compression.sparsity.layers={head.0: 0.9, classifier.linear: 0.5}"
    found = compose(command, [layers, *given_])["compression"]["sparsity"]
    assert found["layers"] == {"head.0": 0.9, "classifier.linear": 0.5}
    check_compression(compose(command, [layers, *given_]))
    with pytest.raises(InputError, match=r"expected a mapping"):
        compose(command, ["compression.sparsity.layers=0.9", *given_])


def test_distillation_has_a_recipe_that_gives_fine_tuning_a_teacher() -> None:
    found = compose("compress", ["compression=distillation", "model=x", "method=channel_pruning"])
    assert found["compression"]["fine_tuning"]["teacher"] == "uncompressed"


@pytest.mark.parametrize("name", shipped_names("architecture"))
def test_every_shipped_architecture_is_a_value(name: str) -> None:
    for command in ("count", "train"):
        assert compose(command, [f"architecture={name}"])["architecture"] == name


def test_the_published_recipe_brings_its_objective_unless_another_is_asked_for() -> None:
    assert compose("run", ["search=fbnet"])["objective"]["name"] == "fbnet_additive"
    assert compose("run", ["search=fbnet", "objective=target"])["objective"]["name"] == "target"


def keys_of(file: Path, prefix: str = "") -> set[str]:
    found: set[str] = set()

    def walk(content: dict, before: str) -> None:
        for key, value in content.items():
            if isinstance(value, dict) and value and "." not in before + key and key != "stem":
                walk(value, f"{before}{key}.")
            elif key != "defaults" and not isinstance(value, list):
                found.add(f"{prefix}{before}{key}")

    walk(yaml.safe_load(file.read_text()), "")
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command: str) -> None:
    lines = describe(command).splitlines()
    explained = {m.group(1) for x in lines if (m := re.match(r"  ([a-z_.]+): .*# \S", x))}
    wanted = keys_of(configs_folder() / f"{command}.yaml")
    for entry in yaml.safe_load((configs_folder() / f"{command}.yaml").read_text()).get(
        "defaults", []
    ):
        for group, name in entry.items() if isinstance(entry, dict) else ():
            if name:
                wanted |= keys_of(configs_folder() / group / f"{name}.yaml", f"{group}.")
    assert wanted - explained == set()
    assert all(f"  {group}=" in "\n".join(lines) for group in groups_of(command))


def test_help_explains_the_files_that_are_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write(tmp_path / "mine.yaml", {"lr": 0.3}, "# Ours.\n")
    chosen = ["data=image_folder", f"training={own}", "experiment=quickstart"]
    assert main(["run", *chosen, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "  # Folders of images, one folder per class" in shown
    assert "  data.path: (required)" in shown
    assert "  # Ours.\n  training.lr: 0.3" in shown
    assert "  search.epochs: 60" in shown.partition("experiment=quickstart:")[2]
    assert "data.path: null" not in shown
    assert main(["run", "data=image_folders", "--help"]) == 2
    assert "Did you mean 'image_folder'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_that_compose(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_space.yaml").write_text(yaml.safe_dump(TINY))
    examples = re.findall(r"^ *(fbnas .*=.*|fbnas doctor)$", describe(command), flags=re.M)
    assert examples
    for example in examples:
        _, name, *overrides = shlex.split(example)
        assert name == command
        if "-m" in overrides:
            jobs = plan(command, [override for override in overrides if override != "-m"]).jobs
            assert len(jobs) > 1
        else:
            assert compose(command, overrides)["command"] == command
    assert any(f"fbnas {command} -m " in example for example in examples)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_its_options_in_a_config_and_its_line_in_help(name: str) -> None:
    shipped = yaml.safe_load((configs_folder() / "compression" / "default.yaml").read_text())
    options = {field.name for field in dataclasses.fields(METHODS[name])} - {"seed"}
    assert set(shipped[METHODS[name].SECTION]) == options
    assert re.search(rf"^{name} +[a-z]", describe("compress"), flags=re.M)


def test_the_general_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {command} ", shown, flags=re.M) for command in COMMANDS)
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"fbnas {command}: ")


OWN = {
    "device": ({"name": "mine", "threads": 2}, "device.precision=int8", "int8"),
    "data": ({"source": "image_folder", "path": "photos"}, "data.limit=10", 10),
    "search": ({"epochs": 5}, "search.tau=2.0", 2.0),
    "objective": ({"name": "hinge", "weight": 2.0}, "objective.weight=7.0", 7.0),
    "training": ({"epochs": 4}, "training.lr=0.2", 0.2),
    "compression": ({"pruning": {"ratio": 0.5}}, "compression.pruning.round_to=4", 4),
    "space": (TINY, "space.input_channels=1", 1),
}


def write(path: Path, content: dict, header: str = "") -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(header + yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("group", OWN)
def test_a_file_of_the_users_own_works_by_path_and_takes_overrides(
    group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, override, value = OWN[group]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sub" / "my own.yaml", content)
    for path in ("sub/my own.yaml", str(tmp_path / "sub" / "my own.yaml")):
        plain = compose("run", [f"{group}={path}"])[group]
        changed = compose("run", [f"{group}={path}", override])[group]
        expected = yaml.safe_load(yaml.safe_dump(plain))
        holder = expected
        *parents, last = override.partition("=")[0].split(".")[1:]
        for parent in parents:
            holder = holder[parent]
        assert holder[last] != value
        holder[last] = value
        assert changed == expected
        for key, stated in content.items():
            kept = plain[key]
            assert kept == stated or (isinstance(stated, dict) and stated.items() <= kept.items())


def test_what_a_users_file_leaves_out_is_as_shipped(tmp_path: Path) -> None:
    file = write(tmp_path / "rpi.yaml", {"threads": 4})
    device = Device.from_dict(compose("profile", ["table=t", f"device={file}"])["device"])
    assert (device.name, device.precision, device.threads) == ("local", "fp32", 4)
    own = compose("run", [f"objective={write(tmp_path / 'o.yaml', {'name': 'hinge'})}"])
    assert build_objective(**own["objective"]) == build_objective(name="hinge")
    file = write(tmp_path / "board.yaml", {"host": "pi@board"})
    device = Device.from_dict(compose("profile", ["table=t", f"device={file}"])["device"])
    assert (device.kind, device.name, device.host) == ("ssh", "pi@board", "pi@board")
    file = write(tmp_path / "c.yaml", {"pruning": {"ratio": 0.5}})
    shipped = compose("run", [])["compression"]
    shipped["pruning"]["ratio"] = 0.5
    assert compose("run", [f"compression={file}"])["compression"] == shipped


def test_a_file_in_the_folder_where_the_user_stands_needs_no_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("my_space.yaml"), TINY)
    assert compose("run", ["space=my_space.yaml"])["space"]["name"] == "my_space"


def test_a_space_with_blocks_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sub" / "own.yaml", {**TINY, "blocks": ["plain"], "modules": ["plain.py"]})
    (tmp_path / "sub" / "plain.py").write_text(
        "from torch import nn\n"
        "from fbnas.space.blocks import register_block\n"
        "@register_block('plain')\n"
        "def plain(in_channels, out_channels, stride):\n"
        "    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)\n"
    )
    space = SearchSpace.from_dict(compose("run", ["space=sub/own.yaml"])["space"])
    assert [layer.blocks for layer in space.layers] == [("plain",), ("plain",)]
    write(tmp_path / "a.yaml", {"space": "own", "blocks": ["plain", "plain"]})
    assert main(["count", "architecture=a.yaml", "space=sub/own.yaml", "classes=10"]) == 0
    params = (3 * 8 + 8 * 8 + 8 * 8) * 9 + 8 * 16 + 16 * 10 + 10  # stem, two blocks, head, scores
    assert f"{params:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["My Photos (2)", "Fotos_äöü", "it's", "a&b#c", "a[1]", "a=b", "one, two", r"a\b"]
)
def test_a_path_may_hold_any_sign(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    for path in (name, str(tmp_path / name)):
        config = compose("run", ["data=image_folder", f"data.path={path}", f"out={path}"])
        assert (config["data"]["path"], config["out"]) == (path, path)
    assert plan("search", ["table=t.csv", "seed=1,2", f"out={name}"]).root == Path(name)


def test_a_home_folder_is_found_but_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write(tmp_path / "d.yaml", {"source": "image_folder", "path": "~/my photos"})
    assert compose("run", [f"data={file}"])["data"]["path"] == f"{tmp_path}/my photos"
    board = ["device=ssh", "device.host=pi", "device.folder=~/there"]
    config = compose("evaluate", ["model=~/a.onnx", *board])
    assert config["model"] == f"{tmp_path}/a.onnx"
    assert config["device"]["folder"] == "~/there"


def test_an_experiment_of_the_users_own(tmp_path: Path) -> None:
    content = {"defaults": [{"override /space": "fbnet_cifar"}], "search": {"epochs": 7}, "seed": 3}
    file = write(tmp_path / "mine.yaml", content, "# @package _global_\n")
    config = compose("run", [f"experiment={file}", "training.epochs=9"])
    assert config["space"]["name"] == "fbnet_cifar"
    assert (config["search"]["epochs"], config["training"]["epochs"]) == (7, 9)
    assert config["seed"] == 3


def test_names_that_look_like_numbers_stay_names() -> None:
    config = compose("export", ["model=2024", "out=7"])
    assert (config["model"], config["out"]) == ("2024", "7")


def test_a_broken_file_of_the_users_own_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("epochs: 3\n  lr: [1\n")
    with pytest.raises(InputError, match=r"broken\.yaml, line 2"):
        compose("run", [f"training={file}"])


def test_a_reader_that_leaves_early_is_no_error() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "fbnas.commands", "search", "--help"],
            stdout=nobody,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("fbnas.commands.count.main", broken)
    assert main(["count", "architecture=fbnet_a"]) == 2
    assert "Broken pipe" in capfd.readouterr().err
