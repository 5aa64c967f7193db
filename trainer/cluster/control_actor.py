"""The actor through which driver and workers communicate. Imports no torch, because its process imports this file."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.training.metrics import Line


class ControlActor:
    """Runs beside the driver and survives restarts of the workers."""

    def __init__(self) -> None:
        self.messages: list[Line | str] = []  # metrics or warnings
        self.stops = False
        self.failure = ""
        self.steps = 0

    def add_message(self, message: "Line | str") -> None:
        self.messages.append(message)

    def messages_from(self, number: int) -> tuple[list["Line | str"], str]:
        """The messages after the first `number`, and the reason why the job failed, if it did."""
        return self.messages[number:], self.failure

    def request_stop(self) -> None:
        self.stops = True

    def stop_requested(self) -> bool:
        return self.stops

    def fail(self, why: str) -> None:
        """Marks the job as failed, so that restarted workers end at once."""
        self.failure = self.failure or why

    def finish(self, steps: int) -> None:
        self.steps = steps

    def steps_taken(self) -> int:
        return self.steps
