"""`logitstore submit`: captures, trainings and sweeps as jobs of a Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.logs import AsJson, Quiet, Verbose, set_up_logs

if TYPE_CHECKING:
    from cluster.job_client import JobClient
    from cluster.job_status import Job
    from cluster.submit import Submission, Verb

app: typer.Typer = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

FileArgument = Annotated[Path, typer.Argument(metavar="FILE.yaml", help="Settings, as the verb itself takes them.")]
RestArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[ARGUMENT]...",
        help="Settings that replace the file's (section.key=value); behind --, options of the verb, such as --extend.",
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="http://HEAD:8265",
        help="The head's dashboard; RAY_API_SERVER_ADDRESS, RAY_ADDRESS or the cluster on this machine otherwise.",
    ),
]
NoWaitOption = Annotated[bool, typer.Option("--no-wait", help="Return when the job is accepted.")]
NameOption = Annotated[str | None, typer.Option(help="Of the job; made up otherwise.")]
SecretOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Variable that the cluster's machines must have; its value is not sent."),
]
EnvOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Variable of the job and its actors; Ray records it: nothing secret."),
]
RuntimeEnvOption = Annotated[
    str | None, typer.Option(metavar="FILE|JSON", help="Ray's runtime environment: pip, uv, image_uri and so on.")
]
WorkingDirOption = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Carry this folder along, FILE.yaml in it; otherwise that file alone."),
]
PackageOption = Annotated[
    bool, typer.Option("--package", help="Run this installation of logitstore, not the cluster's.")
]
AnyVersionOption = Annotated[
    bool, typer.Option("--any-version", help="Accept another release of logitstore on the cluster.")
]
PythonOption = Annotated[str, typer.Option(help="The cluster's interpreter.")]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Name that the job was given when it was submitted.")]

_VERBS = {
    "capture": (
        "Capture on a cluster.\n\nThe job does what is not in the store yet: submit it again, to any cluster, after "
        "whatever went wrong.",
        "logitstore submit capture capture.yaml --address http://head:8265 --secret AWS_SECRET_ACCESS_KEY\n"
        "  logitstore submit capture capture.yaml method.k=32 --package --no-wait -- --extend",
    ),
    "train": (
        "Train a student on a cluster.\n\nSubmitted again, the run goes on from its newest checkpoint.",
        "logitstore submit train train.yaml --address http://head:8265 steps=5000",
    ),
    "sweep": (
        "Train many students on a cluster.\n\nSubmitted again, a sweep leaves finished runs alone.",
        "logitstore submit sweep sweep.yaml --address http://head:8265",
    ),
}


@app.callback()
def describe() -> None:
    """Run a command as a job of a Ray cluster, and watch it from here.

    The job's log is passed on to stderr, and its exit code becomes this command's. Ctrl-C ends the watching; the job
    goes on. A token is taken from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, with RAY_AUTH_MODE=token.

    \b
    Example:
      logitstore submit capture capture.yaml --address http://head:8265
      logitstore submit follow JOB --address http://head:8265
      logitstore submit stop JOB --address http://head:8265
    """


def _build_command(verb: Verb) -> Callable[..., None]:
    def command(
        settings_file: FileArgument,
        arguments: RestArgument = None,
        address: AddressOption = None,
        no_wait: NoWaitOption = False,
        name: NameOption = None,
        secret: SecretOption = None,
        env: EnvOption = None,
        runtime_env: RuntimeEnvOption = None,
        working_dir: WorkingDirOption = None,
        package: PackageOption = False,
        any_version: AnyVersionOption = False,
        python: PythonOption = "python",
        as_json: AsJson = False,
        quiet: Quiet = False,
        verbose: Verbose = False,
    ) -> None:
        set_up_logs(quiet=quiet, verbose=verbose)
        from cluster.submit import Submission, read_runtime_env

        submission = Submission(
            verb=verb,
            settings_file=settings_file,
            arguments=tuple(arguments or ()),
            environment=_read_variables(env or ()),
            secrets=tuple(secret or ()),
            runtime_env={} if runtime_env is None else read_runtime_env(runtime_env),
            working_dir=working_dir,
            with_package=package,
            any_version=any_version,
            python=python,
            name=name,
        )
        _submit(submission, address, wait=not no_wait, as_json=as_json, quiet=quiet)

    text, example = _VERBS[verb]
    command.__doc__ = f"{text}\n\n\b\nExample:\n  {example}\n"
    return command


app.command("capture")(_build_command("capture"))
app.command("train")(_build_command("train"))
app.command("sweep")(_build_command("sweep"))


@app.command("follow")
def follow_command(
    job: JobArgument,
    address: AddressOption = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Pass a job's log on to stderr until it has ended, and end with its exit code.

    \b
    Example:
      logitstore submit follow capture-0d3e5a9c41 --address http://head:8265
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from cluster.job_client import JobClient

    client = JobClient(address)
    client.read(job)  # a name that nobody knows is a mistake here, and a lost head later on
    _end_like(_follow(client, job, quiet=quiet), as_json=as_json)


@app.command("status")
def status_command(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="One job; all of the cluster otherwise.")] = None,
    address: AddressOption = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say how a job is doing, or list all jobs of the cluster.

    How far a capture is, its store says: see 'logitstore status'.

    \b
    Example:
      logitstore submit status --address http://head:8265
      logitstore submit status capture-0d3e5a9c41 --address http://head:8265 --json
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from cluster.job_client import JobClient
    from tools.job_view import print_job, print_jobs

    client = JobClient(address)
    if job is None:
        print_jobs(client.list(), as_json=as_json)
    else:
        print_job(client.read(job), as_json=as_json)


@app.command("stop")
def stop_command(
    job: JobArgument,
    address: AddressOption = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return when the request is accepted.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Stop a job.

    It is asked first (SIGTERM), and killed two minutes later. A training writes a checkpoint; a capture leaves the
    units that it was at to the next one. What is committed stays.

    \b
    Example:
      logitstore submit stop capture-0d3e5a9c41 --address http://head:8265
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from cluster.job_client import JobClient
    from tools.job_view import print_job

    print_job(JobClient(address).stop(job, wait=not no_wait), as_json=as_json)


def _read_variables(texts: Sequence[str]) -> dict[str, str]:
    from logitstore.errors import ConfigError

    variables = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise ConfigError(f"--env: expected NAME=VALUE, found {name!r}; a value that is secret goes by --secret")
        variables[name] = value
    return variables


def _submit(submission: Submission, address: str | None, *, wait: bool, as_json: bool, quiet: bool) -> None:
    from cluster.job_client import JobClient
    from cluster.submit import prepare
    from tools.job_view import print_job
    from tools.look import print_note

    with prepare(submission) as request:
        client = JobClient(address)
        name = client.start(request)
    print_note(f"job {name} on {client.address}")
    if wait:
        _end_like(_follow(client, name, quiet=quiet), as_json=as_json)
    else:
        print_job(client.read(name), as_json=as_json)


def _follow(client: JobClient, name: str, *, quiet: bool) -> Job:
    """Watch a job until it has ended; Ctrl-C ends the watching alone."""
    from tools.look import print_note

    def write(text: str) -> None:
        if not quiet:
            print(text, end="", file=sys.stderr, flush=True)

    try:
        return client.follow(name, write)
    except KeyboardInterrupt:
        where = f"{name} --address {client.address}"
        print_note(
            f"job {name} goes on; watch it again, or stop it, with\n"
            f"  logitstore submit follow {where}\n  logitstore submit stop {where}"
        )
        raise typer.Exit(130) from None


def _end_like(job: Job, *, as_json: bool) -> None:
    """Say how a job has ended, and end in the same way."""
    from cluster.job_status import build_end_error
    from tools.job_view import print_job

    print_job(job, as_json=as_json)
    error = build_end_error(job)
    if error is not None:
        raise error
    if job.exit_code:
        raise typer.Exit(job.exit_code)


if __name__ == "__main__":
    from tools.cli import main

    main("submit")
