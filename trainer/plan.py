"""JOB: hours, dollars, energy, disk and bandwidth of a recipe, estimated before it is paid for."""

import json
import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

from pipeline.core.errors import UsageError
from pipeline.core.jobs import Parser, local_path, run

if TYPE_CHECKING:
    from trainer.cost.costs import Machine, Measured, Pictures, Rates, Setting
    from trainer.cost.planning import Plan, Texts

_MOST_SECONDS = 60.0  # of a probe
_LARGEST = 1e15  # of any number: what is computed of larger ones may be infinite


def parse_args() -> Namespace:
    parser = Parser(prog="plan.py", description=__doc__)
    parser.add_argument(
        "--gpu", metavar="KIND", help='as "RTX 4090"; default: RTX 5090, or with --measure the one here'
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="default: 4, or with --measure those here")
    parser.add_argument("--teraflops", type=float, metavar="F", help="dense bfloat16 peak of a GPU that is not known")
    parser.add_argument("--watts", type=float, metavar="F", help="of one GPU")
    parser.add_argument("--host-watts", type=float, default=250, metavar="F", help="of the rest of the machine; 250")
    parser.add_argument(
        "--price", type=float, metavar="DOLLARS", help="of one GPU hour; default: the papers' for RTX 5090"
    )
    parser.add_argument("--kwh", type=float, metavar="DOLLARS", help="of a kWh")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="default: 256 512 768 1024, or the dataset's")
    parser.add_argument("--dataset", metavar="ROOT", help="counts, bytes and text lengths of its selections")
    parser.add_argument("--images", nargs="+", default=[], metavar="STAGE=N", help="default: the papers' counts")
    parser.add_argument(
        "--text-lengths", nargs="+", default=[], metavar="TOKENS=COUNT", help="default: the dataset's, or the longest"
    )
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="[STAGE.]FIELD=VALUE", help="as run.py's --set"
    )
    parser.add_argument(
        "--images-per-second", nargs="+", default=[], metavar="STAGE=F", help="of all GPUs, from a run's metrics.jsonl"
    )
    parser.add_argument(
        "--measure", nargs="?", type=float, const=_MOST_SECONDS, metavar="SECONDS",
        help="time the training step here, for 60 seconds at most, and plan from that",
    )  # fmt: skip
    parser.add_argument(
        "--captions-per-second", type=float, metavar="F", help="of all GPUs, from caption.py --try: a row of its own"
    )
    parser.add_argument("--budget", type=float, metavar="DOLLARS", help="shorten stages until the plan costs no more")
    parser.add_argument("--json", metavar="FILE", help="the plan as JSON")
    args = parser.parse_args()
    _check_numbers(args)
    return args


def main() -> None:
    args = parse_args()
    from trainer.cost.planning import within_budget  # torch takes seconds to import: not for --help

    path = local_path("--json", args.json) if args.json else None
    if path:  # before a probe that may last a minute
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UsageError(f"--json {path} is a folder: give the name of a file")
    inputs = _inputs(args)
    make = partial(_make, args, inputs)
    settings, plan = inputs.settings, make(inputs.settings)
    record = _record(plan, inputs)
    shortened = None if args.budget is None else within_budget(settings, plan, args.budget, make)
    _show(plan, inputs)
    if shortened:
        settings, fitting = shortened
        record["budget"] = _show_budget(args.budget, inputs.settings, settings, fitting)
    record["commands"] = _show_commands(args, inputs, settings)
    if path:
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What the command, the dataset and a probe say."""

    settings: "list[Setting]"
    chosen: dict[str, dict[str, str]]  # by stage: what --set changes
    pictures: "dict[str, Pictures]"
    captioned: "Pictures"
    texts: "dict[str, Texts]"
    rates: "Rates"
    price_source: str
    with_dataset: bool
    measured: "list[Measured] | None"
    remarks: list[str]  # of the probe

    def assumptions(self, plan: "Plan") -> list[str]:
        from trainer.cost import planning

        return [
            "nothing here is measured but what is called so",
            *map(planning.measured_remark, self.measured or []),
            *self.remarks,
            *planning.speed_remarks(plan.rows, self.settings, self.rates.machine),
            *planning.device_remarks(self.settings, self.rates.machine),
            *planning.text_remarks(self.settings, self.texts),
            *planning.memory_remarks(self.settings, self.rates.machine),
            *planning.cost_remarks(self.rates, self.price_source, self.with_dataset),
        ]


def _inputs(args: Namespace) -> _Inputs:
    from trainer.cost import planning
    from trainer.cost.costs import Rates

    names = _stages(args)
    machine, price_source = _machine(args)
    if args.budget is not None and machine.price is None:
        raise UsageError("--budget needs the price of a GPU hour: give --price")
    texts, pictures = _texts(args, names), {}
    chosen = {name: planning.settings_for(name, names, args.settings) for name in names}
    settings = [planning.setting_of(name, chosen[name], machine.count, texts[name]) for name in names]
    for setting in settings:
        pictures[setting.name] = _pictures(args, setting)
    captioned = _captioned(args, pictures)
    measured, remarks = (None, []) if args.measure is None else _measure(args, settings, chosen, texts)
    return _Inputs(
        settings=settings,
        chosen=chosen,
        pictures=pictures,
        captioned=captioned,
        texts=texts,
        rates=Rates(machine=machine, host_watts=args.host_watts, dollars_per_kwh=args.kwh),
        price_source=price_source,
        with_dataset=args.dataset is not None,
        measured=measured,
        remarks=remarks,
    )


def _make(args: Namespace, inputs: _Inputs, settings: "Sequence[Setting]") -> "Plan":
    from trainer.cost import planning

    given = {name: _above_0("--images-per-second", value) for name, value in _pairs(args, "images_per_second").items()}
    machine = inputs.rates.machine
    speeds = {s.name: planning.speed_of(s, machine, given, inputs.measured) for s in settings}
    return planning.make_plan(
        settings, inputs.pictures, speeds, inputs.rates, args.captions_per_second, inputs.captioned
    )  # fmt: skip


# --- What is asked for ------------------------------------------------------------------------------------------------


def _check_numbers(args: Namespace) -> None:
    for name in ("teraflops", "watts", "captions_per_second", "budget", "measure"):
        _above_0("--" + name.replace("_", "-"), getattr(args, name))
    for name in ("price", "kwh", "host_watts"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= _LARGEST:
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: a number from 0 to {_LARGEST:g}")
    if args.gpus is not None and args.gpus < 1:
        raise UsageError(f"--gpus {args.gpus}: at least 1")
    if args.measure is not None and args.measure > _MOST_SECONDS:
        raise UsageError(f"--measure {args.measure:g}: {_MOST_SECONDS:g} seconds at most")


def _above_0(flag: str, value: float | None) -> float:
    if value is not None and not 0 < value <= _LARGEST:
        raise UsageError(f"{flag} {value:g}: a number above 0, up to {_LARGEST:g}")
    return value or 0.0


def _pairs(args: Namespace, name: str) -> dict[str, float]:
    """Of a flag that takes NAME=NUMBER."""
    flag, found = "--" + name.replace("_", "-"), {}
    for pair in getattr(args, name):
        key, equals, text = pair.partition("=")
        try:
            found[key] = float(text)
        except ValueError:
            equals = ""
        if not (key and equals and abs(found[key]) <= _LARGEST):
            raise UsageError(f"{flag} {pair}: give a name and a number up to {_LARGEST:g}, as in 256=1000")
    return found


def _stages(args: Namespace) -> list[str]:
    """In training order; of a dataset those whose speed is known or measured, so that its demo can stay in it."""
    from trainer.cost.planning import RECIPE
    from trainer.recipe.stages import STAGES

    given = _pairs(args, "images_per_second")
    if args.stages is None and args.dataset is not None:
        from trainer.cost.corpus import selections_of

        if not (found := selections_of(args.dataset)):
            raise UsageError(f"{args.dataset} has no selection of a stage; make one with pipeline/curate.py")
        planned = [name for name in found if args.measure or name in RECIPE or name in given]
        args.stages = planned or found
    asked = args.stages or list(RECIPE)
    for name in [*asked, *_pairs(args, "images"), *given]:
        if name not in STAGES:
            raise UsageError(f"there is no stage {name!r}; stages: {', '.join(STAGES)}")
    planned = [name for name in STAGES if name in asked]
    for flag, names in (("--images", _pairs(args, "images")), ("--images-per-second", given)):
        for name in names:
            if name not in planned:
                raise UsageError(f"{flag} {name}: stage {name} is not planned; --stages {' '.join([*planned, name])}")
    return planned


def _machine(args: Namespace) -> "tuple[Machine, str]":
    """And a remark on the price. UsageError for a kind of GPU that is not known."""
    from trainer.cost import costs

    kind, count, peak, price_source = args.gpu, args.gpus, None, ""
    if args.measure is not None:
        kind, count, peak = _machine_at_hand(args)
    kind = kind or costs.PUBLISHED_GPU
    known = costs.find_gpu(kind)
    if known:
        peak = costs.gpu_peak(known)
    elif args.measure is None and (args.teraflops is None or args.watts is None):
        raise UsageError(
            f"--gpu {kind}: not known; known are {', '.join(costs.GPUS)}. For another one give --teraflops (dense "
            "bfloat16) and --watts"
        )
    price = args.price
    if price is None and known == costs.PUBLISHED_GPU:
        low, high = costs.PUBLISHED_PRICES
        price = (low + high) / 2
        price_source = f" (no --price: the middle of what the papers paid, ${low:.3f} to ${high:.3f})"
    gpu = costs.GPUS[known] if known else None
    return costs.Machine(
        name=known or kind,
        count=count or costs.PUBLISHED_GPUS,
        teraflops=args.teraflops or peak,
        watts=args.watts or (gpu.watts if gpu else None),
        gigabytes=gpu.gigabytes if gpu else None,
        price=price,
    ), price_source


def _machine_at_hand(args: Namespace) -> tuple[str, int, float | None]:
    """Its kind, GPUs and peak; those that the command names instead. UsageError where a probe here would say nothing of
    them."""
    import torch

    from trainer.cost import costs, probe
    from trainer.training.metrics import peak_teraflops

    device = probe.device_at_hand()
    here = probe.device_name(device)
    peak = peak_teraflops(here)
    if args.gpu is None:
        return here, args.gpus or max(1, torch.cuda.device_count()), peak
    target = costs.find_gpu(args.gpu)
    if target is not None and target == costs.find_gpu(here):
        return here, args.gpus or max(1, torch.cuda.device_count()), peak
    if device.type == "cpu" or peak is None or (target is None and args.teraflops is None):
        raise UsageError(
            f"--measure times {here}, which says nothing of --gpu {args.gpu}; leave out --gpu to plan for this "
            "machine, or --measure to plan from the papers' speeds"
        )
    return args.gpu, args.gpus or 1, None


def _texts(args: Namespace, names: Sequence[str]) -> "dict[str, Texts]":
    from trainer.cost import planning
    from trainer.cost.planning import Texts
    from trainer.recipe.settings import stage_config

    given = _pairs(args, "text_lengths")
    if given:
        if not all(key.isdecimal() and count >= 0 for key, count in given.items()) or not sum(given.values()):
            raise UsageError("--text-lengths: give tokens and how many texts have so many, as in 64=100 128=300")
        return dict.fromkeys(names, Texts({int(key): count for key, count in given.items()}, "--text-lengths"))
    if args.dataset is None:
        return dict.fromkeys(
            names, Texts(None, "no dataset: every text fills the recipe's text_tokens, as the papers'")
        )
    from trainer.cost.corpus import selection_of, text_lengths

    found = {}
    for name in names:
        stage, _, _ = stage_config(name, planning.settings_for(name, names, args.settings))
        found[name] = Texts(*text_lengths(selection_of(args.dataset, stage), stage))
    return found


def _pictures(args: Namespace, setting: "Setting") -> "Pictures":
    """UsageError where there are none."""
    from trainer.cost import planning
    from trainer.cost.costs import PUBLISHED

    given = _pairs(args, "images").get(setting.name)
    if given is not None and (given < 1 or given != int(given)):
        raise UsageError(f"--images {setting.name}={given:g}: a stage trains on a whole number of images, at least 1")
    if args.dataset is not None and given is None:
        from trainer.cost.corpus import pictures_of, selection_of

        return pictures_of(selection_of(args.dataset, setting.stage))
    if given is None and setting.name not in PUBLISHED:
        raise UsageError(f"how many images has stage {setting.name}? give --images {setting.name}=N or --dataset")
    return planning.default_pictures(setting, int(given or PUBLISHED[setting.name].images))


def _captioned(args: Namespace, pictures: "dict[str, Pictures]") -> "Pictures":
    from trainer.cost import planning

    if args.dataset is None or args.captions_per_second is None:
        return planning.default_captioned(pictures.values())
    from trainer.cost.corpus import all_pictures

    return all_pictures(args.dataset)


def _measure(
    args: Namespace, settings: "list[Setting]", chosen: dict[str, dict[str, str]], texts: "dict[str, Texts]"
) -> "tuple[list[Measured], list[str]]":
    """On a CPU a tiny model is probed where --set names none."""
    from trainer.cost import probe
    from trainer.cost.planning import setting_of

    device = probe.device_at_hand()
    if device.type == "cpu":
        tiny = {name: {"model": "tiny", **fields} for name, fields in chosen.items()}
        settings = [setting_of(name, tiny[name], 1, texts[name]) for name in tiny]
    print(f"plan: timing the training step on {probe.device_name(device)}, {args.measure:g} s", flush=True)
    try:
        measured, remarks = probe.measure(settings, args.measure, device)
    except ValueError as error:  # of an encoder
        raise UsageError(str(error)) from error
    if not measured:
        raise UsageError(f"nothing could be measured: {'; '.join(remarks)}; --set model=tiny is the smallest probe")
    return measured, remarks


# --- What is told -----------------------------------------------------------------------------------------------------


def _record(plan: "Plan", inputs: _Inputs) -> dict[str, object]:
    from trainer.cost.costs import PUBLISHED, PUBLISHED_DOLLARS, PUBLISHED_GPU, PUBLISHED_GPUS, PUBLISHED_HOURS

    papers = {
        "gpu": PUBLISHED_GPU,
        "gpus": PUBLISHED_GPUS,
        "hours": PUBLISHED_HOURS,
        "dollars": PUBLISHED_DOLLARS,
        "stages": {name: asdict(row) for name, row in PUBLISHED.items()},
    }
    return {
        "is_estimate": True,
        "machine": asdict(inputs.rates.machine),
        "stages": [row.record() for row in plan.rows],
        "total": plan.total.record(),
        "papers": papers,
        "assumptions": inputs.assumptions(plan),
        "measured": [
            {"stage": found.setting.name, "images_per_second": found.images_per_second, "steps": found.steps}
            | {"micro_batch": found.setting.stage.micro_batch, "seconds": found.seconds, "device": found.device}
            for found in inputs.measured or []
        ],
    }


def _show(plan: "Plan", inputs: _Inputs) -> None:
    from trainer.cost.plan_table import papers_line, table
    from trainer.cost.planning import RECIPE

    print(f"An estimate, for {inputs.rates.machine.count} x {inputs.rates.machine.name}:\n")
    print(table(plan, set(RECIPE) <= {row.name for row in plan.rows}))
    print(f"\n{papers_line()}.\n\nAssumptions:")
    print("\n".join(f"- {line}" for line in inputs.assumptions(plan)))


def _show_budget(
    budget: float, whole: "Sequence[Setting]", settings: "Sequence[Setting]", plan: "Plan"
) -> dict[str, object]:
    from trainer.cost.budget import RULE
    from trainer.cost.plan_table import table

    kept = {
        setting.name: setting.stage.samples / before.stage.samples
        for before, setting in zip(whole, settings, strict=True)
    }
    print(f"\nFor ${budget:g} (an estimate; the rule: {RULE}):\n")
    if all(share == 1 for share in kept.values()):
        print("the whole recipe fits")
    else:
        print(table(plan, False))
        print("\nsamples kept: " + ", ".join(f"{name} {share:.0%}" for name, share in kept.items()))
    return {
        "dollars": budget,
        "rule": RULE,
        "samples_kept": kept,
        "stages": [row.record() for row in plan.rows],
        "total": plan.total.record(),
    }


def _show_commands(args: Namespace, inputs: _Inputs, settings: "Sequence[Setting]") -> list[str]:
    from trainer.cost.planning import command_of, device_remarks

    machine, chosen = inputs.rates.machine, inputs.chosen
    if remarks := device_remarks(settings, machine):
        print(f"\nNo commands: {'; '.join(remarks)}", flush=True)
        return []
    before = [None, *(setting.name for setting in settings)]
    commands = [
        shlex.join(command_of(setting, chosen[setting.name], machine, args.dataset, previous))
        for previous, setting in zip(before, settings, strict=False)
    ]
    print("\nTo carry it out:\n" + "\n".join(commands), flush=True)
    return commands


if __name__ == "__main__":
    run(main)
