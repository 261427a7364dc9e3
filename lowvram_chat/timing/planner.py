"""The planner that searches use: plans from the trace, speeds from the time model."""

from __future__ import annotations

from lowvram_chat.gpus import DEFAULT_GPU
from lowvram_chat.planning.plan import Plan
from lowvram_chat.planning.prediction import make_plan
from lowvram_chat.planning.search import Planner
from lowvram_chat.recipe.card import card_of
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.timing.speed import predict_speed


def _tokens_per_second(recipe: Recipe, plan: Plan) -> float:
    """Return a speed to compare settings by; for a card of unknown rates, that on the default card."""
    known = bool(card_of(recipe.memory).fp16_tflops)
    return predict_speed(recipe, plan.work, None if known else DEFAULT_GPU).tokens_per_second


PLANNER = Planner(plan=make_plan, tokens_per_second=_tokens_per_second)
