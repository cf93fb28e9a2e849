#!/usr/bin/env python3
# ruff: noqa: E501 - a table reads better in long lines
"""Take each guard out of a copy of the project and see its test fail.

    python tests/faults/remove_guards.py                 # all, one after the other
    python tests/faults/remove_guards.py frame weights   # those whose name holds one of these words

A guard is a piece of code and what stands there without it. Prints a line for each, exit code 1 where a
test passes without its guard, or where the code has changed so that the guard is not found.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Guard:
    """A guard, its file, its code, the code without it, and the test that must fail then."""

    name: str
    file: str
    code: str
    without: str
    test: str


MAIN, PREPARE, DICOM, CLASSIFIER = (
    "train_byol_mammo.py", "prepare_dataset.py", "mammogram_dicom.py", "train_classifier.py",
)  # fmt: skip
IMAGES, TABLES, DISK = "test_broken_images.py", "test_broken_tables.py", "test_full_disk.py"
PROCESSES, NUMBERS, SECURITY = "test_killed_processes.py", "test_wrong_numbers.py", "test_security.py"

GUARDS = [
    Guard("size of an image before it is decoded", MAIN, "> MAX_SAMPLES:", "> 10**18:", f"{IMAGES} RGBA bombs"),
    Guard("names that are not UTF-8", MAIN, "cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)",
          "cv2.imread(str(path), cv2.IMREAD_UNCHANGED)", f"{IMAGES} main_script"),
    Guard("links that lead nowhere are named", MAIN, "if path.suffix.lower() in IMAGE_SUFFIXES)", "if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES)",
          f"{IMAGES} main_script"),
    Guard("EXIF is left alone", MAIN, "np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED",
          "np.frombuffer(data, np.uint8), cv2.IMREAD_ANYDEPTH", f"{IMAGES} exif"),
    Guard("float images are refused", MAIN, "if image.dtype not in (np.uint8, np.uint16):", "if False:",
          f"{IMAGES} good_files"),
    Guard("channels count in the size", PREPARE,
          'image.width, 3 if image.mode == "P" else len(image.getbands()))', "image.width)",
          f"{IMAGES} RGBA bombs"),
    Guard("names without a safe letter stay apart", PREPARE, '.lower()] > 1:', '.lower()] > 10**9:',
          f"{IMAGES} in_prepare"),
    Guard("deflated DICOM", DICOM, "    check_inflation(path)\n", "", f"{IMAGES} deflated"),
    Guard("frame of another size", DICOM, "            check_frame(dataset)\n", "            pass\n",
          f"{IMAGES} JPEG and 2000"),
    Guard("whatever pydicom raises", DICOM, "except Exception as error:  # pydicom parses each value when it is asked for",
          "except ZeroDivisionError as error:", f"{IMAGES} damaged and dicom"),
    Guard("whatever Pillow raises", MAIN, "except Exception as error:  # Pillow raises almost anything on damaged headers",
          "except ZeroDivisionError as error:", f"{IMAGES} thousands and png"),
    Guard("decoders that end their process", PREPARE, 'return item.kind == ".dcm" and', "return False and",
          "../test_prepare_runs.py ends_the_decoders"),
    Guard("rows longer than the header", MAIN, 'simplefilter("error", pd.errors.ParserWarning)',
          'simplefilter("ignore")', f"{TABLES} spoilt_labels"),
    Guard("other encodings", MAIN, "except (ValueError, pd.errors.ParserWarning) as error:",
          "except ZeroDivisionError as error:", f"{TABLES} manifest"),
    Guard("columns there twice", MAIN, "    if twice:\n        raise MammoError(f\"{path}: the column",
          "    if False:\n        raise MammoError(f\"{path}: the column", f"{TABLES} spoilt_labels"),
    Guard("endless and huge boxes", MAIN, ", OverflowError, RecursionError)", ")", f"{TABLES} spoilt_labels"),
    Guard("ids that leave the folder", PREPARE, "    check_ids(table)\n", "", f"{TABLES} spoilt_tables"),
    Guard("studies in two splits", PREPARE, "        if leaking.empty:", "        if True:",
          f"{TABLES} spoilt_tables"),
    Guard("other separators", PREPARE, 'if delimiter in header and "," not in header:', "if False:",
          f"{TABLES} spoilt_tables"),
    Guard("rows that disagree", PREPARE, "    if twice.any():", "    if False:", f"{TABLES} spoilt_tables"),
    Guard("full disk names the file", MAIN, "raise OSError(error.errno, reason, str(path)) from error",
          "raise", f"{DISK} reduced_pixels_on"),
    Guard("reduced pixels are written, not mapped", MAIN,
          "out.write(np.round(small * grey_scale).astype(np.uint16).data)",
          "out.truncate(out.seek(0, 2) + 2 * small.size); np.memmap(temporary, '<u2', 'r+', "
          "out.seek(0, 2) - 2 * small.size, (small.size,))[:] = np.round(small * grey_scale).ravel()",
          f"{DISK} reduced_pixels_on"),
    Guard("checkpoints on a full disk", MAIN, "temporary.write_bytes(buffer.getbuffer())",
          "torch.save(content, temporary)", f"{DISK} training_on_a_full and 6"),
    Guard("a row of metrics cut short", MAIN, '.rpartition("\\n")[0]', "", f"{DISK} row_of_metrics"),
    Guard("read-only output is told early", MAIN, "    folder.mkdir(parents=True, exist_ok=True)\n"
          "    tempfile.TemporaryFile(dir=folder).close()", "    pass", f"{DISK} told_before"),
    Guard("a read-only cache is enough", MAIN, "        if is_whole():  # also", "        if False:  # also",
          f"{DISK} may_lie"),
    Guard("files of a cache have their size", MAIN,
          "return all((cache / name).stat().st_size == size for name, size in sizes.items())",
          "return bool(sizes)", f"{DISK} damaged_cache"),
    Guard("a damaged cache is moved aside", MAIN, "                move_aside(final)\n", "",
          f"{DISK} damaged_cache and gone"),
    Guard("reduced pixels have their size", MAIN,
          "return path.is_file() and path.stat().st_size == NPY_HEADER + 2 * total", "return path.is_file()",
          f"{DISK} damaged_cache and reduced"),
    Guard("lock of the cache", MAIN, 'held = lock.acquire(timeout=0)', "held = nullcontext()",
          f"{DISK} two_builders and False"),
    Guard("damaged lines of a journal", MAIN, "with suppress(ValueError):  # half a line, where a process was killed",
          "with nullcontext():", "../test_cache.py interrupted_extraction and line"),
    Guard("pixels that are gone", MAIN, "if end > sizes.get(path, 0):", "if False:",
          "../test_cache.py interrupted_extraction and pixels"),
    Guard("images without tiles on a full disk", MAIN, " if pixels.size else 0", "",
          "../test_cache.py takes_no_place"),
    Guard("room of images that did not end", MAIN, "            os.truncate(path, end)\n", "            pass\n",
          "../test_cache.py gives_its_room_back"),
    Guard("images that end while others fail", MAIN, "                            done(future.result())\n",
          "                            pass\n", "../test_cache.py not_lost"),
    Guard("folders that a killed extraction left", MAIN,
          "whole = all(path.stat().st_size == end for path, end in ends.items())", "whole = True",
          "../test_cache.py interrupted_extraction and pixels"),
    Guard("half-written checkpoints are swept", MAIN, "    sweep(run.folder)\n", "",
          f"{PROCESSES} checkpoint and many"),
    Guard("the exported backbone comes last", MAIN, '    show_run(run, tracker, "finished")\n',
          '    export_backbone(run.model, folder / "backbone.safetensors", run.config)\n    show_run(run, tracker, "finished")\n',
          f"{PROCESSES} last_pictures"),
    Guard("files get their name when complete", MAIN, "    path = Path(path)\n    temporary = path.with_name",
          "    path = Path(path)\n    yield path\n    return\n    temporary = path.with_name",
          f"{PROCESSES} training and many"),
    Guard("prepare's files get their name when complete", PREPARE,
          "    temporary = temporary_name(path)\n    temporary.write_bytes(content)",
          "    temporary = path\n    temporary.write_bytes(content)", f"{DISK} prepare_on_a_full"),
    Guard("extraction processes end with their parent", MAIN, "            os._exit(1)", "            return",
          f"{PROCESSES} killed_workers"),
    Guard("a killed worker is told", MAIN, "except BrokenProcessPool as error:",
          "except ZeroDivisionError as error:", f"{PROCESSES} killed_workers"),
    Guard("Ctrl-C waits for the step", MAIN, '("SIGTERM", "SIGUSR1", "SIGINT")', '("SIGTERM", "SIGUSR1")',
          f"{PROCESSES} ctrl_c_in_training"),
    Guard("loss that is no number", MAIN, "if not all(map(math.isfinite, means)):", "if False:",
          f"{NUMBERS} in_a_batch"),
    Guard("the first bad step is named", MAIN, "index = sound.index(False) if False in sound else index",
          "pass", f"{NUMBERS} in_a_batch"),
    Guard("state before it is saved", MAIN, "elif saving and not all_finite(", "elif False and not all_finite(",
          f"{NUMBERS} behind_a_sound"),
    Guard("checkpoints of numbers alone", MAIN, "    if not all_finite(content):", "    if False:",
          f"{NUMBERS} no_checkpoint"),
    Guard("steps that overflow are skipped", MAIN,
          "    run.scaler.step(run.optimizer)\n    run.scaler.update()", "    run.optimizer.step()",
          f"{NUMBERS} gradient_that"),
    Guard("loss of the classifier", CLASSIFIER, "    if not means.isfinite().all():", "    if False:",
          f"{NUMBERS} classifier"),
    Guard("weights_only of checkpoints", MAIN,
          'content = torch.load(path, map_location="cpu", weights_only=True)\n    except FileNotFound',
          'content = torch.load(path, map_location="cpu", weights_only=False)\n    except FileNotFound',
          f"{SECURITY} malicious"),
    Guard("weights_only of weights", MAIN,
          'content = torch.load(path, map_location="cpu", weights_only=True)\n            name',
          'content = torch.load(path, map_location="cpu", weights_only=False)\n            name',
          f"{SECURITY} malicious"),
    Guard("settings of a stranger's checkpoint", CLASSIFIER, "except (RuntimeError, KeyError, TypeError) as",
          "except (RuntimeError, KeyError) as", f"{SECURITY} something_else"),
    Guard("state of something else", MAIN,
          "except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:",
          "except ZeroDivisionError as error:", f"{SECURITY} something_else"),
    Guard("text of pages is escaped", PREPARE, "{html.escape(str(v))}", "{str(v)}", f"{SECURITY} names_and_cells"),
    Guard("wandb stays here without a login", MAIN, 'or login else "offline"', 'or login else "online"',
          f"{SECURITY} without_network"),
    Guard("wandb's telemetry", MAIN, 'os.environ.setdefault("WANDB_ERROR_REPORTING", "false")', "pass",
          f"{SECURITY} without_network"),
    Guard("spacing that cannot be", MAIN, 'spacing.where(spacing.between(*RANGES["pixel_spacing_mm"]))',
          "spacing", f"{TABLES} points_elsewhere"),
    Guard("header values stay in the header (one is let out)", DICOM, '"view": view,',
          '"view": str(dataset.get("PatientName")),', f"{SECURITY} no_identifier"),
]  # fmt: skip


def fails(guard: Guard, place: Path) -> bool:
    """Whether the guard's test fails in a copy of the project without it."""
    file, (test, _, words) = place / guard.file, guard.test.partition(" ")
    text = (ROOT / guard.file).read_text()
    if text.count(guard.code) != 1:
        raise LookupError(f"{guard.name}: its code is there {text.count(guard.code)} times")
    file.write_text(text.replace(guard.code, guard.without))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-x",
        "-q",
        "--timeout",
        "1200",
        "-p",
        "no:cacheprovider",
    ]
    slow = "slow or not slow" if "many" in words or "thousands" in words else "not slow"
    expression = " and ".join(word for word in words.split() if word != "and")
    command += [f"tests/faults/{test}", "-m", slow, "-k", expression.replace(",", " and ")]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    shutil.copyfile(ROOT / guard.file, file)
    if done.returncode in (2, 3, 4, 5):  # pytest's codes for a run that was none
        raise LookupError(f"{guard.name}: {' '.join(command)}: {done.stdout[-800:]}")
    return done.returncode != 0


def main(words: list[str]) -> int:
    """Take the guards out in turn."""
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "project"
        names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in names.stdout.splitlines():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
        for guard in GUARDS:
            if words and not any(word in guard.name for word in words):
                continue
            try:
                verdict = "the test fails" if fails(guard, place) else "THE TEST PASSES"
            except LookupError as error:
                verdict = f"NOT TRIED: {error}"
            bad += verdict != "the test fails"
            print(f"{guard.name:<48} {guard.file:<22} {verdict}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
