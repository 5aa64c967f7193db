"""Draws pictures of prompts with a model of homemade-diffusion, whose camera can be moved.

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=f"{folder}/pipeline.py", trust_remote_code=True)
    pipe("red star", seed=3, x_shift=0.25).images[0]

Axes: B batch, C latent channels, H W latent rows and columns, N image tokens, 3 = RGB.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor

from trainer.diffusion.flow import draw_noise, shift_for_tokens
from trainer.diffusion.keyed_random import sample_key
from trainer.diffusion.positions import camera, full_position_map
from trainer.diffusion.sampler import Velocity, guided, guided_apart, heun, time_grid
from trainer.encoders.text import TextEncoder

_SEEDS = 1 << 62


class HDMPipeline(DiffusionPipeline):  # type: ignore[misc]
    """text_tokens: longer texts are cut; resolution: side of the training crops, in pixels."""

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        text_tokens: int = 256,
        resolution: int = 1024,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )
        self.register_to_config(text_tokens=text_tokens, resolution=resolution)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels along the side of a latent

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        x_shift: float = 0.0,
        y_shift: float = 0.0,
        zoom: float = 1.0,
        sampler: Literal["euler", "heun"] = "euler",
        time_shift: float | None = None,
        selection_rate: float = 0.0,
        unconditional_rate: float = 0.0,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Returns ImagePipelineOutput with num_images_per_prompt pictures per prompt, or a tuple without return_dict.

        height, width: pixels, a whole number of tokens; default: the side of the training crops. guidance_scale: 1
        turns guidance off. x_shift, y_shift, zoom: move the camera right, down and closer; a shift of 1 is the side
        of a square picture. seed: of the first picture, followed by seed + 1 ..., or one per picture; default:
        random. generator: used only for its initial seed. A picture depends only on its seed, not on the others in
        its batch or the device. sampler: heun is second order and evaluates the model twice per step; euler uses the
        scheduler. time_shift: above 1 spends more steps near noise; default: the scheduler's shift, scaled by the
        number of tokens relative to the training crops (SD3, section 5.3.2). selection_rate, unconditional_rate:
        TREAD self-guidance, the shares of image tokens that skip the middle blocks with the prompt and with the
        negative prompt. output_type: "pt" (B, 3, height, width) and "np" (B, height, width, 3) in [0, 1], "latent"
        (B, C, H, W).

        Raises ValueError for a size, number of steps, seed or camera out of range.
        """
        prompts = [text for text in _listed(prompt) for _ in range(num_images_per_prompt)]
        if not prompts:
            raise ValueError("no prompt and no picture: give a prompt, which may be empty")
        negatives = _listed(negative_prompt)
        negatives = negatives * len(prompts) if len(negatives) == 1 else _repeated(negatives, num_images_per_prompt)
        if len(negatives) != len(prompts):
            raise ValueError(
                f"{len(negatives)} negative prompts for {len(prompts)} pictures: give one, or one for each"
            )
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps {num_inference_steps} must be at least 1")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale {guidance_scale} is not a number")
        if sampler not in ("euler", "heun"):
            raise ValueError(f"sampler {sampler!r} must be euler or heun")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} must be pil, np, pt or latent")
        seeds = _seeds(seed, generator, len(prompts))
        width = self.config.resolution if width is None else width
        height = self.config.resolution if height is None else height
        token = self.factor * self.transformer.config.architecture["patch_size"]
        if width < 1 or height < 1 or width % token or height % token:
            raise ValueError(f"{width} x {height} pixels: sides must be multiples of {token}, the pixels of a token")
        device = self._execution_device
        map_N2 = full_position_map(width, height, height // token, width // token, device=device)
        map_N2 = camera(map_N2, x_shift, y_shift, zoom)
        aspect = math.log(width / height)
        keys_B = torch.tensor([sample_key(number, 0, 0) for number in seeds], device=device)

        def branch(texts: list[str], rate: float) -> Velocity:
            return self._velocity(texts, map_N2, aspect, keys_B.repeat(len(texts) // len(keys_B)), rate)

        if guidance_scale == 1:
            velocity = branch(prompts, selection_rate)
        elif selection_rate == unconditional_rate:
            velocity = guided(branch([*prompts, *negatives], selection_rate), guidance_scale)
        else:
            parts = branch(prompts, selection_rate), branch(negatives, unconditional_rate)
            velocity = guided_apart(*parts, guidance_scale)
        shape = (self.transformer.config.architecture["in_channels"], height // self.factor, width // self.factor)
        noise_BCHW = draw_noise(keys_B, shape)
        if time_shift is None:
            by_tokens = shift_for_tokens(width * height, self.config.resolution**2)
            time_shift = self.scheduler.config.get("shift", 1.0) * by_tokens
        with self.progress_bar(total=num_inference_steps) as bar:
            if sampler == "heun":
                steps = num_inference_steps
                latents_BCHW = heun(velocity, noise_BCHW, steps, time_shift, lambda done, of: bar.update())
            else:
                latents_BCHW = self._scheduled(velocity, noise_BCHW, num_inference_steps, time_shift, bar)
        images = latents_BCHW if output_type == "latent" else self._pictures(latents_BCHW, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _velocity(
        self, texts: list[str], map_N2: Tensor, aspect: float, keys_B: Tensor, selection_rate: float
    ) -> Velocity:
        """XUT's forward pass for one text per picture."""
        design = self.transformer.config.architecture
        encoder = TextEncoder(
            self.text_encoder, self.tokenizer, design["text_layers"], design.get("text_prefix", False)
        )
        text_BTD, mask_BT = encoder.encode(texts, self.config.text_tokens, 1)
        count, dtype = len(texts), self.transformer.dtype
        aspect_B = torch.full((count,), aspect, device=map_N2.device)

        def velocity(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
            # Half-precision weights with float32 latents, times and positions, as in training.
            with torch.autocast(map_N2.device.type, dtype, enabled=dtype != torch.float32):
                out: Tensor = self.transformer(
                    x_BCHW,
                    t_B,
                    text_BTD,
                    mask_BT,
                    map_N2.expand(count, -1, -1),
                    aspect_B,
                    selection_rate,
                    # Depends on t, so that tokens skipped at one step are seen at the next.
                    keys_B + (t_B * 2**32).long() if selection_rate else None,
                )
            return out.float()  # because guidance multiplies the rounding error of half precision

        return velocity

    def _scheduled(self, velocity: Velocity, latents_BCHW: Tensor, steps: int, shift: float, bar: Any) -> Tensor:
        """Integrates with a copy of the scheduler, whose times are already shifted."""
        scheduler = self.scheduler.from_config(self.scheduler.config, shift=1.0)
        scheduler.set_timesteps(sigmas=time_grid(steps, shift)[:-1], device=latents_BCHW.device)
        for i, timestep in enumerate(scheduler.timesteps):
            t_B = scheduler.sigmas[i].expand(len(latents_BCHW))
            latents_BCHW = scheduler.step(velocity(latents_BCHW, t_B), timestep, latents_BCHW).prev_sample
            bar.update()
        return latents_BCHW

    def _pictures(self, latents_BCHW: Tensor, output_type: str) -> Any:
        config = self.vae.config
        if self.vae.dtype == torch.float16 and config.force_upcast:
            self.vae.to(torch.float32)  # as diffusers does for VAEs that overflow float16
        mean_C, std_C = (latents_BCHW.new_tensor(values) for values in (config.latents_mean, config.latents_std))
        z_BCHW = latents_BCHW * std_C[:, None, None] + mean_C[:, None, None]
        pixels_B3HW = self.vae.decode(z_BCHW.to(self.vae.dtype)).sample.float()
        if output_type == "pil":
            bytes_B3HW = ((pixels_B3HW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            return [Image.fromarray(picture) for picture in bytes_B3HW.permute(0, 2, 3, 1).cpu().numpy()]
        pixels_B3HW = ((pixels_B3HW + 1) / 2).clamp(0, 1)
        return pixels_B3HW if output_type == "pt" else pixels_B3HW.permute(0, 2, 3, 1).cpu().numpy()


def _listed(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _repeated(texts: list[str], times: int) -> list[str]:
    return [text for text in texts for _ in range(times)]


def _seeds(
    seed: int | Sequence[int] | None, generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[int]:
    """One per picture."""
    if seed is not None and generator is not None:
        raise ValueError("give a seed or a generator, not both")
    if isinstance(generator, torch.Generator):
        seed = generator.initial_seed() % _SEEDS
    elif generator is not None:
        seed = [one.initial_seed() % _SEEDS for one in generator]
    if seed is None:
        seed = int(torch.randint(_SEEDS, ()))
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} pictures: give one, or one for each")
    if not all(0 <= number < _SEEDS for number in seeds):
        raise ValueError(f"seeds must be from 0 to {_SEEDS - 1}: got {seeds}")
    return seeds
