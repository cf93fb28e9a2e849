"""What names, pipes and tables of a user's can cause: a line or a quiet end, in all scripts."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import stages
import torch
from conftest import ROOT, SMALL, small_config, write_images

import byol_mammo.labels
import prepare_dataset as prep
import train_byol_mammo as mammo
from byol_mammo import settings

# Names --------------------------------------------------------------------------------------------


def test_folders_whose_names_are_not_utf8_are_as_good_as_others(tmp_path):
    """Prepared, trained, reported, predicted; stdout is strict, as where the locale is UTF-8."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_images(tmp_path / "in")
    data, run = folder / "split" / "training", folder / "runs" / "byol_slim"
    places = ["--data_dir", data, "--output_dir", folder / "runs", "--cache_dir", folder / "cache"]
    train = [*places, *SMALL, "--max_steps", "2", "--wandb_mode", "offline"]
    predict = ["predict", data, "--output_dir", folder / "out", "--device", "cpu", "--weights"]
    prepare = ["--csv_path", "none", "--images_root", tmp_path / "in"]
    jobs = [
        ("prepare_dataset", [*prepare, "--output_dir", folder / "split"]),
        ("train_byol_mammo", train),
        ("train_byol_mammo", ["--report", run]),
    ]  # fmt: skip
    printed = ""
    for script, words in jobs:
        done = stages.complete(script, words, tmp_path)
        assert done.returncode == 0, done.stderr
        assert "caf\\udce9" in done.stdout
        printed += done.stderr
    assert "Traceback" not in printed
    assert "wandb stopped (ValueError: it takes no name that is not UTF-8" in printed
    assert (run / "report.html").is_file()
    assert mammo.load_backbone(run / "backbone.safetensors")
    done = stages.complete("train_classifier", [*predict, run / "mammogram_byol_best.pth"], tmp_path)
    assert (done.returncode, "its head is not trained" in done.stderr) == (2, True), done.stderr


def test_stdout_that_is_strict_prints_any_name():
    code = "from byol_mammo import settings; settings.escape_names(); print('caf\\udce9')"
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=strict, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"caf\\udce9\n"), done.stderr


# Pipes --------------------------------------------------------------------------------------------

SPEAK = """
import sys
from byol_mammo import settings
def speak():
    for number in range(int(sys.argv[1])): print(number)
"""
PREPARE = """
import prepare_dataset as prep
prep.run = lambda argv: speak() or 0
"""


@pytest.mark.parametrize(("script", "lines"), [("exit_code", 3), ("prepare", 3), ("prepare", 100_000)])
def test_output_that_nobody_reads_ends_quietly(script, lines):
    """Little output is lost at the interpreter's end, much of it while it is printed."""
    call = {"exit_code": "settings.exit_code(speak, '')", "prepare": "prep.main([])"}[script]
    code = SPEAK + PREPARE * (script == "prepare") + f"sys.stdin.read()\nsys.exit({call})"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(lines)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # as a user's; else each print would be flushed
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()  # as `head` does when it has seen enough
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == settings.READER_GONE == 141
    process.stderr.close()


class ClosedPipe:
    """A stream that nobody reads."""

    def write(self, text: str) -> None:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


ERRORS = {  # what a job raises, whether it is one of several processes, what is said
    "memory": (
        torch.OutOfMemoryError("CUDA out of memory"),
        False,
        "the GPU's memory is full; halve it",
    ),
    "lost": (
        RuntimeError("[gloo] Connection closed by peer"),
        True,
        "the processes of the run lost each",
    ),
    "distributed": (torch.distributed.DistBackendError("NCCL"), True, "lost each other (NCCL)"),
    "other": (RuntimeError("mat1 and\nmat2 differ"), True, "error: mat1 and mat2 differ"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_torch_are_named(name, monkeypatch, capsys):
    """That of code is also shown whole: it is a fault to be reported."""
    error, several, said = ERRORS[name]
    left = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: several)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append("group"))

    def job() -> None:
        raise error

    assert settings.exit_code(job, "halve it") == 2
    printed = capsys.readouterr().err
    assert said in printed.splitlines()[-1]
    assert ("Traceback" in printed) == (name == "other")
    assert left == ["group"] * several


def test_an_error_of_code_in_a_single_process_is_shown_whole():
    def job() -> None:
        raise RuntimeError("mat1 and mat2 differ")

    with pytest.raises(RuntimeError, match="mat1"):
        settings.exit_code(job, "")


def test_an_error_that_nobody_reads_ends_quietly(monkeypatch):
    ended = []
    monkeypatch.setattr(settings, "end_without_reader", lambda: ended.append(True))
    monkeypatch.setattr(sys, "stderr", ClosedPipe())
    assert settings.exit_code(fail, "") == 2
    assert ended == [True]


def fail() -> None:
    """A job that ends with an error for people."""
    raise settings.MammoError("no such folder")


# Tables -------------------------------------------------------------------------------------------


def zipped(path: Path, *names: str) -> None:
    """A ZIP archive of files with these names."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "image,mass\na.png,1\n")


KINDS = {  # name of a file, how it is made, what the refusal says
    "table.xlsx": (lambda p: zipped(p, "docProps", "xl/workbook.xml"), "export the sheet as CSV"),
    "table.ods": (lambda p: zipped(p, "mimetype", "content.xml"), "export the sheet as CSV"),
    "excel.csv": (lambda p: zipped(p, "xl/workbook.xml"), "export the sheet as CSV"),
    "table.zip": (lambda p: zipped(p, "labels.csv"), "unpack it, and give a CSV"),
    "cut.zip": (lambda p: p.write_bytes(b"PK\x03\x04 cut"), "unpack it, and give a CSV"),
    "table.xls": (lambda p: p.write_bytes(b"\xd0\xcf\x11\xe0" + bytes(99)), "export the sheet as CSV"),
    "table.parquet": (lambda p: p.write_bytes(b"PAR1" + bytes(99) + b"PAR1"), "read_parquet"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(KINDS))
def test_tables_of_other_kinds_are_refused_with_the_way_to_a_csv(tmp_path, capsys, name):
    make, remedy = KINDS[name]
    path = tmp_path / name
    make(path)
    with pytest.raises(mammo.MammoError, match=f"{name} is .*{remedy}"):
        byol_mammo.labels.read_labels(path, ("mass",))
    write_images(tmp_path / "in", 1)
    places = ["--images_root", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]
    assert prep.main(["--csv_path", str(path), *places]) == 2
    assert remedy in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    path.rename(tmp_path / "manifest.csv")
    with pytest.raises(mammo.MammoError, match=f"manifest.csv is .*{remedy}"):
        mammo.images.read_manifest(tmp_path / "in")


def test_a_foreign_manifest_is_refused_with_what_it_lacks_and_the_remedy(tmp_path):
    write_images(tmp_path, 1)
    (tmp_path / "manifest.csv").write_text("Subject ID,File Location\np1,./a\n")
    with pytest.raises(mammo.MammoError) as caught:
        mammo.images.list_sources(tmp_path)
    text = str(caught.value)
    for part in (
        f"{tmp_path}/manifest.csv: no column file (there is Subject ID, File Location)",
        "rename the column", "prepare_dataset.py", "move the table away",
    ):  # fmt: skip
        assert part in text


# Notes --------------------------------------------------------------------------------------------


def test_extraction_alone_says_that_the_folder_holds_test_images(archive, tmp_path, capsys):
    data = tmp_path / "images"
    for split in ("training", "test"):
        write_images(data / split, 1)
    note = f"note: {data} holds test images too; {data / 'training'} has none"
    for content, count in ((None, 0), ("file\n", 1)):
        if content:
            (data / "manifest.csv").write_text(content)
        mammo.extract_only(small_config(tmp_path))
        assert capsys.readouterr().err.count(note) == count


def test_few_tiles_are_said_to_be_watched_and_trained_on_once(archive, tmp_path, capsys):
    places = ("--output_dir", str(tmp_path), "--max_steps", "1")
    for few, count in (("32", 1), ("4", 0)):  # of some 130 tiles a tenth can't be 32, but 4
        mammo.train(small_config(archive, *places, "--run_name", few, "--monitor_tiles", few))
        assert (
            capsys.readouterr().out.count("tiles that are trained on: too few to keep some out") == count
        )
