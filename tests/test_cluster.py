"""--dask: the bytes of one process, whatever is lost on the way; what can't be used is refused."""

import json
import shutil
import signal
import socket
import sys
import types
from contextlib import closing

import cv2
import pytest
import small_cluster
import stages
from conftest import (
    ROOT,
    SMALL,
    breast_image,
    images_done,
    places_in,
    run_script,
    small_config,
    write_images,
)

import prepare_dataset as prepare
import train_byol_mammo as mammo
from byol_mammo import cluster, extraction, processes
from byol_mammo.settings import MammoError, StoppedError

pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def dask(tmp_path_factory):
    with small_cluster.started(tmp_path_factory.mktemp("dask")) as running:
        yield running


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with images, one broken and one shallow, and their cache by one process."""
    folder = tmp_path_factory.mktemp("alone")
    images = write_images(folder / "images", 8, bits=12)
    cv2.imwrite(str(images / "shallow.png"), breast_image(seed=9)[0])
    (images / "broken.png").write_bytes(b"\x89PNG broken")
    mammo.build_cache(small_config(folder))
    return folder


def contents(folder):
    """All files below a folder, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def same_images(folder, alone):
    shutil.copytree(alone / "images", folder / "images")  # copytree keeps mtimes
    return folder


def build_and_compare(folder, alone, *flags):
    """Build the cache of the same images with other flags: it is the one process's, byte for byte."""
    cache = mammo.build_cache(small_config(folder, *flags))
    whole = alone / "cache" / cache.name
    assert contents(cache) == contents(whole)
    assert not list(cache.parent.glob(".*.building"))


@pytest.mark.parametrize(
    ("depths", "flags"), [("one", ()), ("two", ()), ("one", ("--max_tiles", "20"))], ids=str
)
def test_a_cluster_gives_the_cache_of_one_process(tmp_path, alone, dask, depths, flags):
    same_images(tmp_path, alone)
    if depths == "one":
        (tmp_path / "images" / "shallow.png").unlink()
    mammo.build_cache(small_config(tmp_path, *flags))
    (tmp_path / "cache").rename(tmp_path / "whole")
    cache = mammo.build_cache(small_config(tmp_path, *flags, "--dask", str(dask.dask)))
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    assert len(contents(cache)) == 5


@pytest.mark.parametrize("later", ["cluster", "here"])
def test_a_client_that_was_killed_goes_on(tmp_path, alone, dask, later):
    words = ["--extract_only", *places_in(same_images(tmp_path, alone)), *SMALL, "--dask", dask.dask]
    process = stages.start(small_cluster.extract_and_die, words, tmp_path / "log")
    assert stages.end(process, tmp_path / "log") == -signal.SIGKILL
    (journal,) = tmp_path.glob("cache/.*.building/extracted/*/records.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines() if line]
    assert len(records) == 2
    assert all((journal.parent / record["writer"]).is_dir() for record in records)
    build_and_compare(tmp_path, alone, *(["--dask", str(dask.dask)] if later == "cluster" else []))


def test_a_signal_leaves_what_the_same_command_goes_on_from(tmp_path, alone, dask, monkeypatch):
    same_images(tmp_path, alone)
    with monkeypatch.context() as patch:
        add = extraction.Journal.add

        def add_and_stop(journal, record):
            add(journal, record)
            signal.raise_signal(signal.SIGTERM)

        patch.setattr(extraction.Journal, "add", add_and_stop)
        with pytest.raises(StoppedError):
            mammo.build_cache(small_config(tmp_path, "--dask", str(dask.dask)))
    assert 0 < images_done(tmp_path) < 10
    build_and_compare(tmp_path, alone, "--dask", str(dask.dask))


def test_images_of_a_single_worker_are_put_into_order(tmp_path, monkeypatch):
    write_images(tmp_path / "images", 3, bits=12)
    mammo.build_cache(small_config(tmp_path))
    (tmp_path / "cache").rename(tmp_path / "whole")

    def backwards(dask, function, jobs, *options):
        yield from ((number, function(*job)) for number, job in reversed([*enumerate(jobs)]))

    monkeypatch.setattr(cluster, "results", backwards)
    mammo.build_cache(small_config(tmp_path, "--dask", "x:1"))
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_a_worker_that_is_lost_costs_nothing(tmp_path, alone, dask, monkeypatch):
    dask.add_workers(1)
    add, added = extraction.Journal.add, []

    def add_and_kill(journal, record):
        add(journal, record)
        added.append(record)
        if len(added) == 3:
            dask.kill_worker(-1)

    monkeypatch.setattr(extraction.Journal, "add", add_and_kill)
    build_and_compare(same_images(tmp_path, alone), alone, "--dask", str(dask.dask))
    assert len(added) == 10


@pytest.fixture
def strict(dask, monkeypatch):
    """The cluster with a worker more, giving an image up at the first worker that it ends."""
    import distributed

    def allow(failures):
        def set_it(dask_scheduler):
            dask_scheduler.allowed_failures = failures

        with distributed.Client(scheduler_file=str(dask.dask)) as client:
            client.run_on_scheduler(set_it)

    dask.add_workers(1)
    monkeypatch.setattr(cluster, "AHEAD", 1)  # no other image waits beside it
    allow(0)
    yield dask
    allow(3)


def test_an_image_that_ends_its_workers_is_named_once_the_others_are_done(tmp_path, strict):
    jobs = [(number, str(tmp_path / f"{number}.png")) for number in range(6)]
    with pytest.raises(MammoError, match=r"workers were killed.* at 1 images \(\S+/3\.png\)"):
        extraction.extract_missing(
            small_cluster.die_at_third,
            jobs,
            tmp_path / "extracted" / "here",
            1,
            "none",
            str(strict.dask),
        )
    finished = extraction.read_records(tmp_path / "extracted")
    assert {number: record["error"] for number, record in finished.items()} == {
        0: "0", 1: "2", 2: "4", 4: "8", 5: "10"
    }  # fmt: skip


LAY_OUT = "--csv_path none --images_root images --output_dir out --test_share 0.3".split()


def write_tiffs(folder):
    """Four TIFF, which become PNG, and a broken one."""
    folder.mkdir(parents=True)  # each a study and a patient
    for index in range(4):
        cv2.imwrite(str(folder / f"i{index}.tif"), breast_image(seed=index, bits=12)[0])
    (folder / "broken.tif").write_bytes(b"II*\0 broken")


def test_prepare_on_a_cluster_lays_out_the_same(tmp_path, dask, monkeypatch, capsys):
    write_tiffs(tmp_path / "here" / "images")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    monkeypatch.chdir(tmp_path / "here")
    assert prepare.main(LAY_OUT) == 1
    # As a user starts it: what the script defines is __main__'s in that process, and not in the workers.
    words = [*LAY_OUT, "--dask", dask.dask]
    there = run_script(ROOT / "prepare_dataset.py", *words, cwd=tmp_path / "there")
    assert there.returncode == 1
    assert all(line.startswith("note: Dask workers of several") for line in there.stderr.splitlines())
    assert there.stdout == capsys.readouterr().out
    assert contents(tmp_path / "there" / "out") == contents(tmp_path / "here" / "out")
    assert any(name.endswith("i3.png") for name in contents(tmp_path / "there" / "out"))


def test_prepare_tries_here_what_ended_the_workers(tmp_path, monkeypatch, capsys):
    write_tiffs(tmp_path / "images")
    monkeypatch.chdir(tmp_path)

    def all_killed(dask, function, jobs, folder, inputs):
        yield from ((number, cluster.KILLED) for number, _ in enumerate(jobs))

    monkeypatch.setattr(cluster, "results", all_killed)
    monkeypatch.setattr(cluster, "count_workers", lambda dask: 1)
    monkeypatch.setattr(prepare, "decode_alone", lambda task: prepare.decode_item(*task))
    assert prepare.main([*LAY_OUT, "--dask", "x:1"]) == 1
    assert len(list((tmp_path / "out").glob("t*/*.png"))) == 4
    assert "skipped: 1 not usable" in capsys.readouterr().out


def free_port():
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


UNREACHABLE = {
    "no file": ("{folder}/none.json", "no scheduler file .*dask scheduler --scheduler-file"),
    "another file": ("{folder}/other.json", "is no scheduler file"),
    "half a file": ("{folder}/half.json", "is no scheduler file, or not yet whole"),
    "nothing answers": ("tcp://127.0.0.1:{port}", "no Dask scheduler answers .* within 0.5 s"),
    "another program": ("tcp://127.0.0.1:{silent}", "no Dask scheduler answers .* within 0.5 s"),
    "TLS without certificates": ("tls://127.0.0.1:{silent}", "no Dask scheduler answers .*ssl_context"),
    "no scheme": ("127.0.0.1:{port}", "no Dask scheduler answers .* within 0.5 s"),
    "unknown scheme": ("ftp://127.0.0.1:{port}", "no Dask scheduler answers"),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_a_scheduler_that_is_not_there_is_said(tmp_path, monkeypatch, capsys, case):
    monkeypatch.setattr(cluster, "CONNECT_LIMIT", 0.5)
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "half.json").write_text('{"address": "tcp:')
    write_tiffs(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    where, message = UNREACHABLE[case]
    with socket.create_server(("127.0.0.1", 0)) as mute:  # a program that waits for the other to speak
        silent = mute.getsockname()[1]
        where = where.format(folder=tmp_path, port=free_port(), silent=silent)
        with pytest.raises(MammoError, match=f"--dask \\S+: {message}"):
            cluster.count_workers(where)
        assert prepare.main([*LAY_OUT, "--dask", where]) == 2
    assert "Nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_distributed_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MammoError, match=r"pip install 'dask\[distributed\]'"):
        cluster.count_workers("127.0.0.1:1")


def results(dask, folder, jobs=((1,),), inputs=(), **options):
    return list(cluster.results(str(dask.dask), small_cluster.double, jobs, folder, inputs, **options))


def test_results_come_with_their_numbers(tmp_path, dask):
    jobs = [(number,) for number in range(40, 0, -1) if number != 3]
    found = results(dask, tmp_path, jobs)
    assert sorted(found) == [(place, 2 * number) for place, (number,) in enumerate(jobs)]
    assert not list(tmp_path.iterdir())  # the sign that workers saw is gone


OTHER = {
    "code": ("CODE", "0" * 64, "has other code .* start the workers again"),
    "versions": (
        "versions",
        lambda: (("opencv", "1.0"), ("scikit-image", "0.1")),
        "has opencv .*, not 1.0",
    ),
}


@pytest.mark.parametrize("first", [True, False], ids=["there at the start", "come later"])
@pytest.mark.parametrize("case", OTHER)
def test_workers_of_another_environment_are_refused(tmp_path, dask, monkeypatch, case, first):
    name, value, message = OTHER[case]
    monkeypatch.setattr(cluster, name, value)
    if not first:  # as if none had been there
        monkeypatch.setattr(cluster, "check_workers", lambda client, terms: None)
    with pytest.raises(MammoError, match=f"worker.* {message}"):
        results(dask, tmp_path)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("gone.png", 3, "does not see .*gone.png"),
        ("short.png", 4, r"sees another .*short.png \(3 bytes"),
    ],
)
def test_workers_that_see_other_files_are_refused(tmp_path, name, size, message):
    (tmp_path / "short.png").write_bytes(b"abc")
    terms = cluster.Terms(cluster.CODE, cluster.versions(), ((str(tmp_path / name), size),))
    with pytest.raises(MammoError, match=message):
        cluster.perform(terms, b"")


def test_a_worker_that_cannot_write_is_refused(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    (tmp_path / "sign").touch()
    terms = cluster.Terms(cluster.CODE, cluster.versions(), ((str(tmp_path / "sign"), 0),))
    monkeypatch.setattr(cluster.tempfile, "TemporaryFile", refuse)
    assert "can't write to" in cluster.unfit(terms)


@pytest.mark.parametrize("stop", [StoppedError(signal.SIGTERM), KeyboardInterrupt()], ids=repr)
def test_a_signal_lets_images_under_way_end(tmp_path, dask, stop):
    seen, stops = [], iter([None, None, stop])

    def obey():
        if error := next(stops):
            raise error

    found = cluster.results(str(dask.dask), small_cluster.double, [(9,)] * 90, tmp_path, [], obey)
    with pytest.raises(type(stop)):
        seen += (number for number, _ in found)
    assert 2 < len(seen) < 20


def test_an_image_that_failed_on_a_full_disk_leaves_no_half_value(tmp_path):
    def fill(*job, folder):
        file, _ = extraction.pixel_file(tmp_path / extraction.writer_name(), 12)
        with file.open("ab") as out:
            out.write(b"abc")
        raise OSError(28, "No space left on device", str(file))

    def write(index, folder):
        file, dtype = extraction.pixel_file(tmp_path / extraction.writer_name(), 12)
        return {"offset": extraction.append_pixels(file, mammo.np.ones((2, 3), dtype))}

    assert extraction.extract_apart(write, 0, folder=str(tmp_path))["offset"] == 0
    with pytest.raises(OSError, match="No space left"):
        extraction.extract_apart(fill, 1, folder=str(tmp_path))
    assert extraction.extract_apart(write, 2, folder=str(tmp_path))["offset"] == 6


def test_a_cluster_without_workers_is_noted_once(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "NOTE_AFTER", -1)
    client = types.SimpleNamespace(nthreads=lambda: {})
    run = cluster.Run(client, None, small_cluster.double, [])
    run.look()
    run.look()
    assert capsys.readouterr().err.count("no workers") == 1
    assert run.room == 1


@pytest.mark.parametrize(("threads", "notes"), [([1, 2], 1), ([1, 1], 0)])
def test_workers_of_several_threads_are_noted(capsys, threads, notes):
    answers = {"nthreads": lambda: dict(enumerate(threads)), "run": lambda *job, **options: {}}
    cluster.check_workers(types.SimpleNamespace(**answers), None)
    assert capsys.readouterr().err.count("take one image at a time") == notes


def test_dry_run_counts_the_workers(tmp_path, alone, dask, capsys):
    config = small_config(same_images(tmp_path, alone), "--dask", str(dask.dask))
    mammo.foresee_cache(config)
    count = cluster.count_workers(str(dask.dask))
    assert f" in {count} processes" in capsys.readouterr().out
    assert count > 1 or processes.available_cores() > 1


def test_a_lost_scheduler_is_said(tmp_path, dask):
    """The last test: it ends the cluster."""

    def end():
        dask.scheduler.kill()

    with pytest.raises(MammoError, match=r"scheduler at tcp://.* was lost; what is finished is kept"):
        results(dask, tmp_path, [(9,)] * 2000, obey=end)
