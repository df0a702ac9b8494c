import json
import tarfile
from pathlib import Path

import pytest

from ssl_pipeline.config import run_command
from ssl_pipeline.data.errors import DataError
from ssl_pipeline.data_tools.check_shards import CheckShards, check_shards
from ssl_pipeline.packing.make_shards import MakeShards, make_shards


@pytest.fixture
def made(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Path:
    """22 images in four shards."""
    output = tmp_path / "out"
    make_shards(MakeShards(source=str(folder), output=output, prefix="train", samples_per_shard=6, workers=1))
    capsys.readouterr()
    return output


def checked(directory: Path | str, *arguments: str) -> int:
    return run_command(
        CheckShards, check_shards, command="check_shards", argv=[str(directory), "workers=1", *arguments]
    )


def test_whole_shards_have_no_problems(made: Path, capsys: pytest.CaptureFixture) -> None:
    assert checked(made) == 0
    assert "4 shards, 22 images (22 with a label)" in capsys.readouterr().out
    assert checked(f"directory={made}", "decode=false") == 0
    assert checked(f"{made}/out-00000[12].tar") == 0
    assert "2 shards, 12 images" in capsys.readouterr().out
    assert checked(f"{made}/out-000001*.tar") == 0
    assert "1 shard, 6 images" in capsys.readouterr().out


def test_shards_made_by_others_are_checked_too(made: Path, capsys: pytest.CaptureFixture) -> None:
    (made / "manifest.json").unlink()
    assert checked(made) == 0
    assert "no manifest.json: no problems" in capsys.readouterr().out


def test_every_problem_is_listed(made: Path, capsys: pytest.CaptureFixture) -> None:
    first, second, third, fourth = sorted(made.glob("*.tar"))
    with tarfile.open(first) as archive:
        member = next(member for member in archive if not member.name.endswith(".cls"))
    data = bytearray(first.read_bytes())
    data[member.offset_data : member.offset_data + member.size] = b"?" * member.size
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:3000])
    third.unlink()
    fourth.rename(made / "renamed.tar")
    assert checked(made) == 1
    problems = capsys.readouterr().out.splitlines()
    key = member.name.split(".")[0]
    expected = [
        f"Shard '{first.name}', key '{key}', byte {member.offset_data}: no JPEG, PNG or WebP image.",
        f"Shard '{second.name}' is truncated",
        f"Shard '{first.name}' is not the one that manifest.json lists",
        "Shard 'renamed.tar' is not in manifest.json.",
        f"Shard '{third.name}' is in manifest.json but missing.",
        f"Shard '{fourth.name}' is in manifest.json but missing.",
    ]
    assert len(problems) == len(expected) + 1
    for problem, start in zip(problems, expected, strict=False):
        assert problem.startswith(start)
    assert problems[-1].endswith("6 problems")


def test_without_decoding_the_checksum_still_tells(made: Path, capsys: pytest.CaptureFixture) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (made / "manifest.json").write_text(json.dumps(manifest))
    assert checked(made, "decode=false") == 1
    assert "its checksum differs" in capsys.readouterr().out


def test_a_manifest_that_counts_otherwise_is_told(made: Path, capsys: pytest.CaptureFixture) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["shards"][0]["samples"] += 1
    manifest["samples"] += 1
    (made / "manifest.json").write_text(json.dumps(manifest))
    assert checked(made, "decode=false") == 1
    told = capsys.readouterr().out
    assert f"has {manifest['shards'][0]['samples'] - 1} samples in" in told
    assert f"manifest.json says {manifest['shards'][0]['samples']} in" in told


def test_no_shards_are_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert checked(tmp_path / "nowhere") == 2
    assert "There is no directory" in capsys.readouterr().err


def test_a_manifest_for_shards_made_by_others(made: Path, capsys: pytest.CaptureFixture) -> None:
    original = json.loads((made / "manifest.json").read_text())
    assert checked(made, "write_manifest=true") == 2
    assert "has a manifest.json already" in capsys.readouterr().err
    (made / "manifest.json").unlink()
    assert checked(f"{made}/*.tar", "write_manifest=true") == 2
    assert "Give the directory itself" in capsys.readouterr().err
    assert checked(made, "write_manifest=true") == 0
    written = json.loads((made / "manifest.json").read_text())
    assert written["shards"] == original["shards"]
    assert checked(made) == 0
    again = MakeShards(source="digits", output=made, overwrite=True)
    with pytest.raises(DataError, match="which make_shards did not write"):  # they stay somebody else's
        make_shards(again)


def test_no_manifest_for_shards_with_problems(made: Path, capsys: pytest.CaptureFixture) -> None:
    (made / "manifest.json").unlink()
    first = min(made.glob("*.tar"))
    first.write_bytes(first.read_bytes()[:3000])
    assert checked(made, "write_manifest=true") == 1
    assert "no manifest.json was written" in capsys.readouterr().out
    assert not (made / "manifest.json").exists()


def test_what_is_passed_over_and_odd_labels_are_problems(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.jpg", "a.cls", "b.cls", "c.cls", "README.md"):
            archive.addfile(tarfile.TarInfo(name))
    assert checked(tmp_path, "decode=false", "write_manifest=true") == 1
    first, second, last, written = capsys.readouterr().out.splitlines()
    assert written == f"wrote {tmp_path / 'manifest.json'}"  # a run passes them over too
    assert first.startswith("Shard 'a.tar', key 'b', byte 1024: a sample needs one image")
    assert first.endswith("It has .cls. 1 more have the same problem. (2 of 3 samples are passed over)")
    assert second == "Shard 'a.tar', key 'a': a label that is not a 64-bit integer (1 such labels)."
    assert last.endswith("2 problems")
