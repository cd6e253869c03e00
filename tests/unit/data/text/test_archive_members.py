"""Archives are read and never unpacked: members that lead elsewhere are names, and links are no texts."""

import io
import tarfile
from pathlib import Path

import pytest

from ebft_mega.data.text.archives import read_text_archive
from ebft_mega.data.text.text_files import BadText, ReadOptions, TextDocument


def archive(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        for member in members:
            member.size = 4 if member.isreg() else 0
            tar.addfile(member, io.BytesIO(b"text"))
    return path


@pytest.mark.parametrize("name", ["../../outside.txt", "/etc/outside.txt", "a/../../outside.txt"])
def test_names_that_lead_elsewhere_are_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    file = archive(tmp_path / "in" / "a.tar", tarfile.TarInfo(name))
    (document,) = read_text_archive(file, "a.tar", ReadOptions())
    assert isinstance(document, TextDocument) and document.text == "text"
    assert document.path == f"a.tar:{name.removesuffix('.txt')}"
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "a.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
@pytest.mark.parametrize("target", ["/etc/passwd", "../../secret", "0.txt"])
def test_members_that_are_no_files_are_no_texts(tmp_path: Path, kind: bytes, target: str) -> None:
    (tmp_path / "secret").write_text("a secret")
    member = tarfile.TarInfo("1.txt")
    member.type, member.linkname = kind, target
    documents = list(
        read_text_archive(archive(tmp_path / "a.tar", tarfile.TarInfo("0.txt"), member), "a", ReadOptions())
    )
    assert [type(document) for document in documents] in ([BadText, TextDocument], [TextDocument, BadText])
    (bad,) = (document for document in documents if isinstance(document, BadText))
    assert "no regular file" in bad.problem.found and not bad.is_file
