"""What a job is made of: its files, its Python, its command line.

A job is `python -m tools.submitted VERB FILE …` on the cluster's head, in a working folder that Ray carries there. By
default that folder holds the settings file and nothing else, so that nothing goes along by accident; the cluster's
machines have logitstore already (an image, or `pip` in a runtime environment), unless the job brings this one.

A job has no state of its own. All it leaves is the store, or the run's folder, which must therefore outlive the
cluster: submitting the same file again is how it goes on, on whatever cluster there is.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

import logitstore
from cluster.job_secrets import check_no_secrets, check_secret_names
from logitstore import __version__
from logitstore.errors import ConfigError
from logitstore.settings import Settings, read_settings

Verb = Literal["capture", "train", "sweep"]

_LOG = logging.getLogger("logitstore.submit")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PACKAGES = ("logitstore", "trainer", "cluster", "tools")
# As Ray does.
_LEFT_OUT = (".git", ".venv", "venv", "__pycache__")
# What an installation by pip would tell vLLM.
_ENTRY_POINTS = "[vllm.general_plugins]\nlogitstore = logitstore.teacher.vllm_plugin:register\n"
# From the request to stop until Ray kills the job. Its default of 3 seconds is too short to write a checkpoint.
_STOP_SECONDS = 120
STOP_SECONDS_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is to run on a cluster.

    Attributes:
        verb: of `logitstore`.
        settings_file: here; it is carried to the cluster.
        arguments: what else the verb is given: settings that replace the file's, and options.
        environment: variables of the job and all its processes; recorded, so nothing secret.
        secrets: names of variables that the cluster's machines have to have already.
        runtime_env: Ray's runtime environment, where the machines lack something.
        working_dir: a folder to carry along, with the settings file in it; None carries that file alone.
        with_package: run this installation of logitstore, not the cluster's.
        any_version: accept another release of logitstore on the cluster.
        python: the cluster's interpreter.
        name: of the job, one that the cluster has not seen; made up if None.
    """

    verb: Verb
    settings_file: Path
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    working_dir: Path | None = None
    with_package: bool = False
    any_version: bool = False
    python: str = "python"
    name: str | None = None

    @property
    def overrides(self) -> list[str]:
        """Settings among the arguments."""
        return [text for text in self.arguments if "=" in text and not text.startswith("-")]


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What Ray is asked to run, and all that it records of it.

    Attributes:
        name: the job's submission id.
        entrypoint: one command of a shell.
        runtime_env: with local folders, which the client uploads.
        metadata: what the job is, for those who list jobs.
    """

    name: str
    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]


@contextlib.contextmanager
def prepare(submission: Submission) -> Iterator[JobRequest]:
    """Check a submission and lay its files out, for the length of a `with` block.

    Raises:
        ConfigError: settings that the verb would refuse, that hold secrets, or whose results would be lost with the
            cluster; a runtime environment that cannot be used.
    """
    _check_name(submission.name)
    check_secret_names(submission.secrets)
    check_no_secrets(submission.arguments, "arguments")
    settings = _read_settings(submission)
    for each in settings:
        check_no_secrets(each, str(submission.settings_file))
    runtime_env = _build_runtime_env(submission)
    places = _list_places(submission.verb, settings)
    for key, address in places.items():
        _check_lasts(key, address)
    with tempfile.TemporaryDirectory(prefix="logitstore-job-") as temporary:
        file = _lay_out(submission, Path(temporary) / "work", runtime_env)
        yield JobRequest(
            name=submission.name or f"{submission.verb}-{uuid.uuid4().hex[:10]}",
            entrypoint=build_entrypoint(submission, file),
            runtime_env=runtime_env,
            metadata={"logitstore": __version__, "verb": submission.verb, **places},
        )


def build_entrypoint(submission: Submission, file: str) -> str:
    """The job's command: `exec`, so that the verb's exit code is the job's and a request to stop reaches it."""
    parts = [submission.python, "-m", "tools.submitted"]
    if not submission.any_version:
        parts += ["--version", __version__]
    for name in submission.secrets:
        parts += ["--secret", name]
    return "exec " + shlex.join([*parts, submission.verb, file, "--address", "auto", *submission.arguments])


def read_runtime_env(text: str) -> dict[str, Any]:
    """A runtime environment out of a YAML or JSON file, or out of JSON itself.

    Raises:
        ConfigError: there is no such file, or no mapping in it.
    """
    is_inline = text.lstrip().startswith("{")
    where = "--runtime-env" if is_inline else text
    try:
        values = yaml.safe_load(text if is_inline else Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--runtime-env: expected a YAML or JSON file or JSON, found {text!r}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"{where}: expected YAML or JSON, found something else; check its syntax") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a mapping, such as pip: [s3fs], found {type(values).__name__}")
    return values


def _read_settings(submission: Submission) -> list[Settings]:
    """The settings as the verb will read them; of a sweep those of every run."""
    path, overrides = submission.settings_file, submission.overrides
    if submission.verb == "capture":
        from cluster.settings import ClusterCaptureSettings

        return [read_settings(ClusterCaptureSettings, path, overrides)]
    if submission.verb == "train":
        from trainer.config import TrainSettings

        return [read_settings(TrainSettings, path, overrides)]
    from trainer.sweep.settings import SweepFile, read_sweep

    sweep = read_sweep(path, overrides)
    return [read_settings(SweepFile, path, overrides), *(run.settings for run in sweep.runs)]


def _check_name(name: str | None) -> None:
    if name is not None and _NAME.fullmatch(name) is None:
        raise ConfigError(f"--name: expected letters, digits, '.', '_' and '-', found {name!r}")


def _list_places(verb: Verb, settings: list[Settings]) -> dict[str, str]:
    """Where a job's results go."""
    key = "store" if verb == "capture" else "output"
    return {key: str(getattr(settings[0], key))}


def _check_lasts(key: str, address: str) -> None:
    if "://" not in address and not Path(address).is_absolute():
        raise ConfigError(
            f"{key}: expected an address that outlives the job, found {address!r}, which would be a folder inside the "
            f"job's own on the head; give a URL such as s3://bucket/{address}, or an absolute path on a disk that all "
            "machines share"
        )
    if "://" not in address:
        _LOG.warning("%s: %s has to be a disk that all machines of the cluster share", key, address)


def _build_runtime_env(submission: Submission) -> dict[str, Any]:
    runtime_env = dict(submission.runtime_env)
    variables = {**(runtime_env.get("env_vars") or {}), **submission.environment}
    runtime_env["env_vars"] = {STOP_SECONDS_VARIABLE: str(_STOP_SECONDS), **variables}
    check_no_secrets(runtime_env, "runtime environment")
    return runtime_env


def _lay_out(submission: Submission, work: Path, runtime_env: dict[str, Any]) -> str:
    """Fill the job's folder, and name it in the runtime environment; returns the settings file's path in it."""
    given = submission.working_dir or runtime_env.get("working_dir")
    if given is None:
        file = submission.settings_file.name
        work.mkdir()
        _write_settings(submission, work / file)
    else:
        file = _find_in_folder(submission.settings_file, str(given))
    if submission.with_package:
        if given is not None:
            shutil.copytree(given, work, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        _put_package(work)
    runtime_env["working_dir"] = str(given if given is not None and not submission.with_package else work)
    return file


def _find_in_folder(settings_file: Path, folder: str) -> str:
    if "://" in folder or not Path(folder).is_dir():
        raise ConfigError(f"working_dir: expected a folder here with the settings file in it, found {folder!r}")
    try:
        return settings_file.resolve().relative_to(Path(folder).resolve()).as_posix()
    except ValueError:
        raise ConfigError(
            f"working_dir: expected {settings_file} to lie in it, found {folder}; move one of the two"
        ) from None


def _write_settings(submission: Submission, path: Path) -> None:
    """A copy of the settings file that needs no other file."""
    if submission.verb == "sweep":
        from trainer.sweep.settings import SweepFile, read_sweep

        file, overrides = submission.settings_file, submission.overrides
        if read_settings(SweepFile, file, overrides).train is not None:
            content = read_sweep(file, overrides).content
            path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            return
    shutil.copyfile(submission.settings_file, path)


def _put_package(folder: Path) -> None:
    """Copy this installation into a job's folder, and tell vLLM of the teacher as an installation would."""
    root = Path(logitstore.__file__).resolve().parent.parent
    if taken := [name for name in _PACKAGES if (folder / name).exists()]:
        raise ConfigError(
            f"working_dir: expected room for logitstore beside the settings, found {', '.join(taken)} there; leave "
            "--package out if it is logitstore, rename it otherwise"
        )
    for name in _PACKAGES:
        # The quickstart's teacher, of 11 MB, stays where it is.
        leave_out = shutil.ignore_patterns(*_LEFT_OUT, "*.safetensors")
        shutil.copytree(root / name, folder / name, ignore=leave_out)
    information = folder / f"logitstore-{__version__}.dist-info"
    information.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: logitstore\nVersion: {__version__}\n"
    (information / "METADATA").write_text(metadata, encoding="utf-8")
    (information / "entry_points.txt").write_text(_ENTRY_POINTS, encoding="utf-8")
