"""Tokenizer files of an export: transformers opens them, and its chat template gives the tokens of the training."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_telechat.checkpoint.manifest import MANIFEST, read_manifest
from megatron_telechat.checkpoint.meaning import TOKENIZER
from megatron_telechat.config.yaml_io import dump_run_config, run_config_from_yaml
from megatron_telechat.data.chat.dialogs import parse_dialog
from megatron_telechat.data.chat.template import TEMPLATES, ChatVocabulary, render
from megatron_telechat.data.tokenizers import build_tokenizer, tokenizer_identity
from megatron_telechat.errors import ConfigError
from megatron_telechat.huggingface import export_hf, import_hf
from megatron_telechat.huggingface.chat import template_of_folder
from megatron_telechat.huggingface.chat_templates import chat_template, template_of
from tests.data.chat_material import letters_tokenizer
from tests.data.material import TEXTS, VOCAB
from tests.huggingface.folders import telechat_config, telechat_shapes, write_folder
from tests.huggingface.test_exported_model import ask, without_import

pytestmark = pytest.mark.heavy


def dialog(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    turns = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    return [*([] if system is None else [{"role": "system", "content": system}]), *turns]


PLAIN = [
    dialog("2+2?", "4"),
    dialog("春眠不觉晓，", "处处闻啼鸟。", "and\nthen? ", " 夜来风雨声，\n花落知多少。"),
    dialog("a", "", "", "b"),
]
TOOLS = [
    {"role": "system", "content": "tools: <tool_call>{}</tool_call>."},
    {"role": "user", "content": "time?"},
    {
        "role": "assistant",
        "content": "see",
        "tool_calls": [
            {"type": "function", "function": {"name": "now", "arguments": {"zone": "北京", "deep": [1, None, True]}}},
            {"type": "function", "function": {"name": "then", "arguments": {}}},
        ],
    },
    {"role": "tool", "content": "12"},
    {"role": "tool", "content": "13"},
    {"role": "assistant", "content": "noon"},
]
WITH_SYSTEM = [dialog("2+2?", "4", system="Be exact."), dialog("x", "y", "z", "w", system="答\n简短\n"), TOOLS]
TEXTS_BY_LINE = [*TEXTS, "  two  blanks ", "<_user> in a text", "𝛼🙂"]


def sentencepiece_with_prefix(path: Path) -> Path:
    """As the published one: a dummy prefix, digits and the line end as pieces of their own."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=model, vocab_size=430, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=True, normalization_rule_name="identity", remove_extra_whitespaces=False, unk_id=0, bos_id=1,
        eos_id=2, pad_id=3, unk_piece="<_unk>", bos_piece="<_start>", eos_piece="<_end>", pad_piece="<_pad>",
        control_symbols=["<_user>", "<_bot>", "<_system>", "<tool_call>", "</tool_call>"],
        user_defined_symbols=[*"0123456789", "\n"], minloglevel=2,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path


def tuned(work: Path, tokenizer: str, template: str, system: str | None = None, **data: Any) -> Path:
    """Checkpoints of a run that was fine-tuned with a tokenizer and a template, begun from no Hugging Face folder."""
    config = telechat_config(4, 2, layers=1, head_dim=8, vocab_size=VOCAB)
    import_hf(write_folder(work / "hf", config, telechat_shapes(config)), work / "checkpoints")
    without_import(work / "checkpoints")
    folder = work / "checkpoints" / "iter_0000000"
    manifest = read_manifest(folder)
    run = run_config_from_yaml(manifest.config)
    settings = {"sft": True, "sft_template": template, "sft_system": system, "tokenizer_model": tokenizer, **data}
    run = replace(run, data=replace(run.data, **settings))
    extra = {**manifest.extra, TOKENIZER: tokenizer_identity(None, tokenizer)}
    (folder / MANIFEST).write_bytes(replace(manifest, config=dump_run_config(run), extra=extra).to_bytes())
    return work / "checkpoints"


def tokens_of(tokenizer: str, template: str, line: list[dict[str, Any]], system: str | None = None) -> list[int]:
    vocabulary = ChatVocabulary(None, tokenizer, template, VOCAB)
    return vocabulary.encode([render(parse_dialog({"messages": line}), template, system)])[0][0].tolist()


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """By kind and template: the tokenizer, the dialogs, the exported folder, and what transformers made of them."""
    work = tmp_path_factory.mktemp("tokenizers")
    letters = letters_tokenizer(work / "letters")
    pieces = str(sentencepiece_with_prefix(work / "pieces" / "mine.model"))
    cases: dict[str, tuple[str, str, str | None]] = {
        **{f"letters {template}": (letters, template, None) for template in TEMPLATES},
        **{f"pieces {template}": (pieces, template, None) for template in TEMPLATES},
        "letters telechat2, a default": (letters, "telechat2", 'Say "你好" {{ now }}\n'),
    }
    found: dict[str, dict[str, Any]] = {}
    requests: dict[str, tuple[str, Path, dict[str, Any]]] = {}
    for number, (name, (tokenizer, template, system)) in enumerate(cases.items()):
        checkpoints = tuned(work / str(number), tokenizer, template, system)
        done = export_hf(checkpoints, work / str(number) / "out")
        lines = [*PLAIN, *(WITH_SYSTEM if template == "telechat2" else [])]
        wrong = [dialog("a", "b", "c")[1:], *([] if template == "telechat2" else [dialog("a", system="s")])]
        found[name] = {
            "tokenizer": tokenizer, "template": template, "system": system, "dialogs": lines, "done": done,
        }  # fmt: skip
        requests[f"{name}|encode"] = ("encode", done.path, {"dialogs": lines, "texts": TEXTS_BY_LINE})
        requests[f"{name}|errors"] = (
            "chat_errors",
            done.path,
            {"dialogs": wrong},
        )
    for key, value in ask(work / "process", requests).items():
        name, _, what = key.partition("|")
        found[name][what] = value
    return found


KINDS = [*(f"{kind} {template}" for kind in ("letters", "pieces") for template in TEMPLATES)]


@pytest.mark.parametrize("name", [*KINDS, "letters telechat2, a default"])
def test_the_chat_template_gives_the_tokens_of_the_training(exports, name):
    found = exports[name]
    for line, tokens, rendered, prompt in zip(
        found["dialogs"], *(found["encode"][key] for key in ("dialogs", "rendered", "prompts")), strict=True
    ):
        wanted = tokens_of(found["tokenizer"], found["template"], line, found["system"])
        assert tokens == wanted == rendered
        bot = ChatVocabulary(None, found["tokenizer"], found["template"], VOCAB).ids["<_bot>"]
        last = len(wanted) - wanted[::-1].index(bot)
        assert prompt == wanted[:last]


@pytest.mark.parametrize("name", KINDS)
def test_texts_and_special_tokens_are_those_of_our_tokenizer(exports, name):
    found = exports[name]
    ours = build_tokenizer(None, found["tokenizer"])
    assert found["encode"]["special"] == [ours.bos, ours.eod, ours.pad]
    assert json.loads((found["done"].path / "generation_config.json").read_text()) == {
        "bos_token_id": ours.bos, "eos_token_id": ours.eod, "pad_token_id": ours.pad,
    }  # fmt: skip
    config = json.loads((found["done"].path / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (ours.bos, ours.eod)
    for text, tokens, decoded in zip(TEXTS_BY_LINE, found["encode"]["texts"], found["encode"]["decoded"], strict=True):
        if "<_" not in text:  # which a rendered dialog cannot tell from the token
            assert tokens == ours.encode(text), text
            assert decoded.strip() == text.strip()


@pytest.mark.parametrize("name", KINDS)
def test_a_dialog_that_the_training_refuses_is_refused(exports, name):
    assert all(text.startswith("error: ") for text in exports[name]["errors"]), exports[name]["errors"]
    assert template_of_folder(exports[name]["done"].path) == exports[name]["template"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_told_by_its_text(template):
    assert template_of(chat_template(template)) == template
    assert template_of("{{ messages }}") is None


def test_which_tokenizer_an_export_has(tmp_path):
    letters = letters_tokenizer(tmp_path / "letters")
    checkpoints = tuned(tmp_path, letters, "telechat")
    done = export_hf(checkpoints, tmp_path / "one")
    assert any("the tokenizer is the run's" in note for note in done.notes)
    text = Path(letters).read_text()
    Path(letters).write_text(text.replace('"<_sep>"', '"<_other>"'))
    changed = export_hf(checkpoints, tmp_path / "two")
    assert any("has changed since; --tokenizer puts one there" in note for note in changed.notes)
    assert not (tmp_path / "two" / "tokenizer.json").exists()
    with pytest.raises(ConfigError, match="no chat template"):
        template_of_folder(tmp_path / "two")
    (tmp_path / "letters" / "tokenizer_config.json").write_text('{"chat_template": "{{ mine }}", "x": 1}')
    given = export_hf(checkpoints, tmp_path / "three", tokenizer=Path(letters))
    assert any("gives other ids than the tokenizer that the model was trained with" in note for note in given.notes)
    assert (given.path / "tokenizer_config.json").read_text() == '{"chat_template": "{{ mine }}", "x": 1}'
    assert not (given.path / "chat_template.jinja").exists()
    with pytest.raises(ConfigError, match="not one of TeleChat's"):
        template_of_folder(given.path)
    (tmp_path / "letters" / "tokenizer_config.json").write_text('{"x": 1}')
    added = export_hf(checkpoints, tmp_path / "four", tokenizer=Path(letters))
    assert (added.path / "chat_template.jinja").read_text() == chat_template("telechat")
    assert (added.path / "tokenizer_config.json").read_text() == '{"x": 1}'
    Path(letters).unlink()
    gone = export_hf(checkpoints, tmp_path / "five")
    assert any("is not there" in note for note in gone.notes)
