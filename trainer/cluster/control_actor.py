"""What driver and workers of a training tell each other. A file of its own that needs no torch: whoever starts the
actor imports its file, and all that launch.py imports is five seconds of a core."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.training.metrics import Line


class Board:
    """An actor beside the driver. It outlives workers that are started again."""

    def __init__(self) -> None:
        self.lines: list[Line | str] = []  # figures, or a remark
        self.stops = False
        self.failure = ""
        self.steps = 0

    def tell(self, line: "Line | str") -> None:
        self.lines.append(line)

    def since(self, number: int) -> tuple[list["Line | str"], str]:
        """What was told after the first `number`, and why the workers gave up."""
        return self.lines[number:], self.failure

    def stop(self) -> None:
        self.stops = True

    def is_stopping(self) -> bool:
        return self.stops

    def give_up(self, why: str) -> None:
        """Workers that are started again need not try."""
        self.failure = self.failure or why

    def end(self, steps: int) -> None:
        self.steps = steps

    def ended_at(self) -> int:
        return self.steps
