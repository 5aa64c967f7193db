"""JOB: a dataset -> one HTML page with counts, histograms, pictures that were kept and rejected, and tags."""

import shlex
import time
from dataclasses import dataclass

from pipeline.core.errors import UsageError
from pipeline.core.jobs import Parser, default_dataset, run
from pipeline.storage.shards import Store


@dataclass(frozen=True, kw_only=True)
class ReportJob:
    dataset: str
    out: str
    captions: str  # folder


def parse_args() -> ReportJob:
    parser = Parser(prog="report.py", description=__doc__)
    parser.add_argument(
        "--dataset", default=default_dataset(), metavar="ROOT",
        help="folder or s3:// prefix of the dataset; default: $HDM_DATASET, then ./dataset",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="path or s3:// URL of the page; default: ROOT/report.html")
    parser.add_argument(
        "--captions", metavar="NAME", help="show captions/NAME/, written by caption.py --name NAME; default: captions/"
    )
    args = parser.parse_args()
    return ReportJob(
        dataset=args.dataset,
        out=args.out or Store(args.dataset).path("report.html"),
        captions=f"captions/{args.captions}" if args.captions else "captions",
    )


def main() -> None:
    job = parse_args()
    started = time.time()
    dataset = Store(job.dataset)
    if not dataset.shards("images") and not dataset.shards("rejected"):
        command = f"python pipeline/ingest.py --raw PATH --dataset {shlex.quote(job.dataset)}"
        raise UsageError(f"{job.dataset} has no images; run: {command}")
    if job.captions != "captions" and not dataset.shards(job.captions):
        named = ", ".join(name for name in dataset.folders("captions") if name != "partial") or "none"
        raise UsageError(f"{job.dataset} has no {job.captions}/; --captions takes one of: {named}")
    folder, _, file = Store(job.out).root.rpartition("/")
    # Imported here because they take a second, which --help should not cost.
    from pipeline.reporting.findings import survey
    from pipeline.reporting.report_page import funnel, render

    findings = survey(dataset, job.captions)
    page = render(findings).encode()
    Store(folder).write(file, page)
    for step in funnel(findings):
        print(f"  {step.title}: {step.rows:,}" + (f"; next: {step.command}" if step.command else ""))
    print(f"report: {len(page) / 1e6:.1f} MB in {time.time() - started:.1f} s, in {job.out}", flush=True)


if __name__ == "__main__":
    run(main)
