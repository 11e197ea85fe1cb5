"""From a budget to a plan: measure, choose, look what the export of it takes, and choose again if that is more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lightning_cco.budget.candidates import candidates
from lightning_cco.budget.choosing import choose, trade_off, uniform_points
from lightning_cco.budget.facts import float_bytes, weight_facts
from lightning_cco.budget.integer_program import Choice
from lightning_cco.budget.layer_times import LayerTimes
from lightning_cco.budget.limits import limit_of, measures, point_of, smallest
from lightning_cco.budget.measured import LayerTimer, measured_times
from lightning_cco.budget.options import Choices, choices
from lightning_cco.budget.plan import BudgetPlan, Point, budget_rules, goal_of
from lightning_cco.budget.planned_model import Calibrate, PlannedModel
from lightning_cco.budget.refusals import too_slow
from lightning_cco.budget.rules import as_planned, layer_choices, rules_of
from lightning_cco.budget.solver import Limit, need_scipy, taken_of
from lightning_cco.budget.units import seconds_of_plan, speed_model, timed
from lightning_cco.errors import CCOError
from lightning_cco.loss_sensitivity import LossSensitivityReport
from lightning_cco.number_format import figure
from lightning_cco.quantization.forward_call import Forward
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.plan import QuantizationPlan, packs_weights
from lightning_cco.settings import Settings

_ROUNDS = 3
_NODE_BYTES = 300.0


class BudgetSearch:
    """Finds the plan of a budget for a calibrated model.

    Args:
        quantized: The model, calibrated for the user's own recipe.
        settings: The user's recipe.
        calibrate: Calibrates quantizers that are new.
        measure_loss: Measures the loss sensitivities of the model as it is planned then, for some numbers of bits of weights and of activations.
        forward: How a batch goes through the model.
        export_bytes: Exports the model as it is planned then, and says how many bytes that takes; `None`: sizes are estimated.
        agree: Makes the choice of the first process that of all of them.
        timer: Measures what layers take; `None`: nothing is measured.
        times: What was measured before, which is then taken.
    """

    def __init__(
        self,
        quantized: HookedModel,
        settings: Settings,
        calibrate: Calibrate,
        measure_loss: Callable[[Sequence[int], Sequence[int]], LossSensitivityReport],
        forward: Forward,
        export_bytes: Callable[[], int] | None = None,
        agree: Callable[[Any], Any] = lambda value: value,
        timer: LayerTimer | None = None,
        times: LayerTimes | None = None,
    ) -> None:
        need_scipy()
        goal = goal_of(settings.budget_settings)
        if goal is None:
            raise CCOError("budget_settings: expected a goal, got none. Write one of size, average_bits, bops, accuracy_drop or speed.")
        self._known_curves: tuple[float, tuple[list[Point], list[Point], list[Point]]] | None = None
        self.timer, self.times, self.speed = timer, times, settings.budget_settings.speed
        self.model = PlannedModel(quantized, settings, calibrate, export_bytes, agree)
        self.settings, self.forward, self.measure_loss, self.agree = settings, forward, measure_loss, agree
        self.goal, self.limit = goal
        self.by = settings.budget_settings.accuracy_drop_by if self.goal == "accuracy_drop" else self.goal
        if self.times is None and self.timer is None and (self.speed is not None or self.by == "speed"):
            raise CCOError(
                "budget_settings.speed: no times of layers are known. Give the search a timer, or a table (budget_settings.layer_times)."
            )

    def find(self, batch: Any, validate: Callable[[BudgetPlan], float] | None = None) -> BudgetPlan:
        """Find the plan, and plan the model so.

        Args:
            batch: A batch, for the shapes of the layers.
            validate: For ``accuracy_drop``: what is lost with a plan, once the model is planned so.

        Raises:
            CCOError: No plan is within the budget.
        """
        self._known_curves = None
        float_file = self.model.float_file_bytes() if self.by == "size" else None
        made, base, report = self._choices(batch)
        if self.times is None and self.timer is not None and (self.speed is not None or self.by == "speed"):
            self.times = measured_times(self.model, self.timer, made, base)
        if self.times is not None:
            made.speed = speed_model(made, base, self.times)
            if self.speed is not None or self.by == "speed":
                made = timed(made)
        overhead = _NODE_BYTES * len(base.graph)
        made.float_bytes = float(float_file) if float_file is not None else made.float_bytes + overhead
        taken = self.model.file_bytes() if self.by == "size" else None
        if taken is not None:
            measure, fixed, _ = measures(made, 0.0)["size"]
            overhead = taken - taken_of(as_planned(made, base), measure) - fixed
        if self.goal == "accuracy_drop":
            assert validate is not None
            return self._bisect(made, base, report, overhead, validate)
        return self._fitted(made, base, report, overhead)

    def measure(self, batch: Any) -> LayerTimes:
        """Measure the table of layer times alone."""
        made, base, _ = self._choices(batch)
        assert self.timer is not None
        return measured_times(self.model, self.timer, made, base)

    def _choices(self, batch: Any) -> tuple[Choices, QuantizationPlan, LossSensitivityReport]:
        """What can be chosen, the plan with everything quantized that can be, as the model is planned then, and the loss sensitivities."""
        self.model.replan(self.model.everything())
        bits = candidates(self.settings, self.by)
        report = LossSensitivityReport.from_dict(self.agree(self.measure_loss(*bits.measured).to_dict()))
        facts = weight_facts(self.model.quantized, batch, self.forward)
        base = self.model.quantized.plan
        made = choices(
            base,
            self.settings,
            facts,
            report,
            float_bytes(self.model.quantized.model),
            bits.weights,
            bits.activations,
            packs_weights(self.settings),
        )
        if not made.groups:
            raise CCOError(
                "budget_settings: no layer is left to choose for: all with weights stay in float, by the recipe's rules or the target's."
            )
        return made, base, report

    def _fitted(self, made: Choices, base: QuantizationPlan, report: LossSensitivityReport, overhead: float) -> BudgetPlan:
        """The plan within the limit; for a size with what its export takes, chosen anew as long as that is other than estimated and there is a better one."""
        tried: list[Choice] = []
        best: tuple[BudgetPlan, Choice, float] | None = None
        slower = 0.0
        while len(tried) < _ROUNDS:
            try:
                choice = self._choose(made, overhead, slower)
            except CCOError:
                if best is not None:
                    break
                if tried or self.by != "size" or self.model.export_bytes is None:
                    raise
                choice = smallest(made)  # its file may have less beside the weights than that of the plan with everything quantized
            if choice in tried:
                break
            tried.append(choice)
            plan = self._planned(made, choice, base, report, overhead)
            late = self._late(made, plan)
            slower += late
            taken = self.model.file_bytes() if self.by == "size" else None
            if taken is None and late <= 0:
                return plan
            if taken is None:
                best = best if self.by == "size" else None
                continue
            overhead += taken - plan.size_bytes
            plan.size_bytes, plan.measured = float(taken), True
            fits = taken <= self.limit * made.float_bytes and late <= 0
            if fits and (best is None or plan.chosen.rise < best[0].chosen.rise):
                best = plan, choice, overhead
        if best is None and self._late(made, plan) > 0:
            assert self.speed is not None
            raise CCOError(too_slow(made, self.speed))
        if best is None:
            least = figure(plan.size_bytes / made.float_bytes, 3)
            raise CCOError(
                f"budget_settings.size: {self.limit:g} can't be reached: the plan that was estimated to be within it takes {least}. "
                f"Write {least} or more."
            )
        if best[0] is not plan:
            self.model.replan(best[0].settings(self.settings))
        return self._placed(best[0], made, *best[1:])

    def _choose(self, made: Choices, overhead: float, slower: float) -> Choice:
        """The best choice, where plans take so many seconds more than was to be expected of their choices."""
        if self.goal != "speed":
            return choose(made, self.goal, self.limit, overhead, self._also(made, slower))
        assert made.speed is not None
        allowed = made.speed.float_seconds / self.limit - slower
        return choose(made, self.goal, made.speed.float_seconds / allowed if allowed > 0 else 1e9, overhead)

    def _also(self, made: Choices, slower: float = 0.0) -> list[Limit]:
        """The limit of a speed beside another goal."""
        if self.speed is None or self.goal == "speed":
            return []
        measure, most = limit_of(made, "speed", self.speed)
        return [(measure, most - slower)]

    def _late(self, made: Choices, plan: BudgetPlan) -> float:
        """By how many seconds a plan misses the speed that it must have; 0 if it does not."""
        if self.speed is None or made.speed is None:
            return 0.0
        return max(0.0, plan.seconds - made.speed.float_seconds / self.speed * (1 + 1e-9))

    def _planned(self, made: Choices, choice: Choice, base: QuantizationPlan, report: LossSensitivityReport, overhead: float) -> BudgetPlan:
        """The plan of a choice; the model is planned so."""
        bits = {spec.layer: spec.num_bits for spec in base.tensors.values()}
        rules = rules_of(made, choice, budget_rules(base.settings), bits)
        plan = BudgetPlan(
            self.goal,
            self.limit,
            layer_choices(made, choice, self.by),
            {str(key): count for key, count in choice.tensors.items()},
            rules,
            point_of(made, choice, overhead, "chosen"),
            [],
            [],
            report.loss,
            float_bytes=made.float_bytes,
        )
        plan.rules = self.agree(plan.rules)
        self.model.replan(plan.settings(self.settings))
        measure, fixed, _ = measures(made, overhead)["size"]
        plan.size_bytes = taken_of(choice, measure) + fixed
        plan.by, plan.speed_limit, plan.times, plan.model = self.by, self.speed, self.times, made.speed
        if made.speed is not None:
            plan.seconds, plan.float_seconds = seconds_of_plan(made.speed, self.model.quantized.plan), made.speed.float_seconds
        return self._placed(plan, made, choice, overhead)

    def _placed(self, plan: BudgetPlan, made: Choices, choice: Choice, overhead: float) -> BudgetPlan:
        plan.chosen = point_of(made, choice, overhead, "chosen")
        if made.speed is not None:
            plan.chosen = replace(plan.chosen, speed=plan.float_seconds / max(1e-12, plan.seconds))
        plan.curve, plan.speed_curve, plan.size_curve = self._curves(made, overhead)
        plan.uniform = uniform_points(made, overhead)
        return plan

    def _curves(self, made: Choices, overhead: float) -> tuple[list[Point], list[Point], list[Point]]:
        """The best plans at other limits of what is counted, at other speeds, and at other sizes where speeds are counted; the same for all choices."""
        known = self._known_curves
        if known is None or known[0] != overhead:
            timed_alone = [] if made.speed is None else [point for _, point in trade_off(timed(made), "speed", overhead)]
            others = [] if self.by == "speed" else [point for _, point in trade_off(made, self.by, overhead)]
            sizes = [point for _, point in trade_off(made, "size", overhead)] if self.by == "speed" else []
            known = self._known_curves = overhead, (timed_alone if self.by == "speed" else others, timed_alone, sizes)
        return known[1]

    def _bisect(
        self, made: Choices, base: QuantizationPlan, report: LossSensitivityReport, overhead: float, validate: Callable[[BudgetPlan], float]
    ) -> BudgetPlan:
        """The smallest plan of the trade-off, or the fastest, that loses no more than is allowed."""
        points = trade_off(made, self.by, overhead, also=self._also(made))
        if not points and self.speed is not None:
            raise CCOError(too_slow(made, self.speed))
        tried: dict[str, float] = {}
        low, high, best = 0, len(points) - 1, None
        while low <= high:
            middle = (low + high) // 2
            plan = self._planned(made, points[middle][0], base, report, overhead)
            lost = float(self.agree(validate(plan)))
            tried[f"{getattr(plan.chosen, self.by):.4f}"] = lost
            if lost <= self.limit:
                best, high = middle, middle - 1
            else:
                low = middle + 1
        if best is None:
            found = ", ".join(f"{lost:.4g} at {self.by} {at}" for at, lost in tried.items())
            raise CCOError(
                f"budget_settings.accuracy_drop: no plan loses at most {self.limit:g}: {found}. "
                "Allow more, or train first and set a budget then."
            )
        plan = self._planned(made, points[best][0], base, report, overhead)
        plan.metric = tried
        taken = self.model.file_bytes()
        if taken is not None:
            overhead += taken - plan.size_bytes
            plan.size_bytes, plan.measured = float(taken), True
            plan = self._placed(plan, made, points[best][0], overhead)
        return plan
