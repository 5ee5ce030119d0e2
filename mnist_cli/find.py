"""What a path on the command line means: a checkpoint, or a run to go on with.

torch isn't imported here: that a path leads nowhere can be said at once.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from mnist_cli.config import TrainConfig
from mnist_cli.errors import CheckpointError, shown
from mnist_cli.run import RunFolder


def checkpoint(path: str) -> Path:
    """The file that `path` means: a run folder means its best checkpoint.

    Raises:
        CheckpointError: there is no such file.
    """
    hint = "name a run folder or a .safetensors file: checkpoint=RUN"
    try:
        found = Path(path).expanduser()
        if found.is_dir():
            last, found = found / "last.safetensors", found / "best.safetensors"
            if last.exists():
                hint = f"nothing is selected yet; type {shlex.quote(f'checkpoint={last}')}"
        if found.suffix == ".pt2" and found.exists():
            raise CheckpointError(
                f"{found} is a program for torch.export.load, and not read here",
                "name its run folder, or export format=onnx",
            )
        if found.exists():
            return found
    except (OSError, ValueError, RuntimeError) as error:  # the last: of an unknown ~user
        raise CheckpointError(f"can't open {shown(path)}: {error}", "check the path") from error
    raise CheckpointError(f"no checkpoint at {found}", hint)


def run_to_resume(config: TrainConfig) -> Path | None:
    """The folder to continue in, or None for a new run.

    Raises:
        CheckpointError: `resume=RUN` names no run folder.
    """
    if config.resume is None:
        return None
    if config.resume == "auto":
        folder = Path(config.out or "")
        return folder if checkpoints_in(RunFolder(folder)) else None
    folder = Path(os.path.expanduser(config.resume))
    try:
        is_folder = folder.is_dir()
    except OSError:  # a name that is too long
        is_folder = False
    if not is_folder:
        raise CheckpointError(
            f"resume={folder} is not a run folder", "name one: resume=outputs/train/RUN"
        )
    if not checkpoints_in(RunFolder(folder)):
        hint = "start the run anew, or name another folder"
        if (folder / "leaderboard.json").exists():
            word = shlex.quote(f"sweep.resume={folder}")
            hint = f"to go on with a sweep, type its line again with {word}"
        raise CheckpointError(f"resume={folder} holds no checkpoint", hint)
    return folder


def checkpoints_in(folder: RunFolder) -> list[Path]:
    """The checkpoints of a run, `last` first. Raises CheckpointError: nobody may look."""
    found = []
    for path in (folder.last, folder.best):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise CheckpointError(
                f"can't open {folder.path}: {error.strerror}",
                "make it readable, or name another folder",
            ) from error
        found.append(path)
    return found
