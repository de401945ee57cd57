"""Images from prompts: what they depend on, what is refused before any work, and how the text encoder is stored."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import tiny_vae
from safetensors.torch import load_file
from tiny_text import TOKENS, WIDTH, save_text_encoder, tiny_t5, tiny_text_encoder, tiny_tokenizer

from itarflow import DenoiseScheduler, FlowDenoiser, Guidance, ITARFlowPipeline, TARFlow, denoise
from itarflow.convert import load_official
from itarflow.flow.tarflow import patchify
from itarflow.runtime.seeds import image_generators
from itarflow.text_encoder import TextEncoder

PROMPTS = ["a corgi on the beach", "a red cat", ""]
TEXT_FLOW: dict[str, Any] = {
    "num_classes": 0,
    "context_dim": WIDTH,
    "context_tokens": TOKENS,
    "rotary_side": 2,
    "head_dim": 16,
    "channels": 16,
    "start_token": True,
    "final_norm": True,
    "soft_clip": 4.0,
    "softplus_scale": True,
    "first_block_reversed": True,
    "in_channels": 3,
}
GUIDED = {"weight": 1.0, "rule": "gaussian", "schedule": "constant", "blocks": 1}


@pytest.fixture
def make_pipe(make_flow):
    def make(text: bool = True, vae=None, **changes: Any) -> ITARFlowPipeline:
        flow = make_flow(**TEXT_FLOW | changes)
        parts = {"text_encoder": tiny_t5(), "tokenizer": tiny_tokenizer()} if text else {}
        scheduler = DenoiseScheduler(t_max=0.5, t_min=0.05, num_denoise_steps=2)
        pipe = ITARFlowPipeline(flow, scheduler, guidance=GUIDED, vae=vae, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def pipe(make_pipe):
    return make_pipe()


@pytest.fixture
def never_encodes(monkeypatch):
    def encode(*_: object) -> None:
        raise AssertionError("work began before the refusal")

    monkeypatch.setattr(TextEncoder, "_encode", encode)
    monkeypatch.setattr(TARFlow, "inverse", encode)


def images_of(pipe: ITARFlowPipeline, prompt: Any = PROMPTS, seed: int = 0, **kwargs: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt=prompt, **{"generator": generator, "output_type": "pt"} | kwargs).images


def assert_same(images: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def differ(images: Tensor, others: Tensor) -> bool:
    return bool((images - others).abs().max() > 1e-3)


# -- what an image depends on -----------------------------------------------------------------------------------


def test_images_are_those_of_the_flow_and_its_denoiser(pipe):
    """The pipeline's parts put together by hand."""
    encoder = TextEncoder(pipe.tokenizer, pipe.text_encoder, TOKENS)
    context, null = encoder.encode(PROMPTS), encoder.encode([""])
    own = image_generators(torch.Generator().manual_seed(0), 3)
    z = pipe.flow.sample_prior(3, own)
    noisy = pipe.flow.inverse(z, None, 0.5, context=context, null_context=null, guidance=Guidance(**GUIDED))
    expected = denoise(FlowDenoiser(pipe.flow), noisy, None, pipe.scheduler, generator=own, context=context)
    assert_same(images_of(pipe, output_type="codes"), expected)


def test_samples_are_those_of_the_official_code(monkeypatch):
    """From its noise and its vectors of texts: exact, and guided by the empty one."""
    folder = Path(__file__).parents[1] / "golden" / "starflow_text"
    flow, tensors = load_official(folder / "weights.pth"), load_file(folder / "case.safetensors")
    monkeypatch.setattr(flow, "sample_prior", lambda *_: patchify(tensors["noise"], 1))
    pipe = ITARFlowPipeline(flow, DenoiseScheduler(t_max=0.3, t_min=0.01, num_denoise_steps=1), guidance=GUIDED)
    pipe.set_progress_bar_config(disable=True)
    embeds = {"prompt_embeds": tensors["text"], "negative_prompt_embeds": tensors["empty_text"]}
    for weight in (0.0, 3.6):
        found = pipe(**embeds, guidance_weight=weight, method="skip", output_type="codes").images
        expected = tensors[f"sample_w{weight}"]
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_an_image_depends_on_its_prompt_alone(pipe):
    together = images_of(pipe)
    assert_same(images_of(pipe, batch_size=1), together)
    assert_same(images_of(pipe, denoise_batch_size=1), together)
    others = images_of(pipe, ["a small dog", *PROMPTS[1:]])
    assert_same(others[1:], together[1:])
    assert differ(others[0], together[0])
    own = image_generators(torch.Generator().manual_seed(0), 3)
    for index, prompt in enumerate(PROMPTS):
        assert_same(images_of(pipe, prompt, generator=[own[index]]), together[index : index + 1])


def test_the_empty_prompt_guides(pipe):
    assert differ(images_of(pipe, "a red cat"), images_of(pipe, "a red cat", guidance_weight=0.0))
    # Both passes are the same: nothing is left of guidance.
    assert_same(images_of(pipe, ""), images_of(pipe, "", guidance_weight=0.0))


def test_a_negative_prompt_takes_the_place_of_the_empty_one(pipe):
    assert differ(images_of(pipe, negative_prompt="a dog"), images_of(pipe))
    assert_same(images_of(pipe, negative_prompt=["", "a dog", ""])[::2], images_of(pipe)[::2])
    assert_same(images_of(pipe, negative_prompt=["", "a dog", ""], batch_size=1)[1:2],
                images_of(pipe, negative_prompt="a dog")[1:2])  # fmt: skip
    assert_same(images_of(pipe, "a cat", negative_prompt="a cat"), images_of(pipe, "a cat", guidance_weight=0.0))


def test_a_prompt_is_repeated(pipe):
    two = images_of(pipe, "a red cat", num_images=2)
    assert_same(images_of(pipe, ["a red cat"] * 2), two)
    assert_same(images_of(pipe, "a red cat", num_images_per_prompt=2), two)
    each = images_of(pipe, PROMPTS[:2], num_images_per_prompt=2, negative_prompt=["", "a dog"])
    spread = [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert_same(images_of(pipe, spread, negative_prompt=["", "", "a dog", "a dog"]), each)


def test_vectors_take_the_place_of_texts(pipe, make_pipe):
    embeds, empty = pipe.encode_prompt(PROMPTS), pipe.encode_prompt("")
    assert embeds.shape == (3, TOKENS, WIDTH)
    assert_same(images_of(pipe, None, prompt_embeds=embeds), images_of(pipe))
    bare = make_pipe(text=False)
    found = images_of(bare, None, prompt_embeds=embeds, negative_prompt_embeds=empty)
    assert_same(found, images_of(pipe))
    each = empty.expand(3, -1, -1)
    assert_same(images_of(bare, None, prompt_embeds=embeds, negative_prompt_embeds=each, batch_size=2), found)
    assert_same(
        images_of(bare, None, prompt_embeds=embeds[:1], negative_prompt_embeds=empty, num_images=2),
        images_of(pipe, PROMPTS[0], num_images=2),
    )
    assert images_of(bare, None, prompt_embeds=embeds, guidance_weight=0).shape == (3, 3, 4, 4)
    assert images_of(bare, None, prompt_embeds=embeds.bfloat16(), guidance_weight=0).isfinite().all()


def test_a_long_prompt_is_cut_with_a_warning(pipe):
    with pytest.warns(UserWarning, match="'a small blue dog' ... is left out"):
        images_of(pipe, "a large red cat with a small blue dog")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images_of(pipe)


def test_a_flow_of_rectangles_has_rectangular_pictures(make_pipe):
    pipe = make_pipe(image_size=(4, 8))
    assert pipe.picture_shape == (3, 4, 8)
    assert images_of(pipe).shape == (3, 3, 4, 8)
    assert pipe(prompt="a cat").images[0].size == (8, 4)
    pipe = make_pipe(image_size=(4, 8), in_channels=4, vae=tiny_vae(in_channels=3, out_channels=3))
    assert pipe.picture_shape == (3, 8, 16)
    assert images_of(pipe, "a cat").shape == (1, 3, 8, 16)


# -- what is refused before any work ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "prompt is missing"),
        ({"num_images": 2}, "prompt is missing"),
        ({"num_images_per_prompt": 2}, "prompt is missing"),
        ({"prompt": []}, "prompt: prompts is empty"),
        ({"prompt": [3]}, "prompt: a prompt is 3"),
        ({"prompt": 3}, "prompt: prompts is 3"),
        ({"class_labels": 1}, "class_labels were given, but this flow takes prompts"),
        ({"prompt": PROMPTS, "class_labels": [0, 1]}, r"class_labels were given \(2 of them\)"),
        ({"prompt": PROMPTS, "num_images": 2}, "num_images is 2 for 3 prompts"),
        ({"prompt": "a", "num_images": 0}, "num_images is 0"),
        ({"prompt": PROMPTS, "num_images": 2, "num_images_per_prompt": 2}, "give one of them"),
        ({"prompt": PROMPTS, "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prompt": PROMPTS, "negative_prompt": ["", "a"]}, "2 negative prompts were given for 3 prompts"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, TOKENS, WIDTH)}, "prompt and prompt_embeds were given"),
        ({"prompt_embeds": torch.zeros(2, TOKENS, 9)}, r"prompt_embeds has shape \(2, 6, 9\); expected \(B, 6, 8\)"),
        ({"prompt_embeds": torch.zeros(2, 7, WIDTH)}, r"prompt_embeds has shape \(2, 7, 8\); expected \(B, 6, 8\)"),
        ({"prompt_embeds": torch.zeros(TOKENS, WIDTH)}, "prompt_embeds has shape"),
        ({"prompt_embeds": torch.zeros(0, TOKENS, WIDTH)}, "prompt_embeds has shape"),
        ({"prompt_embeds": torch.zeros(1, TOKENS, WIDTH, dtype=torch.int64)}, "torch.int64; expected floating"),
        ({"prompt_embeds": [[1.0]]}, "of the type list"),
        ({"prompt_embeds": torch.full((1, TOKENS, WIDTH), torch.nan)}, "not finite"),
        ({"prompt": "a", "negative_prompt_embeds": torch.zeros(1, 7, WIDTH)}, "negative_prompt_embeds has shape"),
        ({"prompt": "a", "generator": [torch.Generator()] * 2}, "2 generators"),
        ({"prompt": "a", "t_max": -1.0}, "t_max"),
        ({"promt": "a"}, "is 'prompt' meant"),
    ],
)
def test_impossible_prompts_are_refused(pipe, never_encodes, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**arguments)


def test_without_a_text_encoder_texts_are_refused(make_pipe, never_encodes):
    bare = make_pipe(text=False)
    for call in (lambda: bare(prompt="a cat"), lambda: bare.encode_prompt("a cat")):
        with pytest.raises(ValueError, match="has no text encoder"):
            call()
    with pytest.raises(ValueError, match="negative_prompt_embeds is missing"):
        bare(prompt_embeds=torch.zeros(1, TOKENS, WIDTH))


@pytest.mark.parametrize("changes", [{}, {"num_classes": 0}, {"context_dim": 4, "context_tokens": 1}])
def test_a_flow_without_prompts_refuses_them(make_flow, never_encodes, changes):
    pipe = ITARFlowPipeline(
        make_flow(in_channels=3, **changes), DenoiseScheduler(t_max=0.5, t_min=0.05, num_denoise_steps=2)
    )
    for given in ({"prompt": "a cat"}, {"prompt_embeds": torch.zeros(1, TOKENS, WIDTH)}):
        with pytest.raises(ValueError, match=r"was given, but this flow makes no images from prompts"):
            pipe(**given)
    with pytest.raises(ValueError, match="text_encoder was given, but this flow takes no prompts"):
        ITARFlowPipeline(pipe.flow, pipe.scheduler, text_encoder=tiny_t5(), tokenizer=tiny_tokenizer())


def test_a_text_encoder_of_another_width_is_refused(make_pipe, make_flow):
    pipe = make_pipe(text=False)
    for parts, message in (
        ({"text_encoder": tiny_t5(width=12), "tokenizer": tiny_tokenizer()}, "vectors of 12, but the flow takes"),
        ({"text_encoder": tiny_t5()}, "without tokenizer"),
        ({"tokenizer": tiny_tokenizer()}, "without text_encoder"),
        ({"text_encoder": torch.nn.Linear(8, 8), "tokenizer": tiny_tokenizer()}, "expected a T5EncoderModel"),
    ):
        with pytest.raises(ValueError, match=message):
            ITARFlowPipeline(pipe.flow, pipe.scheduler, **parts)


def test_another_denoiser_has_to_take_the_same_prompts(pipe, make_flow, never_encodes):
    for changes, message in (
        ({"num_classes": 0, "in_channels": 3}, "takes no prompts, but the generating one prompts of 6 vectors"),
        (TEXT_FLOW | {"context_tokens": 7}, "prompts of 7 vectors of 8"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(prompt="a cat", denoiser=FlowDenoiser(make_flow(**changes)))


class Nearest(torch.nn.Module):
    """Denoises nothing, and knows of no prompts."""

    def forward(self, noisy: Tensor, labels: Tensor | None, noise_level: Tensor) -> Tensor:
        return noisy


@pytest.mark.parametrize("denoiser", [Nearest(), Nearest().forward, lambda noisy, *_: noisy])
def test_a_denoiser_without_prompts_is_refused(pipe, never_encodes, denoiser):
    with pytest.raises(ValueError, match=r"has no argument context.*expected denoiser\("):
        pipe(prompt="a cat", denoiser=denoiser)


def test_a_denoiser_may_take_prompts_by_any_signature(pipe):
    seen = []

    def mine(noisy: Tensor, labels: Tensor | None, noise_level: Tensor, **kwargs: Tensor) -> Tensor:
        seen.append(kwargs["context"].shape)
        return noisy

    images_of(pipe, denoiser=mine)
    assert set(seen) == {(3, TOKENS, WIDTH)}
    images_of(pipe, denoiser=Nearest(), method="skip")  # which is not asked


def test_another_denoiser_is_given_the_prompts(pipe, make_flow):
    other = make_flow(seed=5, **TEXT_FLOW)
    found = images_of(pipe, denoiser=FlowDenoiser(other))
    assert differ(found, images_of(pipe))
    assert_same(images_of(pipe, denoiser=FlowDenoiser(pipe.flow)), images_of(pipe))


def test_labels_as_one_vector_are_labels(make_flow, tmp_path):
    """STARFlow's class-conditional model: the label is a prefix, and all else as with any other flow."""
    flow = make_flow(**TEXT_FLOW | {"num_classes": 3, "context_dim": 4, "context_tokens": 1})
    pipe = ITARFlowPipeline(flow, DenoiseScheduler(t_max=0.5, t_min=0.05, num_denoise_steps=2), guidance=GUIDED)
    pipe.set_progress_bar_config(disable=True)

    def images(labels: Any, **kwargs: Any) -> Tensor:
        return pipe(labels, generator=torch.Generator().manual_seed(0), output_type="pt", **kwargs).images

    found = images([0, 1, None])
    assert_same(images([0, 1, None], batch_size=1), found)
    assert differ(images([2, 1, None])[0], found[0])
    assert differ(images([0, 1, None], guidance_weight=0)[0], found[0])
    assert_same(images([0, 1, None], guidance_weight=0)[2], found[2])
    pipe.save_pretrained(tmp_path)
    pipe = ITARFlowPipeline.from_pretrained(tmp_path)
    assert_same(images([0, 1, None]), found)


# -- memory -----------------------------------------------------------------------------------------------------


def test_no_memory_for_the_text_encoder_says_what_to_do(pipe, monkeypatch):
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TextEncoder, "_encode", no_memory)
    with pytest.raises(torch.OutOfMemoryError, match=r"enable_model_cpu_offload.*prompt_embeds"):
        images_of(pipe, "a cat", guidance_weight=0)


def test_the_encoder_leaves_the_device_before_the_flow_comes(pipe, monkeypatch):
    """By the hooks of accelerate, on the CPU in the place of a GPU."""
    expected, order = images_of(pipe), []

    class Hook(ModelHook):
        def __init__(self, name: str) -> None:
            self.name = name

        def init_hook(self, module: torch.nn.Module) -> torch.nn.Module:
            order.append(f"{self.name} leaves")
            return module

        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            order.append(f"{self.name} comes")
            return args, kwargs

    add_hook_to_module(pipe.text_encoder, Hook("encoder"))
    add_hook_to_module(pipe.flow, Hook("flow"))
    order.clear()
    assert_same(images_of(pipe), expected)
    assert order[:3] == ["encoder comes", "encoder leaves", "flow comes"]
    assert "encoder comes" not in order[1:]
    assert ITARFlowPipeline.model_cpu_offload_seq == "text_encoder->flow->vae"


# -- stored -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["10GB", "3KB"])
def test_a_stored_pipeline_makes_the_same_images(pipe, tmp_path, shard):
    pipe.save_pretrained(tmp_path, max_shard_size=shard)
    weights = list((tmp_path / "text_encoder").glob("*.safetensors"))
    assert (len(weights) > 1) == (shard == "3KB")
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "T5EncoderModel"]
    assert f"text_encoder/{weights[0].name}" in index["_sha256"]
    assert not list(tmp_path.rglob("*.bin"))
    assert str(tmp_path) not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    loaded = ITARFlowPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(images_of(loaded), images_of(pipe))
    loaded.save_pretrained(tmp_path / "again")
    assert "read by a T5EncoderModel of 2 layers, as 6 vectors of 8" in (tmp_path / "again/README.md").read_text()
    card = (tmp_path / "README.md").read_text()
    assert (tmp_path / "again" / "README.md").read_text() == card
    assert "image = pipe(prompt='a corgi on the beach').images[0]" in card
    assert "pipeline_tag: text-to-image" in card


def test_the_text_encoder_may_be_left_out(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for part in ("tokenizer", "text_encoder"):  # one is enough
        bare = ITARFlowPipeline.from_pretrained(tmp_path, **{part: None})
        assert (bare.text_encoder, bare.tokenizer) == (None, None)
    bare.save_pretrained(tmp_path)  # in its place: nothing is left of the encoder
    assert not (tmp_path / "text_encoder").exists()
    assert not (tmp_path / "tokenizer").exists()
    assert ITARFlowPipeline.from_pretrained(tmp_path).text_encoder is None
    assert "no text encoder" in repr(bare)


def test_another_encoder_may_be_put_in(make_pipe, tmp_path):
    make_pipe(text=False).save_pretrained(tmp_path / "pipe")
    encoder = TextEncoder.from_pretrained(str(save_text_encoder(tmp_path / "t5")))
    loaded = ITARFlowPipeline.from_pretrained(
        tmp_path / "pipe", text_encoder=encoder.encoder, tokenizer=encoder.tokenizer
    )
    torch.testing.assert_close(loaded.encode_prompt(PROMPTS), tiny_text_encoder().encode(PROMPTS))


def test_variants_lie_beside_one_another(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    pipe.to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
    assert sorted(path.name for path in (tmp_path / "text_encoder").glob("*.safetensors")) == [
        "model.bf16.safetensors",
        "model.safetensors",
    ]
    found = [
        ITARFlowPipeline.from_pretrained(tmp_path, variant=variant).encode_prompt("a cat")
        for variant in (None, "bf16")
    ]
    assert differ(*found)
    with pytest.raises(OSError, match="variant 'fp16'"):
        ITARFlowPipeline.from_pretrained(tmp_path, variant="fp16")


def test_nothing_is_left_of_an_older_encoder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, max_shard_size="3KB")
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(b"of another tokenizer")
    pipe.save_pretrained(tmp_path)
    assert sorted(path.name for path in (tmp_path / "text_encoder").iterdir()) == ["config.json", "model.safetensors"]
    assert not (tmp_path / "tokenizer" / "spiece.model").exists()


def test_precision_of_the_text_encoder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = ITARFlowPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.text_encoder.dtype == torch.bfloat16
    loaded = ITARFlowPipeline.from_pretrained(tmp_path, torch_dtype={"text_encoder": torch.bfloat16})
    assert (loaded.text_encoder.dtype, loaded.flow.dtype) == (torch.bfloat16, torch.float32)
    assert loaded.encode_prompt("a cat").dtype == torch.float32


def changed_index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder": ["transformers", "BertModel"]}, "expected T5EncoderModel of transformers"),
        ({"text_encoder": ["evil", "T5EncoderModel"]}, "expected T5EncoderModel of transformers"),
        ({"tokenizer": ["transformers", "AutoModel"]}, "as tokenizer; expected T5Tokenizer"),
        ({"tokenizer": None}, "without tokenizer"),
    ],
)
def test_other_classes_are_not_looked_for(pipe, tmp_path, changes, message):
    pipe.save_pretrained(tmp_path)
    changed_index(tmp_path, **changes)
    with pytest.raises(OSError, match=message):
        ITARFlowPipeline.from_pretrained(tmp_path)


def test_exchanged_weights_and_foreign_tokenizers_are_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    tiny_t5(seed=1).save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(OSError, match="is not the file that"):
        ITARFlowPipeline.from_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "BertTokenizer"}))
    with pytest.raises(OSError, match="its tokenizer is a BertTokenizer"):
        ITARFlowPipeline.from_pretrained(tmp_path)


def test_without_transformers_the_extra_is_named(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(OSError, match=r"pip install \"itarflow\[text\]\", or .*text_encoder=None"):
        ITARFlowPipeline.from_pretrained(tmp_path)
    bare = ITARFlowPipeline.from_pretrained(tmp_path, text_encoder=None)
    assert bare.takes_prompts
