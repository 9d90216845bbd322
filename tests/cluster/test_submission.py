"""What a job is made of, without a cluster."""

from __future__ import annotations

import shlex
import tomllib
from configparser import ConfigParser
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import PACKAGES, ROOT

from cluster.submit import STOP_SECONDS_VARIABLE, Submission, build_entrypoint, prepare, read_runtime_env
from logitstore import __version__
from logitstore.errors import ConfigError
from trainer.sweep.settings import read_sweep

CAPTURE = {"store": "s3://bucket/store", "corpus": {"files": ["s3://bucket/x"]}, "teacher": {"model": "m"}}
TRAIN = {
    "store": "s3://b/s",
    "student": {"model": "m"},
    "global_batch_sequences": 1,
    "steps": 7,
    "output": "/shared/run",
}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(values: object, name: str = "capture.yaml") -> Path:
        path = tmp_path / "here" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def test_entrypoint_quotes_what_a_shell_would_read() -> None:
    submission = Submission(
        verb="capture",
        settings_file=Path("a b.yaml"),
        arguments=("corpus.files=['*.jsonl; rm x']", "--extend"),
        secrets=("HF_TOKEN",),
        python="python3.12",
    )
    start, *parts = shlex.split(build_entrypoint(submission, "a b.yaml"))
    assert start == "exec"
    assert parts[:7] == ["python3.12", "-m", "tools.submitted", "--version", __version__, "--secret", "HF_TOKEN"]
    assert parts[7:] == ["capture", "a b.yaml", "--address", "auto", "corpus.files=['*.jsonl; rm x']", "--extend"]


def test_job_carries_the_settings_file_alone(write: Any) -> None:
    file = write(CAPTURE)
    (file.parent / "credentials").write_text("xyzzy")
    with prepare(Submission(verb="capture", settings_file=file, arguments=("method.k=3",))) as request:
        folder = Path(request.runtime_env["working_dir"])
        assert [path.name for path in folder.iterdir()] == ["capture.yaml"]
        assert (folder / "capture.yaml").read_text() == file.read_text()
        assert request.metadata == {"logitstore": __version__, "verb": "capture", "store": "s3://bucket/store"}
        assert request.name.startswith("capture-")
    assert not folder.exists()


def test_job_of_a_working_dir_names_the_file_in_it(write: Any, tmp_path: Path) -> None:
    file = write(CAPTURE)
    submission = Submission(verb="capture", settings_file=file, working_dir=tmp_path, name="mine")
    with prepare(submission) as request:
        assert request.runtime_env["working_dir"] == str(tmp_path)
        assert " capture here/capture.yaml " in request.entrypoint
        assert request.name == "mine"


@pytest.mark.parametrize("folder", ["elsewhere", "s3://bucket/x.zip"])
def test_working_dir_without_the_settings_file_is_refused(folder: str, write: Any, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    where = folder if "://" in folder else str(tmp_path / folder)
    submission = Submission(verb="capture", settings_file=write(CAPTURE), runtime_env={"working_dir": where})
    with pytest.raises(ConfigError, match="working_dir: expected"), prepare(submission):
        pass


@pytest.mark.parametrize("has_folder", [False, True])
def test_job_with_its_package_brings_all_four_and_tells_vllm(has_folder: bool, write: Any, tmp_path: Path) -> None:
    (write(CAPTURE).parent / "more.txt").write_text("more")
    submission = Submission(
        verb="capture",
        settings_file=write(CAPTURE),
        with_package=True,
        working_dir=tmp_path / "here" if has_folder else None,
    )
    with prepare(submission) as request:
        folder = Path(request.runtime_env["working_dir"])
        assert folder != tmp_path / "here"
        assert (folder / "more.txt").exists() is has_folder
        assert (folder / "capture.yaml").exists()
        modules = {path.relative_to(folder) for package in PACKAGES for path in (folder / package).rglob("*.py")}
        assert modules == {path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
        [information] = [Distribution.at(path) for path in folder.glob("*.dist-info")]
        assert (information.metadata["Name"], information.version) == ("logitstore", __version__)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        parser = ConfigParser()
        parser.read_string(str(information.read_text("entry_points.txt")))
        assert {name: dict(parser[name]) for name in parser.sections()} == project["entry-points"]


def test_package_is_not_mixed_with_another_of_its_name(write: Any, tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    submission = Submission(verb="capture", settings_file=write(CAPTURE), with_package=True, working_dir=tmp_path)
    with pytest.raises(ConfigError, match="found tools there"), prepare(submission):
        pass


def test_environment_of_a_job_is_what_was_given_and_time_to_stop(write: Any) -> None:
    submission = Submission(
        verb="capture",
        settings_file=write(CAPTURE),
        environment={"AWS_REGION": "eu"},
        runtime_env={"pip": ["s3fs"], "env_vars": {"HF_HOME": "/hf"}},
    )
    with prepare(submission) as request:
        variables = request.runtime_env["env_vars"]
        assert int(variables.pop(STOP_SECONDS_VARIABLE)) >= 60
        assert variables == {"HF_HOME": "/hf", "AWS_REGION": "eu"}
        assert request.runtime_env["pip"] == ["s3fs"]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"store": "runs/store"}, (), "store: expected an address that outlives the job, found 'runs/store'"),
        ({}, ("store=runs/store",), "outlives the job"),
        ({"methods": 1}, (), "known keys"),
        ({}, ("method.k=none",), "method"),
        ({}, ("storage_options.secret=xyzzy",), "storage_options.secret"),
        ({"corpus": {"files": ["https://host/a?token=xyzzy"]}}, (), "secret"),
    ],
)
def test_capture_that_would_fail_or_tell_secrets_is_refused_here(
    changes: dict[str, Any], arguments: tuple[str, ...], message: str, write: Any
) -> None:
    file = write({**CAPTURE, **changes})
    with (
        pytest.raises(ConfigError, match=message) as error,
        prepare(Submission(verb="capture", settings_file=file, arguments=arguments)),
    ):
        pass
    assert "xyzzy" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [{"environment": {"HF_TOKEN": "xyzzy"}}, {"runtime_env": {"env_vars": {"HF_TOKEN": "xyzzy"}}}],
    ids=str,
)
def test_secret_in_the_environment_of_a_job_is_refused(options: dict[str, Any], write: Any) -> None:
    submission = Submission(verb="capture", settings_file=write(CAPTURE), **options)
    with pytest.raises(ConfigError, match=r"env_vars\.HF_TOKEN; .*--secret") as error, prepare(submission):
        pass
    assert "xyzzy" not in str(error.value)


def test_name_that_is_no_name_is_refused(write: Any) -> None:
    submission = Submission(verb="capture", settings_file=write(CAPTURE), name="a/b")
    with pytest.raises(ConfigError, match="--name: expected letters"), prepare(submission):
        pass


def test_training_whose_output_would_go_with_the_job_is_refused(write: Any) -> None:
    file = write({**TRAIN, "output": "runs/student"}, "train.yaml")
    with (
        pytest.raises(ConfigError, match="output: expected an address that outlives the job"),
        prepare(Submission(verb="train", settings_file=file)),
    ):
        pass


def test_training_goes_with_where_its_student_will_be(write: Any) -> None:
    with prepare(Submission(verb="train", settings_file=write(TRAIN, "train.yaml"))) as request:
        assert request.metadata["output"] == "/shared/run"
        assert " train train.yaml --address auto" in request.entrypoint


def test_sweep_that_starts_from_another_file_is_carried_as_one(write: Any, tmp_path: Path) -> None:
    write(TRAIN, "train.yaml")
    file = write({"train": "train.yaml", "seeds": [0, 1], "output": "/shared/sweep"}, "sweep.yaml")
    with prepare(Submission(verb="sweep", settings_file=file, arguments=("steps=9",))) as request:
        carried = Path(request.runtime_env["working_dir"]) / "sweep.yaml"
        runs = {run.name: run.settings for run in read_sweep(carried, ["steps=9"]).runs}
    assert runs == {run.name: run.settings for run in read_sweep(file, ["steps=9"]).runs}
    assert request.metadata["output"] == "/shared/sweep"


@pytest.mark.parametrize("text", ['{"pip": ["s3fs"]}', "file"])
def test_runtime_env_is_read_from_json_or_from_a_file(text: str, write: Any) -> None:
    assert read_runtime_env(str(write({"pip": ["s3fs"]}, "env.yaml")) if text == "file" else text) == {"pip": ["s3fs"]}


@pytest.mark.parametrize("text", ["nowhere.yaml", '{"pip": [', "list"])
def test_runtime_env_that_is_none_is_refused(text: str, write: Any) -> None:
    with pytest.raises(ConfigError, match="expected"):
        read_runtime_env(str(write([1], "env.yaml")) if text == "list" else text)
