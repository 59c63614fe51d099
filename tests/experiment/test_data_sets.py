"""`maveriq data status` knows each file by its content."""

from pathlib import Path

from maveriq.experiment.data_sets import FileState, sha256_of, status_of


def test_an_empty_folder_has_nothing_and_each_set_says_where_it_is_from():
    found = status_of(None)
    assert {each.name for each in found} >= {"azure", "a6000", "testbed", "serving"}
    for each in found:
        assert each.count(FileState.MISSING) == len(each.files) > 0
        assert not each.is_complete
        assert each.data_set.repository.startswith("https://github.com/")


def test_a_file_is_found_by_its_content(tmp_path: Path):
    [azure] = [each for each in status_of(None) if each.name == "azure"]
    (tmp_path / "azure").mkdir()
    for file in azure.files:
        (tmp_path / file.path).write_text("something else")
    [found] = [each for each in status_of(tmp_path) if each.name == "azure"]
    assert [file.state for file in found.files] == [FileState.OTHER] * 2
    assert found.is_complete  # a user may have another version


def test_the_measured_data_is_what_the_table_says(measured_data: Path):
    for each in status_of(measured_data):
        assert each.count(FileState.FOUND) == len(each.files), each.name


def test_the_checksum_is_sha256(tmp_path: Path):
    (tmp_path / "empty").touch()
    assert sha256_of(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
