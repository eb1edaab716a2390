r"""Builds the demo model's folder without its weights, in Hugging Face layout: tokenizer, template, configs.

The tokenizer is a real byte-level BPE over the demo's own words: every word of the prompts and of the world, with
or without its leading space as it occurs, is one token; the tags `<description>`, `</think>`, `\boxed{` ... are
several (`{red` is one, so the parser meets a token that covers a delimiter and an answer); any other text falls
back to smaller pieces and in the end to the 256 bytes.
"""

import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vigos_jax.demo.scenes import ATTRIBUTES, PRIORS, SIDE, Scene, blank_image
from vigos_jax.demo.world import WORLDS, Item
from vigos_jax.miniature.responses import caption, completion, faithful, mistaken, text_driven

SPLIT = (  # words take one leading space or sign, digits stand alone, line ends stick to the signs before
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_MULTIPLE = 64
WINDOW = 84  # pixels: one demo image is exactly one attention window


def world_texts(world: str) -> Iterable[str]:
    """Texts in which every word of a world occurs as it does in questions and responses."""
    for asks in itertools.chain.from_iterable(WORLDS[name].questions() for name in dict.fromkeys(("demo", world))):
        yield from (f"{asks.prior_text} {asks.text}", asks.text)
        for values in itertools.product(*(ATTRIBUTES[attribute] for _, attribute in asks.asked)):
            things = {kind: PRIORS[kind] for kind, _ in asks.asked}
            for (kind, attribute), value in zip(asks.asked, values, strict=True):
                things[kind] = things[kind].replace(attribute, value)
            scene = Scene(tuple(things.values()), ())
            item = Item(id="", image=blank_image(), scene=scene, asks=asks, states_prior=False)
            yield caption(item)
            yield completion(faithful(item))
            yield completion(text_driven(item, item.answer))
            if asks.mistaken(things) != item.answer:
                yield completion(mistaken(item))


def prompt_texts(templates: Sequence[str], world: str) -> Iterable[str]:
    """The prompt templates with a question and every answer filled in."""
    questions = list(WORLDS[world].questions())
    answers = dict.fromkeys(answer for asks in questions for answer in asks.choices)
    for template, answer in itertools.product(templates, answers):
        yield template.replace("{problem}", questions[0].text).replace("{reference}", answer)


def build_tokenizer(templates: Sequence[str], world: str) -> Tokenizer:
    """Byte-level BPE trained until every word of a world and of the prompt `templates` is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: training stops when no pair is left
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    chat = ["user\n", "assistant\n", "\n"]
    tokenizer.train_from_iterator([*chat, *world_texts(world), *prompt_texts(templates, world)], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    return tokenizer


def model_config(tokenizer: Tokenizer) -> dict:
    """config.json in the flat layout of the published Qwen2.5-VL checkpoints; about 0.6 M parameters."""
    ids = {token: tokenizer.token_to_id(token) for token in CONTROL}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 4, 4]},
        "sliding_window": 4096,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": -(-tokenizer.get_vocab_size() // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 128,
            "out_hidden_size": 96,
            "hidden_act": "silu",
            "in_channels": 3,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "tokens_per_second": 2,
            "window_size": WINDOW,
            "fullatt_block_indexes": [1],
        },
    }


def tokenizer_config(tokenizer: Tokenizer) -> dict:
    """Contents of tokenizer_config.json: control tokens and the chat template, as transformers reads them."""
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True,
        }
        for token in CONTROL
    }  # fmt: skip
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [t for t in CONTROL if t != "<|endoftext|>"],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 4096,
        "split_special_tokens": False,
        "chat_template": CHAT_TEMPLATE,
    }


def preprocessor_config() -> dict:
    """Every image is scaled to about 84 x 84 pixels, the size of the demo's own."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": SIDE**2,
        "max_pixels": SIDE**2,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def write_assets(folder: pathlib.Path, *, world: str, templates: Sequence[str]) -> None:
    """Writes tokenizer.json and the four configs: config, tokenizer, preprocessor, generation."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(templates, world)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = model_config(tokenizer)
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": [config["eos_token_id"], config["pad_token_id"]],
        "pad_token_id": config["pad_token_id"],
        "do_sample": True,
        "temperature": 1.0,
    }
    files = {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config(tokenizer),
        "preprocessor_config.json": preprocessor_config(),
        "generation_config.json": generation,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
