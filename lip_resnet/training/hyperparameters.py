"""A run's recipe as hyperparameters for TensorBoard's HParams tab."""

from pathlib import Path

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from lip_resnet.config import Recipe

FIRST_COLUMNS = ("model.name", "model.downsampling", "model.backbone", "train.seed", "optim.lr")
"""Keys in which runs differ most."""


def summarize(config: Recipe, folder: Path, metrics: list[str]) -> tuple[Summary, Summary, Summary]:
    """The summaries of the HParams tab: its columns, this run's values, and one to write when the run is finished.

    TensorBoard sorts columns by name, those marked as different between runs first: here ``FIRST_COLUMNS``.

    Args:
        folder: the run folder, by which the table names the run.
        metrics: tags whose last values are columns too.
    """
    keys = {
        f"{section}.{key}": value if isinstance(value, (bool, int, float, str)) else str(value)
        for section, values in config.model_dump(mode="json").items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    columns, start, end = hparams(keys, dict.fromkeys(metrics, 0.0))
    experiment = metadata.parse_experiment_plugin_data(columns.value[0].metadata.plugin_data.content)
    for column in experiment.hparam_infos:
        column.differs = column.name in FIRST_COLUMNS
    session = metadata.parse_session_start_info_plugin_data(start.value[0].metadata.plugin_data.content)
    session.group_name = str(folder)
    for summary, data in (
        (columns, HParamsPluginData(experiment=experiment)),
        (start, HParamsPluginData(session_start_info=session)),
    ):
        summary.value[0].metadata.CopyFrom(metadata.create_summary_metadata(data))
    return columns, start, end
