"""Generation with the key-value cache: the tokens of a generation without it, on one rank and on two, and in a chat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_telechat.cli.generate import main
from megatron_telechat.data.chat.dialogs import Dialog, Turn
from megatron_telechat.data.chat.template import ChatVocabulary, render
from megatron_telechat.data.tokenizers import build_tokenizer
from megatron_telechat.errors import ConfigError
from megatron_telechat.huggingface.chat import Chat
from megatron_telechat.huggingface.chat_templates import NAME_KEY
from megatron_telechat.huggingface.generation import PiecewiseText, Sampling, new_tokens
from megatron_telechat.huggingface.model import hf_model
from megatron_telechat.model.key_value_cache import KeyValueCache
from tests.data.chat_material import letters_tokenizer
from tests.data.material import TEXTS, VOCAB, huggingface_tokenizer, sentencepiece_tokenizer
from tests.harness import ROOT, run_cases
from tests.huggingface.folders import calm, telechat_config, telechat_shapes, write_folder
from tests.huggingface.worker_generation import NEW, PROMPT

pytestmark = pytest.mark.heavy

GREEDY = Sampling()
MIXTRAL = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
}  # fmt: skip


def folder_of(path: Path, config: dict[str, Any]) -> Path:
    """A folder with random weights."""
    from megatron_telechat.huggingface.config import model_config_from_hf
    from megatron_telechat.huggingface.weights import hf_tensor_shapes

    mixtral = config["model_type"] == "mixtral"
    shapes = hf_tensor_shapes(model_config_from_hf(config)) if mixtral else telechat_shapes(config)
    return calm(write_folder(path, config, dict(shapes)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("generation")
    two = {"layers": 2, "head_dim": 8}
    folder_of(work / "dense", telechat_config(8, 2, **two))
    folder_of(work / "moe", telechat_config(4, 2, **two, num_experts=4, num_experts_per_tok=2))
    folder_of(work / "odd moe", telechat_config(4, 2, **two, num_experts=3, num_experts_per_tok=2))
    folder_of(work / "one group", telechat_config(4, 1, **two))
    folder_of(work / "mixtral", MIXTRAL)
    folder_of(work / "chat", telechat_config(4, 2, **two, vocab_size=VOCAB))
    letters_tokenizer(work / "chat")
    (work / "chat" / "tokenizer_config.json").write_text(json.dumps({NAME_KEY: "telechat2"}))
    return work


def tokens(folder: Path, cached: bool, sampling: Sampling = GREEDY) -> list[int]:
    with hf_model(folder) as model:
        cache = KeyValueCache() if cached else None
        return list(new_tokens(model, PROMPT, NEW, frozenset(), sampling, cache))


@pytest.mark.parametrize("name", ["dense", "moe", "odd moe", "mixtral", "one group"])
def test_the_cache_changes_no_token(folders, name):
    plain = tokens(folders / name, False)
    assert tokens(folders / name, True) == plain and len(plain) == NEW and len(set(plain)) > 3


@pytest.mark.parametrize("pieces", [(25, 1, 1, 1, 8, 1, 30, 3), (1, 40, 29), (70,)])
def test_logits_of_the_cache_are_those_of_the_whole_sequence(folders, pieces):
    """However a text is cut into calls, and wherever theta and the scaling change."""
    row = torch.randint(0, 64, (2, sum(pieces)), generator=torch.Generator().manual_seed(1))
    with hf_model(folders / "dense") as model:
        cache, done = KeyValueCache(), 0
        for piece in pieces:
            found = model.logits(row[:, done : done + piece], cache)
            done += piece
            assert (found[:, 0] - model.logits(row[:, :done])[:, -1]).abs().max() < 1e-4, done
        assert cache.length == done


@pytest.fixture(scope="module")
def two_ranks(folders):
    return run_cases(
        Path(__file__).with_name("worker_generation.py"), nproc=2, env={"GENERATION_FOLDERS": str(folders)}
    )


@pytest.mark.gloo
@pytest.mark.parametrize("name", ["dense", "moe", "odd moe", "mixtral"])
def test_two_ranks_say_what_one_says(folders, two_ranks, name):
    """Experts spread over the ranks (4), and cut (3)."""
    wanted = tokens(folders / name, True)
    assert two_ranks.check(name) == [[wanted, wanted]] * 2


@pytest.mark.gloo
def test_two_ranks_draw_the_same(folders, two_ranks):
    first, second = two_ranks.check("sampled")
    assert first == second == tokens(folders / "dense", True, Sampling(1.5, seed=5))


@pytest.mark.gloo
def test_ranks_that_do_not_divide_the_model_are_refused(two_ranks):
    for text in two_ranks.check("indivisible"):
        assert "1 query groups do not divide by 2 ranks" in text


def by_hand(model, folder: Path, questions: list[str], longest: int, template: str = "telechat2") -> list[str]:
    """A dialog without a cache, every turn encoded by the template of the training."""
    vocabulary = ChatVocabulary(None, str(folder), template, VOCAB)
    ends = {vocabulary.ids["<_end>"], vocabulary.ids["<_user>"]}
    row: list[int] = []
    answers = []
    for question in questions:
        parts = render(Dialog((Turn("user", question), Turn("bot", ""))), template)
        whole = vocabulary.encode([parts])[0][0].tolist()
        begin = whole.index(vocabulary.ids["<_bot>"]) + 1
        row += whole[:begin]
        answer = []
        while len(answer) < longest:
            token = int(model.logits(torch.tensor([row]))[0, -1].argmax())
            if token in ends:
                break
            answer.append(token)
            row.append(token)
        row += whole[begin:]
        answers.append(vocabulary.tokenizer.decode(answer))
    return answers


def test_a_chat_is_the_dialog_that_the_training_would_encode(folders):
    folder, questions = folders / "chat", ["hi", "春眠不觉晓？", "and <_bot> then"]
    with hf_model(folder) as model:
        chat = Chat(model, folder, "telechat2", None, frozenset(), GREEDY, 20)
        answers = ["".join(chat.answer(question)) for question in questions]
        assert answers == by_hand(model, folder, questions, 20)
        chat.clear()
        assert "".join(chat.answer("hi")) == answers[0]
        with pytest.raises(ConfigError, match="--system"):
            Chat(model, folder, "telechat", "Be exact.", frozenset(), GREEDY, 20)
        told = Chat(model, folder, "telechat2", "Be exact.", frozenset(), GREEDY, 20)
        assert "".join(told.answer("hi")) != answers[0]


def test_an_answer_that_ends_leaves_the_dialog_whole(folders):
    """The end token is not read twice, nor left out."""
    folder = folders / "chat"
    with hf_model(folder) as model:
        free = Chat(model, folder, "telechat2", None, frozenset(), GREEDY, 12)
        vocabulary = ChatVocabulary(None, str(folder), "telechat2", VOCAB)
        prompt = vocabulary.encode([render(Dialog((Turn("user", "hi"), Turn("bot", ""))), "telechat2")])[0][0].tolist()
        begin = prompt.index(vocabulary.ids["<_bot>"]) + 1
        said = list(new_tokens(model, prompt[:begin], 12, frozenset(), GREEDY, KeyValueCache()))
        third = next(token for number, token in enumerate(said) if number > 1 and token not in said[:number])
        kept = said[: said.index(third)]
        ending = Chat(model, folder, "telechat2", None, frozenset({third}), GREEDY, 12)
        assert "".join(ending.answer("hi")) == vocabulary.tokenizer.decode(kept)
        assert ending._cache.length == begin + len(kept) and ending._unread == prompt[begin:]
        assert "".join(free.answer("hi")) == vocabulary.tokenizer.decode(said)
        assert free._cache.length == begin + 11 and free._unread == [said[-1], *prompt[begin:]]


@pytest.mark.gloo
def test_the_tool_chats_over_two_ranks(folders, two_ranks):
    with hf_model(folders / "chat") as model:
        answers = by_hand(model, folders / "chat", ["hi", "how"], 9)
    first, second = two_ranks.check("chat")
    assert first == [0, "\n".join([*answers, answers[0]]) + "\n", ""] and second == [0, "", ""]
    for code, text in two_ranks.check("chat_with_input_that_is_no_text"):
        assert code == 3 and "not UTF-8" in text


def test_the_tool_reads_standard_input(folders):
    with hf_model(folders / "chat") as model:
        answers = by_hand(model, folders / "chat", ["春眠", "hi"], 9)
    done = subprocess.run(
        [sys.executable, "tools/generate.py", "--hf", str(folders / "chat"), "--chat", "--max-new-tokens", "9",
         "--device", "cpu"],
        cwd=ROOT, input="春眠\nhi\n".encode(), capture_output=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == "\n".join(answers) + "\n"


def test_arguments_that_do_not_go_together(folders, capsys):
    hf = ["--hf", str(folders / "chat")]
    for words, message in (
        ([], "one of --prompt and --chat"),
        (["--prompt", "x", "--chat"], "one of --prompt and --chat"),
        (["--prompt", "x", "--system", "s"], "belong to --chat"),
        (["--chat", "--no-cache", "--temperature", "-1"], "2 problems"),
        (["--chat", "--template", "chatml"], "chatml"),
    ):
        assert main([*hf, *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["letters", "bpe", "sentencepiece"])
def test_pieces_of_a_text_are_whole_characters(tmp_path, kind):
    if kind == "sentencepiece":
        file = str(sentencepiece_tokenizer(tmp_path / "t.model"))
    else:
        file = letters_tokenizer(tmp_path) if kind == "letters" else str(huggingface_tokenizer(tmp_path))
    tokenizer = build_tokenizer(None, file)
    for text in [*TEXTS, "🙂 a\u0301 𝛼b", "half: "]:
        ids = tokenizer.encode(text)
        stream = PiecewiseText(tokenizer)
        pieces = [stream.add(token) for token in ids]
        assert "".join(pieces) + stream.rest() == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)
    broken = tokenizer.encode("🙂")[:-1]
    stream = PiecewiseText(tokenizer)
    assert "".join(map(stream.add, broken)) + stream.rest() == tokenizer.decode(broken)
