"""The command that makes a selection again as it was asked for, for whoever finds that it is needed."""

import json
import shlex

from pipeline.curation.stage_rules import RULES
from pipeline.storage.shards import Store

_OPTIONS = ("stage", "preset", "rules", "captions")  # what curate.py keeps in run.json of what it was asked for


def asked_for(store: Store, name: str) -> dict[str, str]:
    """The options, those that were given, of the last curation under this name that came to its end."""
    file = f"selections/{name}/run.json"
    asked = json.loads(store.read(file)) if store.exists(file) else {}
    return {key: asked[key] for key in _OPTIONS if asked.get(key)}


def curate_command(store: Store, name: str) -> str:
    """With the options of the last curation under this name. Where none has come to its end, a selection that is not
    called by a stage may be of any: STAGE is for the reader to fill in."""
    options = {"stage": name if name in RULES else "STAGE"} | asked_for(store, name)
    if options["stage"] != name:
        options["name"] = name
    flags = [part for option, value in options.items() for part in (f"--{option}", value)]
    return shlex.join(["python", "pipeline/curate.py", "--dataset", store.root, *flags])
