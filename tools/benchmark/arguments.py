"""What benchmarks hold their arguments to."""

from __future__ import annotations

from pathlib import Path


def check_multiple(option: str, value: int, of: int) -> None:
    """Hold a size to what the heads of a model need.

    Raises:
        ConfigError: it is no multiple.
    """
    from logitstore.errors import ConfigError

    if value % of:
        raise ConfigError(f"{option}: expected a multiple of {of}, found {value}; try {(value // of + 1) * of}")


def check_device(device: str | None) -> None:
    """Hold the name of a device to being one that torch has here.

    Raises:
        ConfigError: it is none.
    """
    from trainer.distributed import choose_device

    choose_device(device)


def check_loss(kind: str) -> None:
    """Hold the name of a loss to those that there are.

    Raises:
        ConfigError: there is none of that name.
    """
    from logitstore.settings import build_settings
    from trainer.loss.settings import LossSettings

    build_settings(LossSettings, {"kind": kind}, where="--loss")


def check_folder(folder: Path) -> None:
    """Hold a folder to work in to being empty; it is made where there is none.

    Raises:
        ConfigError: there is something in it, or it is a file.
    """
    from logitstore.errors import ConfigError

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        found = "files in it" if folder.is_dir() else "a file"
        raise ConfigError(f"--folder: {folder}: expected an empty folder, found {found}; name another one")
    folder.mkdir(parents=True, exist_ok=True)


def check_quickstart(folder: Path) -> None:
    """Hold a folder to having a store, and the text that it is of.

    Raises:
        ConfigError: it is not what a quickstart has left.
    """
    from logitstore.errors import ConfigError

    missing = [part for part in ("store/plan.json", "corpus/train.jsonl") if not (folder / part).is_file()]
    if missing:
        raise ConfigError(
            f"{folder}: expected what 'logitstore quickstart' leaves, found no {' and no '.join(missing)}; run it first"
        )
