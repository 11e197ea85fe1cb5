"""From a budget to a plan: measure, choose, look what the export of it takes, and choose again if that is more."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol

from lightning_cco.budget.facts import float_bytes, weight_facts
from lightning_cco.budget.layer_times import LayerTimes, from_plain, processor_name
from lightning_cco.budget.option import FLOAT, INTEGER, WEIGHT_ONLY, Option
from lightning_cco.budget.options import Choices, choices, tail_rules
from lightning_cco.budget.plan import (
    BudgetPlan,
    Point,
    as_planned,
    budget_rules,
    choose,
    goal_of,
    layer_choices,
    limit_of,
    measures,
    point_of,
    rules_of,
    smallest,
    too_slow,
    trade_off,
    uniform_points,
)
from lightning_cco.budget.solver import Choice, Limit, need_scipy, taken_of
from lightning_cco.budget.units import Probe, Times, layer_times, seconds_of_plan, speed_model, timed
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


class LayerTimer(Protocol):
    """Exports the model as it is planned, several times, and measures all of the files by turns.

    Attributes:
        engine: Name and version of what it measures in.
        threads: Threads of it.
        inputs: Shapes of the inputs, once it has measured.
    """

    engine: str
    threads: int
    inputs: list[list[int]]

    def export(self, name: str) -> None:
        """Write the model as it is planned now."""
        ...

    def times(self) -> dict[str, Times]:
        """Measure what was written, by name."""
        ...


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
        timer: Measures what layers take; `None`: nothing is measured.
        times: What was measured before, which is then taken.
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
        timer: LayerTimer | None = None,
        times: LayerTimes | None = None,
    ) -> None:
        need_scipy()
        goal = goal_of(settings.budget_settings)
        if goal is None:
            raise CCOError(
                "budget_settings: a goal was expected, none came. Write one of size, average_bits, bops, accuracy_drop or speed."
            )
        self._known_curves: tuple[float, tuple[list[Point], list[Point], list[Point]]] | None = None
        self.timer, self.times, self.speed = timer, times, settings.budget_settings.speed
        self.quantized, self.settings, self.calibrate, self.forward = quantized, settings, calibrate, forward
        self.measure_loss, self.export_bytes, self.agree = measure_loss, export_bytes, agree
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
        float_file = self._float_file()
        made, base, report = self._choices(batch)
        if self.times is None and self.timer is not None and (self.speed is not None or self.by == "speed"):
            self.times = self._measured(made, base)
        if self.times is not None:
            made.speed = speed_model(made, base, self.times)
            if self.speed is not None or self.by == "speed":
                made = timed(made)
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

    def measure(self, batch: Any) -> LayerTimes:
        """Measure the table of layer times alone."""
        made, base, _ = self._choices(batch)
        return self._measured(made, base)

    def _choices(self, batch: Any) -> tuple[Choices, QuantizationPlan, LossSensitivityReport]:
        """What can be chosen, the plan with everything quantized that can be, as the model is planned then, and the loss sensitivities."""
        self.replan(self._everything())
        report = LossSensitivityReport.from_dict(self.agree(self.measure_loss().to_dict()))
        facts = weight_facts(self.quantized, batch, self.forward)
        general = self.settings.global_quantization_settings
        of_files = (4, 8) if packs_weights(self.settings) else (8,)
        weights_bits = of_files if self.by in ("size", "speed") else (2, 3, 4, 8)
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
        return made, base, report

    def _fitted(self, made: Choices, base: QuantizationPlan, report: LossSensitivityReport, overhead: float) -> BudgetPlan:
        """The plan within the limit; for a size with what its export takes, chosen anew as long as that is other than reckoned and there is a better one."""
        tried: list[Choice] = []
        best: tuple[BudgetPlan, Choice, float] | None = None
        slower = 0.0
        while len(tried) < _ROUNDS:
            try:
                choice = self._choose(made, overhead, slower)
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
            late = self._late(made, plan)
            slower += late
            taken = self._exported() if self.by == "size" else None
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
                f"budget_settings.size: {self.limit:g} can't be reached: the plan that was reckoned to be within it takes {least}. "
                f"Write {least} or more."
            )
        if best[0] is not plan:
            self.replan(best[0].settings(self.settings))
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

    def _measured(self, made: Choices, base: QuantizationPlan) -> LayerTimes:
        """The table of layer times: the model exported in float, in integers, mixed in both ways, and in 4 bits where these are stored so."""
        assert self.timer is not None
        plans = {"float": self.quantized.plan}
        wanted = {"float": self.plain(made, base, None)}
        for name, options in _probes(made, packs_weights(self.settings)).items():
            wanted[name] = self.plain(made, base, Choice(options, {}))
        problem, raw = "", None
        for name, planned in wanted.items():
            self.replan(planned)
            plans[name] = self.quantized.plan
            if not problem:
                try:
                    self.timer.export(name)
                except CCOError as error:
                    problem = str(error)
        self.replan(base.settings)
        if not problem:
            try:
                taken = self.timer.times()
                probes = [Probe(name, plans[name], taken[name]) for name in wanted if name in taken]
                raw = (
                    layer_times(made, base, probes, self.timer.engine, processor_name(), self.timer.threads, self.timer.inputs)
                    if probes
                    else None
                )
            except CCOError as error:
                problem = str(error)
        problem, plain = self.agree((problem, None if raw is None else raw.to_plain()))
        if problem:
            raise CCOError(f"budget_settings.speed: the files whose times were to be measured could not be written or run: {problem}")
        return from_plain(plain)

    def plain(self, made: Choices, base: QuantizationPlan, choice: Choice | None) -> Settings:
        """The recipe of a choice; without one, that of the model in float."""
        planned = load_settings(self.settings)
        planned.global_quantization_settings.skip_tail_quantization = False
        if choice is None:
            planned.layer_settings = [LayerRule(skip_quantization=True, match="*", by="budget")]
            return planned
        bits = {spec.layer: spec.num_bits for spec in base.tensors.values()}
        planned.layer_settings = [rule for rule in planned.layer_settings if rule.by != "budget"]
        planned.layer_settings += rules_of(made, choice, budget_rules(base.settings), bits)
        return planned

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

    def replan(self, settings: Settings) -> None:
        """Plan the model by a recipe, and calibrate what is new."""
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
        self.replan(plan.settings(self.settings))
        measure, fixed, _ = measures(made, overhead)["size"]
        plan.size_bytes = taken_of(choice, measure) + fixed
        plan.by, plan.speed_limit, plan.times, plan.model = self.by, self.speed, self.times, made.speed
        if made.speed is not None:
            plan.seconds, plan.float_seconds = seconds_of_plan(made.speed, self.quantized.plan), made.speed.float_seconds
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
        taken = self._exported()
        if taken is not None:
            overhead += taken - plan.size_bytes
            plan.size_bytes, plan.measured = float(taken), True
            plan = self._placed(plan, made, points[best][0], overhead)
        return plan


def _probes(made: Choices, packed: bool) -> dict[str, tuple[Option, ...]]:
    """Options for each group of the files that are measured beside that in float: all in integers, every other one, the others, and all in 4 bits.

    What can have its weights alone in integers has that in the place of float in the mixed files.
    """
    found: dict[str, list[Option]] = {"INT8": [], "every other layer": [], "the others": []}
    narrow: list[Option] = []
    for number, group in enumerate(made.groups):
        wide = [option for option in group.options if not packed or option.weights > 4] or list(group.options)
        by_form = {option.form: option for option in reversed(wide)}
        whole = by_form.get(INTEGER) or by_form.get(WEIGHT_ONLY) or wide[0]
        left = by_form.get(WEIGHT_ONLY) or by_form.get(FLOAT) or whole
        found["INT8"].append(whole)
        found["every other layer"].append(left if number % 2 else whole)
        found["the others"].append(whole if number % 2 else left)
        narrow.append(next((option for option in group.options if packed and option.weights <= 4), whole))
    distinct: dict[tuple[Option, ...], str] = {}
    for name, options in [*found.items(), ("4 bits", narrow)]:
        distinct.setdefault(tuple(options), name)
    return {name: options for options, name in distinct.items()}
