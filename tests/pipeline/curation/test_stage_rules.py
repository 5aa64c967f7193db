"""The rules of the stages, and files that override them."""

from pathlib import Path

import pytest

from pipeline.core.errors import UsageError
from pipeline.curation.stage_rules import RULES, ScoreRange, override, stage_rules, tag_rules, with_lists
from pipeline.tagging.tags import TagReader

EXAMPLE = Path(__file__).parents[3] / "pipeline" / "curation" / "rules" / "example.toml"


def overridden(tmp_path: Path, text: str, stage: str = "512") -> object:
    (tmp_path / "mine.toml").write_text(text)
    return override(RULES[stage], tmp_path / "mine.toml")


def test_the_1024_stage_has_both_ends_of_the_quality_scale_as_in_the_report() -> None:
    rules = RULES["1024"]
    assert set(rules.quality) == {"masterpiece", "best quality", "low quality", "worst quality"}
    assert set(rules.eras) == {"newest", "recent", "old"}


def test_a_file_overrides_the_fields_that_it_sets_and_preset_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'min_side = 700\nmax_aspect = 2\nratings = ["general"]\npreset = "animagine31"\n'
        '[scores."aesthetic.very.good"]\nmin = 0.5\n[scores."mark.none"]\nmax = 1\n'
    )
    rules = stage_rules("512", file=str(path))
    assert (rules.min_side, rules.max_aspect, rules.ratings, rules.preset) == (700, 2.0, ("general",), "animagine31")
    assert rules.scores == {"aesthetic.very.good": ScoreRange(min=0.5), "mark.none": ScoreRange(max=1)}
    assert rules.excluded == RULES["512"].excluded
    assert stage_rules("512", "noobai", str(path)).preset == "noobai"
    assert stage_rules("512") == RULES["512"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("min_sides = 5", "no rule is called min_sides; known are min_side, max_aspect, sources"),
        ('min_side = "5"', "min_side = '5' must be a whole number; known rules are min_side, "),
        ("min_side = true", "a whole number"),
        ("min_side = 5.5", "a whole number"),
        ('max_aspect = "wide"', "max_aspect = 'wide' must be a number"),
        ('ratings = "general"', "a list of texts"),
        ("ratings = [1]", "a list of texts"),
        ('ratings = ["safe"]', "ratings cannot be 'safe'; known are general, sensitive, questionable, explicit"),
        ('preset = "kohaku2"', "known are kohaku, animagine31, noobai"),
        ('implied = "both"', "known are add, drop, keep"),
        ('quality = ["master piece"]', "known are masterpiece"),
        ('eras = ["new"]', "known are old, early, mid, recent, newest"),
        ("scores = 5", "is no range of a score; write [scores."),
        ("[scores.aesthetic]\nmin = 0.5", "write [scores."),
        ('[scores."a.b"]\nminimum = 0.5', "write [scores."),
        ('[scores."a.b"]\nmin = "high"', "write [scores."),
        ("min_side = -5", "min_side = -5 must be a number from 0 on"),
        ("max_aspect = 0.5", "max_aspect = 0.5 must be a number from 1 on"),
        ("max_aspect = nan", "from 1 on"),
        ("max_aspect = inf", "from 1 on"),
        ('[scores."a.b"]\nmin = nan', "write [scores."),
        ('[scores."a.b"]\nmin = 2\nmax = 1.5', "its min must not be above its max"),
        ("min_side = ", "give a TOML file such as"),
    ],
)
def test_an_invalid_rule_is_refused_in_one_line(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(UsageError) as error:
        overridden(tmp_path, text)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml"):
        override(RULES["512"], tmp_path / "nowhere.toml")
    (tmp_path / "mine.toml").write_text('blacklist = "nowhere.txt"')
    with pytest.raises(UsageError, match=r"blacklist = 'nowhere\.txt'"):
        tag_rules(override(RULES["512"], tmp_path / "mine.toml"))


def test_files_beside_the_rules_file_precede_shipped_files_and_an_empty_name_means_none(tmp_path: Path) -> None:
    (tmp_path / "aliases.txt").write_text("old -> new\n")
    (tmp_path / "people.txt").write_text("# ours\nA\nb_c\n")
    (tmp_path / "mine.toml").write_text(
        'aliases = "aliases.txt"\nimplications = ""\nartists = ["A"]\nartists_file = "people.txt"'
    )
    rules = override(RULES["512"], tmp_path / "mine.toml")
    tags = tag_rules(rules)
    assert (tags.aliases, tags.implications) == ({"old": "new"}, {})
    assert tags.blacklist == tag_rules(RULES["512"]).blacklist
    assert with_lists(rules).artists == ("A", "b_c")


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("aliases", "a -> b\nb -> a", "a circle: a -> b -> a"),
        ("aliases", "a -> b, c", "a has 2 names, b, c; keep one"),
        ("aliases", "a b", "'a b' is not of the form"),
        ("implications", "a -> a", "a implies itself"),
    ],
)
def test_wrong_tag_files_are_refused(tmp_path: Path, file: str, text: str, named: str) -> None:
    (tmp_path / "tags.txt").write_text(text)
    (tmp_path / "mine.toml").write_text(f'{file} = "tags.txt"')
    with pytest.raises(UsageError, match=named):
        tag_rules(override(RULES["512"], tmp_path / "mine.toml"))


def test_the_shipped_example_and_tag_files_can_be_used() -> None:
    rules = override(RULES["512"], EXAMPLE)
    assert rules.artists
    reader = TagReader(tag_rules(rules))
    parts = reader.text_parts(
        {"general": ["absurdly_long_hair", "gray_eyes", "女の子", "tagme"], "meta": ["commission"]}
    )
    assert parts["special"] == ["1girl"]
    assert parts["general"] == ["absurdly long hair", "very long hair", "long hair", "grey eyes"]
    assert parts["meta"] == []


@pytest.mark.parametrize("stage", RULES)
def test_every_stage_has_tag_rules(stage: str) -> None:
    assert tag_rules(RULES[stage]).aliases
