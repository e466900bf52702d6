"""A run's folder: made once, never over something else."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from s2srm.config import DataConfig, ModelConfig, SFTConfig, TemplateConfig
from s2srm.errors import UserError
from s2srm.runs import config_to_dict, prepare_output, versions


def config(folder, **changes) -> SFTConfig:
    return SFTConfig(output=str(folder), **changes)


def test_writes_config_and_versions(tmp_path):
    cfg = config(tmp_path / "a" / "run", seed=7)
    output = prepare_output(cfg)
    assert yaml.safe_load((output / "config.yaml").read_text()) == config_to_dict(cfg)
    assert json.loads((output / "versions.json").read_text())["torch"] == versions()["torch"]


def test_written_config_is_a_recipe_again(tmp_path):
    from s2srm.commands.parsing import parse

    cfg = config(tmp_path / "run", seed=7, data=DataConfig(columns={"prompt": "q"}))
    written = prepare_output(cfg) / "config.yaml"
    assert parse(SFTConfig, ["--config", str(written)], "sft", "") == cfg


def test_a_run_is_not_replaced_unless_asked(tmp_path):
    cfg = config(tmp_path / "run")
    output = prepare_output(cfg)
    (output / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="already holds a run"):
        prepare_output(cfg)
    prepare_output(dataclasses.replace(cfg, overwrite=True))
    assert not (output / "metrics.jsonl").exists()


def test_a_run_that_stopped_before_its_first_step_is_no_run(tmp_path):
    cfg = config(tmp_path / "run")
    prepare_output(cfg)
    prepare_output(dataclasses.replace(cfg, seed=3))
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty and holds no s2srm run"):
        prepare_output(config(tmp_path, overwrite=overwrite))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_is_not_replaced_by_one_that_reads_it(tmp_path):
    output = prepare_output(config(tmp_path / "run"))
    (output / "config.json").write_text("{}")
    cfg = config(output, overwrite=True, model=ModelConfig(path=str(output)))
    with pytest.raises(UserError, match=r"would delete model\.path"):
        prepare_output(cfg)
    assert (output / "config.json").exists()


def test_output_must_be_given_and_be_a_folder(tmp_path):
    with pytest.raises(UserError, match="output is missing"):
        prepare_output(SFTConfig())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        prepare_output(config(tmp_path / "file"))


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    prepare_output(config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_is_replaced_through_a_link_and_where_one_stands(tmp_path, monkeypatch):
    output = prepare_output(config(tmp_path / "run"))
    (output / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "link").symlink_to(output)
    prepare_output(config(tmp_path / "link", overwrite=True))
    assert (tmp_path / "link").is_symlink() and not (output / "metrics.jsonl").exists()
    (output / "metrics.jsonl").write_text("{}\n")
    monkeypatch.chdir(output)
    prepare_output(config(".", overwrite=True))
    assert {path.name for path in output.iterdir()} == {"config.yaml", "versions.json"}


def test_what_is_in_the_way_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, why in (
        (tmp_path / "file" / "run", "is a file, not a folder"),
        ("/proc/s2srm/run", "no file can be made in /proc"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(UserError, match=why) as caught:
            prepare_output(config(folder))
        assert str(caught.value).startswith("output: ")


def test_a_run_in_the_folder_of_its_data_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("")
    cfg = config(tmp_path / "data" / "run", data=DataConfig(path=str(tmp_path / "data")))
    with pytest.raises(UserError, match=r"lies in data\.path .*read as data"):
        prepare_output(cfg)
    file = DataConfig(path=str(tmp_path / "data" / "train.jsonl"))
    prepare_output(config(tmp_path / "data" / "run", data=file))


def test_long_texts_of_the_config_are_no_paths(tmp_path):
    cfg = config(tmp_path / "run", template=TemplateConfig(separator="fix it " * 200))
    output = prepare_output(cfg)
    (output / "metrics.jsonl").write_text("{}\n")
    prepare_output(dataclasses.replace(cfg, overwrite=True))
