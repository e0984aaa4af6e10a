"""Numbers in docs/ are those of the code and of its plans."""

import re

import pytest

from autoencoder.common.config import load_config
from svg_t2i.flow.solvers import SOLVERS
from svg_t2i.planning.gpus import find_gpu
from svg_t2i.planning.sampling import plan_sampling
from svg_t2i.planning.training import plan_training
from svg_t2i.sampling.options import PRESETS
from svg_t2i.training.settings import TrainConfig
from tests.docs.documents import REPO_ROOT

CONFIGS = REPO_ROOT / "configs" / "svg_t2i"
STAGES = ("stage1_256", "stage2_512", "stage3_1024", "stage4_sft")


@pytest.mark.parametrize("stage", STAGES)
def test_the_numbers_of_the_recipe_are_those_of_the_files(stage):
    (row,) = re.findall(rf"^\| `{stage}` \|(.*)\|$", (REPO_ROOT / "docs" / "recipe.md").read_text(), flags=re.MULTILINE)
    side, batch, steps, images, tokens, operations, total, hours = (float(cell) for cell in row.split("|"))
    config = load_config(TrainConfig, CONFIGS / f"{stage}.yaml")
    found = plan_training(config, find_gpu("h100"), gpus=64)
    assert (side, batch, steps) == (config.data.resolution, config.train.global_batch_size, config.train.max_steps)
    assert images == pytest.approx(batch * steps / 1e6, rel=0.01)
    assert tokens == pytest.approx(found.image_tokens * batch * steps / 1e9, rel=0.01)
    assert operations == pytest.approx(found.flops_per_image / 1e12, rel=0.01)
    assert total == pytest.approx(found.flops_per_image * batch * steps / 1e18, rel=0.01)
    assert hours == pytest.approx(64 * steps * found.best.seconds / 3600, rel=0.01)


def rows(page: str, start: str) -> list[str]:
    """The rest of the lines of docs/`page` that begin so."""
    lines = (REPO_ROOT / "docs" / page).read_text().splitlines()
    return [line.removeprefix(start) for line in lines if line.startswith(start)]


def gigabytes(nbytes: float) -> str:
    """As the pages write it: two significant digits, and one behind the point."""
    return f"{nbytes / 1e9:.0f} GB" if nbytes >= 14e9 else f"{nbytes / 1e9:.1f} GB"


def test_what_a_job_needs_is_what_the_plan_says():
    plan = plan_sampling(load_config(TrainConfig, CONFIGS / "stage4_sft.yaml"), find_gpu("12gb"), 1024)
    resident, turns, small, both = map(gigabytes, (plan.resident, plan.taking_turns, *plan.in_8_bits))
    (row,) = rows("getting-started.md", "| Draw at 1024 px |")
    assert row == f" {resident} | `--cpu_offload`: {turns}; `--quantization int8`: {small}; both: {both} |"
    (offload,) = rows("sampling.md", "| `--cpu_offload`")
    assert f"{turns} instead of {resident[:-3]} at 1024 px" in offload
    (quantised,) = rows("sampling.md", "| `--quantization int8`")
    assert f"at 1024 px {small}, with `--cpu_offload` {both[:-3]}, by" in quantised


def test_what_fine_tuning_needs_is_what_the_plan_says():
    found = {}
    for kind in ("lora", "full"):
        plan = plan_training(load_config(TrainConfig, CONFIGS / f"finetune_{kind}.yaml"), find_gpu("h100"), gpus=1)
        memory = {choice.checkpointing: gigabytes(choice.total) for choice in plan.choices}
        found[kind] = memory["selective"], memory["full"], plan.checkpoint_bytes, plan.parameters
    adapter, small, written, parameters = found["lora"]
    assert rows("getting-started.md", "| LoRA at 1024 px |") == [
        f" {adapter} | `parallel.activation_checkpointing=full`: {small} |"
    ]
    assert rows("finetuning.md", "| at 1024 px, estimated |") == [
        f" {adapter}, or {small} with `parallel.activation_checkpointing=full` | {found['full'][1]} |"
    ]
    assert rows("finetuning.md", "| trains |")[0].startswith(f" an adapter: {parameters / 1e6:.0f} M parameters")
    (sizes,) = rows("finetuning.md", "| a checkpoint has |")
    assert sizes == f" {written / 1e9:.1f} GB | {found['full'][2] / 1e9:.0f} GB |"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_listed_as_they_are(name):
    """In the tables of sampling.md and published-weights.md, and in the README's model zoo."""
    preset = PRESETS[name]
    steps, guidance, solver = f"{preset.num_inference_steps}", f"{preset.guidance_scale:g}", preset.solver
    shift = f"{preset.shift_for(preset.height * preset.width // 256) or SOLVERS[solver].default_shift:g}"

    def listed(page: str) -> list[list[str]]:
        lines = (REPO_ROOT / page).read_text().splitlines()
        return [[cell.strip() for cell in line.split("|")] for line in lines if f"| `{name}`" in line]

    everywhere = [cells[2:6] for page in ("sampling", "published-weights") for cells in listed(f"docs/{page}.md")]
    for size, *numbers, last in everywhere:
        assert (size, numbers, last.split()[0]) == (
            f"{preset.height}", [f"{steps}, `{solver}`" if "`" in numbers[0] else steps, guidance], shift,
        )  # fmt: skip
    if name.startswith("stage"):
        (zoo,) = listed("README.md")
        assert zoo[2] == f"{preset.height}"
        assert zoo[4] == f"`{name}`: {steps}, {guidance}, {shift}"
    assert len(everywhere) == {"stage3": 0, "quickstart": 1}.get(name, 2)  # stage3 is in the row of stage4
