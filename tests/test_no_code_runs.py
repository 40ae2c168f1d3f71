"""No file that is read can run code: canaries for each kind of file, and no call in the package that could let one."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_telechat.checkpoint import CheckpointReader, CheckpointWriter
from megatron_telechat.checkpoint.opening import open_verified
from megatron_telechat.errors import CheckpointError, ConfigError, DataError, UserError

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_telechat"


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture()
def marker(tmp_path):
    found = tmp_path / "ran"
    yield found
    assert not found.exists(), "a file that was read has run code"


def payloads(marker: Path) -> dict[str, bytes]:
    """The canary as a plain pickle, as torch saves it in its two forms, and as numpy saves an array of objects."""
    found = {"pickle": pickle.dumps(Canary(marker))}
    for name, zipped in (("torch", True), ("old torch", False)):
        stream = io.BytesIO()
        torch.save({"weight": Canary(marker)}, stream, _use_new_zipfile_serialization=zipped)
        found[name] = stream.getvalue()
    stream = io.BytesIO()
    np.save(stream, np.array([Canary(marker)], dtype=object), allow_pickle=True)
    found["numpy"] = stream.getvalue()
    return found


def test_the_canary_sings(tmp_path):
    for name, data in payloads(tmp_path / "ran").items():
        if name == "pickle":
            pickle.loads(data)
        elif "torch" in name:
            torch.load(io.BytesIO(data), weights_only=False)
        else:
            np.load(io.BytesIO(data), allow_pickle=True)
        (tmp_path / "ran").unlink()


@pytest.mark.parametrize("file", ["manifest.json", "rank_00000.safetensors", "hf/tokenizer.json"])
def test_a_checkpoint(tmp_path, marker, file):
    from megatron_telechat.checkpoint.companions import carry_companions

    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "tokenizer.json").write_text("{}")
    with CheckpointWriter(tmp_path / "c", step=1, config="") as writer:
        writer.add("model/a", (4,), (0,), torch.ones(4))
        writer.files.update(carry_companions(tmp_path / "first", writer.folder / "hf"))
    path = writer.path
    assert path is not None
    for data in payloads(marker).values():
        (path / file).write_bytes(data)
        with pytest.raises(CheckpointError):
            open_verified(path)
        # Even where size and checksum are forged to fit.
        if file != "manifest.json":
            forge(path, file)
            if file.endswith(".safetensors"):
                with pytest.raises(CheckpointError):
                    CheckpointReader(path).read("model/a")


def forge(path: Path, file: str) -> None:
    """Give the manifest the size and checksum that a file has now."""
    import zlib
    from dataclasses import replace

    from megatron_telechat.checkpoint.manifest import read_manifest
    from megatron_telechat.checkpoint.names import MANIFEST, FileEntry

    manifest, data = read_manifest(path), (path / file).read_bytes()
    entry = FileEntry(len(data), f"{zlib.crc32(data):08x}")
    (path / MANIFEST).write_bytes(replace(manifest, files={**manifest.files, file: entry}).to_bytes())


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_weights_of_hugging_face(tmp_path, marker, file):
    from megatron_telechat.huggingface import import_hf
    from tests.huggingface.folders import telechat_config, telechat_shapes, write_folder

    config = telechat_config(8, 2)
    for name, data in payloads(marker).items():
        folder = write_folder(tmp_path / name / "hf", config, telechat_shapes(config))
        (folder / "model.safetensors").unlink()
        (folder / file).write_bytes(data)
        with pytest.raises(CheckpointError):
            import_hf(folder, tmp_path / name / "checkpoints")


def test_code_in_a_folder_of_hugging_face(tmp_path, marker):
    """Modelling and tokenizer files are carried along, never imported."""
    from megatron_telechat.huggingface import export_hf, import_hf
    from tests.huggingface.folders import telechat_config, telechat_shapes, write_folder

    config = telechat_config(8, 2)
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    loaders = {"AutoModelForCausalLM": "modeling_x.X", "AutoTokenizer": ["tokenization_x.X", None]}
    folder = write_folder(tmp_path / "hf", {**config, "auto_map": loaders}, telechat_shapes(config))
    for name in ("modeling_x.py", "tokenization_x.py", "configuration_x.py", "__init__.py", "setup.py"):
        (folder / name).write_text(code)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": loaders, "tokenizer_class": "X"}))
    import_hf(folder, tmp_path / "checkpoints")
    exported = export_hf(tmp_path / "checkpoints", tmp_path / "exported").path
    assert (exported / "modeling_x.py").read_text() == code


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tiktoken.json"])
def test_tokenizers(tmp_path, marker, name):
    from megatron_telechat.data.tokenizers import build_tokenizer, tokenizer_identity

    kinds = {"tokenizer.json": None, "tokenizer.model": "SentencePieceTokenizer", "tiktoken.json": "TikTokenizer"}
    for data in payloads(marker).values():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError):
            build_tokenizer(kinds[name], str(tmp_path / name))
        with contextlib.suppress(UserError):  # of other files than tokenizer.json it is a sum of the bytes
            tokenizer_identity(kinds[name], str(tmp_path / name))


@pytest.mark.parametrize("suffix", [".idx", ".bin", ".sums"])
def test_datasets(tmp_path, marker, suffix):
    from megatron_telechat.cli.verify_data import main
    from megatron_telechat.data.indexed.verify import add_checksums
    from tests.data.material import write_dataset

    for number, data in enumerate(payloads(marker).values()):
        prefix = write_dataset(tmp_path / str(number), 5)
        add_checksums(prefix)
        Path(f"{prefix}{suffix}").write_bytes(data)
        assert main([prefix]) == 3


@pytest.mark.heavy
def test_caches_of_the_order_of_samples(tmp_path, marker):
    """Whatever comes of a cache that was exchanged: it runs nothing."""
    from megatron_telechat.data import build_datasets
    from tests.data.material import Rank, make_run, write_dataset

    parts = [write_dataset(tmp_path / name, 30, seed) for seed, name in enumerate("ab")]
    run = make_run(tmp_path / "run", data_path=("1", parts[0], "2", parts[1]))
    assert build_datasets(run, Rank()).train[0] is not None
    arrays = sorted((tmp_path / "run").rglob("*.npy"))
    assert {path.stem for path in arrays} >= {"documents", "samples", "shuffle", "source", "sample"}
    for data in payloads(marker).values():
        for path in arrays:
            sound = path.read_bytes()
            path.write_bytes(data)
            with contextlib.suppress(Exception):
                _ = build_datasets(run, Rank()).train[0]
            path.write_bytes(sound)


@pytest.mark.parametrize("file", ["routing.json", "step_00000001/index.json", "step_00000001/rank_00000.safetensors"])
def test_recordings_of_the_routing(tmp_path, marker, file):
    from megatron_telechat.config.routing import FORMAT, SHAPE, read_recording
    from megatron_telechat.training.routing_files import StepReader

    folder = tmp_path / "recording"
    (folder / "step_00000001").mkdir(parents=True)
    about = {"format": FORMAT, "shape": dict.fromkeys(SHAPE, 1), "replayed": False}
    box = {"name": "rank_00000.safetensors", "layers": [0], "samples": [0], "start": 0, "stop": 1}
    for data in payloads(marker).values():
        (folder / "routing.json").write_text(json.dumps(about))
        (folder / "step_00000001" / "index.json").write_text(json.dumps({"files": [box]}))
        (folder / file).write_bytes(data)
        with pytest.raises(UserError):
            StepReader(read_recording(folder).path, 1).read("experts", 0, [0], 0, 1)


def test_yaml_and_plans_and_devices(tmp_path, marker):
    from megatron_telechat.config import load_run_config
    from megatron_telechat.config.plan_file import read_plan
    from megatron_telechat.costs.devices import read_device_file

    evil = tmp_path / "evil.yaml"
    tag = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{str(marker)!r}]]"
    for text in (tag, f"seed: {tag}", f"name: {tag}"):
        evil.write_text(text)
        for read in (read_device_file, lambda path: load_run_config(["--config", str(path), "--dry-run"], {})):
            with pytest.raises(ConfigError):
                read(evil)
    for data in payloads(marker).values():
        evil.write_bytes(data)
        with pytest.raises(ConfigError):
            read_plan(str(evil))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"])
def test_texts(tmp_path, marker, name):
    from megatron_telechat.data.text.readers import read_blocks, spans

    for data in payloads(marker).values():
        (tmp_path / name).write_bytes(data)
        try:
            list(read_blocks(spans([tmp_path / name])))
        except DataError:
            pass


FORBIDDEN = {
    *("eval", "exec", "compile", "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.jit.load", "marshal.load"),
    *("marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "runpy.run_path"),
    *("joblib.load", "dill.load", "cloudpickle.load", "imp.load_source", "importlib.util.spec_from_file_location"),
}


def test_no_call_of_the_package_could_let_a_file_run_code():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            wrong = (
                name in FORBIDDEN
                or (name == "torch.load" and given.get("weights_only") != "True")
                or given.get("allow_pickle", "False") != "False"
                or given.get("trust_remote_code", "False") != "False"
            )
            if wrong:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert found == []


def test_a_file_outside_the_folder_is_not_read(tmp_path):
    """Through links: of a file, of the manifest, and of a whole folder among the checkpoints of a run."""
    with CheckpointWriter(tmp_path / "elsewhere", step=7, config="") as writer:
        writer.add("model/a", (4,), (0,), torch.ones(4))
    with CheckpointWriter(tmp_path / "run", step=1, config="") as other:
        other.add("model/a", (4,), (0,), torch.zeros(4))
    assert writer.path is not None
    (tmp_path / "run" / "iter_0000007").symlink_to(writer.path)
    reader, notes = open_verified(tmp_path / "run")
    assert reader.path == other.path and "symbolic link" in notes[0]
    (tmp_path / "run" / "iter_0000007").unlink()
    shutil.copytree(writer.path, tmp_path / "run" / "iter_0000007", symlinks=True)
    (tmp_path / "run" / "iter_0000007" / "manifest.json").unlink()
    (tmp_path / "run" / "iter_0000007" / "manifest.json").symlink_to(writer.path / "manifest.json")
    reader, notes = open_verified(tmp_path / "run")
    assert reader.path == other.path and "symbolic link" in notes[0]
