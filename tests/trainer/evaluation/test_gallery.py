"""The loss curve of the page."""

import json
from pathlib import Path

from trainer.evaluation.gallery import _loss_curve


def _metrics(run: Path, losses: list[float]) -> None:
    lines = [json.dumps({"step": 10 * (number + 1), "loss": loss}) for number, loss in enumerate(losses)]
    (run / "metrics.jsonl").write_text("\n".join(lines))


def test_the_curve_spans_all_steps_and_its_maximum_is_the_top(tmp_path: Path) -> None:
    _metrics(tmp_path, [2.0, 1.0, 0.5])
    assert _loss_curve(str(tmp_path)) == "0.0,0.0 300.0,100.0 600.0,150.0"


def test_fewer_than_two_lines_of_metrics_have_no_curve(tmp_path: Path) -> None:
    assert _loss_curve(str(tmp_path)) == ""
    _metrics(tmp_path, [2.0])
    assert _loss_curve(str(tmp_path)) == ""
