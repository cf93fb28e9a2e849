"""Strangers' files run nothing; nothing leaves its folder, the machine or a DICOM header."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PLANTED, REPORTS, ROOT, SMALL, SOURCES, breast_image, write_images
from pages import Page
from safetensors.torch import load_file
from test_acquisition import KNOWN, SCANNER
from test_prepare_dicom import IDENTIFIERS, make_dicom, save

import prepare_dataset as prep
import train_byol_mammo as mammo
import train_classifier as classifier

# Checkpoints from strangers -----------------------------------------------------------------------


class Payload:
    """What a malicious pickle does when it is loaded: here it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def malicious(path: Path, marker: Path, form: str) -> Path:
    """A checkpoint that makes `marker` when it is unpickled: as PyTorch writes it, or a bare pickle."""
    content = {"model_state_dict": {"w": torch.zeros(2)}, "config": {}, "x": Payload(marker)}
    if form == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    return path


@pytest.fixture(params=["zip", "pickle"])
def stranger(request, tmp_path):
    """A malicious checkpoint and the folder that it would make."""
    marker = tmp_path / "owned"
    path = malicious(tmp_path / "stranger.pth", marker, request.param)
    if request.param == "zip":  # the payload is live
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert marker.exists()
    marker.rmdir()
    return path, marker


def training_flags(archive, output):
    """A small training on the shared archive and cache."""
    places = {"data_dir": archive / "images", "cache_dir": archive / "cache", "output_dir": output}
    return [word for name, path in places.items() for word in (f"--{name}", str(path))] + SMALL


def test_a_malicious_checkpoint_runs_nothing_in_the_main_script(stranger, archive, tmp_path, capsys):
    path, marker = stranger
    flags = training_flags(archive, tmp_path)
    assert mammo.main([*flags, "--weights", str(path)]) == 2
    assert "can't be read" in capsys.readouterr().err
    (tmp_path / "byol_slim").mkdir(exist_ok=True)
    shutil.copyfile(path, tmp_path / "byol_slim" / "last.pth")
    assert mammo.main(flags) == 2
    assert "can't be read" in capsys.readouterr().err
    for read in (
        mammo.load_backbone,
        mammo.checkpoints.load_checkpoint,
        mammo.checkpoints.read_backbone_state,
    ):
        with pytest.raises(mammo.MammoError, match="can't be read"):
            read(path)
    assert not marker.exists()


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "compare", "embed"])
def test_a_malicious_checkpoint_runs_nothing_in_the_classifier(
    stranger, archive, tmp_path, capsys, command
):
    path, marker = stranger
    words = {
        "compare": ["compare", path],
        "predict": ["predict", archive / "images", "--weights", path],
    }.get(command, [command, "--weights", path])
    words += ["--output_dir", tmp_path / "out", "--wandb_mode", "disabled", "--device", "cpu"]
    assert classifier.main([str(word) for word in words]) == 2
    assert "can't be read" in capsys.readouterr().err
    assert not marker.exists()


RECORDED = {"backbone": "resnet18", "hidden_dim": 16, "proj_dim": 8}


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"model_state_dict": 3},
        {"config": "of another project", "model": {}},
        {"config": RECORDED | {"tile_size": "x"}, "model_state_dict": {}},
        {"config": RECORDED | {"backbone": "vit_b_16"}, "model_state_dict": {}},
        {"config": RECORDED | {"backbone": ["resnet18"]}, "model_state_dict": {}},
        {"config": RECORDED},
        {},
    ],
)
def test_a_checkpoint_of_something_else_is_refused(archive, tmp_path, capsys, content):
    torch.save(content, tmp_path / "odd.pth")
    words = [
        "predict",
        str(archive / "images"),
        "--weights",
        str(tmp_path / "odd.pth"),
        "--device",
        "cpu",
    ]
    assert classifier.main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert str(tmp_path / "odd.pth") in capsys.readouterr().err
    (tmp_path / "byol_slim").mkdir()
    shutil.copyfile(tmp_path / "odd.pth", tmp_path / "byol_slim" / "last.pth")
    assert mammo.main(training_flags(archive, tmp_path)) == 2
    assert "last.pth" in capsys.readouterr().err


def test_paths_recorded_in_a_checkpoint_are_not_followed(archive, tmp_path):
    """A stranger's checkpoint names folders; the classifier writes to those it is given."""
    outside = tmp_path / "outside"
    flags = [
        f"--{name}={outside}" for name in ("output_dir", "cache_dir", "labels", "run_name", "data_dir")
    ]
    config = mammo.parse_args([*SMALL, "--input_dim", "64", "--min_freq_energy", "0", *flags])
    model = mammo.MammogramBYOL(
        mammo.checkpoints.build_backbone(config.backbone), 64, config.hidden_dim, config.proj_dim
    )
    content = {
        "model_state_dict": model.state_dict(), "config": mammo.dataclasses.asdict(config),
        "classes": list(mammo.CLASSES), "classifier": {"output_dir": str(outside)},
    }  # fmt: skip
    torch.save(content, tmp_path / "given.pth")
    words = [
        "predict",
        str(archive / "images"),
        "--weights",
        str(tmp_path / "given.pth"),
        "--device",
        "cpu",
    ]
    assert classifier.main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "predict" / "predictions.csv").is_file()
    assert not outside.exists()


def test_the_exported_backbone_is_safetensors_alone(tmp_path):
    """A format that holds numbers and text, no code."""
    config = mammo.Config(backbone="resnet18", input_dim=512)
    model = mammo.MammogramBYOL(mammo.checkpoints.build_backbone("resnet18"), 512, 8, 4)
    path = tmp_path / "backbone.safetensors"
    mammo.checkpoints.export_backbone(model.backbone, path, config.backbone, (0.449, 0.226))
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"]["backbone"] == "resnet18"
    assert set(load_file(path)) == set(header) - {"__metadata__"}
    path.write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    with pytest.raises(mammo.MammoError, match="can't be read"):
        mammo.load_backbone(path)
    assert not (tmp_path / "owned").exists()


# The code -----------------------------------------------------------------------------------------

FORBIDDEN = {
    "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads",
    "shelve.open", "pd.read_pickle", "yaml.load", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip


def dangers(source: str) -> list[str]:
    """Calls that may run what a file says, or hand text to a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        text = node.args and isinstance(node.args[0], ast.JoinedStr | ast.Constant)
        signs = (
            name in FORBIDDEN,
            options.get("shell", "False") != "False",
            options.get("allow_pickle", "False") != "False",
            name == "torch.load" and options.get("weights_only") != "True",
            name.startswith("subprocess.") and text,
        )
        if any(signs):
            found.append(ast.unparse(node))
    return found


def test_no_script_runs_what_data_say():
    assert len(SOURCES) >= 6
    for script in SOURCES:
        assert dangers(script.read_text()) == [], script.name
    for line in (
        "eval(x)", "os.system(x)", "subprocess.run(f'ls {x}')", "subprocess.run(x, shell=True)",
        "torch.load(x)", "torch.load(x, weights_only=False)", "np.load(x, allow_pickle=True)",
    ):  # fmt: skip
        assert dangers(line), line


def test_the_shell_scripts_quote_what_they_are_given():
    for script in (*ROOT.glob("*.sh"), ROOT / ".ci" / "run"):
        text = script.read_text()
        assert not re.search(r"\beval\b|`", text), script
        assert not re.search(r"(?<![\"\w])\$[@*]", text), script  # "$@" alone keeps words whole
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


# Pages --------------------------------------------------------------------------------------------


def test_pages_show_names_and_cells_as_text(tmp_path):
    """In file names, which may hold all but a slash, and in cells of the table."""
    names = [name.replace("/", "\u2215") for name in PLANTED]
    images = write_images(tmp_path / "in" / "s1", 4)
    for number, path in enumerate(sorted(images.iterdir())):
        path.rename(images / (f"i{number}.png" if number == 0 else f"{names[number - 1]}.png"))
    rows = [
        f's1,i0,L,"{PLANTED[1]}",B,training',
        "s1,gone,L,CC,1,training",
    ]  # others are understood or refused
    header = "study_id,image_id,laterality,view_position,breast_density,split"
    (tmp_path / "table.csv").write_text("\n".join([header, *rows]))
    places = ["--images_root", str(tmp_path / "in"), "--output_dir", str(tmp_path / "out")]
    assert prep.main(["--csv_path", str(tmp_path / "table.csv"), *places]) == 1
    page = Page((tmp_path / "out" / "prepare_report.html").read_text("utf-8"))
    assert page.active == []
    assert not page.tags & {"script", "img", "svg", "iframe", "object"}
    text = (tmp_path / "out" / "prepare_report.html").read_text()
    assert all(word in text for word in ("&lt;script&gt;", "&lt;img", "&lt;svg"))  # they are shown


def test_pages_of_a_run_show_names_as_text(finished):
    pages = list(finished.rglob("*.html"))
    assert pages
    for path in pages:
        text = path.read_text("utf-8")
        page = Page(text)
        assert page.active == []
        assert not page.tags & {"script", "svg", "iframe", "object"}
        assert "alert(1)</script>" not in text.replace("\u2215", "/")
    assert "&lt;img src=x onerror" in text  # it is shown


# The machine --------------------------------------------------------------------------------------

PIPELINE = """
import sys
import prepare_dataset, small_network, train_byol_mammo
places = ["--data_dir", "out/training", "--output_dir", "runs", "--cache_dir", "cache"]
laid_out = ["--images_root", "in", "--output_dir", "out", "--csv_path", "none", "--test_share", "0"]
small = sys.argv[1:]
assert prepare_dataset.main(laid_out) == 0
sys.exit(train_byol_mammo.main([*places, *small, "--epochs", "1", "--max_steps", "3"]))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A DICOM archive with planted identifiers, prepared and trained on in an empty network namespace.

    wandb_mode is auto, as by default, without a login. Calls to connect are recorded where strace is.
    """
    folder = tmp_path_factory.mktemp("alone")
    for number in range(4):
        pixels = breast_image(bits=12, seed=number)[0]
        save(make_dicom(pixels, **SCANNER), folder / f"in/p{number}/image{number}.dcm")
    flags = [*SMALL, *REPORTS, "--wandb_mode", "auto"]
    command = [sys.executable, "-c", PIPELINE, *flags]
    if shutil.which("strace"):
        command = ["strace", "-f", "-qq", "-e", "trace=connect,sendto", "-o", "calls", *command]
    command = ["unshare", "-n", *command]
    if subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode:
        pytest.skip("an empty network namespace is not permitted here")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment |= {"PYTHONPATH": path, "HOME": str(folder / "home"), "NETRC": str(folder / "none")}
    environment |= {"OMP_NUM_THREADS": "1", "TORCH_HOME": str(folder / "hub")}
    (folder / "home").mkdir()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=580, check=False
    )
    (folder / "printed").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def outward(calls: str) -> list[str]:
    """Calls of strace's log that name an internet address other than this machine."""
    lines = [line for line in calls.splitlines() if "AF_INET" in line]
    return [line for line in lines if not re.search(r'"127\.|"::1"|"0\.0\.0\.0"|"::"', line)]


def test_a_run_without_network_needs_none_and_asks_for_none(alone):
    run = alone / "runs" / "byol_slim"
    assert (run / "backbone.safetensors").is_file()
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))  # tracked, on this disk alone
    if not (alone / "calls").exists():
        pytest.skip("no strace: only that the run needs no network was shown")
    calls = (alone / "calls").read_text()
    assert calls.count("connect(") > 0
    assert outward(calls) == []


def test_the_log_of_calls_would_show_a_connection(tmp_path):
    if not shutil.which("strace"):
        pytest.skip("no strace")
    code = "import socket; s = socket.socket(); s.settimeout(0.1); s.connect_ex(('192.0.2.1', 443))"
    command = ["strace", "-f", "-qq", "-e", "trace=connect,sendto", "-o", tmp_path / "calls"]
    subprocess.run([*command, sys.executable, "-c", code], check=True)
    assert len(outward((tmp_path / "calls").read_text())) == 1


def test_no_identifier_of_the_dicom_headers_is_in_any_output(alone):
    written = [
        path for path in alone.rglob("*") if path.is_file() and "in" not in path.relative_to(alone).parts
    ]
    assert len(written) > 25
    assert any(path.suffix == ".wandb" for path in written)
    manifest = (alone / "out" / "manifest.csv").read_text()
    assert all(value in manifest for value in KNOWN.values())  # how they were taken is told
    for path in written:
        content = path.read_bytes()
        for name, value in IDENTIFIERS.items():
            for encoding in ("utf-8", "utf-16-le"):
                assert value.encode(encoding) not in content, f"{name} is in {path}"
    source = (alone / "in/p0/image0.dcm").read_bytes()
    assert all(value.encode() in source for value in IDENTIFIERS.values())


# The repository -----------------------------------------------------------------------------------


def find_secrets(*paths: Path) -> subprocess.CompletedProcess:
    """detect-secrets over files, as `make audit` runs it."""
    hook = Path(sys.executable).with_name("detect-secrets-hook")
    if not hook.is_file():
        pytest.skip("detect-secrets is not installed: make audit")
    return subprocess.run(
        [hook, "--exclude-lines", '"image/png"', *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_secret_is_in_the_repository_and_a_planted_one_is_found(tmp_path):
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no git repository here")
    found = find_secrets(*done.stdout.splitlines())
    assert found.returncode == 0, found.stdout
    (tmp_path / "settings.py").write_text('aws_key = "AKIA' + 'IOSFODNN7EXAMPLQ"\n')
    assert find_secrets(tmp_path / "settings.py").returncode == 1
