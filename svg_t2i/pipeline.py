"""Prompts, images and seeds → images: text encoder, transformer under guidance, solver, decoder.

    pipeline = SVGT2IPipeline.from_pretrained("results/run").to("cuda", torch.bfloat16)
    images = pipeline(["a red fox in snow", "two pears"], height=768, width=1024, guidance_scale=4, seed=[0, 1]).images

A call encodes the prompts, draws one noise per seed, solves dx/dt = v(x, t) from t=0 (noise) to t=1 (data) in the
normalised latent space, denormalises and decodes; each of these is a function of `sampling.steps`. Image i depends on
its own prompt, seed and settings only, never on what else is in the batch.

It is a `diffusers.DiffusionPipeline`: saving, devices and dtypes, offloading, progress bar and components are its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import diffusers.utils
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.loaders import Lumina2LoraLoaderMixin
from diffusers.utils import BaseOutput, logging
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from autoencoder.common.config import UserError, build
from autoencoder.common.weights import report_load, share_weights
from autoencoder.sources.folders import list_images
from svg_t2i.loading import saved, sources
from svg_t2i.loading.components import SVGAutoencoder, SVGDiT
from svg_t2i.loading.quantization import quantize, quantized_layers
from svg_t2i.sampling import conditioning, from_images, inputs, steps
from svg_t2i.sampling.denoising import strength_start
from svg_t2i.sampling.from_images import Match
from svg_t2i.sampling.inputs import ImageInput
from svg_t2i.sampling.memory import memory_stage
from svg_t2i.sampling.networks import Networks, check_widths
from svg_t2i.sampling.options import SamplingOptions, changed, preset_options
from svg_t2i.sampling.schedulers import check_scheduler
from svg_t2i.sampling.steps import CallOptions, OutputType, Running
from svg_t2i.text.encoder import TextCache, TextEncoder
from svg_t2i.text.enhance import enhance
from svg_t2i.text.loading import set_loading_bars
from svg_t2i.transformer.packing import TextFeatures

DTYPE = "dtype" if hasattr(diffusers.utils, "_resolve_dtype") else "torch_dtype"  # as this diffusers calls it
PipelineStepEnd = Callable[["SVGT2IPipeline", int, float, dict[str, Any]], "dict[str, Any] | None"]
Prompts = str | Sequence[str]


def set_verbosity(verbose: bool) -> None:
    """Whether diffusers and transformers show their progress bars and warnings while they load and write weights."""
    set_loading_bars(verbose)
    (logging.enable_progress_bar if verbose else logging.disable_progress_bar)()
    (logging.set_verbosity_warning if verbose else logging.set_verbosity_error)()


@dataclass
class SVGT2IOutput(BaseOutput):
    """What a call gives; also output["images"] and output[0].

    images: PIL images; with output_type "np" an array (B, H, W, 3) and with "pt" a tensor (B, 3, H, W), both in [0, 1];
        with "latent" normalised latents (B, C, h, w). A list of each where sizes differ.
    seeds: the seed of each image; None where generators or latents were given.
    """

    images: list[Image.Image] | list[np.ndarray] | np.ndarray | list[Tensor] | Tensor
    seeds: list[int] | None = None


class SVGT2IPipeline(DiffusionPipeline, Lumina2LoraLoaderMixin):
    """Text to image, and what starts from images.

    The mixin of diffusers' Lumina 2, whose transformer is of this kind, loads and saves adapters.

    Attributes:
        options: the sampling settings of calls that name no others; saved with the pipeline.

    Raises:
        UserError: when latent channels or text widths of the networks do not fit each other, or when the transformer
            was trained with other networks.
    """

    model_cpu_offload_seq = "text_encoder->transformer->autoencoder"
    _optional_components = ["scheduler", "guide"]
    _exclude_from_cpu_offload = ["autoencoder"]  # of the layer by layer kind: it is small
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        autoencoder: SVGAutoencoder,
        transformer: SVGDiT,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: SchedulerMixin | None = None,
        guide: SVGDiT | None = None,
        sampling: SamplingOptions | Mapping | None = None,
        max_length: int = 256,
    ):
        """autoencoder, transformer, guide: those of `loading.components`, or the plain networks.

        guide: a weaker transformer for autoguidance (`set_guide`).
        sampling: the pipeline's `options`. max_length: most tokens kept of a prompt.
        """
        super().__init__()
        check_widths(autoencoder, transformer, text_encoder.config.get_text_config().hidden_size, guide)
        autoencoder, transformer = SVGAutoencoder.adopt(autoencoder), SVGDiT.adopt(transformer)
        guide = None if guide is None else SVGDiT.adopt(guide)
        for network in filter(None, (autoencoder, transformer, guide)):
            network.eval().requires_grad_(False)
        self.register_modules(
            autoencoder=autoencoder, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer,
            scheduler=scheduler, guide=guide,
        )  # fmt: skip
        self.options = sampling if isinstance(sampling, SamplingOptions) else build(SamplingOptions, sampling)
        self.register_to_config(sampling=asdict(self.options), max_length=max_length)
        self._interrupt, self._texts = False, TextCache()
        self._prompt_encoder = TextEncoder(text_encoder, tokenizer, max_length)
        saved.check_fingerprints({"transformer": transformer, "guide": guide}, autoencoder, self._prompt_encoder)

    # ------------------------------------------------------------------------------------------- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        subfolder: str | None = None,
        autoencoder: Any = None,
        autoencoder_checkpoint: str | os.PathLike | None = None,
        latent_stats: str | os.PathLike | None = None,
        text_encoder: Any = None,
        guide: Any = None,
        use_ema: bool = True,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        quantization: str | None = None,
        **kwargs: Any,
    ) -> SVGT2IPipeline:
        """Load a saved pipeline (folder or Hub id), a training run, one checkpoint, or the published `pre-trained/`.

        Args:
            subfolder: which DiT, where the folder holds several.
            autoencoder: YAML file or saved folder; `autoencoder_checkpoint` and `latent_stats` complete a YAML.
            text_encoder: Hugging Face folder or id. A training checkpoint records its own networks.
            guide: folder of a weaker DiT of the same latents and text features, for autoguidance.
            use_ema: the averaged weights rather than the raw ones.
            dtype, torch_dtype: of transformer and text encoder, also as text ("bfloat16", "bf16"); fp32 by default.
                Weights of the autoencoder and all statistics stay fp32.
            quantization: "int8", "fp8" or "fp8_dynamic" (`quantize`).
            **kwargs: those of `DiffusionPipeline.from_pretrained`: revision, token, cache_dir, local_files_only,
                variant, device_map, quantization_config, components by name, … Some want a saved pipeline.

        Raises:
            UserError: anything missing, or networks whose fingerprints show that they do not belong together.
        """
        dtype = saved.as_dtype(torch_dtype if dtype is None else dtype)
        download = sources.download_arguments(kwargs)
        folder = sources.fetch(pretrained_model_name_or_path, subfolder, use_ema, **download)
        folder = folder / subfolder if subfolder else folder
        parts = {
            "autoencoder": autoencoder, "autoencoder_checkpoint": autoencoder_checkpoint, "latent_stats": latent_stats,
            "text_encoder": text_encoder, "guide": guide,
        }  # fmt: skip
        if saved.is_saved_pipeline(folder):
            given = sources.load_given(folder, parts, use_ema, dtype)
            with saved.loading_errors(folder):
                arguments = {DTYPE: dtype, "use_safetensors": True, **given, **kwargs}
                pipeline = super().from_pretrained(folder, **arguments)
            for name, part in pipeline.components.items():
                if isinstance(part, nn.Module) and name not in given:
                    report_load(f"{name} of {folder}", len(part.state_dict()))
        else:
            device = saved.device_alone(kwargs, folder)
            components = sources.load_networks(sources.find_sources(folder, **parts), use_ema, dtype)
            pipeline = cls(**components, **kwargs).to(device)
        if quantization is not None:
            pipeline.quantize(quantization)
        return pipeline

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple]:
        """Types of the arguments, which older versions of diffusers do not find where annotations are text."""
        hints = get_type_hints(cls.__init__).items()
        return {name: get_args(hint) if isinstance(hint, UnionType) else (hint,) for name, hint in hints}

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """The content of model_index.json. UserError if it names other classes than a pipeline of this kind has."""
        return saved.checked_index(super().load_config(*args, **kwargs), cls.__name__)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write all networks (safetensors, JSON, statistics, fingerprints): all that `from_pretrained` needs.

        `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` reads it as well. **kwargs: those of
        diffusers: variant, max_shard_size, push_to_hub, …
        """
        if quantized_layers(self.transformer) or quantized_layers(self.text_encoder):
            raise UserError(
                "quantised weights are not saved; save the pipeline as it was loaded, and quantise it again"
            )
        self.register_to_config(sampling=asdict(self.options), max_length=self._prompt_encoder.max_length)
        self.transformer.register_to_config(fingerprints=saved.fingerprints(self.networks))
        saved.begin(save_directory)
        super().save_pretrained(save_directory, **kwargs)
        share_weights(Path(save_directory), Path(save_directory, saved.INDEX))

    def to_json_string(self) -> str:
        """The content of model_index.json, with the class as `DiffusionPipeline` finds it: in pipeline.py beside."""
        return saved.with_class(super().to_json_string(), type(self).__name__)

    # -------------------------------------------------------------------------------------------------- the networks

    def to(self, *args: Any, **kwargs: Any) -> SVGT2IPipeline:
        """Move all networks to a device, transformer and text encoder also to a dtype: to("cuda", torch.bfloat16)."""
        with memory_stage("loading the weights"):
            return super().to(*args, **kwargs)

    @property
    def networks(self) -> Networks:
        """The networks as the steps of a call use them."""
        encoder = self._prompt_encoder
        if (encoder.model, encoder.tokenizer) != (self.text_encoder, self.tokenizer):  # a component was replaced
            encoder = self._prompt_encoder = TextEncoder(self.text_encoder, self.tokenizer, encoder.max_length)
        device = self._execution_device
        return Networks(self.autoencoder, self.transformer, encoder, self.guide, device, self.dtype, self._texts)

    @property
    def dtype(self) -> torch.dtype:
        """Of transformer and text encoder."""
        return self.transformer.dtype

    @property
    def interrupt(self) -> bool:
        """Whether the call that is running ends after this step; a callback sets `_interrupt`."""
        return self._interrupt

    def set_guide(self, guide: SVGDiT | None) -> None:
        """Guide away from a weaker model with the same prompt (autoguidance) instead of the unconditional branch."""
        if guide is not None:
            check_widths(self.autoencoder, self.transformer, self._prompt_encoder.hidden_size, guide)
            guide = SVGDiT.adopt(guide).eval().requires_grad_(False).to(self.transformer.device, self.dtype)
        self.guide = guide

    def quantize(self, kind: str) -> None:
        """Keep the weights of transformer and text encoder in 8 bits (`loading.quantization`), about half of bf16's."""
        if self._prompt_encoder.is_exact:
            self._prompt_encoder.fingerprint()  # which does not survive
        quantize(kind, *filter(None, (self.transformer, self.guide, self.text_encoder)))
        self._texts = TextCache()

    def set_attention_backend(self, backend: str) -> None:
        """Compute attention by a kernel: "auto" (the default), "flash", "cudnn", "efficient", "math", or "sdpa".

        Raises:
            UserError: an unknown name, or a kernel that cannot do it on this device in this dtype.
        """
        for model in filter(None, (self.transformer, self.guide)):
            model.set_attention_backend(backend, self._execution_device)

    def compile(self, **kwargs: Any) -> None:
        """Compile the transformers' blocks, for any image size and prompt length; `kwargs` go to torch.compile."""
        for model in filter(None, (self.transformer, self.guide)):
            model.compile_repeated_blocks(**{"dynamic": True, **kwargs})

    # ------------------------------------------------------------------------------------------------- text to image

    def __call__(
        self,
        prompt: Prompts | None = None,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        *,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | Sequence[Tensor] | None = None,
        prompt_embeds: TextFeatures | Tensor | Sequence[Tensor] | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: TextFeatures | Tensor | Sequence[Tensor] | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int | None = None,
        scheduler: SchedulerMixin | None = None,
        packed: bool = False,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: PipelineStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        preset: str | None = None,
        **options: Any,
    ) -> SVGT2IOutput | tuple:
        """Make `len(prompt) · num_images_per_prompt` images, prompt by prompt.

        Args:
            prompt: one or several; each is prefixed with the system prompt of `options`.
            height, width: pixels, multiples of 16; or one per prompt.
            seed: one for the first image (image i uses seed + i within its prompt), or one per image. None draws new
                ones; the output names them.
            generator: torch generators instead of seeds: one for all, or one per image.
            latents: starting noise (B, C, height/16, width/16), or a list of (C, h, w), instead of drawing it.
            prompt_embeds, negative_prompt_embeds: text features in place of the texts, of `encode_prompt`: padded
                (B, L, D) with a mask (B, L), a list of (L, D), or packed.
            max_sequence_length: most tokens kept of a prompt; None for the pipeline's own limit.
            scheduler: of diffusers, in place of the solver (`sampling.schedulers`); also a component of the pipeline.
            packed: let the images share forward passes. Faster for several small images, which then depend on each
                other in their last bits.
            output_type, return_dict: see `SVGT2IOutput`; False returns (images,).
            callback_on_step_end: (pipeline, step, t, {"latents", "indices"}) after every step, latents of the images
                `indices`; a returned {"latents": …} replaces them. `pipeline._interrupt = True` ends the call there.
            preset: settings of a model stage (`options.PRESETS`) in place of the pipeline's own, or "fast" for these
                with fewer evaluations.
            **options: fields of `SamplingOptions`: num_inference_steps, guidance_scale, negative_prompt, solver, …

        Raises:
            UserError: an argument out of range, named with its value; or out of memory, naming the stage.
        """
        call, settings, running = self._begin(
            dict(
                options, preset=preset, scheduler=scheduler, packed=packed, output_type=output_type,
                return_dict=return_dict, num_images_per_prompt=num_images_per_prompt, seed=seed, generator=generator,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            )
        )  # fmt: skip
        features = self.transformer.config.cap_feat_dim
        prompts = conditioning.texts_or_features("prompt", prompt, prompt_embeds, prompt_attention_mask, features)
        request = steps.plan_request(prompts, height, width, num_images_per_prompt, seed, settings)
        images = len(request.prompts)
        given = negative_prompt_embeds, negative_prompt_attention_mask, options.get("negative_prompt")
        negatives = conditioning.negative_features(*given, settings, images, features)
        settings = settings.repeated(images // num_images_per_prompt, num_images_per_prompt)
        networks = self.networks
        texts = {"negatives": negatives, "max_length": max_sequence_length, "packed": packed}
        conditions = conditioning.encode_prompts(networks, request.prompts, settings, **texts)
        noise = steps.draw_noise(networks, request, generator, latents)
        solved = steps.solve(networks, noise, conditions, settings, running)
        return self._output(networks, solved, None if latents is not None else request.seeds, call)

    def encode_prompt(
        self,
        prompt: Prompts,
        negative_prompt: Prompts = "",
        *,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        max_sequence_length: int | None = None,
        system_prompt: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Text features for a call: prompt_embeds (B, L, D) and their mask (B, L), and those of the negative prompts.

        system_prompt: which one goes before the prompts; None for the pipeline's own.
        """
        prompts = conditioning.as_prompts(prompt)
        kind = {} if system_prompt is None else {"system_prompt": system_prompt}
        settings = changed(self.options, {"negative_prompt": negative_prompt, **kind}).repeated(len(prompts), 1)
        columns = [prompts, settings.negative_prompts(len(prompts))][: 1 + do_classifier_free_guidance]
        padded = [
            conditioning.padded_features(
                self.networks, column, settings.system_prompt, num_images_per_prompt, max_sequence_length
            )
            for column in columns
        ]
        self.maybe_free_model_hooks()
        return *padded[0], *(padded[1] if do_classifier_free_guidance else (None, None))

    def enhance(self, prompt: str) -> str:
        """The prompt rewritten in more detail by the causal text encoder; use it with system_prompt="align"."""
        with steps.stage("encoding the prompts"):
            written = enhance(prompt, self.networks.text_encoder)
        self.maybe_free_model_hooks()
        return written

    # ---------------------------------------------------------------------------------------------------- from images
    # Keywords that these share with a text-to-image call (num_images_per_prompt, seed, generator, output_type,
    # return_dict, callback_on_step_end, scheduler, preset, and the fields of `SamplingOptions`) mean the same here.

    def image_to_image(
        self,
        prompt: Prompts,
        image: ImageInput | Sequence[ImageInput],
        *,
        strength: float = 0.6,
        **settings: Any,
    ) -> SVGT2IOutput | tuple:
        """Redraw an image after a prompt. One image, or one per prompt.

        strength: how much changes, in (0, 1]: the last `strength` of the steps run. 1 starts from noise alone.
        """
        return self._from_images(prompt, image, strength=strength, **settings)

    def variation(
        self, image: ImageInput | Sequence[ImageInput], *, t: float = 0.3, prompt: str = "", **settings: Any
    ) -> SVGT2IOutput | tuple:
        """Other images like this one: noised to time t in [0, 1) and sampled on; the nearer to 1, the more alike."""
        images = inputs.as_list(image)
        return self._from_images([prompt] * len(images), images, start=t, **settings)

    def inpaint(
        self,
        prompt: Prompts,
        image: ImageInput | Sequence[ImageInput],
        mask_image: ImageInput | Sequence[ImageInput],
        *,
        strength: float = 1.0,
        paste_original: bool = True,
        padding_mask_crop: int | None = None,
        **settings: Any,
    ) -> SVGT2IOutput | tuple:
        """Repaint the cells where the mask is white; the latents of all other cells stay exactly what they were.

        mask_image: an image of the image's size, or one per image. A cell of 16×16 pixels is repainted if any of them
            is more than half white. Or a tensor of latent cells (H/16, W/16), nonzero where to repaint.
        strength: as in `image_to_image`, for the repainted cells.
        paste_original: take each pixel from the original as far as the mask is black there: exactly where it is all
            black. False keeps what the decoder makes of the whole image.
        padding_mask_crop: repaint in close-up: the surroundings of the mask, with this many pixels on each side, are
            enlarged to height × width, repainted, and put back into the image, which keeps its size.
        """
        shared = {"strength": strength, "paste_original": paste_original, **settings}
        if padding_mask_crop is None:
            return self._from_images(prompt, image, mask=mask_image, **shared)
        call, options, _ = self._begin(settings)
        parts = inputs.close_ups(image, mask_image, padding_mask_crop, options.size, call.output_type)
        shared |= {"height": options.height, "width": options.width, "return_dict": True}
        painted = self._from_images(prompt, [x.image for x in parts], mask=[x.part for x in parts], **shared)
        each = len(painted.images) // len(parts)
        images = [parts[i // each].paste(picture) for i, picture in enumerate(painted.images)]
        return SVGT2IOutput(images, painted.seeds) if call.return_dict else (images,)

    def _from_images(
        self,
        prompt: Prompts,
        image: ImageInput | Sequence[ImageInput],
        *,
        strength: float | None = None,
        start: float = 0.0,
        mask: Any = None,
        paste_original: bool = False,
        **arguments: Any,
    ) -> SVGT2IOutput | tuple:
        """Noise encoded images to `start` (or to where `strength` begins) and sample on, one image per prompt."""
        from_images.check_start(start, strength)
        call, settings, running = self._begin(arguments)
        prompts, images = from_images.pair_with_prompts(prompt, image, arguments.get("height"), arguments.get("width"))
        heights, widths = [x.shape[1] for x in images], [x.shape[2] for x in images]
        each = call.num_images_per_prompt
        request = steps.plan_request(prompts, heights, widths, each, call.seed, settings)
        settings = settings.repeated(len(prompts), each)
        masks = None if mask is None else inputs.masks_for(mask, request.sizes, each)
        starts = [start] * len(request.sizes)
        if strength is not None and strength < 1:
            prediction, scheduler = self.transformer.config.prediction, running.scheduler
            starts = [strength_start(settings, size, strength, prediction, scheduler) for size in request.sizes]
        networks = self.networks
        conditions = conditioning.encode_prompts(networks, request.prompts, settings)
        clean = [x for x in steps.encode_images(networks, images) for _ in range(each)]
        noise = steps.draw_noise(networks, request, call.generator)
        cells = None if masks is None else [one.cells.to(networks.device) for one in masks]
        solved = from_images.sample_on(networks, clean, noise, starts, conditions, settings, running, cells)
        keep = None
        if masks is not None and paste_original:
            keep = [(images[i // each], one.pixels) for i, one in enumerate(masks)]
        return self._output(networks, solved, request.seeds, call, keep)

    def interpolate(
        self,
        prompt: Prompts = "",
        image: Sequence[ImageInput] | None = None,
        *,
        weights: int | Sequence[float] = 5,
        t: float = 0.3,
        **arguments: Any,
    ) -> SVGT2IOutput | tuple:
        """Images on the way from one prompt or image to another, all from the same noise (or one seed each).

        Between prompts the two velocities are mixed; between images the latents, along the great circle in each
        cell, which are then noised to time t and sampled on.

        Args:
            prompt: one for all, or two.
            image: two images, or None.
            weights: of the second prompt and image, in [0, 1]; or how many, evenly from 0 to 1.
            t: with images only, in [0, 1]; 1 decodes the mixed latents as they are.
        """
        first_prompt, second_prompt = from_images.interpolation_ends(prompt, image, t)
        shares, start = from_images.interpolation_weights(weights), 0.0
        (call, settings, running), networks = self._begin(arguments), self.networks
        if image is not None:
            first = inputs.prepare_image(image[0], arguments.get("height"), arguments.get("width"))
            pair = [first, inputs.prepare_image(image[1], *first.shape[1:])]
            settings = changed(settings, {"height": first.shape[1], "width": first.shape[2]})
        seed = (
            steps.plan_request(first_prompt, None, None, 1, None, settings).seeds[0] if call.seed is None else call.seed
        )
        seeds = [seed] * len(shares) if np.ndim(seed) == 0 else seed
        request = steps.plan_request([first_prompt] * len(shares), None, None, 1, seeds, settings)
        x = steps.draw_noise(networks, request)
        if image is not None:
            start = t
            left, right = steps.encode_images(networks, pair)
            x = [torch.lerp(noise, from_images.slerp(left, right, share), t) for noise, share in zip(x, shares)]
        if start < 1:
            others = None if second_prompt is None else [second_prompt] * len(shares)
            conditions = conditioning.encode_prompts(networks, request.prompts, settings, others, shares)
            x = steps.solve(networks, x, conditions, settings, running, start=start)
        return self._output(networks, x, request.seeds, call)

    def retrieve(self, image: ImageInput, folder: str | Path | Sequence[Path], *, top_k: int = 10) -> list[Match]:
        """The images below a folder (or among files) whose latents are most like the query's, best first.

        Unreadable files are left out with a warning. Raises UserError if no image is left.
        """
        files = list_images(folder) if isinstance(folder, (str, Path)) else [Path(path) for path in folder]
        matches = from_images.nearest_images(self.networks, image, files, top_k)
        self.maybe_free_model_hooks()
        return matches

    # --------------------------------------------------------------------------------------------- shared by the calls

    def _begin(self, arguments: Mapping[str, Any]) -> tuple[CallOptions, SamplingOptions, Running]:
        """What the keywords of a call say: about the call, its settings, and how its steps run.

        Raises:
            UserError: an unknown or a wrong one.
        """
        call, changes = CallOptions.split(arguments)
        settings = changed(self.options if call.preset is None else preset_options(call.preset, self.options), changes)
        unknown = set(call.callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise UserError(
                f"callback_on_step_end_tensor_inputs = {sorted(unknown)}: choose from {self._callback_tensor_inputs}"
            )
        scheduler = self.scheduler if call.scheduler is None else call.scheduler
        if scheduler is not None:
            check_scheduler(scheduler)
        if settings.internal_guidance != 1 and self.transformer.config.aux_loss != "flow":
            raise UserError(
                f"internal_guidance = {settings.internal_guidance} needs a model with a head for it, trained with "
                "aux.loss=flow; this one has none"
            )
        self._interrupt = False
        on_step_end = None if call.callback_on_step_end is None else partial(call.callback_on_step_end, self)
        return call, settings, Running(call.packed, scheduler, on_step_end, self.progress_bar, lambda: self._interrupt)

    def _output(
        self,
        networks: Networks,
        latents: list[Tensor],
        seeds: list[int] | None,
        call: CallOptions,
        keep: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> SVGT2IOutput | tuple:
        """Clean latents (C, h, w) → the output that was asked for; `keep`: originals and the new images' share."""
        if call.output_type == "latent":
            images: Any = steps.stack(latents)
        else:
            pictures = steps.decode_latents(networks, latents)
            if keep is not None:
                pictures = [torch.lerp(old.to(new), new, share.to(new)) for new, (old, share) in zip(pictures, keep)]
            images = steps.as_output_type(pictures, call.output_type)
        self.maybe_free_model_hooks()
        return SVGT2IOutput(images, None if call.generator else seeds) if call.return_dict else (images,)
