"""Results of an evaluation, and how they are printed."""

from dataclasses import dataclass

from trainer.evaluation.camera_consistency import CameraConsistency
from trainer.evaluation.coloured_objects import Agreement, ShapeAgreement
from trainer.evaluation.fidelity import ENOUGH_FOR_FID, Fidelity
from trainer.evaluation.tagger import TagAgreement


@dataclass(frozen=True)
class SamplingSpeed:
    """Measured on the pictures that were drawn last; other work on the machine lowers it."""

    pictures: int
    pictures_per_second: float
    seconds_per_step: float  # of a batch, including its share of decoding
    at_once: int  # size of the largest batch


@dataclass(frozen=True)
class Evaluation:
    """Field names are keys of evaluation.json."""

    pictures: int
    held_out: int  # pictures whose text was not trained on
    speed: SamplingSpeed | None  # None if nothing was drawn and there is no earlier record
    camera: CameraConsistency
    colour: Agreement | None
    shape: ShapeAgreement | None
    tags: TagAgreement | None
    fidelity: Fidelity | None


def report_lines(found: Evaluation) -> list[str]:
    """One line per measure."""
    speed = "not measured, because all pictures were there already"
    if found.speed:
        speed = f"{found.speed.pictures_per_second:.3g} pictures/s, {found.speed.seconds_per_step:.3g} s per step of a "
        speed += f"batch of up to {found.speed.at_once}"
    lines = [f"pictures: {found.pictures}, {found.held_out} of them of held-out texts", f"speed: {speed}"]
    lines += measure_lines(found.camera, found.colour, found.shape)
    if found.tags:
        lines.append(f"tags of the text found: {_percent(found.tags.share)} (chance {_percent(found.tags.chance)})")
    if found.fidelity:
        lines.append(
            f"FID {found.fidelity.fid:.3f}, KID {found.fidelity.kid:.5f} ± {found.fidelity.kid_spread:.5f}: "
            f"{found.fidelity.drawn} drawn pictures, {found.fidelity.real} of the selection"
        )
    return lines + [f"note: {note}" for note in notes(found)]


def measure_lines(camera: CameraConsistency, colour: Agreement | None, shape: ShapeAgreement | None) -> list[str]:
    lines = [
        f"camera: content moves {camera.ratio:.2f} of the expected distance (median of {camera.moves} shifts), "
        f"{camera.within_40_percent:.0%} within 40%, {camera.right_direction:.0%} in the right direction (chance 50%)"
    ]
    if colour:
        lines.append(_count("main colour as prompted", colour))
    if shape:
        judge = f"the classifier is right on {shape.judge:.0%} of the selection's pictures"
        lines.append(f"{_count('shape as prompted', shape)}; {judge}")
    return lines


def notes(found: Evaluation) -> list[str]:
    """Warnings about the measures."""
    if found.fidelity and (fewest := min(found.fidelity.real, found.fidelity.drawn)) < ENOUGH_FOR_FID:
        return [
            f"FID of {fewest} pictures, fewer than {ENOUGH_FOR_FID}: its covariance is singular and FID comes out far "
            "too high. Compare it only with FIDs of the same number of pictures, or use KID."
        ]
    return []


def _count(what: str, found: Agreement) -> str:
    return f"{what}: {found.hits} of {found.total} = {found.share:.0%} (chance {found.chance:.1%})"


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.0%}"
