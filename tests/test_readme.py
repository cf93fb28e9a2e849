"""README and docs are true: every command runs or says what it needs, every snippet and edit works."""

import functools
import io
import json
import re
import shlex
import shutil
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision
from conftest import ROOT, SOURCES, run_script, write_images
from safetensors.torch import save_file
from test_prepare_dicom import breast, make_dicom, save
from update_docs import PICTURE, SETTINGS, TABLE, settings_table

import benchmark
import prepare_dataset
import study
import synthetic_mammograms as phantoms
import train_byol_mammo as mammo
import train_classifier

README, CHANGING, COMPARED = (
    ROOT / name for name in ("README.md", "docs/changing.md", "docs/compared.md")
)
LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)")  # a file, an anchor, or both; none outside


def reading_order():
    """README and the pages of docs/, each where README first links it."""
    linked = dict.fromkeys(target for target, _ in LINK.findall(README.read_text()))
    return [README, *(ROOT / target for target in linked if re.fullmatch(r"docs/\w+\.md", target))]


PAGES = {path: path.read_text() for path in reading_order()}
TEXT = "\n".join(PAGES.values())
SCRIPTS = {
    "prepare_dataset.py": prepare_dataset.main,
    "train_byol_mammo.py": mammo.main,
    "train_classifier.py": train_classifier.main,
}
HELP = {
    **SCRIPTS,
    "benchmark.py": benchmark.main,
    "study.py": study.main,
    "synthetic_mammograms.py": phantoms.main,
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


@dataclass(frozen=True)
class Command:
    """A command of a fenced block or of a two-column table; `needs` is what it needs beyond a CPU."""

    page: Path
    heading: str
    needs: str
    words: tuple[str, ...]


def sections(page):
    """Heading and text of every section of a page, in order, with what stands before the first."""
    parts = re.split(r"^## ", PAGES[page], flags=re.MULTILINE)
    return [(part.partition("\n")[0], part) for part in parts]


def blocks(language):
    """Page and text of every fenced block of a language, in reading order."""
    fence = re.compile(rf"```{language}\n(.*?)```", flags=re.DOTALL)
    return [(page, block) for page, text in PAGES.items() for block in fence.findall(text)]


def commands():
    """All commands in reading order."""
    row = r"^\| (?P<on>[^|\n]+) \| `(?P<cell>[a-z]+ [^`\n]+\.(?:py|sh)[^`\n]*)` \|$"
    place = re.compile(rf"```bash\n(?P<block>.*?)```|{row}", flags=re.DOTALL | re.MULTILINE)
    found = []
    for page in PAGES:
        for heading, section in sections(page):
            for hit in place.finditer(section):
                lines = (hit["block"] or hit["cell"]).replace("\\\n", " ").splitlines()
                needs = lines[0].removeprefix("# needs ") if lines[0].startswith("# needs ") else ""
                if hit["cell"] and not hit["cell"].startswith("python "):
                    needs = hit["on"]
                split = [tuple(shlex.split(line, comments=True)) for line in lines]
                found += [Command(page, heading, needs, words) for words in split if words]
    return found


@functools.cache
def help_of(script):
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit):
        HELP[script](["--help"])
    return out.getvalue()


def small(script, words, name):
    """Flags that make a command small enough for a test."""
    flags = SMALL[script].split()
    if script == "train_byol_mammo.py":
        flags += ["--run_name", name]
        flags += ["--target_spacing_mm", "0.7"] * ("--target_spacing_mm" in words)
    elif script == "train_classifier.py" and words[0] == "compare":
        flags += ["--backbone", "resnet18"]
    return flags


# Networks of the docs, whose weights nobody downloads for a test, and what stands for them.
STAND_INS = {
    "vit_small_patch14_dinov2.lvd142m": "test_vit",
    "convnext_tiny.dinov3_lvd1689m": "test_convnext",
    "efficientnet_b0": "test_efficientnet",
}


def stand_in(word):
    """A word of a command with a test's network in the place of its own."""
    for name, small_one in STAND_INS.items():
        word = word.replace(f"timm:{name}=", f"timm:{small_one}=")
    return word


def run_commands(wanted):
    """Run commands in order; those that the smaller settings make equal share one run."""
    done, name = set(), "byol_resnet50"  # the first run has the name that later commands use
    for command in wanted:
        python, script, *words = command.words
        assert python == "python"
        flags = [*map(stand_in, words), *small(script, words, name)]
        trains = script == "train_byol_mammo.py"
        same = replace(mammo.parse_args(flags), run_name="") if trains else tuple(flags)
        if same in done:
            continue
        if trains and name != "byol_resnet50":
            flags += ["--report_every", "0"]
        assert not SCRIPTS[script](flags), " ".join(command.words)
        done.add(same)
        if trains and "--extract_only" not in words:
            name = f"run{len(done)}"


def is_for_dicom(command):
    return "dicom" in command.words


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with what the commands name, and ImageNet weights that were put in place."""
    folder = tmp_path_factory.mktemp("readme")
    template = phantoms.PhantomSpec(height=440, width=350)
    phantoms.write_archive(folder, 6, template, test_share=0.34, lesion_share=1.0)
    table = pd.read_csv(folder / "breast-level_annotations.csv", dtype=str)
    studies = table.groupby("split")["study_id"].rank("dense")  # two makers in each split
    table["Manufacturer"] = np.where(studies % 2, "LORAD", "SIEMENS")
    table.to_csv(folder / "breast-level_annotations.csv", index=False)
    write_images(folder / "my_mammograms")
    shutil.copyfile(next(folder.glob("images_png/*/*.png")), folder / "mammogram.png")
    weights = torchvision.models.get_model_weights("resnet18").DEFAULT
    placed = folder / "hub" / "hub" / "checkpoints" / Path(weights.url).name
    placed.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18().state_dict(), placed)
    for file, name in {"dinov2": "test_vit", "dinov3": "test_convnext"}.items():
        save_file(timm.create_model(name).state_dict(), folder / f"{file}.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder / "hub"))
        patch.chdir(folder)
        run_commands(c for c in commands() if not (c.needs or c.heading == "Start" or is_for_dicom(c)))
        yield folder


def test_the_commands_run_in_order_and_leave_what_they_promise(work):
    assert json.loads((work / "runs/byol_resnet50/config.json").read_text())["config"]["max_steps"] == 2
    for name in ("manifest.csv", "labels.csv", "prepare_report.html"):
        assert (work / "split_images" / name).is_file()
    assert len(list(work.glob("runs/byol_resnet50/qc/*/*.png"))) == len(
        list(work.glob("my_mammograms/*"))
    )
    table = pd.read_csv(work / "runs/compare/compare.csv")
    assert {"none", "imagenet", "classic"} <= set(table["start"])
    assert "maker (control)" in set(table["finding"])
    for command in ("evaluate", "compare"):
        groups = pd.read_csv(work / f"runs/{command}/by_maker.csv")
        assert set(groups["value"]) == {"Hologic", "Siemens"}
        assert (work / f"runs/{command}/maker_shares.csv").is_file()
    assert {"untrained", "imagenet", "nothing learns", "dinov2.safetensors"} <= set(table["weights"])
    assert list(work.glob("runs/predict/**/*.png"))


def test_what_a_run_writes_is_what_the_readme_lists(work):
    listed = PAGES[README].split("| out |")[1].split("\n\n")[0]
    written = {path.name for path in (work / "runs/byol_resnet50").iterdir() if path.is_file()}
    whole_epoch = {"embedding.png"}  # a run of a few steps has none
    assert set(re.findall(r"`(\w+\.\w+)`", listed)) - written <= whole_epoch
    assert not {name for name in written if name not in listed} - {"mammogram_byol_final.pth"}


def test_the_snippets_run(work, monkeypatch):
    """As written, but for the test's smaller network."""
    monkeypatch.chdir(work)
    names = {"x": torch.rand(2, 1, 64, 64)}
    for _, code in blocks("python"):
        exec(code.replace("resnet50()", "resnet18()").replace("2048, 4096, 256", "512, 64, 32"), names)
    assert names["features"].shape == (2, 512)
    assert names["logits"].shape == (2, 2)
    assert names["backbone"](torch.rand(1, 3, 64, 64)).shape == (1, 512)


def test_the_dicom_commands_run(tmp_path, monkeypatch):
    """What lays DICOM out, and the first training after it."""
    for number in range(3):
        pixels = breast(shape=(440, 350), seed=number)
        save(make_dicom(pixels), tmp_path / f"dicom/patient{number}/image{number}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SMALL, "train_byol_mammo.py", SMALL["train_byol_mammo.py"] + " --weights none")
    trainings = [c for c in commands() if c.page == README and c.heading == "Train" and not c.needs]
    run_commands([*filter(is_for_dicom, commands()), trainings[0]])
    assert (tmp_path / "runs/byol_resnet50/backbone.safetensors").is_file()


def assert_flags_exist(words):
    """Words before the script are sbatch's and torchrun's own."""
    place = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")))
    script = words[place].replace("submit_byol.sh", "train_byol_mammo.py")
    for word in words[place + 1 :]:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", help_of(script)), f"{script} has no flag {word}"
    if script == "benchmark.py":
        assert words[place + 1] in benchmark.COMMANDS


def test_every_block_is_of_a_kind_that_is_tested():
    fences = re.findall(r"^```(.*)$", TEXT, flags=re.MULTILINE)
    assert {*fences} == {"", "bash", "python", "diff"}
    assert fences[1::2] == [""] * (len(fences) // 2)


def test_other_commands_say_what_they_need_and_have_flags_that_exist():
    for command in commands():
        if command.words[0] in ("git", "make", "source"):
            assert command.heading == "Start"
            continue
        assert command.words[0] == "python" or re.search("GPU|SLURM", command.needs), command
        assert_flags_exist(command.words)
    inline = re.findall(r"`(python \w+\.py[^`]*)`", TEXT)
    assert any("benchmark.py" in line for line in inline)
    for line in inline:
        assert_flags_exist(shlex.split(line))


def test_flags_named_in_the_text_exist():
    known = "".join(map(help_of, HELP))
    launchers = {"--nodes", "--gres", "--ntasks-per-node", "--cpus-per-task", "--mem", "--time"}
    launchers |= {"--nproc_per_node", "--ntasks", "--mem-per-cpu"}
    launchers |= {"--scheduler-file", "--nworkers", "--nthreads"}  # dask's
    for page, text in PAGES.items():
        if page != COMPARED:
            for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - launchers:
                assert re.search(rf"{flag}\b", known), f"{page.name}: {flag}"


def test_make_targets_that_are_named_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    started = [c.words[1] for c in commands() if c.words[0] == "make"]
    assert started == ["demo", "test"]
    assert {*started, *re.findall(r"`make ([a-z]+)", TEXT)} <= set(targets)


def test_code_named_where_to_change_things_exists():
    """README's table of places and docs/changing.md."""
    code = "\n".join(path.read_text() for path in SOURCES)
    places = dict(sections(README))["Change"] + PAGES[CHANGING]
    names = set(re.findall(r"`(\w+)`", places))
    assert {"Objective", "VIEW_1", "CRITERIA", "ADAPTERS"} <= names
    for name in names:
        assert re.search(rf"\b{name}\b", code), name


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """A copy of the scripts with all edits of docs/changing.md, each in one file at one place."""
    folder = tmp_path_factory.mktemp("edited")
    for path in SOURCES:
        copied = folder / path.relative_to(ROOT)
        copied.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copied)
    edits = blocks("diff")
    assert {page for page, _ in edits} == {CHANGING}
    for _, edit in edits:
        lines = [(line[:1], line[1:]) for line in edit.splitlines()]
        before, after = (
            "".join(f"{text}\n" for sign, text in lines if sign in signs) for signs in ("- ", "+ ")
        )
        places = [path for path in folder.rglob("*.py") if before in path.read_text()]
        assert len(places) == 1, before
        source = places[0].read_text()
        assert source.count(before) == 1, before
        places[0].write_text(source.replace(before, after))
    return folder


@pytest.fixture(scope="module")
def edited_run(edited):
    """A run of the edited main script on images of which one is partly saturated."""
    write_images(edited / "images")
    path = sorted((edited / "images").iterdir())[0]
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    image[100:300, :200] = 255
    cv2.imwrite(str(path), image)
    flags = [*small("train_byol_mammo.py", [], "edited"), "--data_dir", "images", "--report_every", "5"]
    flags += ["--backbone", "regnet_y_400mf", "--weights", "none", "--hidden_dim", "64"]
    flags += ["--freq_loss_weight", "0", "--structure_loss_weight", "0"]
    done = run_script(edited / "train_byol_mammo.py", *flags, cwd=edited)
    assert done.returncode == 0, done.stderr
    assert "note: no" not in done.stderr, done.stderr
    return edited / "runs" / "edited"


def test_another_backbone_is_one_word(edited_run):
    state = mammo.checkpoints.load_checkpoint(edited_run / "mammogram_byol_best.pth")
    assert state["config"]["backbone"] == "regnet_y_400mf"


def test_another_objective_is_one_class(edited_run):
    """Its loss is what was minimised, its curve has its title, its state resumes."""
    table = pd.read_csv(edited_run / "metrics.csv")
    assert table["loss"].dropna().gt(0).all()  # BYOL's is negative
    assert table["momentum"].isna().all()
    record = json.loads((edited_run / "config.json").read_text())
    assert record["curves"] == {"loss": "Barlow Twins loss (0 = identity)"}
    assert (edited_run / "curves.png").is_file()
    state = torch.load(edited_run / "last.pth", weights_only=True)
    assert state["objective"] == {}
    assert {name for group in state["optimizer"]["param_groups"] for name in group} >= {"lr_factor"}


def test_another_criterion_is_five_places(edited, edited_run):
    """It rejects, is counted and shown, and its threshold is part of the cache's key."""
    (cache,) = (edited / "cache").glob("[!.]*")
    funnel = pd.read_csv(cache / "rejections.csv")
    assert funnel["saturated"].gt(0).tolist() == [True, False, False, False]
    assert pd.read_csv(cache / "tiles.csv")["saturated"].max() <= 0.1
    assert "too much saturated (saturated above 0.1)" in (edited_run / "report.html").read_text()
    settings = json.loads((cache / "cache.json").read_text())["inputs"]["settings"]
    assert settings["max_saturated"] == 0.1
    assert all((cache / name).is_file() for name in ("segmentation.png", "grid.png", "tiles.png"))


def test_another_archive_is_a_function_and_a_row(edited):
    write_images(edited / "clinic", 3)
    rows = ["image,woman,breast", "s0_i0,w1,LCC", "s0_i1,w1,RMLO", "s1_i2,w2,LMLO"]
    (edited / "clinic.csv").write_text("\n".join(rows) + "\n")
    flags = ["--csv_path", "clinic.csv", "--images_root", "clinic", "--output_dir", "clinic_split"]
    done = run_script(edited / "prepare_dataset.py", *flags, cwd=edited)
    assert done.returncode == 0, done.stderr
    assert "read as our clinic" in done.stdout
    manifest = pd.read_csv(edited / "clinic_split" / "manifest.csv").sort_values("image_id")
    assert manifest["laterality"].tolist() == ["L", "R", "L"]
    assert manifest["view"].tolist() == ["CC", "MLO", "MLO"]
    assert manifest["patient_id"].tolist() == ["w1", "w1", "w2"]


def test_the_settings_table_is_the_constants():
    """After a change of a constant: python tests/update_docs.py --table."""
    assert TABLE.search(PAGES[SETTINGS]).group() == settings_table()


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^##+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links_and_the_picture_exist():
    others = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("tests/*/README.md")]
    for page in [*PAGES, *others]:
        for target, anchor in LINK.findall(page.read_text()):
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(linked), f"{page.name}: {target}#{anchor}"
    assert f"]({PICTURE.relative_to(ROOT)})" in PAGES[README]


def test_the_readme_is_read_in_five_minutes_and_leads_to_every_page():
    assert len(PAGES[README].split()) <= 1300  # as wc -w counts
    assert "Research use only. Not for clinical decisions." in PAGES[README]
    assert set(PAGES) == {README, *ROOT.glob("docs/*.md")}


def test_each_page_starts_with_a_sentence_on_what_it_answers():
    for page, text in list(PAGES.items())[1:]:
        title, first, *_ = text.split("\n\n")
        assert re.fullmatch(r"# .+", title), page.name
        assert re.fullmatch(r"This page answers [^.]*(?:\.\w+[^.]*)*\.", first), page.name


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
