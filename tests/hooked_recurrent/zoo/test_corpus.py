import hashlib

import pytest

from hooked_recurrent.zoo import corpus
from hooked_recurrent.zoo.corpus import SourceFile, fingerprint, is_test, read_folder, split_of, standard_library


def write(folder, name: str, content: bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def names(files: list[SourceFile]) -> list[str]:
    return [file.name for file in files]


def test_split_is_the_documented_hash_of_the_name():
    for name in ("doctest.py", "json/decoder.py", "xml/dom/minidom.py", "abc.py", "os.py"):
        remainder = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
        assert split_of(name) == ("heldout" if remainder == 0 else "train")


def test_split_of_known_files_does_not_drift():
    assert [split_of(name) for name in ("doctest.py", "ast.py", "codecs.py")] == ["heldout"] * 3
    assert [split_of(name) for name in ("os.py", "json/decoder.py")] == ["train"] * 2


def test_the_library_is_split_into_disjoint_sorted_parts():
    train, heldout = standard_library("train"), standard_library("heldout")
    assert names(train) == sorted(names(train)) and names(heldout) == sorted(names(heldout))
    assert not set(names(train)) & set(names(heldout))
    everything = [file for file in read_folder(corpus.library_folder()).files if not is_test(file.name)]
    assert len(train) + len(heldout) == len(everything)
    assert 0.05 < len(heldout) / len(everything) < 0.2


def test_test_suites_are_for_training_only(tmp_path):
    for number in range(60):
        write(tmp_path, f"pkg/tests/case{number}.py", b"x = 1\n")
        write(tmp_path, f"idle_test/case{number}.py", b"x = 1\n")
        write(tmp_path, f"code{number}.py", b"x = 1\n")
    without, added = (standard_library("train", tests, tmp_path) for tests in (False, True))
    heldout = standard_library("heldout", folder=tmp_path)
    assert len(added) - len(without) == 120
    assert not any(is_test(name) for name in names(without) + names(heldout))
    assert heldout == standard_library("heldout", include_tests=True, folder=tmp_path) != []


def test_a_file_called_test_is_no_test_suite():
    assert not is_test("test.py") and not is_test("unittest/case.py") and is_test("test/support/os_helper.py")


def test_installed_packages_and_build_files_are_left_out(tmp_path):
    write(tmp_path, "kept.py", b"x = 1\n")
    for name in (
        "site-packages/a.py",
        "dist-packages/a.py",
        "__pycache__/a.py",
        "lib-dynload/a.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "notes.txt",
    ):
        write(tmp_path, name, b"x = 1\n")
    assert names(list(read_folder(tmp_path).files)) == ["kept.py"]


def test_encodings_are_honoured_and_undecodable_files_counted(tmp_path):
    write(tmp_path, "latin.py", b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    write(tmp_path, "marked.py", b"\xef\xbb\xbfx = 1\r\n")
    write(tmp_path, "broken.py", b"x = '\xff\xfe'\n")
    write(tmp_path, "unknown.py", b"# coding: no-such-encoding\nx = 1\n")
    found = read_folder(tmp_path)
    assert {file.name: file.text.splitlines()[-1] for file in found.files} == {
        "latin.py": "x = 'é'",
        "marked.py": "x = 1",
    }
    assert found.undecodable == ("broken.py", "unknown.py")
    assert {file.name: file.n_bytes for file in found.files}["marked.py"] == len("x = 1\n")


def test_unknown_split_names_the_nearest():
    with pytest.raises(ValueError, match="unknown split 'held_out'.*did you mean 'heldout'"):
        standard_library("held_out")


def test_a_library_without_sources_says_so(tmp_path):
    with pytest.raises(ValueError, match="no Python source files under .*zip archive"):
        standard_library("train", folder=tmp_path)


def test_fingerprint_sees_names_contents_and_boundaries():
    files = [SourceFile("a", "bc"), SourceFile("d", "ef")]
    others = [
        [SourceFile("ab", "c"), SourceFile("d", "ef")],
        [SourceFile("a", "bcd"), SourceFile("", "ef")],
        [SourceFile("a", "bc"), SourceFile("d", "eg")],
        files[::-1],
        files[:1],
    ]
    prints = {fingerprint(other) for other in [files, *others]}
    assert len(prints) == 6 and fingerprint(list(files)) in prints
    assert all(len(text) == 16 for text in prints)
