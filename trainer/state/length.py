"""The number of steps of a run. Only this file converts epochs to steps, once the cache is open; after that a run uses
only steps.

An epoch is the loader's: `first_step(e)` in the order in which the cache is read. So views, a carried or
dropped remainder, and the mode are counted as in training.
"""

from contextlib import closing
from typing import TypeVar

from pydantic import ValidationError

from flowmask.data_pipeline.read.batches import Plan, Reader, open_reader, plan_for
from flowmask.data_pipeline.read.mixture import MixturePlan
from flowmask.models.errors import CacheError, ConfigError
from flowmask.trainer.config import RunConfig
from flowmask.trainer.train_config import TrainConfig

Config = TypeVar("Config", bound=RunConfig)


def counted(train: TrainConfig, plan: Plan) -> TrainConfig:
    """`train` with its epochs converted to steps of `plan`. Raises ConfigError if a run can't have them."""
    if not train.counts_epochs:
        return train
    assert not isinstance(plan, MixturePlan), "RunConfig refuses epochs of a mixture"
    steps = plan.first_step(train.epochs) if train.epochs is not None else train.last_step
    if not steps:
        raise ConfigError(
            f"train.epochs is {train.epochs}, but these epochs of the cache do not fill one train.global_batch of "
            f"{train.global_batch}; set more epochs, or a smaller batch"
        )
    drops = train.decay_at_steps or tuple(plan.first_step(epoch) for epoch in train.decay_at_epochs)
    found = {"steps": steps, "epochs": None, "decay_at_steps": drops, "decay_at_epochs": ()}
    try:
        return TrainConfig.model_validate({**train.model_dump(), **found})
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"with epochs as steps of this cache ({steps} in all) {said}") from error


def in_steps(config: Config, reader: Reader) -> Config:
    """The config with steps in place of epochs."""
    return config.model_copy(update={"train": counted(config.train, order(config, reader))})


def order(config: RunConfig, reader: Reader) -> Plan:
    """The order in which a run reads its opened caches."""
    train, remainder = config.train, config.data.remainder
    return plan_for(reader, global_batch=train.global_batch, seed=train.seed, remainder=remainder)


def if_known(config: Config) -> Config:
    """`in_steps`, or the unchanged config if its cache can't be opened before the run."""
    if not config.train.counts_epochs or (reader := opened(config)) is None:
        return config
    with closing(reader):
        return in_steps(config, reader)


def opened(config: RunConfig) -> Reader | None:
    """The opened data of a run; None if it does not exist yet, or is at a URL, which only the run itself opens."""
    if config.data.asks_a_server:
        return None
    try:
        return open_reader(config.data, check=False)
    except CacheError:
        return None
