"""What a GPU is asked in its few minutes, rehearsed on the CPU: stages, limits, results, the table."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import stages
import torch
from conftest import ROOT

import prepare_dataset as prep
import synthetic_mammograms as phantoms

sys.path.insert(0, str(ROOT / "tests" / "gpu"))

import table

STAGES = "versions agreement resnet50 resnet18 memory killed tests".split()


def script(name, *words, **variables):
    """Run a script of tests/gpu in a process; what it printed and its exit code."""
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": "", **variables}
    command = [ROOT / "tests" / "gpu" / name, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def figures_of(folder):
    """The lines of figures.jsonl by stage."""
    found = {}
    for line in (folder / "figures.jsonl").read_text().splitlines():
        values = json.loads(line)
        found.setdefault(values.pop("stage"), []).append(values)
    return found


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The results of a dry run."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    done = script("run.sh", "--dry_run", out)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()[-3000:]
    return out


def test_every_stage_ends_well_and_leaves_its_figures(rehearsed):
    found = figures_of(rehearsed)
    assert [(line["name"], line["ending"]) for line in found["ended"]] == [(n, "ok") for n in STAGES]
    (agreement,) = found["agreement"]
    for name in ("exact_repeated_apart", "exact_resumed_apart", "exact_streamed_apart", "views_apart"):
        assert agreement[name] == 0
    settings = {line["batch_size"]: line for line in found["training"]}
    for line in settings.values():
        assert {"bare", "whole", "lightly", "views", "kornia"} <= line["seconds"].keys()
        assert line["profile"]["kernels"] > 100
        assert 0 <= line["profile"]["gaps"] < 1
    assert len(settings) == 2
    assert [line["batch"] for line in found["memory"]] == [2, 4]
    assert found["killed"] == [{"steps": 24, "resumed_apart": 0.0}]
    assert "aten::convolution" in (rehearsed / "log.txt").read_text()


def test_a_stage_that_fails_or_hangs_costs_no_other(tmp_path, monkeypatch, capsys):
    import run

    def fail(_):
        raise ValueError("this stage fails")

    def hang(stage):
        stage.record(before=1)
        run.time.sleep(600)

    monkeypatch.setattr(run, "STAGES", {"versions": hang, "memory": fail, "tests": lambda _: None})
    monkeypatch.setitem(run.LIMITS, "versions", 0.1)
    assert run.main(["--dry_run", str(tmp_path)]) == 1
    found = figures_of(tmp_path)
    assert [line["ending"] for line in found["ended"]] == ["out of time", "failed", "ok"]
    assert found["versions"] == [{"before": 1}]
    assert "this stage fails" in (tmp_path / "log.txt").read_text()
    assert capsys.readouterr().out.count("\n") == 3


def forbidden_in_a_fork(_: list[str]) -> int:
    """1 where CUDA is refused to forks of a process that has imported run.py."""
    import run  # noqa: F401

    child = os.fork()
    if not child:
        os._exit(torch.cuda._is_in_bad_fork())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_stages_are_forks_that_may_use_the_gpu(tmp_path):
    """A question to CUDA while run.py imports what the stages need would forbid CUDA in each of them."""
    if not hasattr(torch._C, "_cuda_isInBadFork"):
        pytest.skip("this PyTorch is built without CUDA")
    done = stages.complete(forbidden_in_a_fork, [], tmp_path)
    assert done.returncode == 0, done.stderr


PAGE = f"""# Page
<!-- gpu -->
| card | setting | {" | ".join(table.COLUMNS)} | checks |
|{" --- |" * (len(table.COLUMNS) + 3)}
| A100 | resnet50, 512 px, batch 32 |{" not measured yet |" * (len(table.COLUMNS) + 1)}
| H100 | resnet50, 512 px, batch 32 |{" not measured yet |" * (len(table.COLUMNS) + 1)}
<!-- /gpu -->
after
"""


def test_rows_of_a_card_are_computed_from_its_figures(tmp_path):
    """Figures that no card has given, of a run that was cut before a second setting was whole."""
    setting = {"stage": "training", "backbone": "resnet50", "view_size": 512, "batch_size": 32}
    seconds = {"bare": 0.19, "whole": 0.2, "views": 0.005, "kornia": 0.05, "lightly": 0.5}
    whole = {"seconds": seconds, "precision": "bfloat16", "peak_bytes": 3 * 2**30}
    whole["profile"] = {"gaps": 0.0625}
    other = {"seconds": {"bare": 0.1}, "precision": "bfloat16", "batch_size": 320}
    lines = [
        {"stage": "versions", "gpu": "NVIDIA H100 80GB", "date": "2030-01-02", "torch": "2.11.0"},
        setting | whole, setting | other, {"stage": "ended", "name": "tests", "ending": "out of time"},
    ]  # fmt: skip
    (tmp_path / "figures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    for _ in range(2):  # the second time replaces what the first has written
        assert table.main([str(tmp_path), "--page", str(page)]) == 0
    before, after = PAGE.splitlines(), page.read_text().splitlines()
    assert [after[n] for n in (0, 1, 2, 3, 4, 7, 8)] == [before[n] for n in (0, 1, 2, 3, 4, 6, 7)]
    cells = [cell.strip() for cell in after[5].split("|")[1:-1]]
    assert cells == [
        "NVIDIA H100 80GB, 2030-01-02, torch 2.11.0", "resnet50, 512 px, batch 32, bfloat16", "168",
        "160", "0.950", "0.025", "10.0", "2.50", "0.062", "3.0", "1.9", "28.2", "failed: tests",
    ]  # fmt: skip
    assert after[6].count("not measured yet") == len(table.COLUMNS) - 1


def test_a_rehearsal_is_no_measurement(rehearsed, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    with pytest.raises(SystemExit, match="no figures of a GPU"):
        table.main([str(rehearsed), "--page", str(page)])
    assert page.read_text() == PAGE


def test_the_page_has_the_columns_of_the_table():
    head = table.TABLE.search(table.PAGE.read_text("utf-8"))[0].splitlines()[0]
    assert head == f"| {' | '.join(['card', 'setting', *table.COLUMNS, 'checks'])} |"


def assert_judged(out):
    """study.sh has left what study.py writes."""
    assert {"arms.txt", "study.csv", "study.md", "nuisance.csv", "study.log"} <= set(os.listdir(out))
    assert set(pd.read_csv(out / "study.csv")["arm"]) == {"random", "classic", "plain"}


def test_the_study_is_rehearsed(tmp_path):
    size = "--studies 8 --height 440 --width 350 --spacing_mm 0.68 --lesion_share 1 --test_share 0.5"
    raw = tmp_path / "raw"
    phantoms.main(["--output_dir", str(raw), *size.split()])
    places = ["--images_root", str(raw / "images_png"), "--output_dir", str(tmp_path / "split")]
    tables = ["--csv_path", str(raw / "breast-level_annotations.csv")]
    tables += ["--findings_csv", str(raw / "finding_annotations.csv")]
    assert prep.main([*tables, *places]) == 0
    shutil.rmtree(raw)
    done = script("study.sh", "--dry_run", tmp_path / "out", tmp_path / "split", BUDGET="3000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_judged(tmp_path / "out")


@pytest.mark.slow
def test_the_study_makes_its_own_phantoms(tmp_path):
    done = script("study.sh", "--dry_run", tmp_path / "out", BUDGET="3000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_judged(tmp_path / "out")


@pytest.mark.parametrize(
    ("variables", "code", "message"),
    [({"BUDGET": "0"}, 1, "plain: failed or out of time"), ({"ARMS": "none"}, 2, "none of the arms")],
)
def test_a_study_says_why_it_ends_early(tmp_path, variables, code, message):
    done = script("study.sh", "--dry_run", tmp_path / "out", tmp_path, **variables)
    assert done.returncode == code
    assert message in done.stdout
