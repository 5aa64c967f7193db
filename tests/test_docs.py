"""The README files: short, one in each package folder, with links that lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "captioner", "trainer")
FOLDERS = sorted({path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")})
PAGES = [ROOT / "README.md", ROOT / "deploy" / "RUNBOOK.md", *sorted(ROOT.glob("*/**/README.md"))]
PAGES = [page for page in PAGES if page.relative_to(ROOT).parts[0] in ("README.md", "deploy", *PACKAGES)]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_first_readme_has_at_most_130_lines() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= 130


@pytest.mark.parametrize("folder", FOLDERS, ids=_name)
def test_a_package_folder_has_a_readme_of_one_screen(folder: Path) -> None:
    assert (folder / "README.md").read_text().count("\n") <= 60


@pytest.mark.parametrize("folder", FOLDERS, ids=_name)
def test_the_readme_of_a_folder_names_its_files(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert [name for name in files if name not in text] == []
    # ... and no file of its own that is not there.
    named = set(re.findall(r"^[-|*\s`]*([a-z0-9_]+\.py)`", text, re.MULTILINE))
    assert named <= set(files)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target
