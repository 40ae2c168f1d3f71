"""Indexed datasets: Megatron's bytes, nothing half-written, nothing damaged accepted."""

from __future__ import annotations

import errno
import os
import struct

import numpy as np
import pytest

from megatron_telechat.data.indexed import dataset as indexed
from megatron_telechat.data.indexed.dataset import IndexedDataset, IndexedWriter, token_dtype
from megatron_telechat.errors import DataError, ResourceError
from tests.data.material import write_dataset

DOCUMENTS = [([5, 6, 7], [3]), ([], []), ([9], [1]), ([1, 2, 3, 4, 5], [2, 3]), ([400] * 300, [300])]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_bytes_are_megatrons(tmp_path, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    reference = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    with IndexedWriter(str(tmp_path / "ours"), dtype) as writer:
        for tokens, lengths in DOCUMENTS:
            reference.add_document(tokens, lengths)
            writer.add_document(tokens, lengths)
    reference.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_round_trip(tmp_path):
    with IndexedWriter(str(tmp_path / "d"), np.uint16) as writer:
        for tokens, lengths in DOCUMENTS:
            writer.add_document(tokens, lengths)
    data = IndexedDataset(str(tmp_path / "d.bin"))
    data.verify()
    assert (data.documents, len(data), data.num_tokens) == (5, 5, 309)
    assert [data[i].tolist() for i in range(4)] == [[5, 6, 7], [9], [1, 2], [3, 4, 5]]
    assert data.get(3, 1, 1).tolist() == [4]
    assert [data.document_of(i) for i in range(5)] == [0, 2, 3, 3, 4]


def test_empty_dataset_opens(tmp_path):
    with IndexedWriter(str(tmp_path / "d"), np.uint16) as writer:
        writer.add_document([])
    data = IndexedDataset(str(tmp_path / "d"))
    assert (data.documents, len(data), data.num_tokens) == (1, 0, 0)


@pytest.mark.parametrize("size,expected", [(131072, np.int32), (65500, np.int32), (65499, np.uint16)])
def test_dtype_follows_the_vocabulary(size, expected):
    assert token_dtype(size) is expected


def _set_u64(at, value):
    def change(idx, bin_):
        idx[at : at + 8] = struct.pack("<Q", value)

    return change


def _cut(which, count):
    def change(idx, bin_):
        del (idx if which == "idx" else bin_)[-count:]

    return change


DAMAGE = {
    "wrong magic": (lambda idx, bin_: idx.__setitem__(0, 0), "wrong magic"),
    "version": (_set_u64(9, 2), "version 2"),
    "dtype code": (lambda idx, bin_: idx.__setitem__(17, 99), "dtype code 99"),
    "float dtype": (lambda idx, bin_: idx.__setitem__(17, 6), "dtype code 6"),
    "other dtype": (lambda idx, bin_: idx.__setitem__(17, 4), "cut short"),
    "more sequences": (_set_u64(18, 21), "header"),
    "absurd count": (_set_u64(18, 2**60), "header"),
    "no boundary": (_set_u64(26, 0), "header"),
    "idx cut": (_cut("idx", 5), "header"),
    "idx cut in its header": (lambda idx, bin_: idx.__delitem__(slice(20, None)), "inside its header"),
    "idx empty": (lambda idx, bin_: idx.clear(), "wrong magic"),
    "bin cut": (_cut("bin", 2), "cut short"),
    "bin empty": (lambda idx, bin_: bin_.clear(), "cut short"),
    "bin longer": (lambda idx, bin_: bin_.extend(b"\0\0"), "longer"),
    "last boundary": (lambda idx, bin_: idx.__setitem__(slice(-8, None), struct.pack("<q", 3)), "boundaries"),
    "first offset": (_set_u64(34 + 4 * 20, 2), "byte 0"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_by_name(tmp_path, name):
    prefix = write_dataset(tmp_path / "d", 20)
    change, message = DAMAGE[name]
    content = {s: bytearray((tmp_path / f"d{s}").read_bytes()) for s in (".idx", ".bin")}
    change(content[".idx"], content[".bin"])
    for suffix, data in content.items():
        (tmp_path / f"d{suffix}").write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(prefix)
    assert str(tmp_path / "d.") in caught.value.render() and "fix:" in caught.value.render()


@pytest.mark.parametrize(
    "at,message", [(34 + 4 * 20 + 8 * 7, "does not begin where"), (34 + 4 * 3, "negative|does not begin")]
)
def test_verify_reads_every_entry(tmp_path, at, message):
    prefix = write_dataset(tmp_path / "d", 20)
    content = bytearray((tmp_path / "d.idx").read_bytes())
    content[at : at + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "d.idx").write_bytes(content)
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix).verify()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(tmp_path, suffix):
    prefix = write_dataset(tmp_path / "d", 3)
    os.unlink(prefix + suffix)
    with pytest.raises(DataError, match=f"d{suffix} does not exist"):
        IndexedDataset(prefix)


def test_nothing_stands_under_the_final_name_before_it_is_whole(tmp_path):
    with pytest.raises(RuntimeError):
        with IndexedWriter(str(tmp_path / "d"), np.uint16) as writer:
            writer.add_document([1, 2])
            assert not (tmp_path / "d.bin").exists()
            raise RuntimeError("interrupted")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rewrite_keeps_the_old_dataset(tmp_path):
    prefix = write_dataset(tmp_path / "d", 3)
    before = IndexedDataset(prefix).fingerprint()
    with pytest.raises(DataError, match="70000 does not fit uint16"):
        with IndexedWriter(prefix, np.uint16) as writer:
            writer.add_document([70000])
    assert IndexedDataset(prefix).fingerprint() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def test_a_full_disk_is_a_resource_error(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = IndexedWriter(str(tmp_path / "d"), np.uint16)
    writer.add_document([1, 2, 3])
    monkeypatch.setattr(indexed.os, "fsync", full)
    with pytest.raises(ResourceError, match="no space left.*are needed"):
        writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_sees_the_content_and_not_the_path(tmp_path):
    one, same, other = (
        IndexedDataset(write_dataset(tmp_path / n, 9, seed)) for n, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
