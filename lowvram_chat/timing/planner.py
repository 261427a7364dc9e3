"""The planner that searches use: plans from the trace, speeds from the time model."""

from __future__ import annotations

from lowvram_chat.planning.plan import Plan
from lowvram_chat.planning.prediction import make_plan
from lowvram_chat.planning.search import Planner
from lowvram_chat.recipe.schema import Recipe
from lowvram_chat.timing.speed import predict_speed


def _tokens_per_second(recipe: Recipe, plan: Plan) -> float:
    return predict_speed(recipe, plan.work).tokens_per_second


PLANNER = Planner(plan=make_plan, tokens_per_second=_tokens_per_second)
