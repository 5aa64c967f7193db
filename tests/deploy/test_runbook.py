"""Every command in deploy/RUNBOOK.md and in the README files uses programs, flags and messages that exist."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import click
import pytest
import yaml

RunJob = Callable[..., CompletedProcess[str]]

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "captioner", "trainer")
PAGES = [
    "README.md",
    "deploy/RUNBOOK.md",
    *(
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("README.md"))
    ),
]
_FLAG = re.compile(r"(?:^|[\s\[(])(--[a-z][\w-]*)")


def _commands(page: str) -> Iterator[str]:
    """Lines of fenced blocks without their comments, and inline code."""
    text = (ROOT / page).read_text()
    for block in re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        yield from (re.sub(r"(^|\s)#.*", "", line) for line in block.splitlines())
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose))


def _jobs() -> dict[str, set[str]]:
    """Every job file used as a command, and all flags it is given."""
    found: dict[str, set[str]] = {}
    for command in (command for page in PAGES for command in _commands(page)):
        for file, rest in re.findall(r"(?<![\w/])((?:pipeline|trainer)/\w+\.py)((?: [^|;&]*)?)", command):
            found.setdefault(file, set()).update(_FLAG.findall(rest))
    return found


@pytest.mark.parametrize(("file", "flags"), _jobs().items(), ids=_jobs())
def test_a_job_has_every_flag_used_in_the_documentation(call_job: RunJob, file: str, flags: set[str]) -> None:
    if not flags:
        assert (ROOT / file).exists()
        return
    helped = call_job(file, "--help")
    assert helped.returncode == 0, helped.stderr
    assert flags <= set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", helped.stdout, re.MULTILINE))


def _ray_commands() -> Iterator[list[str]]:
    for command in (command for page in PAGES for command in _commands(page)):
        if match := re.search(r"(?:^|\s)ray ((?:job|status|get-auth-token|start)\b.*)", command):
            yield shlex.split(re.split(r" --(?: |$)", match[1])[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # when importing Ray
@pytest.mark.parametrize("words", list(_ray_commands()), ids=" ".join)
def test_ray_has_these_commands_and_flags(words: list[str]) -> None:
    from ray.scripts.scripts import cli

    command: click.Command = cli
    while isinstance(command, click.Group) and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    assert not isinstance(command, click.Group), words
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def _named(pattern: str) -> set[str]:
    return {name for page in PAGES for command in _commands(page) for name in re.findall(pattern, command)}


def test_scripts_and_manifests_exist() -> None:
    scripts = _named(r"\bsh (deploy/[\w-]+\.sh)") | _named(r"\b(deploy/[\w/-]+\.(?:sh|yaml|md|txt))\b")
    assert scripts
    assert {script for script in scripts if not (ROOT / script).exists()} == set()


def test_make_has_these_targets() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert _named(r"^make (\w+)") <= set(targets)


def test_compose_has_these_profiles_and_services() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    profiles = {profile for service in compose["services"].values() for profile in service.get("profiles", [])}
    named = {profile for listed in _named(r"COMPOSE_PROFILES=([\w,]+)") for profile in listed.split(",")}
    assert named
    assert named <= profiles
    # With --profile, Compose ignores COMPOSE_PROFILES, and with it the store.
    assert not _named(r"docker compose.* (--profile) \w")
    services = _named(r"docker compose (?:exec|stop|up --detach) (\w+)")
    assert services >= {"head", "trainer", "captioner"}
    assert services <= compose["services"].keys()


def test_prometheus_has_these_alerts() -> None:
    rules = yaml.safe_load((ROOT / "deploy/monitoring/alerts.yml").read_text())
    assert _named(r"^(Hdm\w+)$") <= {rule["alert"] for group in rules["groups"] for rule in group["rules"]}


def test_the_table_has_the_steps_of_each_stage() -> None:
    from trainer.recipe.stage_config import total_steps
    from trainer.recipe.stages import STAGES

    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| ", (ROOT / "deploy/RUNBOOK.md").read_text(), re.MULTILINE)
    expected = {name: total_steps(stage, None) for name, stage in STAGES.items() if name != "demo"}
    assert {stage: int(steps.replace(",", "")) for stage, steps in rows} == expected


def _messages() -> list[str]:
    """First column of the table "What to do when"."""
    section = (ROOT / "deploy/RUNBOOK.md").read_text().partition("## What to do when")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


def _source() -> str:
    """Source code of the programs, with strings joined that span several lines."""
    import ray

    ours = [path for folder in ("pipeline", "trainer", "captioner") for path in (ROOT / folder).rglob("*.py")]
    rays = Path(ray.__file__).parent / "_private" / "authentication" / "http_token_authentication.py"
    text = "\n".join(path.read_text() for path in [*ours, rays])
    return re.sub(r'"\s*\n\s*(?:\+ )?f?"', "", text)


def test_the_programs_print_the_messages_of_the_table() -> None:
    source = _source()
    parts = {part.strip() for message in _messages() for part in message.split("...")}
    assert len(_messages()) > 20
    assert {part for part in parts if part not in source} == set()
