"""JOB: converts a trained model to a diffusers folder, to one file in the layout of the public HDM weights or to
adapters for peft, and the public weights to a model folder."""

from pipeline.core.errors import UsageError
from pipeline.core.jobs import run
from trainer.exporting.command import parse_args


def main() -> None:
    job = parse_args(__doc__)
    # Imported here because torch takes seconds to import, which --help does not need.
    from trainer.exporting.weight_files import export_lora, export_released, import_released

    try:
        if job.kind == "to_diffusers":
            from trainer.exporting.diffusers_export import export_diffusers

            count = export_diffusers(job)
        else:
            exports = {"to_released": export_released, "to_lora": export_lora, "from_released": import_released}
            count = exports[job.kind](job)
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(f"export: {count} tensors written to {job.out}, read again and found equal", flush=True)


if __name__ == "__main__":
    run(main)
