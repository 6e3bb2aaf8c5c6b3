"""The folder on disk: whole or refused, old or new, never a mixture."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from funnelrec.serve import artifact
from funnelrec.serve.artifact import MANIFEST, ArtifactError, read_artifact, write_artifact

SMALL = {"match.safetensors": bytes(range(64)), "catalogue.arrow": b"ARROW1" * 8}


def flips(content: bytes) -> Iterator[bytes]:
    """Every version of `content` with one bit changed."""
    for place in range(len(content)):
        for bit in range(8):
            yield content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", {"candidates": 5, "name": "ü"}, SMALL)
    manifest, members = read_artifact(tmp_path / "a")
    assert members == SMALL
    assert (manifest["candidates"], manifest["name"], manifest["format"]) == (5, "ü", 1)


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_artifact(tmp_path / name, {"x": [1.5, None]}, SMALL)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("a", "b"))
    assert a == b


def test_every_flipped_bit_is_refused_by_name(tmp_path: Path) -> None:
    write_artifact(tmp_path, {"candidates": 5, "now": 1.25}, SMALL)
    files = sorted(tmp_path.iterdir())
    tried = 0
    for path in files:
        whole = path.read_bytes()
        for broken in flips(whole):
            path.write_bytes(broken)
            with pytest.raises(ArtifactError) as caught:
                read_artifact(tmp_path)
            assert path.name in str(caught.value)
            tried += 1
        path.write_bytes(whole)
    assert tried == 8 * sum(p.stat().st_size for p in files)
    read_artifact(tmp_path)  # and the undamaged one is accepted


def test_safetensors_alone_would_accept_a_flipped_bit(tmp_path: Path) -> None:
    """The positive control: without the digests, damage goes through."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load, save

    content = save({"weight": torch.ones(4)})
    broken = content[:-1] + bytes([content[-1] ^ 1])
    assert not torch.equal(load(broken)["weight"], torch.ones(4))
    write_artifact(tmp_path, {}, {"match.safetensors": content})
    member = next(p for p in tmp_path.iterdir() if p.name != MANIFEST)
    member.write_bytes(broken)
    with pytest.raises(ArtifactError, match=f"{member.name}.*SHA-256"):
        read_artifact(tmp_path)


def test_truncation_at_every_length_is_refused(tmp_path: Path) -> None:
    write_artifact(tmp_path, {"candidates": 5}, SMALL)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(ArtifactError, match=path.name):
                read_artifact(tmp_path)
        path.write_bytes(whole)


def rewritten(folder: Path, **changes: object) -> None:
    """The manifest with some entries changed, and signed again as its writer would."""
    body = json.loads((folder / MANIFEST).read_text())
    body.pop("sha256")
    body.update(changes)
    text = json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    body["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/passwd", "C:\\x", "match.0123456789ab.pkl", "a/b.0123456789ab.arrow", "x\0.arrow", ""],
)
def test_hostile_names_are_refused(tmp_path: Path, name: str) -> None:
    write_artifact(tmp_path, {}, SMALL)
    rewritten(tmp_path, files={"m": {"file": name, "sha256": "0" * 64, "bytes": 3}})
    with pytest.raises(ArtifactError, match="no member's name"):
        read_artifact(tmp_path)


def test_a_link_in_place_of_a_member_is_refused(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", {}, SMALL)
    member = next(p for p in (tmp_path / "a").iterdir() if p.name.startswith("match"))
    member.rename(tmp_path / "elsewhere")
    member.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=f"{member.name} is missing"):
        read_artifact(tmp_path / "a")


def test_a_newer_format_and_a_missing_folder_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is not a funnel: it has no funnel\.json"):
        read_artifact(tmp_path)
    write_artifact(tmp_path, {}, SMALL)
    rewritten(tmp_path, format=2)
    with pytest.raises(ArtifactError, match="has format 2, this version reads 1; upgrade"):
        read_artifact(tmp_path)


def test_a_wrong_member_name_is_refused_when_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be a member's name"):
        write_artifact(tmp_path, {}, {"match.pkl": b""})


def test_a_reader_goes_on_with_the_funnel_that_replaced_the_one_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_artifact(tmp_path, {"version": 1}, version(1))
    real, calls = artifact._read_member, []

    def replaced_meanwhile(folder: Path, entry: dict[str, object]) -> bytes:
        calls.append(entry["file"])
        if len(calls) == 2:
            write_artifact(tmp_path, {"version": 2}, version(2))
        return real(folder, entry)

    monkeypatch.setattr(artifact, "_read_member", replaced_meanwhile)
    assert whole_versions(tmp_path) == 2
    next(tmp_path.glob("part_2.*")).unlink()
    with pytest.raises(ArtifactError, match=r"part_2\..* is missing"):
        read_artifact(tmp_path)


def test_writers_wait_for_one_another(tmp_path: Path) -> None:
    """Else the tidying of one removes the members that the other has written but not yet named."""
    write_artifact(tmp_path, {"version": 0}, version(0))
    with artifact._only_writer(tmp_path):
        child = os.fork()
        if child == 0:
            write_artifact(tmp_path, {"version": 1}, version(1))
            os._exit(0)
        time.sleep(0.3)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        assert whole_versions(tmp_path) == 0
    assert os.waitpid(child, 0)[1] == 0
    assert whole_versions(tmp_path) == 1


def version(number: int) -> dict[str, bytes]:
    return {f"part_{i}.arrow": bytes([number]) * 200_000 for i in range(4)}


def whole_versions(folder: Path) -> int:
    """The version that lies in the folder; an error if it is a mixture."""
    manifest, members = read_artifact(folder)
    contents = {content[0] for content in members.values()} | {manifest["version"]}
    assert len(contents) == 1
    return int(contents.pop())


def kill_while_saving(folder: Path, number: int, delay: float | None, save: object) -> None:
    """Save in a process of its own, killed after `delay` seconds if there are any."""
    child = os.fork()
    if child == 0:
        save(folder, {"version": number}, version(number))  # type: ignore[operator]
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_fifty_kills_while_saving_leave_the_old_or_the_new(tmp_path: Path) -> None:
    random.seed(0)
    folder = tmp_path / "a"
    write_artifact(folder, {"version": 0}, version(0))
    started = time.perf_counter()
    kill_while_saving(folder, 1, None, write_artifact)
    duration = time.perf_counter() - started
    assert whole_versions(folder) == 1
    seen, current = set(), 1
    for number in range(2, 52):
        kill_while_saving(folder, number, random.uniform(0, 1.5 * duration), write_artifact)
        found = whole_versions(folder)
        assert found in (current, number)
        seen.add(found == number)
        current = found
    assert seen == {True, False}, "the kills must fall on both sides of the commit"
    write_artifact(folder, {"version": 99}, version(99))
    assert len(list(folder.iterdir())) == 1 + len(version(99)), "the next save removes what kills left behind"


def careless_save(folder: Path, manifest: dict[str, int], members: dict[str, bytes]) -> None:
    """A planted fault: files written in place under fixed names, the manifest first."""
    rewritten(folder, **manifest)
    body = json.loads((folder / MANIFEST).read_text())
    for name, content in members.items():
        (folder / body["files"][name]["file"]).write_bytes(content)
        time.sleep(0.005)


def test_the_check_above_catches_a_careless_save(tmp_path: Path) -> None:
    """On a busy machine a kill may come before the save or after it: one of some must come in between."""
    write_artifact(tmp_path, {"version": 0}, version(0))
    with pytest.raises((ArtifactError, AssertionError)):
        for _ in range(20):
            kill_while_saving(tmp_path, 1, 0.012, careless_save)
            whole_versions(tmp_path)
