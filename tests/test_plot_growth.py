"""The plot of time against size: every panel measured and drawn, at sizes that take no time."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module: ModuleType = importlib.import_module("scripts.plot_growth")
    monkeypatch.setattr(module, "MINIMUM_SECONDS", 0.0)
    monkeypatch.setattr(module, "ROUNDS", 2)
    monkeypatch.setattr(module, "measure_limits", lambda: (1e11, 1e10))
    sizes = {
        "a convolution": ("channels", lambda: [module.convolution(c, 1, c, c, 6) for c in (1, 2, 4)]),
        "batch norm": ("rows", lambda: [module.batch_norm(size, 1, 2, size) for size in (2, 4)]),
        "another": ("images", lambda: [module.convolution(n, n, 2, 2, 5) for n in (1, 2)]),
        "one more": ("rows", lambda: [module.convolution(size, 1, 2, 2, size) for size in (3, 6)]),
    }
    monkeypatch.setattr(module, "PANELS", sizes)
    return module


def test_the_picture_and_its_numbers(script: ModuleType, tmp_path: Path) -> None:
    assert script.main([str(tmp_path / "growth.png")]) == 0
    with Image.open(tmp_path / "growth.png") as picture:
        assert picture.size == (1440, 1080)
    found = json.loads((tmp_path / "growth.json").read_text(encoding="utf-8"))
    assert set(found["panels"]) == {"a convolution", "batch norm", "another", "one more"}
    convolution = found["panels"]["a convolution"]
    assert convolution["sizes"] == [1, 2, 4]
    assert set(convolution["seconds"]) == {"forward", "input gradient", "filter gradient"}
    assert all(len(times) == 3 and min(times) > 0 for times in convolution["seconds"].values())
    # 2 * 9 operations a pixel, against 36 pixels in, 36 out and 9 weights of 4 bytes: the bytes take longer here.
    assert convolution["limit"][0] == pytest.approx(4 * 81 / 1e10)
    assert set(found["panels"]["batch norm"]["seconds"]) == {"forward", "input gradient"}


def test_a_folder_that_is_not_there(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "nowhere" / "growth.png")])
    assert "there is no folder" in capsys.readouterr().err
