"""The name of a special token that stands in a text is text, with every tokenizer and engine, unless it is asked
for."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from megatron_telechat.cli.preprocess_data import main
from megatron_telechat.data.indexed.dataset import IndexedDataset
from megatron_telechat.data.text.engines import open_engine
from megatron_telechat.data.text.tokenizer_process import TokenizerBeside
from megatron_telechat.data.tokenizers import HuggingFaceTokenizer, build_tokenizer
from megatron_telechat.errors import ConfigError
from tests.data.material import TEXTS, huggingface_tokenizer, sentencepiece_tokenizer, write_jsonl

NAMED = [
    "<_end>",
    "a<_end>b",
    "see <_user>hi<_bot> there",
    "x <|plain|> y<|plain|>",
    "<_end> <|plain|><_pad><_start>",
    "<_en d> <_end",
    "<|late|>x",
]


def with_added(folder: Path, **beside) -> Path:
    """A byte-level tokenizer with a plain added token, and one that only the files beside it call special."""
    from tokenizers import AddedToken, Tokenizer

    file = huggingface_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_tokens(
        [
            AddedToken("<|plain|>", special=False, normalized=False),
            AddedToken("<|late|>", special=False, normalized=False),
        ]
    )
    tokenizer.save(str(file))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"additional_special_tokens": [{"content": "<|late|>"}], **beside})
    )
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return with_added(tmp_path_factory.mktemp("added"))


def preprocessed(tmp_path: Path, model: Path, *flags: str) -> list[list[int]]:
    source = write_jsonl(tmp_path / "in.jsonl", [*TEXTS, *NAMED])
    prefix = tmp_path / "out"
    command = [
        "--input",
        str(source),
        "--output-prefix",
        str(prefix),
        "--tokenizer-model",
        str(model),
        "--log-interval",
        "0",
    ]
    assert main([*command, "--append-eod", *flags]) == 0
    data = IndexedDataset(f"{prefix}_text_document")
    return [data[i].tolist() for i in range(len(data))]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "engine,workers", [("auto", 2), ("gigatoken", 1), ("gigatoken", 2), ("tiktoken", 2), ("reference", 1)]
)
def test_text_stays_text(tmp_path, file, engine, workers, capsys):
    flags = ["--engine", engine, "--workers", str(workers)]
    found = preprocessed(tmp_path, file, *flags)
    assert "is not used" not in capsys.readouterr().err
    tokenizer = build_tokenizer(None, str(file))
    special = {
        tokenizer.backend.token_to_id(name)
        for name in ("<_end>", "<_user>", "<_bot>", "<_pad>", "<_start>", "<|late|>")
    }
    plain = tokenizer.backend.token_to_id("<|plain|>")
    for text, ids in zip([*TEXTS, *NAMED], found, strict=True):
        assert ids[-1] == tokenizer.eod and not special & set(ids[:-1])
        assert tokenizer.decode(ids[:-1]) == text
        assert ids.count(plain) == text.count("<|plain|>")
    asked = preprocessed(tmp_path, file, *flags, "--special-tokens-in-text")
    assert asked == [[*tokenizer.encode(text), tokenizer.eod] for text in [*TEXTS, *NAMED]]
    assert found[: len(TEXTS)] == asked[: len(TEXTS)] and sum(tokenizer.eod in ids[:-1] for ids in asked) == 3


def test_sentencepiece_keeps_control_pieces_text_with_and_without(tmp_path, capsys):
    model = sentencepiece_tokenizer(tmp_path / "tokenizer.model")
    found = preprocessed(tmp_path, model, "--workers", "2")
    assert preprocessed(tmp_path, model, "--workers", "2", "--special-tokens-in-text") == found
    assert "changes nothing: a SentencePieceTokenizer never takes them from a text" in capsys.readouterr().err
    assert all(2 not in ids[:-1] for ids in found)


def test_tiktoken_vocabulary(tmp_path):
    tokens = [bytes([b]) for b in range(256)]
    import base64

    entries = [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for rank, token in enumerate(tokens)]
    (tmp_path / "vocabulary.json").write_text(json.dumps(entries))
    text, asked = (
        build_tokenizer(None, str(tmp_path / "vocabulary.json"), special_tokens_in_text=said) for said in (False, True)
    )
    assert min(text.encode("a</s><SPECIAL_12>")) >= 1000 and text.decode(text.encode("a</s>")) == "a</s>"
    assert asked.encode("a</s>")[1:] == [asked.eod] and text.digest != asked.digest


@pytest.mark.heavy
@pytest.mark.parametrize("asked", [False, True])
def test_a_helper_answers_as_the_tokenizer_does(file, asked):
    expected = HuggingFaceTokenizer(file, asked)
    with closing(TokenizerBeside(file, asked)) as tokenizer:
        assert tokenizer.encode_batch(NAMED) == expected.encode_batch(NAMED)
        assert tokenizer.digest == expected.digest and tokenizer.here.encode_batch(NAMED) == expected.encode_batch(
            NAMED
        )
        for name in ("gigatoken", "tiktoken"):
            flat, lengths = open_engine(name, tokenizer, 2).encode_batch(NAMED)
            assert np.split(flat, np.cumsum(lengths)[:-1])[1].tolist() == expected.encode(NAMED[1])


def test_the_end_is_special_whatever_the_file_calls_it(tmp_path):
    """<|endoftext|> as a plain added token, and as the eos_token of the files beside."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(huggingface_tokenizer(tmp_path / "t")))
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<|endoftext|>", "<own>")])
    tokenizer.save(str(tmp_path / "t" / "tokenizer.json"))
    (tmp_path / "t" / "tokenizer_config.json").write_text('{"eos_token": "<own>"}')
    opened = build_tokenizer(None, str(tmp_path / "t"), special_tokens_in_text=False)
    assert opened.eod == tokenizer.token_to_id("<own>") and opened.eod not in opened.encode("a<own>b")
    assert tokenizer.token_to_id("<|endoftext|>") not in opened.encode("<|endoftext|>")
    for name in ("gigatoken", "tiktoken"):
        flat, _ = open_engine(name, opened, 1).encode_batch(["a<own>b<|endoftext|>"])
        assert flat.tolist() == opened.encode("a<own>b<|endoftext|>")


@pytest.mark.heavy
def test_a_model_that_makes_the_token_of_the_text_is_refused(tmp_path, capsys):
    """A model of whole words knows the name as a word: no list of added tokens can keep it apart."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="makes a special token of the text </s>"):
        build_tokenizer(None, str(tmp_path), special_tokens_in_text=False)
    source = write_jsonl(tmp_path / "in.jsonl", ["a </s> a"])
    command = [
        "--input",
        str(source),
        "--output-prefix",
        str(tmp_path / "o"),
        "--tokenizer-model",
        str(tmp_path / "tokenizer.json"),
    ]
    for workers in ("1", "2"):
        assert main([*command, "--workers", workers]) == 2
        assert "--special-tokens-in-text" in capsys.readouterr().err
    assert main([*command, "--special-tokens-in-text"]) == 0


def test_a_piece_that_only_names_the_list_is_no_list(tmp_path):
    """The list of added tokens is found in the bytes of the file; a piece of that name is not taken for it."""
    file = with_added(tmp_path / "t")
    content = json.loads(file.read_text())
    content["model"]["vocab"]["added_tokens"] = max(content["model"]["vocab"].values()) + 3
    content = {"model": content.pop("model"), **content}  # the list comes last
    for indent in (None, 2):
        file.write_text(json.dumps(content, ensure_ascii=False, indent=indent))
        kept = json.loads(HuggingFaceTokenizer(file, False).content())
        assert [token["content"] for token in kept.pop("added_tokens")] == ["<|plain|>"]
        assert kept == {name: value for name, value in content.items() if name != "added_tokens"}
        assert HuggingFaceTokenizer(file).content() == file.read_bytes()


def test_another_meaning_of_the_text_does_not_go_on_from_an_unfinished_run(file):
    assert HuggingFaceTokenizer(file, False).digest != HuggingFaceTokenizer(file, True).digest


@pytest.mark.parametrize("special", [True, False])
def test_nobody_types_a_token_of_the_template(tmp_path, special):
    """Whatever the tokenizer calls its tokens: a question that holds <_bot> and <_end> stays a question."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from megatron_telechat.data.chat.template import ChatVocabulary
    from tests.data.chat_material import SPECIAL

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate([*SPECIAL, *letters])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name in SPECIAL])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = ChatVocabulary(None, str(tmp_path / "tokenizer.json"), "telechat2", 400)
    (typed,) = vocabulary.encode_texts(["a<_bot>b<_end><_user>"])
    assert min(typed) >= len(SPECIAL) and len(typed) == len("a<_bot>b<_end><_user>")
