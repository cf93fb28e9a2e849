#!/usr/bin/env python3
# ruff: noqa: E501 - a table reads better in long lines
"""Take each guard out of a copy of the project and see its test fail.

    python tests/faults/remove_guards.py                 # all, one after the other
    python tests/faults/remove_guards.py frame weights   # those whose name holds one of these words

A guard is a piece of code in a function, and what stands there without it. Both are compared as syntax, and
the function is looked for in all files: comments, layout and moves to another module change nothing. Prints
a line for each guard, exit code 1 where a test passes without its guard or where a guard is not found;
tests/test_shape.py looks whether all are found.
"""

from __future__ import annotations

import ast
import functools
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Guard:
    """A guard, its function, its code, the code without it, and the test that must fail then.

    `function` is qualified: `Journal.close`, `start_worker.watch`. `code` is an expression, or statements
    that follow each other, or `if CONDITION:` or `except TYPE:`, of which the condition or the type is
    replaced. `file` is needed where functions of that name in several files hold such code.
    """

    name: str
    function: str
    code: str
    without: str
    test: str
    file: str = ""


@dataclass(frozen=True)
class Place:
    """Where a guard stands: a file and the text that is replaced there, by bytes of its lines."""

    file: Path
    start: tuple[int, int]
    end: tuple[int, int]
    text: str


LABELS = "test_wrong_labels.py"
IMAGES, TABLES, DISK = "test_broken_images.py", "test_broken_tables.py", "test_full_disk.py"
MACHINES, STRANGERS, MESSAGES = "test_machines.py", "test_strangers_weights.py", "test_messages.py"
PROCESSES, NUMBERS, SECURITY = "test_killed_processes.py", "test_wrong_numbers.py", "test_security.py"

GUARDS = [
    Guard("size of an image before it is decoded", "read_checked", "(samples := declared_samples(path)) > MAX_SAMPLES",
          "False and (samples := declared_samples(path))", f"{IMAGES} RGBA bombs"),
    Guard("errors of the system are no skips", "Journal.add", "if 'unread' in record:",
          "False", "../test_cache.py did_not_give"),
    Guard("names that are not UTF-8", "decode", "decode_by_opencv(data)",
          "cv2.imread(str(path), cv2.IMREAD_UNCHANGED)", f"{IMAGES} main_script"),
    Guard("memory for a chunk beyond its PNG", "decode_by_opencv", "if start > len(data):",
          "False", f"{IMAGES} GiB bombs"),
    Guard("links that lead nowhere are named", "walk_images", "path.suffix.lower() in IMAGE_SUFFIXES",
          "path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES", f"{IMAGES} main_script"),
    Guard("hidden files are left out", "walk_images", "is_left_out(entry.name)",
          "False", f"{IMAGES} main_script"),
    Guard("pictures to be turned", "stored_otherwise", "if orientation in range(2, 9):",
          "False", f"{IMAGES} good_files"),
    Guard("several pictures in a file", "stored_otherwise", "pictures > 1",
          "False", f"{IMAGES} good_files"),
    Guard("float images are refused", "decode", "if image.dtype not in (np.uint8, np.uint16):",
          "False", f"{IMAGES} good_files"),
    Guard("channels count in the size", "decode_raster", "3 if image.mode == 'P' else len(image.getbands())",
          "1", f"{IMAGES} RGBA bombs"),
    Guard("PNG that are not one picture as stored", "read_png_header", "check_png_chunks(file)",
          "", "../test_prepare_files.py one_picture"),
    Guard("tags that are missing", "check_tags", "if absent:",
          "False", "../test_prepare_headers.py missing"),
    Guard("bits that cannot be", "check_tags", "if not 1 <= stored <= high + 1 <= allocated:",
          "False", "../test_prepare_headers.py cannot_be_are_named"),
    Guard("bits that lie elsewhere", "stored_values", "dataset.get('HighBit', dataset.BitsStored - 1) == dataset.BitsStored - 1",
          "True", "../test_prepare_headers.py where_they_lie"),
    Guard("pages of dose", "check_is_mammogram", "if is_dose_page(dataset):",
          "False", "../test_prepare_headers.py pages"),
    Guard("magnified views", "decode", "KEPT_OUT.intersection(header.get('view_modifier', '').split('+'))",
          "set()", "../test_prepare_headers.py pages", "prepare_dataset.py"),
    Guard("padding in tissue", "is_tissue", "(near & bright).mean() > TISSUE_OUTLINE",
          "False", "../test_prepare_headers.py saturated"),
    Guard("spacing that a detector cannot have", "judge_spacing", "if not all(DETECTOR_SPACING[0] <= value <= DETECTOR_SPACING[1] for value in values):",
          "False", "../test_prepare_headers.py headers_that_cannot"),
    Guard("spacing that is none", "read_table", "check_spacing(table, reading.notes)",
          "table", "../test_prepare_headers.py none_is_refused"),
    Guard("names that become one stay apart", "adapt_folder", "names[f\"{row['study_id']}_{row['image_id']}\".lower()] > 1",
          "False", "../test_prepare_archives.py become_one"),
    Guard("deflated DICOM", "open_dicom", "check_inflation(path)",
          "", f"{IMAGES} deflated"),
    Guard("frame of another size", "stored_values", "check_frame(dataset)",
          "", f"{IMAGES} JPEG and 2000"),
    Guard("whatever pydicom raises", "read_dicom", "except Exception:",
          "ZeroDivisionError", f"{IMAGES} damaged and dicom"),
    Guard("whatever Pillow raises", "declared_samples", "except Exception:",
          "ZeroDivisionError", f"{IMAGES} thousands and png"),
    Guard("decoders that end their process", "may_crash", "item.kind == '.dcm'",
          "False", "../test_prepare_runs.py ends_the_decoders"),
    Guard("rows longer than the header", "parse_table", "warnings.simplefilter('error', pd.errors.ParserWarning)",
          "warnings.simplefilter('ignore')", f"{TABLES} spoilt_labels"),
    Guard("other encodings", "read_table", "except ValueError:",
          "ZeroDivisionError", f"{TABLES} manifest"),
    Guard("tables that are no CSV", "refuse_other_tables", "if kind:",
          "False", f"{MESSAGES} other_kinds"),
    Guard("readers that go at the end", "exit_code", "sys.stdout.flush()",
          "", f"{MESSAGES} nobody_reads and exit_code"),
    Guard("readers that go", "main", "except BrokenPipeError:",
          "ZeroDivisionError", f"{MESSAGES} nobody_reads and prepare", "prepare_dataset.py"),
    Guard("names that stdout can't print", "escape_names", "stream.reconfigure(errors='backslashreplace')",
          "", f"{MESSAGES} strict"),
    Guard("names that wandb can't take", "Tracker._work", "if not files.is_text(text):",
          "False", f"{MESSAGES} not_utf8"),
    Guard("columns there twice", "read_table", "if twice:",
          "False", f"{TABLES} spoilt_labels"),
    Guard("endless and huge boxes", "_read_boxes", "except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):",
          "(ValueError, TypeError, KeyError, AttributeError)", f"{TABLES} spoilt_labels"),
    Guard("ids that leave the folder", "read_table", "check_ids(table, adapter)",
          "", f"{TABLES} spoilt_tables"),
    Guard("studies in two splits", "check_splits", "if leaking.empty:",
          "True", f"{TABLES} spoilt_tables"),
    Guard("other separators", "delimiter_of", 'if delimiter in header and "," not in header:',
          "False", f"{TABLES} spoilt_tables"),
    Guard("rows that disagree", "resolve", "if not groups.ngroups:",
          "True", f"{TABLES} spoilt_tables"),
    Guard("max has no order for sides", "resolve", "rule == 'max' and fixed",
          "False", f"{LABELS} choose"),
    Guard("one name, several images", "match_files", "if unclear:",
          "False", f"{LABELS} bare"),
    Guard("the folder decides between files of a name", "files_of_rows", "if not key.startswith('name '):",
          "True", f"{LABELS} bare"),
    Guard("a bare name of several images has no patient", "find_patients", "len(set(map(stem_of, found))) == 1",
          "found", f"{LABELS} pattern"),
    Guard("cancer of either breast", "cancer_of_breasts", "if pathology == '1' and not (len(taken) == 1 and taken in sides):",
          "False", "../test_prepare_published_archives.py embed_cancer"),
    Guard("steps of biopsies and contrast studies", "check_is_mammogram", "NO_SCREENING.fullmatch(value)",
          "False", "../test_prepare_headers.py kept_out"),
    Guard("columns twice but for a blank", "read_csv", "if len(twice := table.columns[table.columns.duplicated()]):",
          "False", f"{LABELS} blank"),
    Guard("norms of timm that hold the activation", "synchronise_norm", "if name.startswith(TIMM):",
          "False", "../test_timm_backbones.py keeps_what"),
    Guard("a gradient for what the targets don't ask", "TargetBYOL.forward", "if not loss.requires_grad:",
          "False", "../test_timm_backbones.py every_parameter"),
    Guard("an arm that was trained by another recipe", "check_point", "if changed := flags.changed_flags(config, recorded, mammo.FREE_ON_RESUME):",
          "False", "../test_study.py not_trained_again"),
    Guard("patients who judge what was fitted on them", "note_fitted", "if known := {*judging} & {*fitted}:",
          "False", "../test_classifier.py fitted_on"),
    Guard("one image, several rows", "match_files", "check_shared(table)",
          "", f"{LABELS} rows and file"),
    Guard("a bare name among several images", "match_labels", "len(claims) == 1 and images_of[min(found)] == 1",
          "bool(claims)", f"{LABELS} joined"),
    Guard("labels of an earlier run", "carry_out", "clear_labels(plan)",
          "", f"{LABELS} stay"),
    Guard("images of an earlier run", "remove_stale", "set_aside(output, plan.options.output_dir / EARLIER / output.parent.name)",
          "", "../test_prepare_dataset.py gone_is_kept"),
    Guard("a layout that is not finished", "read_manifest", "(folder / CLAIMS).exists()",
          "False", f"{LABELS} finished"),
    Guard("folders named as splits", "splits_of_folders", "named and named != tops",
          "False", f"{LABELS} named"),
    Guard("folders that are classes", "check_folders_are_patients", "if not folders:",
          "True", f"{LABELS} classes"),
    Guard("CBIS-DDSM's folders without its tables", "check_no_cbis", "if found:",
          "False", f"{LABELS} CBIS"),
    Guard("ids that a spreadsheet has cut", "check_ids", "if len(cut):",
          "False", f"{LABELS} cut"),
    Guard("codes that may be counts", "Reading.check_counts", "len(several) and (not (values == '0').any())",
          "False", f"{LABELS} codes"),
    Guard("corners that make no box", "read_box", "box['xmin'] >= box['xmax'] or box['ymin'] >= box['ymax']",
          "False", f"{LABELS} fit"),
    Guard("findings of another side", "read_findings", "check_same_images(rows, table)",
          "", f"{LABELS} fit"),
    Guard("a pattern beside a column of patients", "find_patients", "'patient_id' in table and table['patient_id'].any() and (not reading.nameless)",
          "False", f"{LABELS} pattern"),
    Guard("women that nothing names", "set_splits", "by_chance and reading.nameless",
          "False", f"{LABELS} INbreast"),
    Guard("one woman in two spellings", "group_keys", "study, patient = (one_spelling(table['study_id']), one_spelling(table['patient_id']))",
          "study, patient = table['study_id'], table['patient_id']", f"{LABELS} spellings"),
    Guard("a study of two women", "check_studies", "(several := women.nunique().loc[lambda count: count > 1]).size",
          "False", f"{LABELS} women"),
    Guard("columns that are others", "Reading.column", "len(lost) > NOT_UNDERSTOOD * spoken",
          "False", f"{LABELS} column"),
    Guard("labels that are all empty", "read_table", "check_labels_said(table, reading, adapter)",
          "", f"{LABELS} RSNA"),
    Guard("labels that reach no image", "make_plan", "check_labels_reach(plan)",
          "", f"{LABELS} CMMD"),
    Guard("findings of other images", "read_findings", "if silent == images:",
          "False", f"{LABELS} findings"),
    Guard("splits of CBIS-DDSM by default", "adapt_cbis", "if len(wrong):",
          "False", f"{LABELS} CBIS"),
    Guard("full disk names the file", "name_file_in_errors", "raise OSError(error.errno, reason, str(path)) from error",
          "raise", f"{DISK} reduced_pixels_on"),
    Guard("reduced pixels are written, not mapped", "write_reduced", "file.write(np.round(small * grey_scale).astype(np.uint16).data)",
          "file.truncate(file.seek(0, 2) + 2 * small.size); np.memmap(file.name, '<u2', 'r+', file.seek(0, 2) - 2 * small.size, (small.size,))[:] = np.round(small * grey_scale).ravel()", f"{DISK} reduced_pixels_on"),
    Guard("checkpoints on a full disk", "write_checkpoint", "temporary.write_bytes(buffer.getbuffer())",
          "torch.save(content, temporary)", f"{DISK} training_on_a_full and few"),
    Guard("a row of metrics cut short", "MetricsFile.__init__", "path.read_text(encoding='utf-8').rpartition('\\n')[0]",
          "path.read_text(encoding='utf-8')", f"{DISK} row_of_metrics"),
    Guard("read-only output is told early", "exclusive_run_folder", "folder.mkdir(parents=True, exist_ok=True)\ntempfile.TemporaryFile(dir=folder).close()",
          "pass", f"{DISK} told_before"),
    Guard("a read-only cache is enough", "open_reduced", "if has_size(path, size):",
          "False", f"{DISK} may_lie"),
    Guard("files of a cache have their size", "is_finished", "all((cache / name).stat().st_size == size for name, size in sizes.items())",
          "bool(sizes)", f"{DISK} damaged_cache"),
    Guard("a damaged cache is moved aside", "build_in", "files.move_aside(final)",
          "", f"{DISK} damaged_cache and gone"),
    Guard("reduced pixels have their size", "has_size", "path.is_file() and path.stat().st_size == size",
          "path.is_file()", f"{DISK} damaged_cache and reduced"),
    Guard("lock of the cache", "build_once", "processes.take_lock(path, timeout=0)",
          "nullcontext()", f"{DISK} two_builders and False"),
    Guard("file systems without locks", "take_lock", "if error.errno not in NO_LOCKS:",
          "True", f"{MACHINES} first_of_two"),
    Guard("builders without locks keep apart", "build_without_lock", "build(mine, journal)",
          "build(building, building / 'extracted' / processes.this_host())", f"{MACHINES} first_of_two"),
    Guard("a cache that may not be read", "build_cache", "caches.check_readable(final)",
          "", f"{MACHINES} colleagues"),
    Guard("a colleague's cache stays as it is", "open_reduced", "if error.errno not in NOT_WRITABLE:",
          "True", f"{MACHINES} colleagues"),
    Guard("sockets in a long TMPDIR", "process_pool", "shorten_socket_names()",
          "", f"{MACHINES} too_long"),
    Guard("damaged lines of a journal", "read_records", "suppress(ValueError)",
          "nullcontext()", "../test_cache.py interrupted_extraction and line"),
    Guard("pixels that are gone", "read_records", "if end > size(path):",
          "False", "../test_cache.py interrupted_extraction and pixels"),
    Guard("images without tiles on a full disk", "extract_to_file", "extraction.append_pixels(file, np.ascontiguousarray(pixels, dtype)) if pixels.size else 0",
          "extraction.append_pixels(file, np.ascontiguousarray(pixels, dtype))", "../test_cache.py takes_no_place"),
    Guard("room of images that did not end", "Journal._cut", "file.truncate(end)",
          "", "../test_cache.py gives_its_room_back"),
    Guard("images that end while others fail", "run_in_parallel", "with suppress(OSError):\n    done(future.result())",
          "pass", "../test_cache.py not_lost"),
    Guard("lines whose pixels are gone go for good", "Journal.__init__", "files.write_atomic(self.folder / RECORDS, lines)",
          "", "../test_cache.py never_comes_back"),
    Guard("half a value is cut off", "Journal.__init__", "self._cut()",
          "", "../test_cache.py interrupted_extraction and pixels"),
    Guard("half-written checkpoints are swept", "start_folder", "files.remove_unfinished(run.folder)",
          "", f"{PROCESSES} checkpoint and many"),
    Guard("the exported backbone comes last", "finish_run", "show_run(run, tracker, 'finished')",
          "checkpoints.export_backbone(run.model.backbone, folder / 'backbone.safetensors', run.config.backbone, (0, 1))\nshow_run(run, tracker, 'finished')", f"{PROCESSES} last_pictures"),
    Guard("files get their name when complete", "atomic_path", "path = Path(path)",
          "path = Path(path)\nyield path\nreturn", f"{PROCESSES} gets_its_name"),
    Guard("prepare's files get their name when complete", "atomic_path", "path = Path(path)",
          "path = Path(path)\nyield path\nreturn", f"{DISK} prepare_on_a_full"),
    Guard("extraction processes end with their parent", "start_worker.watch", "os._exit(1)",
          "return", f"{PROCESSES} killed_workers"),
    Guard("workers that wait for a killed one end", "process_pool", "process.kill()",
          "", f"{PROCESSES} while_it_waits"),
    Guard("a killed worker is told", "extract_missing", "except BrokenProcessPool:",
          "ZeroDivisionError", f"{PROCESSES} killed_workers"),
    Guard("Ctrl-C waits for the step", "StopSignal.__enter__", "STOP_SIGNALS",
          "[name for name in STOP_SIGNALS if name != 'SIGINT']", f"{PROCESSES} ctrl_c_in_training"),
    Guard("loss that is no number", "check_finite", "if not all(map(math.isfinite, means.values())):",
          "False", f"{NUMBERS} in_a_batch"),
    Guard("the first bad step is named", "check_finite", "index = sound.index(False) if False in sound else index",
          "pass", f"{NUMBERS} in_a_batch"),
    Guard("state before it is saved", "check_finite", "if not state_is_finite:",
          "False", f"{NUMBERS} behind_a_sound"),
    Guard("checkpoints of numbers alone", "write_checkpoint", "if not all_finite(content):",
          "False", f"{NUMBERS} no_checkpoint"),
    Guard("steps that overflow are skipped", "train_step", "run.scaler.step(run.optimizer)\nrun.scaler.update()",
          "run.optimizer.step()", f"{NUMBERS} gradient_that"),
    Guard("loss of the classifier", "finetune_epoch", "if not means.isfinite().all():",
          "False", f"{NUMBERS} classifier"),
    Guard("weights_only", "read_archive", "torch.load(path, map_location='cpu', weights_only=True)",
          "torch.load(path, map_location='cpu', weights_only=False)", f"{SECURITY} malicious"),
    Guard("weights that are no numbers", "read_backbone_state", "refuse_no_numbers(state, f'weights {path}')",
          "", f"{STRANGERS} refused_in_a_line and NaN"),
    Guard("two networks in a file", "find_backbone", "if len(prefixes) > 1:",
          "False", f"{STRANGERS} refused_in_a_line and teacher"),
    Guard("momentum copies are left", "find_backbone", "twins[prefix] == prefix or twins[prefix] not in found",
          "True", f"{STRANGERS} wrapped and MoCo"),
    Guard("dicts that hold themselves", "flatten", "isinstance(content, dict) and depth",
          "isinstance(content, dict)", f"{STRANGERS} holds_itself"),
    Guard("settings of a stranger's checkpoint", "start_model", "except (RuntimeError, KeyError, TypeError):",
          "(RuntimeError, KeyError)", f"{SECURITY} something_else"),
    Guard("state of something else", "prepare_run", "except (KeyError, TypeError, AttributeError, ValueError, RuntimeError):",
          "ZeroDivisionError", f"{SECURITY} something_else"),
    Guard("text of pages is escaped", "html_table", "html.escape(str(v))",
          "str(v)", f"{SECURITY} names_and_cells"),
    Guard("wandb stays here without a login", "wandb_mode", "'online' if os.environ.get('WANDB_API_KEY') or login else 'offline'",
          "'online'", f"{SECURITY} without_network"),
    Guard("wandb's telemetry", "Tracker._work", "os.environ.setdefault('WANDB_ERROR_REPORTING', 'false')",
          "", f"{SECURITY} without_network"),
    Guard("spacing that cannot be", "read_manifest", "spacing.where(spacing.between(*SPACING_RANGE))",
          "spacing", f"{TABLES} points_elsewhere"),
    Guard("words that are no polarity", "read_manifest", "check_polarity(manifest['polarity'], folder / 'manifest.csv')",
          "", f"{TABLES} polarity_that_is_none"),
    Guard("header values stay in the header (one is let out)", "read_header", "view",
          "str(dataset.get('PatientName'))", f"{SECURITY} no_identifier"),
]  # fmt: skip


def functions(tree: ast.AST, outer: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Qualified name and node of every function below a node."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.expr):
            continue  # no function stands in an expression
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        name = f"{outer}{node.name}" if named else outer
        if named and not isinstance(node, ast.ClassDef):
            yield name, node
        yield from functions(node, f"{name}." if named else outer)


@functools.cache
def project() -> dict[str, list[tuple[Path, ast.AST]]]:
    """The functions of the project by qualified name, each with its file."""
    found: dict[str, list[tuple[Path, ast.AST]]] = {}
    for file in sorted([*ROOT.glob("*.py"), *ROOT.glob("byol_mammo/**/*.py")]):
        for name, node in functions(ast.parse(file.read_text(encoding="utf-8"))):
            found.setdefault(name, []).append((file, node))
    return found


def shown(nodes: list[ast.AST]) -> str:
    """Code without its layout."""
    return "\n".join(map(ast.unparse, nodes))


def matches(function: ast.AST, code: str) -> list[list[ast.AST]]:
    """The nodes of a function that a guard's code names: one expression, or statements in a row."""
    nodes = list(ast.walk(function))
    if code.startswith("if ") and code.endswith(":") and "\n" not in code:
        wanted = ast.unparse(ast.parse(code + " pass").body[0].test)
        heads = [node.test for node in nodes if isinstance(node, ast.If)]
        return [[head] for head in heads if ast.unparse(head) == wanted]
    if code.startswith("except ") and code.endswith(":"):
        wanted = ast.unparse(ast.parse(f"try: pass\n{code} pass").body[0].handlers[0].type)
        heads = [node.type for node in nodes if isinstance(node, ast.ExceptHandler) and node.type]
        return [[head] for head in heads if ast.unparse(head) == wanted]
    wanted = ast.parse(code).body
    if len(wanted) == 1 and isinstance(wanted[0], ast.Expr):
        value = wanted[0].value
        alike = [node for node in nodes if type(node) is type(value)]
        return [[node] for node in alike if ast.dump(node) == ast.dump(value)]
    found = []
    for node in nodes:
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, [])
            rows = range(len(body) - len(wanted) + 1) if isinstance(body, list) else ()
            parts = [body[row : row + len(wanted)] for row in rows]
            found += [part for part in parts if shown(part) == shown(wanted)]
    return found


class Replacing(ast.NodeTransformer):
    """Puts one expression in the place of another."""

    def __init__(self, old: ast.AST, new: str) -> None:
        self.old, self.new = old, ast.parse(new, mode="eval").body

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().visit(node)


def find(guard: Guard) -> Place:
    """The one place of a guard. Raises LookupError."""
    found = [
        (file, function, nodes)
        for file, function in project().get(guard.function, [])
        if guard.file in ("", str(file.relative_to(ROOT)))
        for nodes in matches(function, guard.code)
    ]
    if len(found) != 1:
        raise LookupError(f"{guard.name}: {guard.function} holds its code {len(found)} times")
    (file, function, nodes) = found[0]
    first, last, text = nodes[0], nodes[-1], guard.without or "None"
    strings = [node for node in ast.walk(function) if isinstance(node, ast.JoinedStr)]
    around = [node for node in strings if node is not first and first in ast.walk(node)]
    if around:  # Python 3.11 doesn't know where in an f-string its parts lie
        first = last = max(around, key=lambda node: sum(1 for _ in ast.walk(node)))
        start, end = (first.lineno, first.col_offset), (last.end_lineno, last.end_col_offset)
        return Place(file, start, end, ast.unparse(Replacing(nodes[0], text).visit(first)))
    text = textwrap.indent(text, " " * first.col_offset).lstrip()
    start, end = (first.lineno, first.col_offset), (last.end_lineno, last.end_col_offset)
    return Place(file, start, end, text)


def without(place: Place) -> str:
    """The text of a guard's file without the guard."""
    lines = place.file.read_bytes().splitlines(keepends=True)
    (row, column), (end_row, end_column) = place.start, place.end
    before = b"".join(lines[: row - 1]) + lines[row - 1][:column]
    after = lines[end_row - 1][end_column:] + b"".join(lines[end_row:])
    return (before + place.text.encode() + after).decode()


def fails(guard: Guard, place: Path) -> bool:
    """Whether the guard's test fails in a copy of the project without it."""
    found, (test, _, words) = find(guard), guard.test.partition(" ")
    file = place / found.file.relative_to(ROOT)
    text = without(found)
    ast.parse(text)  # the guard is gone, not the syntax
    file.write_text(text)
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
    shutil.copyfile(found.file, file)
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
            print(f"{guard.name:<50} {guard.function:<32} {verdict}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
