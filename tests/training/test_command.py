"""The command line: options from a file, complaints in one line, Ctrl-C, and several processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.easy import metrics, tiny_arguments, write_easy
from training import run as runs
from training.__main__ import main

COMMAND = [sys.executable, "-m", "training"]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    "PYTHONPATH": str(Path(__file__).parents[2]),
}
TOML = """
dataset = "easy"
layers = 1
width = 32
heads = 2
feed-forward = 32
vocabulary = 300
num_epochs = 1
seed = 7
"""


def option_file(path: Path, **options: Any) -> str:
    path.write_text(json.dumps(options))
    return str(path)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize("command", ["", "pretrain", "train", "linear", "states", "evaluate", "record", "experiments"])
def test_help_does_not_wait_for_torch(command: str) -> None:
    arguments = [*command.split(), "--help"]
    code = (
        "import sys\nfrom training.__main__ import main\n"
        f"try: main({arguments})\nexcept SystemExit as end: assert end.code == 0\n"
        "print('torch' in sys.modules, 'datasets' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=ENVIRONMENT
    )
    assert "--help" in done.stdout
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize("form", ["--config FILE", "--config=FILE"])
def test_options_come_from_toml_and_the_command_line_wins(form: str, easy_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "options.toml").write_text(TOML)
    config = form.replace("FILE", str(tmp_path / "options.toml")).split()
    places = ["--data-dir", str(easy_dir), "--output-dir", str(tmp_path / "run")]
    assert main(["train", *places, "--seed", "8", *config]) == 0
    options = runs.read_info(tmp_path / "run").options
    assert {name: options[name] for name in ("dataset", "width", "feed_forward", "num_epochs", "seed")} == {
        "dataset": "easy", "width": 32, "feed_forward": 32, "num_epochs": 1, "seed": 8,
    }  # fmt: skip
    assert options["learning_rate"] == 5e-4, "what nobody names keeps its default"


def test_options_come_from_json_too(easy_dir: Path, tmp_path: Path) -> None:
    file = option_file(
        tmp_path / "options.json", dataset="easy", data_dir=str(easy_dir), output_dir=str(tmp_path / "run"), layers=1,
        width=32, heads=2, feed_forward=32, vocabulary=300, num_epochs=1, learning_rate=1e-3, init_from=None,
    )  # fmt: skip
    assert main(["train", "--config", file]) == 0
    assert runs.read_info(tmp_path / "run").options["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (
            "o.json",
            '{"batch_sise": 4, "dataset": "easy"}',
            "unknown options batch-sise; known: architecture, batch-size,",
        ),
        ("o.toml", "batch_size = ", "Invalid value"),
        ("o.json", "{", "Expecting property name"),
        ("o.json", "[1]", "an object of options is needed"),
        ("absent.toml", None, "No such file or directory"),
    ],
)
def test_a_bad_option_file_is_said_in_one_line(
    name: str, content: str | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main(["train", "--config", str(tmp_path / name)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"training: --config {tmp_path / name}: ")
    assert complaint in line


@pytest.mark.parametrize(
    ("option", "value"), [("batch_size", "many"), ("batch_size", 4.5), ("mixed_precision", "fp8"), ("layers", [1])]
)
def test_a_value_of_the_wrong_kind_is_named(
    option: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", option_file(tmp_path / "options.json", **{option: value})])
    assert ended.value.code == 2
    assert f"--{option.replace('_', '-')}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", 0),
        ("recurrent_depth", 0),
        ("num_epochs", 0),
        ("early_stopping_patience", -1),
        ("layers", 0),
        ("dropout", 1.0),
        ("token_dropout", -0.1),
        ("vocabulary", 100),
        ("train_share", 0),
        ("max_tokens", 2),
        ("tail_tokens", 16),
        ("learning_rate", -0.001),
        ("learning_rate", "nan"),
        ("clip_norm", 0.0),
        ("weight_decay", -0.1),
        ("temperature", "nan"),
        ("temperature", "inf"),
        ("seed", -1),
        ("seed", 2**70),
    ],
)
def test_a_value_that_makes_no_sense_is_said_in_one_line(
    option: str, value: float | str, easy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_arguments(easy_dir, tmp_path / "run", **{option: value})) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"training: --{option.replace('_', '-')} ")
    assert str(value) in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA, so fp16 is welcome")
def test_fp16_without_cuda_is_said_in_one_line(
    easy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_arguments(easy_dir, tmp_path, mixed_precision="fp16")) == 1
    assert capsys.readouterr().err == "training: --mixed-precision fp16 needs CUDA; on a CPU take bf16 or no\n"


def two_processes(arguments: list[str]) -> list[str]:
    """`accelerate launch` on a machine without a GPU: --multi_gpu is its word for several processes."""
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", str(free_port()),
        "-m", "training", *arguments,
    ]  # fmt: skip


def stopped(command: list[str], begun: Path, number: signal.Signals) -> tuple[int, str]:
    """Sends the signal once the training has written the file; its exit status and complaints."""
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        give_up = time.monotonic() + 150
        while not (begun.exists() and begun.stat().st_size) and training.poll() is None and time.monotonic() < give_up:
            time.sleep(0.05)
        training.send_signal(number)
        _, complaints = training.communicate(timeout=60)
    finally:
        training.kill()
    return training.returncode, complaints


def test_ctrl_c_leaves_checkpoints_that_evaluate_and_resume_take(easy_dir: Path, tmp_path: Path) -> None:
    endless = tiny_arguments(easy_dir, tmp_path, num_epochs=2000, early_stopping_patience=2000)
    status, complaints = stopped([*COMMAND, *endless], tmp_path / "model.safetensors", signal.SIGINT)
    assert status == 130
    assert complaints.splitlines()[-1] == "training: stopped; the same command goes on from the last checkpoint"
    assert main(["evaluate", str(tmp_path), "--data-dir", str(easy_dir)]) == 0
    checkpoint = runs.read_checkpoint(tmp_path)
    assert checkpoint is not None
    assert 0 < checkpoint["progress"]["step"] < 2000 * 15


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["linear"], "training.linear.fit"),
        (["evaluate", "nothing", "--split", "train"], "training.evaluate.evaluate"),
    ],
)
def test_ctrl_c_promises_no_checkpoint_where_there_is_none(
    arguments: list[str], place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, stopped)
    assert main(arguments) == 130
    assert capsys.readouterr().err == "training: stopped\n"


def test_two_processes_train_one_run_as_one_process_with_twice_the_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sixteen texts are one step, of two processes with eight each as of one with sixteen."""
    write_easy(tmp_path, train=16)
    still = {"dropout": 0.0, "token_dropout": 0.0, "num_epochs": 6}
    arguments = tiny_arguments(tmp_path, tmp_path / "two", batch_size=8, **still)
    subprocess.run(two_processes(arguments), capture_output=True, timeout=150, check=True, env=ENVIRONMENT)
    assert main(tiny_arguments(tmp_path, tmp_path / "one", batch_size=16, **still)) == 0

    assert metrics(tmp_path / "two") == metrics(tmp_path / "one"), "one log, with the same validations"
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)

    capsys.readouterr()
    assert main(arguments) == 1
    assert "was begun with 2 processes, and 1 would take other steps" in capsys.readouterr().err


def test_two_processes_stop_at_the_same_step_and_leave_a_checkpoint(tmp_path: Path) -> None:
    """The first checkpoint is far away, so that there is one at all comes from stopping."""
    write_easy(tmp_path, train=8000)
    arguments = tiny_arguments(tmp_path, tmp_path / "run", checkpoint_steps=10**6)
    status, _ = stopped(two_processes(arguments), tmp_path / "run" / "metrics.jsonl", signal.SIGTERM)
    assert status != 0
    checkpoint = runs.read_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint["processes"] == 2
    assert 50 <= checkpoint["progress"]["step"] < 1000


def test_a_file_in_the_run_directorys_place_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_easy(tmp_path)
    (tmp_path / "run").write_text("")
    assert main(tiny_arguments(tmp_path, tmp_path / "run")) == 1
    assert capsys.readouterr().err == f"training: {tmp_path / 'run'} cannot be a run directory: File exists\n"
