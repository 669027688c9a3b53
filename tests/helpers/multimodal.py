"""Tiny random models that look at images, and batches as their processors return them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

IMAGE = 60
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = VIT | {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4}
SIGLIP = VIT | {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, "vision_use_head": False}
QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_2_5 = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24}
QWEN_2_5 |= {"window_size": 16, "fullatt_block_indexes": [1]}
MROPE = {"type": "mrope", "mrope_section": [1, 2, 1]}
TILES = [[8, 16], [16, 8], [16, 16]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A family, its config, and its processor's way of giving images ("picture", "tiles" or "patches")."""

    name: str
    family: str
    config: dict[str, Any]
    kind: str = "picture"


CASES = (
    Case("llava", "llava", {"text_config": TEXT | {"model_type": "llama"}, "vision_config": CLIP}),
    Case(
        "llava-siglip",
        "llava",
        {"text_config": TEXT | {"model_type": "qwen2"}, "vision_config": SIGLIP, "vision_feature_layer": [0, -1]}
        | {"vision_feature_select_strategy": "full"},
    ),
    Case(
        "llava_next",
        "llava_next",
        {"text_config": TEXT | {"model_type": "mistral", "sliding_window": None}, "vision_config": CLIP}
        | {"image_grid_pinpoints": TILES},
        "tiles",
    ),
    Case(
        "gemma3",
        "gemma3",
        {"text_config": TEXT | {"head_dim": 16, "sliding_window": 3, "query_pre_attn_scalar": 12}}
        | {"vision_config": SIGLIP, "mm_tokens_per_image": 4},
    ),
    Case(
        "qwen2_vl",
        "qwen2_vl",
        {"text_config": TEXT | {"rope_scaling": MROPE}}
        | {"vision_config": QWEN | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}},
        "patches",
    ),
    Case(
        "qwen2_5_vl",
        "qwen2_5_vl",
        {"text_config": TEXT | {"rope_scaling": MROPE}, "tie_word_embeddings": True}
        | {"vision_config": QWEN | QWEN_2_5},
        "patches",
    ),
    Case(
        "qwen3_vl",
        "qwen3_vl",
        {
            "text_config": TEXT | {"head_dim": 8, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
            "vision_config": QWEN
            | {"depth": 3, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24}
            | {"num_position_embeddings": 9, "deepstack_visual_indexes": [0, 2]},
        },
        "patches",
    ),
)


def model(case: Case) -> Any:
    """A random float32 model in eval mode, in which every parameter counts."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**config_of(case))
    found = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        for name, p in found.named_parameters():
            one = p.ndim == 1 and "norm" in name and name.endswith("weight") and case.family != "gemma3"
            p.copy_(torch.randn_like(p) * (0.2 if p.ndim == 1 else 0.3) + float(one))
    return found.eval()


def rows(case: Case, extra: int = 0) -> list[dict[str, torch.Tensor]]:
    """Two texts with images, as a processor returns each; ``extra`` more tokens at their ends."""
    rng = np.random.default_rng(0)
    later = rng.integers(3, IMAGE, (2, 8))[:, :extra]
    out = []
    for number, images in enumerate(([(4, 6)], [(4, 4), (8, 4)])):
        pixels, counts, more = _images(case, images, rng)
        ids = list(rng.integers(3, IMAGE, 3))
        for count in counts:
            ids += [IMAGE] * count + list(rng.integers(3, IMAGE, 2))
        ids = torch.tensor([[*ids, *later[number]]])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **more}
        if case.kind == "patches":
            batch["mm_token_type_ids"] = (ids == IMAGE).int()
        if case.family == "gemma3":
            batch["token_type_ids"] = (ids == IMAGE).int()
        out.append(batch)
    return out


def _images(case: Case, images: list[tuple[int, int]], rng: np.random.Generator) -> Any:
    """``pixel_values``, tokens of each image, and what goes with them."""
    vision = case.config["vision_config"]
    if case.kind == "patches":
        count = sum(h * w for h, w in images)
        pixels = torch.tensor(rng.normal(size=(count, 3 * 2 * 4 * 4)), dtype=torch.float32)
        return pixels, [h * w // 4 for h, w in images], {"image_grid_thw": torch.tensor([[1, h, w] for h, w in images])}
    side = vision["image_size"]
    if case.kind == "tiles":
        sizes = [(10 * h + 1, 10 * w - 4) for h, w in images]  # neither fills its tiles
        pixels = torch.tensor(rng.normal(size=(len(images), 5, 3, side, side)), dtype=torch.float32)
        return pixels, [_tokens(*s) for s in sizes], {"image_sizes": torch.tensor(sizes)}
    pixels = torch.tensor(rng.normal(size=(len(images), 3, side, side)), dtype=torch.float32)
    counts = {"llava": 4, "llava-siglip": 16, "gemma3": 4}
    return pixels, [counts[case.name]] * len(images), {}


def _tokens(height: int, width: int) -> int:
    """Of an image in LLaVA-NeXT, as its processor in transformers counts them."""
    processor = transformers.LlavaNextProcessor.__new__(transformers.LlavaNextProcessor)
    processor.patch_size, processor.vision_feature_select_strategy = 4, "default"
    processor.num_additional_image_tokens = 1
    processor.image_processor = type("Settings", (), {"image_grid_pinpoints": TILES})
    return processor._get_number_of_features(height, width, 8, 8) - 1  # without the class token


def padded(rows: list[dict[str, torch.Tensor]], side: str = "right") -> dict[str, torch.Tensor]:
    """Rows as one batch."""
    length = max(r["input_ids"].shape[1] for r in rows)

    def fill(a: torch.Tensor) -> torch.Tensor:
        room = length - a.shape[1]
        return torch.nn.functional.pad(a, (0, room) if side == "right" else (room, 0))

    return {
        key: torch.cat([fill(r[key]) if key.endswith(("_ids", "_mask")) else r[key] for r in rows]) for key in rows[0]
    }


PHI3 = {"rope_scaling": {"type": "su", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}}
PHI3 |= {"original_max_position_embeddings": 16}
# Whose text part alone is run.
CARRIED = (
    Case("phi3_v", "phi3_v", TEXT | PHI3 | {"rms_norm_eps": 1e-5}),
    Case("qwen2_5_omni", "qwen2_5_omni", {"thinker_config": {"text_config": TEXT | {"rope_scaling": MROPE}}}),
)


def config_of(case: Case) -> dict[str, Any]:
    """Content of ``config.json``."""
    if case in CARRIED:
        return {"model_type": case.family, **case.config}
    return transformers.AutoConfig.for_model(case.family, **case.config, image_token_id=IMAGE).to_dict()


MARKS = {"llava": "<image>", "llava_next": "<image>", "gemma3": "<start_of_image>"}
_TEMPLATE = """{% for m in messages %}{% for c in m.content %}{% if c.type == "image" %} MARK {% else %} {{ c.text }}
{%- endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} t9{% endif %}"""
_PROCESSORS = {
    "llava": ({"image_processor_type": "CLIPImageProcessor"}, "LlavaProcessor"),
    "llava_next": (
        {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": TILES},
        "LlavaNextProcessor",
    ),
    "gemma3": (
        {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 16, "width": 16}},
        "Gemma3Processor",
    ),
}


def save(case: Case, directory: Any) -> None:
    """A random model with a tokenizer of words t0, t1, ..., a chat template, and its family's processor."""
    mark = MARKS.get(case.family, "<|image_pad|>")
    special = {"image_token": mark}
    if case.family == "gemma3":
        special = {"image_token": "<image_soft_token>", "boi_token": mark, "eoi_token": "<end_of_image>"}
    named = {IMAGE + i: token for i, token in enumerate(special.values())}
    raw = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({named.get(i, f"t{i}"): i for i in range(TEXT["vocab_size"])}, unk_token="t0")
    )
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"unk_token": "t0", "eos_token": "t2", "extra_special_tokens": special}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    tokenizer.chat_template = _TEMPLATE.replace("MARK", mark)
    model(case).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if case.kind == "patches":
        image: dict[str, Any] = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2}
        image |= {"size": {"shortest_edge": 64, "longest_edge": 4096}}
    else:
        own, kind = _PROCESSORS[case.family]
        image = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}} | own | {"processor_class": kind}
        more = {"image_seq_length": 4} if case.family == "gemma3" else {"patch_size": 4, "image_token": mark}
        if case.family != "gemma3":
            more |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        (directory / "processor_config.json").write_text(json.dumps({"processor_class": kind} | more))
    (directory / "preprocessor_config.json").write_text(json.dumps(image))


def processed(case: Case, directory: Any, text: str, images: list[Any]) -> dict[str, Any]:
    """What the family's processor in transformers returns. Qwen's would need torchvision, for videos: in its place its
    image processor, and as many marks as it says."""
    if case.kind != "patches":
        processor = transformers.AutoProcessor.from_pretrained(directory)
        return dict(processor(text=[text], images=images, return_tensors="np"))
    processor = transformers.AutoImageProcessor.from_pretrained(directory)
    found = processor(images=images, return_tensors="np")
    before, *after = text.split("<|image_pad|>")
    for (frames, rows, columns), part in zip(found["image_grid_thw"], after, strict=True):
        before += "<|image_pad|>" * (frames * rows * columns // 4) + part
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return {"input_ids": tokenizer([before], return_tensors="np")["input_ids"], **found}
