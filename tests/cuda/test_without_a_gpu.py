"""The CUDA path at full size without a GPU: nothing waits for the device, memory fits, the fast kernels are taken.

What is shown, and what is not: see `tests/fake_cuda.py`.
"""

import json
from pathlib import Path

import pytest

import fake_cuda
from autoencoder.common.config import REPO_ROOT, load_config
from autoencoder.training.settings import AutoencoderTrainConfig
from svg_t2i.planning.autoencoder import plan_autoencoder
from svg_t2i.planning.gpus import find_gpu, tensors_within
from svg_t2i.planning.networks import transformer_counts
from svg_t2i.planning.sampling import plan_sampling
from svg_t2i.planning.training import GB, measure_training, memory_of
from svg_t2i.training.settings import TrainConfig

FOLDER = Path(__file__).resolve().parent

CONFIGS = REPO_ROOT / "configs" / "svg_t2i"
FINETUNING = {"finetune_lora": 24, "finetune_full": 80}  # on one card of so many GB
STAGES = ["stage1_256", "stage2_512", "stage3_1024", "stage4_sft"]
OVERHEAD = 4  # GB on a real device besides tensors: its context, NCCL, workspaces


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    if fake_cuda.COMPILER is None:
        pytest.skip("no C compiler here (apt-get install gcc), which the pretended driver needs")
    if fake_cuda.torch.version.cuda is None:
        pytest.skip("this torch is no CUDA build")
    if fake_cuda.torch.__version__ < (2, 14):
        pytest.skip("needs torch 2.14: in 2.10 the collectives do not know tensors without values")
    if fake_cuda.torch.cuda.is_available():
        pytest.skip("there is a GPU, whose driver cannot be replaced")
    folder = tmp_path_factory.mktemp("stubs")
    fake_cuda.compile_stubs(folder)
    return folder


def results(stubs, script, *arguments):
    done = fake_cuda.run(FOLDER / script, *arguments, stubs=stubs)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def steps(stubs):
    found = results(stubs, "train.py", 8, *STAGES) + results(stubs, "train.py", 1, *FINETUNING)
    return {result["config"]: result for result in found}


@pytest.mark.parametrize("stage", [*STAGES, *FINETUNING])
def test_a_step_of_a_shipped_config(steps, stage):
    """Rank 0 of 8, or the only one where a single card is fine-tuned on; 2.6 B parameters."""
    result = steps[stage]
    assert 2.6e9 < result["parameters"] < 2.65e9  # an adapter's among them
    assert result["down"] == {}
    assert result["waiting"] == {}
    again = load_config(TrainConfig, CONFIGS / f"{stage}.yaml").parallel.activation_checkpointing == "full"
    calls = 2 * (26 + 2 + 2)  # two micro-batches, each block once, and when it is recomputed as a whole
    assert result["kernels"]["torch_attn::_varlen_attn"] == calls * (2 if again else 1)
    assert result["kernels"]["torch_attn::_varlen_attn_backward"] == 60
    height, width = result["grids"][0][0]
    long = height * width > 2048  # at 1024 px and on an H100: cuDNN, which wants heads of its own
    own_heads = result["kernels"]["own heads"]
    assert own_heads >= 2 * 26 if long else own_heads == 0
    assert result["peak"] < FINETUNING.get(stage, 80) - OVERHEAD  # "fits … GB" says the config


@pytest.mark.parametrize("stage", [*STAGES, *FINETUNING])
def test_the_plan_of_a_run_is_what_it_takes(steps, stage):
    """Within 3 %, with the second micro-batch, when gradients are there, or the first."""
    result, config = steps[stage], load_config(TrainConfig, CONFIGS / f"{stage}.yaml")
    sizes, shards = config.model_config(384, 2304), 1 if stage in FINETUNING else 8
    parts = memory_of(config, transformer_counts(sizes, config.lora), config.parallel.data_parallel, shards)
    how = config.parallel.activation_checkpointing, config.lora
    passes = [
        measure_training(sizes, tuple(map(tuple, grids)), tuple(lengths), *how).peak
        for grids, lengths in zip(result["grids"], result["lengths"], strict=True)
    ]
    fixed = sum(parts.values()) + result["static"][0] * GB
    assert max(fixed - parts["gradients"] + passes[0], fixed + passes[1]) == pytest.approx(
        result["peak"] * GB, rel=0.03
    )
    assert [parts["weights"], parts["moments"] + parts["averages"]] == pytest.approx(
        [part * GB for part in result["static"][1:]],
        rel=0.01,
        abs=0.006 * GB,  # two places are printed
    )


def test_every_head_size_takes_the_variable_length_kernel(stubs):
    """NextDiT_3B has heads of 108 channels."""
    name = "NextDiT_3B_GQA_patch1_Adaln_Refiner"
    settings = [f"model={name}", "model_overrides.n_layers=1", "train.micro_batch_size=3", "train.global_batch_size=48"]
    (result,) = results(stubs, "train.py", 8, "stage1_256", *settings)
    assert result["kernels"]["torch_attn::_varlen_attn"] == 2 * (1 + 2 + 2)
    assert result["down"] == result["waiting"] == {}


@pytest.mark.parametrize(("how", "most"), [("resident", 13), ("offload", 6.5)])
def test_sampling_at_1024_with_guidance(stubs, how, most):
    (result,) = results(stubs, "sample.py", 1024, 1, how)
    assert result["peak"] < most
    config = load_config(TrainConfig, CONFIGS / "stage4_sft.yaml")
    plan = plan_sampling(config, find_gpu("12gb"), 1024)
    planned = plan.resident if how == "resident" else plan.taking_turns
    assert tensors_within(planned) == pytest.approx(result["peak"] * GB, rel=0.03)
    assert result["down"] == {}  # while denoising
    assert result["kernels"]["torch_attn::_varlen_attn"] >= 2 * 28
    assert result["kernels"]["own heads"] >= 2 * 26


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plan_of_the_autoencoder_is_what_a_step_takes(stubs, precision):
    (result,) = results(stubs, "autoencoder.py", 8, 256, precision)
    assert result["down"] == {}
    path = REPO_ROOT / "configs/autoencoder/pure/svg_autoencoder_P_dd_M_IN_stage1_bs64_256_woattn.yaml"
    mixed = ["training.trainer.precision=bf16-mixed"] * (precision == "bf16")
    config = load_config(AutoencoderTrainConfig, path, ["data.params.batch_size=8", *mixed])
    plan = plan_autoencoder(config, find_gpu("h100"), 1)
    tensors = plan.total - plan.memory["device's own"]
    assert tensors == pytest.approx(result["peak"] * GB, rel=0.03)


def test_the_tool_notices_what_it_is_for(stubs, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import json, sys
sys.path.insert(0, {str(FOLDER.parent)!r})
import fake_cuda, torch
fake_cuda.pretend(devices=2)
mode = fake_cuda.FakeCuda()
with mode:
    mode.phase = "a"
    x = torch.ones(1000, 1000, device="cuda", requires_grad=True)
    (x * 2).sum().backward()
    own = torch.arange(4).tolist()  # the host's own work has values
    before = mode.now
    mode.phase = "b"
    y = torch.empty(3_000_000, dtype=torch.uint8, device="cuda")
    del y
    copies = [len(mode.waiting)]
    torch.zeros(8).to("cuda", non_blocking=True)
    copies.append(sum(mode.waiting.values()))
    torch.zeros(8).pin_memory().to("cuda")
    copies.append(sum(mode.waiting.values()))
    torch.zeros(8).pin_memory().to("cuda", non_blocking=True)
    copies.append(sum(mode.waiting.values()))
    x.detach().cpu()
    try:
        x.sum().item()
        waited = "no error"
    except Exception as error:
        waited = type(error).__name__
print(json.dumps([own, before, mode.peaks["b"], copies, sum(mode.down.values()), waited, str(x.grad.device)]))
"""
    )
    done = fake_cuda.run(script, stubs=stubs)
    assert done.returncode == 0, done.stderr[-2000:]
    own, before, peak, copies, down, waited, device = json.loads(done.stdout.splitlines()[-1])
    assert own == [0, 1, 2, 3]
    assert before == 2 * 4_000_256  # x and its gradient, in blocks of 512 bytes
    assert peak - before == 3_000_320
    assert copies == [0, 1, 2, 2]
    assert (down, waited, device) == (1, "DataDependentOutputException", "cuda:0")
