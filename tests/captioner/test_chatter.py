"""Chatter is found before, within and after captions, in hundreds of answers; what only sounds like it passes."""

from itertools import chain

import pytest

from captioner.answers import check
from captioner.chatter import has_chatter, without_thinking
from captioner.requests import CaptionReason, CaptionRequest, Note

CAPTIONS = (
    "A girl with long silver hair sits on a windowsill and reads a thick book. Rain runs down the glass behind her.",
    "Two boys in school uniforms share an umbrella on a crowded street. The taller one laughs with his eyes closed.",
    "A white cat sleeps on a stack of folded blankets. Sunlight falls through the curtains onto the wooden floor.",
    "An old lighthouse stands on a cliff above a rough sea. Gulls circle over the water under heavy clouds.",
)

# What models add, by kind. Each is put before, within and after a caption.
CHATTER = {
    "offers": [
        "Let me know if you would like any changes!", "Would you like me to make it shorter?",
        "I hope this helps!", "Feel free to ask for more details.", "If you need another caption, just ask.",
        "Is there anything else I can help you with?", "Please let me know if this works for you.",
        "If you'd like, I can write a longer version.", "Happy to adjust the tone.", "Hope this is useful!",
        "Do you want me to describe the background as well?", "You can also ask for a different style.",
    ],
    "first person": [
        "I can see several details here.", "I think the girl might be waiting for somebody.",
        "I'll describe what is visible.", "I have described only what is visible.", "Let me describe the scene.",
        "Okay, let's look at the details.", "First, I need to look at the hints.", "Hmm, I should mention the light.",
        "So, I will write two sentences.", "We need to write a caption of two to five sentences.",
        "My description focuses on the visible elements.",
    ],
    "options": [
        "Option 1: A quiet scene in warm light.", "Version 2: The same scene in fewer words.",
        "Alternatively, a shorter caption could be used.", "Caption 2: A moment of calm.",
        "Here are three captions for the picture.", "Short version: A quiet scene.", "Final answer: A quiet scene.",
        "Another option is to leave out the weather.", "Revised caption: A quiet scene.",
    ],
    "notes": [
        "Note: the tags mention a hat, which is not visible.", "(Note: the character's name is not certain.)",
        "The provided tags suggest a rainy day.", "Based on the tags, this is a fan work.",
        "This is consistent with the given hints.", "Disclaimer: colours may differ.",
        "According to the tags, the hair is silver.", "The hint about a sword is not mentioned in the tags.",
        "This caption follows the instructions.", "The description avoids names that were not given.",
        "As requested, no names are used.", "Per your instructions, the caption is short.",
        "Tags: 1girl, solo, long hair.", "Word count: 24.", "The user asks for two sentences.",
    ],
    "apologies": [
        "I'm sorry, but I can't identify the person.", "Sorry, the rest is unclear.",
        "Unfortunately, the text on the sign cannot be read.", "I cannot help with identifying people.",
        "I apologize for any mistakes.", "As an AI, I have no opinion on the style.",
        "However, I am unable to name the character.",
    ],
    "no picture": [
        "The image could not be loaded.", "I don't see an image in your message.", "The image failed to load.",
        "No image was attached.", "Unable to load the image.", "There is no image to describe.",
        "The file appears to be corrupted.", "Error: could not open image.", "The link you provided is broken.",
        "Please upload the picture again.",
    ],
}  # fmt: skip
TOKENS = [
    "<think>", "</think>", "<thinking>", "<reasoning>", "◁think▷", "<start_of_turn>model", "<end_of_turn>", "<bos>",
    "<eos>", "[EOS]", "<|im_end|>", "<｜end▁of▁sentence｜>", "<extra_id_0>", "<unused12>", "<0x0A>", "<answer>",
    "<caption>", "</caption>", "[/INST]", "<tool_call>", "<image_soft_token>", "\nAssistant: ", "\n### User: ",
]  # fmt: skip

# Captions that sound like chatter.
TRICKY = [
    'A girl holds up a sign that says "I can\'t, sorry!" in front of a closed door.',
    "A small paper note with a heart on it is pinned to the wall beside her bed.",
    "A dog with two metal tags on its collar waits beside a boy in a raincoat.",
    "A jacket with a price tag hangs on the wall, and a girl counts the coins in her hand.",
    "The first of the two girls points at the second, who hides behind a large fan.",
    "In the background you can see the roofs of a small town under snow.",
    "A framed picture of a ship hangs above the fireplace, and a man in a coat looks at it.",
    "The image on the screen behind her shows a map of an island in bright colours.",
    'A speech bubble reads "Let me know if you need help" above a smiling shop clerk.',
    "A robot with a cracked visor sits at a desk and seems to think about the cards in its hand.",
    "Music notes float around a boy who plays the violin on a stage with red curtains.",
    "A woman in an apron offers a plate of cookies to two children at the door.",
    "Several options for lunch are drawn on a chalkboard beside the counter of the cafe.",
    "He looks unable to lift the heavy box, and his friends laugh behind him.",
    "A torn photograph lies on the floor, its corner missing, next to a broken vase.",
    "An open file cabinet stands behind the detective, who holds a magnifying glass.",
    "The keyboard player wears headphones, and her fingers rest on the white keys.",
    "A girl in a certain pose, one arm raised and the other on her hip, stands on a pedestal.",
    "Here a river bends around the village, and smoke rises from the chimneys.",
    "So many lanterns hang over the street that the sky above it glows orange.",
    "Next to the fountain a musician tunes his guitar while pigeons walk around him.",
    "No other person is in the corridor, and the lights at its end are off.",
    "A user interface with red warnings floats in front of the pilot's helmet.",
    "Let down over one shoulder, her hair reaches the floor and shines in the light.",
    "The answer sheet on his desk is empty, and the clock on the wall shows noon.",
    "If the moon were any larger, it would fill the window behind the sleeping fox.",
    "A heart-shaped box with a gift tag lies in front of a girl in a red coat.",
    "Wait staff in black vests carry trays through a dining hall full of guests.",
    "A description board beside the statue is covered with ivy and small flowers.",
    "Certain that nobody watches, the boy feeds his bread to a stray dog.",
]
# Ordinary sentences, to be combined.
SUBJECTS = [
    "A girl with short brown hair leans on the railing of a bridge", "Three friends sit around a campfire on the beach",
    "A knight in dented armour kneels in a field of poppies", "A black dragon coils around the top of a stone tower",
    "A boy in a yellow raincoat jumps into a puddle", "An old man feeds pigeons on a bench in the park",
    "A witch with a wide hat flies over a sleeping town", "A mermaid rests on a rock in shallow water",
    "Two foxes play in deep snow between birch trees", "A red train crosses a long viaduct in the evening",
    "A girl in a kimono holds a paper lantern", "A spaceship lands on a plain of violet sand",
]  # fmt: skip
REST = [
    "while the sun sets behind her. Long shadows fall over the ground.",
    "under a sky full of stars. Nobody else is near.",
    "in soft morning light. Dew hangs on the grass.", "as leaves drift past. The colours are muted.",
    "beneath a large full moon. A light wind moves the trees.",
    "in front of distant mountains. Clouds hide their peaks.",
    "at noon. The shadows are short and sharp.", "during a storm. Lightning splits the dark clouds.",
    "in late autumn. The last leaves cling to the branches.", "by the water. Small waves reach the shore.",
    "in thick fog. Only outlines are visible farther away.", "on a quiet evening. Lights shine in the windows.",
    "beside a ruined wall. Moss covers the stones.", "close to the viewer. The background is blurred.",
]  # fmt: skip
GOOD = [*TRICKY, *(f"{subject} {rest}" for subject in SUBJECTS for rest in REST), *CAPTIONS]


def with_chatter(said: str) -> list[str]:
    first, second = CAPTIONS[len(said) % len(CAPTIONS)].split(". ")
    return [f"{said} {first}. {second}", f"{first}. {said} {second}", f"{first}. {second} {said}"]


BAD = [answer for said in chain(*CHATTER.values()) for answer in with_chatter(said)]
BAD += [answer for token in TOKENS for answer in with_chatter(token)]


def accepted(answer: str) -> bool:
    return check(answer, "stop", CaptionRequest("danbooru:1", {})).reason is None


def test_the_answers_are_many_and_different() -> None:
    assert len(set(GOOD)) == len(GOOD) >= 200
    assert len(set(BAD)) == len(BAD) >= 200


def test_at_most_one_in_a_hundred_good_answers_is_refused() -> None:
    refused = [answer for answer in GOOD if not accepted(answer)]
    assert len(refused) <= len(GOOD) // 100, refused


def test_at_most_two_in_a_hundred_bad_answers_are_accepted() -> None:
    passed = [answer for answer in BAD if accepted(answer)]
    assert len(passed) <= 2 * len(BAD) // 100, passed


@pytest.mark.parametrize("caption", TRICKY)
def test_a_caption_that_only_sounds_like_chatter_passes(caption: str) -> None:
    assert not has_chatter(caption)


def test_closed_thinking_is_removed_and_noted_and_open_thinking_is_refused() -> None:
    answer = check(
        f"<think>The girl has silver hair.\nI should say so.</think>\n{CAPTIONS[0]}", "stop", CaptionRequest("a", {})
    )
    assert answer.caption == CAPTIONS[0]
    assert answer.notes == (Note.THINKING,)
    assert without_thinking("a ◁think▷ b ◁/think▷ c") == "a c"
    for text in (f"<think>The girl has silver hair. {CAPTIONS[0]}", f"{CAPTIONS[0]}</think>"):
        assert check(text, "stop", CaptionRequest("a", {})).reason == CaptionReason.TOKENS


@pytest.mark.parametrize(
    "text", ["1. A girl reads a book. 2. A girl sits at a window and reads.", "- A quiet room.\n- A cat sleeps."]
)
def test_a_list_of_answers_is_chatter(text: str) -> None:
    assert has_chatter(text)
