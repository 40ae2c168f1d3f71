"""Shapes of dialogs, chat templates and loss masks: expectations written by hand, token by token."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_telechat.data.chat.dialogs import BadDialog, Dialog, Turn, parse_dialog
from megatron_telechat.data.chat.template import ANSWER, ChatVocabulary, learned, render, token_texts
from megatron_telechat.errors import ConfigError
from tests.data.chat_material import SPECIAL, letters_tokenizer, single
from tests.data.material import VOCAB, sentencepiece_tokenizer

U, B, E, S = "<_user>", "<_bot>", "<_end>", "<_system>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return letters_tokenizer(tmp_path_factory.mktemp("letters"))


def tokens_of(line, template, tokenizer, system=None):
    vocabulary = ChatVocabulary(None, tokenizer, template, VOCAB)
    return vocabulary, *vocabulary.encode([render(parse_dialog(line), template, system)])[0]


def spelled(vocabulary, tokens) -> list[str]:
    return token_texts(vocabulary.tokenizer, tokens.tolist())


def expected(*pieces) -> tuple[list[str], list[bool]]:
    """Pieces in order; one in square brackets is learned. ("[yo]" → two learned letters)."""
    words, mask = [], []
    for piece in pieces:
        on = piece.startswith("[")
        text = piece[1:-1] if on else piece
        found = [text] if text in SPECIAL else list(text)
        words += found
        mask += [on] * len(found)
    return words, mask


SINGLE = single("2+2?", "4", "Be exact.")
MULTI = {
    "dialog": [
        {"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"},
        {"role": "user", "content": "bye"}, {"role": "bot", "content": "ok"},
    ]
}  # fmt: skip
OLD_MULTI = {"input": f"{U}hi{B}yo{U}bye", "output": "ok"}
CALL = '{"name": "now", "arguments": {}}'
TOOL = {
    "messages": [
        {"role": "system", "content": "T"},
        {"role": "user", "content": "time?"},
        {
            "role": "assistant",
            "content": "see",
            "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "12"},
        {"role": "tool", "content": "13"},
        {"role": "assistant", "content": "noon"},
    ]
}
PUBLISHED_TOOL = {
    "system": "T",
    "dialog": [
        {"role": "user", "content": "time?"},
        {"role": "bot", "content": f"see\n<tool_call>\n{CALL}\n</tool_call>"},
        {"role": "user", "content": "<tool_response>\n12\n</tool_response>\n<tool_response>\n13\n</tool_response>"},
        {"role": "bot", "content": "noon"},
    ],
    "multiturn": True,
    "tool": True,
}
REPLY = ("<tool_response>", "\n12\n", "</tool_response>", "\n", "<tool_response>", "\n13\n", "</tool_response>")
CALLED = ("[see\n]", "[<tool_call>]", f"[\n{CALL}\n]", "[</tool_call>]")

FIXTURES = {
    "single turn, telechat": (
        SINGLE, "telechat2", "telechat",
        expected(S, "Be exact.", "\n", f"[{U}]", "2+2?", f"[{B}]", "[4]", f"[{E}]", "\n"),
    ),
    "single turn, answer": (
        SINGLE, "telechat2", "answer",
        expected(S, "Be exact.", "\n", U, "2+2?", B, "[4]", f"[{E}]", "\n"),
    ),
    "several turns, telechat": (
        MULTI, "telechat2", "telechat",
        expected(f"[{U}]", "hi", f"[{B}]", "[yo]", f"[{E}]", "\n", f"[{U}]", "bye", f"[{B}]", "[ok]", f"[{E}]", "\n"),
    ),
    "several turns, answer": (
        MULTI, "telechat2", "answer",
        expected(U, "hi", B, "[yo]", f"[{E}]", "\n", U, "bye", B, "[ok]", f"[{E}]", "\n"),
    ),
    "first shape, first template, telechat": (
        OLD_MULTI, "telechat", "telechat",
        expected(f"[{U}]", "hi", f"[{B}]", "[yo]", f"[{E}]", f"[{U}]", "bye", f"[{B}]", "[ok]", f"[{E}]"),
    ),
    "first shape, 115B, answer": (
        OLD_MULTI, "telechat2-115b", "answer",
        expected("<_start>", U, "hi", B, "[yo]", f"[{E}]", U, "bye", B, "[ok]", f"[{E}]"),
    ),
    "tools, telechat": (
        TOOL, "telechat2", "telechat",
        expected(S, "T", "\n", f"[{U}]", "time?", f"[{B}]", *CALLED, f"[{E}]", "\n",
                 f"[{U}]", *REPLY, f"[{B}]", "[noon]", f"[{E}]", "\n"),
    ),
    "tools as published, answer": (
        PUBLISHED_TOOL, "telechat2", "answer",
        expected(S, "T", "\n", U, "time?", B, *CALLED, f"[{E}]", "\n", U, *REPLY, B, "[noon]", f"[{E}]", "\n"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXTURES)
def test_tokens_and_masks_written_by_hand(name, tokenizer):
    line, template, convention, (words, mask) = FIXTURES[name]
    vocabulary, tokens, roles = tokens_of(line, template, tokenizer)
    assert spelled(vocabulary, tokens) == words
    assert learned(roles, convention).tolist() == mask


def published_mask(tokens: np.ndarray) -> np.ndarray:
    """The rule of the published scripts, on token ids: each <_bot> to its <_end>, and each <_user>."""
    mask = np.zeros(tokens.size, bool)
    users, bots, ends = (np.flatnonzero(tokens == SPECIAL.index(name)).tolist() for name in (U, B, E))
    if len(ends) + 1 == len(bots):
        ends.append(tokens.size)
    for user, bot, end in zip(users, bots, ends, strict=True):
        mask[bot : end + 1] = True
        mask[user] = True
    return mask


@pytest.mark.parametrize("line", [SINGLE, MULTI, OLD_MULTI, TOOL, PUBLISHED_TOOL])
@pytest.mark.parametrize("cut", [None, 1, 2, 4])
def test_the_telechat_convention_is_the_published_rule_also_where_the_end_is_cut(line, cut, tokenizer):
    template = "telechat" if line is OLD_MULTI else "telechat2"
    _, tokens, roles = tokens_of(line, template, tokenizer)
    end = tokens.size - cut if cut else tokens.size
    # The scripts mask the whole dialog and cut it then; one that was cut before is masked to its end.
    assert learned(roles[:end], "telechat").tolist() == published_mask(tokens)[:end].tolist()
    if cut in (1, 2):
        assert learned(roles[:end], "telechat").tolist() == published_mask(tokens[:end]).tolist()


def test_the_same_dialog_in_all_shapes_is_the_same():
    assert (
        parse_dialog(OLD_MULTI)
        == parse_dialog(MULTI)
        == Dialog((Turn("user", "hi"), Turn("bot", "yo"), Turn("user", "bye"), Turn("bot", "ok")))
    )
    assert parse_dialog(TOOL) == parse_dialog(PUBLISHED_TOOL)
    assert parse_dialog({"input": "a", "output": f"{B}b"}) == parse_dialog({"input": f"{U}a", "output": "b"})


def test_a_default_system_text_goes_where_there_is_none(tokenizer):
    vocabulary, tokens, _ = tokens_of(MULTI, "telechat2", tokenizer, "D")
    assert spelled(vocabulary, tokens)[:3] == [S, "D", "\n"]
    vocabulary, tokens, _ = tokens_of(SINGLE, "telechat2", tokenizer, "D")
    assert "D" not in spelled(vocabulary, tokens)


def test_a_template_without_a_place_for_the_system_text_refuses_it(tokenizer):
    with pytest.raises(BadDialog, match="no place"):
        tokens_of(SINGLE, "telechat", tokenizer)


def test_names_of_special_tokens_in_a_text_stay_text(tokenizer):
    """A user who types <_bot> must not end the user's turn."""
    line = single(f"what is {B}?", f"a token, like {E}")
    vocabulary, tokens, roles = tokens_of(line, "telechat2", tokenizer)
    assert [int((tokens == SPECIAL.index(name)).sum()) for name in (U, B, E)] == [1, 1, 1]
    assert int((roles == ANSWER).sum()) == len(f"a token, like {E}") + 1


def test_a_tokenizer_without_tags_of_tools_writes_them_as_text(tmp_path):
    plain = letters_tokenizer(tmp_path, without=SPECIAL[9:])
    vocabulary, tokens, roles = tokens_of(TOOL, "telechat2", plain)
    text = "".join(spelled(vocabulary, tokens))
    assert f"see\n<tool_call>\n{CALL}\n</tool_call>" in text and not np.isin(tokens, range(9, 13)).any()
    assert int((roles == ANSWER).sum()) == len(f"see\n<tool_call>\n{CALL}\n</tool_call>") + 1 + len("noon") + 1


def test_labels_that_the_configuration_gives_to_control_pieces_are_used(tmp_path):
    plain = letters_tokenizer(tmp_path, without=SPECIAL[9:])
    labels = {str(number): {"content": SPECIAL[number]} for number in range(9, 13)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": labels}))
    _, tokens, _ = tokens_of(TOOL, "telechat2", plain)
    assert (tokens == 9).sum() == 1 and (tokens == 11).sum() == 2


def test_a_sentencepiece_model_of_telechats_kind(tmp_path):
    file = sentencepiece_tokenizer(tmp_path / "tokenizer.model")
    vocabulary, tokens, roles = tokens_of(MULTI, "telechat", str(file))
    backend = vocabulary.tokenizer.backend
    assert [backend.IdToPiece(int(t)) for t in tokens if int(t) < 6] == [U, B, E, U, B, E]
    assert vocabulary.tokenizer.decode([int(t) for t in tokens[roles == ANSWER]]).replace(E, "") == "yook"
    vocabulary, tokens, _ = tokens_of(single(f"say {B}", "no"), "telechat", str(file))
    assert int((tokens == vocabulary.ids[B]).sum()) == 1


def test_a_tokenizer_that_lacks_the_roles_is_refused(tmp_path):
    bare = letters_tokenizer(tmp_path, without=("<_bot>", "<_system>"))
    with pytest.raises(ConfigError, match="no <_system>, <_bot>, which the template telechat2 needs"):
        ChatVocabulary(None, bare, "telechat2", VOCAB)
    with pytest.raises(ConfigError, match="no <_user>"):
        ChatVocabulary("NullTokenizer", None, "telechat", VOCAB)


def test_the_text_of_tokens_shows_a_character_once(tmp_path, tokenizer):
    vocabulary, tokens, _ = tokens_of(single("几?", "é"), "telechat2", tokenizer)
    assert spelled(vocabulary, tokens) == [U, "·", "·", "几", "?", B, "·", "é", E, "\n"]
    pieces = ChatVocabulary(None, str(sentencepiece_tokenizer(tmp_path / "tokenizer.model")), "telechat", VOCAB)
    ids = pieces.tokenizer.encode("The tide é 春")
    assert "".join(token_texts(pieces.tokenizer, ids)).replace("·", "") == "The tide é 春"


USER, BOT = {"role": "user", "content": "q"}, {"role": "bot", "content": "a"}
BAD = {
    "a list": ([1], "not a list"),
    "null": (None, "not null"),
    "no shape": ({"text": "x"}, "none of the keys"),
    "input alone": ({"input": "x"}, "none of the keys"),
    "turns that are none": ({"dialog": "x"}, "not a list of turns"),
    "no turns": ({"dialog": []}, "not a list of turns"),
    "a turn that is none": ({"dialog": ["x"]}, r"dialog\[0\] is not an object"),
    "an unknown role": ({"dialog": [{"role": "robot", "content": "x"}]}, "role 'robot'"),
    "a role that is no text": ({"dialog": [{"role": [], "content": "x"}]}, r"role \[\]"),
    "content null": ({"dialog": [USER, {"role": "bot", "content": None}]}, r"dialog\[1\].content is null"),
    "content a number": ({"dialog": [USER, {"role": "bot", "content": 4}]}, "is a number"),
    "no content": ({"dialog": [USER, {"role": "bot"}]}, "content is null"),
    "the user last": ({"dialog": [USER, BOT, USER]}, "last turn is not the bot's"),
    "the bot first": ({"dialog": [BOT]}, "turn 1 is the bot's, but the user's turn is expected"),
    "two questions": ({"dialog": [USER, USER, BOT]}, "turn 2 is the user's, but the bot's turn is expected"),
    "two answers": ({"dialog": [USER, BOT, BOT]}, "turn 3 is the bot's, but the user's turn is expected"),
    "a late system": ({"dialog": [USER, {"role": "system", "content": "x"}, BOT]}, "does not come first"),
    "two systems": ({"system": "a", "dialog": [{"role": "system", "content": "x"}, USER, BOT]}, "second system"),
    "system a number": ({"system": 3, "dialog": [USER, BOT]}, "system is a number"),
    "an answer of nobody's tool": ({"dialog": [{"role": "tool", "content": "x"}, BOT]}, "has not called it"),
    "tools apart": ({"tools": [{}], "messages": [USER, BOT]}, "into the system text"),
    "a call without a name": ({"messages": [USER, {**BOT, "tool_calls": [{}]}]}, "without a name"),
    "calls that are no list": ({"messages": [USER, {**BOT, "tool_calls": "x"}]}, "not a list"),
    "a call with bad arguments": (
        {"messages": [USER, {**BOT, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
        "not JSON",
    ),
    "a user who calls": ({"messages": [{**USER, "tool_calls": [{"name": "f"}]}, BOT]}, "only the bot"),
    "half a surrogate": ({"dialog": [USER, {"role": "bot", "content": "\ud83d"}]}, "surrogate"),
    "input ends with an answer": ({"input": f"{U}a{B}b", "output": "c"}, "turn 1 is not"),
    "input lacks an answer": ({"input": f"{U}a{U}b", "output": "c"}, "turn 1 is not"),
    "an end in the output": ({"input": "a", "output": f"b{E}"}, "not a turn border"),
    "a turn in the output": ({"input": "a", "output": f"b{U}c{B}d"}, "not a turn border"),
    "output null": ({"input": "a", "output": None}, "output is null"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_dialog_is_refused_by_name(name):
    line, message = BAD[name]
    with pytest.raises(BadDialog, match=message):
        parse_dialog(line)
