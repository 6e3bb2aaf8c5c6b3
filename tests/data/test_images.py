"""Pictures from files: what is read, what is refused, and that no file kills a run."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from funnelrec.data.batches import Batches, counter_generator
from funnelrec.data.images import FAULTS, ImageError, ImageExamples, Images, actions, decode, split_rows
from funnelrec.data.sources import images as sources


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def plain(value: int = 100, size: int = 8, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (size, size), value if mode == "L" else (value, 0, 255 - value))


FRAMES = [plain(50), plain(200)]
DEEP = Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16))


def chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)


SIGNATURE = b"\x89PNG\r\n\x1a\n"
BOMB = SIGNATURE + chunk(b"IHDR", (60_000).to_bytes(4) * 2 + b"\x08\x02\0\0\0") + chunk(b"IDAT", b"")  # 3.6 billion
FAULTY = {
    "empty": b"",
    "corrupt": encoded(Image.effect_noise((64, 64), 80).convert("RGB"))[:300],
    "huge": BOMB,
    "animated": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "cmyk": encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"),
    "deep": encoded(DEEP),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_named_skipped_refused_or_mended(kind: str) -> None:
    pixels, fault = decode(FAULTY[kind], "a.png", size=8, told=actions("skip"))
    assert pixels is None
    assert fault is not None
    assert (fault.name, fault.kind, fault.action) == ("a.png", kind, "skip")
    with pytest.raises(ImageError, match=f"a.png is {kind}: .*; mend or remove it, or say what to do"):
        decode(FAULTY[kind], "a.png", size=8, told=actions("refuse"))
    pixels, fault = decode(FAULTY[kind], "a.png", size=8, told=actions("use"))
    assert (pixels is not None) == (kind in ("animated", "cmyk", "deep"))
    assert fault is not None


def test_a_good_file_has_no_fault() -> None:
    pixels, fault = decode(encoded(plain(100)), "a.png", size=8, told=actions("refuse"))
    assert fault is None
    assert pixels is not None
    assert pixels[:, 0, 0].tolist() == [100, 0, 155]


def test_huge_is_what_the_caller_says() -> None:
    data = encoded(plain(size=20))
    assert decode(data, "a.png", size=8, told=actions())[1] is None
    _, fault = decode(data, "a.png", size=8, told=actions(), max_pixels=399)
    assert fault is not None
    assert (fault.kind, fault.reason) == ("huge", "20 x 20 pixels, more than 399")


def test_a_deep_picture_keeps_its_greys_and_inks_become_light() -> None:
    pixels, _ = decode(FAULTY["deep"], "a.png", size=8, channels=1, told=actions("use"))
    assert pixels is not None
    assert (pixels.min(), pixels.max(), len(np.unique(pixels))) == (0, 255, 64)
    pixels, _ = decode(FAULTY["cmyk"], "a.jpg", size=8, told=actions("use"))
    assert pixels is not None
    assert pixels[0].min() > 200  # magenta and yellow ink make red
    assert pixels[1:].max() < 60


def test_the_middle_square_is_scaled_and_turned_as_the_camera_was() -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    pixels, _ = decode(encoded(Image.fromarray(wide)), "a.png", size=5, told=actions())
    assert pixels is not None
    assert pixels.shape == (3, 5, 5)
    assert pixels[:, :, 1:4].min() == 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    half = np.zeros((8, 8), dtype=np.uint8)
    half[:4] = 255
    pixels, _ = decode(encoded(Image.fromarray(half), exif=exif), "a.png", size=8, channels=1, told=actions())
    assert pixels is not None
    assert pixels[0, 0, 0] == 0
    assert pixels[0, -1, 0] == 255


@pytest.mark.parametrize("cut", [0, 1, 5, 30, 60, 99])
def test_no_damage_escapes(cut: int) -> None:
    generator = np.random.default_rng(cut)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"):
        data = bytearray(encoded(Image.effect_noise((20, 20), 50).convert("RGB"), kind))
        for place in generator.integers(0, len(data), 5):
            data[place] = int(generator.integers(256))
        pixels, _ = decode(bytes(data[: len(data) - cut]), "a", size=8, told=actions("use"))
        assert pixels is None or pixels.shape == (3, 8, 8)


def test_what_to_do_must_be_possible() -> None:
    assert actions({"deep": "use"})["deep"] == "use"
    with pytest.raises(ValueError, match="corrupt files: skip or refuse, received 'use'"):
        actions({"corrupt": "use"})
    with pytest.raises(ValueError, match=r"the faults empty, .* received 'blurred'"):
        actions({"blurred": "skip"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for kind, value in (("cat", 10), ("dog", 200)):
        (tmp_path / kind).mkdir()
        for number in range(6):
            (tmp_path / kind / f"{number}.png").write_bytes(encoded(plain(value + number)))
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    return tmp_path


def test_a_folder_a_class(folder: Path) -> None:
    for kind, data in FAULTY.items():
        (folder / "dog" / f"{kind}.png").write_bytes(data)
    found = sources.from_folder(folder, size=8)
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0] * 6 + [1] * 6
    assert found.pixels[7, 0, 0, 0] == 201
    assert found.names[7] == "dog/1.png"
    assert sorted(f.kind for f in found.faults) == sorted(FAULTS)
    with pytest.raises(ImageError, match=r"dog/empty\.png is empty"):
        sources.from_folder(folder, size=8, faults={"empty": "refuse"})
    assert len(sources.from_folder(folder, size=8, faults="use")) == 15


def test_parts_of_a_folder(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "x.png").write_bytes(encoded(plain()))
    found = sources.from_folder(tmp_path, size=8)
    assert found.part is not None
    assert sorted(found.part.tolist()) == [0, 1, 2]
    assert found.rows(2).shape == (1,)


def test_a_memory_map_holds_the_same(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "5.png").write_bytes(b"")
    plainly = sources.from_folder(folder, size=8)
    mapped = sources.from_folder(folder, size=8, to=tmp_path / "kept")
    again = Images.open(tmp_path / "kept")
    copied = Images.open(plainly.save(tmp_path / "saved"))
    for other in (mapped, again, copied):
        assert torch.equal(other.pixels, plainly.pixels)
        assert torch.equal(other.labels, plainly.labels)
        assert (other.names, other.faults) == (plainly.names, plainly.faults)
    again.pixels[0] = 7  # stays in memory
    assert torch.equal(Images.open(tmp_path / "kept").pixels, plainly.pixels)
    with (tmp_path / "kept" / "pixels.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="2,113 bytes where 2,112 are due"):
        Images.open(tmp_path / "kept")
    with pytest.raises(ValueError, match="holds no pictures"):
        Images.open(tmp_path)


def test_a_table_of_files(folder: Path) -> None:
    rows = ["file,kind,person,fold", *(f"cat/{n}.png,{'yes' if n % 2 else 'no'},p{n // 2},train" for n in range(5))]
    rows += ["dog/0.png,,p9,test", "gone.png,yes,p9,test"]
    (folder / "list.csv").write_text("\n".join(rows))
    found = sources.from_csv(folder / "list.csv", size=8, image="file", label="kind", patient="person", part="fold")
    assert found.classes == ("no", "yes")
    assert found.labels.tolist() == [0, 1, 0, 1, 0, -1]
    assert found.group is not None
    assert found.group.tolist() == [1, 1, 2, 2, 3, 4]
    assert [(f.name, f.kind) for f in found.faults] == [("gone.png", "corrupt")]
    with pytest.raises(ValueError, match="no column 'image'; its columns are file, kind, person, fold"):
        sources.from_csv(folder / "list.csv", size=8)
    (folder / "list.csv").write_text("image,label,fold\ncat/0.png,a,first\n")
    with pytest.raises(ValueError, match="'fold' holds train, val or test, received 'first'"):
        sources.from_csv(folder / "list.csv", size=8, part="fold")


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4) for n in array.shape) + array.tobytes()


def test_idx_files(tmp_path: Path) -> None:
    pictures = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2)
    labels = np.array([3, 1, 4, 1, 5], dtype=np.uint8)
    for name, data in zip(
        sources.IDX, (idx(pictures[:3]), idx(labels[:3]), idx(pictures[3:]), idx(labels[3:])), strict=True
    ):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
    found = sources.mnist(tmp_path)
    assert torch.equal(found.pixels[:, 0], torch.from_numpy(pictures))
    assert found.labels.tolist() == labels.tolist()
    assert found.rows(2).tolist() == [3, 4]
    (tmp_path / f"{sources.IDX[0]}.gz").write_bytes(gzip.compress(idx(pictures[:3])[:-1]))
    with pytest.raises(ValueError, match="holds 11 values where 12 are due"):
        sources.mnist(tmp_path)
    (tmp_path / f"{sources.IDX[0]}.gz").write_bytes(gzip.compress(b"<html>"))
    with pytest.raises(ValueError, match="no idx file"):
        sources.mnist(tmp_path)


def test_cifar_in_its_binary_form_and_as_jpeg(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (4, 3073)).astype(np.uint8)
    rows[:, 0] = [1, 2, 3, 4]
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        for name, data in (("b/test_batch.bin", rows[3:]), ("b/data_batch_1.bin", rows[:3]), ("b/readme", rows[0])):
            info = tarfile.TarInfo(name)
            info.size = data.nbytes
            archive.addfile(info, io.BytesIO(data.tobytes()))
    found = sources.cifar10(tmp_path / "c.tar.gz")
    assert found.labels.tolist() == [1, 2, 3, 4]
    assert found.part is not None
    assert found.part.tolist() == [0, 0, 0, 2]
    assert found.pixels[2, 1, 0, 0] == rows[2, 1 + 1024]
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "7.jpg").write_bytes(encoded(plain(90, 32), "JPEG"))
    assert sources.cifar10(tmp_path).classes == ("cat",)
    (tmp_path / "bad.tar.gz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=re.escape("pass a folder or a whole .tar[.gz|.zst]")):
        sources.cifar10(tmp_path / "bad.tar.gz")


def test_medmnist(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    for part, n in (("train", 4), ("val", 2), ("test", 3)):
        arrays[f"{part}_images"] = np.full((n, 5, 5, 3), n, dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(n, dtype=np.uint8)[:, None] % 2
    np.savez(tmp_path / "m.npz", **arrays)  # type: ignore[arg-type]
    found = sources.medmnist(tmp_path / "m.npz")
    assert found.pixels.shape == (9, 3, 5, 5)
    assert [len(found.rows(p)) for p in range(3)] == [4, 2, 3]
    np.savez(tmp_path / "o.npz", train_images=np.array([{}], dtype=object))
    for name, message in (("o.npz", "no MedMNIST file"), ("gone.npz", "no MedMNIST file")):
        with pytest.raises(ValueError, match=message):
            sources.medmnist(tmp_path / name)


def pictures(n: int = 100, **facts: Any) -> Images:
    pixels = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 4, 4).contiguous()
    return Images(pixels, torch.arange(n) % 4 // 3, ("a", "b"), **facts)


def test_no_patient_is_in_two_parts() -> None:
    group = torch.randint(0, 23, (100,), generator=torch.Generator().manual_seed(1))
    images = pictures(group=group)
    parts = split_rows(images, valid=0.2, test=0.3)
    assert sorted(torch.cat(parts).tolist()) == list(range(100))
    people = [set(group[rows].tolist()) for rows in parts]
    assert not people[0] & people[1]
    assert not people[0] & people[2]
    assert not people[1] & people[2]
    assert 20 <= len(parts[2]) <= 42
    free = split_rows(pictures(), valid=0.2, test=0.3)  # the control: without patients they do mix
    assert set(group[free[0]].tolist()) & set(group[free[2]].tolist())


def test_classes_are_divided_in_the_same_shares() -> None:
    images = pictures()
    rows = split_rows(images, valid=0.2, test=0.2)
    assert [len(r) for r in rows] == [60, 20, 20]
    assert [int(images.labels[r].sum()) for r in rows] == [15, 5, 5]
    assert not torch.equal(rows[2], split_rows(images, valid=0.2, test=0.2, seed=1)[2])


def test_published_parts_count() -> None:
    part = torch.zeros(100, dtype=torch.uint8)
    part[90:] = 2
    rows = split_rows(pictures(part=part), valid=0.2)
    assert rows[2].tolist() == list(range(90, 100))
    assert 15 <= len(rows[1]) <= 20
    with pytest.raises(ValueError, match="no picture is left to test on"):
        split_rows(pictures(part=torch.zeros(100, dtype=torch.uint8)))


def test_batches_of_pictures() -> None:
    images = pictures()

    def change(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return pixels + torch.randint(0, 100, (len(pixels), 1, 1, 1), generator=generator, dtype=torch.uint8)

    examples = ImageExamples(images, torch.arange(10, 20), augment=change, views=2)
    batches = Batches(examples, 4, shuffle=True, seed=3)
    one, two = next(batches.epoch(0)), next(batches.epoch(0))
    assert torch.equal(one.image, two.image)  # a function of seed, epoch and batch
    assert not torch.equal(one.image, one.image2)
    assert not torch.equal(one.image, next(batches.epoch(1)).image)
    assert torch.equal(images.labels[one.row], one.label)
    assert torch.equal(examples.gather(torch.tensor([0]), None).image, images.pixels[10:11])
    assert counter_generator(1).initial_seed() != counter_generator(2).initial_seed()


def test_labels_must_be_classes() -> None:
    with pytest.raises(ValueError, match="class number below 2, received 0 to 2"):
        Images(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.arange(3), ("a", "b"))


@pytest.mark.slow
def test_real_sources(real_data: Path) -> None:
    digits = sources.mnist(real_data / "mnist")
    assert (len(digits.rows(0)), len(digits.rows(2))) == (60_000, 10_000)
    assert digits.pixels[digits.rows(2)].double().mean().item() / 255 == pytest.approx(0.1325, abs=2e-4)
    films = sources.medmnist(real_data / "pneumoniamnist" / "pneumoniamnist_rebuilt.npz")
    assert [len(films.rows(p)) for p in range(3)] == [4708, 524, 624]
    photos = sources.cifar10(real_data / "cifar10-jpg" / "train.tar.zst")
    assert (len(photos), len(photos.faults), photos.classes) == (50_000, 0, sources.CIFAR)
