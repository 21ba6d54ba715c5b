"""The weights, cache and config for timing trainings."""

from pathlib import Path

import pytest
import torch
import yaml


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `wan`, `cache` and the config of a training with slow settings."""
    from runs import make_lab, run_config

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tune")
    make_lab(folder)
    slow = {"train.global_batch": 2, "train.micro_batch": 1, "train.activation_checkpointing": "full"}
    config = run_config(folder, folder / "run", slow)
    tree = config.model_dump(mode="json", exclude_unset=True)
    (folder / "train.yaml").write_text(yaml.safe_dump(tree))
    return folder
