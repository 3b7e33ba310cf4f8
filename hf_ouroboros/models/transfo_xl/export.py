"""Writes a model for the Hub: plain weights, or with a frozen copy of this code for those who lack the package."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

AUTO_CLASSES = {"TransfoXLModel": "AutoModel", "TransfoXLLMHeadModel": "AutoModelForCausalLM"}


def export(model: PreTrainedModel, directory: str | Path, with_code: bool = False) -> None:
    """Saves config.json and model.safetensors.

    Args:
        model: a TransfoXLModel or TransfoXLLMHeadModel.
        directory: where to; made if needed.
        with_code: add the files of this package that define the model, so that
            `from_pretrained(..., trust_remote_code=True)` works without hf_ouroboros. The copy is frozen: it gets no
            fixes, and transformers 5.3 can't tie its embeddings; 5.4 can. Without the code users import
            hf_ouroboros.models.transfo_xl first.
    """
    # register_for_auto_class makes every later save of every model ship code, or point to code that isn't there.
    vars(model.config).pop("auto_map", None)
    classes: dict[type[PreTrainedModel] | type[PretrainedConfig], str]
    classes = {type(model): AUTO_CLASSES[type(model).__name__], type(model.config): "AutoConfig"}
    try:
        for cls, auto_class in classes.items() if with_code else ():
            cls.register_for_auto_class(auto_class)
        model.save_pretrained(directory)
    finally:
        for cls in classes:
            cls._auto_class = None
        vars(model.config).pop("auto_map", None)
