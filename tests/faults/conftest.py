"""The two stages, and commands that end with their test."""

import pytest

from tests.faults.runs import Stage

FOR_TEST = "configs/autoencoder/pure/svg_autoencoder_P_dd_M_IN_stage1_bs64_256_gpu1_forTest"


@pytest.fixture(params=["autoencoder", "dit"])
def stage(request, toy_parts, tiny_for_test) -> Stage:
    if request.param == "dit":
        return Stage(
            "dit",
            "svg_t2i.train",
            ("svg_t2i.training.loop", "train_step"),
            ("--config", str(toy_parts / "train.yaml"), "text_encoder.cache_tokens=0"),
            "results_dir",
            "",
            "train.max_steps",
            "train.ckpt_every=1",
            "data.num_workers",
            "train.keep_last",
        )
    tiny = (*tiny_for_test, "model.params.lossconfig.params.disc_num_layers=2")
    data = (f"data.params.json_path={toy_parts / 'manifest.jsonl'}", "training.image_logger_type=none")
    return Stage(
        "autoencoder",
        "autoencoder.train",
        ("autoencoder.training.module:AutoencoderModule", "training_step"),
        ("--config", FOR_TEST, "--devices", "1", *tiny, *data, "data.params.batch_size=2"),
        "training.logdir",
        FOR_TEST.rsplit("/", 1)[1],
        "training.trainer.max_steps",
        "training.save_every_n_train_steps=1",
        "data.params.num_workers",
        "training.keep_last_k",
    )


@pytest.fixture
def started():
    """started(command) -> the same, ended with the test."""
    commands = []
    yield lambda command: commands.append(command) or command
    for command in commands:
        command.end()
