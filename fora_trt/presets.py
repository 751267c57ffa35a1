"""Schedules for models that nobody calibrated, and how far they were measured.

The order, the exponent of `dense` and the limits follow from benchmarks/results/presets_*.json: the digits model with
10 to 50 steps of DDIM, DPM-Solver++ and DDPM, at guidance 1.5 and 4. A forecast whose full steps stand closer together
towards the end comes closer to no caching than FORA with as many full steps wherever there are at least
`FEWEST_FULL_STEPS` and the scheduler adds no noise. At FORA's own positions it loses to FORA where steps are few or
guidance is strong. With noise at each step the same full steps without a forecast are closest.
"""

from __future__ import annotations

from fora_trt.schedule import EVERY, Schedule, fora_text, text_with_forecast, with_forecast

DEFAULT_INTERVAL = 3
"""Cache interval where neither an interval nor a schedule is given."""

USUAL_ORDER = 2
"""Forecast order of `preset`."""

FEWEST_STEPS, FEWEST_FULL_STEPS = 10, 6
"""The smallest numbers of steps and of full steps at which a forecast was measured to gain."""

FEWEST_STEPS_AS_FORA, STRONGEST_GUIDANCE_AS_FORA = 30, 2.0
"""The same for a forecast at FORA's positions, and the largest guidance scale."""


def preset(cache_interval: int = DEFAULT_INTERVAL, order: int = USUAL_ORDER) -> str:
    """Text form of a forecast with as many full steps as FORA has at this interval, denser towards the end."""
    return text_with_forecast(f"dense:{EVERY}={cache_interval}", order)


def usual_text(cache_interval: int | None = None, order: int | None = None) -> str:
    """Text form of the schedule where none is given, but perhaps an interval or a forecast order.

    An interval is one of FORA, whose positions a forecast keeps. A forecast order alone stands for `preset`.
    """
    if cache_interval is None and order:
        return preset(order=order)
    return with_forecast(fora_text(DEFAULT_INTERVAL if cache_interval is None else cache_interval), order)


def doubt_of(schedule: Schedule, guidance_scale: float, adds_noise: bool) -> str | None:
    """A sentence on a forecast outside of what was measured to gain; None for FORA, calibrated schedules and others.

    `adds_noise` says whether the scheduler adds noise at each step.
    """
    if schedule.depth == 1 or schedule.made_from:
        return None
    remedy = "fora-trt calibrate finds a schedule for this model"
    if adds_noise:
        return (
            f"{schedule.text} forecasts, but the scheduler adds noise at each step, which a forecast cannot foresee; "
            f"--schedule dense:{schedule.full_steps} without a forecast was measured to be closer; {remedy}"
        )
    if schedule.steps < FEWEST_STEPS or schedule.full_steps < FEWEST_FULL_STEPS:
        return (
            f"{schedule.text} forecasts with {schedule.full_steps} full steps of {schedule.steps}; with fewer than "
            f"{FEWEST_FULL_STEPS} of {FEWEST_STEPS} a forecast was not measured to be closer than FORA; {remedy}"
        )
    strong = guidance_scale > STRONGEST_GUIDANCE_AS_FORA
    if not _is_denser_towards_the_end(schedule) and (schedule.steps < FEWEST_STEPS_AS_FORA or strong):
        why = f"at a guidance scale above {STRONGEST_GUIDANCE_AS_FORA:g}" if strong else "with few steps"
        better = text_with_forecast(f"dense:{schedule.full_steps}", schedule.depth - 1)
        return (
            f"{schedule.text} forecasts at equal distances, which can be worse than FORA {why}; "
            f"--schedule {better} takes as long; {remedy}"
        )
    return None


def _is_denser_towards_the_end(schedule: Schedule) -> bool:
    middle = schedule.steps // 2
    return sum(schedule.full[middle:]) >= sum(schedule.full[:middle]) + 2
