"""JOB: estimates hours, dollars, energy, disk space and reads of a training recipe."""

import json
from dataclasses import asdict
from functools import partial
from typing import Any

from pipeline.core.errors import UsageError
from pipeline.core.jobs import local_path, run
from trainer.cost.command import parse_args


def main() -> None:
    job = parse_args(__doc__)
    # Imported here because torch takes seconds to import, which --help does not need.
    from trainer.cost import budget, machines, report
    from trainer.cost.estimate import cost_plan, stage_images, training_speed
    from trainer.cost.stage_setup import planned_stages, stage_setups

    path = local_path("--json", job.json) if job.json else None
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UsageError(f"--json {path} is a folder: give the name of a file")
    names = planned_stages(job)
    machine = machines.planned_machine(job)
    setups = stage_setups(job, names, machine.count)
    images = [stage_images(job, setup) for setup in setups]
    measured = []
    if job.measure is not None:
        from trainer.cost.probe import measure

        measured = measure(setups, job.measure)
    speeds = [training_speed(setup, machine, job.images_per_second, measured) for setup in setups]
    estimate = partial(cost_plan, images=images, speeds=speeds, machine=machine)
    *stages, total = plan = estimate(setups)
    record: dict[str, Any] = {
        "is_estimate": True,
        "machine": asdict(machine),
        "stages": stages,
        "total": total,
        "papers": machines.PAPERS,
        "assumptions": list(report.assumptions(job, plan, setups, machine, measured)),
        "measured": measured,
    }
    lines = [f"An estimate, for {machine.count} x {machine.name}:", "", report.table(plan), "", report.PAPERS_LINE, ""]
    lines += ["Assumptions:", *(f"- {line}" for line in record["assumptions"]), ""]
    if job.budget is not None:
        whole = setups
        setups = budget.shortened(whole, {row["name"]: row["dollars"] for row in stages}, job.budget)
        kept = {a.name: b.stage.samples / a.stage.samples for a, b in zip(whole, setups, strict=True)}
        *stages, total = plan = estimate(setups)
        record["budget"] = {"dollars": job.budget, "rule": budget.RULE, "samples_kept": kept}
        record["budget"] |= {"stages": stages, "total": total}
        lines += [f"For ${job.budget:g} (an estimate; the rule: {budget.RULE}):", "", report.table(plan), ""]
        lines += ["samples kept: " + ", ".join(f"{name} {share:.0%}" for name, share in kept.items()), ""]
    record["commands"] = list(report.training_commands(setups, machine, job.dataset))
    print("\n".join([*lines, "To train it:", *(record["commands"] or [report.NO_GPU])]), flush=True)
    if path:
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
