"""Rows of TensorBoard's HPARAMS page, read back with TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from engine.records.events import EventFile
from engine.train.hparams import COLUMNS, METRICS, write_hparams


def test_the_row_of_a_run_is_the_one_of_its_last_end(tmp_path: Path) -> None:
    curves = EventFile(tmp_path, tell=print)
    curves.scalars({"loss/total": 2.0}, 1)
    curves.close()
    for lr, loss in ((1e-3, 0.5), (2e-3, 0.25)):
        write_hparams(tmp_path, {"mapping": "2-4", "lr": lr}, {"loss": loss}, tell=print)
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in read.Scalars("loss/total")] == [2.0]
    assert [event.value for event in read.Scalars("result/loss")] == [0.25]
    content = {tag: read.SummaryMetadata(tag).plugin_data.content for tag in read.PluginTagToContent("hparams")}
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    values = {name: value.string_value or value.number_value for name, value in start.hparams.items()}
    assert values == {"mapping": "2-4", "lr": 2e-3}
    shown = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    assert [info.name for info in shown.hparam_infos] == list(COLUMNS)
    assert [info.name.tag for info in shown.metric_infos] == [f"result/{name}" for name in METRICS]
