"""The text encoder "local": built from the selection's captions and stored in the run folder for all of its stages."""

import filecmp
import shutil
from pathlib import Path

from pipeline.core.errors import UsageError
from trainer.encoders.text import build_local_text_encoder
from trainer.recipe.stages import StageConfig
from trainer.runs import run_folder
from trainer.runs.checkpoint import Checkpoint
from trainer.samples.data import selection_texts
from trainer.samples.row_index import Selection


def prepare_text_encoder(
    run: Path, stage: StageConfig, selection: Selection, newest: Checkpoint | None, initial: Checkpoint | None
) -> str:
    """Folder or hub name of the stage's text encoder.

    A local one is copied from the run of the initial checkpoint. Without any checkpoint it is rebuilt at every start,
    because the selection may have changed. UsageError if the one that the checkpoints need is missing or differs.
    """
    name = run_folder.text_encoder_of(run, stage.text_encoder)
    if stage.text_encoder != "local":
        return name
    folder = Path(name)
    in_use = newest is not None or any(map(_uses_local, run_folder.newest_by_stage(run).values()))
    source = run_folder.text_encoder_of_checkpoint(initial) if initial else name
    if source != name:
        _copy(Path(source), folder, in_use)
    elif initial is None and not in_use:
        shutil.rmtree(folder, ignore_errors=True)
        build_local_text_encoder(selection_texts(selection), folder, stage.seed)
    elif not folder.is_dir():
        raise UsageError(f"{folder} is gone, but the checkpoints of {run} were trained with it: put it back")
    return name


def _uses_local(found: Checkpoint) -> bool:
    return bool(run_folder.config_of(found)["stage"]["text_encoder"] == "local")


def _copy(source: Path, folder: Path, in_use: bool) -> None:
    if not source.is_dir():
        raise UsageError(f"the weights of --from were trained with {source}, which is gone: put it back")
    if in_use:
        names = [path.name for path in source.iterdir()]
        if not folder.is_dir() or filecmp.cmpfiles(source, folder, names, shallow=False)[0] != names:
            raise UsageError(
                f"the weights of --from were trained with {source}, but other stages of this run with {folder}: give "
                "another --run folder"
            )
        return
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
