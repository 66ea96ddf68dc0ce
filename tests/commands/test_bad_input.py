"""Wrong input through the real command line: exit 2 and one line that names the way out."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import write_space, write_table

from fbnas.commands import main
from fbnas.commands.composition import compose, compose_single
from fbnas.commands.folder import check_out
from fbnas.errors import InputError
from fbnas.space import Architecture, NetworkCard, SearchSpace, build_network, save_network

RUN = ["run", "space=tiny.yaml", "table=table.csv", "out=out"]
SEARCH = ["search", "space=tiny.yaml", "table=table.csv", "out=out"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a space, a table of it, a network and its architecture."""
    folder = tmp_path_factory.mktemp("made")
    space = SearchSpace.load(write_space(folder))
    write_table(folder / "table.csv")
    architecture = Architecture(("k3_e1", "k5_e1", "skip"), space="tiny", provenance={})
    architecture.save(folder / "a.yaml")
    torch.manual_seed(0)
    names = tuple(str(digit) for digit in range(10))
    card = NetworkCard(space, architecture, names, (0.5,), (0.25,))
    save_network(folder / "network", build_network(space, architecture, 10), card)
    return folder


@pytest.fixture(autouse=True)
def stand(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it, where the command is given."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run a command that must be refused before anything is trained; return its one line."""

    def learn(*_: object, **__: object) -> None:
        raise AssertionError("training began before the input was refused")

    monkeypatch.setattr(torch.optim.SGD, "step", learn)

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1
        assert shown.err.startswith("fbnas: ")
        assert "Traceback" not in shown.out + shown.err
        return shown.err

    return run


TYPOS = [
    ("trian", "'train'"),
    ("run target_mss=3", "'target_ms'"),
    ("run data.pth=x", "'data.path'"),
    ("run search.epoch=3", "'search.epochs'"),
    ("run spce=fbnet", "'space'"),
    ("run compression.methods=[channel_prunning]", "'channel_pruning'"),
    ("run compression.pruning.ratioo=0.5", "'compression.pruning.ratio'"),
    ("run space=fbnt", "'fbnet'"),
    ("run objective=targt", "'target'"),
    ("run objective.name=hinj", "'hinge'"),
    ("run data=digit", "'digits'"),
    ("run search=fats", "'fast'"),
    ("run experiment=quikstart", "'quickstart'"),
    ("run rank=shared_weight", "'shared_weights'"),
    ("run init=scrach", "'scratch'"),
    ("run device.precision=fp23", "'fp32'"),
    ("run device.runtime=onnxruntim", "'onnxruntime'"),
    ("run search.theta_step=hart", "'hard'"),
    ("count architecture=fbnet_aa", "'fbnet_a'"),
    ("compress model=network method=int", "'int8'"),
    ("export model=network format=onx", "'onnx'"),
    ("run +fou=1 out=out", "'out'"),
]


@pytest.mark.parametrize(("line", "closest"), TYPOS, ids=[line for line, _ in TYPOS])
def test_a_typo_is_answered_with_the_closest_name(
    refused: Callable[..., str], line: str, closest: str
) -> None:
    assert f"Did you mean {closest}?" in refused(*line.split())


VALUES = [
    ("run search", "expected key=value"),
    ("run =3", "expected key=value"),
    ("run --seed 3", "expected key=value"),
    ("run hydra.run.dir=x", "expected key=value"),
    ("run search.epochs=[1", "expected key=value with a YAML value"),
    ("run search.epochs=abc", "search.epochs='abc'; expected a whole number"),
    ("run search.epochs=2.5", "search.epochs=2.5; expected a whole number"),
    ("run search.epochs=0", "search.epochs is 0; expected a whole number of at least 1"),
    ("run training.lr=fast", "training.lr='fast'; expected a number"),
    ("run search.tau_final=low", "search.tau_final='low'; expected a number"),
    ("run max_accuracy_drop=abc", "max_accuracy_drop='abc'; expected a number"),
    ("run resume=tru", "resume='tru'; expected true or false"),
    ("run seed=-1", "seed=-1; expected a whole number from 0"),
    ("run candidates=0", "candidates=0; expected a whole number from 1"),
    ("run networks=2", "networks=2; expected 0"),
    ("run compression.methods=[int8,channel_pruning]", "int8 the last of them"),
    ("run compression.methods=[int8,qat]", "compression.methods=['int8', 'qat']; expected"),
    ("run compression.methods=int8", "a list, as in [a, b]"),
    ("compress method=[int8,int8] model=m", "a list of different ones"),
    ("run space.blocks=skip", "space.blocks='skip'; expected a list"),
    ("run data.limit=-3", "data.limit=-3"),
    ("run data.workers=-1", "data.workers=-1; expected a whole number from 0"),
    ("run data.workers=many", "data.workers='many'; expected a whole number from 0"),
    ("run data.device_mb=-1", "data.device_mb=-1; expected a whole number from 0"),
    ("run device.threads=0", "device.threads is 0; expected a whole number from 1"),
    ("run data=image_folder", "needs data.path=...; the folder. See: fbnas run --help"),
    ("search", "needs table=...; a latency table"),
    ("count", "needs architecture=...; a file, or fbnet_a"),
    ("count architecture=fbnet_a classes=0", "classes=0; expected a whole number from 1"),
    ("count architecture=fbnet_a space.head=8", "expected space=NAME"),
    ("profile table=t.csv classes=0", "classes=0; expected a whole number from 1"),
    ("profile table=t.csv space=tiny.yaml rounds=1", "rounds is 1; expected at least 2"),
    ("calibrate table=table.csv space=tiny.yaml classes=10 networks=1", "at least 3"),
    ("run space=nowhere.yaml", "nowhere.yaml: no such space file"),
    ("run data=image_folder data.path=nowhere", "nowhere: no such folder"),
    ("train architecture=nowhere.yaml", "nowhere.yaml: no such architecture file"),
    ("train architecture=a.yaml space=fbnet", "has 3 blocks, space fbnet has 22 layers"),
    ("train architecture=a.yaml", "expected space=NAME or space=PATH"),
    ("search table=nowhere.csv", "nowhere.csv: no such latency table"),
    ("sample run=nowhere", "no theta.json there"),
    ("report run=nowhere", "nowhere: no such folder"),
    ("report run=.", "expected the out folder of fbnas run, search or train"),
    ("report run=[]", "run is an empty list; expected a folder"),
    ("report run=[a,b]", "run names 2 folders; expected a folder for their page"),
    ("report run=[nowhere,b] out=o", "nowhere: no such folder"),
    ("compress model=nowhere", "no network there"),
    ("evaluate model=nowhere.onnx", "nowhere.onnx: no such file"),
    ("evaluate model=a.yaml", "a.yaml: no runtime is known for .yaml; expected .onnx"),
]


@pytest.mark.parametrize(("line", "words"), VALUES, ids=[line for line, _ in VALUES])
def test_a_wrong_value_is_answered_with_what_was_expected(
    refused: Callable[..., str], line: str, words: str
) -> None:
    assert words in refused(*line.split())
    assert not Path("out").exists()


def test_what_a_group_does_not_name_is_named_as_it_is_meant(refused: Callable[..., str]) -> None:
    Path("photos").mkdir()
    for name in ("photos", "./photos"):
        assert f"data=image_folder data.path={Path(name)}." in refused("run", f"data={name}")
    assert "Did you mean 'tiny.yaml'?" in refused("run", "space=tiny")
    assert "device=ssh device.host=pi@board" in refused("run", "device=pi@board")


@pytest.mark.parametrize("command", [RUN, SEARCH], ids=["run", "search"])
@pytest.mark.parametrize("value", ["0", "-1", "abc", "true", "nan"])
def test_a_target_that_is_no_time(
    refused: Callable[..., str], command: list[str], value: str
) -> None:
    assert "expected a" in refused(*command, f"target_ms={value}")
    assert not Path("out").exists()


@pytest.mark.parametrize("command", [[*RUN, "networks=0"], SEARCH], ids=["run", "search"])
@pytest.mark.parametrize(
    ("value", "words"), [("3.5", "under the fastest"), ("12.2", "over the slo")]
)
def test_an_infeasible_target_is_answered_with_the_fastest_and_the_slowest(
    refused: Callable[..., str], command: list[str], value: str, words: str
) -> None:
    line = refused(*command, f"target_ms={value}")
    assert words in line
    assert "3.6 ms" in line
    assert "12.1 ms" in line


def test_a_measured_table_serves_another_budget_after_an_infeasible_one(
    refused: Callable[..., str],
) -> None:
    run = ["run", "space=tiny.yaml", "networks=0", "out=out"]
    Path("out").mkdir()
    begun = compose("run", [*run[1:], "target_ms=3.4"])
    Path("out/config.yaml").write_text(yaml.safe_dump(begun))
    Path("out/table.csv").write_bytes(Path("table.csv").read_bytes())
    line = refused(*run, "target_ms=3.5", "resume=true")
    assert "the fastest network takes 3.6 ms" in line
    assert "another budget and resume=true" in line
    with pytest.raises(AssertionError, match="training began"):
        main([*run, "target_ms=7", "resume=true"])
    assert "was begun with another target_ms" in refused(*run, "target_ms=8", "resume=true")


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new, 1))


def cut(path: str, share: float = 0.5) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(len(content) * share)])


def test_a_typo_in_the_users_space_file(refused: Callable[..., str]) -> None:
    edit("tiny.yaml", "k5_e1", "k5_e11")
    assert "Unknown block 'k5_e11'. Did you mean 'k5_e1'?" in refused(*RUN)


def test_a_table_of_another_space_names_the_command_that_measures_it(
    refused: Callable[..., str],
) -> None:
    line = refused("run", "space=quickstart", "table=table.csv", "out=out", "networks=0")
    assert "Measure it: fbnas profile space=quickstart" in line


def test_a_table_of_another_precision(refused: Callable[..., str]) -> None:
    assert "precision fp32, here it is int8" in refused(*RUN, "device.precision=int8")
    assert "precision fp32, here it is int8" in refused(
        "profile", "space=tiny.yaml", "table=table.csv", "device.precision=int8"
    )


def test_a_hand_edited_row_of_a_table_is_named_by_its_line(refused: Callable[..., str]) -> None:
    lines = Path("table.csv").read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.startswith("k3_e3"))
    edit("table.csv", lines[number - 1], lines[number - 1].replace("3.1", "fast", 1))
    assert f"table.csv, line {number}: " in refused(*SEARCH)


def test_a_truncated_table(refused: Callable[..., str]) -> None:
    lines = Path("table.csv").read_text().splitlines(keepends=True)
    Path("table.csv").write_text("".join(lines[:-3]))
    assert "table.csv" in (line := refused(*SEARCH))
    assert "rows" in line


def test_a_truncated_network(refused: Callable[..., str]) -> None:
    cut("network/weights.safetensors")
    assert "weights.safetensors" in refused("export", "model=network", "out=out")


def test_a_network_without_its_weights(refused: Callable[..., str]) -> None:
    Path("network/weights.safetensors").unlink()
    assert "weights.safetensors" in refused("export", "model=network", "out=out")


def test_a_truncated_model_file(refused: Callable[..., str]) -> None:
    assert main(["export", "model=network", "measure=false", "out=exported"]) == 0
    assert "expected exported/model.onnx" in refused("evaluate", "model=exported")
    Path("short.onnx").write_bytes(Path("exported/model.onnx").read_bytes()[:3000])
    assert "short.onnx: not a whole ONNX file" in refused("evaluate", "model=short.onnx")
    assert "short.onnx: not a whole ONNX file" in refused(
        "compress", "model=short.onnx", "method=int8"
    )


def test_a_broken_architecture_file(refused: Callable[..., str]) -> None:
    edit("a.yaml", "k5_e1", "k5_e11")
    line = refused("count", "architecture=a.yaml", "space=tiny.yaml")
    assert "k5_e11" in line
    Path("a.yaml").write_text("blocks: [k3_e1\nspace: tiny\n")
    assert "a.yaml, line" in refused("count", "architecture=a.yaml", "space=tiny.yaml")


def test_an_out_folder_that_is_a_file_or_below_one(refused: Callable[..., str]) -> None:
    assert "out=a.yaml is a file" in refused(*RUN, "out=a.yaml")
    assert "cannot be written" in refused(*RUN, "out=a.yaml/below")


def test_an_out_folder_with_other_files_is_left_alone(refused: Callable[..., str]) -> None:
    Path("photos").mkdir()
    Path("photos/cat.txt").write_text("mine")
    for more in ([], ["overwrite=true"], ["resume=true"]):
        assert "holds other files" in refused(*RUN, "out=photos", *more)
    assert [file.name for file in Path("photos").iterdir()] == ["cat.txt"]


def test_an_out_folder_that_a_kill_left_at_its_first_file_is_as_none(
    refused: Callable[..., str],
) -> None:
    Path("out").mkdir()
    Path("out/.config.yaml.x7.part").touch()
    count = ["count", "architecture=a.yaml", "space=tiny.yaml", "out=out"]
    assert "holds nothing to resume" in refused(*SEARCH, "resume=true")
    assert main(count) == 0
    assert not Path("out/.config.yaml.x7.part").exists()
    assert "holds a finished run" in refused(*count)


def test_an_out_folder_that_holds_a_run(refused: Callable[..., str]) -> None:
    assert main(["export", "model=network", "measure=false", "out=out"]) == 0
    before = Path("out/result.json").read_text()
    line = refused(*RUN)
    assert "holds a finished run" in line
    assert "overwrite=true" in line
    assert "no such folder" in refused(
        *RUN, "overwrite=true", "data=image_folder", "data.path=nowhere"
    )
    assert Path("out/result.json").read_text() == before  # a typo costs no older run
    unread = ["data=image_folder", "data.path=nowhere"]
    assert "holds a finished run" in refused(*RUN, *unread)  # before images are read


def test_a_device_that_does_not_answer_leaves_no_folder(refused: Callable[..., str]) -> None:
    for command in (["run", "space=tiny.yaml"], ["evaluate", "model=a.onnx"]):
        line = refused(*command, "device.python=nowhere", "out=out")
        assert "device.python=nowhere cannot be started" in line
    assert not Path("out").exists()


def test_sampling_never_empties_a_folder_unasked(refused: Callable[..., str]) -> None:
    line = refused("sample", "run=nowhere", "out=out")
    assert "no theta.json" in line
    assert compose("sample", ["run=r"])["overwrite"] is False


def test_nothing_to_resume(refused: Callable[..., str]) -> None:
    for command in (RUN, SEARCH, ["train", "architecture=a.yaml", "space=tiny.yaml", "out=out"]):
        assert "holds nothing to resume" in refused(*command, "resume=true")
    assert not Path("out").exists()


def test_a_damaged_checkpoint(refused: Callable[..., str]) -> None:
    Path("out").mkdir()
    begun = compose("search", [*SEARCH[1:], "data.limit=320"])
    Path("out/config.yaml").write_text(yaml.safe_dump(begun))
    Path("out/checkpoint.pt").write_bytes(b"PK\x03\x04 cut off")
    line = refused(*SEARCH, "resume=true", "data.limit=320")
    assert "out/checkpoint.pt: the checkpoint is damaged" in line


def test_a_run_is_not_continued_as_another_one(refused: Callable[..., str]) -> None:
    Path("out").mkdir()
    Path("out/config.yaml").write_text(yaml.safe_dump(compose("search", SEARCH[1:])))
    line = refused(*SEARCH, "target_ms=6", "resume=true")
    assert "was begun with another target_ms (None, now 6)" in line
    line = refused(*SEARCH, "search.schedule.tau=[[0,2.0]]", "resume=true")
    assert "was begun with another search.schedule.tau ([], now [[0, 2.0]])" in line


def test_overwriting_never_deletes_what_is_read(refused: Callable[..., str]) -> None:
    Path("out").mkdir()
    Path("out/config.yaml").write_text(yaml.safe_dump(compose("search", SEARCH[1:])))
    Path("table.csv").rename("out/table.csv")
    search = [x if not x.startswith("table=") else "table=out/table.csv" for x in SEARCH]
    assert "would delete out/table.csv" in refused(*search, "overwrite=true")
    assert Path("out/table.csv").is_file()


@pytest.mark.parametrize(
    ("command", "option", "others"),
    [
        ("calibrate", "measurements=out/filled.csv", ["space=tiny.yaml", "table=t.csv"]),
        ("calibrate", "among=out/filled.csv", ["space=tiny.yaml", "table=t.csv", "suggest=3"]),
        ("train", "teacher=out/net", ["architecture=a.yaml"]),
        ("train", "teacher=[supernet,out/net]", ["architecture=a.yaml"]),
        ("compress", "compression.fine_tuning.teacher=out/net", ["model=n", "method=low_rank"]),
        ("compress", "compression.lottery_ticket.rewind_to=out/net", ["model=n", "method=int8"]),
        (
            "compress",
            "compression.latency_pruning.table=out/filled.csv",
            ["model=n", "method=int8"],
        ),
    ],
)
def test_overwriting_deletes_nothing_that_any_option_names(
    command: str, option: str, others: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out/net").mkdir(parents=True)
    Path("out/filled.csv").touch()
    Path("out/config.yaml").write_text(yaml.safe_dump(compose("search", SEARCH[1:])))
    config = compose_single(command, [*others, option, "out=out", "overwrite=true"])
    with pytest.raises(InputError, match="would delete out/"):
        check_out(config)


def test_a_table_inside_out_is_refused_before_anything_is_measured(
    refused: Callable[..., str],
) -> None:
    line = refused("profile", "space=tiny.yaml", "table=new/table.csv", "out=new")
    assert "table=new/table.csv lies in out=new" in line
    assert not Path("new").exists()


def test_a_folder_of_another_program_is_not_emptied(refused: Callable[..., str]) -> None:
    Path("out").mkdir()
    Path("out/config.yaml").write_text("theirs: true\n")
    assert "out=out holds other files" in refused(*SEARCH, "overwrite=true")
    assert Path("out/config.yaml").is_file()
