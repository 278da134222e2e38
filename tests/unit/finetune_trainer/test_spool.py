"""The spool: what one process committed another finds again, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_trainer.errors import RetryableError, UserError
from finetune_trainer.spool import IGNORED, DocumentSpool

KEY = {"data": "sha256:1", "maxLength": 8}
CHUNKS: list[list[tuple[list[int], list[tuple[int, int]], int]]] = [
    [([5, 6, 7], [(1, 3)], 11), ([8], [], 2**64 - 1)],
    [],
    [([9, 0, 4, 4, 2**31 - 1], [(1, 2), (2, 3), (4, 5)], 12)],
]


def fill(spool: DocumentSpool, chunks: int = len(CHUNKS)) -> None:
    for number, chunk in enumerate(CHUNKS[:chunks]):
        for document in chunk:
            spool.add(*document)
        spool.commit({"chunk": number})


def contents(spool: DocumentSpool) -> list[tuple[list[int], list[int], int]]:
    """(tokens, labels, key) of every document."""
    keys = spool.keys.tolist()
    return [(spool.tokens(n).tolist(), spool.labels(n).tolist(), keys[n]) for n in range(len(spool))]


EXPECTED = [
    ([5, 6, 7], [IGNORED, 6, 7], 11),
    ([8], [IGNORED], 2**64 - 1),
    ([9, 0, 4, 4, 2**31 - 1], [IGNORED, 0, 4, IGNORED, 2**31 - 1], 12),
]


def kill_after(folder: Path, chunks: int) -> None:
    """Leave what a process leaves that is killed after so many commits, in the middle of the next chunk."""
    spool = DocumentSpool(folder, KEY)
    fill(spool, chunks)
    spool.add([1, 2, 3], [(1, 2)])
    spool.close(keep=True)


def test_documents_come_back_as_they_were_added(tmp_path: Path) -> None:
    with DocumentSpool(tmp_path) as spool:
        fill(spool)
        assert contents(spool) == EXPECTED
        assert spool.lengths.tolist() == [3, 1, 5]
        assert spool.supervised_counts.tolist() == [2, 0, 3]
        assert (spool.learnt(0), spool.learnt(1), spool.learnt(2)) == ([(1, 3)], [], [(1, 3), (4, 5)])
        assert spool.largest_token() == 2**31 - 1
        with pytest.raises(ValueError, match="nothing can be added"):
            spool.add([1], [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("chunks", range(len(CHUNKS) + 1))
def test_what_was_committed_before_a_kill_is_there_again(tmp_path: Path, chunks: int) -> None:
    folder = tmp_path / ".output.spool"
    kill_after(folder, chunks)
    with DocumentSpool(folder, KEY) as spool:
        assert spool.notes == [{"chunk": number} for number in range(chunks)]
        assert len(spool) == sum(len(chunk) for chunk in CHUNKS[:chunks])
        for number in range(chunks, len(CHUNKS)):
            for document in CHUNKS[number]:
                spool.add(*document)
            spool.commit({"chunk": number})
        assert contents(spool) == EXPECTED
        assert spool.supervised_counts.tolist() == [2, 0, 3]
    assert list(tmp_path.iterdir()) == []


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return apply


@pytest.mark.parametrize(
    ("damage", "chunks"),
    [
        pytest.param(lambda folder: None, 3, id="nothing happened"),
        pytest.param(edit("journal.jsonl", lambda data: data[:-5]), 2, id="the last line is cut off"),
        pytest.param(edit("tokens.bin", lambda data: data + b"1234567"), 3, id="tokens of no chunk"),
        pytest.param(edit("documents.bin", lambda data: data + b"12345"), 3, id="half a document of no chunk"),
        pytest.param(edit("tokens.bin", lambda data: bytes([data[0] ^ 1]) + data[1:]), 0, id="another token"),
        pytest.param(edit("tokens.bin", lambda data: data[:-4]), 0, id="tokens are missing"),
        pytest.param(edit("tokens.bin", lambda data: data[:-3]), 0, id="a part of a token is missing"),
        pytest.param(edit("documents.bin", lambda data: data[:-1] + b"\x01"), 0, id="another length"),
        pytest.param(edit("journal.jsonl", lambda data: data.replace(b'"tokens": 4', b'"tokens": -4')), 0, id="minus"),
        pytest.param(edit("journal.jsonl", lambda data: data.replace(b'"sha256"', b'"sha512"')), 0, id="no sha256"),
        pytest.param(edit("journal.jsonl", lambda data: data.replace(b"{", b"[")), 0, id="no JSON"),
        pytest.param(edit("journal.jsonl", lambda data: b""), 0, id="an empty journal"),
        pytest.param(lambda folder: (folder / "tokens.bin").unlink(), 0, id="no tokens"),
        pytest.param(edit("journal.jsonl", lambda data: data.replace(b"sha256:1", b"sha256:2")), 0, id="of other data"),
    ],
)
def test_a_damaged_spool_is_thrown_away(tmp_path: Path, damage: Callable[[Path], None], chunks: int) -> None:
    folder = tmp_path / ".output.spool"
    kill_after(folder, 3)
    damage(folder)
    spool = DocumentSpool(folder, KEY)
    assert spool.notes == [{"chunk": number} for number in range(chunks)]
    assert len(spool) == sum(len(chunk) for chunk in CHUNKS[:chunks])
    for number in range(chunks, len(CHUNKS)):
        for document in CHUNKS[number]:
            spool.add(*document)
        spool.commit({"chunk": number})
    spool.close(keep=True)
    with DocumentSpool(folder, KEY) as again:
        assert contents(again) == EXPECTED


def test_a_spool_of_other_inputs_is_not_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / ".output.spool"
    kill_after(folder, 3)
    with DocumentSpool(folder, {**KEY, "maxLength": 9}) as spool:
        assert (len(spool), spool.notes) == (0, [])
    assert "is thrown away: it was made from other inputs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        pytest.param(RetryableError("VolumeFull", "no space"), True, id="another attempt may do better"),
        pytest.param(MemoryError(), True, id="out of memory"),
        pytest.param(UserError("RecordsRejected", "ten problems"), False, id="the data must be mended first"),
    ],
)
def test_what_is_kept_depends_on_how_prepare_ended(tmp_path: Path, error: Exception, kept: bool) -> None:
    folder = tmp_path / ".output.spool"

    def prepare() -> None:
        with DocumentSpool(folder, KEY) as spool:
            fill(spool)
            raise error

    with pytest.raises(type(error)):
        prepare()
    assert folder.exists() == kept
    assert len(list(tmp_path.iterdir())) == (2 if kept else 0)


def test_a_second_process_does_not_share_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / ".output.spool"
    with DocumentSpool(folder, KEY) as first:
        fill(first, 1)
        with DocumentSpool(folder, KEY) as second:
            assert "another process has it" in capsys.readouterr().out
            assert len(second) == 0
            fill(second)
            assert contents(second) == EXPECTED
        assert len(first) == 2
        assert contents(first) == EXPECTED[:2]
