"""What the tests of rows share: a tiny model folder's processor, and a cache of tables that is theirs alone."""

import datasets
import pytest
from helpers import make_processor_folder

from vigos_jax.data.processor import Processor


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.load(make_processor_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
