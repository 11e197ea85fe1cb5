"""From a budget to a plan: measure, choose, look what the export of it takes, and choose again if that is more."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from lightning_cco.budget.facts import float_bytes, weight_facts
from lightning_cco.budget.options import Choices, choices, tail_rules
from lightning_cco.budget.plan import (
    BudgetPlan,
    as_planned,
    budget_rules,
    choose,
    goal_of,
    layer_choices,
    measures,
    point_of,
    rules_of,
    smallest,
    trade_off,
    uniform_points,
)
from lightning_cco.budget.solver import Choice, need_scipy, taken_of
from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.figures import figure
from lightning_cco.loss_sensitivity import LossSensitivityReport
from lightning_cco.quantization.forward_call import Forward
from lightning_cco.quantization.model import HookedModel
from lightning_cco.quantization.plan import QuantizationPlan, packs_weights
from lightning_cco.settings import LayerRule, Settings, load_settings

Calibrate = Callable[[Iterable[str]], Any]
"""Finds the ranges of the quantizers with these names."""
_ROUNDS = 3
_NODE_BYTES = 300.0


class BudgetSearch:
    """Finds the plan of a budget for a calibrated model.

    Args:
        quantized: The model, calibrated for the user's own recipe.
        settings: The user's recipe.
        calibrate: Calibrates quantizers that are new.
        measure_loss: Measures the loss sensitivities of the model as it is planned then.
        forward: How a batch goes through the model.
        export_bytes: Exports the model as it is planned then, and says how many bytes that takes; `None`: sizes are reckoned.
        agree: Makes the choice of the first process that of all of them.
    """

    def __init__(
        self,
        quantized: HookedModel,
        settings: Settings,
        calibrate: Calibrate,
        measure_loss: Callable[[], LossSensitivityReport],
        forward: Forward,
        export_bytes: Callable[[], int] | None = None,
        agree: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        need_scipy()
        goal = goal_of(settings.budget_settings)
        if goal is None:
            raise CCOError("budget_settings: a goal was expected, none came. Write one of size, average_bits, bops or accuracy_drop.")
        self.quantized, self.settings, self.calibrate, self.forward = quantized, settings, calibrate, forward
        self.measure_loss, self.export_bytes, self.agree = measure_loss, export_bytes, agree
        self.goal, self.limit = goal
        self.by = "size" if self.goal == "accuracy_drop" else self.goal

    def find(self, batch: Any, validate: Callable[[BudgetPlan], float] | None = None) -> BudgetPlan:
        """Find the plan, and plan the model so.

        Args:
            batch: A batch, for the shapes of the layers.
            validate: For ``accuracy_drop``: what is lost with a plan, once the model is planned so.

        Raises:
            CCOError: No plan is within the budget.
        """
        float_file = self._float_file()
        self._replan(self._everything())
        report = self.agree(self.measure_loss().to_dict())
        report = LossSensitivityReport.from_dict(report)
        facts = weight_facts(self.quantized, batch, self.forward)
        general = self.settings.global_quantization_settings
        weights_bits = (2, 3, 4, 8) if self.by != "size" else (4, 8) if packs_weights(self.settings) else (8,)
        activations_bits = (4, 8) if self.goal == "bops" else (general.activations_num_bits,)
        base = self.quantized.plan
        made = choices(
            base,
            self.settings,
            facts,
            report,
            float_bytes(self.quantized.model),
            weights_bits,
            activations_bits,
            packs_weights(self.settings),
        )
        if not made.groups:
            raise CCOError(
                "budget_settings: no layer is left to choose for: all with weights stay in float, by the recipe's rules or the target's."
            )
        overhead = _NODE_BYTES * len(base.graph)
        made.float_bytes = float(float_file) if float_file is not None else made.float_bytes + overhead
        taken = self._exported() if self.by == "size" else None
        if taken is not None:
            measure, fixed, _ = measures(made, 0.0)["size"]
            overhead = taken - taken_of(as_planned(made, base), measure) - fixed
        if self.goal == "accuracy_drop":
            assert validate is not None
            return self._bisect(made, base, report, overhead, validate)
        return self._fitted(made, base, report, overhead)

    def _fitted(self, made: Choices, base: QuantizationPlan, report: LossSensitivityReport, overhead: float) -> BudgetPlan:
        """The plan within the limit; for a size with what its export takes, chosen anew as long as that is other than reckoned and there is a better one."""
        tried: list[Choice] = []
        best: tuple[BudgetPlan, Choice, float] | None = None
        while len(tried) < _ROUNDS:
            try:
                choice = choose(made, self.goal, self.limit, overhead)
            except CCOError:
                if best is not None:
                    break
                if tried or self.by != "size" or self.export_bytes is None:
                    raise
                choice = smallest(made)  # its file may have less beside the weights than that of the plan with everything quantized
            if choice in tried:
                break
            tried.append(choice)
            plan = self._planned(made, choice, base, report, overhead)
            taken = self._exported() if self.by == "size" else None
            if taken is None:
                return plan
            overhead += taken - plan.size_bytes
            plan.size_bytes, plan.measured = float(taken), True
            fits = taken <= self.limit * made.float_bytes
            if fits and (best is None or plan.chosen.rise < best[0].chosen.rise):
                best = plan, choice, overhead
        if best is None:
            least = figure(plan.size_bytes / made.float_bytes, 3)
            raise CCOError(
                f"budget_settings.size: {self.limit:g} can't be reached: the plan that was reckoned to be within it takes {least}. "
                f"Write {least} or more."
            )
        if best[0] is not plan:
            self._replan(best[0].settings(self.settings))
        return self._placed(best[0], made, *best[1:])

    def _float_file(self) -> int | None:
        """Bytes of the file with nothing quantized."""
        if self.by != "size" or self.export_bytes is None:
            return None
        quantized, settings = self.quantized, load_settings(self.settings)
        before = quantized.settings, quantized.plan.suggestions, quantized.activations, quantized.weights
        settings.layer_settings = [LayerRule(skip_quantization=True, match="*", by="budget")]
        try:
            quantized.replan(settings)
            return self._exported()
        finally:
            quantized._activations, quantized.weights = before[2:]
            quantized.replan(*before[:2])

    def _everything(self) -> Settings:
        """The recipe with everything quantized that can be, the tail included."""
        whole = load_settings(self.settings)
        whole.layer_settings = [rule for rule in whole.layer_settings if rule.by != "budget"]
        whole.layer_settings += tail_rules(self.quantized.plan, self.settings)
        whole.global_quantization_settings.skip_tail_quantization = False
        return whole

    def _replan(self, settings: Settings) -> None:
        new = self.quantized.replan(settings, self.quantized.plan.suggestions)
        if new:
            self.calibrate(new)

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
        self._replan(plan.settings(self.settings))
        measure, fixed, _ = measures(made, overhead)["size"]
        plan.size_bytes = taken_of(choice, measure) + fixed
        return self._placed(plan, made, choice, overhead)

    def _placed(self, plan: BudgetPlan, made: Choices, choice: Choice, overhead: float) -> BudgetPlan:
        plan.chosen = point_of(made, choice, overhead, "chosen")
        plan.curve = [point for _, point in trade_off(made, self.by, overhead)]
        plan.uniform = uniform_points(made, overhead)
        return plan

    def _exported(self) -> int | None:
        """Bytes of the file of the model as it is planned now."""
        if self.export_bytes is None:
            return None
        taken, problem = 0, ""
        try:
            taken = self.export_bytes()
        except CCOError as error:
            problem = str(error)
        taken, problem = self.agree((taken, problem))
        if problem:
            warnings.warn(
                f"budget_settings.size: the export that was to measure the file failed, so its size is reckoned: {problem}",
                CCOWarning,
                stacklevel=3,
            )
            self.export_bytes = None
            return None
        return int(taken)

    def _bisect(
        self, made: Choices, base: QuantizationPlan, report: LossSensitivityReport, overhead: float, validate: Callable[[BudgetPlan], float]
    ) -> BudgetPlan:
        """The smallest plan of the trade-off that loses no more than is allowed."""
        points = trade_off(made, "size", overhead)
        tried: dict[str, float] = {}
        low, high, best = 0, len(points) - 1, None
        while low <= high:
            middle = (low + high) // 2
            plan = self._planned(made, points[middle][0], base, report, overhead)
            lost = float(self.agree(validate(plan)))
            tried[f"{plan.chosen.size:.4f}"] = lost
            if lost <= self.limit:
                best, high = middle, middle - 1
            else:
                low = middle + 1
        if best is None:
            found = ", ".join(f"{lost:.4g} at size {size}" for size, lost in tried.items())
            raise CCOError(
                f"budget_settings.accuracy_drop: no plan loses at most {self.limit:g}: {found}. "
                "Allow more, or train first and set a budget then."
            )
        plan = self._planned(made, points[best][0], base, report, overhead)
        plan.metric = tried
        taken = self._exported()
        if taken is not None:
            overhead += taken - plan.size_bytes
            plan.size_bytes, plan.measured = float(taken), True
            plan = self._placed(plan, made, points[best][0], overhead)
        return plan
