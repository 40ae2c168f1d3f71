"""Tokenizers: the reference's ids, the end of a document, and files that are none."""

from __future__ import annotations

import json

import pytest

from megatron_telechat.data.text.tokenizer_training import SPECIAL_TOKENS, train_tokenizer
from megatron_telechat.data.tokenizers import build_tokenizer
from megatron_telechat.errors import ConfigError, DataError
from tests.data.material import TEXTS, huggingface_tokenizer, sentencepiece_tokenizer, write_jsonl

HARD = [*TEXTS, "", " ", "  two  spaces ", "12 345", "<_end>", "a<_user>b", "tab\tline\nend", "🙂", "\u3000全角"]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return huggingface_tokenizer(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def sp(tmp_path_factory):
    return sentencepiece_tokenizer(tmp_path_factory.mktemp("sp") / "tokenizer.model")


def test_special_tokens_stand_at_telechats_ids(hf):
    tokenizer = build_tokenizer(None, str(hf))
    assert [tokenizer.backend.token_to_id(name) for name in SPECIAL_TOKENS] == list(range(9))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.bos, tokenizer.pad) == (320, 2, 1, 3)


@pytest.mark.heavy
def test_huggingface_ids_are_those_of_transformers(hf):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(hf.parent)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(hf.parent))
    assert tokenizer.eod == reference.eos_token_id
    for text in HARD:
        ids = reference(text).input_ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch(HARD) == [tokenizer.encode(text) for text in HARD]


def test_truncation_and_padding_of_the_file_are_turned_off(hf, tmp_path):
    content = json.loads(hf.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert build_tokenizer(None, str(tmp_path)).encode(TEXTS[0]) == build_tokenizer(None, str(hf)).encode(TEXTS[0])


def test_sentencepiece_ids_are_the_references(sp):
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(sp))
    tokenizer = build_tokenizer(None, str(sp))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.bos, tokenizer.pad) == (420, 2, 1, 3)
    for text in HARD:
        assert tokenizer.encode(text) == reference.encode(text, out_type=int)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 2 not in tokenizer.encode("<_end>")  # control pieces are not to be written by a text
    assert [tokenizer.backend.IdToPiece(i) for i in tokenizer.encode("345")] == ["3", "4", "5"]
    assert build_tokenizer(None, str(sp.parent)).encode("abc") == tokenizer.encode("abc")


def test_end_of_document_of_a_configuration_beside_the_file(hf, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(hf.read_bytes())
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<_bot>"}}')
    assert build_tokenizer(None, str(tmp_path)).eod == 5


def test_null_tokenizer():
    tokenizer = build_tokenizer("NullTokenizer", None, vocab_size=100)
    assert (tokenizer.encode("7 8 9"), tokenizer.eod, tokenizer.decode([7, 8])) == ([7, 8, 9], 99, "7 8")
    with pytest.raises(DataError):
        tokenizer.encode("seven")


def test_tiktoken_vocabulary(tmp_path):
    pytest.importorskip("tiktoken")
    import base64

    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the"]
    entries = [{"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": ""} for i, t in enumerate(tokens)]
    file = tmp_path / "vocab.json"
    file.write_text(json.dumps(entries))
    tokenizer = build_tokenizer(None, str(file))
    assert tokenizer.encode("the</s>") == [1257, 2] and tokenizer.eod == 2
    assert tokenizer.decode(tokenizer.encode("天气 the")) == "天气 the"
    file.write_text(json.dumps(entries[:-2] + [{"rank": 900, "token_bytes": "dGg=", "token_str": ""}]))
    with pytest.raises(DataError, match="gaps"):
        build_tokenizer("TikTokenizer", str(file))


def test_bad_files(tmp_path, hf):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "x.model").write_bytes(b"garbage")
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for arguments, error, message in [
        (("HuggingFaceTokenizer", str(tmp_path / "tokenizer.json")), DataError, "not a tokenizer.json"),
        ((None, str(tmp_path / "x.model")), DataError, "not a sentencepiece model"),
        (("SentencePieceTokenizer", str(hf)), DataError, "not a sentencepiece model"),
        ((None, str(tmp_path / "nowhere.json")), DataError, "does not exist"),
        ((None, str(tmp_path / "empty")), DataError, "holds no tokenizer"),
        ((None, str(tmp_path / "x.bin")), ConfigError, "cannot be detected"),
        (("GPT2BPETokenizer", str(hf)), ConfigError, "unknown tokenizer_type"),
        (("NullTokenizer", None), ConfigError, "vocabulary size"),
        ((None, None), ConfigError, "no tokenizer"),
    ]:
        with pytest.raises(error, match=message) as caught:
            build_tokenizer(*arguments)
        assert "fix:" in caught.value.render() or "must hold" in caught.value.render()


def test_training_is_deterministic_and_bounded(tmp_path):
    source = write_jsonl(tmp_path / "t.jsonl", TEXTS * 3)
    for name in ("a", "b"):
        assert train_tokenizer([str(source)], 300, tmp_path / name / "tokenizer.json") == 300
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    with pytest.raises(ConfigError, match="at least 265"):
        train_tokenizer([str(source)], 200, tmp_path / "c.json")
    with pytest.raises(DataError, match="no input file"):
        train_tokenizer([str(tmp_path / "*.nothing")], 300, tmp_path / "c.json")
