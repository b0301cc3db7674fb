"""A CLIP of random weights in the format of the library."""

from __future__ import annotations

from pathlib import Path

import torch

from ftdpp.systems import clip

PATCH, SIDE, WIDTH, DIM = 8, 32, 24, 20


def write_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP of random weights in the library's format, with a tokenizer of its own."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    names = [name for names in clip.NAMES.values() for name in names]
    tokenizer = CLIPTokenizer().train_new_from_iterator([[*names, "a photo of a"]], 500)
    of_both = {"num_hidden_layers": 4, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=DIM,
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 40,
            "image_size": SIDE,
            "patch_size": PATCH,
            **of_both,
        },
        text_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "max_position_embeddings": 40,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **of_both,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        for parameter in model.parameters():  # the library's own are so small that all looks alike
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
