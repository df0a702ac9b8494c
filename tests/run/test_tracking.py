"""What is logged is valid, complete, there at once, and cut back to the step a run resumes from."""

import io
import json
import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer

from ssl_pipeline.config import ConfigError
from ssl_pipeline.run import tracking
from ssl_pipeline.run.tracking import ProgressBar, ProgressLines, Tracker, cut_back, duration


def make_tracker(directory, *, resumed_position=0, **options):
    first = resumed_position // 10
    return Tracker(directory, total_steps=100, first_step=first, resumed_position=resumed_position, **options)


def row(step, **values):
    return {"step": step, "images": 10 * step, "epoch": step / 4, "loss": 1 / step, **values}


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_row_is_on_disk_as_soon_as_it_is_logged_and_unrounded(tmp_path):
    tracker = make_tracker(tmp_path)
    tracker.log(row(3, learning_rate=0.1 + 0.2))
    assert rows_of(tmp_path) == [{"step": 3, "images": 30, "epoch": 0.75, "loss": 1 / 3, "learning_rate": 0.1 + 0.2}]
    tracker.close()


def test_numbers_that_are_not_finite_are_null(tmp_path):
    tracker = make_tracker(tmp_path)
    tracker.log(row(1) | {"loss": math.nan, "scale": math.inf})
    tracker.close()
    (logged,) = rows_of(tmp_path)
    assert logged["loss"] is None
    assert logged["scale"] is None


def test_a_row_needs_step_and_images(tmp_path):
    tracker = make_tracker(tmp_path)
    with pytest.raises(AssertionError):
        tracker.log({"step": 1, "loss": 0.0})
    tracker.close()


def test_at_resume_the_rows_behind_the_checkpoint_go(tmp_path):
    tracker = make_tracker(tmp_path)
    for step in (1, 2, 3, 4):
        tracker.log(row(step))
    tracker.log({"step": 2, "images": 20, "knn_top1": 50.0})  # monitors have rows of their own
    tracker.close()
    tracker = make_tracker(tmp_path, resumed_position=20)
    tracker.log(row(3, again=1))
    tracker.close()
    assert [(logged["step"], logged.get("again")) for logged in rows_of(tmp_path)] == [
        (1, None),
        (2, None),
        (2, None),
        (3, 1),
    ]


@pytest.mark.parametrize("tail", ['{"step": 3, "posi', '{"step": 3, "images": 3}', "\0\0\0", "[]\n", "7\n"])
def test_a_half_written_row_is_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 2, "images": 2}\n'
    path.write_text(whole + tail)
    assert cut_back(path, position=100) == 2
    assert path.read_text() == whole


def test_rows_of_the_version_before_are_cut_by_their_position(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "position": 20}\n{"step": 3, "position": 30}\n')
    assert cut_back(path, position=20) == 2
    assert path.read_text() == '{"step": 2, "position": 20}\n'


def test_a_file_that_needs_no_cut_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert cut_back(path, position=0) == -1
    assert not path.exists()
    path.write_text('{"step": 2, "images": 2}\n')
    before = path.stat().st_ino
    assert cut_back(path, position=2) == 2
    assert path.stat().st_ino == before


def scalars(directory, name):
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(name)]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    tracker = make_tracker(tmp_path)
    for step in (1, 2, 3, 4):
        tracker.log(row(step))
    tracker.close()
    tracker = make_tracker(tmp_path, resumed_position=20)
    tracker.log(row(3) | {"loss": 7.0})
    tracker.close()
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 0.5), (3, 7.0)]
    assert scalars(tmp_path, "epoch") == [(1, 0.25), (2, 0.5), (3, 0.75)]


@pytest.mark.parametrize(
    "clock",
    [(1000, 1000, 1000, 1000), (3000, 2000, 1000, 999), (1000, 1001, 1001, 1002), (1000, 1001, 1002, 1001)],
    ids=["one second", "the clock goes back", "the second after", "the clock goes back a little"],
)
def test_the_events_of_a_later_start_are_read_later(tmp_path, monkeypatch, clock):
    """The names of TensorBoard's files end with a host, a process and a counter, so ".10" sorted before ".9"."""
    for start, now in enumerate(clock):
        monkeypatch.setattr(tracking.time, "time", partial(float, now))
        monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9 + start))
        tracker = make_tracker(tmp_path, resumed_position=20)
        for step in (3, 4):
            tracker.log(row(step) | {"loss": float(10 * start + step)})
        tracker.close()
    assert scalars(tmp_path, "loss") == [(3, 33.0), (4, 34.0)]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 4


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    tracker = make_tracker(tmp_path, enabled=False)
    tracker.log(row(1))
    tracker.advance(2)
    tracker.message("hello")
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


# Weights & Biases


def test_wandb_that_is_not_installed_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="extra 'wandb'"):
        make_tracker(tmp_path, wandb=True)


def test_wandb_gets_the_same_rows_and_a_resumed_run_its_identity(tmp_path, monkeypatch):
    started, logged = [], []

    def init(**options):
        started.append(options)
        return SimpleNamespace(
            log=logged.append, define_metric=lambda *names, **options: None, finish=lambda: logged.append("end")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for step in (1, 2):
        tracker = make_tracker(tmp_path, resumed_position=10 * step - 10, wandb=True)
        tracker.log(row(step))
        tracker.close()
    assert logged == [row(1), "end", row(2), "end"]
    assert started[0]["id"] == started[1]["id"] != ""
    assert started[0]["resume"] == "allow"


# Progress


def make_lines(clock, first_step=0):
    stream = io.StringIO()
    return stream, ProgressLines(stream, total_steps=1000, first_step=first_step, clock=clock)


def test_without_a_terminal_a_plain_line_comes_at_most_every_ten_seconds():
    now = 0.0
    stream, lines = make_lines(lambda: now, first_step=100)
    for step in range(101, 201):
        now += 0.25
        lines.log(row(step, learning_rate=0.0005, images_per_second=812.4, data_wait=0.034) | {"loss": 2.345678})
        lines.log({"step": step, "images": 10 * step, "knn_top1": 3.0})  # says nothing about the loss
    lines.close()
    first, second, last = stream.getvalue().splitlines()
    assert first == (
        "step 140/1000, epoch 35.00, loss 2.3457, learning rate 0.0005, 812 images/s, data wait 3%, 0:03:35 left"
    )
    assert second.startswith("step 180/1000, ")
    assert last.startswith("step 200/1000, ")
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_steps_that_log_nothing_show_too():
    now = 0.0
    stream, lines = make_lines(lambda: now)
    for step in (1, 2, 3):
        now += 6.0
        lines.advance(step)
    lines.advance(1000)
    lines.close()
    lines.close()
    assert stream.getvalue().splitlines() == ["step 2/1000, 1:39:48 left", "step 1000/1000"]


def test_a_line_has_the_epoch_and_the_loss_of_its_own_step():
    now = 0.0
    stream, lines = make_lines(lambda: now)
    lines.log(row(1, images_per_second=812.4) | {"loss": 9.0})
    asked = []

    def numbers(step):
        asked.append(step)
        return {"epoch": step / 4, "loss": float(step)}

    for step in range(2, 50):
        now += 0.25
        lines.advance(step, partial(numbers, step))
    lines.close()
    first, last = stream.getvalue().splitlines()
    assert first.startswith("step 41/1000, epoch 10.25, loss 41.0000, 812 images/s, ")
    assert last.startswith("step 49/1000, epoch 12.25, loss 49.0000, ")
    assert asked == [41, 49], "nobody is asked for what is not shown"


def test_a_bar_has_them_too_about_once_a_second(monkeypatch):
    now = 0.0
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now)
    stream, asked = io.StringIO(), []
    bar = ProgressBar(stream, total_steps=1000, first_step=0)
    for step in range(1, 11):
        now += 0.25
        bar.advance(step, lambda step=step: asked.append(step) or {"epoch": step / 4, "loss": float(step)})
    bar.close()
    assert asked == [4, 8]
    assert "epoch 2.00, loss 8.0000" in stream.getvalue().rstrip().rsplit("\r", 1)[-1]


def test_a_terminal_gets_a_bar_with_the_same_numbers():
    stream = io.StringIO()
    bar = ProgressBar(stream, total_steps=1000, first_step=100)
    bar.advance(101)
    bar.message("saved step-00000101")
    bar.log(row(102, learning_rate=0.0005, images_per_second=812.4, data_wait=0.034))
    bar.log({"step": 102, "images": 1020, "knn_top1": 3.0})
    bar.close()
    text = stream.getvalue()
    assert "saved step-00000101\n" in text
    assert "step 100/1000 [" in text
    last = text.rstrip().rsplit("\r", 1)[-1]
    assert "step 102/1000 [" in last
    assert "loss 0.0098, learning rate 0.0005, 812 images/s, data wait 3%]" in last


@pytest.mark.parametrize("columns", [80, 120, 160])
def test_a_terminal_of_any_width_shows_speed_and_data_wait(monkeypatch, columns):
    monkeypatch.setattr(tracking, "_columns", lambda stream: columns)
    stream = io.StringIO()
    bar = ProgressBar(stream, total_steps=125_000, first_step=100)
    bar._bar.dynamic_ncols = lambda _: (columns, 24)
    bar.log(row(98_765, learning_rate=0.0005, images_per_second=12_812.4, data_wait=0.034) | {"loss": 10.98765})
    bar.close()
    last = stream.getvalue().rstrip().rsplit("\r", 1)[-1]
    assert len(last) <= columns
    assert "loss 10.9877, " in last
    assert "12812 images/s, " in last
    assert last.endswith("wait 3%]")
    assert ("learning rate" in last) == (columns == 160)


def test_the_display_follows_the_kind_of_stream(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, has_bar in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        tracker = make_tracker(tmp_path, resumed_position=20)
        tracker.advance(3)
        tracker.message("hello")
        tracker.close()
        assert "hello\n" in stream.getvalue()
        assert ("\r" in stream.getvalue()) == has_bar
        assert "3/100" in stream.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05")])
def test_durations_read_as_a_clock(seconds, text):
    assert duration(seconds) == text


def test_tensorboard_has_the_settings(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\noptim: {lr: {value: 0.5, warmup: 10ep}, clip: null}\nflag: true\n")
    tracker = make_tracker(tmp_path)
    tracker.log(row(1))
    tracker.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert "settings/text_summary" in events.Tags()["tensors"]
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = HParamsPluginData.FromString(plugin).session_start_info.hparams
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.items()}
    assert values == {"seed": 0.0, "optim.lr.value": 0.5, "optim.lr.warmup": "10ep", "flag": True}
