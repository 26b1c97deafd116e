"""scripts/pictures.py: pictures in docs/ know from which results they were drawn."""

import json
import sys
from dataclasses import replace

import pictures
import pytest
import update_docs
import update_readme

ALL = (*pictures.OF_README, *pictures.OF_DOCS)


def test_every_picture_in_docs_is_drawn_by_a_script():
    found = {path for ending in ("png", "svg") for path in pictures.DOCS.glob(f"*.{ending}")}
    assert {picture.path for picture in ALL} == found


@pytest.mark.parametrize("picture", ALL, ids=lambda picture: picture.path.name)
def test_the_pictures_are_current(picture):
    assert picture.is_current(), f"run scripts/update_{'readme' if picture in pictures.OF_README else 'docs'}.py"


@pytest.mark.parametrize("picture", ALL, ids=lambda picture: picture.path.name)
def test_a_picture_is_current_until_its_results_change(picture, tmp_path):
    pytest.importorskip("matplotlib")
    source, path = tmp_path / picture.source.name, tmp_path / picture.path.name
    source.write_bytes(picture.source.read_bytes())
    copy = replace(picture, path=path, source=source)
    assert not copy.is_current()
    copy.redraw()
    assert copy.is_current()
    once = path.read_bytes()
    copy.redraw()
    assert path.read_bytes() == once
    data = json.loads(source.read_text())
    source.write_text(json.dumps(data))  # the same numbers, laid out otherwise
    assert not copy.is_current()


@pytest.mark.parametrize(
    ("script", "name"), [(update_docs, "OF_DOCS"), (update_readme, "OF_README")], ids=["docs", "readme"]
)
def test_the_check_names_a_stale_picture_and_what_redraws_it(script, name, tmp_path, monkeypatch, capsys):
    stale = replace(getattr(pictures, name)[0], path=tmp_path / "old.svg")
    stale.path.write_text("drawn from other results")
    monkeypatch.setattr(pictures, name, (stale,))
    monkeypatch.setattr(sys, "argv", ["update", "--check"])
    assert script.main() == 1
    command = f"scripts/{script.__name__}.py"
    assert f"docs/old.svg: STALE: not drawn from {stale.source.name} as it is: run {command}" in capsys.readouterr().out
