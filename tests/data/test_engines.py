"""Engines give the reference's ids, or are not used, and the run says so."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megatron_telechat.cli.preprocess_data import main
from megatron_telechat.data.text import engines, self_check
from megatron_telechat.data.text import preprocess as preprocess_module
from megatron_telechat.data.text.engines import EngineUnfit, Reference, open_engine
from megatron_telechat.data.text.preprocess import preprocess
from megatron_telechat.data.text.tokenizer_training import SPLIT
from megatron_telechat.data.tokenizers import build_tokenizer
from megatron_telechat.errors import ConfigError
from tests.data.material import TEXTS, huggingface_tokenizer, sentencepiece_tokenizer, write_jsonl


def split_tokenizer(folder, bos=False, vocab_size=400, texts=TEXTS * 4, split=SPLIT):
    """A byte-level tokenizer; with ``bos`` its post-processor puts <_start> before each text; ``split`` None: digits
    alone, the rest as GPT-2, in two steps."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    steps = [
        pre_tokenizers.Split(Regex(split or r"\p{N}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<_unk>", "<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<_start> $A", special_tokens=[("<_start>", 1)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def _sentencepiece_prefixed(path, **options):
    """With the dummy prefix and normalisation, as most published models."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        control_symbols=["<_user>", "<_bot>"],
        user_defined_symbols=[*"0123456789", "\n", "__"],
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    return {
        "own": huggingface_tokenizer(folder / "own"),
        "digits": split_tokenizer(folder / "digits", split=None),
        "split": split_tokenizer(folder / "split"),
        "bos": split_tokenizer(folder / "bos", bos=True),
        "model": sentencepiece_tokenizer(folder / "a.model"),
        "prefixed": _sentencepiece_prefixed(folder / "b.model", remove_extra_whitespaces=False),
        "stripping": _sentencepiece_prefixed(folder / "c.model"),
    }


TAKEN = [
    ("own", "gigatoken"),
    ("digits", "tiktoken"),
    ("split", "gigatoken"),
    ("split", "tiktoken"),
    ("bos", "gigatoken"),
    ("bos", "tiktoken"),
    ("model", "gigatoken"),
    ("prefixed", "gigatoken"),
]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name,engine", TAKEN)
def test_an_engine_gives_the_references_ids(files, name, engine, workers):
    pytest.importorskip(engine)
    tokenizer = build_tokenizer(None, str(files[name]))
    texts = [*self_check.HARD, *self_check._around_added(tokenizer), *TEXTS, "".join(TEXTS) * 30]
    right, right_lengths = Reference(tokenizer, 1).encode_batch(texts)
    assert right_lengths.tolist() == [len(tokenizer.encode(text)) for text in texts]
    flat, lengths = open_engine(engine, tokenizer, workers).encode_batch(texts)
    assert lengths.tolist() == right_lengths.tolist() and np.array_equal(flat, right)


def test_gigatoken_as_it_is_would_be_wrong_on_the_prefixed_model(files):
    """What the changes to a sentencepiece model are for."""
    gigatoken = pytest.importorskip("gigatoken")
    tokenizer = build_tokenizer(None, str(files["prefixed"]))
    plain = gigatoken.Tokenizer.from_sentencepiece(files["prefixed"])
    assert plain.encode("lit 42 boats").tolist() != tokenizer.encode("lit 42 boats")


def test_engines_that_do_not_fit_say_why(files):
    pytest.importorskip("gigatoken")
    for name, engine, reason in [
        ("digits", "gigatoken", "does not take this tokenizer"),
        ("model", "tiktoken", "does not read"),
    ]:
        with pytest.raises(EngineUnfit, match=reason):
            open_engine(engine, build_tokenizer(None, str(files[name])), 1)
    null = build_tokenizer("NullTokenizer", None, vocab_size=9)
    assert engines.engine_names("auto", null) == ["reference"]
    with pytest.raises(ConfigError, match="no engine is named"):
        engines.engine_names("fastest", null)


def test_a_model_gigatoken_reads_but_gets_wrong_falls_back(tmp_path, files, capsys):
    """It takes the dummy prefix away together with the spaces in front."""
    pytest.importorskip("gigatoken")
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    arguments = [
        "--input",
        str(source),
        "--output-prefix",
        str(tmp_path / "o"),
        "--tokenizer-model",
        str(files["stripping"]),
    ]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert "engine gigatoken is not used (its ids differ" in output.err and "engine reference" in output.out
    tokenizer = build_tokenizer(None, str(files["stripping"]))
    ids = np.fromfile(tmp_path / "o_text_document.bin", np.uint16)
    assert ids.tolist() == [i for text in TEXTS for i in tokenizer.encode(text)]


class _Wrong:
    """An engine that is right on the hard texts and on most of the input."""

    name, threads = "gigatoken", 1

    def __init__(self, tokenizer, marker):
        self.reference, self.marker = Reference(tokenizer, 1), marker

    def encode_batch(self, texts):
        flat, lengths = self.reference.encode_batch(texts)
        for place, text in enumerate(texts):
            if self.marker in text:
                flat[lengths[: place + 1].sum() - 1] += 1
        return flat, lengths


@pytest.mark.heavy
@pytest.mark.parametrize("place", [0, 2500, 4999])
def test_other_ids_anywhere_in_the_sample_throw_the_engine_out(tmp_path, files, monkeypatch, place):
    tokenizer = build_tokenizer(None, str(files["split"]))
    source = write_jsonl(tmp_path / "in.jsonl", [f"text {i}" if i != place else "a marked text" for i in range(5000)])
    opened = []

    def opening(name, tokenizer, workers):
        opened.append(name)
        return _Wrong(tokenizer, "marked") if name == "gigatoken" else open_engine(name, tokenizer, workers)

    monkeypatch.setattr(preprocess_module, "open_engine", opening)
    said = []
    report = preprocess([str(source)], str(tmp_path / "o"), tokenizer, log=said.append, log_interval=0)
    assert opened == ["gigatoken", "tiktoken"] == ["gigatoken", report.engine]
    assert "engine gigatoken is not used (its ids differ from the tokenizer's own on 'a marked text'" in said[0]
    monkeypatch.undo()
    preprocess([str(source)], str(tmp_path / "right"), tokenizer, engine="reference", log_interval=0)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"o_text_document.{suffix}").read_bytes() == (
            tmp_path / f"right_text_document.{suffix}"
        ).read_bytes()


def test_the_sample_goes_on_to_the_end(files):
    """Beyond the first documents, a thousandth of the text is compared."""
    tokenizer = build_tokenizer(None, str(files["split"]))
    texts = ["some words of a text " * 20] * 50
    reference = Reference(tokenizer, 1)
    flat, lengths = reference.encode_batch(texts)
    with self_check.SelfCheck(_Wrong(tokenizer, "never there"), tokenizer) as check:
        for _ in range(100):
            check.offer(texts, flat, lengths)
        check.settle()
        assert check.seen == 100 * sum(len(text) + 1 for text in texts)
        assert (
            self_check.FIRST + (check.seen - self_check.FIRST) / self_check.SHARE
            <= check.compared
            <= self_check.FIRST * 1.1
        )


@pytest.mark.heavy
def test_an_engine_asked_for_that_cannot_be_used_is_an_error(tmp_path, files, capsys):
    pytest.importorskip("gigatoken")
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    arguments = [
        "--input",
        str(source),
        "--output-prefix",
        str(tmp_path / "o"),
        "--tokenizer-model",
        str(files["digits"]),
    ]
    assert main([*arguments, "--engine", "gigatoken"]) == 2
    assert "--engine gigatoken cannot be used" in capsys.readouterr().err
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert "engine gigatoken is not used" in output.err and "engine tiktoken" in output.out


def test_a_growing_encoder_is_opened_anew(files, monkeypatch):
    pytest.importorskip("gigatoken")
    tokenizer = build_tokenizer(None, str(files["split"]))
    engine = open_engine("gigatoken", tokenizer, 1)
    monkeypatch.setattr(engines, "_LOOK_EVERY", 100)
    monkeypatch.setattr(engines, "_FIRST_LOOK", 0)
    resident = iter([0, 10**9, 10**9, *[0] * 9])
    monkeypatch.setattr(engines, "_resident_bytes", lambda: next(resident))
    first = engine.backend
    results = [engine.encode_batch(TEXTS * 3)[0].tolist() for _ in range(3)]
    assert engine.backend is not first and results[0] == results[1] == results[2]


def test_threads_that_encode_while_it_is_opened_anew(files, monkeypatch):
    pytest.importorskip("gigatoken")
    engine = open_engine("gigatoken", build_tokenizer(None, str(files["split"])), 2)
    monkeypatch.setattr(engines, "_LOOK_EVERY", 0)
    monkeypatch.setattr(engines, "_FIRST_LOOK", 0)
    resident = itertools.count(step=10**9)  # grows at every look
    monkeypatch.setattr(engines, "_resident_bytes", lambda: next(resident))
    opened, alive = [], []
    open_backend = engine._open
    monkeypatch.setattr(engine, "_open", lambda: alive.append(engine.backend) or opened.append(1) or open_backend())
    wanted = engine.encode_batch(TEXTS)[0].tolist()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: engine.encode_batch(TEXTS)[0].tolist(), range(40)))
    assert all(result == wanted for result in results)
    assert len(opened) >= 10 and not any(alive), "the old one goes before the new one comes"


def test_a_text_that_breaks_an_engine_goes_to_the_reference(tmp_path, files, monkeypatch):
    class Breaking(_Wrong):
        def encode_batch(self, texts):
            if any("break" in text for text in texts):
                raise RuntimeError("gave up")
            return self.reference.encode_batch(texts)

    tokenizer = build_tokenizer(None, str(files["split"]))
    source = write_jsonl(tmp_path / "in.jsonl", ["a", "break", "b"])
    monkeypatch.setattr(preprocess_module, "open_engine", lambda name, tokenizer, workers: Breaking(tokenizer, "-"))
    report = preprocess([str(source)], str(tmp_path / "o"), tokenizer, append_eod=True, log_interval=0)
    assert report.documents_out == 3
    ids = np.fromfile(tmp_path / "o_text_document.bin", np.uint16)
    assert ids.tolist() == [i for text in ("a", "break", "b") for i in [*tokenizer.encode(text), 2]]
    assert json.loads((tmp_path / "o_text_document.sums").read_text())["bin"]["bytes"] == 2 * ids.size
