"""The model card of a run."""

from __future__ import annotations

from typing import Any

from ..hub.card_facts import collect_facts
from ..user_files import output_folder
from .interfaces import SplitTrainer


class CardHooks(SplitTrainer):
    """Writes a card that says how the model was trained."""

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        **facts: Any,
    ) -> None:
        """Writes `README.md` into the output directory: method, split, delays, data, results, citation.

        Args:
            facts: further fields of `hf_ouroboros.hub.CardFacts`, which win over what the trainer knows.
        """
        from ..hub.card import build_card

        if not self.is_world_process_zero():
            return
        known = collect_facts(
            self,
            language=language,
            license=license,
            tags=tags,
            model_name=model_name,
            base_model=finetuned_from,
            dataset_id=dataset_tags,
            dataset_name=dataset,
            **facts,
        )
        path = output_folder(self.args) / "README.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        build_card(known).save(path)
