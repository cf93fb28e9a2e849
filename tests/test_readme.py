"""The README tells the truth: every command runs or says what it needs, every snippet and edit works."""

import functools
import io
import json
import re
import shlex
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pandas as pd
import pytest
import torch
import torchvision
from conftest import ROOT, run_script, write_images
from test_prepare_dicom import breast, make_dicom, save
from update_docs import PICTURE, README, TABLE, settings_table

import prepare_dataset
import synthetic_mammograms as phantoms
import train_byol_mammo as mammo
import train_classifier

TEXT = README.read_text()
SCRIPTS = {
    "prepare_dataset.py": prepare_dataset.main,
    "train_byol_mammo.py": mammo.main,
    "train_classifier.py": train_classifier.main,
}
# Added behind each command's own flags.
SMALL_TILES = "--view_size 32 --pixel_spacing_mm 0.68 --tile_size 96 --tile_stride 64"
QUICK = "--num_workers 1 --device cpu --wandb_mode disabled --backbone resnet18"
SMALL = {
    "prepare_dataset.py": "",
    "train_byol_mammo.py": f"{SMALL_TILES} {QUICK} --hidden_dim 64 --proj_dim 32 --batch_size 8 "
    "--monitor_tiles 8 --min_freq_energy 0 --epochs 1 --max_steps 2",
    "train_classifier.py": "--num_workers 1 --device cpu --bootstrap 100",
}


def blocks(language):
    """Heading and text of every fenced block of a language, in order."""
    found = []
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        heading = section.partition("\n")[0]
        code = re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)
        found += [(heading, block.replace("\\\n", " ")) for block in code]
    return found


def commands(block):
    """Commands of a block as words, comments left out."""
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [words for words in lines if words]


@functools.cache
def help_of(script):
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit):
        SCRIPTS[script](["--help"])
    return out.getvalue()


def needs(block):
    return block.startswith("# needs ")


def small(script, words, name):
    """Flags that make a README command small enough for a test."""
    flags = SMALL[script].split()
    if script == "train_byol_mammo.py":
        flags += ["--run_name", name]
    elif script == "train_classifier.py" and words[0] == "compare":
        flags += ["--backbone", "resnet18"]
    return flags


def run_block(block, run_name):
    for word, script, *words in commands(block):
        assert word == "python"
        code = SCRIPTS[script]([*words, *small(script, words, run_name)])
        assert not code, " ".join([script, *words])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with what the README's commands name, and ImageNet weights that were put in place."""
    folder = tmp_path_factory.mktemp("readme")
    template = phantoms.PhantomSpec(height=440, width=350)
    phantoms.write_archive(folder, 6, template, test_share=0.34, lesion_share=1.0)
    write_images(folder / "my_mammograms")
    shutil.copyfile(next(folder.glob("images_png/*/*.png")), folder / "mammogram.png")
    weights = torchvision.models.get_model_weights("resnet18").DEFAULT
    placed = folder / "hub" / "hub" / "checkpoints" / Path(weights.url).name
    placed.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), placed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder / "hub"))
        patch.chdir(folder)
        for number, (heading, block) in enumerate(blocks("bash")):
            if not (needs(block) or heading.startswith(("Start", "I have DICOM"))):
                run_block(block, f"run{number}" if (folder / "runs").exists() else "byol_resnet50")
        yield folder


def test_the_commands_run_in_order_and_leave_what_they_promise(work):
    assert json.loads((work / "runs/byol_resnet50/config.json").read_text())["config"]["max_steps"] == 2
    for name in ("manifest.csv", "labels.csv", "prepare_report.html"):
        assert (work / "split_images" / name).is_file()
    table = pd.read_csv(work / "runs/compare/compare.csv")
    assert {"none", "imagenet"} <= set(table["start"])
    assert list(work.glob("runs/predict/**/*.png"))


def test_what_a_run_writes_is_what_the_readme_lists(work):
    listed = TEXT.split("| out |")[1].split("\n\n")[0]
    written = {path.name for path in (work / "runs/byol_resnet50").iterdir() if path.is_file()}
    whole_epoch = {"embedding.png"}  # a run of a few steps has none
    assert set(re.findall(r"`(\w+\.\w+)`", listed)) - written <= whole_epoch
    assert not {name for name in written if name not in listed} - {"mammogram_byol_final.pth"}


def test_the_snippet_runs(work, monkeypatch):
    """As written, but for the test's smaller network."""
    monkeypatch.chdir(work)
    ((_, code),) = blocks("python")
    code = code.replace("resnet50()", "resnet18()").replace("2048, 4096, 256", "512, 64, 32")
    names = {"x": torch.rand(2, 1, 64, 64)}
    exec(code, names)
    assert names["features"].shape == (2, 512)
    assert names["logits"].shape == (2, 2)
    assert names["backbone"](torch.rand(1, 3, 64, 64)).shape == (1, 512)


def test_the_dicom_commands_run(tmp_path, monkeypatch):
    for number in range(3):
        pixels = breast(shape=(440, 350), seed=number)
        save(make_dicom(pixels), tmp_path / f"dicom/patient{number}/image{number}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (block,) = [block for heading, block in blocks("bash") if heading.startswith("I have DICOM")]
    monkeypatch.setitem(SMALL, "train_byol_mammo.py", SMALL["train_byol_mammo.py"] + " --weights none")
    run_block(block, "run")
    assert (tmp_path / "runs/run/backbone.safetensors").is_file()


def test_other_commands_say_what_they_need_and_have_flags_that_exist():
    for heading, block in blocks("bash"):
        for words in commands(block):
            if words[0] in ("git", "make"):
                assert heading == "Start"
                continue
            assert words[0] == "python" or needs(block), words
            place = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")))
            # Words before the script are sbatch's and torchrun's own.
            script = words[place].replace("submit_byol.sh", "train_byol_mammo.py")
            for word in words[place + 1 :]:
                if word.startswith("--"):
                    assert re.search(rf"{word}\b", help_of(script)), f"{script} has no flag {word}"


def test_flags_named_in_the_text_exist():
    known = "".join(map(help_of, SCRIPTS))
    launchers = {"--nodes", "--gres", "--ntasks-per-node", "--cpus-per-task", "--mem", "--time"}
    launchers |= {"--nproc_per_node", "--table"}
    text = TEXT.split("## How it differs")[0]
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - launchers:
        assert re.search(rf"{flag}\b", known), flag


def test_start_names_makes_targets():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    (_, start), *_ = blocks("bash")
    named = [words[1] for words in commands(start) if words[0] == "make"]
    assert named == ["demo", "test"]
    assert set(named) <= set(targets)


def edited(source):
    """The main script with all the README's edits."""
    edits = blocks("diff")
    assert len(edits) == 3
    for _, edit in edits:
        lines = [(line[:1], line[1:]) for line in edit.splitlines()]
        before = "\n".join(text for sign, text in lines if sign in "- ")
        after = "\n".join(text for sign, text in lines if sign in "+ ")
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    return source


def test_the_edits_apply_and_run(tmp_path):
    script = tmp_path / "train_byol_mammo.py"
    script.write_text(edited((ROOT / "train_byol_mammo.py").read_text()))
    write_images(tmp_path / "images")
    flags = [*small("train_byol_mammo.py", [], "edited"), "--data_dir", str(tmp_path / "images")]
    config = mammo.parse_args(flags)
    flags += ["--backbone", "regnet_y_400mf", "--weights", "none"]
    done = run_script(script, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    state = mammo.load_checkpoint(tmp_path / "runs/edited/mammogram_byol_best.pth")
    assert state["config"]["backbone"] == "regnet_y_400mf"
    (cache,) = (tmp_path / "cache").glob("[!.]*")
    unedited = mammo.cache_key(mammo.cache_inputs(mammo.list_sources(config.data_dir), config))
    assert cache.name != unedited


def test_the_settings_table_is_the_constants():
    """After a change of a constant: python tests/update_docs.py --table."""
    assert TABLE.search(TEXT).group() == settings_table()


def test_links_and_the_picture_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    assert f"]({PICTURE.relative_to(ROOT)})" in TEXT
    headings = re.findall(r"^## (.+)$", TEXT, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


def test_the_readme_stays_readable():
    assert len(TEXT.splitlines()) <= 460
    assert "Research use only. Not for clinical decisions." in TEXT


def test_the_citation_file_has_what_readers_of_it_need():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license", "version"} <= set(cited)
    assert f'version = "{cited["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert cited["version"] in (ROOT / "CHANGELOG.md").read_text()
    for work in cited["references"]:
        assert {"type", "title", "authors", "year"} <= set(work)
        place = work.get("doi") or work["url"]
        assert place.removeprefix("https://arxiv.org/abs/") in TEXT, place
