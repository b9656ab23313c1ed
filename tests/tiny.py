"""Tiny random models in the exact folder layouts of the real ones, for every room's tests."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cloud_server.torchvision_guard import guard

guard()
from diffusers import (  # noqa: E402  the guard must come first
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPTokenizerFast,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.models.clip.tokenization_clip import bytes_to_unicode  # noqa: E402

from cloud_server.training.predictor import Predictor, PredictorConfig, save  # noqa: E402

WORDS = ("a", "cat", "dog", "two", "red", "apples", "on", "grass", "above", "the", "beach", "and")
CONTEXT = 32
BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "!"
METRICS = (
    "Definition",
    "Detail",
    "Clarity",
    "Sharpness",
    "Harmony",
    "Realism",
    "Color",
    "Consistency",
    "Layout",
    "Integrity",
)


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write a byte-level CLIP tokenizer that knows `WORDS` whole: slow files and tokenizer.json."""
    alphabet = list(bytes_to_unicode().values())  # the first is "!", which pads as id 0
    tokens = dict.fromkeys([*alphabet, *(letter + "</w>" for letter in alphabet)])
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            merges[left, right] = None
            left += right
            tokens[left] = None
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate([*tokens, BOS, EOS])}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    settings = {"pad_token": PAD, "model_max_length": CONTEXT}
    CLIPTokenizerFast(*files, **settings).save_pretrained(folder)
    tokenizer = CLIPTokenizer(*files, **settings)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_text_encoder(vocab_size: int, seed: int, width: int = 32) -> CLIPTextModel:
    """Return a random CLIP text tower of two layers."""
    torch.manual_seed(seed)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=0,
        )
    ).eval()


def make_pipeline(
    folder: Path,
    seed: int = 0,
    *,
    unet_channels: tuple[int, int] = (32, 64),
    latent_channels: int = 8,
    text_seed: int = 0,
    text_width: int = 32,
    latent_size: int = 8,
    steps: int = 2,
) -> Path:
    """Write a random Stable Diffusion folder, and its defaults.json, and return `folder`.

    Pictures have 8 * `latent_size` pixels a side. Pipelines of one `text_seed` share their text
    encoder, as the starter's edge and cloud models do.
    """
    tokenizer = make_tokenizer(folder / "tokenizer")
    text_encoder = make_text_encoder(len(tokenizer), text_seed, text_width)
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=unet_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=text_width,
    )
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(0, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 0),
        latent_channels=latent_channels,
    )
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        solver_order=2,
        use_karras_sigmas=False,
        steps_offset=1,  # unused by "trailing"; the pipeline warns without it
        timestep_spacing="trailing",
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    side = 8 * latent_size
    defaults = {"width": side, "height": side, "steps": steps, "guidance": 4.0}
    (folder / "defaults.json").write_text(json.dumps(defaults), encoding="utf-8")
    return folder


def make_router(folder: Path, seed: int = 0, *, text_seed: int = 0, text_width: int = 32) -> Path:
    """Write a random predictor and a plausible router.json, and return `folder`.

    It goes with the text encoder that `make_pipeline` gives to the same `text_seed`.
    """
    with TemporaryDirectory() as scratch:
        tokenizer = make_tokenizer(Path(scratch))
    prompt = "two red apples to the left of a cat"
    encoder = make_text_encoder(len(tokenizer), text_seed, text_width)
    with torch.inference_mode():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        state = encoder(ids).last_hidden_state[0, -1].tolist()
    torch.manual_seed(seed)
    config = PredictorConfig(width=text_width, hidden=text_width, low_rank=4, top_k=4)
    save(Predictor(config), folder)
    metrics = [
        {
            "name": name,
            "positive": f"{name} photo",
            "negative": f"Photo without {name.lower()}",
            "weight": 1 / len(METRICS),
            "mu_edge": 0.5 + 0.01 * i,
            "mu_cloud": 0.53 + 0.012 * i,
        }
        for i, name in enumerate(METRICS)
    ]
    router = {
        "metrics": metrics,
        "gamma": 6.0,
        "floor": 1e-3,
        "score_digest": [0.3 + 0.4 * i / 199 for i in range(200)],
        "default_share": 0.3,
        "top_k": config.top_k,
        "edge_model": "tiny-edge",
        "cloud_model": "tiny-cloud",
        "text_probe": {"prompt": prompt, "state": state},
        "seed": seed,
    }
    (folder / "router.json").write_text(json.dumps(router, indent=1), encoding="utf-8")
    return folder


def make_bert(folder: Path, seed: int = 0, width: int = 24) -> Path:
    """Write a random BERT that knows `WORDS`, in Hugging Face's format, and return `folder`."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    save_word_tokenizer(folder, special, "[CLS] $A [SEP]", pad_token="[PAD]")
    torch.manual_seed(seed)
    BertModel(
        BertConfig(
            vocab_size=len(special) + len(WORDS),
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * width,
            max_position_embeddings=20,
        )
    ).save_pretrained(folder)
    return folder


def make_t5(folder: Path, seed: int = 0, width: int = 16) -> Path:
    """Write a random T5 encoder that knows `WORDS`, and return `folder`."""
    special = ["<pad>", "</s>", "[UNK]"]
    save_word_tokenizer(folder, special, "$A </s>", pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(seed)
    vocabulary = len(special) + len(WORDS)
    heads = {"num_layers": 2, "num_heads": 2, "d_kv": 8}
    config = T5Config(vocab_size=vocabulary, d_model=width, d_ff=2 * width, **heads)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def save_word_tokenizer(folder: Path, special: list[str], frame: str, **tokens: str) -> None:
    """Write a tokenizer of `special` tokens and `WORDS`, which puts prompts into a frame."""
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    framed = [(word, vocabulary[word]) for word in special]
    core.post_processor = processors.TemplateProcessing(frame, special_tokens=framed)
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", model_max_length=20, **tokens
    ).save_pretrained(folder)


def make_clip(folder: Path, seed: int = 0, width: int = 32) -> Path:
    """Write a random CLIP in open_clip's folder format, with `make_tokenizer`'s files."""
    import open_clip
    from safetensors.torch import save_file

    vocab_size = len(make_tokenizer(folder))
    vision = {"image_size": 32, "patch_size": 16, "width": width, "layers": 1, "head_width": 16}
    text = {
        "context_length": CONTEXT,
        "vocab_size": vocab_size,
        "width": width,
        "heads": 2,
        "layers": 1,
    }
    torch.manual_seed(seed)
    model = open_clip.CLIP(embed_dim=width, vision_cfg=vision, text_cfg=text)
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k != "attn_mask"}
    save_file(weights, folder / "open_clip_model.safetensors")
    own_files = {"hf_tokenizer_name": "tiny", "tokenizer_kwargs": {"clean": "whitespace"}}
    config = {
        "model_cfg": {"embed_dim": width, "vision_cfg": vision, "text_cfg": text | own_files},
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def make_recognizer(folder: Path, seed: int = 0, classes: int = 7) -> Path:
    """Write a random recogniser of 32-pixel pictures, asked from one on, and return `folder`."""
    import timm

    from cloud_server.training.iciia.backbone import Backbone
    from cloud_server.training.iciia.module import Iciia, IciiaConfig
    from cloud_server.training.iciia.recognizer import Recognizer

    torch.manual_seed(seed)
    network = timm.create_model(
        "resnet10t",
        num_classes=classes,
        channels=[8, 8, 16, 32],
        pretrained_cfg_overlay={"input_size": (3, 32, 32), "crop_pct": 1.0},
    )
    iciia = Iciia(IciiaConfig(width=32, classes=classes, groups=8))
    names = tuple(f"class {i}" for i in range(classes))
    Recognizer(Backbone(network.eval()), iciia.eval(), 1, names, {"seed": seed}).save(folder)
    return folder
