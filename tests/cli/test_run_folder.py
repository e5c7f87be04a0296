"""`--ckpt_path auto`: going on, beginning anew, and refusing what would be neither."""

import shutil

import pytest


@pytest.fixture
def broken_off(trained):
    """A folder with a COBRA that has checkpoints and no results."""
    (trained / "cobra" / "results.json").unlink()
    return trained


def test_a_finished_run_is_left_alone(trained, recsys):
    before = (trained / "cobra" / "results.json").read_text()
    outcome = recsys("fit", "-c", trained / "cobra.yaml", "--ckpt_path", "auto")
    assert outcome.status == 0
    assert "is finished; --ckpt_path last goes on with it, another --run_dir begins anew" in outcome.err
    assert (trained / "cobra" / "results.json").read_text() == before
    assert not (trained / "cobra.1").exists()


def test_a_run_that_was_broken_off_goes_on_in_its_folder(broken_off, recsys):
    settings = ["-c", broken_off / "cobra.yaml", "--ckpt_path", "auto"]
    outcome = recsys("fit", *settings)
    assert outcome.status == 0, outcome.err
    assert f"going on from {broken_off / 'cobra' / 'checkpoints' / 'last.ckpt'}" in outcome.err
    assert (broken_off / "cobra" / "results.json").is_file()
    assert not (broken_off / "cobra.1").exists()


def test_other_settings_than_it_was_begun_with_are_refused_with_both_values(broken_off, recsys):
    settings = ["-c", broken_off / "cobra.yaml", "--ckpt_path", "auto"]
    error = recsys("fit", *settings, "--data.batch_size", "8").error
    assert "was begun with data.init_args.batch_size=16, not 8" in error
    assert "set it back" in error
    # How often it is saved, and by how many processes, is no other training.
    assert recsys("fit", *settings, "--preemption.every_n_steps", "3").status == 0


def test_where_there_is_nothing_to_go_on_from_it_begins_anew(trained, recsys):
    shutil.rmtree(trained / "cobra")
    outcome = recsys("fit", "-c", trained / "cobra.yaml", "--ckpt_path", "auto")
    assert outcome.status == 0, outcome.err
    assert "going on" not in outcome.err
    assert (trained / "cobra" / "results.json").is_file()


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_it_is_for_fit_alone(trained, recsys, command):
    error = recsys(command, "-c", trained / "cobra.yaml", "--ckpt_path", "auto").error
    assert error == f"--ckpt_path auto is for `recsys fit`; `recsys {command}` takes best, last or a file"


def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over_by_auto(broken_off, recsys):
    last = broken_off / "cobra" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-30])
    error = recsys("fit", "-c", broken_off / "cobra.yaml", "--ckpt_path", "last").error
    assert f"{last} is no checkpoint, is cut off or is damaged" in error
    outcome = recsys("fit", "-c", broken_off / "cobra.yaml", "--ckpt_path", "auto")
    assert outcome.status == 0, outcome.err
    assert "last.ckpt is damaged and is passed over" in outcome.err
    assert "going on from" in outcome.err
