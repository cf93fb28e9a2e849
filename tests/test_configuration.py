"""Settings: the contract's defaults, spellings, refusals with the remedy. Their form: test_shape.py."""

import pytest

import train_byol_mammo as mammo


def test_contract_defaults():
    config = mammo.Config()
    expected = {
        "data_dir": "./split_images/training", "tile_size": 512, "tile_stride": 256,
        "min_breast_ratio": 0.15, "min_freq_energy": 0.03, "min_tile_intensity": 40,
        "min_non_zero_pixels": 0.7, "batch_size": 32, "num_workers": 16, "lr": 2e-3,
        "warmup_epochs": 10, "epochs": 100, "momentum_base": 0.996, "input_dim": 2048,
        "hidden_dim": 4096, "proj_dim": 256, "tiles_per_epoch": 11_000, "max_tiles": 0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_dashes_equal_underscores():
    assert mammo.parse_args(["--tile-size", "256"]) == mammo.parse_args(["--tile_size=256"])
    assert mammo.parse_args(["--no-compile"]).compile is False
    assert mammo.parse_args(["--data_dir", "a-b"]).data_dir == "a-b"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tile_sise", "256"], "did you mean --tile_size"),
        (["--batch", "8"], "unknown argument --batch"),
        (["--batch_size", "x"], "invalid int value"),
        (["--batch_size", "1"], "between 2 and"),
        (["--backbone", "resnet5"], "choose one of resnet18"),
        (["--min_breast_ratio", "nan"], "between 0 and 1"),
        (["leftover"], "unknown argument leftover"),
    ],
)
def test_wrong_settings_are_refused_with_the_remedy(words, message):
    with pytest.raises(mammo.MammoError, match=message):
        mammo.parse_args(words)
