"""`funnelrec finetune`: from a folder of pictures to a classifier that can be read back, with its report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from funnelrec.cli.app import run
from funnelrec.data.images import Images
from funnelrec.encode.image.named import load_classifier
from funnelrec.learn.transfer import predict


def write_films(folder: Path, n: int = 40) -> list[str]:
    """Noise; the ill ones have a bright patch. Two films a patient."""
    rows, generator = ["image,label,patient"], np.random.default_rng(0)
    for number in range(n):
        kind = "ill" if number // 2 % 2 else "well"
        film = generator.integers(0, 90, (28, 28)).astype(np.uint8)
        if kind == "ill":
            film[8:16, 8:16] += 150
        (folder / kind).mkdir(exist_ok=True, parents=True)
        Image.fromarray(film).save(folder / kind / f"{number}.png")
        rows.append(f"{kind}/{number}.png,{kind},p{number // 2}")
    return rows


OPTIONS = ["--size", "28", "--width", "4", "--grey", "--epochs", "4", "--batch-size", "10", "--no-progress"]


def test_a_folder_becomes_a_classifier_with_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_films(tmp_path / "films", 80)
    (tmp_path / "films" / "ill" / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "films" / "ill" / "nothing.jpg").write_bytes(b"")
    assert run(["finetune", str(tmp_path / "films"), "-o", str(tmp_path / "out"), *OPTIONS]) == 0
    assert "AUC" in capsys.readouterr().out
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    for word in ("sensitivity", "specificity", "ECE before calibration", "ill/broken.png | corrupt", "| empty |"):
        assert word in report
    for name in ("confusion", "reliability", "gradcam"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 3000
    facts = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert facts["test"]["auc"] > 0.9
    assert facts["rows"] == [56, 8, 16]

    model, kept = load_classifier(tmp_path / "out")
    images = Images.open(tmp_path / "out" / "pixels")
    assert kept["classes"] == ["ill", "well"]
    assert predict(model, images, torch.arange(4)).shape == (4, 2)
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(b"x")
    with pytest.raises(ValueError, match=r"holds no encoder: model\.safetensors was changed"):
        load_classifier(tmp_path / "out")


def test_a_table_with_patients_and_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.csv").write_text("\n".join(write_films(tmp_path, 60)))
    command = ["finetune", str(tmp_path / "list.csv"), *OPTIONS, "--patient", "patient"]
    assert run([*command, "-o", str(tmp_path / "one")]) == 0
    report = (tmp_path / "one" / "report.md").read_text(encoding="utf-8")
    assert "no patient in two of them" in report
    network = {
        name.removeprefix("network."): tensor.contiguous()
        for name, tensor in load_classifier(tmp_path / "one")[0].state_dict().items()
        if name.startswith("network.")
    }
    from safetensors.torch import save_file

    save_file(network, tmp_path / "net.safetensors")
    for extra in ([], ["--frozen"]):
        again = [*command, "-o", str(tmp_path / "two"), "--weights", str(tmp_path / "net.safetensors"), *extra]
        assert run(again) == 0
        assert json.loads((tmp_path / "two" / "metrics.json").read_text(encoding="utf-8"))["test"]["auc"] > 0.9
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoder", "resnet19"], "the networks are lenet, alexnet,"),
        (["--bad", "refuse"], "broken.png is corrupt"),
        (["--bad", "burn"], "received 'burn'"),
        (["--weights", "gone.safetensors"], "gone.safetensors is no safetensors file"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    write_films(tmp_path / "films", 24)
    (tmp_path / "films" / "ill" / "broken.png").write_bytes(b"\x89PNG")
    assert run(["finetune", str(tmp_path / "films"), "-o", str(tmp_path / "out"), *OPTIONS, *options]) == 2
    assert message in capsys.readouterr().err
